"""Heads that know sentences: zero-shot, and logistic regression shrunk towards it."""

from typing import Any, ClassVar, Self

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from medembed.core.errors import ModelError, TrainingDataError
from medembed.core.prompts import Prompts, normalise
from medembed.heads.base import ClassWeight, Head, arrays_of, is_count, row_weights
from medembed.heads.scaling import column_scaling

__all__ = ["TextLogisticHead", "WordHead", "ZeroShotHead"]


class WordHead(Head):
    """A head that reads the pooled image vector and a direction from normal to abnormal.

    The direction comes from prompts of the same checkpoint, see `Prompts.directions`; where they
    name regions, each row has its region's, which it reads off the covariate `region`.

    Parameters
    ----------
    prompts : str
        The set of prompts; "" is the first.
    n_covariates : int
        The last columns of X, which are not of the image vector.
    words : Prompts, optional
        Set by sweeps; needed to fit.
    region_columns : mapping of str to int, optional
        Set by sweeps: for each region the column of the covariates that is 1 there.

    Attributes
    ----------
    directions_ : float64 array of shape (1 + r, k)
    region_columns_ : int64 array of shape (r,)
        Columns of X that are 1 in the regions of ``directions_[1:]``.
    image_projection_ : float32 array of shape (k, d), or None
    best_epoch_ : None
    """

    reads_words: ClassVar[bool] = True
    reads_pooling: ClassVar[str | None] = "pooler"
    data_params: ClassVar[tuple[str, ...]] = ("words", "region_columns")

    prompts: str
    n_covariates: int
    words: Prompts | None
    region_columns: Any

    def _take_words(self, n_columns: int) -> None:
        if self.words is None:
            raise TrainingDataError(
                f"{type(self).__name__} knows no prompts. Give a file of `medembed prompts`: "
                "--prompts FILE."
            )
        directions, regions = self.words.directions(self.prompts)
        n_own = n_columns - self.n_covariates
        if n_own != self.words.n_columns:
            raise TrainingDataError(
                f"the prompts belong to image vectors of {self.words.n_columns} columns, and "
                f"these have {n_own}. Use the pooling pooler of the same checkpoint."
            )
        places = dict(self.region_columns or {})
        known = [region for region in regions if region in places]
        kept = [0, *(1 + regions.index(region) for region in known)]
        self.directions_ = directions[kept]
        self.region_columns_ = np.array([n_own + places[own] for own in known], np.int64)
        self.image_projection_ = self.words.image_projection
        self.best_epoch_ = None

    def margins(self, X: np.ndarray) -> np.ndarray:
        """Return the logit of the abnormal prompts minus that of the normal ones, float64 (n,)."""
        own = X[:, : X.shape[1] - self.n_covariates]
        projection = self.image_projection_
        units = normalise(own if projection is None else own @ projection.T)
        found = np.asarray(units @ self.directions_[0])
        for k, column in enumerate(self.region_columns_):
            rows = X[:, column] > 0.5
            found[rows] = units[rows] @ self.directions_[1 + k]
        return found

    def _word_arrays(self) -> dict[str, np.ndarray]:
        arrays = {"directions": self.directions_, "region_columns": self.region_columns_}
        if self.image_projection_ is not None:
            arrays["image_projection"] = np.asarray(self.image_projection_, np.float32)
        return arrays

    def _restore_words(
        self, payload: dict[str, np.ndarray] | str, n_features: int, expected: dict[str, Any]
    ) -> dict[str, np.ndarray]:
        """Check and take what `_word_arrays` returned; return all arrays."""
        held = payload if isinstance(payload, dict) else {}
        n_own = n_features - self.n_covariates
        shape = getattr(held.get("region_columns"), "shape", (0,))
        r = shape[0] if len(shape) == 1 else 0
        projection = held.get("image_projection")
        k = n_own if projection is None or projection.ndim != 2 else projection.shape[0]
        wanted: dict[str, tuple[str, tuple[int, ...]]] = {
            "directions": ("float64", (1 + r, k)),
            "region_columns": ("int64", (r,)),
            **expected,
        }
        if projection is not None:
            wanted["image_projection"] = ("float32", (k, n_own))
        arrays = arrays_of(payload, wanted)
        columns = arrays["region_columns"]
        if ((columns < n_own) | (columns >= n_features)).any():
            raise ModelError("a region is read off a column that is no covariate")
        self.directions_, self.region_columns_ = arrays["directions"], columns
        self.image_projection_ = arrays.get("image_projection")
        return arrays


class ZeroShotHead(WordHead):
    """Say what the prompts say: sigmoid of the difference of two classes' logits; fits nothing.

    Its probability is not calibrated: with a checkpoint's own scale it is nearly always close to 0
    or 1. A sweep calibrates it as any other head.
    """

    def __init__(
        self,
        prompts: str = "",
        *,
        n_covariates: int = 0,
        words: Prompts | None = None,
        region_columns: Any = None,
    ) -> None:
        self.prompts = prompts
        self.n_covariates = n_covariates
        self.words = words
        self.region_columns = region_columns

    def fit(self, X: Any, y: Any, *, X_val: Any = None, y_val: Any = None) -> Self:
        """Take the prompts; labels are checked but not used.

        Raises
        ------
        TrainingDataError
            There are no prompts, they belong to other vectors, or y does not hold two classes.
        """
        X, _ = self._check_training(X, y)
        self._check_validation(X_val, y_val)
        self._take_words(X.shape[1])
        return self

    def _probability(self, X: np.ndarray) -> np.ndarray:
        return np.asarray(expit(self.margins(X)), np.float64)

    def _payload(self) -> dict[str, np.ndarray]:
        return self._word_arrays()

    def _restore(self, payload: dict[str, np.ndarray] | str, n_features: int) -> None:
        self._restore_words(payload, n_features, {})


