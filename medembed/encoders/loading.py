"""From what a user writes after `--encoder` to an encoder that is ready."""

import os
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from medembed.encoders.hub import resolve_checkpoint
from medembed.encoders.preprocessing import read_preprocessing
from medembed.encoders.protocol import Encoder
from medembed.encoders.weights import SIGLIP_TYPES, read_json
from medembed.errors import EncoderError

if TYPE_CHECKING:
    from medembed.encoders.torch_encoder import TorchEncoder

__all__ = [
    "DEVICES",
    "POOLINGS",
    "PRECISIONS",
    "choose_device",
    "choose_precision",
    "load_encoder",
    "refuse_unknown",
    "take_own_gpu",
]

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16")
POOLINGS = ("mean", "max", "grid4", "pooler", "cls", "projector")  # each of some encoder


def load_encoder(
    ref: str | PathLike[str],
    *,
    device: str = "auto",
    precision: str = "auto",
    fit: str = "stretch",
    poolings: Sequence[str] = ("mean", "max"),
    progress: Callable[[int, int], None] | None = None,
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
    poolings : sequence of str
        What will be asked of it. `projector` makes Gemma's projector part of it, and of its
        fingerprint; the others are on offer whether named here or not.
    progress : callable, optional
        Called as progress(done, total) with bytes, while weights are fetched.

    Raises
    ------
    EncoderError
        The reference, checkpoint, device or a pooling will not do.
    """
    refuse_unknown(poolings)
    projector = "projector" in poolings
    checkpoint = resolve_checkpoint(ref, projector=projector, progress=progress)
    preprocessing = read_preprocessing(checkpoint.path, fit)
    config: Any = read_json(checkpoint.path / "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    chosen = choose_device(device)
    if chosen == "cuda":
        take_own_gpu(os.environ)
    known: dict[str, Any] = {
        "source": checkpoint.source,
        "revision": checkpoint.revision,
        "device": chosen,
        "precision": choose_precision(precision, chosen),
    }
    encoder: TorchEncoder
    # Not earlier: a wrong reference is said before torch and transformers have loaded.
    if kind in SIGLIP_TYPES:
        from medembed.encoders.siglip import load_siglip

        encoder = load_siglip(checkpoint.path, preprocessing, projector=projector, **known)
    else:
        from medembed.encoders.backbones import BACKBONE_TYPES, load_backbone

        if kind not in BACKBONE_TYPES:
            raise EncoderError(
                f"{checkpoint.source} is a checkpoint of type {kind!r}, which is not read. Give "
                f"one of type: {', '.join((*SIGLIP_TYPES, *BACKBONE_TYPES))}."
            )
        encoder = load_backbone(checkpoint.path, preprocessing, **known)
    if poolings:
        encoder.check_poolings(poolings)
    return encoder


def refuse_unknown(poolings: Sequence[str]) -> None:
    """Refuse poolings that no encoder offers, before anything is fetched.

    Raises
    ------
    EncoderError
        Names those there are.
    """
    unknown = [name for name in poolings if name not in POOLINGS]
    if unknown:
        raise EncoderError(
            f"pooling {', '.join(unknown)} is unknown. Choose from: {', '.join(POOLINGS)}."
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


def take_own_gpu(environ: Mapping[str, str]) -> int | None:
    """Make this process use the GPU that its launcher means for it, where there are several.

    Launchers number the processes of one machine: torchrun in LOCAL_RANK, SLURM in SLURM_LOCALID.

    Parameters
    ----------
    environ : mapping of str to str
        The environment.

    Returns
    -------
    int or None
        The GPU's number, if one was chosen.
    """
    import torch

    local = environ.get("LOCAL_RANK", environ.get("SLURM_LOCALID", ""))
    n_gpus = torch.cuda.device_count()
    if n_gpus < 2 or not local.isdecimal():
        return None
    torch.cuda.set_device(int(local) % n_gpus)
    return int(local) % n_gpus


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
