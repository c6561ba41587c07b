"""How often a heat map's peak falls on the finding, on synthetic images whose finding is known.

    .venv/bin/python bench/explaining.py --out bench/results/explaining.json

Heads are trained on the demo's embeddings of one cohort; maps are computed for the abnormal images
with a visible finding of another. In a hit, the cell with the map's highest value touches the
finding. Chance is the share of cells that touch it among those that touch bone or finding, image by
image; `of_frame` is the easier comparison, among all cells. Ratios are hits over chance, with 95 %
intervals from 1,000 bootstrap resamples of images. The images are drawn by formula: the results
do not carry over to other images.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from measuring import write_results
from medembed.demo.cohort import draw_cohort, render_view
from medembed.encoders.loading import load_encoder
from medembed.encoders.preprocessing import prepare
from medembed.encoders.torch_encoder import TorchEncoder
from medembed.heads.registry import make_head
from medembed.prediction.attribution import Explainer
from tools.bone_masks import locate_bones, pool_mask

HEADS = (
    ("logistic", "mean+max"),
    ("mlp", "mean+max"),
    ("lightgbm", "mean+max"),
    ("attention", "mean+max"),
    ("logistic", "mean"),
    ("lightgbm", "mean"),
)
N_RESAMPLES = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patients", type=int, default=170, help="of each of the two cohorts")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    encoder = load_encoder("demo", device="cpu", precision="fp32")
    assert isinstance(encoder, TorchEncoder)
    train, test = (draw(encoder, given.patients, seed) for seed in (0, 1))
    shown = test["finding"].any(axis=(1, 2))
    found = {}
    for name, pooling in HEADS:
        head = make_head(name, {})
        head.fit(embed(encoder, train["pixels"], pooling), train["label"])
        heat = Explainer(encoder, head, pooling).heat_maps(test["pixels"][shown])
        found[f"{name} {pooling}"] = judge(heat, test["finding"][shown], test["bones"][shown])
        print(name, pooling, found[f"{name} {pooling}"], flush=True)
    results = {
        "ratios": {name: own["times_chance"] for name, own in found.items()},
        "heads": found,
        "images": {"train": len(train["label"]), "explained": int(shown.sum())},
        "synthetic": True,
    }
    if given.out:
        write_results(given.out, results)
    else:
        print(json.dumps(results, indent=2))


def draw(encoder: TorchEncoder, n_patients: int, seed: int) -> dict[str, np.ndarray]:
    """Return a cohort: the encoder's input pixels, labels, cells of findings and of bones."""
    grid = (16, 16)
    rows: dict[str, list[Any]] = {"pixels": [], "label": [], "finding": [], "bones": []}
    for view in draw_cohort(n_patients, seed=seed):
        rendered = render_view(view)
        rows["pixels"].append(prepare(rendered.pixels, encoder.preprocessing))
        rows["label"].append(view.label)
        rows["finding"].append(pool_mask(rendered.mask, grid))
        rows["bones"].append(pool_mask(locate_bones(view), grid))
    return {name: np.stack(values) for name, values in rows.items()}


def embed(encoder: TorchEncoder, pixels: np.ndarray, pooling: str) -> np.ndarray:
    """Return embeddings of images, poolings joined."""
    names = pooling.split("+")
    parts = [encoder.encode(pixels[i : i + 8], names) for i in range(0, len(pixels), 8)]
    return np.hstack([np.concatenate([part[name] for part in parts]) for name in names])


def judge(heat: np.ndarray, finding: np.ndarray, bones: np.ndarray) -> dict[str, Any]:
    """Return hits compared with chance."""
    peaks = heat.reshape(len(heat), -1).argmax(axis=1)
    hit = finding.reshape(len(heat), -1)[np.arange(len(heat)), peaks]
    chance = finding.sum(axis=(1, 2)) / (bones | finding).sum(axis=(1, 2))
    drawn = np.random.default_rng(0).integers(0, len(hit), (N_RESAMPLES, len(hit)))
    ratios = hit[drawn].mean(axis=1) / chance[drawn].mean(axis=1)
    return {
        "hit": round(float(hit.mean()), 4),
        "chance": round(float(chance.mean()), 4),
        "times_chance": round(float(hit.mean() / chance.mean()), 3),
        "interval": [round(float(end), 3) for end in np.percentile(ratios, [2.5, 97.5])],
        "of_frame": round(float(hit.mean() / finding.mean()), 3),
    }


if __name__ == "__main__":
    main()
