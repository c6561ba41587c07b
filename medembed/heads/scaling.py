"""The transformation of columns before a head: scaling, then principal components."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import linalg

from medembed.core.errors import ModelError, TrainingDataError

__all__ = ["SCALINGS", "Basis", "Projection", "Projector", "column_scaling"]

SCALINGS = ("standard", "global", "none")
"""`standard`: each column to mean 0 and deviation 1. `global`: each to mean 0, all divided by one
number, so that their mean variance is 1. `none`: as they are."""

#: Rows mapped at a time: 4096 x 1152 float64 are 38 MB, whatever the table's size.
_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Projection:
    """An affine map of columns, learnt from training rows.

    Attributes
    ----------
    mean, scale : float64 arrays of shape (d,)
        `mean` is subtracted from the columns, which are then divided by `scale`; zeros and ones
        without scaling.
    components : float32 array of shape (d - n_covariates, k), or None
        Multiplied with all scaled columns but the last `n_covariates`, which are kept.
    n_covariates : int
    """

    mean: np.ndarray
    scale: np.ndarray
    components: np.ndarray | None = None
    n_covariates: int = 0

    @property
    def n_columns(self) -> int:
        """The number of columns after the projection."""
        if self.components is None:
            return len(self.mean)
        return int(self.components.shape[1]) + self.n_covariates

    def blocks(
        self, X: np.ndarray, dtype: Any = np.float64, rows: np.ndarray | None = None
    ) -> Iterator[np.ndarray]:
        """Yield blocks of mapped rows of X (n, d), arrays (m, n_columns) of `dtype`.

        `rows` are the indices of rows to map, by default all: X itself is never copied. In float64
        a row's result depends on the rows of its block by no more than 1e-12.
        """
        mean, scale = self.mean.astype(dtype), self.scale.astype(dtype)
        components = None if self.components is None else self.components.astype(dtype)
        n = len(X) if rows is None else len(rows)
        for start in range(0, n, _BLOCK_ROWS):
            part = slice(start, start + _BLOCK_ROWS)
            block = X[part if rows is None else rows[part]]
            # float64 columns are centred before they are rounded
            block = block - (self.mean if block.dtype == np.float64 else mean)
            block = (block / scale).astype(dtype, copy=False)
            if components is not None:
                embedded = len(components)
                block = np.hstack([block[:, :embedded] @ components, block[:, embedded:]])
            yield block.astype(dtype, copy=False)

    def apply(
        self, X: np.ndarray, dtype: Any = np.float32, rows: np.ndarray | None = None
    ) -> np.ndarray:
        """Return all blocks in one array, (n, n_columns) of `dtype`."""
        mapped = np.empty((len(X) if rows is None else len(rows), self.n_columns), dtype)
        start = 0
        for block in self.blocks(X, dtype, rows):
            mapped[start : start + len(block)] = block
            start += len(block)
        return mapped

    def fold_into(self, weight: np.ndarray) -> "tuple[Projection, np.ndarray]":
        """Return this projection without its components, and the weight that makes up for them.

        `weight`, of shape (n_columns, any), is what the mapped columns are multiplied with.
        """
        if self.components is None:
            return self, weight
        k = self.components.shape[1]
        folded = np.vstack([self.components.astype(weight.dtype) @ weight[:k], weight[k:]])
        return replace(self, components=None), folded

    def as_arrays(self) -> dict[str, np.ndarray]:
        """Return the named arrays of a packaged head."""
        arrays = {"mean": self.mean, "scale": self.scale}
        return arrays if self.components is None else {**arrays, "components": self.components}

    @staticmethod
    def expected_arrays(
        payload: Any, n_features: int, pca: int, n_covariates: int
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the dtypes and shapes of `as_arrays`, for `arrays_of` to check.

        There are at most `pca` components: with few rows or columns, fewer.
        """
        if not 0 <= n_covariates < n_features:
            raise ModelError(
                f"n_covariates={n_covariates} is out of range for {n_features} columns"
            )
        columns: tuple[str, tuple[int, ...]] = ("float64", (n_features,))
        expected = {"mean": columns, "scale": columns}
        if pca:
            held = payload.get("components") if isinstance(payload, dict) else None
            n = min(pca, max(1, held.shape[1])) if held is not None and held.ndim == 2 else pca
            expected["components"] = ("float32", (n_features - n_covariates, n))
        return expected

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], n_covariates: int) -> "Projection":
        """Build a projection from the checked arrays of `as_arrays`."""
        return cls(arrays["mean"], arrays["scale"], arrays.get("components"), n_covariates)


