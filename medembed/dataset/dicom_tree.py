"""The layout of a tree of DICOM files, whatever their names: all is read from their elements."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medembed.dataset.dicom_file import quiet_pydicom, read_dicom, why_no_image
from medembed.dataset.dicom_words import age_in_years, laterality, region, sex, text, view
from medembed.dataset.identities import EXACT, IDS, find_persons
from medembed.dataset.images import BARE_DICOM
from medembed.dataset.labels import doubt_labels, find_table, need_columns, read_labels
from medembed.dataset.listing import ImageIndex, Listing, first_names, refuse
from medembed.dataset.lookalikes import is_missing_patient, list_examples
from medembed.dataset.pseudonyms import Pseudonyms, read_key
from medembed.dataset.recipe_format import Dicom, Recipe
from medembed.dataset.tables import read_foreign_table
from medembed.errors import ImageError, RecipeError

__all__ = ["read_dicom_tree"]

TAGS = (
    "SOPClassUID SOPInstanceUID StudyInstanceUID AccessionNumber Modality PatientID "
    "IssuerOfPatientID PatientAge PatientSex BodyPartExamined AnatomicRegionSequence "
    "ImageLaterality Laterality FrameLaterality ViewPosition ViewCodeSequence "
    "NumberOfFrames Rows Columns"
)
DICOMDIR = "1.2.840.10008.1.3.10"
KEYS = {"instance": "SOPInstanceUID", "study": "StudyInstanceUID", "accession": "AccessionNumber"}
COVARIATES = ("laterality", "view", "age", "sex")


def read_dicom_tree(recipe: Recipe, root: Path, key_file: Path | None = None) -> Listing:
    """Read every DICOM file below `root`; what is no image of the wanted kind is left out.

    A study of the manifest is one region of a DICOM study. Where a file names no patient, its study
    stands for one, and where it names no study, the image is its own.

    Raises
    ------
    RecipeError
        There is no image, the table does not fit, or the key cannot be used.
    """
    spec = recipe.dicom or Dicom()
    names = Pseudonyms(read_key(key_file) if spec.identifiers == "hash" else None)
    index = ImageIndex(root, every_file=True)
    found: list[dict[str, str]] = []
    excluded: list[tuple[str, str]] = []
    with quiet_pydicom():
        for image in sorted(index.paths):
            row = _read_file(root, image, spec.modalities, names)
            if isinstance(row, str):
                excluded.append((image, row))
            else:
                found.append({"image": image, **row})
    if not found:
        raise RecipeError(
            f"no DICOM image of modality {', '.join(spec.modalities)} below {root} among "
            f"{len(index.paths)} files. Correct --image-root, or `modalities` in [dicom]."
        )
    rows = pd.DataFrame(found)
    rows["name"] = rows["image"].str.rpartition("/")[2]
    rows["label"], rows["split"], warnings = _label(recipe, spec, rows, root)
    if names.hide:  # else the manifest shows them
        rows["patient"], joined = _join_spellings(recipe, rows, root)
        warnings += [*joined, *_doubt_identifiers(rows["identifier"])]
    wanted = ["image", "name", "patient", "study", "region", "label", "split", *COVARIATES]
    return Listing(rows[wanted], pd.Series(data=True, index=rows.index), warnings, excluded)


def _read_file(
    root: Path, image: str, modalities: tuple[str, ...], names: Pseudonyms
) -> dict[str, str] | str:
    """Give what a file says of its image, or the reason why it is left out."""
    try:
        with open(root / image, "rb") as file:
            begins = file.read(132)
            if begins[128:] != b"DICM" and not begins.startswith(BARE_DICOM):
                return "not DICOM"
            file.seek(0)
            dataset = read_dicom(file, TAGS, with_pixels=False)
            if dataset.file_meta.get("MediaStorageSOPClassUID") == DICOMDIR:
                return "a DICOMDIR"
            reason = why_no_image(dataset)
            if reason:
                return reason
            if text(dataset, "Modality").upper() not in modalities:
                return "of another modality than the recipe's"
            return _describe(dataset, names, image)
    except ImageError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror or type(error).__name__}"
    except Exception as error:  # pydicom raises nearly every builtin error on damage
        return f"damaged DICOM ({type(error).__name__})"


def _describe(dataset: Any, names: Pseudonyms, image: str) -> dict[str, str]:
    """Say whose image it is, of what; identifiers are hashed, all else comes from closed lists."""
    issuer, patient, study = (
        text(dataset, name) for name in ("IssuerOfPatientID", "PatientID", "StudyInstanceUID")
    )
    study = names.name("study", study or image)
    whose = f"{issuer}/{patient}" if issuer and patient else patient
    part = region(dataset)
    return {
        "patient": names.name("patient", whose) if patient else study,
        "identifier": whose,  # never written
        "study": f"{part}/{study}",
        "region": part,
        "laterality": laterality(dataset),
        "view": view(dataset),
        "age": age_in_years(dataset, cap=names.hide),
        "sex": sex(dataset),
        **{keyword: text(dataset, keyword) for keyword in KEYS.values()},  # never written
    }


def _join_spellings(
    recipe: Recipe, rows: pd.DataFrame, root: Path
) -> tuple["pd.Series[str]", list[str]]:
    """Give spellings of one patient one name: a hash does not show what they have in common.

    Returns
    -------
    patients : pandas.Series of str
    warnings : list of str
        Which were joined, told by files alone.

    Raises
    ------
    RecipeError
        Such spellings stand in two splits.
    """
    patients, raw = rows["patient"], rows["identifier"]
    spellings = raw[raw != ""].unique()
    persons = None if recipe.ids == EXACT else find_persons(spellings)
    if persons is None:
        return patients, []
    several = np.bincount(persons) > 1
    person_of = {spelling: n for spelling, n in zip(spellings, persons, strict=True) if several[n]}
    firsts = rows[raw.isin(person_of)].drop_duplicates(["identifier", "split"])
    joined, apart = [], []
    names: dict[str, str] = {}  # of a spelling, and what it gives way to
    for _, own in firsts.groupby(firsts["identifier"].map(person_of)):
        joined.append(" and ".join(sorted(own.groupby("identifier")["image"].first())[:2]))
        sides = own["image"].groupby(own["split"].replace(recipe.split_names)).first()
        apart += [" and ".join(sides)] * (len(sides) > 1)
        spelt = own.sort_values("identifier")["patient"]
        names |= dict.fromkeys(spelt, spelt.iloc[0])
    patients = patients.map(names).fillna(patients)
    differ = "differ in nothing but case, blanks, zeros or Unicode form"
    remedy = f'{IDS} = "{EXACT}" in the recipe keeps them apart'
    refuse(apart, str(root), f"identifiers of patients in two splits {differ}; {remedy}:")
    noun = "patient" if len(joined) == 1 else "patients"
    found = f"identifiers of {len(joined)} {noun} {differ}, and stand for one person each"
    return patients, [f"{found}; {remedy}: {list_examples(joined)}"] if joined else []


def _doubt_identifiers(raw: "pd.Series[str]") -> list[str]:
    """Warn of words that stand for patients: as hashes nobody would see them."""
    words = sorted(text for text in raw.unique() if is_missing_patient(text.rpartition("/")[2]))
    n = int(raw.isin(words).sum())
    shown = list_examples(list(map(repr, words)))
    return [f"Patient ID of {n} images is a word that names nobody: {shown}"] if words else []


def _label(
    recipe: Recipe, spec: Dicom, rows: pd.DataFrame, root: Path
) -> tuple[list[str], list[str], list[str]]:
    """Join the table's labels and splits to the images; also say what does not match."""
    if recipe.label is None:
        return [""] * len(rows), [""] * len(rows), []
    path = find_table(spec.table, root, recipe.path)
    as_written = (spec.column,) if spec.match == "file" else ()
    table = read_foreign_table(path, RecipeError, as_written=as_written)
    split_column = recipe.split.column if recipe.split else ""
    need_columns(table, (spec.column, recipe.label.column, split_column), path)
    answers = pd.DataFrame({"key": table[spec.column]})
    answers["label"] = read_labels(table[recipe.label.column], recipe.label, str(path))
    answers["split"] = table[split_column] if split_column else ""
    answers = answers.drop_duplicates()
    torn = sorted(answers["key"][answers["key"].duplicated()].unique())
    refuse(torn, str(path), "images or studies whose rows differ in label or split:")
    keys = _keys(rows, spec.match, set(answers["key"]), str(path))
    joined = answers.set_index("key").reindex(keys)
    without = rows["image"][joined["label"].isna().to_numpy()].tolist()
    n_unused = len(set(answers["key"]) - set(keys))
    warnings = doubt_labels(table[recipe.label.column], recipe.label, str(path))
    if without:
        some = first_names(without)
        warnings.append(f"{len(without)} images are in no row of {path.name}: {some}")
    if n_unused:
        warnings.append(f"{n_unused} names in {path.name} are of no image that was found")
    joined = joined.fillna("")
    return joined["label"].tolist(), joined["split"].tolist(), warnings


def _keys(rows: pd.DataFrame, match: str, known: set[str], source: str) -> list[str]:
    """Name each image as the table does: by path, name or stem, or by an identifier."""
    if match != "file":
        return rows[KEYS[match]].tolist()
    stems = rows["name"].str.replace(r"\.[^.]*$", "", regex=True)
    owners = defaultdict(list)
    keys = []
    for image, name, stem in zip(rows["image"], rows["name"], stems, strict=True):
        key = next((way for way in (image, name, stem) if way in known), image)
        owners[key].append(image)
        keys.append(key)
    several = [f"{k}: {first_names(images)}" for k, images in owners.items() if len(images) > 1]
    refuse(several, source, "several files have the name of one row; give their paths:")
    return keys
