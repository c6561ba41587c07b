"""Priors: baselines for a head to beat. They know the labels of training rows, but no image."""

from typing import Any, Self

import numpy as np

from medembed.core.errors import TrainingDataError

__all__ = ["ClassPrior", "RegionPrior"]


class ClassPrior:
    """Predict the share of abnormal training rows for everything."""

    prior_: float

    def fit(self, regions: Any, y: Any, sample_weight: Any = None) -> Self:
        """Learn the prior from labels 0 and 1 of shape (n,); regions are ignored.

        Parameters
        ----------
        regions, y : arrays of shape (n,)
        sample_weight : array of shape (n,), optional
            How many training rows each row stands for, above 0; by default one.

        Raises
        ------
        TrainingDataError
            A label is neither 0 nor 1, there are no labels, or the lengths differ.
        """
        _, labels, weights = _checked(regions, y, sample_weight)
        self.prior_ = float(np.average(labels, weights=weights))
        return self

    def predict_proba(self, regions: Any) -> np.ndarray:
        """Return the probability of normal and abnormal per row, float64 of shape (n, 2)."""
        abnormal = np.full(len(regions), self.prior_)
        return np.column_stack([1 - abnormal, abnormal])


class RegionPrior:
    """Predict the share of abnormal training rows of the same region.

    Parameters
    ----------
    strength : float
        Number of rows at the overall prior that are added to every region: (abnormal + strength *
        prior) / (n + strength), the mean under a beta prior. An unseen region has the overall
        prior.
    """

    prior_: float
    priors_: dict[Any, float]

    def __init__(self, strength: float = 2.0) -> None:
        self.strength = strength

    def fit(self, regions: Any, y: Any, sample_weight: Any = None) -> Self:
        """Learn the priors from regions and labels 0 and 1, both of shape (n,).

        Parameters and errors are those of `ClassPrior.fit`.
        """
        regions, labels, weights = _checked(regions, y, sample_weight)
        self.prior_ = float(np.average(labels, weights=weights))
        self.priors_ = {}
        for region in dict.fromkeys(regions.tolist()):
            is_inside = regions == region
            n, n_abnormal = weights[is_inside].sum(), labels[is_inside] @ weights[is_inside]
            shrunk = (n_abnormal + self.strength * self.prior_) / (n + self.strength)
            self.priors_[region] = float(shrunk)
        return self

    def predict_proba(self, regions: Any) -> np.ndarray:
        """Return the probability of normal and abnormal per row, float64 of shape (n, 2)."""
        names = np.asarray(regions, dtype=object).tolist()
        abnormal = np.array([self.priors_.get(name, self.prior_) for name in names], dtype=float)
        return np.column_stack([1 - abnormal, abnormal])


def _checked(regions: Any, y: Any, sample_weight: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    names, labels = np.asarray(regions, dtype=object), np.asarray(y)
    weights = np.ones(len(labels)) if sample_weight is None else np.asarray(sample_weight, float)
    if not names.shape == labels.shape == weights.shape or labels.ndim != 1 or len(labels) == 0:
        raise TrainingDataError(
            f"{names.shape} regions, {labels.shape} labels and {weights.shape} weights: a prior "
            "needs one of each per row, and at least one row"
        )
    if not np.isin(labels, (0, 1)).all():
        raise TrainingDataError("a prior needs labels 0 and 1; leave unlabelled rows out")
    return names, labels.astype(np.float64), weights
