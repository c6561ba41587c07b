"""What a recipe says, section by section, and the parser that holds a file to it.

A recipe is a TOML file. At its top: `name`, `licence`, `citation`, `url`, `layout` (mura, table,
folders, dicom), `label_level` (study, image), `split_names` (a table: the dataset's name of a split
to train or test), `ids` (exact: see `identities`). Its sections are the dataclasses here. Any other
key is an error. All text but names of files is spelt as `text.normalise` does, as tables are.
"""

import difflib
import tomllib
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from medembed.core.errors import RecipeError
from medembed.core.files import read_plain
from medembed.core.text import normalise
from medembed.dataset.checks import LABEL_LEVELS, REQUIRED, SPLITS
from medembed.dataset.identities import EXACT, IDS

__all__ = [
    "LAYOUTS",
    "MEANINGS",
    "Dicom",
    "Folders",
    "Groups",
    "Label",
    "Recipe",
    "Region",
    "Split",
    "Table",
    "parse_recipe",
]


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


MAX_BYTES = 1 << 20  # of a recipe; those at hand are below 2 KB
LAYOUTS = ("mura", "table", "folders", "dicom")
DICOM_INTENTS = ("presentation", "processing", "both")
DICOM_MATCHES = ("file", "instance", "study", "accession")
MEANINGS = {"normal": "0", "abnormal": "1", "unknown": ""}
"""What a value may mean in `[label]`, and how a table of a manifest writes it."""
# Columns that a manifest, or the building of one, fills itself.
_TAKEN = (*REQUIRED, IDS, "label_level", "name")
_NAMES_OF_FILES = ("file", "table", "below", "image_pattern", "pattern", "exclude")
COUNTS = ("images", "studies", "patients", "abnormal", "abnormal_studies", "unlabelled")


@dataclass(frozen=True)
class Recipe:
    """A dataset's recipe; see the module's text and the sections' classes."""

    name: str
    licence: str
    citation: str
    url: str
    layout: str
    label_level: str
    table: Table | None = None
    folders: Folders | None = None
    dicom: Dicom | None = None
    region: Region | None = None
    label: Label | None = None
    groups: Groups | None = None
    split: Split | None = None
    split_names: dict[str, str] = field(default_factory=dict)
    ids: str = ""
    """Where it says "exact", patients whose identifiers look alike are different persons."""
    exclude: dict[str, str] = field(default_factory=dict)
    """`[exclude]`: an image's path or name, or a folder, and the reason why it is left out."""
    expected: dict[str, Any] = field(default_factory=dict)
    """`[expected]`: counts, also under `train`, `test`, `region.NAME`, `train.region.NAME`."""
    path: Path = field(default=Path(), metadata={"written": False})


SECTIONS: dict[str, type] = {
    "table": Table,
    "folders": Folders,
    "dicom": Dicom,
    "region": Region,
    "label": Label,
    "groups": Groups,
    "split": Split,
}


def parse_recipe(path: Path) -> Recipe:
    """Read a recipe's file.

    Raises
    ------
    RecipeError
        It is not TOML, has unknown, missing or contradicting keys, or values of the wrong type.
    """
    try:
        document = tomllib.loads(read_plain(path, max_bytes=MAX_BYTES).decode())
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:  # TOML's and Unicode's are ValueErrors
        raise RecipeError(f"{path} cannot be read as TOML: {error}") from error
    for name, kind in SECTIONS.items():
        if name in document:
            document[name] = _fill(kind, document[name], f"{path}, [{name}]")
    recipe = replace(_fill(Recipe, document, str(path)), path=path)
    _check(recipe)
    return recipe


T = TypeVar("T")

SIMPLE: dict[type, tuple[tuple[type, ...], str]] = {
    str: ((str,), "text"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    bool: ((bool,), "true or false"),
}


def _fill(kind: type[T], values: Any, where: str) -> T:
    """Make a dataclass of a TOML table, checking keys and types."""
    if not isinstance(values, dict):
        raise RecipeError(f"{where} must be a section, not {values!r}.")
    every = fields(kind)  # type: ignore[arg-type]
    known = {item.name: item for item in every if item.metadata.get("written", True)}
    _refuse_unknown(values, list(known), where)
    required = [
        n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING
    ]
    missing = [name for name in required if name not in values]
    if missing:
        raise RecipeError(f"{where} lacks {', '.join(missing)}. Add them.")
    evened = {n: v if n in _NAMES_OF_FILES else _normalised(v) for n, v in values.items()}
    return kind(**{name: _typed(known[name], value, where) for name, value in evened.items()})


def _normalised(value: Any) -> Any:
    """Spell all text in a value of TOML in one way."""
    if isinstance(value, str):
        return normalise(value)
    if isinstance(value, list):
        return [_normalised(item) for item in value]
    if isinstance(value, dict):
        return {normalise(name): _normalised(item) for name, item in value.items()}
    return value


def _refuse_unknown(values: dict[str, Any], known: list[str], where: str) -> None:
    complaints = []
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            complaints.append(f"unknown key {name!r}; {remedy}")
    if complaints:
        raise RecipeError(f"{where}: {'; '.join(complaints)}")


def _typed(item: "Field[Any]", value: Any, where: str) -> Any:
    if item.type == tuple[str, ...]:
        value = (value,) if isinstance(value, str) else value
        if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
            return tuple(value)
        raise RecipeError(f"{where}: {item.name} must be text or a list of texts, not {value!r}.")
    for kind, (accepted, noun) in SIMPLE.items():
        is_right = isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)
        if item.type is kind and not is_right:
            raise RecipeError(f"{where}: {item.name} must be {noun}, not {value!r}.")
    return value


