"""Thresholds that turn probabilities into decisions: abnormal at or above them.

They are chosen on (calibrated) out-of-fold predictions of `train` and never see `test`.
"""

import numpy as np

from medembed.errors import TrainingDataError
from medembed.evaluation.checks import check_both_classes

__all__ = ["sensitivity_threshold", "youden_threshold"]


def youden_threshold(y: np.ndarray, probability: np.ndarray) -> float:
    """Return the threshold with the largest sensitivity + specificity - 1.

    Youden, Index for rating diagnostic tests, Cancer 3, 1950. Of all thresholds with the same
    decisions the middle of the gap is taken, and of several cuts with the same index the lowest,
    the more sensitive one. Where no cut is better than chance this is the smallest probability:
    everything is called abnormal.

    Parameters
    ----------
    y, probability : arrays of shape (n,)
        Labels 0 or 1, and (calibrated, out-of-fold) probabilities of abnormal.

    Raises
    ------
    TrainingDataError
        Only one class, lengths that differ, other labels, or probabilities outside [0, 1].
    """
    distinct, hits, false = _cuts(y, probability)
    # counts are whole numbers, so equal indices compare equal: scaled by n1 * n0, they stay whole
    index = hits * false[0] - false * hits[0]
    return _middle_of_gap(distinct, int(np.argmax(index)))


def sensitivity_threshold(
    y: np.ndarray, probability: np.ndarray, sensitivity: float = 0.9
) -> float:
    """Return the highest threshold that finds at least this share of the abnormal rows.

    Of all thresholds with the same decisions the middle of the gap is taken. Where only calling
    everything abnormal reaches the share this is the smallest probability.

    Parameters
    ----------
    y, probability : arrays of shape (n,)
        As for `youden_threshold`.
    sensitivity : float
        The share of abnormal rows at or above the threshold, in (0, 1].

    Raises
    ------
    TrainingDataError
        A share outside (0, 1], or as `youden_threshold`.
    """
    if not 0 < sensitivity <= 1:
        raise TrainingDataError(
            f"sensitivity {sensitivity} is not above 0 and at most 1; ask for 0.9, for example"
        )
    distinct, hits, _ = _cuts(y, probability)
    # divided, not multiplied: 55 / 100 is the same float as 0.55, but 0.55 * 100 is above 55
    reached = np.flatnonzero(hits / hits[0] >= sensitivity)
    return _middle_of_gap(distinct, int(reached[-1]))


def _cuts(y: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the distinct probabilities, rising; abnormal and normal rows at or above each."""
    labels, values = check_both_classes(y, probability, "a threshold")
    distinct, groups = np.unique(values, return_inverse=True)
    abnormal = np.bincount(groups, weights=labels, minlength=len(distinct))
    normal = np.bincount(groups, weights=1 - labels, minlength=len(distinct))
    return distinct, np.cumsum(abnormal[::-1])[::-1], np.cumsum(normal[::-1])[::-1]


def _middle_of_gap(distinct: np.ndarray, cut: int) -> float:
    """Return a threshold between the cut's probability and the next lower one."""
    if cut == 0:
        return float(distinct[0])
    middle = float((distinct[cut - 1] + distinct[cut]) / 2)
    return middle if middle > distinct[cut - 1] else float(distinct[cut])
