"""Scores with limits that cover the truth at realistic sample sizes, with patients as clusters.

Every score except ECE is estimated without resampling: its variance comes from each patient's
contribution (`influences`), its limits from the method that covered best in `bench/coverage.py`:

- shares (accuracy, sensitivity, specificity, predictive values) by `bounds.bound_share` with the
  patients' design effect (Kish, Survey Sampling, 1965);
- AUROC by `bounds.bound_auroc`, with DeLong's variance for clusters (Obuchowski, Biometrics 53,
  1997), shrunk towards Hanley and McNeil's if few patients carry it;
- average precision and Brier score by Student's t on the log-odds;
- macro-F1 and kappa from the limits of sensitivity, specificity and prevalence (MOVER).

The degrees of freedom account for patients' unequal contributions to the variance (Satterthwaite,
Biometrics Bulletin 2, 1946): n equal normal contributions give n - 1, and fewer if few patients
carry most of the variance.

A row's contribution is the derivative of the score in the row's weight. The sum of squares of the
patients' sums is the score's variance with patients as clusters, without resampling (the
infinitesimal jackknife; Jaeckel, Bell Laboratories memorandum, 1972; Efron, Biometrika 68, 1981).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf, isnan, nan, sqrt
from typing import NamedTuple

import numpy as np

from medembed.core.errors import TrainingDataError
from medembed.evaluation.bootstrap import CONFIDENCE, CONSTANT, MIN_PATIENTS, Interval
from medembed.evaluation.bounds import (
    RULE_OF_FIVE,
    Bounds,
    auroc_variance,
    bound_auroc,
    bound_on_logit,
    bound_share,
    combine,
    quantile,
)
from medembed.evaluation.scores import SCORES, Scorer

__all__ = [
    "PREDICTIVE",
    "Clusters",
    "Estimate",
    "Spread",
    "estimate_auroc",
    "estimate_mean",
    "estimate_scores",
    "estimate_share",
    "influences",
    "mean_estimate",
    "measure_spread",
    "placements",
]


def influences(
    y: np.ndarray, probability: np.ndarray, threshold: float, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return the derivative of each score in the weight of each row, float64 (n,).

    Parameters
    ----------
    y, probability : arrays of shape (n,)
        Labels 0 or 1 and probabilities of abnormal, checked by the caller.
    threshold : float
        Decisions are abnormal at or above it.
    names : sequence of str
        Scores from `SCORES` except ECE, which has no derivative, and from `PREDICTIVE`.

    Returns
    -------
    dict of str to ndarray
        Each sums to 0. NaN if the score is not estimable.
    """
    labels, called = y.astype(np.float64), (probability >= threshold).astype(np.float64)
    found: dict[str, np.ndarray] = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for name in names:
            if name == "auroc":
                found[name] = _of_auroc(labels, probability)
            elif name == "average_precision":
                found[name] = _of_average_precision(labels, probability)
            elif name == "brier":
                found[name] = _of_mean((probability - labels) ** 2)
            else:
                found[name] = _DECISIONS[name](labels, called)
    return found


def placements(is_abnormal: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return for each row the share of the other class that it ranks correctly against.

    From midranks, in O(n log n) (Sun and Xu, IEEE Signal Processing Letters 21, 2014).
    """
    ranks, is_normal = _midranks(values), ~is_abnormal
    found = np.empty(len(values))
    below = ranks[is_abnormal] - _midranks(values[is_abnormal])
    found[is_abnormal] = below / is_normal.sum()
    below = ranks[is_normal] - _midranks(values[is_normal])
    found[is_normal] = 1 - below / is_abnormal.sum()
    return found


def _midranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 1, ties at their mean, as scipy.stats does, which is slow to import.

    >>> _midranks(np.array([0.3, 0.1, 0.3]))
    array([2.5, 1. , 2.5])
    """
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[places])


