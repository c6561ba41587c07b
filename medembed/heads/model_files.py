"""The files of a packaged model, which are not trusted: names and sizes are checked before reading.

A directory holds `model.json`, one payload, and at most a reference and a README.md, each a plain
file; an ensemble also holds `members`, a directory of such directories. Anything else, and anything
larger than a head can be, is refused before it is parsed.
"""

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.numpy

from medembed.core.errors import ModelError, PathNotFoundError
from medembed.core.files import read_plain
from medembed.core.schema import ClosedRecord, Count, Field

__all__ = [
    "MAX_MEMBERS",
    "MAX_TENSOR_BYTES",
    "MEMBERS",
    "MODEL_FILE",
    "README_FILE",
    "REFERENCE_FILE",
    "TENSOR_FILE",
    "TEXT_FILE",
    "FileEntry",
    "MemberEntry",
    "PayloadEntry",
    "ReferenceEntry",
    "check_members",
    "check_names",
    "describe_file",
    "pack_tensors",
    "parse_json",
    "read_described",
    "read_part",
]

MODEL_FILE = "model.json"
TENSOR_FILE = "head.safetensors"
TEXT_FILE = "booster.txt"
REFERENCE_FILE = "reference.safetensors"
README_FILE = "README.md"
MEMBERS = "members"
MAX_MEMBERS = 64

MAX_TENSOR_BYTES = 1 << 30
#: A head of 4,096 units on 16 cells of 3,456 columns is 0.9 GB; 100,000 trees are 200 MB; a
#: million training images' codes are 20 MB of `model.json`.
_LIMITS = {
    MODEL_FILE: 1 << 26,
    TENSOR_FILE: MAX_TENSOR_BYTES,
    TEXT_FILE: 1 << 28,
    REFERENCE_FILE: 1 << 26,
    README_FILE: 1 << 20,
}
#: A list or table of JSON takes a hundred times the memory of its two brackets in the file.
_MAX_BRACKETS = 200_000
#: Python's own reader goes as deep as the stack; `save_model` writes eight levels.
_MAX_DEPTH = 64

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def check_names(directory: Path) -> None:
    """Refuse a directory that holds anything but a model's files.

    Hidden files, which operating systems or a killed writer leave, are ignored and never read.

    Raises
    ------
    PathNotFoundError
        The directory does not exist or holds no `model.json`.
    ModelError
        A file does not belong there; the message names the first.
    """
    if not directory.is_dir() or not os.path.lexists(directory / MODEL_FILE):
        raise PathNotFoundError(f"no model at {directory}: {MODEL_FILE} is not there")
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.name == MEMBERS and entry.is_dir(follow_symlinks=False):
            continue
        if entry.name not in _LIMITS:
            raise _explain_stranger(directory, entry.name)
        if not entry.is_file(follow_symlinks=False):
            raise ModelError(f"{directory / entry.name} is missing or not a plain file")


def check_members(directory: Path, names: Sequence[str]) -> None:
    """Refuse a model whose `members` are not the directories that its `model.json` names.

    Raises
    ------
    ModelError
        The message names the first that is missing, or does not belong there.
    """
    place = directory / MEMBERS
    is_there = os.path.lexists(place)
    found = {entry.name for entry in os.scandir(place)} if is_there else set()
    found = {name for name in found if not name.startswith(".")}
    if is_there and not names:
        raise _explain_stranger(directory, MEMBERS)
    for name in sorted(set(names) - found):
        raise ModelError(f"{directory} lacks {MEMBERS}/{name}. Copy the whole model again")
    for name in sorted(found - set(names)):
        raise _explain_stranger(place, name)
    for name in sorted(found):
        if (place / name).is_symlink() or os.path.lexists(place / name / MEMBERS):
            raise ModelError(f"{place / name} is not a member of an ensemble: it leads elsewhere")


def _explain_stranger(directory: Path, name: str) -> ModelError:
    return ModelError(
        f"{directory} holds {name!r}, which is not part of a model. Move it elsewhere"
    )


def read_part(path: Path) -> bytes:
    """Return the bytes of one of a model's files, whose name decides how large it may be.

    Raises
    ------
    ModelError
        The file is missing, a link or a device, or too large.
    """
    limit = _LIMITS[path.name]
    try:
        return read_plain(path, max_bytes=limit, follow_links=False)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise ModelError(
                f"{path.name} is too large: {error.strerror}, and more than {limit:,} are not read"
            ) from error
        raise ModelError(
            f"{path.name} is missing or not a plain file: {error.strerror or error}"
        ) from error


def parse_json(data: bytes) -> Any:
    """Return parsed JSON; NaN, duplicate keys, deep nesting and too many lists are refused.

    Raises
    ------
    ModelError
        The bytes are not such JSON.
    """
    if data.count(b"[") + data.count(b"{") > _MAX_BRACKETS:
        raise ModelError(f"is not read: it holds more than {_MAX_BRACKETS:,} lists and tables")
    if _SURROGATE.search(data):
        raise ModelError("is not read: it holds half of a surrogate pair")
    try:
        document = json.loads(
            data,
            parse_float=_finite,
            parse_constant=_finite,
            object_pairs_hook=_without_twins,
        )
    except (ValueError, RecursionError) as error:
        raise ModelError(f"is not JSON: {error}") from error
    _check_depth(document)
    return document


def pack_tensors(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return arrays as safetensors; equal arrays give equal bytes."""
    return safetensors.numpy.save({k: np.ascontiguousarray(array) for k, array in arrays.items()})


class FileEntry(ClosedRecord):
    """What `model.json` says of a file beside it."""

    file: str
    bytes: Count
    sha256: str


class PayloadEntry(FileEntry):
    """The file that holds what the head has learnt; its name decides how it is parsed."""

    file: Literal["head.safetensors", "booster.txt"]


class MemberEntry(ClosedRecord):
    """A member of an ensemble: a model in `members`, and the digest of its `model.json`."""

    directory: str = Field(pattern="^[0-9]{1,2}$")
    sha256: str


class ReferenceEntry(FileEntry):
    """The file that holds statistics of the training embeddings."""

    file: Literal["reference.safetensors"]


def describe_file(name: str, data: bytes) -> dict[str, Any]:
    """Return what `model.json` says of a file beside it."""
    return {"file": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def read_described(entry: FileEntry, directory: Path) -> dict[str, np.ndarray] | str:
    """Return the arrays of a file that `model.json` describes, or the text of a booster.

    Raises
    ------
    ModelError
        The size or hash is not the recorded one, or the content is not what the name says.
    """
    name = entry.file
    data = read_part(directory / name)
    if len(data) != entry.bytes:
        raise ModelError(f"{name} has {len(data)} bytes, {entry.bytes} are recorded")
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise ModelError(f"{name} is damaged: its SHA-256 is not the one recorded")
    try:
        return data.decode("ascii") if name == TEXT_FILE else safetensors.numpy.load(data)
    except (
        *(UnicodeDecodeError, safetensors.SafetensorError),
        *(KeyError, ValueError, TypeError, AttributeError, OverflowError, MemoryError),
    ) as error:
        raise ModelError(f"{name} cannot be read: {error}") from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object holds a key twice")
    return found


def _check_depth(document: Any) -> None:
    level: list[Any] = [document]
    for _ in range(_MAX_DEPTH):
        nested = [part for part in level if isinstance(part, dict | list)]
        level = [
            inner
            for part in nested
            for inner in (part.values() if isinstance(part, dict) else part)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ModelError(f"is not read: it is nested more than {_MAX_DEPTH} levels deep")
