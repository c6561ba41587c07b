"""Where each row of a cache is: keys of fixed width, no Python object per row."""

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from medembed.cache import shards
from medembed.cache.keys import SortedKeys
from medembed.cache.listing import committed_shards
from medembed.cache.spec import KEY_BYTES, CacheSpec, sortable
from medembed.core.errors import ShardError
from medembed.core.system import count_cores

__all__ = ["MAX_TRIES", "Index"]

MAX_TRIES = 20  # of listing the shards, while a compaction takes them away
RECENT_SHARE = 4  # new shards are kept apart until they hold this part of the rows of the others


class Index:
    """Locate keys in the shards of a directory.

    About 44 bytes of memory per row. When shards are added, only their keys are read.

    Parameters
    ----------
    directory : Path
        The cache's `shards/`.
    spec : CacheSpec
        What every shard must be of.
    known : collection of str
        Names of shards that are passed over, as if they were not there.

    Attributes
    ----------
    paths : list of Path
        The committed shards when last refreshed, sorted by name.
    """

    def __init__(self, directory: Path, spec: CacheSpec, known: Collection[str] = ()) -> None:
        self.paths: list[Path] = []
        self._directory, self._spec, self._known = directory, spec, frozenset(known)
        self._segments: list[_Segment] = []

    def refresh(self) -> "Index":
        """Look for shards again; read the keys of those that are new.

        Raises
        ------
        ShardError
            The keys of a shard are damaged.
        """
        for n_tries in range(1, MAX_TRIES + 1):
            paths = [p for p in committed_shards(self._directory) if p.name not in self._known]
            if paths == self.paths:
                break
            try:
                self._take(paths)
                break
            except ShardError as error:
                gone = isinstance(error.__cause__, FileNotFoundError)
                if not gone or n_tries == MAX_TRIES:
                    raise
        return self

    @property
    def n_rows(self) -> int:
        """How many different keys there are."""
        if not self._segments:
            return 0
        first, *others = self._segments
        n_rows = len(first.sorted)
        for segment in others:
            distinct = segment.sorted.keys[segment.sorted.firsts]
            n_rows += int((first.sorted.find(distinct) < 0).sum())
        return n_rows

    def keys(self) -> np.ndarray:
        """Return all keys, sorted and unique: (n, 32) uint8."""
        parts = [segment.sorted.keys[segment.sorted.firsts] for segment in self._segments]
        if len(parts) == 1:
            return parts[0]
        every = np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *parts])
        return np.unique(sortable(every)).view(np.uint8).reshape(-1, KEY_BYTES)

    def locate(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Find keys, (n, 32) uint8.

        Returns
        -------
        found : (n,) bool
        owners : (n,) int
            Position of the shard in `paths`, the first by name that has the key; meaningless
            where not found.
        rows : (n,) int
            Row in that shard; meaningless where not found.
        """
        owners = np.full(len(keys), len(self.paths), np.int32)
        rows = np.zeros(len(keys), np.int32)
        for segment in self._segments:
            there, owner, row = segment.locate(keys)
            better = owner < owners[there]
            owners[there[better]], rows[there[better]] = owner[better], row[better]
        found = owners < len(self.paths)
        owners[~found] = 0
        return found, owners, rows

    def _take(self, paths: list[Path]) -> None:
        """Hold the keys of exactly these shards."""
        held = {path: keys for segment in self._segments for path, keys in segment.parts()}
        first = self._segments[0].paths if self._segments else []
        recent = sorted(set(paths).difference(first))
        if not self._segments or not set(paths).issuperset(first):
            self._segments = [self._segment(paths, held)] if paths else []
        else:
            segment = self._segment(recent, held)
            if RECENT_SHARE * len(segment.sorted.keys) > len(self._segments[0].sorted.keys):
                held |= dict(segment.parts())
                self._segments = [self._segment(paths, held)]
            else:
                self._segments = [self._segments[0], segment]
        for segment in self._segments:
            segment.number(paths)
        self.paths = paths

    def _segment(self, paths: list[Path], held: Mapping[Path, np.ndarray]) -> "_Segment":
        def count(path: Path) -> int:
            if path in held:
                return len(held[path])
            return int(shards.read_header(path, spec=self._spec)["rows"])

        def fill(path: Path, start: int, stop: int) -> None:
            part = held[path] if path in held else shards.read_keys(path, spec=self._spec)
            keys[start:stop] = part

        with ThreadPoolExecutor(count_cores()) as pool:
            edges = np.cumsum([0, *pool.map(count, paths)])
            keys = np.empty((edges[-1], KEY_BYTES), np.uint8)
            list(pool.map(fill, paths, edges[:-1].tolist(), edges[1:].tolist()))
        return _Segment(paths, edges, SortedKeys(keys))


class _Segment:
    """The keys of some shards, one after the other in one array, and their order."""

    def __init__(self, paths: list[Path], edges: np.ndarray, sorted_keys: SortedKeys) -> None:
        self.paths, self.sorted = paths, sorted_keys
        self._edges = edges
        self._numbers = np.empty(0, np.int32)

    def parts(self) -> list[tuple[Path, np.ndarray]]:
        """Give each shard's keys."""
        edges = zip(self._edges[:-1].tolist(), self._edges[1:].tolist(), strict=True)
        keys = self.sorted.keys
        return [(p, keys[a:b]) for p, (a, b) in zip(self.paths, edges, strict=True)]

    def number(self, paths: list[Path]) -> None:
        """Learn the shards' positions among all paths."""
        place = {path: number for number, path in enumerate(paths)}
        self._numbers = np.array([place[path] for path in self.paths], np.int32)

    def locate(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Give which of `keys` are here, the position of their shard, and their row in it."""
        places = self.sorted.find(keys)
        there = np.flatnonzero(places >= 0)
        places = places[there]
        local = np.searchsorted(self._edges, places, side="right") - 1
        return there, self._numbers[local], (places - self._edges[local]).astype(np.int32)
