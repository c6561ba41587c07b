"""Random checkpoints of a small Gemma 3 around a SigLIP tower, as MedGemma is built."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

SIZE = 32
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": 8,
    "vision_use_head": False,
}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars for writing out of the report."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def make_gemma(directory: Path, **changes: object) -> Any:
    """Save a random MedGemma-like checkpoint by transformers' own means; return the model."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    torch.manual_seed(0)
    config = Gemma3Config(
        vision_config={**VISION, **changes}, text_config=TEXT, mm_tokens_per_image=4
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    for parameter in model.parameters():  # biases and norms start as constants: move them
        parameter.data += 0.05 * torch.randn_like(parameter)
    processor = Gemma3ImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    with quiet():
        model.save_pretrained(directory)
        processor.save_pretrained(directory)
    return model
