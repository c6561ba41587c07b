"""CLIP's image tower, of which alone the tensors are fetched and read."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from medembed.core.errors import EncoderError
from medembed.core.text import one_line
from medembed.encoders.block_outputs import block_poolings, observe_blocks
from medembed.encoders.checkpoint_files import CONFIG_FILE, Part, canonical_name, read_json
from medembed.encoders.devices import stored_dtypes
from medembed.encoders.features import Features, token_poolings
from medembed.encoders.fingerprint import Digest, read_part
from medembed.encoders.preprocessing import Preprocessing
from medembed.encoders.torch_encoder import TorchEncoder

__all__ = ["ClipEncoder", "ReadTensors", "build_clip", "check_architecture", "load_clip"]

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
)
_POSITIONS = "embeddings.position_ids"  # 0, 1, 2, …, which checkpoints need not store
ReadTensors = Callable[[Mapping[str, tuple[int, ...]]], Iterable[tuple[str, str, torch.Tensor]]]
"""Takes the shapes of a tower's tensors to canonical name, stored dtype and values, by name."""


class ClipEncoder(TorchEncoder):
    """CLIP's image tower; created by `load_clip`.

    Patch tokens and `cls` are the last block's output, as transformers' `last_hidden_state` has
    them; `pooler` is the class token after the post-layernorm, before CLIP's projection.
    """

    part: ClassVar[Part] = "tower"

    def __init__(self, model: Any, preprocessing: Preprocessing, **known: Any) -> None:
        super().__init__(model, preprocessing, **known)
        config = model.config
        side, width = config.image_size // config.patch_size, config.hidden_size
        self._grid = (side, side)
        own = {"pooler": (width,), "cls": (width,)}
        blocks = block_poolings([width] * config.num_hidden_layers, has_class_token=True)
        self._dimensions = {**token_poolings(width, self._grid), **own, **blocks}
        observe_blocks(self.model)

    @property
    def dimensions(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of one image's vector under each pooling."""
        return dict(self._dimensions)

    def features(self, pixel_values: torch.Tensor) -> Features:
        """Run the tower; see `TorchEncoder.features`."""
        seen = self.tower(pixel_values)
        tokens, class_token = self.block_tokens(seen.last_hidden_state)
        return Features(tokens, self._grid, {"pooler": seen.pooler_output, "cls": class_token})

    def block_tokens(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the patch tokens and the class token of a block's output."""
        return output[:, 1:], output[:, 0]

    def can_repool(self, name: str) -> bool:
        """Return whether a pooling is of patch tokens: `pooler` is of the class token."""
        return name != "pooler" and super().can_repool(name)


def load_clip(
    directory: Path,
    preprocessing: Preprocessing,
    *,
    source: str,
    revision: str | None = None,
    device: str = "cpu",
    precision: str = "fp32",
) -> ClipEncoder:
    """Return the image tower of a checkpoint directory of CLIP, or of its image tower alone.

    The fingerprint is SHA-256 over the architecture and the tower's tensors, as in
    `siglip.load_siglip`: equal under all namings and file layouts.

    Raises
    ------
    EncoderError
        The directory holds no such tower, or not exactly the tensors, shapes and finite values
        that its config requires; or its processor makes images of another size.
    """
    config = _read_architecture(directory, preprocessing, source)
    known: dict[str, Any] = {"source": source, "revision": revision, "device": device}
    return build_clip(
        config,
        lambda shapes: read_part(directory, shapes, source),
        preprocessing,
        precision=precision,
        reload=partial(load_clip, directory, preprocessing, **known),
        **known,
    )


def build_clip(
    config: CLIPVisionConfig,
    read: ReadTensors,
    preprocessing: Preprocessing,
    *,
    device: str,
    precision: str,
    **known: Any,
) -> ClipEncoder:
    """Return an image tower of CLIP, filled with tensors from anywhere.

    Parameters
    ----------
    config : CLIPVisionConfig
        See `check_architecture`.
    read : callable
        See `ReadTensors`.
    """
    digest = Digest()
    digest.add({"clip": {key: getattr(config, key) for key in _ARCHITECTURE}})
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    names = {str(canonical_name(name)): name for name in model.state_dict()}
    shapes = {name: tuple(model.state_dict()[full].shape) for name, full in names.items()}
    dtypes, state = stored_dtypes(model, precision), {}
    for name, dtype, tensor in read(shapes):
        digest.add_tensor(name, dtype, tensor)
        state[names[name]] = tensor.to(device, dtypes[names[name]])
    model.load_state_dict(state, strict=True, assign=True)
    n_positions = model.get_buffer(_POSITIONS).shape[-1]
    positions = torch.arange(n_positions, device=device).expand((1, -1))
    model.embeddings.register_buffer("position_ids", positions, persistent=False)
    return ClipEncoder(
        model,
        preprocessing,
        fingerprint=digest.hexdigest(),
        precision=precision,
        device=device,
        **known,
    )


def _read_architecture(
    directory: Path, preprocessing: Preprocessing, source: str
) -> CLIPVisionConfig:
    config = read_json(directory / CONFIG_FILE)
    vision = config if config.get("model_type") == "clip_vision_model" else None
    vision = vision or config.get("vision_config")
    if not isinstance(vision, dict):
        raise EncoderError(f"{CONFIG_FILE} of {source} describes no image tower.")
    return check_architecture(vision, preprocessing, CONFIG_FILE, source)


def check_architecture(
    vision: Mapping[str, Any], preprocessing: Preprocessing, file: str, source: str
) -> CLIPVisionConfig:
    """Return a tower's config of entries in transformers' words, from `file` of a checkpoint.

    Raises
    ------
    EncoderError
        They describe no tower, or one that reads images of another size than `preprocessing`.
    """
    known: dict[str, Any] = {key: vision[key] for key in _ARCHITECTURE if key in vision}
    try:
        built: Any = CLIPVisionConfig(**{**known, "attn_implementation": "sdpa"})
    except Exception as error:  # its validation raises its own errors, by transformers' version
        raise EncoderError(
            f"{file} of {source} is not a CLIP tower's: {one_line(error)}"
        ) from error
    for key in _ARCHITECTURE:
        value = getattr(built, key)
        if key not in ("hidden_act", "layer_norm_eps") and (type(value) is not int or value < 1):
            raise EncoderError(f"{file} of {source}: {key} {value!r} is no positive number.")
    size = (preprocessing.height, preprocessing.width)
    if size != (built.image_size, built.image_size):
        raise EncoderError(
            f"{source}: its processor makes images of {size[0]} x {size[1]}, but its tower reads "
            f"{built.image_size} x {built.image_size}. The two files are not of one checkpoint."
        )
    if built.num_channels != 3 or built.hidden_size % built.num_attention_heads:
        raise EncoderError(
            f"{file} of {source}: {built.num_channels} channels, or {built.hidden_size} "
            f"columns for {built.num_attention_heads} heads, cannot be built."
        )
    checked: CLIPVisionConfig = built
    return checked
