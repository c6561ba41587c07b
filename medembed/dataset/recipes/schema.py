"""The schema of recipes, section by section, and their parser.

A recipe is a TOML file. `name`, `layout` (mura, table, folders, dicom) and `label_level` (study,
image) are required; the sections are the classes here. Any other key is an error. All text but
names of files is normalised by `text.normalise`, like tables.
"""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from medembed.core.errors import RecipeError
from medembed.core.files import read_plain
from medembed.core.schema import (
    ClosedRecord,
    Count,
    Field,
    Problem,
    Texts,
    field_validator,
    find_problems,
    model_validator,
    parse,
)
from medembed.core.text import normalise
from medembed.dataset.checks import REQUIRED
from medembed.dataset.foreign_tables import TableFormat
from medembed.dataset.identities import IDS
from medembed.dataset.recipes.listing import refuse
from medembed.dataset.targets import is_target, name_problem, target_column

__all__ = [
    "MEANINGS",
    "Dicom",
    "Folders",
    "Format",
    "Groups",
    "Label",
    "Meaning",
    "Recipe",
    "Region",
    "Section",
    "Split",
    "Table",
    "Target",
    "make_recipe",
    "parse_recipe",
]

Layout = Literal["mura", "table", "folders", "dicom"]
Meaning = Literal["normal", "abnormal", "unknown"]
Answer = Literal["negative", "positive", "unknown", "normal", "abnormal"]
Rows = Literal["equal", "any"]
SplitName = Literal["train", "test"]
MEANINGS = {"normal": "0", "abnormal": "1", "unknown": ""}
"""The meanings of values in `[label]`, and how a manifest's table writes them."""


class Section(ClosedRecord):
    """A section of a recipe; a single text is accepted for a list of one."""

    @field_validator("*", mode="before")
    @classmethod
    def _list_one_text(cls, value: object, info: Any) -> object:
        is_list = cls.model_fields[info.field_name].annotation == tuple[str, ...]
        return (value,) if is_list and isinstance(value, str) else value


class Table(Section):
    """`[table]`: a table with one row per image, as CSV, Excel or Parquet.

    Attributes
    ----------
    file : tuple of str
        Name of the file, looked for in the image root, then beside the root, then beside the
        recipe. Several files are read one after the other.
    file_column : str
        Name of a column to make of the files' names without suffix, for example as the split.
    columns : tuple of str
        Names of the columns of a table without a header.
    image : str
        Column with a path below the root, or the name or stem of a file anywhere below it; or with
        a folder's path or name, if a row describes all images below that.
    fields : str
        A pattern, as in `[folders]`, of the values of column `image`; its fields become further
        columns of the table: "**/{patient}/{study}/{view}.jpg".
    patient, study : tuple of str
        Columns that together name the patient and the study; empty if there are none. Without
        `study` each image is a study of its own.
    covariates : tuple of str
        Columns that are copied into the manifest; they must not be named like its own columns.
    below : tuple of str
        Folders of the root to which the search for images is limited; empty: the whole root.
    image_pattern : str
        The path of a missing image, for builds from tables only, with columns in braces:
        "images/{image_id}". Empty: the value of column `image`.
    rows : str
        "equal": several rows of one image must agree. "any": the image is abnormal if any row is,
        else unknown if any is; covariates in which the rows differ become empty.
    """

    file: Texts = Field(min_length=1)
    image: str
    file_column: str = ""
    columns: Texts = ()
    fields: str = ""
    patient: Texts = ()
    study: Texts = ()
    covariates: Texts = ()
    below: Texts = ()
    image_pattern: str = ""
    rows: Rows = "equal"


class Format(Section):
    """`[format]`: how the table's file is written, if detection would be wrong.

    Attributes
    ----------
    encoding : str
        Python's name of the encoding, such as "utf-8" or "cp1252".
    delimiter : str
        The character between two fields.
    decimal : str
        The decimal separator of numbers in covariates: "." or ",".
    sheet : str
        The sheet of an Excel file.
    """

    encoding: str = ""
    delimiter: str = Field(default="", max_length=1)
    decimal: Literal["", ".", ","] = ""
    sheet: str = ""

    def as_format(self) -> TableFormat:
        """Return the format for reading tables."""
        return TableFormat(self.encoding, self.delimiter, self.decimal, self.sheet)


