"""The sections of a recipe, as dataclasses; `recipe_format` parses a file into them."""

from dataclasses import dataclass

__all__ = ["Dicom", "Folders", "Groups", "Label", "Region", "Split", "Table"]


@dataclass(frozen=True)
class Table:
    """`[table]`: a CSV file with one row per image.

    Attributes
    ----------
    file : str
        Its name, looked for in the image root, then beside it, then beside the recipe.
    image : str
        Column with a path below the root, or a file's name or stem, wherever it lies.
    patient, study : tuple of str
        Columns that together name the patient and the study; empty: there are none. Without
        `study` each image is its own.
    covariates : tuple of str
        Columns that are copied into the manifest; none has the name of a column of its own.
    below : tuple of str
        Folders of the root to which the search for images is limited; empty: the whole root.
    image_pattern : str
        The path of an image that is not there, for builds from tables alone, with columns in
        braces: "images/{image_id}". Empty: what column `image` holds.
    rows : str
        "equal": several rows of one image must say the same. "any": it is abnormal if any row is,
        else unknown if any is; covariates in which the rows differ become empty.
    """

    file: str
    image: str
    patient: tuple[str, ...] = ()
    study: tuple[str, ...] = ()
    covariates: tuple[str, ...] = ()
    below: tuple[str, ...] = ()
    image_pattern: str = ""
    rows: str = "equal"


@dataclass(frozen=True)
class Folders:
    """`[folders]`: everything is in the paths.

    Attributes
    ----------
    pattern : str
        How paths below the root look, with fields in braces, `*` for any text within a folder's or
        file's name, and `**` for any number of folders:
        "{split}/{region}/{patient}/{study}_{label}/*.png". Fields take as little text as they can.
        `split`, `region`, `patient`, `study`, `label` have their meaning; others are covariates.
    """

    pattern: str


@dataclass(frozen=True)
class Dicom:
    """`[dicom]`: everything is in the files' own elements, labels perhaps in a table.

    Attributes
    ----------
    identifiers : str
        "hash": patient and study become keyed hashes (see `dataset.pseudonyms`), and ages from 90
        on become 90. "keep": they are kept as they are.
    modalities : tuple of str
        Which to take; other objects are left out with their reason.
    table : str
        A CSV file with labels, looked for as `[table]` says. Empty: there are none.
    column : str
        Its column that says which image or study a row speaks of.
    match : str
        What that column holds: "file" (a path below the root, or a file's name or stem),
        "instance" (SOPInstanceUID), "study" (StudyInstanceUID), "accession" (AccessionNumber).
    rows : str
        What several rows of one image or study come to, as in `[table]`.
    intent : str
        Which rendering of an exposure is kept where there is one FOR PRESENTATION and one FOR
        PROCESSING: "presentation", "processing", or "both".
    """

    identifiers: str = "hash"
    modalities: tuple[str, ...] = ("CR", "DX", "RG")
    table: str = ""
    column: str = ""
    match: str = "file"
    rows: str = "equal"
    intent: str = "presentation"


@dataclass(frozen=True)
class Region:
    """`[region]`: one of `column`, `one_hot` (a column per region) and `constant`.

    `several` names the region of rows with more than one column of `one_hot` set.
    """

    column: str = ""
    one_hot: tuple[str, ...] = ()
    constant: str = ""
    several: str = ""


@dataclass(frozen=True)
class Label:
    """`[label]`: which values of `column` (of the field `label`, in folders) mean what.

    `empty` says what an empty value means; `others` what values not listed mean. Either is normal,
    abnormal or unknown. Without `others` a value that is not listed is an error.
    """

    abnormal: tuple[str, ...]
    normal: tuple[str, ...] = ()
    column: str = ""
    empty: str = "unknown"
    others: str = ""


@dataclass(frozen=True)
class Groups:
    """`[groups]`: what stands for the patient in a dataset without patient ids.

    Attributes
    ----------
    rule : str
        "runs": images whose numbers follow each other by at most `max_gap`, while the columns
        `break_on` stay the same. "image": each image is its own patient.
    max_gap : int
        Largest difference between neighbouring numbers of a run.
    break_on : tuple of str
        Columns whose change ends a run.
    same_bytes : bool
        Whether images with the same bytes pull their groups together.
    """

    rule: str
    max_gap: int = 3
    break_on: tuple[str, ...] = ("region",)
    same_bytes: bool = True


@dataclass(frozen=True)
class Split:
    """`[split]`: a `column` of the table, or a `fraction` of studies drawn by patient for test."""

    column: str = ""
    fraction: float = 0.0
    seed: int = 0
