"""How far single rows lie from the training patients, before anything they are called is believed.

Calibration, thresholds and prediction sets hold for patients like those of training. A row is held
against the distances that training patients have, one row of each, in the space of `drift`, whose
directions come from other patients: of a new patient of the same kind the rank of its distance is
uniform, so its p-value is exact but for its rounding up.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from medembed.errors import ModelError, TrainingDataError
from medembed.evaluation.spaces import Space

__all__ = ["FAR", "Remoteness", "measure_remoteness"]

FAR = 0.02
"""Rows of a p-value up to this are called far; with fewer than 50 training patients, those that lie
further out than all of them."""


@dataclass(frozen=True, eq=False)
class Remoteness:
    """How far n rows lie from training.

    Attributes
    ----------
    distance : float64 (n,)
        1 is the edge of the range that holds 95 % of training patients.
    p : float64 (n,)
        The share of training patients that lie as far, the row counted as one of them; at most that
        much too large, and never too small, by one in a hundred.
    far : bool (n,)
        Whether that is `FAR` at most.
    n_training : int
        Patients behind it.
    """

    distance: np.ndarray
    p: np.ndarray
    far: np.ndarray
    n_training: int


def measure_remoteness(reference: Mapping[str, np.ndarray], X: np.ndarray) -> Remoteness | None:
    """Compare rows, each by itself, with the training patients behind a reference.

    A conformal p-value (Laxhammar and Falkman, Annals of Mathematics and Artificial Intelligence
    74, 2015), from the hundredths of the distances that are kept.

    Parameters
    ----------
    reference : mapping
        From `drift.fit_reference`.
    X : float array of shape (n, d)
        Embeddings of the same kind.

    Returns
    -------
    Remoteness or None
        None where there were too few training patients to measure anything.

    Raises
    ------
    ModelError
        The reference is damaged, or of embeddings with another number of columns.
    TrainingDataError
        An embedding is not finite.
    """
    if "range" not in reference:
        return None
    space = Space.from_arrays(reference)
    limit, n, kept = _read(reference)
    if X.ndim != 2 or X.shape[1] != len(space.centre):
        raise ModelError(
            f"the model's reference is of {len(space.centre)} columns, these embeddings have "
            f"{X.shape[-1]}; use the poolings that the model reads"
        )
    if not np.isfinite(X).all():
        raise TrainingDataError("an embedding is not finite; how far it lies cannot be measured")
    found = np.linalg.norm(space.project(X), axis=1)
    # of the kept quantiles below the distance, the highest says how many patients are below it
    below = np.searchsorted(kept, found, side="left") - 1
    n_below = np.where(below < 0, 0, below * (n - 1) // (len(kept) - 1) + 1)
    p = (1 + n - n_below) / (1 + n)
    return Remoteness(found / limit, p, p <= max(FAR, 1 / (1 + n)), n)


def _read(reference: Mapping[str, np.ndarray]) -> tuple[float, int, np.ndarray]:
    """Return the range's edge, the number of patients, and the quantiles of their distances."""
    limits, kept = reference["range"], reference.get("quantiles", np.zeros(0))
    are_right = limits.shape == (3,) and limits[0] > 0 and limits[2] >= 2
    if not are_right or kept.shape != (101,) or (np.diff(kept) < 0).any() or kept[0] < 0:
        raise ModelError(
            "the model's reference is damaged in range or quantiles; copy or train the model again"
        )
    return float(limits[0]), int(limits[2]), kept
