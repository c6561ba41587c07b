"""What a column beside the images has to do with the embedding, and with the score of the label.

All scores are AUROCs that count only pairs of rows within one stratum: a fold, since scores of
different folds come from different models; or a group within a fold, where the group cannot help.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from typing import Any, NamedTuple

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.stats import rankdata

from medembed.evaluation.bootstrap import finite_or_none
from medembed.evaluation.estimates import (
    Estimate,
    estimate_auroc,
    mean_estimate,
    placements,
)
from medembed.evaluation.paired import Difference, compare_influences
from medembed.evaluation.unpaired import (
    MOST_PAIRED,
    Gap,
    find_gaps,
)

__all__ = [
    "Encoded",
    "Loss",
    "PairScore",
    "average_pairs",
    "join_strata",
    "largest_gap",
    "permutation_p",
    "score_encoded",
    "score_gap",
    "score_loss",
    "score_pairs",
    "shuffle_groups",
    "subtract_group_means",
]


_PENALTY = 400.0
"""Ridge's, on standardised columns: 4 / C of `LogisticHead`, whose loss curves by up to 1/4."""
_ENOUGH = 50  # draws at least as high as what was found; fewer would make p coarse
_DRAWS_AT_ONCE, _DRAW_BYTES = 128, 1 << 28
_BLOCK = 8192  # rows whose columns are standardised at a time


class PairScore(NamedTuple):
    """An AUROC over some pairs of rows, and each row's contribution to it (n,)."""

    value: float
    added: np.ndarray


@dataclass(frozen=True)
class Encoded:
    """How well a column can be read: a macro AUROC, and the one-sided p of `permutation_p`.

    The interval is that of the folds' models; p also takes into account that they were trained on
    each other's rows.
    """

    estimate: Estimate
    p: float

    def as_dict(self) -> dict[str, object]:
        """Return the interval's keys, and `p`."""
        return {**self.estimate.interval().as_dict(), "p": finite_or_none(self.p)}


@dataclass(frozen=True)
class Loss:
    """The label's AUROC that is left without a column, and how much was lost.

    `p` is one-sided: the probability of such a loss where nothing is lost.
    """

    left: Estimate
    lost: Difference
    p: float


