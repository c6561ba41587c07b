"""Fit and assess the calibration of probabilities.

All calibrations are fitted on out-of-fold predictions of `train` and never see `test`.

`calibration_line` estimates slope and intercept of log-odds with patients as clusters (Van Calster
et al., BMC Medicine 17:230, 2019; Cox, Biometrika 45, 1958). Standard errors come from the sandwich
estimator (Liang and Zeger, Biometrika 73, 1986), here identical to the infinitesimal jackknife.
`reliability` tabulates the observed share of abnormal rows by predicted probability.
"""

from dataclasses import dataclass
from math import exp, isnan, log, nan
from typing import Literal, Self

import numpy as np
import pandas as pd
from scipy.special import expit, fdtrc, logit

from medembed.core.errors import ModelError, TrainingDataError
from medembed.core.schema import Field, Record, model_validator, parse
from medembed.evaluation.bootstrap import (
    CONFIDENCE,
    MIN_PATIENTS,
    Interval,
    patient_codes,
    quotients,
)
from medembed.evaluation.bounds import bound_on_logit, quantile
from medembed.evaluation.estimates import Clusters, Spread, estimate_share, measure_spread
from medembed.evaluation.scores import (
    N_ECE_BINS,
    check_both_classes,
    check_rows,
    find_bins,
)

__all__ = [
    "MIN_SLOPE",
    "Calibration",
    "CalibrationEntry",
    "IsotonicCalibration",
    "LineFit",
    "calibration_curve",
    "calibration_line",
    "check_line",
    "fit_isotonic",
    "fit_line",
    "fit_platt",
    "fit_temperature",
    "log_odds",
    "reliability",
]


def reliability(y: np.ndarray, probability: np.ndarray, patients: np.ndarray) -> pd.DataFrame:
    """Return mean probability and share of abnormal rows in each bin of ECE.

    The bins are those of `Scorer`'s ECE: `N_ECE_BINS` of equal width, half-open at the upper end
    except the last one (DeGroot and Fienberg, The Statistician 32, 1983, for the diagram).

    Parameters
    ----------
    y, probability, patients : arrays of shape (n,)
        See `bootstrap_scores`.

    Returns
    -------
    DataFrame
        One row per bin: `low`, `high` (its edges), `n` (its rows), `k` (its abnormal rows),
        `mean_probability`, `share_abnormal`, `share_low`, `share_high` (the 95 % interval of the
        share, see `estimates.estimate_share`), and its `method`. In an empty bin everything except
        edges and counts is NaN; in a bin of fewer than `MIN_PATIENTS` patients the interval is.

    Raises
    ------
    TrainingDataError
        Invalid labels or probabilities, or lengths that differ; see `Scorer`.
    """
    labels, values = check_rows(y, probability)
    codes, bins = patient_codes(patients), find_bins(values)
    if len(codes) != len(labels):
        raise TrainingDataError(f"{len(labels)} labels, but {len(codes)} patients")
    shares = [estimate_share(labels == 1, bins == k, codes).interval() for k in range(N_ECE_BINS)]
    n = np.bincount(bins, minlength=N_ECE_BINS)
    edges = np.arange(N_ECE_BINS + 1) / N_ECE_BINS
    return pd.DataFrame(
        {
            "low": edges[:-1],
            "high": edges[1:],
            "n": n,
            "k": [own.k for own in shares],
            "mean_probability": quotients(np.bincount(bins, values, N_ECE_BINS), n),
            "share_abnormal": [own.value for own in shares],
            "share_low": [own.low for own in shares],
            "share_high": [own.high for own in shares],
            "method": [own.method for own in shares],
        }
    )


#: The slope is kept above zero, so that calibration never reverses the order of studies, even if a
#: head ranks worse than chance.
MIN_SLOPE = 1e-3
#: Probabilities closer to 0 or 1 are clipped to this distance before the logit: float32 has no
#: finer steps below 1 (2 ** -24 = 6e-8).
_EDGE = 1e-7


