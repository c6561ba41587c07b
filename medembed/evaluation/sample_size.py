"""The number of test patients required for an interval's width or a paired test's power.

The calculations match `evaluation.estimates` and `evaluation.paired`: Newcombe's score limits of
AUROC, limits of a share, and the test of two AUROCs on the same rows, with Hanley and McNeil's
variances, which are slightly too large above an AUROC of 0.9. Studies of one patient are
discounted by the design effect ``1 + (studies per patient - 1) * icc`` (Kish, Survey Sampling,
1965).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, exp, isfinite, pi, sqrt
from typing import NamedTuple

from scipy.integrate import quad
from scipy.special import ndtri

from medembed.core.errors import MedembedError
from medembed.evaluation.bootstrap import CONFIDENCE, MIN_PATIENTS
from medembed.evaluation.bounds import auroc_variance, bound_auroc, bound_share, quantile

__all__ = [
    "MOST_PATIENTS",
    "PLANNED_SCORES",
    "Counts",
    "SampleSize",
    "Sampling",
    "auroc_correlation",
    "difference_error",
    "plan_difference",
    "plan_width",
]

MOST_PATIENTS = 1_000_000
"""Nobody will label a larger test set."""
PLANNED_SCORES = ("auroc", "sensitivity", "specificity")
METHODS = {
    "auroc": "Newcombe's score interval with Hanley and McNeil's variance, t",
    "sensitivity": "Wilson, or Clopper–Pearson with fewer than five of a kind",
    "specificity": "Wilson, or Clopper–Pearson with fewer than five of a kind",
    "difference": "paired t test with Hanley and McNeil's variance of a difference",
}


@dataclass(frozen=True)
class Sampling:
    """The composition of a planned test set.

    Attributes
    ----------
    prevalence : float
        Share of studies that are abnormal, in (0, 1).
    studies_per_patient : float
        Mean number of studies per patient, at least 1.
    icc : float
        Intraclass correlation of the scores of a patient's studies with one label, in [0, 1]: 0 as
        between two patients, 1 identical.

    Raises
    ------
    MedembedError
        A value is out of its range.
    """

    prevalence: float
    studies_per_patient: float = 1.0
    icc: float = 0.0

    def __post_init__(self) -> None:
        _require(0 < self.prevalence < 1, "prevalence", self.prevalence, "between 0 and 1")
        _require(
            1 <= self.studies_per_patient <= MOST_PATIENTS,
            "studies per patient",
            self.studies_per_patient,
            "that is 1 at least",
        )
        _require(0 <= self.icc <= 1, "icc", self.icc, "between 0 and 1, both included")

    @property
    def design_effect(self) -> float:
        """Factor by which the variance exceeds that of independent studies."""
        return 1 + (self.studies_per_patient - 1) * self.icc

    def count(self, patients: int) -> "Counts":
        """Return the effective numbers of abnormal and normal studies of this many patients."""
        effective = patients * self.studies_per_patient / self.design_effect
        return Counts(effective * self.prevalence, effective * (1 - self.prevalence))


class Counts(NamedTuple):
    """Effective numbers of independent studies."""

    abnormal: float
    normal: float


@dataclass(frozen=True)
class SampleSize:
    """The smallest sufficient test set.

    Attributes
    ----------
    patients, studies, abnormal_studies : int
    method : str
    """

    patients: int
    studies: int
    abnormal_studies: int
    method: str


def plan_width(score: str, value: float, width: float, sampling: Sampling) -> SampleSize:
    """Return how many patients make the 95 % interval of a score no wider than requested.

    Parameters
    ----------
    score : {"auroc", "sensitivity", "specificity"}
    value : float
        The expected score: AUROC in (0.5, 1), shares in (0, 1).
    width : float
        From lower to upper limit, in (0, 1).
    sampling : Sampling

    Returns
    -------
    SampleSize
        Includes at least `MIN_PATIENTS` of each class, below which no interval is shown. For AUROC
        the size is close to that of Riley et al. (Statistics in Medicine 40, 2021, criterion 3),
        who use the same variance but a symmetric normal interval.

    Raises
    ------
    MedembedError
        A value is out of its range, or more than `MOST_PATIENTS` would be needed.
    """
    if score not in PLANNED_SCORES:
        raise MedembedError(f"score {score!r} is none of {', '.join(PLANNED_SCORES)}.")
    _require_expected(score, value)
    _require(0 < width < 1, "width", width, "between 0 and 1, such as 0.05")

    def measure(patients: int) -> float:
        counts = sampling.count(patients)
        if score == "auroc":
            reach = quantile(CONFIDENCE, 2 * (min(counts) - 1))
            low, high = bound_auroc(value, counts.abnormal, counts.normal, 1.0, reach)
        else:
            n = counts.abnormal if score == "sensitivity" else counts.normal
            low, high = bound_share(value, n, CONFIDENCE)
        return high - low

    patients = _find(lambda n: measure(n) <= width, sampling, f"an interval of width {width:g}")
    return _answer(patients, sampling, METHODS[score])


def plan_difference(
    auroc: float, difference: float, correlation: float, power: float, sampling: Sampling
) -> SampleSize:
    """Return how many patients a paired test at the 5 % level needs to detect an AUROC difference.

    Parameters
    ----------
    auroc : float
        AUROC of the better head, in (0.5, 1).
    difference : float
        By how much the other head's AUROC is lower; it must stay above 0.5.
    correlation : float
        Correlation of both heads' scores among studies of one label, in [0, 1).
    power : float
        Probability that the test detects the difference, in [0.5, 1).
    sampling : Sampling

    Raises
    ------
    MedembedError
        See `plan_width`.

    Notes
    -----
    The test detects the difference if ``difference / error`` exceeds the quantile of t. The number
    of patients is therefore such that this ratio is the sum of that quantile and the normal
    quantile of the power (Obuchowski, AJR 175, 2000).
    """
    _require_expected("auroc", auroc)
    _require(
        0 < difference < auroc - 0.5,
        "difference",
        difference,
        f"above 0 and below {auroc - 0.5:.3g}, so that the other head's AUROC stays above 0.5",
    )
    _require(0 <= correlation < 1, "correlation", correlation, "between 0 and 1, 1 excluded")
    _require(0.5 <= power < 1, "power", power, "between 0.5 and 1, such as 0.8")

    def is_found(patients: int) -> bool:
        counts = sampling.count(patients)
        error = difference_error((auroc, auroc - difference), correlation, counts)
        reach = quantile(CONFIDENCE, min(counts) - 1) + float(ndtri(power))
        return difference >= reach * error

    patients = _find(is_found, sampling, f"a difference of {difference:g} in AUROC")
    return _answer(patients, sampling, METHODS["difference"])


def difference_error(
    aurocs: tuple[float, float], correlation: float, counts: tuple[float, float]
) -> float:
    """Return the standard error of the difference of two AUROCs on shared, independent rows.

    ``sqrt(v1 + v2 - 2 r sqrt(v1 v2))`` (Hanley and McNeil, Radiology 148, 1983).

    Parameters
    ----------
    aurocs : (float, float)
    correlation : float
        Correlation of the scores; r is `auroc_correlation`.
    counts : (float, float)
        Numbers of abnormal and normal rows.
    """
    first, second = (auroc_variance(auroc, *counts) for auroc in aurocs)
    r = auroc_correlation(aurocs, correlation)
    return sqrt(max(first + second - 2 * r * sqrt(first * second), 0.0))


def auroc_correlation(aurocs: tuple[float, float], correlation: float) -> float:
    """Return the correlation of two AUROCs from that of the heads' scores within a class.

    For binormal scores, as in the table of Hanley and McNeil (Radiology 148, 1983). An abnormal row
    outranks a normal one under both heads if two normal differences, whose correlation is half
    that of the scores, are both positive. The covariance is therefore the integral of the bivariate
    normal density over the correlation from 0 to that value (Plackett, Biometrika 41, 1954).
    """
    first, second = (float(ndtri(auroc)) for auroc in aurocs)
    shared = _covariance(first, second, correlation / 2)
    return shared / sqrt(_covariance(first, first, 0.5) * _covariance(second, second, 0.5))


def _covariance(first: float, second: float, correlation: float) -> float:
    def density(r: float) -> float:
        rest = 1 - r * r
        squares = first * first - 2 * r * first * second + second * second
        return exp(-squares / (2 * rest)) / (2 * pi * sqrt(rest))

    return float(quad(density, 0, correlation)[0])


def _find(is_enough: Callable[[int], bool], sampling: Sampling, what: str) -> int:
    """Return the smallest sufficient number of patients, by bisection."""
    least = MIN_PATIENTS / min(sampling.prevalence, 1 - sampling.prevalence)
    if least > MOST_PATIENTS or not is_enough(MOST_PATIENTS):
        raise MedembedError(
            f"{what} needs more than {MOST_PATIENTS:,} test patients. Ask for a wider interval, a "
            "larger difference or less power, or plan for a higher prevalence."
        )
    low, high = ceil(least) - 1, MOST_PATIENTS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def _answer(patients: int, sampling: Sampling, method: str) -> SampleSize:
    studies = ceil(patients * sampling.studies_per_patient)
    return SampleSize(patients, studies, ceil(studies * sampling.prevalence), method)


def _require_expected(score: str, value: float) -> None:
    if score == "auroc":
        _require(0.5 < value < 1, "AUROC", value, "above 0.5, which is chance, and below 1")
    else:
        _require(0 < value < 1, score, value, "between 0 and 1")


def _require(is_right: bool, name: str, value: float, wanted: str) -> None:
    if not is_right or not isfinite(value):
        raise MedembedError(f"{name} {value:g} is out of range. Give a number {wanted}.")
