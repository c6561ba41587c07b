"""The build file: what a build found and left out, kept beside the manifest for reports.

The build of `mine.csv` is `mine.build.json`: MANIFEST in `MANIFEST.build.json` is the name without
its suffix. The file holds counts, reasons and warnings, but no paths and no names of images,
patients or studies, so that it can be shared with results. Equal builds give equal bytes.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import pandas as pd

from medembed import __version__
from medembed.core.errors import ManifestError
from medembed.core.files import json_bytes, read_plain, writing_atomically
from medembed.core.schema import (
    Count,
    Given,
    Record,
    Texts,
    find_problems,
    model_validator,
)
from medembed.dataset.build_record import FORMAT, VERSION, build_path, read_document
from medembed.dataset.checks import SPLITS
from medembed.dataset.manifest import Manifest, check_destination, count_rows, write_manifest
from medembed.images.hub_dataset import HubRoot
from medembed.images.streams import StreamRoot

if TYPE_CHECKING:
    from medembed.dataset.recipes.build import BuildReport, Recipe

__all__ = [
    "BuildCounts",
    "BuildFile",
    "BuiltRecipe",
    "BuiltStream",
    "Excluded",
    "KeptBuild",
    "build_path",
    "check_destinations",
    "move_build",
    "read_build",
    "recipe_path",
    "write_build",
    "write_stream_build",
]

MAX_REASONS = 100
OTHERS = "other reasons"
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
_COUNTED = re.compile(r"\d+ [a-z ]+ expected, \d+ found|: a part of the data set")
"""Warnings about `[expected]`, which name only splits, regions and numbers."""


class Excluded(Record):
    """Images that were left out for one reason."""

    reason: str
    images: Count


class BuildCounts(Record):
    """What a build counted; see `_describe_build`."""

    found: Count
    not_listed: Count
    excluded: list[Excluded]
    images: Count
    studies: Given[Count] = None
    patients: Given[Count] = None

    @model_validator(mode="after")
    def _check_sum(self) -> Self:
        if self.found != self.not_listed + self.images + sum(own.images for own in self.excluded):
            raise ValueError("found is not the sum of not_listed, excluded and images")
        return self


class BuiltRecipe(Record):
    """The recipe of a build."""

    name: str | None = None
    sha256: str | None = None
    """Of its file; null for one that was made in memory."""


class BuiltStream(Record):
    """The stream of a build."""

    kind: Literal["tar", "hub"]
    dataset: str | None = None
    """OWNER/NAME at the hub."""
    revision: str | None = None
    """The branch or tag that was named; null for the default branch."""
    commit: str | None = None
    """What that was when the manifest was built; `extract` reads the same."""


class KeptBuild(Record):
    """The part of its manifest's build that a run keeps."""

    counts: BuildCounts
    recipe: BuiltRecipe
    """Without name and digest for a stream."""
    stream: Given[BuiltStream] = None
    """Only of a build from a stream."""
    medembed: str | None = None


class BuildFile(KeptBuild):
    """`MANIFEST.build.json`."""

    format: Literal["medembed-build"]
    version: Literal[1]
    manifest: str
    structure_only: Given[bool] = None
    warnings: Texts = ()
    notices: Texts = ()


def recipe_path(manifest_path: str | Path) -> Path:
    """Return the path of the recipe proposed for a manifest that was built without one."""
    return Path(manifest_path).with_suffix(".recipe.toml")


def check_destinations(manifest_path: str | Path) -> None:
    """Check that manifest and build file can be written, before the work that makes them.

    Raises
    ------
    PathNotFoundError, ManifestError
        `manifest.check_destination` refuses the path, or a directory has the build file's name.
    """
    check_destination(manifest_path)
    for path in (build_path(manifest_path), recipe_path(manifest_path)):
        if path.is_dir():
            raise ManifestError(
                f"{path} is a directory, and what the build found is written to a file of that "
                "name. Move it, or name another manifest."
            )


def write_build(
    report: "BuildReport", recipe: "Recipe", manifest_path: str | Path, recipe_text: str = ""
) -> None:
    """Write a manifest, and beside it what its build found; each file is complete or absent.

    A proposed recipe has no file yet: its text is written beside the two, so that the build can be
    repeated. If the manifest cannot be written, no file changes. After a crash between the renames,
    the digest shows that the build file does not belong to the manifest.

    Raises
    ------
    PathNotFoundError, ManifestError
        On the conditions of `write_manifest`.
    """
    text = recipe_text.encode()
    digest = hashlib.sha256(text).hexdigest() if text else _digest(recipe.path)
    data = json_bytes(_describe_build(report, {"name": recipe.name, "sha256": digest}))
    check_destinations(manifest_path)
    with ExitStack() as files:
        if text:
            own = writing_atomically(recipe_path(manifest_path), len(text))
            files.enter_context(own).write(text)
        files.enter_context(writing_atomically(build_path(manifest_path), len(data))).write(data)
        write_manifest(report.manifest, manifest_path)


