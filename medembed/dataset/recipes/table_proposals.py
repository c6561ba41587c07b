"""Propose a recipe for a table of images: columns, label values, patients, regions, split."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from medembed.core.errors import RecipeError
from medembed.core.text import counted, normalise
from medembed.dataset.foreign_tables import ForeignTable, read_foreign_table
from medembed.dataset.recipes.choices import Choices, Proposal, UndecidedError, make_proposal
from medembed.dataset.recipes.guesses import (
    are_regions,
    are_splits,
    find_column,
    find_covariates,
    find_questions,
    has_role,
    map_splits,
)
from medembed.dataset.recipes.image_index import ImageIndex, compare_names
from medembed.dataset.recipes.label_proposals import (
    LabelChoice,
    choose_label,
    show_counts,
    show_values,
)
from medembed.dataset.recipes.labels import find_table, need_columns
from medembed.dataset.split_counts import ENOUGH_OF_CLASS, ENOUGH_PATIENTS

__all__ = [
    "NO_PATIENTS",
    "ONE_REGION",
    "NamedFiles",
    "choose_fraction",
    "draw_split",
    "name_file",
    "propose_table",
    "score_image_columns",
    "tells_label",
]

ONE_REGION = "all"
FEW_NAMES = 0.2  # distinct values per row: a column with fewer describes images, not names
N_TRIED = 2000  # values of a column that are looked for among the files
MAX_REGIONS = 40
FRACTIONS = (0.2, 0.3, 0.4)
NO_PATIENTS = (
    "nothing identifies the patients, so each {} counts as a patient of its own: {} of one person "
    "may end up in both train and test, and scores look better than they are"
)


@dataclass
class _Draft:
    """A recipe that is being put together."""

    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    settled: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)


def propose_table(
    paths: Sequence[Path], root: Path, choices: Choices, *, name: str = ""
) -> Proposal:
    """Return a proposed recipe for a table, or for tables with equal columns, one for each split.

    Parameters
    ----------
    paths : sequence of Path
    root : Path
        The folder with the images, with links resolved.
    choices : Choices
    name : str
        Name of the recipe; by default the table's.

    Raises
    ------
    UndecidedError
        A column or the meaning of a label's values cannot be determined; the first such choice.
    RecipeError
        The table cannot be read, or lacks a column that was named.
    """
    found = [read_foreign_table(path, RecipeError, known=choices.format) for path in paths]
    rows = pd.concat([one.rows for one in found], ignore_index=True).fillna("")
    source = " and ".join(path.name for path in paths)
    named = (choices.image, choices.label, choices.region, choices.split)
    several = (choices.patient, choices.study, choices.covariates)
    need_columns(
        rows, [*map(str, filter(None, named)), *_flat(several)], source, "Name one of them."
    )
    draft = _Draft()
    index = ImageIndex(root)
    image = _choose_image(rows, choices, index, source, root)
    draft.taken.append(image)
    files = [name_file(path, root) for path in paths]
    table: dict[str, Any] = {"file": files[0] if len(files) == 1 else files, "image": image}
    draft.sections["table"] = table
    draft.comments["table.image"] = "Column with the image's path, file name, or stem."
    draft.settled["image"] = image
    _add_format(draft, found[0], paths)
    by_file = len(paths) > 1
    if by_file:
        table["file_column"] = "table"
        rows["table"] = [normalise(p.stem) for p, one in zip(paths, found, strict=True)
                         for _ in range(len(one.rows))]  # fmt: skip
        draft.taken.append("table")
    _reserve(draft, rows, choices)
    label = choose_label(rows, choices, source, draft.taken)
    draft.taken.append(label.column)
    region = _choose_region(draft, rows, choices, label.column)
    level = _choose_study(draft, rows, choices, label, region)
    _choose_patient(draft, rows, choices)
    _choose_rows(draft, rows, image, label)
    draft.sections["region"] = region
    draft.sections["label"] = label.as_section()
    draft.comments["label"] = label.comment
    draft.settled["label"] = label.column
    draft.settled["normal"] = show_values(label.meanings.normal)
    draft.settled["abnormal"] = show_values(label.meanings.abnormal)
    names = _choose_split(draft, rows, choices, "table" if by_file else "", label)
    _choose_covariates(draft, rows, choices, label)
    document: dict[str, Any] = {
        "name": name or normalise(paths[0].stem) or "mine",
        "layout": "table",
        "label_level": level,
        **({"split_names": names} if names else {}),
        **draft.sections,
    }
    return make_proposal(
        document,
        root,
        comments=draft.comments,
        settled=draft.settled,
        warnings=draft.warnings,
        notices=[*(note for one in found for note in one.notes), *draft.notices],
    )


def name_file(path: Path, root: Path) -> str:
    """Return the shortest name that finds a table again, below or beside the root."""
    for folder in (root, root.parent):
        name = os.path.relpath(path, folder)
        if not name.startswith("..") and find_table(name, root, Path()).samefile(path):
            return Path(name).as_posix()
    return path.resolve().as_posix()


@dataclass(frozen=True)
class NamedFiles:
    """How well a column names images.

    Parameters
    ----------
    column : str
    share : float
        Share of the column's values that name a file or a folder of images.
    rank : float
        Higher for a likelier column: labels, too, may be names of files such as 0.png.
    """

    column: str
    share: float
    rank: float


def score_image_columns(rows: pd.DataFrame, index: ImageIndex) -> list[NamedFiles]:
    """Return the columns that name files, or else folders; the likeliest first."""
    for find in (index.find, index.find_in_folder):
        found = []
        for name in map(str, rows):
            values = pd.unique(rows[name])
            values = values[values != ""]
            variety = len(values) / max(len(rows), 1)
            is_called_so = has_role(name, "image")
            if len(values) == 0 or (variety < FEW_NAMES and not is_called_so):
                continue
            tried = values[:N_TRIED]
            if share := sum(bool(find(value)) for value in tried) / len(tried):
                found.append(NamedFiles(name, share, share * variety + is_called_so / 10))
        if found:
            return sorted(found, key=lambda own: -own.rank)
    return []


def _choose_image(
    rows: pd.DataFrame, choices: Choices, index: ImageIndex, source: str, root: Path
) -> str:
    if choices.image:
        return choices.image
    if found := score_image_columns(rows, index):
        return found[0].column
    if not index.paths:
        raise RecipeError(
            f"no image below {root}, such as .png, .jpg, .tif or .dcm. Give --image-root the "
            "folder that holds the images."
        )
    likely = find_column(rows, "image", ())
    why = compare_names(rows[likely].head(N_TRIED).tolist(), index.paths, root) if likely else ""
    first = min(index.paths)
    raise UndecidedError(
        f"no column of {source} names images below {root}: there are {len(index.paths):,}, the "
        f"first is {first!r}. "
        f"{why or 'Name the column with --image, or the folder with --image-root.'}",
        "image",
        "Which column names the image?",
        tuple(rows.columns),
    )


def _add_format(draft: _Draft, found: ForeignTable, paths: Sequence[Path]) -> None:
    """Write the detected format of a file that is not plain to the recipe, for builds to use."""
    if paths[0].suffix.lower() == ".parquet":
        return
    kept = {
        "encoding": found.format.encoding if found.format.encoding != "utf-8" else "",
        "delimiter": found.format.delimiter if found.format.delimiter != "," else "",
        "sheet": found.format.sheet,
    }
    if any(kept.values()) and len(paths) == 1:
        draft.sections["format"] = {key: value for key, value in kept.items() if value}
        draft.comments["format"] = "How the file is written, as it was detected."
        draft.settled["written in"] = ", ".join(map(repr, filter(None, kept.values())))


def _reserve(draft: _Draft, rows: pd.DataFrame, choices: Choices) -> None:
    """Reserve columns that are chosen or have another role, so that none becomes the label."""
    draft.taken += [*_flat((choices.patient, choices.study)), choices.region or ""]
    draft.taken.append(choices.split or "")
    for role in ("patient", "study"):
        draft.taken.append(find_column(rows, role, ()))


def _find_patient(rows: pd.DataFrame, choices: Choices) -> tuple[str, ...]:
    if choices.patient is not None:
        return choices.patient
    likely = find_column(rows, "patient", ())
    return (likely,) if likely else ()


def _choose_patient(draft: _Draft, rows: pd.DataFrame, choices: Choices) -> None:
    """Choose the columns of the patient; without any, each study or image counts as one."""
    table = draft.sections["table"]
    likely = find_column(rows, "patient", ())
    chosen = _find_patient(rows, choices)
    if chosen:
        _refuse_empty(rows, chosen, "patient")
        table["patient"] = _one_or_list(chosen)
        draft.comments["table.patient"] = (
            f"Identifies the patient ({counted(_n_distinct(rows, chosen), 'patient')}), whose "
            "films all stay in one split."
        )
        draft.settled["patient"] = " + ".join(chosen)
        return
    hint = f". Column {likely!r} looks like it does: add --patient {likely!r}" if likely else ""
    if study := table.get("study"):
        table["patient"] = study
        draft.comments["table.patient"] = (
            "No column identifies the patient: each study counts as one."
        )
        draft.settled["patient"] = "each study"
        draft.warnings.append(f"{NO_PATIENTS.format('study', 'two studies')}{hint}")
        return
    draft.sections["groups"] = {"rule": "image"}
    draft.comments["groups"] = "No column identifies the patient: each image counts as one."
    draft.settled["patient"] = "each image"
    draft.warnings.append(f"{NO_PATIENTS.format('image', 'two films')}{hint}")


def _refuse_empty(rows: pd.DataFrame, names: Iterable[str], role: str) -> None:
    for name in names:
        n_empty = int((rows[name] == "").sum())
        if n_empty:
            raise RecipeError(
                f"column {name!r} names no {role} in {n_empty:,} of {len(rows):,} rows. Fill it "
                f"in, or choose another with --{role}."
            )


def _choose_region(
    draft: _Draft, rows: pd.DataFrame, choices: Choices, label: str
) -> dict[str, Any]:
    column = choices.region
    if column is None:
        flags = _find_one_hot(rows, label)
        if flags:
            draft.settled["region"] = ", ".join(flags)
            draft.comments["region"] = "A column for each body part."
            several = (rows[flags] == "1").sum(axis=1).gt(1).any()
            mixed = next((name for name in flags if not are_regions([name])), "several")
            draft.taken += flags
            return {"one_hot": flags, **({"several": mixed} if several else {})}
        column = _find_region(rows, [*draft.taken, label])
    if not column:
        draft.settled["region"] = f"one, {ONE_REGION!r}"
        return {"constant": ONE_REGION}
    _refuse_empty(rows, (column,), "region")
    draft.taken.append(column)
    values = rows[column].value_counts()
    draft.settled["region"] = f"{column}: {show_values(values.index.tolist())}"
    return {"column": column}


def _find_region(rows: pd.DataFrame, taken: Iterable[str]) -> str:
    barred = set(taken)
    for name in rows.columns:
        values = rows[name].unique().tolist()
        if name in barred or not 1 <= len(values) <= MAX_REGIONS or "" in values:
            continue
        if are_regions(values) or has_role(name, "region"):
            return str(name)
    return ""


def _find_one_hot(rows: pd.DataFrame, label: str) -> list[str]:
    """Return columns of 0 and 1 that are named after body parts, if each row has one set."""
    names = [str(name) for name in rows if name != label]
    is_flag = {name: set(rows[name].unique()) <= {"0", "1"} for name in names}
    parts = [name for name, is_one in is_flag.items() if is_one and are_regions([name])]
    if len(parts) < 2:
        return []
    more = [n for n in ("mixed", "other", "others", "multiple", "several") if is_flag.get(n)]
    for flags in (parts, [*parts, *more]):
        if (rows[flags] == "1").any(axis=1).all():
            return [*parts, *more]
    return []


def _choose_study(
    draft: _Draft, rows: pd.DataFrame, choices: Choices, label: LabelChoice, region: dict[str, Any]
) -> str:
    """Choose the columns of the study, and return the label's level."""
    table = draft.sections["table"]
    if choices.study is None:
        patient = _find_patient(rows, choices)
        likely = find_column(rows, "study", [label.column, *patient])
        chosen: tuple[str, ...] = (likely,) if likely and not (rows[likely] == "").any() else ()
        whole = (*patient, *chosen)
        if chosen and _n_distinct(rows, chosen) < _n_distinct(rows, whole):
            chosen = whole  # numbers of studies restart for each patient
    else:
        chosen = choices.study
    if not chosen:
        draft.settled["study"] = "each image"
        return "image"
    _refuse_empty(rows, chosen, "study")
    with_region = (*chosen, *filter(None, [region.get("column")]))
    if _n_distinct(rows, chosen) < _n_distinct(rows, with_region):
        chosen = with_region  # a study of a manifest shows one region
    table["study"] = _one_or_list(chosen)
    draft.settled["study"] = " + ".join(chosen)
    keys = _join(rows, chosen)
    n_labels = label.read(rows).groupby(keys).nunique().max()
    level = "study" if n_labels == 1 else "image"
    reason = "every study has one label" if level == "study" else "views of a study differ in label"
    draft.comments["label_level"] = (
        f"Whether a label belongs to the study or to the image: {reason}."
    )
    draft.settled["label level"] = f"{level}: {reason}"
    return level


