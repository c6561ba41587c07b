"""Embeddings in two dimensions, to be looked at: principal components, or t-SNE."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from medembed.core.errors import TrainingDataError
from medembed.core.system import require_libraries

__all__ = ["METHODS", "Projected", "project"]

METHODS = ("pca", "tsne")
_BLOCK_ROWS = 4096
#: t-SNE reads this many principal components: more are mostly noise, and take longer.
_COMPONENTS = 50
_PERPLEXITY = 30.0


@dataclass(frozen=True, eq=False)
class Projected:
    """Embeddings in two dimensions.

    Attributes
    ----------
    points : (n, 2) float32
    explained : tuple of float
        Share of the variance of either principal component; empty for t-SNE.
    """

    points: NDArray[np.float32]
    explained: tuple[float, ...]


def project(X: NDArray[Any], method: str = "pca", *, seed: int = 0) -> Projected:
    """Return embeddings (n, d) in two dimensions.

    Principal components are of the columns as they are, centred; of a component's vector the entry
    of the largest size is positive, so that no axis is mirrored from one call to the next. t-SNE
    (van der Maaten and Hinton, JMLR 9, 2008) by openTSNE, of 50 principal components, begun with
    the first two. Equal rows in equal order give equal results.

    Raises
    ------
    TrainingDataError
        The method is unknown, there are fewer than 3 rows, or a value is not finite.
    MissingLibraryError
        t-SNE needs the extra `map`.
    """
    if method not in METHODS:
        raise TrainingDataError(f"method {method!r} is unknown; it is one of {', '.join(METHODS)}")
    if len(X) < 3:
        raise TrainingDataError(f"a map of {len(X)} images shows nothing; embed at least 3")
    if method == "tsne":
        require_libraries("A map by t-SNE", ["openTSNE"], "map")
    components, explained = _components(X, 2 if method == "pca" else _COMPONENTS)
    if method == "pca":
        return Projected(components.astype(np.float32), explained)
    return Projected(_embed(components, seed), ())


def _components(
    X: NDArray[Any], n_components: int
) -> tuple[NDArray[np.float64], tuple[float, ...]]:
    """Return principal components (n, k), zeros where there are fewer, and their shares."""
    n, d = X.shape
    mean = np.zeros(d)
    for block in _blocks(X):
        mean += block.sum(axis=0, dtype=np.float64) / n
    if not np.isfinite(mean).all():
        raise TrainingDataError("an embedding holds a value that is not a finite number")
    products = np.zeros((d, d))
    for block in _blocks(X):  # float32 in a block, float64 over blocks
        centred = (block - mean).astype(np.float32)
        products += centred.T @ centred
    k = min(n_components, d)
    variances, vectors = linalg.eigh(products, subset_by_index=[d - k, d - 1])
    variances, vectors = np.maximum(variances[::-1], 0.0), vectors[:, ::-1]
    signs = np.sign(vectors[np.argmax(np.abs(vectors), axis=0), np.arange(k)])
    found = np.zeros((n, n_components))
    start = 0
    for block in _blocks(X):
        found[start : start + len(block), :k] = (block - mean) @ (vectors * signs)
        start += len(block)
    total = float(np.trace(products))
    shares = [float(v) / total if total > 0 else 0.0 for v in variances]
    return found, (*shares, *[0.0] * (n_components - k))


def _embed(components: NDArray[np.float64], seed: int) -> NDArray[np.float32]:
    from openTSNE import TSNE
    from openTSNE.initialization import rescale

    if not components.any():
        return np.zeros((len(components), 2), np.float32)
    made = TSNE(
        perplexity=min(_PERPLEXITY, (len(components) - 1) / 3),
        initialization=rescale(components[:, :2]),
        random_state=seed % 2**32,
        n_jobs=1,  # of several threads the order of sums is not fixed
    )
    return np.asarray(made.fit(components), np.float32)


def _blocks(X: NDArray[Any]) -> Iterator[NDArray[Any]]:
    return (X[start : start + _BLOCK_ROWS] for start in range(0, len(X), _BLOCK_ROWS))
