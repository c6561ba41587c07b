"""Random checkpoints of the backbones that transformers has, one of each kind."""

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
import transformers

SIZE = 64
TOKENS = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": SIZE,
    "patch_size": 14,  # leaves 8 pixels over
}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 2]}
SWIN = {
    "image_size": 70,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 1, 1],
    "num_heads": [2, 2, 2],
    "window_size": 4,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "ConvNext": {**STAGES, "num_stages": 2},
    "ConvNextV2": {**STAGES, "num_stages": 2},
    "DeiT": TOKENS,
    "DINOv3ViT": {**TOKENS, "num_register_tokens": 3, "patch_size": 16},
    "Dinov2": {**TOKENS, "mlp_ratio": 2},
    "Dinov2WithRegisters": {**TOKENS, "mlp_ratio": 2, "num_register_tokens": 4},
    "ResNet": {**STAGES, "embedding_size": 8, "layer_type": "basic"},
    "Swin": SWIN,
    "Swinv2": SWIN,
    "ViT": {**TOKENS, "image_size": 2 * SIZE},
}


def save(directory: Path, family: str, suffix: str = "Model", **changes: object) -> Any:
    """Save a random checkpoint by transformers' own means; return the model."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**CONFIGS[family], **changes})
    model = getattr(transformers, f"{family}{suffix}")(config).eval()
    for name, tensor in model.state_dict().items():  # biases and norms start as constants
        if tensor.is_floating_point():
            noise = 0.05 * torch.randn_like(tensor)
            tensor.add_(noise.abs() if name.endswith("running_var") else noise)
    processor = transformers.ViTImageProcessorPil(
        size={"height": input_size(family), "width": input_size(family)}
    )
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(directory)
        processor.save_pretrained(directory)
    return model


def input_size(family: str) -> int:
    return int(CONFIGS[family].get("image_size", SIZE))
