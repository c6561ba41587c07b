"""Intervals and paired tests from a bootstrap over patients.

Views and studies of one patient are not independent, so whole patients are drawn with replacement
(the cluster bootstrap; Davison and Hinkley, Bootstrap Methods and Their Application, 1997, 3.8).
The same seed and patients give the same resamples, so that every number of a report, and every
head of a comparison, is judged on the same draws.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from medembed.errors import TrainingDataError
from medembed.evaluation.scores import DECISION_SCORES, SCORES, Scorer

__all__ = [
    "CONFIDENCE",
    "MAX_DROPPED_SHARE",
    "Difference",
    "Interval",
    "bootstrap_report",
    "bootstrap_scores",
    "holm",
    "paired_difference",
    "paired_differences",
    "plain",
]

CONFIDENCE = 0.95
#: Resamples without a class are dropped; where more than this share is, no interval is given. At
#: one tenth, a class wants about three patients (exp(-3) = 5 % of resamples miss all of them).
MAX_DROPPED_SHARE = 0.1
#: Weights held at a time: 2 M float64 are 16 MB, and a handful of such arrays live at once.
_CHUNK_ELEMENTS = 2_000_000


@dataclass(frozen=True)
class Interval:
    """A score and its 95 % percentile interval; NaN where not estimable.

    The value is that of the data, not the resamples' mean. `low` and `high` are NaN alone where
    the value exists but too few patients stand behind it.
    """

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float | None]:
        """Return `value`, `low`, `high` with None for what is not estimable."""
        return {"value": _none(self.value), "low": _none(self.low), "high": _none(self.high)}


@dataclass(frozen=True)
class Difference:
    """A difference a - b between two sets of predictions on the same rows; NaN: not estimable."""

    difference: float
    low: float
    high: float
    p: float

    def as_dict(self) -> dict[str, float | None]:
        """Return `difference`, `low`, `high`, `p` with None for what is not estimable."""
        return {name: _none(getattr(self, name)) for name in ("difference", "low", "high", "p")}


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
    codes = _codes(patients)
    return _intervals([scorer], [np.arange(len(codes))], codes, n_resamples, seed)[0]


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
    scorers, members = _scorers(known, list(groups.values()), threshold)
    means = _region_members(known["label"].to_numpy(), groups)
    codes = _codes(known["patient"])
    found = _intervals(scorers, members, codes, n_resamples, seed, means=_doubled(means))
    report: dict[str, Any] = {
        "threshold": float(threshold),
        "n_resamples": n_resamples,
        "seed": seed,
        "confidence": CONFIDENCE,
        "n_unlabelled": int((labels < 0).sum()),
    }
    for k, ((column, name), rows_of_group) in enumerate(groups.items()):
        block = _block(known.iloc[rows_of_group], found[2 * k], found[2 * k + 1])
        if column == "overall":
            report["overall"] = block
        else:
            report.setdefault(column, {})[name] = block
    if "region" in report:
        report["mean_over_regions"] = {
            "n_regions": len(means),
            "left_out": [
                name
                for k, (column, name) in enumerate(groups)
                if column == "region" and k not in means
            ],
            "scores": found[-2],
            "at_half": found[-1],
        }
    return report


def paired_difference(
    y: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    patients: np.ndarray,
    *,
    n_resamples: int = 2000,
    seed: int = 0,
    score: str = "auroc",
    thresholds: tuple[float, float] = (0.5, 0.5),
) -> Difference:
    """Return the difference in a score between predictions `a` and `b` of the same rows.

    Both are scored on the same resamples of patients. Formula and sources: `paired_differences`.
    """
    pair = paired_differences(
        y,
        {"a": a, "b": b},
        patients,
        n_resamples=n_resamples,
        seed=seed,
        score=score,
        thresholds=dict(zip("ab", thresholds, strict=True)),
    )
    return pair["a", "b"]


def paired_differences(
    y: np.ndarray,
    probabilities: Mapping[str, np.ndarray],
    patients: np.ndarray,
    *,
    n_resamples: int = 2000,
    seed: int = 0,
    score: str = "auroc",
    thresholds: Mapping[str, float] | None = None,
) -> dict[tuple[str, str], Difference]:
    """Return the difference in a score for every pair of heads, each scored once per resample.

    Parameters
    ----------
    y, patients : arrays of shape (n,)
        Labels 0 or 1, and whose row it is.
    probabilities : dict of str to array of shape (n,)
        Each head's probabilities on the same rows.
    n_resamples, seed, score
        As for `bootstrap_scores`; `score` is one of `SCORES`.
    thresholds : dict of str to float, optional
        Each head's threshold, for the decision scores; 0.5 where not given.

    Returns
    -------
    dict of (a, b) to Difference, in the order of `itertools.combinations`
        With d the differences a - b of the B resamples, `low` and `high` are the percentile
        interval and ``p = min(1, 2 * (min(#{d <= 0}, #{d >= 0}) + 1) / (B + 1))``: the test that
        inverts the percentile interval (Efron and Tibshirani, An Introduction to the Bootstrap,
        1993, chapters 13 and 15), with one added so that p is never zero (Davison and Hinkley 1997,
        4.2). Predictions that are the same differ by 0 with p = 1. Not corrected for the number of
        pairs: see `holm`.
    """
    cuts = thresholds or {}
    scorers = [
        Scorer(y, probability, cuts.get(name, 0.5), [score])
        for name, probability in probabilities.items()
    ]
    codes = _codes(patients)
    everyone = np.arange(len(codes))
    truth, draws = _draw(scorers, [everyone] * len(scorers), codes, n_resamples, seed)
    return {
        (a, b): _difference(truth[i][score] - truth[j][score], draws[i][score] - draws[j][score])
        for (i, a), (j, b) in combinations(enumerate(probabilities), 2)
    }


def holm(p: Sequence[float]) -> np.ndarray:
    """Return Holm's step-down adjusted p-values, in the order given (float64, NaN stays NaN).

    The k-th smallest of m is multiplied by m - k + 1, made monotone, and cut at 1 (Holm,
    Scandinavian Journal of Statistics 6, 1979). NaN is no test: it does not count in m.
    """
    values = np.asarray(p, dtype=np.float64)
    adjusted = np.full(values.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(values))
    order = tested[np.argsort(values[tested], kind="stable")]
    scaled = values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted


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
    return _none(report) if isinstance(report, float) else report


def _none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _codes(patients: Any) -> np.ndarray:
    codes, _ = pd.factorize(np.asarray(patients))
    if (codes < 0).any():
        raise TrainingDataError(f"{int((codes < 0).sum())} rows have no patient to resample by")
    return codes


def _weights(codes: np.ndarray, n_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield row weights (chunk, n): how often each row's patient was drawn."""
    generator = np.random.default_rng(seed)
    n_patients = int(codes.max()) + 1 if len(codes) else 0
    size = max(1, _CHUNK_ELEMENTS // max(len(codes), 1))
    for start in range(0, n_resamples, size):
        n = min(size, n_resamples - start)
        drawn = generator.integers(0, n_patients, size=(n, n_patients))
        drawn += np.arange(n)[:, None] * n_patients
        counts = np.bincount(drawn.ravel(), minlength=n * n_patients).reshape(n, n_patients)
        yield counts.astype(np.float64)[:, codes]


def _draw(
    scorers: Sequence[Scorer],
    members: Sequence[np.ndarray],
    codes: np.ndarray,
    n_resamples: int,
    seed: int,
) -> tuple[list[dict[str, float]], list[dict[str, np.ndarray]]]:
    """Return each scorer's scores on the data, and on every resample (B,)."""
    truth = [
        {name: float(value[0]) for name, value in scorer(np.ones((1, len(rows)))).items()}
        for scorer, rows in zip(scorers, members, strict=True)
    ]
    parts: list[list[dict[str, np.ndarray]]] = [[] for _ in scorers]
    for weights in _weights(codes, n_resamples, seed):
        for part, scorer, rows in zip(parts, scorers, members, strict=True):
            part.append(scorer(weights if len(rows) == len(codes) else weights[:, rows]))
    draws = [
        {name: np.concatenate([chunk[name] for chunk in part]) for name in scorer.names}
        for part, scorer in zip(parts, scorers, strict=True)
    ]
    return truth, draws


def _intervals(
    scorers: Sequence[Scorer],
    members: Sequence[np.ndarray],
    codes: np.ndarray,
    n_resamples: int,
    seed: int,
    means: Sequence[Sequence[int]] = (),
) -> list[dict[str, Interval]]:
    """Return one dict of intervals per scorer, then one per mean over scorers in `means`."""
    truth, draws = _draw(scorers, members, codes, n_resamples, seed)
    n_patients = [len(np.unique(codes[rows])) for rows in members]
    found = [
        {name: _interval(value, draw[name], n) for name, value in values.items()}
        for values, draw, n in zip(truth, draws, n_patients, strict=True)
    ]
    for group in means:
        names = scorers[group[0]].names if group else ()
        found.append(
            {
                name: _interval(
                    float(np.mean([truth[k][name] for k in group])),
                    np.mean([draws[k][name] for k in group], axis=0),
                    max(n_patients[k] for k in group),
                )
                for name in names
            }
        )
    return found


def _interval(value: float, draws: np.ndarray, n_patients: int) -> Interval:
    low, high = _percentiles(value, draws) if n_patients > 1 else (math.nan, math.nan)
    return Interval(value, low, high)


def _percentiles(value: float, draws: np.ndarray) -> tuple[float, float]:
    kept = draws[~np.isnan(draws)]
    if math.isnan(value) or len(kept) < (1 - MAX_DROPPED_SHARE) * len(draws) or len(kept) == 0:
        return math.nan, math.nan
    low, high = np.quantile(kept, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _difference(value: float, draws: np.ndarray) -> Difference:
    low, high = _percentiles(value, draws)
    if math.isnan(low):
        return Difference(value, low, high, math.nan)
    kept = draws[~np.isnan(draws)]
    smaller = min(int((kept <= 0).sum()), int((kept >= 0).sum()))
    return Difference(value, low, high, min(1.0, 2 * (smaller + 1) / (len(kept) + 1)))


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


def _region_members(y: np.ndarray, groups: Mapping[tuple[str, str], np.ndarray]) -> list[int]:
    """Return which groups are regions with both classes."""
    return [
        k
        for k, ((column, _), rows) in enumerate(groups.items())
        if column == "region" and len(np.unique(y[rows])) == 2
    ]


def _doubled(groups: Sequence[int]) -> list[list[int]]:
    """Return the scorers of `groups`, whose decisions at 0.5 stand beside all their scores."""
    return [[2 * k for k in groups], [2 * k + 1 for k in groups]]


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