def join_strata(folds: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return the stratum of each row, (n,): its fold and its group, both integers from 0."""
    return np.asarray(folds * (int(groups.max(initial=0)) + 1) + groups)


def score_pairs(y: np.ndarray, values: np.ndarray, strata: np.ndarray) -> PairScore:
    """Return the share of pairs ranked correctly among those of two classes and one stratum.

    Parameters
    ----------
    y, values, strata : arrays of shape (n,)
        Labels 0 or 1, scores, and integers.

    Returns
    -------
    PairScore
        With one stratum the AUROC and its `influences`. NaN if no stratum has both classes.
        Contributions are the derivatives of the ratio of both counts in the weight of each row.
    """
    is_abnormal = y == 1
    placed, facing = np.zeros(len(y)), np.zeros(len(y))
    for stratum in np.unique(strata):
        own = np.flatnonzero(strata == stratum)
        n_abnormal = int(is_abnormal[own].sum())
        if 0 < n_abnormal < len(own):
            placed[own] = placements(is_abnormal[own], values[own])
            facing[own] = np.where(is_abnormal[own], len(own) - n_abnormal, n_abnormal)
    n_pairs = facing[is_abnormal].sum()
    if not n_pairs:
        return PairScore(nan, np.full(len(y), nan))
    value = float((facing * placed)[is_abnormal].sum() / n_pairs)
    return PairScore(value, facing * (placed - value) / n_pairs)


def average_pairs(scores: Sequence[PairScore]) -> PairScore:
    """Return the mean of scores of the same rows, with its contributions."""
    return PairScore(
        float(np.mean([own.value for own in scores])),
        np.mean([own.added for own in scores], axis=0),
    )


def score_encoded(
    groups: np.ndarray, values: np.ndarray, folds: np.ndarray, codes: np.ndarray
) -> Estimate:
    """Return the mean over k groups of the AUROC of each against the others.

    Parameters
    ----------
    groups, folds : integer arrays of shape (n,)
        Groups from 0 to k - 1.
    values : array of shape (n, k), or (n, 1) for two groups
        Out-of-fold scores of each group; of two, of the second.
    codes : integer array of shape (n,)
        Patients, see `patient_codes`.
    """
    which = [1] if values.shape[1] == 1 else list(range(values.shape[1]))
    estimates = []
    for k, own in zip(which, values.T, strict=True):
        is_own = (groups == k).astype(np.int8)
        estimates.append(estimate_auroc(is_own, *score_pairs(is_own, own, folds), codes))
    if len(which) == 1:
        return estimates[0]
    return mean_estimate(estimates, [str(k) for k in which])


def permutation_p(
    X: np.ndarray,
    groups: np.ndarray,
    folds: np.ndarray,
    codes: np.ndarray,
    generator: np.random.Generator,
    n_draws: int = 999,
) -> float:
    """Return the p of a permutation test that the groups cannot be read from X.

    Out-of-fold scores of chance are no sample of independent values: a pair of rows of two folds
    counts twice, each as a training row of the other, and with few columns the scores' variance
    depends on the very rows. So the groups are dealt to other patients (`shuffle_groups`), and read
    anew: by ridge regression, whose normal equations have one factor for all draws, and whose
    penalty is that of `LogisticHead` at its defaults. The statistic is the mean over groups of the
    out-of-fold AUROC.

    Drawing ends early once `_ENOUGH` draws were at least as high as the statistic (Besag and
    Clifford, Biometrika 78, 1991). p is exact where patients with equally many rows may exchange
    theirs.

    Parameters
    ----------
    X : float array of shape (n, d)
        Finite.
    groups, folds, codes : integer arrays of shape (n,)
        Groups from 0 to k - 1, folds, and patients from `patient_codes`.
    n_draws : int
        The most that are drawn; p is not below 1 / (n_draws + 1).
    """
    reader = _RidgeReader(X, folds)
    deal = _Dealer(groups, codes)
    [found] = reader.score(groups[:, None])
    if not np.isfinite(found):
        return nan
    n_high = n = 0
    size = max(1, min(_DRAWS_AT_ONCE, _DRAW_BYTES // (4 * len(groups))))
    while n < n_draws:
        some = min(size, n_draws - n)
        drawn = reader.score(np.stack([deal(generator) for _ in range(some)], axis=1))
        for is_high in drawn >= found - 1e-9:
            n, n_high = n + 1, n_high + int(is_high)
            if n_high == _ENOUGH:
                return n_high / n
    return (n_high + 1) / (n + 1)


class _RidgeReader:
    """Ridge regressions of groups on the standardised columns of X, without each of the folds."""

    def __init__(self, X: np.ndarray, folds: np.ndarray) -> None:
        self._X = X
        self._mean: Any = np.float32(0)
        self._scale: Any = np.float32(1)
        if X.shape[1] > len(X):
            self._X = _rotate(X)
        else:
            self._mean = X.mean(axis=0, dtype=np.float64).astype(np.float32)
            parts = _split(np.arange(len(X)))
            squares = [(self._take(own) ** 2).sum(axis=0) for own in parts]
            spread = np.sqrt(np.sum(squares, axis=0) / len(X))
            self._scale = np.where(spread > 0, spread, 1).astype(np.float32)
        self._rows = [np.flatnonzero(folds == k) for k in np.unique(folds)]
        grams = [self._gram(rows) for rows in self._rows]
        whole = np.sum(grams, axis=0) + _PENALTY * np.eye(self._X.shape[1])
        self._factors = [cho_factor(whole - own, overwrite_a=True) for own in grams]

    def score(self, groups: np.ndarray) -> np.ndarray:
        """Return the mean out-of-fold AUROC of each column of `groups`, (n, m): float64 (m,)."""
        k = int(groups.max(initial=0)) + 1
        which = [1] if k == 2 else range(k)
        found = np.stack([self._read(groups == own) for own in which])
        with np.errstate(invalid="ignore"):  # a draw may leave a group no pairs in any fold
            return np.asarray(np.nansum(found, axis=0) / np.isfinite(found).sum(axis=0))

    def _read(self, is_own: np.ndarray) -> np.ndarray:
        Y = is_own.astype(np.float32)
        products = [self._multiply(rows, Y) for rows in self._rows]
        whole, n_right, n_pairs = np.sum(products, axis=0), 0.0, 0.0
        for rows, product, factor in zip(self._rows, products, self._factors, strict=True):
            weights = cho_solve(factor, whole - product).astype(np.float32)
            values = np.concatenate([self._take(own) @ weights for own in _split(rows)])
            ranks, own = rankdata(values, axis=0), is_own[rows]
            n_own = own.sum(axis=0)
            n_right = n_right + (ranks * own).sum(axis=0) - n_own * (n_own + 1) / 2
            n_pairs = n_pairs + n_own * (len(rows) - n_own)
        with np.errstate(invalid="ignore"):
            return np.asarray(n_right / n_pairs)

    def _multiply(self, rows: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return the product of a fold's columns with answers about their mean over all folds."""
        centred = Y[rows] - Y.mean(axis=0)
        places = zip(_split(rows), _split(np.arange(len(rows))), strict=True)
        products = [self._take(own).T @ centred[at] for own, at in places]
        return np.asarray(np.sum(products, axis=0))

    def _gram(self, rows: np.ndarray) -> np.ndarray:
        found = np.zeros((self._X.shape[1],) * 2)
        for own in _split(rows):
            Z = self._take(own)
            found += Z.T @ Z
        return found

    def _take(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray((self._X[rows] - self._mean) / self._scale, np.float32)


def _split(rows: np.ndarray) -> list[np.ndarray]:
    return np.array_split(rows, max(1, -(-len(rows) // _BLOCK)))


def _rotate(X: np.ndarray) -> np.ndarray:
    """Return n columns in place of more, (n, n): standardised rows with the same products."""
    Z = X - X.mean(axis=0)
    scale = Z.std(axis=0)
    Z = Z / np.where(scale > 0, scale, 1)
    values, vectors = np.linalg.eigh((Z @ Z.T).astype(np.float64))
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0)), np.float32)


def _one_sided(value: float, p: float) -> float:
    """Return the p of a value above 0 from the two-sided p."""
    return p / 2 if value > 0 else 1 - p / 2


def score_loss(y: np.ndarray, full: PairScore, other: PairScore, codes: np.ndarray) -> Loss:
    """Return what is left of the label's score without a column, and what was lost.

    Parameters
    ----------
    y, codes : arrays of shape (n,)
        Labels 0 or 1, and patients from `patient_codes`.
    full, other : PairScore
        With the column, or with a control in its place, and without it; of the same rows.
    """
    fewest = min(len(np.unique(codes[y == label])) for label in (0, 1))
    lost = compare_influences(
        full.value - other.value, full.added - other.added, (y, codes), fewest
    )
    left = estimate_auroc(y, other.value, other.added, codes)
    return Loss(left, lost, _one_sided(lost.difference, lost.p))


def score_gap(
    y: np.ndarray,
    values: np.ndarray,
    groups: np.ndarray,
    names: Sequence[str],
    folds: np.ndarray,
    codes: np.ndarray,
    name_of_others: str,
) -> tuple[dict[str, Estimate], list[Gap]]:
    """Return the label's AUROC within each group, and the gaps between groups.

    Parameters
    ----------
    y, values, groups, folds, codes : arrays of shape (n,)
        Labels 0 or 1, out-of-fold scores, groups from 0, folds, and patients.
    names : sequence of str
        The name of each group.
    name_of_others : str
        See `unpaired.find_gaps`.
    """
    size = int(codes.max(initial=-1)) + 1

    def score(own: np.ndarray) -> dict[str, Estimate]:
        pairs = score_pairs(y[own], values[own], folds[own])
        return {"auroc": estimate_auroc(y[own], *pairs, codes[own], size)}

    inside = {name: score(groups == k) for k, name in enumerate(names)}
    many = len(names) > MOST_PAIRED
    others = {name: score(groups != k) for k, name in enumerate(names)} if many else {}
    gaps = find_gaps(inside, others, name_of_others, ("auroc",))
    return {name: own["auroc"] for name, own in inside.items()}, gaps


def largest_gap(gaps: Sequence[Gap]) -> Gap:
    """Return the gap with the smallest p after correction; if none was tested, the first."""
    tested = [gap for gap in gaps if gap.p_holm == gap.p_holm]
    return min(tested, key=lambda gap: (gap.p_holm, -abs(gap.found.difference)), default=gaps[0])


def subtract_group_means(X: np.ndarray, groups: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Return X without the least-squares prediction of X from the group.

    The prediction is the mean of the group's training rows, so that a fold's own rows have no part
    in it (cross-validated confound regression: Snoek, Miletić and Scholte, NeuroImage 184, 2019).

    Parameters
    ----------
    X : array of shape (n, d)
    groups : integer array of shape (n,)
        Groups from 0; one without a training row has the mean of all.
    train : integer array
        Indices of the training rows.
    """
    n_groups = int(groups.max(initial=-1)) + 1
    members = [train[groups[train] == k] for k in range(n_groups)]
    means = np.stack([X[own if len(own) else train].mean(axis=0) for own in members])
    return np.asarray(X - means[groups])


def shuffle_groups(
    groups: np.ndarray, codes: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Return the groups dealt to other patients, (n,): a column that knows nothing.

    Patients with equally many rows exchange theirs, so that groups stay as large, and as clustered
    in patients, as they are.
    """
    return _Dealer(groups, codes)(generator)


class _Dealer:
    """Deals groups to other patients, as often as it is called; see `shuffle_groups`."""

    def __init__(self, groups: np.ndarray, codes: np.ndarray) -> None:
        order = np.argsort(codes, kind="stable")
        _, start, size = np.unique(codes[order], return_index=True, return_counts=True)
        self._groups = groups
        self._alike = [order[start[size == n][:, None] + np.arange(n)] for n in np.unique(size)]

    def __call__(self, generator: np.random.Generator) -> np.ndarray:
        shuffled = self._groups.copy()
        for own in self._alike:
            shuffled[own] = self._groups[generator.permutation(own)]
        return shuffled
