"""`failures.jsonl`: images that could not become a row, one line each, append-only."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from medembed.cache.spec import KEY_BYTES
from medembed.errors import CacheError

__all__ = ["STAGES", "Failure", "append_failures", "read_failures"]

STAGES = ("read", "decode", "encode")


@dataclass(frozen=True)
class Failure:
    """Say why the image with these bytes has no row.

    Parameters
    ----------
    sha256 : str
        Of the file's bytes, hex. No name or path: nothing that identifies a patient.
    stage : {"read", "decode", "encode"}
        Where it failed.
    reason : str
        What the stage said.
    """

    sha256: str
    stage: str
    reason: str


def read_failures(path: Path) -> dict[str, Failure]:
    """Read the newest failure of each image, by sha256; a torn last line means nothing.

    Raises
    ------
    CacheError
        A whole line is not a failure, or the file cannot be read.
    """
    try:
        text = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise CacheError(f"cannot read {path}: {error.strerror or error}") from error
    *lines, torn = text.split(b"\n")
    del torn  # empty, or cut off by a crash while it was written
    newest = {}
    for number, line in enumerate(lines, 1):
        failure = _parse(line)
        if failure:
            newest[failure.sha256] = failure
        elif line:
            raise CacheError(f"{path}, line {number} is not a failure; remove that line")
    return newest


def append_failures(path: Path, new: Iterable[Failure]) -> None:
    """Append failures, one line each, and sync.

    Raises
    ------
    CacheError
        The file cannot be written.
    """
    data = b"".join(json.dumps(asdict(failure)).encode() + b"\n" for failure in new)
    if not data:
        return
    try:
        # Appending, one write: lines of several workers do not mix.
        with path.open("ab", buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())
    except OSError as error:
        raise CacheError(f"cannot append to {path}: {error.strerror or error}") from error


def _parse(line: bytes) -> Failure | None:
    try:
        failure = Failure(**json.loads(line))
    except (ValueError, TypeError):
        return None
    whole = len(failure.sha256) == 2 * KEY_BYTES and failure.stage in STAGES
    return failure if whole else None
