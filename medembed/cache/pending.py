"""What a manifest asks for and a cache does not hold yet."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import pandas as pd

from medembed.cache.failures import Failure
from medembed.cache.index import SortedKeys, keys_from_column, prefixes_of
from medembed.cache.spec import hex_from_keys, keys_from_hex
from medembed.cache.store import Cache
from medembed.images.load import Content

__all__ = ["Contents", "Plan", "Worker", "make_plan"]

BLOCK = 4096  # contents that are made at once


@dataclass(frozen=True)
class Worker:
    """One of several processes that share a manifest's contents without talking to each other.

    Parameters
    ----------
    index, count : int
        This one, from 0, of how many.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"worker {self.index} of {self.count}: count from 0 to N - 1")

    def mine(self, keys: np.ndarray) -> np.ndarray:
        """Tell which contents are this worker's, by their SHA-256, (n, 32) uint8: (n,) bool."""
        mine: np.ndarray = prefixes_of(keys) % np.uint64(self.count) == self.index
        return mine


class Contents(Sequence[Content]):
    """Distinct contents of a manifest, in its order, made when they are asked for.

    Parameters
    ----------
    images : Series of str
        The manifest's column.
    keys : (n, 32) uint8
        SHA-256 of each row.
    places : (k,) int
        Row where each content stands first, ascending.
    repeats, originals : (r,) int
        Rows whose content stands earlier too, and where; sorted by the latter.

    Attributes
    ----------
    keys : (k, 32) uint8
        SHA-256 of each content.
    """

    def __init__(
        self,
        images: Any,
        keys: np.ndarray,
        places: np.ndarray,
        repeats: np.ndarray,
        originals: np.ndarray,
    ) -> None:
        self._images, self._every_key, self._places = images, keys, places
        self._repeats, self._originals = repeats, originals

    @property
    def keys(self) -> np.ndarray:  # noqa: D102 (an attribute of the class's docstring)
        keys: np.ndarray = self._every_key[self._places]
        return keys

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Content: ...

    @overload
    def __getitem__(self, index: slice) -> "Contents": ...

    def __getitem__(self, index: int | slice) -> "Content | Contents":
        if isinstance(index, slice):
            return self.at(self._places[index])
        return next(iter(self.at(self._places[[index]])))

    def __iter__(self) -> Iterator[Content]:
        for start in range(0, len(self), BLOCK):
            places = self._places[start : start + BLOCK]
            digests = hex_from_keys(self._every_key[places])
            firsts = self._images.iloc[places].tolist()
            begins = np.searchsorted(self._originals, places, side="left").tolist()
            ends = np.searchsorted(self._originals, places, side="right").tolist()
            for digest, first, begin, end in zip(digests, firsts, begins, ends, strict=True):
                others = self._images.iloc[self._repeats[begin:end]] if end > begin else ()
                yield Content(digest, (first, *others))

    def rows(self) -> np.ndarray:
        """Return all rows with these contents, ascending: (m,) int, m >= k."""
        begins = np.searchsorted(self._originals, self._places, side="left")
        ends = np.searchsorted(self._originals, self._places, side="right")
        spans = [self._repeats[a:b] for a, b in zip(begins, ends, strict=True) if b > a]
        return np.sort(np.concatenate([self._places, *spans]))

    def at(self, places: np.ndarray) -> "Contents":
        """Choose the contents that stand first in these rows, (k,) int."""
        return Contents(self._images, self._every_key, places, self._repeats, self._originals)


@dataclass(frozen=True)
class Plan:
    """Sort the distinct contents of a manifest by what is to be done with them.

    Parameters
    ----------
    n_rows, n_contents, n_already : int
        Rows of the manifest, distinct contents among them, those of these in the cache. With a
        worker, of its share.
    pending : Contents
        To be embedded, in the manifest's order.
    done : Contents
        In the cache already, in the manifest's order.
    known : list of (Content, Failure)
        Known failures that are not tried again.
    """

    n_rows: int
    n_contents: int
    n_already: int
    pending: Contents
    done: Contents
    known: list[tuple[Content, Failure]]


def make_plan(
    rows: pd.DataFrame,
    cache: Cache | None,
    *,
    retry_failed: bool = False,
    worker: Worker | None = None,
) -> Plan:
    """Find what is missing in a cache, or in none; for one worker, in its share of the contents.

    Of a manifest's rows only columns `image` and `sha256` are read, none of the latter empty.
    Contents that failed to decode or embed are not pending unless `retry_failed`: the same bytes
    fail again. Those that could not be read may be readable now, and always are.
    """
    images, keys = rows["image"], keys_from_column(rows["sha256"])
    if worker:
        mine = worker.mine(keys)
        images, keys = images[mine], keys[mine]
    distinct = SortedKeys(keys)
    is_first = np.ones(len(keys), bool)
    is_first[distinct.repeats] = False
    is_done = cache.is_done(keys) if cache else np.zeros(len(keys), bool)
    contents = Contents(
        images, keys, np.flatnonzero(is_first), distinct.repeats, distinct.originals
    )
    n_already = int((is_done & is_first).sum())
    is_pending = is_first & ~is_done
    settled = [] if retry_failed else _settled(distinct, cache)
    is_pending[np.array([place for place, _ in settled], np.int64)] = False
    return Plan(
        n_rows=len(keys),
        n_contents=len(distinct),
        n_already=n_already,
        pending=contents.at(np.flatnonzero(is_pending)),
        done=contents.at(np.flatnonzero(is_first & is_done)),
        known=[(contents.at(np.array([place]))[0], failure) for place, failure in settled],
    )


def _settled(contents: SortedKeys, cache: Cache | None) -> list[tuple[int, Failure]]:
    """Find the contents that failed and will fail again: their row and why, in rows' order."""
    failures = cache.failures() if cache else {}
    again = [failure for failure in failures.values() if failure.stage != "read"]
    places = contents.find(keys_from_hex([failure.sha256 for failure in again]))
    found = [(p, f) for p, f in zip(places.tolist(), again, strict=True) if p >= 0]
    return sorted(found, key=lambda pair: pair[0])
