"""Calibration of probabilities, and the threshold that turns them into decisions.

Both are fitted on out-of-fold predictions of `train` and never see `test`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit

from medembed.errors import ModelError, TrainingDataError

__all__ = ["MIN_SLOPE", "Calibration", "fit_platt", "youden_threshold"]

#: The slope is held above zero, so that calibration never turns the order of studies round, even
#: where a head ranks worse than chance.
MIN_SLOPE = 1e-3
#: Probabilities nearer to 0 or 1 are moved here before the logit: float32 knows no finer steps
#: below 1 (2 ** -24 = 6e-8).
_EDGE = 1e-7


@dataclass(frozen=True)
class Calibration:
    """A logistic map of the log-odds: sigmoid(slope * logit(p) + intercept), slope > 0."""

    slope: float = 1.0
    intercept: float = 0.0

    def apply(self, probability: np.ndarray) -> np.ndarray:
        """Return calibrated probabilities (float64, the shape given), in the same order."""
        result = expit(self.slope * _log_odds(probability) + self.intercept)
        return np.asarray(result, dtype=np.float64)

    def as_dict(self) -> dict[str, Any]:
        """Return what `from_dict` reads, fit for JSON."""
        return {"method": "platt", "slope": self.slope, "intercept": self.intercept}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Calibration":
        """Read what `as_dict` wrote.

        Raises
        ------
        ModelError
            Another method, or parameters that are not finite numbers with a slope above zero.
        """
        slope, intercept = document.get("slope"), document.get("intercept")
        if document.get("method") != "platt":
            raise ModelError(f"calibration method {document.get('method')!r} is not 'platt'")
        if not (_is_finite(slope) and _is_finite(intercept) and slope > 0):
            raise ModelError(
                f"calibration slope {slope!r} and intercept {intercept!r} are not finite numbers "
                "with a slope above zero"
            )
        return cls(float(slope), float(intercept))


def fit_platt(probability: np.ndarray, y: np.ndarray) -> Calibration:
    """Fit Platt scaling on the log-odds.

    The cross-entropy to Platt's smoothed targets, (n1 + 1) / (n1 + 2) for abnormal and
    1 / (n0 + 2) for normal rows, is minimised over slope >= `MIN_SLOPE` and intercept (Platt,
    Probabilistic Outputs for Support Vector Machines, 1999). The problem is convex; the targets
    keep separable data finite.

    Parameters
    ----------
    probability : array of shape (n,)
        Out-of-fold probabilities of abnormal, in [0, 1].
    y : array of shape (n,)
        Labels, 0 or 1.

    Raises
    ------
    TrainingDataError
        Only one class, lengths that differ, other labels, or probabilities outside [0, 1].
    """
    labels, values = _both_classes(y, probability, "calibration")
    x = _log_odds(values)
    n_abnormal = int(labels.sum())
    n_normal = len(labels) - n_abnormal
    targets = np.where(labels == 1, (n_abnormal + 1) / (n_abnormal + 2), 1 / (n_normal + 2))

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        z = parameters[0] * x + parameters[1]
        error = expit(z) - targets
        value = np.mean(np.logaddexp(0.0, z) - targets * z)
        return float(value), np.array([np.mean(error * x), np.mean(error)])

    # the search starts from what is right already where the probabilities are calibrated
    found = minimize(
        loss,
        np.array([1.0, 0.0]),
        jac=True,
        method="L-BFGS-B",
        bounds=[(MIN_SLOPE, None), (None, None)],
        options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": 1000},
    )
    return Calibration(float(found.x[0]), float(found.x[1]))


def youden_threshold(y: np.ndarray, probability: np.ndarray) -> float:
    """Return the threshold with the largest sensitivity + specificity - 1.

    Youden, Index for rating diagnostic tests, Cancer 3, 1950. Decisions are abnormal at or above
    the threshold. Of all thresholds with the same decisions the middle of the gap is taken, and of
    several cuts with the same index the lowest, the more sensitive one. Where no cut is better
    than chance this is the smallest probability: everything is called abnormal.

    Parameters
    ----------
    y, probability : arrays of shape (n,)
        Labels 0 or 1, and (calibrated, out-of-fold) probabilities of abnormal.

    Raises
    ------
    TrainingDataError
        As `fit_platt`.
    """
    labels, values = _both_classes(y, probability, "a threshold")
    distinct, groups = np.unique(values, return_inverse=True)
    abnormal = np.bincount(groups, weights=labels, minlength=len(distinct))
    normal = np.bincount(groups, weights=1 - labels, minlength=len(distinct))
    # counts are whole numbers, so equal indices compare equal: scaled by n1 * n0, they stay whole
    above = labels.sum() - np.r_[0, np.cumsum(abnormal)[:-1]]
    false = (1 - labels).sum() - np.r_[0, np.cumsum(normal)[:-1]]
    index = above * normal.sum() - false * abnormal.sum()
    best = int(np.argmax(index))
    if best == 0:
        return float(distinct[0])
    middle = float((distinct[best - 1] + distinct[best]) / 2)
    return middle if middle > distinct[best - 1] else float(distinct[best])


def _is_finite(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and math.isfinite(value)


def _log_odds(probability: np.ndarray) -> np.ndarray:
    clipped = np.clip(np.asarray(probability, dtype=np.float64), _EDGE, 1 - _EDGE)
    return np.asarray(logit(clipped))


def _both_classes(
    y: np.ndarray, probability: np.ndarray, purpose: str
) -> tuple[np.ndarray, np.ndarray]:
    labels, values = np.asarray(y), np.asarray(probability, dtype=np.float64)
    if labels.ndim != 1 or labels.shape != values.shape:
        raise TrainingDataError(
            f"{purpose} needs one probability per label, got shapes {values.shape} and "
            f"{labels.shape}"
        )
    if not np.isin(labels, (0, 1)).all():
        raise TrainingDataError(f"{purpose} needs labels 0 and 1; leave unlabelled rows out")
    if not ((values >= 0) & (values <= 1)).all():
        raise TrainingDataError(f"{purpose} needs probabilities in [0, 1], not NaN")
    if len(np.unique(labels)) < 2:
        held = "normal" if (labels == 0).any() else "abnormal" if len(labels) else "none"
        raise TrainingDataError(
            f"{purpose} needs normal and abnormal rows, but all {len(labels)} are {held}; "
            "give it more patients"
        )
    return labels.astype(np.int64), values
