"""A small encoder that can be computed by hand, and images and extractions for it."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from medembed.core.errors import EncoderError
from medembed.dataset.manifest import Manifest
from medembed.encoders.preprocessing import Preprocessing
from medembed.encoders.protocol import Encoder
from medembed.extraction import ExtractionReport, extract

THIRD = (1 / 3, 1 / 3, 1 / 3)


@dataclass
class HalvesEncoder:
    """Pool an image's left and right half: small enough to compute by hand."""

    source: str = "halves"
    revision: str | None = None
    fingerprint: str = "ab" * 32
    preprocessing: Preprocessing = field(
        default_factory=lambda: Preprocessing(8, 8, "stretch", "bilinear", THIRD, THIRD, 1 / 255)
    )
    dimensions: Mapping[str, tuple[int, ...]] = field(
        default_factory=lambda: {"mean": (2,), "max": (2,)}
    )
    device: str = "cpu"
    precision: str = "fp32"
    seconds: float = 0.0  # per batch
    scale: float = 1.0
    dislikes: int | None = None  # an image that begins with this pixel is refused
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def encode(self, pixels: np.ndarray, poolings: Sequence[str]) -> dict[str, np.ndarray]:
        time.sleep(self.seconds)
        self.shapes.append(pixels.shape)
        if self.dislikes is not None and (pixels[:, 0, 0] == self.dislikes).any():
            raise EncoderError(f"an image begins with {self.dislikes}")
        halves = np.stack([pixels[:, :, :4], pixels[:, :, 4:]], axis=1).astype(np.float32)
        pooled = {"mean": halves.mean((2, 3)), "max": halves.max((2, 3))}
        return {name: self.scale * pooled[name] for name in poolings}


def write_images(root: Path, n: int, seed: int = 0) -> Manifest:
    """Write `n` grey images of 8 × 8, whose first pixels are 1, 2, 3…, and list them."""
    generator = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    for number in range(n):
        pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
        pixels[0, 0] = number + 1
        Image.fromarray(pixels).save(root / f"{number:03d}.png")
    return list_images(root)


def with_both_classes(manifest: Manifest) -> Manifest:
    """Call every other image abnormal, and half of them test images."""
    rows = manifest.rows.copy()
    rows["label"] = pd.array([i % 2 for i in range(len(rows))], dtype="Int8")
    rows["split"] = ["test" if i % 4 > 1 else "train" for i in range(len(rows))]
    return Manifest(rows, manifest.label_level)


def list_images(root: Path) -> Manifest:
    paths = sorted(root.glob("*.png"))
    rows = pd.DataFrame(
        {
            "image": [path.name for path in paths],
            "sha256": [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths],
            "patient": [path.stem for path in paths],
            "study": [path.stem for path in paths],
            "region": "hand",
            "label": pd.array([0] * len(paths), dtype="Int8"),
            "split": "train",
        }
    )
    return Manifest(rows, "study")


def extract_here(
    tmp_path: Path, manifest: Manifest, encoder: Encoder | None = None, **options: Any
) -> ExtractionReport:
    """Extract from `images` to `cache` below `tmp_path`, in float32 and batches of 4."""
    options = {"dtype": "float32", "batch_size": 4, "decoders": 2} | options
    encoder = encoder or HalvesEncoder()
    return extract(manifest, tmp_path / "images", encoder, tmp_path / "cache", **options)


def counts(report: ExtractionReport) -> tuple[int, ...]:
    names = ("requested", "already", "embedded", "failed", "duplicates")
    values = tuple(report.as_dict()[name] for name in names)
    assert values[0] == sum(values[1:])
    return values


def extract_slowly(home: str) -> None:
    """Be the process that is killed: a batch of 4 takes 20 ms, and is often committed."""
    manifest = list_images(Path(home) / "images")
    extract_here(Path(home), manifest, HalvesEncoder(seconds=0.02), commit_seconds=0.01)
