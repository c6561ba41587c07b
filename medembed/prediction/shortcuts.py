"""What else an embedding tells, and whether the label's score lives on it.

For each column of a manifest, on the labelled images of train and out of fold throughout:

- encoded: the macro AUROC of logistic regressions that read each group of the column from the
  embedding;
- used: the AUROC of the label that is lost when the groups' means are subtracted from the embedding
  before training, in excess of what is lost with groups dealt at random to the patients; and when
  only images of one group are compared with each other;
- gap: the difference of the label's AUROC between groups.

Beside them stands the label's AUROC by the column alone: the share of abnormal images in a group;
and that of three classifiers: on the embedding, on all of the columns, and on the statistics of the
films (`images.statistics`).

Test images are not looked at. p is one-sided for `encoded` and `used`, two-sided for `gap`; Holm's
correction runs over the columns of each question.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import clone

from medembed.cache.embeddings import load_embeddings, load_statistics, patient_folds
from medembed.cache.store import Cache, open_cache
from medembed.core.errors import ArgumentError, ManifestError, TrainingDataError
from medembed.core.poolings import IMAGE_STATISTICS
from medembed.core.text import Summarised, Summary, counted
from medembed.dataset.covariate_bands import (
    OTHERS,
    choose_grouping,
    group_rows,
)
from medembed.dataset.covariates import fit_covariates
from medembed.dataset.manifest import Manifest, read_manifest
from medembed.dataset.targets import is_target
from medembed.evaluation.bootstrap import finite_or_none, patient_codes
from medembed.evaluation.estimates import Estimate, estimate_auroc
from medembed.evaluation.paired import holm
from medembed.evaluation.shortcuts import (
    Encoded,
    Loss,
    PairScore,
    average_pairs,
    join_strata,
    largest_gap,
    permutation_p,
    score_encoded,
    score_gap,
    score_loss,
    score_pairs,
    shuffle_groups,
    subtract_group_means,
)
from medembed.evaluation.unpaired import Gap
from medembed.heads.baselines import RegionPrior
from medembed.heads.linear import LogisticHead

__all__ = [
    "MIN_GROUP_PATIENTS",
    "AuditRows",
    "AuditedColumn",
    "AuditedGroup",
    "ShortcutAudit",
    "audit_shortcuts",
]

MIN_GROUP_PATIENTS = 10
"""Images of groups with fewer patients are left out: a fold would have too few to learn from."""
MOST_IMAGES = 100_000
"""Of more labelled images of train, patients are drawn at random."""
N_CONTROLS = 5
"""Shuffled columns that are taken out as a control: any column takes some signal along."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class AuditedGroup:
    """A group of a column: images, abnormal ones, patients, and the label's AUROC within it."""

    name: str
    n: int
    n_abnormal: int
    n_patients: int
    auroc: Estimate | None = None

    def as_dict(self) -> dict[str, object]:
        """Return JSON values."""
        own = None if self.auroc is None else self.auroc.interval().as_dict()
        counts = {"n": self.n, "n_abnormal": self.n_abnormal, "n_patients": self.n_patients}
        return {"name": self.name, **counts, "auroc": own}


