"""The layout of a tree of DICOM files with any names: everything is read from their elements.

A detector's raw values (FOR PROCESSING) are often stored beside the finished film (FOR
PRESENTATION; PS3.3 C.8.11.1.1.1), in the same study. They are one view, not two.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medembed.core.errors import ImageError, RecipeError
from medembed.core.files import open_plain
from medembed.dataset.checks import is_missing_patient, list_examples
from medembed.dataset.identities import EXACT, IDS, find_persons
from medembed.dataset.pseudonyms import Pseudonyms, read_key
from medembed.dataset.recipes.image_index import ImageIndex
from medembed.dataset.recipes.labels import KEYS, join_labels
from medembed.dataset.recipes.listing import Listing, count_of, first_names, name_unread, refuse
from medembed.dataset.recipes.schema import Dicom, Recipe
from medembed.images.decode import BARE_DICOM
from medembed.images.dicom.file import quiet_pydicom, read_dicom, why_no_image
from medembed.images.dicom.terms import age_in_years, laterality, region, sex, text, view

__all__ = [
    "TAGS",
    "Rendering",
    "read_dicom_tree",
]

RENDERING_TAGS = (
    "PresentationIntentType IrradiationEventUID SourceImageSequence AcquisitionDateTime "
    "AcquisitionDate AcquisitionTime"
)
INTENTS = {"presentation": "FOR PRESENTATION", "processing": "FOR PROCESSING"}
OTHER = {"presentation": "processing", "processing": "presentation"}


@dataclass(frozen=True)
class Rendering:
    """What identifies an image's exposure; none of this is written.

    Parameters
    ----------
    intent : str
        FOR PRESENTATION, FOR PROCESSING, or another text.
    instance : str
        SOPInstanceUID.
    events, sources : frozenset of str
        UIDs of the irradiation events, and of the images that the image was made from.
    taken : str
        Date and time of the acquisition to the second.
    """

    intent: str
    instance: str
    events: frozenset[str]
    sources: frozenset[str]
    taken: str


def _read_rendering(dataset: Any) -> Rendering:
    """Return what identifies an image's exposure."""
    taken = text(dataset, "AcquisitionDateTime")
    date, time = text(dataset, "AcquisitionDate"), text(dataset, "AcquisitionTime")
    sources = dataset.get("SourceImageSequence") or ()
    return Rendering(
        intent=text(dataset, "PresentationIntentType").upper(),
        instance=text(dataset, "SOPInstanceUID"),
        events=_several(dataset.get("IrradiationEventUID")),
        sources=frozenset(text(item, "ReferencedSOPInstanceUID") for item in sources) - {""},
        taken=(taken or (date + time if date and time else ""))[:14],
    )


def _find_doubles(rows: pd.DataFrame, wanted: str) -> tuple["pd.Series[bool]", list[str]]:
    """Return the images that repeat an exposure whose wanted rendering exists.

    Parameters
    ----------
    rows : pandas.DataFrame
        Columns `image`, `exam` (the DICOM study), `region`, `laterality`, `view`, `rendering`.
    wanted : {"presentation", "processing", "both"}

    Returns
    -------
    pandas.Series of bool
        Which images to leave out.
    list of str
        A notice about images that exist only with the other intent.
    """
    if wanted not in OTHER:
        return pd.Series(data=False, index=rows.index), []
    doubles: list[Any] = []
    intents = rows["rendering"].map(lambda rendering: rendering.intent)
    is_other = intents == INTENTS[OTHER[wanted]]
    for _, part in rows[is_other | (intents == INTENTS[wanted])].groupby("exam", sort=False):
        shown = list(part[~is_other[part.index]].itertuples())
        again = part[is_other[part.index]].itertuples()
        doubles += [row.Index for row in again if any(_is_same(row, other) for other in shown)]
    is_double = pd.Series(rows.index.isin(doubles), index=rows.index)
    lone = rows["image"][is_other & ~is_double].tolist()
    if not lone:
        return is_double, []
    return is_double, [
        f"{count_of(len(lone), 'image')} {INTENTS[OTHER[wanted]]} kept, as there is none "
        f"{INTENTS[wanted]} of the same exposure: {first_names(lone)}"
    ]


def _describe_double(wanted: str) -> str:
    """Return why `_find_doubles` leaves an image out."""
    if wanted not in OTHER:
        return ""
    return f"{INTENTS[OTHER[wanted]]} beside {INTENTS[wanted]} of the same exposure"


