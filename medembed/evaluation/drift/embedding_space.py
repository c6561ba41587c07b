"""Distances in embedding space: between clouds of points, and of single rows from training.

Calibration, thresholds and prediction sets hold for patients like those of training. A row's
distance is compared with the distances of training patients, one row each. Distances are
Mahalanobis's, with the covariance of *other* training patients, shrunken (Ledoit and Wolf, A
well-conditioned estimator for large-dimensional covariance matrices, Journal of Multivariate
Analysis 88, 2004) and reduced to its leading directions (Tipping and Bishop, Probabilistic
principal component analysis, Journal of the Royal Statistical Society B 61, 1999). For a new
patient from the training distribution, the rank of the distance is therefore uniform, and the
p-value exact apart from rounding up.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from medembed.core.errors import ModelError, TrainingDataError

__all__ = [
    "FAR",
    "N_DIRECTIONS",
    "Remoteness",
    "Space",
    "fit_remoteness",
    "frechet",
    "learn_space",
    "measure_remoteness",
]

N_DIRECTIONS = 16
#: Minimum number of rows for each direction.
_ROWS_PER_DIRECTION = 4
_N_ITERATIONS = 4
_BLOCK_ROWS = 4_096
_TINY = 1e-12


@dataclass(frozen=True)
class Space:
    """Principal directions, scaled to unit variance, and the spread of the distance from them.

    Attributes
    ----------
    centre, scale : float32 arrays of shape (d,)
        Used to standardise the columns; scale is above zero.
    directions : float32 array of shape (k, d)
        Orthonormal vectors divided by their standard deviations.
    spreads : float array of shape (k,)
        These standard deviations.
    rest : float array of shape (2,)
        Mean and standard deviation of the log of the squared distance from the directions; empty
        if the directions span all columns.
    """

    centre: np.ndarray
    scale: np.ndarray
    directions: np.ndarray
    spreads: np.ndarray
    rest: np.ndarray

    def project(self, X: np.ndarray) -> np.ndarray:
        """Return rows (n, d) as float64 points (n, k), or (n, k + 1) if there is a rest."""
        starts = range(0, max(len(X), 1), _BLOCK_ROWS)
        return np.concatenate([self._project(X[start : start + _BLOCK_ROWS]) for start in starts])

    def as_arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays that `from_arrays` reads."""
        return {f"space_{name}": getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Space":
        """Return the space that `as_arrays` described.

        Raises
        ------
        ModelError
            An array is missing, the shapes do not fit, or a divisor is not above zero.
        """
        names = {name: f"space_{name}" for name in cls.__dataclass_fields__}
        missing = next((name for name in names.values() if name not in arrays), None)
        if missing is not None:
            raise ModelError(f"the model's reference lacks {missing}; train the model again")
        space = cls(**{name: arrays[own] for name, own in names.items()})
        k, d = space.directions.shape if space.directions.ndim == 2 else (-1, -1)
        shapes = {"centre": (d,), "scale": (d,), "spreads": (k,), "rest": (space.rest.size and 2,)}
        for name, shape in shapes.items():
            if getattr(space, name).shape != shape:
                raise ModelError(
                    f"the model's reference has {name} of shape {getattr(space, name).shape}, "
                    f"not {shape}; train the model again"
                )
        divisors = {"scale": space.scale, "spreads": space.spreads, "rest": space.rest[1:]}
        for name, values in divisors.items():
            if not (values > 0).all():
                raise ModelError(
                    f"the model's reference has {name} not above zero; train the model again"
                )
        return space

    def _project(self, X: np.ndarray) -> np.ndarray:
        Z = (X - self.centre) / self.scale
        along = (Z @ self.directions.T).astype(np.float64)
        points = along / self.spreads
        if not len(self.rest):
            return np.asarray(points)
        mean, spread = self.rest
        return np.column_stack([points, (_log_rest(Z, along) - mean) / spread])


def learn_space(
    X: np.ndarray, others: np.ndarray, generator: np.random.Generator, k: int = N_DIRECTIONS
) -> Space:
    """Return the directions in which rows vary most.

    Randomised subspace iteration (Halko, Martinsson and Tropp, SIAM Review 53, 2011).

    Parameters
    ----------
    X : float array of shape (n, d)
        Rows, one per patient; fewer directions are used if there are fewer than 4 k rows.
    others : float array of shape (m, d)
        Rows of other patients, for the distance from the directions, which is too small for X.
    generator : numpy Generator
    k : int
        Number of directions.
    """
    k = max(1, min(k, len(X) // _ROWS_PER_DIRECTION, X.shape[1]))
    centre = X.mean(axis=0, dtype=np.float64)
    scale = X.std(axis=0, dtype=np.float64)
    # a constant column is left unscaled: it carries no information until it changes
    scale[scale <= _TINY] = 1.0
    centre, scale = centre.astype(np.float32), scale.astype(np.float32)
    Z = ((X - centre) / scale).astype(np.float64)
    n_tried = min(k + 8, *Z.shape)
    basis = np.linalg.qr(Z.T @ generator.normal(size=(len(Z), n_tried)))[0]
    for _ in range(_N_ITERATIONS):
        basis = np.linalg.qr(Z.T @ (Z @ basis))[0]
    _, values, turned = np.linalg.svd(Z @ basis, full_matrices=False)
    directions = (turned[:k] @ basis.T).astype(np.float32)
    spreads = np.maximum(values[:k] / np.sqrt(max(len(Z) - 1, 1)), _TINY)
    space = Space(centre, scale, directions, spreads, np.zeros(0))
    if len(directions) == X.shape[1]:
        return space
    Z = (others - centre) / scale
    rest = _log_rest(Z, (Z @ directions.T).astype(np.float64))
    found = np.array([rest.mean(), max(rest.std(), _TINY)])
    return Space(centre, scale, directions, spreads, found)


def frechet(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> np.ndarray:
    """Return the squared Fréchet (2-Wasserstein) distance between normal distributions.

    ``|a - b|² + tr(A + B - 2 (A^½ B A^½)^½)`` (Dowson and Landau, Journal of Multivariate Analysis
    12, 1982); means (…, k) and covariances (…, k, k) of any number of pairs at once.
    """
    values, vectors = np.linalg.eigh(covariance_a)
    half = vectors * np.sqrt(np.maximum(values, 0.0))[..., None, :]
    # A^½ = V L^½ Vᵀ; turned by V, which changes no eigenvalue
    middle = np.swapaxes(half, -1, -2) @ covariance_b @ half
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(middle), 0.0)).sum(axis=-1)
    traces = np.trace(covariance_a, axis1=-2, axis2=-1) + np.trace(covariance_b, axis1=-2, axis2=-1)
    moved = ((mean_a - mean_b) ** 2).sum(axis=-1)
    return np.asarray(np.maximum(moved + traces - 2 * shared, 0.0))


def _log_rest(Z: np.ndarray, along: np.ndarray) -> np.ndarray:
    """Return the log of the squared distance of rows from the directions."""
    squared = np.einsum("nd,nd->n", Z, Z, dtype=np.float64) - (along**2).sum(axis=1)
    return np.asarray(np.log(np.maximum(squared, _TINY * Z.shape[1])))


FAR = 0.02
"""Rows with a p-value up to this are called far; with fewer than 50 training patients, rows that
lie further out than all of them."""
N_AXES = 64
"""More add little: for real films compared with a model of drawings, 64 detect as many as all."""
_MAX_ROWS = 1_000
_TINY_VARIANCE = 1e-9


@dataclass(frozen=True, eq=False)
class Remoteness:
    """How far n rows lie from training.

    Attributes
    ----------
    distance : float64 (n,)
        1 is the edge of the range that holds 95 % of training patients.
    p : float64 (n,)
        The share of training patients at least as far, counting the row itself; rounding makes it
        too large by at most 0.01, and never too small.
    far : bool (n,)
        Whether `p` is at most `FAR`.
    n_training : int
        Number of training patients compared with.
    """

    distance: np.ndarray
    p: np.ndarray
    far: np.ndarray
    n_training: int


def fit_remoteness(space: Space, X: np.ndarray, others: np.ndarray) -> dict[str, np.ndarray]:
    """Return the covariance of training embeddings, and the distances of other patients in it.

    Parameters
    ----------
    space : Space
        Supplies the centre and scale that standardise the columns.
    X : float array of shape (m, d)
        One row per patient, for the covariance.
    others : float array of shape (n, d)
        One row of each other patient, for the distances.

    Returns
    -------
    dict of str to ndarray
        ``remote_directions`` (k, d) float32, ``remote_variances`` (k + 1,), the last for all other
        directions, and ``remote_quantiles`` (101,) of the distances.
    """
    from sklearn.covariance import ledoit_wolf_shrinkage  # not earlier: predicting fits nothing

    Z = _standardised(space, X[:_MAX_ROWS])
    shrinkage = float(ledoit_wolf_shrinkage(Z, assume_centered=True))
    _, values, turned = np.linalg.svd(Z, full_matrices=False)
    found = values**2 / len(Z)
    total = float((Z**2).sum()) / len(Z)
    d, k = Z.shape[1], min(N_AXES, len(found), max(Z.shape[1] - 1, 1))
    aim = max(total / d, _TINY_VARIANCE)
    rest = (1 - shrinkage) * (total - found[:k].sum()) / max(d - k, 1) + shrinkage * aim
    variances = np.append(
        (1 - shrinkage) * found[:k] + shrinkage * aim, max(rest, _TINY_VARIANCE * aim)
    )
    shape = turned[:k].astype(np.float32), np.maximum(variances, _TINY_VARIANCE * aim)
    distances = _distances(space, *shape, others)
    return {
        "remote_directions": shape[0],
        "remote_variances": shape[1],
        "remote_quantiles": np.quantile(distances, np.linspace(0, 1, 101)),
    }


def measure_remoteness(reference: Mapping[str, np.ndarray], X: np.ndarray) -> Remoteness | None:
    """Return how far each row lies from the training patients behind a reference.

    A conformal p-value (Laxhammar and Falkman, Annals of Mathematics and Artificial Intelligence
    74, 2015), from the stored percentiles of the distances.

    Parameters
    ----------
    reference : mapping
        From `drift.fit_reference`; older references have distances only in the space of `drift`,
        which detect less.
    X : float array of shape (n, d)
        Embeddings with the columns of the reference.

    Returns
    -------
    Remoteness or None
        None if there were too few training patients.

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
    # the highest stored quantile below the distance gives the number of patients below it
    below = np.searchsorted(kept, found, side="left") - 1
    n_below = np.where(below < 0, 0, below * (n - 1) // (len(kept) - 1) + 1)
    p = (1 + n - n_below) / (1 + n)
    return Remoteness(found / max(kept[95], _TINY_VARIANCE), p, p <= max(FAR, 1 / (1 + n)), n)


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
    """Return the percentiles of n patients' distances."""
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
