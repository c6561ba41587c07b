"""Test scores of decisions at each operating point, and net benefit over all thresholds."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from medembed.evaluation.bootstrap import patient_codes
from medembed.evaluation.clinical_utility import net_benefit, predictive_values
from medembed.evaluation.estimates import PREDICTIVE, Estimate, estimate_scores
from medembed.evaluation.intervals import plain
from medembed.evaluation.scores import DECISION_SCORES
from medembed.evaluation.thresholds import OperatingPoint, ThresholdRule
from medembed.results.comparison_schema import Confusion, Curve, PointDocument

__all__ = [
    "POINT_SCORES",
    "count_confusion",
    "describe_benefit",
    "describe_points",
]

POINT_SCORES = (*DECISION_SCORES, *PREDICTIVE)
"""The scores of decisions at an operating point."""


def describe_points(
    y: np.ndarray,
    probability: np.ndarray,
    patients: np.ndarray,
    rules: Sequence[ThresholdRule],
    known: Iterable[OperatingPoint],
    prevalence: float | None = None,
) -> list[PointDocument]:
    """Return how a head decides at each operating point, as JSON values.

    Parameters
    ----------
    y, probability, patients : arrays of shape (n,)
        Test labels 0 or 1, calibrated probabilities, and the patient of each row.
    rules : sequence of ThresholdRule
        The operating points to describe.
    known : iterable of OperatingPoint
        The points for which the head has a threshold.
    prevalence : float, optional
        A prevalence in (0, 1) at which predictive values are reported too.

    Returns
    -------
    list of dict
        ``name``, ``threshold``, ``scores`` (of `POINT_SCORES`), ``confusion``; ``at_prevalence``
        (``prevalence``, ``ppv``, ``npv``) if a prevalence is given. If the threshold is unknown,
        it and the confusion are None, and scores are not estimable.
    """
    thresholds = {point.name: point.threshold for point in known}
    found: list[PointDocument] = []
    for rule in rules:
        threshold = thresholds.get(rule.name)
        if threshold is None:
            nothing = Estimate(np.nan, reason="the model's threshold is not known")
            estimates, confusion = dict.fromkeys(POINT_SCORES, nothing), None
        else:
            codes = patient_codes(patients)
            estimates = estimate_scores(y, probability, threshold, codes, POINT_SCORES)
            confusion = count_confusion(y, probability, threshold)
        entry: PointDocument = {
            "name": rule.name,
            "threshold": threshold,
            "scores": _intervals(estimates),
            "confusion": confusion,
        }
        if prevalence is not None:
            shares = (estimates["sensitivity"], estimates["specificity"])
            values = predictive_values(*shares, prevalence)
            entry["at_prevalence"] = {"prevalence": prevalence, **_intervals(values)}
        found.append(entry)
    return found


def describe_benefit(y: np.ndarray, probability: np.ndarray, patients: np.ndarray) -> Curve:
    """Return a head's decision curve as JSON values, see `evaluation.clinical_utility`.

    Returns
    -------
    dict
        Lists of equal length: ``thresholds``, ``value``, ``low``, ``high``, and ``treat_all``;
        ``method`` of the band, None without a band.
    """
    curve = net_benefit(y, probability, patients)
    return {
        "thresholds": curve["threshold"].tolist(),
        "value": plain(curve["value"].tolist()),
        "low": plain(curve["low"].tolist()),
        "high": plain(curve["high"].tolist()),
        "treat_all": plain(curve["treat_all"].tolist()),
        "method": "influence-t" if curve["low"].notna().any() else None,
    }


def count_confusion(y: np.ndarray, probability: np.ndarray, threshold: float) -> Confusion:
    """Return ``tn``, ``fp``, ``fn``, ``tp`` of decisions at or above a threshold."""
    called, is_abnormal = probability >= threshold, y == 1
    return {
        "tn": int((~called & ~is_abnormal).sum()),
        "fp": int((called & ~is_abnormal).sum()),
        "fn": int((~called & is_abnormal).sum()),
        "tp": int((called & is_abnormal).sum()),
    }


def _intervals(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: own.interval().as_dict() for name, own in estimates.items()}
