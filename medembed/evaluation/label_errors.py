"""Labels that scores contradict: how many are wrong, and how many chance alone contradicts.

Confident learning says which labels are contradicted (Northcutt, Jiang and Chuang, Journal of
Artificial Intelligence Research 70, 2021). Its estimate of how many are wrong counts every
contradicted label, so it is far above 0 even if all are right. The counts here come from a logistic
model of contaminated labels (Copas, Journal of the Royal Statistical Society B 50, 1988), which
expects some right labels to be contradicted too.

Probabilities have to come from models that did not see the label.
"""

from dataclasses import astuple, dataclass

import numpy as np
from scipy.special import expit

from medembed.evaluation.bootstrap import patient_codes, percentiles
from medembed.evaluation.calibration import log_odds
from medembed.evaluation.scores import check_both_classes

__all__ = [
    "MAX_NOISE",
    "MAX_SLOPE",
    "NoiseModel",
    "Thresholds",
    "bound_errors",
    "find_thresholds",
    "fit_noise",
]

MAX_NOISE = 0.3
"""The largest share of wrong labels in a class that is considered."""
MAX_SLOPE = 10.0
"""The steepest line, for scores that separate the classes and so give none."""
N_RESAMPLES = 200
_BOUNDS = [(None, None), (1e-3, MAX_SLOPE), (0.0, MAX_NOISE), (0.0, MAX_NOISE)]
_STARTS = [(0.0, 1.0, 0.01, 0.01), (0.0, 2.0, 0.1, 0.1)]
_EDGE = 1e-12
_MOST, _N_GROUPS = 20_000, 4_000  # rows that are resampled one by one; groups of more


@dataclass(frozen=True)
class Thresholds:
    """From where on a probability is confident: the mean over the studies with that label.

    Attributes
    ----------
    normal, abnormal : float
        Mean probability of normal over studies labelled normal, and of abnormal over the others.
    """

    normal: float
    abnormal: float

    def confident_class(self, probability: np.ndarray) -> np.ndarray:
        """Return the likelier class where it is confident, 0 or 1, else -1; int8, shape (n,)."""
        p = np.asarray(probability, np.float64)
        is_abnormal = (p > 0.5) & (p >= self.abnormal)
        is_normal = (p < 0.5) & (1 - p >= self.normal)
        return np.select([is_abnormal, is_normal], [1, 0], -1).astype(np.int8)

    def contradicts(self, y: np.ndarray, probability: np.ndarray) -> np.ndarray:
        """Return which labels the probabilities confidently contradict, bool, shape (n,)."""
        confident = self.confident_class(probability)
        return np.asarray((confident >= 0) & (confident != np.asarray(y)))


@dataclass(frozen=True)
class NoiseModel:
    """A logistic model of the right label, of which a share was recorded wrongly.

    A study is labelled abnormal with probability ``(1 - missed) q + invented (1 - q)``, where
    ``q = sigmoid(intercept + slope * logit(p))`` is the probability that it is abnormal.

    Attributes
    ----------
    intercept, slope : float
    missed, invented : float
        Share of abnormal studies labelled normal, and of normal ones labelled abnormal.
    """

    intercept: float
    slope: float
    missed: float
    invented: float

    def apply(self, probability: np.ndarray) -> np.ndarray:
        """Return q, the probability that the right label is abnormal; float64, shape (n,)."""
        return np.asarray(expit(self.intercept + self.slope * log_odds(probability)))

    def error_probability(self, y: np.ndarray, probability: np.ndarray) -> np.ndarray:
        """Return the probability that each label is wrong, by Bayes' rule; float64, shape (n,).

        Its sum is the expected number of wrong labels.
        """
        q, labels = self.apply(probability), np.asarray(y)
        wrong = np.where(labels == 1, self.invented * (1 - q), self.missed * q)
        right = np.where(labels == 1, (1 - self.missed) * q, (1 - self.invented) * (1 - q))
        total = wrong + right  # 0 where q is 0 or 1 and no label of the class is wrong
        return np.asarray(np.divide(wrong, total, out=np.zeros_like(total), where=total > 0))

    def chance(self, probability: np.ndarray, thresholds: Thresholds) -> np.ndarray:
        """Return the probability that the right label of each study is contradicted.

        That is 1 - q where abnormal is confident, since a study whose right label is normal is
        contradicted there; q where normal is confident; and 0 elsewhere. Its sum is the number of
        contradicted labels that is expected if all labels are right.
        """
        q, confident = self.apply(probability), thresholds.confident_class(probability)
        return np.asarray(np.select([confident == 1, confident == 0], [1 - q, q], 0.0))


