"""The review of a manifest: what breaks its rules, and what should be looked at."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from medembed.core.errors import ManifestError
from medembed.dataset.checks import find_warnings
from medembed.dataset.manifest import check_images, read_manifest

__all__ = ["Review", "review_manifest"]


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
    image_root: str | Path | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Review:
    """Return the review of a manifest's file and, given a root, of its images.

    Raises
    ------
    PathNotFoundError
        There is no such file or root.
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
