"""Exact nearest neighbours by cosine or Euclidean distance, in blocks of rows.

Products of a block, in float32, only choose candidates; their distances are then computed one by
one in float64. What is found therefore depends neither on the size of the blocks nor on what else
is searched for at the same time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medembed.core.errors import ArgumentError

__all__ = ["METRICS", "Neighbours", "Rows", "counting", "find_neighbours", "measure", "unit_rows"]

METRICS = ("cosine", "euclidean")

#: A block of products is 256 x 8192 float32, 8 MiB; the rows of a block are a few times that.
QUERY_ROWS, BLOCK_ROWS = 256, 8192
#: Candidates beyond k, so that few queries have more rows near the k-th than there is room for.
_SPARE = 32
_LARGE = 1e15  # beyond it squares, or sums of them, may overflow float32
_GATHERED = 1 << 22  # numbers of candidates gathered at once


class Rows(Protocol):
    """What is searched: an array, a memory map, or anything that is indexed like one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, d)."""

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        """Return the rows of a slice, or of an array of indices."""


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The nearest rows of each query, the nearest first.

    Attributes
    ----------
    distance : (m, k) float64
        Euclidean distance, or 1 minus the cosine, in [0, 2]; infinite where there are fewer rows
        than were asked for.
    rows : (m, k) int64
        Indices of rows; -1 where the distance is infinite.
    """

    distance: NDArray[np.float64]
    rows: NDArray[np.int64]


def find_neighbours(
    queries: NDArray[Any],
    rows: Rows,
    k: int,
    *,
    metric: str = "cosine",
    own: NDArray[Any] | None = None,
    groups: NDArray[Any] | None = None,
    rank: NDArray[np.int64] | None = None,
    tick: Callable[[int], None] | None = None,
) -> Neighbours:
    """Return the k nearest rows of each query, except rows of its own group.

    Memory does not grow with the number of rows: they are read in blocks, of any float dtype.

    Parameters
    ----------
    queries : (m, d) float
    rows : (n, d) float
        An array, a memory map, or anything that is indexed like one.
    k : int
        Number of neighbours, at least 1. If there are fewer, the rest is padded.
    metric : {"cosine", "euclidean"}
        The cosine with a vector of zeros is 0.
    own, groups : (m,) and (n,), optional
        Groups of queries and of rows, such as patients: a row whose group is the query's is
        skipped.
    rank : (n,) int64, optional
        Which of several equally near rows comes first, by default the one that stands first.
    tick : callable, optional
        Called as tick(rows) after each block.

    Raises
    ------
    ArgumentError
        `k` or `metric` is out of range, widths differ, or a value is not finite.
    """
    queries = np.asarray(queries)
    n, width = rows.shape
    if metric not in METRICS:
        raise ArgumentError(f"metric={metric!r} is unknown; it is one of {', '.join(METRICS)}")
    if k < 1:
        raise ArgumentError(f"{k} neighbours were asked for; ask for at least 1")
    if queries.ndim != 2 or queries.shape[1] != width:
        raise ArgumentError(f"queries of shape {queries.shape} do not fit rows of {width} columns")
    _require_finite(queries, "query", 0)
    rank = np.arange(n) if rank is None else rank
    found = Neighbours(np.full((len(queries), k), np.inf), np.full((len(queries), k), -1, np.int64))
    for part in _parts(len(queries), QUERY_ROWS):
        search = _Search(queries[part], rows, min(k, n), metric, rank)
        excluded = None if own is None or groups is None else (own[part], groups)
        search.run(excluded, tick)
        found.distance[part, : search.k] = search.distance
        found.rows[part, : search.k] = search.rows
    return found


def measure(a: NDArray[Any], b: NDArray[Any], metric: str) -> NDArray[np.float64]:
    """Return distances of vectors, pair by pair and in float64: (...) for two of (..., d)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    if metric == "euclidean":
        gap = a - b
        return np.asarray(np.sqrt(np.einsum("...i,...i->...", gap, gap)))
    squares = np.einsum("...i,...i->...", a, a) * np.einsum("...i,...i->...", b, b)
    product = np.einsum("...i,...i->...", a, b)
    cosine = np.divide(product, np.sqrt(squares), out=np.zeros_like(squares), where=squares > 0)
    return np.asarray(1.0 - np.clip(cosine, -1.0, 1.0))


def unit_rows(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return rows (n, d) scaled to length 1, as float32; rows of zeros stay zero.

    Raises
    ------
    ArgumentError
        A value is not finite.
    """
    return np.asarray(_prepare(values, "cosine", 0)[0], np.float32)


