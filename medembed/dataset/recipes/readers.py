"""The layouts of datasets: reading each image's data from a table or a tree of folders."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from medembed.core.errors import RecipeError
from medembed.core.text import normalise
from medembed.dataset.checks import is_missing_word
from medembed.dataset.foreign_tables import read_foreign_table
from medembed.dataset.identities import IDS
from medembed.dataset.recipes.image_index import ImageIndex, plain_path
from medembed.dataset.recipes.labels import (
    doubt_labels,
    doubt_targets,
    find_table,
    need_columns,
    read_labels,
)
from medembed.dataset.recipes.listing import Listing, first_names, merge_rows, refuse
from medembed.dataset.recipes.mura import read_mura
from medembed.dataset.recipes.schema import Recipe, Region, Table
from medembed.dataset.recipes.targets import read_targets
from medembed.dataset.tables import normalise_column, normalise_columns
from medembed.dataset.targets import is_target

__all__ = ["compile_pattern", "read_layout"]


def read_layout(recipe: Recipe, root: Path, key_file: Path | None = None) -> Listing:
    """Return the images that `recipe` describes below `root`.

    Parameters
    ----------
    recipe : Recipe
    root : Path
    key_file : Path, optional
        Key for hashing identifiers of layout dicom; see `dataset.pseudonyms`.

    Raises
    ------
    PathNotFoundError
        A table is missing.
    RecipeError
        Tables, folders and recipe do not match; the message lists all problems of one kind.
    """
    if recipe.layout == "mura":
        return read_mura(root)
    if recipe.layout == "dicom":
        from medembed.dataset.recipes.dicom import read_dicom_tree  # pydicom, for this layout alone

        return read_dicom_tree(recipe, root, key_file)
    return _read_table(recipe, root) if recipe.table else _read_folders(recipe, root)


def _read_table(recipe: Recipe, root: Path) -> Listing:
    spec, region, label = recipe.table, recipe.region, recipe.label
    assert spec is not None
    assert region is not None
    assert label is not None
    split_column = recipe.split.column if recipe.split else ""
    named = (spec.image, *spec.patient, *spec.study, *spec.covariates, region.column)
    asked = [target.column for target in recipe.targets.values()]
    table, source, notes = _read_files(
        recipe, spec, root, (*named, *region.one_hot, label.column, split_column, *asked)
    )
    index = ImageIndex(root, spec.below)
    table, names = _enter_folders(table, table[spec.image], index)
    images, is_found = _locate(table, names, spec, index, source)
    rows = pd.DataFrame({"image": images, "name": names})
    rows["patient"] = normalise_column(_join(table, spec.patient))
    own = rows.groupby("image", sort=False)["name"].transform("first")  # one name for all spellings
    rows["study"] = normalise_column(_join(table, spec.study) if spec.study else own)
    rows["region"] = _regions(table, region, source)
    rows["label"] = read_labels(table[label.column], label, source)
    rows["split"] = table[split_column] if split_column else ""
    for name in spec.covariates:
        rows[name] = table[name]
    rows = pd.concat([rows, read_targets(table, recipe.targets, source)], axis=1)
    warnings = doubt_labels(table[label.column], label, source)
    warnings += doubt_targets(table, recipe.targets, source)
    name = source.rpartition("/")[2]
    rows, notices = merge_rows(rows, "image", source=name, rule=spec.rows)
    return Listing(
        rows,
        is_found,
        [*index.unlisted(images, name), *warnings],
        notices=[*notes, *notices],
        unseen=index.unseen,
        files=index.paths.difference(images),
    )


def _read_files(
    recipe: Recipe, spec: Table, root: Path, names: Sequence[str]
) -> tuple[pd.DataFrame, str, list[str]]:
    """Return the tables of a recipe as one, its name for messages, and notes on the format."""
    tables, paths, notes = [], [], []
    for file in spec.file:
        path = find_table(file, root, recipe.path)
        found = read_foreign_table(
            path,
            RecipeError,
            columns=spec.columns,
            as_written=(spec.image,),
            numbers=spec.covariates,
            known=recipe.format.as_format(),
        )
        rows = found.rows
        if spec.file_column:
            if spec.file_column in rows:
                raise RecipeError(
                    f"{path} has a column {spec.file_column!r} of its own. Choose another name for "
                    "`file_column` in [table]."
                )
            rows = rows.assign(**{spec.file_column: normalise(path.stem)})
        if spec.fields:
            need_columns(rows, [spec.image], path)
            rows = _add_fields(rows, spec, path, recipe.path)
        need_columns(rows, names, path)
        tables.append(rows)
        paths.append(path)
        notes += found.notes
    if len(paths) == 1:
        return tables[0], str(paths[0]), notes
    source = f"{' and '.join(path.name for path in paths)} (rows counted through)"
    return pd.concat(tables, ignore_index=True).fillna(""), source, notes


def _add_fields(rows: pd.DataFrame, spec: Table, source: Path, recipe: Path) -> pd.DataFrame:
    """Return rows with the fields of `spec.fields` in the images' names as further columns."""
    matcher = compile_pattern(normalise(spec.fields), recipe, section="table")
    matches = [matcher.fullmatch(plain_path(value)) for value in rows[spec.image]]
    refuse(
        [f"row {i + 2}: {rows[spec.image].iloc[i]}" for i, own in enumerate(matches) if not own],
        str(source),
        f"values of column {spec.image!r} that do not fit `fields` in [table], {spec.fields}:",
    )
    added = pd.DataFrame([own.groupdict() for own in matches if own], index=rows.index)
    refuse(
        [str(name) for name in added if name in rows],
        str(source),
        "columns of the table that `fields` in [table] would replace; rename these fields:",
    )
    return pd.concat([rows, normalise_columns(added.astype(str), ())], axis=1)


