"""How alike images are by their embeddings: a metric that fits them, and the nearest of many.

Images of one split that look alike under different patients (copies, and films of nothing) are a
problem of their own, and must not decide how alike an image of `test` may be: one film that stands
in `train` twice would hide every copy in `test`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy import linalg
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

__all__ = [
    "NEIGHBOURS",
    "SAME",
    "LookAlikes",
    "find_lookalikes",
    "find_nearest",
    "find_nearest_groups",
    "tell_alike",
    "whiten",
]

# The least ridge. Measured with the demo encoder on copies of 150 synthetic and 63 real
# radiographs, against columns that are only scaled: saved as JPEG at quality 50, 148 (scaled: 124)
# and 63 (63) are found; brightened by 15 %, 91 (14) and 63 (46); cropped by 2 %, 2 (3) and 45 (28).
RIDGE = 0.1
# A block of similarities is 2048 x 8192 float32, 64 MiB, and its mask 16 MiB.
QUERY_ROWS, REFERENCE_ROWS = 2048, 8192
DECIMALS = 6  # of a similarity: float32 products of unit vectors differ by less, by order of sums


def whiten(X: np.ndarray, rounding: float) -> None:
    """Map the rows of X so that the product of two is their similarity, in place.

    Columns are centred and divided by their standard deviation; then rows are multiplied with the
    inverse of a Cholesky factor of R + ridge I, R being the columns' correlations, and brought to
    length 1. So the similarity is the cosine in Mahalanobis' metric, ridged: directions in which
    images differ much anyway, such as region and view, count less. The ridge, d / n and `RIDGE` at
    the least, keeps directions that n rows can tell nothing of from being noise made large.

    Parameters
    ----------
    X : (n, d) float32
        Finite. Rows are mapped in blocks; d x d numbers are held twice, in float64.
    rounding : float
        Columns whose standard deviation is not above this, relative to their mean, become 0 before
        the product; so does a row without length, which is then like no other.
    """
    mean, scale = _scaling(X, rounding)
    products = np.zeros((X.shape[1], X.shape[1]))
    for part in _parts(len(X), QUERY_ROWS):
        X[part] = (X[part] - mean) * scale
        products += X[part].T @ X[part]  # float32 in a block, float64 over blocks
    ridge = max(RIDGE, X.shape[1] / max(1, len(X)))
    ridged = products / max(1, len(X)) + ridge * np.eye(X.shape[1])
    factor = linalg.cholesky(ridged, lower=True, overwrite_a=True)
    inverse = linalg.solve_triangular(factor, np.eye(X.shape[1]), lower=True, overwrite_b=True)
    towards = inverse.T.astype(np.float32)
    for part in _parts(len(X), QUERY_ROWS):
        block = (X[part] @ towards).astype(np.float64)
        length = np.linalg.norm(block, axis=1, keepdims=True)
        X[part] = block / np.where(length > 0, length, 1.0)


def _scaling(X: np.ndarray, rounding: float) -> tuple[np.ndarray, np.ndarray]:
    """Return each column's mean and what to multiply it with: float64, 0 where it is constant."""
    mean, squares = np.zeros(X.shape[1]), np.zeros(X.shape[1])
    for part in _parts(len(X), QUERY_ROWS):
        mean += X[part].sum(axis=0, dtype=np.float64) / len(X)
    for part in _parts(len(X), QUERY_ROWS):
        squares += np.square(X[part] - mean).sum(axis=0)
    deviation = np.sqrt(squares / max(1, len(X)))
    varies = deviation > rounding * np.abs(mean)
    return mean, np.divide(1.0, deviation, out=np.zeros_like(deviation), where=varies)


