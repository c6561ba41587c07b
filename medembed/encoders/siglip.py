"""SigLIP's vision tower, as contained in MedGemma, MedSigLIP and SigLIP itself.

On CUDA in bfloat16, two products are replaced by cheaper forms (`GreyPatches`, `FusedMLP`) that
differ only in the rounding of a sum. In fp32, and on a CPU, a tower keeps its own modules and bits.
"""

import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from medembed.core.errors import EncoderError
from medembed.encoders.checkpoint_files import Part, canonical_name, checkpoint_name, read_json
from medembed.encoders.delta import DeltaWeights, put_in
from medembed.encoders.devices import stored_dtypes
from medembed.encoders.features import Features, token_poolings
from medembed.encoders.fingerprint import Digest, read_part
from medembed.encoders.preprocessing import Preprocessing
from medembed.encoders.siglip_tower import Projector, SiglipConfig, SiglipTower
from medembed.encoders.torch_encoder import TorchEncoder

__all__ = ["FusedMLP", "GreyPatches", "SiglipEncoder", "fuse", "gelu_agrees", "load_siglip"]

_TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python_tanh")


class GreyPatches(nn.Conv2d):
    """A patch embedding for images with equal channels: a product of a third of the width.

    Sum over channels c of w_c · x = (sum of w_c) · x, so a patch of 14 x 14 takes 196 columns
    instead of 588. It is computed in fp32, which costs less here than rounding the grey levels.
    """

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the result of the convolution.

        Parameters
        ----------
        pixel_values : Tensor
            (n, 3, rows, columns); only the first channel is read.

        Returns
        -------
        Tensor
            float32 (n, width, rows of patches, columns of patches).
        """
        high, wide = self.kernel_size
        with torch.autocast(pixel_values.device.type, enabled=False):
            grey = pixel_values[:, 0].float()
            rows, columns = grey.shape[1] // high, grey.shape[2] // wide
            grey = grey[:, : rows * high, : columns * wide]
            patches = grey.reshape(len(grey), rows, high, columns, wide)
            patches = patches.permute(0, 1, 3, 2, 4).flatten(3)
            weight = self.weight.float().sum(dim=1).flatten(1)
            bias = None if self.bias is None else self.bias.float()
            return functional.linear(patches, weight, bias).permute(0, 3, 1, 2)


class FusedMLP(nn.Module):
    """A block's MLP whose GELU is the first product's epilogue instead of a separate pass."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.fc1, self.fc2 = mlp.fc1, mlp.fc2

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return fc2(gelu(fc1(x))), with the tanh form of GELU."""
        flat = hidden_states.flatten(0, -2).to(self.fc1.weight.dtype)
        inner = torch._addmm_activation(self.fc1.bias, flat, self.fc1.weight.t(), use_gelu=True)
        outer: torch.Tensor = self.fc2(inner.reshape(*hidden_states.shape[:-1], -1))
        return outer


def fuse(model: Any, device: str, *, channels_alike: bool) -> list[str]:
    """Replace a SigLIP tower's modules by cheaper ones with equal results on this device.

    Parameters
    ----------
    model : SiglipTower
        The tower in bfloat16 on `device`; its tensors and their names do not change.
    channels_alike : bool
        Whether normalised images have three equal channels.

    Returns
    -------
    list of str
        The replaced parts: "patches", "gelu".
    """
    replaced = []
    if channels_alike:
        old = model.embeddings.patch_embedding
        model.embeddings.patch_embedding = _with_tensors_of(old)
        replaced.append("patches")
    if model.config.hidden_act in _TANH_GELU and gelu_agrees(device):
        for block in model.encoder.layers:
            block.mlp = FusedMLP(block.mlp)
        replaced.append("gelu")
    return replaced


def gelu_agrees(device: str) -> bool:
    """Return whether this device's fused GELU is the tanh form, to bfloat16 resolution."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(64, 64, generator=generator) for _ in range(2))
    bias = torch.randn(64, generator=generator)
    own = [t.to(device, torch.bfloat16) for t in (bias, x, w)]
    try:
        fused = torch._addmm_activation(own[0], own[1], own[2].t(), use_gelu=True)
    except RuntimeError:  # not on this device
        return False
    exact = [t.double() for t in own]
    wanted = functional.gelu(torch.addmm(exact[0], exact[1], exact[2].t()), approximate="tanh")
    return bool((fused.double() - wanted).abs().max() <= 2**-8 * wanted.abs().max())


def _with_tensors_of(convolution: nn.Conv2d) -> GreyPatches:
    made = GreyPatches(1, 1, 1, device="meta")
    made.__dict__.update(convolution.__dict__)
    return made


