"""The contents of a manifest that a cache does not hold yet."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import pandas as pd

from medembed.cache.failures import Failure
from medembed.cache.index import SortedKeys, keys_from_column, prefixes_of
from medembed.cache.spec import hex_from_keys, keys_from_hex
from medembed.cache.store import Cache
from medembed.core.errors import MedembedError
from medembed.images.load import Content

__all__ = ["LAUNCHERS", "Contents", "Plan", "Worker", "find_worker", "make_plan", "parse_worker"]

BLOCK = 4096  # contents created at once
# Index and number of workers, by launcher: torchrun, `srun`, a SLURM array that counts from 0.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
)


@dataclass(frozen=True)
class Worker:
    """One of several processes that share a manifest's contents without communicating.

    Parameters
    ----------
    index, count : int
        This worker's number, from 0, and the number of workers.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"worker {self.index} of {self.count}: count from 0 to N - 1")

    def mine(self, keys: np.ndarray) -> np.ndarray:
        """Return which contents are this worker's, by their SHA-256, (n, 32) uint8: (n,) bool."""
        mine: np.ndarray = prefixes_of(keys) % np.uint64(self.count) == self.index
        return mine


def parse_worker(text: str) -> Worker:
    """Read `I/N`, counted from 0.

    Raises
    ------
    ValueError
        `text` is not two whole numbers with 0 <= I < N.
    """
    if not re.fullmatch(r"[0-9]{1,9}/[0-9]{1,9}", text):
        raise ValueError(f"{text!r} is not I/N, such as 0/4 for the first of four")
    index, count = map(int, text.split("/"))
    return Worker(index, count)


def find_worker(environ: Mapping[str, str]) -> tuple[Worker, str] | None:
    """Return the worker that a launcher's environment variables describe, and the variable's name.

    Returns None without a launcher, or if it started only one process.

    Raises
    ------
    MedembedError
        A launcher's variables contradict each other.
    """
    for index, count in LAUNCHERS:
        if index not in environ or count not in environ:
            continue
        try:
            worker = parse_worker(f"{environ[index]}/{environ[count]}")
        except ValueError as error:
            raise MedembedError(
                f"{index}={environ[index]} and {count}={environ[count]} name no worker: {error}. "
                "Correct them, or say which worker this is with --worker I/N."
            ) from error
        if worker.count > 1:
            return worker, index
    return None


class Contents(Sequence[Content]):
    """Distinct contents of a manifest, in its order, created on access.

    Parameters
    ----------
    images : Series of str
        The manifest's column.
    keys : (n, 32) uint8
        SHA-256 of each row.
    places : (k,) int
        First row of each content, ascending.
    repeats, originals : (r,) int
        Rows with a content of an earlier row, and that row; sorted by the latter.

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
        """Return the contents whose first rows are these, (k,) int."""
        return Contents(self._images, self._every_key, places, self._repeats, self._originals)


@dataclass(frozen=True)
class Plan:
    """The distinct contents of a manifest, sorted by what remains to be done.

    Parameters
    ----------
    n_rows, n_contents, n_already : int
        Rows of the manifest, distinct contents among them, and those of the contents that are in
        the cache; for a worker, within its share.
    pending : Contents
        Contents to be embedded, in the manifest's order.
    done : Contents
        Contents already in the cache, in the manifest's order.
    known : list of (Content, Failure)
        Known failures that are not retried.
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
    """Return a plan of the contents missing in a cache, if any, within a worker's share.

    Only the columns `image` and `sha256` of the rows are used, and the latter has no empty values.
    Contents that failed to decode or embed are pending only with `retry_failed`, since equal bytes
    fail again. Contents that could not be read may be readable now, and are always pending.
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
    """Return the row and failure of contents that would fail again, in row order."""
    failures = cache.failures() if cache else {}
    again = [failure for failure in failures.values() if failure.stage != "read"]
    places = contents.find(keys_from_hex([failure.sha256 for failure in again]))
    found = [(p, f) for p, f in zip(places.tolist(), again, strict=True) if p >= 0]
    return sorted(found, key=lambda pair: pair[0])
