"""The costs and benefits of deferral: the share of deferred studies, and errors among the others.

A study is decided if its prediction set holds one class. It is deferred if the set holds both (the
head is uncertain) or neither (the study resembles neither class). Plotting the error among decided
studies against the share deferred gives the curve of selective classification (El-Yaniv and Wiener,
On the foundations of
noise-free selective classification, Journal of Machine Learning Research 11, 2010).
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from medembed.core.errors import TrainingDataError
from medembed.evaluation.bootstrap import Interval, patient_codes, quotients
from medembed.evaluation.estimates import estimate_share
from medembed.evaluation.scores import check_rows

__all__ = ["SHARES", "deferral_curve", "estimate_deferral"]

SHARES = ("coverage", "coverage_normal", "coverage_abnormal", "deferred", "empty", "error")


def deferral_curve(y: np.ndarray, p_values: np.ndarray, alphas: Sequence[float]) -> pd.DataFrame:
    """Return coverage, deferral and error of the prediction sets at each level.

    Parameters
    ----------
    y : array of shape (n,)
        Labels, 0 or 1.
    p_values : array of shape (n, 2)
        From `Conformal.p_values`: columns normal and abnormal, in [0, 1].
    alphas : sequence of float
        A class is in a study's set if its p-value is above alpha.

    Returns
    -------
    DataFrame
        One row per alpha: `alpha`, and shares in [0, 1]: `coverage`, of studies whose set holds
        their label; `coverage_normal` and `coverage_abnormal`, within one label; `deferred`, of
        studies whose set does not hold exactly one class; `empty`, of studies whose set holds none;
        `error`, of decided studies whose one class is not their label. NaN if the denominator is 0.

    Raises
    ------
    TrainingDataError
        A label is not 0 or 1, a p-value is not in [0, 1], or the lengths differ.
    """
    y, p_values = _check(y, p_values)
    both = np.array([[np.sum(y == 0), np.sum(y == 1)]])
    shares = [
        _share(np.hstack([both, _flags(y, p_values, alpha).sum(axis=0, keepdims=True)]))
        for alpha in alphas
    ]
    columns = {share: [float(own[share][0]) for own in shares] for share in SHARES}
    return pd.DataFrame({"alpha": list(alphas), **columns})


def estimate_deferral(
    y: np.ndarray, p_values: np.ndarray, patients: np.ndarray, alphas: Sequence[float]
) -> list[dict[str, Interval]]:
    """Return the shares of `deferral_curve` with 95 % intervals, patients as clusters.

    The stored scores of the sets are fixed: the intervals reflect sampling of the test patients.

    Parameters
    ----------
    y, p_values, alphas
        See `deferral_curve`.
    patients : array of shape (n,)
        Each study's patient.

    Returns
    -------
    list of dict of str to Interval
        One dict per alpha, keyed by `SHARES`; see `estimates.estimate_share`.

    Raises
    ------
    TrainingDataError
        Invalid labels or p-values (see `deferral_curve`), or a study without a patient.
    """
    labels, p_values = _check(y, p_values)
    codes, everyone = patient_codes(patients), np.ones(len(labels), bool)
    if len(codes) != len(labels):
        raise TrainingDataError(f"{len(labels)} labels, but {len(codes)} patients")
    found = []
    for alpha in alphas:
        normal, abnormal, decided, empty, wrong = _flags(labels, p_values, alpha).T
        covered = normal | abnormal
        own = {
            "coverage": (covered, everyone),
            "coverage_normal": (covered, labels == 0),
            "coverage_abnormal": (covered, labels == 1),
            "deferred": (~decided, everyone),
            "empty": (empty, everyone),
            "error": (wrong, decided),
        }
        found.append({name: estimate_share(*own[name], codes).interval() for name in SHARES})
    return found


def _check(y: np.ndarray, p_values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    table = np.asarray(p_values, np.float64)
    if table.ndim != 2 or table.shape[1] != 2:
        raise TrainingDataError(f"p-values of shape {table.shape}; a study has two")
    columns = [check_rows(y, column)[1] for column in table.T]
    return np.asarray(y), np.column_stack(columns)


def _flags(y: np.ndarray, p_values: np.ndarray, alpha: float) -> np.ndarray:
    """Return which studies count in each numerator and denominator of `_share`, bool (n, 5)."""
    normal, abnormal = (p_values > alpha).T
    covered, decided = np.where(y == 1, abnormal, normal), normal != abnormal
    empty = ~(normal | abnormal)
    return np.column_stack(
        [covered & (y == 0), covered & (y == 1), decided, empty, decided & ~covered]
    )


def _share(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return `SHARES` (B,) from counts (B, 7): those of both labels, then those of `_flags`."""
    n_normal, n_abnormal, normal, abnormal, decided, empty, wrong = counts.T
    n = n_normal + n_abnormal
    return {
        "coverage": quotients(normal + abnormal, n),
        "coverage_normal": quotients(normal, n_normal),
        "coverage_abnormal": quotients(abnormal, n_abnormal),
        "deferred": quotients(n - decided, n),
        "empty": quotients(empty, n),
        "error": quotients(wrong, decided),
    }
