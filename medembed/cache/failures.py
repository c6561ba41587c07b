"""`failures.jsonl`: images that could not become a row, one line each, append-only."""

import io
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from medembed.cache.spec import KEY_BYTES
from medembed.core.errors import CacheError
from medembed.core.files import open_plain, read_plain, sync_directory

__all__ = ["STAGES", "Failure", "append_failures", "name_failures", "read_failures"]

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


def read_failures(path: Path) -> dict[str, Failure]:
    """Return the newest failure of each image, by sha256.

    A line truncated by a crash is skipped: its image is merely retried.

    Raises
    ------
    CacheError
        The file cannot be read.
    """
    try:
        lines = read_plain(path).splitlines() if path.exists() else []
    except OSError as error:
        raise CacheError(f"cannot read {path}: {error.strerror or error}") from error
    return {failure.sha256: failure for failure in map(_parse, lines) if failure}


def append_failures(path: Path, new: Iterable[Failure]) -> None:
    """Append failures, one line each, and sync the file and its name.

    Raises
    ------
    CacheError
        The file cannot be written.
    """
    data = b"".join(json.dumps(asdict(failure)).encode() + b"\n" for failure in new)
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
