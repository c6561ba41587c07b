"""Logistic regression: the baseline that every table shows, and on columns without an encoder."""

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from scipy.special import expit

from medembed.core.poolings import IMAGE_STATISTICS
from medembed.heads.base import ClassWeight, Head, arrays_of, is_count
from medembed.heads.scaling import Projection, Projector

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

__all__ = ["ImageStatisticsHead", "LogisticHead", "MetadataHead", "PartHead", "fit_path"]


class LogisticHead(Head):
    """L2-regularised logistic regression on standardised columns.

    Parameters
    ----------
    C : float
        Inverse strength of the penalty. With hundreds of correlated columns, 1 is almost no
        penalty; the default suits embeddings of a thousand to a hundred thousand images.
    class_weight : "balanced", dict or None
        scikit-learn's `class_weight`.
    standardize : bool
        Scale the columns of X to mean 0 and standard deviation 1 first.
    pca : int
        Number of principal components to fit on; 0: all columns.
    n_covariates : int
        The last columns of X, which `pca` leaves out.
    max_iter : int
        Maximum number of L-BFGS iterations; `converged_` says whether fewer were enough.
    tol : float
        L-BFGS stops when the largest element of the gradient is below this.

    Attributes
    ----------
    coef_ : float64 array of shape (1, k)
        Coefficients of the columns that `projection_` returns.
    intercept_ : float64 array of shape (1,)
    projection_ : Projection
    n_iter_ : int
    converged_ : bool
    best_epoch_ : None
    """

    shares: ClassVar[str | None] = "path"
    n_together: ClassVar[int | None] = None
    is_differentiable: ClassVar[bool] = True
    trains_with_encoder: ClassVar[bool] = True

    def __init__(
        self,
        C: float = 0.01,
        *,
        class_weight: ClassWeight = "balanced",
        standardize: bool = True,
        pca: int = 0,
        n_covariates: int = 0,
        max_iter: int = 200,
        tol: float = 1e-4,
    ) -> None:
        self.C = C
        self.class_weight = class_weight
        self.standardize = standardize
        self.pca = pca
        self.n_covariates = n_covariates
        self.max_iter = max_iter
        self.tol = tol

    def find_bases(self) -> list[tuple[str, int]]:
        """Return the standard scaling with the number of components to fit on."""
        return [("standard", self.pca)] if self.standardize else []

    def as_layers(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return the coefficients as one layer."""
        return [self.coef_.T.astype(np.float32)], [self.intercept_.astype(np.float32)]

    def fit(self, X: Any, y: Any, *, X_val: Any = None, y_val: Any = None) -> Self:
        """Fit on X of shape (n, d), finite, and y of two classes.

        Validation rows are checked but not used: there is nothing to stop early.

        Raises
        ------
        TrainingDataError
            y, or y_val if given, does not hold both of two classes.
        """
        X, codes = self._check_training(X, y)
        self._check_validation(X_val, y_val)
        self.check_parameters()
        fit_path([self], X, codes, Projector(X, n_covariates=self.n_covariates))
        return self

    def check_parameters(self) -> None:
        """Raise TrainingDataError if a parameter is out of range."""
        self._refuse_out_of_range(
            {
                "C": self.C > 0,
                "pca": is_count(self.pca, 0),
                "max_iter": is_count(self.max_iter, 1),
                "tol": self.tol > 0,
            }
        )

    def take(self, model: "LogisticRegression", projection: Projection) -> None:
        """Become fitted with scikit-learn's coefficients and the projection before them."""
        self.projection_ = projection
        self.coef_ = model.coef_.astype(np.float64)
        self.intercept_ = model.intercept_.astype(np.float64)
        self.n_iter_ = int(model.n_iter_[0])
        self.converged_ = self.n_iter_ < self.max_iter
        self.best_epoch_ = None

    def _probability(self, X: np.ndarray) -> np.ndarray:
        blocks = self.projection_.blocks(X)
        return np.concatenate([expit(rows @ self.coef_[0] + self.intercept_[0]) for rows in blocks])

    def _payload(self) -> dict[str, np.ndarray]:
        return {
            **self.projection_.as_arrays(),
            "coef": self.coef_,
            "intercept": self.intercept_,
        }

    def _restore(self, payload: dict[str, np.ndarray] | str, n_features: int) -> None:
        self.check_parameters()
        expected = Projection.expected_arrays(payload, n_features, self.pca, self.n_covariates)
        n_columns = expected["components"][1][1] + self.n_covariates if self.pca else n_features
        expected |= {"coef": ("float64", (1, n_columns)), "intercept": ("float64", (1,))}
        arrays = arrays_of(payload, expected)
        self.projection_ = Projection.from_arrays(arrays, self.n_covariates)
        self.coef_, self.intercept_ = arrays["coef"], arrays["intercept"]


def fit_path(
    heads: Sequence[LogisticHead],
    X: np.ndarray,
    codes: np.ndarray,
    projector: Projector,
    rows: np.ndarray | None = None,
) -> None:
    """Fit heads on the same rows, from the strongest penalty to the weakest.

    A head that differs from the one before only in C starts from its coefficients.

    Parameters
    ----------
    X, rows
        The table and the indices of the n training rows (None: all), those of `projector`.
    codes : int array of shape (n,)
        Labels, 0 or 1.
    """
    # not earlier: a packaged head predicts without them
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    paths: dict[str, list[LogisticHead]] = {}
    for head in sorted(heads, key=lambda head: head.C):
        paths.setdefault(str({**head.get_params(), "C": None}), []).append(head)
    for path in paths.values():
        first = path[0]
        scaling = "standard" if first.standardize else "none"
        projection = projector.learn(scaling, first.pca)
        # one copy in the dtype given: float32 halves both memory and time
        columns = projection.apply(X, X.dtype, rows)
        classes = getattr(first, "classes_", np.array([0, 1]))
        model = LogisticRegression(
            class_weight=_by_code(first.class_weight, classes),
            max_iter=first.max_iter,
            tol=first.tol,
            warm_start=True,
        )
        for head in path:
            with warnings.catch_warnings():
                # an attribute, not a warning: weak penalties rarely converge, which seldom matters
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.set_params(C=head.C).fit(columns, codes)
            head.take(model, projection)


def _by_code(class_weight: ClassWeight, classes: np.ndarray) -> Any:
    """Return `class_weight`, with 0 and 1 for keys if it is a dict."""
    if class_weight is None or isinstance(class_weight, str):
        return class_weight
    return {code: class_weight.get(name, 1.0) for code, name in enumerate(classes.tolist())}


class PartHead(Head):
    """A logistic regression on those columns of X that no encoder made: a baseline.

    Parameters
    ----------
    C, class_weight
        See `LogisticHead`; few columns need little penalty.
    n_covariates : int
        The last columns of X, which are covariates.

    Attributes
    ----------
    model_ : LogisticHead
        Fitted on the part of the columns that is read.
    best_epoch_ : None
    """

    is_baseline: ClassVar[bool] = True

    def __init__(
        self,
        C: float = 1.0,
        *,
        class_weight: ClassWeight = "balanced",
        n_covariates: int = 0,
    ) -> None:
        self.C = C
        self.class_weight = class_weight
        self.n_covariates = n_covariates

    @abstractmethod
    def _columns(self, n_columns: int) -> slice:
        """Return the columns that are read, of X with `n_columns`."""

    def check_parameters(self) -> None:
        """Raise TrainingDataError if a parameter is out of range."""
        self._make().check_parameters()

    def fit(self, X: Any, y: Any, *, X_val: Any = None, y_val: Any = None) -> Self:
        """Fit on a part of X of shape (n, d), finite, and y of two classes; see `LogisticHead.fit`.

        Raises
        ------
        TrainingDataError
            y, or y_val if given, does not hold both of two classes.
        """
        X, codes = self._check_training(X, y)
        self._check_validation(X_val, y_val)
        self.model_ = self._make().fit(X[:, self._columns(X.shape[1])], self.classes_[codes])
        self.best_epoch_ = None
        return self

    def _make(self) -> LogisticHead:
        return LogisticHead(self.C, class_weight=self.class_weight)

    def _probability(self, X: np.ndarray) -> np.ndarray:
        return self.model_._probability(X[:, self._columns(X.shape[1])])

    def _payload(self) -> dict[str, np.ndarray] | str:
        return self.model_._payload()

    def _restore(self, payload: dict[str, np.ndarray] | str, n_features: int) -> None:
        start, stop, _ = self._columns(n_features).indices(n_features)
        self.model_ = self._make()
        self.model_._restore(payload, stop - start)


class MetadataHead(PartHead):
    """Read the covariates alone, which know no image; without any, all columns."""

    def _columns(self, n_columns: int) -> slice:
        return slice(n_columns - self.n_covariates if self.n_covariates else 0, n_columns)


class ImageStatisticsHead(PartHead):
    """Read brightness, size, sharpness and border of the film; see `images.statistics`."""

    reads_pooling: ClassVar[str | None] = IMAGE_STATISTICS

    def _columns(self, n_columns: int) -> slice:
        return slice(0, n_columns - self.n_covariates)
