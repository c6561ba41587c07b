"""Divide patients between training and test and between folds, and draw a fraction of them.

All rows of a patient stay together, however the patient is spelt (see `identities`). Studies are
balanced by label and region. The result depends only on the rows and the seed, never on the order
of the rows: patients are assigned by descending number of studies, in the order of a keyed hash
among equals, each to the part that brings all parts nearest to their targets. scikit-learn's
StratifiedGroupKFold draws such folds of equal size, but its result depends on the order of the
rows, and it warns of every rare stratum.

If a dataset has no patient ids, `name_runs` and `join_same_bytes` make stand-ins for them.
"""

import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medembed.core.errors import RecipeError, TrainingDataError
from medembed.dataset.identities import name_persons

__all__ = [
    "TrainFolds",
    "draw_folds",
    "draw_fraction",
    "draw_inner",
    "draw_target_folds",
    "draw_train_folds",
    "fold_train_rows",
    "join_same_bytes",
    "name_runs",
    "require_both_classes",
    "split_patients",
]


def name_runs(names: "pd.Series[str]", states: pd.DataFrame, *, max_gap: int) -> "pd.Series[str]":
    """Return groups of images with consecutive numbers, which often show one person.

    Parameters
    ----------
    names : pandas.Series of str, (n,)
        File names or stems. An image's number is the last run of digits in its stem, and images are
        neighbours only if the text before the number is equal.
    states : pandas.DataFrame, (n, k)
        A change of any column between neighbours ends a run.
    max_gap : int
        Largest difference between neighbouring numbers of one run.

    Returns
    -------
    pandas.Series of str, (n,)
        The stem of the run's first image, on the index of `names`. An image without a number forms
        a group of its own.
    """
    stems = names.str.replace(r"\.[^./]*$", "", regex=True)
    parts = stems.str.extract(r"^(?P<prefix>.*?)(?P<number>\d+)(?P<rest>\D*)$")
    keys = parts.assign(stem=stems)
    keys["number"] = pd.to_numeric(keys["number"]).astype("float64")
    state = states.astype(str).agg("\x00".join, axis=1) if len(states.columns) else ""
    ordered = keys.assign(state=state).sort_values(["prefix", "number", "rest", "stem"])
    near = ordered["number"].diff().le(max_gap)  # false without a number
    same = ordered[["prefix", "state"]].eq(ordered[["prefix", "state"]].shift()).all(axis=1)
    first = ordered["stem"].where(~(near & same)).ffill()
    return first.reindex(names.index)


