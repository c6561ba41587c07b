"""Random checkpoints of two towers with tokenizers, and prompts whose direction is known."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from made_towers import SIDE, quiet

from medembed.core.prompts import PromptEntry, Prompts, PromptsDocument

SENTENCES = [
    "a radiograph of a normal hand",
    "a radiograph of a wrist with a fracture",
    "no acute finding in this elbow",
    "a displaced fracture of the shoulder",
]
WIDTH, LENGTH = 16, 24
SIZES = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2}


def make_siglip(directory: Path, seed: int = 0, *, masked: bool = False) -> Any:
    """Save a random SigLIP of two towers, and a tokenizer that was trained on `SENTENCES`.

    `masked` says whether the tokenizer's settings make it return an attention mask.
    """
    import sentencepiece
    import transformers as t

    model_file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 5),
        model_writer=model_file,
        vocab_size=48,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "spiece.model").write_bytes(model_file.getvalue())
    names = ["input_ids", "attention_mask"] if masked else ["input_ids"]
    tokenizer = t.SiglipTokenizer(
        str(directory / "spiece.model"), model_max_length=LENGTH, model_input_names=names
    )
    text = {**SIZES, "vocab_size": 64, "max_position_embeddings": LENGTH, "projection_size": WIDTH}
    vision = {**SIZES, "image_size": SIDE, "patch_size": 8}
    torch.manual_seed(seed)
    model = t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=vision))
    return _save(directory, model, tokenizer, t.SiglipImageProcessorPil(size=_size()))


def make_clip(directory: Path, seed: int = 0) -> Any:
    """Save a random CLIP, whose tokenizer knows letters alone."""
    import transformers as t

    letters = [chr(c) for c in range(97, 123)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    directory.mkdir(parents=True, exist_ok=True)
    vocab, merges = directory / "vocab.json", directory / "merges.txt"
    vocab.write_text(json.dumps({word: i for i, word in enumerate(words)}))
    merges.write_text("#version: 0.2\n")
    tokenizer = t.CLIPTokenizer(str(vocab), str(merges), model_max_length=3 * LENGTH)
    ids = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    text = {**SIZES, "vocab_size": 54, "max_position_embeddings": 3 * LENGTH, **ids}
    vision = {**SIZES, "image_size": SIDE, "patch_size": 8}
    torch.manual_seed(seed)
    model = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    processor = t.CLIPImageProcessorPil(size=_size(), do_center_crop=False)
    return _save(directory, model, tokenizer, processor)


def _size() -> dict[str, int]:
    return {"height": SIDE, "width": SIDE}


def _save(directory: Path, model: Any, tokenizer: Any, processor: Any) -> Any:
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    with quiet():
        model.eval().save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        processor.save_pretrained(directory)
    return model


def make_prompts(
    direction: np.ndarray, *, encoder: str = "ab" * 32, scale: float = 10.0, noise: float = 0.0
) -> Prompts:
    """Prompts of which the first set points along a direction; the second, `astray`, elsewhere."""
    generator = np.random.default_rng(0)
    entries, rows = [], []
    for name, axis in (("right", direction), ("astray", generator.normal(size=len(direction)))):
        unit = axis / np.linalg.norm(axis)
        for label, sign in (("normal", -1), ("abnormal", 1)):
            for k in range(2):
                entries.append(PromptEntry(set=name, label=label, region=None, text=f"{label} {k}"))
                rows.append(sign * unit + noise * generator.normal(size=len(direction)))
    document = PromptsDocument(
        encoder=encoder,
        text_encoder="cd" * 32,
        source="made",
        revision=None,
        logit_scale=scale,
        logit_bias=-1.0,
        prompts=entries,
    )
    return Prompts(document, np.array(rows, np.float32))
