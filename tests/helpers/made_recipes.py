"""Small data sets in the layouts that recipes read: tables, folders, MURA."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medembed.dataset.recipes.build import BuildReport, Recipe, build_manifest, load_recipe

HEAD = """
name = "mine"
licence = "none"
citation = "none"
url = "https://example.org"
"""
TABLE = (
    HEAD
    + """
layout = "table"
label_level = "image"
[table]
file = "labels.csv"
image = "file"
patient = "person"
study = ["person", "exam"]
covariates = ["age"]
[region]
column = "part"
[label]
column = "finding"
normal = ["none"]
abnormal = ["fracture", "lesion"]
[split]
column = "set"
"""
)
FOLDERS = (
    HEAD
    + """
layout = "folders"
label_level = "study"
[folders]
pattern = "{split}/{region}/{patient}/{study}_{label}/{view}.png"
[label]
normal = ["ok"]
abnormal = ["bad"]
"""
)
LABELS = """file,person,exam,part,finding,set,age
a.png,p1,1,hand,none,train,31
b,p1,1,hand,fracture,train,31
deep/c.png,p2,1,wrist,,test,40
"""
STUDIES = {
    "train/XR_ELBOW/patient00001/study1_negative": [1, 2],
    "train/XR_HAND/patient00001/study1_positive": [3],
    "train/XR_HAND/patient00001/study2_negative": [4, 5, 6],
    "valid/XR_WRIST/patient11185/study1_positive": [7],
}


def image(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((2, 3), value, np.uint8)).save(path)


def recipe_of(folder: Path, text: str) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path)


def build(folder: Path, root: Path, text: str = TABLE, **options: Any) -> BuildReport:
    return build_manifest(recipe_of(folder, text), root, **options)


def folder_tree(root: Path) -> Path:
    names = ["train/hand/p1/s1_ok/1", "train/hand/p1/s1_ok/2", "test/wrist/p2/s1_bad/1"]
    for i, name in enumerate(names):
        image(root / f"{name}.png", i)
    return root


def write_mura(base: Path, studies: dict[str, list[int]]) -> None:
    """Lay out MURA: each study's folder below `base` with the grey values of its views."""
    for split in ("train", "valid"):
        with (base / f"{split}_image_paths.csv").open("w", newline="") as paths_file:
            paths = csv.writer(paths_file, lineterminator="\n")
            for study, views in studies.items():
                if study.startswith(split):
                    names = [f"{study}/image{i + 1}.png" for i in range(len(views))]
                    paths.writerows([f"MURA-v1.1/{name}"] for name in names)
                    for name, value in zip(names, views, strict=True):
                        image(base / name, value)
        lines = [
            f"MURA-v1.1/{study}/,{int(study.endswith('positive'))}\n"
            for study in studies
            if study.startswith(split)
        ]
        (base / f"{split}_labeled_studies.csv").write_text("".join(lines))