def find_thresholds(y: np.ndarray, probability: np.ndarray) -> Thresholds:
    """Return the mean probability of its label in each class.

    Parameters
    ----------
    y, probability : arrays of shape (n,)
        Labels, 0 or 1, and probabilities of abnormal, in [0, 1].

    Raises
    ------
    TrainingDataError
        Only one class, lengths that differ, other labels, or probabilities outside [0, 1].
    """
    labels, p = check_both_classes(y, probability, "an audit of labels")
    return Thresholds(float((1 - p[labels == 0]).mean()), float(p[labels == 1].mean()))


def fit_noise(
    y: np.ndarray,
    probability: np.ndarray,
    weights: np.ndarray | None = None,
    start: NoiseModel | None = None,
) -> NoiseModel:
    """Return the likeliest `NoiseModel`, with at most `MAX_NOISE` wrong labels in a class.

    Parameters
    ----------
    y, probability : arrays of shape (n,)
        As for `find_thresholds`, which raises the same errors.
    weights : array of shape (n,), optional
        How many studies each row stands for; by default one.
    start : NoiseModel, optional
        Where the search begins; by default in two places, of which the likelier end is kept.
    """
    from scipy.optimize import minimize  # not earlier: comparisons fit nothing

    labels, values = check_both_classes(y, probability, "an audit of labels")
    x, is_abnormal = log_odds(values), labels == 1
    w = np.full(len(x), 1 / len(x)) if weights is None else weights / weights.sum()

    starts = _STARTS if start is None else [astuple(start)]
    fits = [
        minimize(_loss, np.array(own), (is_abnormal, x, w), "L-BFGS-B", jac=True, bounds=_BOUNDS)
        for own in starts
    ]
    best = min(fits, key=lambda fit: float(fit.fun))
    return NoiseModel(*map(float, best.x))


def bound_errors(
    y: np.ndarray,
    probability: np.ndarray,
    patients: np.ndarray,
    noise: NoiseModel,
    counted: tuple[np.ndarray, np.ndarray],
    seed: int = 0,
) -> tuple[float, float]:
    """Return the ends of a 95 % percentile interval for the number of wrong labels.

    Patients are resampled and the noise model is fitted anew; calibrations are kept. Of more than
    `_MOST` rows those of nearly equal score are one, which costs the interval nothing.

    Parameters
    ----------
    y, probability, patients : arrays of shape (n,)
        What `noise` was fitted on, and each row's patient.
    noise : NoiseModel
    counted : pair of arrays
        Labels and probabilities of the rows whose wrong labels are counted.
    seed : int
    """
    codes = patient_codes(patients)
    generator = np.random.default_rng(seed)
    own, labels, p = _group(y, probability)
    of_counted, *shown = _group(*counted)
    n_counted = np.bincount(of_counted)
    draws = []
    for _ in range(N_RESAMPLES):
        drawn = generator.integers(0, codes.max() + 1, codes.max() + 1)
        weights = np.bincount(own, np.bincount(drawn, minlength=codes.max() + 1)[codes])
        if len(np.unique(labels[weights > 0])) == 2:
            fitted = fit_noise(labels, p, weights, noise)
            draws.append(float(fitted.error_probability(*shown) @ n_counted))
    return percentiles(float(noise.error_probability(*counted).sum()), np.array(draws))


def _group(y: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the group of each row (n,), and of each group its label and its mean score."""
    if len(y) <= _MOST:
        return np.arange(len(y)), y, probability
    x = log_odds(probability)
    order = np.lexsort((x, y))
    rank = np.empty(len(y), np.int64)
    rank[order] = np.arange(len(y)) * _N_GROUPS // len(y)
    group = np.unique(2 * rank + y, return_inverse=True)[1]  # none of both labels
    n = np.bincount(group)
    labels = np.round(np.bincount(group, y) / n).astype(np.int8)
    return group, labels, expit(np.bincount(group, x) / n)


def _loss(
    parameters: np.ndarray, is_abnormal: np.ndarray, x: np.ndarray, weights: np.ndarray
) -> tuple[float, np.ndarray]:
    """Return the negative log-likelihood of a noise model, and its gradient, of shape (4,)."""
    intercept, slope, missed, invented = parameters
    q = expit(intercept + slope * x)
    kept = 1 - missed - invented
    abnormal = np.clip(invented + kept * q, _EDGE, 1 - _EDGE)
    own = np.where(is_abnormal, abnormal, 1 - abnormal)
    by_abnormal = np.where(is_abnormal, -weights, weights) / own  # the derivative by `abnormal`
    by_z = by_abnormal * kept * q * (1 - q)
    gradient = [by_z.sum(), by_z @ x, -by_abnormal @ q, by_abnormal @ (1 - q)]
    return float(-weights @ np.log(own)), np.array(gradient)