def _choose_rows(draft: _Draft, rows: pd.DataFrame, image: str, label: LabelChoice) -> None:
    """Choose how several rows of one image are combined."""
    again = rows[rows[image].duplicated(keep=False)]
    if again.empty:
        return
    torn = int((label.read(again).groupby(again[image]).nunique() > 1).sum())
    draft.sections["table"]["rows"] = "any"
    draft.comments["table.rows"] = "An image with several rows is abnormal if any of them is."
    differ = f", and {counted(torn, 'image')} with both labels" if torn else ""
    n_images = again[image].nunique()
    draft.notices.append(
        f"{counted(n_images, 'image')} have several rows{differ}: abnormal where any row is"
    )


def _choose_split(
    draft: _Draft, rows: pd.DataFrame, choices: Choices, by_file: str, label: LabelChoice
) -> dict[str, str]:
    """Choose the column of the split, or a fraction; return what the data set's names mean."""
    column = choices.split
    if column is None and choices.test_fraction is None:
        likely = [by_file] if by_file else list(rows.columns.difference(draft.taken, sort=False))
        column = next(
            (n for n in likely if has_role(n, "split") or n == by_file
             if are_splits(rows[n].unique()) or n == by_file), "",
        )  # fmt: skip
    if not column:
        draft.sections["split"] = draw_split(choices, *_count_patients(draft, rows, label))
        draft.comments["split"] = "Drawn by patient, stratified by label and region."
        draft.settled["test"] = f"{draft.sections['split']['fraction']:g} of the studies, drawn"
        return {}
    values = rows[column].unique().tolist()
    if not set(values) <= {"train", "test"} and not _are_named(values):
        raise RecipeError(
            f"column {column!r} holds {show_counts(rows[column].value_counts().to_dict())}, and "
            "not the names of a training and a test split. Choose another with --split, or leave "
            "it out."
        )
    names = {} if set(values) <= {"train", "test"} else _map(values)
    draft.sections["split"] = {"column": column}
    draft.taken.append(column)
    draft.settled["split"] = f"{column}: {show_values(values)}"
    if names:
        draft.comments["split_names"] = "Which of the data set's splits is which."
        draft.settled["split"] = f"{column}: {', '.join(f'{k} is {v}' for k, v in names.items())}"
    return names


