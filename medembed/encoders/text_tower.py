"""The text tower of SigLIP, MedSigLIP and CLIP, and its tokenizer, as the checkpoint has them."""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medembed.core.errors import EncoderError
from medembed.core.system import require_libraries
from medembed.core.text import one_line
from medembed.encoders.checkpoint_files import (
    check_config,
    find_config,
    is_open_clip_config,
    match_tensors,
    read_json,
    weight_files,
)
from medembed.encoders.fingerprint import Digest, open_tensors, read_tensor
from medembed.encoders.hub import resolve_checkpoint

__all__ = ["TextTower", "load_text_tower"]

_TYPES = ("siglip", "clip")
_BATCH = 32
# Config entries that change the result besides the weights; in the fingerprint.
_ARCHITECTURE = (
    *("eos_token_id", "hidden_act", "hidden_size", "intermediate_size", "layer_norm_eps"),
    *("max_position_embeddings", "num_attention_heads", "num_hidden_layers", "projection_size"),
    *("vocab_size",),
)


@dataclass(frozen=True, eq=False)
class TextTower:
    """A text tower on the CPU in fp32; made by `load_text_tower`.

    Attributes
    ----------
    source, revision : str, str or None
        See `hub.Checkpoint`.
    fingerprint : str
        SHA-256 over the tower's architecture and tensors.
    logit_scale, logit_bias : float
        A logit is scale * cos(image, text) + bias; CLIP has no bias, and it is 0.
    image_projection : float32 (k, d) or None
        Of CLIP: projects the image tower's pooled vector into the space of texts.
    """

    source: str
    revision: str | None
    fingerprint: str
    logit_scale: float
    logit_bias: float
    image_projection: np.ndarray | None
    max_tokens: int
    model: Any
    tokenizer: Any
    text_projection: torch.Tensor | None

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, with those that begin and end it."""
        return len(self.tokenizer(text)["input_ids"])

    def tokenize(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the tower's input, padded to the length that it was trained with.

        SigLIP reads a text off its last position, so that shorter padding gives another vector.
        Lower case and punctuation are the tokenizer's.
        """
        found = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        )
        return dict(found)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return the vectors of texts, float32 (n, k), before normalisation.

        Raises
        ------
        EncoderError
            A text is empty or has more tokens than the tower reads.
        """
        for text in texts:
            n = self.count_tokens(text)
            if not text.strip() or n > self.max_tokens:
                what = "is empty" if not text.strip() else f"has {n} tokens"
                raise EncoderError(
                    f"prompt {one_line(text, 60)!r} {what}, and the text tower of {self.source} "
                    f"reads 1 to {self.max_tokens}. Write another one."
                )
        parts = []
        for start in range(0, len(texts), _BATCH):
            with torch.inference_mode():
                seen = self.model(**self.tokenize(texts[start : start + _BATCH])).pooler_output
                if self.text_projection is not None:
                    seen = seen @ self.text_projection.T
            parts.append(seen.float().numpy())
        return np.concatenate(parts)


def load_text_tower(
    ref: str | PathLike[str], *, progress: Callable[[int, int], None] | None = None
) -> TextTower:
    """Return the text tower of a checkpoint of SigLIP, MedSigLIP or CLIP.

    Parameters
    ----------
    ref
        A hub id, of which only the towers and the tokenizer's files are fetched, or a directory.
    progress : callable, optional
        See `hub.resolve_checkpoint`.

    Raises
    ------
    EncoderError
        The checkpoint cannot be had, or has no text tower that belongs to its image tower; or a
        tensor is missing, of another shape or not finite; or the tokenizer's files are.
    MissingLibraryError
        A library of the extra `encoders` is not installed.
    """
    checkpoint = resolve_checkpoint(ref, words=True, progress=progress)
    require_libraries(f"prompts of {checkpoint.source}", ("transformers",), "encoders")
    config = read_json(find_config(checkpoint.path))
    kind = config.get("model_type") if isinstance(config, dict) else None
    if is_open_clip_config(config):
        raise EncoderError(
            f"{checkpoint.source} is a checkpoint of open_clip, whose text towers are not read. "
            "Give one of MedSigLIP, SigLIP or CLIP in the form of transformers."
        )
    if kind not in _TYPES:
        raise _explain_wordless(checkpoint.source, kind)
    check_config(config, checkpoint.source)
    model, names = _build(kind, config, checkpoint.source)
    tensors, fingerprint = _read(checkpoint.path, checkpoint.source, model, names)
    projection = tensors.get("text_projection.weight")
    visual = tensors.get("visual_projection.weight")
    if (kind == "clip") != (projection is not None and visual is not None):
        raise EncoderError(f"{checkpoint.source} has not the projections that {kind} has.")
    return TextTower(
        source=checkpoint.source,
        revision=checkpoint.revision,
        fingerprint=fingerprint,
        logit_scale=math.exp(float(tensors["logit_scale"].float().reshape(-1)[0])),
        logit_bias=float(tensors["logit_bias"].reshape(-1)[0]) if "logit_bias" in tensors else 0.0,
        image_projection=None if visual is None else visual.float().numpy(),
        max_tokens=int(model.config.max_position_embeddings),
        model=model,
        tokenizer=_load_tokenizer(checkpoint.path, checkpoint.source),
        text_projection=None if projection is None else projection.float(),
    )


def _explain_wordless(source: str, kind: Any) -> EncoderError:
    if kind == "gemma3":
        return EncoderError(
            f"{source} has no partner in words: MedGemma's image tower was taken from its text "
            "tower, and speaks to a language model instead. Use google/medsiglip-448."
        )
    return EncoderError(
        f"{source} is a checkpoint of type {kind!r}, which has no text tower beside its image "
        "tower. Give one of MedSigLIP, SigLIP or CLIP."
    )


def _build(kind: str, config: dict[str, Any], source: str) -> tuple[Any, dict[str, str]]:
    """Return the tower without weights, and its tensors' names by those of the checkpoint."""
    import transformers

    classes = {
        "siglip": (transformers.SiglipTextConfig, transformers.SiglipTextModel),
        "clip": (transformers.CLIPTextConfig, transformers.CLIPTextModel),
    }
    given = config.get("text_config") or {}
    try:
        known = classes[kind][0](**given)
        with torch.device("meta"):
            model = classes[kind][1](known).eval()
    except Exception as error:  # its validation raises its own errors, by transformers' version
        raise EncoderError(
            f"config.json of {source} describes no text tower: {one_line(error, 300)}"
        ) from error
    return model, {f"text_model.{n.removeprefix('text_model.')}": n for n in model.state_dict()}


