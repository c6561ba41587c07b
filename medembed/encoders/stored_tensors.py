"""The layout of a safetensors file: each tensor's place, read without a library or torch.

The `safetensors` library does not say where in a file a tensor lies. huggingface_hub's
`parse_safetensors_file_metadata` does, for files at a hub, but it believes the header: names that
occur twice, offsets with gaps or beyond the file, and an answer of any length, which it holds in
memory (release 2.4).
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medembed.core.errors import EncoderError
from medembed.core.files import open_plain
from medembed.encoders.checkpoint_files import checkpoint_name

__all__ = [
    "FLOAT_BYTES",
    "LENGTH_BYTES",
    "StoredTensor",
    "compose_header",
    "find_non_finite",
    "header_length",
    "parse_header",
    "read_header",
]

LENGTH_BYTES = 8
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_OTHER_BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1}
_BYTES = {**FLOAT_BYTES, **_OTHER_BYTES, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8}
# The format's own limit: https://github.com/huggingface/safetensors#format
_MOST_HEADER_BYTES = 100_000_000
# A float whose exponent bits are all ones is an infinity or a NaN (IEEE 754, 3.4; bfloat16 alike).
_EXPONENTS: dict[str, np.unsignedinteger[Any]] = {
    "F64": np.uint64(0x7FF0_0000_0000_0000),
    "F32": np.uint32(0x7F80_0000),
    "F16": np.uint16(0x7C00),
    "BF16": np.uint16(0x7F80),
}
_CHECKED_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file.

    Attributes
    ----------
    name, dtype : str
        From the file's header; the dtype in the format's own terms (`BF16`, `F32`, …).
    shape : tuple of int
        Its shape.
    start, stop : int
        First byte and the byte after the last, counted from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def header_length(first: bytes, size: int, what: str) -> int:
    """Return a header's length from the first 8 bytes of a file of `size` bytes.

    Raises
    ------
    EncoderError
        The length exceeds the file.
    """
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    fits = 2 <= length <= min(size - LENGTH_BYTES, _MOST_HEADER_BYTES)
    if len(first) < LENGTH_BYTES or not fits:
        raise _no_safetensors(what, f"its header would be {length} of {size} bytes")
    return length


def parse_header(text: bytes, size: int, what: str) -> list[StoredTensor]:
    """Return the tensors that a header describes, in file order.

    Parameters
    ----------
    text : bytes
        The header without the 8 bytes of its length.
    size : int
        Size of the whole file in bytes.
    what : str
        The file, for messages.

    Raises
    ------
    EncoderError
        The header is invalid, a name is a duplicate, a tensor's size does not match its shape, or
        the tensors do not fill the file without gap or overlap.
    """
    try:
        document = json.loads(text, object_pairs_hook=_unique)
    except _TwiceError as error:
        raise _no_safetensors(what, f"it describes {error} twice") from error
    except (ValueError, RecursionError) as error:
        raise _no_safetensors(what, f"its header is not JSON ({error})") from error
    if not isinstance(document, dict):
        raise _no_safetensors(what, "its header is not a JSON object")
    begin = LENGTH_BYTES + len(text)
    entries = ((name, entry) for name, entry in document.items() if name != "__metadata__")
    tensors = [_tensor_of(name, entry, begin, what) for name, entry in entries]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    end = begin
    for tensor in tensors:
        if tensor.start != end:
            raise _no_safetensors(what, f"{tensor.name} lies at byte {tensor.start}, not {end}")
        end = tensor.stop
    if end != size:
        raise _no_safetensors(what, f"its tensors end at byte {end} of {size}")
    return tensors


def read_header(path: Path) -> list[StoredTensor]:
    """Return the tensors of a local file, see `parse_header`.

    Raises
    ------
    EncoderError
        The file cannot be read or is not a complete safetensors file.
    """
    what = f"{path.name} of {checkpoint_name(path.parent)}"
    try:
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            text = file.read(header_length(file.read(LENGTH_BYTES), size, what))
    except OSError as error:
        raise EncoderError(f"{what} cannot be read: {error.strerror or error}.") from error
    return parse_header(text, size, what)


def compose_header(
    tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str]
) -> bytes:
    """Return the header of a file that holds these tensors one after the other.

    Parameters
    ----------
    tensors : iterable of (name, dtype, shape, number of bytes)
        In file order; putting larger dtypes first keeps all tensors aligned.
    metadata : mapping of str to str
        The file's `__metadata__`.

    Returns
    -------
    bytes
        The header after its length, padded with spaces to a multiple of 8 bytes.
    """
    document: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, dtype, shape, count in tensors:
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + count]}
        at += count
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def find_non_finite(path: Path, tensors: Iterable[StoredTensor]) -> str | None:
    """Return the first float tensor of a file that holds an infinity or a NaN, or None.

    The bits are tested, a few MB at a time: numpy does not know bfloat16, and torch is not loaded.
    """
    for tensor in tensors:
        exponent = _EXPONENTS.get(tensor.dtype)
        if exponent is None or tensor.start == tensor.stop:
            continue
        count = (tensor.stop - tensor.start) // exponent.itemsize
        with path.open("rb") as file:
            file.seek(tensor.start)
            for begin in range(0, count, _CHECKED_AT_ONCE):
                n = min(_CHECKED_AT_ONCE, count - begin)
                bits = np.fromfile(file, exponent.dtype.newbyteorder("<"), n)
                if len(bits) < n or bool(((bits & exponent) == exponent).any()):
                    return tensor.name
    return None


class _TwiceError(ValueError):
    """A duplicate key in a JSON object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return document


def _tensor_of(name: str, entry: Any, begin: int, what: str) -> StoredTensor:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, stop]
    except (KeyError, TypeError, ValueError) as error:
        raise _no_safetensors(what, f"{name} has no dtype, shape and offsets") from error
    if not all(type(number) is int and number >= 0 for number in numbers) or stop < start:
        raise _no_safetensors(what, f"{name} has shape {shape} at {start} to {stop}")
    # An unknown dtype may belong to a part that is not read.
    if dtype in _BYTES and stop - start != math.prod(shape) * _BYTES[dtype]:
        raise _no_safetensors(what, f"{name}, {dtype} {shape}, has {stop - start} bytes")
    return StoredTensor(name, str(dtype), tuple(shape), begin + start, begin + stop)


def _no_safetensors(what: str, reason: str) -> EncoderError:
    return EncoderError(f"{what} is not a whole safetensors file: {reason}.")