class Folders(Section):
    """`[folders]`: everything is in the paths.

    Attributes
    ----------
    pattern : str
        The form of paths below the root, with fields in braces, `*` for any text within a folder's
        or file's name, and `**` for any number of folders:
        "{split}/{region}/{patient}/{study}_{label}/*.png". Fields match as little text as possible.
        `split`, `region`, `patient`, `study`, `label` have their meaning; others are covariates.
    """

    pattern: str


class Dicom(Section):
    """`[dicom]`: everything is in the files' own elements, but labels may be in a table.

    Attributes
    ----------
    identifiers : str
        "hash": patient and study become keyed hashes (see `dataset.pseudonyms`), and ages from 90
        on become 90. "keep": they are kept as they are.
    modalities : tuple of str
        The modalities to keep; other objects are left out with their reason.
    table : str
        A table with labels, looked for like that of `[table]`. Empty: there are no labels.
    column : str
        The column that says which image or study a row describes.
    match : str
        What that column holds: "file" (a path below the root, or a file's name or stem),
        "instance" (SOPInstanceUID), "study" (StudyInstanceUID), "accession" (AccessionNumber).
    rows : str
        How several rows of one image or study are combined, as in `[table]`.
    intent : str
        Which rendering of an exposure is kept if there is one FOR PRESENTATION and one FOR
        PROCESSING: "presentation", "processing", or "both".
    """

    identifiers: Literal["hash", "keep"] = "hash"
    modalities: Texts = ("CR", "DX", "RG")
    table: str = ""
    column: str = ""
    match: Literal["file", "instance", "study", "accession"] = "file"
    rows: Rows = "equal"
    intent: Literal["presentation", "processing", "both"] = "presentation"


class Region(Section):
    """`[region]`: one of `column`, `one_hot` (a column per region) and `constant`.

    `several` names the region of rows with more than one column of `one_hot` set.
    """

    column: str = ""
    one_hot: Texts = ()
    constant: str = ""
    several: str = ""


class Label(Section):
    """`[label]`: the meaning of values of `column` (in folders, of the field `label`).

    Values of `unknown` say neither. `empty` is the meaning of an empty value, `others` that of
    values not listed. Without `others` a value that is not listed is an error.
    """

    abnormal: Texts
    normal: Texts = ()
    unknown: Texts = ()
    column: str = ""
    empty: Meaning = "unknown"
    others: Meaning | Literal[""] = ""


class Target(Section):
    """`[targets.NAME]`: a further question about each image, which becomes a column `target_NAME`.

    NAME consists of a to z, 0 to 9 and _.

    Attributes
    ----------
    column : str
        Column of the table (in folders, a field of the pattern) that holds the answer.
    positive, negative : tuple of str
        Values that mean yes and no; `abnormal` and `normal` are other names for them.
    empty : str
        The meaning of an empty value: "unknown", "negative" or "positive".
    others : str
        The meaning of values that are not listed. Without it such a value is an error.
    uncertain_values : tuple of str
        Values that mean "cannot be told", such as CheXpert's -1.
    uncertain : str
        What becomes of these: "ignore" (unknown), "positive" or "negative".
    separator : str
        Text between several values of one field. The field is positive if any value is, else
        unknown if any is, else negative. Brackets, quotes and blanks around a value are dropped.
    each_value : bool
        Make a target of every value of the column, one against the rest: `target_NAME_VALUE`, with
        the value in lower case and _ in place of anything but a to z and 0 to 9.
    """

    column: str
    positive: Texts = ()
    negative: Texts = ()
    abnormal: Texts = ()
    normal: Texts = ()
    empty: Answer = "unknown"
    others: Answer | Literal[""] = ""
    uncertain_values: Texts = ()
    uncertain: Literal["ignore", "positive", "negative"] = "ignore"
    separator: str = ""
    each_value: bool = False

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        yes, no = (*self.positive, *self.abnormal), (*self.negative, *self.normal)
        if self.each_value:
            if yes or no or self.others:
                raise ValueError(
                    "has each_value, which makes a target of every value; leave out the lists of "
                    "positive and negative values and `others`"
                )
        elif not yes and self.others not in ("positive", "abnormal"):
            raise ValueError(
                "lists no positive value; give positive = [...], or each_value = true for one "
                "target per value"
            )
        elif not no and not self.others and self.empty not in ("negative", "normal"):
            raise ValueError(
                "lists no negative value; give negative = [...], or what other values mean, as in "
                'others = "negative"'
            )
        return self


