"""The rows of fine-tuning: those for training, early stopping, held-out scores and the test."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medembed.core.errors import TrainingDataError
from medembed.dataset.manifest import Manifest, require_hashes
from medembed.dataset.splits import draw_inner, fold_train_rows, require_both_classes
from medembed.evaluation.scores import by_study, score

__all__ = ["FAILED_COLUMNS", "HELD_OUT", "TrainRows", "choose_rows"]

FAILED_COLUMNS = ("image", "sha256", "stage", "reason")
"""Columns of rows whose images were left out, as in `cache.embeddings`."""

HELD_OUT = 0
"""The held-out fold that is scored; part of the other folds is used for early stopping."""


@dataclass(frozen=True, eq=False)
class TrainRows:
    """Labelled train rows and all test rows, in the manifest's order.

    Attributes
    ----------
    rows : DataFrame
        Rows of the manifest; index 0 to n - 1.
    folds : int64 array of shape (n,)
        The fold of each train row; -1 for test rows.
    inner : bool array of shape (n,)
        Rows of the other folds' patients who are used for early stopping.
    failed : DataFrame
        `FAILED_COLUMNS` of the rows left out.
    """

    rows: pd.DataFrame
    folds: NDArray[np.int64]
    inner: NDArray[np.bool_]
    failed: pd.DataFrame

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def y(self) -> NDArray[np.int8]:
        """Labels, (n,): 0, 1, or -1 for test rows without a label."""
        found: NDArray[np.int8] = self.rows["label"].fillna(-1).to_numpy(np.int8)
        return found

    @property
    def fitted(self) -> NDArray[np.int64]:
        """Indices of the rows that are trained on."""
        return np.flatnonzero((self.folds >= 0) & (self.folds != HELD_OUT) & ~self.inner)

    @property
    def judging(self) -> NDArray[np.int64]:
        """Indices of the rows for early stopping, of patients that are not trained on."""
        return np.flatnonzero(self.inner)

    @property
    def held(self) -> NDArray[np.int64]:
        """Indices of the held-out patients' rows."""
        return np.flatnonzero(self.folds == HELD_OUT)

    @property
    def tested(self) -> NDArray[np.int64]:
        """Indices of the test rows."""
        return np.flatnonzero(self.folds < 0)

    def study_auroc(self, rows: NDArray[np.int64], probability: NDArray[np.float64]) -> float:
        """Return the AUROC of some rows' studies, averaging the probabilities of views."""
        table = pd.DataFrame(
            {
                "study": pd.factorize(self.rows["study"].iloc[rows], sort=True)[0],
                "label": self.y[rows],
                "probability": probability,
            }
        )
        studies = by_study(table)
        y, found = studies["label"].to_numpy(np.int8), studies["probability"].to_numpy()
        return float(score(y, found, 0.5)["auroc"])

    def without(self, failed: pd.DataFrame) -> tuple["TrainRows", NDArray[np.int64]]:
        """Return the rows without those whose images could not be read or decoded.

        Returns
        -------
        rows : TrainRows
        kept : int64 array
            Their indices in the original rows.

        Raises
        ------
        TrainingDataError
            Only one class is left in a part, or no labelled test row.
        """
        kept = np.flatnonzero(~self.rows["image"].isin(failed["image"]).to_numpy())
        rows = self.rows.iloc[kept].reset_index(drop=True)
        left = TrainRows(rows, self.folds[kept], self.inner[kept], failed)
        where = f"without the {len(failed)} images that could not be read or decoded"
        require_both_classes(left.y[left.held], f"the held-out fold {where}")
        for part, own in (("learnt from", left.fitted), ("stopped by", left.judging)):
            require_both_classes(left.y[own], f"what is {part} in the other folds, {where},")
        if not (left.y[left.tested] >= 0).any():
            raise TrainingDataError(
                f"no labelled test image can be read and decoded: {len(failed)} failed, the first "
                f"for this reason: {failed['reason'].iloc[0]}."
            )
        return left, kept


def choose_rows(manifest: Manifest, n_folds: int, seed: int) -> TrainRows:
    """Return the rows of a manifest for training and test, before any image is read.

    Raises
    ------
    TrainingDataError
        The rows cannot be split into folds; see `dataset.splits.fold_train_rows`.
    ManifestError
        The manifest holds no SHA-256s.
    """
    require_hashes(manifest)
    folds = fold_train_rows(manifest.rows, n_folds=n_folds, seed=seed)
    rows = manifest.rows
    known = rows.set_index("image", drop=False).loc[folds.index]
    inner = draw_inner(known, folds.to_numpy(), seed=seed)[HELD_OUT]
    own = rows["image"].isin(folds.index) | (rows["split"] == "test")
    chosen = rows[own].reset_index(drop=True)
    by_row = folds.reindex(chosen["image"]).fillna(-1).to_numpy(np.int64)
    nothing = pd.DataFrame(columns=[*FAILED_COLUMNS], dtype=object)
    is_inner = chosen["image"].isin(folds.index[inner]).to_numpy(bool)
    return TrainRows(chosen, by_row, is_inner, nothing)
