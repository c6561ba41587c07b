"""Resampling of patients, and the statistics computed from resamples.

Views and studies of one patient are not independent, so whole patients are drawn with replacement
(the cluster bootstrap; Davison and Hinkley, Bootstrap Methods and Their Application, 1997, 3.8).
Equal seeds and patients produce equal resamples, so that all numbers of a report, and all heads of
a comparison, are evaluated on identical draws.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from medembed.core.errors import TrainingDataError
from medembed.evaluation.scores import Scorer

__all__ = [
    "CONFIDENCE",
    "CONSTANT",
    "MAX_DROPPED_SHARE",
    "MIN_PATIENTS",
    "Interval",
    "draw",
    "finite_or_none",
    "patient_codes",
    "percentiles",
    "quotients",
    "standard_error",
    "upper_bound",
]

CONFIDENCE = 0.95
#: Patients of each class, or of a share's denominator, below which no interval is given.
MIN_PATIENTS = 5
CONSTANT = "every row has the same probability"
"""Why a head such as the class prior has no interval."""
#: Resamples without a class are dropped; if more than this share is dropped, no interval is given.
#: At one tenth, a class needs about three patients (exp(-3) = 5 % of resamples miss all of them).
MAX_DROPPED_SHARE = 0.1
#: Weights held at a time: 60,000 float64 and the arrays derived from them stay in a core's cache;
#: but at least this many resamples if there are many rows.
_CHUNK_ELEMENTS = 60_000
_MIN_CHUNK = 4
#: Draws are kept for the next head if they take at most 64 MB and fit 16 bits.
_MAX_KEPT_COUNTS, _MAX_KEPT_PATIENTS = 32_000_000, 65_535


@dataclass(frozen=True)
class Interval:
    """A score and its 95 % interval; NaN if they cannot be estimated.

    Only `low` and `high` are NaN if the value exists but has no interval; only `low` is NaN if
    there is just an upper bound.

    Attributes
    ----------
    value, low, high : float
    method : str, optional
        Name of the method that gave the limits; None without limits.
    reason : str, optional
        Why there are no limits.
    k, n : int, optional
        For a share, the rows counted and the rows in total.
    """

    value: float
    low: float
    high: float
    method: str | None = None
    reason: str | None = None
    k: int | None = None
    n: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return `value`, `low`, `high`, None if not estimable, and `method`.

        `reason` is included if there is one, `k` and `n` for a share.
        """
        found: dict[str, Any] = {
            name: finite_or_none(getattr(self, name)) for name in ("value", "low", "high")
        }
        found["method"] = self.method
        if self.reason is not None:
            found["reason"] = self.reason
        return found if self.n is None else {**found, "k": self.k, "n": self.n}


def patient_codes(patients: Any) -> np.ndarray:
    """Return patients as integers from 0, sorted, so that draws do not depend on the row order.

    Raises
    ------
    TrainingDataError
        A row has no patient.
    """
    codes, _ = pd.factorize(np.asarray(patients), sort=True)
    if (codes < 0).any():
        raise TrainingDataError(f"{int((codes < 0).sum())} rows have no patient to resample by")
    return codes


def draw(
    scorers: Sequence[Scorer],
    members: Sequence[np.ndarray],
    codes: np.ndarray,
    n_resamples: int,
    seed: int,
) -> tuple[list[dict[str, float]], list[dict[str, np.ndarray]]]:
    """Return each scorer's scores on the data, and on every resample (float64, shape (B,)).

    Parameters
    ----------
    scorers : sequence of Scorer
    members : sequence of integer arrays
        The rows that each scorer covers.
    codes : integer array of shape (n,)
        From `patient_codes`.
    n_resamples, seed : int

    Raises
    ------
    TrainingDataError
        The rows of a scorer differ from its members, or a member has no patient.
    """
    for scorer, rows in zip(scorers, members, strict=True):
        if scorer.n_rows != len(rows) or (len(rows) and rows.max() >= len(codes)):
            raise TrainingDataError(f"{scorer.n_rows} labels, but {len(codes)} patients")
    truth = [
        {name: float(value[0]) for name, value in scorer(np.ones((1, len(rows)))).items()}
        for scorer, rows in zip(scorers, members, strict=True)
    ]
    parts: list[list[dict[str, np.ndarray]]] = [[] for _ in scorers]
    for weights in _weights(codes, n_resamples, seed):
        for part, scorer, rows in zip(parts, scorers, members, strict=True):
            part.append(scorer(weights if len(rows) == len(codes) else weights[:, rows]))
    draws = [
        {name: np.concatenate([chunk[name] for chunk in part]) for name in scorer.names}
        for part, scorer in zip(parts, scorers, strict=True)
    ]
    return truth, draws


