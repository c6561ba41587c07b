"""Where each row of a cache is: sorted keys of fixed width, no Python object per row."""

from pathlib import Path

import numpy as np

from medembed.cache import shards
from medembed.cache.spec import KEY_BYTES, CacheSpec, sortable

__all__ = ["Index"]


class Index:
    """Locate keys in the shards of a directory.

    Attributes
    ----------
    paths : list of Path
        The committed shards when last refreshed, sorted by name.
    """

    def __init__(self, directory: Path, spec: CacheSpec) -> None:
        self.paths: list[Path] = []
        self._directory, self._spec = directory, spec
        self._sorted = np.empty(0, f"S{KEY_BYTES}")  # unique
        self._owners = np.empty(0, np.int32)  # position in `paths`, for each sorted key
        self._rows = np.empty(0, np.int32)  # row in that shard

    def refresh(self) -> "Index":
        """Look for shards again; read keys only if some came or went."""
        paths = sorted(p for p in self._directory.glob("*.h5") if shards.is_shard_name(p.name))
        if paths != self.paths:
            self._read(paths)
        return self

    def keys(self) -> np.ndarray:
        """Return all keys, sorted and unique: (n, 32) uint8."""
        return self._sorted.view(np.uint8).reshape(-1, KEY_BYTES)

    def locate(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Find keys, (n, 32) uint8.

        Returns
        -------
        found : (n,) bool
        owners : (n,) int
            Position of the shard in `paths`; meaningless where not found.
        rows : (n,) int
            Row in that shard; meaningless where not found.
        """
        wanted = sortable(keys)
        if not len(self._sorted):
            nothing = np.zeros(len(wanted), np.int32)
            return np.zeros(len(wanted), bool), nothing, nothing
        order = np.argsort(wanted)  # sorted questions walk through memory once: 9 times faster
        places = np.empty(len(wanted), np.int64)
        places[order] = np.searchsorted(self._sorted, wanted[order])
        places[places == len(self._sorted)] = 0
        return self._sorted[places] == wanted, self._owners[places], self._rows[places]

    def _read(self, paths: list[Path]) -> None:
        parts = [shards.read_keys(path, spec=self._spec) for path in paths]
        lengths = [len(part) for part in parts]
        keys = sortable(np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *parts]))
        owners = np.repeat(np.arange(len(paths), dtype=np.int32), lengths)
        rows = np.concatenate(
            [np.empty(0, np.int32), *(np.arange(n, dtype=np.int32) for n in lengths)]
        )
        order = np.argsort(keys, kind="stable")  # of a row that stands twice, the first is kept
        keys = keys[order]
        first = np.ones(len(keys), bool)
        first[1:] = keys[1:] != keys[:-1]
        self._sorted = keys[first]
        self._owners, self._rows = owners[order[first]], rows[order[first]]
        self.paths = paths
