"""Rows of `predictions.parquet`: the images by the run's codes, and what the two priors say."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medembed.heads.baselines import ClassPrior, RegionPrior

__all__ = ["PRIORS", "image_code", "image_rows", "prior_rows"]

PRIORS = {"class-prior": ClassPrior, "region-prior": RegionPrior}


def image_rows(rows: pd.DataFrame, folds: NDArray[Any]) -> pd.DataFrame:
    """Return a run's rows of some images, without head, trial and probability.

    Parameters
    ----------
    rows : DataFrame
        Rows of the manifest; patients and studies become codes, in their alphabetical order.
    folds : int array of shape (n,)
        The fold of each row, below 0 where it was not trained on: a null.
    """
    images = rows[["sha256", "region", "label", "split"]].copy()
    images["patient"] = pd.factorize(rows["patient"].to_numpy(object), sort=True)[0]
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


def image_code(sha256: str) -> str:
    """Hash an image's hash, so that a card tells its owner, and nobody else, what it has seen."""
    return hashlib.sha256(bytes.fromhex(sha256)).hexdigest()[:16]


def _predict(name: str, rows: pd.DataFrame, folds: NDArray[Any]) -> NDArray[np.float64]:
    regions, trained = rows["region"].to_numpy(object), folds >= 0
    y = rows["label"].fillna(-1).to_numpy(np.int8)
    fitted = PRIORS[name]().fit(regions[trained], y[trained])
    found = fitted.predict_proba(regions)[:, 1]
    for fold in np.unique(folds[trained]):
        held, others = folds == fold, trained & (folds != fold)
        fitted = PRIORS[name]().fit(regions[others], y[others])
        found[held] = fitted.predict_proba(regions[held])[:, 1]
    # Half of float64's digits stay free, so that the mean over equal views is that very number:
    # rounding in the mean would otherwise rank studies by their number of views.
    return np.asarray(found, np.float32).astype(np.float64)
