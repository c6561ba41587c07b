"""Several fitted heads as one: each reads its own columns, and their probabilities are averaged."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from scipy.special import expit, logit

from medembed.core.errors import ModelError, TrainingDataError
from medembed.heads.base import Head, arrays_of

__all__ = ["EDGE", "EnsembleHead"]

EDGE = 1e-7
"""Distance from 0 and 1 to which probabilities are clipped before the logit; the same as in
`evaluation.calibration`, whose maps the head applies."""


class EnsembleHead(Head):
    """The weighted mean of calibrated heads; made by `medembed ensemble`, never fitted.

    A member's probability p becomes sigmoid(slope * logit(p) + intercept); these are averaged with
    weights that are not negative and sum to 1. With members that read whole studies, a study's
    probability is the mean over its views of the other members' before averaging, so that it does
    not matter whether views or members are averaged first.

    Parameters
    ----------
    members : sequence of Head
        Fitted heads.
    columns : sequence of int64 arrays
        For each member the columns of X that it reads, in its order.
    weights, slopes, intercepts : float64 arrays of shape (k,)

    Attributes
    ----------
    is_study_level : bool
        Whether a member judges whole studies; `predict_proba` then takes studies.
    best_epoch_ : None
    """

    def __init__(
        self,
        members: Sequence[Head] = (),
        columns: Sequence[np.ndarray] = (),
        weights: Any = (),
        slopes: Any = (),
        intercepts: Any = (),
    ) -> None:
        self.members = members
        self.columns = columns
        self.weights = weights
        self.slopes = slopes
        self.intercepts = intercepts

    @classmethod
    def build(
        cls,
        members: Sequence[Head],
        columns: Sequence[np.ndarray],
        weights: np.ndarray,
        slopes: np.ndarray,
        intercepts: np.ndarray,
        n_features: int,
    ) -> "EnsembleHead":
        """Return a head that counts as fitted on X of `n_features` columns."""
        head = cls(members, columns, weights, slopes, intercepts)
        head.classes_, head.n_features_in_ = np.array([0, 1]), n_features
        head.best_epoch_ = None
        return head

    def fit(self, X: Any, y: Any, *, X_val: Any = None, y_val: Any = None) -> Self:
        """Refuse: members are fitted before they are combined.

        Raises
        ------
        TrainingDataError
            Always.
        """
        raise TrainingDataError(
            "an ensemble is not fitted on embeddings: `medembed ensemble` makes it of runs"
        )

    @property
    def is_study_level(self) -> bool:
        """Whether a member judges whole studies."""
        return any(member.study_level for member in self.members)

    def predict_proba(self, X: np.ndarray, studies: np.ndarray | None = None) -> np.ndarray:
        """Return the probability of both classes: float64 of shape (rows or studies, 2).

        Parameters
        ----------
        X : (n, d) array
        studies : (n,) array, optional
            The study of each row; the result then has a row per study, in ascending order.
            Without it each row is a study of its own.
        """
        if studies is None:
            return super().predict_proba(X)
        positive = self._pool(np.asarray(X), studies)
        return np.column_stack([1 - positive, positive])

    def _probability(self, X: np.ndarray) -> np.ndarray:
        return self._pool(X, None)

    def _pool(self, X: np.ndarray, studies: np.ndarray | None) -> np.ndarray:
        codes = None if studies is None else np.unique(studies, return_inverse=True)[1]
        pooled: Any = 0.0
        for k, member in enumerate(self.members):
            if not self.weights[k]:
                continue
            own = X[:, self.columns[k]]
            given = (codes,) if member.study_level and codes is not None else ()
            found = member.predict_proba(own, *given)[:, 1]
            found = expit(self.slopes[k] * _logit(found) + self.intercepts[k])
            if codes is not None and not member.study_level:
                found = np.bincount(codes, found) / np.bincount(codes)
            pooled = pooled + self.weights[k] * found
        return np.clip(np.asarray(pooled, np.float64), 0.0, 1.0)

    def _payload(self) -> dict[str, np.ndarray]:
        columns = {f"columns.{k}": np.asarray(own) for k, own in enumerate(self.columns)}
        own = {name: np.asarray(getattr(self, name), np.float64) for name in _PER_MEMBER}
        return {**own, **columns}

    def _restore(self, payload: dict[str, np.ndarray] | str, n_features: int) -> None:
        k = len(self.members)
        expected: dict[str, tuple[str, tuple[int, ...]]]
        expected = dict.fromkeys(_PER_MEMBER, ("float64", (k,)))
        for i, member in enumerate(self.members):
            expected[f"columns.{i}"] = ("int64", (member.n_features_in_,))
        arrays = arrays_of(payload, expected)
        weights, slopes = arrays["weights"], arrays["slopes"]
        if not ((weights >= 0).all() and abs(weights.sum() - 1) < 1e-6 and (slopes > 0).all()):
            raise ModelError("the weights of members do not sum to 1, or a slope is not above 0")
        columns = [arrays[f"columns.{i}"] for i in range(k)]
        if any(((own < 0) | (own >= n_features)).any() for own in columns):
            raise ModelError(f"a member reads a column that is not among the {n_features} columns")
        self.columns = columns
        self.weights, self.slopes, self.intercepts = weights, slopes, arrays["intercepts"]


_PER_MEMBER = ("weights", "slopes", "intercepts")


def _logit(probability: np.ndarray) -> np.ndarray:
    return np.asarray(logit(np.clip(probability, EDGE, 1 - EDGE)))
