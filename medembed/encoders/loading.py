"""Load an encoder from the user's reference, the value of `--encoder`."""

import os
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from medembed.core.errors import EncoderError
from medembed.core.poolings import (
    DEFAULT_POOLINGS,
    expand_blocks,
    find_pooling,
    list_of_tower,
    refuse_unknown,
)
from medembed.core.system import require_libraries
from medembed.core.text import one_line
from medembed.encoders.base_ref import BaseRef, Origin, base_of, read_base
from medembed.encoders.checkpoint_files import (
    AUTOENCODER_TYPE,
    CLIP_TYPES,
    OPEN_CLIP_CONFIG,
    SIGLIP_TYPES,
    check_config,
    find_config,
    is_of_timm,
    is_open_clip_config,
    is_timm_config,
    read_json,
)
from medembed.encoders.hub import Checkpoint, resolve_checkpoint
from medembed.encoders.preprocessing import Preprocessing, read_preprocessing
from medembed.encoders.protocol import Encoder

if TYPE_CHECKING:
    import torch

    from medembed.encoders.torch_encoder import TorchEncoder

__all__ = [
    "DEVICES",
    "LOCAL_RANKS",
    "PRECISIONS",
    "adapt_encoder",
    "choose_device",
    "choose_precision",
    "load_encoder",
    "take_own_gpu",
]

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16")
# Kinds that no config.json names by itself.
_TIMM, _TORCHVISION, _OPEN_CLIP = "timm", "torchvision", "open_clip"
LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")  # process numbers of torchrun and SLURM


def load_encoder(
    ref: str | PathLike[str],
    *,
    device: str = "auto",
    precision: str = "auto",
    fit: str = "stretch",
    poolings: Sequence[str] = DEFAULT_POOLINGS,
    worker: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Encoder:
    """Load an encoder by hub id (`owner/name[@revision]`), directory, or `demo`.

    The directory may hold an adapted encoder that fine-tuning wrote (see `base_ref`).

    Parameters
    ----------
    device : {"auto", "cpu", "cuda", "mps"}
        `auto` uses the first available of cuda, mps, cpu.
    precision : {"auto", "fp32", "bf16"}
        `auto` is bf16 on a CUDA device that supports it in hardware, fp32 elsewhere. fp16 is not
        supported: these towers overflow in it.
    fit : {"stretch", "pad"}
        How an image that is not square is fitted.
    poolings : sequence of str
        Poolings that will be used; `mean@all` stands for `mean@K` of every block. `projector`
        makes Gemma's projector part of the encoder and its fingerprint; the others are always
        available.
    worker : int, optional
        Number of this process among several on one machine, which are distributed over its GPUs. A
        launcher's own variables take precedence.
    progress : callable, optional
        Called as progress(done, total) with bytes, while weights are downloaded.

    Raises
    ------
    DeviceMemoryError
        The tower does not fit the device.
    EncoderError
        The reference, checkpoint, device or a pooling is invalid or unavailable.
    MissingLibraryError
        A library of the extra `encoders` is not installed.
    """
    refuse_unknown(poolings)
    poolings = list_of_tower(poolings)
    projector = any(find_pooling(name).needs_language_model for name in poolings)
    checkpoint = resolve_checkpoint(ref, projector=projector, progress=progress)
    base = read_base(checkpoint.path)
    weights = checkpoint
    if base is not None:
        place = base_of(checkpoint.path)
        weights = resolve_checkpoint(place, projector=projector, progress=progress)
    preprocessing = read_preprocessing(checkpoint.path, fit)
    kind = _read_kind(checkpoint)
    chosen = choose_device(device, worker)
    known: dict[str, Any] = {
        "source": checkpoint.source,
        "revision": checkpoint.revision,
        "device": chosen,
        "precision": choose_precision(precision, chosen),
    }
    if base is not None:
        from medembed.encoders.delta import read_changes

        known["changes"] = read_changes(checkpoint.path, base)
    from medembed.encoders.devices import guard_memory

    encoder = guard_memory(
        lambda: _load(kind, weights, preprocessing, known, projector=projector),
        f"{checkpoint.source} in {known['precision']} does not fit the memory of {chosen}. Close "
        "what else uses it, give --precision bf16, or choose another --device.",
    )
    fingerprint = encoder.fingerprint if base is None else base.fingerprint
    if kind not in (_TIMM, _TORCHVISION, _OPEN_CLIP, *CLIP_TYPES):  # without it fine-tuning refuses
        encoder.origin = Origin(weights, checkpoint.path, fingerprint)
    if poolings:
        encoder.check_poolings(expand_blocks(poolings, encoder.dimensions))
    return encoder


def adapt_encoder(
    origin: Origin, preprocessing: Preprocessing, tensors: "Mapping[str, torch.Tensor]"
) -> "TorchEncoder":
    """Return an encoder with changed tensors, on the CPU in fp32.

    Parameters
    ----------
    origin : Origin
        The encoder that training started from.
    preprocessing : Preprocessing
        That encoder's preprocessing.
    tensors : mapping of str to Tensor
        By canonical name; float32, or int64 if the base has integers.

    Raises
    ------
    EncoderError
        The encoder cannot be loaded; see `load_encoder`.
    """
    import torch

    from medembed.encoders.delta import DeltaWeights

    source = origin.weights.source
    words = {torch.float32: "F32", torch.int64: "I64"}
    stored = {name: (words[tensor.dtype], tensor) for name, tensor in tensors.items()}
    base = BaseRef(None, None, origin.fingerprint, None)
    known = {"source": source, "changes": DeltaWeights(stored, base, source)}
    return _load(_read_kind(origin.weights), origin.weights, preprocessing, known)


def _read_kind(checkpoint: Checkpoint) -> Any:
    if checkpoint.path.is_file():
        return _TORCHVISION
    config = read_json(find_config(checkpoint.path))
    if not isinstance(config, dict):
        return None
    if is_open_clip_config(config):
        return _OPEN_CLIP
    if is_timm_config(config):
        return _TIMM
    check_config(config, checkpoint.source)
    return config.get("model_type")


def _load(
    kind: Any,
    weights: Checkpoint,
    preprocessing: Preprocessing,
    known: Mapping[str, Any],
    *,
    projector: bool = False,
) -> "TorchEncoder":
    if kind in (_TIMM, _TORCHVISION):
        return _load_timm(kind, weights, preprocessing, known)
    if kind == _OPEN_CLIP:
        return _load_open_clip(weights, preprocessing, known)
    # Not earlier: a wrong reference is reported before torch and transformers have loaded.
    if kind in SIGLIP_TYPES:
        from medembed.encoders.siglip import load_siglip

        return load_siglip(weights.path, preprocessing, projector=projector, **known)
    if kind in CLIP_TYPES:
        require_libraries(f"encoder {weights.source}", ("transformers",), "encoders")
        _refuse_changes(weights, known, "an image tower of CLIP")
        from medembed.encoders.clip import load_clip

        return load_clip(weights.path, preprocessing, **known)
    if kind == AUTOENCODER_TYPE:
        _refuse_changes(weights, known, "an autoencoder")
        from medembed.encoders.autoencoder import load_autoencoder

        return load_autoencoder(weights.path, preprocessing, **known)
    require_libraries(f"encoder {weights.source}", ("transformers",), "encoders")
    from medembed.encoders.backbones import BACKBONE_TYPES, load_backbone

    if kind not in BACKBONE_TYPES:
        raise EncoderError(
            f"{weights.source} is a checkpoint of type {kind!r}, which is not read. Give one of "
            f"type: {', '.join((*SIGLIP_TYPES, *CLIP_TYPES, AUTOENCODER_TYPE, *BACKBONE_TYPES))}."
        )
    return load_backbone(weights.path, preprocessing, **known)


def _refuse_changes(weights: Checkpoint, known: Mapping[str, Any], what: str) -> None:
    if "changes" in known:
        raise EncoderError(
            f"{weights.source} is {what}, which fine-tuning does not change, and yet a base.json "
            "lies with it. Remove that file."
        )


def _load_timm(
    kind: str, weights: Checkpoint, preprocessing: Preprocessing, known: Mapping[str, Any]
) -> "TorchEncoder":
    _refuse_changes(weights, known, "a model of timm")
    _require_timm(weights.source)
    from medembed.encoders.timm_models import load_timm, load_torchvision

    load = load_timm if kind == _TIMM else load_torchvision
    return load(weights.path, preprocessing, **known)


def _load_open_clip(
    weights: Checkpoint, preprocessing: Preprocessing, known: Mapping[str, Any]
) -> "TorchEncoder":
    _refuse_changes(weights, known, "an image tower of open_clip")
    if is_of_timm(read_json(weights.path / OPEN_CLIP_CONFIG)):
        _require_timm(weights.source)
    else:
        require_libraries(f"encoder {weights.source}", ("transformers",), "encoders")
    from medembed.encoders.open_clip import load_open_clip

    return load_open_clip(weights.path, preprocessing, **known)


def _require_timm(source: str) -> None:
    require_libraries(f"encoder {source}", ("timm",), "timm")
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError) as error:  # torchvision's, where it does not suit torch
        raise EncoderError(
            f"encoder {source} needs timm, which cannot be imported "
            f"({one_line(error, 200)}). Install the torchvision that belongs to your torch."
        ) from error


