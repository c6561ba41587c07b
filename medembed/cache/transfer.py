"""Copy a cache between a bucket and a disk, or to this machine's copies of shards."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from medembed.cache import local_copies
from medembed.cache.compaction import drop_repeats
from medembed.cache.index import MAX_TRIES, committed_shards, list_files
from medembed.cache.local_copies import damaged_shard, read_whole
from medembed.cache.storage import READERS, Store, file_size, read_file, store_at
from medembed.cache.store import create_cache, open_cache
from medembed.core import object_store
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
    superseded : int
        Shards of a directory that were removed, because shards of the bucket hold their rows.
    """

    shards: int
    bytes: int
    already: int
    superseded: int = 0


def copy_cache(
    source: Location,
    target: Location,
    progress: Callable[[int, int], None] | None = None,
    announce: Callable[[int, int], None] | None = None,
) -> Transfer:
    """Copy what `target` lacks of the cache at `source`, several shards at a time.

    Bytes are compared with their names on the way, and a shard appears complete or not at all: a
    copy that was interrupted goes on where it stopped. Failures are merged. What is copied from a
    bucket to a directory stands there once: what the directory holds of the same rows in other
    shards, as from before a compaction of the bucket, is removed, and no other row of it.

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
    held = set(list_files(target / "shards"))
    copied: dict[str, int] = {}
    for n_tries in range(1, MAX_TRIES + 1):
        shards = committed_shards(source / "shards")
        missing = [path for path in shards if path.name not in held and path.name not in copied]
        n_bytes = sum(map(file_size, missing))
        if announce and n_tries == 1:
            announce(len(missing), n_bytes)
        copied |= _copy_all(missing, target, n_bytes, progress)
        if copied.keys() | held >= {path.name for path in missing}:
            break
        object_store.pause(n_tries)  # a compaction removes shards: what replaced them is copied
    else:
        raise _vanishing(source)
    if isinstance(target, Path):
        sync_directory(target / "shards")
        _remove_leftovers(target / "shards")
    there.record_failures(given.failures().values())
    names = {path.name for path in shards}
    n_superseded = 0
    if isinstance(source, BucketPath) and isinstance(target, Path):
        n_superseded = drop_repeats(target, given.spec, names)
    return Transfer(len(copied), sum(copied.values()), len(held & names), n_superseded)


def keep_copies(source: BucketPath, announce: Callable[[int, int], None] | None = None) -> Transfer:
    """Fetch the shards of a bucket that this machine has no copy of, see `local_copies`."""
    open_cache(source)
    fetched: dict[BucketPath, int] = {}
    for n_tries in range(1, MAX_TRIES + 1):
        listed = committed_shards(source / "shards")
        shards = [path for path in listed if isinstance(path, BucketPath)]
        local_copies.require_room(shards)
        missing = [path for path in shards if not local_copies.has_copy(path)]
        if announce and n_tries == 1:
            announce(len(missing), sum(map(file_size, missing)))
        try:
            local_copies.fetch_all(missing)
            fetched |= {path: file_size(path) for path in missing}
            break
        except FileNotFoundError:  # a compaction removes shards: what replaced them is fetched
            fetched |= {path: file_size(path) for path in missing if local_copies.has_copy(path)}
            object_store.pause(n_tries)
        except OSError as error:
            if isinstance(error, CacheError):
                raise
            raise CacheError(f"cannot fetch shards of {source}: {describe_error(error)}") from None
    else:
        raise _vanishing(source)
    return Transfer(len(fetched), sum(fetched.values()), len({*shards} - fetched.keys()))


def _copy_all(
    paths: Sequence[Location],
    target: Location,
    n_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, int]:
    """Copy shards, several at a time; return the bytes of each that was still there."""
    store, copied, done = store_at(target / "shards"), {}, 0
    with ThreadPoolExecutor(READERS) as pool:
        results = pool.map(lambda path: _copy(path, store, target), paths)
        for path, size in zip(paths, results, strict=True):
            if size is not None:
                copied[path.name] = size
            done += file_size(path)
            if progress:
                progress(done, n_bytes)
    return copied


def _copy(path: Location, store: Store, target: Location) -> int | None:
    """Copy a shard, and return its bytes; None if a compaction has removed it."""
    try:
        data = read_whole(path) if isinstance(path, BucketPath) else _read_proven(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _uncopied(path, target, error) from None
    try:
        store.put_if_absent(path.name, data)
    except OSError as error:
        raise _uncopied(path, target, error) from None
    return len(data)


def _remove_leftovers(folder: Path) -> None:
    """Remove what copies that were killed have left of shards that are there now."""
    for partial in folder.glob(".*.h5.*.partial"):
        if (folder / f"{partial.name[1:].partition('.')[0]}.h5").exists():
            partial.unlink(missing_ok=True)


def _read_proven(path: Path) -> bytes:
    data = read_file(path)
    if hashlib.sha256(data).hexdigest()[: len(path.stem)] != path.stem:
        raise damaged_shard(path, "its bytes are not those of its name")
    return data


def _vanishing(source: Location) -> CacheError:
    return CacheError(
        f"shards of {source} vanish faster than they are copied. Run the command again when "
        "whatever removes them has ended."
    )


def _uncopied(path: Location, target: Location, error: OSError) -> CacheError:
    if isinstance(error, ShardError):
        return error
    return CacheError(
        f"cannot copy {path} to {target}: {describe_error(error).rstrip('.')}. Run the command "
        "again: it goes on where it stopped."
    )
