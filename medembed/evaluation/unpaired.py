"""Differences between scores of different rows: between data sets, and between groups of one set.

A patient may have rows in several groups, such as a study before the fifth birthday and one after
it. The scores of two groups are then correlated through these patients' contributions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import exp, isnan, log, nan, sqrt

import numpy as np
import pandas as pd

from medembed.evaluation.bootstrap import CONFIDENCE, Interval, patient_codes
from medembed.evaluation.bounds import Bounds, combine
from medembed.evaluation.estimates import PREDICTIVE, Estimate, estimate_scores
from medembed.evaluation.paired import Difference, holm
from medembed.evaluation.scores import SCORES, Scorer

__all__ = [
    "GAP_SCORES",
    "GROUP_SCORES",
    "MOST_PAIRED",
    "Gap",
    "estimate_difference",
    "find_gaps",
    "invert_interval",
    "mover_drop",
    "sample_drop",
    "score_groups",
]

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
        The threshold of the decision scores.

    Returns
    -------
    dict of str to Difference
        Below zero if the score is lower on external rows. The interval is that of `mover_drop`
        from the limits of `evaluation.estimates`; p is one minus the confidence at which a limit
        is zero. NaN if one side has no interval. ECE has neither: its noise is larger in smaller
        samples, so that two samples of one population differ.

    Raises
    ------
    TrainingDataError
        Invalid labels or probabilities, or lengths that differ; see `Scorer`.
    """
    inside, outside = _estimate(internal, threshold), _estimate(external, threshold)
    return {name: estimate_difference(outside[name], inside[name]) for name in SCORES}


def estimate_difference(a: Estimate, b: Estimate, correlation: float = 0.0) -> Difference:
    """Return the score `a` less `b`, with the interval of MOVER from the limits of both.

    Parameters
    ----------
    a, b : Estimate
    correlation : float
        Correlation of the two scores, in [-1, 1]; 0 if no patient is in both. Zou (Psychological
        Methods 12, 2007) subtracts ``2 r`` times the product of the distances below each root.

    Returns
    -------
    Difference
        p is one minus the confidence at which the interval's limit is zero. NaN if either score
        has no interval.
    """
    value = a.value - b.value
    if a.limits is None or b.limits is None:
        return Difference(value, nan, nan, nan)

    def limits(confidence: float) -> Bounds:
        of_a, of_b = a.interval(confidence), b.interval(confidence)
        ends = (of_b.low, of_b.high), (of_a.low, of_a.high)
        return _ends(b.value, a.value, *ends, correlation)

    low, high = limits(CONFIDENCE)
    return _shown(value, low, high, invert_interval(value, limits) if low < high else nan)