def _are_named(values: Sequence[str]) -> bool:
    return bool(_map(values)) and set(_map(values).values()) == {"train", "test"}


def _map(values: Sequence[str]) -> dict[str, str]:
    """Return names of splits, or of files that hold such a word, mapped to train and test."""
    if are_splits(values):
        return map_splits(values)
    from medembed.dataset.recipes.guesses import find_split_word

    words = {value: find_split_word(value) for value in values}
    if not are_splits(words.values()):
        return {}
    means = map_splits(set(words.values()))
    return {value: means[word] for value, word in words.items()}


def draw_split(choices: Choices, n_patients: int, n_of_class: int) -> dict[str, Any]:
    """Return the section `[split]` of a recipe that draws its test patients."""
    fraction = choices.test_fraction
    return {
        "fraction": choose_fraction(n_patients, n_of_class) if fraction is None else fraction,
        "seed": choices.seed,
    }


def choose_fraction(n_patients: int, n_of_class: int) -> float:
    """Return the smallest share for test that leaves enough patients to score.

    Parameters
    ----------
    n_patients : int
        Patients of the data set.
    n_of_class : int
        Patients of the rarer class; 0 if nothing is labelled.
    """
    for fraction in FRACTIONS:
        is_enough = n_patients * fraction >= ENOUGH_PATIENTS
        if is_enough and (not n_of_class or n_of_class * fraction >= ENOUGH_OF_CLASS):
            return fraction
    return FRACTIONS[-1]


