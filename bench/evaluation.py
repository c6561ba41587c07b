"""Time a report's scores and intervals against a resampling loop over scikit-learn's scores.

    .venv/bin/python bench/evaluation.py --out bench/results/statistics.json
    .venv/bin/python bench/evaluation.py --loop 5        # does it all work?

Everything is synthetic, at the size of MURA's validation set: 1,199 studies of 783 patients in
seven regions. A patient's studies share part of the patient's noise, and their label. The coverage
of intervals and the error rates of tests are measured by `coverage.py`.

- `report`: seconds of `bootstrap_report` with 2,000 resamples behind ECE's bounds: every score with
  its interval, and the decision scores also at 0.5, overall, per region, per number of views, and
  as the mean over regions. `cpu_seconds` are those of all threads, which other work on the machine
  affects less.
- `loop`: seconds for these blocks, resample by resample, with scikit-learn's functions (ECE, which
  it lacks, in numpy), as in a handwritten loop. Only `--loop` resamples are timed;
  `extrapolated_seconds` is for 2,000. The scores themselves are compared and are equal.
"""

import argparse
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn import metrics

from measuring import alternate, write_results
from medembed.evaluation.bootstrap import _keep_counts
from medembed.evaluation.intervals import bootstrap_report
from medembed.evaluation.scores import N_ECE_BINS

REGIONS = {
    "elbow": 158,
    "finger": 175,
    "forearm": 133,
    "hand": 167,
    "humerus": 135,
    "shoulder": 194,
    "wrist": 237,
}
N_STUDIES, N_PATIENTS = 1199, 783
N_RESAMPLES = 2000
N_TIMED = 5
THRESHOLD = 0.4