def percentiles(value: float, draws: np.ndarray) -> tuple[float, float]:
    """Return the ends of the 95 % percentile interval, NaN where not estimable.

    It is not estimable if `value` is NaN, or more than `MAX_DROPPED_SHARE` of the draws are.
    """
    kept = _kept(value, draws)
    if len(kept) == 0:
        return math.nan, math.nan
    low, high = np.quantile(kept, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def upper_bound(
    value: float, draws: np.ndarray, n_patients: int, is_constant: bool = False
) -> Interval:
    """Return a score that resampling inflates, such as ECE, with only a 95 % upper bound.

    ECE sums absolute values: its value includes the noise of the sample, and the draws include
    that of resampling as well. The draws' 95 % quantile is therefore an upper bound for the truth,
    but there is no lower bound: a calibrated head's true ECE is 0, while that of a sample never is.
    """
    kept = _kept(value, draws)
    reason = None
    if n_patients < MIN_PATIENTS:
        reason = f"{n_patients} patients; an interval needs {MIN_PATIENTS}"
    elif is_constant:
        reason = CONSTANT
    if reason is not None or len(kept) == 0:
        return Interval(value, math.nan, math.nan, None, reason)
    high = float(np.quantile(kept, CONFIDENCE))
    return Interval(value, math.nan, high, "bootstrap upper bound")


def quotients(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return sums divided by counts, arrays of one shape, float64; NaN where the count is 0."""
    return np.asarray(sums / np.where(counts > 0, counts, np.nan))


def standard_error(value: float, draws: np.ndarray) -> float:
    """Return the bootstrap standard error, the draws' standard deviation (n - 1).

    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 6. NaN if
    `percentiles` gives no interval.
    """
    kept = _kept(value, draws)
    return float(kept.std(ddof=1)) if len(kept) > 1 else math.nan


def finite_or_none(value: float) -> float | None:
    """Return `value` as a float, or None for NaN and infinities, which JSON does not have."""
    return float(value) if math.isfinite(value) else None


def _kept(value: float, draws: np.ndarray) -> np.ndarray:
    """Return the valid draws, or none if the value is NaN or too many draws are."""
    kept = np.asarray(draws[~np.isnan(draws)])
    if math.isnan(value) or len(kept) < (1 - MAX_DROPPED_SHARE) * len(draws):
        return kept[:0]
    return kept


def _weights(codes: np.ndarray, n_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield row weights (chunk, n): how often each row's patient was drawn."""
    n_patients = int(codes.max()) + 1 if len(codes) else 0
    size = max(_MIN_CHUNK, _CHUNK_ELEMENTS // max(len(codes), 1))
    generator, kept = np.random.default_rng(seed), None
    if n_patients <= _MAX_KEPT_PATIENTS and n_patients * n_resamples <= _MAX_KEPT_COUNTS:
        kept = _keep_counts(n_patients, n_resamples, seed)
    for start in range(0, n_resamples, size):
        n = min(size, n_resamples - start)
        if kept is None:
            counts = _count_patients(generator, n_patients, n)
        else:
            counts = kept[start : start + n]
        yield counts[:, codes].astype(np.float64)


@lru_cache(maxsize=2)
def _keep_counts(n_patients: int, n_resamples: int, seed: int) -> np.ndarray:
    """Return the cached draws shared by all heads of a comparison, uint16 (B, patients)."""
    generator = np.random.default_rng(seed)
    kept = np.empty((n_resamples, n_patients), np.uint16)
    size = max(_MIN_CHUNK, _CHUNK_ELEMENTS // max(n_patients, 1))
    for start in range(0, n_resamples, size):
        part = kept[start : start + size]
        part[:] = _count_patients(generator, n_patients, len(part))
    return kept


def _count_patients(generator: np.random.Generator, n_patients: int, n: int) -> np.ndarray:
    """Return how often each patient occurs in n draws with replacement, (n, patients)."""
    drawn = generator.integers(0, n_patients, size=(n, n_patients))
    drawn += np.arange(n)[:, None] * n_patients
    return np.bincount(drawn.ravel(), minlength=n * n_patients).reshape(n, n_patients)
