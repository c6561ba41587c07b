"""Measure the optimism of a sweep: cross-validated AUROC of its winners on pure noise.

    nice -n 15 .venv/bin/python bench/noise_cv.py --out bench/results/noise_cv.json
    .venv/bin/python bench/noise_cv.py --sets 2                    # does it all work?
    .venv/bin/python bench/noise_cv.py --heads mlp --keep noise.jsonl   # goes on where it stopped

Everything is synthetic: 100 training patients with 1 or 2 studies of 1 or 2 views each, 32 columns
in which the views of a study and the studies of a patient resemble each other, and labels that are
independent of them. Each set is swept with the default space in 5 folds. A head's `cv` should be
0.5; any excess is optimism.

- `mean`, `standard_error`: the winner's `cv` over the sets.
- `pooled`: the AUROC of its out-of-fold scores, all folds together.
- `chosen_by`: the score by which the winner was chosen, which is optimistic and not a result.
- `n_tried`: configurations that the winner was chosen from.
- `ratios`: the difference of `mean` from 0.5.
"""

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from measuring import write_results
from medembed.cache.spec import CacheSpec, keys_from_hex
from medembed.cache.store import create_cache
from medembed.dataset.manifest import Manifest, make_manifest
from medembed.evaluation.scores import by_study
from medembed.results.runs import open_run
from medembed.sweeps import sweep

HEADS = ("logistic", "mlp", "lightgbm", "attention")
N_PATIENTS, N_TEST, WIDTH = 100, 12, 32


def draw_set(seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Return the rows of a manifest, and their embeddings (n, `WIDTH`)."""
    generator = np.random.default_rng([20, seed])
    rows, X = [], []
    for patient in range(N_PATIENTS + N_TEST):
        of_patient = generator.normal(size=WIDTH)
        for study in range(generator.integers(1, 3)):
            of_study = of_patient + generator.normal(size=WIDTH)
            label = str(patient % 2 if patient >= N_PATIENTS else generator.integers(2))
            for view in range(generator.integers(1, 3)):
                image = f"p{patient:03d}/s{study}/{view}.png"
                sha256 = hashlib.sha256(image.encode()).hexdigest()
                split = "test" if patient >= N_PATIENTS else "train"
                rows.append((image, sha256, f"p{patient:03d}", f"p{patient:03d}/s{study}"))
                rows[-1] += (("hand", "wrist")[patient // 2 % 2], label, split)
                X.append(of_study + generator.normal(size=WIDTH))
    columns = ["image", "sha256", "patient", "study", "region", "label", "split"]
    return pd.DataFrame(rows, columns=columns), np.stack(X).astype(np.float32)


def sweep_noise(seed: int, heads: list[str]) -> dict[str, dict[str, float]]:
    """Return each head's winning scores in a sweep of one set."""
    table, X = draw_set(seed)
    with tempfile.TemporaryDirectory() as home:
        spec = CacheSpec("ab" * 32, {"size": [8, 8]}, {"mean": (WIDTH,)}, "float32")
        cache = create_cache(Path(home) / "cache", spec, {"source": "noise"})
        cache.commit(keys_from_hex(table["sha256"].tolist()), {"mean": X})
        manifest: Manifest = make_manifest(table, "study")
        out = Path(home) / "run"
        board = sweep(cache, manifest, out, heads=heads, seed=seed, jobs=1).as_dict()["leaderboard"]
        predictions = open_run(out).predictions()
    train = predictions[(predictions["split"] == "train") & predictions["fold"].notna()]
    found = {}
    for entry in board:
        studies = by_study(train[train["head"] == entry["head"]])
        pooled = float(roc_auc_score(studies["label"].astype(int), studies["probability"]))
        found[entry["head"]] = {
            "cv": float(entry["cv"]),
            "pooled": pooled,
            "chosen_by": float(entry["chosen_by"]),
            "n_tried": entry["n_tried"],
        }
    return found


def summarise(found: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Return means and standard errors over sets, by head."""
    result: dict[str, Any] = {}
    for head in found[0]:
        cv, pooled, chosen_by = (
            np.array([own[head][name] for own in found]) for name in ("cv", "pooled", "chosen_by")
        )
        error = float(cv.std(ddof=1) / np.sqrt(len(cv))) if len(cv) > 1 else None
        result[head] = {
            "mean": round(float(cv.mean()), 4),
            "standard_error": None if error is None else round(error, 4),
            "pooled": round(float(pooled.mean()), 4),
            "chosen_by": round(float(chosen_by.mean()), 4),
            "n_tried": found[0][head]["n_tried"],
        }
    return result


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=60)
    parser.add_argument("--heads", default=",".join(HEADS))
    parser.add_argument("--keep", type=Path, help="Lines of JSON, one per set that is done.")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found, began = _read(options.keep), time.perf_counter()
    for seed in range(len(found), options.sets):
        found.append(sweep_noise(seed, options.heads.split(",")))
        if options.keep:
            with options.keep.open("a") as file:
                file.write(json.dumps(found[-1]) + "\n")
    heads = summarise(found[: options.sets])
    result = {
        "sets": options.sets,
        "patients": N_PATIENTS,
        "heads": heads,
        "seconds": round(time.perf_counter() - began, 1),
        "ratios": {head: round(own["mean"] - 0.5, 4) for head, own in heads.items()},
    }
    print(json.dumps(result, indent=2))
    if options.out:
        write_results(options.out, result)


def _read(path: Path | None) -> list[dict[str, dict[str, float]]]:
    """Return the results of earlier runs; another choice of heads needs another file."""
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
