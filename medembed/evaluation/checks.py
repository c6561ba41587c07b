"""What labels and probabilities must be before anything is scored or fitted on them."""

import math
from typing import Any, TypeGuard

import numpy as np

from medembed.core.errors import TrainingDataError

__all__ = ["check_both_classes", "check_rows", "is_number"]


def check_rows(
    y: np.ndarray, probability: np.ndarray, purpose: str = "a score"
) -> tuple[np.ndarray, np.ndarray]:
    """Return labels as int8 and probabilities as float64, both (n,), fit for `purpose`.

    Raises
    ------
    TrainingDataError
        A label is not 0 or 1, a probability is not a number in [0, 1], or the lengths differ.
    """
    labels, values = np.asarray(y), np.asarray(probability, dtype=np.float64)
    if labels.ndim != 1 or labels.shape != values.shape:
        raise TrainingDataError(
            f"labels of shape {labels.shape} and probabilities of shape {values.shape} "
            f"are not two columns of one length; {purpose} needs one probability per label"
        )
    if not np.isin(labels, (0, 1)).all():
        strange = next(value for value in labels.tolist() if value not in (0, 1))
        raise TrainingDataError(f"label {strange} is not 0 or 1; leave unlabelled rows out")
    if not ((values >= 0) & (values <= 1)).all():
        raise TrainingDataError("a probability is NaN or outside [0, 1]; it cannot be scored")
    return labels.astype(np.int8), values


def check_both_classes(
    y: np.ndarray, probability: np.ndarray, purpose: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return labels as int64 and probabilities as float64, both (n,), fit to fit `purpose` on.

    Raises
    ------
    TrainingDataError
        Only one class, lengths that differ, other labels, or probabilities outside [0, 1].
    """
    labels, values = check_rows(y, probability, purpose)
    if len(np.unique(labels)) < 2:
        held = "normal" if (labels == 0).any() else "abnormal" if len(labels) else "none"
        raise TrainingDataError(
            f"{purpose} needs normal and abnormal rows, but all {len(labels)} are {held}; "
            "give it more patients"
        )
    return labels.astype(np.int64), values


def is_number(value: Any) -> TypeGuard[float]:
    """Say whether a JSON value is a number that a float can hold: no bool, infinity or NaN."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # JSON has whole numbers of any length
        return False
