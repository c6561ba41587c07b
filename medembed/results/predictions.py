"""Rows of `predictions.parquet`: the images by the run's codes, and the priors' predictions."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medembed.dataset.identities import name_persons
from medembed.heads.baselines import ClassPrior, RegionPrior

__all__ = ["PRIORS", "image_code", "image_rows", "predict_prior", "prior_rows"]

PRIORS = {"class-prior": ClassPrior, "region-prior": RegionPrior}
"""Heads that look at no image, by name; every run of a sweep has them."""


def image_rows(rows: pd.DataFrame, folds: NDArray[Any]) -> pd.DataFrame:
    """Return a run's rows of some images, without head, trial and probability.

    Parameters
    ----------
    rows : DataFrame
        Rows of the manifest; patients, told apart by `dataset.identities`, and studies are
        replaced by codes in alphabetical order.
    folds : int array of shape (n,)
        The fold of each row; below 0, written as null, for rows outside training.
    """
    images = rows[["sha256", "region", "label", "split"]].copy()
    images["patient"] = pd.factorize(name_persons(rows).to_numpy(object), sort=True)[0]
    images["study"] = pd.factorize(rows["study"].to_numpy(object), sort=True)[0]
    images["fold"] = pd.array(folds, dtype="Int16")
    images.loc[folds < 0, "fold"] = pd.NA
    return images


def prior_rows(rows: pd.DataFrame, folds: NDArray[Any]) -> Iterator[pd.DataFrame]:
    """Yield the predictions of each prior on all rows: out of fold on the training rows.

    Parameters
    ----------
    rows, folds
        The arguments of `image_rows`; rows in a fold have labels 0 and 1.
    """
    images = image_rows(rows, folds)
    for name in PRIORS:
        probability = _predict(name, rows, folds)
        yield images.assign(head=name, trial=None, probability=probability)


def predict_prior(
    name: str,
    trained_regions: NDArray[Any],
    y: NDArray[Any],
    regions: NDArray[Any],
    sample_weight: NDArray[Any] | None = None,
) -> NDArray[np.float64]:
    """Return a prior's probabilities for rows of these regions, float64 in [0, 1].

    Parameters
    ----------
    name : str
        The prior, one of `PRIORS`.
    trained_regions, y : arrays of shape (n,)
        Regions and labels, 0 or 1, of the training rows.
    regions : array of shape (m,)
        Regions of the rows to predict.
    sample_weight : array of shape (n,), optional
        How many rows each training row stands for; by default one.

    Raises
    ------
    TrainingDataError
        A label is neither 0 nor 1, or there are no labels.
    """
    prior = PRIORS[name]().fit(trained_regions, y, sample_weight)
    found = prior.predict_proba(regions)[:, 1]
    # Half of float64's digits stay free, so that the mean over equal views is exact: rounding in
    # the mean would otherwise rank studies by their number of views.
    return np.asarray(found, np.float32).astype(np.float64)


def image_code(sha256: str) -> str:
    """Return a hash of an image's hash, which only somebody who has the image can look for."""
    return hashlib.sha256(bytes.fromhex(sha256)).hexdigest()[:16]


def _predict(name: str, rows: pd.DataFrame, folds: NDArray[Any]) -> NDArray[np.float64]:
    regions, trained = rows["region"].to_numpy(object), folds >= 0
    y = rows["label"].fillna(-1).to_numpy(np.int8)
    found = predict_prior(name, regions[trained], y[trained], regions)
    for fold in np.unique(folds[trained]):
        held, others = folds == fold, trained & (folds != fold)
        found[held] = predict_prior(name, regions[others], y[others], regions[held])
    return found
