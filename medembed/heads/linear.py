"""Logistic regression: the floor that every table shows."""

import warnings
from typing import Any, Self

import numpy as np
from scipy.special import expit
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from medembed.heads.base import ClassWeight, Head, arrays_of, column_scaling, standardised_blocks

__all__ = ["LogisticHead"]


class LogisticHead(Head):
    """L2-regularised logistic regression on standardised columns.

    Parameters
    ----------
    C : float
        Inverse strength of the penalty. With hundreds of correlated columns 1 is nearly none;
        the default suits embeddings of a thousand to a hundred thousand images.
    class_weight : "balanced", dict or None
        As scikit-learn's.
    standardize : bool
        Bring the columns of X to mean 0 and standard deviation 1 first.
    max_iter : int
        L-BFGS iterations at most; `converged_` says whether fewer were enough.
    tol : float
        L-BFGS stops where the largest element of the gradient is below this.

    Attributes
    ----------
    coef_ : float64 array of shape (1, d)
        Coefficients of the standardised columns.
    intercept_ : float64 array of shape (1,)
    mean_, scale_ : float64 arrays of shape (d,)
        Zeros and ones without `standardize`.
    n_iter_ : int
    converged_ : bool
    best_epoch_ : None
    """

    def __init__(
        self,
        C: float = 0.01,
        *,
        class_weight: ClassWeight = "balanced",
        standardize: bool = True,
        max_iter: int = 200,
        tol: float = 1e-4,
    ) -> None:
        self.C = C
        self.class_weight = class_weight
        self.standardize = standardize
        self.max_iter = max_iter
        self.tol = tol

    def fit(self, X: Any, y: Any, *, X_val: Any = None, y_val: Any = None) -> Self:
        """Fit on X of shape (n, d), finite, and y of two classes.

        Validation rows are checked and not used: there is nothing to stop early.

        Raises
        ------
        TrainingDataError
            y, or y_val where given, does not hold both of two classes.
        """
        X, codes = self._check_training(X, y)
        self._check_validation(X_val, y_val)
        self.mean_, self.scale_ = np.zeros(X.shape[1]), np.ones(X.shape[1])
        if self.standardize:
            self.mean_, self.scale_ = column_scaling(X)
            # one copy in the dtype given: float32 halves both memory and time
            X = ((X - self.mean_.astype(X.dtype)) / self.scale_.astype(X.dtype)).astype(X.dtype)
        model = LogisticRegression(
            C=self.C,
            class_weight=_by_code(self.class_weight, self.classes_),
            max_iter=self.max_iter,
            tol=self.tol,
        )
        with warnings.catch_warnings():
            # kept as an attribute: weak penalties rarely converge, and no sweep is read that far
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(X, codes)
        self.coef_ = model.coef_.astype(np.float64)
        self.intercept_ = model.intercept_.astype(np.float64)
        self.n_iter_ = int(model.n_iter_[0])
        self.converged_ = self.n_iter_ < self.max_iter
        self.best_epoch_ = None
        return self

    def _probability(self, X: np.ndarray) -> np.ndarray:
        blocks = standardised_blocks(X, self.mean_, self.scale_)
        return np.concatenate([expit(rows @ self.coef_[0] + self.intercept_[0]) for rows in blocks])

    def _payload(self) -> dict[str, np.ndarray]:
        return {
            "coef": self.coef_,
            "intercept": self.intercept_,
            "mean": self.mean_,
            "scale": self.scale_,
        }

    def _restore(self, payload: dict[str, np.ndarray] | str, n_features: int) -> None:
        columns = ("float64", (n_features,))
        expected = {"coef": ("float64", (1, n_features)), "intercept": ("float64", (1,))}
        arrays = arrays_of(payload, expected | {"mean": columns, "scale": columns})
        self.coef_, self.intercept_ = arrays["coef"], arrays["intercept"]
        self.mean_, self.scale_ = arrays["mean"], arrays["scale"]


def _by_code(class_weight: ClassWeight, classes: np.ndarray) -> Any:
    """Return `class_weight` with 0 and 1 for keys where it is a dict."""
    if class_weight is None or isinstance(class_weight, str):
        return class_weight
    return {code: class_weight.get(name, 1.0) for code, name in enumerate(classes.tolist())}
