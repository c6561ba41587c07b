"""Shards of buckets, copied whole to a directory that all processes of a machine share.

A copy has the name of its shard, the SHA-256 of its bytes, so that caches which hold the same shard
share it, and nobody can take it for another. The directory is bounded: the copies that were used
least recently are removed first. `MEDEMBED_SHARDS` names it, by default
`~/.cache/medembed/shards`, and `MEDEMBED_SHARDS_MAX_BYTES` bounds it, by default to 50 GB.
"""

import fcntl
import hashlib
import io
import os
import shutil
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from medembed.cache.storage import READERS
from medembed.core import object_store
from medembed.core.errors import CacheError, ShardError
from medembed.core.files import open_plain
from medembed.core.locations import BucketPath, Location

__all__ = [
    "Download",
    "FirstBytes",
    "Proven",
    "copies_directory",
    "damaged_shard",
    "fetch",
    "fetch_all",
    "forget",
    "open_copy",
    "open_object",
]

MAX_BYTES = 50 * 10**9
KEPT_FREE = 2**30  # bytes of the disk that copies leave free
FIRST_BYTES = 2**18 + 2**11  # of a shard: its header, and the keys of 8192 rows
DIGITS = 32  # of the SHA-256 in a shard's name
TRIES = 3  # of a shard whose bytes are not what its name says: a line may be bad
_ABANDONED_NS = 86_400 * 10**9  # after a day, a partial copy is of a process that was killed


def copies_directory() -> Path:
    """Return the directory of copies, which need not exist."""
    named = os.environ.get("MEDEMBED_SHARDS")
    if named:
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(home) if home else Path.home() / ".cache") / "medembed" / "shards"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / f"medembed-shards-{os.getuid()}"


def _most_bytes() -> int:
    """Return the bound of the directory of copies.

    Raises
    ------
    CacheError
        `MEDEMBED_SHARDS_MAX_BYTES` is no number of bytes.
    """
    text = os.environ.get("MEDEMBED_SHARDS_MAX_BYTES") or str(MAX_BYTES)
    try:
        return int(float(text))
    except (ValueError, OverflowError):
        raise CacheError(
            f"MEDEMBED_SHARDS_MAX_BYTES={text:.40} is no number of bytes, such as 50e9."
        ) from None


def damaged_shard(path: Location, what: str) -> ShardError:
    """Return the error that says what is wrong with a shard, and the way out."""
    return ShardError(
        f"shard {path} is damaged: {what}. Move it out of the cache, as `medembed cache verify "
        "--repair` does, and run `medembed extract` again: only its rows are embedded anew."
    )


class Proven(io.BytesIO):
    """Bytes of a bucket whose hash is their shard's name."""


class FirstBytes(io.BytesIO):
    """The first bytes of an object, its keys among them; what is behind them is asked for.

    Attributes
    ----------
    size : int
        Bytes of the object.
    """

    def __init__(self, path: BucketPath) -> None:
        data, self.size = object_store.read_range(path, 0, FIRST_BYTES)
        self._path, self._held = path, len(data)
        super().__init__(data)

    def read(self, size: int | None = -1) -> bytes:
        """Return the next bytes."""
        start = self.tell()
        stop = self.size if size is None or size < 0 else min(self.size, start + size)
        if stop <= self._held:
            return super().read(size)
        self.seek(stop)
        return object_store.read_range(self._path, start, stop)[0]


def open_object(path: BucketPath, *, whole: bool = False, again: bool = False) -> BinaryIO:
    """Open a shard of a bucket: its copy, if there is one, or what is read from there.

    Parameters
    ----------
    whole : bool
        Fetch the whole shard, prove it, and keep a copy; else its first bytes have to do.
    again : bool
        Read the object, copy or not, and prove nothing.

    Raises
    ------
    OSError
        The object does not exist, cannot be read, or is not what its name says.
    """
    if again:
        return io.BytesIO(object_store.read_object(path)) if whole else FirstBytes(path)
    copy = copies_directory() / path.name
    with suppress(OSError):
        file = open_plain(copy)
        os.utime(copy)
        return file
    return Proven(fetch(path)) if whole else FirstBytes(path)