def _count_patients(draft: _Draft, rows: pd.DataFrame, label: LabelChoice) -> tuple[int, int]:
    table = draft.sections["table"]
    names = _listed(table.get("patient", table["image"]))
    keys = _join(rows, names)
    means = label.read(rows)
    of_class = [keys[means == meaning].nunique() for meaning in ("normal", "abnormal")]
    return keys.nunique(), min(of_class)


def _choose_covariates(
    draft: _Draft, rows: pd.DataFrame, choices: Choices, label: LabelChoice
) -> None:
    table = draft.sections["table"]
    chosen = choices.covariates
    if chosen is None:
        patient = _listed(table.get("patient", ()))
        taken = [*draft.taken, *patient, *_listed(table.get("study", ()))]
        means = label.read(rows)
        every = find_covariates(rows, taken)
        telling = [name for name in every if tells_label(rows[name], means)]
        chosen = tuple(name for name in every if name not in telling)
        _propose_targets(draft, rows, chosen)
        if telling:
            verbs = (
                "reveals the label and was" if len(telling) == 1 else "reveal the label and were"
            )
            draft.notices.append(
                f"{', '.join(map(repr, telling))} {verbs} left out of the covariates"
            )
        draft.comments["table.covariates"] = (
            "Kept, so that scores can be broken down by them, and heads can use them."
        )
    if chosen:
        table["covariates"] = list(chosen)
        draft.settled["covariates"] = ", ".join(chosen)


