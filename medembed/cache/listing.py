"""Which files of a cache's `shards/` are its shards, and which a compaction has replaced."""

import json
import os
from collections.abc import Collection
from pathlib import Path

from medembed.cache import shards
from medembed.core.errors import CacheError
from medembed.core.files import read_plain

__all__ = ["committed_shards", "file_names", "read_replaced", "replaced_shards"]


def committed_shards(directory: Path) -> list[Path]:
    """List the committed shards of `shards/`, sorted by name."""
    names = file_names(directory)
    replaced = replaced_shards(directory, names)
    there = (name for name in names if shards.is_shard_name(name) and name not in replaced)
    return [directory / name for name in sorted(there)]


def file_names(directory: Path) -> list[str]:
    """List what `shards/` holds, in any order; nothing if it is not there.

    Raises
    ------
    CacheError
        It cannot be read.
    """
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(directory, error) from error


def replaced_shards(directory: Path, names: Collection[str]) -> set[str]:
    """Name the shards, among `names`, whose rows others of them have taken over."""
    replaced: set[str] = set()
    there = frozenset(names)
    for name in names:
        path = directory / name
        if path.suffix == shards.REPLACES and path.with_suffix(".h5").name in there:
            replaced.update(read_replaced(path))
    return replaced & there


def read_replaced(path: Path) -> list[str]:
    """Read the names in the file beside a shard, but its own; none if it is gone, or not ours.

    Then at worst a row stands twice.

    Raises
    ------
    CacheError
        The disk says no.
    """
    try:
        names = json.loads(read_plain(path))
    except (FileNotFoundError, ValueError, RecursionError):
        return []
    except OSError as error:
        raise _unreadable(path, error) from error
    if not isinstance(names, list):
        return []
    others = (name for name in names if isinstance(name, str) and shards.is_shard_name(name))
    return [name for name in others if name != path.with_suffix(".h5").name]


def _unreadable(path: Path, error: OSError) -> CacheError:
    return CacheError(
        f"cannot read {path}: {error.strerror or error}. Make it readable, and run the command "
        "again."
    )