@dataclass(frozen=True)
class Basis:
    """A scaling and the principal components of the scaled columns.

    Attributes
    ----------
    mean, scale : float64 arrays of shape (d,)
    vectors : float32 array of shape (d - n_covariates, k)
        Orthonormal, largest variance first; k may be 0.
    variances : float64 array of shape (k,)
    span : float32 array of shape (d - n_covariates, n), optional
        See `Projector.span`.
    """

    mean: np.ndarray
    scale: np.ndarray
    vectors: np.ndarray
    variances: np.ndarray
    span: np.ndarray | None = None


class Projector:
    """Learn projections from one set of rows; what they share is learnt once.

    Parameters
    ----------
    X : array of shape (n, d)
    rows : int array, optional
        The training rows of X; all by default.
    n_covariates : int
        The last columns of X, which components leave out.
    known : mapping of scaling to Basis, optional
        What an earlier projector of these rows learnt.
    """

    def __init__(
        self,
        X: np.ndarray,
        rows: np.ndarray | None = None,
        *,
        n_covariates: int = 0,
        known: Mapping[str, Basis] | None = None,
    ) -> None:
        if not 0 <= n_covariates < X.shape[1]:
            raise TrainingDataError(
                f"n_covariates={n_covariates} is out of range: X has {X.shape[1]} columns, and at "
                "least one is of an embedding"
            )
        self._X, self._rows, self._n_covariates = X, rows, n_covariates
        self.known = dict(known or {})

    def learn(self, scaling: str, pca: int = 0, *, whiten: bool = False) -> Projection:
        """Return the projection of one kind.

        Parameters
        ----------
        scaling : str
            One of `SCALINGS`.
        pca : int
            Number of principal components of the scaled columns, at most all; 0 for none. All are
            divided by one number, so that their mean variance is 1 and their proportions stay.
        whiten : bool
            Scale each component to variance 1 instead.
        """
        n_rows = len(self._X) if self._rows is None else len(self._rows)
        pca = min(pca, n_rows - 1, self._X.shape[1] - self._n_covariates)
        basis = self._basis(scaling, pca)
        if not pca:
            return Projection(basis.mean, basis.scale, None, self._n_covariates)
        kept = basis.variances[:pca]
        variances = kept if whiten else np.full(pca, np.mean(kept))
        # a component without variance carries no information; dividing by its rounding error would
        # blow it up
        least = np.finfo(np.float32).eps * basis.variances[0]
        scale = np.sqrt(np.maximum(variances, least)) if basis.variances[0] > 0 else np.ones(pca)
        components = np.ascontiguousarray(basis.vectors[:, :pca] / scale, np.float32)
        return Projection(basis.mean, basis.scale, components, self._n_covariates)

    def span(self, scaling: str) -> Projection:
        """Return a projection to as many columns as there are rows, if those are fewer.

        It turns the scaled columns, without the covariates, into an orthonormal basis of what the
        rows span, so that nothing of the rows is lost, and a weight learnt on them equals one of
        the scaled columns, see `Projection.fold_into`. The basis has a random orientation: like
        scaled columns, and unlike principal components, its columns have similar variances, for
        which AdamW's step sizes are meant. They are divided by one number: the mean variance is 1.
        """
        n_rows = len(self._X) if self._rows is None else len(self._rows)
        n_columns = self._X.shape[1] - self._n_covariates
        plain = self.learn(scaling)
        if n_rows >= n_columns:
            return plain
        basis = self._basis(scaling, 0)
        if basis.span is None:
            rows = plain.apply(self._X, np.float32, self._rows)[:, :n_columns]
            basis = self.known[scaling] = replace(basis, span=_orthonormal(rows))
        return replace(plain, components=basis.span)

    def _basis(self, scaling: str, pca: int) -> Basis:
        basis = self.known.get(scaling)
        if basis is None or len(basis.variances) < pca:
            basis = self.known[scaling] = self._fit(scaling, pca)
        return basis

    def _fit(self, scaling: str, pca: int) -> Basis:
        plain = Projection(*_scaling(self._X, self._rows, scaling))
        n = self._X.shape[1] - self._n_covariates
        if not pca:
            nothing = np.zeros((n, 0), np.float32)
            return Basis(plain.mean, plain.scale, nothing, np.zeros(0))
        # float32 products, float64 sums: the rows are scaled, and a block's rounding is far below
        # the noise of a covariance
        gram, total, n_rows = np.zeros((n, n)), np.zeros(n), 0
        centre = _moments(self._X, self._rows)[0] if scaling == "none" else plain.mean
        for block in Projection(centre, plain.scale).blocks(self._X, np.float32, self._rows):
            embedded = block[:, :n]
            gram += embedded.T @ embedded
            total += embedded.sum(axis=0, dtype=np.float64)
            n_rows += len(block)
        covariance = (gram - np.outer(total, total) / n_rows) / max(n_rows - 1, 1)
        variances, vectors = linalg.eigh(covariance, subset_by_index=[n - pca, n - 1])
        variances, vectors = np.maximum(variances[::-1], 0.0), vectors[:, ::-1]
        # a vector's sign is arbitrary: its largest entry is made positive, so that it repeats
        signs = np.sign(vectors[np.argmax(np.abs(vectors), axis=0), np.arange(pca)])
        return Basis(plain.mean, plain.scale, (vectors * signs).astype(np.float32), variances)


