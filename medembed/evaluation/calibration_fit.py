"""How probabilities fit labels: slope and intercept of their log-odds, with patients as clusters.

Van Calster et al., BMC Medicine 17:230, 2019; Cox, Biometrika 45, 1958. Standard errors are the
sandwich's (Liang and Zeger, Biometrika 73, 1986), which is the infinitesimal jackknife here.
"""

from dataclasses import dataclass
from math import exp, isnan, log, nan

import numpy as np
import pandas as pd
from scipy.special import expit, fdtrc

from medembed.core.errors import TrainingDataError
from medembed.evaluation.bootstrap import CONFIDENCE, MIN_PATIENTS, Interval, patient_codes
from medembed.evaluation.bounds import bound_on_logit, quantile
from medembed.evaluation.calibration import log_odds
from medembed.evaluation.checks import check_rows
from medembed.evaluation.estimates import Spread, estimate_share, measure_spread

__all__ = ["LineFit", "calibration_curve", "calibration_line", "check_line", "fit_line"]

_N_STEPS = 30
_TOLERANCE = 1e-9
#: A slope or intercept beyond this is that of separable rows, which have none.
_LARGEST = 1e3
_N_POINTS = 41
"""Where a calibration curve is given."""


@dataclass(frozen=True, eq=False)
class LineFit:
    """A logistic regression of labels on the log-odds of probabilities.

    Attributes
    ----------
    line : ndarray of shape (2,)
        Intercept and slope; NaN where there are none.
    added : ndarray of shape (n, 2)
        What each row adds to them, see `influence`.
    """

    line: np.ndarray
    added: np.ndarray


def calibration_line(
    y: np.ndarray, probability: np.ndarray, patients: np.ndarray
) -> dict[str, Interval]:
    """Return how (calibrated) probabilities fit the labels, with 95 % intervals.

    Parameters
    ----------
    y, probability, patients : arrays of shape (n,)
        Labels 0 or 1, probabilities of abnormal in [0, 1], and whose row it is.

    Returns
    -------
    dict of str to Interval
        ``intercept`` of a logistic regression of the label whose slope is held at 1 (0: right;
        below 0: the probabilities are too high); ``slope`` of the log-odds in one where it is free
        (1: right; below 1: the probabilities are too extreme); ``mean_probability``,
        ``share_abnormal``, and ``observed_expected``, the second over the first. NaN where the
        rows are of one class or the log-odds separate the classes; ends are NaN where fewer than
        `MIN_PATIENTS` patients of a class stand behind them.

    Raises
    ------
    TrainingDataError
        As `Scorer`.
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
    """Return the share abnormal over the probability, as a logistic line with a 95 % band.

    The line is the regression of which `calibration_line` gives the slope; the band is pointwise,
    from the variance of the line on the log-odds with patients as clusters, and Student's t.

    Parameters
    ----------
    y, probability, patients : arrays of shape (n,)
        As for `calibration_line`.

    Returns
    -------
    DataFrame
        `probability`, 41 points of equal distance between the least and the largest; `share`,
        `low`, `high`. No row where there is no line; `low` and `high` are NaN with fewer than
        `MIN_PATIENTS` patients of a class.

    Raises
    ------
    TrainingDataError
        As `Scorer`.
    """
    labels, values = check_rows(y, probability)
    codes, fit = patient_codes(patients), fit_line(labels, values, free_slope=True)
    if isnan(fit.line[0]):
        return pd.DataFrame({"probability": [], "share": [], "low": [], "high": []}, dtype=float)
    points = np.linspace(values.min(), values.max(), _N_POINTS)
    x = log_odds(points)
    centre, reach = fit.line[0] + fit.line[1] * x, np.full(len(x), nan)
    for i, place in enumerate(x):
        spread = measure_spread(labels, fit.added @ [1.0, place], codes)
        if spread.fewest >= MIN_PATIENTS and spread.error > 0:
            freedom = min(spread.freedom, spread.fewest - 1)
            reach[i] = quantile(CONFIDENCE, freedom) * spread.error
    ends = {"low": expit(centre - reach), "high": expit(centre + reach)}
    return pd.DataFrame({"probability": points, "share": expit(centre), **ends})


def fit_line(y: np.ndarray, probability: np.ndarray, *, free_slope: bool) -> LineFit:
    """Fit intercept and slope by Newton's method; the slope stays 1 where it is not free.

    NaN where the rows are of one class, or the log-odds are all the same or separate the classes.
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
    """Return the p of slope and intercept being 1 and 0 both; NaN where there are none.

    Wald's test with the sandwich's covariance, by F with 2 and one less than the patients of the
    rarer class as degrees of freedom.
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
        reason = f"{spread.fewest} patients of the rarer class; an interval wants {MIN_PATIENTS}"
        return Interval(value, nan, nan, None, reason)
    reach = quantile(CONFIDENCE, min(spread.freedom, spread.fewest - 1)) * spread.error
    if on_log:
        low, high = (exp(log(value) + sign * reach / value) for sign in (-1, 1))
        return Interval(value, low, high, "log-t")
    return Interval(value, value - reach, value + reach, "sandwich-t")


def _mean_interval(mean: float, spread: Spread, codes: np.ndarray) -> Interval:
    n = len(np.unique(codes))
    if n < MIN_PATIENTS:
        return Interval(mean, nan, nan, None, f"{n} patients; an interval wants {MIN_PATIENTS}")
    error = float(np.sqrt(n / (n - 1) * (spread.parts @ spread.parts)))
    low, high = bound_on_logit(mean, error, quantile(CONFIDENCE, spread.freedom))
    return Interval(mean, low, high, None if isnan(low) else "logit-t")
