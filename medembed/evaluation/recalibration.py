"""How probabilities fit new patients, and what a small labelled sample of them mends."""

from collections.abc import Mapping
from math import nan
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit

from medembed.errors import TrainingDataError
from medembed.evaluation.calibration import Calibration, fit_platt, log_odds
from medembed.evaluation.intervals import Variant, bootstrap_variants, plain
from medembed.evaluation.resampling import Interval, centre, draw, patient_codes, percentiles
from medembed.evaluation.scores import DECISION_SCORES, Scorer
from medembed.evaluation.thresholds import youden_threshold

__all__ = ["AFTER", "calibration_line", "draw_patients", "recalibrate"]

#: The scores that recalibration can change; it keeps the order, and so AUROC.
AFTER = (*DECISION_SCORES, "brier", "ece")
_LINE = ("intercept", "slope", "mean_probability", "share_abnormal", "observed_expected")
_N_STEPS = 30
_TOLERANCE = 1e-6
#: A slope or intercept beyond this is that of separable rows, which have none.
_LARGEST = 1e3


def calibration_line(
    y: np.ndarray,
    probability: np.ndarray,
    patients: np.ndarray,
    *,
    n_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return how (calibrated) probabilities fit the labels, with intervals over patients.

    Parameters
    ----------
    y, probability, patients : arrays of shape (n,)
        Labels 0 or 1, probabilities of abnormal in [0, 1], and whose row it is.
    n_resamples, seed : int
        As for `bootstrap_scores`.

    Returns
    -------
    dict of str to Interval
        ``slope`` of the log-odds in a logistic regression of the label (1: right; below 1: the
        probabilities are too extreme); ``intercept`` of one whose slope is held at 1 (0: right;
        below 0: the probabilities are too high); ``mean_probability``, ``share_abnormal``, and
        ``observed_expected``, the second over the first. NaN where the rows are of one class or
        the log-odds separate the classes. Van Calster et al., BMC Medicine 17:230, 2019; Cox,
        Biometrika 45, 1958.

    Raises
    ------
    TrainingDataError
        As `Scorer`.
    """
    scorer = _Line(y, probability)
    codes = patient_codes(patients)
    truth, draws = draw([scorer], [np.arange(len(codes))], codes, n_resamples, seed)
    if len(np.unique(codes)) < 2:
        return {name: Interval(truth[0][name], nan, nan) for name in scorer.names}
    return {
        name: Interval(truth[0][name], *percentiles(truth[0][name], draws[0][name]))
        for name in scorer.names
    }


def draw_patients(patients: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    """Return which rows (n_rows,) bool belong to `n` patients drawn without replacement.

    The draw hangs on the patients' names and the seed, not on the order of rows; with more
    patients come the same ones first.

    Raises
    ------
    TrainingDataError
        Fewer than 1 are asked for, or so many that no patient is left to be scored.
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


def recalibrate(
    studies: pd.DataFrame,
    calibration: Calibration,
    threshold: float,
    n_patients: int,
    *,
    n_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Fit calibration and threshold on some patients, and score them on all others.

    Parameters
    ----------
    studies : DataFrame
        `patient`, `label` (0 or 1), `probability` (not calibrated), one row per study.
    calibration : Calibration
        The model's own, and `threshold` on what it gives.
    n_patients : int
        How many are drawn by `seed`, see `draw_patients`.
    n_resamples, seed : int
        Of the bootstrap over the other patients.

    Returns
    -------
    dict
        JSON values: ``n_patients``, ``n``, ``n_abnormal`` of the drawn; ``note``, None or why
        nothing could be fitted (the drawn are of one class), and then no more; ``calibration``
        (Platt scaling of the log-odds) and ``threshold`` (Youden's) fitted on them; of the others
        ``scored`` (counts), ``before`` and ``after``: ``scores`` of `AFTER` and ``line`` as
        `calibration_line` has it; ``change`` of each score, after less before, with its interval
        from the same resamples.

    Raises
    ------
    TrainingDataError
        As `draw_patients` and `Scorer`.
    """
    is_drawn = draw_patients(studies["patient"].to_numpy(), n_patients, seed)
    drawn, others = studies[is_drawn], studies[~is_drawn]
    about = {"n_patients": n_patients, "n": len(drawn), "n_abnormal": int(drawn["label"].sum())}
    if drawn["label"].nunique() < 2:
        note = (
            f"The {n_patients} patients drawn have studies of one class only, so nothing was "
            "recalibrated. Draw more, or with another --seed."
        )
        return {**about, "note": note}
    raw, y = drawn["probability"].to_numpy(), drawn["label"].to_numpy(np.int8)
    fitted = fit_platt(raw, y)
    cut = youden_threshold(y, fitted.apply(raw))
    found = _score_others(
        others, {"before": (calibration, threshold), "after": (fitted, cut)}, n_resamples, seed
    )
    return {
        **about,
        "note": None,
        "calibration": fitted.as_dict(),
        "threshold": float(cut),
        "scored": {
            "n": len(others),
            "n_abnormal": int(others["label"].sum()),
            "n_patients": int(others["patient"].nunique()),
        },
        **plain(found),
    }


def _score_others(
    others: pd.DataFrame,
    methods: Mapping[str, tuple[Calibration, float]],
    n_resamples: int,
    seed: int,
) -> dict[str, Any]:
    y, patients = others["label"].to_numpy(np.int8), others["patient"].to_numpy()
    raw = others["probability"].to_numpy()
    probabilities = {name: method.apply(raw) for name, (method, _) in methods.items()}
    options = {"n_resamples": n_resamples, "seed": seed}
    variants = {
        name: Variant(probabilities[name], cut, AFTER) for name, (_, cut) in methods.items()
    }
    scores = bootstrap_variants(y, variants, patients, **options)
    found: dict[str, Any] = {
        name: {
            "scores": scores[name],
            "line": calibration_line(y, probabilities[name], patients, **options),
        }
        for name in methods
    }
    scorers = [Scorer(y, *variants[name]) for name in ("before", "after")]
    codes = patient_codes(patients)
    truth, draws = draw(scorers, [np.arange(len(y))] * 2, codes, n_resamples, seed)
    found["change"] = {
        name: _change(name, truth[1][name] - truth[0][name], draws[1][name] - draws[0][name], codes)
        for name in AFTER
    }
    return found


def _change(name: str, value: float, draws: np.ndarray, codes: np.ndarray) -> Interval:
    if len(np.unique(codes)) < 2:
        return Interval(value, nan, nan)
    if name == "ece":  # resampling inflates the smaller one more
        draws = centre(value, draws)
    return Interval(value, *percentiles(value, draws))


class _Line(Scorer):
    """Score the fit of probabilities to labels under any weights, for use with `draw`."""

    def __init__(self, y: np.ndarray, probability: np.ndarray) -> None:
        super().__init__(y, probability, 0.5, ())
        self.names = _LINE
        self._x = log_odds(self._probability)

    def __call__(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        weights = np.asarray(weights, dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            total, positive = weights.sum(axis=1), weights @ self._positive
            both = (positive > 0) & (positive < total)
            mean, share = weights @ self._probability / total, positive / total
            return {
                "intercept": np.where(both, self._solve(weights, slope=False)[:, 0], np.nan),
                "slope": np.where(both, self._solve(weights, slope=True)[:, 1], np.nan),
                "mean_probability": mean,
                "share_abnormal": share,
                "observed_expected": np.where(mean > 0, share / mean, np.nan),
            }

    def _solve(self, weights: np.ndarray, *, slope: bool) -> np.ndarray:
        """Fit intercept and slope (B, 2) by Newton's method, NaN where it does not settle.

        A step that lowers the likelihood is halved. Without `slope` the slope stays 1.
        """
        line = np.tile([0.0, 1.0], (len(weights), 1))
        fit = self._likelihood(weights, line)
        for _ in range(_N_STEPS):
            step = self._step(weights, line, slope=slope)
            for _ in range(_N_STEPS):
                tried = self._likelihood(weights, line + step)
                worse = tried < fit - 1e-9 * np.abs(fit)
                if not worse.any():
                    break
                step[worse] /= 2
            line, fit = line + step, tried
            if np.nan_to_num(np.abs(step)).max() < _TOLERANCE:
                break
        settled = (np.abs(step).max(axis=1) < _TOLERANCE) & (np.abs(line).max(axis=1) < _LARGEST)
        return np.where(settled[:, None], line, np.nan)

    def _likelihood(self, weights: np.ndarray, line: np.ndarray) -> np.ndarray:
        z = line[:, :1] + line[:, 1:] * self._x
        fit = np.einsum("bn,bn->b", weights, self._positive * z - np.logaddexp(0.0, z))
        return np.asarray(fit)

    def _step(self, weights: np.ndarray, line: np.ndarray, *, slope: bool) -> np.ndarray:
        expected = expit(line[:, :1] + line[:, 1:] * self._x)
        error = weights * (self._positive - expected)
        spread = weights * expected * (1 - expected)
        a, g = spread.sum(axis=1), error.sum(axis=1)
        if not slope:
            return np.column_stack([g / a, np.zeros_like(a)])
        b, c, h = spread @ self._x, spread @ self._x**2, error @ self._x
        determinant = a * c - b * b
        return np.asarray(np.column_stack([c * g - b * h, a * h - b * g]) / determinant[:, None])
