"""Compare the heads of any number of runs on the test rows that they share."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from medembed.errors import RunError
from medembed.evaluation.intervals import bootstrap_report, holm, paired_differences, plain
from medembed.results.alignment import LEVELS, Contender, TestSet, align_runs
from medembed.results.runs import Run, open_run

__all__ = [
    "DISCLAIMER",
    "SIGNIFICANCE",
    "compare",
    "compare_runs",
    "counted",
    "describe",
    "open_runs",
    "row_name",
]

DISCLAIMER = "Research software; not a medical device."
SIGNIFICANCE = 0.05
"""A difference counts where Holm's adjusted p is below this."""
RESAMPLES_PER_PAIR = 100
"""Keeps the smallest p that the bootstrap can give, times the number of pairs, near 0.02."""


def compare(
    run_paths: Sequence[str | Path],
    *,
    level: str = "study",
    n_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score every head of the runs on their common test rows, with intervals and paired tests.

    Parameters
    ----------
    run_paths : sequence of str or Path
        Run directories, all complete.
    level : {"study", "image"}
        What is scored. A study's probability is the mean of its views'.
    n_resamples : int
        Bootstrap resamples of patients.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    dict
        JSON values only, see `compare_runs`.

    Raises
    ------
    PathNotFoundError
        A run does not exist.
    RunError
        A run is unfinished or not a run, or the runs have no test rows in common.
    """
    return compare_runs(open_runs(run_paths), level=level, n_resamples=n_resamples, seed=seed)


def open_runs(run_paths: Sequence[str | Path]) -> list[Run]:
    """Open runs that are complete.

    Raises
    ------
    PathNotFoundError, RunError
        As `compare`.
    """
    if not run_paths:
        raise RunError("no run was given. Name at least one run directory.")
    runs = [open_run(path) for path in run_paths]
    for run in runs:
        run.require_complete()
    return runs


def compare_runs(
    runs: Sequence[Run], *, level: str = "study", n_resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Do what `compare` does on runs that are open, complete or not.

    Returns
    -------
    dict
        ``level``, ``test`` (counts), ``runs`` (per run: left-out images, rows that fell out),
        ``rows`` (per head, best AUROC first: ``scores`` and, at a threshold of 0.5, ``at_half``;
        ``regions``, ``mean_over_regions``, ``views``; ``versus_best``), ``paired`` (AUROC of every
        pair of trained heads, and of the best with each prior, with Holm's correction over all of
        them), ``notes``. A score is
        ``{value, low, high}`` with null for what is not estimable.
    """
    if level not in LEVELS:
        raise RunError(f"level {level!r} is unknown. Choose one of: {', '.join(LEVELS)}.")
    test_set = align_runs(runs, level)
    rows = [_row(test_set, contender, n_resamples, seed) for contender in test_set.contenders]
    rows.sort(key=_by_auroc)
    paired = _pairs(test_set, rows, n_resamples, seed)
    for i, row in enumerate(rows):
        row["versus_best"] = _versus_best(paired.get((0, i)))
    result: dict[str, Any] = {
        "level": level,
        "n_resamples": n_resamples,
        "seed": seed,
        "test": _count(test_set),
        "runs": [
            _about(run, name, n)
            for run, (name, n) in zip(runs, test_set.dropped.items(), strict=True)
        ],
        "synthetic": any(run.info.get("data", {}).get("synthetic", False) for run in runs),
        "rows": rows,
        "paired": list(paired.values()),
    }
    return {**result, "notes": describe(result)}


def describe(result: dict[str, Any]) -> list[str]:
    """Return the sentences that belong under every table: what was counted, and how."""
    test, level = result["test"], result["level"]
    notes = [
        f"Test: {counted(test['n'], level)} ({test['n_abnormal']:,} abnormal) of "
        f"{counted(test['n_patients'], 'patient')}.",
        f"Intervals: 95 %, from {result['n_resamples']:,} bootstrap resamples of patients.",
        "Decisions: Youden's threshold on calibrated out-of-fold predictions of train.",
    ]
    for run in result["runs"]:
        notes += _describe_losses(run, level, len(result["runs"]) > 1)
    if result["synthetic"]:
        notes.append("Synthetic images: these scores say nothing about medicine.")
    return [*notes, DISCLAIMER]


def counted(n: int, noun: str) -> str:
    """Write a count with its noun: 1 study, 1,199 studies."""
    if n == 1:
        return f"1 {noun}"
    return f"{n:,} {noun[:-1]}ies" if noun.endswith("y") else f"{n:,} {noun}s"


def _describe_losses(run: dict[str, Any], level: str, several: bool) -> list[str]:
    prefix = f"{run['name']}: " if several else ""
    notes = []
    if run["left_out"]:
        notes.append(
            f"{prefix}Left out: {counted(run['left_out'], 'image')} that could not be embedded "
            f"({run['left_out_test']:,} in test)."
        )
    if run["unlabelled"]:
        notes.append(f"{prefix}Not scored: {counted(run['unlabelled'], 'image')} without a label.")
    if run["dropped"]:
        notes.append(
            f"{prefix}Fell out: {counted(run['dropped'], level)} of test that not all runs have."
        )
    return notes


def _row(test_set: TestSet, contender: Contender, n_resamples: int, seed: int) -> dict[str, Any]:
    units = test_set.units.assign(probability=contender.probability)
    report = plain(bootstrap_report(units, contender.threshold, n_resamples=n_resamples, seed=seed))
    return {
        "run": contender.run,
        "head": contender.head,
        "baseline": contender.is_baseline,
        "pooling": contender.pooling,
        "trial": contender.trial,
        "params": contender.params,
        "cv": contender.cv,
        "threshold": contender.threshold,
        "calibration": contender.calibration.as_dict(),
        "scores": report["overall"]["scores"],
        "at_half": report["overall"]["at_half"],
        "regions": {name: _flat(block) for name, block in report["region"].items()},
        "mean_over_regions": _flat(report["mean_over_regions"]),
        "views": {name: _flat(block) for name, block in report["n_views"].items()},
    }


def _flat(block: dict[str, Any]) -> dict[str, Any]:
    return {**{name: value for name, value in block.items() if name != "scores"}, **block["scores"]}


def _by_auroc(row: dict[str, Any]) -> float:
    value = row["scores"]["auroc"]["value"]
    return float("inf") if value is None else -float(value)


def _pairs(
    test_set: TestSet, rows: list[dict[str, Any]], n_resamples: int, seed: int
) -> dict[tuple[int, int], dict[str, Any]]:
    """Test the trained heads against each other and the best row against the priors too."""
    chosen = [
        (i, j)
        for i, j in combinations(range(len(rows)), 2)
        if i == 0 or not (rows[i]["baseline"] or rows[j]["baseline"])
    ]
    probabilities = {(c.run, c.head): c.probability for c in test_set.contenders}
    ordered = {str(i): probabilities[row["run"], row["head"]] for i, row in enumerate(rows)}
    # p is at least 2 / (resamples + 1), and Holm multiplies it by up to the number of pairs
    n_resamples = max(n_resamples, RESAMPLES_PER_PAIR * len(chosen))
    found = paired_differences(
        test_set.y, ordered, test_set.patients, n_resamples=n_resamples, seed=seed
    )
    differences = [found[str(i), str(j)] for i, j in chosen]
    adjusted = holm([difference.p for difference in differences])
    names = [row_name(row, several=len(test_set.dropped) > 1) for row in rows]
    return {
        (i, j): {
            "a": names[i],
            "b": names[j],
            "score": "auroc",
            **difference.as_dict(),
            "p_holm": plain(float(p)),
        }
        for (i, j), difference, p in zip(chosen, differences, adjusted, strict=True)
    }


def _versus_best(pair: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return p against the best, None for the best itself; `tied` where it may be chance."""
    if pair is None:
        return None
    return {
        "difference": pair["difference"],
        "p_holm": pair["p_holm"],
        "tied": pair["p_holm"] is not None and pair["p_holm"] >= SIGNIFICANCE,
    }


def _count(test_set: TestSet) -> dict[str, int]:
    return {
        "n": len(test_set.units),
        "n_abnormal": int(test_set.y.sum()),
        "n_patients": int(test_set.units["patient"].nunique()),
    }


def _about(run: Run, name: str, dropped: int) -> dict[str, Any]:
    data = run.info.get("data", {})
    return {
        "name": name,
        "left_out": data.get("left_out", 0),
        "left_out_test": data.get("left_out_test", 0),
        "unlabelled": data.get("unlabelled", 0),
        "dropped": dropped,
    }


def row_name(row: dict[str, Any], *, several: bool) -> str:
    """Return the head's name, with its run's where there are several runs."""
    return f"{row['run']}/{row['head']}" if several else str(row["head"])
