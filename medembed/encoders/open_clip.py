"""Image towers of open_clip: its own ViT, run as CLIP's, and models of timm, as in BiomedCLIP.

A checkpoint is a directory with `open_clip_config.json` and a file of weights, of which the tensors
`visual.…` are read. open_clip itself is not needed: its ViT is CLIP's with other names.
"""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medembed.core.errors import EncoderError
from medembed.core.text import one_line
from medembed.encoders.checkpoint_files import OPEN_CLIP_CONFIG, is_of_timm, read_json
from medembed.encoders.fingerprint import compare_names
from medembed.encoders.preprocessing import Preprocessing
from medembed.encoders.state_dicts import read_weights

if TYPE_CHECKING:
    from medembed.encoders.torch_encoder import TorchEncoder

__all__ = ["load_open_clip"]

# Entries of `vision_cfg` that change the ViT, with the only values that CLIP's tower has.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "act_kwargs": (None, {}),
    "attentional_pool": (False, None),
    "block_type": (None, "default"),
    "ls_init_value": (None,),
    "no_ln_pre": (False,),
    "norm_kwargs": (None, {}),
    "pool_type": ("tok",),
    **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_attn", "scale_attn_inner"), (False,)),
    **dict.fromkeys(("scale_fc", "scale_heads"), (False,)),
}
# Entries that are read below, and those without effect on an image that is only embedded: the
# positions are stored, whether they were learnt or not.
_READ = {"head_width", "image_size", "layers", "mlp_ratio", "patch_size", "width"}
_IDLE = {"attn_pooler_heads", "attn_pooler_queries", "final_ln_after_pool", "output_tokens"}
_IDLE |= {"patch_dropout", "pos_embed_type"}
_RENAMED = (
    (r"^conv1\.", "embeddings.patch_embedding."),
    (r"^class_embedding$", "embeddings.class_embedding"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_pre\.", "pre_layrnorm."),
    (r"^ln_post\.", "post_layernorm."),
    (r"^transformer\.resblocks\.(\d+)\.", r"encoder.layers.\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
_FUSED = re.compile(r"(encoder\.layers\.\d+)\.attn\.in_proj_(weight|bias)")
_PROJECTION = "proj"  # to the space that images share with words
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def load_open_clip(
    directory: Path,
    preprocessing: Preprocessing,
    *,
    source: str,
    revision: str | None = None,
    device: str = "cpu",
    precision: str = "fp32",
) -> "TorchEncoder":
    """Return the image tower of a checkpoint of open_clip.

    It is a `ClipEncoder`, with the fingerprint of the same tower in the form of transformers, or a
    `TimmEncoder`. `pooler` is the vector before the projection to the space that images share with
    words.

    Raises
    ------
    EncoderError
        The config is of another tower, such as open_clip's ResNet, or the tensors are not exactly
        those that it asks for, or not finite.
    """
    config = read_json(directory / OPEN_CLIP_CONFIG)
    vision = config["model_cfg"]["vision_cfg"]
    known: dict[str, Any] = {"source": source, "revision": revision, "device": device}
    reload = partial(load_open_clip, directory, preprocessing, **known)
    known |= {"precision": precision, "reload": reload}
    if is_of_timm(config):
        return _load_timm(directory, config["model_cfg"], preprocessing, known)
    from medembed.encoders.clip import build_clip, check_architecture

    words = _read_architecture(vision, config["model_cfg"], source)
    architecture = check_architecture(words, preprocessing, OPEN_CLIP_CONFIG, source)
    stored = _rename(read_weights(directory, source, "image"), source)
    return build_clip(architecture, partial(_take, stored, source), preprocessing, **known)


def _load_timm(
    directory: Path, model: Mapping[str, Any], preprocessing: Preprocessing, known: dict[str, Any]
) -> "TorchEncoder":
    from medembed.encoders.timm_models import Architecture, build_timm

    vision, source = model["vision_cfg"], known["source"]
    pool, proj = vision.get("timm_pool", "avg"), vision.get("timm_proj", "linear")
    n_columns = model.get("embed_dim")
    if pool not in ("", "avg", "map", "max", "token") or type(n_columns) is not int:
        raise EncoderError(
            f"{OPEN_CLIP_CONFIG} of {source}: timm_pool {one_line(pool, 60)!r} with embed_dim "
            f"{one_line(n_columns, 60)} is not read."
        )
    name = str(vision["timm_model_name"])
    if proj in ("linear", "mlp"):
        kept = {"global_pool": pool} if pool else {}
        architecture = Architecture(name, 1000, without_classifier=kept)
    else:
        n_classes = 0 if proj == "none" else n_columns
        architecture = Architecture(name, n_classes, {"global_pool": pool})
    stored = {
        tensor_name.removeprefix("trunk."): tensor
        for tensor_name, tensor in read_weights(directory, source, "image").items()
        if tensor_name.startswith("trunk.")
    }
    return build_timm(architecture, stored, preprocessing, **known)


def _read_architecture(
    vision: Mapping[str, Any], model: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Return a ViT's config in transformers' words, with open_clip's own defaults."""
    if isinstance(vision.get("layers"), list):
        raise _refuse(source, "a ResNet of open_clip's own")
    for key, value in vision.items():
        if key in _PLAIN and value not in _PLAIN[key]:
            raise _refuse(source, f"a ViT with {key} {one_line(value, 60)}")
        if key not in (*_PLAIN, *_READ, *_IDLE) and not key.startswith("timm_"):
            raise _refuse(source, f"a tower with {one_line(key, 60)} in its config")
    width, head_width = vision.get("width", 768), vision.get("head_width", 64)
    ratio = vision.get("mlp_ratio", 4.0)
    numbers = all(type(value) is int and value > 0 for value in (width, head_width))
    if (
        not numbers
        or head_width > width
        or not isinstance(ratio, int | float)
        or not 0 < ratio < 1024
    ):
        raise _refuse(source, "a tower whose width, head_width or mlp_ratio cannot be built")
    return {
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "hidden_size": width,
        "image_size": _side(vision.get("image_size", 224)),
        "intermediate_size": int(width * ratio),
        "layer_norm_eps": 1e-5,
        "num_attention_heads": width // head_width,
        "num_hidden_layers": vision.get("layers", 12),
        "patch_size": _side(vision.get("patch_size", 16)),
    }


def _refuse(source: str, what: str) -> EncoderError:
    return EncoderError(
        f"{source} is {what} ({OPEN_CLIP_CONFIG}), which is not read. Of open_clip, CLIP's ViT and "
        "models of timm are."
    )


def _side(value: Any) -> Any:
    """Return the side of a square; other values as they are, which are refused later."""
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        return value[0]
    return value


def _rename(stored: Mapping[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """Return a ViT's tensors by transformers' names; its three products of one are three there."""
    tensors = {}
    for name, tensor in stored.items():
        if name == _PROJECTION:
            continue
        renamed = name
        for pattern, other in _RENAMED:
            renamed = re.sub(pattern, other, renamed)
        fused = _FUSED.fullmatch(renamed)
        if fused is None:
            tensors[renamed] = tensor
            continue
        if tensor.ndim < 1 or len(tensor) % 3:
            raise EncoderError(f"{source}: {name} has shape {tuple(tensor.shape)}, no three equal.")
        for which, third in zip("qkv", tensor.chunk(3), strict=True):
            tensors[f"{fused[1]}.self_attn.{which}_proj.{fused[2]}"] = third
    return tensors


def _take(
    stored: Mapping[str, torch.Tensor], source: str, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield the tensors of a tower, as `fingerprint.read_part` does."""
    compare_names(set(stored), set(shapes), source, "image")
    for name in sorted(stored):
        tensor = stored[name]
        if tuple(tensor.shape) != shapes[name]:
            raise EncoderError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, its config asks for "
                f"{shapes[name]}."
            )
        if tensor.dtype not in _DTYPES:
            raise EncoderError(f"{source}: {name} is stored as {tensor.dtype}, which is not read.")
        yield name, _DTYPES[tensor.dtype], tensor
