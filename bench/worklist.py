"""Measure how many labels a worklist saves against random choice.

    .venv/bin/python bench/worklist.py --out bench/results/worklist.json     # an hour of a core
    .venv/bin/python bench/worklist.py --seeds 2 --tables made               # does it all work?

Two tables: `nih`, features of 736 real chest films (`../shared/data/nih`), and `made`, synthetic
embeddings with FracAtlas' share of abnormal studies (717 of 4,083). In each repetition a third of
the patients is for testing and the others are unlabelled. Both strategies label START studies, then
STEP more in each round, and train a logistic head on all labels so far:

- `random`: every study is drawn at random;
- `worklist`: `medembed worklist` without a run at first, then with the run so far, and its default
  random share.

Where the labels so far are too few to train on, the AUROC counts as 0.5.

Reported per round: the mean test AUROC of both, the difference with a 95 % t interval over seeds;
and the number of labels with which the worklist's mean curve reaches what random choice has at
its end, with a 95 % percentile interval over resampled seeds.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

import medembed as me
from made_table import make_table
from measuring import write_results
from medembed.cache.spec import CacheSpec, keys_from_hex
from medembed.cache.store import create_cache
from medembed.core.errors import TrainingDataError
from medembed.dataset.manifest import Manifest

NIH = Path(__file__).parents[2] / "shared" / "data" / "nih"
PREVALENCE = 717 / 4083
N_MADE, N_SEEDS = 2400, 20
START, STEP, N_ROUNDS = 40, 40, 5


def read_nih(_: Path) -> tuple[Path, pd.DataFrame]:
    return NIH / "cache", me.read_manifest(NIH / "manifest.csv").rows


def make_fracatlas_like(home: Path) -> tuple[Path, pd.DataFrame]:
    """Write a synthetic cache with a row per study and FracAtlas' share of abnormal ones.

    A study is abnormal if a random direction of ten principal components, with noise of .4 of its
    standard deviation, is among the highest values.
    """
    table = make_table(N_MADE, N_MADE * 6 // 10, 384)
    _, kept = np.unique(table.studies, return_index=True)
    X, generator = table.X[kept].astype(np.float16), np.random.default_rng(0)
    centred = X.astype(np.float64) - X.mean(0, dtype=np.float64)
    Z = np.linalg.svd(centred, full_matrices=False)[0][:, :10] @ generator.normal(size=10)
    signal = Z + 0.4 * Z.std() * generator.normal(size=len(Z))
    label = (signal >= np.quantile(signal, 1 - PREVALENCE)).astype(int)
    sha256 = [f"{row:064x}" for row in kept]
    spec = CacheSpec("ab" * 32, {"size": [8, 8]}, {"mean": (X.shape[1],)}, "float16")
    cache = create_cache(home / "cache", spec, {"source": "made"})
    cache.commit(keys_from_hex(sha256), {"mean": X})
    rows = pd.DataFrame({"image": [f"{row:06d}.png" for row in kept], "sha256": sha256})
    rows["patient"] = [f"p{own}" for own in table.patients[kept]]
    rows["study"] = [f"s{own}" for own in table.studies[kept]]
    rows["region"] = "bone"
    rows["label"] = pd.array(label, "Int8")
    return home / "cache", rows.assign(split="train", synthetic="1")


TABLES = {"nih": read_nih, "made": make_fracatlas_like}


def follow(cache: Path, rows: pd.DataFrame, seed: int, home: Path, strategy: str) -> list[float]:
    """Return the test AUROC after each round."""
    truth = rows["label"]
    generator = np.random.default_rng([seed, strategy == "random"])
    labelled = np.zeros(len(rows), bool)
    is_test = (rows["split"] == "test").to_numpy()
    run: me.Run | None = None
    scores = []
    for k in range(N_ROUNDS):
        known = truth.where(labelled | is_test)
        manifest = Manifest(rows.assign(label=known.astype("Int8")), "study")
        n = START if k == 0 else STEP
        if strategy == "random":
            free = rows["study"][~labelled & ~is_test].unique()
            chosen = generator.choice(free, n, replace=False)
        else:
            list_ = me.make_worklist(cache, manifest, n, model=run, seed=seed * N_ROUNDS + k)
            chosen = list_.rows["study"].unique()
        labelled |= rows["study"].isin(chosen).to_numpy()
        known = truth.where(labelled | is_test)
        manifest = Manifest(rows.assign(label=known.astype("Int8")), "study")
        try:
            run = me.sweep(
                cache, manifest, home / f"{strategy}-{k}", heads="logistic", n_folds=3, jobs=1
            )
        except TrainingDataError:  # too few patients of a class so far
            scores.append(0.5)
            continue
        [own] = [row for row in run.scores()["rows"] if row["head"] == "logistic"]
        scores.append(own["scores"]["auroc"]["value"])
    return scores


def labels_needed(curve: np.ndarray, target: float, n: np.ndarray) -> float:
    """Return where a curve first reaches the target, interpolated; the last n if it never does."""
    above = np.flatnonzero(curve >= target)
    if not len(above):
        return float(n[-1])
    k = above[0]
    if k == 0:
        return float(n[0])
    return float(np.interp(target, curve[k - 1 : k + 1], n[k - 1 : k + 1]))


def summarise(random: np.ndarray, worklist: np.ndarray) -> dict[str, Any]:
    """Return means, paired differences and labels needed; curves are (seeds, rounds)."""
    n = START + STEP * np.arange(N_ROUNDS)
    gain = worklist - random
    half = stats.t.ppf(0.975, len(gain) - 1) * gain.std(0, ddof=1) / np.sqrt(len(gain))
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, len(gain), (2000, len(gain)))
    needed = [labels_needed(worklist[own].mean(0), random[own].mean(0)[-1], n) for own in drawn]
    return {
        "labels": n.tolist(),
        "random": random.mean(0).round(4).tolist(),
        "worklist": worklist.mean(0).round(4).tolist(),
        "difference": gain.mean(0).round(4).tolist(),
        "low": (gain.mean(0) - half).round(4).tolist(),
        "high": (gain.mean(0) + half).round(4).tolist(),
        "labels_needed": round(labels_needed(worklist.mean(0), random.mean(0)[-1], n), 1),
        "labels_needed_interval": np.percentile(needed, [2.5, 97.5]).round(1).tolist(),
        "of": int(n[-1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("worklist.json"))
    parser.add_argument("--seeds", type=int, default=N_SEEDS)
    parser.add_argument("--tables", default=",".join(TABLES))
    given = parser.parse_args()
    results: dict[str, Any] = {"seeds": given.seeds, "tables": {}}
    for name in given.tables.split(","):
        with tempfile.TemporaryDirectory() as home:
            cache, rows = TABLES[name](Path(home))
            curves: dict[str, list[list[float]]] = {"random": [], "worklist": []}
            for seed in range(given.seeds):
                patients = rows["patient"].unique()
                generator = np.random.default_rng(seed)
                test = generator.choice(patients, len(patients) // 3, replace=False)
                split = np.where(rows["patient"].isin(test), "test", "train")
                for strategy, own in curves.items():
                    place = Path(home) / f"{seed}"
                    place.mkdir(exist_ok=True)
                    own.append(follow(cache, rows.assign(split=split), seed, place, strategy))
                print(name, seed, {key: own[-1] for key, own in curves.items()}, flush=True)
            results["tables"][name] = summarise(*(np.array(own) for own in curves.values()))
    results["ratios"] = {
        name: round(own["labels_needed"] / own["of"], 3) for name, own in results["tables"].items()
    }
    write_results(given.out, results)


if __name__ == "__main__":
    main()
