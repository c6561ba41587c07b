"""Decision curves: what decisions are worth at each threshold, beside treating all or none.

Vickers and Elkin, Medical Decision Making 26, 2006. A threshold of t says that one study found is
worth (1 - t) / t false alarms.
"""

import numpy as np
import pandas as pd

from medembed.core.errors import TrainingDataError
from medembed.evaluation.bootstrap import CONFIDENCE, MIN_PATIENTS, patient_codes
from medembed.evaluation.bounds import quantile
from medembed.evaluation.checks import check_rows
from medembed.evaluation.estimates import measure_spread

__all__ = ["THRESHOLDS", "net_benefit"]

THRESHOLDS = np.arange(1, 100) / 100
"""Where a decision curve is given, by default."""


def net_benefit(
    y: np.ndarray,
    probability: np.ndarray,
    patients: np.ndarray,
    thresholds: np.ndarray = THRESHOLDS,
) -> pd.DataFrame:
    """Return the net benefit of calling abnormal at or above each threshold, with a 95 % band.

    Net benefit is ``TP / n - FP / n * t / (1 - t)``: the share found, less the false alarms at
    their price. Its variance comes from what each patient adds to it (see `influence`); limits are
    Student's t, pointwise.

    Parameters
    ----------
    y, probability, patients : arrays of shape (n,)
        Labels 0 or 1, calibrated probabilities of abnormal, and whose row it is.
    thresholds : array of shape (k,)
        In (0, 1).

    Returns
    -------
    DataFrame
        One row per threshold: `threshold`, `value`, `low`, `high`, `treat_all` (of calling every
        row abnormal; calling none has 0). NaN without a row; the ends are NaN with fewer than
        `MIN_PATIENTS` patients of a class, and where the rows do not tell how far it varies:
        nothing is called abnormal, or no two patients differ.

    Raises
    ------
    TrainingDataError
        A threshold outside (0, 1), or as `Scorer`.
    """
    labels, values = check_rows(y, probability)
    codes, cuts = patient_codes(patients), np.asarray(thresholds, np.float64)
    if len(codes) != len(labels):
        raise TrainingDataError(f"{len(labels)} labels, but {len(codes)} patients")
    if not ((cuts > 0) & (cuts < 1)).all():
        raise TrainingDataError("a threshold of net benefit is above 0 and below 1")
    prices = cuts / (1 - cuts)
    found = [
        _estimate(labels, values >= cut, codes, price)
        for cut, price in zip(cuts, prices, strict=True)
    ]
    share = labels.mean() if len(labels) else np.nan
    table = pd.DataFrame(found, columns=["value", "low", "high"], dtype=np.float64)
    table.insert(0, "threshold", cuts)
    return table.assign(treat_all=share - (1 - share) * prices)


def _estimate(
    labels: np.ndarray, called: np.ndarray, codes: np.ndarray, price: float
) -> tuple[float, float, float]:
    n = len(labels)
    if n == 0:
        return np.nan, np.nan, np.nan
    gained = called * np.where(labels == 1, 1.0, -price)
    value = float(gained.mean())
    spread = measure_spread(labels, (gained - value) / n, codes)
    if spread.fewest < MIN_PATIENTS or not spread.error > 0:
        return value, np.nan, np.nan
    freedom = min(spread.freedom, spread.fewest - 1)
    reach = quantile(CONFIDENCE, freedom) * spread.error
    return value, value - reach, value + reach
