"""Convex weights of several classifiers, from scores that none of them was trained on.

Calibrated probabilities are averaged with weights that are not negative and sum to 1: a linear
opinion pool whose weights minimise the cross-entropy (Wolpert, Neural Networks 5, 1992; van der
Laan et al., Statistical Applications in Genetics and Molecular Biology 6:25, 2007).
"""

import numpy as np
from scipy.optimize import LinearConstraint, minimize

from medembed.core.errors import TrainingDataError

__all__ = ["pool_loss", "pool_weights"]

_LEAST = 1e-12
"""Probability of a label below which the cross-entropy is cut off."""
_NEGLIGIBLE = 1e-6
"""Weights below this are the solver's rounding and become 0."""
_MAX_GAP = 1e-4
"""Cross-entropy per study by which weights may miss the optimum."""


def pool_loss(weights: np.ndarray, probability: np.ndarray, y: np.ndarray) -> float:
    """Return the mean cross-entropy of pooled probabilities; see `pool_weights`."""
    return float(-np.log(np.maximum(_likelihood(probability, y) @ weights, _LEAST)).mean())


def pool_weights(probability: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the convex weights of calibrated members that minimise the mean cross-entropy.

    The problem is convex. With g_k the mean over studies of q_k / (q · w), where q_k is the
    probability that member k gave to the label, no weights are better than w by more than
    max(g) - 1, so that the result is checked without knowing the optimum.

    Parameters
    ----------
    probability : (n, k) array
        Calibrated probabilities of abnormal, in [0, 1].
    y : (n,) array
        Labels, 0 or 1.

    Returns
    -------
    ndarray of float64, shape (k,)
        Not negative, with a sum of 1; members that do not help have 0. Among members with equal
        probabilities the split is arbitrary, but the same in every call.

    Raises
    ------
    TrainingDataError
        The solver missed the optimum; this has not been seen.
    """
    likelihood = _likelihood(probability, y)
    k = likelihood.shape[1]
    weights = np.full(k, 1 / k)
    if k == 1:
        return weights

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        pooled = np.maximum(likelihood @ w, _LEAST)
        return float(-np.log(pooled).mean()), -(likelihood / pooled[:, None]).mean(axis=0)

    found = minimize(
        loss,
        weights,
        jac=True,
        method="SLSQP",
        bounds=[(0.0, 1.0)] * k,
        constraints=LinearConstraint(np.ones(k), 1.0, 1.0),
        options={"ftol": 1e-12, "maxiter": 1000},
    ).x
    weights = _project(found)
    # a few steps of expectation maximisation, which never increase the loss, take up rounding
    for _ in range(100):
        gain = -loss(weights)[1]
        if gain.max() - 1 <= _MAX_GAP / 100:
            break
        weights = _project(weights * gain)
    gap = float(-loss(weights)[1].min() - 1)
    if not gap <= _MAX_GAP:
        raise TrainingDataError(
            f"the weights of {k} members could not be fitted: they miss the optimum by up to "
            f"{gap:.2g} of cross-entropy. Leave out the member that was added last."
        )
    return weights


def _likelihood(probability: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the probability that each member gave to each label, (n, k)."""
    is_abnormal = np.asarray(y, bool)[:, None]
    return np.maximum(np.where(is_abnormal, probability, 1 - probability), _LEAST)


def _project(weights: np.ndarray) -> np.ndarray:
    kept = np.where(weights > _NEGLIGIBLE, weights, 0.0)
    return np.asarray(kept / kept.sum(), np.float64)
