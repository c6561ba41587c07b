"""Recipes: how the files and tables of a dataset become a manifest."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

import medembed
from medembed.dataset.checks import SPLITS
from medembed.dataset.groups import join_same_bytes, name_runs
from medembed.dataset.layouts import read_layout
from medembed.dataset.listing import first_names
from medembed.dataset.manifest import (
    Manifest,
    count_rows,
    existing_root,
    hash_files,
    image_path,
    make_manifest,
)
from medembed.dataset.recipe_format import Groups, Recipe, parse_recipe
from medembed.dataset.splits import split_patients
from medembed.errors import ManifestError, PathNotFoundError, RecipeError

__all__ = ["BuildReport", "Recipe", "build_manifest", "load_recipe"]

NOT_FOUND = "not below the image root"


@dataclass(frozen=True)
class BuildReport:
    """What `build_manifest` made.

    Attributes
    ----------
    manifest : Manifest
    excluded : list of (str, str)
        Images of the dataset that are not in the manifest, each with the reason.
    warnings : list of str
        What a careful reader should know; `strict` makes these an error.
    """

    manifest: Manifest
    excluded: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the counts of `manifest.count`, the exclusions and the warnings, fit for JSON."""
        excluded = [{"image": image, "reason": reason} for image, reason in self.excluded]
        return {**count_rows(self.manifest.rows), "excluded": excluded, "warnings": self.warnings}


def load_recipe(path_or_name: str | Path) -> Recipe:
    """Load a recipe from a TOML file, or one that comes with medembed by its bare name.

    Raises
    ------
    PathNotFoundError
        There is no such file, and no recipe of that name.
    RecipeError
        The recipe cannot be read or contradicts itself.
    """
    path = Path(path_or_name)
    if path.exists() and not path.is_dir():  # whatever else it is, its reader says so
        return parse_recipe(path)
    packaged = _packaged_recipes()
    if str(path_or_name) in packaged:
        return parse_recipe(packaged[str(path_or_name)])
    known = ", ".join(sorted(packaged))
    raise PathNotFoundError(
        f"no recipe at {path_or_name}. Give the path of a .toml file, or one of the names {known}."
    )