def _propose_targets(draft: _Draft, rows: pd.DataFrame, columns: Sequence[str]) -> None:
    """Propose a target for each of the columns that answers a question by yes or no."""
    found = find_questions(rows, columns)
    if not found:
        return
    draft.sections["targets"] = found
    draft.settled["targets"] = ", ".join(found)
    draft.comments["targets"] = (
        "Further questions about each image: `medembed sweep --target NAME` trains on one. Delete "
        "those that\nnobody asks."
    )
    if assumed := [name for name, own in found.items() if "empty" in own]:
        draft.notices.append(
            f"an empty field is taken to mean no in {', '.join(assumed)}: change `empty` in "
            "[targets.NAME] if it is not known there"
        )


def tells_label(column: "pd.Series[str]", means: "pd.Series[str]") -> bool:
    """Return whether each value of a column has only one label, like a count of findings."""
    is_known = means.isin(["normal", "abnormal"]) & (column != "")
    labels = means[is_known].groupby(column[is_known])
    is_common = labels.size().max() > 2 and labels.ngroups > 1
    return bool(is_common and means[is_known].nunique() > 1 and (labels.nunique() == 1).all())


def _join(rows: pd.DataFrame, names: Sequence[str]) -> "pd.Series[str]":
    joined = rows[names[0]]
    for name in names[1:]:
        joined = joined + "/" + rows[name]
    return joined


def _n_distinct(rows: pd.DataFrame, names: Sequence[str]) -> int:
    return len(rows[list(names)].drop_duplicates())


def _one_or_list(names: Sequence[str]) -> str | list[str]:
    return names[0] if len(names) == 1 else list(names)


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _flat(several: Iterable[Sequence[str] | None]) -> list[str]:
    return [name for names in several for name in names or ()]
