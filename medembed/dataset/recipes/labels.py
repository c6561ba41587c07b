"""The table beside the images: its place, its columns, the meaning of labels, and the join.

`join_labels` joins labels and splits to the images of a DICOM tree.
"""

import posixpath
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from medembed.core.errors import PathNotFoundError, RecipeError
from medembed.core.text import normalise
from medembed.dataset.checks import is_missing_word, list_examples
from medembed.dataset.foreign_tables import read_foreign_table
from medembed.dataset.identities import key_texts
from medembed.dataset.recipes.image_index import AS_TEXT, compare_names, find_shortened, plain_path
from medembed.dataset.recipes.listing import count_of, first_names, merge_rows, refuse
from medembed.dataset.recipes.schema import MEANINGS, Dicom, Label, Recipe, Target
from medembed.dataset.recipes.targets import ANSWERS, read_targets

__all__ = [
    "KEYS",
    "Answers",
    "doubt_labels",
    "doubt_targets",
    "find_table",
    "join_labels",
    "need_columns",
    "read_labels",
]


def find_table(file: str, root: Path, recipe_path: Path) -> Path:
    """Return the path of a table in the image root, beside the root, or beside the recipe."""
    candidates = [root / file, root.parent / file, recipe_path.parent / file]
    for candidate in candidates:
        if candidate.exists() and not candidate.is_dir():
            return candidate
    raise PathNotFoundError(
        f"no table {file} in {root}, beside it, or beside the recipe. Give --image-root the "
        "directory that the dataset was unpacked into, or correct `file` in the recipe."
    )


def need_columns(
    table: pd.DataFrame,
    names: Iterable[str],
    source: Path | str,
    remedy: str = "Correct the recipe.",
) -> None:
    """Raise RecipeError if a table lacks columns; empty names are ignored."""
    missing = sorted({name for name in names if name and name not in table})
    if missing:
        raise RecipeError(
            f"{source} has no column {', '.join(map(repr, missing))}; its columns are "
            f"{', '.join(map(repr, table.columns))}. {remedy}"
        )


def read_labels(values: "pd.Series[str]", spec: Label, source: str) -> "pd.Series[str]":
    """Return a table's values as "0", "1" and "", by their meaning in the recipe.

    Raises
    ------
    RecipeError
        The recipe does not know a value and has no meaning for others, or it gives a value two
        meanings.
    """
    listed = {"0": spec.normal, "1": spec.abnormal, "": spec.unknown}
    pairs = [(value, one) for one, values in listed.items() for value in values]
    meaning = {**dict(pairs), "": MEANINGS[spec.empty]}
    torn = sorted({value for value, one in pairs if one != meaning[value]})
    refuse(
        list(map(repr, torn)),
        source,
        "values that [label] gives two meanings (of a blank `empty` says it):",
    )
    strange = values[~values.isin(list(meaning))]
    if len(strange) and not spec.others:
        counted = [f"{value!r} in {n} rows" for value, n in strange.value_counts().items()]
        remedy = "labels that the recipe does not know; add them to [label], or set `others`:"
        refuse(counted, source, remedy)
    return values.map(meaning).fillna(MEANINGS.get(spec.others, ""))


def doubt_labels(
    values: "pd.Series[str]", spec: Label, source: str, *, section: str = "label"
) -> list[str]:
    """Return warnings of values whose meaning comes only from `others` and that may be slips.

    Such values look like a value that the recipe lists, or are words that usually mean missing.
    """
    if not spec.others:
        return []  # `read_labels` refuses them all
    listed = (*spec.normal, *spec.abnormal, *spec.unknown)
    counts = values[~values.isin(["", *listed])].value_counts()
    meant = dict(zip(key_texts(listed), listed, strict=True))
    found = []
    for value, key in zip(counts.index, key_texts(counts.index), strict=True):
        if key in meant:
            found.append(f"{value!r} in {counts[value]} rows looks like {meant[key]!r}")
        elif is_missing_word(value):
            found.append(f"{value!r} in {counts[value]} rows usually means missing")
    if not found:
        return []
    return [
        f"{source}: labels that [{section}] does not list count as {spec.others}: "
        f"{list_examples(found)}. List them"
    ]


def doubt_targets(table: pd.DataFrame, targets: Mapping[str, Target], source: str) -> list[str]:
    """Return the warnings of `doubt_labels` for the columns of targets."""
    words = {"0": "normal", "1": "abnormal", "": "unknown"}
    found = []
    for name, spec in targets.items():
        if spec.others and not spec.separator:
            label = Label.model_construct(
                abnormal=(*spec.positive, *spec.abnormal),
                normal=(*spec.negative, *spec.normal),
                unknown=spec.uncertain_values,
                others=words[ANSWERS[spec.others]],
            )
            found += doubt_labels(table[spec.column], label, source, section=f"targets.{name}")
    return found


KEYS = {"instance": "SOPInstanceUID", "study": "StudyInstanceUID", "accession": "AccessionNumber"}


