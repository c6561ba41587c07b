"""ROC curves and their bands."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medembed.evaluation.resampling import draw, patient_codes, percentiles
from medembed.evaluation.scores import Scorer

__all__ = ["roc_band", "roc_curve"]

GRID = np.linspace(0, 1, 101)
"""False-positive rates at which a band is given."""


def roc_curve(y: NDArray[Any], probability: NDArray[Any]) -> pd.DataFrame:
    """Return the empirical ROC curve, from nothing called abnormal to everything.

    Parameters
    ----------
    y, probability : arrays of shape (n,)
        Labels 0 or 1 and probabilities of abnormal.

    Returns
    -------
    DataFrame
        Columns fpr, tpr (in [0, 1]) and threshold (infinite in the first row). One row per
        distinct probability; empty where the labels are of one class.
    """
    positives, negatives, ends = _cumulated(y, probability, np.ones((1, len(y))))
    if not positives[0, -1] or not negatives[0, -1]:
        return pd.DataFrame({"fpr": [], "tpr": [], "threshold": []}, dtype=np.float64)
    falling = np.sort(np.asarray(probability, np.float64))[::-1]
    return pd.DataFrame(
        {
            "fpr": negatives[0] / negatives[0, -1],
            "tpr": positives[0] / positives[0, -1],
            "threshold": np.r_[np.inf, falling[ends]],
        }
    )


def roc_band(
    y: NDArray[Any],
    probability: NDArray[Any],
    patients: NDArray[Any],
    *,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the pointwise 95 % band of the ROC curve from a bootstrap over patients.

    The band is vertical: at each false-positive rate the percentiles of the resampled curves'
    sensitivities (Fawcett, An introduction to ROC analysis, 2006, section 8.1).

    Parameters
    ----------
    y, probability, patients : arrays of shape (n,)
        Labels, probabilities of abnormal, and whose row it is.
    n_resamples, seed : int
        How many resamples are drawn, and from which stream.

    Returns
    -------
    DataFrame
        Columns fpr, tpr, low, high at 101 rates; low and high are NaN where not estimable.
    """
    scorer = _Sensitivities(y, probability)
    codes = patient_codes(patients)
    truth, draws = draw([scorer], [np.arange(len(codes))], codes, n_resamples, seed)
    rows = [
        (rate, truth[0][name], *percentiles(truth[0][name], draws[0][name]))
        for rate, name in zip(GRID, scorer.names, strict=True)
    ]
    return pd.DataFrame(rows, columns=["fpr", "tpr", "low", "high"])


class _Sensitivities(Scorer):
    """Score sensitivity at each rate of `GRID`, for use with `draw`."""

    def __init__(self, y: NDArray[Any], probability: NDArray[Any]) -> None:
        super().__init__(y, probability, 0.5)
        self.names = tuple(f"{rate:.2f}" for rate in GRID)
        self._data = (np.asarray(y), np.asarray(probability, np.float64))

    def __call__(self, weights: NDArray[Any]) -> dict[str, NDArray[Any]]:
        positives, negatives, _ = _cumulated(*self._data, weights)
        found = np.full((len(weights), len(GRID)), np.nan)
        for i in np.flatnonzero((positives[:, -1] > 0) & (negatives[:, -1] > 0)):
            rates = negatives[i] / negatives[i, -1]
            # np.interp wants rising rates: of a vertical piece it takes the top, as a curve does
            found[i] = np.interp(GRID, rates, positives[i] / positives[i, -1])
        return dict(zip(self.names, found.T, strict=True))


def _cumulated(
    y: NDArray[Any], probability: NDArray[Any], weights: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.intp]]:
    """Count abnormal and normal rows at or above each distinct probability, highest first.

    Returns arrays of shape (B, g + 1), beginning with 0, and for each of the g distinct
    probabilities the place of its last row.
    """
    order = np.argsort(-np.asarray(probability, np.float64), kind="stable")
    falling = np.asarray(probability, np.float64)[order]
    ends = np.flatnonzero(np.r_[falling[1:] != falling[:-1], True])
    ordered, abnormal = weights[:, order], np.asarray(y)[order] == 1
    start = np.zeros((len(weights), 1))
    positives = np.cumsum(ordered * abnormal, axis=1)[:, ends]
    negatives = np.cumsum(ordered * ~abnormal, axis=1)[:, ends]
    return np.hstack([start, positives]), np.hstack([start, negatives]), ends
