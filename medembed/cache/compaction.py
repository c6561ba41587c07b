"""Merge many small shards into few full ones, while other processes read and write.

In a bucket the merged shards are deleted a while after all new ones are written: who has listed
them can still read them. Who lists a new shard and its record ignores those that it replaced.
"""

import secrets
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np

from medembed.cache import shards
from medembed.cache.index import SortedKeys, committed_shards, list_files, read_replaced
from medembed.cache.spec import KEY_BYTES, CacheSpec
from medembed.cache.storage import delete_files, file_size
from medembed.core import object_store
from medembed.core.errors import CacheError
from medembed.core.files import describe_error, hold_lock
from medembed.core.locations import BucketPath, Location
from medembed.core.system import count_cores

__all__ = ["GRACE_SECONDS", "Compaction", "compact", "drop_repeats"]

GRACE_SECONDS = 60.0
"""How long shards that were merged stay in a bucket, for those who have listed them."""

LOCK = ".compact.lock"
STALE = timedelta(minutes=15)  # of a lock in a bucket whose owner has not renewed it
RENEWAL_SECONDS = 120.0  # how often a lock is renewed while nothing happens
SMALL = 2  # a shard is small if it holds less than this fraction, 1/2, of a full one


@dataclass(frozen=True)
class Compaction:
    """The result of a compaction.

    Parameters
    ----------
    shards_before, shards_after, bytes_before, bytes_after : int
        Numbers of shards and bytes in the whole cache.
    repeats : int
        Duplicate rows that were removed.
    """

    shards_before: int
    shards_after: int
    bytes_before: int
    bytes_after: int
    repeats: int


@dataclass(frozen=True)
class _Source:
    """A shard to be merged.

    Parameters
    ----------
    path : Path or BucketPath
        The shard's file.
    kept : (k,) int
        Rows that are copied to the new shard.
    holders : list of Path or BucketPath
        The shards that hold the other rows.
    """

    path: Location
    kept: np.ndarray
    holders: list[Location]


def compact(
    directory: Location,
    spec: CacheSpec,
    progress: Callable[[int, int], None] | None = None,
    *,
    grace_seconds: float | None = None,
) -> Compaction:
    """Merge the shards less than half full, and remove duplicate rows.

    Each new shard is complete, synced and verified before the shards that it replaces are removed;
    after a crash at any moment every row is readable, and the next compaction cleans up. Readers
    that find a shard missing search for its rows again. A second compaction finds nothing to do.

    Parameters
    ----------
    directory : Path or BucketPath
        The cache.
    spec : CacheSpec
        The cache's spec.
    progress : callable, optional
        Called as progress(done, total) with the number of new shards.
    grace_seconds : float, optional
        How long merged shards stay in a bucket after the new ones are there; by default
        `GRACE_SECONDS`.

    Raises
    ------
    ShardError
        A shard to be merged is damaged. Shards merged before stay merged; the damaged one and
        those of its group are unchanged.
    CacheError
        Another compaction is running, or the directory cannot be written.
    """
    grace = GRACE_SECONDS if grace_seconds is None else grace_seconds
    with _removing(directory, grace) as removal:
        return _compact(directory / "shards", spec, progress, removal)


def drop_repeats(directory: Path, spec: CacheSpec, names: Collection[str]) -> int:
    """Remove the rows that shards of these names hold too from all others; return how many shards.

    A shard without another row is removed, and of one that has some these are written anew. The
    named shards are verified before that, and only those count that are there. As safe as
    `compact`: after a crash at any moment every row is readable.

    Raises
    ------
    ShardError
        A shard is damaged, and no row of it or instead of it was removed.
    CacheError
        A compaction is running, or the directory cannot be written.
    """
    folder = directory / "shards"
    paths = committed_shards(folder)
    if {path.name for path in paths} <= set(names):
        return 0
    with _removing(directory, 0.0) as removal:
        _tidy_up(folder, spec, removal)
        sources = _find_repeats(committed_shards(folder), spec, names)
        for group in _group(sources, shards.max_rows(spec)):
            _merge(folder, group, {source.path for source in group}, spec, removal)
        return len(sources)


