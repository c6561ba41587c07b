"""How often abnormal is right where a head says so: the numbers of a reliability diagram."""

from math import nan

import numpy as np
import pandas as pd

from medembed.evaluation.resampling import draw, patient_codes, percentiles, quotients
from medembed.evaluation.scores import N_ECE_BINS, Scorer

__all__ = ["reliability"]


def reliability(
    y: np.ndarray,
    probability: np.ndarray,
    patients: np.ndarray,
    *,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return mean probability and share abnormal in each bin of the expected calibration error.

    The bins are those of `Scorer`'s ECE: `N_ECE_BINS` of equal width, each without its upper end
    but the last one (DeGroot and Fienberg, The Statistician 32, 1983, for the diagram).

    Parameters
    ----------
    y, probability, patients : arrays of shape (n,)
        As for `bootstrap_scores`.
    n_resamples, seed : int
        How many resamples are drawn, and from which stream.

    Returns
    -------
    DataFrame
        One row per bin: `low`, `high` (its ends), `n` (its rows), `mean_probability`,
        `share_abnormal`, and `share_low`, `share_high`, the 95 % percentile interval of the share
        from a bootstrap over patients. Of an empty bin all but the ends and `n` are NaN; the
        interval is NaN too where over a tenth of the resamples leave the bin empty. Rows of one
        class only give an interval without width.

    Raises
    ------
    TrainingDataError
        As `Scorer`.
    """
    scorer = _Shares(y, probability)
    codes = patient_codes(patients)
    truth, draws = draw([scorer], [np.arange(len(codes))], codes, n_resamples, seed)
    several = len(np.unique(codes)) > 1
    ends = [
        percentiles(truth[0][name], draws[0][name]) if several else (nan, nan)
        for name in scorer.names
    ]
    edges = np.arange(N_ECE_BINS + 1) / N_ECE_BINS
    return pd.DataFrame(
        {
            "low": edges[:-1],
            "high": edges[1:],
            "n": scorer.n,
            "mean_probability": scorer.mean_probability,
            "share_abnormal": [truth[0][name] for name in scorer.names],
            "share_low": [low for low, _ in ends],
            "share_high": [high for _, high in ends],
        }
    )


class _Shares(Scorer):
    """Score the share of abnormal rows in each bin, for use with `draw`."""

    def __init__(self, y: np.ndarray, probability: np.ndarray) -> None:
        super().__init__(y, probability, 0.5)
        self.names = tuple(str(k) for k in range(N_ECE_BINS))
        inside = (self._bins[:, None] == np.arange(N_ECE_BINS)).astype(np.float64)
        self._counted = np.hstack([inside, inside * self._positive[:, None]])
        self.n = inside.sum(axis=0).astype(np.int64)
        self.mean_probability = quotients(self._probability @ inside, self.n)

    def __call__(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        counts = np.asarray(weights, dtype=np.float64) @ self._counted
        shares = quotients(counts[:, N_ECE_BINS:], counts[:, :N_ECE_BINS])
        return dict(zip(self.names, shares.T, strict=True))