def _enter_folders(
    table: pd.DataFrame, names: "pd.Series[str]", index: ImageIndex
) -> tuple[pd.DataFrame, "pd.Series[str]"]:
    """Return a row for each image of a folder that a row names, such as a study, and the images."""
    folders = {
        value: images
        for value in names.unique()
        if not index.find(value) and (images := index.find_in_folder(value))
    }
    if not folders:
        return table, names
    every = names.map(lambda value: folders.get(value, [value])).explode()
    return table.loc[every.index].reset_index(drop=True), every.reset_index(drop=True).astype(str)


def _locate(
    table: pd.DataFrame, names: "pd.Series[str]", spec: Table, index: ImageIndex, source: str
) -> tuple["pd.Series[str]", "pd.Series[bool]"]:
    """Return each row's file, or where a missing one would be, and whether it was found."""
    found = [index.find(value) for value in names]
    refuse(
        [
            f"row {i + 2}: {value} may be {first_names(paths)}"
            for i, (value, paths) in enumerate(zip(names, found, strict=True))
            if len(paths) > 1
        ],
        source,
        "several files have the name of one row. Keep one of them, or name the folder to search "
        "with `below` in [table]:",
    )
    pattern = spec.image_pattern or f"{{{spec.image}}}"
    expected = _fill_pattern(pattern, table, source)
    images = [p[0] if p else e for p, e in zip(found, expected, strict=True)]
    is_found = pd.Series([bool(paths) for paths in found], index=table.index)
    return pd.Series(images, index=table.index, dtype=str), is_found


def _fill_pattern(pattern: str, table: pd.DataFrame, source: str) -> list[str]:
    names = [normalise(name) for name in re.findall(r"\{(.*?)\}", pattern)]
    need_columns(table, names, source)
    pieces = re.split(r"\{.*?\}", pattern)
    filled = pd.Series(pieces[0], index=table.index, dtype=str)
    for name, piece in zip(names, pieces[1:], strict=True):
        filled = filled + table[name] + piece
    return filled.tolist()


def _join(table: pd.DataFrame, names: tuple[str, ...]) -> "pd.Series[str]":
    """Return columns joined with "/"; an empty part makes the whole empty, for checks to find."""
    if not names:
        return pd.Series("", index=table.index, dtype=str)
    joined = table[names[0]]
    for name in names[1:]:
        joined = joined + "/" + table[name]
    return joined.where((table[list(names)] != "").all(axis=1), "")


def _regions(table: pd.DataFrame, spec: Region, source: str) -> "pd.Series[str]":
    if spec.constant:
        return pd.Series(spec.constant, index=table.index, dtype=str)
    if spec.column:
        return table[spec.column]
    values = table[list(spec.one_hot)]
    strange = {v: name for name in values for v in values[name].unique() if is_missing_word(v)}
    refuse(
        [f"{value!r} in column {name!r}" for value, name in strange.items()],
        source,
        "columns of [region] hold words that say neither yes nor no; write 0 or 1:",
    )
    flags = ~values.isin(["", "0", "0.0"])
    n_set = flags.sum(axis=1)
    refuse(
        [
            f"row {i + 2}: {n} of them are set"
            for i, n in enumerate(n_set)
            if n == 0 or (n > 1 and not spec.several)
        ],
        source,
        f"a row must show one region of {', '.join(spec.one_hot)}; `several` in [region] can name "
        "rows with more than one:",
    )
    return flags.idxmax(axis=1).where(n_set == 1, spec.several)