def _find_repeats(
    paths: Sequence[Location], spec: CacheSpec, names: Collection[str]
) -> list[_Source]:
    """Return the shards with rows that shards of these names hold, with their other rows."""
    holders = [path for path in paths if path.name in names]
    if not holders:
        return []
    parts = [shards.read_keys(path, spec=spec) for path in holders]
    held, edges = SortedKeys(np.concatenate(parts)), np.cumsum([0, *map(len, parts)])
    found = []
    for path in paths:
        if path.name in names:
            continue
        places = held.find(shards.read_keys(path, spec=spec))
        homes = np.unique(np.searchsorted(edges, places[places >= 0], side="right") - 1)
        if len(homes):
            found.append(_Source(path, np.flatnonzero(places < 0), [holders[n] for n in homes]))
    return found


@contextmanager
def _removing(directory: Location, grace_seconds: float) -> Iterator["_Removal"]:
    """Hold the lock of a cache whose shards are removed."""
    refusal = CacheError(f"another compaction of {directory} is running; wait for it to end.")
    try:
        # Two concurrent compactions might each drop a different copy of a duplicate row.
        with _holding_lock(directory, refusal) as require_lock:
            yield _Removal(directory / "shards", grace_seconds, require_lock)
    except OSError as error:
        if isinstance(error, CacheError):
            raise
        raise CacheError(
            f"cannot compact {directory}: {describe_error(error).rstrip('.')}. No row was lost; "
            "make the cache writable, and run the command again."
        ) from error


def _compact(
    folder: Location,
    spec: CacheSpec,
    progress: Callable[[int, int], None] | None,
    removal: "_Removal",
) -> Compaction:
    _tidy_up(folder, spec, removal)
    before = _sizes(folder)
    sources, n_repeats = _choose(folder, spec)
    groups = list(_group(sources, shards.max_rows(spec)))
    merged: set[Location] = set()
    for number, group in enumerate(groups, start=1):
        merged.update(source.path for source in group)
        _merge(folder, group, merged, spec, removal)
        if progress:
            progress(number, len(groups))
    removal.finish()
    after = _sizes(folder)
    return Compaction(len(before), len(after), sum(before), sum(after), n_repeats)


@contextmanager
def _holding_lock(directory: Location, refusal: Exception) -> Iterator[Callable[[], None]]:
    """Hold the lock of a cache; yield a function that raises `refusal` if it was lost."""
    if not isinstance(directory, BucketPath):
        with hold_lock(directory / LOCK, refusal):
            yield lambda: None
        return
    path, token = directory / LOCK, secrets.token_bytes(16)

    def is_ours() -> bool:
        with suppress(FileNotFoundError):
            return object_store.read_object(path) == token
        return False

    def require_lock() -> None:
        if not is_ours():
            raise refusal
        object_store.put_object(path, token)

    if not object_store.create_object(path, token) and not is_ours():
        held = object_store.find_object(path)
        # (this machine's clock may be wrong)
        if held and object_store.store_time(directory) - held.modified < STALE:
            raise refusal
        object_store.delete_objects([path])  # of one that was killed
        if not object_store.create_object(path, token) and not is_ours():
            raise refusal
    try:
        yield require_lock
    finally:
        if is_ours():
            object_store.delete_objects([path])


class _Removal:
    """Removes merged shards: from a directory at once, from a bucket all of them, a while later."""

    def __init__(
        self, folder: Location, grace_seconds: float, require_lock: Callable[[], None]
    ) -> None:
        self._folder, self._grace, self._require_lock = folder, grace_seconds, require_lock
        self._waiting: list[tuple[Sequence[Location], Location | None]] = []

    def add(self, old: Sequence[Location], record: Location | None) -> None:
        """Remove shards, and after them the record of what replaced them."""
        if not isinstance(self._folder, BucketPath):
            delete_files(self._folder, old)
            if record:
                delete_files(self._folder, [record])
            return
        self._require_lock()
        self._waiting.append((old, record))

    def finish(self) -> None:
        """Remove what waits."""
        if not self._waiting:
            return
        until = time.monotonic() + self._grace
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, RENEWAL_SECONDS))
            self._require_lock()
        self._require_lock()
        for old, record in self._waiting:
            delete_files(self._folder, old)
            delete_files(self._folder, [record] if record else [])
        self._waiting = []


def _tidy_up(folder: Location, spec: CacheSpec, removal: _Removal) -> None:
    """Complete a compaction that was killed."""
    files = list_files(folder)
    for path in (files[name] for name in sorted(files) if name.endswith(shards.REPLACES)):
        merged = path.with_suffix(".h5")
        if merged.name in files:
            shards.read_shard(merged, poolings=(), spec=spec, again=True)
            removal.add([folder / name for name in read_replaced(path)], path)
        else:
            delete_files(folder, [path])
    removal.finish()