def write_stream_build(
    report: "BuildReport", asked: StreamRoot, read: StreamRoot, manifest_path: str | Path
) -> None:
    """Write the manifest of a stream, and its build file, as `write_build` does.

    Parameters
    ----------
    report : BuildReport
    asked, read : TarRoot or HubRoot
        The stream as it was named, and at the commit that was read.
    manifest_path : path
    """
    stream: dict[str, Any] = {"kind": "tar"}
    if isinstance(asked, HubRoot) and isinstance(read, HubRoot):
        stream = {"kind": "hub", "dataset": read.dataset, "commit": read.revision}
        stream["revision"] = asked.revision or None
    document = _describe_build(report, {"name": None, "sha256": None})
    data = json_bytes({**document, "stream": stream})
    check_destinations(manifest_path)
    with writing_atomically(build_path(manifest_path), len(data)) as file:
        file.write(data)
        write_manifest(report.manifest, manifest_path)


def _describe_build(report: "BuildReport", recipe: dict[str, str | None]) -> dict[str, Any]:
    """Return the content of a build file.

    Returns
    -------
    dict
        JSON values: ``format``, ``version``, ``medembed``, ``recipe`` (``name``, ``sha256`` of its
        file or None), ``manifest`` (digest), ``structure_only``, ``warnings``, ``notices`` (without
        names), and ``counts``: ``found`` (images of the tables and below the root), ``not_listed``
        (files below the root that the tables or the pattern lack), ``excluded`` (``reason`` and
        ``images``, most first), ``images``, ``studies``, ``patients``, ``abnormal``,
        ``abnormal_studies``, ``unlabelled`` of the manifest and by ``splits``. ``found`` is the sum
        of ``not_listed``, the excluded images and ``images``.
    """
    rows = report.manifest.rows
    reasons = Counter(reason for _, reason in report.excluded)
    excluded = sorted(reasons.items(), key=lambda own: (-own[1], own[0]))
    if len(excluded) > MAX_REASONS:
        rest = sum(n for _, n in excluded[MAX_REASONS - 1 :])
        excluded = [*excluded[: MAX_REASONS - 1], (OTHERS, rest)]
    counts = {
        "found": len(rows) + len(report.excluded) + report.n_unlisted,
        "not_listed": report.n_unlisted,
        "excluded": [{"reason": reason, "images": n} for reason, n in excluded],
        **_count_rows(rows),
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "medembed": __version__,
        "recipe": recipe,
        "manifest": report.manifest.digest(),
        "structure_only": not report.manifest.has_hashes,
        "counts": counts,
        "warnings": _without_names(report.warnings),
        "notices": _without_names(report.notices),
    }


def move_build(manifest_path: str | Path, manifest: Manifest, relabelled: Manifest) -> bytes | None:
    """Return the bytes of a manifest's build file for one with other labels of the same images.

    Returns None if the manifest has no build file of its own.
    """
    document = read_document(manifest_path, manifest)
    if document is None or find_problems(BuildFile, document):
        return None
    counts = {**document["counts"], **_count_rows(relabelled.rows)}
    return json_bytes({**document, "manifest": relabelled.digest(), "counts": counts})


def read_build(manifest_path: object, manifest: Manifest) -> KeptBuild | None:
    """Return the build of a manifest for a run to keep, or None if there is no build file.

    Parameters
    ----------
    manifest_path : path or other
        The manifest's file. Anything else, such as a manifest in memory, has no build file.
    manifest : Manifest
        The manifest that was read; a build file with another digest is ignored.
    """
    document = read_document(manifest_path, manifest)
    if document is None:
        return None
    kept = {name: document.get(name) for name in ("counts", "recipe", "medembed")}
    kept |= {"stream": document["stream"]} if "stream" in document else {}
    return None if find_problems(KeptBuild, kept) else KeptBuild.model_validate(kept)


def _count_rows(rows: pd.DataFrame) -> dict[str, Any]:
    splits = {name: count_rows(rows[rows["split"] == name]) for name in SPLITS}
    return {**count_rows(rows), "splits": splits}


def _digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(read_plain(path)).hexdigest()
    except OSError:  # a recipe that was made in memory
        return None


def _without_names(sentences: Sequence[str]) -> list[str]:
    """Return sentences cut to what they count, without names of images or patients, or paths."""
    return [own if _COUNTED.search(own) else _cut(own) for own in sentences]


def _cut(sentence: str) -> str:
    """Return the part before a list of names, without quotations and what looks like a path."""
    first, colon, rest = _QUOTED.sub("…", sentence).partition(": ")
    if colon and " " not in first:  # a column's name
        first = f"{first}: {rest.partition(': ')[0]}"
    return re.sub(r"\S*/\S*", "…", first)
