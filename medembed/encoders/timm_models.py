"""Models of timm: DenseNet, EfficientNet, ViT and others, pooled as maps or as tokens.

A checkpoint is a directory as timm's hub has them: `config.json` with the architecture and
`pretrained_cfg`, and a file of weights. A file of torchvision's weights whose name begins with the
model's, such as `densenet169-b2777c0a.pth`, is read as timm's model of that name, where both name
their tensors alike. Trunks of open_clip come from `open_clip`. timm is an extra.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from medembed.core.errors import EncoderError
from medembed.core.text import one_line
from medembed.encoders.block_outputs import ObservedBlocks, block_poolings, observe_list
from medembed.encoders.checkpoint_files import CONFIG_FILE, read_json
from medembed.encoders.devices import set_precision
from medembed.encoders.features import Features, token_poolings
from medembed.encoders.fingerprint import Digest
from medembed.encoders.preprocessing import Preprocessing
from medembed.encoders.state_dicts import read_weights
from medembed.encoders.torch_encoder import ArrangedEncoder

__all__ = ["Architecture", "TimmEncoder", "build_timm", "load_timm", "load_torchvision"]

_NAME = re.compile(r"[a-z0-9_]+")
_TORCHVISION = re.compile(r"([a-z][a-z0-9_]*?)(?:-[0-9a-f]{8})?\.(?:pth|pt)")
# Early releases of torchvision wrote `norm.1` for what is `norm1` now.
_EARLY_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")
_COUNTERS = "num_batches_tracked"  # of training steps; without effect
_TRANSFORMERS = (VisionTransformer, Eva)  # class, register and patch tokens through all blocks


@dataclass(frozen=True)
class Architecture:
    """What of a config determines the model.

    Attributes
    ----------
    name : str
        timm's name of it.
    n_classes : int
        Of the classifier that the checkpoint may hold; it is not used.
    options : mapping
        Further arguments of `timm.create_model`.
    without_classifier : mapping or None
        Arguments of the model's `reset_classifier` beside 0, if it is to be called.
    """

    name: str
    n_classes: int
    options: Mapping[str, Any] = field(default_factory=dict)
    without_classifier: Mapping[str, Any] | None = None


class _Tower(nn.Module):
    """A model of timm that returns its features, and what its head makes of them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.net = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.net.forward_features(pixel_values)
        return features, self.net.forward_head(features, pre_logits=True)