@dataclass(frozen=True)
class AuditedColumn:
    """What was found for a column.

    Attributes
    ----------
    groups : list of AuditedGroup
    n_left_out : int
        Images without a known value, outside of the bands, or in too small a group.
    reason : str, optional
        Why nothing could be estimated; the others are then None.
    score : Estimate, optional
        The label's AUROC on the images of these groups.
    alone : Estimate, optional
        The label's AUROC by the share of abnormal images in the groups, without any image.
    encoded : Encoded, optional
    residualised, matched : Loss, optional
        The label's AUROC without the groups' means, and within the groups.
    control : Estimate, optional
        The label's AUROC without the means of shuffled groups, from which `residualised` is lost.
    gap : Gap, optional
        The gap with the smallest p, which is corrected for the number of gaps.
    p_holm : dict of str to float
        Of "encoded", "used" and "gap", over all columns; NaN if not tested.
    """

    groups: list[AuditedGroup]
    n_left_out: int
    reason: str | None = None
    score: Estimate | None = None
    alone: Estimate | None = None
    encoded: Encoded | None = None
    control: Estimate | None = None
    residualised: Loss | None = None
    matched: Loss | None = None
    gap: Gap | None = None
    p_holm: dict[str, float] = field(default_factory=dict)

    @property
    def p(self) -> dict[str, float]:
        """The p of each question before correction over columns; NaN if not tested."""
        if self.encoded is None or self.residualised is None or self.gap is None:
            return {"encoded": nan, "used": nan, "gap": nan}
        used, gap = self.residualised.p, self.gap.p_holm
        return {"encoded": self.encoded.p, "used": used, "gap": gap}

    def as_dict(self) -> dict[str, object]:
        """Return `encoded`, `used` and `gap`, each None if not estimable, and the groups."""
        found: dict[str, Any] = {
            "groups": [group.as_dict() for group in self.groups],
            "left_out": self.n_left_out,
            "reason": self.reason,
            "alone": None,
            "encoded": None,
            "used": None,
            "gap": None,
        }
        if self.encoded is None or self.gap is None or self.score is None:
            return found
        assert self.residualised is not None
        assert self.matched is not None
        assert self.control is not None
        assert self.alone is not None
        p = {name: {"p_holm": finite_or_none(value)} for name, value in self.p_holm.items()}
        lost = {**_difference(self.residualised), "p": finite_or_none(self.residualised.p)}
        own = self.gap.found.as_dict()
        gap = {"a": self.gap.a, "b": self.gap.b, **own, "p": finite_or_none(self.gap.p_holm)}
        return found | {
            "alone": self.alone.interval().as_dict(),
            "encoded": {**self.encoded.as_dict(), **p["encoded"]},
            "used": {
                "score": self.score.interval().as_dict(),
                "residualised": {
                    **_left(self.residualised),
                    "control": self.control.interval().as_dict(),
                    "lost": {**lost, **p["used"]},
                },
                "matched": {**_left(self.matched), "lost": _difference(self.matched)},
            },
            "gap": {**gap, **p["gap"], "reason": self.gap.reason},
        }


@dataclass(frozen=True, repr=False)
class ShortcutAudit(Summarised):
    """What the columns of a manifest have to do with an embedding and its label.

    Attributes
    ----------
    columns : dict of str to AuditedColumn
        In the order asked for.
    pooling : str
    n_folds, seed : int
        The folds, which are those of a sweep with this seed.
    n, n_patients : int
        Labelled images of train that were used, and their patients; see `MOST_IMAGES`.
    baselines : dict of str to Estimate
        The label's AUROC by `embedding`, by the columns alone (`metadata`), and by brightness,
        size, sharpness and border of the films (`imagestats`).
    lacking : dict of str to str
        Those of them that cannot be had, and why.
    """

    columns: dict[str, AuditedColumn]
    pooling: str
    n_folds: int
    seed: int
    n: int
    n_patients: int
    baselines: dict[str, Estimate]
    lacking: dict[str, str]

    def as_dict(self) -> dict[str, object]:
        """Return JSON values."""
        return {
            "pooling": self.pooling,
            "folds": self.n_folds,
            "seed": self.seed,
            "images": self.n,
            "patients": self.n_patients,
            "baselines": {name: own.interval().as_dict() for name, own in self.baselines.items()},
            "lacking": dict(self.lacking),
            "columns": {name: own.as_dict() for name, own in self.columns.items()},
        }

    def summarise(self) -> Summary:
        """Return the three numbers of each column in a line."""
        return Summary(
            f"Shortcuts: {self.pooling}, {counted(self.n, 'image')} of train",
            {name: _describe(own) for name, own in self.columns.items()},
        )