def mover_drop(
    internal: Mapping[str, Interval], external: Mapping[str, Interval]
) -> dict[str, Difference]:
    """Return external less internal scores, with intervals from both sides' own intervals.

    MOVER: with e in [le, ue] and i in [li, ui] of independent samples the limits are
    ``e - i - sqrt((e - le)² + (ui - i)²)`` and ``e - i + sqrt((ue - e)² + (i - li)²)`` (Zou and
    Donner, Statistics in Medicine 27, 2008). p is NaN, and ECE has no interval either.

    Parameters
    ----------
    internal, external : dict of str to Interval
        Scores of each side; those that only one side has are left out.
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
    """Return MOVER limits, NaN if a side has none."""
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


def invert_interval(value: float, limits: Callable[[float], Bounds]) -> float:
    """Return the two-sided p that a value is 0: 1 minus the confidence at which a limit is 0."""
    if value == 0:
        return 1.0
    from scipy.optimize import brentq  # not earlier: most comparisons have no groups

    def end(log_p: float) -> float:
        low, high = limits(1 - exp(log_p))
        return low if value > 0 else -high

    smallest, largest = log(_SMALLEST_P), log(1 - 1e-6)
    if end(smallest) > 0:
        return _SMALLEST_P
    return exp(brentq(end, smallest, largest, xtol=1e-4)) if end(largest) > 0 else 1.0


GROUP_SCORES = (*(name for name in SCORES if name != "ece"), *PREDICTIVE)
"""The scores within a group: all except ECE, which noise inflates in smaller groups."""
GAP_SCORES = ("auroc", "sensitivity", "specificity", "brier")
MOST_PAIRED = 5
"""With more groups, each is compared with all others together instead of with every other."""


@dataclass(frozen=True)
class Gap:
    """A score in group `a` less that in `b`, with `p_holm` after Holm's correction.

    Values that cannot be estimated are NaN; `reason` explains why.
    """

    score: str
    a: str
    b: str
    found: Difference
    p_holm: float
    reason: str | None = None


def score_groups(
    y: np.ndarray,
    probability: np.ndarray,
    threshold: float,
    patients: np.ndarray,
    members: Mapping[str, np.ndarray],
) -> dict[str, dict[str, Estimate]]:
    """Return estimates of `GROUP_SCORES` within each group of rows.

    Parameters
    ----------
    y, probability, patients : arrays of shape (n,)
        Labels 0 or 1, probabilities of abnormal, and each row's patient.
    threshold : float
        Decisions are abnormal at or above it.
    members : dict of str to bool array of shape (n,)
        The rows of each group.

    Raises
    ------
    TrainingDataError
        Invalid labels or probabilities (see `Scorer`), or a row without a patient.
    """
    codes = patient_codes(patients)
    size = int(codes.max()) + 1 if len(codes) else 0
    return {
        name: estimate_scores(
            y[own], probability[own], threshold, codes[own], GROUP_SCORES, n_patients=size
        )
        for name, own in members.items()
    }


def find_gaps(
    groups: Mapping[str, Mapping[str, Estimate]],
    others: Mapping[str, Mapping[str, Estimate]],
    name_of_others: str,
    scores: Sequence[str] = GAP_SCORES,
) -> list[Gap]:
    """Return the gaps of one head in each of the scores between all its groups.

    Parameters
    ----------
    groups : dict of str to dict of str to Estimate
        From `score_groups`, with parts over one set of patients.
    others : dict of str to dict of str to Estimate
        For each group the scores of all other groups' rows together, used for comparison if there
        are more than `MOST_PAIRED` groups, and ignored otherwise.
    name_of_others : str
        The value of `Gap.b` in that case.
    scores : sequence of str
        The scores to compare, all in `groups`.

    Returns
    -------
    list of Gap
        The interval is MOVER's from the groups' own limits (Zou and Donner, Statistics in Medicine
        27, 2008), with the correlation due to patients in both groups (Zou, Psychological Methods
        12, 2007); p is one minus the confidence at which a limit is 0. Holm's correction covers
        all gaps.
    """
    pairs: list[tuple[str, str, Mapping[str, Estimate], Mapping[str, Estimate]]]
    if len(groups) > MOST_PAIRED:
        pairs = [(name, name_of_others, own, others[name]) for name, own in groups.items()]
    else:
        pairs = [(a, b, groups[a], groups[b]) for a, b in combinations(groups, 2)]
    asked = [(score, *pair) for score in scores for pair in pairs]
    found = [_compare(one[score], other[score]) for score, _, _, one, other in asked]
    adjusted = holm([own.p for own in found])
    return [
        Gap(score, a, b, own, float(p), _why_none([(a, one[score]), (b, other[score])], own))
        for (score, a, b, one, other), own, p in zip(asked, found, adjusted, strict=True)
    ]


def _compare(a: Estimate, b: Estimate) -> Difference:
    return estimate_difference(a, b, correlation=_correlate(a.parts, b.parts))


def _correlate(a: np.ndarray, b: np.ndarray) -> float:
    """Return the correlation of two scores from the patients' contributions to each, (I,)."""
    size = sqrt(float(a @ a) * float(b @ b))
    return 0.0 if isnan(size) or size == 0 else float(a @ b) / size


def _why_none(sides: Sequence[tuple[str, Estimate]], found: Difference) -> str | None:
    """Return which groups have no interval and why, if their gap has none."""
    if found.method is not None:
        return None
    told = [f"{name}: {own.reason}" for name, own in sides if own.reason is not None]
    return "; ".join(told) or "the rows do not tell how far the difference varies"
