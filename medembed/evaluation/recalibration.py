"""Recalibrate a model's probabilities on a small labelled sample of new patients."""

from collections.abc import Mapping
from math import exp, nan
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import logit

from medembed.core.errors import TrainingDataError
from medembed.evaluation.bootstrap import CONFIDENCE, MIN_PATIENTS, Interval, patient_codes
from medembed.evaluation.bounds import quantile
from medembed.evaluation.calibration import (
    Calibration,
    calibration_line,
    check_line,
    fit_line,
)
from medembed.evaluation.estimates import influences, measure_spread
from medembed.evaluation.intervals import Variant, bootstrap_variants, plain
from medembed.evaluation.scores import DECISION_SCORES, Scorer
from medembed.evaluation.thresholds import DecisionRule

__all__ = ["AFTER", "MIN_FOR_SLOPE", "draw_patients", "recalibrate"]

#: The scores that recalibration can change; it keeps the order, and therefore AUROC.
AFTER = (*DECISION_SCORES, "brier", "ece")
#: Patients needed to fit a slope. With fewer, its noise does more harm than good.
MIN_FOR_SLOPE = 50
_SIGNIFICANCE = 0.05


def draw_patients(patients: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    """Return which rows (n_rows,) bool belong to `n` patients drawn without replacement.

    The draw depends on the patients' names and the seed, not on the order of rows; a larger draw
    contains every smaller one.

    Raises
    ------
    TrainingDataError
        `n` is below 1, or leaves no patient to be scored.
    """
    codes = patient_codes(patients)
    n_patients = int(codes.max()) + 1 if len(codes) else 0
    if not 1 <= n < n_patients:
        raise TrainingDataError(
            f"{n} patients cannot be drawn for recalibration: {n_patients} have a label, and the "
            f"others are scored. Ask for 1 to {max(n_patients - 1, 1)}, about half at most."
        )
    chosen = np.random.default_rng(seed).permutation(n_patients)[:n]
    return np.isin(codes, chosen)


class _Mended(NamedTuple):
    action: str
    calibration: Calibration
    threshold: float
    p: float


def recalibrate(
    studies: pd.DataFrame,
    calibration: Calibration,
    threshold: float,
    n_patients: int,
    *,
    n_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, object]:
    """Return a recalibration fitted on some patients and scored on all others.

    Nothing changes if the drawn patients' slope and intercept do not differ significantly from 1
    and 0 (p of the joint test at least 5 %). With fewer than `MIN_FOR_SLOPE` patients only the
    intercept is fitted, and decisions stay; with more, both are fitted, and Youden's threshold is
    chosen anew (closed testing as in Vergouwe et al., Statistics in Medicine 36, 2017).

    Parameters
    ----------
    studies : DataFrame
        `patient`, `label` (0 or 1), `probability` (not calibrated), one row per study.
    calibration : Calibration
        The model's own calibration.
    threshold : float
        The model's own threshold of calibrated probabilities.
    n_patients : int
        Number of patients to draw, see `draw_patients`.
    n_resamples, seed : int
        Number of resamples for ECE's bound over the other patients, and the random seed.

    Returns
    -------
    dict
        JSON values: ``n_patients``, ``n``, ``n_abnormal`` of the drawn patients; ``note``, None or
        why nothing could be fitted (fewer than `MIN_PATIENTS` of a class, and how many to draw), in
        which case the other keys are absent; ``action`` ("none", "intercept" or
        "slope_and_intercept"), ``p`` of the joint test and ``line``, the fit of the model's own
        probabilities to the drawn patients; the new ``calibration`` and ``threshold``; for the
        other patients ``scored`` (counts), ``before`` and ``after``: ``scores`` of `AFTER` and
        ``line`` as returned by `calibration_line`; ``change`` of each score, after less before,
        with its interval.

    Raises
    ------
    TrainingDataError
        Too few or too many patients are requested (see `draw_patients`), or labels or probabilities
        are invalid (see `Scorer`).
    """
    is_drawn = draw_patients(studies["patient"].to_numpy(), n_patients, seed)
    drawn, others = studies[is_drawn], studies[~is_drawn]
    about = {"n_patients": n_patients, "n": len(drawn), "n_abnormal": int(drawn["label"].sum())}
    note = _why_not(studies, drawn, n_patients, seed)
    if note is not None:
        return {**about, "note": note}
    y, raw, patients = _arrays(drawn)
    mended = _mend(y, raw, patients, calibration, threshold)
    methods = {
        "before": (calibration, threshold),
        "after": (mended.calibration, mended.threshold),
    }
    return {
        **about,
        "note": None,
        "action": mended.action,
        "p": plain(mended.p),
        "line": plain(calibration_line(y, calibration.apply(raw), patients)),
        "calibration": mended.calibration.as_dict(),
        "threshold": float(mended.threshold),
        "scored": {
            "n": len(others),
            "n_abnormal": int(others["label"].sum()),
            "n_patients": int(others["patient"].nunique()),
        },
        **plain(_score_others(others, methods, n_resamples, seed)),
    }


def _why_not(studies: pd.DataFrame, drawn: pd.DataFrame, n: int, seed: int) -> str | None:
    """Return a note if a class has too few drawn patients, and how many to draw, else None."""
    fewest, which = min(
        (int(drawn.loc[drawn["label"] == label, "patient"].nunique()), name)
        for label, name in ((0, "normal"), (1, "abnormal"))
    )
    if fewest >= MIN_PATIENTS:
        return None
    needed = _needed(studies, seed)
    remedy = (
        f"Draw {needed} patients, the smallest number that gives enough with this seed."
        if needed is not None
        else f"Label more patients: in total there are too few of a class to draw {MIN_PATIENTS} "
        "and score others."
    )
    return (
        f"The {n} patients drawn hold {fewest} with {which} studies, and recalibration needs "
        f"{MIN_PATIENTS} of each class, so nothing was changed. {remedy}"
    )


def _needed(studies: pd.DataFrame, seed: int) -> int | None:
    """Return how many patients to draw so that each class has enough, or None if impossible."""
    codes = patient_codes(studies["patient"].to_numpy())
    n_patients = int(codes.max()) + 1
    order = np.random.default_rng(seed).permutation(n_patients)
    labels = studies["label"].to_numpy()
    enough = 0
    for label in (0, 1):
        has = np.bincount(codes[labels == label], minlength=n_patients)[order] > 0
        reached = np.flatnonzero(np.cumsum(has) == MIN_PATIENTS)
        if not len(reached):
            return None
        enough = max(enough, int(reached[0]) + 1)
    return enough if enough < n_patients else None


def _mend(
    y: np.ndarray,
    raw: np.ndarray,
    patients: np.ndarray,
    calibration: Calibration,
    threshold: float,
) -> _Mended:
    calibrated = calibration.apply(raw)
    p = check_line(y, calibrated, patients)
    if p >= _SIGNIFICANCE:
        return _Mended("none", calibration, threshold, p)
    if len(np.unique(patients)) >= MIN_FOR_SLOPE:
        fitted = DecisionRule.fit(y, raw)
        return _Mended("slope_and_intercept", fitted.calibration, fitted.threshold, p)
    shift = float(fit_line(y, calibrated, free_slope=False).line[0])
    moved = Calibration(calibration.slope, calibration.intercept + shift)
    odds = float(logit(threshold)) if 0 < threshold < 1 else nan
    cut = 1 / (1 + exp(-odds - shift)) if odds == odds else threshold
    return _Mended("intercept", moved, cut, p)


def _score_others(
    others: pd.DataFrame,
    methods: Mapping[str, tuple[Calibration, float]],
    n_resamples: int,
    seed: int,
) -> dict[str, Any]:
    y, raw, patients = _arrays(others)
    probabilities = {name: method.apply(raw) for name, (method, _) in methods.items()}
    variants = {
        name: Variant(probabilities[name], cut, AFTER) for name, (_, cut) in methods.items()
    }
    scores = bootstrap_variants(y, variants, patients, n_resamples=n_resamples, seed=seed)
    found: dict[str, Any] = {
        name: {"scores": scores[name], "line": calibration_line(y, probabilities[name], patients)}
        for name in methods
    }
    found["change"] = _find_changes(y, variants, patient_codes(patients))
    return found


def _find_changes(
    y: np.ndarray, variants: Mapping[str, Variant], codes: np.ndarray
) -> dict[str, Interval]:
    """Return each score after less before, on identical rows; ECE's without an interval."""
    values, added = {}, {}
    names = [name for name in AFTER if name != "ece"]
    for side, variant in variants.items():
        own = Scorer(y, *variant)(np.ones((1, len(y))))
        values[side] = {name: float(value[0]) for name, value in own.items()}
        added[side] = influences(y, variant.probability, variant.threshold, names)
    found = {}
    for name in AFTER:
        value = values["after"][name] - values["before"][name]
        found[name] = Interval(value, nan, nan)
        if name in names and not np.isnan(added["after"][name] + added["before"][name]).any():
            spread = measure_spread(y, added["after"][name] - added["before"][name], codes)
            if spread.error > 0 and spread.fewest >= MIN_PATIENTS:
                reach = quantile(CONFIDENCE, spread.freedom) * spread.error
                found[name] = Interval(value, value - reach, value + reach, "t")
    return found


def _arrays(studies: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    y, patients = studies["label"].to_numpy(np.int8), studies["patient"].to_numpy()
    return y, studies["probability"].to_numpy(np.float64), patients
