"""Compare the heads of a sweep within each of its targets, and their means over targets."""

from collections.abc import Mapping
from math import nan
from typing import Literal

import numpy as np
from typing_extensions import TypedDict  # of typing, pydantic reads it from 3.12 on only

from medembed.core.errors import RunError
from medembed.core.schema import Count, closed
from medembed.evaluation.estimates import Estimate, estimate_scores, mean_estimate
from medembed.evaluation.intervals import Interval, holm, plain
from medembed.evaluation.scores import SCORES
from medembed.results.alignment import TestSet
from medembed.results.comparison import ComparisonOptions, compare_opened
from medembed.results.comparison_schema import ComparisonResult, Score
from medembed.results.significance import versus_best
from medembed.results.targets import TargetRuns

__all__ = [
    "MEANS",
    "Compared",
    "TargetMeans",
    "TargetsComparison",
    "compare_each",
    "compare_targets",
    "summarise_targets",
]

MEANS = tuple(name for name in SCORES if name != "ece")
"""The scores with a mean over targets."""
Compared = dict[str, tuple[ComparisonResult, TestSet]]
"""Of each target what `compare_opened` returns."""


@closed
class TargetMeans(TypedDict):
    """A head's mean scores over the targets that it has an AUROC of."""

    head: str
    baseline: bool
    targets: list[str]
    left_out: list[str]
    scores: dict[str, Score]


@closed
class TargetsComparison(TypedDict):
    """A comparison within each target of a sweep; see `compare_targets`."""

    level: Literal["study", "image"]
    targets: dict[str, ComparisonResult]
    not_estimable: dict[str, str]
    """The other targets, each with the reason."""
    macro: list[TargetMeans]
    n_tests: Count
    """Tests that Holm's correction runs over, of all targets."""
    notes: list[str]


def compare_targets(runs: TargetRuns, options: ComparisonOptions) -> TargetsComparison:
    """Compare the heads within each target of a sweep.

    Parameters
    ----------
    runs : TargetRuns
        All runs complete.
    options : ComparisonOptions
        Without `by`, `manifest` and `margin`.

    Returns
    -------
    dict
        JSON values. ``targets``: by name what `comparison.compare_runs` returns, where paired tests
        stay within a target and Holm's correction runs over those of all targets.
        ``not_estimable``: the other targets, each with the reason. ``macro``: for each head, best
        mean AUROC first, ``head``, ``baseline``, ``targets`` and ``left_out`` (targets without an
        AUROC of this head), and ``scores``, means over these targets, equally weighted, each at the
        target's own threshold; intervals by MOVER, with patients who are in several targets.
        ``level``, ``n_tests`` (of Holm's correction), ``notes``.

    Raises
    ------
    RunError
        A run is missing or unfinished, or all are.
    """
    return summarise_targets(runs, compare_each(runs, options))


def compare_each(runs: TargetRuns, options: ComparisonOptions) -> Compared:
    """Return the comparison of each target and its test rows, as `compare_targets` has them.

    Raises
    ------
    RunError
        On the conditions of `compare_targets`.
    """
    opened = runs.runs()
    for run in opened.values():
        run.require_complete()
    if not opened:
        raise RunError(f"no target of {runs.path} can be estimated.")
    found = {name: compare_opened([run], options) for name, run in opened.items()}
    _correct({name: result for name, (result, _) in found.items()})
    return found


def summarise_targets(runs: TargetRuns, found: Compared) -> TargetsComparison:
    """Return the document of `compare_targets` for the comparisons of its targets."""
    results = {name: result for name, (result, _) in found.items()}
    p = [pair["p"] for result in results.values() for pair in result["paired"]]
    n_tests = len(p) - p.count(None)
    return {
        "level": next(iter(results.values()))["level"],
        "targets": results,
        "not_estimable": runs.not_estimable,
        "macro": _average({name: test_set for name, (_, test_set) in found.items()}),
        "n_tests": n_tests,
        "notes": _note(runs, n_tests),
    }


def _correct(results: Mapping[str, ComparisonResult]) -> None:
    """Let Holm's correction run over the paired tests of all targets."""
    pairs = [pair for result in results.values() for pair in result["paired"]]
    p = [nan if pair["p"] is None else pair["p"] for pair in pairs]
    for pair, adjusted in zip(pairs, holm(p), strict=True):
        pair["p_holm"] = plain(float(adjusted))
    for result in results.values():
        best, *others = result["rows"]
        of_best = {pair["b"]: pair for pair in result["paired"] if pair["a"] == best["head"]}
        for row in others:
            row["versus_best"] = versus_best(of_best.get(row["head"]))


def _average(test_sets: Mapping[str, TestSet]) -> list[TargetMeans]:
    n_patients = 1 + max(int(own.patients.max()) for own in test_sets.values())
    heads: dict[str, dict[str, dict[str, Estimate]]] = {}
    baselines = set()
    for target, own in test_sets.items():
        for contender in own.contenders:
            scores = estimate_scores(
                own.y,
                contender.probability,
                contender.threshold,
                own.patients,
                MEANS,
                n_patients,
            )
            heads.setdefault(contender.head, {})[target] = scores
            baselines |= {contender.head} if contender.is_baseline else set()
    rows = [
        _average_head(head, by_target, list(test_sets), is_baseline=head in baselines)
        for head, by_target in heads.items()
    ]
    return sorted(rows, key=_by_auroc)


def _average_head(
    head: str,
    by_target: Mapping[str, Mapping[str, Estimate]],
    targets: list[str],
    *,
    is_baseline: bool,
) -> TargetMeans:
    used = [name for name, own in by_target.items() if np.isfinite(own["auroc"].value)]
    scores = {
        score: mean_estimate([by_target[name][score] for name in used], used).interval()
        if used
        else Interval(nan, nan, nan)
        for score in MEANS
    }
    left_out = [name for name in targets if name not in used]
    return {
        "head": head,
        "baseline": is_baseline,
        "targets": used,
        "left_out": left_out,
        "scores": plain(scores),
    }


def _by_auroc(row: TargetMeans) -> float:
    value = row["scores"]["auroc"]["value"]
    return float("inf") if value is None else -float(value)


def _note(runs: TargetRuns, n_tests: int) -> list[str]:
    notes = [
        "A mean over targets weighs each equally; its interval counts a patient who is in several "
        "targets once.",
        f"Heads are compared within a target only; Holm's correction runs over the {n_tests} tests "
        "of all targets.",
    ]
    notes += [f"{name}: not estimable, {reason}" for name, reason in runs.not_estimable.items()]
    return notes