class TextLogisticHead(WordHead):
    """Logistic regression whose prior is what the prompts say.

    The logit is b + strength · m + w · z, where m is the prompts' margin, standardised over the
    training rows, and z are the standardised columns of X. The loss is

        sum_i weight_i · cross-entropy_i  +  |w|² / (2 C),

    the mode of the posterior under a normal prior of the coefficients around the prompts'
    direction. As C falls, w vanishes: at C = 0 rows are ranked as by `ZeroShotHead`; as C grows, or
    with little strength, the head becomes `LogisticHead`. A sweep chooses both.

    Parameters
    ----------
    C : float
        Variance of the prior of w, at least 0.
    strength : float
        Logit of the prior's mean per standard deviation of the margin, above 0.
    prompts : str
        The set of prompts; "" is the first.
    class_weight : "balanced", dict or None
        scikit-learn's `class_weight`.
    max_iter : int
        Maximum number of L-BFGS-B iterations.

    Attributes
    ----------
    coef_ : float64 array of shape (d,)
        w.
    margin_ : float64 array of shape (4,)
        Mean and deviation of the margin, strength and b.
    mean_, scale_ : float64 arrays of shape (d,)
        What the columns are standardised by.
    """

    def __init__(
        self,
        C: float = 1e-2,
        strength: float = 0.3,
        prompts: str = "",
        *,
        class_weight: ClassWeight = "balanced",
        max_iter: int = 300,
        n_covariates: int = 0,
        words: Prompts | None = None,
        region_columns: Any = None,
    ) -> None:
        self.C = C
        self.strength = strength
        self.prompts = prompts
        self.class_weight = class_weight
        self.max_iter = max_iter
        self.n_covariates = n_covariates
        self.words = words
        self.region_columns = region_columns

    def check_parameters(self) -> None:
        """Raise TrainingDataError if a parameter is out of range."""
        limits = {"C": self.C >= 0, "strength": self.strength > 0}
        self._refuse_out_of_range({**limits, "max_iter": is_count(self.max_iter, 1)})

    def fit(self, X: Any, y: Any, *, X_val: Any = None, y_val: Any = None) -> Self:
        """Fit on X of shape (n, d), finite, and y of two classes; validation rows are not used.

        Raises
        ------
        TrainingDataError
            There are no prompts, they belong to other vectors, or y does not hold two classes.
        """
        X, codes = self._check_training(X, y)
        self._check_validation(X_val, y_val)
        self.check_parameters()
        self._take_words(X.shape[1])
        weights = row_weights(codes, self.classes_, self.class_weight)
        margins = self.margins(X)
        centre, spread = float(margins.mean()), float(margins.std()) or 1.0
        self.mean_, self.scale_ = column_scaling(X)
        prior = self.strength * (margins - centre) / spread
        z = ((X - self.mean_) / self.scale_).astype(X.dtype)
        scale = np.sqrt(self.C)  # w = scale · v, so that v has a prior of variance 1

        def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
            b, v = parameters[0], parameters[1:]
            logit = b + prior + scale * (z @ v.astype(z.dtype))
            value = weights @ (np.logaddexp(0, logit) - codes * logit) + v @ v / 2
            slope = weights * (expit(logit) - codes)
            own = v + scale * (z.T @ slope.astype(z.dtype))
            return float(value), np.concatenate([[slope.sum()], own])

        options = {"maxiter": self.max_iter}
        start = np.zeros(1 + X.shape[1])
        found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x
        self.coef_ = scale * found[1:]
        self.margin_ = np.array([centre, spread, self.strength, found[0]])
        return self

    def _probability(self, X: np.ndarray) -> np.ndarray:
        centre, spread, strength, b = self.margin_
        prior = b + strength * (self.margins(X) - centre) / spread
        return np.asarray(expit(prior + ((X - self.mean_) / self.scale_) @ self.coef_))

    def _payload(self) -> dict[str, np.ndarray]:
        own = {"coef": self.coef_, "margin": self.margin_}
        return {**self._word_arrays(), **own, "mean": self.mean_, "scale": self.scale_}

    def _restore(self, payload: dict[str, np.ndarray] | str, n_features: int) -> None:
        self.check_parameters()
        columns: tuple[str, tuple[int, ...]] = ("float64", (n_features,))
        expected = {"coef": columns, "mean": columns, "scale": columns}
        arrays = self._restore_words(payload, n_features, {**expected, "margin": ("float64", (4,))})
        self.coef_, self.margin_ = arrays["coef"], arrays["margin"]
        self.mean_, self.scale_ = arrays["mean"], arrays["scale"]
