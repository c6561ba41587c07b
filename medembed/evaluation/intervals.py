"""Scores with their intervals, overall and by group, with patients as clusters.

Only ECE is resampled; the other scores are estimated, see `evaluation.estimates`.
"""

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from medembed.core.errors import TrainingDataError
from medembed.evaluation.bootstrap import (
    CONFIDENCE,
    Interval,
    draw,
    finite_or_none,
    patient_codes,
    upper_bound,
)
from medembed.evaluation.estimates import Estimate, estimate_scores, mean_estimate
from medembed.evaluation.paired import Difference, holm, paired_difference, paired_differences
from medembed.evaluation.scores import DECISION_SCORES, SCORES, Scorer

__all__ = [
    "Interval",
    "Variant",
    "bootstrap_report",
    "bootstrap_scores",
    "bootstrap_variants",
    "holm",
    "paired_difference",
    "paired_differences",
    "plain",
]


def bootstrap_scores(
    y: np.ndarray,
    probability: np.ndarray,
    patients: np.ndarray,
    threshold: float,
    *,
    n_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return every score with its 95 % interval, patients as clusters.

    Parameters
    ----------
    y, probability : arrays of shape (n,)
        Labels 0 or 1 and probabilities of abnormal, one row per study (or per image).
    patients : array of shape (n,)
        Each row's patient; any values that compare equal for one patient.
    threshold : float
        Decisions are abnormal at or above it.
    n_resamples, seed : int
        Number of resamples of patients for ECE's bound, and their random seed.

    Returns
    -------
    dict of str to Interval, in the order of `SCORES`
        Each names its method, see `evaluation.estimates`. ECE has only an upper bound: `low` is
        NaN. With fewer than `MIN_PATIENTS` patients of a class, or one probability for all rows,
        both limits are NaN and `reason` is set.

    Raises
    ------
    TrainingDataError
        Invalid labels or probabilities, or lengths that differ; see `Scorer`.
    """
    variants = {"": Variant(probability, threshold)}
    return bootstrap_variants(y, variants, patients, n_resamples=n_resamples, seed=seed)[""]


class Variant(NamedTuple):
    """Probabilities of the rows (n,), the decision threshold, and the requested scores."""

    probability: np.ndarray
    threshold: float
    names: Sequence[str] = SCORES


def bootstrap_variants(
    y: np.ndarray,
    variants: Mapping[str, Variant],
    patients: np.ndarray,
    *,
    n_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, Interval]]:
    """Return the scores of several predictions of one set of rows.

    Parameters and errors are those of `bootstrap_scores`.
    """
    codes, labels = patient_codes(patients), np.asarray(y)
    values = {
        name: np.asarray(variant.probability, np.float64)
        for name, variant in variants.items()
        if "ece" in variant.names
    }
    estimates = {
        name: _estimate(variant, labels, codes, _size(codes)) for name, variant in variants.items()
    }
    rows = [(own, np.arange(len(codes))) for own in values.values()]
    bounds = _bound_errors(labels, rows, codes, (), n_resamples, seed) if rows else []
    errors = dict(zip(values, bounds, strict=True))
    nothing = Interval(nan, nan, nan)
    return {name: _intervals(own, errors.get(name, nothing)) for name, own in estimates.items()}


def bootstrap_report(
    rows: pd.DataFrame,
    threshold: float,
    *,
    n_resamples: int = 2000,
    seed: int = 0,
    by: Sequence[str] = ("region", "n_views"),
) -> dict[str, object]:
    """Return scores with intervals overall, per group, and as the mean over regions.

    Parameters
    ----------
    rows : DataFrame
        One row per study as returned by `by_study`, or per image: `patient`, `label` (missing or
        -1 if unknown), `probability`, and the columns of `by`.
    threshold : float
        The threshold of the decision scores.
    n_resamples, seed : int
        See `bootstrap_scores`.
    by : sequence of str
        Columns to group by; `n_views` is grouped into 1, 2 and 3+. Columns that `rows` lacks are
        ignored.

    Returns
    -------
    dict
        `threshold`, `n_resamples`, `seed`, `confidence`, `n_unlabelled` (rows left out), `overall`
        (a block), for each column of `by` a dict of blocks by value, and with `region`
        `mean_over_regions`. A block holds `n`, `n_abnormal`, `n_patients`, `scores` (name to
        `Interval`) and `at_half` (the decision scores at 0.5). `mean_over_regions` holds `scores`
        and `at_half`, `n_regions`, and `left_out`: the regions of one class, which have no AUROC.
        `plain` converts the report to JSON values.

    Raises
    ------
    TrainingDataError
        No row has a label, or labels or probabilities are invalid; see `Scorer`.
    """
    labels = rows["label"].astype("Int8").fillna(-1).to_numpy(dtype=np.int8)
    known = rows[labels >= 0].assign(label=labels[labels >= 0])
    if known.empty:
        raise TrainingDataError("no row has a label, so nothing can be scored")
    groups = _groups(known, [column for column in by if column in known])
    report: dict[str, Any] = {
        "threshold": float(threshold),
        "n_resamples": n_resamples,
        "seed": seed,
        "confidence": CONFIDENCE,
        "n_unlabelled": int((labels < 0).sum()),
    }
    return report | _parts(known, groups, threshold, n_resamples, seed)


def plain(report: Any) -> Any:
    """Return a report as JSON values: intervals as dicts, NaN as None, plain Python numbers."""
    if isinstance(report, (Interval, Difference)):
        return report.as_dict()
    if isinstance(report, Mapping):
        return {str(key): plain(value) for key, value in report.items()}
    if isinstance(report, (list, tuple)):
        return [plain(value) for value in report]
    if isinstance(report, np.generic):
        report = report.item()
    return finite_or_none(report) if isinstance(report, float) else report


def _parts(
    rows: pd.DataFrame,
    groups: Mapping[tuple[str, str], np.ndarray],
    threshold: float,
    n_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Return the blocks of a report; every group is scored twice, the second time at 0.5."""
    y, probability = rows["label"].to_numpy(), rows["probability"].to_numpy(np.float64)
    codes, members = patient_codes(rows["patient"]), list(groups.values())
    estimable = _two_class_regions(y, groups)
    scored = [(probability, chosen) for chosen in members]
    errors = _bound_errors(y, scored, codes, (estimable,), n_resamples, seed)
    found = [
        _estimate(Variant(probability[chosen], cut, names), y[chosen], codes[chosen], _size(codes))
        for chosen in members
        for cut, names in ((threshold, SCORES), (0.5, DECISION_SCORES))
    ]
    parts: dict[str, Any] = {}
    for k, ((column, name), chosen) in enumerate(groups.items()):
        scores, at_half = (_intervals(own, errors[k]) for own in found[2 * k : 2 * k + 2])
        block = _block(rows.iloc[chosen], scores, at_half)
        if column == "overall":
            parts["overall"] = block
        else:
            parts.setdefault(column, {})[name] = block
    regions = {k: name for k, (column, name) in enumerate(groups) if column == "region"}
    if regions:
        names = [regions[k] for k in estimable]
        means = [_mean([found[2 * k + part] for k in estimable], names) for part in (0, 1)]
        nothing = Interval(nan, nan, nan)
        parts["mean_over_regions"] = {
            "n_regions": len(estimable),
            "left_out": [name for k, name in regions.items() if k not in estimable],
            "scores": _intervals(means[0], errors[-1]) or dict.fromkeys(SCORES, nothing),
            "at_half": _intervals(means[1], errors[-1]) or dict.fromkeys(DECISION_SCORES, nothing),
        }
    return parts


def _estimate(
    variant: Variant, y: np.ndarray, codes: np.ndarray, n_patients: int
) -> dict[str, Estimate | None]:
    """Return estimates of the requested scores in their order, None for ECE."""
    found = estimate_scores(
        y, variant.probability, variant.threshold, codes, variant.names, n_patients
    )
    return {name: found.get(name) for name in variant.names}


def _size(codes: np.ndarray) -> int:
    return int(codes.max()) + 1 if len(codes) else 0


def _mean(
    groups: Sequence[Mapping[str, Estimate | None]], names: Sequence[str]
) -> dict[str, Estimate | None]:
    """Return the mean of each score over groups, or {} without groups."""
    found: dict[str, Estimate | None] = {}
    for score in groups[0] if groups else ():
        own = [one for group in groups if (one := group[score]) is not None]
        found[score] = mean_estimate(own, names) if own else None
    return found


def _intervals(found: Mapping[str, Estimate | None], error: Interval) -> dict[str, Interval]:
    return {name: error if own is None else own.interval() for name, own in found.items()}


def _bound_errors(
    y: np.ndarray,
    scored: Sequence[tuple[np.ndarray, np.ndarray]],
    codes: np.ndarray,
    means: Sequence[Sequence[int]],
    n_resamples: int,
    seed: int,
) -> list[Interval]:
    """Return ECE with its upper bound for each group of rows, then for means over some groups.

    A group is probabilities of all rows, and which of the rows it holds. Resamples are drawn once
    for all of them.
    """
    scorers = [Scorer(y[rows], probability[rows], 0.5, ["ece"]) for probability, rows in scored]
    members = [rows for _, rows in scored]
    truth, draws = draw(scorers, members, codes, n_resamples, seed)
    values = [own["ece"] for own in truth]
    drawn = [own["ece"] for own in draws]
    n_patients = [len(np.unique(codes[rows])) for rows in members]
    for group in means:
        values.append(float(np.mean([values[k] for k in group])) if group else nan)
        drawn.append(np.mean([drawn[k] for k in group], axis=0) if group else np.empty(0))
        n_patients.append(min((n_patients[k] for k in group), default=0))
    is_constant = [len(rows) > 0 and np.ptp(own[rows]) == 0 for own, rows in scored]
    is_constant += [all(is_constant[k] for k in group) for group in means]
    return [upper_bound(*own) for own in zip(values, drawn, n_patients, is_constant, strict=True)]


def _groups(rows: pd.DataFrame, by: Sequence[str]) -> dict[tuple[str, str], np.ndarray]:
    groups = {("overall", ""): np.arange(len(rows))}
    for column in by:
        values = rows[column].map(_views) if column == "n_views" else rows[column].astype(str)
        for name in sorted(values.unique()):
            groups[column, name] = np.flatnonzero((values == name).to_numpy())
    return groups


def _views(n_views: int) -> str:
    return str(n_views) if n_views < 3 else "3+"


def _two_class_regions(y: np.ndarray, groups: Mapping[tuple[str, str], np.ndarray]) -> list[int]:
    """Return the indices of the groups that are regions with both classes."""
    return [
        k
        for k, ((column, _), rows) in enumerate(groups.items())
        if column == "region" and len(np.unique(y[rows])) == 2
    ]


def _block(
    rows: pd.DataFrame, scores: dict[str, Interval], at_half: dict[str, Interval]
) -> dict[str, Any]:
    return {
        "n": len(rows),
        "n_abnormal": int((rows["label"] == 1).sum()),
        "n_patients": int(rows["patient"].nunique()),
        "scores": scores,
        "at_half": at_half,
    }
