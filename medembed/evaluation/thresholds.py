"""Thresholds that turn probabilities into decisions: abnormal at or above them.

Thresholds are chosen on (calibrated) out-of-fold predictions of `train` and never see `test`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import nextafter
from typing import NamedTuple

import numpy as np

from medembed.core.errors import TrainingDataError
from medembed.evaluation.calibration import Calibration, fit_platt
from medembed.evaluation.scores import check_both_classes

__all__ = [
    "HIGHEST",
    "PACKAGED",
    "SHOWN",
    "DecisionRule",
    "OperatingPoint",
    "ThresholdRule",
    "fit_points",
    "fixed_points",
    "parse_rule",
    "parse_rules",
    "sensitivity_threshold",
    "specificity_threshold",
    "youden_threshold",
]

HIGHEST = nextafter(1.0, 2.0)
"""The highest threshold: above every probability, so that no row is called abnormal."""
_ACCEPTED = "sensitivity=0.95, specificity=0.9, youden or threshold=0.3, for example"
_RANGES = {
    "sensitivity": "above 0 and at most 1",
    "specificity": "above 0 and at most 1",
    "threshold": "above 0 and below 1",
}


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold of calibrated probabilities, and the name of the rule that chose it.

    Attributes
    ----------
    name : str
        The rule's name, such as ``youden``, ``sensitivity=0.95`` or ``threshold=0.3``.
    threshold : float
        In [0, `HIGHEST`]; abnormal at or above it.
    """

    name: str
    threshold: float


@dataclass(frozen=True)
class ThresholdRule:
    """How a threshold is chosen.

    Attributes
    ----------
    kind : {"youden", "sensitivity", "specificity", "threshold"}
    value : float, optional
        The sensitivity or specificity to reach, in (0, 1], or the threshold itself, in (0, 1);
        None for Youden's rule.
    """

    kind: str
    value: float | None = None

    @property
    def name(self) -> str:
        """The rule as text, which `parse_rule` reads."""
        if self.value is None:
            return self.kind
        short = f"{self.value:g}"
        return f"{self.kind}={short if float(short) == self.value else repr(self.value)}"

    def fit(self, y: np.ndarray, probability: np.ndarray) -> OperatingPoint:
        """Return the threshold chosen on labels and calibrated out-of-fold probabilities, (n,).

        Raises
        ------
        TrainingDataError
            See `youden_threshold`.
        """
        if self.value is None:
            return OperatingPoint(self.name, youden_threshold(y, probability))
        if self.kind == "threshold":
            return OperatingPoint(self.name, self.value)
        choose = sensitivity_threshold if self.kind == "sensitivity" else specificity_threshold
        return OperatingPoint(self.name, choose(y, probability, self.value))


PACKAGED = (
    ThresholdRule("youden"),
    ThresholdRule("sensitivity", 0.95),
    ThresholdRule("specificity", 0.9),
)
"""The rules of the operating points that every model is packaged with."""
SHOWN = (*PACKAGED, ThresholdRule("threshold", 0.5))
"""The rules of the operating points that every comparison shows."""


def parse_rule(text: str) -> ThresholdRule:
    """Read ``youden``, ``sensitivity=0.95``, ``specificity=0.9`` or ``threshold=0.3``.

    Raises
    ------
    TrainingDataError
        The rule is unknown, or its number is invalid or out of range.

    Examples
    --------
    >>> parse_rule("sensitivity=0.95")
    ThresholdRule(kind='sensitivity', value=0.95)
    """
    kind, sign, number = text.strip().partition("=")
    if kind == "youden" and not sign:
        return ThresholdRule("youden")
    if kind not in _RANGES or not sign:
        raise TrainingDataError(f"operating point {text!r} is unknown; ask for {_ACCEPTED}")
    try:
        value = float(number)
    except ValueError:
        raise TrainingDataError(
            f"operating point {text!r}: {number!r} is not a number; ask for {_ACCEPTED}"
        ) from None
    # NaN is outside every range
    if not (0 < value <= 1 if kind != "threshold" else 0 < value < 1):
        raise TrainingDataError(
            f"operating point {text!r}: a {kind} is {_RANGES[kind]}; ask for {_ACCEPTED}"
        )
    return ThresholdRule(kind, value)


def parse_rules(texts: Iterable[str | ThresholdRule]) -> tuple[ThresholdRule, ...]:
    """Return several parsed rules, all different.

    Raises
    ------
    TrainingDataError
        A rule is invalid (see `parse_rule`) or given twice.
    """
    found: list[ThresholdRule] = []
    for text in texts:
        rule = text if isinstance(text, ThresholdRule) else parse_rule(text)
        if rule in found:
            raise TrainingDataError(f"operating point {rule.name} was given twice; name it once")
        found.append(rule)
    return tuple(found)


def fit_points(
    rules: Sequence[ThresholdRule], y: np.ndarray, probability: np.ndarray
) -> tuple[OperatingPoint, ...]:
    """Return the operating point of each rule, duplicates removed.

    Parameters
    ----------
    y, probability : arrays of shape (n,)
        Labels 0 or 1, and calibrated out-of-fold probabilities of abnormal.
    """
    return tuple(rule.fit(y, probability) for rule in dict.fromkeys(rules))


def fixed_points(rules: Iterable[ThresholdRule]) -> tuple[OperatingPoint, ...]:
    """Return the points whose rules require no fitting: ``threshold=…``."""
    known = ((rule.name, rule.value) for rule in rules if rule.kind == "threshold")
    return tuple(OperatingPoint(name, value) for name, value in known if value is not None)


