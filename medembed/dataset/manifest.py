"""The manifest: one row per image, the lock file of a dataset.

A CSV (or Parquet) file with the columns of `REQUIRED`, then covariates and targets, then
`label_level`, sorted by `image`. Equal rows always give equal bytes. `checks` holds the rules of a
manifest. All text but `image` and `sha256` is normalised by `text.normalise`. If a recipe says so,
there is a column `ids`, the last before `label_level`; see `identities`.
"""

import hashlib
import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import pandas as pd

from medembed.core.errors import ArgumentError, ManifestError, PathNotFoundError
from medembed.core.files import as_path, write_atomically
from medembed.core.locations import BucketPath, Location, as_location
from medembed.core.object_store import list_objects
from medembed.core.text import Summarised, Summary, count_values, counted
from medembed.dataset.checks import (
    CONTENTS,
    LABEL_LEVELS,
    REQUIRED,
    find_content_problems,
    find_table_problems,
    find_warnings,
    is_ascending,
)
from medembed.dataset.identities import IDS, are_exact, name_persons
from medembed.dataset.tables import (
    csv_bytes,
    normalise_columns,
    read_parquet_table,
    read_text_table,
)
from medembed.dataset.targets import is_target, list_targets
from medembed.images.hashing import hash_files, hash_or_explain
from medembed.images.streams import (
    StreamRoot,
    explain_stream,
    is_stream,
    parse_stream_root,
    settle_stream,
)
from medembed.images.tar_stream import TarRoot

__all__ = [
    "LABEL_LEVELS",
    "REQUIRED",
    "Manifest",
    "Review",
    "check_destination",
    "check_images",
    "count",
    "count_rows",
    "existing_images",
    "existing_root",
    "existing_source",
    "find_problems",
    "hash_files",
    "image_path",
    "make_manifest",
    "read_contents",
    "read_manifest",
    "require_hashes",
    "review_manifest",
    "write_manifest",
]


@dataclass(frozen=True, eq=False, repr=False)
class Manifest(Summarised):
    """The images of one dataset, their patients, studies, labels and splits.

    Attributes
    ----------
    rows : pandas.DataFrame
        The columns of `REQUIRED`, then covariates and targets (`target_NAME`, see `targets`); one
        row per image, sorted by `image`, with a RangeIndex. Every column holds strings except
        `label`: Int8, 0 normal, 1 abnormal, `<NA>` unknown. `sha256` is empty throughout if the
        manifest was built from tables only.
    label_level : str
        "study": all views of a study share its label. "image": views may differ, and a study is
        abnormal if any view is.
    """

    rows: pd.DataFrame
    label_level: str

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the manifest's canonical CSV bytes."""
        return hashlib.sha256(_csv_bytes(self)).hexdigest()

    @property
    def has_hashes(self) -> bool:
        """Whether the rows have hashes of their images (not if built from tables only)."""
        return bool((self.rows["sha256"] != "").any())

    def write(self, path: str | Path) -> None:
        """Write the manifest as CSV or Parquet, by the suffix; see `write_manifest`."""
        write_manifest(self, path)

    def summarise(self) -> Summary:
        """Return counts of images by split, region and label."""
        n, rows = count(self), self.rows
        images, studies = counted(n["images"], "image"), counted(n["studies"], "study")
        abnormal = f"{counted(n['abnormal'], 'image')}, {counted(n['abnormal_studies'], 'study')}"
        others = [name for name in rows.columns if name not in (*REQUIRED, IDS)]
        covariates = [name for name in others if not is_target(name)]
        _, *targets = list_targets(rows.columns)
        return Summary(
            f"Manifest: {images}, {studies}, {counted(n['patients'], 'patient')}",
            {
                "splits": count_values(rows["split"].value_counts().sort_index().to_dict()),
                "regions": count_values(rows["region"].value_counts().to_dict()),
                "labels": f"by {self.label_level}; abnormal {abnormal}; "
                f"unlabelled {counted(n['unlabelled'], 'image')}",
                **({"targets": ", ".join(targets)} if targets else {}),
                "covariates": ", ".join(covariates) or "none",
                "sha256": "known" if self.has_hashes else "not known: built from tables only",
            },
        )


def require_hashes(manifest: Manifest) -> None:
    """Raise ManifestError unless every row has a SHA-256, without which no embedding is found."""
    n_empty = int((manifest.rows["sha256"] == "").sum())
    if n_empty:
        raise ManifestError(
            f"{n_empty} manifest rows have no sha256, so their images cannot be told apart and no "
            "embeddings can be joined to them. Build the manifest again without --structure-only."
        )


