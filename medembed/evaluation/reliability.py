"""How often abnormal is right where a head says so: the numbers of a reliability diagram."""

import numpy as np
import pandas as pd

from medembed.core.errors import TrainingDataError
from medembed.evaluation.bootstrap import patient_codes, quotients
from medembed.evaluation.checks import check_rows
from medembed.evaluation.estimates import estimate_share
from medembed.evaluation.scores import N_ECE_BINS, find_bins

__all__ = ["reliability"]


def reliability(y: np.ndarray, probability: np.ndarray, patients: np.ndarray) -> pd.DataFrame:
    """Return mean probability and share abnormal in each bin of the expected calibration error.

    The bins are those of `Scorer`'s ECE: `N_ECE_BINS` of equal width, each without its upper end
    but the last one (DeGroot and Fienberg, The Statistician 32, 1983, for the diagram).

    Parameters
    ----------
    y, probability, patients : arrays of shape (n,)
        As for `bootstrap_scores`.

    Returns
    -------
    DataFrame
        One row per bin: `low`, `high` (its ends), `n` (its rows), `k` (those abnormal),
        `mean_probability`, `share_abnormal`, `share_low`, `share_high` (the 95 % interval of the
        share, see `estimates.estimate_share`), and its `method`. Of an empty bin all but ends and
        counts are NaN; the interval is NaN too in a bin of fewer than `MIN_PATIENTS` patients.

    Raises
    ------
    TrainingDataError
        As `Scorer`.
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
