"""Random checkpoints that transformers itself has saved, small enough to be made by the dozen."""

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SIDE = 16
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "image_size": SIDE, "patch_size": 8}
TEXT = {**SIZES, "vocab_size": 16, "head_dim": 8, "num_key_value_heads": 1}
PROCESSOR = "preprocessor_config.json"
NESTING = "processor_config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


@contextlib.contextmanager
def quiet() -> Any:
    """Keep transformers' progress bars out of the report."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def make_model(kind: str, seed: int = 0) -> Any:
    """Make a SigLIP tower, a Gemma 3 around one, or a ViT, with no constant among its values."""
    import transformers as t

    torch.manual_seed(seed)
    if kind == "siglip":
        model = t.SiglipVisionModel(t.SiglipVisionConfig(**SIZES, vision_use_head=False))
    elif kind == "gemma":
        vision = {**SIZES, "vision_use_head": False}
        config = t.Gemma3Config(vision_config=vision, text_config=TEXT, mm_tokens_per_image=4)
        model = t.Gemma3ForConditionalGeneration(config)
    else:
        model = t.ViTModel(t.ViTConfig(**SIZES))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def save(directory: Path, kind: str = "siglip", seed: int = 0, **how: Any) -> Path:
    """Save one with its processor; `how` goes to `save_pretrained`."""
    from transformers import SiglipImageProcessorPil

    with quiet():
        make_model(kind, seed).save_pretrained(directory, **how)
        SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(directory)
    return directory


def rename(source: Path, target: Path, name: Any) -> Path:
    """Copy a checkpoint of one file; `name` gives a tensor's new name."""
    shutil.copytree(source, target)
    renamed = {name(key): value for key, value in load_file(source / WEIGHTS).items()}
    save_file(renamed, target / WEIGHTS, {"format": "pt"})
    return target
