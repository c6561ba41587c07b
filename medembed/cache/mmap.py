"""Rows of a cache read at random from mapped files, for what is too large to be held."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from medembed.cache.keys import SortedKeys
from medembed.cache.listing import committed_shards
from medembed.cache.shards import read_keys
from medembed.cache.spec import KEY_BYTES
from medembed.cache.store import Cache
from medembed.core.errors import MissingRowsError, ShardError
from medembed.core.files import describe_error, open_plain

__all__ = ["MappedRows", "map_rows"]


@dataclass(frozen=True, eq=False)
class MappedRows:
    """Rows of one pooling, each where it lies in its shard's file.

    Attributes
    ----------
    blocks : list of ndarray
        Rows that lie together, (rows, ...), mapped, read-only.
    owners, places : (n,) int
        The block of each row, and where in it.
    """

    blocks: list[np.ndarray]
    owners: np.ndarray
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.owners)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Copy some of the rows, (k, ...), in the stored dtype."""
        first = self.blocks[0]
        taken = np.empty((len(rows), *first.shape[1:]), first.dtype)
        for i, row in enumerate(rows.tolist()):
            taken[i] = self.blocks[self.owners[row]][self.places[row]]
        return taken


def map_rows(cache: Cache, keys: np.ndarray, pooling: str) -> MappedRows:
    """Map the rows of `keys`, (n, 32) uint8, without reading them.

    What the shards hold is not compared with their names: `Cache.verify` does that, once.

    Raises
    ------
    MissingRowsError
        A key is not in the cache.
    CacheError
        The pooling is not in the cache, or a shard is damaged (`ShardError`).
    """
    cache.check_poolings([pooling])
    paths = committed_shards(cache.path / "shards")
    parts = [read_keys(path, spec=cache.spec) for path in paths]
    held = SortedKeys(np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *parts]))
    found = held.find(keys)
    if (found < 0).any():
        raise MissingRowsError(
            f"{int((found < 0).sum())} of {len(keys)} rows are not in the cache at {cache.path}"
        )
    blocks: list[np.ndarray] = []
    for path, part in zip(paths, parts, strict=True):
        blocks += _map(path, pooling, len(part))
    edges = np.cumsum([0, *map(len, blocks)])
    owners = np.searchsorted(edges, found, side="right") - 1
    return MappedRows(blocks, owners, found - edges[owners])


def _map(path: Path, pooling: str, n_rows: int) -> list[np.ndarray]:
    """Map the chunks of a shard, in the order of its rows."""
    try:
        with open_plain(path) as opened:
            with h5py.File(opened, "r") as file:
                dataset: Any = file["embeddings"][pooling]
                size, dtype, shape = dataset.chunks[0], dataset.dtype, dataset.shape[1:]
                offsets = [
                    dataset.id.get_chunk_info_by_coord((first, *(0 for _ in shape))).byte_offset
                    for first in range(0, n_rows, size)
                ]
            return [
                np.memmap(opened, dtype, "r", offset, (min(size, n_rows - i * size), *shape))
                for i, offset in enumerate(offsets)
            ]
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ShardError(f"shard {path} cannot be mapped: {describe_error(error)}") from error
