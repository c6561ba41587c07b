"""The configurations and the model card of the demo's encoder."""

from collections.abc import Mapping
from typing import Any

from tools.demo_encoder.training_set import IMAGE_SIZE, N_PATCHES

__all__ = ["describe", "processor_config", "tower_config", "vision_config"]


def vision_config() -> dict[str, Any]:
    """Return the tower's architecture under the hub's names."""
    return {
        "attention_dropout": 0.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 128,
        "image_size": IMAGE_SIZE,
        "intermediate_size": 384,
        "layer_norm_eps": 1e-06,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 4,
        "num_channels": 3,
        "num_hidden_layers": 4,
        "patch_size": IMAGE_SIZE // N_PATCHES,
        "vision_use_head": False,
    }


def tower_config() -> dict[str, Any]:
    """Return `config.json` in the form of MedGemma 4B; its text model is a placeholder."""
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "mm_tokens_per_image": 16,
        "text_config": {
            "head_dim": 32,
            "hidden_size": 64,
            "intermediate_size": 128,
            "model_type": "gemma3_text",
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "num_key_value_heads": 1,
            "vocab_size": 64,
        },
        "torch_dtype": "float16",
        "vision_config": vision_config(),
    }


def processor_config() -> dict[str, Any]:
    """Return `preprocessor_config.json` with the keys of Gemma 3's own."""
    return {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_pan_and_scan": None,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Gemma3ImageProcessor",
        "image_seq_length": 16,
        "image_std": [0.5, 0.5, 0.5],
        "pan_and_scan_max_num_crops": None,
        "pan_and_scan_min_crop_size": None,
        "pan_and_scan_min_ratio_to_activate": None,
        "processor_class": "Gemma3Processor",
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    }


def describe(scores: Mapping[str, float], *, n_images: int, n_steps: int, n_trial: int = 0) -> str:
    """Return the model card; `scores` come from `measure`, or are empty."""
    measured = "Not measured: training had not ended when this was written."
    if scores:
        rows = "\n".join(
            f"| {_TITLES.get(name, name)} | {score:.3f} |" for name, score in scores.items()
        )
        measured = _MEASURED.format(half=n_trial // 2, rows=rows)
    return _CARD.format(n_images=n_images, n_steps=n_steps, measured=measured)


_TITLES = {
    "mean": "any finding, `mean`",
    "mean+max": "any finding, `mean` and `max`",
    "line": "fracture line, `mean` and `max`",
    "displaced": "displaced fragment, `mean` and `max`",
    "implant": "implant, `mean` and `max`",
    "lesion": "lesion, `mean` and `max`",
}

_MEASURED = """\
AUROC against normal images of a logistic regression on the frozen embeddings of synthetic images
that were not trained on ({half} to fit it, {half} to score it), findings from subtle to obvious:

| finding and pooling | AUROC |
|---|---|
{rows}"""

_CARD = """\
---
license: apache-2.0
---

# The demo's encoder

**This model knows nothing of medicine.** It was trained only on synthetic images, drawn by formula
by `medembed.demo.synthetic`. No radiograph of any person was used. It exists so that medembed can
be tried and tested within minutes, without a GPU or gated weights. Never use it on people.

It is a SigLIP vision tower of 0.7 M parameters (128 × 128 pixels, patches of 8, width 128, 4
layers, 4 heads) in the checkpoint layout of MedGemma 4B: `vision_tower.vision_model.…` in
`model.safetensors` (float16), the architecture in `config.json`, the preprocessing in
`preprocessor_config.json`. The text model that `config.json` names is a placeholder; there are no
weights for it.

## Training

{n_images} images, {n_steps} steps of 64. The tower was taught where the finding lies (its mask, by
patch), of which kind it is (from the maximum and the mean of the tokens) and which region is shown
(from the mean). The demo's images come from other seeds. To repeat it:

    python -m tools.demo_encoder --out DIR --images {n_images} --steps {n_steps}

## Measured

{measured}

## Licence

Apache-2.0
"""
