"""Similarity of images by their embeddings: an adapted metric, and nearest-neighbour search.

Images of one split that look alike under different patients (copies, and empty films) are a
separate problem, and must not influence the threshold for images of `test`: a single duplicate film
in `train` would hide every copy in `test`.
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
    "find_alike",
    "find_lookalikes",
    "find_nearest",
    "find_nearest_groups",
    "whiten",
]

# The smallest ridge. Measured with the demo encoder on copies of 150 synthetic and 63 real
# radiographs, compared with columns that are only scaled: as JPEG at quality 50, 148 (scaled: 124)
# and 63 (63) are found; brightened by 15 %, 91 (14) and 63 (46); cropped by 2 %, 2 (3) and 45 (28).
RIDGE = 0.1
# A block of similarities is 2048 x 8192 float32, 64 MiB, and its mask 16 MiB.
QUERY_ROWS, REFERENCE_ROWS = 2048, 8192
DECIMALS = 6  # of a similarity: float32 products of unit vectors vary by less with summation order


def whiten(X: np.ndarray, rounding: float) -> None:
    """Transform the rows of X in place so that the product of two rows is their similarity.

    Columns are centred and divided by their standard deviation; then rows are multiplied by the
    inverse of a Cholesky factor of R + ridge I, where R is the columns' correlation matrix, and
    normalised to length 1. The similarity is thus the cosine in a ridged Mahalanobis metric:
    directions in which images always differ widely, such as region and view, count less. The ridge,
    the larger of d / n and `RIDGE`, keeps directions that n rows do not determine from amplifying
    noise.

    Parameters
    ----------
    X : (n, d) float32
        Finite values. Rows are transformed in blocks; two d x d matrices are held in float64.
    rounding : float
        Columns whose standard deviation relative to their mean is not above this become 0 before
        the product; a row of length 0 stays 0 and resembles no other.
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
    """Return each column's mean and scaling factor, float64, 0 if it is constant."""
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
    """Return each query's nearest reference.

    Additional memory does not grow with the arguments: products are computed in blocks.

    Parameters
    ----------
    queries, references : (k, d), (n, d) float32
        Rows of length 1 or 0, from `whiten`.
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
    """Return the k nearest groups of each query, except its own, by their nearest rows.

    Additional memory does not grow with the arguments: products are computed in blocks.

    Parameters
    ----------
    X : (n, d) float32
        Rows of length 1 or 0, from `whiten`.
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
    """Return the similarity and nearest row of up to k groups of a block sorted by group."""
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
    """Return two merged lists of nearest groups; a group in both keeps only its nearest row."""
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
"""Ranks of the nearest other patients whose distances are compared; look-alikes are detected if
they have fewer patients than such a rank."""
SAME = 0.99999
"""From this similarity on, two embeddings are equal up to the rounding of float16."""
LEAST = 0.85
"""Below this similarity no two images are reported as alike. With the demo encoder, 19 of 20 copies
saved as JPEG at quality 50 or resized are above it, and no two images of different patients among
736 chest films or the demo's own images."""
RATE = 0.01  # at most this share of sets without copies has a pair reported as alike
# Nearest images of real radiographs are distributed as in 35 dimensions (736 chest films) or 24 (64
# films of bones, both with the demo encoder), but with heavier tails, so fewer are assumed. Fewer
# than 8 neighbours do not determine the dimension.
MOST_DIMENSIONS, FEW_DIMENSIONS, FEW_NEIGHBOURS = 16.0, 8.0, 8


@dataclass(frozen=True, eq=False)
class LookAlikes:
    """Images of one split, and their look-alikes among other patients.

    Parameters
    ----------
    pairs : (p, 2) int64
        Rows, the smaller first, each pair once, the most similar first.
    similarity : (p,) float64
        Similarity of each pair.
    usual : (m,) float64
        Each query's similarity to the nearest image of a patient that is no look-alike; -inf if
        all neighbours are look-alikes.
    units : (m,) int64
        Each query's unit: patients whose images look alike form one unit.
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
    """Return the images that look like an image of another patient.

    Parameters
    ----------
    X : (n, d) float32
        Rows from `whiten`.
    groups : (n,) int64
        Patients as numbers from 0.
    queries : (m,) int64
        Rows of X to examine; their neighbours are searched among all rows.
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
    is_alike = find_alike(similarity, n)
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


def find_alike(similarity: np.ndarray, n: int) -> np.ndarray:
    """Return which neighbours are nearer than chance explains.

    Parameters
    ----------
    similarity : (m, k) float64
        Similarity of m images to the nearest image of each of the k nearest other patients,
        descending.
    n : int
        Number of patients in the set.

    Returns
    -------
    (m, k) bool
        True for neighbours that equal the image up to rounding (`SAME`), and for those with a
        similarity of at least `LEAST` whose distance is less than t times that of the 8th, 16th or
        64th neighbour (`NEIGHBOURS`).

    Notes
    -----
    If density is uniform around an image, its distances r_1 < … < r_k to other patients follow
    P(r_1 / r_k < t) <= (k - 1) t^D in D dimensions for any density, so that the density of a region
    or a hospital does not matter. D is estimated from the median ratio of the k-th distance to the
    (k / 4)-th (Facco et al., Scientific Reports 7, 2017, use k = 2), which does not change if every
    image is duplicated. Hence t = (`RATE` / (n (k - 1)))^(1 / D), with `RATE` divided among the
    values of k. A k that covers nearly all patients carries no information on density and is left
    out.
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
    """Return the dimension in which the neighbours are distributed, at most `MOST_DIMENSIONS`."""
    k = distance.shape[1]
    if k < FEW_NEIGHBOURS:
        return FEW_DIMENSIONS
    far, near = distance[:, -1], distance[:, k // 4 - 1]
    ratios = np.divide(far, near, out=np.full(len(far), np.inf), where=near > 0)
    spread = float(np.log(np.median(ratios)))
    return min(MOST_DIMENSIONS, float(np.log(k / (k // 4))) / max(spread, 1e-9))
