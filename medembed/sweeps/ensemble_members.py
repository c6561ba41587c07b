"""The members of an ensemble: heads of several sweeps, on the images that all of them embedded.

Runs number patients and studies for themselves, so that rows are matched by the hash of the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medembed.core.errors import RunError
from medembed.core.text import counted
from medembed.evaluation.calibration import Calibration, fit_platt
from medembed.evaluation.scores import by_study
from medembed.evaluation.stacking import pool_weights
from medembed.heads.model_files import MAX_MEMBERS
from medembed.heads.packaging import Model, load_model
from medembed.heads.registry import BASELINES
from medembed.results.alignment import short_names
from medembed.results.model_card import Card, read_card, require_winner
from medembed.results.predictions import PRIORS
from medembed.results.run_schema import CV_METHOD
from medembed.results.runs import Run

__all__ = ["COLUMNS", "SHARED", "EnsembleRows", "Member", "Weighting", "read_rows"]

SHARED = ("manifest", "metric", "n_folds", "train_fraction")
"""What all runs have to ask alike; their folds are compared row by row."""
COLUMNS = ["sha256", "patient", "study", "region", "label", "split", "fold"]
"""Columns of the common images."""


@dataclass(frozen=True, eq=False)
class Member:
    """A head of a run, and its predictions of the common images.

    Attributes
    ----------
    name : str
        RUN:HEAD, by the shortest end of the run's path that tells the runs apart.
    probability : float64 (n,)
        Of every common image, or of every study in the order of codes if `per_study`.
    """

    name: str
    run: Run
    head: str
    model: Model
    card: Card
    per_study: bool
    probability: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Weighting:
    """How members become one score.

    Attributes
    ----------
    calibrations : tuple of Calibration
        Applied to each member's probabilities before averaging.
    weights : float64 (k,)
    """

    calibrations: tuple[Calibration, ...]
    weights: NDArray[np.float64]


class EnsembleRows:
    """The images that all runs embedded, and the members' predictions of them.

    Parameters
    ----------
    images : DataFrame
        `COLUMNS`, by the first run's codes.
    members : sequence of Member

    Attributes
    ----------
    codes : int64 (n,)
        The study of each image, numbered from 0 in the order of the run's codes.
    studies : DataFrame
        A row per study, in the order of codes.
    is_trained, folds, y : bool, int64 and int8 (m,)
        Of each study: whether it is in a fold, in which (-1: none), and its label.
    """

    def __init__(self, images: pd.DataFrame, members: Sequence[Member]) -> None:
        self.images, self.members = images, members
        self.codes = np.unique(images["study"].to_numpy(np.int64), return_inverse=True)[1]
        self.studies = by_study(images.assign(probability=0.5))
        self.is_trained = (self.studies["fold"].notna() & self.studies["label"].notna()).to_numpy()
        self.folds = self.studies["fold"].fillna(-1).to_numpy(np.int64)
        self.y = self.studies["label"].fillna(0).to_numpy(np.int8)

    def fit(self, rows: NDArray[Any], *, equal: bool) -> Weighting:
        """Fit the pool on some studies; with `equal` all members have the same weight."""
        y, k = self.y[rows], len(self.members)
        plain = [self._by_study(member, member.probability) for member in self.members]
        calibrations = tuple(fit_platt(own[rows], y) for own in plain)
        if equal:
            return Weighting(calibrations, np.full(k, 1 / k))
        calibrated = np.column_stack(self._calibrate(calibrations))
        return Weighting(calibrations, pool_weights(calibrated[rows], y))

    def predict(self, pool: Weighting, *, per_study: bool) -> NDArray[np.float64]:
        """Return the pooled probability of each study, or of each image."""
        columns = (
            self._calibrate(pool.calibrations)
            if per_study
            else [
                calibration.apply(member.probability)
                for calibration, member in zip(pool.calibrations, self.members, strict=True)
            ]
        )
        return np.asarray(np.clip(np.column_stack(columns) @ pool.weights, 0, 1))

    def _calibrate(self, calibrations: Sequence[Calibration]) -> list[NDArray[np.float64]]:
        """Return each member's calibrated probabilities of studies; views are averaged after."""
        return [
            self._by_study(member, calibration.apply(member.probability))
            for calibration, member in zip(calibrations, self.members, strict=True)
        ]

    def _by_study(self, member: Member, found: NDArray[np.float64]) -> NDArray[np.float64]:
        if member.per_study:
            return found
        return np.asarray(np.bincount(self.codes, found) / np.bincount(self.codes))