def choose_device(device: str, worker: int | None = None) -> str:
    """Return the available device to compute on; with several GPUs, select this process's own.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda", "mps"}
    worker : int, optional
        See `load_encoder`.

    Raises
    ------
    EncoderError
        The device is unknown or unavailable.
    """
    import torch

    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        device = next(name for name, there in present.items() if there)
    if device not in present:
        raise EncoderError(f"device {device!r} is unknown. Choose one of: {', '.join(DEVICES)}.")
    if not present[device]:
        raise EncoderError(
            f"device {device} was asked for, but torch {torch.__version__} sees none. Choose "
            f"--device auto, or {_how_to_see_one(device)}."
        )
    if device == "cuda":
        take_own_gpu(os.environ, worker)
    return device


def _how_to_see_one(device: str) -> str:
    """Return how to make a device visible to torch, as the end of a sentence."""
    from medembed.encoders.devices import why_no_gpu

    found = why_no_gpu() if device == "cuda" else None
    if found is None:
        return "install a build of torch for it"
    reason, remedy = found
    return f"fix this: {reason}. {remedy.rstrip('.')}"


def take_own_gpu(environ: Mapping[str, str], worker: int | None = None) -> int | None:
    """Make this process use the GPU that its launcher assigns, if there are several.

    Launchers number the processes of one machine, in one of `LOCAL_RANKS`.

    Parameters
    ----------
    environ : mapping of str to str
        The environment.
    worker : int, optional
        Number of this process, if no launcher sets one.

    Returns
    -------
    int or None
        The GPU's number, if one was chosen.
    """
    import torch

    local = next((environ[name] for name in LOCAL_RANKS if name in environ), "")
    if not local and worker is not None:
        local = str(worker)
    n_gpus = torch.cuda.device_count()
    if n_gpus < 2 or not local.isdecimal():
        return None
    torch.cuda.set_device(int(local) % n_gpus)
    return int(local) % n_gpus


def choose_precision(precision: str, device: str) -> str:
    """Return `fp32` or `bf16`; `auto` is bf16 only if the device supports it in hardware.

    Raises
    ------
    EncoderError
        The precision is unknown.
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