# Config entries that change the result besides the weights; in the fingerprint, with defaults.
_ARCHITECTURE = (
    "hidden_act",
    "hidden_size",
    "image_size",
    "intermediate_size",
    "layer_norm_eps",
    "num_attention_heads",
    "num_channels",
    "num_hidden_layers",
    "patch_size",
    "vision_use_head",
)
_PROJECTOR = "projector"


class SiglipEncoder(TorchEncoder):
    """A loaded tower; created by `load_siglip`, described by `protocol.PipelinedEncoder`.

    Patch tokens are those after the post-layernorm. `pooler` is the attention head of towers
    that have one (MedSigLIP, not MedGemma). `projector` is the mean over the tokens that Gemma
    would receive: 4 × 4 average pooling, RMS norm, projection to the language model's width.

    Parameters
    ----------
    model : SiglipTower
    projector : Projector, optional
    """

    part: ClassVar[Part] = "tower"

    def __init__(
        self, model: Any, preprocessing: Preprocessing, *, projector: Any = None, **known: Any
    ) -> None:
        super().__init__(model, preprocessing, **known)
        self.projector = projector
        config = model.config
        side = config.image_size // config.patch_size
        self._grid = (side, side)
        self._dimensions = token_poolings(config.hidden_size, self._grid)
        if config.vision_use_head:
            self._dimensions["pooler"] = (config.hidden_size,)
        if projector is not None:
            projector.requires_grad_(False).eval()
            self._dimensions[_PROJECTOR] = (projector.mm_input_projection_weight.shape[1],)
        if (self.device, self.precision) == ("cuda", "bf16"):
            fuse(self.model, self.device, channels_alike=self._alike)

    @property
    def dimensions(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of one image's vector under each pooling."""
        return dict(self._dimensions)

    def canonical_name(self, stored: str) -> str | None:
        """Return the name without prefix; see `checkpoint_files.canonical_name`."""
        return canonical_name(stored)

    def stored_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tower's tensors; see `TorchEncoder.stored_tensors`."""
        stored = super().stored_tensors()
        return {str(canonical_name(name)): tensor for name, tensor in stored.items()}

    def features(self, pixel_values: torch.Tensor) -> Features:
        """Run the tower; see `TorchEncoder.features`."""
        seen = self.tower(pixel_values)
        vectors = {}
        if "pooler" in self._dimensions:
            vectors["pooler"] = seen.pooler_output
        if self.projector is not None:
            vectors[_PROJECTOR] = self.projector(seen.last_hidden_state)
        return Features(seen.last_hidden_state, self._grid, vectors)

    def draw_model(self) -> nn.Module:
        """Return a tower with random weights, as transformers draws them."""
        from transformers import SiglipVisionConfig, SiglipVisionModel

        known = {key: getattr(self.model.config, key) for key in _ARCHITECTURE}
        drawn: nn.Module = SiglipVisionModel(SiglipVisionConfig(**known))
        return drawn

    def repool(self, name: str, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Return what the projector or the attention head makes of tokens; see `TorchEncoder`."""
        pooler = self.projector if name == _PROJECTOR else self.model.head
        vectors: torch.Tensor = pooler(tokens)
        return vectors


def load_siglip(
    directory: Path,
    preprocessing: Preprocessing,
    *,
    source: str,
    revision: str | None = None,
    device: str = "cpu",
    precision: str = "fp32",
    projector: bool = False,
    changes: DeltaWeights | None = None,
) -> SiglipEncoder:
    """Return the vision tower of a checkpoint directory, optionally with the projector.

    Tensors are read one at a time, so a tower needs its own memory only once. The fingerprint is
    SHA-256 over the architecture and over every tensor's canonical name, stored dtype, shape and
    bytes in the order of names: it is equal under all namings and file layouts. It includes the
    projector only if that is loaded. With `changes` it is the fingerprint of the changed tower,
    and the directory is their base.

    Raises
    ------
    EncoderError
        The directory holds no tower, or not exactly the tensors, shapes and finite values that
        its config requires; or lacks the requested projector; or is not the base of the changes.
    """
    config = _read_architecture(directory)
    _check_size(config, preprocessing, source)
    digest, base = Digest(), Digest()
    for each in (digest, base):
        each.add({key: getattr(config, key) for key in _ARCHITECTURE})
    to = {"device": device, "precision": precision}
    with torch.device("meta"):
        model = SiglipTower(config)
    names = {str(canonical_name(name)): name for name in model.state_dict()}
    tensors = read_part(directory, _shapes(model, names), source)
    _fill(model, names, digest, put_in(tensors, changes, base), to)
    if changes is not None:
        changes.require(base.hexdigest(), digest.hexdigest())
    _fill_positions(model, device)
    added = _load_projector(directory, config, digest, source, to) if projector else None
    reload = partial(
        load_siglip,
        directory,
        preprocessing,
        source=source,
        revision=revision,
        device=device,
        projector=projector,
        changes=changes,
    )
    return SiglipEncoder(
        model,
        preprocessing,
        projector=added,
        fingerprint=digest.hexdigest(),
        source=source,
        revision=revision,
        device=device,
        precision=precision,
        reload=reload,
    )


def _load_projector(
    directory: Path, vision: SiglipConfig, digest: Digest, source: str, to: Mapping[str, str]
) -> Any:
    config = read_json(directory / "config.json")
    text = config.get("text_config")
    width = text.get("hidden_size") if isinstance(text, dict) else None
    n_tokens = config.get("mm_tokens_per_image", 256)  # Gemma3Config's default
    if config.get("model_type") != "gemma3" or type(width) is not int or width < 1:
        raise EncoderError(
            f"pooling {_PROJECTOR} is not offered by {source}: its config.json describes no "
            "projector of Gemma 3 to a language model."
        )
    side = vision.image_size // vision.patch_size
    if type(n_tokens) is not int or not 1 <= math.isqrt(max(0, n_tokens)) <= side:
        raise EncoderError(
            f"config.json of {source}: mm_tokens_per_image {n_tokens!r} cannot be had of "
            f"{side} x {side} tokens."
        )
    with torch.device("meta"):
        projector = Projector(vision, width, n_tokens)
    digest.add({"mm_tokens_per_image": n_tokens})
    names = {name: name for name in projector.state_dict()}
    shapes = _shapes(projector, names)
    _fill(projector, names, digest, read_part(directory, shapes, source, "projector"), to)
    return projector


def _shapes(module: Any, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    state = module.state_dict()
    return {name: tuple(state[full].shape) for name, full in names.items()}


def _fill(
    module: Any,
    names: Mapping[str, str],
    digest: Digest,
    tensors: Iterable[tuple[str, str, torch.Tensor]],
    to: Mapping[str, str],
) -> None:
    dtypes = stored_dtypes(module, to["precision"])
    state = {}
    for name, dtype, tensor in tensors:
        digest.add_tensor(name, dtype, tensor)
        state[names[name]] = tensor.to(to["device"], dtypes[names[name]])
    module.load_state_dict(state, strict=True, assign=True)


def _read_architecture(directory: Path) -> SiglipConfig:
    config = read_json(directory / "config.json")
    vision = config
    if isinstance(config, dict) and config.get("model_type") != "siglip_vision_model":
        vision = config.get("vision_config")
    if not isinstance(vision, dict):
        raise EncoderError(
            f"config.json of {checkpoint_name(directory)} describes no vision tower."
        )
    _refuse_second_tower(config, vision, checkpoint_name(directory))
    kind = vision.get("model_type", "siglip_vision_model")
    if kind != "siglip_vision_model":
        raise EncoderError(
            f"{checkpoint_name(directory)} has a vision tower of type {kind}, not SigLIP's."
        )
    known = {key: vision[key] for key in _ARCHITECTURE if key in vision}
    try:
        return SiglipConfig(**known)
    except ValueError as error:
        name = checkpoint_name(directory)
        raise EncoderError(f"config.json of {name} is not a SigLIP tower's: {error}") from error


def _refuse_second_tower(config: Any, vision: Any, source: str) -> None:
    """Refuse a tower's config that also nests one, which transformers would read in places."""
    nested = config.get("vision_config")
    if vision is not config or not isinstance(nested, dict):
        return
    for key in _ARCHITECTURE:
        if key in nested and nested[key] != config.get(key, nested[key]):
            raise EncoderError(
                f"config.json of {source} describes two towers: {key} is {config[key]!r}, and "
                f"{nested[key]!r} in its vision_config. Take one out."
            )


def _check_size(config: SiglipConfig, preprocessing: Preprocessing, source: str) -> None:
    size = (preprocessing.height, preprocessing.width)
    if size != (config.image_size, config.image_size):
        raise EncoderError(
            f"{source}: its processor makes images of {size[0]} x {size[1]}, but its tower reads "
            f"{config.image_size} x {config.image_size}. The two files are not of one checkpoint."
        )


def _fill_positions(model: Any, device: str) -> None:
    """Set the tower's only constant, 0, 1, 2, …, which checkpoints do not store."""
    for module in model.modules():
        if "position_ids" in dict(module.named_buffers(recurse=False)):
            count = module.position_ids.shape[-1]
            positions = torch.arange(count, device=device).expand((1, -1))
            module.register_buffer("position_ids", positions, persistent=False)
