"""Separate a score's spread over training seeds from that over samples of patients."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import numpy as np

from medembed.core.errors import TrainingDataError
from medembed.evaluation.bootstrap import draw, patient_codes, standard_error
from medembed.evaluation.scores import Scorer

__all__ = ["SeedSpread", "seed_spread"]


@dataclass(frozen=True)
class SeedSpread:
    """A head's mean score over seeds, and two sources of its variance; NaN if not estimable.

    Attributes
    ----------
    mean : float
        Mean over seeds.
    seed_sd : float
        Sample standard deviation over seeds (n - 1): the chance of training. NaN for one seed.
    sampling_sd : float
        Bootstrap standard error over patients, averaged over seeds: the chance of the test set.
    n_seeds : int
    """

    mean: float
    seed_sd: float
    sampling_sd: float
    n_seeds: int


def seed_spread(
    y: np.ndarray,
    probabilities: Sequence[np.ndarray],
    patients: np.ndarray,
    thresholds: Sequence[float],
    *,
    score: str = "auroc",
    n_resamples: int = 2000,
    seed: int = 0,
) -> SeedSpread:
    """Return the spread of a score over seeds and over resamples of patients.

    More seeds reduce the former, only more patients the latter (Bouthillier et al., Accounting for
    Variance in Machine Learning Benchmarks, MLSys 2021). All seeds share the resamples.

    Parameters
    ----------
    y, patients : arrays of shape (n,)
        Labels 0 or 1, and each row's patient.
    probabilities : sequence of arrays of shape (n,)
        Predictions of these rows by one head trained with several seeds.
    thresholds : sequence of float
        Each seed's threshold for the decision scores.
    score : str
        One of `SCORES`.
    n_resamples, seed : int
        Number of resamples, and their random seed.

    Raises
    ------
    TrainingDataError
        There are no predictions, or not one threshold for each; or labels or probabilities are
        invalid, see `Scorer`.
    """
    if not len(probabilities) or len(probabilities) != len(thresholds):
        raise TrainingDataError(
            f"{len(probabilities)} predictions and {len(thresholds)} thresholds: give at least "
            "one seed, and one threshold for each"
        )
    pairs = zip(probabilities, thresholds, strict=True)
    scorers = [Scorer(y, probability, threshold, [score]) for probability, threshold in pairs]
    codes = patient_codes(patients)
    everyone = [np.arange(len(codes))] * len(scorers)
    truth, draws = draw(scorers, everyone, codes, n_resamples, seed)
    values = np.array([value[score] for value in truth])
    errors = [standard_error(*pair) for pair in zip(values, (d[score] for d in draws), strict=True)]
    return SeedSpread(
        mean=float(values.mean()),
        seed_sd=float(values.std(ddof=1)) if len(values) > 1 else nan,
        sampling_sd=float(np.mean(errors)) if len(np.unique(codes)) > 1 else nan,
        n_seeds=len(values),
    )
