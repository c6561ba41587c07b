"""The contract of all heads, and the checks before fitting."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from numbers import Integral
from typing import Any, ClassVar, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data

from medembed.core.errors import ModelError, TrainingDataError

__all__ = [
    "ClassWeight",
    "Head",
    "arrays_of",
    "is_count",
    "row_weights",
]

_LEAST = 1e-15  # of a probability whose logit is asked for
ClassWeight = str | Mapping[Any, float] | None


class Head(ClassifierMixin, BaseEstimator, ABC):
    """A binary classifier on embeddings.

    ``fit(X, y, *, X_val=None, y_val=None)`` is given its validation rows and never draws them: a
    random draw would put one patient on both sides. ``best_epoch_`` is the number of epochs or
    trees in use (None for a head without any), and ``with_budget(n)`` an unfitted copy that trains
    exactly that many, for the refit on all rows. Class attributes declare what a head can do, so
    that callers never test for its name.
    """

    study_level: ClassVar[bool] = False
    """Whether rows are views, and predictions are of studies."""
    shares: ClassVar[str | None] = None
    """What configurations share when a sweep fits them together: a "path" of penalties, "bins" of
    the data, or a "cohort" whose members take each step together; None: each is fitted alone."""
    n_together: ClassVar[int | None] = 1
    """The most configurations that a sweep fits together; None: all."""
    is_independent: ClassVar[bool] = False
    """Whether a result does not depend on what is fitted beside it: after a crash a sweep then
    tries each configuration alone."""
    has_rungs: ClassVar[bool] = False
    """Whether training has epochs, after some of which a sweep may drop the weaker half."""
    shared_params: ClassVar[tuple[str, ...]] = ()
    """Parameters that all configurations fitted together must have in common."""
    bin_params: ClassVar[tuple[str, ...]] = ()
    """Parameters that determine the bins: configurations that agree in them share binned data."""
    uses_span: ClassVar[bool] = False
    """Whether it is trained on a basis of its rows where they are fewer than the columns, which a
    fold learns once for each scaling of `find_bases`; see `Projector.span`."""
    is_differentiable: ClassVar[bool] = False
    """Whether the logit has a gradient for explanations to follow; otherwise they leave tokens out.
    """
    trains_with_encoder: ClassVar[bool] = False
    """Whether the head can be trained on together with an encoder's blocks: it has `as_layers`."""
    keeps_rows: ClassVar[bool] = False
    """Whether a packaged model holds the embeddings of its training rows, which its card then says.
    """
    reads_words: ClassVar[bool] = False
    """Whether the head needs prompts, which a sweep is given by `--prompts`."""
    reads_pooling: ClassVar[str | None] = None
    """The one pooling that the head reads, whatever `--pool` says; None: those of `--pool`."""
    is_baseline: ClassVar[bool] = False
    """Whether the head reads nothing that an encoder made: a sweep tries it once, whatever `--pool`
    says, and tables show it beside the priors."""
    data_params: ClassVar[tuple[str, ...]] = ()
    """Parameters that a sweep sets and that are no JSON values: what a model keeps of them is in
    its payload."""
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

    def import_libraries(self) -> None:
        """Import what training needs and applying does not, such as torch.

        Threads can only be limited in libraries that are imported.
        """

    def find_bases(self) -> list[tuple[str, int]]:
        """Return the scalings and components that a fold learns once for all heads that need them.

        Each pair is a name of `scaling.SCALINGS` and a number of principal components, or 0.
        """
        return []

    def as_layers(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return the fitted weights, (columns in, columns out), and biases of layers, float32.

        Raises
        ------
        ModelError
            The head has no layers; see `trains_with_encoder`.
        """
        raise ModelError(f"a head of {type(self).__name__} has no layers to train on.")

    def predict_logit(self, X: np.ndarray) -> np.ndarray:
        """Return ln(p / (1 - p)) of each row's probability of the second class, float64 (n,)."""
        positive = np.clip(self.predict_proba(X)[:, 1], _LEAST, 1 - _LEAST)
        return np.asarray(np.log(positive) - np.log1p(-positive), np.float64)

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
        """Restore what `_payload` returned; ModelError if it does not match the parameters."""

    def _read_arrays(
        self,
        payload: dict[str, np.ndarray] | str,
        expected: Mapping[str, tuple[str, tuple[int, ...]]],
    ) -> dict[str, np.ndarray]:
        """Return the payload's arrays for `_restore`, checked by `arrays_of`."""
        return arrays_of(payload, expected)

    def check_parameters(self) -> None:
        """Raise TrainingDataError if a parameter is out of range."""

    def _refuse_out_of_range(self, are_right: Mapping[str, bool]) -> None:
        for name, is_right in are_right.items():
            if not is_right:
                value = getattr(self, name)
                raise TrainingDataError(f"{type(self).__name__}: {name}={value!r} is out of range")

    def _check_training(self, X: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return X (float32 or float64, unchanged) and y as 0 and 1; set `classes_`."""
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
        """Return validation rows and their labels as 0 and 1, or None if there are none."""
        if X_val is None and y_val is None:
            return None
        if X_val is None or y_val is None:
            raise TrainingDataError("X_val and y_val must be passed together, or not at all")
        X_val, y_val = validate_data(
            self, X_val, y_val, reset=False, dtype=[np.float32, np.float64]
        )
        if not np.isin(self.classes_, y_val).all() or not np.isin(y_val, self.classes_).all():
            raise TrainingDataError(
                f"validation rows hold the classes {np.unique(y_val).tolist()}, training rows "
                f"{self.classes_.tolist()}; early stopping needs both in both"
            )
        return X_val, (y_val == self.classes_[1]).astype(np.int64)


def is_count(value: Any, least: int) -> bool:
    """Return whether a value is a whole number (no bool) and not below `least`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def row_weights(
    codes: np.ndarray,
    classes: np.ndarray,
    class_weight: ClassWeight,
    labels: np.ndarray | None = None,
) -> np.ndarray:
    """Return each row's weight (float64, shape (n,)) from scikit-learn's `class_weight`.

    `labels` are those of the training rows, if `codes` are labels of other rows.
    """
    if isinstance(class_weight, Mapping):
        class_weight = dict(class_weight)
    y = classes[codes] if labels is None else labels
    return np.asarray(compute_class_weight(class_weight, classes=classes, y=y)[codes])


def arrays_of(
    payload: dict[str, np.ndarray] | str, expected: Mapping[str, tuple[str, tuple[int, ...]]]
) -> dict[str, np.ndarray]:
    """Return the payload's arrays after checking names, dtypes, shapes and values.

    Parameters
    ----------
    payload : dict of arrays, or text, which is refused
    expected : dict of name to (dtype, shape)

    Raises
    ------
    ModelError
        A name is missing or unknown, a dtype or shape is not the expected one, a value is not
        finite, or a value of a `scale`, which columns are divided by, is not above zero.
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
        if name.rpartition(".")[2] == "scale" and not (array > 0).all():
            raise ModelError(f"tensor {name} holds values that are not above zero")
    return payload
