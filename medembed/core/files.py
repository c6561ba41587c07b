"""Open only plain files; write files that are complete or absent; lock files; hash JSON."""

import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast, overload

from medembed.core.errors import ArgumentError
from medembed.core.text import without_credentials

__all__ = [
    "append_synced",
    "as_path",
    "describe_error",
    "hold_lock",
    "json_bytes",
    "json_digest",
    "naming_full_disk",
    "open_plain",
    "read_plain",
    "require_plain",
    "sync_directory",
    "write_atomically",
    "writing_atomically",
]


_KINDS = {
    stat.S_IFDIR: "directory",
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
    stat.S_IFLNK: "link",
}
_FLAGS = {
    "rb": os.O_RDONLY,
    "r+b": os.O_RDWR,
    "ab": os.O_WRONLY | os.O_APPEND | os.O_CREAT,
    "a+b": os.O_RDWR | os.O_APPEND | os.O_CREAT,
}
_FULL = (errno.ENOSPC, errno.EDQUOT)


def as_path(value: Any, what: str, otherwise: str = "") -> Path:
    """Return an argument as a path.

    Parameters
    ----------
    value : str or path-like
    what : str
        What the argument denotes, such as "a cache", for the error message.
    otherwise : str
        The accepted type besides a path, such as "a Cache".

    Raises
    ------
    ArgumentError
        The argument has another type, or is the URL of a bucket.
    """
    if "://" in str(value):
        shown = without_credentials(str(value))
        raise ArgumentError(
            f"{what} is a local path here, and {shown:.200} is not one. Copy it to this "
            "machine, a cache with `medembed cache pull URL DIR`, and name the copy."
        )
    if isinstance(value, str | os.PathLike):
        name = os.fspath(value)
        if isinstance(name, str):
            return Path(name)
    shown = repr(value)
    shown = shown if len(shown) <= 60 and "\n" not in shown else f"{shown.splitlines()[0][:60]}…"
    raise ArgumentError(
        f"{what} is given as a path{f' or as {otherwise}' if otherwise else ''}; this is of type "
        f"{type(value).__name__}: {shown}."
    )


@overload
def open_plain(
    path: str | Path, mode: str = "rb", *, buffering: Literal[0], follow_links: bool = True
) -> io.FileIO: ...


@overload
def open_plain(path: str | Path, mode: str = "rb", *, follow_links: bool = True) -> BinaryIO: ...


def open_plain(
    path: str | Path, mode: str = "rb", *, buffering: int = -1, follow_links: bool = True
) -> BinaryIO | io.FileIO:
    """Return an open plain file, or the target of a link to one.

    Anything else is refused before a byte is read: a named pipe would block forever, and a device
    may never end.

    Parameters
    ----------
    mode : {"rb", "r+b", "ab", "a+b"}
        A mode of `open`; the last two create the file.
    buffering : int
        Buffering policy of `open`.
    follow_links : bool
        If False, links are refused as well.

    Raises
    ------
    OSError
        The file does not exist, cannot be opened, or is not a plain file; `strerror` gives the
        reason without the path. For a directory it is an IsADirectoryError.
    """
    try:
        require_plain(path, follow_links=follow_links)
    except FileNotFoundError:
        if not _FLAGS[mode] & os.O_CREAT:
            raise
    flags = _FLAGS[mode] | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    descriptor = os.open(path, flags if follow_links else flags | os.O_NOFOLLOW, 0o666)
    try:
        _refuse_special(os.fstat(descriptor), path)  # the name may mean another file by now
        return cast("BinaryIO | io.FileIO", os.fdopen(descriptor, mode, buffering))
    except BaseException:
        os.close(descriptor)
        raise


def read_plain(
    path: str | Path, *, max_bytes: int | None = None, follow_links: bool = True
) -> bytes:
    """Return the content of a plain file; see `open_plain`.

    Raises
    ------
    OSError
        The file cannot be opened (see `open_plain`), or has more than `max_bytes` bytes (EFBIG), in
        which case none is read.
    """
    with open_plain(path, follow_links=follow_links) as file:
        n_bytes = os.fstat(file.fileno()).st_size
        if max_bytes is None:
            return file.read()
        if n_bytes > max_bytes:
            raise OSError(
                errno.EFBIG, f"it has {n_bytes:,} bytes; at most {max_bytes:,} are read", str(path)
            )
        data = file.read(n_bytes + 1)  # not max_bytes: Python allocates the requested size
        if len(data) > n_bytes:
            data += file.read(max_bytes + 1 - len(data))
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"it grew beyond {max_bytes:,} bytes while read", str(path))
    return data


