"""Paired comparison of heads that predicted one set of rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import inf, isnan, nan

import numpy as np
from scipy.special import bdtr, ndtr, stdtr

from medembed.core.errors import TrainingDataError
from medembed.evaluation.bootstrap import (
    CONFIDENCE,
    MIN_PATIENTS,
    draw,
    finite_or_none,
    patient_codes,
    percentiles,
)
from medembed.evaluation.bounds import quantile
from medembed.evaluation.estimates import influences, measure_spread
from medembed.evaluation.scores import Scorer

__all__ = [
    "Difference",
    "McNemar",
    "bootstrap_p",
    "compare_influences",
    "holm",
    "mcnemar",
    "non_inferiority_p",
    "paired_difference",
    "paired_differences",
]

#: AUROCs over n1 * n0 pairs of rows differ by at least 1 / (2 n1 n0); less is rounding error.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Difference:
    """A difference a - b between two predictions of the same rows; NaN if not estimable.

    `error` is its standard error and `freedom` its degrees of freedom, only for method "t".
    """

    difference: float
    low: float
    high: float
    p: float
    method: str | None = None
    error: float = nan
    freedom: float = nan

    def as_dict(self) -> dict[str, float | str | None]:
        """Return `difference`, `low`, `high`, `p`, None if not estimable, and `method`."""
        found: dict[str, float | None] = {
            name: finite_or_none(getattr(self, name)) for name in ("difference", "low", "high", "p")
        }
        return {**found, "method": self.method}


def paired_difference(
    y: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    patients: np.ndarray,
    *,
    score: str = "auroc",
    thresholds: tuple[float, float] = (0.5, 0.5),
) -> Difference:
    """Return the difference in a score between predictions `a` and `b` of the same rows.

    Formula and sources: `paired_differences`.
    """
    pair = paired_differences(
        y,
        {"a": a, "b": b},
        patients,
        score=score,
        thresholds=dict(zip("ab", thresholds, strict=True)),
    )
    return pair["a", "b"]


def paired_differences(
    y: np.ndarray,
    probabilities: Mapping[str, np.ndarray],
    patients: np.ndarray,
    *,
    score: str = "auroc",
    thresholds: Mapping[str, float] | None = None,
) -> dict[tuple[str, str], Difference]:
    """Return the difference in a score for every pair of heads, patients as clusters.

    Parameters
    ----------
    y, patients : arrays of shape (n,)
        Labels 0 or 1, and each row's patient.
    probabilities : dict of str to array of shape (n,)
        Each head's probabilities on the same rows.
    score : str
        One of `SCORES`.
    thresholds : dict of str to float, optional
        Each head's threshold for the decision scores; 0.5 by default.

    Returns
    -------
    dict of (a, b) to Difference, in the order of `itertools.combinations`
        The interval, clipped to [-1, 1], and the two-sided p come from Student's t of the
        difference over its standard error, from each patient's contribution (`influences`; for
        AUROC this is DeLong's with Obuchowski's clusters), with at most as many degrees of freedom
        as the rarer class has patients, less one. Predictions that the score does not distinguish
        differ by 0 with p = 1 and no interval. Not corrected for the number of pairs: see `holm`.
        With fewer than `MIN_PATIENTS` patients of a class, or without spread, interval and p are
        NaN; they are also NaN for ECE, whose noise does not average out.

    Raises
    ------
    TrainingDataError
        Invalid labels or probabilities (see `Scorer`), or a row without a patient.
    """
    cuts, codes, labels = thresholds or {}, patient_codes(patients), np.asarray(y)
    values, added = {}, {}
    for name, probability in probabilities.items():
        scorer = Scorer(y, probability, cuts.get(name, 0.5), [score])
        if scorer.n_rows != len(codes):
            raise TrainingDataError(f"{scorer.n_rows} labels, but {len(codes)} patients")
        values[name] = float(scorer(np.ones((1, len(codes))))[score][0])
        if score != "ece":
            checked = np.asarray(probability, np.float64)
            added[name] = influences(labels, checked, cuts.get(name, 0.5), [score])[score]
    fewest = _fewest_patients(labels, codes, score)
    return {
        (a, b): compare_influences(
            values[a] - values[b],
            added[a] - added[b] if added else np.full(len(codes), nan),
            (labels, codes),
            fewest,
        )
        for a, b in combinations(probabilities, 2)
    }


def non_inferiority_p(difference: Difference, margin: float) -> float:
    """Return the one-sided p that a is worse than b by `margin` or more, NaN without a spread.

    From Student's t of ``difference + margin`` over the standard error: below 0.025 exactly if the
    lower limit of the 95 % interval is above ``-margin`` (Piaggio et al., JAMA 308, 2012;
    Wellek, Testing Statistical Hypotheses of Equivalence and Noninferiority, 2010).
    """
    if not difference.error > 0:
        return nan
    return float(_tail((difference.difference + margin) / difference.error, difference.freedom))


def bootstrap_p(
    y: np.ndarray,
    probabilities: Mapping[str, np.ndarray],
    patients: np.ndarray,
    *,
    n_resamples: int = 2000,
    seed: int = 0,
    score: str = "auroc",
) -> dict[tuple[str, str], float]:
    """Return the p of every pair of heads from a bootstrap over patients, as a cross-check.

    With d the differences a - b on the B resamples, ``p = min(1, 2 * (min(#{d <= 0}, #{d >= 0}) +
    1) / (B + 1))``: the test that inverts the percentile interval (Efron and Tibshirani, An
    Introduction to the Bootstrap, 1993, chapters 13 and 15), with one added so that p is never
    zero (Davison and Hinkley 1997, 4.2). NaN if `percentiles` gives no interval.
    """
    scorers = [Scorer(y, probability, 0.5, [score]) for probability in probabilities.values()]
    codes = patient_codes(patients)
    members = [np.arange(len(codes))] * len(scorers)
    truth, draws = draw(scorers, members, codes, n_resamples, seed)
    several = len(np.unique(codes)) > 1
    return {
        (a, b): _smaller_tail(
            truth[i][score] - truth[j][score], draws[i][score] - draws[j][score], several=several
        )
        for (i, a), (j, b) in combinations(enumerate(probabilities), 2)
    }


def compare_influences(
    value: float, added: np.ndarray, rows: tuple[np.ndarray, np.ndarray], fewest: int
) -> Difference:
    """Return a difference with its interval from Student's t, see `paired_differences`.

    Parameters
    ----------
    value : float
        The difference of the two scores.
    added : array of shape (n,)
        The difference of the rows' contributions to them.
    rows : two arrays of shape (n,)
        Labels, and patients from `patient_codes`.
    fewest : int
        Patients of the rarer class.
    """
    if isnan(value) or np.isnan(added).any() or fewest < MIN_PATIENTS:
        return Difference(value, nan, nan, nan)
    spread = measure_spread(rows[0], added, rows[1])
    if not spread.error > _ROUNDING:
        is_same = abs(value) < _ROUNDING
        return Difference(0.0 if is_same else value, nan, nan, 1.0 if is_same else nan)
    freedom = min(spread.freedom, fewest - 1)  # a few patients determine their own spread poorly
    reach = quantile(CONFIDENCE, freedom) * spread.error
    p = 2 * float(_tail(abs(value) / spread.error, freedom))
    low, high = max(value - reach, -1.0), min(value + reach, 1.0)
    return Difference(value, low, high, p, "t", spread.error, freedom)


def _tail(ratio: float, freedom: float) -> float:
    return float(ndtr(-ratio) if freedom == inf else stdtr(freedom, -ratio))


def _fewest_patients(labels: np.ndarray, codes: np.ndarray, score: str) -> int:
    """Return the number of patients of the rarer class among those that the score uses."""
    n_abnormal, n_normal = (len(np.unique(codes[labels == label])) for label in (1, 0))
    if score in ("accuracy", "brier"):
        return len(np.unique(codes))
    return {"sensitivity": n_abnormal, "specificity": n_normal}.get(
        score, min(n_abnormal, n_normal)
    )


def _smaller_tail(value: float, draws: np.ndarray, *, several: bool) -> float:
    if not several or isnan(percentiles(value, draws)[0]):
        return nan
    kept = draws[~np.isnan(draws)]
    smaller = min(int((kept <= 0).sum()), int((kept >= 0).sum()))
    return min(1.0, 2 * (smaller + 1) / (len(kept) + 1))


def holm(p: Sequence[float]) -> np.ndarray:
    """Return Holm's step-down adjusted p-values, in the order given (float64, NaN stays NaN).

    The k-th smallest of m is multiplied by m - k + 1, made monotone, and capped at 1 (Holm,
    Scandinavian Journal of Statistics 6, 1979). NaN is not a test and does not count in m.
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
    """Numbers of rows on which only one of two heads was correct, and their exact test."""

    only_a: int
    only_b: int
    p: float


def mcnemar(y: np.ndarray, a: np.ndarray, b: np.ndarray) -> McNemar:
    """Return McNemar's exact test of whether two heads are correct equally often.

    The test assumes independent rows, but studies of one patient are dependent: it is a cross-check
    of the bootstrap over patients, and overconfident if patients have many rows.

    Parameters
    ----------
    y : array of shape (n,)
        Labels, 0 or 1.
    a, b : arrays of shape (n,)
        The heads' decisions on these rows: True, or 1, is abnormal.

    Returns
    -------
    McNemar
        `p` is two-sided, from the binomial distribution with probability one half of the smaller
        of the two counts among their sum (McNemar, Psychometrika 12, 1947, in its exact form),
        doubled and capped at 1; 1 if the heads are right and wrong on the same rows.

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