def _of_auroc(labels: np.ndarray, probability: np.ndarray) -> np.ndarray:
    is_abnormal = labels == 1
    n_abnormal = int(is_abnormal.sum())
    if not 0 < n_abnormal < len(labels):
        return np.full(len(labels), np.nan)
    placed = placements(is_abnormal, probability)
    excess = placed - placed[is_abnormal].mean()
    return np.asarray(excess / np.where(is_abnormal, n_abnormal, len(labels) - n_abnormal))


def _of_average_precision(labels: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Differentiate the sum over tied groups of their abnormal rows times the precision."""
    n_abnormal = labels.sum()
    if not 0 < n_abnormal < len(labels):
        return np.full(len(labels), np.nan)
    _, groups = np.unique(-probability, return_inverse=True)  # from the highest downwards
    hits = np.bincount(groups, weights=labels)
    true, called = np.cumsum(hits), np.cumsum(np.bincount(groups))
    precision = true / called
    # a row of group g is counted in g and all groups below it
    of_true = np.cumsum((hits / called)[::-1])[::-1][groups]
    of_called = np.cumsum((hits * precision / called)[::-1])[::-1][groups]
    score = (hits * precision).sum() / n_abnormal
    change = labels * (precision[groups] + of_true - score) - of_called
    return np.asarray(change / n_abnormal)


def _of_mean(values: np.ndarray) -> np.ndarray:
    return np.asarray((values - values.mean()) / len(values)) if len(values) else values


def _of_share(hit: np.ndarray, among: np.ndarray) -> np.ndarray:
    total = among.sum()
    return np.asarray(among * (hit - (among * hit).sum() / total) / total)


def _of_macro_f1(labels: np.ndarray, called: np.ndarray) -> np.ndarray:
    hit, passed = labels * called, (1 - labels) * (1 - called)
    wrong = len(labels) - hit.sum() - passed.sum()
    if not 0 < labels.sum() < len(labels):
        return np.full(len(labels), np.nan)
    change = np.zeros(len(labels))
    for right in (hit, passed):  # half of F1 = r / (2 r + wrong) for each class
        total = 2 * right.sum() + wrong
        change += right * wrong / total**2 - (1 - hit - passed) * right.sum() / total**2
    return change


def _of_kappa(labels: np.ndarray, called: np.ndarray) -> np.ndarray:
    n, positive, call = len(labels), labels.sum(), called.sum()
    if not 0 < positive < n:
        return np.full(n, np.nan)
    agreed = labels == called
    by_chance = (positive * call + (n - positive) * (n - call)) / n**2
    kappa = (agreed.mean() - by_chance) / (1 - by_chance)
    of_chance = labels * call + called * positive
    of_chance += (1 - labels) * (n - call) + (1 - called) * (n - positive)
    of_chance = of_chance / n**2 - 2 * by_chance / n
    change = (agreed - agreed.mean()) / n - (1 - kappa) * of_chance
    return np.asarray(change / (1 - by_chance))


_DECISIONS = {
    "accuracy": lambda labels, called: _of_mean((labels == called).astype(np.float64)),
    "sensitivity": lambda labels, called: _of_share(called, labels),
    "specificity": lambda labels, called: _of_share(1 - called, 1 - labels),
    "ppv": lambda labels, called: _of_share(labels, called),
    "npv": lambda labels, called: _of_share(1 - labels, 1 - called),
    "macro_f1": _of_macro_f1,
    "kappa": _of_kappa,
}


PREDICTIVE = ("ppv", "npv")
#: Weight, in patients, of Hanley and McNeil's variance beside that of the data.
_PRIOR_PATIENTS = 5.0
_NO_SPREAD = "the rows do not tell how far the score varies"
_SHARES = ("accuracy", "sensitivity", "specificity", *PREDICTIVE)


@dataclass(frozen=True)
class Estimate:
    """A score, and a function that returns its limits at any confidence.

    Attributes
    ----------
    value : float
        NaN if it cannot be estimated.
    limits : callable, optional
        Returns (low, high) for a confidence in (0, 1); None if no interval is shown.
    method : str, optional
        Name of the method; None without limits.
    reason : str, optional
        Why there are no limits.
    k, n : int, optional
        For a share, the rows counted and the rows in total.
    parts : array of shape (patients,)
        Each patient's contribution, see `influences`.
    """

    value: float
    limits: Callable[[float], Bounds] | None = None
    method: str | None = None
    reason: str | None = None
    k: int | None = None
    n: int | None = None
    parts: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False, compare=False)

    def interval(self, confidence: float = CONFIDENCE) -> Interval:
        """Return the value with its limits, NaN where none are shown."""
        low, high = (nan, nan) if self.limits is None else self.limits(confidence)
        if not low < high:
            method, reason = None, self.reason or _NO_SPREAD
            return Interval(self.value, nan, nan, method, reason, self.k, self.n)
        return Interval(self.value, low, high, self.method, None, self.k, self.n)


class Spread(NamedTuple):
    """Patients' contributions to a score.

    `parts` (I,) are the contributions of all rows, `error` the score's standard error, `freedom`
    its degrees of freedom, `fewest` the number of patients of the rarer class.
    """

    parts: np.ndarray
    error: float
    freedom: float
    fewest: int


class _Rows(NamedTuple):
    """Scored rows: labels, decisions and patients (n,), and the total number of patients."""

    y: np.ndarray
    called: np.ndarray
    codes: np.ndarray
    n_patients: int


def estimate_scores(
    y: np.ndarray,
    probability: np.ndarray,
    threshold: float,
    codes: np.ndarray,
    names: Sequence[str] = SCORES,
    n_patients: int | None = None,
) -> dict[str, Estimate]:
    """Return estimates of scores, each with limits or the reason why there are none.

    Parameters
    ----------
    y, probability : arrays of shape (n,)
        Labels 0 or 1 and probabilities of abnormal.
    threshold : float
        Decisions are abnormal at or above it.
    codes : integer array of shape (n,)
        From `patient_codes`, for at least these rows.
    names : sequence of str
        Scores from `SCORES` except ECE, and from `PREDICTIVE`.
    n_patients : int, optional
        The length of `Estimate.parts`; by default as long as these rows require.

    Raises
    ------
    TrainingDataError
        Invalid labels or probabilities, or lengths that differ; see `Scorer`.
    """
    known = [name for name in names if name not in (*PREDICTIVE, "ece")]
    scorer = Scorer(y, probability, threshold, known)
    if scorer.n_rows != len(codes):
        raise TrainingDataError(f"{scorer.n_rows} labels, but {len(codes)} patients")
    labels, values = np.asarray(y), np.asarray(probability, np.float64)
    size = (int(codes.max()) + 1 if len(codes) else 0) if n_patients is None else n_patients
    rows = _Rows(labels, values >= threshold, codes, size)
    found = {name: float(own[0]) for name, own in scorer(np.ones((1, len(labels)))).items()}
    is_constant = len(values) > 0 and bool((values == values[0]).all())
    smooth = [name for name in ("auroc", "average_precision", "brier") if name in known]
    added = influences(labels, values, threshold, smooth)
    estimates = {}
    for name in names:
        if name == "ece":
            continue
        if name in _SHARES:
            own = _estimate_decided(rows, name)
        elif name in smooth:
            own = _estimate_smooth(rows, name, found[name], added[name])
        else:
            own = _estimate_agreement(rows, name, found[name])
        if is_constant and own.limits is not None:
            own = Estimate(own.value, None, None, CONSTANT, own.k, own.n, own.parts)
        estimates[name] = own
    return estimates


def estimate_auroc(
    y: np.ndarray, value: float, added: np.ndarray, codes: np.ndarray, n_patients: int | None = None
) -> Estimate:
    """Return an estimate from an AUROC and the rows' contributions to it (n,), see `influences`.

    For an AUROC that counts only some of the pairs; `codes` and `n_patients` are those of
    `estimate_scores`.
    """
    size = (int(codes.max()) + 1 if len(codes) else 0) if n_patients is None else n_patients
    return _estimate_smooth(_Rows(y, y == 1, codes, size), "auroc", value, added)


def estimate_share(
    hit: np.ndarray, among: np.ndarray, codes: np.ndarray, n_patients: int | None = None
) -> Estimate:
    """Return an estimate of the share of rows that have a property.

    The number of rows is divided by the design effect: the variance of the share with patients as
    clusters over that of independent rows, clipped between 1 and its value if all rows of a patient
    were equal. If the rows do not determine it, that upper value is used.

    Parameters
    ----------
    hit, among : bool arrays of shape (n,)
        Which rows have the property, and which rows are counted.
    codes : integer array of shape (n,)
        Each row's patient, from `patient_codes`.
    n_patients : int, optional
        The length of `Estimate.parts`.
    """
    size = (int(codes.max()) + 1 if len(codes) else 0) if n_patients is None else n_patients
    counts = np.bincount(codes[among], minlength=size)
    n, n_own = int(counts.sum()), int((counts > 0).sum())
    k = int((hit & among).sum())
    if n == 0:
        return Estimate(nan, reason="there is no such row", k=0, n=0, parts=np.full(size, nan))
    share = k / n
    hits = np.bincount(codes[hit & among], minlength=size)
    parts = (hits - share * counts) / n
    if n_own < MIN_PATIENTS:
        return Estimate(share, None, None, _too_few(n_own, "patients"), k, n, parts)
    n_effective = n / _design_effect(share, n, n_own, counts, parts)
    freedom = _freedom(parts)
    is_wilson = min(share, 1 - share) * n_effective >= RULE_OF_FIVE
    return Estimate(
        share,
        lambda confidence: bound_share(share, n_effective, confidence, freedom),
        "wilson" if is_wilson else "clopper-pearson",
        None,
        k,
        n,
        parts,
    )


def estimate_mean(values: np.ndarray, codes: np.ndarray) -> Estimate:
    """Return an estimate of the mean of values in [0, 1], with patients as clusters.

    Limits by Student's t on the log-odds, as of average precision.

    Parameters
    ----------
    values : float array of shape (n,)
    codes : integer array of shape (n,)
        Each row's patient, from `patient_codes`.
    """
    if not len(values):
        return Estimate(nan, reason="there is no such row")
    value = float(values.mean())
    parts = np.bincount(codes, weights=(values - value) / len(values))
    n_patients = _count(codes)
    if n_patients < MIN_PATIENTS:
        return Estimate(value, None, None, _too_few(n_patients, "patients"), parts=parts)
    error = sqrt(_correction(n_patients) * float(parts @ parts))
    freedom = min(_freedom(parts), n_patients - 1)
    return Estimate(
        value,
        lambda confidence: bound_on_logit(value, error, quantile(confidence, freedom)),
        "logit-t",
        parts=parts,
    )


def mean_estimate(estimates: Sequence[Estimate], names: Sequence[str]) -> Estimate:
    """Return the estimated mean of the scores of groups of rows, such as regions, equally weighted.

    By MOVER from the groups' own limits. If patients are in several groups, the distances are
    widened by the root of the ratio of the variance with their correlation to that without.
    """
    value = float(np.mean([own.value for own in estimates]))
    parts = np.sum([own.parts for own in estimates], axis=0) / len(estimates)
    without = [name for name, own in zip(names, estimates, strict=True) if own.limits is None]
    if without:
        reason = f"{', '.join(without)}: no interval of its own"
        return Estimate(value, None, None, reason, parts=parts)
    apart = sum(float((own.parts**2).sum()) for own in estimates) / len(estimates) ** 2
    widened = sqrt(max(1.0, float((parts**2).sum()) / apart)) if apart > 0 else 1.0

    def limits(confidence: float) -> Bounds:
        ends = [own.interval(confidence) for own in estimates]
        shifts = [
            tuple(value + (end - own.value) / len(ends) for end in (own.low, own.high))
            for own in ends
        ]
        low, high = combine(value, [(a, b) for a, b in shifts])
        return value - widened * (value - low), value + widened * (high - value)

    return Estimate(value, limits, "mover", parts=parts)


def measure_spread(
    y: np.ndarray, added: np.ndarray, codes: np.ndarray, n_patients: int | None = None
) -> Spread:
    """Return one score's standard error, see `Clusters`."""
    return Clusters(y, codes, n_patients).measure_spread(added)


class Clusters:
    """Rows of patients, of which the spread of many scores is measured.

    Parameters
    ----------
    y, codes : arrays of shape (n,)
        Labels 0 or 1, and each row's patient, from `patient_codes`.
    n_patients : int, optional
        The length of `Spread.parts`.
    """

    def __init__(self, y: np.ndarray, codes: np.ndarray, n_patients: int | None = None) -> None:
        self._size = (
            (int(codes.max()) + 1 if len(codes) else 0) if n_patients is None else n_patients
        )
        self._rows = [np.flatnonzero(y == 1), np.flatnonzero(y != 1)]
        self._codes = [codes[rows] for rows in self._rows]
        self._counts = [_count(own, self._size) for own in (*self._codes, codes)]

    def measure_spread(self, added: np.ndarray) -> Spread:
        """Return a score's standard error from the rows' contributions (n,).

        With a and b the contributions of a patient's abnormal and normal rows and
        c(m) = m / (m - 1), the variance is
        ``c(I) sum (a + b)² + (c(I1) - c(I)) sum a² + (c(I0) - c(I)) sum b²`` over I patients, I1
        with an abnormal and I0 with a normal row: for AUROC, Obuchowski's variance. NaN if one of
        these numbers is below two.
        """
        n_abnormal, n_normal, n_all = self._counts
        abnormal, normal = (
            np.bincount(codes, weights=added[rows], minlength=self._size)
            for codes, rows in zip(self._codes, self._rows, strict=True)
        )
        parts = abnormal + normal
        of_all = _correction(n_all)
        variance = of_all * float(parts @ parts)
        variance += (_correction(n_abnormal) - of_all) * float(abnormal @ abnormal)
        variance += (_correction(n_normal) - of_all) * float(normal @ normal)
        error = sqrt(variance) if variance > 0 else (nan if isnan(variance) else 0.0)
        return Spread(parts, error, _freedom(parts), min(n_abnormal, n_normal))


def _estimate_decided(rows: _Rows, name: str) -> Estimate:
    is_abnormal = rows.y == 1
    hit, among = {
        "accuracy": (rows.called == is_abnormal, np.ones(len(rows.y), bool)),
        "sensitivity": (rows.called, is_abnormal),
        "specificity": (~rows.called, ~is_abnormal),
        "ppv": (is_abnormal, rows.called),
        "npv": (~is_abnormal, ~rows.called),
    }[name]
    return estimate_share(hit, among, rows.codes, rows.n_patients)


def _estimate_smooth(rows: _Rows, name: str, value: float, added: np.ndarray) -> Estimate:
    spread = measure_spread(rows.y, added, rows.codes, rows.n_patients)
    reason = _why_none(rows)
    if isnan(value) or reason is not None:
        return Estimate(value, None, None, reason, parts=spread.parts)
    if name == "auroc":
        n_abnormal, n_normal = _count_patients(rows)
        ratio = _shrunken_ratio(value, spread, n_abnormal, n_normal)
        freedom = 2.0 * (spread.fewest - 1)
        return Estimate(
            value,
            lambda confidence: bound_auroc(
                value, n_abnormal, n_normal, ratio, quantile(confidence, freedom)
            ),
            "newcombe",
            parts=spread.parts,
        )
    freedom = min(spread.freedom, spread.fewest - 1)
    return Estimate(
        value,
        lambda confidence: bound_on_logit(value, spread.error, quantile(confidence, freedom)),
        "logit-t",
        parts=spread.parts,
    )


def _estimate_agreement(rows: _Rows, name: str, value: float) -> Estimate:
    """Return macro-F1 or kappa, estimated from sensitivity, specificity and prevalence."""
    is_abnormal, everyone = rows.y == 1, np.ones(len(rows.y), bool)
    added = influences(rows.y, rows.called.astype(np.float64), 0.5, [name])[name]
    parts = np.bincount(rows.codes, weights=added, minlength=rows.n_patients)
    reason = _why_none(rows)
    if isnan(value) or reason is not None:
        return Estimate(value, None, None, reason, parts=parts)
    own = [
        estimate_share(hit, among, rows.codes, rows.n_patients)
        for hit, among in (
            (rows.called, is_abnormal),
            (~rows.called, ~is_abnormal),
            (is_abnormal, everyone),
        )
    ]
    shares = [part.value for part in own]
    of = _macro_f1 if name == "macro_f1" else _kappa

    def limits(confidence: float) -> Bounds:
        ends = []
        for i, part in enumerate(own):
            interval = part.interval(confidence)
            moved = [[*shares[:i], end, *shares[i + 1 :]] for end in (interval.low, interval.high)]
            ends.append((of(*moved[0]), of(*moved[1])))
        return combine(value, ends)

    return Estimate(value, limits, "mover", parts=parts)


def _macro_f1(sensitivity: float, specificity: float, prevalence: float) -> float:
    hit, passed = prevalence * sensitivity, (1 - prevalence) * specificity
    wrong = 1 - hit - passed
    return hit / (2 * hit + wrong) + passed / (2 * passed + wrong)


def _kappa(sensitivity: float, specificity: float, prevalence: float) -> float:
    hit, passed = prevalence * sensitivity, (1 - prevalence) * specificity
    called = hit + 1 - prevalence - passed
    by_chance = prevalence * called + (1 - prevalence) * (1 - called)
    return (hit + passed - by_chance) / (1 - by_chance)


def _shrunken_ratio(value: float, spread: Spread, n_abnormal: int, n_normal: int) -> float:
    """Return the variance of the data over Hanley and McNeil's, shrunk towards 1."""
    if not 0 < value < 1 or not spread.error > 0:
        return 1.0
    ratio = spread.error**2 / auroc_variance(value, n_abnormal, n_normal)
    weight = max(spread.freedom, 0.0)
    return (weight * ratio + _PRIOR_PATIENTS) / (weight + _PRIOR_PATIENTS)


def _design_effect(
    share: float, n: int, n_own: int, counts: np.ndarray, parts: np.ndarray
) -> float:
    alike = float((counts.astype(np.float64) ** 2).sum()) / n
    independent, variance = share * (1 - share) / n, _correction(n_own) * float(parts @ parts)
    if not (independent > 0 and variance > 0):
        return alike
    return min(max(variance / independent, 1.0), alike)


def _freedom(parts: np.ndarray) -> float:
    """Return n - 1 for n equal normal contributions, less for unequal ones; at least 1."""
    squared = parts * parts
    fourth = float(squared @ squared)
    return max(3 * float(squared.sum()) ** 2 / fourth - 1, 1.0) if fourth > 0 else inf


def _count_patients(rows: _Rows) -> tuple[int, int]:
    is_abnormal = rows.y == 1
    return _count(rows.codes[is_abnormal]), _count(rows.codes[~is_abnormal])


def _count(codes: np.ndarray, size: int = 0) -> int:
    return int(np.count_nonzero(np.bincount(codes, minlength=size)))


def _why_none(rows: _Rows) -> str | None:
    n_abnormal, n_normal = _count_patients(rows)
    fewest = min(n_abnormal, n_normal)
    if fewest >= MIN_PATIENTS:
        return None
    which = "abnormal" if n_abnormal <= n_normal else "normal"
    return _too_few(fewest, f"patients with {which} rows")


def _too_few(n: int, noun: str) -> str:
    return f"{n} {noun}; an interval needs {MIN_PATIENTS}"


def _correction(n: int) -> float:
    return n / (n - 1) if n > 1 else nan
