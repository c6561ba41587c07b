"""Compare the heads of any number of runs on their common test rows."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any, Literal, cast

import numpy as np
from threadpoolctl import threadpool_limits

from medembed.core.errors import RunError
from medembed.dataset.manifest import Manifest
from medembed.dataset.targets import LABEL
from medembed.evaluation.calibration import calibration_curve, calibration_line, reliability
from medembed.evaluation.clinical_utility import check_prevalence
from medembed.evaluation.delong import auroc_interval
from medembed.evaluation.intervals import (
    Interval,
    Variant,
    bootstrap_report,
    bootstrap_variants,
    plain,
)
from medembed.evaluation.scores import DECISION_SCORES
from medembed.evaluation.thresholds import ThresholdRule, parse_rules
from medembed.results.ablations import (
    drop_repeats,
    find_depths,
    find_efficiency,
    find_layers,
    find_seeds,
    mark_repeats,
)
from medembed.results.alignment import SENSITIVITY, ScoredHead, TestSet, align_runs
from medembed.results.comparison_schema import (
    CalibratedScores,
    CalibrationParameters,
    ComparedHead,
    ComparedRun,
    ComparisonResult,
    Counts,
    HeadDeferral,
)
from medembed.results.deferral import find_deferrals
from medembed.results.flow import describe_flow
from medembed.results.methods import describe, name_compared_classes
from medembed.results.operating_points import count_confusion, describe_benefit, describe_points
from medembed.results.runs import Run, RunLike, open_run
from medembed.results.significance import (
    check_margin,
    describe_margins,
    find_non_inferior,
    pair_rows,
    versus_best,
)
from medembed.results.subgroups import compare_groups, join_groups

__all__ = [
    "ComparisonOptions",
    "compare",
    "compare_aligned",
    "compare_opened",
    "compare_runs",
    "open_runs",
    "score_run",
]

Level = Literal["study", "image"]
_NOT_KNOWN = dict.fromkeys(DECISION_SCORES, Interval(nan, nan, nan))


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions:
    """The options of a comparison.

    Attributes
    ----------
    level : {"study", "image"}
        The unit that is scored. A study's probability is the mean over its views.
    n_resamples : int
        Bootstrap resamples of patients.
    seed : int
        Seed of the bootstrap.
    by : str, optional
        ``COLUMN`` or ``COLUMN:BANDS`` of `manifest`, see `covariate_bands.parse_grouping`.
    manifest : Manifest, optional
        The manifest that the runs were made from; required with `by`, and not used without.
    margin : float, optional
        Acceptable loss of AUROC: adds tests of non-inferiority.
    operating_points : sequence of str or ThresholdRule
        Operating points to show besides `thresholds.SHOWN`; strings are read by
        `thresholds.parse_rule`.
    prevalence : float, optional
        A share of abnormal studies, in (0, 1), at which predictive values are reported too.

    Raises
    ------
    RunError
        The margin is out of range.
    """

    level: str = "study"
    n_resamples: int = 2000
    seed: int = 0
    by: str | None = None
    manifest: Manifest | None = None
    margin: float | None = None
    operating_points: Sequence[str | ThresholdRule] = ()
    prevalence: float | None = None

    def __post_init__(self) -> None:
        if self.margin is not None:
            check_margin(self.margin)


def compare(run_paths: RunLike | Sequence[RunLike], **options: Any) -> ComparisonResult:
    """Score every head of the runs on their common test rows, with intervals and paired tests.

    Parameters
    ----------
    run_paths : Run, path, or sequence of them
        Run directories, all complete.
    **options
        Fields of `ComparisonOptions`.

    Returns
    -------
    dict
        JSON values only, see `compare_runs`; with `by` also ``groups`` and ``gaps``, see
        `subgroups.compare_groups`; with `margin` ``non_inferiority``, see
        `significance.find_non_inferior`.

    Raises
    ------
    PathNotFoundError
        A run does not exist.
    RunError
        A run is unfinished or not a run, the runs have no test rows in common, the margin is out
        of range, a run was made from another manifest, or an evaluated model has no threshold for
        an operating point.
    ManifestError
        The manifest has no such column, or the column cannot be grouped.
    TrainingDataError
        An operating point or the prevalence is invalid.
    """
    asked = ComparisonOptions(**options)  # invalid options are refused before anything is read
    return compare_opened(open_runs(run_paths), asked)[0]


def compare_opened(
    runs: Sequence[Run], options: ComparisonOptions
) -> tuple[ComparisonResult, TestSet]:
    """Return what `compare` returns, for open runs, and the test rows."""
    test_set = align_runs(runs, options.level, parse_rules(options.operating_points))
    own = None
    if options.by is not None and options.manifest is not None:
        own = join_groups(runs, test_set, options.manifest, options.by)
    result = compare_aligned(
        runs,
        test_set,
        n_resamples=options.n_resamples,
        seed=options.seed,
        prevalence=options.prevalence,
    )
    if own is not None:
        result = {**result, **compare_groups(result["rows"], test_set, own)}
    if options.margin is not None:
        tests = find_non_inferior(result["rows"], test_set, options.margin)
        *notes, last = result["notes"]
        classes = name_compared_classes(result)
        notes = [*notes, *describe_margins(tests, options.margin, classes), last]
        result = {**result, "non_inferiority": tests, "notes": notes}
    return result, test_set


def open_runs(run_paths: RunLike | Sequence[RunLike]) -> list[Run]:
    """Return one or several complete runs, opened.

    Raises
    ------
    PathNotFoundError, RunError
        On the conditions of `compare`.
    """
    if isinstance(run_paths, Run | str | os.PathLike) or not isinstance(run_paths, Iterable):
        run_paths = [run_paths]
    runs = [open_run(path) for path in run_paths]
    if not runs:
        raise RunError("no run was given. Name at least one run directory.")
    for run in runs:
        run.require_complete()
    return runs


def compare_runs(
    runs: Sequence[Run],
    *,
    level: str = "study",
    n_resamples: int = 2000,
    seed: int = 0,
    operating_points: Sequence[str | ThresholdRule] = (),
    prevalence: float | None = None,
) -> ComparisonResult:
    """Return what `compare` returns, for open runs that may be unfinished.

    Returns
    -------
    dict
        ``level``, ``test`` (counts), ``runs`` (per run: left-out images, rows that other runs lack,
        and ``priors_of``, ``left_out_of``, ``copy_of``, see `mark_repeats`), ``flow`` (see
        `describe_flow`),
        ``rows`` (per head, best AUROC first: ``scores`` at Youden's threshold, ``at_half`` at 0.5,
        ``at_sensitivity``; ``operating_points`` and ``net_benefit``, see `operating_points`;
        ``confusion``; ``calibrations``; ``auroc_delong``; ``fit``:
        Brier score, ``slope`` and ``intercept`` of calibrated probabilities, ECE; ``regions``,
        ``mean_over_regions``, ``views``; ``deferral`` and ``deferral_note``, see
        `results.deferral`; ``versus_best``), ``paired`` (AUROC of every pair of
        trained heads, and of the best with each prior, with Holm's correction over all of them),
        ``seeds``, ``efficiency``, ``depths`` (see `results.ablations`), ``layers`` (see
        `results.ablations`), ``notes``. A score is
        ``{value, low, high, method}`` with null for what is not estimable, ``reason`` if there is
        no interval, and ``k, n`` of a share; ECE has only an upper bound.
    """
    test_set = align_runs(runs, level, parse_rules(operating_points))
    return compare_aligned(
        runs, test_set, n_resamples=n_resamples, seed=seed, prevalence=prevalence
    )


def compare_aligned(
    runs: Sequence[Run],
    test_set: TestSet,
    *,
    n_resamples: int = 2000,
    seed: int = 0,
    prevalence: float | None = None,
) -> ComparisonResult:
    """Return what `compare_runs` returns, for the test set that `align_runs` made of these runs.

    Linear algebra takes one thread: with more, sums over 10,000 patients have other last digits on
    another number of cores, and take twice as long, for threads wait for each other at every sum.
    """
    with threadpool_limits(1, user_api="blas"):
        return _compare(runs, test_set, n_resamples, seed, prevalence)


def _compare(
    runs: Sequence[Run], test_set: TestSet, n_resamples: int, seed: int, prevalence: float | None
) -> ComparisonResult:
    known = None if prevalence is None else check_prevalence(prevalence)
    contenders, priors_of = drop_repeats(runs, test_set)
    deferrals = find_deferrals(runs, test_set)
    rows = [
        _row(test_set, own, deferrals[own.run, own.head], n_resamples, seed, known)
        for own in contenders
    ]
    rows.sort(key=_by_auroc)
    paired = pair_rows(test_set, rows, n_resamples, seed)
    for i, row in enumerate(rows):
        row["versus_best"] = versus_best(paired.get((0, i)))
    abouts = [
        _about(run, name, n) for run, (name, n) in zip(runs, test_set.dropped.items(), strict=True)
    ]
    result: ComparisonResult = {
        "level": cast("Level", test_set.level),
        "n_resamples": n_resamples,
        "seed": seed,
        "test": _count(test_set),
        "runs": mark_repeats(abouts, runs, test_set, priors_of),
        "flow": describe_flow(runs, list(test_set.dropped)),
        "operating_points": [rule.name for rule in test_set.rules],
        "prevalence": known,
        "synthetic": any(run.info.data.synthetic for run in runs),
        "rows": rows,
        "paired": list(paired.values()),
        "seeds": find_seeds(runs, test_set, n_resamples, seed),
        "efficiency": find_efficiency(rows, runs, test_set),
        "depths": find_depths(rows, runs, test_set),
        "layers": find_layers(runs, list(test_set.dropped)),
        "notes": [],
    }
    return {**result, "notes": describe(result)}


def score_run(run: Run, **asked: Any) -> ComparisonResult:
    """Return the scores that a run keeps: a comparison with itself, without durations.

    Equal arguments give equal scores; times are in `run.json`. `asked` is passed to `compare_runs`.
    The whole comparison stays with `run` as `Run.comparison`, to be shown without a second one.
    """
    result = run.comparison = compare_runs([run], **asked)
    rows: Any = [
        {key: value for key, value in row.items() if key != "seconds"} for row in result["rows"]
    ]
    return {**result, "rows": rows}


def _row(
    test_set: TestSet,
    contender: ScoredHead,
    deferral: HeadDeferral,
    n_resamples: int,
    seed: int,
    prevalence: float | None,
) -> ComparedHead:
    rows = (test_set.y, contender.probability, test_set.patients)
    units = test_set.units.assign(probability=contender.probability)
    report = plain(bootstrap_report(units, contender.threshold, n_resamples=n_resamples, seed=seed))
    delong = auroc_interval(test_set.y, contender.probability, test_set.patients)
    return {
        "run": contender.run,
        "head": contender.head,
        "baseline": contender.is_baseline,
        "pooling": contender.pooling,
        "trial": contender.trial,
        "params": contender.params,
        "cv": contender.cv,
        "cv_method": contender.cv_method,
        "n_tried": contender.n_tried,
        "seconds": contender.seconds,
        "depth": contender.depth,
        "seed": contender.seed,
        "train_fraction": contender.train_fraction,
        "n_train_patients": contender.n_train_patients,
        "threshold": contender.threshold,
        "calibration": cast("CalibrationParameters", contender.calibration.as_dict()),
        "scores": report["overall"]["scores"],
        "auroc_delong": plain(delong),
        "fit": _fit(report["overall"]["scores"], test_set, contender),
        "at_half": report["overall"]["at_half"],
        **_at_sensitivity_and_calibrations(test_set, contender, n_resamples, seed),
        "confusion": {
            "threshold": contender.threshold,
            **count_confusion(test_set.y, contender.probability, contender.threshold),
        },
        "operating_points": describe_points(*rows, test_set.rules, contender.points, prevalence),
        "net_benefit": describe_benefit(*rows),
        "regions": {name: _flat(block) for name, block in report["region"].items()},
        "mean_over_regions": _flat(report["mean_over_regions"]),
        "views": {name: _flat(block) for name, block in report["n_views"].items()},
        **deferral,
        "versus_best": None,
    }


def _at_sensitivity_and_calibrations(
    test_set: TestSet, contender: ScoredHead, n_resamples: int, seed: int
) -> CalibratedScores:
    """Return scores at the threshold of `SENSITIVITY`, and those of each calibration."""
    y, patients, cut = test_set.y, test_set.patients, contender.sensitive_threshold
    calibrated = {
        name: calibration.apply(contender.raw)
        for name, calibration in contender.calibrations.items()
    }
    variants = {name: Variant(values, 0.5, ("brier", "ece")) for name, values in calibrated.items()}
    if cut is not None:
        variants["sensitive"] = Variant(contender.probability, cut, DECISION_SCORES)
    scores = bootstrap_variants(y, variants, patients, n_resamples=n_resamples, seed=seed)
    bins = {name: reliability(y, values, patients) for name, values in calibrated.items()}
    found = {
        "at_sensitivity": {
            "target": SENSITIVITY,
            "threshold": cut,
            "scores": scores.get("sensitive", _NOT_KNOWN),
        },
        "calibrations": {
            name: {
                **scores[name],
                **_line(y, calibrated[name], patients),
                "bins": bins[name].to_dict("records"),
                "curve": calibration_curve(y, calibrated[name], patients).to_dict("list"),
            }
            for name in calibrated
        },
    }
    return cast("CalibratedScores", plain(found))


def _fit(scores: dict[str, Any], test_set: TestSet, contender: ScoredHead) -> dict[str, Any]:
    """Return how well calibrated probabilities fit, the leading score first."""
    line = _line(test_set.y, contender.probability, test_set.patients)
    return {"brier": scores["brier"], **plain(line), "ece": scores["ece"]}


def _line(y: np.ndarray, probability: np.ndarray, patients: np.ndarray) -> dict[str, Interval]:
    line = calibration_line(y, probability, patients)
    return {name: line[name] for name in ("slope", "intercept")}


def _flat(block: dict[str, Any]) -> dict[str, Any]:
    return {**{name: value for name, value in block.items() if name != "scores"}, **block["scores"]}


def _by_auroc(row: ComparedHead) -> float:
    value = row["scores"]["auroc"]["value"]
    return float("inf") if value is None else -float(value)


def _count(test_set: TestSet) -> Counts:
    return {
        "n": len(test_set.units),
        "n_abnormal": int(test_set.y.sum()),
        "n_patients": int(test_set.units["patient"].nunique()),
    }


def _about(run: Run, name: str, dropped: int) -> ComparedRun:
    data = run.info.data
    about: ComparedRun = {
        "name": name,
        "left_out": data.left_out or 0,
        "left_out_test": data.left_out_test or 0,
        "unlabelled": data.unlabelled or 0,
        "dropped": dropped,
        "priors_of": None,
        "left_out_of": None,
        "copy_of": None,
    }
    if run.info.asked.target not in (None, LABEL):
        about["target"] = str(run.info.asked.target)
    if data.sought_test:
        about["sought_test"] = data.sought_test
    if run.info.lacking:
        about["lacking"] = run.info.lacking
    if run.info.without_suspects:
        about["without_suspects"] = run.info.without_suspects.model_dump()
    return about