def _is_same(one: Any, other: Any) -> bool:
    """Return whether two rows of one study show one exposure."""
    a, b = one.rendering, other.rendering
    if a.events and b.events:
        return bool(a.events & b.events)
    if a.instance in b.sources or b.instance in a.sources:
        return True
    if a.taken and b.taken:
        return bool(a.taken == b.taken)
    pairs = ((getattr(one, name), getattr(other, name)) for name in ("laterality", "view"))
    return one.region == other.region and all(x == y or not x or not y for x, y in pairs)


def _several(value: Any) -> frozenset[str]:
    values = [value] if value is None or isinstance(value, str) else value
    return frozenset(str(item).strip(" \0") for item in values if item) - {""}


TAGS = (
    "SOPClassUID SOPInstanceUID StudyInstanceUID AccessionNumber Modality PatientID "
    "IssuerOfPatientID PatientAge PatientSex BodyPartExamined AnatomicRegionSequence "
    "ImageLaterality Laterality FrameLaterality ViewPosition ViewCodeSequence "
    f"NumberOfFrames Rows Columns {RENDERING_TAGS}"
)
DICOMDIR = "1.2.840.10008.1.3.10"
COVARIATES = ("laterality", "view", "age", "sex")


def read_dicom_tree(recipe: Recipe, root: Path, key_file: Path | None = None) -> Listing:
    """Return the images of all DICOM files below `root`; other objects are left out.

    A study of the manifest is one region of a DICOM study. If a file names no patient, its study
    counts as one; if it names no study, the image is a study of its own.

    Raises
    ------
    RecipeError
        There is no image, the table does not match, or the key cannot be used.
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
    is_double, notices = _find_doubles(every, spec.intent)
    reason = _describe_double(spec.intent)
    excluded += [(image, reason) for image in every["image"][is_double]]
    rows = every[~is_double].reset_index(drop=True)
    answers = join_labels(recipe, spec, rows, every[is_double], root)
    rows["label"], rows["split"] = answers.labels, answers.splits
    rows = pd.concat([rows, answers.targets], axis=1)
    warnings = list(answers.warnings)
    if names.hide:  # otherwise the manifest shows them
        rows["patient"], joined = _join_spellings(recipe, rows, root)
        warnings += [*joined, *_doubt_identifiers(rows["identifier"])]
    wanted = ["image", "name", "patient", "study", "region", "label", "split", *COVARIATES]
    wanted += map(str, answers.targets)
    return Listing(
        rows[wanted],
        pd.Series(data=True, index=rows.index),
        warnings,
        excluded,
        [*notices, *answers.notices],
        unseen,
    )


def _read_file(
    root: Path, image: str, modalities: tuple[str, ...], names: Pseudonyms
) -> dict[str, Any] | str:
    """Return what a file says about its image, or the reason why the image is left out.

    Raises
    ------
    OSError
        The file cannot be read.
    """
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
    except OSError:
        raise
    except Exception as error:  # pydicom raises nearly every builtin error on damage
        return f"damaged DICOM ({type(error).__name__})"


def _describe(dataset: Any, names: Pseudonyms, image: str) -> dict[str, Any]:
    """Return an image's patient and content: identifiers hashed, the rest from closed lists."""
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
        "exam": study,
        "rendering": _read_rendering(dataset),  # nor is this
    }


def _join_spellings(
    recipe: Recipe, rows: pd.DataFrame, root: Path
) -> tuple["pd.Series[str]", list[str]]:
    """Return patients with one name for all spellings of a patient, which hashes would hide.

    Returns
    -------
    patients : pandas.Series of str
    warnings : list of str
        Which patients were joined, identified only by files.

    Raises
    ------
    RecipeError
        Such spellings are in two splits.
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
    found = f"identifiers of {len(joined)} {noun} {differ}, and count as one person each"
    return patients, [f"{found}; {remedy}: {list_examples(joined)}"] if joined else []


def _doubt_identifiers(raw: "pd.Series[str]") -> list[str]:
    """Return warnings of words in place of patients, which nobody would notice in hashes."""
    words = sorted(text for text in raw.unique() if is_missing_patient(text.rpartition("/")[2]))
    n = int(raw.isin(words).sum())
    shown = list_examples(list(map(repr, words)))
    return [f"Patient ID of {n} images is a word that names nobody: {shown}"] if words else []
