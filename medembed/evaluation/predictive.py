"""Predictive values where abnormal is more or less common than in the rows at hand."""

from collections.abc import Callable
from dataclasses import replace
from math import inf, isnan, nan

from medembed.core.errors import TrainingDataError
from medembed.evaluation.bounds import Bounds, bound_ratio
from medembed.evaluation.estimates import Estimate

__all__ = ["check_prevalence", "predictive_values"]

_UNDECIDED = "sensitivity and specificity leave no row that it could be of"


def check_prevalence(prevalence: float) -> float:
    """Return a share of abnormal studies that predictive values can be had at.

    Raises
    ------
    TrainingDataError
        It is not above 0 and below 1.
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
    Limits of that ratio are MOVER's from the limits of both shares (`bounds.bound_ratio`), which
    know of patients as clusters and have a width at 0 and 1. Mercaldo, Lau and Zhou (Statistics in
    Medicine 26, 2007) take the delta method on the log-odds, which has no limits there.

    Parameters
    ----------
    sensitivity, specificity : Estimate
        From `estimates.estimate_scores`.
    prevalence : float
        The share of abnormal rows, in (0, 1), taken as known.

    Returns
    -------
    dict of str to Estimate
        NaN where a share is not known, or nothing is called abnormal (PPV) or normal (NPV); without
        limits where one of the shares has none. They have no counts.

    Raises
    ------
    TrainingDataError
        A prevalence outside (0, 1).
    """
    odds = check_prevalence(prevalence) / (1 - prevalence)
    return {
        "ppv": _of_ratio(sensitivity, specificity, odds),
        "npv": _of_ratio(specificity, sensitivity, 1 / odds),
    }


def _of_ratio(right: Estimate, other: Estimate, odds: float) -> Estimate:
    """Return the share right among those called so, from the shares of both classes."""
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
