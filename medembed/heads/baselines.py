"""Priors: what a head must beat. They know the labels of training studies, and no image."""

from typing import Any, Self

import numpy as np

from medembed.errors import TrainingDataError

__all__ = ["ClassPrior", "RegionPrior"]


class ClassPrior:
    """Predict the share of abnormal training rows for everything."""

    prior_: float

    def fit(self, regions: Any, y: Any) -> Self:
        """Take the prior from labels 0 and 1 of shape (n,); regions are not looked at.

        Raises
        ------
        TrainingDataError
            A label is neither 0 nor 1, there is none, or the lengths differ.
        """
        _, labels = _checked(regions, y)
        self.prior_ = float(labels.mean())
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
        So many rows at the overall prior are added to every region: (abnormal + strength * prior)
        / (n + strength), the mean under a beta prior. A region never seen has the overall prior.
    """

    prior_: float
    priors_: dict[Any, float]

    def __init__(self, strength: float = 2.0) -> None:
        self.strength = strength

    def fit(self, regions: Any, y: Any) -> Self:
        """Take the priors from regions and labels 0 and 1, both of shape (n,).

        Raises
        ------
        TrainingDataError
            As `ClassPrior.fit`.
        """
        regions, labels = _checked(regions, y)
        self.prior_ = float(labels.mean())
        self.priors_ = {}
        for region in dict.fromkeys(regions.tolist()):
            inside = labels[regions == region]
            shrunk = inside.sum() + self.strength * self.prior_
            self.priors_[region] = float(shrunk / (len(inside) + self.strength))
        return self

    def predict_proba(self, regions: Any) -> np.ndarray:
        """Return the probability of normal and abnormal per row, float64 of shape (n, 2)."""
        names = np.asarray(regions, dtype=object).tolist()
        abnormal = np.array([self.priors_.get(name, self.prior_) for name in names], dtype=float)
        return np.column_stack([1 - abnormal, abnormal])


def _checked(regions: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    names, labels = np.asarray(regions, dtype=object), np.asarray(y)
    if names.shape != labels.shape or labels.ndim != 1 or len(labels) == 0:
        raise TrainingDataError(
            f"{names.shape} regions and {labels.shape} labels: a prior needs one label per region, "
            "and at least one row"
        )
    if not np.isin(labels, (0, 1)).all():
        raise TrainingDataError("a prior needs labels 0 and 1; leave unlabelled rows out")
    return names, labels.astype(np.float64)
