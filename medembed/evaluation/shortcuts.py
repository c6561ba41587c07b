"""What a column beside the images has to do with the embedding, and with the score of the label.

All scores are AUROCs that count only pairs of rows within one stratum: a fold, since scores of
different folds come from different models; or a group within a fold, where the group cannot help.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan, sqrt
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri

from medembed.evaluation.bootstrap import finite_or_none
from medembed.evaluation.bounds import Bounds
from medembed.evaluation.estimates import (
    Estimate,
    estimate_auroc,
    mean_estimate,
    placements,
)
from medembed.evaluation.paired import Difference, compare_influences
from medembed.evaluation.unpaired import (
    MOST_PAIRED,
    Gap,
    find_gaps,
    invert_interval,
)

__all__ = [
    "Encoded",
    "Loss",
    "PairScore",
    "average_pairs",
    "join_strata",
    "largest_gap",
    "score_encoded",
    "score_gap",
    "score_loss",
    "score_pairs",
    "shuffle_groups",
    "subtract_group_means",
]


class PairScore(NamedTuple):
    """An AUROC over some pairs of rows, and each row's contribution to it (n,)."""

    value: float
    added: np.ndarray


@dataclass(frozen=True)
class Encoded:
    """How well a column can be read: a macro AUROC, and the one-sided p that it is 0.5 or less.

    The interval is that of the folds' models; p also takes into account that they were trained on
    each other's rows.
    """

    estimate: Estimate
    p: float

    def as_dict(self) -> dict[str, object]:
        """Return the interval's keys, and `p`."""
        return {**self.estimate.interval().as_dict(), "p": finite_or_none(self.p)}


@dataclass(frozen=True)
class Loss:
    """The label's AUROC that is left without a column, and how much was lost.

    `p` is one-sided: the probability of such a loss where nothing is lost.
    """

    left: Estimate
    lost: Difference
    p: float


