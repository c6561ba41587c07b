"""Propose a recipe for a folder, a table or a tree of DICOM files."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from medembed.core.errors import MedembedError, PathNotFoundError, RecipeError
from medembed.core.files import as_path, open_plain
from medembed.core.text import counted, normalise
from medembed.dataset.foreign_tables import (
    TABLE_SUFFIXES,
    ForeignTable,
    TableFormat,
    read_foreign_table,
)
from medembed.dataset.manifest import existing_root
from medembed.dataset.recipes.build import BuildReport, build_manifest, load_recipe
from medembed.dataset.recipes.choices import Choices, Proposal, UndecidedError, make_proposal
from medembed.dataset.recipes.folder_proposals import propose_folders
from medembed.dataset.recipes.guesses import are_splits, find_split_word
from medembed.dataset.recipes.image_index import ImageIndex
from medembed.dataset.recipes.label_proposals import choose_label, show_values
from medembed.dataset.recipes.labels import KEYS
from medembed.dataset.recipes.table_proposals import (
    draw_split,
    name_file,
    propose_table,
    score_image_columns,
)
from medembed.images.decode import BARE_DICOM
from medembed.images.dicom.file import quiet_pydicom, read_dicom, why_no_image
from medembed.images.dicom.terms import text

__all__ = [
    "Choices",
    "Kind",
    "Proposal",
    "UndecidedError",
    "build_proposal",
    "propose",
    "propose_recipe",
]

Kind = Literal["auto", "folders", "table"]
N_HEADERS = 2000  # DICOM files that are looked into
N_PEEKED = 50  # files whose first bytes are looked at
MAX_TABLES = 20  # that are tried
ENOUGH = 0.5  # share of a table's names, or of the images, that must match
MODALITIES = ("CR", "DX", "RG", "MG", "OT")
MURA_TABLE = "train_image_paths.csv"


def propose_recipe(
    path: str | os.PathLike[str],
    image_root: str | os.PathLike[str] | None = None,
    *,
    kind: Kind = "auto",
    name: str = "",
    image: str | None = None,
    label: str | None = None,
    normal: Sequence[str] | None = None,
    abnormal: Sequence[str] | None = None,
    empty: str | None = None,
    patient: Sequence[str] | None = None,
    study: Sequence[str] | None = None,
    region: str | None = None,
    split: str | None = None,
    covariates: Sequence[str] | None = None,
    pattern: str | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
    encoding: str = "",
    delimiter: str = "",
    sheet: str = "",
) -> Proposal:
    """Propose a recipe for the data set at a path: folders, a table, or a tree of DICOM files.

    >>> proposal = propose_recipe("films/labels.csv", label="finding")  # doctest: +SKIP
    >>> build_manifest(proposal.recipe, proposal.image_root)  # doctest: +SKIP

    Parameters
    ----------
    path : path
        A folder with images, or a table (CSV, Excel, Parquet).
    image_root : path, optional
        The folder with the images; by default the folder itself, or the table's.
    kind : {"auto", "folders", "table"}
        For a folder: "folders" reads classes from its folders even if there is a table.
    name : str
        Name of the recipe; by default the folder's or the table's.
    image, label, region, split : str, optional
        Columns of the table; "" if there is none. Columns that are not given are guessed.
    normal, abnormal : str or sequence of str, optional
        Values of the label, or names of folders; if one is given, all other values are the other.
    empty : {"normal", "abnormal", "unknown"}, optional
        What an empty label means.
    patient, study, covariates : str or sequence of str, optional
        Columns; () if there are none.
    pattern : str, optional
        Form of the paths, such as ``{split}/{label}/{patient}_*``.
    test_fraction : float, optional
        Share of the studies that is drawn for test; by default 0.2, or up to 0.4 if test would be
        too small to score.
    seed : int
        Seed of the draw.
    encoding, delimiter, sheet : str
        How the table is written, if detection would be wrong.

    Returns
    -------
    Proposal
        With `recipe`, `image_root`, the recipe's `text`, and `warnings`.

    Raises
    ------
    PathNotFoundError
        There is no such file or folder.
    RecipeError
        Nothing at the path can become a manifest, or a choice that the recipe needs cannot be
        determined (`UndecidedError`: an argument settles that choice).
    """
    choices = Choices(
        image=image,
        label=label,
        normal=_several(normal),
        abnormal=_several(abnormal),
        empty=empty,
        patient=_several(patient),
        study=_several(study),
        region=region,
        split=split,
        covariates=_several(covariates),
        pattern=pattern,
        test_fraction=test_fraction,
        seed=seed,
        format=TableFormat(encoding, delimiter, "", sheet),
    )
    return propose(path, image_root, choices, kind=kind, name=name)


def _several(value: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if value is None else (value,) if isinstance(value, str) else tuple(value)


def propose(
    path: str | os.PathLike[str],
    image_root: str | os.PathLike[str] | None,
    choices: Choices,
    *,
    kind: Kind = "auto",
    name: str = "",
) -> Proposal:
    """Return a proposal like `propose_recipe`, from `Choices`."""
    place = as_path(path, "a data set")
    if not place.exists():
        raise PathNotFoundError(f"{place} does not exist. Name a folder with images, or a table.")
    if place.is_dir():
        if kind == "table":
            raise RecipeError(f"{place} is a folder. Name the table in it.")
        root = existing_root(image_root or place)
        return _propose_folder(root, place, choices, kind, name)
    if kind == "folders":
        raise RecipeError(f"{place} is a file. Name the folder that holds a folder per class.")
    root = existing_root(image_root or place.resolve().parent)
    return _with_dicom([place], root, choices, name or _name_table(place))


def build_proposal(
    proposal: Proposal,
    *,
    strict: bool = False,
    structure_only: bool = False,
    key_file: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BuildReport:
    """Return the report of building a proposal's manifest, including the proposal's warnings.

    Parameters and errors are those of `build_manifest`.
    """
    if strict and proposal.warnings:
        listed = "\n".join(f"  - {warning}" for warning in proposal.warnings)
        raise RecipeError(
            f"{proposal.image_root} causes warnings, which --strict refuses (drop --strict to "
            f"build anyway):\n{listed}"
        )
    report = build_manifest(
        proposal.recipe,
        proposal.image_root,
        strict=strict,
        structure_only=structure_only,
        key_file=key_file,
        progress=progress,
    )
    return replace(
        report,
        warnings=[*proposal.warnings, *report.warnings],
        notices=[*proposal.notices, *report.notices],
    )


def _propose_folder(root: Path, place: Path, choices: Choices, kind: Kind, name: str) -> Proposal:
    if kind == "folders" or choices.pattern is not None:
        return propose_folders(root, choices, name=name)
    if any((base / MURA_TABLE).is_file() for base in (root, *_folders_in(root))):
        return _propose_mura(root)
    if tables := _find_tables(root, place):
        found = _with_dicom(tables, root, choices, name or normalise(root.name) or "mine")
        also = _recognise(tables[0])
        return replace(found, notices=[*found.notices, *also])
    if _is_dicom(root):
        return _propose_dicom(root, choices, name, ())
    try:
        return propose_folders(root, choices, name=name)
    except UndecidedError:
        raise
    except RecipeError as error:
        unused = [path.name for path in _list_tables(place)]
        if not unused:
            raise
        raise RecipeError(
            f"{error} None of the tables there names the images: {show_values(unused)}."
        ) from error


def _name_table(path: Path) -> str:
    """Return a recipe's name: its table's, or the folder's if the table has a common name."""
    stem = normalise(path.stem)
    is_common = stem.lower() in ("labels", "label", "dataset", "data", "train", "metadata", "index")
    return normalise(path.resolve().parent.name) if is_common else stem


