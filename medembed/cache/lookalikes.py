"""Images of one split that look alike under different patients: copies, and films of nothing.

They are a problem of their own, and they must not decide how alike an image of `test` may be: one
film that stands in `train` twice would hide every copy in `test`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from medembed.cache.likeness import find_nearest_groups

__all__ = ["NEIGHBOURS", "SAME", "LookAlikes", "find_lookalikes", "tell_alike"]

NEIGHBOURS = (8, 16, 64)
"""Nearest other patients that distances are compared with: look-alikes of fewer are told."""
SAME = 0.99999
"""From this similarity on, two embeddings are one up to the rounding of float16."""
LEAST = 0.85
"""Below this similarity no two images are told to look alike: 19 of 20 copies that are saved as
JPEG at quality 50 or resized are above, with the demo encoder, and no two of 736 chest films or of
the demo's own are that belong to different patients."""
RATE = 0.01  # of sets without copies, at most this share has a pair that is told to look alike
# Nearest images of real radiographs lie as in 35 dimensions (736 chest films) or 24 (64 films of
# bones, both with the demo encoder), but with heavier tails: so fewer are taken for granted. So few
# neighbours as below 8 tell nothing of dimensions.
MOST_DIMENSIONS, FEW_DIMENSIONS, FEW_NEIGHBOURS = 16.0, 8.0, 8


@dataclass(frozen=True, eq=False)
class LookAlikes:
    """Images of one split, and which others of other patients look like them.

    Parameters
    ----------
    pairs : (p, 2) int64
        Rows, the smaller first, each pair once, the most alike first.
    similarity : (p,) float64
        Of each pair.
    usual : (m,) float64
        Of each query, to the nearest image of a patient that does not look like it; -inf where
        all neighbours do.
    units : (m,) int64
        Of each query: patients whose images look alike are one.
    """

    pairs: np.ndarray
    similarity: np.ndarray
    usual: np.ndarray
    units: np.ndarray


def find_lookalikes(
    X: np.ndarray,
    groups: np.ndarray,
    queries: np.ndarray,
    tick: Callable[[int], None] | None = None,
) -> LookAlikes:
    """Find the images that look like one of another patient.

    Parameters
    ----------
    X : (n, d) float32
        Rows as `whiten` makes them.
    groups : (n,) int64
        Patients as numbers from 0.
    queries : (m,) int64
        Rows of X that are looked at; their neighbours are looked for among all.
    tick : callable, optional
        Called as tick(m) when m more queries are done.
    """
    n = int(groups.max(initial=-1)) + 1
    k = min(max(NEIGHBOURS), n - 1)
    if k < 1 or not len(queries):
        none = np.empty(0, np.int64)
        units = groups[queries]
        return LookAlikes(
            none.reshape(0, 2), none.astype(float), np.full(len(units), -np.inf), units
        )
    similarity, nearest = find_nearest_groups(X, groups, queries, k, tick=tick)
    is_alike = tell_alike(similarity, n)
    query, place = np.nonzero(is_alike)
    found = np.sort(np.stack([queries[query], nearest[query, place]], axis=1), axis=1)
    pairs, first = np.unique(found.reshape(-1, 2), axis=0, return_index=True)
    values = similarity[query, place][first]
    order = np.argsort(-values, kind="stable")
    edges = (np.ones(len(pairs)), (groups[pairs[:, 0]], groups[pairs[:, 1]]))
    _, unit = connected_components(coo_array(edges, shape=(n, n)), directed=False)
    return LookAlikes(
        pairs=pairs[order],
        similarity=values[order],
        usual=np.where(is_alike, -np.inf, similarity).max(axis=1),
        units=np.asarray(unit[groups[queries]], np.int64),
    )


def tell_alike(similarity: np.ndarray, n: int) -> np.ndarray:
    """Tell which neighbours are so near that chance does not bring images so near.

    Parameters
    ----------
    similarity : (m, k) float64
        Of m images to the nearest image of each of the k nearest other patients, descending.
    n : int
        Patients of the set.

    Returns
    -------
    (m, k) bool
        True for neighbours that are one with the image up to rounding (`SAME`), and for those of
        similarity `LEAST` or more whose distance is less than t times that of the 8th, 16th or
        64th neighbour (`NEIGHBOURS`).

    Notes
    -----
    Where density is even around an image, its distances r_1 < … < r_k to other patients follow
    P(r_1 / r_k < t) <= (k - 1) t^D in D dimensions, whatever the density: it makes no difference
    how dense a region or a hospital is. D is read off the ratio of the k-th to the (k / 4)-th
    distance, by the median (Facco et al., Scientific Reports 7, 2017, do so with k = 2); it stays
    the same where every image stands twice. So t = (`RATE` / (n (k - 1)))^(1 / D), and `RATE` is
    shared among the values of k. One that takes in nearly all patients says nothing of density
    and is left out.
    """
    distance = np.sqrt(np.maximum(0.0, 2.0 - 2.0 * similarity))
    is_near = np.zeros(similarity.shape, bool)
    most = min(similarity.shape[1], n - 1)
    ks = [k for k in NEIGHBOURS if k <= most and 1.25 * k <= n - 1] or [
        min(most, FEW_NEIGHBOURS - 1)
    ]
    for k in ks:
        share = RATE / len(ks) / (n * max(1, k - 1))
        t = share ** (1.0 / _dimensions(distance[:, :k])) if k > 1 else 0.0
        is_near |= distance < t * distance[:, k - 1 : k]
    return np.asarray((similarity >= SAME) | (is_near & (similarity >= LEAST)))


def _dimensions(distance: np.ndarray) -> float:
    """Return in how many dimensions the neighbours lie, at most `MOST_DIMENSIONS`."""
    k = distance.shape[1]
    if k < FEW_NEIGHBOURS:
        return FEW_DIMENSIONS
    far, near = distance[:, -1], distance[:, k // 4 - 1]
    ratios = np.divide(far, near, out=np.full(len(far), np.inf), where=near > 0)
    spread = float(np.log(np.median(ratios)))
    return min(MOST_DIMENSIONS, float(np.log(k / (k // 4))) / max(spread, 1e-9))
