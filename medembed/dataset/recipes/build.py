"""Recipes: how the files and tables of a dataset become a manifest.

`compare_counts` compares the result with `[expected]`, the known counts of the dataset.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

import medembed
from medembed.core.errors import ManifestError, PathNotFoundError, RecipeError
from medembed.core.files import as_path
from medembed.core.text import Summarised, Summary
from medembed.dataset.checks import SPLITS, find_warnings
from medembed.dataset.identities import EXACT, IDS, find_persons
from medembed.dataset.manifest import (
    Manifest,
    count_rows,
    existing_root,
    image_path,
    make_manifest,
)
from medembed.dataset.recipes.image_index import compare_names, plain_path
from medembed.dataset.recipes.listing import Listing, first_names, name_unread
from medembed.dataset.recipes.readers import read_layout
from medembed.dataset.recipes.schema import Groups, Recipe, parse_recipe
from medembed.dataset.split_counts import SplitCount, count_splits, find_gaps, find_small_parts
from medembed.dataset.splits import join_same_bytes, name_runs, split_patients
from medembed.dataset.tables import normalise_column
from medembed.dataset.targets import count_target, describe_targets, list_targets
from medembed.images.hashing import hash_or_explain

__all__ = [
    "BuildReport",
    "Recipe",
    "build_manifest",
    "compare_counts",
    "find_recipes",
    "load_recipe",
]

N_TELLING = 4  # counts that are named for a part of a data set
FEW = 2  # differences that are named one by one, whether more or fewer


@dataclass(frozen=True)
class _Difference:
    where: str  # "", "train", "train, hand"
    name: str
    expected: int
    found: int

    def describe(self) -> str:
        prefix = f"{self.where}: " if self.where else ""
        return f"{prefix}{self.expected} {self.name} expected, {self.found} found"

    def describe_part(self) -> str:
        suffix = f" in {self.where}" if self.where else ""
        return f"{self.found} of {self.expected} {self.name}{suffix}"


def compare_counts(expected: dict[str, Any], manifest: Manifest) -> list[str]:
    """Return the differences of a manifest's counts from `[expected]`.

    Returns
    -------
    list of str
        A warning for each count that differs, or one for all if every count is lower than expected,
        as in a part of the data set.
    """
    differences = [
        _Difference(where, name.replace("_", " "), value, counts[name])
        for where, wanted, counts in _parts(expected, manifest.rows)
        for name, value in wanted.items()
        if counts[name] != value
    ]
    if len(differences) <= FEW or any(d.found > d.expected for d in differences):
        return [difference.describe() for difference in differences]
    first, *others = sorted(differences, key=lambda difference: bool(difference.where))
    told = ", ".join(difference.describe_part() for difference in others[: N_TELLING - 1])
    n_more = len(others) - (N_TELLING - 1)
    more = f"; {n_more} more counts are lower too" if n_more > 0 else ""
    return [f"{first.describe()}: a part of the data set, with {told}{more}"]


def _parts(
    expected: dict[str, Any], rows: pd.DataFrame, where: str = ""
) -> list[tuple[str, dict[str, int], dict[str, int]]]:
    """Return each section of `[expected]` with the counts of its rows."""
    wanted = {name: value for name, value in expected.items() if isinstance(value, int)}
    parts = [(where, wanted, count_rows(rows))]
    for split in SPLITS:
        if split in expected:
            parts += _parts(expected[split], rows[rows["split"] == split], split)
    for region, counts in expected.get("region", {}).items():
        name = f"{where}, {region}" if where else region
        parts += _parts(counts, rows[rows["region"] == region], name)
    return parts


NOT_FOUND = "not below the image root"


@dataclass(frozen=True, repr=False)
class BuildReport(Summarised):
    """The manifest that `build_manifest` made, and what was found on the way.

    Attributes
    ----------
    manifest : Manifest
    excluded : list of (str, str)
        Images of the dataset that are not in the manifest, each with the reason.
    warnings : list of str
        What a careful reader should know; `strict` makes these an error.
    notices : list of str
        What the build settled, and what the data set is too small for; never an error.
    n_unlisted : int
        Image files below the root that the recipe's tables or pattern lack.
    """

    manifest: Manifest
    excluded: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    n_unlisted: int = 0

    @property
    def splits(self) -> list[SplitCount]:
        """Counts of images, studies and patients by split, region and label."""
        return count_splits(self.manifest.rows)

    def summarise(self) -> Summary:
        """Return the manifest's counts, and the numbers of excluded images, warnings and so on."""
        about = self.manifest.summarise()
        counts = {
            name: f"{n:,}, see .{name}" if n else "none"
            for name, n in (
                ("excluded", len(self.excluded)),
                ("warnings", len(self.warnings)),
                ("notices", len(self.notices)),
            )
        }
        return Summary(about.title.replace("Manifest", "Build", 1), {**about.facts, **counts})

    def as_dict(self) -> dict[str, object]:
        """Return the counts of `manifest.count` and everything but the rows, as JSON values."""
        rows = self.manifest.rows
        _, *targets = list_targets(rows.columns)
        counted = {"targets": {name: count_target(rows, name) for name in targets}}
        return {
            **count_rows(rows),
            **(counted if targets else {}),
            "splits": [asdict(count) for count in self.splits],
            "excluded": [{"image": image, "reason": reason} for image, reason in self.excluded],
            "warnings": self.warnings,
            "notices": self.notices,
        }


