"""How much worse scores are on other patients than on a model's own test patients."""

from collections.abc import Mapping
from math import nan, sqrt

import numpy as np
import pandas as pd

from medembed.evaluation.paired import Difference, difference_of
from medembed.evaluation.resampling import Interval, centre, draw, patient_codes
from medembed.evaluation.scores import SCORES, Scorer

__all__ = ["bootstrap_drop", "mover_drop"]

#: The two samples are drawn from streams of their own.
_SECOND_STREAM = 1_000_003


def bootstrap_drop(
    internal: pd.DataFrame,
    external: pd.DataFrame,
    threshold: float,
    *,
    n_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Difference]:
    """Return every score on external rows less that on internal ones, patients resampled in both.

    Parameters
    ----------
    internal, external : DataFrame
        `label` (0 or 1), `probability`, `patient`; no patient is in both.
    threshold : float
        Of the decision scores.
    n_resamples, seed : int
        As for `bootstrap_scores`.

    Returns
    -------
    dict of str to Difference
        Below zero where the score is lower on external rows. The interval is that of the
        percentiles of the differences of independent resamples, p that of the test which inverts
        it (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8, 13 and 15).

    Raises
    ------
    TrainingDataError
        As `Scorer`.
    """
    inside, inside_draws = _draw(internal, threshold, n_resamples, seed)
    outside, outside_draws = _draw(external, threshold, n_resamples, seed + _SECOND_STREAM)
    several = min(internal["patient"].nunique(), external["patient"].nunique()) > 1
    return {
        name: _difference(
            name, outside[name] - inside[name], outside_draws[name] - inside_draws[name], several
        )
        for name in SCORES
    }


def mover_drop(
    internal: Mapping[str, Interval], external: Mapping[str, Interval]
) -> dict[str, Difference]:
    """Return external less internal scores, with intervals from both sides' own intervals.

    MOVER: with e in [le, ue] and i in [li, ui] of independent samples the ends are
    ``e - i - sqrt((e - le)² + (ui - i)²)`` and ``e - i + sqrt((ue - e)² + (i - li)²)`` (Zou and
    Donner, Statistics in Medicine 27, 2008). There is no p: NaN.

    Parameters
    ----------
    internal, external : dict of str to Interval
        Scores that only one side has are left out.
    """
    return {name: _mover(internal[name], external[name]) for name in internal if name in external}


def _draw(
    rows: pd.DataFrame, threshold: float, n_resamples: int, seed: int
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    scorer = Scorer(rows["label"].to_numpy(), rows["probability"].to_numpy(np.float64), threshold)
    codes = patient_codes(rows["patient"])
    truth, draws = draw([scorer], [np.arange(len(rows))], codes, n_resamples, seed)
    return truth[0], draws[0]


def _difference(name: str, value: float, draws: np.ndarray, several: bool) -> Difference:
    if name == "ece":
        # resampling inflates it, in a small sample more than in a large one
        draws = centre(value, draws)
    return difference_of(value, draws, several=several)


def _mover(inside: Interval, outside: Interval) -> Difference:
    value = outside.value - inside.value
    low = value - sqrt((outside.value - outside.low) ** 2 + (inside.high - inside.value) ** 2)
    high = value + sqrt((outside.high - outside.value) ** 2 + (inside.value - inside.low) ** 2)
    return Difference(value, low, high, nan)
