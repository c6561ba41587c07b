"""Rows of a table, grouped into studies and read study by study.

A row is a view: [cell 1 | cell 2 | … | covariates], with n_cells cells of equal width.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from medembed.core.errors import TrainingDataError
from medembed.heads.base import ClassWeight, row_weights
from medembed.heads.scaling import Projection, Projector, column_scaling

__all__ = [
    "Batch",
    "LabelledStudies",
    "Studies",
    "Views",
    "cell_width",
    "learn_projections",
    "study_codes",
]

#: Vectors mapped at a time outside training: 4096 x 1152 float64 are 38 MB.
_BLOCK_VECTORS = 4096


class Views(NamedTuple):
    """The mapped views of m studies: r rows of n_cells vectors each, v in all, study by study.

    Attributes
    ----------
    rows : int array of shape (r,)
        Their indices in the table.
    counts : int array of shape (m,)
        Vectors of each study.
    cells : float array of shape (v, k)
    covariates : float array of shape (m, n_covariates)
        Means over each study's rows.
    """

    rows: np.ndarray
    counts: np.ndarray
    cells: np.ndarray
    covariates: np.ndarray

    @property
    def owners(self) -> np.ndarray:
        """Return the study, of the m, that each vector belongs to, int of shape (v,)."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def attend(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return each study's softmax of scores (v,), and its weighted mean cell: (v,), (m, k)."""
        starts = np.cumsum(self.counts) - self.counts
        top = np.maximum.reduceat(scores, starts)
        attention = np.exp(scores - np.repeat(top, self.counts))
        attention /= np.repeat(np.add.reduceat(attention, starts), self.counts)
        return attention, np.add.reduceat(attention[:, None] * self.cells, starts)