class TimmEncoder(ArrangedEncoder):
    """A model of timm without its classifier; created by `load_timm`.

    `pooler` is what the checkpoint's own head gives to its classifier. `mean`, `max` and `grid4`
    are of the feature map, or of the patch tokens; `cls` is the class token after the last norm. Of
    ViT and EVA each block's output is pooled, too.
    """

    libraries: ClassVar[tuple[str, ...]] = ("timm",)

    def __init__(self, model: Any, preprocessing: Preprocessing, **known: Any) -> None:
        super().__init__(model, preprocessing, **known)
        if isinstance(model.net, _TRANSFORMERS):
            net: Any = model.net
            observe_list(net, "blocks", net.blocks)

    def features(self, pixel_values: torch.Tensor) -> Features:
        """Run the model; see `TorchEncoder.features`."""
        seen, pooled = self.tower(pixel_values)
        vectors = {"pooler": pooled.flatten(1)}
        if "cls" in self._dimensions:
            vectors["cls"] = seen[:, 0]
        return Features(_tokens_of(self.model.net, seen)[:, self._n_before :], self._grid, vectors)

    def block_tokens(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the patch tokens and the class token of a block's output."""
        return output[:, self._n_before :], output[:, 0] if "cls" in self._dimensions else None

    def find_blocks(self) -> tuple[str, nn.ModuleList] | None:
        """Return the blocks of ViT and EVA; see `TorchEncoder.find_blocks`."""
        net: Any = self.model.net
        blocks = getattr(net, "blocks", None)
        return ("net.blocks", blocks) if isinstance(blocks, ObservedBlocks) else None

    def can_repool(self, name: str) -> bool:
        """Return whether a pooling is over tokens; heads of timm's models are not run apart."""
        return name != "pooler" and super().can_repool(name)


def load_timm(
    directory: Path,
    preprocessing: Preprocessing,
    *,
    source: str,
    revision: str | None = None,
    device: str = "cpu",
    precision: str = "fp32",
) -> TimmEncoder:
    """Load a model of timm from a directory in the form of timm's hub.

    The fingerprint is SHA-256 over the architecture and the tensors that are used, without the
    classifier and without counters of training.

    Raises
    ------
    EncoderError
        The installed timm has no such model, or the weights are not exactly its own, or not finite.
    """
    architecture = _read_architecture(read_json(directory / CONFIG_FILE), source)
    stored = read_weights(directory, source)
    known: dict[str, Any] = {"source": source, "revision": revision, "device": device}
    reload = partial(load_timm, directory, preprocessing, **known)
    return build_timm(
        architecture, stored, preprocessing, precision=precision, reload=reload, **known
    )


def load_torchvision(
    path: Path,
    preprocessing: Preprocessing,
    *,
    source: str,
    revision: str | None = None,
    device: str = "cpu",
    precision: str = "fp32",
) -> TimmEncoder:
    """Load a file of torchvision's weights, named `MODEL.pth` or `MODEL-HASH.pth`.

    Raises
    ------
    EncoderError
        The name is of no model of timm, or the weights are not exactly that model's, not finite,
        or not readable without running code.
    """
    named = _TORCHVISION.fullmatch(path.name)
    if named is None:
        raise EncoderError(
            f"{source} does not say which model its weights are of. Name the file as torchvision "
            "does, such as densenet169-b2777c0a.pth."
        )
    stored = {
        _EARLY_DENSENET.sub(r"\1\2.", name): tensor
        for name, tensor in read_weights(path, source).items()
    }
    biases = [tensor for name, tensor in stored.items() if name in ("fc.bias", "classifier.bias")]
    architecture = Architecture(named[1], len(biases[0]) if biases else 1000)
    known: dict[str, Any] = {"source": source, "revision": revision, "device": device}
    reload = partial(load_torchvision, path, preprocessing, **known)
    return build_timm(
        architecture, stored, preprocessing, precision=precision, reload=reload, **known
    )


def build_timm(
    architecture: Architecture,
    stored: Mapping[str, torch.Tensor],
    preprocessing: Preprocessing,
    *,
    precision: str,
    device: str,
    **known: Any,
) -> TimmEncoder:
    """Return a model of timm, filled with tensors from anywhere.

    Raises
    ------
    EncoderError
        See `load_timm`.
    """
    source = str(known["source"])
    model = _create(architecture, source)
    _fill(model, stored, source)
    grid, n_before, dimensions = _arrange(model, preprocessing, source)
    fingerprint = _fingerprint(architecture, model, stored)
    set_precision(model, precision)
    return TimmEncoder(
        _Tower(model).to(device),
        preprocessing,
        grid=grid,
        n_before=n_before,
        dimensions=dimensions,
        fingerprint=fingerprint,
        precision=precision,
        device=device,
        **known,
    )


def _read_architecture(config: Any, source: str) -> Architecture:
    name, options = config.get("architecture"), config.get("model_args") or {}
    n_classes = config.get("num_classes", 1000)
    if not isinstance(name, str) or not isinstance(options, dict) or type(n_classes) is not int:
        raise EncoderError(f"{CONFIG_FILE} of {source} does not describe a model of timm.")
    if "global_pool" in config:
        options = {"global_pool": config["global_pool"], **options}
    return Architecture(name, n_classes, options)


def _create(architecture: Architecture, source: str) -> Any:
    name = architecture.name
    if not _NAME.fullmatch(name) or not timm.is_model(name):
        raise EncoderError(
            f"{source} is a model {one_line(name, 60)!r}, which timm {timm.__version__} does not "
            "have. Install a release of timm that does."
        )
    try:
        model: Any = timm.create_model(
            name, pretrained=False, num_classes=architecture.n_classes, **architecture.options
        )
        if architecture.without_classifier is not None:
            model.reset_classifier(0, **architecture.without_classifier)
    except Exception as error:  # of many kinds, by the model
        raise EncoderError(f"{source} cannot be built: {one_line(error, 300)}") from error
    if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
        raise EncoderError(f"{source}: {name} of timm has no features apart from its classifier.")
    return model.eval()


def _fill(model: Any, stored: Mapping[str, torch.Tensor], source: str) -> None:
    wanted = model.state_dict()
    # a checkpoint saved without its classifier has no use for one
    idle = {name for name in wanted if name.endswith(_COUNTERS) or _is_classifier(model, name)}
    missing = sorted(wanted.keys() - stored.keys() - idle)
    extra = sorted(name for name in stored.keys() - wanted.keys() if not name.endswith(_COUNTERS))
    if missing:
        raise EncoderError(f"{source} lacks {missing[0]}, one of {len(missing)} missing tensors.")
    if extra:
        raise EncoderError(
            f"{source} holds {extra[0]}, one of {len(extra)} tensors that its model does not have."
        )
    for name in sorted(stored.keys() - idle):
        if stored[name].shape != wanted[name].shape:
            raise EncoderError(
                f"{source}: {name} has shape {tuple(stored[name].shape)}, its model asks for "
                f"{tuple(wanted[name].shape)}."
            )
    used = {name: tensor for name, tensor in stored.items() if name not in idle}
    model.load_state_dict({**wanted, **used}, strict=True)


def _is_classifier(model: Any, name: str) -> bool:
    known = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = (known,) if isinstance(known, str) else tuple(known)
    return any(name.startswith(f"{each}.") for each in names)


def _arrange(
    model: Any, preprocessing: Preprocessing, source: str
) -> tuple[tuple[int, int], int, dict[str, tuple[int, ...]]]:
    """Return the grid, the tokens before the patches, and the poolings, by one black image."""
    size = (preprocessing.height, preprocessing.width)
    try:
        with torch.inference_mode():
            seen = model.forward_features(torch.zeros(1, 3, *size))
            pooled = model.forward_head(seen, pre_logits=True).flatten(1)
    except Exception as error:
        raise EncoderError(
            f"{source} cannot read the images of {size[0]} x {size[1]} that its config asks for: "
            f"{one_line(error, 300)}"
        ) from error
    if not isinstance(seen, torch.Tensor) or seen.ndim not in (3, 4):
        raise EncoderError(f"{source}: its model gives neither a feature map nor tokens.")
    n_before = int(getattr(model, "num_prefix_tokens", 0)) if seen.ndim == 3 else 0
    tokens = _tokens_of(model, seen)[:, n_before:]
    grid = _grid_of(model, seen, tokens.shape[1])
    dimensions = {**token_poolings(tokens.shape[2], grid), "pooler": (pooled.shape[1],)}
    if n_before and getattr(model, "cls_token", None) is not None:
        dimensions["cls"] = (tokens.shape[2],)
    if isinstance(model, _TRANSFORMERS):
        widths = [tokens.shape[2]] * len(model.blocks)
        dimensions |= block_poolings(widths, has_class_token="cls" in dimensions)
    return grid, n_before, dimensions


def _tokens_of(model: Any, seen: torch.Tensor) -> torch.Tensor:
    """Return a map's cells row by row, or tokens as they are: (n, tokens, d)."""
    if seen.ndim == 3:
        return seen
    if str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC"):
        return seen.flatten(1, 2)
    return seen.flatten(2).transpose(1, 2)


def _grid_of(model: Any, seen: torch.Tensor, n_tokens: int) -> tuple[int, int]:
    if seen.ndim == 4:
        is_last = str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC")
        rows, columns = seen.shape[1:3] if is_last else seen.shape[2:]
        return int(rows), int(columns)
    patches = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if patches is not None and patches[0] * patches[1] == n_tokens:
        return int(patches[0]), int(patches[1])
    side = isqrt(n_tokens)
    return (side, side) if side * side == n_tokens else (1, n_tokens)


def _fingerprint(architecture: Architecture, model: Any, stored: Mapping[str, torch.Tensor]) -> str:
    digest = Digest()
    options = {name: repr(value) for name, value in sorted(architecture.options.items())}
    if architecture.without_classifier is not None:
        options["reset_classifier"] = repr(dict(architecture.without_classifier))
    digest.add({"timm": architecture.name, "options": options})
    for name in sorted(stored):
        if not name.endswith(_COUNTERS) and not _is_classifier(model, name):
            tensor = stored[name]
            digest.add_tensor(name, str(tensor.dtype).removeprefix("torch."), tensor)
    return digest.hexdigest()
