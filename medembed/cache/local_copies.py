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
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from medembed.cache.storage import READERS
from medembed.core import object_store
from medembed.core.errors import CacheError, ShardError
from medembed.core.files import describe_error, open_plain
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
    "has_copy",
    "open_copy",
    "open_object",
    "read_whole",
    "require_room",
]

MAX_BYTES = 50 * 10**9
KEPT_FREE = 2**30  # bytes of the disk that copies leave free
FIRST_BYTES = 2**18 + 2**11  # of a shard: its header, and the keys of 8192 rows
DIGITS = 32  # of the SHA-256 in a shard's name
TRIES = 3  # of a shard whose bytes are not what its name says: a line may be bad
MAX_WAIT = 300.0  # seconds for another process that fetches the same shard
NO_ROOM = "no room"
UNWRITABLE = "nothing can be written"
BUSY = "another process"
_POLL = 0.02  # seconds
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
        `MEDEMBED_SHARDS_MAX_BYTES` is not a number of bytes.
    """
    text = os.environ.get("MEDEMBED_SHARDS_MAX_BYTES") or str(MAX_BYTES)
    try:
        return int(float(text))
    except (ValueError, OverflowError):
        raise CacheError(
            f"MEDEMBED_SHARDS_MAX_BYTES={text:.40} is not a number of bytes, such as 50e9."
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
    return _open_held(path) or (Proven(fetch(path)) if whole else FirstBytes(path))


def _open_held(path: BucketPath) -> BinaryIO | None:
    """Return the copy of a shard, open, after noting that it is used; None if none can be read."""
    try:
        file = open_plain(copies_directory() / path.name)
    except OSError:
        return None
    with suppress(OSError):  # another user's, or on a disk that is only read
        os.utime(file.fileno())
    return file


def fetch(path: BucketPath) -> bytes:
    """Return the bytes of a shard from its bucket, proven by its name, and keep a copy.

    Of several processes that want one shard, one fetches it, and the others wait for its copy.

    Raises
    ------
    FileNotFoundError
        The bucket does not hold it.
    StorageError
        The store refuses, or keeps failing.
    ShardError
        The bytes are not those that the name promises, however often they are read.
    """
    return _fetch(path)[0]


def _fetch(path: BucketPath) -> tuple[bytes, str]:
    """Return what `fetch` does, and why there is no copy, "" if there is one."""
    with _turn(path.name) as file:
        held = _read_held(path)
        if held:
            return held, ""
        data = _read_proven(path)
        return data, _keep(path.name, data, file)


def read_whole(path: BucketPath) -> bytes:
    """Return the bytes of a shard, proven, and keep no new copy. Raises like `fetch`."""
    return _read_held(path) or _read_proven(path)


def _read_held(path: BucketPath) -> bytes | None:
    """Return the bytes of a copy; None if there is none, or it is damaged."""
    file = _open_held(path)
    if file is None:
        return None
    with file:
        data = file.read()
    return data if _is_named(data, path) else None


def _read_proven(path: BucketPath) -> bytes:
    for attempt in range(1, TRIES + 1):
        data = object_store.read_object(path)
        if _is_named(data, path):
            return data
        object_store.pause(attempt)
    raise damaged_shard(path, "its bytes are not those of its name")


def _is_named(data: bytes, path: BucketPath) -> bool:
    return hashlib.sha256(data).hexdigest()[:DIGITS] == path.stem


def open_copy(path: BucketPath) -> BinaryIO:
    """Return the copy of a shard, open; it is fetched where there is none. Raises like `fetch`.

    Raises
    ------
    CacheError
        There is no room for the copy, its directory cannot be written, or another process fetches
        it and does not end.
    """
    for _ in range(TRIES):  # others may remove it at once
        file = _open_held(path)
        if file:
            return file
        _, reason = _fetch(path)
        if reason:
            break
    file = _open_held(path)  # who was waited for in vain may have ended meanwhile
    if file:
        return file
    if reason == BUSY:
        raise CacheError(
            f"another process has been fetching {path} to {copies_directory()} for more than "
            f"{MAX_WAIT:g} seconds. Wait for it, or end it, and run the command again."
        )
    raise CacheError(
        f"{reason or NO_ROOM} in {copies_directory()} for a copy of {path}. Make room, or set "
        "MEDEMBED_SHARDS to a directory on a larger disk, or MEDEMBED_SHARDS_MAX_BYTES to more "
        "bytes."
    )


def has_copy(path: BucketPath) -> bool:
    """Tell whether this machine has a copy of a shard."""
    return (copies_directory() / path.name).exists()


def forget(path: BucketPath) -> bool:
    """Remove a copy, such as one that is damaged; return whether there was one, and is no more."""
    try:
        (copies_directory() / path.name).unlink()
    except OSError:
        return False
    return True


@contextmanager
def _turn(name: str) -> Iterator[io.FileIO | str]:
    """Hold the lock of a shard's copy, on the file that is to become it.

    It is the system's, and ends with its process. Yields the reason where the directory
    cannot be written, or whoever holds the lock does not end: then the shard is not kept.
    """
    partial = copies_directory() / f".{name}.partial"
    file = _lock(partial)
    try:
        yield file
    finally:
        if not isinstance(file, str):
            if _is_at(file, partial):
                with suppress(OSError):
                    partial.unlink()
            file.close()


def _lock(partial: Path) -> io.FileIO | str:
    until = time.monotonic() + MAX_WAIT
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        while time.monotonic() < until:
            file = open_plain(partial, "ab", buffering=0)  # nothing is left to its closing
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(file, partial):  # and is not what became a copy, or was removed
                    return file
            file.close()
            time.sleep(_POLL)
    except OSError:
        return UNWRITABLE
    return BUSY


def _is_at(file: io.FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _keep(name: str, data: bytes, file: io.FileIO | str) -> str:
    """Write a copy to its locked file; return why there is none, "" if there is one.

    Without a copy the shard is fetched again when it is needed.
    """
    directory = copies_directory()
    if isinstance(file, str):
        return file
    try:
        with open(directory / ".lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _make_room(directory, len(data)):
                return NO_ROOM
            partial = directory / f".{name}.partial"
            if not _is_at(file, partial):
                return "the partial file was removed while being written"
            # (still locked: what others write meanwhile would not count)
            file.truncate(0)
            left = memoryview(data)
            while left:  # a disk that fills up accepts a part, and refuses the next
                left = left[file.write(left) :]
            os.replace(partial, directory / name)
    except OSError as error:
        return f"{UNWRITABLE} ({describe_error(error)})"
    return ""


@dataclass
class _Held:
    """The files of the directory of copies."""

    copies: list[tuple[int, int, str]]  # when used, bytes, path
    partials: list[tuple[int, str]]  # when begun, path
    newest: int = 0

    @property
    def n_bytes(self) -> int:
        return sum(size for _, size, _ in self.copies)

    def most(self, directory: Path) -> int:
        """Return the bytes that copies may take, here and now."""
        return min(_most_bytes(), self.n_bytes + shutil.disk_usage(directory).free - KEPT_FREE)


def _scan(directory: Path) -> _Held:
    held = _Held([], [])
    with os.scandir(directory) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                status = entry.stat()
                held.newest = max(held.newest, status.st_mtime_ns)
                if entry.name.endswith(".h5"):
                    held.copies.append((status.st_mtime_ns, status.st_size, entry.path))
                elif entry.name.endswith(".partial"):
                    held.partials.append((status.st_mtime_ns, entry.path))
    return held


def _make_room(directory: Path, n_bytes: int) -> bool:
    """Remove copies, the least recently used first; return whether there is room now."""
    held = _scan(directory)
    for changed, path in held.partials:
        # by the disk's clock, which is that of all machines
        if held.newest - changed > _ABANDONED_NS:
            Path(path).unlink(missing_ok=True)
    most, total = held.most(directory), held.n_bytes
    if n_bytes > most:
        return False  # and nothing is removed in vain
    for _, size, path in sorted(held.copies):
        if total + n_bytes <= most:
            break
        Path(path).unlink(missing_ok=True)
        total -= size
    return True


def require_room(paths: Sequence[BucketPath]) -> None:
    """Refuse to copy shards that have no room beside each other.

    Raises
    ------
    CacheError
        The later copies would displace the earlier ones.
    """
    directory = copies_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        most = _scan(directory).most(directory)
    except OSError as error:
        raise CacheError(
            f"nothing can be written in {directory}: {describe_error(error)}. Set MEDEMBED_SHARDS "
            "to a directory that can be."
        ) from None
    total = sum(path.size or 0 for path in paths)
    if total > most:
        raise CacheError(
            f"{NO_ROOM} in {directory} for copies of {total / 1e6:,.1f} MB: at most "
            f"{max(0, most) / 1e6:,.1f} MB are available. Make room, or set MEDEMBED_SHARDS to a "
            "directory on a larger disk, or MEDEMBED_SHARDS_MAX_BYTES to more bytes; or name a DIR "
            "to copy to."
        )


class Download:
    """Shows the progress of a read that fetches shards; used as a context manager.

    Parameters
    ----------
    paths : sequence of BucketPath
        The shards that are needed, with their sizes. Those that have a copy are not counted.
    """

    def __init__(self, paths: Sequence[BucketPath]) -> None:
        self._missing = {path for path in paths if not has_copy(path)}
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

    @property
    def is_needed(self) -> bool:
        """Whether a shard has no copy."""
        return bool(self._missing)

    def done(self, path: BucketPath) -> None:
        """Count a shard that has been read."""
        if path in self._missing:
            with self._lock:
                self._done += path.size or 0
                self._progress(self._done, self._total)


def fetch_all(paths: Sequence[BucketPath]) -> None:
    """Fetch the shards that have no copy, several at a time. Raises like `open_copy`."""
    with Download(paths) as download, ThreadPoolExecutor(READERS) as pool:

        def get(path: BucketPath) -> None:
            open_copy(path).close()
            download.done(path)

        list(pool.map(get, paths))