def _sizes(folder: Location) -> list[int]:
    return [file_size(path) for path in committed_shards(folder)]


def _ages(folder: Location, paths: Sequence[Location]) -> dict[Location, float]:
    """Return numbers that order shards by when they were written."""
    if isinstance(folder, BucketPath):
        return {o.path: o.modified.timestamp() for o in object_store.list_objects(folder)}
    return {path: path.stat().st_mtime_ns for path in paths if not isinstance(path, BucketPath)}


def _choose(folder: Location, spec: CacheSpec) -> tuple[list[_Source], int]:
    """Return the shards to be merged, and the number of duplicate rows."""
    paths = committed_shards(folder)
    if not paths:
        return [], 0
    n_threads = object_store.AHEAD if isinstance(folder, BucketPath) else count_cores()
    with ThreadPoolExecutor(n_threads) as pool:
        parts = list(pool.map(lambda path: shards.read_keys(path, spec=spec), paths))
    edges = np.cumsum([0, *map(len, parts)])
    every = SortedKeys(np.concatenate(parts))
    is_kept = np.ones(edges[-1], bool)
    is_kept[every.repeats] = False
    homes = np.searchsorted(edges, every.repeats, side="right") - 1
    holders = np.searchsorted(edges, every.originals, side="right") - 1
    order = np.argsort(homes, kind="stable")
    spans = np.searchsorted(homes[order], np.arange(len(paths) + 1))
    chosen = []
    for number, path in enumerate(paths):
        start, stop = edges[number], edges[number + 1]
        others = np.unique(holders[order[spans[number] : spans[number + 1]]]).tolist()
        if others or SMALL * (stop - start) < shards.max_rows(spec):
            kept = np.flatnonzero(is_kept[start:stop])
            chosen.append(_Source(path, kept, [paths[other] for other in others]))
    # In order of creation: rows that were embedded together stay together.
    ages = _ages(folder, [source.path for source in chosen])
    return sorted(chosen, key=lambda source: ages.get(source.path, 0)), len(every.repeats)


def _group(sources: Sequence[_Source], max_rows: int) -> Iterator[list[_Source]]:
    """Yield groups of sources, in order, that fit into one shard."""
    group: list[_Source] = []
    n_rows = 0
    for source in sources:
        if group and n_rows + len(source.kept) > max_rows:
            if _is_worth_it(group):
                yield group
            group, n_rows = [], 0
        group.append(source)
        n_rows += len(source.kept)
    if group and _is_worth_it(group):
        yield group


def _is_worth_it(group: Sequence[_Source]) -> bool:
    return len(group) > 1 or bool(group[0].holders)


def _merge(
    folder: Location,
    group: Sequence[_Source],
    merged: set[Location],
    spec: CacheSpec,
    removal: _Removal,
) -> None:
    """Write the rows of a group as one shard, then remove the shards that they come from.

    `merged` are the shards of this group and earlier ones, whose content is verified on the way.
    """
    parts = [_read_kept(source, spec) for source in group]
    keys = np.concatenate([keys for keys, _ in parts])
    rows = {name: np.concatenate([part[name] for _, part in parts]) for name in spec.poolings}
    for holder in {path for source in group for path in source.holders} - merged:
        # before the only other copy is removed
        shards.read_shard(holder, poolings=(), spec=spec, again=True)
    old = [source.path for source in group]
    if not len(keys):
        removal.add(old, None)
        return
    new = shards.write_shard(folder, keys, rows, spec, replaces=[path.name for path in old])
    if isinstance(new, BucketPath):  # a directory's is compared when it is written
        shards.read_shard(new, poolings=(), spec=spec, again=True)
    removal.add([path for path in old if path != new], new.with_suffix(shards.REPLACES))


def _read_kept(source: _Source, spec: CacheSpec) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    if not len(source.kept):  # nor does it matter whether it is whole
        rows = {name: np.empty((0, *shape), spec.dtype) for name, shape in spec.poolings.items()}
        return np.empty((0, KEY_BYTES), np.uint8), rows
    keys, rows = shards.read_shard(source.path, spec=spec)
    return keys[source.kept], {name: values[source.kept] for name, values in rows.items()}
