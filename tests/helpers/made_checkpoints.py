"""Small checkpoints with the names, dtypes and neighbours that MedGemma's files have."""

import json

import torch
from safetensors.torch import save

INDEX = "model.safetensors.index.json"
PROCESSOR = "preprocessor_config.json"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
CONFIG = b'{"model_type": "gemma3"}'


def tower(n_layers: int = 8, width: int = 256, prefix: str = "vision_tower.vision_model.") -> dict:
    """Make bfloat16 tensors under a tower's names; 8 x 256: 1 MB a layer in two tensors."""
    made = {}
    generator = torch.Generator().manual_seed(n_layers * width)
    for layer in range(n_layers):
        for name, rows in (("mlp.fc1", 4 * width), ("self_attn.q_proj", width)):
            weight = torch.randn(rows, width, generator=generator).bfloat16()
            made[f"{prefix}encoder.layers.{layer}.{name}.weight"] = weight
    made[f"{prefix}post_layernorm.bias"] = torch.randn(width, generator=generator).bfloat16()
    return made


def projector() -> dict[str, torch.Tensor]:
    return {
        "multi_modal_projector.mm_input_projection_weight": torch.full((8, 16), 0.5).bfloat16(),
        "multi_modal_projector.mm_soft_emb_norm.weight": torch.arange(8.0).bfloat16(),
    }


def language(n: int, rows: int = 1024) -> dict[str, torch.Tensor]:
    """Make tensors that come before and behind the tower's in the order of names."""
    names = ("language_model.model.norm", "zzz.lm_head")
    return {f"{name}.{n}.weight": torch.full((rows, 256), float(n)).bfloat16() for name in names}


def n_bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def sharded(made: dict[str, torch.Tensor] | None = None, rows: int = 1024) -> dict[str, bytes]:
    """Make a repository of three shards: tower, tower, projector, each among other tensors."""
    made = tower(2, 64) if made is None else made
    names = sorted(made)
    halves = [{name: made[name] for name in part} for part in (names[::2], names[1::2])]
    parts = [{**half, **language(n, rows)} for n, half in enumerate([*halves, projector()])]
    weight_map = {
        name: shard for shard, part in zip(SHARDS, parts, strict=True) for name in sorted(part)
    }
    files = {shard: save(part) for shard, part in zip(SHARDS, parts, strict=True)}
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return {"config.json": CONFIG, PROCESSOR: b"{}", INDEX: index, **files}


def single(made: dict[str, torch.Tensor] | None = None) -> dict[str, bytes]:
    """Make a repository of one file, as MedSigLIP's is, with names of another release."""
    made = tower(2, 64, "vision_model.") if made is None else made
    weights = save({**made, **language(0)})
    files = {"config.json": b'{"model_type": "siglip"}', "processor_config.json": b"{}"}
    return {**files, "model.safetensors": weights, "tokenizer.json": b"{}"}


def classifier() -> dict[str, bytes]:
    """Make a repository whose model is no SigLIP: two shards that are needed whole."""
    parts = {"a.safetensors": {"vit.a": torch.ones(3)}, "b.safetensors": {"vit.b": torch.ones(4)}}
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = json.dumps({"weight_map": weight_map}).encode()
    files = {file: save(part) for file, part in parts.items()}
    return {"config.json": b'{"model_type": "vit"}', PROCESSOR: b"{}", INDEX: index, **files}
