"""Calibrations and thresholds: fitted on out-of-fold predictions, or read."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import numpy as np
import pandas as pd

from medembed.core.errors import RunError, TrainingDataError
from medembed.core.schema import AfterValidator, Field, Record, parse
from medembed.evaluation.calibration import (
    Calibration,
    CalibrationEntry,
    IsotonicCalibration,
    fit_isotonic,
    fit_temperature,
)
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
    "DecisionsEntry",
    "NamedThreshold",
    "PointEntry",
    "fit_decisions",
    "read_decisions",
    "read_points",
    "write_points",
]

SENSITIVITY = 0.9
"""The sensitivity of the third threshold, on out-of-fold predictions."""


class Decisions(NamedTuple):
    """Calibrations and thresholds of one head; see `alignment.ScoredHead`.

    `calibration` is the one in use, and `calibrations` has all by name; `threshold` is Youden's,
    `sensitive_threshold` that of `SENSITIVITY`, or None if unknown; `points` are operating points.
    """

    calibration: Calibration
    calibrations: dict[str, Calibration | IsotonicCalibration]
    threshold: float
    sensitive_threshold: float | None
    points: tuple[OperatingPoint, ...]


def _check_rule(name: str) -> str:
    try:
        is_name = parse_rule(name).name == name
    except TrainingDataError:
        is_name = False
    if not is_name:
        raise ValueError(f"must be an operating point's name, not {name[:40]!r}")
    return name


class PointEntry(Record):
    """An operating point, in the form that cards and runs keep."""

    name: Annotated[str, AfterValidator(_check_rule)]
    threshold: float = Field(ge=0, le=HIGHEST)


def _check_twins(points: list[PointEntry]) -> list[PointEntry]:
    names = [point.name for point in points]
    if len(set(names)) < len(names):
        raise ValueError(f"must have different names, not {', '.join(names)[:60]}")
    return points


PointEntries = Annotated[list[PointEntry], AfterValidator(_check_twins)]


def _check_platt(calibrations: dict[str, CalibrationEntry]) -> dict[str, CalibrationEntry]:
    if "platt" not in calibrations:
        raise ValueError("lacks platt")
    return calibrations


class DecisionsEntry(Record):
    """`decisions` of a head in the `run.json` of a run that trained nothing."""

    calibrations: Annotated[dict[str, CalibrationEntry], AfterValidator(_check_platt)]
    threshold: float
    sensitive_threshold: float | None
    operating_points: PointEntries | None = None


def fit_decisions(train: pd.DataFrame, rules: Sequence[ThresholdRule]) -> Decisions:
    """Return fitted calibrations, thresholds, and operating points of `SHOWN` and `rules`.

    Parameters
    ----------
    train : DataFrame
        Out-of-fold predictions: `label` (0 or 1), `probability`.

    Raises
    ------
    TrainingDataError
        There is only one class.
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
    """Return the decisions of a run that trained nothing; see `prediction.external_validation`.

    Raises
    ------
    RunError
        The entry is damaged, or has no threshold for one of the rules.
    """
    where = f"decisions of run.json of {path}"
    way_out = "It was damaged or edited. Evaluate again into another --out."
    entry = parse(DecisionsEntry, document, RunError, where, way_out)
    calibrations = {name: own.build() for name, own in entry.calibrations.items()}
    packaged = read_points(entry.operating_points, entry.threshold)
    _require_points(packaged, rules, path)
    return Decisions(
        calibrations["platt"],
        {"none": Calibration(), **calibrations},
        entry.threshold,
        entry.sensitive_threshold,
        (*packaged, *fixed_points((*SHOWN, *rules))),
    )


class NamedThreshold(TypedDict):
    """An operating point as JSON, which `PointEntry` reads."""

    name: str
    threshold: float


def write_points(points: Iterable[OperatingPoint]) -> list[NamedThreshold]:
    """Return operating points in the form that a card and a run keep."""
    return [{"name": point.name, "threshold": point.threshold} for point in points]


def read_points(entries: Sequence[PointEntry] | None, youden: float) -> tuple[OperatingPoint, ...]:
    """Return the operating points of a card's or a run's entries.

    Parameters
    ----------
    entries : sequence of PointEntry, or None
        None for a model packaged before entries existed, which has Youden's point.
    youden : float
        The threshold kept beside the entries.
    """
    if entries is None:
        return (OperatingPoint("youden", youden),)
    return tuple(OperatingPoint(own.name, own.threshold) for own in entries)


def _require_points(
    points: Iterable[OperatingPoint], rules: Iterable[ThresholdRule], path: Any
) -> None:
    """Refuse a rule that the evaluated model was not packaged with.

    Raises
    ------
    RunError
        There is such a rule; the message names the rule and the points that the model has.
    """
    names = [point.name for point in points]
    for rule in rules:
        if rule.kind != "threshold" and rule.name not in names:
            raise RunError(
                f"the evaluation at {path} has no operating point {rule.name}: its model packages "
                f"{', '.join(names) or 'none'}. Ask for one of these, or for a threshold of your "
                "own, such as threshold=0.3."
            )
