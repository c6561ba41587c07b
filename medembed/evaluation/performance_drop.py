"""How much worse scores are on other patients than on a model's own test patients."""

from collections.abc import Callable, Mapping
from math import exp, isnan, log, nan, sqrt

import numpy as np
import pandas as pd
from scipy.optimize import brentq

from medembed.evaluation.bootstrap import CONFIDENCE, Interval, patient_codes
from medembed.evaluation.bounds import Bounds, combine
from medembed.evaluation.estimates import Estimate, estimate_scores
from medembed.evaluation.paired import Difference
from medembed.evaluation.scores import SCORES, Scorer

__all__ = ["estimate_difference", "mover_drop", "sample_drop"]

_SMALLEST_P = 1e-9


def sample_drop(
    internal: pd.DataFrame, external: pd.DataFrame, threshold: float
) -> dict[str, Difference]:
    """Return every score on external rows less that on internal ones.

    Parameters
    ----------
    internal, external : DataFrame
        `label` (0 or 1), `probability`, `patient`; no patient is in both.
    threshold : float
        Of the decision scores.

    Returns
    -------
    dict of str to Difference
        Below zero where the score is lower on external rows. The interval is that of `mover_drop`
        from the limits of `evaluation.estimates`; p is one less the confidence at which its end is
        zero. NaN where one side has no interval. ECE has neither: its noise is larger in the
        smaller sample, so that two samples of one population differ.

    Raises
    ------
    TrainingDataError
        As `Scorer`.
    """
    inside, outside = _estimate(internal, threshold), _estimate(external, threshold)
    return {name: estimate_difference(outside[name], inside[name]) for name in SCORES}


def estimate_difference(a: Estimate, b: Estimate, correlation: float = 0.0) -> Difference:
    """Return the score `a` less `b`, with the interval of MOVER from the limits of both.

    Parameters
    ----------
    a, b : Estimate
    correlation : float
        Of the two, in [-1, 1]; 0 where no patient is in both. Zou (Psychological Methods 12, 2007)
        subtracts ``2 r`` times the product of the distances below each root.

    Returns
    -------
    Difference
        p is one less the confidence at which the interval's end is zero. NaN where one of them has
        no interval.
    """
    value = a.value - b.value
    if a.limits is None or b.limits is None:
        return Difference(value, nan, nan, nan)

    def limits(confidence: float) -> Bounds:
        of_a, of_b = a.interval(confidence), b.interval(confidence)
        ends = (of_b.low, of_b.high), (of_a.low, of_a.high)
        return _ends(b.value, a.value, *ends, correlation)

    low, high = limits(CONFIDENCE)
    return _shown(value, low, high, _p_value(value, limits) if low < high else nan)


def mover_drop(
    internal: Mapping[str, Interval], external: Mapping[str, Interval]
) -> dict[str, Difference]:
    """Return external less internal scores, with intervals from both sides' own intervals.

    MOVER: with e in [le, ue] and i in [li, ui] of independent samples the ends are
    ``e - i - sqrt((e - le)² + (ui - i)²)`` and ``e - i + sqrt((ue - e)² + (i - li)²)`` (Zou and
    Donner, Statistics in Medicine 27, 2008). There is no p: NaN. ECE has no interval either.

    Parameters
    ----------
    internal, external : dict of str to Interval
        Scores that only one side has are left out.
    """
    found = {}
    for name in internal:
        if name in external:
            inside, outside = internal[name], external[name]
            ends = (inside.low, inside.high), (outside.low, outside.high)
            low, high = (nan, nan) if name == "ece" else _ends(inside.value, outside.value, *ends)
            found[name] = _shown(outside.value - inside.value, low, high, nan)
    return found


def _estimate(rows: pd.DataFrame, threshold: float) -> dict[str, Estimate]:
    y, probability = rows["label"].to_numpy(), rows["probability"].to_numpy(np.float64)
    found = estimate_scores(y, probability, threshold, patient_codes(rows["patient"]))
    scorer = Scorer(y, probability, threshold, ["ece"])
    return {**found, "ece": Estimate(float(scorer(np.ones((1, len(y))))["ece"][0]))}


def _ends(
    inside: float, outside: float, own: Bounds, other: Bounds, correlation: float = 0.0
) -> Bounds:
    """Return the ends of MOVER, NaN where a side has none."""
    if any(isnan(end) for end in (inside, outside, *own, *other)):
        return nan, nan
    value = outside - inside
    by_inside, by_outside = [outside - end for end in own], [end - inside for end in other]
    low, high = combine(value, [(by_inside[0], by_inside[1]), (by_outside[0], by_outside[1])])
    if correlation == 0:
        return low, high
    shared = 2 * correlation * (own[1] - inside) * (outside - other[0])
    low = value - sqrt(max((value - low) ** 2 - shared, 0.0))
    shared = 2 * correlation * (inside - own[0]) * (other[1] - outside)
    return low, value + sqrt(max((high - value) ** 2 - shared, 0.0))


def _shown(value: float, low: float, high: float, p: float) -> Difference:
    if not low < high:
        return Difference(value, nan, nan, nan)
    return Difference(value, low, high, p, "mover")


def _p_value(value: float, limits: Callable[[float], Bounds]) -> float:
    """Return 1 less the confidence at which an end is 0: the test that inverts the interval."""
    if value == 0:
        return 1.0

    def end(log_p: float) -> float:
        low, high = limits(1 - exp(log_p))
        return low if value > 0 else -high

    smallest, largest = log(_SMALLEST_P), log(1 - 1e-6)
    if end(smallest) > 0:
        return _SMALLEST_P
    return exp(brentq(end, smallest, largest, xtol=1e-4)) if end(largest) > 0 else 1.0
