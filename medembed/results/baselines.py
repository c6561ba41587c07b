"""The floor of every table: priors that look at no image."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

__all__ = ["BASELINES", "predict_prior"]

BASELINES = ("class-prior", "region-prior")


def predict_prior(name: str, train: pd.DataFrame, rows: pd.DataFrame) -> NDArray[np.float64]:
    """Predict the share of abnormal images in `train`, overall or in the row's own region.

    Parameters
    ----------
    name : {"class-prior", "region-prior"}
        Which prior.
    train : DataFrame
        Labelled rows to count, with columns region and label.
    rows : DataFrame
        Rows to predict, with column region; a region that `train` lacks gets the overall share.

    Returns
    -------
    ndarray of float64, shape (n_rows,)
        Probabilities in [0, 1].
    """
    labels = train["label"].astype("float64")
    found = pd.Series(labels.mean(), index=rows.index)
    if name == "region-prior":
        found = rows["region"].map(labels.groupby(train["region"]).mean()).fillna(labels.mean())
    # Half of float64's digits stay free, so that the mean over equal views is that very number:
    # rounding in the mean would otherwise rank studies by their number of views.
    return found.to_numpy(np.float32).astype(np.float64)