def draw_studies(
    n: int, n_patients: int, seed: int, n_heads: int = 1
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Return random labels, probabilities of heads with equal AUROC, and patients."""
    generator = np.random.default_rng(seed)
    more = generator.integers(0, n_patients, n - n_patients)
    patients = np.concatenate([np.arange(n_patients), more])
    tendency = generator.beta(2, 2.4, n_patients)[patients]
    y = (generator.uniform(size=n) < tendency).astype(np.int8)
    seen_by_all = 1.6 * y - 0.8 + 0.9 * generator.normal(size=n)
    probabilities = []
    for _ in range(n_heads):
        of_patient = 0.6 * generator.normal(size=n_patients)[patients]
        logit = seen_by_all + of_patient + 0.4 * generator.normal(size=n)
        probabilities.append(1 / (1 + np.exp(-logit)))
    return y, probabilities, patients


def make_table() -> pd.DataFrame:
    """Return a table in the format of `bootstrap_report`."""
    y, (probability,), patients = draw_studies(N_STUDIES, N_PATIENTS, seed=0)
    generator = np.random.default_rng(1)
    regions = np.repeat(list(REGIONS), list(REGIONS.values()))
    return pd.DataFrame(
        {
            "patient": patients,
            "region": generator.permutation(regions),
            "label": pd.array(y, dtype="Int8"),
            "probability": probability,
            "n_views": generator.choice([1, 2, 3, 4, 5], N_STUDIES, p=[0.1, 0.25, 0.5, 0.1, 0.05]),
        }
    )


def blocks_of(rows: pd.DataFrame) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Yield the path of each block in a report, and which rows are in it."""
    yield ("overall",), np.ones(len(rows), dtype=bool)
    for region in REGIONS:
        yield ("region", region), (rows["region"] == region).to_numpy()
    for name in ("1", "2", "3+"):
        views = rows["n_views"].clip(upper=3).to_numpy()
        yield ("n_views", name), views == int(name[0])


def loop_over_resamples(rows: pd.DataFrame, n: int) -> dict[tuple[str, ...], pd.DataFrame]:
    """Return scikit-learn's scores of `n` resamples: a frame per block, a row per resample."""
    y, probability = rows["label"].to_numpy(int), rows["probability"].to_numpy()
    by_patient = list(rows.groupby("patient", sort=True).indices.values())
    drawn = np.random.default_rng(0).integers(0, len(by_patient), size=(n, len(by_patient)))
    blocks = dict(blocks_of(rows))
    found: dict[tuple[str, ...], list[dict[str, float]]] = {path: [] for path in blocks}
    for patients in drawn:
        chosen = np.concatenate([by_patient[patient] for patient in patients])
        for path, inside in blocks.items():
            own = chosen[inside[chosen]]
            scores = score_by_scikit_learn(y[own], probability[own])
            at_half = decisions_by_scikit_learn(y[own], probability[own] >= 0.5)
            found[path].append(scores | {f"{k} at half": v for k, v in at_half.items()})
    return {path: pd.DataFrame(values) for path, values in found.items()}


def score_by_scikit_learn(y: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    bins = np.minimum((probability * N_ECE_BINS).astype(int), N_ECE_BINS - 1)
    errors = np.bincount(bins, weights=probability - y, minlength=N_ECE_BINS)
    return {
        "auroc": metrics.roc_auc_score(y, probability),
        "average_precision": metrics.average_precision_score(y, probability),
        "brier": metrics.brier_score_loss(y, probability),
        "ece": float(np.abs(errors).sum() / len(y)),
        **decisions_by_scikit_learn(y, probability >= THRESHOLD),
    }


def decisions_by_scikit_learn(y: np.ndarray, called: np.ndarray) -> dict[str, float]:
    decisions = called.astype(int)
    return {
        "accuracy": metrics.accuracy_score(y, decisions),
        "macro_f1": metrics.f1_score(y, decisions, average="macro"),
        "kappa": metrics.cohen_kappa_score(y, decisions),
        "sensitivity": metrics.recall_score(y, decisions),
        "specificity": metrics.recall_score(y, decisions, pos_label=0),
    }


def largest_gap(report: dict[str, Any], rows: pd.DataFrame) -> float:
    """Return the largest difference between a score of a report and scikit-learn's."""
    y, probability = rows["label"].to_numpy(int), rows["probability"].to_numpy()
    gaps = []
    for path, inside in blocks_of(rows):
        block = report
        for name in path:
            block = block[name]
        expected = score_by_scikit_learn(y[inside], probability[inside])
        gaps += [abs(value - block["scores"][name].value) for name, value in expected.items()]
    return float(max(gaps))


def measure_time(n_loop: int) -> dict[str, Any]:
    rows = make_table()

    def report() -> float:
        _keep_counts.cache_clear()  # as for the first head of a comparison
        start = time.perf_counter()
        bootstrap_report(rows, THRESHOLD, n_resamples=N_RESAMPLES)
        return time.perf_counter() - start

    start = time.process_time()
    seconds = alternate({"report": report}, N_TIMED)["report"]
    cpu_seconds = (time.process_time() - start) / (N_TIMED + 1)  # with the warm-up
    start, cpu_start = time.perf_counter(), time.process_time()
    loop = loop_over_resamples(rows, n_loop)
    loop_seconds, loop_cpu = time.perf_counter() - start, time.process_time() - cpu_start
    assert len(loop[("overall",)]) == n_loop
    gap = largest_gap(bootstrap_report(rows, THRESHOLD, n_resamples=2), rows)
    assert gap < 1e-9, gap
    return {
        "report": {
            "resamples": N_RESAMPLES,
            "seconds": seconds,
            "cpu_seconds": round(cpu_seconds, 3),
        },
        "loop": {
            "resamples": n_loop,
            "seconds": round(loop_seconds, 2),
            "cpu_seconds": round(loop_cpu, 2),
            "fraction_timed": n_loop / N_RESAMPLES,
            "extrapolated_seconds": round(loop_seconds * N_RESAMPLES / n_loop, 1),
            "largest_gap_between_scores": gap,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loop", type=int, default=50, help="resamples of scikit-learn's loop")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    timed = measure_time(given.loop)
    median = float(np.median(timed["report"]["seconds"]))
    results = {
        "ratios": {"loop_vs_report": round(timed["loop"]["extrapolated_seconds"] / median, 1)},
        "synthetic": True,
        "studies": N_STUDIES,
        "patients": N_PATIENTS,
        "regions": REGIONS,
        **timed,
        "peer_versions": {"scikit-learn": version("scikit-learn")},
    }
    print({name: results[name] for name in ("report", "loop")})
    if given.out:
        write_results(given.out, results)


if __name__ == "__main__":
    main()
