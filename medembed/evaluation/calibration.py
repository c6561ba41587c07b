"""Calibration: probabilities that mean what they say.

All are fitted on out-of-fold predictions of `train` and never see `test`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression, minimize
from scipy.special import expit, logit

from medembed.core.errors import ModelError
from medembed.evaluation.checks import check_both_classes, is_number

__all__ = [
    "MIN_SLOPE",
    "Calibration",
    "IsotonicCalibration",
    "fit_isotonic",
    "fit_platt",
    "fit_temperature",
    "log_odds",
]

#: The slope is held above zero, so that calibration never turns the order of studies round, even
#: where a head ranks worse than chance.
MIN_SLOPE = 1e-3
#: Probabilities nearer to 0 or 1 are moved here before the logit: float32 knows no finer steps
#: below 1 (2 ** -24 = 6e-8).
_EDGE = 1e-7

_METHODS = ("platt", "temperature")


@dataclass(frozen=True)
class Calibration:
    """A logistic map of the log-odds: sigmoid(slope * logit(p) + intercept), slope > 0.

    `method` says how it was fitted: "platt", or "temperature", whose intercept is 0.
    """

    slope: float = 1.0
    intercept: float = 0.0
    method: str = "platt"

    def apply(self, probability: np.ndarray) -> np.ndarray:
        """Return calibrated probabilities (float64, the shape given), in the same order."""
        result = expit(self.slope * log_odds(probability) + self.intercept)
        return np.asarray(result, dtype=np.float64)

    def as_dict(self) -> dict[str, Any]:
        """Return what `from_dict` reads, fit for JSON."""
        return {"method": self.method, "slope": self.slope, "intercept": self.intercept}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Calibration":
        """Read what `as_dict` wrote.

        Raises
        ------
        ModelError
            Another method, parameters that are not finite numbers with a slope above zero, or a
            temperature with an intercept.
        """
        if not isinstance(document, Mapping):
            raise ModelError("calibration is not a table")
        method = document.get("method")
        slope, intercept = document.get("slope"), document.get("intercept")
        if method not in _METHODS:
            raise ModelError(f"calibration method {method!r} is not one of {', '.join(_METHODS)}")
        if not (is_number(slope) and is_number(intercept) and slope > 0):
            raise ModelError(
                f"calibration slope {slope!r} and intercept {intercept!r} are not finite numbers "
                "with a slope above zero"
            )
        if method == "temperature" and intercept != 0:
            raise ModelError(f"calibration by temperature has no intercept, but here {intercept!r}")
        return cls(float(slope), float(intercept), str(method))


@dataclass(frozen=True, eq=False)
class IsotonicCalibration:
    """A rising map: linear between knots, constant below the first and above the last.

    Attributes
    ----------
    x : ndarray of float64, shape (k,)
        Probabilities before calibration, strictly rising, in [0, 1].
    y : ndarray of float64, shape (k,)
        What becomes of them, never falling, in [0, 1].
    """

    x: np.ndarray
    y: np.ndarray

    def apply(self, probability: np.ndarray) -> np.ndarray:
        """Return calibrated probabilities (float64, the shape given); distinct ones may be tied."""
        values = np.asarray(probability, dtype=np.float64)
        return np.asarray(np.interp(values, self.x, self.y), dtype=np.float64)


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
    slope, intercept = _fit_line(probability, y, (None, None))
    return Calibration(slope, intercept)


def fit_temperature(probability: np.ndarray, y: np.ndarray) -> Calibration:
    """Fit one positive scale of the log-odds, the inverse of a temperature, and no intercept.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017. As in `fit_platt` the targets
    are Platt's and slope >= `MIN_SLOPE`: theirs, 0 and 1, have no finite scale on separable data.

    Parameters and errors are those of `fit_platt`.
    """
    slope, _ = _fit_line(probability, y, (0.0, 0.0))
    return Calibration(slope, 0.0, "temperature")


def fit_isotonic(probability: np.ndarray, y: np.ndarray) -> IsotonicCalibration:
    """Fit the rising map with the least squared error.

    Zadrozny and Elkan, Transforming Classifier Scores into Accurate Multiclass Probability
    Estimates, KDD 2002; fitted by scipy's `isotonic_regression`. It wants more rows than
    `fit_platt`: below about a thousand it follows their noise (Niculescu-Mizil and Caruana, ICML
    2005).

    Parameters and errors are those of `fit_platt`.
    """
    labels, values = check_both_classes(y, probability, "calibration")
    distinct, groups, counts = np.unique(values, return_inverse=True, return_counts=True)
    shares = np.bincount(groups, weights=labels) / counts
    fitted = isotonic_regression(shares, weights=counts).x
    # of a level only its ends are knots
    ends = np.r_[True, fitted[1:] != fitted[:-1]]
    knots = ends | np.r_[ends[1:], True]
    return IsotonicCalibration(distinct[knots], fitted[knots])


def _fit_line(
    probability: np.ndarray, y: np.ndarray, intercept_bounds: tuple[float | None, float | None]
) -> tuple[float, float]:
    """Return the slope and intercept with the least cross-entropy to Platt's targets."""
    labels, values = check_both_classes(y, probability, "calibration")
    x = log_odds(values)
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
        bounds=[(MIN_SLOPE, None), intercept_bounds],
        options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": 1000},
    )
    return float(found.x[0]), float(found.x[1])


def log_odds(probability: np.ndarray) -> np.ndarray:
    """Return ln(p / (1 - p)) of probabilities in [0, 1] held within 1e-7 of the ends, float64."""
    clipped = np.clip(np.asarray(probability, dtype=np.float64), _EDGE, 1 - _EDGE)
    return np.asarray(logit(clipped))