@dataclass(frozen=True)
class Calibration:
    """A logistic map of the log-odds: sigmoid(slope * logit(p) + intercept), slope > 0.

    `method` is how the map was fitted: "platt", or "temperature", whose intercept is 0.
    """

    slope: float = 1.0
    intercept: float = 0.0
    method: str = "platt"

    def apply(self, probability: np.ndarray) -> np.ndarray:
        """Return calibrated probabilities (float64, the shape given), in unchanged order."""
        result = expit(self.slope * log_odds(probability) + self.intercept)
        return np.asarray(result, dtype=np.float64)

    def as_dict(self) -> dict[str, str | float]:
        """Return a JSON-able dict that `from_dict` reads."""
        return {"method": self.method, "slope": self.slope, "intercept": self.intercept}

    @classmethod
    def from_dict(cls, document: object) -> "Calibration":
        """Return the calibration that `as_dict` described.

        Raises
        ------
        ModelError
            The method is unknown, the parameters are not finite numbers with a slope above zero,
            or a temperature has an intercept.
        """
        return parse(CalibrationEntry, document, ModelError, "calibration").build()


class CalibrationEntry(Record):
    """A calibration as cards and runs keep it."""

    method: Literal["platt", "temperature"]
    slope: float = Field(gt=0)
    intercept: float

    @model_validator(mode="after")
    def _check_intercept(self) -> Self:
        if self.method == "temperature" and self.intercept != 0:
            raise ValueError(
                f"calibration by temperature has no intercept, but here {self.intercept!r}"
            )
        return self

    def build(self) -> Calibration:
        """Return the map itself."""
        return Calibration(self.slope, self.intercept, self.method)


@dataclass(frozen=True, eq=False)
class IsotonicCalibration:
    """A monotone map: linear between knots, constant below the first and above the last.

    Attributes
    ----------
    x : ndarray of float64, shape (k,)
        Probabilities before calibration, strictly increasing, in [0, 1].
    y : ndarray of float64, shape (k,)
        Calibrated probabilities, non-decreasing, in [0, 1].
    """

    x: np.ndarray
    y: np.ndarray

    def apply(self, probability: np.ndarray) -> np.ndarray:
        """Return calibrated probabilities (float64, the shape given); distinct ones may be tied."""
        values = np.asarray(probability, dtype=np.float64)
        return np.asarray(np.interp(values, self.x, self.y), dtype=np.float64)


def fit_platt(probability: np.ndarray, y: np.ndarray) -> Calibration:
    """Return a Platt scaling fitted on the log-odds.

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
    """Return a fitted positive scale of the log-odds, an inverse temperature, without intercept.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017. As in `fit_platt`, the targets
    are Platt's and slope >= `MIN_SLOPE`: with Guo et al.'s targets, 0 and 1, separable data have no
    finite scale.

    Parameters and errors are those of `fit_platt`.
    """
    slope, _ = _fit_line(probability, y, (0.0, 0.0))
    return Calibration(slope, 0.0, "temperature")


def fit_isotonic(probability: np.ndarray, y: np.ndarray) -> IsotonicCalibration:
    """Return the monotone map with the least squared error.

    Zadrozny and Elkan, Transforming Classifier Scores into Accurate Multiclass Probability
    Estimates, KDD 2002; fitted by scipy's `isotonic_regression`. It needs more rows than
    `fit_platt`: below about a thousand it follows their noise (Niculescu-Mizil and Caruana, ICML
    2005).

    Parameters and errors are those of `fit_platt`.
    """
    from scipy.optimize import isotonic_regression  # not earlier: comparisons fit nothing

    labels, values = check_both_classes(y, probability, "calibration")
    distinct, groups, counts = np.unique(values, return_inverse=True, return_counts=True)
    shares = np.bincount(groups, weights=labels) / counts
    fitted = isotonic_regression(shares, weights=counts).x
    # only the ends of a level are knots
    ends = np.r_[True, fitted[1:] != fitted[:-1]]
    knots = ends | np.r_[ends[1:], True]
    return IsotonicCalibration(distinct[knots], fitted[knots])


def _fit_line(
    probability: np.ndarray, y: np.ndarray, intercept_bounds: tuple[float | None, float | None]
) -> tuple[float, float]:
    """Return the slope and intercept with the least cross-entropy to Platt's targets."""
    from scipy.optimize import minimize  # not earlier: comparisons fit nothing

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

    # the search starts from the solution for probabilities that are already calibrated
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
    """Return ln(p / (1 - p)) of probabilities in [0, 1] clipped by 1e-7 at the ends, float64."""
    clipped = np.clip(np.asarray(probability, dtype=np.float64), _EDGE, 1 - _EDGE)
    return np.asarray(logit(clipped))


_N_STEPS = 30
_TOLERANCE = 1e-9
#: A slope or intercept beyond this comes from separable rows, which have no finite estimate.
_LARGEST = 1e3
_N_POINTS = 41
"""Number of points of a calibration curve."""


