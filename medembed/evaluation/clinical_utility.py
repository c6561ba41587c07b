"""The value of decisions: net benefit over thresholds, and predictive values at a prevalence.

A decision curve compares a head with treating all or none (Vickers and Elkin, Medical Decision
Making 26, 2006): a threshold of t means that one detected study is worth (1 - t) / t false alarms.
"""

from collections.abc import Callable
from dataclasses import replace
from math import inf, isnan, nan

import numpy as np
import pandas as pd

from medembed.core.errors import TrainingDataError
from medembed.evaluation.bootstrap import CONFIDENCE, MIN_PATIENTS, patient_codes
from medembed.evaluation.bounds import Bounds, bound_ratio, quantile
from medembed.evaluation.estimates import Clusters, Estimate
from medembed.evaluation.scores import check_rows

__all__ = ["THRESHOLDS", "check_prevalence", "net_benefit", "predictive_values"]

_UNDECIDED = "sensitivity and specificity leave no row that it could be of"


def check_prevalence(prevalence: float) -> float:
    """Return the prevalence unchanged if predictive values can be computed at it.

    Raises
    ------
    TrainingDataError
        The prevalence is not above 0 and below 1.
    """
    if not 0 < prevalence < 1:
        raise TrainingDataError(
            f"prevalence {prevalence} is not above 0 and below 1; give the share of abnormal "
            "studies where the model is to be used, such as 0.1"
        )
    return float(prevalence)


def predictive_values(
    sensitivity: Estimate, specificity: Estimate, prevalence: float
) -> dict[str, Estimate]:
    """Return ``ppv`` and ``npv`` of a sensitivity and specificity at a prevalence.

    By Bayes' rule the odds of being right are the odds of the class times a ratio of shares,
    ``sensitivity / (1 - specificity)`` for PPV and ``specificity / (1 - sensitivity)`` for NPV.
    The ratio has MOVER limits from the limits of both shares (`bounds.bound_ratio`), which treat
    patients as clusters and have a width at 0 and 1. Mercaldo, Lau and Zhou (Statistics in
    Medicine 26, 2007) use the delta method on the log-odds, which gives no limits there.

    Parameters
    ----------
    sensitivity, specificity : Estimate
        From `estimates.estimate_scores`.
    prevalence : float
        The share of abnormal rows, in (0, 1), assumed known.

    Returns
    -------
    dict of str to Estimate
        NaN if a share is unknown, or if no row is called abnormal (PPV) or normal (NPV); without
        limits if one of the shares has none. The estimates have no counts.

    Raises
    ------
    TrainingDataError
        The prevalence is outside (0, 1).
    """
    odds = check_prevalence(prevalence) / (1 - prevalence)
    return {
        "ppv": _of_ratio(sensitivity, specificity, odds),
        "npv": _of_ratio(specificity, sensitivity, 1 / odds),
    }


def _of_ratio(right: Estimate, other: Estimate, odds: float) -> Estimate:
    """Return the share of correct calls of one kind, from the shares of both classes."""
    above, below = right.value, 1 - other.value
    if isnan(above) or isnan(below):
        reason = right.reason if isnan(above) else other.reason
        return Estimate(nan, reason=reason)
    if above == 0 and below == 0:
        return Estimate(nan, reason=_UNDECIDED)
    value = _share(above / below if below > 0 else inf, odds)
    if right.limits is None or other.limits is None:
        return Estimate(value, reason=right.reason if right.limits is None else other.reason)
    limits = _limits(right, other, odds)
    return replace(Estimate(value), limits=limits, method="mover-ratio")


def _limits(right: Estimate, other: Estimate, odds: float) -> Callable[[float], Bounds]:
    def limits(confidence: float) -> Bounds:
        own, opposite = right.interval(confidence), other.interval(confidence)
        low, high = bound_ratio(
            right.value,
            1 - other.value,
            (own.low, own.high),
            (1 - opposite.high, 1 - opposite.low),
        )
        return _share(low, odds), _share(high, odds)

    return limits


def _share(ratio: float, odds: float) -> float:
    return 1.0 if ratio == inf else ratio * odds / (1 + ratio * odds)


THRESHOLDS = np.arange(1, 100) / 100
"""Default thresholds of a decision curve."""


def net_benefit(
    y: np.ndarray,
    probability: np.ndarray,
    patients: np.ndarray,
    thresholds: np.ndarray = THRESHOLDS,
) -> pd.DataFrame:
    """Return the net benefit of calling abnormal at or above each threshold, with a 95 % band.

    Net benefit is ``TP / n - FP / n * t / (1 - t)``: the share detected, less the weighted false
    alarms. Its variance comes from each patient's contribution (see `estimates.influences`);
    limits are pointwise, by Student's t.

    Parameters
    ----------
    y, probability, patients : arrays of shape (n,)
        Labels 0 or 1, calibrated probabilities of abnormal, and each row's patient.
    thresholds : array of shape (k,)
        Thresholds in (0, 1).

    Returns
    -------
    DataFrame
        One row per threshold: `threshold`, `value`, `low`, `high`, `treat_all` (net benefit of
        calling every row abnormal; that of calling none is 0). NaN without rows; the limits are NaN
        with fewer than `MIN_PATIENTS` patients of a class, and if the variance cannot be estimated:
        no row is called abnormal, or no two patients differ.

    Raises
    ------
    TrainingDataError
        A threshold is outside (0, 1), or labels or probabilities are invalid; see `Scorer`.
    """
    labels, values = check_rows(y, probability)
    codes, cuts = patient_codes(patients), np.asarray(thresholds, np.float64)
    if len(codes) != len(labels):
        raise TrainingDataError(f"{len(labels)} labels, but {len(codes)} patients")
    if not ((cuts > 0) & (cuts < 1)).all():
        raise TrainingDataError("a threshold of net benefit is above 0 and below 1")
    prices, clusters = cuts / (1 - cuts), Clusters(labels, codes)
    found = [
        _estimate(labels, values >= cut, clusters, price)
        for cut, price in zip(cuts, prices, strict=True)
    ]
    share = labels.mean() if len(labels) else np.nan
    table = pd.DataFrame(found, columns=["value", "low", "high"], dtype=np.float64)
    table.insert(0, "threshold", cuts)
    return table.assign(treat_all=share - (1 - share) * prices)


def _estimate(
    labels: np.ndarray, called: np.ndarray, clusters: Clusters, price: float
) -> tuple[float, float, float]:
    n = len(labels)
    if n == 0:
        return np.nan, np.nan, np.nan
    gained = called * np.where(labels == 1, 1.0, -price)
    value = float(gained.mean())
    spread = clusters.measure_spread((gained - value) / n)
    if spread.fewest < MIN_PATIENTS or not spread.error > 0:
        return value, np.nan, np.nan
    freedom = min(spread.freedom, spread.fewest - 1)
    reach = quantile(CONFIDENCE, freedom) * spread.error
    return value, value - reach, value + reach
