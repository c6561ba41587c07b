"""Intervals from a bootstrap over patients, and the paired tests that rest on the same draws."""

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from medembed.errors import TrainingDataError
from medembed.evaluation.paired import Difference, holm, paired_difference, paired_differences
from medembed.evaluation.resampling import (
    CONFIDENCE,
    Interval,
    draw,
    finite_or_none,
    patient_codes,
    percentiles,
)
from medembed.evaluation.scores import DECISION_SCORES, SCORES, Scorer

__all__ = [
    "Difference",
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
    """Return every score with its 95 % interval from a bootstrap over patients.

    Parameters
    ----------
    y, probability : arrays of shape (n,)
        Labels 0 or 1 and probabilities of abnormal, one row per study (or per image).
    patients : array of shape (n,)
        Whose row it is; any values that compare equal for one patient.
    threshold : float
        Decisions are abnormal at or above it.
    n_resamples, seed : int
        How many resamples are drawn, and from which stream.

    Returns
    -------
    dict of str to Interval, in the order of `SCORES`

    Raises
    ------
    TrainingDataError
        As `Scorer`.
    """
    scorer = Scorer(y, probability, threshold)
    codes = patient_codes(patients)
    return _intervals([scorer], [np.arange(len(codes))], codes, n_resamples, seed)[0]


class Variant(NamedTuple):
    """Probabilities of the rows (n,), the threshold of decisions, and the scores wanted."""

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
    """Return the scores of several predictions of the same rows, all on the same resamples.

    Parameters and errors are those of `bootstrap_scores`.
    """
    scorers = [Scorer(y, *variant) for variant in variants.values()]
    codes = patient_codes(patients)
    members = [np.arange(len(codes))] * len(scorers)
    found = _intervals(scorers, members, codes, n_resamples, seed)
    return dict(zip(variants, found, strict=True))


def bootstrap_report(
    rows: pd.DataFrame,
    threshold: float,
    *,
    n_resamples: int = 2000,
    seed: int = 0,
    by: Sequence[str] = ("region", "n_views"),
) -> dict[str, Any]:
    """Return scores with intervals overall, per group, and as the mean over regions.

    Parameters
    ----------
    rows : DataFrame
        One row per study as `by_study` makes them, or per image: `patient`, `label` (missing or -1
        where unknown), `probability`, and the columns of `by`.
    threshold : float
        The threshold of the decision scores.
    n_resamples, seed : int
        As for `bootstrap_scores`; all parts share the resamples.
    by : sequence of str
        Columns that split the rows; `n_views` is split into 1, 2 and 3+. Those that `rows` does
        not have are passed over.

    Returns
    -------
    dict
        `threshold`, `n_resamples`, `seed`, `confidence`, `n_unlabelled` (rows left out), `overall`
        (a block), for each column of `by` a dict of blocks by value, and with `region`
        `mean_over_regions`. A block holds `n`, `n_abnormal`, `n_patients`, `scores` (name to
        `Interval`) and `at_half` (the decision scores at 0.5). `mean_over_regions` holds `scores`
        and `at_half`, `n_regions`, and `left_out`: the regions of one class, which have no AUROC.
        `plain` makes it fit for JSON.

    Raises
    ------
    TrainingDataError
        No row has a label, or as `Scorer`.
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
    """Return a report fit for JSON: intervals as dicts, NaN as None, numpy numbers as Python's."""
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
    """Return the blocks of a report; every group has two scorers, the second one for 0.5."""
    scorers, members = _scorers(rows, list(groups.values()), threshold)
    estimable = _two_class_regions(rows["label"].to_numpy(), groups)
    means = [[2 * k + part for k in estimable] for part in (0, 1)]
    codes = patient_codes(rows["patient"])
    found = _intervals(scorers, members, codes, n_resamples, seed, means=means)
    parts: dict[str, Any] = {}
    for k, ((column, name), chosen) in enumerate(groups.items()):
        block = _block(rows.iloc[chosen], found[2 * k], found[2 * k + 1])
        if column == "overall":
            parts["overall"] = block
        else:
            parts.setdefault(column, {})[name] = block
    regions = {k: name for k, (column, name) in enumerate(groups) if column == "region"}
    if regions:
        parts["mean_over_regions"] = {
            "n_regions": len(estimable),
            "left_out": [name for k, name in regions.items() if k not in estimable],
            "scores": found[-2] or dict.fromkeys(SCORES, Interval(nan, nan, nan)),
            "at_half": found[-1] or dict.fromkeys(DECISION_SCORES, Interval(nan, nan, nan)),
        }
    return parts


def _intervals(
    scorers: Sequence[Scorer],
    members: Sequence[np.ndarray],
    codes: np.ndarray,
    n_resamples: int,
    seed: int,
    means: Sequence[Sequence[int]] = (),
) -> list[dict[str, Interval]]:
    """Return a dict of intervals per scorer, then one per mean over scorers ({} over none)."""
    truth, draws = draw(scorers, members, codes, n_resamples, seed)
    n_patients = [len(np.unique(codes[rows])) for rows in members]
    for group in means:
        names = scorers[group[0]].names if group else ()
        truth.append({name: float(np.mean([truth[k][name] for k in group])) for name in names})
        draws.append({name: np.mean([draws[k][name] for k in group], axis=0) for name in names})
        n_patients.append(max((n_patients[k] for k in group), default=0))
    return [
        {name: _interval(name, value, drawn[name], n) for name, value in values.items()}
        for values, drawn, n in zip(truth, draws, n_patients, strict=True)
    ]


def _interval(name: str, value: float, draws: np.ndarray, n_patients: int) -> Interval:
    if n_patients < 2:
        return Interval(value, nan, nan)
    # ECE sums absolute values: the noise that a resample adds to every bin counts as error, and
    # the plain percentile interval of a well calibrated head lies above its own ECE
    return Interval(value, *percentiles(value, draws, centred=name == "ece"))


def _groups(rows: pd.DataFrame, by: Sequence[str]) -> dict[tuple[str, str], np.ndarray]:
    groups = {("overall", ""): np.arange(len(rows))}
    for column in by:
        values = rows[column].map(_views) if column == "n_views" else rows[column].astype(str)
        for name in sorted(values.unique()):
            groups[column, name] = np.flatnonzero((values == name).to_numpy())
    return groups


def _views(n_views: int) -> str:
    return str(n_views) if n_views < 3 else "3+"


def _scorers(
    rows: pd.DataFrame, groups: Sequence[np.ndarray], threshold: float
) -> tuple[list[Scorer], list[np.ndarray]]:
    """Return two scorers per group (all scores; decisions at 0.5) and the rows of each."""
    y, probability = rows["label"].to_numpy(), rows["probability"].to_numpy(np.float64)
    scorers, members = [], []
    for group in groups:
        scorers.append(Scorer(y[group], probability[group], threshold, SCORES))
        scorers.append(Scorer(y[group], probability[group], 0.5, DECISION_SCORES))
        members += [group, group]
    return scorers, members


def _two_class_regions(y: np.ndarray, groups: Mapping[tuple[str, str], np.ndarray]) -> list[int]:
    """Return which groups are regions with both classes."""
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