def _folders_in(root: Path) -> list[Path]:
    with os.scandir(root) as entries:
        return sorted(Path(entry.path) for entry in entries if entry.is_dir())


def _propose_mura(root: Path) -> Proposal:
    recipe = load_recipe("mura")
    return Proposal(
        recipe,
        root,
        recipe.path.read_text(encoding="utf-8"),
        {"data set": "MURA v1.1"},
        notices=["this is MURA v1.1; medembed comes with a recipe for that: mura"],
    )


@dataclass(frozen=True)
class _Candidate:
    """A table that names images below the root."""

    path: Path
    columns: tuple[str, ...]
    score: float


def _find_tables(root: Path, place: Path) -> list[Path]:
    """Return the table that names the images below a folder, or several of one form by split."""
    index = ImageIndex(root, every_file=_is_dicom(root))
    found = []
    for path in _list_tables(place)[:MAX_TABLES]:
        try:
            table = read_foreign_table(path, RecipeError).rows
        except MedembedError:
            continue
        columns = tuple(table.columns)
        if "sha256" in columns and "split" in columns:
            continue  # a manifest
        best = next(iter(score_image_columns(table, index)), None)
        if best is None:
            continue
        n_found = best.share * table[best.column].nunique()
        if best.share >= ENOUGH or n_found >= ENOUGH * len(index.paths):
            found.append(_Candidate(path, columns, best.rank))
    if not found:
        return []
    best_one = max(found, key=lambda own: (own.score, len(own.columns)))
    alike = [own.path for own in found if own.columns == best_one.columns]
    words = [find_split_word(path.stem) for path in alike]
    if len(alike) > 1 and len(set(words)) == len(alike) and are_splits(words):
        return alike
    return [best_one.path]