def _check(recipe: Recipe) -> None:
    where = str(recipe.path)
    _refuse_other(f"{where}: layout", recipe.layout, LAYOUTS)
    _refuse_other(f"{where}: label_level", recipe.label_level, LABEL_LEVELS)
    _refuse_other(f"{where}: {IDS}", recipe.ids, ("", EXACT))
    _check_sections(recipe, where)
    for name, section in (("table", recipe.table), ("dicom", recipe.dicom)):
        if section:
            _refuse_other(f"{where}, [{name}]: rows", section.rows, ("equal", "any"))
    if recipe.layout == "dicom":
        _check_dicom(recipe, recipe.dicom or Dicom(), where)
    if recipe.label:
        _refuse_other(f"{where}, [label]: empty", recipe.label.empty, tuple(MEANINGS))
        _refuse_other(f"{where}, [label]: others", recipe.label.others, ("", *MEANINGS))
    if recipe.groups:
        _refuse_other(f"{where}, [groups]: rule", recipe.groups.rule, ("runs", "image"))
    for name, split in _texts(recipe.split_names, f"{where}, split_names").items():
        _refuse_other(f"{where}, split_names: {name}", split, SPLITS)
    _texts(recipe.exclude, f"{where}, [exclude]")
    _check_expected(recipe.expected, f"{where}, [expected]", (*SPLITS, "region"))


def _check_sections(recipe: Recipe, where: str) -> None:
    """Hold the sections to the layout: each needs some and has no use for others."""
    needed = {
        "mura": (),
        "table": ("table", "region", "label"),
        "folders": ("folders",),
        "dicom": ("split",),
    }
    useless = {
        "mura": ("table", "folders", "dicom", "region", "label", "groups", "split"),
        "table": ("folders", "dicom"),
        "folders": ("table", "dicom"),
        "dicom": ("table", "folders", "region", "groups"),
    }
    for name in needed[recipe.layout]:
        if getattr(recipe, name) is None:
            raise RecipeError(f"{where}: layout {recipe.layout!r} needs a section [{name}].")
    for name in useless[recipe.layout]:
        if getattr(recipe, name) is not None:
            raise RecipeError(f"{where}: layout {recipe.layout!r} has no use for [{name}].")
    if recipe.table and bool(recipe.table.patient) == bool(recipe.groups):
        raise RecipeError(f"{where}: give either patient columns in [table] or [groups], not both.")
    for folder in recipe.table.below if recipe.table else ():
        if Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise RecipeError(f"{where}, [table]: below names {folder!r}, outside the image root.")
    for name in recipe.table.covariates if recipe.table else ():
        if name in _TAKEN:
            raise RecipeError(
                f"{where}, [table]: covariates names {name!r}, and a manifest has a column {name} "
                "of its own. Leave it out, or rename the table's column."
            )
    if recipe.split and bool(recipe.split.column) == bool(recipe.split.fraction):
        raise RecipeError(f"{where}, [split]: give either column or fraction.")
    region = recipe.region
    if region and sum(map(bool, (region.column, region.one_hot, region.constant))) != 1:
        raise RecipeError(f"{where}, [region]: give one of column, one_hot and constant.")
    if recipe.table and not (recipe.label and recipe.label.column):
        raise RecipeError(f"{where}, [label]: name the table's column.")
    if recipe.table and recipe.split is None:
        raise RecipeError(f"{where}: add [split] with a column, or with a fraction to draw.")


def _check_dicom(recipe: Recipe, dicom: Dicom, where: str) -> None:
    _refuse_other(f"{where}, [dicom]: identifiers", dicom.identifiers, ("hash", "keep"))
    _refuse_other(f"{where}, [dicom]: match", dicom.match, DICOM_MATCHES)
    _refuse_other(f"{where}, [dicom]: intent", dicom.intent, DICOM_INTENTS)
    has_label = bool(recipe.label and recipe.label.column)
    if not bool(dicom.table) == bool(dicom.column) == has_label == (recipe.label is not None):
        raise RecipeError(
            f"{where}: for labels give a table and its column in [dicom], and a [label] with a "
            "column; without labels none of them."
        )
    if recipe.split and recipe.split.column and not dicom.table:
        raise RecipeError(f"{where}, [split]: a column needs a table in [dicom].")


def _refuse_other(what: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        choices = ", ".join(repr(item) for item in allowed if item)
        raise RecipeError(f"{what} is {value!r}; it must be one of {choices}.")


def _texts(values: Any, where: str) -> dict[str, str]:
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise RecipeError(f'{where} must hold lines of the form "name" = "text".')
    return values


def _check_expected(values: Any, where: str, parts: tuple[str, ...]) -> None:
    """Hold `[expected]` to counts, with `train`, `test` and `region.NAME` below."""
    if not isinstance(values, dict):
        raise RecipeError(f"{where} must be a section of counts.")
    _refuse_unknown(values, [*COUNTS, *parts], where)
    for name, value in values.items():
        if name == "region":
            if not isinstance(value, dict):
                raise RecipeError(f"{where}: region must hold a section for each region.")
            for region, counts in value.items():
                _check_expected(counts, f"{where}: region {region}", ())
        elif name in parts:
            _check_expected(value, f"{where}: {name}", ("region",))
        elif not isinstance(value, int) or isinstance(value, bool):
            raise RecipeError(f"{where}: {name} must be a whole number, not {value!r}.")
