"""Groups of a manifest's rows by one covariate: its categories, or bands of its numbers."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isfinite
from reprlib import repr as short

import numpy as np
import pandas as pd

from medembed.core.errors import ManifestError
from medembed.core.text import normalise
from medembed.dataset.covariates import (
    MAX_CATEGORIES,
    NOT_COVARIATES,
    is_covariate,
    to_number,
)
from medembed.dataset.identities import name_persons

__all__ = [
    "FEW",
    "NOT_KNOWN",
    "OTHERS",
    "OUTSIDE",
    "RESERVED",
    "SEVERAL",
    "Grouping",
    "choose_grouping",
    "find_groupings",
    "group_rows",
    "parse_grouping",
]

FEW = 12
"""Distinct values that are shown one by one: more numbers need bands, more words their own page."""
NOT_KNOWN, OUTSIDE, SEVERAL, OTHERS = "not known", "outside", "several", "all others"
RESERVED = (SEVERAL, OUTSIDE, NOT_KNOWN, OTHERS)
"""Names of groups made here; a category with such a name is shown in quotation marks."""
_EDGE = r"-?(?:\d+\.?\d*|\.\d+)"
_BANDS = re.compile(rf"{_EDGE}(?:-{_EDGE})+", re.ASCII)
_QUARTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Grouping:
    """The column that rows are grouped by, and the edges of its bands.

    Attributes
    ----------
    column : str
        A covariate of the manifest, or its region.
    edges : tuple of float, optional
        Ascending, at least two: each band includes its lower edge, the last one its upper edge too.
        The outermost may be infinite. None if every value is a group.
    """

    column: str
    edges: tuple[float, ...] | None = None

    @property
    def bands(self) -> list[str]:
        """Names of the bands in ascending order, such as "[5, 10)"; empty without edges."""
        edges = self.edges or ()
        last = len(edges) - 2
        return [
            _name_band(low, high, is_last=i == last)
            for i, (low, high) in enumerate(pairwise(edges))
        ]


def parse_grouping(text: str, columns: Sequence[str]) -> Grouping:
    """Return the grouping by ``COLUMN`` or ``COLUMN:BANDS``, such as ``age:0-5-10-18``.

    Parameters
    ----------
    text : str
        The column and bands. If a column's name itself ends in a colon and bands, the whole text is
        that column.
    columns : sequence of str
        The columns of the manifest.

    Raises
    ------
    ManifestError
        There is no such column, it is not a covariate, or the bands are not ascending numbers.
    """
    text = normalise(text)
    column, colon, bands = text.rpartition(":")
    if not colon or text in columns or column not in columns:
        return Grouping(_require_covariate(text, columns))
    _require_covariate(column, columns)
    if not _BANDS.fullmatch(bands):
        raise ManifestError(
            f"bands {short(bands)} of {column} are not numbers with - between them. Write at least "
            f"two edges, such as {column}:0-5-10-18."
        )
    edges = _split_edges(bands)
    if any(low >= high for low, high in pairwise(edges)):
        raise ManifestError(
            f"bands {short(bands)} of {column} do not ascend. Write each edge once, the lowest "
            f"first, such as {column}:0-5-10-18."
        )
    return Grouping(column, edges)


def choose_grouping(rows: pd.DataFrame, text: str) -> Grouping:
    """Return a grouping by ``COLUMN`` or ``COLUMN:BANDS``.

    More than `FEW` different numbers without bands are split at their median.

    Parameters
    ----------
    rows : pandas.DataFrame
        The manifest rows that are grouped.
    text : str
        See `parse_grouping`.

    Raises
    ------
    ManifestError
        On the conditions of `parse_grouping`.
    """
    grouping = parse_grouping(text, [str(name) for name in rows.columns])
    texts = rows[grouping.column].astype(str).map(normalise)
    numbers = {text: to_number(text) for text in texts.unique() if text}
    if grouping.edges is None and _are_finite(numbers) and len(set(numbers.values())) > FEW:
        known = _known(texts, numbers)
        middle = float(np.quantile(known, 0.5, method="inverted_cdf"))
        if middle == known.min():
            middle = float(known[known > middle].min())
        return Grouping(grouping.column, (-inf, middle, inf))
    return grouping


def group_rows(rows: pd.DataFrame, grouping: Grouping) -> tuple["pd.Series[str]", list[str]]:
    """Return the group of each row.

    Parameters
    ----------
    rows : pandas.DataFrame
        The manifest rows that are scored.
    grouping : Grouping

    Returns
    -------
    pandas.Series of str
        On the index of `rows`: a category, a band, `OUTSIDE` of all bands, or `NOT_KNOWN`.
    list of str
        The names of categories or bands in order, without those two.

    Raises
    ------
    ManifestError
        The column holds words, and bands were given; or no bands were given, and it has more than
        `FEW` different numbers, more than `MAX_CATEGORIES` categories, or a value of its own for
        every patient.
    """
    column = grouping.column
    texts = rows[column].astype(str).map(normalise)
    numbers = {text: to_number(text) for text in texts.unique() if text}
    if grouping.edges is not None:
        return _cut(texts, numbers, grouping), grouping.bands
    names, order = _name_categories(numbers)
    if _are_finite(numbers) and len(order) > FEW:
        edges = "-".join(_write(edge) for edge in _propose_edges(texts, numbers))
        raise ManifestError(
            f"{column} holds {len(order)} different numbers, and each would be a group. Give bands,"
            f" such as --by {column}:{edges}"
        )
    reason = _find_identifying(rows, texts.map({"": "", **names}))
    if reason is not None and column != "region":
        raise ManifestError(
            f"{column} {reason}, so it may identify patients, and nothing that does leaves the "
            "manifest. Give bands of numbers, or group its values in a column of their own."
        )
    return texts.map({"": NOT_KNOWN, **names}), order


def find_groupings(rows: pd.DataFrame) -> tuple[list[Grouping], dict[str, str]]:
    """Return default groupings of the covariates in a manifest's rows.

    Parameters
    ----------
    rows : pandas.DataFrame
        The manifest rows that are scored.

    Returns
    -------
    list of Grouping
        Categories of at most `FEW` values; more numbers in bands between their quartiles.
    dict of str to str
        The other covariates, each with the reason for leaving it out, as the end of a sentence.
    """
    found, left_out = [], {}
    for column in rows.columns:
        if not is_covariate(column) or column == "region":
            continue
        texts = rows[column].astype(str).map(normalise)
        numbers = {text: to_number(text) for text in texts.unique() if text}
        names, order = _name_categories(numbers)
        reason = _find_identifying(rows, texts.map({"": "", **names}))
        if len(order) < 2:
            left_out[column] = "has one value" if order else "has no known value"
        elif reason is not None:
            left_out[column] = f"{reason}, so it may identify patients"
        elif len(order) <= FEW:
            found.append(Grouping(column))
        elif not _are_finite(numbers):
            left_out[column] = f"has {len(order)} categories, more than {FEW}"
        else:
            edges = _find_quartiles(texts, numbers)
            found.append(Grouping(column, (-inf, *edges, inf)))
    return found, left_out


def _require_covariate(name: str, columns: Sequence[str]) -> str:
    covariates = [own for own in columns if own not in NOT_COVARIATES]
    if name in covariates:
        return name
    if name in NOT_COVARIATES:
        raise ManifestError(
            f"{name} is not a covariate: {', '.join(NOT_COVARIATES)} say which image a row is and "
            f"what it is used for. Choose one of: {', '.join(covariates)}."
        )
    near = difflib.get_close_matches(name, covariates, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    if name == "views":
        hint = " Numbers of views need no manifest: leave it out."
    raise ManifestError(
        f"{short(name)} is not a column of the manifest.{hint} Columns to group by: "
        f"{', '.join(covariates)}."
    )


def _split_edges(bands: str) -> tuple[float, ...]:
    """Return edges separated by -; a - after a separator is a sign."""
    found = re.findall(rf"(?:^|-)({_EDGE})", bands, re.ASCII)
    return tuple(float(edge) for edge in found)


def _cut(
    texts: "pd.Series[str]", numbers: dict[str, float | None], grouping: Grouping
) -> "pd.Series[str]":
    assert grouping.edges is not None
    edges, bands, names = np.array(grouping.edges), grouping.bands, {"": NOT_KNOWN}
    for text, number in numbers.items():
        if number is None or not isfinite(number):
            raise ManifestError(
                f"{grouping.column} holds {short(text)}, which is not a finite number, so it "
                "has no bands. Leave out the bands, or leave unknown values empty."
            )
        place = int((edges <= number).sum()) - 1 - int(number == edges[-1])
        names[text] = bands[place] if 0 <= place < len(bands) else OUTSIDE
    return texts.map(names)


def _name_categories(numbers: dict[str, float | None]) -> tuple[dict[str, str], list[str]]:
    """Return the group of each known value, and the groups in order; 1 and 1.0 are one number."""
    if _are_finite(numbers):
        names = {text: _write(number) for text, number in numbers.items() if number is not None}
        return names, sorted(set(names.values()), key=float)
    names = {text: f"“{text}”" if text in RESERVED else text for text in numbers}
    return names, sorted(set(names.values()))


def _are_finite(numbers: dict[str, float | None]) -> bool:
    return all(number is not None and isfinite(number) for number in numbers.values())


def _find_identifying(rows: pd.DataFrame, names: "pd.Series[str]") -> str | None:
    """Return why a column may identify patients, as the end of a sentence, or None."""
    known = names != ""
    n_values, n_patients = names[known].nunique(), name_persons(rows[known]).nunique()
    if n_values > MAX_CATEGORIES and not _are_finite({own: to_number(own) for own in names[known]}):
        return f"has {n_values} categories, more than {MAX_CATEGORIES}"
    if n_values > 1 and n_values >= n_patients:
        return f"has {n_values} different values in {n_patients} patients"
    return None


def _known(texts: "pd.Series[str]", numbers: dict[str, float | None]) -> np.ndarray:
    return np.array([numbers[text] for text in texts if text], np.float64)


def _find_quartiles(texts: "pd.Series[str]", numbers: dict[str, float | None]) -> tuple[float, ...]:
    """Return quartiles with rows between them; each is a value that occurs."""
    known = _known(texts, numbers)
    found = np.quantile(known, _QUARTILES, method="inverted_cdf")
    inner = sorted({float(edge) for edge in found if edge > known.min()})
    return tuple(inner) if inner else (float(known[known > known.min()].min()),)


def _propose_edges(texts: "pd.Series[str]", numbers: dict[str, float | None]) -> tuple[float, ...]:
    known = _known(texts, numbers)
    inner = _find_quartiles(texts, numbers)
    ends = float(np.floor(known.min())), float(np.ceil(known.max()))
    return tuple(sorted({ends[0], *inner, ends[1]}))


def _name_band(low: float, high: float, *, is_last: bool) -> str:
    if not isfinite(low):
        return f"< {_write(high)}"
    if not isfinite(high):
        return f"≥ {_write(low)}"
    return f"[{_write(low)}, {_write(high)}{']' if is_last else ')'}"


def _write(number: float) -> str:
    return f"{number + 0.0:.10g}"  # -0 is 0
