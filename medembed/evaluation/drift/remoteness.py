"""How far single rows lie from the training patients, before anything they are called is believed.

Calibration, thresholds and prediction sets hold for patients like those of training. A row is held
against the distances that training patients have, one row of each. Distances are Mahalanobis's,
with a covariance of *other* training patients, shrunken (Ledoit and Wolf, A well-conditioned
estimator for large-dimensional covariance matrices, Journal of Multivariate Analysis 88, 2004) and
kept in its first directions (Tipping and Bishop, Probabilistic principal component analysis,
Journal of the Royal Statistical Society B 61, 1999). So of a new patient of the same kind the rank
of its distance is uniform, and its p-value exact but for rounding up.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from sklearn.covariance import ledoit_wolf_shrinkage

from medembed.core.errors import ModelError, TrainingDataError
from medembed.evaluation.drift.embedding_space import Space

__all__ = ["FAR", "Remoteness", "fit_remoteness", "measure_remoteness"]

FAR = 0.02
"""Rows of a p-value up to this are called far; with fewer than 50 training patients, those that lie
further out than all of them."""
N_DIRECTIONS = 64
"""More add little: on real films, held against a model of drawings, 64 find as many as all."""
_MAX_ROWS = 1_000
_TINY = 1e-9


@dataclass(frozen=True, eq=False)
class Remoteness:
    """How far n rows lie from training.

    Attributes
    ----------
    distance : float64 (n,)
        1 is the edge of the range that holds 95 % of training patients.
    p : float64 (n,)
        The share of training patients that lie as far, the row counted as one of them; at most that
        much too large, and never too small, by one in a hundred.
    far : bool (n,)
        Whether that is `FAR` at most.
    n_training : int
        Patients behind it.
    """

    distance: np.ndarray
    p: np.ndarray
    far: np.ndarray
    n_training: int


def fit_remoteness(space: Space, X: np.ndarray, others: np.ndarray) -> dict[str, np.ndarray]:
    """Learn the shape of training embeddings, and how far other patients lie in it.

    Parameters
    ----------
    space : Space
        Its centre and scale standardise the columns.
    X : float array of shape (m, d)
        One row per patient, for the covariance.
    others : float array of shape (n, d)
        One row of each other patient, for the distances.

    Returns
    -------
    dict of str to ndarray
        ``remote_directions`` (k, d) float32, ``remote_variances`` (k + 1,), the last that of all
        else, and ``remote_quantiles`` (101,) of the distances.
    """
    Z = _standardised(space, X[:_MAX_ROWS])
    shrinkage = float(ledoit_wolf_shrinkage(Z, assume_centered=True))
    _, values, turned = np.linalg.svd(Z, full_matrices=False)
    found = values**2 / len(Z)
    total = float((Z**2).sum()) / len(Z)
    d, k = Z.shape[1], min(N_DIRECTIONS, len(found), max(Z.shape[1] - 1, 1))
    aim = max(total / d, _TINY)
    rest = (1 - shrinkage) * (total - found[:k].sum()) / max(d - k, 1) + shrinkage * aim
    variances = np.append((1 - shrinkage) * found[:k] + shrinkage * aim, max(rest, _TINY * aim))
    shape = turned[:k].astype(np.float32), np.maximum(variances, _TINY * aim)
    distances = _distances(space, *shape, others)
    return {
        "remote_directions": shape[0],
        "remote_variances": shape[1],
        "remote_quantiles": np.quantile(distances, np.linspace(0, 1, 101)),
    }


def measure_remoteness(reference: Mapping[str, np.ndarray], X: np.ndarray) -> Remoteness | None:
    """Compare rows, each by itself, with the training patients behind a reference.

    A conformal p-value (Laxhammar and Falkman, Annals of Mathematics and Artificial Intelligence
    74, 2015), from the hundredths of the distances that are kept.

    Parameters
    ----------
    reference : mapping
        From `drift.fit_reference`; those of before have distances in the space of `drift` alone,
        which see less.
    X : float array of shape (n, d)
        Embeddings of the same kind.

    Returns
    -------
    Remoteness or None
        None where there were too few training patients to measure anything.

    Raises
    ------
    ModelError
        The reference is damaged, or of embeddings with another number of columns.
    TrainingDataError
        An embedding is not finite.
    """
    if "range" not in reference:
        return None
    space = Space.from_arrays(reference)
    n = int(reference["range"][2]) if reference["range"].shape == (3,) else 0
    if X.ndim != 2 or X.shape[1] != len(space.centre):
        raise ModelError(
            f"the model's reference is of {len(space.centre)} columns, these embeddings have "
            f"{X.shape[-1]}; use the poolings that the model reads"
        )
    if not np.isfinite(X).all():
        raise TrainingDataError("an embedding is not finite; how far it lies cannot be measured")
    kept = _read_quantiles(reference, n)
    if "remote_directions" in reference:
        found = _distances(space, *_read_shape(reference, len(space.centre)), X)
    else:
        found = np.linalg.norm(space.project(X), axis=1)
    # of the kept quantiles below the distance, the highest says how many patients are below it
    below = np.searchsorted(kept, found, side="left") - 1
    n_below = np.where(below < 0, 0, below * (n - 1) // (len(kept) - 1) + 1)
    p = (1 + n - n_below) / (1 + n)
    return Remoteness(found / max(kept[95], _TINY), p, p <= max(FAR, 1 / (1 + n)), n)


def _standardised(space: Space, X: np.ndarray) -> np.ndarray:
    return np.asarray((X - space.centre) / space.scale, np.float64)


def _distances(
    space: Space, directions: np.ndarray, variances: np.ndarray, X: np.ndarray
) -> np.ndarray:
    """Return the Mahalanobis distance of each row (n, d) from the centre, float64 (n,)."""
    squares = np.empty(len(X))
    for start in range(0, len(X), _MAX_ROWS):
        Z = _standardised(space, X[start : start + _MAX_ROWS])
        along = (Z @ directions.T.astype(np.float64)) ** 2
        rest = np.maximum((Z**2).sum(axis=1) - along.sum(axis=1), 0.0)
        found = (along / variances[:-1]).sum(axis=1) + rest / variances[-1]
        squares[start : start + _MAX_ROWS] = found
    return np.sqrt(squares)


def _read_quantiles(reference: Mapping[str, np.ndarray], n: int) -> np.ndarray:
    """Return the hundredths of n patients' distances."""
    name = "remote_quantiles" if "remote_directions" in reference else "quantiles"
    kept = reference.get(name, np.zeros(0))
    if n < 2 or kept.shape != (101,) or (np.diff(kept) < 0).any() or kept[0] < 0:
        raise _damaged(f"range or {name}")
    return kept


def _read_shape(reference: Mapping[str, np.ndarray], d: int) -> tuple[np.ndarray, np.ndarray]:
    directions = reference["remote_directions"]
    variances = reference.get("remote_variances", np.zeros(0))
    k = len(directions) if directions.ndim == 2 else -1
    if k < 1 or directions.shape != (k, d) or variances.shape != (k + 1,):
        raise _damaged("remote_directions or remote_variances")
    if not (variances > 0).all():
        raise _damaged("remote_variances")
    return directions, variances


def _damaged(what: str) -> ModelError:
    return ModelError(f"the model's reference is damaged in {what}; copy or train the model again")
