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
    overall = float(labels.mean())
    if name == "class-prior":
        return np.full(len(rows), overall)
    by_region = labels.groupby(train["region"]).mean()
    return rows["region"].map(by_region).fillna(overall).to_numpy(np.float64)
