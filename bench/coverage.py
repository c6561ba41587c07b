"""Measure the coverage of intervals and the error rates of tests at realistic sample sizes.

    .venv/bin/python bench/coverage.py --out bench/results/coverage.json      # hours; goes on
    .venv/bin/python bench/coverage.py --datasets 100 --cells 0.1,0.85,100    # does it work?

Synthetic patients have one to three studies of one to four views, whose scores share part of the
patient's noise and part of the study's (binormal), and whose labels are correlated as well. A cell
is a prevalence, an AUROC and a number of patients. Each cell is independent, is written when it
ends, and is not repeated with an equal number of data sets.

- `scores`: how often the 95 % interval of each score holds the score of the population (200,000
  patients), among the data sets where an interval is shown, and among those with 20 or more
  patients of each class; how often it is shown, and how often it has no width. Decisions are at
  Youden's threshold of the population, and at 0.5. `line` is slope and intercept.
- `tests`: how often two heads of equal AUROC are called different at the 5 % level, how often any
  of the six pairs of four heads is after Holm's correction, and how often a score is called changed
  between 300 patients and the cell's, of one population.
- `others`: the same coverage of methods that were not chosen, on fewer data sets.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit
from scipy.stats import norm
from scipy.stats import t as student

from coverage_table import name_cell, parse_cells, summarise
from measuring import machine
from medembed.evaluation.bootstrap import MIN_PATIENTS, Interval, draw, upper_bound
from medembed.evaluation.bounds import bound_on_logit, clopper_pearson, wilson
from medembed.evaluation.calibration import calibration_line
from medembed.evaluation.estimates import PREDICTIVE, estimate_scores, influences, measure_spread
from medembed.evaluation.paired import bootstrap_p, holm, paired_differences
from medembed.evaluation.scores import DECISION_SCORES, SCORES, Scorer
from medembed.evaluation.thresholds import youden_threshold
from medembed.evaluation.unpaired import mover_drop

NAMES = (*(name for name in SCORES if name != "ece"), *PREDICTIVE)
DECIDED = (*DECISION_SCORES, *PREDICTIVE)
#: Shares of a view's noise due to the patient, the study and the view; and the correlation of the
#: labels of a patient's studies.
NOISE = (0.3, 0.3, 0.4)
LABEL_CORRELATION = 0.3
COMMON = 0.6
N_POPULATION = 200_000
N_RESAMPLES = 400
ENOUGH = 20
N_INTERNAL = 300
Z = 1.959964


def draw_patients(
    n: int, prevalence: float, separation: float, rng: np.random.Generator, n_heads: int = 1
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Return random labels, each head's probabilities, and patients, one row per study."""
    patients = np.repeat(np.arange(n), rng.choice([1, 2, 3], n, p=[0.5, 0.3, 0.2]))
    sureness = 1 / LABEL_CORRELATION - 1
    tendency = rng.beta(prevalence * sureness, (1 - prevalence) * sureness, n)
    y = (rng.random(len(patients)) < tendency[patients]).astype(np.int8)
    n_views = rng.choice([1, 2, 3, 4], len(y), p=[0.2, 0.3, 0.3, 0.2])
    studies = np.repeat(np.arange(len(y)), n_views)

    def noise() -> np.ndarray:
        of_patient, of_study, of_view = np.sqrt(NOISE)
        shared = of_patient * rng.normal(size=n)[patients] + of_study * rng.normal(size=len(y))
        return np.asarray(shared[studies] + of_view * rng.normal(size=len(studies)))

    seen_by_all, probabilities = noise(), []
    for _ in range(n_heads):
        own = seen_by_all
        if n_heads > 1:
            own = np.sqrt(COMMON) * seen_by_all + np.sqrt(1 - COMMON) * noise()
        odds = np.log(prevalence / (1 - prevalence))
        odds = odds + separation * (separation * y[studies] + own - separation / 2)
        probabilities.append(np.bincount(studies, weights=expit(odds)) / n_views)
    return y, probabilities, patients


