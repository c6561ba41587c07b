"""Open plain files alone; write files that are complete or absent; lock files; hash JSON."""

import errno
import fcntl
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

__all__ = [
    "hold_lock",
    "json_bytes",
    "json_digest",
    "open_plain",
    "read_plain",
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
}


def open_plain(path: str | Path) -> BinaryIO:
    """Open a file for reading in binary, if it is a plain file or a link to one.

    Anything else is refused before a byte is read: a named pipe would block for ever, and a device
    may never end.

    Raises
    ------
    OSError
        There is no such file, it may not be read, or it is no plain file; `strerror` says which,
        without the path. For a directory it is an IsADirectoryError.
    """
    _require_plain(os.stat(path), path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _require_plain(os.fstat(descriptor), path)  # the name may mean another file by now
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_plain(path: str | Path, *, max_bytes: int | None = None) -> bytes:
    """Read a whole plain file; see `open_plain`.

    Raises
    ------
    OSError
        As `open_plain`, or the file has more than `max_bytes` bytes (EFBIG); none is read then.
    """
    with open_plain(path) as file:
        n_bytes = os.fstat(file.fileno()).st_size
        if max_bytes is None:
            return file.read()
        if n_bytes > max_bytes:
            raise OSError(
                errno.EFBIG, f"it has {n_bytes:,} bytes; at most {max_bytes:,} are read", str(path)
            )
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"it grew beyond {max_bytes:,} bytes while read", str(path))
    return data


def _require_plain(status: os.stat_result, path: str | Path) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        code = errno.EISDIR if kind == stat.S_IFDIR else errno.EINVAL
        raise OSError(code, f"it is a {_KINDS.get(kind, 'special file')}, not a file", str(path))


def sync_directory(path: Path) -> None:
    """Make the directory entries of `path` durable (POSIX: fsync on the directory)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` by writing beside it, syncing and renaming.

    Readers see the old file or the whole new one. On any error nothing is left behind.

    Raises
    ------
    OSError
        The directory is missing, not writable, or full.
    """
    with writing_atomically(path) as file:
        file.write(data)


@contextmanager
def writing_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside `path`, which takes its name, synced, when the `with` block ends well.

    Raises as `write_atomically`.
    """
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


def json_bytes(document: Any) -> bytes:
    """Encode as UTF-8 JSON, indented, ending in a newline; NaN and infinities are refused.

    Where a text is a file name of bytes that are no UTF-8, which Python keeps as halves of
    characters, all that is not ASCII is escaped.
    """
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        return f"{text}\n".encode()
    except UnicodeEncodeError:
        return f"{json.dumps(document, indent=2, allow_nan=False)}\n".encode()


def json_digest(document: Any) -> str:
    """Hash JSON values, whatever the order of their keys: SHA-256 in hex; NaN is refused."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


@contextmanager
def hold_lock(path: Path, refusal: Exception) -> Iterator[None]:
    """Hold the lock of the file `path`, which is made; raise `refusal` where another process does.

    The lock is the system's and ends with the process, however that ends.
    """
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise refusal from None
        yield


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
