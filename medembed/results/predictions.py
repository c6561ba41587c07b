"""Rows of `predictions.parquet`: the images by the run's codes, and what the two priors say."""

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
"""Heads that look at no image, by name; no run of a sweep is without them."""


def image_rows(rows: pd.DataFrame, folds: NDArray[Any]) -> pd.DataFrame:
    """Return a run's rows of some images, without head, trial and probability.

    Parameters
    ----------
    rows : DataFrame
        Rows of the manifest; patients, as `dataset.identities` tells them apart, and studies
        become codes, in their alphabetical order.
    folds : int array of shape (n,)
        The fold of each row, below 0 where it was not trained on: a null.
    """
    images = rows[["sha256", "region", "label", "split"]].copy()
    images["patient"] = pd.factorize(name_persons(rows).to_numpy(object), sort=True)[0]
    images["study"] = pd.factorize(rows["study"].to_numpy(object), sort=True)[0]
    images["fold"] = pd.array(folds, dtype="Int16")
    images.loc[folds < 0, "fold"] = pd.NA
    return images


def prior_rows(rows: pd.DataFrame, folds: NDArray[Any]) -> Iterator[pd.DataFrame]:
    """Yield the predictions of each prior on all rows: out of fold on those trained on.

    Parameters
    ----------
    rows, folds
        As for `image_rows`; those of a fold have labels 0 and 1.
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
    """Return what a prior of `PRIORS` says of rows of these regions, float64 in [0, 1].

    Parameters
    ----------
    name : str
        Of the prior.
    trained_regions, y : arrays of shape (n,)
        Regions and labels, 0 or 1, of the rows that it knows.
    regions : array of shape (m,)
        Of the rows that it is asked about.
    sample_weight : array of shape (n,), optional
        How many rows each of those that it knows stands for; by default one.

    Raises
    ------
    TrainingDataError
        A label is neither 0 nor 1, or there is none.
    """
    prior = PRIORS[name]().fit(trained_regions, y, sample_weight)
    found = prior.predict_proba(regions)[:, 1]
    # Half of float64's digits stay free, so that the mean over equal views is that very number:
    # rounding in the mean would otherwise rank studies by their number of views.
    return np.asarray(found, np.float32).astype(np.float64)


def image_code(sha256: str) -> str:
    """Hash an image's hash, so that a card tells its owner, and nobody else, what it has seen."""
    return hashlib.sha256(bytes.fromhex(sha256)).hexdigest()[:16]


def _predict(name: str, rows: pd.DataFrame, folds: NDArray[Any]) -> NDArray[np.float64]:
    regions, trained = rows["region"].to_numpy(object), folds >= 0
    y = rows["label"].fillna(-1).to_numpy(np.int8)
    found = predict_prior(name, regions[trained], y[trained], regions)
    for fold in np.unique(folds[trained]):
        held, others = folds == fold, trained & (folds != fold)
        found[held] = predict_prior(name, regions[others], y[others], regions[held])
    return found
