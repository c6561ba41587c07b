"""Measure one prediction: the encoder alone, against a loaded Predictor, for one image.

    .venv/bin/python bench/prediction.py

Two encoders: the demo's, and a SigLIP-Base tower with random weights, on which speed does not
depend. The image is a PNG of 1024 x 832, a realistic size for a radiograph. A Predictor should take
less than 200 ms in addition to the encoder's own time. Results go to bench/results/prediction.json.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import SiglipVisionConfig, SiglipVisionModel

from measuring import alternate, write_results
from medembed.encoders.loading import load_encoder
from medembed.encoders.preprocessing import prepare
from medembed.evaluation.calibration import Calibration
from medembed.extraction import spec_of
from medembed.heads.linear import LogisticHead
from medembed.heads.packaging import save_model
from medembed.images.decode import decode_image
from medembed.prediction import Predictor

ALLOWED_MS = 200.0
PROCESSOR = """{"size": {"height": 224, "width": 224}, "resample": 2, "rescale_factor": 0.003921569,
"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
"image_processor_type": "SiglipImageProcessor"}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path("bench/results/prediction.json"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        image = home / "radiograph.png"
        draw(image)
        towers = {"demo": "demo", "siglip-base": make_tower(home / "siglip-base")}
        found = {
            tower: measure(reference, image, home / f"model-{tower}", asked.runs)
            for tower, reference in towers.items()
        }
    beyond = {f"{tower}_beyond_ms": each["beyond_ms"] for tower, each in found.items()}
    write_results(
        asked.out,
        {"ratios": {**beyond, "allowed_ms": ALLOWED_MS}, "runs": asked.runs, "towers": found},
    )


def draw(path: Path) -> None:
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:1024, :832]
    bone = 120 + 80 * np.cos(columns / 90) + 20 * np.sin(rows / 200)
    pixels = np.clip(bone + generator.normal(0, 6, bone.shape), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def make_tower(directory: Path) -> Path:
    config = SiglipVisionConfig(
        image_size=224,
        patch_size=16,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        vision_use_head=False,
    )
    SiglipVisionModel(config).save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(PROCESSOR)
    return directory


def make_model(directory: Path, reference: Any) -> Path:
    """Save a head trained on noise, since its time does not depend on its weights."""
    encoder: Any = load_encoder(reference, device="cpu", precision="fp32")
    poolings = ("mean", "max")
    width = sum(encoder.dimensions[name][0] for name in poolings)
    X = np.random.default_rng(0).normal(size=(64, width)).astype(np.float32)
    head = LogisticHead().fit(X, np.arange(64) % 2)
    spec = spec_of(encoder, poolings).as_dict()
    card = {
        "spec": spec,
        "pooling": "mean+max",
        "label_level": "study",
        "views": "mean",
        "calibration": Calibration().as_dict(),
        "threshold": 0.5,
        "training_images": [],
        "encoder": {"source": encoder.source, "revision": None, "path": None},
    }
    save_model(directory, head, card)
    return directory


def measure(reference: Any, image: Path, model: Path, n_runs: int) -> dict[str, Any]:
    """Return the median times of both and their difference, in milliseconds."""
    make_model(model, reference)
    predictor = Predictor(model, encoder=reference, device="cpu", precision="fp32").load()
    encoder = predictor.embedders[0].encoder
    pixels = prepare(decode_image(image.read_bytes()).pixels, encoder.preprocessing)[None]
    jobs = {
        "encoder": timed(lambda: encoder.encode(pixels, ("mean", "max"))),
        "predictor": timed(lambda: predictor.predict(image)),
    }
    seconds = alternate(jobs, n_runs)
    medians = {name: 1000 * statistics.median(each) for name, each in seconds.items()}
    return {
        **{f"{name}_ms": round(value, 2) for name, value in medians.items()},
        "beyond_ms": round(medians["predictor"] - medians["encoder"], 2),
        "seconds": seconds,
    }


def timed(job: Callable[[], Any]) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        job()
        return time.perf_counter() - start

    return run


if __name__ == "__main__":
    main()