@dataclass(frozen=True, eq=False)
class LineFit:
    """A logistic regression of labels on the log-odds of probabilities.

    Attributes
    ----------
    line : ndarray of shape (2,)
        Intercept and slope; NaN if not estimable.
    added : ndarray of shape (n, 2)
        Each row's contribution to them, see `estimates.influences`.
    """

    line: np.ndarray
    added: np.ndarray


def calibration_line(
    y: np.ndarray, probability: np.ndarray, patients: np.ndarray
) -> dict[str, Interval]:
    """Return how well (calibrated) probabilities fit the labels, with 95 % intervals.

    Parameters
    ----------
    y, probability, patients : arrays of shape (n,)
        Labels 0 or 1, probabilities of abnormal in [0, 1], and each row's patient.

    Returns
    -------
    dict of str to Interval
        ``intercept`` of a logistic regression of the label with the slope fixed at 1 (0: well
        calibrated; below 0: probabilities too high); ``slope`` of the log-odds in a regression
        with a free slope (1: well calibrated; below 1: probabilities too extreme);
        ``mean_probability``, ``share_abnormal``, and ``observed_expected``, the latter divided by
        the former. NaN if all rows have one class or the log-odds separate the classes; limits are
        NaN with fewer than `MIN_PATIENTS` patients of a class.

    Raises
    ------
    TrainingDataError
        Invalid labels or probabilities, or lengths that differ; see `Scorer`.
    """
    labels, values = check_rows(y, probability)
    codes = patient_codes(patients)
    if len(codes) != len(labels):
        raise TrainingDataError(f"{len(labels)} labels, but {len(codes)} patients")
    level, full = (fit_line(labels, values, free_slope=free) for free in (False, True))
    n = max(len(labels), 1)
    mean, share = float(values.sum() / n), float(labels.sum() / n)
    of_mean, of_share = (values - mean) / n, (labels - share) / n
    ratio = share / mean if mean > 0 else nan
    of_ratio = ratio * (of_share / share - of_mean / mean) if share > 0 and mean > 0 else of_share
    spread = {
        name: measure_spread(labels, added, codes)
        for name, added in (
            ("intercept", level.added[:, 0]),
            ("slope", full.added[:, 1]),
            ("mean", of_mean),
            ("ratio", of_ratio),
        )
    }
    return {
        "intercept": _interval(float(level.line[0]), spread["intercept"]),
        "slope": _interval(float(full.line[1]), spread["slope"]),
        "mean_probability": _mean_interval(mean, spread["mean"], codes),
        "share_abnormal": estimate_share(labels == 1, np.ones(len(labels), bool), codes).interval(),
        "observed_expected": _interval(ratio, spread["ratio"], on_log=True),
    }


def calibration_curve(y: np.ndarray, probability: np.ndarray, patients: np.ndarray) -> pd.DataFrame:
    """Return the share of abnormal rows by probability, as a logistic line with a 95 % band.

    The line is the regression whose slope `calibration_line` returns; the pointwise band comes
    from the variance of the line on the log-odds with patients as clusters, and Student's t.

    Parameters
    ----------
    y, probability, patients : arrays of shape (n,)
        See `calibration_line`.

    Returns
    -------
    DataFrame
        `probability`, 41 equidistant points between the smallest and the largest; `share`, `low`,
        `high`. Empty if no line can be fitted; `low` and `high` are NaN with fewer than
        `MIN_PATIENTS` patients of a class.

    Raises
    ------
    TrainingDataError
        Invalid labels or probabilities, or lengths that differ; see `Scorer`.
    """
    labels, values = check_rows(y, probability)
    codes, fit = patient_codes(patients), fit_line(labels, values, free_slope=True)
    if isnan(fit.line[0]):
        return pd.DataFrame({"probability": [], "share": [], "low": [], "high": []}, dtype=float)
    points = np.linspace(values.min(), values.max(), _N_POINTS)
    x = log_odds(points)
    centre, reach = fit.line[0] + fit.line[1] * x, np.full(len(x), nan)
    clusters = Clusters(labels, codes)
    for i, place in enumerate(x):
        spread = clusters.measure_spread(fit.added @ [1.0, place])
        if spread.fewest >= MIN_PATIENTS and spread.error > 0:
            freedom = min(spread.freedom, spread.fewest - 1)
            reach[i] = quantile(CONFIDENCE, freedom) * spread.error
    ends = {"low": expit(centre - reach), "high": expit(centre + reach)}
    return pd.DataFrame({"probability": points, "share": expit(centre), **ends})


