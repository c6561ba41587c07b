"""What each row adds to a score: the slope of the score in the row's weight.

The sum of squares of the patients' sums is the score's variance with patients as clusters, without
a resample (the infinitesimal jackknife; Jaeckel, Bell Laboratories memorandum, 1972; Efron,
Biometrika 68, 1981). Of AUROC it is that of DeLong, with Obuchowski's clusters.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

__all__ = ["influences", "placements"]


def influences(
    y: np.ndarray, probability: np.ndarray, threshold: float, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return the derivative of each score in the weight of each row, float64 (n,).

    Parameters
    ----------
    y, probability : arrays of shape (n,)
        Labels 0 or 1 and probabilities of abnormal, checked by the caller.
    threshold : float
        Decisions are abnormal at or above it.
    names : sequence of str
        Scores, of `SCORES` but ECE, which has no derivative, and `PREDICTIVE`.

    Returns
    -------
    dict of str to ndarray
        Each sums to 0. NaN where the data do not give the score.
    """
    labels, called = y.astype(np.float64), (probability >= threshold).astype(np.float64)
    found: dict[str, np.ndarray] = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for name in names:
            if name == "auroc":
                found[name] = _of_auroc(labels, probability)
            elif name == "average_precision":
                found[name] = _of_average_precision(labels, probability)
            elif name == "brier":
                found[name] = _of_mean((probability - labels) ** 2)
            else:
                found[name] = _DECISIONS[name](labels, called)
    return found


def placements(is_abnormal: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return for each row the share of the other class that it is on the right side of.

    From midranks, in O(n log n) (Sun and Xu, IEEE Signal Processing Letters 21, 2014).
    """
    ranks, is_normal = rankdata(values), ~is_abnormal
    found = np.empty(len(values))
    below = ranks[is_abnormal] - rankdata(values[is_abnormal])
    found[is_abnormal] = below / is_normal.sum()
    below = ranks[is_normal] - rankdata(values[is_normal])
    found[is_normal] = 1 - below / is_abnormal.sum()
    return found


def _of_auroc(labels: np.ndarray, probability: np.ndarray) -> np.ndarray:
    is_abnormal = labels == 1
    n_abnormal = int(is_abnormal.sum())
    if not 0 < n_abnormal < len(labels):
        return np.full(len(labels), np.nan)
    placed = placements(is_abnormal, probability)
    excess = placed - placed[is_abnormal].mean()
    return np.asarray(excess / np.where(is_abnormal, n_abnormal, len(labels) - n_abnormal))


def _of_average_precision(labels: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Differentiate the sum over groups of ties of their abnormal rows times the precision."""
    n_abnormal = labels.sum()
    if not 0 < n_abnormal < len(labels):
        return np.full(len(labels), np.nan)
    _, groups = np.unique(-probability, return_inverse=True)  # from the highest downwards
    hits = np.bincount(groups, weights=labels)
    true, called = np.cumsum(hits), np.cumsum(np.bincount(groups))
    precision = true / called
    # a row of group g stands in the counts of g and all groups below it
    of_true = np.cumsum((hits / called)[::-1])[::-1][groups]
    of_called = np.cumsum((hits * precision / called)[::-1])[::-1][groups]
    score = (hits * precision).sum() / n_abnormal
    change = labels * (precision[groups] + of_true - score) - of_called
    return np.asarray(change / n_abnormal)


def _of_mean(values: np.ndarray) -> np.ndarray:
    return np.asarray((values - values.mean()) / len(values)) if len(values) else values


def _of_share(hit: np.ndarray, among: np.ndarray) -> np.ndarray:
    total = among.sum()
    return np.asarray(among * (hit - (among * hit).sum() / total) / total)


def _of_macro_f1(labels: np.ndarray, called: np.ndarray) -> np.ndarray:
    hit, passed = labels * called, (1 - labels) * (1 - called)
    wrong = len(labels) - hit.sum() - passed.sum()
    if not 0 < labels.sum() < len(labels):
        return np.full(len(labels), np.nan)
    change = np.zeros(len(labels))
    for right in (hit, passed):  # half of F1 = r / (2 r + wrong) for each class
        total = 2 * right.sum() + wrong
        change += right * wrong / total**2 - (1 - hit - passed) * right.sum() / total**2
    return change


def _of_kappa(labels: np.ndarray, called: np.ndarray) -> np.ndarray:
    n, positive, call = len(labels), labels.sum(), called.sum()
    if not 0 < positive < n:
        return np.full(n, np.nan)
    agreed = labels == called
    by_chance = (positive * call + (n - positive) * (n - call)) / n**2
    kappa = (agreed.mean() - by_chance) / (1 - by_chance)
    of_chance = labels * call + called * positive
    of_chance += (1 - labels) * (n - call) + (1 - called) * (n - positive)
    of_chance = of_chance / n**2 - 2 * by_chance / n
    change = (agreed - agreed.mean()) / n - (1 - kappa) * of_chance
    return np.asarray(change / (1 - by_chance))


_DECISIONS = {
    "accuracy": lambda labels, called: _of_mean((labels == called).astype(np.float64)),
    "sensitivity": lambda labels, called: _of_share(called, labels),
    "specificity": lambda labels, called: _of_share(1 - called, 1 - labels),
    "ppv": lambda labels, called: _of_share(labels, called),
    "npv": lambda labels, called: _of_share(1 - labels, 1 - called),
    "macro_f1": _of_macro_f1,
    "kappa": _of_kappa,
}
