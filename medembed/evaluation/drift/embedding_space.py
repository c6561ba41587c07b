"""A few directions in which embeddings vary, and the distance between clouds of points there."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from medembed.core.errors import ModelError

__all__ = ["N_DIRECTIONS", "Space", "frechet", "learn_space"]

N_DIRECTIONS = 16
#: So many rows are wanted for each direction.
_ROWS_PER_DIRECTION = 4
_N_ITERATIONS = 4
_BLOCK_ROWS = 4_096
_TINY = 1e-12


@dataclass(frozen=True)
class Space:
    """Principal directions, each of unit variance, and how far a row lies from all of them.

    Attributes
    ----------
    centre, scale : float32 arrays of shape (d,)
        The columns are standardised by them; scale is above zero.
    directions : float32 array of shape (k, d)
        Orthonormal before they were divided by their standard deviations.
    spreads : float array of shape (k,)
        These standard deviations.
    rest : float array of shape (2,)
        Mean and standard deviation of the log of the squared distance from the directions; empty
        where they span all columns and there is no rest.
    """

    centre: np.ndarray
    scale: np.ndarray
    directions: np.ndarray
    spreads: np.ndarray
    rest: np.ndarray

    def project(self, X: np.ndarray) -> np.ndarray:
        """Return rows (n, d) as float64 points (n, k), or (n, k + 1) where there is a rest."""
        starts = range(0, max(len(X), 1), _BLOCK_ROWS)
        return np.concatenate([self._project(X[start : start + _BLOCK_ROWS]) for start in starts])

    def as_arrays(self) -> dict[str, np.ndarray]:
        """Return what `from_arrays` reads."""
        return {f"space_{name}": getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Space":
        """Read what `as_arrays` gave.

        Raises
        ------
        ModelError
            An array is missing, the shapes do not fit, or what is divided by is not above zero.
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
    """Find the directions in which rows vary most.

    Randomised subspace iteration (Halko, Martinsson and Tropp, SIAM Review 53, 2011).

    Parameters
    ----------
    X : float array of shape (n, d)
        Rows, one per patient; fewer directions are taken where there are fewer than 4 k.
    others : float array of shape (m, d)
        Rows of other patients, for the distance from the directions: of X's own it is too small.
    generator : numpy Generator
    k : int
        Directions wanted.
    """
    k = max(1, min(k, len(X) // _ROWS_PER_DIRECTION, X.shape[1]))
    centre = X.mean(axis=0, dtype=np.float64)
    scale = X.std(axis=0, dtype=np.float64)
    # a constant column is left as it is: it says nothing, until it moves
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
