"""Who is one person, however the identifier is spelt.

A table that went through Excel has 7 for 007, another 7.0, a third a name in capitals. What differs
in nothing else is taken for one person wherever rows are divided or counted by patient: splits,
folds, fractions, resampling. A data set whose identifiers really differ so says `ids = "exact"` in
its recipe; its manifest has a column `ids` that holds "exact" in every row.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

__all__ = [
    "EXACT",
    "IDS",
    "are_exact",
    "explain_likeness",
    "find_persons",
    "key_texts",
    "name_persons",
]

Texts = Sequence[str] | pd.Index | np.ndarray

IDS = "ids"  # the column, and the recipe's key
EXACT = "exact"

ASCII_BLANKS = r"[\x00-\x20\x7f]+"
# Between slashes stand the parts of an identifier that several columns make.
WHOLE_NUMBER = r"(^|/)([0-9]+)\.0{1,2}(/|$)"
LEADING_ZEROS = r"(^|[^0-9.,])0+([0-9])"  # not those of 0.05


def are_exact(rows: pd.DataFrame) -> bool:
    """Tell whether a manifest's rows record that identifiers which look alike really differ."""
    return IDS in rows and len(rows) > 0 and bool((rows[IDS] == EXACT).all())


def name_persons(rows: pd.DataFrame) -> "pd.Series[str]":
    """Name the person of each row: what folds, groups and clusters of patients are made of.

    Parameters
    ----------
    rows : pandas.DataFrame
        Column `patient`, and `ids` where the manifest has it.

    Returns
    -------
    pandas.Series of str
        On the index of `rows`: the patient, or of several spellings of one the first in
        alphabetical order.
    """
    patients = rows["patient"].astype(str)
    if are_exact(rows):
        return patients
    codes, spellings = pd.factorize(patients)
    persons = find_persons(spellings)
    if persons is None:
        return patients
    order = np.argsort(np.asarray(spellings, dtype=object), kind="stable")
    first = np.empty(persons.max() + 1, np.int64)
    first[persons[order[::-1]]] = order[::-1]  # the last that is written is the first in order
    names = np.asarray(spellings, dtype=object)[first[persons]]
    return pd.Series(names[codes], index=patients.index, name="patient", dtype=str)


def find_persons(spellings: Texts) -> np.ndarray | None:
    """Return the number of the person that each of distinct identifiers means, (n,) int64.

    They count from 0 by first appearance. None where no two of the identifiers look alike.
    """
    persons, keys = pd.factorize(key_texts(spellings))
    return None if len(keys) == len(persons) else persons.astype(np.int64)


def key_texts(texts: Texts) -> np.ndarray:
    """Return what is left of texts where nothing counts that people and programs change.

    Those are upper and lower case, blanks and invisible characters anywhere, zeros before a number,
    ".0" behind one, and forms that Unicode calls compatible (NFKC), such as full-width digits.

    Returns
    -------
    numpy.ndarray of object, (n,)
        Equal where two texts look alike.
    """
    try:
        return _key_quickly(texts)
    except ImportError:  # machines that only embed may lack pyarrow
        return np.array([_apply_but("", text) for text in texts], dtype=object)


def explain_likeness(a: str, b: str) -> str:
    """Say in what two texts of one key differ: "case and leading zeros"."""
    names = dict.fromkeys(name for name, _ in _RULES)
    needed = [name for name in names if _apply_but(name, a) != _apply_but(name, b)]
    *others, last = needed or ["Unicode form"]  # a ligature: folding case undoes it too
    return f"{', '.join(others)} and {last}" if others else last


def _key_quickly(texts: Texts) -> np.ndarray:
    """Apply `_RULES` to a whole column: a million texts take a second."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = pa.array(texts, pa.large_string())
    if isinstance(column, pa.ChunkedArray):  # as pandas keeps what it has joined, and nothing
        column = column.combine_chunks()
    is_ascii = pc.string_is_ascii(column).to_numpy(zero_copy_only=False)
    if not is_ascii.all():
        values = _as_objects(column)
        values[~is_ascii] = [_fold(text) for text in values[~is_ascii]]
        column = pa.array(values, pa.large_string())
    column = pc.replace_substring_regex(pc.ascii_lower(column), ASCII_BLANKS, "")
    for _ in range(2):  # neighbours share a slash
        column = pc.replace_substring_regex(column, WHOLE_NUMBER, r"\1\2\3")
    return _as_objects(pc.replace_substring_regex(column, LEADING_ZEROS, r"\1\2"))


def _as_objects(column: Any) -> np.ndarray:
    return np.array(column.to_numpy(zero_copy_only=False), dtype=object)


def _fold(text: str) -> str:
    """Fold any text as `_key_quickly` folds ASCII; caseless by Unicode, section 3.13, D146."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return _without_blanks(text)


def _without_blanks(text: str) -> str:
    """Drop blanks, controls (Cc), and characters that take no room, as soft hyphens do (Cf)."""
    kept = (c for c in text if not c.isspace() and unicodedata.category(c) not in ("Cc", "Cf"))
    return "".join(kept)


def _without_decimals(text: str) -> str:
    return re.sub(WHOLE_NUMBER, r"\1\2\3", re.sub(WHOLE_NUMBER, r"\1\2\3", text))


# Text by text what `_key_quickly` does for a column, a step at a time.
_RULES: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("Unicode form", lambda text: unicodedata.normalize("NFKC", text)),
    ("case", str.casefold),
    ("Unicode form", lambda text: unicodedata.normalize("NFKC", text)),
    ("blanks", _without_blanks),
    ("a trailing .0", _without_decimals),
    ("leading zeros", lambda text: re.sub(LEADING_ZEROS, r"\1\2", text)),
)


def _apply_but(left_out: str, text: str) -> str:
    for name, rule in _RULES:
        if name != left_out:
            text = rule(text)
    return text
