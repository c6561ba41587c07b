"""Paired comparison of heads that predicted the same rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import isnan, nan

import numpy as np
from scipy.special import bdtr

from medembed.errors import TrainingDataError
from medembed.evaluation.resampling import draw, finite_or_none, patient_codes, percentiles
from medembed.evaluation.scores import Scorer

__all__ = [
    "Difference",
    "McNemar",
    "difference_of",
    "holm",
    "mcnemar",
    "paired_difference",
    "paired_differences",
]


@dataclass(frozen=True)
class Difference:
    """A difference a - b between two sets of predictions on the same rows; NaN: not estimable."""

    difference: float
    low: float
    high: float
    p: float

    def as_dict(self) -> dict[str, float | None]:
        """Return `difference`, `low`, `high`, `p` with None for what is not estimable."""
        return {
            name: finite_or_none(getattr(self, name)) for name in ("difference", "low", "high", "p")
        }


def paired_difference(
    y: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    patients: np.ndarray,
    *,
    n_resamples: int = 2000,
    seed: int = 0,
    score: str = "auroc",
    thresholds: tuple[float, float] = (0.5, 0.5),
) -> Difference:
    """Return the difference in a score between predictions `a` and `b` of the same rows.

    Both are scored on the same resamples of patients. Formula and sources: `paired_differences`.
    """
    pair = paired_differences(
        y,
        {"a": a, "b": b},
        patients,
        n_resamples=n_resamples,
        seed=seed,
        score=score,
        thresholds=dict(zip("ab", thresholds, strict=True)),
    )
    return pair["a", "b"]


def paired_differences(
    y: np.ndarray,
    probabilities: Mapping[str, np.ndarray],
    patients: np.ndarray,
    *,
    n_resamples: int = 2000,
    seed: int = 0,
    score: str = "auroc",
    thresholds: Mapping[str, float] | None = None,
) -> dict[tuple[str, str], Difference]:
    """Return the difference in a score for every pair of heads, each scored once per resample.

    Parameters
    ----------
    y, patients : arrays of shape (n,)
        Labels 0 or 1, and whose row it is.
    probabilities : dict of str to array of shape (n,)
        Each head's probabilities on the same rows.
    n_resamples, seed, score
        As for `bootstrap_scores`; `score` is one of `SCORES`.
    thresholds : dict of str to float, optional
        Each head's threshold, for the decision scores; 0.5 where not given.

    Returns
    -------
    dict of (a, b) to Difference, in the order of `itertools.combinations`
        With d the differences a - b of the B resamples, `low` and `high` are the percentile
        interval and ``p = min(1, 2 * (min(#{d <= 0}, #{d >= 0}) + 1) / (B + 1))``: the test that
        inverts the percentile interval (Efron and Tibshirani, An Introduction to the Bootstrap,
        1993, chapters 13 and 15), with one added so that p is never zero (Davison and Hinkley 1997,
        4.2). Predictions that are the same differ by 0 with p = 1. Not corrected for the number of
        pairs: see `holm`. Of one patient alone, and where over a tenth of the resamples have no
        score, interval and p are NaN.

    Raises
    ------
    TrainingDataError
        As `Scorer`, or a row has no patient.
    """
    cuts = thresholds or {}
    scorers = [
        Scorer(y, probability, cuts.get(name, 0.5), [score])
        for name, probability in probabilities.items()
    ]
    codes = patient_codes(patients)
    everyone = np.arange(len(codes))
    truth, draws = draw(scorers, [everyone] * len(scorers), codes, n_resamples, seed)
    several = len(np.unique(codes)) > 1
    return {
        (a, b): difference_of(
            truth[i][score] - truth[j][score], draws[i][score] - draws[j][score], several=several
        )
        for (i, a), (j, b) in combinations(enumerate(probabilities), 2)
    }


def difference_of(value: float, draws: np.ndarray, *, several: bool) -> Difference:
    """Return a difference with the interval and p of its draws (B,), as `paired_differences`.

    Without `several` patients resamples are all alike, and neither is estimable.
    """
    low, high = percentiles(value, draws) if several else (nan, nan)
    if isnan(low):
        return Difference(value, nan, nan, nan)
    kept = draws[~np.isnan(draws)]
    smaller = min(int((kept <= 0).sum()), int((kept >= 0).sum()))
    return Difference(value, low, high, min(1.0, 2 * (smaller + 1) / (len(kept) + 1)))


def holm(p: Sequence[float]) -> np.ndarray:
    """Return Holm's step-down adjusted p-values, in the order given (float64, NaN stays NaN).

    The k-th smallest of m is multiplied by m - k + 1, made monotone, and cut at 1 (Holm,
    Scandinavian Journal of Statistics 6, 1979). NaN is no test: it does not count in m.
    """
    values = np.asarray(p, dtype=np.float64)
    adjusted = np.full(values.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(values))
    order = tested[np.argsort(values[tested], kind="stable")]
    scaled = values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted


@dataclass(frozen=True)
class McNemar:
    """Rows on which only one of two heads decided rightly, and the exact test of their numbers."""

    only_a: int
    only_b: int
    p: float


def mcnemar(y: np.ndarray, a: np.ndarray, b: np.ndarray) -> McNemar:
    """Test whether two heads decide rightly equally often, by McNemar's exact test.

    The test takes rows as independent, which studies of one patient are not: it is a cross-check
    beside the bootstrap over patients, and too sure of itself where patients have many rows.

    Parameters
    ----------
    y : array of shape (n,)
        Labels, 0 or 1.
    a, b : arrays of shape (n,)
        The heads' decisions on the same rows: True, or 1, is abnormal.

    Returns
    -------
    McNemar
        `p` is two-sided, from the binomial distribution with probability one half of the smaller
        of the two counts among their sum (McNemar, Psychometrika 12, 1947, in its exact form),
        doubled and cut at 1; 1 where the heads are right and wrong on the same rows.

    Raises
    ------
    TrainingDataError
        Lengths that differ, or values other than 0 and 1, False and True.
    """
    labels, of_a, of_b = np.asarray(y), np.asarray(a), np.asarray(b)
    if labels.ndim != 1 or not labels.shape == of_a.shape == of_b.shape:
        raise TrainingDataError(
            f"labels of shape {labels.shape} and decisions of shapes {of_a.shape} and {of_b.shape} "
            "are not three columns of one length"
        )
    for name, values in (("label", labels), ("decision", of_a), ("decision", of_b)):
        if not np.isin(values, (0, 1)).all():
            raise TrainingDataError(f"a {name} is not 0 or 1; leave unlabelled rows out")
    only_a = int(((of_a == labels) & (of_b != labels)).sum())
    only_b = int(((of_b == labels) & (of_a != labels)).sum())
    p = 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5))
    return McNemar(only_a, only_b, min(1.0, p))
