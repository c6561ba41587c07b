"""Whole sets of weights: safetensors, or a state dict that torch reads without running code."""

import pickle  # nosec B403 # its errors alone
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from medembed.core.errors import EncoderError
from medembed.core.files import open_plain
from medembed.core.text import one_line
from medembed.encoders.checkpoint_files import (
    INDEX_FILE,
    WEIGHTS_FILE,
    checkpoint_name,
    holds_file,
    unwrap,
    weight_files,
)
from medembed.encoders.delta import INTEGERS
from medembed.encoders.fingerprint import open_tensors, read_tensor

__all__ = ["PICKLED_FILES", "read_weights"]

PICKLED_FILES = ("pytorch_model.bin", "model.bin", "model.pth")
_NESTED = ("state_dict", "model")  # where training scripts put the weights


def read_weights(place: Path, source: str) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint's directory, or of one file of a state dict.

    A directory's safetensors go before a state dict. That is read by `torch.load` with
    ``weights_only=True``, which builds tensors and nothing else.

    Raises
    ------
    EncoderError
        There are no weights, they cannot be read so, or a value is not finite.
    """
    if place.is_file():
        return _read_pickled(place, source)
    pickled = [place / name for name in PICKLED_FILES if holds_file(place / name)]
    others = (holds_file(place / name) for name in (WEIGHTS_FILE, INDEX_FILE))
    if pickled and not any(others):
        return _read_pickled(pickled[0], source)
    tensors: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        for path in weight_files(place, "whole"):
            file = open_tensors(stack, path)
            for name in file.keys():  # noqa: SIM118
                tensors[unwrap(name)] = read_tensor(file, name, source, INTEGERS)[1]
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
        tensors[unwrap(name)] = tensor
    return tensors
