"""How much worse scores are on other patients than on a model's own test patients."""

from collections.abc import Callable, Mapping
from math import exp, isnan, log, nan

import numpy as np
import pandas as pd
from scipy.optimize import brentq

from medembed.evaluation.bounds import Bounds, combine
from medembed.evaluation.estimates import Estimate, estimate_scores
from medembed.evaluation.paired import Difference
from medembed.evaluation.resampling import CONFIDENCE, Interval, patient_codes
from medembed.evaluation.scores import SCORES, Scorer

__all__ = ["mover_drop", "sample_drop"]

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
    return {name: _difference(inside[name], outside[name]) for name in SCORES}


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


def _difference(inside: Estimate, outside: Estimate) -> Difference:
    value = outside.value - inside.value
    if inside.limits is None or outside.limits is None:
        return Difference(value, nan, nan, nan)

    def limits(confidence: float) -> Bounds:
        sides = (inside.interval(confidence), outside.interval(confidence))
        return _ends(inside.value, outside.value, *((own.low, own.high) for own in sides))

    low, high = limits(CONFIDENCE)
    return _shown(value, low, high, _p_value(value, limits) if not isnan(low) else nan)


def _ends(inside: float, outside: float, own: Bounds, other: Bounds) -> Bounds:
    """Return the ends of MOVER, NaN where a side has none."""
    if any(isnan(end) for end in (inside, outside, *own, *other)):
        return nan, nan
    by_inside, by_outside = [outside - end for end in own], [end - inside for end in other]
    return combine(outside - inside, [(by_inside[0], by_inside[1]), (by_outside[0], by_outside[1])])


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
