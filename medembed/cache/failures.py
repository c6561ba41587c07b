"""`failures.jsonl`: images that could not become a row, one line each, append-only.

Nothing can be appended to an object of a bucket. There each process that has failures writes one
object below `failures/`, of all its lines, anew with each addition; who reads merges them.
"""

import io
import json
import os
import re
import secrets
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from medembed.cache.spec import KEY_BYTES
from medembed.core import object_store
from medembed.core.errors import CacheError
from medembed.core.files import describe_error, open_plain, read_plain, sync_directory
from medembed.core.locations import BucketPath, Location

__all__ = [
    "STAGES",
    "Failure",
    "FailureObject",
    "append_failures",
    "name_failures",
    "read_failure_lines",
    "read_failures",
]

STAGES = ("read", "decode", "encode")
DIGEST = re.compile(f"[0-9a-f]{{{2 * KEY_BYTES}}}")


@dataclass(frozen=True)
class Failure:
    """The reason why the image with these bytes has no row.

    Parameters
    ----------
    sha256 : str
        SHA-256 of the file's bytes, hex. No name or path is stored, which might identify a patient.
    stage : {"read", "decode", "encode"}
        The stage that failed.
    reason : str
        The stage's error message.
    """

    sha256: str
    stage: str
    reason: str


def name_failures(images: Iterable[str], failure: Failure) -> list[dict[str, str]]:
    """Return a failure for each image that has these bytes: `image`, and the failure's fields."""
    return [{"image": image, **asdict(failure)} for image in images]


def read_failures(path: Location) -> dict[str, Failure]:
    """Return the newest failure of each image, by sha256.

    A line truncated by a crash is skipped: its image is merely retried.

    Parameters
    ----------
    path : Path or BucketPath
        The cache's `failures.jsonl`; in a bucket also what lies below `failures/` beside it.

    Raises
    ------
    CacheError
        The file cannot be read.
    """
    lines = read_failure_lines(path).splitlines()
    return {failure.sha256: failure for failure in map(_parse, lines) if failure}


def read_failure_lines(path: Location) -> bytes:
    """Return all lines, the oldest first. Raises like `read_failures`."""
    try:
        if isinstance(path, BucketPath):
            return _read_objects(path)
        return read_plain(path) if path.exists() else b""
    except OSError as error:
        raise CacheError(f"cannot read {path}: {describe_error(error)}") from error


def _read_objects(path: BucketPath) -> bytes:
    """Return the lines of a copied `failures.jsonl`, and of every process in order of writing."""
    written = object_store.list_objects(path.with_suffix(""))
    in_order = [path, *(o.path for o in sorted(written, key=lambda o: (o.modified, o.path)))]

    def read(path: BucketPath) -> bytes:
        with suppress(FileNotFoundError):
            return object_store.read_object(path)
        return b""

    with ThreadPoolExecutor(object_store.AHEAD) as pool:
        return b"\n".join(pool.map(read, in_order))


class FailureObject:
    """The failures of one process in a bucket.

    Parameters
    ----------
    path : BucketPath
        The cache's `failures.jsonl`.
    """

    def __init__(self, path: BucketPath) -> None:
        self._path = path.with_suffix("") / f"{secrets.token_hex(16)}.jsonl"
        self._data = b""

    def append(self, new: Iterable[Failure]) -> None:
        """Add failures; the object holds them on return.

        Raises
        ------
        CacheError
            It cannot be written.
        """
        data = self._data + _as_lines(new)
        if data == self._data:
            return
        try:
            object_store.put_object(self._path, data)
        except OSError as error:
            raise CacheError(f"cannot write {self._path}: {describe_error(error)}") from None
        self._data = data


def _as_lines(failures: Iterable[Failure]) -> bytes:
    return b"".join(json.dumps(asdict(failure)).encode() + b"\n" for failure in failures)


def append_failures(path: Path, new: Iterable[Failure]) -> None:
    """Append failures, one line each, and sync the file and its name.

    Raises
    ------
    CacheError
        The file cannot be written.
    """
    data = _as_lines(new)
    if not data:
        return
    try:
        # One write in append mode: lines of several workers are not interleaved.
        with open_plain(path, "a+b", buffering=0) as file:
            _write_all(file, b"\n" + data if _is_torn(file) else data)
            os.fsync(file.fileno())
        sync_directory(path.parent)
    except OSError as error:
        raise CacheError(f"cannot append to {path}: {error.strerror or error}") from error


def _write_all(file: io.FileIO, data: bytes) -> None:
    written = 0
    while written < len(data):  # a disk that fills up accepts a part, and refuses the next
        written += file.write(data[written:])


def _is_torn(file: io.FileIO) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def _parse(line: bytes) -> Failure | None:
    try:
        failure = Failure(**json.loads(line))
        whole = DIGEST.fullmatch(failure.sha256) is not None and failure.stage in STAGES
    except (ValueError, TypeError, RecursionError):
        return None
    return failure if whole and isinstance(failure.reason, str) else None