@dataclass(frozen=True)
class Studies:
    """Rows by study, mapped when they are read: the table is never copied.

    Attributes
    ----------
    X : float array of shape (n, n_cells * width + n_covariates)
    projection, covariates : Projection
        Maps of a cell's columns to k, and of the covariates.
    n_cells : int
    order : int array of shape (n,)
        All rows, study by study.
    starts, counts : int arrays of shape (number of studies,)
        The rows of study s are the `counts[s]` entries of `order` from `starts[s]` on.
    """

    X: np.ndarray
    projection: Projection
    covariates: Projection
    n_cells: int
    order: np.ndarray
    starts: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(
        cls,
        X: np.ndarray,
        codes: np.ndarray,
        projection: Projection,
        covariates: Projection,
        n_cells: int,
    ) -> Self:
        """Group the rows of X by their study codes (n,), which `study_codes` returns."""
        counts = np.bincount(codes)
        order, starts = np.argsort(codes, kind="stable"), np.cumsum(counts) - counts
        return cls(X, projection, covariates, n_cells, order, starts, counts)

    def take(self, chosen: np.ndarray, dtype: Any) -> Views:
        """Return the views of the studies whose numbers are `chosen` (m,), mapped in `dtype`."""
        counts = self.counts[chosen]
        starts = np.cumsum(counts) - counts
        places = np.repeat(self.starts[chosen] - starts, counts) + np.arange(counts.sum())
        rows = self.order[places]
        cells, covariates = self._map(self.X[rows], dtype)
        means = np.add.reduceat(covariates, starts) / counts[:, None].astype(dtype)
        return Views(rows, counts * self.n_cells, cells, means)

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the numbers of all studies in order, in blocks that are mapped at once."""
        block = self.starts // max(_BLOCK_VECTORS // self.n_cells, 1)
        yield from np.split(np.arange(len(block)), np.flatnonzero(np.diff(block)) + 1)

    def mapped(self) -> Self:
        """Return these studies mapped once, in float32, if components make them small."""
        if self.projection.components is None:
            return self
        k, n_covariates = self.projection.n_columns, self.covariates.n_columns
        X = np.empty((len(self.X), self.n_cells * k + n_covariates), np.float32)
        for start in range(0, len(X), _BLOCK_VECTORS):
            part = slice(start, start + _BLOCK_VECTORS)
            cells, covariates = self._map(self.X[part], np.float32)
            X[part] = np.hstack([cells.reshape(len(covariates), -1), covariates])
        as_is, as_are = (Projection(np.zeros(n), np.ones(n)) for n in (k, n_covariates))
        return replace(self, X=X, projection=as_is, covariates=as_are)

    def _map(self, X: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        width = len(self.projection.mean)
        embedded = width * self.n_cells
        cells = self.projection.apply(X[:, :embedded].reshape(-1, width), dtype)
        return cells, self.covariates.apply(X[:, embedded:], dtype)


class Batch(NamedTuple):
    """The data of a training step: m studies with v vectors.

    Attributes
    ----------
    cells : float32 tensor of shape (v, k)
    owners : int64 tensor of shape (v,)
        Which of the m studies a vector belongs to.
    covariates : float32 tensor of shape (m, n_covariates)
    targets, weights : float32 tensors of shape (m,)
    """

    cells: torch.Tensor
    owners: torch.Tensor
    covariates: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class LabelledStudies:
    """Studies with their labels, 0 or 1, and their weights in the loss; both float32."""

    studies: Studies
    targets: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(
        cls,
        studies: Studies,
        codes: np.ndarray,
        classes: np.ndarray,
        class_weight: ClassWeight,
        kind: str,
    ) -> Self:
        """Label studies, and map them once if that pays.

        Parameters
        ----------
        codes : int array of shape (n,)
            The rows' labels, 0 or 1; a study's label is the largest of its rows'.
        classes, class_weight
            Passed to `row_weights`.
        kind : str
            What the studies are for, which errors name.

        Raises
        ------
        TrainingDataError
            The studies are of one class.
        """
        labels = np.maximum.reduceat(codes[studies.order], studies.starts)
        if labels.min() == labels.max():
            raise TrainingDataError(
                f"the {len(labels)} {kind} studies hold one class, {classes[labels[0]]}; "
                "a head needs studies of both"
            )
        weights = row_weights(labels, classes, class_weight)
        return cls(studies.mapped(), labels.astype(np.float32), weights.astype(np.float32))

    def take(self, chosen: np.ndarray) -> Batch:
        """Return the studies whose numbers are `chosen` (m,)."""
        views = self.studies.take(chosen, np.float32)
        labels = self.targets[chosen], self.weights[chosen]
        arrays = (views.cells, views.owners, views.covariates, *labels)
        return Batch(*(torch.from_numpy(array) for array in arrays))


def cell_width(n_columns: int, n_cells: int, n_covariates: int) -> int:
    """Return the columns of each cell; TrainingDataError if `n_columns` does not divide evenly."""
    embedded = n_columns - n_covariates
    if embedded < n_cells or embedded % n_cells:
        raise TrainingDataError(
            f"X has {n_columns} columns, {embedded} of them beside n_covariates={n_covariates}; "
            f"those are not n_cells={n_cells} cells of equal width"
        )
    return embedded // n_cells


def learn_projections(
    X: np.ndarray, n_cells: int, n_covariates: int, scaling: str, pca: int, *, whiten: bool
) -> tuple[Projection, Projection]:
    """Return one projection for all cells and one that standardises the covariates.

    `scaling`, `pca` and `whiten` are those of `Projector.learn`.

    Raises
    ------
    TrainingDataError
        X (n, d) cannot be divided into the cells, or `scaling` is unknown.
    """
    width = cell_width(X.shape[1], n_cells, n_covariates)
    embedded = X[:, : width * n_cells]
    if n_cells > 1 and not embedded.flags.c_contiguous:
        # cells are not rows of a view of X, so the projection is learnt from a float32 copy
        embedded = embedded.astype(np.float32, order="C")
    projector = Projector(embedded.reshape(-1, width))
    covariates = Projection(*column_scaling(X[:, width * n_cells :]))
    return projector.learn(scaling, pca, whiten=whiten), covariates


def study_codes(studies: Any, n_rows: int, *, by_name: bool = True) -> np.ndarray:
    """Return the number of each row's study, from 0 on without gaps; int of shape (n_rows,).

    Parameters
    ----------
    studies : int or str array-like of shape (n_rows,), or None
        The study of each row; None makes a study of every row.
    by_name : bool
        Number studies in the order of their names; otherwise in the order of their first rows,
        which does not depend on the names.

    Raises
    ------
    TrainingDataError
        `studies` has the wrong shape, or names that are neither whole numbers nor text.
    """
    if studies is None:
        return np.arange(n_rows)
    names = np.asarray(studies)
    if names.shape != (n_rows,):
        raise TrainingDataError(
            f"studies have the shape {names.shape}, X has {n_rows} rows; name one study per row"
        )
    # a missing name is a float or None, and rows without a name do not form a study
    if names.dtype.kind not in "iuU" and not all(isinstance(name, str) for name in names):
        raise TrainingDataError(
            f"studies are {names.dtype}; name them by whole numbers or text, none missing"
        )
    _, first, codes = np.unique(names, return_index=True, return_inverse=True)
    return codes if by_name else np.argsort(np.argsort(first))[codes]
