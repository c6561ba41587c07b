"""What deferring costs and what it saves: studies handed on, and errors among the others.

A study is decided where its prediction set holds one class. It is deferred where the set holds both
(the head cannot tell) or neither (it resembles neither). Error among the decided against the share
deferred is the curve of selective classification (El-Yaniv and Wiener, On the foundations of
noise-free selective classification, Journal of Machine Learning Research 11, 2010).
"""

from collections.abc import Sequence
from math import nan

import numpy as np
import pandas as pd

from medembed.errors import TrainingDataError
from medembed.evaluation.checks import check_rows
from medembed.evaluation.resampling import Interval, draw, patient_codes, percentiles, quotients
from medembed.evaluation.scores import Scorer

__all__ = ["SHARES", "bootstrap_deferral", "deferral_curve"]

SHARES = ("coverage", "coverage_normal", "coverage_abnormal", "deferred", "empty", "error")


def deferral_curve(y: np.ndarray, p_values: np.ndarray, alphas: Sequence[float]) -> pd.DataFrame:
    """Return what sets do at each level.

    Parameters
    ----------
    y : array of shape (n,)
        Labels, 0 or 1.
    p_values : array of shape (n, 2)
        As `Conformal.p_values` returns them: columns normal and abnormal, in [0, 1].
    alphas : sequence of float
        A class is in a study's set where its p-value is above alpha.

    Returns
    -------
    DataFrame
        One row per alpha: `alpha`, and shares in [0, 1]: `coverage` of studies whose set holds
        their label, `coverage_normal` and `coverage_abnormal` of those of one label, `deferred` of
        studies whose set does not hold one class, `empty` of those whose set holds none, `error` of
        the others, the decided, whose one class is not their label. NaN where there is no such
        study.

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


def bootstrap_deferral(
    y: np.ndarray,
    p_values: np.ndarray,
    patients: np.ndarray,
    alphas: Sequence[float],
    *,
    n_resamples: int = 2000,
    seed: int = 0,
) -> list[dict[str, Interval]]:
    """Return the shares of `deferral_curve` with 95 % intervals from a bootstrap over patients.

    The kept scores of the sets stay as they are: the intervals are those of the test's patients.

    Parameters
    ----------
    y, p_values, alphas
        As for `deferral_curve`.
    patients : array of shape (n,)
        Whose study it is.
    n_resamples, seed : int
        How many resamples are drawn, and from which stream.

    Returns
    -------
    list of dict of str to Interval
        For each alpha, by the names of `SHARES`. The ends are NaN where there is one patient, or
        over a tenth of the resamples has no such study.

    Raises
    ------
    TrainingDataError
        As `deferral_curve`, or a study has no patient.
    """
    tally, codes = _Tally(y, p_values, alphas), patient_codes(patients)
    truth, draws = draw([tally], [np.arange(len(codes))], codes, n_resamples, seed)
    several = len(np.unique(codes)) > 1

    def interval(name: str) -> Interval:
        value = truth[0][name]
        return Interval(value, *(percentiles(value, draws[0][name]) if several else (nan, nan)))

    return [{share: interval(f"{share} {k}") for share in SHARES} for k in range(len(alphas))]


class _Tally(Scorer):
    """Score sets at several levels, for use with `draw`; its names are a share and a number."""

    def __init__(self, y: np.ndarray, p_values: np.ndarray, alphas: Sequence[float]) -> None:
        labels, p_values = _check(y, p_values)
        super().__init__(labels, p_values[:, 0], 0.5, ())
        self.names = tuple(f"{share} {k}" for k in range(len(alphas)) for share in SHARES)
        both = np.column_stack([labels == 0, labels == 1])
        flags = [_flags(labels, p_values, alpha) for alpha in alphas]
        self._counted = np.hstack([both, *flags]).T.astype(np.float64, order="C")

    def __call__(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        # not @: on a busy machine its threads wait for each other, 2 s where this takes 0.2 s
        counts = np.einsum("bn,kn->bk", np.asarray(weights, np.float64), self._counted)
        found: dict[str, np.ndarray] = {}
        for k in range(len(self.names) // len(SHARES)):
            own = np.hstack([counts[:, :2], counts[:, 2 + 5 * k : 7 + 5 * k]])
            found |= {f"{name} {k}": share for name, share in _share(own).items()}
        return found


def _check(y: np.ndarray, p_values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    table = np.asarray(p_values, np.float64)
    if table.ndim != 2 or table.shape[1] != 2:
        raise TrainingDataError(f"p-values of shape {table.shape}; a study has two")
    columns = [check_rows(y, column)[1] for column in table.T]
    return np.asarray(y), np.column_stack(columns)


def _flags(y: np.ndarray, p_values: np.ndarray, alpha: float) -> np.ndarray:
    """Tell which studies are counted for what `_share` divides, bool (n, 5)."""
    normal, abnormal = (p_values > alpha).T
    covered, decided = np.where(y == 1, abnormal, normal), normal != abnormal
    empty = ~(normal | abnormal)
    return np.column_stack(
        [covered & (y == 0), covered & (y == 1), decided, empty, decided & ~covered]
    )


def _share(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return each of `SHARES` (B,) of counts (B, 7): of both labels, then those of `_flags`."""
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