def join_strata(folds: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return the stratum of each row, (n,): its fold and its group, both integers from 0."""
    return np.asarray(folds * (int(groups.max(initial=0)) + 1) + groups)


def score_pairs(y: np.ndarray, values: np.ndarray, strata: np.ndarray) -> PairScore:
    """Return the share of pairs ranked correctly among those of two classes and one stratum.

    Parameters
    ----------
    y, values, strata : arrays of shape (n,)
        Labels 0 or 1, scores, and integers.

    Returns
    -------
    PairScore
        With one stratum the AUROC and its `influences`. NaN if no stratum has both classes.
        Contributions are the derivatives of the ratio of both counts in the weight of each row.
    """
    is_abnormal = y == 1
    placed, facing = np.zeros(len(y)), np.zeros(len(y))
    for stratum in np.unique(strata):
        own = np.flatnonzero(strata == stratum)
        n_abnormal = int(is_abnormal[own].sum())
        if 0 < n_abnormal < len(own):
            placed[own] = placements(is_abnormal[own], values[own])
            facing[own] = np.where(is_abnormal[own], len(own) - n_abnormal, n_abnormal)
    n_pairs = facing[is_abnormal].sum()
    if not n_pairs:
        return PairScore(nan, np.full(len(y), nan))
    value = float((facing * placed)[is_abnormal].sum() / n_pairs)
    return PairScore(value, facing * (placed - value) / n_pairs)


def average_pairs(scores: Sequence[PairScore]) -> PairScore:
    """Return the mean of scores of the same rows, with its contributions."""
    return PairScore(
        float(np.mean([own.value for own in scores])),
        np.mean([own.added for own in scores], axis=0),
    )


def score_encoded(
    groups: np.ndarray, values: np.ndarray, folds: np.ndarray, codes: np.ndarray
) -> Encoded:
    """Return the mean over k groups of the AUROC of each against the others.

    Parameters
    ----------
    groups, folds : integer arrays of shape (n,)
        Groups from 0 to k - 1.
    values : array of shape (n, k), or (n, 1) for two groups
        Out-of-fold scores of each group; of two, of the second.
    codes : integer array of shape (n,)
        Patients, see `patient_codes`.
    """
    which = [1] if values.shape[1] == 1 else list(range(values.shape[1]))
    estimates = []
    for k, own in zip(which, values.T, strict=True):
        is_own = (groups == k).astype(np.int8)
        estimates.append(estimate_auroc(is_own, *score_pairs(is_own, own, folds), codes))
    found = estimates[0] if len(which) == 1 else mean_estimate(estimates, [str(k) for k in which])
    return Encoded(found, _above_chance(found))


def _above_chance(found: Estimate) -> float:
    of_found = found.limits
    if of_found is None:
        return nan

    def limits(confidence: float) -> Bounds:
        low, high = of_found(confidence)
        return low - 0.5, high - 0.5

    p = _one_sided(found.value - 0.5, invert_interval(found.value - 0.5, limits))
    # The contributions are those of scored rows. But a pair of rows of two folds counts twice, each
    # as a training row of the other: where nothing can be read, this doubles the variance.
    return float(ndtr(ndtri(p) / sqrt(2)))


def _one_sided(value: float, p: float) -> float:
    """Return the p of a value above 0 from the two-sided p."""
    return p / 2 if value > 0 else 1 - p / 2


def score_loss(y: np.ndarray, full: PairScore, other: PairScore, codes: np.ndarray) -> Loss:
    """Return what is left of the label's score without a column, and what was lost.

    Parameters
    ----------
    y, codes : arrays of shape (n,)
        Labels 0 or 1, and patients from `patient_codes`.
    full, other : PairScore
        With the column, or with a control in its place, and without it; of the same rows.
    """
    fewest = min(len(np.unique(codes[y == label])) for label in (0, 1))
    lost = compare_influences(
        full.value - other.value, full.added - other.added, (y, codes), fewest
    )
    left = estimate_auroc(y, other.value, other.added, codes)
    return Loss(left, lost, _one_sided(lost.difference, lost.p))


def score_gap(
    y: np.ndarray,
    values: np.ndarray,
    groups: np.ndarray,
    names: Sequence[str],
    folds: np.ndarray,
    codes: np.ndarray,
    name_of_others: str,
) -> tuple[dict[str, Estimate], list[Gap]]:
    """Return the label's AUROC within each group, and the gaps between groups.

    Parameters
    ----------
    y, values, groups, folds, codes : arrays of shape (n,)
        Labels 0 or 1, out-of-fold scores, groups from 0, folds, and patients.
    names : sequence of str
        The name of each group.
    name_of_others : str
        See `unpaired.find_gaps`.
    """
    size = int(codes.max(initial=-1)) + 1

    def score(own: np.ndarray) -> dict[str, Estimate]:
        pairs = score_pairs(y[own], values[own], folds[own])
        return {"auroc": estimate_auroc(y[own], *pairs, codes[own], size)}

    inside = {name: score(groups == k) for k, name in enumerate(names)}
    many = len(names) > MOST_PAIRED
    others = {name: score(groups != k) for k, name in enumerate(names)} if many else {}
    gaps = find_gaps(inside, others, name_of_others, ("auroc",))
    return {name: own["auroc"] for name, own in inside.items()}, gaps


def largest_gap(gaps: Sequence[Gap]) -> Gap:
    """Return the gap with the smallest p after correction; if none was tested, the first."""
    tested = [gap for gap in gaps if gap.p_holm == gap.p_holm]
    return min(tested, key=lambda gap: (gap.p_holm, -abs(gap.found.difference)), default=gaps[0])


def subtract_group_means(X: np.ndarray, groups: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Return X without the least-squares prediction of X from the group.

    The prediction is the mean of the group's training rows, so that a fold's own rows have no part
    in it (cross-validated confound regression: Snoek, Miletić and Scholte, NeuroImage 184, 2019).

    Parameters
    ----------
    X : array of shape (n, d)
    groups : integer array of shape (n,)
        Groups from 0; one without a training row has the mean of all.
    train : integer array
        Indices of the training rows.
    """
    n_groups = int(groups.max(initial=-1)) + 1
    members = [train[groups[train] == k] for k in range(n_groups)]
    means = np.stack([X[own if len(own) else train].mean(axis=0) for own in members])
    return np.asarray(X - means[groups])


def shuffle_groups(
    groups: np.ndarray, codes: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Return the groups dealt to other patients, (n,): a column that knows nothing.

    Patients with equally many rows exchange theirs, so that groups stay as large, and as clustered
    in patients, as they are.
    """
    order = np.argsort(codes, kind="stable")
    _, start, size = np.unique(codes[order], return_index=True, return_counts=True)
    shuffled = groups.copy()
    for n in np.unique(size):
        own = order[start[size == n][:, None] + np.arange(n)]
        shuffled[own] = groups[generator.permutation(own)]
    return shuffled
