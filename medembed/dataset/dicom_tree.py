"""The layout of a tree of DICOM files, whatever their names: all is read from their elements."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pandas as pd

from medembed.dataset.dicom_file import quiet_pydicom, read_dicom, why_no_image
from medembed.dataset.dicom_words import age_in_years, laterality, region, sex, text, view
from medembed.dataset.images import BARE_DICOM
from medembed.dataset.labels import find_table, need_columns, read_labels
from medembed.dataset.listing import ImageIndex, Listing, first_names, refuse
from medembed.dataset.pseudonyms import Pseudonyms, read_key
from medembed.dataset.recipe_format import Dicom, Recipe
from medembed.dataset.tables import read_text_table
from medembed.errors import ImageError, RecipeError
from medembed.files import open_plain

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
    wanted = ["image", "name", "patient", "study", "region", "label", "split", *COVARIATES]
    return Listing(rows[wanted], pd.Series(data=True, index=rows.index), warnings, excluded)


def _read_file(
    root: Path, image: str, modalities: tuple[str, ...], names: Pseudonyms
) -> dict[str, str] | str:
    """Give what a file says of its image, or the reason why it is left out."""
    try:
        with open_plain(root / image) as file:
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
    whose = names.name("patient", f"{issuer}/{patient}" if issuer else patient)
    part = region(dataset)
    return {
        "patient": whose if patient else study,
        "study": f"{part}/{study}",
        "region": part,
        "laterality": laterality(dataset),
        "view": view(dataset),
        "age": age_in_years(dataset, cap=names.hide),
        "sex": sex(dataset),
        **{keyword: text(dataset, keyword) for keyword in KEYS.values()},  # never written
    }


def _label(
    recipe: Recipe, spec: Dicom, rows: pd.DataFrame, root: Path
) -> tuple[list[str], list[str], list[str]]:
    """Join the table's labels and splits to the images; also say what does not match."""
    if recipe.label is None:
        return [""] * len(rows), [""] * len(rows), []
    path = find_table(spec.table, root, recipe.path)
    table = read_text_table(path, RecipeError)
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
    warnings = []
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