class Groups(Section):
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
        Whether groups are joined if they share images with equal bytes.
    """

    rule: Literal["runs", "image"]
    max_gap: int = 3
    break_on: Texts = ("region",)
    same_bytes: bool = True


class Split(Section):
    """`[split]`: a `column` of the table, or a `fraction` of studies drawn by patient for test."""

    column: str = ""
    fraction: float = 0.0
    seed: int = 0


class _Counts(Section):
    """Counts that are known beforehand."""

    images: Count | None = None
    studies: Count | None = None
    patients: Count | None = None
    abnormal: Count | None = None
    abnormal_studies: Count | None = None
    unlabelled: Count | None = None


class _Part(_Counts):
    region: dict[str, _Counts] = Field(default_factory=dict)


class _Expected(_Part):
    train: _Part = _Part()
    test: _Part = _Part()


class Recipe(Section):
    """A data set's recipe; see the module's text and the sections' classes.

    Attributes
    ----------
    licence, citation, url : str
        Where the data set comes from and how it may be used; "" if unknown.
    about, patient_ids : str
        A line on the data set, and one on what names its patients.
    tried : str
        How much of the data set the recipe was tried on.
    split_names : dict of str to str
        The data set's names of splits, each with train or test.
    ids : str
        If "exact", patients whose identifiers look alike are different persons.
    exclude : dict of str to str
        `[exclude]`: an image's path or name, or a folder, and the reason why it is left out.
    expected : dict
        `[expected]`: counts, also under `train`, `test`, `region.NAME`, `train.region.NAME`.
    path : Path
        The recipe's file.
    """

    name: str
    layout: Layout
    label_level: Literal["study", "image"]
    licence: str = ""
    citation: str = ""
    url: str = ""
    about: str = ""
    patient_ids: str = ""
    tried: str = ""
    table: Table | None = None
    format: Format = Format()
    folders: Folders | None = None
    dicom: Dicom | None = None
    region: Region | None = None
    label: Label | None = None
    groups: Groups | None = None
    split: Split | None = None
    targets: dict[str, Target] = Field(default_factory=dict)
    split_names: dict[str, SplitName] = Field(default_factory=dict)
    ids: Literal["", "exact"] = ""
    exclude: dict[str, str] = Field(default_factory=dict)
    expected: dict[str, Any] = Field(default_factory=dict)
    _path: Path = Path()

    @field_validator("targets")
    @classmethod
    def _check_targets(cls, value: dict[str, Target]) -> dict[str, Target]:
        for name in value:
            if wrong := name_problem(name):
                raise ValueError(f"{name!r} names no target: {wrong}")
        return value

    @field_validator("expected")
    @classmethod
    def _hold_to_counts(cls, value: dict[str, Any]) -> dict[str, Any]:
        if problems := find_problems(_Expected, value):
            raise ValueError("; ".join(map(str, problems)))
        return value

    @property
    def path(self) -> Path:
        """The recipe's file; ``Path()`` for a recipe made in memory."""
        return self._path


MAX_BYTES = 1 << 20  # of a recipe; those at hand are below 2 KB
# Columns that a manifest, or the building of one, fills itself.
_TAKEN = (*REQUIRED, IDS, "label_level", "name")
_NAMES_OF_FILES = ("file", "table", "below", "image_pattern", "fields", "pattern", "exclude")
_SECTIONS = (
    *("table", "format", "folders", "dicom", "region", "label", "groups", "split"),
    *("targets", "split_names", "exclude", "expected"),
)
_NEEDED = {
    "mura": (),
    "table": ("table", "region", "label", "split"),
    "folders": ("folders",),
    "dicom": ("split",),
}
_USELESS = {
    "mura": (
        "table",
        "format",
        "folders",
        "dicom",
        "region",
        "label",
        "groups",
        "split",
        "targets",
    ),
    "table": ("folders", "dicom"),
    "folders": ("table", "format", "dicom"),
    "dicom": ("table", "folders", "region", "groups"),
}


def parse_recipe(path: Path) -> Recipe:
    """Return the recipe in a file.

    Raises
    ------
    RecipeError
        The file is not TOML, has unknown, missing or contradicting keys, or values of the wrong
        type; the message lists everything that is wrong.
    """
    try:
        text = read_plain(path, max_bytes=MAX_BYTES).decode()
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise RecipeError(f"{path} cannot be read as TOML: {error}") from error
    return make_recipe(text, path)