def _read(
    directory: Path, source: str, model: Any, names: dict[str, str]
) -> tuple[dict[str, torch.Tensor], str]:
    """Fill the tower; return the tensors beside it, and the fingerprint of all."""
    digest, state, beside = Digest(), {}, {}
    digest.add({key: getattr(model.config, key, None) for key in _ARCHITECTURE})
    expected = model.state_dict()
    with ExitStack() as stack:
        files = {path: open_tensors(stack, path) for path in weight_files(directory, "text")}
        stored = [(path, name) for path, file in files.items() for name in file.keys()]  # noqa: SIM118
        found = match_tensors(stored, source, "text")
        missing = sorted({*names, "logit_scale"} - set(found))
        extra = sorted(name for name in set(found) - set(names) if name.startswith("text_model."))
        if missing or extra:
            what = f"lacks {missing[0]}" if missing else f"holds {extra[0]}, not in its config"
            raise EncoderError(f"{source}: the text tower {what}.")
        for name in sorted(found):
            path, full = found[name]
            dtype, tensor = read_tensor(files[path], full, source)
            digest.add_tensor(name, dtype, tensor)
            if name not in names:
                beside[name] = tensor
                continue
            if tensor.shape != expected[names[name]].shape:
                raise EncoderError(
                    f"{source}: {full} has shape {tuple(tensor.shape)}, its config asks for "
                    f"{tuple(expected[names[name]].shape)}."
                )
            state[names[name]] = tensor.float()
    model.load_state_dict(state, strict=True, assign=True)
    for module in model.modules():  # a constant that no checkpoint holds
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, torch.Tensor):
            module.position_ids = torch.arange(ids.shape[-1]).expand(1, -1)
    model.requires_grad_(False)
    return beside, digest.hexdigest()


def _load_tokenizer(directory: Path, source: str) -> Any:
    from transformers import AutoTokenizer

    settings = directory / "tokenizer_config.json"
    if settings.exists() and "auto_map" in json.dumps(read_json(settings)):
        raise EncoderError(f"{source} brings code for its tokenizer, which medembed never runs.")
    try:
        return AutoTokenizer.from_pretrained(  # nosec B615 # local files
            directory, trust_remote_code=False, local_files_only=True
        )
    except ImportError as error:
        raise EncoderError(
            f"the tokenizer of {source} needs a library: {one_line(error, 200)} It comes with "
            "medembed[encoders]."
        ) from error
    except Exception as error:  # of many kinds, by transformers' version
        raise EncoderError(
            f"the tokenizer of {source} cannot be read: {one_line(error, 300)}"
        ) from error
