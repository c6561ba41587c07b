"""Read and check a checkpoint's tensors one at a time, and compute their identifying digest."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from medembed.core.errors import EncoderError
from medembed.encoders.checkpoint_files import (
    PART_WORDS,
    Part,
    checkpoint_name,
    match_tensors,
    weight_files,
)
from medembed.encoders.stored_tensors import FLOAT_BYTES, read_header

__all__ = ["Digest", "compare_names", "open_tensors", "read_part", "read_tensor"]


class Digest:
    """SHA-256 over lines of JSON and tensors: the fingerprint of a tower."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def add(self, value: Any) -> None:
        """Add a JSON-able value."""
        self._sha256.update((json.dumps(value, sort_keys=True) + "\n").encode())

    def add_tensor(self, name: str, dtype: str, tensor: torch.Tensor) -> None:
        """Add a tensor's name, stored dtype, shape and bytes."""
        self.add([name, dtype, list(tensor.shape)])
        self._sha256.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        """Return the digest so far."""
        return self._sha256.hexdigest()


def read_part(
    directory: Path, shapes: Mapping[str, tuple[int, ...]], source: str, part: Part = "tower"
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield canonical name, stored dtype and tensor of a part, sorted by name.

    Raises
    ------
    EncoderError
        A file is missing or damaged, or the part does not consist of exactly the tensors of
        `shapes`, in floating point and finite.
    """
    with ExitStack() as stack:
        files = {path: open_tensors(stack, path) for path in weight_files(directory, part)}
        stored = [(path, name) for path, file in files.items() for name in file.keys()]  # noqa: SIM118
        found = match_tensors(stored, source, part)
        compare_names(set(found), set(shapes), source, part)
        for name in sorted(found):
            path, full = found[name]
            shape = tuple(files[path].get_slice(full).get_shape())
            if shape != shapes[name]:
                raise EncoderError(
                    f"{source}: {full} has shape {shape}, its config asks for {shapes[name]}."
                )
            yield name, *read_tensor(files[path], full, source)


def read_tensor(
    file: Any, name: str, source: str, integers: tuple[str, ...] = ()
) -> tuple[str, torch.Tensor]:
    """Return the stored dtype and the values of a tensor of an open safetensors file.

    Parameters
    ----------
    integers : tuple of str
        Integer dtypes to accept in addition to floating point.

    Raises
    ------
    EncoderError
        The tensor is quantised, or not finite.
    """
    dtype = file.get_slice(name).get_dtype()
    if dtype not in (*FLOAT_BYTES, *integers):
        raise EncoderError(f"{source}: {name} is stored as {dtype}; quantised towers are not read.")
    tensor = file.get_tensor(name)
    if not bool(torch.isfinite(tensor).all()):
        raise EncoderError(f"{source}: {name} holds values that are not finite.")
    return dtype, tensor


def open_tensors(stack: ExitStack, path: Path) -> Any:
    """Return a safetensors file that stays open until `stack` closes.

    Raises
    ------
    EncoderError
        The file is not a plain file, is incomplete, or has two tensors of one name.
    """
    read_header(path)  # opens no pipe, and detects duplicate names
    try:
        return stack.enter_context(safe_open(path, framework="pt", device="cpu"))
    except (SafetensorError, OSError) as error:
        raise EncoderError(
            f"{path.name} of {checkpoint_name(path.parent)} is not a whole safetensors file: "
            f"{error}"
        ) from error


def compare_names(found: set[str], expected: set[str], source: str, part: Part) -> None:
    """Raise EncoderError where the tensors found are not exactly those that are expected."""
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing:
        raise EncoderError(
            f"{source}: {PART_WORDS[part]} lacks {missing[0]}, one of {len(missing)} missing "
            "tensors."
        )
    if extra:
        raise EncoderError(
            f"{source}: {PART_WORDS[part]} holds {extra[0]}, one of {len(extra)} tensors that its "
            "config does not ask for."
        )
