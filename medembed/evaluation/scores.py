"""Scores of a binary classifier, for one data set or for many reweightings of it at once.

Label 1 is abnormal, 0 normal. A decision is abnormal if probability >= threshold. A score that
cannot be computed (AUROC of one class) is NaN, never an error, and is shown as "not estimable".
"""

import math
from collections.abc import Sequence
from typing import Any, TypeGuard, overload

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medembed.core.errors import TrainingDataError

__all__ = [
    "DECISION_SCORES",
    "N_ECE_BINS",
    "SCORES",
    "Scorer",
    "by_study",
    "check_both_classes",
    "check_rows",
    "find_bins",
    "is_number",
    "score",
]


def check_rows(
    y: np.ndarray, probability: np.ndarray, purpose: str = "a score"
) -> tuple[np.ndarray, np.ndarray]:
    """Return labels as int8 and probabilities as float64, both (n,), validated for `purpose`.

    Raises
    ------
    TrainingDataError
        A label is not 0 or 1, a probability is not a number in [0, 1], or the lengths differ.
    """
    labels, values = np.asarray(y), np.asarray(probability, dtype=np.float64)
    if labels.ndim != 1 or labels.shape != values.shape:
        raise TrainingDataError(
            f"labels of shape {labels.shape} and probabilities of shape {values.shape} "
            f"are not two columns of one length; {purpose} needs one probability per label"
        )
    if not np.isin(labels, (0, 1)).all():
        strange = next(value for value in labels.tolist() if value not in (0, 1))
        raise TrainingDataError(f"label {strange} is not 0 or 1; leave unlabelled rows out")
    if not ((values >= 0) & (values <= 1)).all():
        raise TrainingDataError("a probability is NaN or outside [0, 1]; it cannot be scored")
    return labels.astype(np.int8), values


