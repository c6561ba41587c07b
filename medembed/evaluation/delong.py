"""Interval and paired test of AUROC without resampling, with patients as clusters.

DeLong, DeLong and Clarke-Pearson (Biometrics 44, 1988) derive the variance of an AUROC from each
row's placement among the rows of the other class. Obuchowski (Biometrics 53, 1997) allows rows of
one patient to be correlated; with one row per patient both variances agree. A cross-check of the
bootstrap over patients.
"""

from collections.abc import Mapping
from itertools import combinations
from math import isnan, nan, sqrt
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri

from medembed.core.errors import TrainingDataError
from medembed.evaluation.bootstrap import CONFIDENCE, Interval, patient_codes
from medembed.evaluation.estimates import placements
from medembed.evaluation.paired import Difference
from medembed.evaluation.scores import check_rows

__all__ = ["auroc_covariance", "auroc_difference", "auroc_differences", "auroc_interval"]

#: AUROCs over n1 * n0 pairs of rows differ by at least 1 / (2 n1 n0); less is rounding error.
_ROUNDING = 1e-12


def auroc_covariance(
    y: np.ndarray, probabilities: Mapping[str, np.ndarray], patients: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the AUROCs of several heads on one set of rows, and their covariance matrix.

    Parameters
    ----------
    y, patients : arrays of shape (n,)
        Labels 0 or 1, and each row's patient; any values that compare equal for one patient.
    probabilities : dict of str to array of shape (n,)
        Each head's probabilities of abnormal.

    Returns
    -------
    auroc : ndarray of float64, shape (k,)
        In the order of `probabilities`, ties counting one half; NaN if there is only one class.
    covariance : ndarray of float64, shape (k, k)
        NaN if fewer than two patients have an abnormal row, or a normal one.

    Raises
    ------
    TrainingDataError
        A label is not 0 or 1, a probability is not a number in [0, 1], lengths differ, or a row
        has no patient.

    Notes
    -----
    A row's placement is the share of the rows of the other class that it ranks correctly against;
    midranks give all placements in O(n log n) (Sun and Xu, IEEE Signal Processing Letters 21,
    2014). With a (b) a patient's sum over abnormal (normal) rows of placement - AUROC, divided by
    the number of all abnormal (normal) rows, and c(m) = m / (m - 1), the covariance of heads r and
    s is ``c(I10) sum a_r a_s + c(I01) sum b_r b_s + c(I) sum (a_r b_s + a_s b_r)`` (Obuchowski
    1997), where I10, I01 and I count the patients with an abnormal row, a normal row, any row.
    """
    parts = _parts(y, probabilities, patients)
    return parts.auroc, _covariance(parts.abnormal, parts.normal, parts.corrections)


def auroc_interval(y: np.ndarray, probability: np.ndarray, patients: np.ndarray) -> Interval:
    """Return an AUROC with its normal 95 % interval, clipped to [0, 1].

    Parameters and errors are those of `auroc_covariance`. An AUROC of 0 or 1, or that of a
    constant, has an estimated variance of 0 and no interval: zero width would overstate certainty.
    """
    auroc, covariance = auroc_covariance(y, {"": probability}, patients)
    value, error = float(auroc[0]), sqrt(float(covariance[0, 0]))
    if isnan(error) or error < _ROUNDING:
        return Interval(value, nan, nan)
    return Interval(value, *_ends(value, error, 0.0), "delong")


def auroc_difference(
    y: np.ndarray, a: np.ndarray, b: np.ndarray, patients: np.ndarray
) -> Difference:
    """Return the difference in AUROC between predictions `a` and `b` of one set of rows.

    See `auroc_differences`.
    """
    return auroc_differences(y, {"a": a, "b": b}, patients)["a", "b"]


def auroc_differences(
    y: np.ndarray, probabilities: Mapping[str, np.ndarray], patients: np.ndarray
) -> dict[tuple[str, str], Difference]:
    """Return the difference in AUROC for every pair of heads, with a normal interval and test.

    Parameters and errors are those of `auroc_covariance`.

    Returns
    -------
    dict of (a, b) to Difference, in the order of `itertools.combinations`
        With s the standard error of the difference a - b, the 95 % interval is clipped to [-1, 1],
        and p comes from the two-sided test of (a - b) / s. Predictions that rank the rows equally
        differ by 0 with p = 1 and no interval. Heads that differ with s = 0, such as one of AUROC
        1 and a constant, have no p, since it would be 0, which no sample supports. Not corrected
        for the number of pairs: see `holm`.
    """
    parts = _parts(y, probabilities, patients)
    found = {}
    for (i, a), (j, b) in combinations(enumerate(probabilities), 2):
        # from differences of the parts: heads that rank the rows equally have exactly 0
        abnormal = parts.abnormal[[i]] - parts.abnormal[[j]]
        normal = parts.normal[[i]] - parts.normal[[j]]
        variance = _covariance(abnormal, normal, parts.corrections)
        found[a, b] = _difference(float(parts.auroc[i] - parts.auroc[j]), float(variance[0, 0]))
    return found


class _Parts(NamedTuple):
    """AUROCs (k,), patients' contributions from abnormal and normal rows (k, I), and c(I10) etc.

    The names are those of `auroc_covariance`'s notes.
    """

    auroc: np.ndarray
    abnormal: np.ndarray
    normal: np.ndarray
    corrections: tuple[float, float, float]


def _parts(y: np.ndarray, probabilities: Mapping[str, np.ndarray], patients: np.ndarray) -> _Parts:
    checked = [check_rows(y, probability) for probability in probabilities.values()]
    codes = patient_codes(patients)
    if len(codes) != len(y):
        raise TrainingDataError(f"{len(y)} labels, but {len(codes)} patients")
    is_abnormal = np.asarray(y) == 1
    n_patients = int(codes.max()) + 1 if len(codes) else 0
    auroc = np.full(len(checked), np.nan)
    sums = np.full((2, len(checked), n_patients), np.nan)
    if 0 < is_abnormal.sum() < len(codes):
        for k, (_, values) in enumerate(checked):
            placed = placements(is_abnormal, values)
            auroc[k] = placed[is_abnormal].mean()
            for part, own in zip(sums, (is_abnormal, ~is_abnormal), strict=True):
                excess = (placed[own] - auroc[k]) / own.sum()
                part[k] = np.bincount(codes[own], weights=excess, minlength=n_patients)
    groups = (codes[is_abnormal], codes[~is_abnormal], codes)
    of_abnormal, of_normal, of_all = (_correction(len(np.unique(group))) for group in groups)
    return _Parts(auroc, sums[0], sums[1], (of_abnormal, of_normal, of_all))


def _covariance(
    abnormal: np.ndarray, normal: np.ndarray, corrections: tuple[float, float, float]
) -> np.ndarray:
    """Return `auroc_covariance`'s formula as a sum of squares, which stays >= 0 when rounded."""
    of_abnormal, of_normal, of_all = corrections
    both = abnormal + normal
    shared = of_all * (both @ both.T)
    of_abnormal, of_normal = of_abnormal - of_all, of_normal - of_all
    return np.asarray(
        shared + of_abnormal * (abnormal @ abnormal.T) + of_normal * (normal @ normal.T)
    )


def _correction(n: int) -> float:
    return n / (n - 1) if n > 1 else nan


def _difference(value: float, variance: float) -> Difference:
    if isnan(variance):
        return Difference(value, nan, nan, nan)
    error = sqrt(variance)
    if error < _ROUNDING:
        is_same = abs(value) < _ROUNDING
        return Difference(0.0 if is_same else value, nan, nan, 1.0 if is_same else nan)
    low, high = _ends(value, error, -1.0)
    return Difference(value, low, high, float(2 * ndtr(-abs(value) / error)), "delong")


def _ends(value: float, error: float, lowest: float) -> tuple[float, float]:
    """Return the limits of the normal interval, clipped to [lowest, 1]; NaN if the error is NaN."""
    if isnan(error):
        return nan, nan
    reach = float(ndtri((1 + CONFIDENCE) / 2)) * error
    return max(value - reach, lowest), min(value + reach, 1.0)
