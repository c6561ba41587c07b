"""Trees of DICOM files and the manifests that are built from them."""

from pathlib import Path
from typing import Any

import numpy as np
from made_dicom import dataset, write
from pydicom.dataset import Dataset

from medembed.dataset.recipes.build import BuildReport, build_manifest, load_recipe

RECIPE = """
name = "mine"
licence = "none"
citation = "none"
url = "https://example.org"
layout = "dicom"
label_level = "study"
[dicom]
{dicom}
{label}
[split]
fraction = 0.3
"""
LABEL = """
[label]
column = "finding"
normal = ["none"]
abnormal = ["fracture"]
"""


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(1800, 400, (32, 24)).clip(0, 4095).astype(np.uint16)


def put(path: Path, seed: int, **elements: Any) -> Dataset:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = dataset(picture(seed), BitsStored=12, **elements)
    made.SOPInstanceUID = f"1.2.826.{seed}"
    path.write_bytes(write(made))
    return made


def build(
    folder: Path, root: Path, dicom: str = "", label: str = "", **options: Any
) -> BuildReport:
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(dicom=dicom, label=label), encoding="utf-8")
    return build_manifest(load_recipe(path), root, **options)
