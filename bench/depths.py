"""Measure what unfreezing gains on images that the small encoder was not trained on.

    .venv/bin/python bench/depths.py --out bench/results/depths.json      # 25 minutes of a core
    .venv/bin/python bench/depths.py --seeds 9 --patients 60              # does it all work?

Everything is synthetic: cohorts of the demo's patients, different for each seed, half of them for
testing, whose radiographs are exposed as in `detectors.py`: at the bedside, without a grid, at a
higher voltage and a quarter of the dose. That detector, the recipe, the number of patients and the
seeds were fixed before any measurement, and all seeds are reported.

The recipe: the defaults of `medembed finetune`, without augmentation because of the trunk cache, as
in `make reproduce`; and a learning rate of the last block of 0.3 of the head's instead of 0.1. Both
were tried with the detectors `film` and `plate` and a cohort of seed 11, where held-out patients of
`train` had an AUROC of .885 and .855 at depth 2, and .875 and .850 with 0.1. A small encoder
tolerates larger steps than a large one, for which 0.1 stays the default.

Per seed and depth: AUROC by study on test, and its paired difference from the head alone with the
95 % interval of 2,000 resamples of patients, as in `medembed compare` and on the page; the loss of
the training images in the first and last epoch; how many of the encoder's tensors have changed,
and in which blocks. `usual` is the head alone on these patients' images with the demo's exposure,
which shows the cost of the other detector.
"""

import argparse
import contextlib
import hashlib
import io
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from detectors import DETECTORS, expose
from measuring import write_results
from medembed.dataset.manifest import make_manifest, write_manifest
from medembed.dataset.splits import split_patients
from medembed.demo.cohort import draw_cohort, render_view
from medembed.encoders.loading import load_encoder
from medembed.finetuning import Hyperparameters, finetune
from medembed.results.comparison import compare
from medembed.results.runs import open_run

DETECTOR = "bedside"
N_PATIENTS = 1000
SEEDS = (1, 2, 3, 4)  # 0 is the demo's own cohort
DEPTHS = (0, 1, 2)
RECIPE = Hyperparameters(augment=False, encoder_share=0.3)
HEAD_ALONE = "unfreeze-0"