def audit_shortcuts(
    cache: Cache | str | os.PathLike[str],
    manifest: Manifest | str | Path,
    columns: Sequence[str],
    *,
    pool: str | None = None,
    n_folds: int = 5,
    seed: int = 0,
    image_root: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> ShortcutAudit:
    """Return what columns of a manifest have to do with its embeddings and its label.

    Parameters
    ----------
    cache, manifest : Cache, Manifest or path
    columns : sequence of str
        Covariates of the manifest, or `region`; ``COLUMN:BANDS`` groups numbers, such as
        ``age:0-18-60-100``. More than 12 different numbers without bands are split at their median.
    pool : str, optional
        Poolings to read, joined by `+`; see `load_embeddings`.
    n_folds, seed : int
        The folds are those of a sweep: patient-disjoint, from the manifest and the seed.
    image_root : path, optional
        Directory, or bucket's prefix, that the manifest's paths are relative to: films are
        measured there if the cache does not hold the pooling `imagestats`.
    progress : callable, optional
        Called as progress(done, total) with columns.

    Raises
    ------
    ArgumentError
        No column is named, or one is named twice, or there are fewer than 2 folds.
    ManifestError
        A column is not a covariate, may identify patients, or cannot be grouped.
    TrainingDataError
        Train has one class, or fewer patients than the folds need.
    MissingRowsError
        Rows are neither embedded nor listed as failed.
    ImageError
        A film below `image_root` is missing, holds other bytes or is no complete image.
    """
    if not columns:
        raise ArgumentError("name at least one column of the manifest to audit.")
    if n_folds < 2:
        raise ArgumentError(f"cross-validation needs at least 2 folds, not {n_folds}.")
    known = read_manifest(manifest)
    of_train = known.rows[(known.rows["split"] == "train") & known.rows["label"].notna()]
    grouped = {}
    for asked in columns:
        name, groups = _group(of_train, asked)
        if name in grouped:
            raise ArgumentError(f"column {name} is named twice. Name each column once.")
        grouped[name] = groups
    opened = open_cache(cache)
    films, lacking = _measure_films(opened, known, image_root)
    embeddings = load_embeddings(opened, known, pool=pool, split="train")
    fold = np.full(len(embeddings), -1)
    for k, (_, own) in enumerate(patient_folds(embeddings, n_folds, seed)):
        fold[own] = k
    used = np.flatnonzero(fold >= 0)
    used = used[_draw_patients(embeddings.patients[used], seed)]
    rows = embeddings.rows.iloc[used]
    data = AuditRows(
        embeddings.X[used],
        embeddings.y[used],
        fold[used],
        patient_codes(embeddings.patients[used]),
        seed,
    )
    found = {}
    for done, (name, (names, order)) in enumerate(grouped.items()):
        if progress is not None:
            progress(done, len(grouped))
        of_rows = names.reindex(rows["image"]).to_numpy(object)
        found[name] = data.audit(of_rows, order)
    if progress is not None:
        progress(len(grouped), len(grouped))
    others = {} if films is None else {IMAGE_STATISTICS: films.loc[rows["sha256"]].to_numpy()}
    try:
        others["metadata"] = fit_covariates(rows, list(grouped)).transform(rows)
    except TrainingDataError as error:
        lacking["metadata"] = str(error)
    return ShortcutAudit(
        _correct(found),
        embeddings.pooling,
        n_folds,
        seed,
        len(used),
        len(np.unique(data.codes)),
        data.score_baselines(dict(sorted(others.items(), reverse=True))),
        lacking,
    )


def _draw_patients(patients: np.ndarray, seed: int) -> np.ndarray:
    """Return the indices of all images, or of `MOST_IMAGES` at most, of patients drawn at random.

    Beyond them intervals are narrower than the third decimal, and classifiers take minutes.
    """
    if len(patients) <= MOST_IMAGES:
        return np.arange(len(patients))
    codes = patient_codes(patients)
    order = np.random.default_rng(seed).permutation(codes.max() + 1)
    n_before = np.cumsum(np.bincount(codes)[order])
    return np.flatnonzero(np.isin(codes, order[n_before <= MOST_IMAGES]))


def _measure_films(
    cache: Cache, manifest: Manifest, image_root: str | os.PathLike[str] | None
) -> tuple[pd.DataFrame | None, dict[str, str]]:
    """Return the statistics of the films of train by SHA-256, or why there are none."""
    if image_root is None and IMAGE_STATISTICS not in cache.spec.poolings:
        way_out = f"Add --image-root DIR, or extract with --pool mean,max,{IMAGE_STATISTICS}"
        return None, {IMAGE_STATISTICS: f"the cache does not hold {IMAGE_STATISTICS}. {way_out}"}
    of_train = manifest.rows[manifest.rows["split"] == "train"].reset_index(drop=True)
    found = load_statistics(cache, Manifest(of_train, manifest.label_level), image_root)
    table = pd.DataFrame(found.X, index=found.rows["sha256"])
    return table[~table.index.duplicated()], {}


def _group(rows: pd.DataFrame, asked: str) -> tuple[str, tuple["pd.Series[str]", list[str]]]:
    """Return a column's name, and the group of each row by its image with the order of groups."""
    column = asked.partition(":")[0]
    if is_target(column):
        raise ManifestError(
            f"{column} is a target, not a covariate. Copy it into a column of another name to "
            "audit it."
        )
    covariates = rows[[name for name in rows.columns if not is_target(name)]]
    grouping = choose_grouping(covariates, asked)
    names, order = group_rows(covariates, grouping)
    return grouping.column, (names.set_axis(rows["image"]), order)


@dataclass
class AuditRows:
    """The labelled images of train.

    Attributes
    ----------
    X : float array of shape (n, d)
    y, fold, codes : integer arrays of shape (n,)
        Labels 0 and 1, folds from 0, and patients from `patient_codes`.
    seed : int
        Of the shuffled groups.
    """

    X: np.ndarray
    y: np.ndarray
    fold: np.ndarray
    codes: np.ndarray
    seed: int = 0
    _scores: np.ndarray | None = field(default=None, init=False, repr=False)

    def audit(self, names: np.ndarray, order: Sequence[str]) -> AuditedColumn:
        """Return what a column tells: `names` (n,) are the rows' groups, `order` all of them."""
        groups = [self._count(name, names == name) for name in order]
        groups = [group for group in groups if group.n]
        large = [group.name for group in groups if group.n_patients >= MIN_GROUP_PATIENTS]
        kept = np.isin(names, large)
        n_left_out = int((~kept).sum())
        if len(large) < 2:
            told = f"it needs two groups of at least {MIN_GROUP_PATIENTS} patients"
            return AuditedColumn(groups, n_left_out, f"{told}, and has {len(large)}")
        own = self if kept.all() else self._take(kept)
        code = pd.Index(large).get_indexer(pd.Index(names[kept]))
        lacking = own._find_lacking(code, large)
        if lacking is not None:
            return AuditedColumn(groups, n_left_out, lacking)
        return own._measure(code, [g for g in groups if g.name in large], n_left_out)

    def _take(self, kept: np.ndarray) -> "AuditRows":
        return AuditRows(self.X[kept], self.y[kept], self.fold[kept], self.codes[kept], self.seed)

    def _count(self, name: str, own: np.ndarray) -> AuditedGroup:
        n_patients = len(np.unique(self.codes[own]))
        return AuditedGroup(name, int(own.sum()), int(self.y[own].sum()), n_patients)

    def _find_lacking(self, groups: np.ndarray, names: Sequence[str]) -> str | None:
        """Return what the training rows of a fold lack, or None."""
        for k in np.unique(self.fold):
            rest = self.fold != k
            if len(np.unique(self.y[rest])) < 2:
                return f"without fold {k + 1}, the images with a known value have one class"
            for i, name in enumerate(names):
                if not (groups[rest] == i).any():
                    return f"{name} is in one fold only"
        return None

    def _measure(
        self, groups: np.ndarray, found: list[AuditedGroup], n_left_out: int
    ) -> AuditedColumn:
        full = score_pairs(self.y, self._scored, self.fold)
        which = [1] if len(found) == 2 else range(len(found))
        read = np.stack([self._predict((groups == k).astype(np.int8)) for k in which], axis=1)
        without, control = self._remove(groups), self._remove_shuffled(groups)
        within = score_pairs(self.y, self._scored, join_strata(self.fold, groups))
        names = [group.name for group in found]
        inside, gaps = score_gap(self.y, self._scored, groups, names, self.fold, self.codes, OTHERS)
        return AuditedColumn(
            [AuditedGroup(g.name, g.n, g.n_abnormal, g.n_patients, inside[g.name]) for g in found],
            n_left_out,
            score=estimate_auroc(self.y, *full, self.codes),
            alone=estimate_auroc(self.y, *self._score_alone(groups), self.codes),
            encoded=Encoded(
                score_encoded(groups, read, self.fold, self.codes), self._test_encoded(groups)
            ),
            control=estimate_auroc(self.y, *control, self.codes),
            residualised=self._lose(control, without),
            matched=self._lose(full, within),
            gap=largest_gap(gaps),
        )

    def score_baselines(self, others: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
        """Return the label's AUROC by the embedding, and by a few other columns, (n, k) each."""
        found = {"embedding": self._scored}
        for name, X in others.items():
            own = replace(self, X=X)
            found[name] = own._predict(self.y, head=LogisticHead(C=1.0))
        return {
            name: estimate_auroc(self.y, *score_pairs(self.y, own, self.fold), self.codes)
            for name, own in found.items()
        }

    @property
    def _scored(self) -> np.ndarray:
        """Out-of-fold probabilities of the label, shared by all columns that leave out no row."""
        if self._scores is None:
            self._scores = self._predict(self.y)
        return self._scores

    def _score_alone(self, groups: np.ndarray) -> PairScore:
        scores = np.empty(len(self.y))
        for k in np.unique(self.fold):
            rest, own = self.fold != k, self.fold == k
            prior = RegionPrior().fit(groups[rest], self.y[rest])
            scores[own] = prior.predict_proba(groups[own])[:, 1]
        return score_pairs(self.y, scores, self.fold)

    def _test_encoded(self, groups: np.ndarray) -> float:
        generator = np.random.default_rng(self.seed)
        return permutation_p(self.X, groups, self.fold, self.codes, generator)

    def _remove(self, groups: np.ndarray) -> PairScore:
        return score_pairs(self.y, self._predict(self.y, groups), self.fold)

    def _remove_shuffled(self, groups: np.ndarray) -> PairScore:
        generator = np.random.default_rng(self.seed)
        shuffled = [shuffle_groups(groups, self.codes, generator) for _ in range(N_CONTROLS)]
        return average_pairs([self._remove(own) for own in shuffled])

    def _lose(self, full: PairScore, other: PairScore) -> Loss:
        return score_loss(self.y, full, other, self.codes)

    def _predict(
        self, y: np.ndarray, groups: np.ndarray | None = None, head: LogisticHead | None = None
    ) -> np.ndarray:
        """Return out-of-fold probabilities of y, float64 (n,); without `groups`' means if given."""
        head, scores = head or LogisticHead(), np.empty(len(y))
        for k in np.unique(self.fold):
            train, own = np.flatnonzero(self.fold != k), np.flatnonzero(self.fold == k)
            X = self.X if groups is None else subtract_group_means(self.X, groups, train)
            scores[own] = clone(head).fit(X[train], y[train]).predict_proba(X[own])[:, 1]
        return scores


def _correct(found: dict[str, AuditedColumn]) -> dict[str, AuditedColumn]:
    """Return the columns with their p after Holm's correction over columns, per question."""
    adjusted = {
        name: holm([own.p[name] for own in found.values()]) for name in ("encoded", "used", "gap")
    }
    return {
        column: replace(own, p_holm={name: float(p[i]) for name, p in adjusted.items()})
        for i, (column, own) in enumerate(found.items())
    }


def _difference(loss: Loss) -> dict[str, Any]:
    found = loss.lost.as_dict()
    del found["p"]  # its own is one-sided
    return found


def _left(loss: Loss) -> dict[str, Any]:
    return {"score": loss.left.interval().as_dict()}


def _describe(own: AuditedColumn) -> str:
    if own.encoded is None or own.residualised is None or own.gap is None:
        return f"not estimable: {own.reason}"
    return (
        f"encoded {own.encoded.estimate.value:.3f}, lost {own.residualised.lost.difference:+.3f}, "
        f"gap {own.gap.found.difference:+.3f} ({own.gap.a} − {own.gap.b})"
    )
