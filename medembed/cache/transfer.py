"""Copy a cache between a bucket and a disk, or to this machine's copies of shards."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from medembed.cache import local_copies
from medembed.cache.index import committed_shards, list_files
from medembed.cache.local_copies import damaged_shard
from medembed.cache.storage import READERS, Store, file_size, read_file, store_at
from medembed.cache.store import create_cache, open_cache
from medembed.core.errors import CacheError, ShardError
from medembed.core.files import describe_error, sync_directory
from medembed.core.locations import BucketPath, Location

__all__ = ["Transfer", "copy_cache", "keep_copies"]


@dataclass(frozen=True)
class Transfer:
    """What a copy of a cache moved.

    Parameters
    ----------
    shards, bytes : int
        Shards that were copied, and their bytes.
    already : int
        Shards that were there.
    """

    shards: int
    bytes: int
    already: int


def copy_cache(
    source: Location,
    target: Location,
    progress: Callable[[int, int], None] | None = None,
    announce: Callable[[int, int], None] | None = None,
) -> Transfer:
    """Copy what `target` lacks of the cache at `source`, several shards at a time.

    Bytes are compared with their names on the way, and a shard appears complete or not at all: a
    copy that was interrupted goes on where it stopped. Failures are merged.

    Parameters
    ----------
    source, target : Path or BucketPath
        The target is created if it does not exist.
    progress : callable, optional
        Called as progress(done, total) with bytes.
    announce : callable, optional
        Called once, before anything is copied, with the number of shards and their bytes.

    Raises
    ------
    SpecMismatchError
        The target is a cache of another spec.
    CacheError
        The target cannot be written, or a shard is damaged (`ShardError`).
    """
    given = open_cache(source)
    there = create_cache(target, given.spec, given.recorded, given.canary)
    shards = committed_shards(source / "shards")
    held = list_files(target / "shards")
    missing = [path for path in shards if path.name not in held]
    n_bytes = list(accumulate(map(file_size, missing), initial=0))
    if announce:
        announce(len(missing), n_bytes[-1])
    store = store_at(target / "shards")
    with ThreadPoolExecutor(READERS) as pool:
        copied = pool.map(lambda path: _copy(path, store, target), missing)
        for number, _ in enumerate(copied, start=1):
            if progress:
                progress(n_bytes[number], n_bytes[-1])
    if isinstance(target, Path):
        sync_directory(target / "shards")
    there.record_failures(given.failures().values())
    return Transfer(len(missing), n_bytes[-1], len(shards) - len(missing))


def keep_copies(source: BucketPath, announce: Callable[[int, int], None] | None = None) -> Transfer:
    """Fetch the shards of a bucket that this machine has no copy of, see `local_copies`."""
    open_cache(source)
    shards = [path for path in committed_shards(source / "shards") if isinstance(path, BucketPath)]
    directory = local_copies.copies_directory()
    missing = [path for path in shards if not (directory / path.name).exists()]
    n_bytes = sum(map(file_size, missing))
    if announce:
        announce(len(missing), n_bytes)
    try:
        local_copies.fetch_all(missing)
    except OSError as error:
        if isinstance(error, CacheError):
            raise
        raise CacheError(f"cannot fetch shards of {source}: {describe_error(error)}") from None
    return Transfer(len(missing), n_bytes, len(shards) - len(missing))


def _copy(path: Location, store: Store, target: Location) -> None:
    try:
        data = read_file(path)
        if hashlib.sha256(data).hexdigest()[: len(path.stem)] != path.stem:
            raise damaged_shard(path, "its bytes are not those of its name")
        store.put_if_absent(path.name, data)
    except OSError as error:
        if isinstance(error, ShardError):
            raise
        raise CacheError(
            f"cannot copy {path} to {target}: {describe_error(error)}. Run the command again: it "
            "goes on where it stopped."
        ) from None