@dataclass(frozen=True)
class Answers:
    """The labels, splits and targets of images in a table.

    Attributes
    ----------
    labels, splits : list of str
        In the order of the images; "" if the table says nothing.
    targets : DataFrame
        Columns `target_NAME`, in the order of the images.
    warnings, notices : list of str
    """

    labels: list[str]
    splits: list[str]
    targets: pd.DataFrame
    warnings: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def join_labels(
    recipe: Recipe, spec: Dicom, rows: pd.DataFrame, left_out: pd.DataFrame, root: Path
) -> Answers:
    """Return what the table says of the images of `rows`, and what does not match.

    Parameters
    ----------
    recipe : Recipe
    spec : Dicom
        The recipe's section `[dicom]`.
    rows, left_out : pandas.DataFrame
        Columns `image`, `name` and those of `KEYS`; the images to be labelled, and others that the
        table may name.
    root : Path

    Raises
    ------
    PathNotFoundError
        There is no such table.
    RecipeError
        The table lacks columns, contradicts itself, or names no image at all.
    """
    if recipe.label is None:
        nothing = [""] * len(rows)
        return Answers(nothing, nothing, pd.DataFrame(index=rows.index))
    path = find_table(spec.table, root, recipe.path)
    as_written = (spec.column,) if spec.match == "file" else ()
    written = recipe.format.as_format()
    found = read_foreign_table(path, RecipeError, as_written=as_written, known=written)
    table = found.rows
    split_column = recipe.split.column if recipe.split else ""
    asked = [target.column for target in recipe.targets.values()]
    need_columns(table, (spec.column, recipe.label.column, split_column, *asked), path)
    own_spelling = plain_path if spec.match == "file" else normalise
    answers = pd.DataFrame({"key": table[spec.column].map(own_spelling)})
    answers["label"] = read_labels(table[recipe.label.column], recipe.label, str(path))
    answers["split"] = table[split_column] if split_column else ""
    targets = read_targets(table, recipe.targets, str(path))
    answers = pd.concat([answers, targets], axis=1)
    answers = answers[answers["key"] != ""]
    noun = KEYS.get(spec.match, "image")
    answers, notices = merge_rows(
        answers, "key", source=path.name, rule=spec.rows, section="dicom", noun=noun
    )
    known = set(answers["key"])
    keys = _keys(rows, spec.match, known, str(path))
    unused = known.difference(keys)
    if len(unused) == len(known):
        _refuse_all(answers["key"].tolist(), rows, spec, path, root)
    joined = answers.set_index("key").reindex(keys)
    is_without = joined["label"].isna().to_numpy()
    unused.difference_update(*_every_key(left_out, spec.match))
    hint = ""
    if unused and is_without.any():
        hint = _compare(sorted(unused), rows[is_without], spec.match, root)
    without = rows["image"][is_without].tolist()
    joined = joined.fillna("")
    return Answers(
        joined["label"].tolist(),
        joined["split"].tolist(),
        joined[targets.columns].reset_index(drop=True),
        [
            *doubt_labels(table[recipe.label.column], recipe.label, str(path)),
            *doubt_targets(table, recipe.targets, str(path)),
            *_warnings(without, len(unused), path.name, hint),
        ],
        [*found.notes, *notices],
    )


def _keys(rows: pd.DataFrame, match: str, known: set[str], source: str) -> list[str]:
    """Return each image's name in the table: a path, name or stem, or an identifier."""
    owners = defaultdict(list)
    keys = []
    for image, *ways in zip(rows["image"], *_every_key(rows, match), strict=True):
        key = next((way for way in ways if way in known), ways[0])
        owners[key].append(image)
        keys.append(key)
    if match == "file":
        several = [f"{k}: {first_names(images)}" for k, images in owners.items() if len(images) > 1]
        refuse(several, source, "several files have the name of one row; give their paths:")
    return keys


def _every_key(rows: pd.DataFrame, match: str) -> list[list[str]]:
    """Return the names that a table may use for each image, a list for each way of naming."""
    if match != "file":
        return [[normalise(value) for value in rows[KEYS[match]]]]
    paths = [plain_path(image) for image in rows["image"]]
    names = [posixpath.basename(path) for path in paths]
    return [paths, names, [name.rpartition(".")[0] or name for name in names]]


def _refuse_all(keys: list[str], rows: pd.DataFrame, spec: Dicom, path: Path, root: Path) -> None:
    """Raise an error because no row of the table matches any image, and say why."""
    noun = KEYS.get(spec.match, "image")
    if not keys:
        raise RecipeError(f"{path}: column {spec.column!r} is empty. Fill it, or name another.")
    every = [key for key in _every_key(rows, spec.match)[0] if key]
    if not every:
        raise RecipeError(
            f"{path}: column {spec.column!r} cannot be matched, as no image below {root} has an "
            f"{noun}. Choose another `match` in [dicom]."
        )
    why = _compare(keys, rows, spec.match, root) or (
        f"The first in the table is {keys[0]!r}, that of the first image {every[0]!r}. Correct "
        "`column` or `match` in [dicom]."
    )
    raise RecipeError(
        f"{path}: none of the {len(keys)} names in column {spec.column!r} is the {noun} of one of "
        f"the {count_of(len(rows), 'image')} below {root}. {why}"
    )


def _compare(keys: Iterable[str], rows: pd.DataFrame, match: str, root: Path) -> str:
    """Return how a name in the table differs from a similar one of an image."""
    if match == "file":
        return compare_names(list(keys), rows["image"].tolist(), root)
    found = find_shortened(keys, set(_every_key(rows, match)[0]))
    if found is None:
        return ""
    return f"{found[0]!r} in the table is {found[1]!r} of an image: {found[2]}. {AS_TEXT}"


def _warnings(without: list[str], n_unused: int, table: str, hint: str) -> list[str]:
    warnings = []
    if without:
        warnings.append(f"{len(without)} images are in no row of {table}: {first_names(without)}")
    if n_unused:
        also = f". {hint}" if hint else ""
        warnings.append(f"{n_unused} names in {table} match no image that was found{also}")
    return warnings