def find_population(prevalence: float, auroc: float, n: int = N_POPULATION) -> dict[str, Any]:
    """Return the separation that gives an AUROC, and the scores of a large population."""
    low, high = 0.0, 6.0
    for _ in range(14):  # an approximation suffices: the true AUROC is measured below
        middle = (low + high) / 2
        y, (probability,), _ = draw_patients(n // 10, prevalence, middle, np.random.default_rng(5))
        found = Scorer(y, probability, 0.5, ["auroc"])(np.ones((1, len(y))))["auroc"][0]
        low, high = (middle, high) if found < auroc else (low, middle)
    y, (probability,), patients = draw_patients(n, prevalence, middle, np.random.default_rng(77))
    cut = youden_threshold(y, probability)
    truth = {}
    for suffix, threshold in (("", cut), (" at 0.5", 0.5)):
        scores = Scorer(y, probability, threshold)(np.ones((1, len(y))))
        called = probability >= threshold
        own = {name: float(value[0]) for name, value in scores.items()}
        own["ppv"] = float(y[called].mean()) if called.any() else float("nan")
        own["npv"] = float((1 - y[~called]).mean()) if (~called).any() else float("nan")
        names = SCORES + PREDICTIVE if not suffix else DECIDED
        truth |= {name + suffix: own[name] for name in names}
    line = calibration_line(y, probability, patients)
    truth |= {name: own.value for name, own in line.items()}
    return {"separation": middle, "threshold": cut, "truth": truth}


class Tally:
    """Counts the outcomes of intervals over data sets."""

    def __init__(self, truth: dict[str, float]) -> None:
        self.truth = truth
        self.counts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def add(self, name: str, interval: Interval, fewest: int) -> None:
        """Count an interval; its name is a score's, or a score's and a method's."""
        truth = self.truth[name.split(":")[0]]
        if isnan(truth):
            return
        own = self.counts[name]
        own["datasets"] += 1
        low = 0.0 if name == "ece" else interval.low
        if isnan(low) or isnan(interval.high):
            return
        held = low <= truth <= interval.high
        own["shown"] += 1
        own["held"] += held
        own["no_width"] += interval.high <= low
        own["width"] += round(interval.high - low, 6)
        if fewest >= ENOUGH:
            own["shown_enough"] += 1
            own["held_enough"] += held

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Return the counts as JSON values."""
        return {name: dict(own) for name, own in self.counts.items()}


def count_fewest(y: np.ndarray, patients: np.ndarray) -> int:
    """Return the number of patients of the rarer class."""
    return min(len(np.unique(patients[y == label])) for label in (0, 1))


def measure_scores(
    cell: tuple[float, float, int], population: dict[str, Any], n: int, n_others: int, batch: int
) -> dict[str, Any]:
    """Return the coverage counts of a cell's intervals, and of those by other methods."""
    prevalence, _, size = cell
    rng = np.random.default_rng([1, batch, *(round(1000 * part) for part in cell)])
    tally, others = Tally(population["truth"]), Tally(population["truth"])
    for i in range(n):
        y, (probability,), patients = draw_patients(size, prevalence, population["separation"], rng)
        fewest = count_fewest(y, patients)
        for suffix, cut, names in (
            ("", population["threshold"], NAMES),
            (" at 0.5", 0.5, DECIDED),
        ):
            found = estimate_scores(y, probability, cut, patients, names)
            for name, own in found.items():
                tally.add(name + suffix, own.interval(), fewest)
        for name, line in calibration_line(y, probability, patients).items():
            tally.add(name, line, fewest)
        if i < n_others:
            for name, interval in find_others(y, probability, patients, population, seed=i):
                (tally if name == "ece" else others).add(name, interval, fewest)
    return {"scores": tally.as_dict(), "others": others.as_dict()}


def find_others(
    y: np.ndarray,
    probability: np.ndarray,
    patients: np.ndarray,
    population: dict[str, Any],
    seed: int,
) -> Iterator[tuple[str, Interval]]:
    """Yield the intervals of methods that were not chosen, and ECE's bound, by resampling."""
    names = [name for name in SCORES if name != "ece"]
    scorer = Scorer(y, probability, population["threshold"], SCORES)
    truth, draws = draw([scorer], [np.arange(len(y))], patients, N_RESAMPLES, seed)
    n_patients = int(patients.max()) + 1
    yield "ece", upper_bound(truth[0]["ece"], draws[0]["ece"], n_patients)
    fewest = count_fewest(y, patients)
    if fewest < MIN_PATIENTS:
        return
    added = influences(y, probability, population["threshold"], names)
    for name in names:
        value, drawn = truth[0][name], draws[0][name]
        spread = measure_spread(y, added[name], patients)
        drawn = drawn[~np.isnan(drawn)]
        for method, tails in (
            ("percentile", np.array([0.025, 0.975])),
            ("bca", _bca_tails(value, drawn, spread.parts)),
        ):
            yield f"{name}:{method}", Interval(value, *np.quantile(drawn, tails).tolist())
        reach = float(student.ppf(0.975, fewest - 1))
        low, high = bound_on_logit(value, spread.error, reach)
        yield f"{name}:logit-t(m-1)", Interval(value, low, high)
    hits, n = int(((probability >= population["threshold"]) & (y == 1)).sum()), int((y == 1).sum())
    yield "sensitivity:wilson of rows", Interval(hits / n, *wilson(hits / n, n, Z))
    yield (
        "sensitivity:clopper-pearson of rows",
        Interval(hits / n, *clopper_pearson(hits / n, n, 0.95)),
    )


def _bca_tails(value: float, drawn: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Return BCa's tails (Efron, JASA 82, 1987), with the acceleration from contributions."""
    below = ((drawn < value).sum() + (drawn == value).sum() / 2) / len(drawn)
    shift = float(norm.ppf(np.clip(below, 1e-4, 1 - 1e-4)))
    squares = float(parts @ parts)
    speed = float((parts**3).sum()) / (6 * squares**1.5) if squares > 0 else 0.0
    z = shift + np.array([-Z, Z])
    return np.asarray(norm.cdf(shift + z / (1 - speed * z)))


def measure_tests(
    cell: tuple[float, float, int], population: dict[str, Any], n: int, n_others: int, batch: int
) -> dict[str, Any]:
    """Return how often tests find a difference between equal heads or populations."""
    prevalence, _, size = cell
    rng = np.random.default_rng([2, batch, *(round(1000 * part) for part in cell)])
    counts: dict[str, list[bool]] = defaultdict(list)
    for i in range(n):
        y, heads, patients = draw_patients(size, prevalence, population["separation"], rng, 4)
        named = {str(k): head for k, head in enumerate(heads)}
        p = [own.p for own in paired_differences(y, named, patients).values()]
        if not isnan(p[0]):
            counts["pair"].append(p[0] < 0.05)
            counts["family"].append(bool((holm(p) < 0.05).any()))
            if i < n_others:
                p = list(bootstrap_p(y, named, patients, n_resamples=N_RESAMPLES, seed=i).values())
                counts["pair:bootstrap"].append(p[0] < 0.05)
                counts["family:bootstrap"].append(bool((holm(p) < 0.05).any()))
        inside = draw_patients(N_INTERNAL, prevalence, population["separation"], rng)
        outside = draw_patients(size, prevalence, population["separation"], rng)
        sides = [
            {
                name: own.interval()
                for name, own in estimate_scores(
                    labels, own_heads[0], population["threshold"], codes, NAMES
                ).items()
            }
            for labels, own_heads, codes in (inside, outside)
        ]
        for name, drop in mover_drop(*sides).items():
            if not isnan(drop.low):
                counts[f"drop of {name}"].append(not drop.low <= 0 <= drop.high)
    found = {name: {"n": len(own), "found": int(sum(own))} for name, own in counts.items()}
    return {"tests": found}


def run_batch(
    cell: tuple[float, float, int],
    population: dict[str, Any],
    n: int,
    n_others: int,
    batch: int = 0,
    part: str = "scores",
) -> dict[str, Any]:
    """Return the counts of one batch of a cell's data sets; `part` is "scores" or "tests"."""
    measure = measure_scores if part == "scores" else measure_tests
    return measure(cell, population, n, n_others, batch)


def add_counts(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Return the sums of numbers with equal names."""
    total = dict(before)
    for name, own in found.items():
        if isinstance(own, dict):
            total[name] = add_counts(total.get(name, {}), own)
        else:
            total[name] = round(total.get(name, 0) + own, 6)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", type=int, default=2000, help="of each cell")
    parser.add_argument("--batch", type=int, default=100, help="data sets that are run at a time")
    parser.add_argument("--others", type=int, default=10, help="of each batch that are resampled")
    parser.add_argument("--cells", help="prevalence,auroc,patients;… ; all by default")
    parser.add_argument("--parts", default="scores,tests")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    results: dict[str, Any] = {"populations": {}, "cells": {}}
    if given.out.exists():
        results = json.loads(given.out.read_text())
    jobs = product(
        range(given.datasets // given.batch), parse_cells(given.cells), given.parts.split(",")
    )
    for batch, cell, part in jobs:
        key, kind = name_cell(cell), f"{cell[0]:g}|{cell[1]:g}"
        own = results["cells"].setdefault(key, {"scores": {}})
        if own.get(f"{part}_batches", 0) > batch:
            continue
        if kind not in results["populations"]:
            results["populations"][kind] = find_population(*cell[:2])
        population = results["populations"][kind]
        found = run_batch(cell, population, given.batch, given.others, batch, part)
        results["cells"][key] = add_counts(own, {**found, f"{part}_batches": 1})
        print(batch, key, part, flush=True)
        document = {
            "synthetic": True,
            **results,
            "batch": given.batch,
            "summary": summarise(results["cells"]),
            "machine": machine(),
        }
        given.out.parent.mkdir(parents=True, exist_ok=True)
        partial = given.out.with_suffix(".partial")
        partial.write_text(json.dumps(document, indent=1) + "\n")
        partial.replace(given.out)


if __name__ == "__main__":
    main()