def make_manifest(table: pd.DataFrame, label_level: str, *, source: str = "the table") -> Manifest:
    """Return a manifest of a table of strings, after checking its rules.

    Parameters
    ----------
    table : pandas.DataFrame
        The columns of `REQUIRED` and any covariates, all strings, in any order; `label` is "0",
        "1" or "" (unknown).
    label_level : str
        "study" or "image".
    source : str
        The name of the table in messages.

    Raises
    ------
    ManifestError
        The table breaks the rules; the message lists all problems, with spreadsheet rows (the
        header is row 1).
    """
    table = normalise_columns(table, CONTENTS)
    _refuse(find_table_problems(table, label_level), source)
    return _arrange(table, label_level)


def read_manifest(path: Manifest | str | os.PathLike[str]) -> Manifest:
    """Return the checked manifest of a `.csv` or `.parquet` file; a `Manifest` is returned as is.

    Raises
    ------
    PathNotFoundError
        There is no such file.
    ManifestError
        The file cannot be read or breaks a manifest's rules; the message lists all problems.
    """
    if isinstance(path, Manifest):
        return path
    table = normalise_columns(_read_table(as_path(path, "a manifest", "a Manifest")), CONTENTS)
    level, problems = _label_level(table)
    table = table.drop(columns="label_level", errors="ignore")
    _refuse([*problems, *find_table_problems(table, level)], str(path))
    return _arrange(table, level)


def read_contents(path: str | Path) -> pd.DataFrame:
    """Return only the images of a manifest and their hashes, after checking these.

    For 10 million rows in Parquet this takes 2 GB of memory; the whole manifest takes 6 GB.

    Returns
    -------
    pandas.DataFrame
        Columns `image` and `sha256`, strings, in the file's order, with a RangeIndex.

    Raises
    ------
    PathNotFoundError
        There is no such file.
    ManifestError
        The file cannot be read, lacks these columns, or they break a manifest's rules.
    """
    table = _read_table(Path(path), CONTENTS)
    _refuse(find_content_problems(table), str(path))
    return table[[*CONTENTS]]


def write_manifest(manifest: Manifest, path: str | Path) -> None:
    """Write a manifest, as Parquet if the suffix is `.parquet`, else as CSV.

    The file is complete or absent, and equal rows give equal bytes.

    Raises
    ------
    PathNotFoundError
        The directory of `path` does not exist.
    ManifestError
        The rows break a manifest's rules, or the suffix is neither `.csv` nor `.parquet`.
    """
    path = check_destination(path)
    _refuse(find_problems(manifest), str(path))
    write_atomically(
        path, _parquet_bytes(manifest) if path.suffix == ".parquet" else _csv_bytes(manifest)
    )


def check_destination(path: str | Path) -> Path:
    """Return the path of a manifest that can be written, before the work that makes one.

    Raises
    ------
    PathNotFoundError
        The directory of `path` does not exist.
    ManifestError
        The suffix is neither `.csv` nor `.parquet`, or a directory has that name.
    """
    path = Path(path)
    if path.suffix not in {".csv", ".parquet"} or path.is_dir():
        raise ManifestError(f"a manifest is a file ending in .csv or .parquet; {path} is not.")
    if not path.parent.is_dir():
        raise PathNotFoundError(
            f"{path.parent} is not a directory to write {path.name} into. Create it, or name "
            "another."
        )
    return path


def find_problems(manifest: Manifest) -> list[str]:
    """Return a line for every rule that the manifest breaks, at most 20 of a kind."""
    return find_table_problems(_as_text(manifest.rows), manifest.label_level)