def read_rows(runs: Sequence[Run], heads: Sequence[str] | None) -> EnsembleRows:
    """Return the members of complete sweeps with equal folds; see `ensembles.ensemble`.

    Raises
    ------
    RunError, ModelError
        A run or a model does not belong to the others.
    """
    names = short_names(runs)
    for run, name in zip(runs, names, strict=True):
        _check_run(run, name, runs[0], names[0])
    tables = [run.predictions() for run in runs]
    keyed = [_key_images(table, name) for table, name in zip(tables, names, strict=True)]
    common = keyed[0].index
    for own in keyed[1:]:
        common = common[common.isin(own.index)]
    keyed = [own.loc[common] for own in keyed]
    for own, name in zip(keyed[1:], names[1:], strict=True):
        _require_same_folds(keyed[0], own, names[0], name)
    images = keyed[0].reset_index(drop=True)
    members = [
        member
        for run, name, table, own in zip(runs, names, tables, keyed, strict=True)
        for member in _read_members(run, name, table, own, images, heads)
    ]
    unknown = sorted(set(heads or ()) - {member.head for member in members})
    if unknown:
        raise RunError(f"no run has a model of the head {unknown[0]!r}. Leave it out of --heads.")
    if not 2 <= len(members) <= MAX_MEMBERS:
        raise RunError(
            f"an ensemble has 2 to {MAX_MEMBERS} members, and the runs hold "
            f"{counted(len(members), 'head')}. Name other runs, or choose with --heads."
        )
    return EnsembleRows(images, members)


def _check_run(run: Run, name: str, first: Run, first_name: str) -> None:
    """Refuse a run without out-of-fold predictions, or of another question than the first."""
    run.require_complete()
    info = run.info
    if info.kind != "sweep":
        raise RunError(
            f"run {name} is of kind {info.kind}, and only sweeps have out-of-fold predictions "
            "of every training study. Name runs of `medembed sweep`."
        )
    if info.cv_method != CV_METHOD:
        raise RunError(
            f"run {name} is from an older medembed, whose out-of-fold predictions were used to "
            "choose its heads. Sweep again into another --out."
        )
    for key in SHARED:
        ours, theirs = getattr(first.info.asked, key), getattr(info.asked, key)
        if ours != theirs:
            raise RunError(
                f"run {name} has another {key} than {first_name}: {_short(theirs)} and "
                f"{_short(ours)}. Sweep the caches over one manifest, with the same options."
            )


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 20 else str(value)


def _key_images(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return a run's images, by a key that is valid in all runs, with the priors' predictions."""
    first, *others = PRIORS
    rows = table[table["head"] == first]
    if rows.empty:
        raise RunError(f"predictions of the run {name} lack the {first}. Sweep again.")
    rows = rows[COLUMNS].assign(**{first: rows["probability"]})
    for other in others:
        rows[other] = table.loc[table["head"] == other, "probability"].to_numpy()
    copies = rows.groupby("sha256").cumcount().astype(str)
    return rows.set_index(pd.Index(rows["sha256"] + "#" + copies))


def _require_same_folds(ours: pd.DataFrame, theirs: pd.DataFrame, first: str, run: str) -> None:
    """Refuse runs whose folds, labels or studies differ."""
    codes = [pd.factorize(own["study"])[0] for own in (ours, theirs)]  # numbered within a run
    compared = {
        "studies": tuple(map(pd.Series, codes)),
        "labels": (ours["label"].fillna(-1), theirs["label"].fillna(-1)),
        "folds": (ours["fold"].fillna(-1), theirs["fold"].fillna(-1)),
    }
    for what, (own, other) in compared.items():
        n = int((own.to_numpy() != other.to_numpy()).sum())
        if n:
            raise RunError(
                f"run {run} has other {what} than {first} for {n} of {len(ours)} images: the "
                "members would have seen the studies that they are weighed on. Sweep both with "
                "one manifest, --seed, --folds and --train-fraction."
            )
    if not len(ours):
        raise RunError(f"runs {first} and {run} have no image in common.")


def _read_members(
    run: Run,
    name: str,
    table: pd.DataFrame,
    own: pd.DataFrame,
    images: pd.DataFrame,
    heads: Sequence[str] | None,
) -> list[Member]:
    """Return a run's members, in the order of its leaderboard."""
    members = []
    for entry in run.info.leaderboard:
        head = entry.head
        is_wanted = head not in BASELINES if heads is None else head in heads
        if entry.trial is None or not is_wanted:
            continue
        path = run.model_path(head)
        model = load_model(path)
        require_winner(run, head, model.card)
        card = read_card(model, path)
        rows = table[table["head"] == head]
        per_study = card.views == "attention"
        probability = _align(rows, own, images, per_study=per_study)
        if np.isnan(probability).any():
            raise RunError(f"predictions of the run {name} lack rows of {head}. Sweep again.")
        members.append(Member(f"{name}:{head}", run, head, model, card, per_study, probability))
    return members


def _align(
    rows: pd.DataFrame, own: pd.DataFrame, images: pd.DataFrame, *, per_study: bool
) -> NDArray[np.float64]:
    """Return a head's predictions of the common images, or of their studies by the first's code."""
    if per_study:
        by_code = rows.set_index("study")["probability"]
        pairs = pd.DataFrame({"ours": images["study"].to_numpy(), "own": own["study"].to_numpy()})
        first = pairs.drop_duplicates("ours").sort_values("ours")
        return by_code.reindex(first["own"]).to_numpy(np.float64)
    copies = rows.groupby("sha256").cumcount().astype(str)
    by_key = rows.set_index(pd.Index(rows["sha256"] + "#" + copies))["probability"]
    return by_key.reindex(own.index).to_numpy(np.float64)