def build_manifest(
    recipe: Recipe,
    image_root: str | Path,
    *,
    strict: bool = False,
    structure_only: bool = False,
    key_file: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BuildReport:
    """Build the manifest of the dataset below `image_root`.

    Parameters
    ----------
    recipe : Recipe
    image_root : path
        The directory that image paths are relative to.
    strict : bool
        Raise where there would be warnings: images of the tables that are missing, files that no
        table lists, counts that are not the expected ones, exclusions that match nothing.
    structure_only : bool
        Use the tables alone: images may be missing and `sha256` is empty. Such a manifest shows
        what a dataset holds; nothing can be extracted with it.
    key_file : path, optional
        What the identifiers of layout dicom are hashed with; made where it is not there. Without
        one a random key is used and forgotten: the identifiers, and with them a drawn split,
        differ from build to build.
    progress : callable, optional
        Called as `progress(done, total)` while files are hashed.

    Raises
    ------
    PathNotFoundError
        The root or a table is missing.
    RecipeError
        Recipe and dataset do not fit, or `strict` and there are warnings (all are listed).
    ManifestError
        The rows break a manifest's rules, as leaks do; lists all problems.
    """
    root = existing_root(image_root)
    listing = read_layout(recipe, root, Path(key_file) if key_file else None)
    warnings = list(listing.warnings)
    rows = _name_splits(recipe, listing.rows)
    rows["patient"] = _group_by_name(recipe.groups, rows)
    rows, excluded = _exclude(recipe, rows, warnings)
    excluded += listing.excluded
    if not structure_only:
        rows = _drop_missing(rows, listing.is_found, excluded, warnings, root)
    _refuse_warnings(recipe, strict, warnings)  # before the long work
    if rows.empty:
        raise RecipeError(f"recipe {recipe.name!r} finds no image in {root}.")
    rows = rows.drop(columns="name").reset_index(drop=True)
    rows["sha256"] = "" if structure_only else _hash(rows["image"], root, progress)
    if recipe.groups and recipe.groups.same_bytes:
        rows["patient"] = join_same_bytes(rows["patient"], rows["sha256"])
    if recipe.split and recipe.split.fraction:
        known = rows.assign(label=pd.to_numeric(rows["label"]).astype("Int8"))
        rows["split"] = split_patients(
            known, fraction=recipe.split.fraction, seed=recipe.split.seed
        )
    manifest = make_manifest(rows, recipe.label_level, source=f"recipe {recipe.name!r}")
    warnings += _compare(recipe.expected, manifest)
    _refuse_warnings(recipe, strict, warnings)
    return BuildReport(manifest, sorted(excluded), warnings)


def _packaged_recipes() -> dict[str, Path]:
    """Find the recipes inside an installed package, or beside the package in a checkout."""
    package = Path(medembed.__file__).parent
    folders = (package.parent / "data_manifests", package / "data_manifests")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.toml"))}


def _name_splits(recipe: Recipe, rows: pd.DataFrame) -> pd.DataFrame:
    """Bring the dataset's names of its splits to train and test."""
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
    """Name groups from all rows, so that missing and excluded images do not change them."""
    if groups is None:
        return rows["patient"]
    if groups.rule == "image":
        return rows["image"]
    unknown = [name for name in groups.break_on if name not in rows]
    if unknown:
        raise RecipeError(
            f"[groups]: break_on names {', '.join(unknown)}; known: {', '.join(rows.columns)}."
        )
    names = rows["name"].str.rpartition("/")[2]
    return name_runs(names, rows[list(groups.break_on)], max_gap=groups.max_gap)


def _exclude(
    recipe: Recipe, rows: pd.DataFrame, warnings: list[str]
) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """Leave out what `[exclude]` names: a path, a file's name or stem, or a folder."""
    excluded: list[tuple[str, str]] = []
    name = rows["image"].str.rpartition("/")[2]
    stem = name.str.replace(r"\.[^.]*$", "", regex=True)
    for key, reason in recipe.exclude.items():
        hit = rows["image"].eq(key) | name.eq(key) | stem.eq(key) | rows["name"].eq(key)
        hit |= rows["image"].str.startswith(key.rstrip("/") + "/")
        if not hit.any():
            warnings.append(f"[exclude] names {key!r}, which is no image of the dataset")
        excluded += [(image, reason) for image in rows["image"][hit]]
    left_out = {image for image, _ in excluded}
    reasons = dict(reversed(excluded))  # the first reason stands where several match
    return rows[~rows["image"].isin(left_out)], list(reasons.items())


def _drop_missing(
    rows: pd.DataFrame,
    is_found: "pd.Series[bool]",
    excluded: list[tuple[str, str]],
    warnings: list[str],
    root: Path,
) -> pd.DataFrame:
    """Leave out images that are not there; a root without any of them is the wrong root."""
    there = is_found.reindex(rows.index)
    missing = rows["image"][~there].tolist()
    if missing and not there.any():
        raise RecipeError(
            f"none of the {len(missing)} images of the tables are below {root}; the first is "
            f"{missing[0]}. Correct --image-root, or use --structure-only for the tables alone."
        )
    if missing:
        warnings.append(
            f"{len(missing)} of {len(rows)} images of the tables are {NOT_FOUND} and were left "
            f"out: {first_names(missing)}"
        )
        excluded += [(image, NOT_FOUND) for image in missing]
    return rows[there]


def _hash(
    images: "pd.Series[str]", root: Path, progress: Callable[[int, int], None] | None
) -> list[str]:
    try:
        paths = [image_path(root, image) for image in images]
    except ManifestError as error:
        raise RecipeError(str(error)) from error
    return hash_files(paths, progress)


def _refuse_warnings(recipe: Recipe, strict: bool, warnings: list[str]) -> None:
    if strict and warnings:
        listed = "\n".join(f"  - {warning}" for warning in warnings)
        raise RecipeError(
            f"recipe {recipe.name!r} and the image root do not agree (drop --strict to build "
            f"all the same):\n{listed}"
        )


def _compare(expected: dict[str, Any], manifest: Manifest) -> list[str]:
    """Hold the manifest's counts to `[expected]`."""
    return [
        line
        for where, wanted, rows in _parts(expected, manifest.rows)
        for line in _differences(where, wanted, rows)
    ]


def _parts(
    expected: dict[str, Any], rows: pd.DataFrame, where: str = ""
) -> list[tuple[str, dict[str, int], pd.DataFrame]]:
    """Pair each section of `[expected]` with the rows that it speaks of."""
    counts = {name: value for name, value in expected.items() if isinstance(value, int)}
    parts = [(where, counts, rows)]
    for split in SPLITS:
        if split in expected:
            parts += _parts(expected[split], rows[rows["split"] == split], split)
    for region, wanted in expected.get("region", {}).items():
        name = f"{where}, {region}" if where else region
        parts += _parts(wanted, rows[rows["region"] == region], name)
    return parts


def _differences(where: str, wanted: dict[str, int], rows: pd.DataFrame) -> list[str]:
    found = count_rows(rows)
    prefix = f"{where}: " if where else ""
    return [
        f"{prefix}{value} {name.replace('_', ' ')} expected, {found[name]} found"
        for name, value in wanted.items()
        if found[name] != value
    ]