class _Search:
    """The search for a few queries: candidates of each block, then their exact distances."""

    def __init__(
        self, queries: NDArray[Any], rows: Rows, k: int, metric: str, rank: NDArray[np.int64]
    ) -> None:
        self.queries, self.table, self.k, self.metric = queries, rows, k, metric
        self.rank = rank
        self.distance = np.full((len(queries), k), np.inf)
        self.rows = np.full((len(queries), k), -1, np.int64)
        self._scaled = _prepare(queries, metric)[0]
        self._room = min(rows.shape[0], 2 * k + _SPARE)
        self._largest = 0.0  # squared length, over all rows

    def run(self, excluded: tuple[NDArray[Any], NDArray[Any]] | None, tick: Any) -> None:
        n, m = self.table.shape[0], len(self.queries)
        score = np.full((m, self._room), -np.inf)
        place = np.full((m, self._room), -1, np.int64)
        for block in _parts(n, BLOCK_ROWS):
            own = self._score(block)
            if excluded is not None:
                own[excluded[0][:, None] == excluded[1][block]] = -np.inf
            here = np.broadcast_to(np.arange(block.start, block.stop), own.shape)
            score, place = _keep_best(score, place, own, here, self._room)
            if tick:
                tick(block.stop - block.start)
        if not self.k:
            return
        place[np.isneginf(score)] = -1
        least = np.partition(score, -self.k, axis=1)[:, -self.k] - 2 * self._tolerance()
        # The weakest candidate is near enough to be a neighbour: so may be others, without room.
        is_full = (score.min(axis=1) >= least) & np.isfinite(least) & (self._room < n)
        place[score < least[:, None]] = -1
        for few in _parts(m, max(1, _GATHERED // (self._room * self.table.shape[1] + 1))):
            self._settle(np.arange(few.start, few.stop), place[few])
        for query in np.flatnonzero(is_full).tolist():
            self._search_all(query, excluded)

    def _score(self, block: slice) -> NDArray[Any]:
        """Return scores (m, rows of the block), the nearest the highest."""
        values = np.asarray(self.table[block])
        scaled, squares = _prepare(values, self.metric, block.start)
        self._largest = max(self._largest, float(squares.max(initial=0.0)))
        product = self._scaled.astype(scaled.dtype, copy=False) @ scaled.T
        if self.metric == "cosine":
            return np.asarray(product)
        return np.asarray(2 * product - squares.astype(product.dtype))

    def _tolerance(self) -> NDArray[np.float64]:
        """Return how far float32 may be from the score, per query.

        Errors of d rounded terms add up as a random walk does, a few times sqrt(d) units; the
        bound is several times that.
        """
        unit = 8 * np.sqrt(self.table.shape[1]) * float(np.finfo(np.float32).eps)
        if self.metric == "cosine":
            return np.full(len(self.queries), unit)
        squares = np.square(self.queries.astype(np.float64)).sum(axis=1)
        return np.asarray(unit * (squares + self._largest))

    def _settle(self, queries: NDArray[np.int64], place: NDArray[np.int64]) -> None:
        """Sort candidates (q, room), -1 for none, by their exact distance; keep the nearest."""
        known = place >= 0
        # Unknown places read row 0, which costs nothing and is then left out.
        values = self.table[np.where(known, place, 0).ravel()].reshape(*place.shape, -1)
        distance = measure(self.queries[queries, None], values, self.metric)
        distance[~known] = np.inf
        order = np.lexsort((self.rank[place], distance))[:, : self.k]
        self.distance[queries] = np.take_along_axis(distance, order, axis=1)
        self.rows[queries] = np.take_along_axis(place, order, axis=1)

    def _search_all(self, query: int, excluded: Any) -> None:
        """Compute every exact distance of a query; for rows of which many are equally near."""
        distance, place = np.empty(0), np.empty(0, np.int64)
        for block in _parts(self.table.shape[0], BLOCK_ROWS):
            here = np.arange(block.start, block.stop)
            own = measure(self.queries[query], np.asarray(self.table[block]), self.metric)
            if excluded is not None:
                is_other = excluded[1][block] != excluded[0][query]
                own, here = own[is_other], here[is_other]
            distance, place = np.append(distance, own), np.append(place, here)
            order = np.lexsort((self.rank[place], distance))[: self.k]
            distance, place = distance[order], place[order]
        self.distance[query, : len(distance)] = distance
        self.rows[query, : len(place)] = place


def _prepare(
    values: NDArray[Any], metric: str, start: int | None = None
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return vectors as they are multiplied, of length 1 or 0 for the cosine, and their squares.

    The vectors are float32, or float64 where their squares may overflow.
    """
    with np.errstate(over="ignore"):
        narrow: NDArray[Any] = values.astype(np.float32)
        squares = np.einsum("ij,ij->i", narrow, narrow).astype(np.float64)
    if not np.isfinite(squares).all() or squares.max(initial=0.0) > _LARGE:
        _require_finite(values, "query" if start is None else "row", start or 0)
        narrow = values.astype(np.float64)
        squares = np.einsum("ij,ij->i", narrow, narrow)
    elif metric == "cosine" and (squares < 1.0 / _LARGE).any():
        narrow = values.astype(np.float64)
        squares = np.einsum("ij,ij->i", narrow, narrow)
    if metric == "cosine":
        length = np.sqrt(squares)
        narrow = narrow / np.where(length > 0, length, 1.0)[:, None].astype(narrow.dtype)
        return narrow.astype(np.float32), squares
    return narrow, squares


def _require_finite(values: NDArray[Any], what: str, start: int) -> None:
    broken = ~np.isfinite(values).all(axis=1)
    if broken.any():
        place = start + int(broken.argmax())
        raise ArgumentError(
            f"{what} {place} holds a value that is not a finite number: nothing is near it"
        )


def _keep_best(
    score: NDArray[Any],
    place: NDArray[np.int64],
    more: NDArray[Any],
    more_place: NDArray[np.int64],
    room: int,
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the `room` best of two lists of candidates, in no order."""
    if more.shape[1] > room:
        best = np.argpartition(more, -room, axis=1)[:, -room:]
        more = np.take_along_axis(more, best, axis=1)
        more_place = np.take_along_axis(more_place, best, axis=1)
    score = np.hstack([score, more.astype(np.float64)])
    place = np.hstack([place, more_place])
    best = np.argpartition(score, score.shape[1] - room, axis=1)[:, score.shape[1] - room :]
    return np.take_along_axis(score, best, axis=1), np.take_along_axis(place, best, axis=1)


def _parts(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def counting(
    progress: Callable[[int, int], None] | None, total: int
) -> Callable[[int], None] | None:
    """Return a function that adds up increments and calls `progress(done, total)`."""
    if progress is None:
        return None
    done = 0

    def tick(n: int) -> None:
        nonlocal done
        done += n
        progress(done, total)

    return tick
