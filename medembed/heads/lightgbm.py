"""LightGBM's boosted trees, with defaults for dense embeddings."""

from typing import Any, ClassVar, Self

import lightgbm
import numpy as np
from sklearn.utils import check_random_state

from medembed.core.errors import ModelError, TrainingDataError
from medembed.heads.base import ClassWeight, Head, arrays_of, is_count, row_weights
from medembed.heads.lightgbm_text import check_booster_text, trim_booster_text
from medembed.heads.scaling import Projection, Projector

__all__ = ["BinnedRows", "LightGBMHead", "rank_columns"]


class LightGBMHead(Head):
    """Gradient-boosted trees (Ke et al., NeurIPS 2017).

    Early stopping uses only the validation rows that `fit` is given.

    Parameters
    ----------
    n_trees : int
        Maximum number of trees; exact if `fit` gets no validation rows.
    learning_rate, num_leaves, lambda_l2 : float, int, float
        LightGBM's parameters of these names.
    max_bin : int
        Bins per column. Few bins, a small share of the columns per tree and large leaves make trees
        on a thousand columns cheap; `bench/sweep.py` compares with LightGBM's defaults.
    feature_fraction : float in (0, 1] or None
        Share of columns that each tree may use; None: a twentieth, but at least 32 columns.
    min_data_in_leaf : int or None
        None: a fiftieth of the rows, between 5 and 100, so that 300 rows still make trees.
    patience : int or None
        Stop after this many trees without improvement; None ignores validation rows.
    stopping : "auroc" or "loss"
        The validation score that decides when to stop.
    pca : int
        Number of principal components of the standardised columns that the trees are trained on; 0:
        the columns unchanged.
    k_best : int or None
        Train on this many columns alone, those that each by itself tells the training labels apart
        best (see `rank_columns`), and on the covariates; None: on all. Trees find a few strong
        columns among many weak ones where a random share of the columns rarely holds them.
    n_covariates : int
        The last columns of X, which `pca` leaves out.
    class_weight : "balanced", dict or None
        scikit-learn's `class_weight`.
    random_state : int, RandomState or None
        Determines which columns a tree may use. Results do not depend on `n_jobs`.
    n_jobs : int
        Threads, at most 1,024; 0 or -1: one per core.

    Attributes
    ----------
    booster_ : lightgbm.Booster
        The trees in use, up to the best one.
    projection_ : Projection or None
        Applied to the columns first; None without `pca`.
    best_epoch_ : int
        The number of trees in use.
    """

    shares: ClassVar[str | None] = "bins"
    n_together: ClassVar[int | None] = None
    is_independent: ClassVar[bool] = True
    bin_params: ClassVar[tuple[str, ...]] = ("pca", "k_best", "max_bin")

    def __init__(
        self,
        n_trees: int = 300,
        *,
        learning_rate: float = 0.1,
        num_leaves: int = 31,
        lambda_l2: float = 1.0,
        max_bin: int = 31,
        feature_fraction: float | None = None,
        min_data_in_leaf: int | None = None,
        patience: int | None = 30,
        stopping: str = "auroc",
        pca: int = 0,
        k_best: int | None = None,
        n_covariates: int = 0,
        class_weight: ClassWeight = "balanced",
        random_state: Any = 0,
        n_jobs: int = 1,
    ) -> None:
        self.n_trees = n_trees
        self.learning_rate = learning_rate
        self.num_leaves = num_leaves
        self.lambda_l2 = lambda_l2
        self.max_bin = max_bin
        self.feature_fraction = feature_fraction
        self.min_data_in_leaf = min_data_in_leaf
        self.patience = patience
        self.stopping = stopping
        self.pca = pca
        self.k_best = k_best
        self.n_covariates = n_covariates
        self.class_weight = class_weight
        self.random_state = random_state
        self.n_jobs = n_jobs

    def find_bases(self) -> list[tuple[str, int]]:
        """Return the standard scaling if the trees are trained on components."""
        return [("standard", self.pca)] if self.pca else []

    def predict_logit(self, X: np.ndarray) -> np.ndarray:
        """Return the sum of the trees' leaves for each row, float64 (n,)."""
        columns = X if self.projection_ is None else self.projection_.apply(X, np.float64)
        raw = self.booster_.predict(columns, raw_score=True, num_threads=self.n_jobs)
        return np.asarray(raw, np.float64)

    def with_budget(self, n: int) -> Self:
        """Return an unfitted copy that trains exactly `n` trees."""
        return super().with_budget(n).set_params(n_trees=n, patience=None)  # type: ignore[no-any-return]

    def fit(self, X: Any, y: Any, *, X_val: Any = None, y_val: Any = None) -> Self:
        """Fit on X of shape (n, d), finite, and y of two classes.

        Parameters
        ----------
        X, y
            Training rows.
        X_val, y_val : optional
            Rows of other patients that decide when to stop; trees after the best are dropped.

        Raises
        ------
        TrainingDataError
            y, or y_val if given, does not hold both of two classes, or LightGBM refuses a
            parameter.
        """
        X, codes = self._check_training(X, y)
        validation = self._check_validation(X_val, y_val)
        self.check_parameters()
        held = None if validation is None else (validation[0], None, validation[1])
        projector = Projector(X, n_covariates=self.n_covariates)
        BinnedRows((X, None, codes), held, projector).fit(self)
        return self

    def check_parameters(self) -> None:
        """Raise TrainingDataError if a parameter that LightGBM does not check is out of range."""
        self._refuse_out_of_range(
            {
                "n_trees": is_count(self.n_trees, 1),
                "patience": self.patience is None or is_count(self.patience, 1),
                "stopping": self.stopping in ("auroc", "loss"),
                "pca": is_count(self.pca, 0),
                "k_best": self.k_best is None or is_count(self.k_best, 1),
                "n_jobs": is_count(self.n_jobs, -1) and self.n_jobs <= _MOST_THREADS,
            }
        )

    def take(self, booster: Any, projection: Projection | None) -> None:
        """Become fitted with a trained booster's trees and the projection before them."""
        # a trained booster holds its binned data set; one that was read holds trees only
        # (`model_to_string` ends at the best tree where training stopped early)
        self._take(trim_booster_text(booster.model_to_string()))
        self.projection_ = projection
        self.best_epoch_ = int(self.booster_.num_trees())

    def weigh(self, codes: np.ndarray) -> np.ndarray:
        """Return the weights of rows with labels `codes`, 0 and 1, float64 of the same shape."""
        return row_weights(codes, getattr(self, "classes_", np.array([0, 1])), self.class_weight)

    def parameters(self, n: int, d: int) -> dict[str, object]:
        """Return LightGBM's parameters for n rows of d columns."""
        fraction, least = self.feature_fraction, self.min_data_in_leaf
        if self.k_best is not None:
            d = min(d, self.k_best + self.n_covariates)
        return {
            "objective": "binary",
            "metric": "auc" if self.stopping == "auroc" else "binary_logloss",
            "learning_rate": self.learning_rate,
            "num_leaves": self.num_leaves,
            "lambda_l2": self.lambda_l2,
            "max_bin": self.max_bin,
            "feature_fraction": min(1.0, max(0.05, 32 / d)) if fraction is None else fraction,
            "bin_construct_sample_cnt": _BINNED_ROWS,
            "min_data_in_leaf": min(100, max(5, n // 50)) if least is None else least,
            "seed": int(check_random_state(self.random_state).randint(2**31 - 1)),
            "num_threads": self.n_jobs,
            # without a fixed layout LightGBM times both and uses the faster: not repeatable
            "deterministic": True,
            "force_col_wise": True,
            "feature_pre_filter": False,
            "enable_bundle": False,  # dense columns never are, and it takes long to find out
            "verbosity": -1,
        }

    def _take(self, text: str) -> None:
        self.booster_ = lightgbm.Booster(model_str=text)

    def _probability(self, X: np.ndarray) -> np.ndarray:
        columns = X if self.projection_ is None else self.projection_.apply(X, np.float64)
        return np.asarray(self.booster_.predict(columns, num_threads=self.n_jobs), np.float64)

    def _payload(self) -> dict[str, np.ndarray] | str:
        text = trim_booster_text(self.booster_.model_to_string())
        if self.projection_ is None:
            return text
        return {**self.projection_.as_arrays(), _TREES: np.frombuffer(text.encode(), np.uint8)}

    def _restore(self, payload: dict[str, np.ndarray] | str, n_features: int) -> None:
        self.check_parameters()
        self.projection_ = None
        if self.pca:
            payload, n_features = self._restore_projection(payload, n_features)
        if not isinstance(payload, str):
            raise ModelError("the model holds tensors; a lightgbm head is stored as text")
        check_booster_text(payload, n_features)
        self._take(payload)

    def _restore_projection(
        self, payload: dict[str, np.ndarray] | str, n_features: int
    ) -> tuple[str, int]:
        expected = Projection.expected_arrays(payload, n_features, self.pca, self.n_covariates)
        trees = payload.get(_TREES) if isinstance(payload, dict) else None
        expected[_TREES] = ("uint8", (0 if trees is None else trees.size,))
        arrays = arrays_of(payload, expected)
        self.projection_ = Projection.from_arrays(arrays, self.n_covariates)
        try:
            return arrays[_TREES].tobytes().decode("ascii"), self.projection_.n_columns
        except UnicodeDecodeError:
            raise ModelError("the trees are not in LightGBM's text format") from None


#: Rows that the bounds of bins are found from: all 29,000 take twice the time and make no better
#: trees.
_BINNED_ROWS = 5000

#: Columns that are ranked at a time, to bound the memory.
_RANKED_COLUMNS = 2048

#: Parts of a column between which the labels' variance is taken.
_N_PARTS = 8

#: Binned data sets that are kept: those with all columns, and those with the best.
_KEPT_BINS = 2

#: With more, which a stranger's model may ask for, OpenMP ends the process.
_MOST_THREADS = 1024

#: The name of the trees' text beside the arrays of a projection.
_TREES = "booster"

_Rows = tuple[np.ndarray, np.ndarray | None, np.ndarray]


def rank_columns(X: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return the variance of the labels that each column of X explains alone.

    A column is cut at its octiles, and its score is the variance between the means of the eight
    parts (the correlation ratio, times the rows), so that a column counts whose middle differs from
    its ends. Of more than 5,000 rows, as many at equal distances are read.

    Parameters
    ----------
    X : array of shape (n, d)
    codes : array of shape (n,)
        Labels, 0 or 1.

    Returns
    -------
    float64 array of shape (d,)
    """
    chosen = np.linspace(0, len(X) - 1, min(len(X), _BINNED_ROWS)).astype(int)
    deviations = (codes[chosen] - codes[chosen].mean()).astype(np.float64)
    scores = [
        _between_parts(X[chosen, start : start + _RANKED_COLUMNS], deviations)
        for start in range(0, X.shape[1], _RANKED_COLUMNS)
    ]
    return np.concatenate(scores)


def _between_parts(columns: np.ndarray, deviations: np.ndarray) -> np.ndarray:
    """Return the variance between the parts of each column; equal values are in one part."""
    n, d = columns.shape
    ordered = np.sort(columns, axis=0)
    above = [columns > ordered[n * part // _N_PARTS] for part in range(1, _N_PARTS)]
    counts = np.array([np.full(d, n), *(each.sum(axis=0) for each in above), np.zeros(d)])
    sums = np.array([np.zeros(d), *(deviations @ each for each in above), np.zeros(d)])
    parts, totals = -np.diff(counts, axis=0), -np.diff(sums, axis=0)
    return np.asarray((totals**2 / np.maximum(parts, 1)).sum(axis=0))


class BinnedRows:
    """Training and validation rows, binned once for all heads that bin alike.

    Parameters
    ----------
    rows, held : (X, indices, codes), held may be None
        A table, the indices of the rows in use (None: all) and their labels, 0 or 1.
    projector : Projector
        Learns projections from `rows`.
    """

    def __init__(self, rows: _Rows, held: _Rows | None, projector: Projector) -> None:
        self._rows, self._held, self._projector = rows, held, projector
        self._binned: dict[tuple[Any, ...], tuple[Projection | None, Any, Any]] = {}

    def fit(self, head: LightGBMHead) -> None:
        """Fit a head; TrainingDataError if LightGBM refuses a parameter."""
        try:
            booster, projection = self._train(head)
        except lightgbm.basic.LightGBMError as error:
            raise TrainingDataError(f"LightGBM refused this training: {error}") from error
        head.take(booster, projection)

    def _train(self, head: LightGBMHead) -> tuple[Any, Projection | None]:
        projection, data, held = self._bin(head)
        parameters = head.parameters(data.num_data(), data.num_feature())
        _set_weights(data, head.weigh(self._rows[2]))
        if held is None or self._held is None or head.patience is None:
            return lightgbm.train(parameters, data, head.n_trees), projection
        _set_weights(held, head.weigh(self._held[2]))
        stop = lightgbm.early_stopping(head.patience, verbose=False)
        booster = lightgbm.train(
            parameters, data, head.n_trees, valid_sets=[held], callbacks=[stop]
        )
        return booster, projection

    def _bin(self, head: LightGBMHead) -> tuple[Projection | None, Any, Any]:
        """Return binned data sets: those of an earlier head if this one bins the rows alike."""
        alike = (*(getattr(head, name) for name in head.bin_params), str(head.random_state))
        if alike not in self._binned:
            if len(self._binned) == _KEPT_BINS:
                del self._binned[next(iter(self._binned))]
            self._binned[alike] = self._construct(head)
        return self._binned[alike]

    def _construct(self, head: LightGBMHead) -> tuple[Projection | None, Any, Any]:
        projection = self._projector.learn("standard", head.pca) if head.pca else None
        X, codes = _columns(self._rows, projection), self._rows[2]
        parameters = head.parameters(*X.shape)
        left_out = _find_left_out(head, X, codes)
        X = self._blank(X, left_out)
        data = lightgbm.Dataset(X, codes, params=parameters).construct()
        held = None
        if self._held is not None:
            columns = self._blank(_columns(self._held, projection), left_out)
            held = data.create_valid(columns, self._held[2], params=parameters).construct()
        return projection, data, held

    def _blank(self, X: np.ndarray, left_out: np.ndarray | None) -> np.ndarray:
        """Return X with columns that LightGBM finds no split in, so that trees count them still."""
        if left_out is None:
            return X
        tables = [rows[0] for rows in (self._rows, self._held) if rows is not None]
        if any(X is table for table in tables):
            X = X.copy()
        X[:, left_out] = 0
        return X


def _find_left_out(head: LightGBMHead, X: np.ndarray, codes: np.ndarray) -> np.ndarray | None:
    """Return the columns that `k_best` leaves out; None if that is none."""
    n = X.shape[1] - head.n_covariates
    if head.k_best is None or head.k_best >= n:
        return None
    return np.argsort(-rank_columns(X[:, :n], codes), kind="stable")[head.k_best :]


def _set_weights(data: Any, weights: np.ndarray) -> None:
    # LightGBM's set_weight leaves older weights where the new ones are all 1
    data.set_field("weight", weights.astype(np.float32))


def _columns(rows: _Rows, projection: Projection | None) -> np.ndarray:
    X, index, _ = rows
    if projection is not None:
        return projection.apply(X, np.float32, index)
    return X if index is None else X[index]
