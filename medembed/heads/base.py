"""What all heads share: their contract, and the checks before any fitting."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data

from medembed.errors import ModelError, TrainingDataError

__all__ = [
    "ClassWeight",
    "Head",
    "arrays_of",
    "column_scaling",
    "row_weights",
    "standardised_blocks",
]

#: Rows scaled and predicted at a time: 4096 x 1152 float64 are 38 MB, whatever the table's size.
_BLOCK_ROWS = 4096

ClassWeight = str | Mapping[Any, float] | None


class Head(ClassifierMixin, BaseEstimator, ABC):
    """A binary classifier on embeddings.

    ``fit(X, y, *, X_val=None, y_val=None)`` is handed its validation rows and never draws them: a
    random draw would put one patient on both sides. ``best_epoch_`` is the number of epochs or
    trees in use (None where a head has none), and ``with_budget(n)`` an unfitted copy that trains
    exactly that many, for the refit on all rows.
    """

    best_epoch_: int | None
    classes_: np.ndarray
    n_features_in_: int

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def with_budget(self, n: int) -> Self:
        """Return an unfitted copy that trains exactly `n` epochs or trees, without stopping early.

        A head without epochs returns a plain copy.
        """
        return clone(self)  # type: ignore[no-any-return]

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Return the probability of each of `classes_`, float64 of shape (n, 2)."""
        check_is_fitted(self)
        checked = validate_data(self, X, reset=False, dtype=[np.float32, np.float64])
        positive = self._probability(checked)
        return np.column_stack([1 - positive, positive])

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Return the likelier class of each row (the second at one half), shape (n,)."""
        abnormal = self.predict_proba(X)[:, 1] >= 0.5
        return np.take(self.classes_, abnormal.astype(int))

    @abstractmethod
    def _probability(self, X: np.ndarray) -> np.ndarray:
        """Return the probability of the second class, float64 of shape (n,)."""

    @abstractmethod
    def _payload(self) -> dict[str, np.ndarray] | str:
        """Return what was learnt, as named arrays or as text, for `packaging`."""

    @abstractmethod
    def _restore(self, payload: dict[str, np.ndarray] | str, n_features: int) -> None:
        """Take what `_payload` gave; ModelError where it does not fit the parameters."""

    def _check_training(self, X: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return X (float32 or float64 as given) and y as 0 and 1; set `classes_`."""
        X, y = validate_data(self, X, y, dtype=[np.float32, np.float64])
        check_classification_targets(y)
        kind = type_of_target(y, input_name="y", raise_unknown=True)
        if kind != "binary":
            raise TrainingDataError(
                f"Only binary classification is supported. The type of the target is {kind}. "
                "Leave unlabelled rows (label -1) out."
            )
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise TrainingDataError(
                f"the {len(codes)} training rows hold one class, {self.classes_[0]}; "
                "a head needs rows of both"
            )
        return X, codes

    def _check_validation(self, X_val: Any, y_val: Any) -> tuple[np.ndarray, np.ndarray] | None:
        """Return validation rows, labels as 0 and 1; None where none were handed over."""
        if X_val is None and y_val is None:
            return None
        if X_val is None or y_val is None:
            raise TrainingDataError("X_val and y_val are handed over together, or neither")
        X_val, y_val = validate_data(
            self, X_val, y_val, reset=False, dtype=[np.float32, np.float64]
        )
        if not np.isin(self.classes_, y_val).all() or not np.isin(y_val, self.classes_).all():
            raise TrainingDataError(
                f"validation rows hold the classes {np.unique(y_val).tolist()}, training rows "
                f"{self.classes_.tolist()}; early stopping needs both in both"
            )
        return X_val, (y_val == self.classes_[1]).astype(np.int64)


def column_scaling(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each column's mean and standard deviation (float64; 1 for a constant column).

    Two passes over blocks of rows, so that no float64 copy of `X` is made.
    """
    mean = np.mean(X, axis=0, dtype=np.float64)
    squares = np.zeros(X.shape[1])
    for start in range(0, len(X), _BLOCK_ROWS):
        squares += np.square(X[start : start + _BLOCK_ROWS] - mean).sum(axis=0)
    scale = np.sqrt(squares / len(X))
    # a constant column's deviation is rounding error, and dividing by it would make noise of it
    constant = scale <= 10 * np.finfo(X.dtype).eps * np.abs(mean)
    scale[constant] = 1.0
    return np.asarray(mean), scale


def standardised_blocks(X: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> Iterator[np.ndarray]:
    """Yield blocks of rows of (X - mean) / scale in float64.

    In float64 a row's prediction does not depend on the rows beside it beyond 1e-12.
    """
    for start in range(0, len(X), _BLOCK_ROWS):
        yield (X[start : start + _BLOCK_ROWS] - mean) / scale


def row_weights(codes: np.ndarray, classes: np.ndarray, class_weight: ClassWeight) -> np.ndarray:
    """Return each row's weight (float64, shape (n,)) from scikit-learn's `class_weight`."""
    if isinstance(class_weight, Mapping):
        class_weight = dict(class_weight)
    y = classes[codes]
    return np.asarray(compute_class_weight(class_weight, classes=classes, y=y)[codes])


def arrays_of(
    payload: dict[str, np.ndarray] | str, expected: Mapping[str, tuple[str, tuple[int, ...]]]
) -> dict[str, np.ndarray]:
    """Return the payload's arrays once names, dtypes, shapes and values are what they must be.

    Parameters
    ----------
    payload : dict of arrays, or text, which no caller of this function wants
    expected : dict of name to (dtype, shape)

    Raises
    ------
    ModelError
        A name is missing or unknown, a dtype or shape is another, or a value is not finite.
    """
    if isinstance(payload, str) or set(payload) != set(expected):
        held = "text" if isinstance(payload, str) else ", ".join(sorted(payload))
        raise ModelError(f"the model holds {held}; its parameters ask for {', '.join(expected)}")
    for name, (dtype, shape) in expected.items():
        array = payload[name]
        if array.dtype != dtype or array.shape != shape:
            raise ModelError(
                f"tensor {name} is {array.dtype} {array.shape}; the model's parameters ask for "
                f"{dtype} {shape}"
            )
        if not np.isfinite(array).all():
            raise ModelError(f"tensor {name} holds values that are not finite numbers")
    if "scale" in payload and not (payload["scale"] > 0).all():
        raise ModelError("tensor scale holds values that are not above zero")
    return payload