class DecisionRule(NamedTuple):
    """How a head's probabilities become decisions, fitted on rows that it has not seen.

    Attributes
    ----------
    calibration : Calibration
        Platt's.
    threshold : float
        Youden's, of calibrated probabilities.
    calibrated : float64 array of shape (n,)
        The rows' own.
    """

    calibration: Calibration
    threshold: float
    calibrated: np.ndarray

    @classmethod
    def fit(cls, y: np.ndarray, probability: np.ndarray) -> "DecisionRule":
        """Fit on labels (0 or 1) and a head's own probabilities, each of shape (n,).

        Raises
        ------
        TrainingDataError
            Only one class, or probabilities outside [0, 1].
        """
        calibration = fit_platt(probability, y)
        calibrated = calibration.apply(probability)
        return cls(calibration, float(youden_threshold(y, calibrated)), calibrated)


def youden_threshold(y: np.ndarray, probability: np.ndarray) -> float:
    """Return the threshold with the largest sensitivity + specificity - 1.

    Youden, Index for rating diagnostic tests, Cancer 3, 1950. Among thresholds with equal
    decisions the middle of the gap is chosen, and among cuts with equal index the lowest, most
    sensitive one. If no cut is better than chance, the result is the smallest probability: all
    rows are called abnormal.

    Parameters
    ----------
    y, probability : arrays of shape (n,)
        Labels 0 or 1, and (calibrated, out-of-fold) probabilities of abnormal.

    Raises
    ------
    TrainingDataError
        Only one class, lengths that differ, other labels, or probabilities outside [0, 1].

    Examples
    --------
    >>> y = np.array([0, 0, 1, 0, 1, 1])
    >>> youden_threshold(y, np.array([0.1, 0.2, 0.3, 0.5, 0.7, 0.9]))
    0.25
    """
    distinct, hits, false = _cuts(y, probability)
    # counts are whole numbers, so equal indices compare equal: scaled by n1 * n0, they stay whole
    index = hits * false[0] - false * hits[0]
    return _middle_of_gap(distinct, int(np.argmax(index)))


def sensitivity_threshold(
    y: np.ndarray, probability: np.ndarray, sensitivity: float = 0.9
) -> float:
    """Return the highest threshold that detects at least this share of the abnormal rows.

    Among thresholds with equal decisions the middle of the gap is chosen. If only calling all rows
    abnormal reaches the share, the result is the smallest probability.

    Parameters
    ----------
    y, probability : arrays of shape (n,)
        See `youden_threshold`.
    sensitivity : float
        The share of abnormal rows at or above the threshold, in (0, 1].

    Raises
    ------
    TrainingDataError
        The share is outside (0, 1], or labels or probabilities are invalid; see `youden_threshold`.

    Examples
    --------
    >>> y = np.array([0, 0, 1, 0, 1, 1])
    >>> sensitivity_threshold(y, np.array([0.1, 0.2, 0.3, 0.5, 0.7, 0.9]), 0.6)
    0.6
    """
    if not 0 < sensitivity <= 1:
        raise TrainingDataError(
            f"sensitivity {sensitivity} is not above 0 and at most 1; ask for 0.9, for example"
        )
    distinct, hits, _ = _cuts(y, probability)
    # divided, not multiplied: 55 / 100 equals the float 0.55, but 0.55 * 100 is above 55
    reached = np.flatnonzero(hits / hits[0] >= sensitivity)
    return _middle_of_gap(distinct, int(reached[-1]))


def specificity_threshold(
    y: np.ndarray, probability: np.ndarray, specificity: float = 0.9
) -> float:
    """Return the lowest threshold that keeps at least this share of the normal rows below it.

    Among thresholds with equal decisions the middle of the gap is chosen. If only calling no row
    abnormal reaches the share, the result is the middle between the largest probability and 1, or
    `HIGHEST` if that probability is 1.

    Parameters
    ----------
    y, probability : arrays of shape (n,)
        See `youden_threshold`.
    specificity : float
        The share of normal rows below the threshold, in (0, 1].

    Raises
    ------
    TrainingDataError
        The share is outside (0, 1], or labels or probabilities are invalid; see `youden_threshold`.
    """
    if not 0 < specificity <= 1:
        raise TrainingDataError(
            f"specificity {specificity} is not above 0 and at most 1; ask for 0.9, for example"
        )
    distinct, _, false = _cuts(y, probability)
    # divided, like sensitivity
    reached = np.flatnonzero((false[0] - false) / false[0] >= specificity)
    if len(reached):
        return _middle_of_gap(distinct, int(reached[0]))
    return float((distinct[-1] + 1) / 2) if distinct[-1] < (distinct[-1] + 1) / 2 else HIGHEST


def _cuts(y: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return sorted distinct probabilities, and the abnormal and normal rows at or above each."""
    labels, values = check_both_classes(y, probability, "a threshold")
    distinct, groups = np.unique(values, return_inverse=True)
    abnormal = np.bincount(groups, weights=labels, minlength=len(distinct))
    normal = np.bincount(groups, weights=1 - labels, minlength=len(distinct))
    return distinct, np.cumsum(abnormal[::-1])[::-1], np.cumsum(normal[::-1])[::-1]


def _middle_of_gap(distinct: np.ndarray, cut: int) -> float:
    """Return a threshold between the cut's probability and the next lower one."""
    if cut == 0:
        return float(distinct[0])
    middle = float((distinct[cut - 1] + distinct[cut]) / 2)
    return middle if middle > distinct[cut - 1] else float(distinct[cut])