def make_recipe(text: str, path: Path) -> Recipe:
    """Return the recipe of a TOML text, with the errors of `parse_recipe`.

    Parameters
    ----------
    text : str
    path : Path
        The recipe's name in messages, and its `Recipe.path`.
    """
    try:
        document = _normalised(tomllib.loads(text))
        problems = [*_describe(find_problems(Recipe, document)), *_find_contradictions(document)]
    except (ValueError, RecursionError) as error:  # TOML's are ValueErrors
        raise RecipeError(f"{path} cannot be read as TOML: {error}") from error
    if len(problems) == 1:
        raise RecipeError(f"{path}: {problems[0]}")
    refuse(problems, str(path), "the recipe cannot be used; correct it:")
    recipe = parse(Recipe, document, RecipeError, path)
    recipe._path = path
    return recipe


def _normalised(value: Any) -> Any:
    """Return a TOML value with all text normalised, except names of files."""
    if isinstance(value, str):
        return normalise(value)
    if isinstance(value, list):
        return [_normalised(item) for item in value]
    if isinstance(value, dict):
        return {normalise(k): v if _names_files(k, v) else _normalised(v) for k, v in value.items()}
    return value


def _names_files(key: str, value: object) -> bool:
    return key in _NAMES_OF_FILES and not (key == "table" and isinstance(value, dict))


def _describe(problems: Sequence[Problem]) -> Iterator[str]:
    """Yield a sentence for each problem; the first one names all keys that are missing."""
    for problem in problems:
        section, _, key = problem.key.partition(".")
        where = f"[{section}]" if section in _SECTIONS else problem.key
        if section in _SECTIONS and key:
            where += f": {key}"
        text = f"{where} {problem.text}".lstrip()
        yield text if text.endswith("?") else f"{text}."


def _find_contradictions(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield contradictions between sections; wrong types are reported elsewhere."""
    layout = document.get("layout")
    if not isinstance(layout, str) or layout not in _NEEDED:
        return
    lacking = [f"[{name}]" for name in _NEEDED[layout] if name not in document]
    if lacking:
        noun = "a section" if len(lacking) == 1 else "sections"
        yield f"layout {layout!r} needs {noun} {', '.join(lacking)}."
    for name in _USELESS[layout]:
        if name in document:
            yield f"layout {layout!r} has no use for [{name}]."
    parts = {name: document.get(name) for name in _SECTIONS}
    table, dicom, region, label, split = (
        part if isinstance(part := parts[name], dict) else None
        for name in ("table", "dicom", "region", "label", "split")
    )
    if table is not None:
        yield from _contradict_table(table, label, has_groups=parts["groups"] is not None)
    if layout == "dicom":
        yield from _contradict_dicom(dicom or {}, label, split or {}, parts["targets"])
    if split is not None and bool(split.get("column")) == bool(split.get("fraction")):
        yield "[split]: give either column or fraction."
    named = [name for name in ("column", "one_hot", "constant") if region and region.get(name)]
    if region is not None and len(named) != 1:
        yield "[region]: give one of column, one_hot and constant."


def _contradict_table(
    table: dict[str, Any], label: dict[str, Any] | None, *, has_groups: bool
) -> Iterator[str]:
    if bool(table.get("patient")) == has_groups:
        yield (
            "give either patient columns in [table] or [groups], not both "
            '(rule = "image" in [groups]: each image counts as a patient of its own).'
        )
    if label is not None and not label.get("column"):
        yield "[label]: name the table's column."
    for folder in _texts(table.get("below")):
        if Path(folder).is_absolute() or ".." in Path(folder).parts:
            yield f"[table]: below names {folder!r}, outside the image root."
    for name in _texts(table.get("covariates")):
        if is_target(name):
            yield (
                f"[table]: covariates names {name!r}, which would be a target. Make it one with "
                f"[targets.{name.removeprefix(target_column(''))}], or rename the table's column."
            )
        if name in _TAKEN:
            yield (
                f"[table]: covariates names {name!r}, and a manifest has a column {name} of its "
                "own. Leave it out, or rename the table's column."
            )


def _contradict_dicom(
    dicom: dict[str, Any],
    label: dict[str, Any] | None,
    split: dict[str, Any],
    targets: object,
) -> Iterator[str]:
    has_table = bool(dicom.get("table"))
    has_label_column = bool(label and label.get("column"))
    if len({has_table, bool(dicom.get("column")), has_label_column, label is not None}) > 1:
        yield (
            "for labels give a table and its column in [dicom], and a [label] with a column; "
            "without labels none of them."
        )
    for key, needs in (("split", split.get("column")), ("targets", targets)):
        if needs and not has_table:
            yield f"[{key}]: a column needs a table in [dicom]."


def _texts(value: object) -> list[str]:
    every = value if isinstance(value, list) else [value]
    return [item for item in every if isinstance(item, str)]
