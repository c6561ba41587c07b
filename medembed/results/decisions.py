"""How scores become probabilities and decisions: fitted on out-of-fold predictions, or read."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import pandas as pd

from medembed.core.errors import RunError, TrainingDataError
from medembed.evaluation.calibration import (
    Calibration,
    IsotonicCalibration,
    fit_isotonic,
    fit_temperature,
)
from medembed.evaluation.scores import is_number
from medembed.evaluation.thresholds import (
    HIGHEST,
    SHOWN,
    DecisionRule,
    OperatingPoint,
    ThresholdRule,
    fit_points,
    fixed_points,
    parse_rule,
    sensitivity_threshold,
)

__all__ = [
    "SENSITIVITY",
    "Decisions",
    "fit_decisions",
    "read_decisions",
    "read_points",
    "write_points",
]

SENSITIVITY = 0.9
"""What the third threshold asks for, on out-of-fold predictions."""


class Decisions(NamedTuple):
    """Calibrations and thresholds of one head; see `alignment.ScoredHead`.

    `calibration` is the one in use, of `calibrations` by name; `threshold` is Youden's,
    `sensitive_threshold` that of `SENSITIVITY`, None where it is not known; `points` are operating
    points.
    """

    calibration: Calibration
    calibrations: dict[str, Calibration | IsotonicCalibration]
    threshold: float
    sensitive_threshold: float | None
    points: tuple[OperatingPoint, ...]


def fit_decisions(train: pd.DataFrame, rules: Sequence[ThresholdRule]) -> Decisions:
    """Fit calibrations, thresholds, and operating points beside `SHOWN`.

    Parameters
    ----------
    train : DataFrame
        Out-of-fold predictions: `label` (0 or 1), `probability`.

    Raises
    ------
    TrainingDataError
        Only one class.
    """
    out_of_fold, y = train["probability"].to_numpy(np.float64), train["label"].to_numpy(np.int8)
    calibrations: dict[str, Calibration | IsotonicCalibration] = {
        "none": Calibration(),
        "platt": (fitted := DecisionRule.fit(y, out_of_fold)).calibration,
        "temperature": fit_temperature(out_of_fold, y),
        "isotonic": fit_isotonic(out_of_fold, y),
    }
    return Decisions(
        fitted.calibration,
        calibrations,
        fitted.threshold,
        float(sensitivity_threshold(y, fitted.calibrated, SENSITIVITY)),
        fit_points((*SHOWN, *rules), y, fitted.calibrated),
    )


def read_decisions(document: Any, path: Path, rules: Sequence[ThresholdRule]) -> Decisions:
    """Read what a run keeps that trained nothing; see `prediction.external_validation`.

    Raises
    ------
    RunError
        It is damaged, or has no threshold of one of the rules.
    """
    try:
        calibrations = {
            str(name): Calibration.from_dict(own) for name, own in document["calibrations"].items()
        }
        sensitive, threshold = document["sensitive_threshold"], _finite(document["threshold"])
        packaged = read_points(document.get("operating_points"), threshold)
        decisions = Decisions(
            calibrations["platt"],
            {"none": Calibration(), **calibrations},
            threshold,
            None if sensitive is None else _finite(sensitive),
            (*packaged, *fixed_points((*SHOWN, *rules))),
        )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise RunError(
            f"run.json of {path} has decisions that cannot be read ({error}): it was damaged or "
            "edited. Evaluate again into another --out."
        ) from None
    _require_points(packaged, rules, path)
    return decisions


def _finite(value: Any) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"a threshold is {number}")
    return number


def write_points(points: Iterable[OperatingPoint]) -> list[dict[str, Any]]:
    """Return operating points as a card and a run keep them."""
    return [{"name": point.name, "threshold": point.threshold} for point in points]


def read_points(entries: Any, youden: float) -> tuple[OperatingPoint, ...]:
    """Read what `write_points` wrote.

    Parameters
    ----------
    entries : list of dict, or None
        None of models packaged before they had any: they have Youden's.
    youden : float
        The threshold kept beside them.

    Raises
    ------
    ValueError
        Says what is wrong, as the end of a sentence.
    """
    if entries is None:
        return (OperatingPoint("youden", youden),)
    if not isinstance(entries, list):
        raise ValueError("operating_points is no list")
    found = {}
    for number, entry in enumerate(entries):
        where = f"operating_points[{number}]"
        name, threshold = _fields(entry, where)
        if name in found:
            raise ValueError(f"{where}.name is there twice")
        found[name] = OperatingPoint(name, threshold)
    return tuple(found.values())


def _require_points(
    points: Iterable[OperatingPoint], rules: Iterable[ThresholdRule], path: Any
) -> None:
    """Refuse a rule that a model from elsewhere was not packaged with.

    Raises
    ------
    RunError
        Names the rule, and what the model has.
    """
    names = [point.name for point in points]
    for rule in rules:
        if rule.kind != "threshold" and rule.name not in names:
            raise RunError(
                f"the evaluation at {path} has no operating point {rule.name}: its model packages "
                f"{', '.join(names) or 'none'}. Ask for one of these, or for a threshold of your "
                "own, such as threshold=0.3."
            )


def _fields(entry: Any, where: str) -> tuple[str, float]:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} is no table")
    name, threshold = entry.get("name"), entry.get("threshold")
    if not _is_rule(name):
        raise ValueError(f"{where}.name is {str(name)[:40]!r}")
    if not is_number(threshold) or not 0 <= threshold <= HIGHEST:
        raise ValueError(f"{where}.threshold is {str(threshold)[:40]}")
    return name, float(threshold)


def _is_rule(name: Any) -> TypeGuard[str]:
    try:
        return isinstance(name, str) and parse_rule(name).name == name
    except TrainingDataError:
        return False