def draw_images(home: Path, seed: int, n_patients: int, detector: str) -> None:
    """Write one cohort as `images/` by the detector and `usual/` by the demo, with manifests."""
    rows: dict[str, list[dict[str, object]]] = {"images": [], "usual": []}
    for number, view in enumerate(draw_cohort(n_patients, seed)):
        usual = render_view(view).pixels
        generator = np.random.default_rng([seed, number])
        shown = {"images": expose(usual, DETECTORS[detector], generator), "usual": usual}
        for folder, pixels in shown.items():
            name = f"{view.study}/view{view.projection + 1}.png"
            path = home / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, compress_level=1)
            facts = {"image": name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            facts |= {"patient": view.patient, "study": view.study, "region": view.region}
            rows[folder].append({**facts, "label": view.label, "split": "", "synthetic": "1"})
    for folder, own in rows.items():
        table = pd.DataFrame(own)
        table["split"] = split_patients(table, fraction=0.5, seed=seed)
        manifest = make_manifest(table.assign(label=table["label"].astype(str)), "study")
        write_manifest(manifest, home / f"{folder}.csv")


def tune(home: Path, folder: str, depths: tuple[int, ...]) -> Path:
    out = home / f"run-{folder}"
    with contextlib.redirect_stderr(io.StringIO()):
        finetune(
            *(home / f"{folder}.csv", home / folder, "demo", out),
            unfreeze=depths,
            trunk_cache=home / "trunk" if max(depths) else None,
            config=RECIPE,
            device="cpu",
        )
    return out


def measure(seed: int, n_patients: int, detector: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        draw_images(home, seed, n_patients, detector)
        start = time.perf_counter()
        out = tune(home, "images", DEPTHS)
        seconds = time.perf_counter() - start
        result = compare([out])
        usual = compare([tune(home, "usual", (0,))])
        return {
            "seed": seed,
            "test": result["test"],
            "seconds": round(seconds, 1),
            "usual": auroc_of(usual, HEAD_ALONE),
            "depths": [describe(out, result, record) for record in records_of(out)],
        }


def records_of(out: Path) -> list[dict[str, Any]]:
    return sorted(open_run(out).trial_records(), key=lambda record: record["depth"])


def auroc_of(result: dict[str, Any], head: str) -> dict[str, float]:
    (row,) = [row for row in result["rows"] if row["head"] == head]
    return {end: round(row["scores"]["auroc"][end], 4) for end in ("value", "low", "high")}


def describe(out: Path, result: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    history = record["history"]
    found = {
        "depth": record["depth"],
        "auroc": auroc_of(result, record["head"]),
        "held_out_auroc": round(record["score"], 4),
        "best_epoch": record["best_epoch"],
        "epochs": len(history),
        "train_loss": [round(history[k]["train_loss"], 4) for k in (0, -1)],
    }
    if not record["depth"]:
        return found
    found["versus_head_alone"] = versus_head_alone(result, record["head"])
    return {**found, "changed": changed_blocks(out / "encoders" / record["head"])}


def versus_head_alone(result: dict[str, Any], head: str) -> dict[str, float]:
    """Return the paired difference of a head's AUROC from that of the head alone."""
    wanted = {head, HEAD_ALONE}
    (pair,) = [
        pair
        for pair in result["paired"]
        if {pair["a"], pair["b"]} == wanted and pair["score"] == "auroc"
    ]
    sign = 1 if pair["a"] == head else -1
    low, high = sorted((sign * pair["low"], sign * pair["high"]))
    found = {"difference": sign * pair["difference"], "low": low, "high": high, "p": pair["p"]}
    return {name: round(value, 4) for name, value in found.items()}


def changed_blocks(adapted: Path) -> dict[str, Any]:
    """Return the number of changed tensors of the demo encoder, and their blocks."""
    before, after = (dict(model_of(ref).state_dict()) for ref in ("demo", adapted))
    assert set(before) == set(after)
    names = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    blocks = {".".join(name.split(".")[: 3 if "layers" in name else 1]) for name in names}
    return {"tensors": len(names), "of": len(before), "in": sorted(blocks)}


def model_of(reference: str | Path) -> torch.nn.Module:
    encoder: Any = load_encoder(reference, device="cpu", precision="fp32")
    model: torch.nn.Module = encoder.model
    return model


def summarise(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each depth's mean gain over the head alone, and how many seeds show it clearly."""
    found = {}
    for depth in DEPTHS[1:]:
        gains = [
            own["versus_head_alone"]
            for seed in seeds
            for own in seed["depths"]
            if own["depth"] == depth
        ]
        differences = [gain["difference"] for gain in gains]
        found[str(depth)] = {
            "mean": round(float(np.mean(differences)), 4),
            "least": min(differences),
            "most": max(differences),
            "above_zero": sum(gain["low"] > 0 for gain in gains),
            "of": len(gains),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--patients", type=int, default=N_PATIENTS)
    parser.add_argument("--detector", choices=sorted(DETECTORS), default=DETECTOR)
    given = parser.parse_args()
    torch.set_num_threads(1)  # several of these run side by side
    done = []
    for seed in given.seeds:
        done.append(measure(seed, given.patients, given.detector))
        print(f"seed {seed}: {done[-1]}", flush=True)
    gains = summarise(done)
    results = {
        "ratios": {f"gain_of_depth_{depth}": gain["mean"] for depth, gain in gains.items()},
        "synthetic": True,
        "detector": {"name": given.detector, **vars(DETECTORS[given.detector])},
        "patients": given.patients,
        "recipe": RECIPE.as_dict(),
        "gains": gains,
        "seeds": done,
    }
    if given.out:
        write_results(given.out, results)


if __name__ == "__main__":
    main()