def check_images(
    manifest: Manifest,
    image_root: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Return the differences between the files below `image_root` and the manifest.

    Parameters
    ----------
    manifest : Manifest
    image_root : path
        The directory, or the bucket's prefix, that the manifest's paths are relative to.
    progress : callable, optional
        Called as progress(done, total) with files.

    Returns
    -------
    list of str
        One line for each file that is missing, cannot be read, lies outside the root, or has
        another hash than the manifest. Without hashes in the manifest only presence is checked.

    Raises
    ------
    PathNotFoundError
        `image_root` is not a directory, or there is nothing below the prefix.
    ArgumentError
        It is a stream, such as tar files, in which no image can be looked up.
    StorageError
        The bucket refuses, or keeps failing.
    """
    root = existing_images(image_root)
    names = manifest.rows["image"].tolist()
    paths, problems = _resolve_all(root, names)
    if not manifest.has_hashes:
        return problems + [f"{name} is missing" for name in _find_missing(root, paths)]
    expected = dict(zip(names, manifest.rows["sha256"], strict=True))
    found = hash_or_explain(list(paths.values()), progress)
    for name, outcome in zip(paths, found, strict=True):
        if isinstance(outcome, FileNotFoundError):
            problems.append(f"{name} is missing")
        elif isinstance(outcome, OSError):
            problems.append(f"{name} cannot be read: {outcome.strerror}")
        elif outcome != expected[name]:
            problems.append(
                f"{name} is not the manifest's: its sha256 begins {outcome[:12]}, "
                f"the manifest says {expected[name][:12]}"
            )
    return problems


def count(manifest: Manifest) -> dict[str, int]:
    """Return counts of what the manifest holds.

    Returns
    -------
    dict of str to int
        `images`, `studies`, `patients` (by `identities`); `abnormal`: images with label 1;
        `abnormal_studies`: those with such an image; `unlabelled`: images without a label.
    """
    return count_rows(manifest.rows)


def count_rows(rows: pd.DataFrame) -> dict[str, int]:
    """Return counts of all or some rows of a manifest; see `count`."""
    abnormal = rows["label"].eq(1).fillna(False).astype(bool)
    return {
        "images": len(rows),
        "studies": rows["study"].nunique(),
        "patients": name_persons(rows).nunique(),
        "abnormal": int(abnormal.sum()),
        "abnormal_studies": rows["study"][abnormal].nunique(),
        "unlabelled": int(rows["label"].isna().sum()),
    }


def existing_root(image_root: str | os.PathLike[str]) -> Path:
    """Return the image root with symbolic links resolved.

    Raises
    ------
    PathNotFoundError
        There is no such directory.
    ArgumentError
        It is a stream, such as tar files, in which no image can be looked up.
    """
    _refuse_stream(image_root)
    root = as_path(image_root, "the image root")
    if not root.is_dir():
        raise PathNotFoundError(
            f"no directory at {root} to find images in. "
            "Give --image-root the directory that holds the dataset, unpacked."
        )
    return root.resolve()


def existing_images(image_root: str | os.PathLike[str]) -> Location:
    """Return the image root, a directory as `existing_root` does or a bucket's prefix.

    Raises
    ------
    PathNotFoundError
        There is no such directory, or nothing below the prefix.
    ArgumentError
        It is a stream, such as tar files, in which no image can be looked up.
    StorageError
        The bucket cannot be reached.
    """
    _refuse_stream(image_root)
    root = existing_source(image_root)
    assert not is_stream(root)
    return root


def _refuse_stream(image_root: str | os.PathLike[str]) -> None:
    stream = parse_stream_root(os.fspath(image_root)) if _is_text(image_root) else None
    if stream is not None:
        raise ArgumentError(explain_stream(stream))


def existing_source(
    image_root: str | os.PathLike[str], *, pinned: bool = True
) -> Location | StreamRoot:
    """Return what `existing_images` does, or a stream.

    Parameters
    ----------
    pinned : bool
        Ask the hub for a dataset, and return it at its commit of now.
    """
    stream = parse_stream_root(os.fspath(image_root)) if _is_text(image_root) else None
    if stream is not None:
        return settle_stream(stream) if pinned or isinstance(stream, TarRoot) else stream
    root = as_location(image_root, "the image root")
    if not isinstance(root, BucketPath):
        return existing_root(root)
    if not list_objects(root, limit=1):
        raise PathNotFoundError(
            f"no object below {root} to find images in. "
            "Give --image-root the prefix that holds the dataset, unpacked."
        )
    return root


def _is_text(value: Any) -> bool:
    return isinstance(value, str | os.PathLike) and isinstance(os.fspath(value), str)


@overload
def image_path(image_root: Path, image: str) -> Path: ...


@overload
def image_path(image_root: BucketPath, image: str) -> BucketPath: ...


def image_path(image_root: Location, image: str) -> Location:
    """Return the file, or in a bucket the object, of a manifest's `image` below `image_root`.

    Raises
    ------
    ManifestError
        The path, or the file that it links to, lies outside the root.
    """
    if isinstance(image_root, BucketPath):
        parts = image.split("/")
        if not image or any(part in ("", ".", "..") for part in parts):
            raise ManifestError(
                f"image {image!r} names nothing below the image root {image_root}. Build the "
                "manifest again."
            )
        return image_root / image
    root = Path(image_root).resolve()
    resolved = _resolve(root / image)
    if not image or not resolved.is_relative_to(root) or resolved == root:
        raise ManifestError(
            f"image {image!r} leads out of the image root {root}. Choose as --image-root a "
            "directory that holds all images without links to the outside."
        )
    return resolved


def _resolve(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL in the name
        raise ManifestError(f"image {str(path)!r} is not a usable path: {error}.") from error


def _find_missing(root: Location, paths: Mapping[str, Location]) -> list[str]:
    """Return the names of files that do not exist; those of a bucket are listed, not asked for."""
    if isinstance(root, BucketPath):
        there = {found.path for found in list_objects(root)}
        return [name for name, path in paths.items() if path not in there]
    return [name for name, path in paths.items() if not Path(path).is_file()]


def _resolve_all(root: Location, names: list[str]) -> tuple[dict[str, Location], list[str]]:
    paths: dict[str, Location] = {}
    problems: list[str] = []
    for name in names:
        try:
            paths[name] = image_path(root, name)
        except ManifestError as error:
            problems.append(str(error))
    return paths, problems


def _refuse(problems: list[str], source: str) -> None:
    if problems:
        raise ManifestError(
            f"{source} breaks the rules of a manifest (rows as in a spreadsheet: the header is "
            "row 1). Correct the rows, or leave images out with [exclude] in the recipe:",
            problems,
        )


def _as_text(rows: pd.DataFrame) -> pd.DataFrame:
    text = rows.copy()
    if "label" in text:
        text["label"] = text["label"].astype("string").fillna("")
    return text


def _with_level(manifest: Manifest) -> pd.DataFrame:
    return manifest.rows.assign(label_level=manifest.label_level)


def _csv_bytes(manifest: Manifest) -> bytes:
    return csv_bytes(_as_text(_with_level(manifest)))


def _parquet_bytes(manifest: Manifest) -> bytes:
    buffer = io.BytesIO()
    _with_level(manifest).to_parquet(buffer, engine="pyarrow", index=False)
    return buffer.getvalue()


def _read_table(path: Path, columns: tuple[str, ...] = ()) -> pd.DataFrame:
    """Return all columns of a manifest, or those of `columns` that a Parquet file has."""
    if not path.exists():
        raise PathNotFoundError(
            f"no manifest at {path}. Build one with `medembed manifest build`, or correct the path."
        )
    if path.suffix == ".parquet":
        return read_parquet_table(path, ManifestError, columns)
    return read_text_table(path, ManifestError)


def _label_level(table: pd.DataFrame) -> tuple[str, list[str]]:
    """Return the single value of column `label_level`, and problems of the column."""
    if "label_level" not in table:
        return "image", ["missing column: label_level (study or image in every row)"]
    levels = sorted(table["label_level"].unique())
    if len(levels) > 1:
        return "image", [f"column label_level must hold one value, not {', '.join(levels[:5])}"]
    return (levels[0] if levels else "image"), []


def _arrange(table: pd.DataFrame, label_level: str) -> Manifest:
    last = [IDS] if are_exact(table) else []
    covariates = [name for name in table.columns if name not in (*REQUIRED, *last)]
    rows = table[[*REQUIRED, *covariates, *last]]
    if not is_ascending(rows["image"]):
        rows = rows.sort_values("image", kind="stable")
    rows = rows.reset_index(drop=True).astype(str)
    rows["label"] = rows["label"].map({"0": 0, "1": 1}).astype("Int8")
    return Manifest(rows, label_level)


@dataclass(frozen=True)
class Review:
    """The problems and warnings that were found.

    Attributes
    ----------
    problems : list of str
        Everything wrong with the rows; or, if the rows are sound, with their images.
    warnings : list of str
        Warnings of `checks.find_warnings`; none if the rows break the rules.
    """

    problems: list[str]
    warnings: list[str] = field(default_factory=list)


def review_manifest(
    path: str | Path,
    image_root: str | os.PathLike[str] | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Review:
    """Return the review of a manifest's file and, given a root, of its images.

    Raises
    ------
    PathNotFoundError
        There is no such file or root.
    ArgumentError, StorageError
        As `check_images` raises them.
    ManifestError
        The file cannot be read as a table at all.
    """
    try:
        manifest = read_manifest(path)
    except ManifestError as error:
        if not error.problems:
            raise
        return Review(list(error.problems))
    problems = [] if image_root is None else check_images(manifest, image_root, progress)
    return Review(problems, find_warnings(manifest.rows))
