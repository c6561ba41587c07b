"""Patients as persons, however their identifiers are spelt.

A table that went through Excel has 7 for 007, another 7.0, a third a name in capitals. Identifiers
that differ only in this way count as one person wherever rows are divided or counted by patient:
splits, folds, fractions, resampling. If the identifiers of a data set really differ in this way,
its recipe says `ids = "exact"`, and its manifest has a column `ids` with "exact" in every row.
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
# Slashes separate the parts of an identifier that is made of several columns.
WHOLE_NUMBER = r"(^|/)([0-9]+)\.0{1,2}(/|$)"
LEADING_ZEROS = r"(^|[^0-9.,])0+([0-9])"  # not those of 0.05


def are_exact(rows: pd.DataFrame) -> bool:
    """Return whether a manifest's rows say that identifiers that look alike really differ."""
    return IDS in rows and len(rows) > 0 and bool((rows[IDS] == EXACT).all())


def name_persons(rows: pd.DataFrame) -> "pd.Series[str]":
    """Return the person of each row, the unit of folds, groups and clusters of patients.

    Parameters
    ----------
    rows : pandas.DataFrame
        Column `patient`, and `ids` if the manifest has it.

    Returns
    -------
    pandas.Series of str
        On the index of `rows`: the patient; of several spellings, the first in alphabetical order.
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
    first[persons[order[::-1]]] = order[::-1]  # the last assignment wins: the first in order
    names = np.asarray(spellings, dtype=object)[first[persons]]
    return pd.Series(names[codes], index=patients.index, name="patient", dtype=str)


def find_persons(spellings: Texts) -> np.ndarray | None:
    """Return the number of the person behind each of the distinct identifiers, (n,) int64.

    Numbers count from 0 by first appearance. None if no two of the identifiers look alike.
    """
    persons, keys = pd.factorize(key_texts(spellings))
    return None if len(keys) == len(persons) else persons.astype(np.int64)


def key_texts(texts: Texts) -> np.ndarray:
    """Return texts without the differences that people and programs introduce.

    These are upper and lower case, blanks and invisible characters anywhere, zeros before a number,
    ".0" after a number, and forms that Unicode calls compatible (NFKC), such as full-width digits.

    Returns
    -------
    numpy.ndarray of object, (n,)
        Equal for texts that look alike.
    """
    try:
        return _key_quickly(texts)
    except ImportError:  # machines that only embed may lack pyarrow
        return np.array([_apply_but("", text) for text in texts], dtype=object)


def explain_likeness(a: str, b: str) -> str:
    """Return in what two texts of one key differ: "case and leading zeros"."""
    names = dict.fromkeys(name for name, _ in _RULES)
    needed = [name for name in names if _apply_but(name, a) != _apply_but(name, b)]
    *others, last = needed or ["Unicode form"]  # a ligature: folding case undoes it too
    return f"{', '.join(others)} and {last}" if others else last


def _key_quickly(texts: Texts) -> np.ndarray:
    """Apply `_RULES` to a whole column: a million texts take a second."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = pa.array(texts, pa.large_string())
    if isinstance(column, pa.ChunkedArray):  # pandas' form of joined and of empty columns
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
    """Return a text without blanks, controls (Cc) and invisible characters (Cf, soft hyphens)."""
    kept = (c for c in text if not c.isspace() and unicodedata.category(c) not in ("Cc", "Cf"))
    return "".join(kept)


def _without_decimals(text: str) -> str:
    return re.sub(WHOLE_NUMBER, r"\1\2\3", re.sub(WHOLE_NUMBER, r"\1\2\3", text))


# The steps of `_key_quickly`, applied to one text at a time.
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
