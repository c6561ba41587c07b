"""What every layout yields, and the image files below a root."""

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from medembed.dataset.checks import cap
from medembed.errors import RecipeError

__all__ = ["ImageIndex", "Listing", "first_names", "refuse"]

SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".dcm", ".dicom"}


@dataclass
class Listing:
    """What a layout holds, before hashing, grouping and splitting.

    Attributes
    ----------
    rows : pandas.DataFrame
        Strings: `image`, `name` (what runs are numbered by), `patient` ("" where there is none),
        `study`, `region`, `label` ("0", "1", ""), `split` ("" where there is none), covariates.
    is_found : pandas.Series of bool
        Whether the image is below the root.
    warnings : list of str
    excluded : list of (str, str)
        Files that the layout leaves out by itself, each with the reason.
    """

    rows: pd.DataFrame
    is_found: "pd.Series[bool]"
    warnings: list[str] = field(default_factory=list)
    excluded: list[tuple[str, str]] = field(default_factory=list)


class ImageIndex:
    """The image files below a root, walked once; hidden files and macOS's doubles are passed by.

    With `every_file` names do not matter: DICOM files have any.
    """

    def __init__(self, root: Path, below: Iterable[str] = (), *, every_file: bool = False) -> None:
        self.paths: set[str] = set()
        is_wanted = _is_visible if every_file else _is_image
        for folder in below or ("",):
            for parent, folders, names in os.walk(root / folder):
                folders[:] = [n for n in folders if not n.startswith(".") and n != "__MACOSX"]
                relative = Path(parent).relative_to(root).as_posix()
                prefix = "" if relative == "." else f"{relative}/"
                self.paths.update(prefix + name for name in names if is_wanted(name))
        odd = [ascii(path) for path in sorted(self.paths) if not _is_unicode(path)]
        refuse(odd, str(root), "file names that are not valid Unicode; rename the files:")
        self.by_name: dict[str, list[str]] = defaultdict(list)
        for path in sorted(self.paths):
            name = path.rpartition("/")[2]
            self.by_name[name].append(path)
            self.by_name[name.rpartition(".")[0]].append(path)

    def find(self, value: str) -> list[str]:
        """Return the files that `value` may mean: one path, or all files of that name or stem."""
        return [value] if value in self.paths else self.by_name.get(value, [])

    def unlisted(self, images: Iterable[str], source: str) -> list[str]:
        """Return a warning where files are in no row."""
        extra = sorted(self.paths.difference(images))
        if not extra:
            return []
        return [f"{len(extra)} image files are not in {source} and were left: {first_names(extra)}"]


def _is_visible(name: str) -> bool:
    return not name.startswith(".")


def _is_image(name: str) -> bool:
    return _is_visible(name) and os.path.splitext(name)[1].lower() in SUFFIXES


def _is_unicode(path: str) -> bool:
    """Whether the name has no bytes that POSIX keeps as half a character."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def first_names(names: list[str]) -> str:
    """Name the first three."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def refuse(lines: list[str], source: str, remedy: str) -> None:
    """Raise a RecipeError that lists `lines`, where there are any."""
    if lines:
        listed = "\n".join(f"  - {line}" for line in cap(lines, len(lines)))
        raise RecipeError(f"{source}: {remedy}\n{listed}")