def join_same_bytes(groups: "pd.Series[str]", sha256: "pd.Series[str]") -> "pd.Series[str]":
    """Return groups, joined if they share images with equal bytes.

    Returns
    -------
    pandas.Series of str
        On the index of `groups`; joined groups take the name that sorts first among them.
    """
    parent = {name: name for name in groups}

    def find(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    same = sha256[sha256 != ""]
    same = same[same.duplicated(keep=False)]
    for _, members in groups[same.index].groupby(same):
        roots = sorted({find(name) for name in members})
        for root in roots[1:]:
            parent[root] = roots[0]
    return groups.map(find)


UNKNOWN = -1


def split_patients(rows: pd.DataFrame, *, fraction: float, seed: int = 0) -> np.ndarray:
    """Draw a test set of patients, stratified by label and region.

    Parameters
    ----------
    rows : pandas.DataFrame
        Columns `patient`, `study`, `region`, `label` (0, 1, or missing for unknown).
    fraction : float
        Share of studies in `test`, between 0 and 1, both excluded.
    seed : int

    Returns
    -------
    numpy.ndarray of str, (n_rows,)
        "train" or "test" for each row.

    Raises
    ------
    RecipeError
        `fraction` is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise RecipeError(f"split fraction is {fraction}; it must lie between 0 and 1.")
    part = _divide(_patients(rows), np.array([1 - fraction, fraction]), seed)
    return np.where(name_persons(rows).map(part).to_numpy() == 1, "test", "train")


def draw_folds(rows: pd.DataFrame, *, n_folds: int, seed: int = 0) -> np.ndarray:
    """Draw folds of patients, stratified by the studies' label and region.

    Parameters
    ----------
    rows : pandas.DataFrame
        Columns `patient`, `study`, `region`, `label` (0, 1, or missing for unknown). A study's
        label is the highest among its views.
    n_folds : int
        At least 2.
    seed : int

    Returns
    -------
    numpy.ndarray of int64, (n_rows,)
        The fold of each row, 0 to `n_folds` - 1.

    Raises
    ------
    TrainingDataError
        There are fewer patients than folds, only one class, or a class with fewer patients than
        folds, or a fold would hold one class.
    """
    if n_folds < 2:
        raise TrainingDataError(
            f"{n_folds} folds were asked for; cross-validation needs 2 or more."
        )
    patients = _patients(rows)
    _refuse_too_few(patients, n_folds)
    fold = _divide(patients, np.full(n_folds, 1 / n_folds), seed)
    _refuse_one_class(patients, fold, n_folds)
    return name_persons(rows).map(fold).to_numpy(dtype=np.int64)


def draw_fraction(
    rows: pd.DataFrame, folds: np.ndarray, *, fraction: float, seed: int = 0
) -> np.ndarray:
    """Draw a fraction of the patients of each fold; smaller fractions are subsets of larger ones.

    Patients with normal studies, with abnormal ones, and with both are drawn separately, at least
    one of each kind that a fold has, so that a fold keeps its classes.

    Parameters
    ----------
    rows : pandas.DataFrame
        The rows that `draw_folds` got.
    folds : numpy.ndarray of int, (n_rows,)
        The fold of each row, from `draw_folds`.
    fraction : float
        Share of the patients to keep, above 0; 1 keeps all.
    seed : int

    Returns
    -------
    numpy.ndarray of bool, (n_rows,)
        Whether a row's patient is kept.

    Raises
    ------
    TrainingDataError
        `fraction` is not above 0 and at most 1, or a patient is in two folds.
    """
    if not 0 < fraction <= 1:
        raise TrainingDataError(
            f"--train-fraction is {fraction}; it must be above 0 and at most 1, which keeps all."
        )
    names = name_persons(rows)
    fold = pd.Series(folds, index=names).groupby(level=0, sort=True).agg(["min", "max"])
    n_torn = int((fold["min"] != fold["max"]).sum())
    if n_torn:
        raise TrainingDataError(
            f"{n_torn} patients are in two folds. Draw the folds of these rows again."
        )
    if fraction == 1:
        return np.ones(len(rows), bool)
    fold_of = fold["min"].to_dict()
    strata: dict[tuple[int, frozenset[int]], list[str]] = {}
    for patient in _patients(rows):
        key = (fold_of[patient.name], frozenset(patient.labels))
        strata.setdefault(key, []).append(patient.name)
    kept: set[str] = set()
    for members in strata.values():
        members.sort(key=lambda name: _draw(seed, f"fraction|{name}"))
        n_kept = max(1, math.ceil(round(fraction * len(members), 9)))  # 0.07 of 100 is 7, not 8
        kept.update(members[:n_kept])
    return names.isin(kept).to_numpy(dtype=bool)


def draw_inner(rows: pd.DataFrame, folds: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Draw, for each fold, one of `n_folds` parts of the patients of all other folds.

    Decisions based on this part (when to stop, what to retire, what to choose) do not use the fold
    that is scored. The parts are stratified like the folds.

    Parameters
    ----------
    rows : pandas.DataFrame
        The rows that `draw_folds` got.
    folds : numpy.ndarray of int, (n_rows,)
        The fold of each row, from 0.
    seed : int

    Returns
    -------
    numpy.ndarray of bool, (n_folds, n_rows)
        Whether a row is in a fold's part; False for the fold's own rows.

    Raises
    ------
    TrainingDataError
        Either part would hold one class.
    """
    n_folds = int(folds.max()) + 1
    names, known = name_persons(rows), _patients(rows)
    fold_of = dict(zip(names, folds.tolist(), strict=True))
    inner = np.zeros((n_folds, len(rows)), bool)
    shares = np.array([1 - 1 / n_folds, 1 / n_folds])
    for fold, flags in enumerate(inner):
        patients = [patient for patient in known if fold_of[patient.name] != fold]
        part = _divide(patients, shares, f"{seed}|inner|{fold}")
        for number in (0, 1):
            own = (patient.labels for patient in patients if part[patient.name] == number)
            if len(set().union(*own)) < 2:
                raise TrainingDataError(
                    f"without fold {fold}, too few patients of one class are left to train on and "
                    "to stop by: both need one of each. Add patients, or ask for more --folds."
                )
        flags[:] = names.map(part).to_numpy() == 1
    return inner


def fold_train_rows(
    rows: pd.DataFrame, *, n_folds: int, fraction: float = 1.0, seed: int = 0
) -> "pd.Series[Any]":
    """Draw folds over all labelled train rows of a manifest.

    Rows whose images cannot be read are included, so that folds depend only on the manifest and the
    seed.

    Parameters
    ----------
    rows : pandas.DataFrame
        All rows of the manifest.
    fraction : float
        Share of the patients, see `draw_fraction`; the rows of other patients are left out.

    Returns
    -------
    Series
        The fold of each image, by the image's name.

    Raises
    ------
    TrainingDataError
        There are no train rows, none with a label, only one class, or no labelled test rows to
        score on; or `draw_folds` or `draw_fraction` raises an error.
    """
    train = rows[rows["split"] == "train"]
    if train.empty:
        raise TrainingDataError("the manifest has no train rows. Give some rows the split train.")
    labelled = train[train["label"].notna()]
    if labelled.empty:
        raise TrainingDataError(
            f"none of the {len(train)} train rows has a label. Give the manifest labels 0 and 1."
        )
    require_both_classes(labelled["label"].to_numpy(np.int8), "the train rows of the manifest")
    if not (rows["label"].notna() & (rows["split"] == "test")).any():
        raise TrainingDataError(
            "the manifest has no labelled test rows, so no head could be scored. "
            "Give some patients the split test."
        )
    labelled = labelled.reset_index(drop=True)
    folds = np.asarray(draw_folds(labelled, n_folds=n_folds, seed=seed), np.int64)
    chosen = draw_fraction(labelled, folds, fraction=fraction, seed=seed)
    return pd.Series(folds[chosen], index=labelled["image"].to_numpy()[chosen])


@dataclass(frozen=True)
class TrainFolds:
    """The folds of a manifest's training rows, by the images' names.

    Attributes
    ----------
    fold : Series of int64
        The fold of each row.
    inner : DataFrame of bool, a column per fold
        Whether the row stops and chooses the trials that leave this fold out, see `draw_inner`.
    """

    fold: "pd.Series[Any]"
    inner: pd.DataFrame


def draw_train_folds(
    rows: pd.DataFrame, *, n_folds: int, fraction: float = 1.0, seed: int = 0
) -> TrainFolds:
    """Draw the folds of all labelled train rows of a manifest, and their inner parts.

    Parameters and errors are those of `fold_train_rows` and `draw_inner`.
    """
    fold = fold_train_rows(rows, n_folds=n_folds, fraction=fraction, seed=seed)
    known = rows.set_index("image", drop=False).loc[fold.index]
    inner = draw_inner(known, fold.to_numpy(), seed=seed)
    return TrainFolds(fold, pd.DataFrame(inner.T, fold.index))


def draw_target_folds(
    rows: pd.DataFrame, *, n_folds: int, fraction: float = 1.0, seed: int = 0
) -> TrainFolds:
    """Draw the folds that all targets of a manifest share: those of all train rows.

    Rows with a label have the folds of `draw_train_folds`, so that a sweep of `label` is the same
    with other targets and without. Their patients' other rows follow. Patients without a label,
    or all if the label allows no folds, are divided by region.

    Parameters
    ----------
    rows : pandas.DataFrame
        All rows of the manifest.
    n_folds, fraction, seed
        See `fold_train_rows`.

    Raises
    ------
    TrainingDataError
        There are no train rows, or the fraction is out of range.
    """
    train = rows[rows["split"] == "train"].reset_index(drop=True)
    if train.empty:
        raise TrainingDataError("the manifest has no train rows. Give some rows the split train.")
    persons, is_labelled = name_persons(train), train["label"].notna()
    try:
        drawn = [draw_train_folds(rows, n_folds=n_folds, fraction=fraction, seed=seed)]
    except TrainingDataError:  # its sweep, if one is asked for, says why
        drawn, is_labelled = [], is_labelled & False
    is_rest = ~persons.isin(persons[is_labelled])
    if is_rest.any():
        drawn.append(_divide_unlabelled(_unlabel(train[is_rest]), n_folds, fraction, seed))
    fold = pd.concat([own.fold for own in drawn])
    inner = pd.concat([own.inner for own in drawn])
    person_of = pd.Series(persons.to_numpy(), index=train["image"])
    first = ~person_of[fold.index].duplicated().to_numpy()
    by_person = pd.Series(fold.index[first], index=person_of[fold.index[first]].to_numpy())
    example = person_of.map(by_person).dropna()  # an image of the same person that has a fold
    return TrainFolds(
        pd.Series(fold.loc[example].to_numpy(), index=example.index),
        pd.DataFrame(inner.loc[example].to_numpy(), index=example.index),
    )


def _unlabel(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(label=pd.array([pd.NA] * len(rows), dtype="Int8"))


def _divide_unlabelled(rows: pd.DataFrame, n_folds: int, fraction: float, seed: int) -> TrainFolds:
    """Draw folds and inner parts of patients without a label, balanced by region."""
    persons, patients = name_persons(rows), _patients(rows)
    fold_of = _divide(patients, np.full(n_folds, 1 / n_folds), f"{seed}|unlabelled")
    fold = persons.map(fold_of).to_numpy(dtype=np.int64)
    chosen = draw_fraction(rows, fold, fraction=fraction, seed=seed)
    inner = np.zeros((n_folds, len(rows)), bool)
    shares = np.array([1 - 1 / n_folds, 1 / n_folds])
    for number, flags in enumerate(inner):
        others = [patient for patient in patients if fold_of[patient.name] != number]
        part = _divide(others, shares, f"{seed}|unlabelled|inner|{number}")
        flags[:] = persons.map(part).to_numpy() == 1
    images = rows["image"].to_numpy()[chosen]
    return TrainFolds(
        pd.Series(fold[chosen], index=images), pd.DataFrame(inner.T[chosen], index=images)
    )


def require_both_classes(y: NDArray[Any], where: str) -> None:
    """Refuse labels, 0 and 1 of shape (n,), of fewer than two classes; `where` names the rows.

    Raises
    ------
    TrainingDataError
        A class is missing; the message names it.
    """
    present = np.unique(y)
    if len(present) < 2:
        names = ("normal (label 0)", "abnormal (label 1)")
        found = f"only {names[int(present[0])]}" if len(present) else "no"
        lacking = names[1 - int(present[0])] if len(present) else "labelled"
        fewer = " or ask for fewer --folds" if "fold" in where else ""
        raise TrainingDataError(
            f"{where} hold {found} rows; a head learns from both classes. "
            f"Add {lacking} patients{fewer}."
        )


@dataclass(frozen=True)
class _Patient:
    name: str
    strata: Counter[tuple[int, str]]  # studies by (label, region)

    @cached_property
    def n_studies(self) -> int:
        return self.strata.total()

    @cached_property
    def labels(self) -> frozenset[int]:
        return frozenset(label for label, _ in self.strata if label != UNKNOWN)

    @cached_property
    def keys(self) -> Counter[tuple[str, ...]]:
        """The studies counted by stratum, by label, and in all."""
        keys: Counter[tuple[str, ...]] = Counter()
        for (label, region), n_studies in self.strata.items():
            keys[("label and region", str(label), region)] += n_studies
            keys[("label", str(label))] += n_studies
            keys[("all",)] += n_studies
        return keys


def _patients(rows: pd.DataFrame) -> list[_Patient]:
    """Return the studies of each patient; a study counts once, with its highest label."""
    studies = pd.DataFrame(
        {
            "patient": name_persons(rows),
            "study": rows["study"].astype(str),
            "region": rows["region"].astype(str),
            "label": rows["label"].astype("Int8").fillna(UNKNOWN).astype(int),
        }
    )
    studies = (
        studies.groupby(["patient", "study", "region"], sort=True)["label"].max().reset_index()
    )
    strata: dict[str, Counter[tuple[int, str]]] = {}
    for name, region, label in zip(
        studies["patient"], studies["region"], studies["label"], strict=True
    ):
        strata.setdefault(name, Counter())[(int(label), region)] += 1
    return [_Patient(name, counted) for name, counted in strata.items()]


def _divide(patients: list[_Patient], shares: np.ndarray, seed: int | str) -> dict[str, int]:
    """Assign each patient to one of `len(shares)` parts whose sizes follow `shares`.

    A patient with c studies of a stratum goes to the part p that adds least to the sum over strata
    of (n - t)² / t, where n is the number of the stratum's studies in p and t its target: (c² +
    2cn) / t, as the rest is equal for all parts. Label and all studies are strata too, with larger
    t: they decide if the finer ones are even.
    """
    columns = {key: i for i, key in enumerate(sorted({k for p in patients for k in p.keys}))}
    totals = np.zeros(len(columns))
    for patient in patients:
        for key, n_studies in patient.keys.items():
            totals[columns[key]] += n_studies
    targets = (shares[:, None] * totals).tolist()  # plain numbers: the arrays would be tiny
    held = [[0.0] * len(columns) for _ in shares]
    lacks = [{0, 1} for _ in shares]  # classes that a part still lacks
    part: dict[str, int] = {}
    for patient in sorted(patients, key=lambda p: (-p.n_studies, _draw(seed, p.name))):
        added = [(columns[key], n_studies) for key, n_studies in patient.keys.items()]
        # Rare classes first go where they are missing, so that no part is left with one class.
        best = min(
            range(len(held)),
            key=lambda p: (
                -len(lacks[p] & patient.labels),
                round(1e9 * sum((c * c + 2 * c * held[p][i]) / targets[p][i] for i, c in added)),
            ),
        )
        for i, c in added:
            held[best][i] += c
        lacks[best] -= patient.labels
        part[patient.name] = best
    return part


def _draw(seed: int | str, name: str) -> bytes:
    """Return a patient's sort key among equals, which does not depend on the other patients."""
    return hashlib.sha256(f"{seed}|{name}".encode()).digest()


def _refuse_too_few(patients: list[_Patient], n_folds: int) -> None:
    if len(patients) < n_folds:
        raise TrainingDataError(
            f"{len(patients)} patients cannot fill {n_folds} folds. "
            f"Ask for at most {max(len(patients), 2)} folds, or add patients."
        )
    with_class = {
        name: sum(label in patient.labels for patient in patients)
        for label, name in ((0, "normal"), (1, "abnormal"))
    }
    for name, n_patients in with_class.items():
        if n_patients == 0:
            raise TrainingDataError(
                f"no training study is {name}: a classifier needs both classes. "
                "Add labelled studies, or correct the manifest's label column."
            )
        if n_patients < n_folds:
            raise TrainingDataError(
                f"{name} studies come from {n_patients} patients, too few for {n_folds} folds. "
                "Ask for fewer folds, or add patients."
            )


def _refuse_one_class(patients: list[_Patient], fold: dict[str, int], n_folds: int) -> None:
    classes: list[set[int]] = [set() for _ in range(n_folds)]
    for patient in patients:
        classes[fold[patient.name]] |= patient.labels
    for i, found in enumerate(classes):
        if len(found) < 2:
            raise TrainingDataError(
                f"fold {i} of {n_folds} would hold one class only. Ask for fewer folds, "
                "or add patients."
            )
