"""What every layout yields, and how what does not fit is listed."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import pandas as pd

from medembed.core.errors import RecipeError
from medembed.dataset.checks import cap

__all__ = ["Listing", "count_of", "first_names", "is_unicode", "name_unread", "refuse"]


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
    notices : list of str
        What the layout has settled by itself.
    unseen : list of str
        Parts of the root that the search for images did not see.
    files : collection of str
        Images below the root that are in no row.
    """

    rows: pd.DataFrame
    is_found: "pd.Series[bool]"
    warnings: list[str] = field(default_factory=list)
    excluded: list[tuple[str, str]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    files: Collection[str] = ()


def first_names(names: Sequence[str]) -> str:
    """Name the first three; what is no Unicode is escaped."""
    shown = [name if is_unicode(name) else ascii(name) for name in names[:3]]
    return ", ".join(shown) + (", …" if len(names) > 3 else "")


def count_of(n: int, noun: str) -> str:
    """Count what `noun` names in the singular: "1 row", "2 rows"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def is_unicode(path: str) -> bool:
    """Tell whether a name has no bytes that POSIX keeps as half a character."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def name_unread(unread: Sequence[tuple[str, str]]) -> list[str]:
    """Return a warning where there are images that cannot be read: (image, reason) of each."""
    if not unread:
        return []
    named = first_names([f"{image} ({reason})" for image, reason in unread])
    verb = "cannot be read and was" if len(unread) == 1 else "cannot be read and were"
    return [f"{count_of(len(unread), 'file')} {verb} left out: {named}"]


def refuse(lines: Iterable[str], source: str, remedy: str, n_lines: int | None = None) -> None:
    """Raise a RecipeError that lists `lines`, where there are any.

    Where `n_lines` says how many there are, those that are not shown are never made.
    """
    if n_lines is None:
        lines = list(lines)
        n_lines = len(lines)
    if n_lines:
        listed = "\n".join(f"  - {line}" for line in cap(lines, n_lines))
        raise RecipeError(f"{source}: {remedy}\n{listed}")
