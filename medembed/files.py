"""Write files so that they are complete or absent, one process at a time; hash JSON."""

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

__all__ = [
    "hold_lock",
    "json_bytes",
    "json_digest",
    "sync_directory",
    "write_atomically",
    "writing_atomically",
]


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