def _list_tables(folder: Path) -> list[Path]:
    """Return what may be a table in a folder or its subfolders, by name."""
    every = [
        path
        for base in (folder, *_folders_in(folder))
        for path in sorted(base.iterdir())
        if path.suffix.lower() in TABLE_SUFFIXES and not path.name.startswith((".", "~$"))
    ]
    return [path for path in every if path.is_file()]


def _recognise(table: Path) -> list[str]:
    """Return a notice if a known recipe is for a table of this name with such columns."""
    known = []
    columns = set(read_foreign_table(table, RecipeError).rows.columns)
    for name in ("fracatlas", "grazpedwri"):
        spec = load_recipe(name).table
        assert spec is not None
        if table.name in spec.file and columns >= {spec.image, *spec.patient, *spec.covariates}:
            known.append(f"this looks like {name}; medembed comes with a recipe for that: {name}")
    return known


def _is_dicom(root: Path) -> bool:
    """Return whether most of the first files below a root are DICOM."""
    index = ImageIndex(root, every_file=True)
    plain = [path for path in sorted(index.paths) if not path.lower().endswith(TABLE_SUFFIXES)]
    step = max(len(plain) // N_PEEKED, 1)
    peeked = plain[::step][:N_PEEKED]
    return bool(peeked) and sum(_begins_as_dicom(root / path) for path in peeked) * 2 > len(peeked)


def _begins_as_dicom(path: Path) -> bool:
    try:
        with open_plain(path) as file:
            begins = file.read(132)
    except OSError:
        return False
    return begins[128:] == b"DICM" or begins.startswith(BARE_DICOM)


def _with_dicom(paths: Sequence[Path], root: Path, choices: Choices, name: str) -> Proposal:
    """Return a proposal for a table whose images may be DICOM, which name patients themselves."""
    if len(paths) == 1 and choices.patient is None and _is_dicom(root):
        return _propose_dicom(root, choices, name, paths)
    return propose_table(paths, root, choices, name=name)


TAGS = "SOPClassUID Modality Rows Columns NumberOfFrames PatientID " + " ".join(KEYS.values())


@dataclass
class _Headers:
    """What the first DICOM files of a tree say."""

    modalities: Counter[str] = field(default_factory=Counter)
    patients: set[str] = field(default_factory=set)
    keys: dict[str, set[str]] = field(default_factory=lambda: {way: set() for way in KEYS})


def _read_headers(root: Path, paths: Sequence[str]) -> _Headers:
    found = _Headers()
    with quiet_pydicom():
        for dataset in _open_each(root, paths):
            found.modalities[text(dataset, "Modality").upper()] += 1
            found.patients.add(text(dataset, "PatientID"))
            for way, keyword in KEYS.items():
                found.keys[way].add(text(dataset, keyword))
    return found


def _open_each(root: Path, paths: Sequence[str]) -> Iterator[Any]:
    headers = (_read_header(root / path) for path in paths)
    return (header for header in headers if header is not None and not why_no_image(header))


def _read_header(path: Path) -> Any:
    try:
        with open_plain(path) as file:
            return read_dicom(file, TAGS, with_pixels=False)
    except Exception:  # damage is counted and named when the manifest is built
        return None


def _propose_dicom(root: Path, choices: Choices, name: str, tables: Sequence[Path]) -> Proposal:
    index = ImageIndex(root, every_file=True)
    paths = [p for p in sorted(index.paths) if not p.lower().endswith(TABLE_SUFFIXES)]
    headers = _read_headers(root, paths[:N_HEADERS])
    taken = [own for own in MODALITIES if headers.modalities[own]]
    if not taken:
        listed = show_values([repr(own) for own in headers.modalities])
        raise RecipeError(f"no radiograph among the DICOM files below {root}: modality {listed}.")
    dicom: dict[str, Any] = {"identifiers": "hash", "modalities": taken}
    others = {own: n for own, n in headers.modalities.items() if own not in taken}
    settled = {"files": f"DICOM, {counted(len(paths), 'file')}", "modalities": ", ".join(taken)}
    settled |= {"patient": "Patient ID, hashed", "region": "as the files say"}
    warnings, notices = [], []
    sections: dict[str, Any] = {"dicom": dicom}
    comments = {
        "dicom.identifiers": "Patients and studies are named by a keyed hash: build with "
        '--key-file, so that they\nkeep their names. "keep" leaves them as they are.',
        "dicom.modalities": "Other objects are left out, and counted.",
    }
    if tables:
        found = read_foreign_table(tables[0], RecipeError, known=choices.format)
        level = _join_table(dicom, sections, settled, found, tables[0], root, choices, headers)
        notices += found.notes
        comments["dicom.table"] = "The table of labels, and what its rows refer to."
        comments["label"] = "What the label's values mean."
    else:
        level = "study"
        warnings.append(
            "no table of labels names these files: their images can be embedded and predicted, but "
            "nothing can be trained on them"
        )
    if len(headers.patients - {""}) < 2 and len(paths) > 2:
        warnings.append("the files name no patients, or only one: each study counts as a patient")
    if others:
        notices.append(f"other modalities are left out: {show_values(list(others))}")
    sections["split"] = draw_split(choices, len(headers.patients), 0)
    comments["split"] = "Drawn by patient, stratified by label and region."
    settled["test"] = f"{sections['split']['fraction']:g} of the studies, drawn"
    document = {
        "name": name or normalise(root.name) or "mine",
        "layout": "dicom",
        "label_level": level,
        **sections,
    }
    return make_proposal(
        document, root, comments=comments, settled=settled, warnings=warnings, notices=notices
    )


def _join_table(
    dicom: dict[str, Any],
    sections: dict[str, Any],
    settled: dict[str, str],
    found: ForeignTable,
    path: Path,
    root: Path,
    choices: Choices,
    headers: _Headers,
) -> str:
    """Write the table's columns to the recipe; return the level of its labels."""
    rows = found.rows
    index = ImageIndex(root, every_file=True)
    column, match = _find_key(rows, index, headers, choices.image)
    label = choose_label(rows, choices, path.name, [column])
    dicom |= {"table": name_file(path, root), "column": column, "match": match}
    keys = rows[column]
    if keys.duplicated().any():
        dicom["rows"] = "any"
    sections["label"] = label.as_section()
    settled["image"] = f"{column} ({match})"
    settled["label"] = label.column
    settled["normal"] = show_values(label.meanings.normal)
    settled["abnormal"] = show_values(label.meanings.abnormal)
    written = {"encoding": found.format.encoding, "delimiter": found.format.delimiter}
    plain = {"encoding": "utf-8", "delimiter": ","}
    if kept := {key: value for key, value in written.items() if value and value != plain[key]}:
        sections["format"] = kept
    return "image" if match in ("file", "instance") else "study"


def _find_key(
    rows: pd.DataFrame, index: ImageIndex, headers: _Headers, chosen: str | None
) -> tuple[str, str]:
    """Return the column that identifies files or studies, and what it holds."""
    columns = [chosen] if chosen else list(rows.columns)
    named = score_image_columns(rows[columns], index)
    scores = {(own.column, "file"): own.share for own in named}
    for name in columns:
        values = {normalise(value) for value in rows[name].unique()} - {""}
        for way, keys in headers.keys.items():
            if shared := values & (keys - {""}):
                scores[name, way] = len(shared) / min(len(values), len(keys))
    if not scores:
        raise UndecidedError(
            "no column holds the files' names, or the UIDs or accession numbers of their studies; "
            "the columns are "
            f"{show_values([repr(n) for n in rows.columns], 12)}. Name "
            "the column with --image.",
            "image",
            "Which column identifies the file or the study?",
            tuple(rows.columns),
        )
    return max(scores, key=lambda own: scores[own])
