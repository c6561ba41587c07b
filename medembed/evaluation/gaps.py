"""Scores within groups of test rows, and how much they differ between groups.

A patient may have rows in several groups: a study before the fifth birthday and one after it. The
scores of two groups then hang together, by what those patients add to both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import isnan, sqrt

import numpy as np

from medembed.evaluation.bootstrap import patient_codes
from medembed.evaluation.estimates import PREDICTIVE, Estimate, estimate_scores
from medembed.evaluation.paired import Difference, holm
from medembed.evaluation.performance_drop import estimate_difference
from medembed.evaluation.scores import SCORES

__all__ = ["GAP_SCORES", "GROUP_SCORES", "MOST_PAIRED", "Gap", "find_gaps", "score_groups"]

GROUP_SCORES = (*(name for name in SCORES if name != "ece"), *PREDICTIVE)
"""What is scored within a group: all but ECE, which noise makes larger in smaller groups."""
GAP_SCORES = ("auroc", "sensitivity", "specificity", "brier")
MOST_PAIRED = 5
"""Of more groups each is compared with all others together, not with every other."""


@dataclass(frozen=True)
class Gap:
    """A score in group `a` less that in `b`, with `p_holm` after Holm's correction.

    What cannot be estimated is NaN; `reason` says why.
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
    """Estimate `GROUP_SCORES` within each group of rows.

    Parameters
    ----------
    y, probability, patients : arrays of shape (n,)
        Labels 0 or 1, probabilities of abnormal, and whose row it is.
    threshold : float
        Decisions are abnormal at or above it.
    members : dict of str to bool array of shape (n,)
        The rows of each group.

    Raises
    ------
    TrainingDataError
        As `Scorer`, or a row has no patient.
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
) -> list[Gap]:
    """Return the gaps of one head in each of `GAP_SCORES` between all its groups.

    Parameters
    ----------
    groups : dict of str to dict of str to Estimate
        From `score_groups`, with parts over the same patients.
    others : dict of str to dict of str to Estimate
        Of each group the scores of all other groups' rows together, which it is compared with where
        there are more than `MOST_PAIRED` groups; else not looked at.
    name_of_others : str
        What `Gap.b` is then.

    Returns
    -------
    list of Gap
        The interval is MOVER's from the groups' own limits (Zou and Donner, Statistics in Medicine
        27, 2008), with the correlation that patients in both groups bring (Zou, Psychological
        Methods 12, 2007); p is one less the confidence at which its end is 0. Holm's correction
        goes over all of them.
    """
    pairs: list[tuple[str, str, Mapping[str, Estimate], Mapping[str, Estimate]]]
    if len(groups) > MOST_PAIRED:
        pairs = [(name, name_of_others, own, others[name]) for name, own in groups.items()]
    else:
        pairs = [(a, b, groups[a], groups[b]) for a, b in combinations(groups, 2)]
    asked = [(score, *pair) for score in GAP_SCORES for pair in pairs]
    found = [_compare(one[score], other[score]) for score, _, _, one, other in asked]
    adjusted = holm([own.p for own in found])
    return [
        Gap(score, a, b, own, float(p), _why_none([(a, one[score]), (b, other[score])], own))
        for (score, a, b, one, other), own, p in zip(asked, found, adjusted, strict=True)
    ]


def _compare(a: Estimate, b: Estimate) -> Difference:
    return estimate_difference(a, b, correlation=_correlate(a.parts, b.parts))


def _correlate(a: np.ndarray, b: np.ndarray) -> float:
    """Return the correlation of two scores from what the same patients add to them, (I,) each."""
    size = sqrt(float(a @ a) * float(b @ b))
    return 0.0 if isnan(size) or size == 0 else float(a @ b) / size


def _why_none(sides: Sequence[tuple[str, Estimate]], found: Difference) -> str | None:
    """Say which groups have no interval and why, where there is none of their gap."""
    if found.method is not None:
        return None
    told = [f"{name}: {own.reason}" for name, own in sides if own.reason is not None]
    return "; ".join(told) or "the rows do not tell how far the difference varies"
