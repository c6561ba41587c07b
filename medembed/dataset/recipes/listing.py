"""The result of every layout: one row per image; several rows of an image are joined or refused."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from medembed.core.errors import RecipeError
from medembed.dataset.checks import cap
from medembed.dataset.targets import LABEL, is_target

__all__ = [
    "EQUAL",
    "Listing",
    "count_of",
    "first_names",
    "is_unicode",
    "merge_rows",
    "name_unread",
    "refuse",
]


@dataclass
class Listing:
    """The images of a layout, before hashing, grouping and splitting.

    Attributes
    ----------
    rows : pandas.DataFrame
        Strings: `image`, `name` (which numbers runs), `patient` ("" if there is none), `study`,
        `region`, `label` ("0", "1", ""), `split` ("" if there is none), covariates, targets.
    is_found : pandas.Series of bool
        Whether the image is below the root.
    warnings : list of str
    excluded : list of (str, str)
        Files that the layout itself leaves out, each with the reason.
    notices : list of str
        What the layout itself settled.
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
    """Return the first three names; bytes that are not Unicode are escaped."""
    shown = [name if is_unicode(name) else ascii(name) for name in names[:3]]
    return ", ".join(shown) + (", …" if len(names) > 3 else "")


def count_of(n: int, noun: str) -> str:
    """Return a count with its noun, which is given in the singular: "1 row", "2 rows"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def is_unicode(path: str) -> bool:
    """Return whether a name is Unicode, without surrogates that stand for other bytes."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def name_unread(unread: Sequence[tuple[str, str]]) -> list[str]:
    """Return a warning if images cannot be read; `unread` has (image, reason) of each."""
    if not unread:
        return []
    named = first_names([f"{image} ({reason})" for image, reason in unread])
    verb = "cannot be read and was" if len(unread) == 1 else "cannot be read and were"
    return [f"{count_of(len(unread), 'file')} {verb} left out: {named}"]


def refuse(lines: Iterable[str], source: str, remedy: str, n_lines: int | None = None) -> None:
    """Raise a RecipeError that lists `lines`, if there are any.

    If `n_lines` is their number, lines that are not shown are never made.
    """
    if n_lines is None:
        lines = list(lines)
        n_lines = len(lines)
    if n_lines:
        listed = "\n".join(f"  - {line}" for line in cap(lines, n_lines))
        raise RecipeError(f"{source}: {remedy}\n{listed}")


EQUAL, ANY = "equal", "any"  # the values of `rows` in a recipe
WORDS = {"0": "normal", "1": "abnormal", "": "unknown"}
RANKS = ("0", "", "1")  # in Kleene's logic "or" is the highest
FIXED = ("patient", "study", "region", "split")  # an image has only one of each


def merge_rows(
    rows: pd.DataFrame,
    key: str,
    *,
    source: str,
    rule: str = EQUAL,
    section: str = "table",
    noun: str = "image",
) -> tuple[pd.DataFrame, list[str]]:
    """Return one row for each value of column `key`.

    Parameters
    ----------
    rows : pandas.DataFrame
        Strings, with the table's RangeIndex; column `label` and targets hold "0", "1" and "".
        Column `name` is not compared, and rows whose `key` is empty are left as they are.
    key : str
    rule : {"equal", "any"}
        "equal": rows of one image must agree. "any": the image is abnormal if any of its rows is,
        else unknown if any is (the "or" of Kleene's logic), else normal; targets likewise; a
        covariate in which the rows differ becomes empty. Patient, study, region and split must
        always be equal.
    source, section, noun : str
        The names in messages of the table, the recipe's section with the rule, and a row's unit.

    Returns
    -------
    pandas.DataFrame
        The first row of each image, on its index.
    list of str
        What was settled, a notice for each kind.

    Raises
    ------
    RecipeError
        Rows of one image differ in a column in which they must not; the message names it.
    """
    is_repeat = rows[key].duplicated() & (rows[key] != "")
    if not is_repeat.any():
        return rows, []
    shared = rows[rows[key].duplicated(keep=False) & (rows[key] != "")]
    torn = _differing(shared, key)
    for column in FIXED:
        _refuse_torn(shared, key, column, torn.pop(column, []), source, (
            f"rows of one {noun} differ in {column}; correct the table:"
        ))  # fmt: skip
    if rule != ANY:
        for column, keys in torn.items():
            _refuse_torn(shared, key, column, keys, source, _way_out(column, section, noun))
    first = rows[~is_repeat].copy()
    for column, keys in torn.items():
        at = first[key].map(set(keys).__contains__).astype(bool)
        if _is_answer(column):
            first.loc[at, column] = first.loc[at, key].map(_any_answer(shared, key, column))
        else:
            first.loc[at, column] = ""
    return first, _notices(shared, key, torn, source, noun)


def _differing(shared: pd.DataFrame, key: str) -> dict[str, list[str]]:
    """Return the keys whose rows differ, by column."""
    codes, names = pd.factorize(shared[key])
    first = np.unique(codes, return_index=True)[1]
    torn = {}
    for column in shared.columns.drop([key, "name"], errors="ignore"):
        values = pd.factorize(shared[column])[0]
        differs = np.unique(codes[values != values[first][codes]])
        if len(differs):
            torn[column] = list(names[differs])
    return torn


def _refuse_torn(
    shared: pd.DataFrame, key: str, column: str, keys: list[str], source: str, remedy: str
) -> None:
    lines = (f"{name}: {_each_value(shared[shared[key] == name], column)}" for name in keys)
    refuse(lines, source, remedy, len(keys))


def _each_value(rows: pd.DataFrame, column: str) -> str:
    """Return where each value first occurs: "normal in row 2, abnormal in row 3"."""
    first = rows.drop_duplicates(column)
    values = [WORDS[v] if _is_answer(column) else repr(v) for v in first[column]]
    named = [f"{v} in row {i + 2}" for v, i in zip(values, first.index.tolist(), strict=True)]
    return first_names(named)


def _way_out(column: str, section: str, noun: str) -> str:
    if _is_answer(column):
        return (
            f"rows of one {noun} differ in {column}. Correct the table, or say that it is "
            f'abnormal if any of its rows is, with rows = "{ANY}" in [{section}]:'
        )
    return (
        f"rows of one {noun} differ in {column}. Take {column} out of `covariates`, or leave it "
        f'empty for these images, with rows = "{ANY}" in [{section}]:'
    )


def _is_answer(column: str) -> bool:
    """Return whether a column holds answers that several rows of an image can be combined to."""
    return column == LABEL or is_target(column)


def _any_answer(shared: pd.DataFrame, key: str, column: str) -> "pd.Series[str]":
    """Return the label or target of each image, by its key."""
    ranks = shared[column].map(RANKS.index).groupby(shared[key], sort=False).max()
    return ranks.map(dict(enumerate(RANKS)))


def _notices(
    shared: pd.DataFrame, key: str, torn: dict[str, list[str]], source: str, noun: str
) -> list[str]:
    notices = []
    columns = [name for name in shared.columns if name != "name"]
    equal = shared[shared.duplicated(columns)]
    if len(equal):
        names = first_names(equal[key].drop_duplicates().tolist())
        notices.append(
            f"{count_of(len(equal), 'row')} of {source} only repeat another of the same {noun}, "
            f"and count once: {names}"
        )
    for column, keys in torn.items():
        became = "abnormal if any row is" if _is_answer(column) else "now empty"
        notices.append(
            f"{count_of(len(keys), noun)} of {source} differ in {column} from row to row, "
            f"{became}: {first_names(keys)}"
        )
    return notices
