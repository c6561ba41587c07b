"""SigLIP's vision tower as MedGemma, MedSigLIP and SigLIP itself hold it."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import SiglipVisionConfig, SiglipVisionModel

from medembed.encoders.preprocessing import Preprocessing, channel_levels
from medembed.encoders.weights import canonical_name, match_tensors, read_json, weight_files
from medembed.errors import EncoderError

__all__ = ["MODEL_TYPES", "SiglipEncoder", "load_siglip"]

MODEL_TYPES = ("gemma3", "siglip", "siglip_vision_model")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_STORED_DTYPES = ("F64", "F32", "F16", "BF16")
# What changes the result besides the weights; part of the fingerprint, defaults filled in.
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
_POOLINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda tokens: tokens.mean(dim=1),
    "max": lambda tokens: tokens.amax(dim=1),
}


class SiglipEncoder:
    """A loaded tower; made by `load_siglip`, described by `protocol.Encoder`.

    Poolings are taken over the patch tokens after the post-layernorm, in fp32.
    """

    def __init__(
        self,
        model: Any,
        preprocessing: Preprocessing,
        *,
        fingerprint: str,
        source: str,
        revision: str | None,
        device: str,
        precision: str,
    ) -> None:
        self.model = model
        self.preprocessing = preprocessing
        self.fingerprint = fingerprint
        self.source = source
        self.revision = revision
        self.device = device
        self.precision = precision
        self._levels = torch.from_numpy(channel_levels(preprocessing)).to(device)

    @property
    def dimensions(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of one image's vector under each pooling."""
        return dict.fromkeys(_POOLINGS, (int(self.model.config.hidden_size),))

    def encode(self, pixels: np.ndarray, poolings: Sequence[str]) -> dict[str, np.ndarray]:
        """Embed prepared images, uint8 (n, height, width); see `protocol.Encoder.encode`.

        In fp32 on a CPU a row depends neither on its place nor on its neighbours, bit for bit,
        as long as n is the same: held by a test, since it is the product's kernels that promise
        it. One image at a time would need no promise, but took 1.1 (one thread) to 1.8 times
        (two) as long.
        """
        self._check(pixels, poolings)
        if not len(pixels):
            return {name: np.empty((0, *self.dimensions[name]), np.float32) for name in poolings}
        pooled = self._pool(pixels, poolings)
        for name, rows in pooled.items():
            _refuse_non_finite(name, rows, self.precision)
        return pooled

    @torch.inference_mode()
    def _pool(self, pixels: np.ndarray, poolings: Sequence[str]) -> dict[str, np.ndarray]:
        tokens = self.model(pixel_values=self._normalise(pixels)).last_hidden_state.float()
        return {name: _POOLINGS[name](tokens).cpu().numpy() for name in poolings}

    def _normalise(self, pixels: np.ndarray) -> torch.Tensor:
        """Look grey levels up on the device: one uint8 channel travels instead of three floats."""
        levels = self._levels.to(_DTYPES[self.precision])
        index = torch.from_numpy(np.array(pixels)).to(self.device).int()
        if bool((levels[0] == levels).all()):
            return levels[0][index][:, None].expand(-1, 3, -1, -1)
        return torch.stack([level[index] for level in levels], dim=1)

    def _check(self, pixels: np.ndarray, poolings: Sequence[str]) -> None:
        size = (self.preprocessing.height, self.preprocessing.width)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[1:] != size:
            raise EncoderError(
                f"the encoder reads uint8 (n, {size[0]}, {size[1]}); this is {pixels.dtype} "
                f"{pixels.shape}. Bring images to its size with `prepare`."
            )
        unknown = [name for name in poolings if name not in _POOLINGS]
        if unknown or not poolings:
            raise EncoderError(
                f"pooling {', '.join(unknown) or '(none)'} is not offered by {self.source}. "
                f"Choose from: {', '.join(_POOLINGS)}."
            )


def load_siglip(
    directory: Path,
    preprocessing: Preprocessing,
    *,
    source: str,
    revision: str | None = None,
    device: str = "cpu",
    precision: str = "fp32",
) -> SiglipEncoder:
    """Load the vision tower of a checkpoint directory, and nothing else of it.

    Tensors are read one at a time, so a tower needs its own memory once. The fingerprint is
    SHA-256 over the architecture and over every tensor's canonical name, stored dtype, shape and
    bytes in the order of names: the same under all namings and file layouts.

    Raises
    ------
    EncoderError
        The directory holds no tower, or not exactly the tensors, shapes and finite values that
        its config asks for.
    """
    config = _read_architecture(directory)
    _check_size(config, preprocessing, source)
    with torch.device("meta"):
        model = SiglipVisionModel(config)
    expected = {str(canonical_name(name)): name for name in model.state_dict()}
    shapes = {name: tuple(model.state_dict()[full].shape) for name, full in expected.items()}
    digest = hashlib.sha256(_line({key: getattr(config, key) for key in _ARCHITECTURE}))
    state = {}
    for name, dtype, tensor in _read_tower(directory, shapes, source):
        digest.update(_line([name, dtype, list(tensor.shape)]))
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        state[expected[name]] = tensor.to(device=device, dtype=_DTYPES[precision])
    model.load_state_dict(state, strict=True, assign=True)
    _fill_positions(model, device)
    model.requires_grad_(False).eval()
    return SiglipEncoder(
        model,
        preprocessing,
        fingerprint=digest.hexdigest(),
        source=source,
        revision=revision,
        device=device,
        precision=precision,
    )