def _orthonormal(rows: np.ndarray) -> np.ndarray:
    """Return columns that span the rows (n, d), n < d, with n random directions: float32 (d, n).

    Overwrites the rows.
    """
    n, d = rows.shape
    # (in the memory of the rows, which may be gigabytes)
    basis = linalg.qr(rows.T, mode="economic", overwrite_a=True, check_finite=False)[0]
    turn = linalg.qr(np.random.default_rng(0).standard_normal((n, n), np.float32))[0]
    turned = basis @ turn
    turned *= np.float32(np.sqrt(n / d))
    return np.ascontiguousarray(turned, np.float32)


def _scaling(X: np.ndarray, rows: np.ndarray | None, scaling: str) -> tuple[np.ndarray, np.ndarray]:
    if scaling not in SCALINGS:
        raise TrainingDataError(
            f"scaling={scaling!r} is out of range; it is one of {', '.join(SCALINGS)}"
        )
    if scaling == "none":
        return np.zeros(X.shape[1]), np.ones(X.shape[1])
    mean, deviation = _moments(X, rows)
    if scaling == "global":
        deviation = np.full_like(deviation, np.sqrt(np.mean(np.square(deviation))))
    return mean, np.where(deviation > 0, deviation, 1.0)


def column_scaling(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each column's mean and standard deviation (float64; 1 for a constant column)."""
    return _scaling(X, None, "standard")


def _moments(X: np.ndarray, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return each column's mean and deviation, 0 where it is constant.

    Two passes over blocks of rows, so that no float64 copy of `X` is made.
    """
    n = len(X) if rows is None else len(rows)
    parts = [slice(start, start + _BLOCK_ROWS) for start in range(0, n, _BLOCK_ROWS)]
    wanted = parts if rows is None else [rows[part] for part in parts]
    mean, squares = np.zeros(X.shape[1]), np.zeros(X.shape[1])
    for part in wanted:
        mean += np.sum(X[part], axis=0, dtype=np.float64) / n
    for part in wanted:
        squares += np.square(X[part] - mean).sum(axis=0)
    deviation = np.sqrt(squares / n)
    # a constant column's deviation is rounding error, and dividing by it would make noise
    # (sums are in float64, whose own rounding shows in float64 columns: it grows with the rows)
    units = 10 + (n if X.dtype == np.float64 else 0)
    deviation[deviation <= units * np.finfo(X.dtype).eps * np.abs(mean)] = 0.0
    return mean, deviation