def check_both_classes(
    y: np.ndarray, probability: np.ndarray, purpose: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return labels as int64 and probabilities as float64, both (n,), with both classes present.

    Raises
    ------
    TrainingDataError
        Only one class, lengths that differ, other labels, or probabilities outside [0, 1].
    """
    labels, values = check_rows(y, probability, purpose)
    if len(np.unique(labels)) < 2:
        held = "normal" if (labels == 0).any() else "abnormal" if len(labels) else "none"
        raise TrainingDataError(
            f"{purpose} needs normal and abnormal rows, but all {len(labels)} are {held}; "
            "give it more patients"
        )
    return labels.astype(np.int64), values


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a JSON value is a number that a float can hold: no bool, infinity or NaN."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # JSON has whole numbers of any length
        return False


SCORES = (
    "auroc",
    "average_precision",
    "accuracy",
    "macro_f1",
    "kappa",
    "sensitivity",
    "specificity",
    "brier",
    "ece",
)
#: The scores that depend on a threshold.
DECISION_SCORES = ("accuracy", "macro_f1", "kappa", "sensitivity", "specificity")
#: Ten bins leave about a hundred studies in each at the size of MURA's validation set.
N_ECE_BINS = 10

_STUDY_COLUMNS = ("patient", "region", "split", "fold")


class Scorer:
    """Scores fixed probabilities under any number of row weights.

    Everything that depends on the order of the probabilities is computed once, so that a bootstrap
    costs only a few passes over its weights.

    Parameters
    ----------
    y : array of shape (n,)
        Labels, 0 or 1.
    probability : array of shape (n,)
        Probability of abnormal, in [0, 1].
    threshold : float
        Decisions are abnormal at or above it.
    names : sequence of str
        The requested scores, from `SCORES`.

    Raises
    ------
    TrainingDataError
        A label is not 0 or 1, a probability is not a number in [0, 1], the lengths differ, or a
        name is not a score.

    Notes
    -----
    AUROC is the Mann-Whitney statistic with ties at one half (Hanley and McNeil, Radiology 143,
    1982). Average precision is the sum over distinct thresholds of the gain in recall times the
    precision, without interpolation, as in scikit-learn. Kappa is Cohen's (Educational and
    Psychological Measurement 20, 1960). Macro-F1 is the mean of the F1 of both classes. ECE is the
    binary expected calibration error of Naeini et al. (AAAI 2015): `N_ECE_BINS` bins of equal
    width, each weighted by its share of rows times abs(share abnormal - mean probability).
    """

    def __init__(
        self,
        y: np.ndarray,
        probability: np.ndarray,
        threshold: float,
        names: Sequence[str] = SCORES,
    ) -> None:
        self.names = _known_scores(names)
        labels, self._probability = check_rows(y, probability)
        self._positive = labels.astype(np.float64)
        self._bins = find_bins(self._probability)
        self._decision = (self._probability >= threshold).astype(np.float64)
        self._order = np.argsort(self._probability, kind="stable")
        ordered = self._probability[self._order]
        self._ties = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]][: len(ordered)])
        self._ordered_positive = self._positive[self._order]
        self._columns = self._moment_columns()

    @property
    def n_rows(self) -> int:
        """Number of scored rows."""
        return len(self._positive)

    def __call__(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Return each score's values, float64 of shape (B,), for `weights` of shape (B, n)."""
        if weights.shape[1] == 0:
            return {name: np.full(len(weights), np.nan) for name in self.names}
        weights = np.asarray(weights, dtype=np.float64)
        values: dict[str, np.ndarray] = {}
        with np.errstate(divide="ignore", invalid="ignore"):
            if {"auroc", "average_precision"} & set(self.names):
                values |= self._ranking(weights)
            if set(self.names) - {"auroc", "average_precision"}:
                values |= self._from_moments(weights @ self._columns)
        return {name: values[name] for name in self.names}

    def _ranking(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        ordered = weights[:, self._order]
        positive = ordered * self._ordered_positive
        negative = ordered - positive
        if len(self._ties) < len(self._order):
            positive = np.add.reduceat(positive, self._ties, axis=1)
            negative = np.add.reduceat(negative, self._ties, axis=1)
        positives, negatives = positive.sum(axis=1), negative.sum(axis=1)
        values = {}
        below = np.cumsum(negative, axis=1)
        if "auroc" in self.names:
            wins = np.einsum("bg,bg->b", positive, below - negative / 2)
            values["auroc"] = wins / (positives * negatives)
        if "average_precision" in self.names:
            # from the highest score downwards: every row not strictly below is called abnormal
            false = negatives[:, None] - below + negative
            true = positives[:, None] - np.cumsum(positive, axis=1) + positive
            precision = true / np.where(true + false > 0, true + false, 1.0)
            area = np.einsum("bg,bg->b", positive, precision) / positives
            values["average_precision"] = np.where(negatives > 0, area, np.nan)
        return values

    def _moment_columns(self) -> np.ndarray:
        """Return (n, 5 + bins), the columns whose weighted sums give the scores without ranks."""
        positive, decision = self._positive, self._decision
        error = self._probability - positive
        bins = (self._bins[:, None] == np.arange(N_ECE_BINS)) * error[:, None]
        total = np.ones_like(positive)
        moments = np.column_stack([total, positive, decision, positive * decision, error**2])
        return np.hstack([moments, bins])

    def _from_moments(self, moments: np.ndarray) -> dict[str, np.ndarray]:
        total, positive, called, hit, squared = moments[:, :5].T
        negative, miss, false = total - positive, positive - hit, called - hit
        passed = negative - false
        both = (positive > 0) & (negative > 0)
        # half of F1 = 2 TP / (2 TP + FP + FN) per class; defined if both classes are present
        macro = hit / (2 * hit + miss + false) + passed / (2 * passed + miss + false)
        agreed = (hit + passed) / total
        by_chance = (positive * called + negative * (total - called)) / total**2
        return {
            "accuracy": agreed,
            "macro_f1": np.where(both, macro, np.nan),
            "kappa": np.where(both, (agreed - by_chance) / (1 - by_chance), np.nan),
            "sensitivity": hit / positive,
            "specificity": passed / negative,
            "brier": squared / total,
            "ece": np.abs(moments[:, 5:]).sum(axis=1) / total,
        }


def find_bins(probability: np.ndarray) -> np.ndarray:
    """Return the bin of each probability: [k / 10, (k + 1) / 10), the last one closed."""
    return np.asarray(np.minimum((probability * N_ECE_BINS).astype(int), N_ECE_BINS - 1))


@overload
def score(
    y: np.ndarray, probability: np.ndarray, threshold: float, *, weights: None = None
) -> dict[str, float]: ...


@overload
def score(
    y: np.ndarray, probability: np.ndarray, threshold: float, *, weights: np.ndarray
) -> dict[str, NDArray[np.float64]]: ...


def score(
    y: np.ndarray,
    probability: np.ndarray,
    threshold: float,
    *,
    weights: np.ndarray | None = None,
) -> dict[str, float] | dict[str, NDArray[np.float64]]:
    """Return every score of `SCORES`.

    Parameters
    ----------
    y, probability, threshold
        Labels 0 or 1, probabilities of abnormal, and the decision threshold; see `Scorer`.
    weights : array of shape (B, n), optional
        Row weights >= 0, one set of weights per result, such as the counts of a bootstrap.

    Returns
    -------
    dict of str to float, or to float64 arrays of shape (B,) if weights are given
        NaN if not estimable: AUROC, average precision, macro-F1 and kappa need both classes,
        sensitivity an abnormal row, specificity a normal one, the others any row.

    Examples
    --------
    >>> found = score(np.array([0, 1, 0, 1]), np.array([0.1, 0.4, 0.6, 0.9]), threshold=0.5)
    >>> found["auroc"], found["sensitivity"]
    (0.75, 0.5)
    """
    scorer = Scorer(y, probability, threshold)
    if weights is not None:
        return dict(scorer(np.asarray(weights)))
    return {name: float(value[0]) for name, value in scorer(np.ones((1, len(y)))).items()}


def by_study(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row per study, sorted by study.

    Parameters
    ----------
    rows : DataFrame
        One row per view with `study`, `label` (0, 1, or missing or -1 for unknown), `probability`,
        and any of `patient`, `region`, `split`, `fold`, which a study's views share.

    Returns
    -------
    DataFrame
        `study`, those of `patient`, `region`, `split`, `fold` that were given, `label` (Int8: the
        largest known label, as a study is abnormal if any view is; missing if none is known),
        `probability` (float64, the mean over the views), `n_views` (int64).

    Raises
    ------
    TrainingDataError
        A study has two patients, regions, splits or folds, or a probability is missing.

    Examples
    --------
    >>> views = {"study": ["a", "a", "b"], "label": [0, 1, 0], "probability": [0.25, 0.75, 0.125]}
    >>> by_study(pd.DataFrame(views))
      study  label  probability  n_views
    0     a      1        0.500        2
    1     b      0        0.125        1
    """
    if rows["probability"].isna().any():
        n_missing = int(rows["probability"].isna().sum())
        raise TrainingDataError(f"{n_missing} views have no probability; predict them first")
    kept = [column for column in _STUDY_COLUMNS if column in rows]
    labels = rows["label"].astype("Int8")
    views = rows[["study", *kept]].assign(
        label=labels.mask(labels < 0), probability=rows["probability"].astype(np.float64)
    )
    studies = views.groupby("study", sort=True)
    _check_shared(studies, kept)
    result = studies[[*kept, "label"]].first()
    result["label"] = studies["label"].max()
    result["probability"] = studies["probability"].mean()
    result["n_views"] = studies.size().astype(np.int64)
    return result.reset_index()


def _check_shared(studies: Any, columns: Sequence[str]) -> None:
    for column in columns:
        counts = studies[column].nunique()
        if (counts > 1).any():
            study = counts.index[np.argmax(counts.to_numpy() > 1)]
            raise TrainingDataError(
                f"study {study} lies in {counts[study]} values of {column}; "
                "a study has one. Make study names unique in the manifest"
            )


def _known_scores(names: Sequence[str]) -> tuple[str, ...]:
    for name in names:
        if name not in SCORES:
            raise TrainingDataError(f"unknown score {name!r}; known are {', '.join(SCORES)}")
    return tuple(names)