def _read_architecture(directory: Path) -> Any:
    config = read_json(directory / "config.json")
    vision = config
    if isinstance(config, dict) and config.get("model_type") != "siglip_vision_model":
        vision = config.get("vision_config")
    if not isinstance(vision, dict):
        raise EncoderError(f"config.json of {directory.name} describes no vision tower.")
    kind = vision.get("model_type", "siglip_vision_model")
    if kind != "siglip_vision_model":
        raise EncoderError(f"{directory.name} has a vision tower of type {kind}, not SigLIP's.")
    known = {key: vision[key] for key in _ARCHITECTURE if key in vision}
    try:
        built = SiglipVisionConfig(**known, attn_implementation="sdpa")
    except Exception as error:  # its validation raises its own errors, by transformers' version
        reason = " ".join(str(error).split())
        message = f"config.json of {directory.name} is not a SigLIP tower's: {reason}"
        raise EncoderError(message) from error
    _check_architecture(built, directory.name)
    return built


def _check_architecture(config: Any, source: str) -> None:
    sizes = ("hidden_size", "image_size", "patch_size", "num_hidden_layers", "num_attention_heads")
    for key in (*sizes, "intermediate_size"):
        value = getattr(config, key)
        if type(value) is not int or value < 1:
            raise EncoderError(f"config.json of {source}: {key} {value!r} is not a positive number")
    if config.hidden_size % config.num_attention_heads or config.num_channels != 3:
        raise EncoderError(
            f"config.json of {source}: hidden_size {config.hidden_size} for "
            f"{config.num_attention_heads} heads and {config.num_channels} channels cannot be built"
        )


def _check_size(config: Any, preprocessing: Preprocessing, source: str) -> None:
    size = (preprocessing.height, preprocessing.width)
    if size != (config.image_size, config.image_size):
        raise EncoderError(
            f"{source}: its processor makes images of {size[0]} x {size[1]}, but its tower reads "
            f"{config.image_size} x {config.image_size}. The two files are not of one checkpoint."
        )


def _read_tower(
    directory: Path, shapes: Mapping[str, tuple[int, ...]], source: str
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield canonical name, stored dtype and tensor, sorted by name, all of them checked."""
    with ExitStack() as stack:
        files = {path: _open(stack, path) for path in weight_files(directory)}
        stored = [(path, name) for path, file in files.items() for name in file.keys()]  # noqa: SIM118
        found = match_tensors(stored, source)
        _compare_names(set(found), set(shapes), source)
        for name in sorted(found):
            path, full = found[name]
            header = files[path].get_slice(full)
            if tuple(header.get_shape()) != shapes[name]:
                raise EncoderError(
                    f"{source}: {full} has shape {tuple(header.get_shape())}, its config asks for "
                    f"{shapes[name]}."
                )
            dtype = header.get_dtype()
            if dtype not in _STORED_DTYPES:
                raise EncoderError(
                    f"{source}: {full} is stored as {dtype}; quantised towers are not read."
                )
            tensor = files[path].get_tensor(full)
            if not bool(torch.isfinite(tensor).all()):
                raise EncoderError(f"{source}: {full} holds values that are not finite.")
            yield name, dtype, tensor


def _open(stack: ExitStack, path: Path) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="pt", device="cpu"))
    except (SafetensorError, OSError) as error:
        raise EncoderError(
            f"{path.name} of {path.parent.name} is not a whole safetensors file: {error}"
        ) from error


def _compare_names(found: set[str], expected: set[str], source: str) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing:
        raise EncoderError(
            f"{source}: the vision tower lacks {missing[0]}, one of {len(missing)} missing tensors."
        )
    if extra:
        raise EncoderError(
            f"{source}: the vision tower holds {extra[0]}, one of {len(extra)} tensors that its "
            "config does not ask for."
        )


def _fill_positions(model: Any, device: str) -> None:
    """Give the tower its only constant, 0, 1, 2, …, which checkpoints do not store."""
    for module in model.modules():
        if "position_ids" in dict(module.named_buffers(recurse=False)):
            count = module.position_ids.shape[-1]
            positions = torch.arange(count, device=device).expand((1, -1))
            module.register_buffer("position_ids", positions, persistent=False)


def _refuse_non_finite(pooling: str, rows: np.ndarray, precision: str) -> None:
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        first = int(np.flatnonzero(~finite)[0])
        raise EncoderError(
            f"{(~finite).sum()} of {len(rows)} {pooling} embeddings are not finite in {precision}, "
            f"the first at position {first}. Try --precision fp32."
        )


def _line(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True) + "\n").encode()
