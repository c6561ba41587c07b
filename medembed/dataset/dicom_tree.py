"""The layout of a tree of DICOM files, whatever their names: all is read from their elements."""

from pathlib import Path
from typing import Any

import pandas as pd

from medembed.dataset import renderings
from medembed.dataset.dicom_file import quiet_pydicom, read_dicom, why_no_image
from medembed.dataset.dicom_labels import KEYS, join_labels
from medembed.dataset.dicom_words import age_in_years, laterality, region, sex, text, view
from medembed.dataset.image_index import ImageIndex
from medembed.dataset.images import BARE_DICOM
from medembed.dataset.listing import Listing, name_unread
from medembed.dataset.pseudonyms import Pseudonyms, read_key
from medembed.dataset.recipe_format import Dicom, Recipe
from medembed.errors import ImageError, RecipeError

__all__ = ["read_dicom_tree"]

TAGS = (
    "SOPClassUID SOPInstanceUID StudyInstanceUID AccessionNumber Modality PatientID "
    "IssuerOfPatientID PatientAge PatientSex BodyPartExamined AnatomicRegionSequence "
    "ImageLaterality Laterality FrameLaterality ViewPosition ViewCodeSequence "
    f"NumberOfFrames Rows Columns {renderings.TAGS}"
)
DICOMDIR = "1.2.840.10008.1.3.10"
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
    found: list[dict[str, Any]] = []
    excluded: list[tuple[str, str]] = []
    unread: list[tuple[str, str]] = []
    with quiet_pydicom():
        for image in sorted(index.paths):
            try:
                row = _read_file(root, image, spec.modalities, names)
            except OSError as error:
                unread.append((image, error.strerror or type(error).__name__))
                row = f"cannot be read: {unread[-1][1]}"
            if isinstance(row, str):
                excluded.append((image, row))
            else:
                found.append({"image": image, **row})
    unseen = [*index.unseen, *name_unread(unread)]
    if not found:
        also = "".join(f" {warning}." for warning in unseen)
        raise RecipeError(
            f"no DICOM image of modality {', '.join(spec.modalities)} below {root} among "
            f"{len(index.paths)} files.{also} Correct --image-root, or `modalities` in [dicom]."
        )
    every = pd.DataFrame(found)
    every["name"] = every["image"].str.rpartition("/")[2]
    is_double, notices = renderings.find_doubles(every, spec.intent)
    reason = renderings.describe_double(spec.intent)
    excluded += [(image, reason) for image in every["image"][is_double]]
    rows = every[~is_double].reset_index(drop=True)
    answers = join_labels(recipe, spec, rows, every[is_double], root)
    rows["label"], rows["split"] = answers.labels, answers.splits
    wanted = ["image", "name", "patient", "study", "region", "label", "split", *COVARIATES]
    return Listing(
        rows[wanted],
        pd.Series(data=True, index=rows.index),
        answers.warnings,
        excluded,
        [*notices, *answers.notices],
        unseen,
    )


def _read_file(
    root: Path, image: str, modalities: tuple[str, ...], names: Pseudonyms
) -> dict[str, Any] | str:
    """Give what a file says of its image, or the reason why it is left out.

    Raises
    ------
    OSError
        It cannot be read.
    """
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
    except OSError:
        raise
    except Exception as error:  # pydicom raises nearly every builtin error on damage
        return f"damaged DICOM ({type(error).__name__})"


def _describe(dataset: Any, names: Pseudonyms, image: str) -> dict[str, Any]:
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
        "exam": study,
        "rendering": renderings.read_rendering(dataset),  # nor is this
    }
