"""Whole sets of weights: safetensors, or a state dict that torch reads without running code."""

import pickle  # nosec B403 # its errors alone
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from medembed.core.errors import EncoderError
from medembed.core.files import open_plain
from medembed.core.text import one_line
from medembed.encoders.checkpoint_files import (
    PART_NAMES,
    Part,
    checkpoint_name,
    explain_not_held,
    pickled_file,
    refuse_adapted,
    unwrap,
    weight_files,
)
from medembed.encoders.delta import INTEGERS
from medembed.encoders.fingerprint import open_tensors, read_tensor

__all__ = ["read_weights"]

_NESTED = ("state_dict", "model")  # where training scripts put the weights


def read_weights(place: Path, source: str, part: Part = "whole") -> dict[str, torch.Tensor]:
    """Return a part's tensors of a checkpoint's directory, or of one file of a state dict.

    A directory's safetensors go before a state dict. That is read by `torch.load` with
    ``weights_only=True``, which builds tensors and nothing else.

    Raises
    ------
    EncoderError
        There are no weights of the part, they cannot be read so, or a value is not finite; or two
        tensors share a name.
    """
    if place.is_file():
        return _of_part(_read_pickled(place, source).items(), part, source)
    pickled = pickled_file(place, part)
    if pickled is not None:
        return _of_part(_read_pickled(pickled, source).items(), part, source)
    with ExitStack() as stack:
        files = [open_tensors(stack, path) for path in weight_files(place, part)]
        named = (
            (name, read_tensor(file, name, source, INTEGERS)[1])
            for file in files
            for name in file.keys()  # noqa: SIM118
            if PART_NAMES[part](name) is not None
        )
        return _of_part(named, part, source)


def _of_part(
    named: Iterable[tuple[str, torch.Tensor]], part: Part, source: str
) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for stored, tensor in named:
        name = PART_NAMES[part](unwrap(stored))
        if name is None:
            continue
        if name in tensors:
            raise EncoderError(f"{source} holds {name} twice. Keep one naming.")
        refuse_adapted(name, source, part)
        tensors[name] = tensor
    if not tensors:
        raise explain_not_held(source, part)
    return tensors


def _read_pickled(path: Path, source: str) -> dict[str, torch.Tensor]:
    try:
        with open_plain(path) as file:
            found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise EncoderError(
            f"{path.name} of {source} holds more than weights, and reading it would run code of "
            "it. Save its state dict alone, or convert it to safetensors."
        ) from error
    except Exception as error:  # torch's errors for damaged files are of many kinds
        raise EncoderError(
            f"{path.name} of {source} is not a whole state dict: {one_line(error, 200)}."
        ) from error
    for key in _NESTED:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not found:
        raise EncoderError(f"{path.name} of {checkpoint_name(path.parent)} holds no state dict.")
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.is_quantized:
            raise EncoderError(f"{path.name} of {source}: {one_line(name, 60)!r} is no tensor.")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise EncoderError(f"{source}: {name} holds values that are not finite.")
        tensors[name] = tensor
    return tensors
