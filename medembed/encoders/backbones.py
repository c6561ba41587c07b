"""Vision backbones of transformers for comparison: ResNet, ConvNeXt, ViT, DINOv2, …."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel
from transformers.utils import logging

from medembed.core.errors import EncoderError
from medembed.core.text import one_line
from medembed.encoders.block_outputs import block_poolings, observe_blocks, watch_blocks
from medembed.encoders.checkpoint_files import (
    INDEX_FILE,
    WEIGHTS_FILE,
    holds_both,
    is_snapshot,
    refuse_adapted,
    unwrap,
    weight_files,
)
from medembed.encoders.delta import INTEGERS, DeltaWeights, put_in
from medembed.encoders.devices import set_precision
from medembed.encoders.features import Features, token_poolings
from medembed.encoders.fingerprint import Digest, open_tensors, read_tensor
from medembed.encoders.preprocessing import Preprocessing
from medembed.encoders.torch_encoder import ArrangedEncoder

__all__ = ["BACKBONE_TYPES", "BackboneEncoder", "load_backbone"]

_MAPS = ("convnext", "convnextv2", "resnet")  # return a feature map
_CLASSED = ("deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit")  # a class token first
_MERGING = ("swin", "swinv2")  # halve the grid of patches after every stage but the last
BACKBONE_TYPES = tuple(sorted((*_MAPS, *_CLASSED, *_MERGING)))
# Config entries that change the result besides the weights; a type's own are in its fingerprint.
_ARCHITECTURE = (
    "attention_bias",
    "depths",
    "downsample_in_bottleneck",
    "downsample_in_first_stage",
    "embed_dim",
    "embedding_size",
    "hidden_act",
    "hidden_size",
    "hidden_sizes",
    "image_size",
    "intermediate_size",
    "layer_norm_eps",
    "layer_type",
    "mlp_ratio",
    "num_attention_heads",
    "num_channels",
    "num_heads",
    "num_hidden_layers",
    "num_register_tokens",
    "patch_size",
    "pooler_act",
    "pooler_output_size",
    "pretrained_window_sizes",
    "qkv_bias",
    "rope_theta",
    "use_absolute_embeddings",
    "use_gated_mlp",
    "use_swiglu_ffn",
    "window_size",
)
# Tensors without effect: constants, and placeholders for patches masked in training.
_IDLE = ("mask_token", "position_ids", "relative_position_index")
# Wrappers that PEFT, trainers and other models put around a backbone, as name prefixes.
_OUTER = re.compile(r"(?:(?:base_model\.)?model\.)+")
_FIRST = ("embeddings.", "embedder.")


class BackboneEncoder(ArrangedEncoder):
    """A complete vision model of transformers; created by `load_backbone`.

    `pooler` is transformers' own `pooler_output`, available if the checkpoint holds its weights;
    `cls` is the class token after the last norm. Class and register tokens are excluded from
    `mean`, `max` and `grid4`.
    """

    def __init__(self, model: Any, preprocessing: Preprocessing, **known: Any) -> None:
        super().__init__(model, preprocessing, **known)
        observe_blocks(self.model)

    def canonical_name(self, stored: str) -> str | None:
        """Return the name without prefixes of wrappers and of the model."""
        prefix = self.model.base_model_prefix
        name = unwrap(stored)
        return name.removeprefix(_outer_of([name], prefix)).removeprefix(f"{prefix}.")

    def stored_tensors(self) -> dict[str, torch.Tensor]:
        """Return the model's tensors; see `TorchEncoder.stored_tensors`.

        transformers saves them, because the names depend on its release.
        """
        tensors: dict[str, torch.Tensor] = {}
        with TemporaryDirectory() as saved:
            with _quiet():
                self.model.save_pretrained(saved)
            for path in sorted(Path(saved).glob("*.safetensors")):
                tensors |= load_file(path)
        return {str(self.canonical_name(name)): tensor for name, tensor in tensors.items()}

    def features(self, pixel_values: torch.Tensor) -> Features:
        """Run the model; see `TorchEncoder.features`."""
        seen = self.tower(pixel_values)
        last = seen.last_hidden_state
        vectors = {}
        if "pooler" in self._dimensions:
            vectors["pooler"] = seen.pooler_output.flatten(1)
        if "cls" in self._dimensions:
            vectors["cls"] = last[:, 0]
        return Features(self.block_tokens(last)[0], self._grid, vectors)

    def block_tokens(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the patch tokens and the class token of a block's output, or of the model's."""
        if output.ndim == 4:  # a feature map
            return output.flatten(2).transpose(1, 2), None
        return output[:, self._n_before :], output[:, 0] if self._n_before else None

    def can_repool(self, name: str) -> bool:
        """Return whether a pooling is of patch tokens: models with a class token pool that one."""
        of_class_token = name == "pooler" and "cls" in self._dimensions
        return super().can_repool(name) and not of_class_token

    def repool(self, name: str, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Return what the model's pooling layer makes of tokens; see `TorchEncoder.repool`."""
        model: Any = self.model
        pooler = getattr(model, "pooler", None)
        if pooler is None:  # ConvNeXt's: a norm of the mean
            vectors: torch.Tensor = model.layernorm(tokens.mean(dim=1))
            return vectors
        columns = tokens.transpose(1, 2)
        is_map = model.config.model_type in _MAPS
        pooled: torch.Tensor = pooler(
            columns.reshape(len(tokens), -1, *grid) if is_map else columns
        )
        return pooled.flatten(1)


def load_backbone(
    directory: Path,
    preprocessing: Preprocessing,
    *,
    source: str,
    revision: str | None = None,
    device: str = "cpu",
    precision: str = "fp32",
    changes: DeltaWeights | None = None,
) -> BackboneEncoder:
    """Load a vision model of one of `BACKBONE_TYPES` through transformers, from safetensors only.

    The fingerprint is SHA-256 over the architecture and over the stored tensors, as in
    `siglip.load_siglip`, without the model's prefix and without a classifier: equal for a bare
    backbone and for a classifier built on it. With `changes` it is the fingerprint of the changed
    model, and the directory is their base.

    Raises
    ------
    EncoderError
        The directory holds no such model, or its weights are incomplete or not finite; or it is
        not the base of the changes.
    """
    config = _read_config(directory, source)
    shapes, block_widths = _shapes_of(config, preprocessing, source)
    model, has_pooler = _load(directory, config, precision, source, changes)
    grid, n_before = _arrange(config, shapes["last_hidden_state"], preprocessing, source)
    width = shapes["last_hidden_state"][1 if config.model_type in _MAPS else -1]
    dimensions = token_poolings(width, grid)
    if has_pooler and "pooler_output" in shapes:
        dimensions["pooler"] = (shapes["pooler_output"][1],)
    if config.model_type in _CLASSED:
        dimensions["cls"] = (width,)
    dimensions |= block_poolings(block_widths, has_class_token=config.model_type in _CLASSED)
    known: dict[str, Any] = {"source": source, "revision": revision, "device": device}
    prefix = model.base_model_prefix
    return BackboneEncoder(
        model.to(device),
        preprocessing,
        grid=grid,
        n_before=n_before,
        dimensions=dimensions,
        fingerprint=_fingerprint(directory, config, prefix, source, changes),
        precision=precision,
        reload=partial(load_backbone, directory, preprocessing, changes=changes, **known),
        **known,
    )


def _read_config(directory: Path, source: str) -> Any:
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(  # nosec B615 # a directory, local files only
                directory, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # its validation raises its own errors, by transformers' version
        raise EncoderError(
            f"config.json of {source} is not read: {one_line(error, 300)}"
        ) from error
    if config.model_type not in BACKBONE_TYPES:
        raise EncoderError(
            f"{source} is a checkpoint of type {config.model_type!r}, which is not a vision "
            f"backbone that is read. Give one of type: {', '.join(BACKBONE_TYPES)}."
        )
    if getattr(config, "quantization_config", None):
        raise EncoderError(
            f"config.json of {source} asks for quantised weights (quantization_config), which are "
            "not read. Give the checkpoint that was quantised."
        )
    if getattr(config, "num_channels", 3) != 3:
        raise EncoderError(f"{source} reads {config.num_channels} channels, not 3.")
    return config


def _shapes_of(
    config: Any, preprocessing: Preprocessing, source: str
) -> tuple[dict[str, tuple[int, ...]], list[int]]:
    """Return output shapes and widths of the blocks for one image, from a model without weights."""
    size = (preprocessing.height, preprocessing.width)
    blocks: list[torch.Tensor] = []
    try:
        with torch.device("meta"), torch.inference_mode():
            model = AutoModel.from_config(config, trust_remote_code=False).eval()
            observe_blocks(model)
            with watch_blocks(lambda _, output: blocks.append(output)):
                seen = model(pixel_values=torch.empty(1, 3, *size))
    except Exception as error:
        raise EncoderError(
            f"{source} cannot read the images of {size[0]} x {size[1]} that its processor makes: "
            f"{one_line(error, 300)}"
        ) from error
    last, pooler = seen.last_hidden_state, getattr(seen, "pooler_output", None)
    shapes = {"last_hidden_state": tuple(last.shape)}
    if pooler is not None:
        shapes["pooler_output"] = tuple(pooler.flatten(1).shape)
    return shapes, [each.shape[1 if each.ndim == 4 else -1] for each in blocks]


def _arrange(
    config: Any, shape: tuple[int, ...], preprocessing: Preprocessing, source: str
) -> tuple[tuple[int, int], int]:
    """Return the grid of the patch tokens, and how many other tokens come before them."""
    if config.model_type in _MAPS:
        return (shape[2], shape[3]), 0
    patch = config.patch_size
    rows, columns = preprocessing.height // patch, preprocessing.width // patch
    if config.model_type in _MERGING:  # sides that do not divide are padded
        rows, columns = -(-preprocessing.height // patch), -(-preprocessing.width // patch)
        for _ in config.depths[1:]:
            rows, columns = -(-rows // 2), -(-columns // 2)
    n_before = shape[1] - rows * columns
    if n_before < 0 or (n_before > 0) != (config.model_type in _CLASSED):
        raise EncoderError(
            f"{source} gives {shape[1]} tokens for {rows} x {columns} patches: transformers has "
            f"changed what {config.model_type} gives. Use another release of it."
        )
    return (rows, columns), n_before


def _load(
    directory: Path, config: Any, precision: str, source: str, changes: DeltaWeights | None
) -> tuple[Any, bool]:
    """Return the model with all its weights, and whether its pooling layer is the checkpoint's."""
    weight_files(directory, "whole")
    if holds_both(directory, "whole") and not is_snapshot(directory):
        raise EncoderError(f"{source} holds {INDEX_FILE} and {WEIGHTS_FILE}. Keep one of the two.")
    try:
        with _quiet():
            model, report = _from_pretrained(directory, config, source, changes)
    except EncoderError:
        raise
    except Exception as error:  # of many kinds, by transformers' version
        raise EncoderError(f"{source} cannot be loaded: {one_line(error, 300)}") from error
    missing = sorted(name for name in report["missing_keys"] if not name.endswith(_IDLE))
    without = [name for name in missing if name.startswith("pooler.")]
    if len(missing) > len(without):
        first = next(name for name in missing if name not in without)
        raise EncoderError(f"{source} lacks {first}, one of {len(missing)} missing tensors.")
    _refuse_extra(report["unexpected_keys"], model.base_model_prefix, source)
    if without:
        model.pooler = None  # transformers has filled it with random numbers
    set_precision(model, precision)
    return model, not without


def _from_pretrained(
    directory: Path, config: Any, source: str, changes: DeltaWeights | None
) -> tuple[Any, dict[str, Any]]:
    with torch.device("meta"):
        kind = type(AutoModel.from_config(config, trust_remote_code=False))
    prefix = kind.base_model_prefix
    with ExitStack() as stack:
        files = {path: open_tensors(stack, path) for path in weight_files(directory, "whole")}
        names = _inner_names(files, prefix, source)
    is_wrapped = any(stored != name for name, (_, stored) in names.items())
    known: dict[str, Any] = {"config": config, "dtype": torch.float32}
    known |= {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    if changes is None and not is_wrapped:
        found: tuple[Any, dict[str, Any]] = AutoModel.from_pretrained(  # nosec B615 # local files
            directory, trust_remote_code=False, **known
        )
        return found
    held = {path: load_file(path) for path in files}
    state = {name: held[path][stored] for name, (path, stored) in names.items()}
    for full in state:
        name = full.removeprefix(f"{prefix}.")
        if changes is not None and name in changes.tensors:
            state[full] = changes.tensors[name][1]
    adapted: tuple[Any, dict[str, Any]] = kind.from_pretrained(None, state_dict=state, **known)
    return adapted


def _refuse_extra(unexpected: Any, prefix: str, source: str) -> None:
    """Refuse tensors of the backbone that its config does not define."""
    inner = [
        name.removeprefix(f"{prefix}.") for name in unexpected if name.startswith(f"{prefix}.")
    ]
    parts = ("embedder.", "embeddings.", "encoder.", "layers.", "layer.", "stages.")
    inner += [name for name in unexpected if name.startswith(parts)]
    extra = sorted(name for name in inner if not name.endswith(_IDLE))
    if extra:
        raise EncoderError(
            f"{source} holds {extra[0]}, one of {len(extra)} tensors that its config does not ask "
            "for."
        )


def _fingerprint(
    directory: Path, config: Any, prefix: str, source: str, changes: DeltaWeights | None
) -> str:
    digest, base = Digest(), Digest()
    known = {key: getattr(config, key) for key in _ARCHITECTURE if hasattr(config, key)}
    for each in (digest, base):
        each.add({"model_type": config.model_type, **known})
    for name, dtype, tensor in put_in(_read(directory, prefix, source), changes, base):
        digest.add_tensor(name, dtype, tensor)
    if changes is not None:
        changes.require(base.hexdigest(), digest.hexdigest())
    return digest.hexdigest()


def _read(directory: Path, prefix: str, source: str) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield the backbone's tensors sorted by name: without prefix, stored dtype, values."""
    with ExitStack() as stack:
        files = {path: open_tensors(stack, path) for path in weight_files(directory, "whole")}
        names = _inner_names(files, prefix, source)
        if any(name.startswith(f"{prefix}.") for name in names):
            names = {name: file for name, file in names.items() if name.startswith(f"{prefix}.")}
        for name in sorted(names, key=lambda name: name.removeprefix(f"{prefix}.")):
            path, stored = names[name]
            dtype, tensor = read_tensor(files[path], stored, source, integers=INTEGERS)
            yield name.removeprefix(f"{prefix}."), dtype, tensor


def _inner_names(
    files: Mapping[Path, Any], prefix: str, source: str
) -> dict[str, tuple[Path, str]]:
    """Return the tensors' names without wrappers, with the places where they are stored.

    The model's own prefix stays. Raises EncoderError if two tensors have one name without it.
    """
    stored = [(path, name) for path, file in files.items() for name in file.keys()]  # noqa: SIM118
    outer = _outer_of((unwrap(name) for _, name in stored), prefix)
    names: dict[str, tuple[Path, str]] = {}
    bare: dict[str, tuple[Path, str]] = {}
    for place in stored:
        name = unwrap(place[1]).removeprefix(outer)
        refuse_adapted(name, source, "whole")
        before = bare.setdefault(name.removeprefix(f"{prefix}."), place)
        if before != place:
            raise EncoderError(
                f"{source} holds {name} twice, as {before[1]} of {before[0].name} and as "
                f"{place[1]} of {place[0].name}. Keep one of the two."
            )
        names[name] = place
    return names


def _outer_of(names: Iterable[str], prefix: str) -> str:
    """Return the prefix of a backbone's own names, or "" without one."""
    first = (f"{prefix}.", *_FIRST)
    for name in names:
        outer = _OUTER.match(name)
        if outer and name[outer.end() :].startswith(first):
            return outer[0]
    return ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bar and its report of unused classifiers."""
    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()