def find_nearest(
    queries: np.ndarray,
    references: np.ndarray,
    *,
    tick: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Find each query's nearest reference.

    Memory beyond the arguments does not grow with them: products are made in blocks.

    Parameters
    ----------
    queries, references : (k, d), (n, d) float32
        Rows of length 1, or 0, as `whiten` makes them.
    tick : callable, optional
        Called as tick(m) when m more queries are done.

    Returns
    -------
    similarity : (k,) float64
        Cosine, in [-1, 1], to 6 decimals; -inf without a reference.
    nearest : (k,) int64
        Row of references; 0 without one.
    """
    similarity = np.full(len(queries), -np.inf)
    nearest = np.zeros(len(queries), np.int64)
    for part in _parts(len(queries), QUERY_ROWS):
        for others in _parts(len(references), REFERENCE_ROWS):
            alike = queries[part] @ references[others].T
            best = alike.argmax(axis=1)
            value = alike[np.arange(len(alike)), best].astype(np.float64).round(DECIMALS)
            better = value > similarity[part]
            similarity[part] = np.where(better, value, similarity[part])
            nearest[part] = np.where(better, best + others.start, nearest[part])
        if tick:
            tick(part.stop - part.start)
    return np.minimum(similarity, 1.0), nearest


def find_nearest_groups(
    X: np.ndarray,
    groups: np.ndarray,
    queries: np.ndarray,
    k: int,
    *,
    tick: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k groups that are nearest to each query, its own left out, by their nearest rows.

    Memory beyond the arguments does not grow with them: products are made in blocks.

    Parameters
    ----------
    X : (n, d) float32
        Rows of length 1, or 0, as `whiten` makes them.
    groups : (n,) int64
        Each row's group.
    queries : (m,) int64
        Rows of X.
    k : int
        From 1 up to the number of groups less one.
    tick : callable, optional
        Called as tick(m) when m more queries are done.

    Returns
    -------
    similarity : (m, k) float64
        Cosine, in [-1, 1], to 6 decimals; descending.
    nearest : (m, k) int64
        Rows of X.
    """
    order = np.argsort(groups, kind="stable")
    similarity = np.full((len(queries), k), -np.inf)
    nearest = np.zeros((len(queries), k), np.int64)
    for part in _parts(len(queries), QUERY_ROWS):
        best, rows = similarity[part], nearest[part]
        for others in _parts(len(X), REFERENCE_ROWS):
            found = _nearest_of_groups(X, groups, queries[part], order[others], k)
            best, rows = _keep_nearest((best, rows), found, groups, k)
        similarity[part], nearest[part] = best, rows
        if tick:
            tick(part.stop - part.start)
    return np.minimum(similarity, 1.0), nearest


def _nearest_of_groups(
    X: np.ndarray, groups: np.ndarray, queries: np.ndarray, block: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return up to k groups of a block that is sorted by group: similarity, and the nearest row."""
    alike = X[queries] @ X[block].T
    alike[groups[queries, None] == groups[block]] = -np.inf
    starts = np.flatnonzero(np.diff(groups[block], prepend=-1))
    values = alike
    if len(starts) < len(block):
        values = np.maximum.reduceat(alike, starts, axis=1)
    chosen = np.argpartition(-values, min(k, values.shape[1]) - 1, axis=1)[:, :k]
    values = np.take_along_axis(values, chosen, axis=1)
    ends = np.append(starts[1:], len(block))
    places = starts[chosen]
    for ahead in range(1, int((ends - starts).max())):  # where in its group the nearest row stands
        further = np.minimum(starts[chosen] + ahead, ends[chosen] - 1)
        is_there = np.take_along_axis(alike, further, axis=1) == values
        is_there &= np.take_along_axis(alike, places, axis=1) != values
        places = np.where(is_there, further, places)
    return values.astype(np.float64).round(DECIMALS), block[places]


def _keep_nearest(
    kept: tuple[np.ndarray, np.ndarray],
    found: tuple[np.ndarray, np.ndarray],
    groups: np.ndarray,
    k: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Merge two lists of nearest groups; one that is in both counts once, by its nearest row."""
    values, rows = (np.hstack(pair) for pair in zip(kept, found, strict=True))
    first = np.argsort(-values, axis=1, kind="stable")[
        :, : k + 1
    ]  # a block's first may stand twice
    values, rows = (np.take_along_axis(array, first, axis=1) for array in (values, rows))
    named = np.where(np.isfinite(values), groups[rows], -1 - np.arange(values.shape[1]))
    again = np.zeros(values.shape, bool)
    for column in range(1, values.shape[1]):
        again[:, column] = (named[:, :column] == named[:, column, None]).any(axis=1)
    values = np.where(again, -np.inf, values)
    first = np.argsort(-values, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(values, first, axis=1), np.take_along_axis(rows, first, axis=1)


def _parts(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


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
