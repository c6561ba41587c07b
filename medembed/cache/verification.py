"""Verify that a cache is intact, and set damaged shards aside."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medembed.cache import shards
from medembed.cache.index import SortedKeys, list_files, replaced_shards
from medembed.cache.shards import REPLACES
from medembed.cache.spec import CacheSpec
from medembed.cache.storage import READERS, file_size
from medembed.core import object_store
from medembed.core.errors import CacheError, ShardError, StorageError
from medembed.core.files import sync_directory
from medembed.core.locations import BucketPath, Location
from medembed.core.system import count_cores

__all__ = ["SET_ASIDE", "Problem", "repair", "verify"]

SET_ASIDE = "set-aside"


@dataclass(frozen=True)
class Problem:
    """A problem with one file of a cache.

    Parameters
    ----------
    path : Path or BucketPath
        The file.
    what : str
        One line: the file, what is wrong, the way out.
    is_bad : bool
        Whether its rows cannot be trusted, so that `repair` sets it aside. Duplicate rows are a
        problem, but do not make a shard bad.
    """

    path: Location
    what: str
    is_bad: bool = True


def verify(
    directory: Location, spec: CacheSpec, progress: Callable[[int, int], None] | None = None
) -> list[Problem]:
    """Return all problems, after checking every byte of every shard, its spec and its rows.

    Shards are read in parallel, one in memory per thread; their bytes are compared with their name
    before they are passed to HDF5, which a single flipped bit can hang. Those of a bucket are read
    from there, whatever copies this machine has.

    Parameters
    ----------
    directory : Path or BucketPath
        The cache.
    spec : CacheSpec
        The cache's spec.
    progress : callable, optional
        Called as progress(done, total) with bytes.

    Returns
    -------
    list of Problem
        Sorted by name. Leftovers of a killed writer (`*.partial`) or compaction are harmless and
        ignored.

    Raises
    ------
    StorageError
        The store of a bucket fails, which says nothing about the shards.
    """
    paths = _files(directory / "shards")
    count = _Count(sum(map(file_size, paths)), progress)

    def check(path: Location) -> tuple[np.ndarray | None, Problem | None]:
        try:
            return _check_shard(path, spec), None
        except CacheError as error:
            if isinstance(error.__cause__, StorageError):
                raise error.__cause__ from None
            if _is_gone(path, error):  # removed meanwhile
                return None, None
            return None, Problem(path, str(error))
        finally:
            count.add(file_size(path))

    n_threads = READERS if isinstance(directory, BucketPath) else count_cores()
    with ThreadPoolExecutor(n_threads) as pool:
        found = list(pool.map(check, paths))
    problems = [problem for _, problem in found if problem]
    whole = [(path, keys) for path, (keys, _) in zip(paths, found, strict=True) if keys is not None]
    return sorted([*problems, *_find_repeats(whole)], key=lambda problem: problem.path)


def repair(directory: Location, problems: Sequence[Problem]) -> list[Location]:
    """Move bad shards to `set-aside/`, and return their new paths.

    Nothing is overwritten; in a bucket the object is copied, and deleted where it was. The next
    `medembed extract` embeds only their rows again.

    Raises
    ------
    CacheError
        A file cannot be moved.
    """
    bad = [problem.path for problem in problems if problem.is_bad]
    if isinstance(directory, BucketPath):
        return _repair_bucket(directory, [path for path in bad if isinstance(path, BucketPath)])
    return _repair_directory(directory, [path for path in bad if not isinstance(path, BucketPath)])


def _repair_bucket(directory: BucketPath, bad: Sequence[BucketPath]) -> list[Location]:
    moved: list[Location] = []
    try:
        for path in bad:
            number, aside = 1, directory / SET_ASIDE / path.name
            while object_store.object_exists(aside):
                number += 1
                aside = aside.with_name(f"{path.name}.{number}")
            object_store.copy_object(path, aside)
            object_store.delete_objects([path])
            moved.append(aside)
    except OSError as error:
        raise CacheError(f"cannot set aside shards of {directory}: {error}") from None
    return moved


def _repair_directory(directory: Path, bad: Sequence[Path]) -> list[Location]:
    aside = directory / SET_ASIDE
    moved: list[Location] = []
    try:
        for path in bad:
            aside.mkdir(exist_ok=True)
            free = _free_name(aside / path.name)
            moved.append(free)
            os.rename(path, free)
        if moved:
            sync_directory(aside)
            sync_directory(directory / "shards")
    except OSError as error:
        raise CacheError(
            f"cannot move {error.filename} into {aside}: {error.strerror or error}. Make the cache "
            "writable, and run the command again."
        ) from error
    return moved


def _files(folder: Location) -> list[Location]:
    files = list_files(folder)
    replaced = replaced_shards(files)
    paths = [files[name] for name in sorted(files) if name not in replaced]
    return [path for path in paths if path.suffix not in (".partial", REPLACES)]


def _is_gone(path: Location, error: CacheError) -> bool:
    if isinstance(path, BucketPath):
        return isinstance(error.__cause__, FileNotFoundError)
    return not os.path.lexists(path)


def _check_shard(path: Location, spec: CacheSpec) -> np.ndarray:
    """Return the keys of a shard after verifying it."""
    if not shards.is_shard_name(path.name):
        raise CacheError(f"{path} is not a shard: its name is not 32 hex digits and .h5")
    keys, embeddings = shards.read_shard(path, spec=spec, again=True)
    if not np.array_equal(keys, shards.read_keys(path, again=True)):
        raise ShardError(f"shard {path} names other keys in its header than in its rows")
    try:
        shards.as_stored(embeddings, spec, len(keys))
    except CacheError as error:
        raise CacheError(f"shard {path}: {error}") from error
    return keys


def _find_repeats(whole: list[tuple[Location, np.ndarray]]) -> Iterator[Problem]:
    if not whole:
        return
    edges = np.cumsum([0, *(len(keys) for _, keys in whole)])
    repeats = SortedKeys(np.concatenate([keys for _, keys in whole])).repeats
    counts = np.bincount(np.searchsorted(edges, repeats, side="right") - 1, minlength=len(whole))
    for (path, _), n_rows in zip(whole, counts.tolist(), strict=True):
        if n_rows:
            yield Problem(
                path,
                f"{n_rows} row(s) of shard {path} are also in another shard; `medembed cache "
                "compact` keeps one of each",
                is_bad=False,
            )


def _free_name(path: Path) -> Path:
    number, free = 1, path
    while free.exists() or free.is_symlink():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free


class _Count:
    """Counts the bytes processed by several threads."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self._done, self._total, self._progress = 0, total, progress
        self._lock = threading.Lock()

    def add(self, n_bytes: int) -> None:
        with self._lock:
            self._done += n_bytes
            if self._progress:
                self._progress(min(self._done, self._total), self._total)