def _read_folders(recipe: Recipe, root: Path) -> Listing:
    assert recipe.folders is not None
    pattern = normalise(recipe.folders.pattern)
    matcher = compile_pattern(pattern, recipe.path)
    index = ImageIndex(root)
    names = [*sorted(index.paths), *index.others]
    matches = {name: found for name in names if (found := matcher.fullmatch(plain_path(name)))}
    if not matches:
        example = f"; the first of {len(index.paths)} is {min(index.paths)}" if index.paths else ""
        unseen = "".join(f" {warning}." for warning in index.unseen)
        raise RecipeError(f"no image below {root} fits the pattern {pattern!r}{example}.{unseen}")
    table = pd.DataFrame([found.groupdict() for found in matches.values()])
    files = {index.others.get(name, name): name for name in reversed(matches)}
    table = normalise_columns(table, ())
    table.insert(0, "image", [files[index.others.get(name, name)] for name in matches])
    _check_fields(recipe, table)
    rows = table[["image"]].assign(name=table["image"].str.rpartition("/")[2])
    rows["patient"] = table.get("patient", "")
    rows["region"] = table.get("region", recipe.region.constant if recipe.region else "")
    parts = tuple(name for name in ("region", "patient", "study") if name in table)
    stems = table["image"].str.replace(r"\.[^./]*$", "", regex=True)
    rows["study"] = _join(table, parts) if "study" in table else normalise_column(stems)
    rows["label"] = read_labels(table["label"], recipe.label, str(root)) if recipe.label else ""
    warnings = doubt_labels(table["label"], recipe.label, str(root)) if recipe.label else []
    rows["split"] = table.get("split", "")
    for name in table.columns.difference([*rows.columns, "label"], sort=False):
        rows[name] = table[name]
    need_columns(table, [target.column for target in recipe.targets.values()], pattern)
    rows = pd.concat([rows, read_targets(table, recipe.targets, str(root))], axis=1)
    warnings += doubt_targets(table, recipe.targets, str(root))
    rows = _merge_names(rows, list(matches), root)
    is_found = pd.Series(data=True, index=rows.index)
    unlisted = index.unlisted(files, "the pattern")
    return Listing(
        rows,
        is_found,
        [*unlisted, *warnings],
        unseen=index.unseen,
        files=index.paths.difference(files),
    )


def _merge_names(rows: pd.DataFrame, names: list[str], root: Path) -> pd.DataFrame:
    """Return rows in which each file occurs once; names through links must not contradict."""
    again = rows["image"].duplicated()
    columns = [name for name in rows.columns if name not in ("image", "name")]
    first = rows[~again].set_index("image")[columns].reindex(rows["image"])
    differs = rows[columns].to_numpy() != first.to_numpy()
    lines = [
        f"{name} is the file {image}, but for its {', '.join(np.array(columns)[torn])}"
        for name, image, torn in zip(names, rows["image"], differs, strict=True)
        if torn.any()
    ]
    remedy = "links give files a second name that says something else; remove one of the two:"
    refuse(lines, str(root), remedy)
    return rows[~again]


def compile_pattern(pattern: str, path: Path, *, section: str = "folders") -> re.Pattern[str]:
    """Return a pattern with {fields}, `*` and `**` as a regular expression."""
    pieces = []
    seen: set[str] = set()
    for token in re.split(r"(\{.*?\}|\*\*/|\*)", pattern):
        name = token[1:-1]
        if token == "**/":  # nosec B105 # a part of a pattern
            pieces.append(r"(?:[^/]+/)*")
        elif token == "*":  # nosec B105 # a part of a pattern
            pieces.append(r"[^/]*")
        elif not token.startswith("{"):
            pieces.append(re.escape(token))
        elif not name.isidentifier() or name in {"image", "sha256", "name", "label_level", IDS}:
            raise RecipeError(f"{path}, [{section}]: {token} is not a name for a field.")
        elif is_target(name):
            raise RecipeError(
                f"{path}, [{section}]: {token} is not a name for a field. Give it another, and "
                "make it a target with [targets.NAME]."
            )
        else:
            pieces.append(f"(?P={name})" if name in seen else f"(?P<{name}>[^/]+?)")
            seen.add(name)
    return re.compile("".join(pieces))


def _check_fields(recipe: Recipe, table: pd.DataFrame) -> None:
    """Refuse patterns and sections that leave a column without a source, or with two."""
    has = {name: name in table for name in ("patient", "region", "label", "split", "study")}
    sections = {
        "patient": (recipe.groups is not None, '[groups] (rule = "image" or "runs")'),
        "region": (bool(recipe.region and recipe.region.constant), "[region] with a constant"),
        "split": (bool(recipe.split and recipe.split.fraction), "[split] with a fraction"),
    }
    for name, (is_given, section) in sections.items():
        if has[name] == is_given:
            raise RecipeError(
                f"{recipe.path}: give either a field {{{name}}} in the pattern or {section}."
            )
    if has["label"] != (recipe.label is not None):
        raise RecipeError(f"{recipe.path}: a field {{label}} and a section [label] go together.")
    if recipe.label_level == "study" and not has["study"]:
        raise RecipeError(f"{recipe.path}: label_level is study; the pattern names no {{study}}.")