def require_plain(path: str | Path, *, follow_links: bool = True) -> None:
    """Check that a path names a plain file, for a library that opens paths itself.

    Raises
    ------
    OSError
        The path is missing or not a plain file; see `open_plain`.
    """
    _refuse_special(os.stat(path, follow_symlinks=follow_links), path)


def _refuse_special(status: os.stat_result, path: str | Path) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        code = errno.EISDIR if kind == stat.S_IFDIR else errno.EINVAL
        raise OSError(code, f"it is a {_KINDS.get(kind, 'special file')}, not a file", str(path))


def describe_error(error: Exception) -> str:
    """Return an error's message, for a system error without the path, which the caller names."""
    return str(getattr(error, "strerror", None) or error)


def append_synced(path: Path, data: bytes) -> None:
    """Append to a plain file, created if missing; `data` is on disk on return.

    Raises
    ------
    OSError
        The file cannot be written; for a full disk see `naming_full_disk`.
    """
    with naming_full_disk(path, len(data)), open_plain(path, "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make the directory entries of `path` durable (POSIX: fsync on the directory)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` by writing a temporary file beside it, syncing and renaming.

    Readers see the old file or the complete new one. After an error nothing is left behind.

    Raises
    ------
    OSError
        The directory is missing, not writable, or full.
    """
    with writing_atomically(path, len(data)) as file:
        file.write(data)


@contextmanager
def writing_atomically(path: Path, n_bytes: int | None = None) -> Iterator[BinaryIO]:
    """Yield a temporary file, which is synced and renamed to `path` if the `with` block succeeds.

    If the disk is full, the error states how much of `n_bytes` is missing, if that is given.
    Raises like `write_atomically`.
    """
    with suppress(FileNotFoundError):
        status = path.stat()
        if not stat.S_ISDIR(status.st_mode):  # a rename itself refuses to replace a directory
            _refuse_special(status, path)  # a rename would turn /dev/null into a plain file
    with naming_full_disk(path, n_bytes):
        yield from _writing(path)


def _writing(path: Path) -> Iterator[BinaryIO]:
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextmanager
def naming_full_disk(path: Path, n_bytes: int | None = None) -> Iterator[None]:
    """Make an out-of-space error name the file, and the space that is free and needed.

    The system's own error names neither. Other errors are passed on unchanged.

    Parameters
    ----------
    n_bytes : int, optional
        The number of bytes to be written.

    Raises
    ------
    OSError
        ENOSPC or EDQUOT, with `filename`.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL or error.strerror != os.strerror(error.errno):
            raise  # another error, or one that is explained already
        what = error.strerror or "No space left on device"
        raise OSError(error.errno, f"{what}{_lack(path, n_bytes)}", str(path)) from error


def _lack(path: Path, n_bytes: int | None) -> str:
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError:
        return ""
    if n_bytes is None:
        return f"; {free:,} bytes are free"
    if n_bytes <= free:  # a quota or the number of files is exhausted
        return f"; {n_bytes:,} bytes were wanted and {free:,} are free: is a quota used up?"
    return f": {n_bytes:,} bytes were wanted, {free:,} are free, {n_bytes - free:,} are missing"


def json_bytes(document: Any) -> bytes:
    """Return indented UTF-8 JSON with a final newline; NaN and infinities are refused.

    If a text is a file name that is not valid UTF-8, which Python represents by surrogates, all
    characters outside ASCII are escaped.
    """
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        return f"{text}\n".encode()
    except UnicodeEncodeError:
        return f"{json.dumps(document, indent=2, allow_nan=False)}\n".encode()


def json_digest(document: Any) -> str:
    """Return the SHA-256, in hex, of JSON values, ignoring the order of keys; NaN is refused."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


@contextmanager
def hold_lock(path: Path, refusal: Exception) -> Iterator[None]:
    """Hold a lock on the file `path`, which is created; raise `refusal` if another process has it.

    The lock is the system's and ends with the process in any case.
    """
    with open_plain(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise refusal from None
        yield


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
