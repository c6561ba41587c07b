"""Time of the intervals of a report, and whether intervals and tests hold what they promise.

    .venv/bin/python bench/evaluation.py --out bench/results/statistics.json
    .venv/bin/python bench/evaluation.py --runs 20 --loop 5        # does it all work?

Everything is made up, at the size of MURA's validation set: 1,199 studies of 783 patients in seven
regions. A patient's studies share a part of the patient's noise, and whether they are abnormal.

- `report`: seconds of `bootstrap_report` with 2,000 resamples: every score, and the decision
  scores at 0.5 too, overall, per region, per number of views, and the mean over regions.
  `cpu_seconds` are those of all threads, which other work on the machine changes less.
- `loop`: seconds of the same blocks resample by resample with scikit-learn's functions (ECE, which
  it has not, in numpy). Only `--loop` resamples are timed; `extrapolated_seconds` is for 2,000. The
  intervals of these few are compared with `bootstrap_report`'s of the same few: they are equal.
- `coverage`: how often the 95 % interval holds the value of the population, over `--runs` draws.
  That value is the score of 2 million studies, whose own error is a fortieth of an interval's half
  width or less. At the size of the whole set, and of one region.
- `type_1_error`: how often two heads of equal AUROC are called different at the 5 % level, by the
  paired bootstrap over patients, by DeLong with patients as clusters (Obuchowski), and by DeLong
  with studies taken as independent. `--pairs` of them: at 500 two standard errors of 5 % are 2 %.
"""

import argparse
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
from sklearn import metrics

from measuring import alternate, write_results
from medembed.evaluation.delong import auroc_difference, auroc_interval
from medembed.evaluation.intervals import Variant, bootstrap_report, bootstrap_variants
from medembed.evaluation.paired import paired_difference
from medembed.evaluation.resampling import _keep_counts
from medembed.evaluation.scores import DECISION_SCORES, N_ECE_BINS, SCORES, Scorer

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
SIZES = {"all": (N_STUDIES, N_PATIENTS), "region": (171, 150)}
COVERED = ("auroc", "accuracy", "macro_f1", "kappa")
N_RESAMPLES = 2000
N_TIMED = 5
N_POPULATION = 2_000_000
THRESHOLD = 0.4


def draw_studies(
    n: int, n_patients: int, seed: int, n_heads: int = 1
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Draw labels, each head's probabilities and patients; all heads have the same AUROC."""
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
    """Make a table such as `bootstrap_report` reads."""
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
    """Score every block of `n` resamples by scikit-learn: a frame per block, a row per resample."""
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


def largest_gap(
    report: dict[str, Any], loop: dict[tuple[str, ...], pd.DataFrame], n_resamples: int
) -> float:
    """Return how far apart any two interval ends are; ECE's interval is moved, and left out."""
    assert report["n_resamples"] == n_resamples
    gaps = []
    for path, draws in loop.items():
        block = report
        for name in path:
            block = block[name]
        for part, names, suffix in (
            ("scores", set(SCORES) - {"ece"}, ""),
            ("at_half", set(DECISION_SCORES), " at half"),
        ):
            for name in names:
                ends = np.quantile(draws[name + suffix], [0.025, 0.975])
                own = block[part][name]
                gaps.append(np.abs(ends - [own.low, own.high]).max())
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
    few = bootstrap_report(rows, THRESHOLD, n_resamples=n_loop)
    gap = largest_gap(few, loop, n_loop)
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
            "largest_gap_between_ends": gap,
        },
    }


def cover(size: tuple[int, int], truth: dict[str, float], seed: int) -> dict[str, list[float]]:
    """Say of one draw's intervals whether they hold the truth, and how wide they are."""
    y, (probability,), patients = draw_studies(*size, seed=seed)
    variant = Variant(probability, THRESHOLD, COVERED)
    found = bootstrap_variants(y, {"": variant}, patients, n_resamples=N_RESAMPLES, seed=seed)[""]
    intervals = found | {"auroc_delong": auroc_interval(y, probability, patients)}
    return {
        name: [float(own.low <= truth[name] <= own.high), own.high - own.low]
        for name, own in intervals.items()
    }


def measure_coverage(n_runs: int) -> dict[str, Any]:
    ratio = N_PATIENTS / N_STUDIES
    y, (probability,), _ = draw_studies(N_POPULATION, round(ratio * N_POPULATION), seed=10**9)
    scorer = Scorer(y, probability, THRESHOLD, COVERED)
    truth = {name: float(value[0]) for name, value in scorer(np.ones((1, len(y)))).items()}
    truth["auroc_delong"] = truth["auroc"]
    coverage: dict[str, Any] = {"runs": n_runs, "truth": truth, "studies_behind_truth": len(y)}
    for name, size in SIZES.items():
        jobs = (joblib.delayed(cover)(size, truth, seed) for seed in range(n_runs))
        found = joblib.Parallel(n_jobs=-1)(jobs)
        means = {score: np.mean([run[score] for run in found], axis=0) for score in found[0]}
        coverage[name] = {
            "studies": size[0],
            "patients": size[1],
            "covered": {score: round(float(mean[0]), 4) for score, mean in means.items()},
            "mean_width": {score: round(float(mean[1]), 4) for score, mean in means.items()},
        }
    return coverage


def compare_equals(size: tuple[int, int], seed: int) -> dict[str, bool]:
    """Say which tests call two heads of equal AUROC different."""
    y, (a, b), patients = draw_studies(*size, seed=seed, n_heads=2)
    found = {
        "bootstrap": paired_difference(y, a, b, patients, n_resamples=N_RESAMPLES, seed=seed),
        "obuchowski": auroc_difference(y, a, b, patients),
        "delong_by_study": auroc_difference(y, a, b, np.arange(len(y))),
    }
    return {name: own.p < 0.05 for name, own in found.items()}


def measure_type_1_error(n_pairs: int) -> dict[str, Any]:
    errors: dict[str, Any] = {"pairs": n_pairs, "level": 0.05}
    for name, size in SIZES.items():
        jobs = (joblib.delayed(compare_equals)(size, seed) for seed in range(n_pairs))
        found = pd.DataFrame(joblib.Parallel(n_jobs=-1)(jobs))
        errors[name] = {test: round(float(share), 4) for test, share in found.mean().items()}
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loop", type=int, default=50, help="resamples of scikit-learn's loop")
    parser.add_argument("--runs", type=int, default=1000, help="draws behind a coverage")
    parser.add_argument("--pairs", type=int, default=500, help="pairs of heads of equal AUROC")
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
        "coverage": measure_coverage(given.runs),
        "type_1_error": measure_type_1_error(given.pairs),
        "peer_versions": {"scikit-learn": version("scikit-learn")},
    }
    print({name: results[name] for name in ("report", "loop", "coverage", "type_1_error")})
    if given.out:
        write_results(given.out, results)


if __name__ == "__main__":
    main()