def load_recipe(path_or_name: Recipe | str | os.PathLike[str]) -> Recipe:
    """Return the recipe in a TOML file, or one that comes with medembed, by its name.

    A `Recipe` is returned unchanged.

    Raises
    ------
    PathNotFoundError
        There is no such file, and no recipe of that name.
    RecipeError
        The recipe cannot be read or contradicts itself.
    """
    if isinstance(path_or_name, Recipe):
        return path_or_name
    path = as_path(path_or_name, "a recipe", "the name of one that is shipped")
    if path.exists() and not path.is_dir():  # the reader refuses anything unreadable
        return parse_recipe(path)
    packaged = find_recipes()
    if str(path_or_name) in packaged:
        return parse_recipe(packaged[str(path_or_name)])
    known = ", ".join(sorted(packaged))
    raise PathNotFoundError(
        f"no recipe at {path_or_name}. Give the path of a .toml file, or one of the names {known}."
    )


def build_manifest(
    recipe: Recipe | str | os.PathLike[str],
    image_root: str | os.PathLike[str],
    *,
    strict: bool = False,
    structure_only: bool = False,
    key_file: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BuildReport:
    """Return a report with the manifest of the dataset below `image_root`.

    Parameters
    ----------
    recipe : Recipe, path or str
        A recipe for `load_recipe`: a TOML file, or the name of a recipe that comes with medembed,
        such as ``mura``.
    image_root : path
        The directory that image paths are relative to.
    strict : bool
        Raise an error instead of warning. Warnings are about listed images that are missing, files
        that no table lists or that cannot be read, folders that were not entered, counts other than
        expected, exclusions that match nothing, a split without patients or without a class, and
        the findings of `checks.find_warnings`.
    structure_only : bool
        Use only the tables: images may be missing and `sha256` is empty. Such a manifest shows what
        a dataset holds, but cannot be used for extraction.
    key_file : path, optional
        Key for hashing the identifiers of layout dicom; created if missing. Without a file a random
        key is used and forgotten: the identifiers, and with them a drawn split, differ from build
        to build.
    progress : callable, optional
        Called as `progress(done, total)` while files are hashed.

    Raises
    ------
    PathNotFoundError
        The root or a table is missing.
    RecipeError
        Recipe and dataset do not match, or there are warnings and `strict` is set (all are listed).
    ManifestError
        The rows break a manifest's rules, as leaks do; the message lists all problems.
    """
    recipe, root = load_recipe(recipe), existing_root(image_root)
    listing = read_layout(recipe, root, Path(key_file) if key_file else None)
    warnings = [*([] if structure_only else listing.unseen), *listing.warnings]
    rows = _name_splits(recipe, listing.rows)
    rows["patient"] = _group_by_name(recipe.groups, rows)
    rows, excluded = _exclude(recipe, rows, warnings)
    excluded += listing.excluded
    if not structure_only:
        rows = _drop_missing(rows, listing, excluded, warnings, root)
    _refuse_warnings(recipe, strict, warnings)  # before the long work
    if rows.empty:
        raise RecipeError(f"recipe {recipe.name!r} finds no image in {root}.")
    rows = rows.drop(columns="name").reset_index(drop=True)
    rows["sha256"] = ""
    if not structure_only:
        rows = _hash(rows, root, excluded, warnings, progress)
    if recipe.groups and recipe.groups.same_bytes:
        rows["patient"] = join_same_bytes(rows["patient"], rows["sha256"])
    if recipe.ids == EXACT or (
        recipe.groups and find_persons(rows["patient"].unique()) is not None
    ):
        rows[IDS] = EXACT  # patients named after files are never spellings of one person
    if recipe.split and recipe.split.fraction:
        known = rows.assign(label=pd.to_numeric(rows["label"]).astype("Int8"))
        rows["split"] = split_patients(
            known, fraction=recipe.split.fraction, seed=recipe.split.seed
        )
    manifest = make_manifest(rows, recipe.label_level, source=f"recipe {recipe.name!r}")
    is_labelled = recipe.label is not None or bool(manifest.rows["label"].notna().any())
    warnings += compare_counts(recipe.expected, manifest)
    warnings += find_gaps(manifest.rows, is_labelled=is_labelled)
    warnings += find_warnings(manifest.rows)
    _refuse_warnings(recipe, strict, warnings)
    small = find_small_parts(manifest.rows, is_labelled=is_labelled)
    n_unlisted = 0 if structure_only else len(listing.files)
    copies = _describe_copies(recipe, manifest.rows)
    notices = [*listing.notices, *copies, *small, *describe_targets(manifest.rows)]
    return BuildReport(manifest, sorted(excluded), warnings, notices, n_unlisted)


def find_recipes() -> dict[str, Path]:
    """Return the recipes that come with medembed, by name; in a checkout, those beside it."""
    package = Path(medembed.__file__).parent
    folders = (package.parent / "data_manifests", package / "data_manifests")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.toml"))}


def _name_splits(recipe: Recipe, rows: pd.DataFrame) -> pd.DataFrame:
    """Return rows with the dataset's names of splits mapped to train and test."""
    if recipe.split and recipe.split.fraction:
        return rows
    split = rows["split"].replace(recipe.split_names)
    others = split[~split.isin(SPLITS)]
    if len(others):
        counted = ", ".join(f"{name!r} ({n} images)" for name, n in others.value_counts().items())
        raise RecipeError(
            f"recipe {recipe.name!r}: splits other than train and test: {counted}. Map each with "
            'split_names, as in split_names = {valid = "test"}.'
        )
    return rows.assign(split=split)


def _group_by_name(groups: Groups | None, rows: pd.DataFrame) -> "pd.Series[str]":
    """Return groups named from all rows, so that missing and excluded images do not change them."""
    if groups is None:
        return rows["patient"]
    if groups.rule == "image":
        return normalise_column(rows["image"])
    unknown = [name for name in groups.break_on if name not in rows]
    if unknown:
        raise RecipeError(
            f"[groups]: break_on names {', '.join(unknown)}; known: {', '.join(rows.columns)}."
        )
    names = rows["name"].str.rpartition("/")[2]
    runs = name_runs(names, rows[list(groups.break_on)], max_gap=groups.max_gap)
    return normalise_column(runs)


def _exclude(
    recipe: Recipe, rows: pd.DataFrame, warnings: list[str]
) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """Leave out what `[exclude]` names: a path, a file's name or stem, or a folder."""
    excluded: list[tuple[str, str]] = []
    path = rows["image"].map(plain_path) if recipe.exclude else rows["image"]
    name = path.str.rpartition("/")[2]
    stem = name.str.replace(r"\.[^.]*$", "", regex=True)
    for key, reason in recipe.exclude.items():
        own = plain_path(key)
        hit = path.eq(own) | name.eq(own) | stem.eq(own) | rows["name"].eq(key)
        hit |= path.str.startswith(f"{own}/")
        if not hit.any():
            warnings.append(f"[exclude] names {key!r}, which is not an image of the dataset")
        excluded += [(image, reason) for image in rows["image"][hit]]
    left_out = {image for image, _ in excluded}
    reasons = dict(reversed(excluded))  # the first reason counts if several match
    return rows[~rows["image"].isin(left_out)], list(reasons.items())


def _drop_missing(
    rows: pd.DataFrame,
    listing: Listing,
    excluded: list[tuple[str, str]],
    warnings: list[str],
    root: Path,
) -> pd.DataFrame:
    """Leave out missing images; if all are missing, raise an error that says why."""
    there = listing.is_found.reindex(rows.index)
    if there.all():
        return rows
    missing = rows["image"][~there].tolist()
    alike = compare_names(rows["name"][~there].tolist(), listing.files, root)
    if not there.any():
        raise RecipeError(_describe_none(missing, listing, alike, root))
    also = f". {alike}" if alike else ""
    warnings.append(
        f"{len(missing)} of {len(rows)} images of the tables are {NOT_FOUND} and were left "
        f"out: {first_names(missing)}{also}"
    )
    excluded += [(image, NOT_FOUND) for image in missing]
    return rows[there]


def _describe_none(missing: list[str], listing: Listing, alike: str, root: Path) -> str:
    """Return why none of the tables' images was found, blaming the root only if it is at fault."""
    unseen = "".join(f" {warning}." for warning in listing.unseen)
    if alike:
        why = alike
    elif listing.files:
        why = (
            f"The first in the tables is {missing[0]!r}, the first of {len(listing.files)} files "
            f"{min(listing.files)!r}, and no two match. Name the column of the files in the "
            "recipe, or correct --image-root."
        )
    else:
        why = f"There is no image at all, such as {missing[0]}. Correct --image-root."
    return (
        f"none of the {len(missing)} images of the tables are below {root}.{unseen} {why} Use "
        "--structure-only to read only the tables."
    )


def _hash(
    rows: pd.DataFrame,
    root: Path,
    excluded: list[tuple[str, str]],
    warnings: list[str],
    progress: Callable[[int, int], None] | None,
) -> pd.DataFrame:
    """Fill in the hashes, and leave out files that cannot be read."""
    try:
        paths = [image_path(root, image) for image in rows["image"]]
    except ManifestError as error:
        raise RecipeError(str(error)) from error
    hashes: list[str] = []
    unread: list[tuple[str, str]] = []
    for image, found in zip(rows["image"], hash_or_explain(paths, progress), strict=True):
        if isinstance(found, OSError):
            unread.append((image, found.strerror or type(found).__name__))
        hashes.append("" if isinstance(found, OSError) else found)
    warnings += (said := name_unread(unread))
    excluded += [(image, f"cannot be read: {reason}") for image, reason in unread]
    if len(unread) == len(rows):
        raise RecipeError(f"{said[0]}. Make the files below {root} readable.")
    rows = rows.assign(sha256=hashes)
    return rows[rows["sha256"] != ""].reset_index(drop=True)


def _describe_copies(recipe: Recipe, rows: pd.DataFrame) -> list[str]:
    """Return a sentence on images whose bytes stand under several names, if there are any."""
    n_copies = int(((rows["sha256"] != "") & rows["sha256"].duplicated(keep=False)).sum())
    if not n_copies:
        return []
    joined = " and count as one patient" if recipe.groups and recipe.groups.same_bytes else ""
    copies = f"{n_copies:,} images have the same bytes as another; such copies are embedded once"
    return [f"{copies}{joined}"]


def _refuse_warnings(recipe: Recipe, strict: bool, warnings: list[str]) -> None:
    if strict and warnings:
        listed = "\n".join(f"  - {warning}" for warning in warnings)
        raise RecipeError(
            f"recipe {recipe.name!r} causes warnings, which --strict refuses (drop --strict to "
            f"build anyway):\n{listed}"
        )
