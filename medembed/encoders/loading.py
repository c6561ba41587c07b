"""From what a user writes after `--encoder` to an encoder that is ready."""

from os import PathLike
from typing import Any

from medembed.encoders.hub import resolve_checkpoint
from medembed.encoders.preprocessing import read_preprocessing
from medembed.encoders.protocol import Encoder
from medembed.encoders.weights import read_json
from medembed.errors import EncoderError

__all__ = ["DEVICES", "PRECISIONS", "choose_device", "choose_precision", "load_encoder"]

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16")


def load_encoder(
    ref: str | PathLike[str],
    *,
    device: str = "auto",
    precision: str = "auto",
    fit: str = "stretch",
) -> Encoder:
    """Load an encoder by hub id (`owner/name[@revision]`), directory, or `demo`.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda", "mps"}
        `auto` takes the first of cuda, mps, cpu that is there.
    precision : {"auto", "fp32", "bf16"}
        `auto` is bf16 on a CUDA device that has it in hardware, fp32 elsewhere. fp16 is not on
        offer: these towers overflow in it.
    fit : {"stretch", "pad"}
        What happens to an image that is not square.

    Raises
    ------
    EncoderError
        The reference, checkpoint or device will not do.
    """
    checkpoint = resolve_checkpoint(ref)
    preprocessing = read_preprocessing(checkpoint.path, fit)
    config: Any = read_json(checkpoint.path / "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None

    # Not earlier: a wrong reference is said before torch and transformers have loaded.
    from medembed.encoders.siglip import MODEL_TYPES, load_siglip

    if kind not in MODEL_TYPES:
        raise EncoderError(
            f"{checkpoint.source} is a checkpoint of type {kind!r}, which is not read. Give one of "
            f"type: {', '.join(MODEL_TYPES)}."
        )
    chosen = choose_device(device)
    return load_siglip(
        checkpoint.path,
        preprocessing,
        source=checkpoint.source,
        revision=checkpoint.revision,
        device=chosen,
        precision=choose_precision(precision, chosen),
    )


def choose_device(device: str) -> str:
    """Give the device to compute on, asked of torch.

    Raises
    ------
    EncoderError
        Unknown, or asked for and not there.
    """
    import torch

    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        return next(name for name, there in present.items() if there)
    if device not in present:
        raise EncoderError(f"device {device!r} is unknown. Choose one of: {', '.join(DEVICES)}.")
    if not present[device]:
        raise EncoderError(
            f"device {device} was asked for, but torch {torch.__version__} sees none. Choose "
            "--device auto, or install a build of torch for it."
        )
    return device


def choose_precision(precision: str, device: str) -> str:
    """Give `fp32` or `bf16`; bf16 by itself only where the device has it in hardware.

    Raises
    ------
    EncoderError
        Anything else.
    """
    import torch

    if precision not in PRECISIONS:
        raise EncoderError(
            f"precision {precision!r} is not on offer. Choose one of: {', '.join(PRECISIONS)}."
        )
    if precision != "auto":
        return precision
    fast = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if fast else "fp32"