def fetch(path: BucketPath) -> bytes:
    """Return the bytes of a shard from its bucket, proven by its name, and keep a copy.

    Raises
    ------
    FileNotFoundError
        The bucket does not hold it.
    StorageError
        The store refuses, or keeps failing.
    ShardError
        The bytes are not those that the name promises, however often they are read.
    """
    for attempt in range(1, TRIES + 1):
        data = object_store.read_object(path)
        found = hashlib.sha256(data).hexdigest()[:DIGITS]
        if found == path.stem:
            _keep(path.name, data)
            return data
        object_store.pause(attempt)
    raise damaged_shard(path, f"its bytes hash to {found}")


def open_copy(path: BucketPath) -> BinaryIO:
    """Return the copy of a shard, open; it is fetched where there is none. Raises like `fetch`.

    Raises
    ------
    CacheError
        There is no room for the copy.
    """
    copy = copies_directory() / path.name
    for _ in range(TRIES):
        with suppress(FileNotFoundError):
            file = open_plain(copy)
            os.utime(copy)
            return file
        fetch(path)
    raise CacheError(
        f"no room in {copies_directory()} for a copy of {path}. Make room, or set MEDEMBED_SHARDS "
        "to a directory on a larger disk, or MEDEMBED_SHARDS_MAX_BYTES to more bytes."
    )


def forget(path: BucketPath) -> None:
    """Remove a copy, such as one that is damaged."""
    with suppress(OSError):
        (copies_directory() / path.name).unlink(missing_ok=True)


def _keep(name: str, data: bytes) -> None:
    """Write a copy; without room or permission there is none, and the shard is fetched again."""
    directory = copies_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / ".lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _make_room(directory, len(data)):
                return
            # (still locked: what others write meanwhile would not count)
            partial = directory / f".{name}.{os.getpid()}.{threading.get_ident()}.partial"
            try:
                partial.write_bytes(data)
                os.replace(partial, directory / name)
            finally:
                partial.unlink(missing_ok=True)
    except OSError:
        return


def _make_room(directory: Path, n_bytes: int) -> bool:
    """Remove copies, the least recently used first; return whether there is room now."""
    copies, partials, total, newest = [], [], 0, 0
    with os.scandir(directory) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                status = entry.stat()
                newest = max(newest, status.st_mtime_ns)
                if entry.name.endswith(".h5"):
                    copies.append((status.st_mtime_ns, status.st_size, entry.path))
                    total += status.st_size
                elif entry.name.endswith(".partial"):
                    partials.append((status.st_mtime_ns, entry.path))
    for changed, path in partials:
        if newest - changed > _ABANDONED_NS:  # by the disk's clock, which is that of all machines
            Path(path).unlink(missing_ok=True)
    most = min(_most_bytes(), total + shutil.disk_usage(directory).free - KEPT_FREE)
    for _, size, path in sorted(copies):
        if total + n_bytes <= most:
            break
        os.unlink(path)
        total -= size
    return total + n_bytes <= most


class Download:
    """Shows the progress of a read that fetches shards; used as a context manager.

    Parameters
    ----------
    paths : sequence of BucketPath
        The shards that are needed, with their sizes. Those that have a copy are not counted.
    """

    def __init__(self, paths: Sequence[BucketPath]) -> None:
        directory = copies_directory()
        there = {path: (directory / path.name).exists() for path in paths}
        self._missing = {path for path, is_there in there.items() if not is_there}
        self._total = sum(path.size or 0 for path in self._missing)
        self._done, self._lock = 0, threading.Lock()

    def __enter__(self) -> "Download":
        if self._missing:
            prefix = next(iter(self._missing)).parent.parent
            n_shards = len(self._missing)
            self._shown = object_store.announcing(
                f"Fetching {n_shards:,} shard{'s' * (n_shards != 1)}, {self._total / 1e6:,.1f} MB, "
                f"from {prefix}"
            )
            self._progress = self._shown.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._missing:
            self._shown.__exit__(None, None, None)

    def done(self, path: BucketPath) -> None:
        """Count a shard that has been read."""
        if path in self._missing:
            with self._lock:
                self._done += path.size or 0
                self._progress(self._done, self._total)


def fetch_all(paths: Sequence[BucketPath]) -> None:
    """Fetch the shards that have no copy, several at a time. Raises like `fetch`."""
    with Download(paths) as download, ThreadPoolExecutor(READERS) as pool:

        def get(path: BucketPath) -> None:
            if not (copies_directory() / path.name).exists():
                fetch(path)
            download.done(path)

        list(pool.map(get, paths))