def fit_line(y: np.ndarray, probability: np.ndarray, *, free_slope: bool) -> LineFit:
    """Return intercept and slope fitted by Newton's method; a slope that is not free stays 1.

    NaN if all rows have one class, or if the log-odds are all equal or separate the classes.
    """
    x = log_odds(probability)
    nothing = LineFit(np.full(2, nan), np.full((len(x), 2), nan))
    if len(np.unique(y)) < 2 or (free_slope and np.ptp(x) == 0):
        return nothing
    columns = np.column_stack([np.ones_like(x), x])
    free = [0, 1] if free_slope else [0]
    line = np.array([0.0, 1.0])
    step = np.zeros(2)
    for _ in range(_N_STEPS):
        expected = expit(columns @ line)
        gradient = columns[:, free].T @ (y - expected)
        curvature = (columns[:, free].T * (expected * (1 - expected))) @ columns[:, free]
        if not np.linalg.cond(curvature) < 1e12:
            return nothing
        step[free] = np.linalg.solve(curvature, gradient)
        fit = _likelihood(y, columns @ line)
        for _ in range(_N_STEPS):  # a step that lowers the likelihood is too long
            if not _likelihood(y, columns @ (line + step)) < fit - 1e-9 * abs(fit):
                break
            step /= 2
        line = line + step
        if np.abs(line).max() > _LARGEST:
            return nothing
        if np.abs(step).max() < _TOLERANCE:
            expected = expit(columns @ line)
            weights = expected * (1 - expected)
            curvature = (columns[:, free].T * weights) @ columns[:, free]
            added = np.zeros((len(x), 2))
            scores = columns[:, free] * (y - expected)[:, None]
            added[:, free] = np.linalg.solve(curvature, scores.T).T
            return LineFit(line, added)
    return nothing


def check_line(y: np.ndarray, probability: np.ndarray, patients: np.ndarray) -> float:
    """Return the p-value of slope 1 and intercept 0 jointly; NaN if they are not estimable.

    Wald's test with the sandwich covariance, by F with 2 degrees of freedom and one less than the
    number of patients of the rarer class.
    """
    labels, values = check_rows(y, probability)
    codes, fit = patient_codes(patients), fit_line(labels, values, free_slope=True)
    if isnan(fit.line[0]):
        return nan
    sums = np.stack([np.bincount(codes, weights=column) for column in fit.added.T])
    spread = measure_spread(labels, fit.added[:, 0], codes)
    n, freedom = len(np.unique(codes)), spread.fewest - 1
    if freedom < 1:
        return nan
    off = fit.line - [0.0, 1.0]
    covariance = n / (n - 1) * (sums @ sums.T)
    ratio = float(off @ np.linalg.pinv(covariance) @ off) / 2
    return float(fdtrc(2, freedom, ratio))


def _likelihood(y: np.ndarray, z: np.ndarray) -> float:
    return float(np.sum(y * z - np.logaddexp(0.0, z)))


def _interval(value: float, spread: Spread, *, on_log: bool = False) -> Interval:
    if isnan(value) or not spread.error > 0:
        return Interval(value, nan, nan)
    if spread.fewest < MIN_PATIENTS:
        reason = f"{spread.fewest} patients of the rarer class; an interval needs {MIN_PATIENTS}"
        return Interval(value, nan, nan, None, reason)
    reach = quantile(CONFIDENCE, min(spread.freedom, spread.fewest - 1)) * spread.error
    if on_log:
        low, high = (exp(log(value) + sign * reach / value) for sign in (-1, 1))
        return Interval(value, low, high, "log-t")
    return Interval(value, value - reach, value + reach, "sandwich-t")


def _mean_interval(mean: float, spread: Spread, codes: np.ndarray) -> Interval:
    n = len(np.unique(codes))
    if n < MIN_PATIENTS:
        return Interval(mean, nan, nan, None, f"{n} patients; an interval needs {MIN_PATIENTS}")
    error = float(np.sqrt(n / (n - 1) * (spread.parts @ spread.parts)))
    low, high = bound_on_logit(mean, error, quantile(CONFIDENCE, spread.freedom))
    return Interval(mean, low, high, None if isnan(low) else "logit-t")
