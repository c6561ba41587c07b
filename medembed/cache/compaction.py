"""Merge many small shards into few full ones, while other processes read and write."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medembed.cache import shards
from medembed.cache.index import SortedKeys, committed_shards, read_replaced
from medembed.cache.spec import CacheSpec
from medembed.core.errors import CacheError
from medembed.core.files import hold_lock, sync_directory
from medembed.core.system import count_cores

__all__ = ["Compaction", "compact"]

LOCK = ".compact.lock"
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
    path : Path
        The shard's file.
    kept : (k,) int
        Rows that are copied to the new shard.
    holders : list of Path
        The shards that hold the other rows.
    """

    path: Path
    kept: np.ndarray
    holders: list[Path]


def compact(
    directory: Path, spec: CacheSpec, progress: Callable[[int, int], None] | None = None
) -> Compaction:
    """Merge the shards less than half full, and remove duplicate rows.

    Each new shard is complete, synced and verified before the shards that it replaces are removed;
    after a crash at any moment every row is readable, and the next compaction cleans up. Readers
    that find a shard missing search for its rows again. A second compaction finds nothing to do.

    Parameters
    ----------
    directory : Path
        The cache.
    spec : CacheSpec
        The cache's spec.
    progress : callable, optional
        Called as progress(done, total) with the number of new shards.

    Raises
    ------
    ShardError
        A shard to be merged is damaged. Shards merged before stay merged; the damaged one and
        those of its group are unchanged.
    CacheError
        Another compaction is running, or the directory cannot be written.
    """
    refusal = CacheError(f"another compaction of {directory} is running; wait for it to end.")
    try:
        # Two concurrent compactions might each drop a different copy of a duplicate row.
        with hold_lock(directory / LOCK, refusal):
            return _compact(directory / "shards", spec, progress)
    except OSError as error:
        if isinstance(error, CacheError):
            raise
        raise CacheError(
            f"cannot compact {directory}: {error.strerror or error}. No row was lost; make the "
            "cache writable, and run the command again."
        ) from error


def _compact(
    folder: Path, spec: CacheSpec, progress: Callable[[int, int], None] | None
) -> Compaction:
    _tidy_up(folder, spec)
    before = _sizes(folder)
    sources, n_repeats = _choose(folder, spec)
    groups = list(_group(sources, shards.max_rows(spec)))
    merged: set[Path] = set()
    for number, group in enumerate(groups, start=1):
        merged.update(source.path for source in group)
        _merge(folder, group, merged, spec)
        if progress:
            progress(number, len(groups))
    after = _sizes(folder)
    return Compaction(len(before), len(after), sum(before), sum(after), n_repeats)


def _tidy_up(folder: Path, spec: CacheSpec) -> None:
    """Complete a compaction that was killed."""
    for path in sorted(folder.glob("*" + shards.REPLACES)):
        merged = path.with_suffix(".h5")
        if merged.exists():
            shards.read_shard(merged, poolings=(), spec=spec)
            _remove(folder, [folder / name for name in read_replaced(path)])
        _remove(folder, [path])


def _sizes(folder: Path) -> list[int]:
    return [path.stat().st_size for path in committed_shards(folder)]


def _choose(folder: Path, spec: CacheSpec) -> tuple[list[_Source], int]:
    """Return the shards to be merged, and the number of duplicate rows."""
    paths = committed_shards(folder)
    if not paths:
        return [], 0
    with ThreadPoolExecutor(count_cores()) as pool:
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
    return sorted(chosen, key=lambda source: source.path.stat().st_mtime_ns), len(every.repeats)


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


def _merge(folder: Path, group: Sequence[_Source], merged: set[Path], spec: CacheSpec) -> None:
    """Write the rows of a group as one shard, then remove the shards that they come from.

    `merged` are the shards of this group and earlier ones, whose content is verified on the way.
    """
    parts = [_read_kept(source, spec) for source in group]
    keys = np.concatenate([keys for keys, _ in parts])
    rows = {name: np.concatenate([part[name] for _, part in parts]) for name in spec.poolings}
    for holder in {path for source in group for path in source.holders} - merged:
        shards.read_shard(holder, poolings=(), spec=spec)  # before the only other copy is removed
    old = [source.path for source in group]
    if not len(keys):
        _remove(folder, old)
        return
    new = shards.write_shard(folder, keys, rows, spec, replaces=[path.name for path in old])
    _remove(folder, [path for path in old if path != new])
    _remove(folder, [new.with_suffix(shards.REPLACES)])


def _read_kept(source: _Source, spec: CacheSpec) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    keys, rows = shards.read_shard(source.path, spec=spec)
    return keys[source.kept], {name: values[source.kept] for name, values in rows.items()}


def _remove(folder: Path, paths: Sequence[Path]) -> None:
    """Remove files durably: a shard's record of replacement must not vanish before the shard."""
    for path in paths:
        path.unlink(missing_ok=True)
    sync_directory(folder)
