"""k nearest neighbours: what the training images nearest to an image were labelled."""

import hashlib
from typing import Any, ClassVar, Self

import numpy as np

from medembed.core.errors import ModelError, TrainingDataError
from medembed.core.nearest import METRICS, find_neighbours
from medembed.heads.base import Head, arrays_of, is_count
from medembed.heads.model_files import MAX_TENSOR_BYTES
from medembed.heads.scaling import Projection, Projector

__all__ = ["WEIGHTS", "KNNHead"]

WEIGHTS = ("distance", "uniform")


class KNNHead(Head):
    """k nearest neighbours on whitened principal components, found exactly.

    The share of abnormal images among the nearest, each weighted by the inverse of its distance, is
    scikit-learn's `KNeighborsClassifier`. Half an image of either class is added to it, so that no
    probability is 0 or 1; this changes neither the order of images nor any decision at one half.

    A packaged model holds the training images' vectors: `whiten` components of each, or with
    `whiten=0` the whole standardised embedding, from which much about an image can be recovered.

    Parameters
    ----------
    n_neighbors : int
        Number of nearest training images that vote, or all if there are fewer.
    metric : {"cosine", "euclidean"}
        Distance between vectors.
    weights : {"distance", "uniform"}
        Whether nearer images count more, in inverse proportion to their distance. Images at
        distance 0 then outvote all others.
    whiten : int
        Number of principal components of the standardised columns that distances are measured in,
        each scaled to variance 1; 0: all standardised columns.
    n_covariates : int
        The last columns of X, which `whiten` leaves out.

    Attributes
    ----------
    vectors_ : float32 array of shape (n, k)
        The training rows as `projection_` maps them, in an order that only they decide.
    labels_ : uint8 array of shape (n,)
        0 or 1.
    projection_ : Projection
    best_epoch_ : None
    """

    keeps_rows: ClassVar[bool] = True

    def __init__(
        self,
        n_neighbors: int = 50,
        *,
        metric: str = "cosine",
        weights: str = "distance",
        whiten: int = 32,
        n_covariates: int = 0,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.metric = metric
        self.weights = weights
        self.whiten = whiten
        self.n_covariates = n_covariates

    def fit(self, X: Any, y: Any, *, X_val: Any = None, y_val: Any = None) -> Self:
        """Keep X of shape (n, d), finite, and y of two classes.

        Validation rows are checked but not used: there is nothing to stop early.

        Raises
        ------
        TrainingDataError
            y, or y_val if given, does not hold both of two classes, or the vectors are more than a
            packaged model may hold.
        """
        X, codes = self._check_training(X, y)
        self._check_validation(X_val, y_val)
        self.check_parameters()
        projector = Projector(X, n_covariates=self.n_covariates)
        self.projection_ = projector.learn("standard", self.whiten, whiten=True)
        _refuse_many(len(X), self.projection_.n_columns)
        vectors, labels = self._map(X), codes.astype(np.uint8)
        order = _order(vectors, labels)
        self.vectors_, self.labels_ = vectors[order], labels[order]
        self.best_epoch_ = None
        return self

    def check_parameters(self) -> None:
        """Raise TrainingDataError if a parameter is out of range."""
        self._refuse_out_of_range(
            {
                "n_neighbors": is_count(self.n_neighbors, 1),
                "metric": self.metric in METRICS,
                "weights": self.weights in WEIGHTS,
                "whiten": is_count(self.whiten, 0),
            }
        )

    def _probability(self, X: np.ndarray) -> np.ndarray:
        k = min(self.n_neighbors, len(self.vectors_))
        found = find_neighbours(self._map(X), self.vectors_, k, metric=self.metric)
        weights = _weigh(found.distance) if self.weights == "distance" else np.ones((len(X), k))
        share = (weights * self.labels_[found.rows]).sum(axis=1) / weights.sum(axis=1)
        return np.asarray((k * share + 0.5) / (k + 1))

    def _map(self, X: np.ndarray) -> np.ndarray:
        """Return projected rows, float32: computed in float64, so that equal rows stay equal."""
        mapped = np.empty((len(X), self.projection_.n_columns), np.float32)
        start = 0
        for block in self.projection_.blocks(X):
            mapped[start : start + len(block)] = block
            start += len(block)
        return mapped

    def _payload(self) -> dict[str, np.ndarray]:
        vectors = {"vectors": self.vectors_, "labels": self.labels_}
        return {**self.projection_.as_arrays(), **vectors}

    def _restore(self, payload: dict[str, np.ndarray] | str, n_features: int) -> None:
        self.check_parameters()
        expected = Projection.expected_arrays(payload, n_features, self.whiten, self.n_covariates)
        n_columns = expected["components"][1][1] + self.n_covariates if self.whiten else n_features
        held = payload.get("labels") if isinstance(payload, dict) else None
        n = 1 if held is None else max(1, held.size)
        expected |= {"vectors": ("float32", (n, n_columns)), "labels": ("uint8", (n,))}
        arrays = arrays_of(payload, expected)
        if (arrays["labels"] > 1).any():
            raise ModelError("tensor labels holds values other than 0 and 1")
        self.projection_ = Projection.from_arrays(arrays, self.n_covariates)
        self.vectors_, self.labels_ = arrays["vectors"], arrays["labels"]


def _weigh(distance: np.ndarray) -> np.ndarray:
    """Return inverse distances; where some are 0, one for these and zero for all others."""
    is_same = distance == 0
    with np.errstate(divide="ignore"):
        inverse = 1 / distance
    return np.where(is_same.any(axis=1, keepdims=True), is_same, inverse)


def _order(vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return an order of rows that is the same however they came, and tells nothing of patients."""
    codes = [
        hashlib.blake2b(vector.tobytes() + bytes([label]), digest_size=16).digest()
        for vector, label in zip(vectors, labels.tolist(), strict=True)
    ]
    return np.argsort(np.array(codes, "S16"), kind="stable")


def _refuse_many(n: int, n_columns: int) -> None:
    n_bytes = n * n_columns * 4
    if n_bytes > MAX_TENSOR_BYTES * 15 // 16:
        raise TrainingDataError(
            f"{n:,} training vectors of {n_columns:,} numbers are {n_bytes / 1e9:.1f} GB, more "
            "than a packaged model may hold; set whiten, such as to 64"
        )
