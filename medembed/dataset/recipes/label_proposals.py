"""Choose the label of a table: its column, and which of its values mean normal and abnormal."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from medembed.core.errors import RecipeError
from medembed.dataset.recipes.choices import Choices, UndecidedError
from medembed.dataset.recipes.guesses import Meanings, guess_meanings, has_role

__all__ = [
    "MAX_CLASSES",
    "LabelChoice",
    "choose_label",
    "settle_meanings",
    "show_counts",
    "show_values",
]

MAX_CLASSES = 12
"""The most distinct values that a label may have."""


@dataclass(frozen=True)
class LabelChoice:
    """A label's column and what its values mean.

    Parameters
    ----------
    column : str
    meanings : Meanings
    empty : str
        What an empty field means.
    comment : str
        The recipe's comment on the label.
    """

    column: str
    meanings: Meanings
    empty: str = "unknown"
    comment: str = ""

    def as_section(self) -> dict[str, Any]:
        """Return the section `[label]` of a recipe."""
        others = {"others": "unknown"} if self.meanings.unknown else {}
        empty = {} if self.empty == "unknown" else {"empty": self.empty}
        return {
            "column": self.column,
            "normal": list(self.meanings.normal),
            "abnormal": list(self.meanings.abnormal),
            **empty,
            **others,
        }

    def read(self, rows: pd.DataFrame) -> "pd.Series[str]":
        """Return normal, abnormal or unknown for each row."""
        known = dict.fromkeys(self.meanings.normal, "normal")
        known |= dict.fromkeys(self.meanings.abnormal, "abnormal") | {"": self.empty}
        return rows[self.column].map(known).fillna("unknown")


def choose_label(
    rows: pd.DataFrame, choices: Choices, source: str, taken: Iterable[str]
) -> LabelChoice:
    """Return the label's column and what its values mean.

    Raises
    ------
    UndecidedError
        No column or several may be the label, or its values do not say what is normal.
    """
    column = choices.label or _find_label(rows, choices, source, taken)
    values = [value for value in rows[column].value_counts().index if value]
    what = f"column {column!r} of {source}"
    meanings = settle_meanings(values, choices, what, rows[column].value_counts().to_dict())
    has_empty = bool((rows[column] == "").any())
    empty = choices.empty or "unknown"
    comment = "What the label's values mean."
    if not meanings.normal and has_empty and not choices.empty:
        empty = "normal"
        comment += " None means normal, so an empty field was taken for normal: check that."
    elif meanings.unknown:
        comment += f" These count as unknown: {show_values(meanings.unknown)}."
    return LabelChoice(column, meanings, empty, comment)


def _find_label(rows: pd.DataFrame, choices: Choices, source: str, taken: Iterable[str]) -> str:
    barred = set(taken)
    named = {*(choices.normal or ()), *(choices.abnormal or ())}
    likely = []
    for name in rows.columns.difference(list(barred), sort=False):
        values = [value for value in pd.unique(rows[name]) if value]
        if not 0 < len(values) <= MAX_CLASSES:
            continue
        is_one_sided = values in (["1"], ["TRUE"], ["x"], ["X"]) and (rows[name] == "").any()
        if named <= set(values) if named else is_one_sided or guess_meanings(values) is not None:
            likely.append(name)
    for way in (
        [name for name in likely if has_role(name, "label")],
        likely if not any(has_role(name, "label") for name in likely) else [],
    ):
        if len(way) == 1:
            return way[0]
    few = [name for name in rows.columns if name not in barred and _has_few_values(rows[name])]
    answers = tuple(likely or few)
    if not answers:
        listed = ", ".join(map(repr, rows.columns))
        raise UndecidedError(
            f"no column of {source} looks like a label, with few values such as 0 and 1; its "
            f"columns are {listed}. Name the label with --label.",
            "label",
            "Which column is the label?",
            tuple(rows.columns),
        )
    listed = "\n".join(f"  - {name!r}: {_count(rows[name])}" for name in answers[:MAX_CLASSES])
    raise UndecidedError(
        f"it is not clear which column of {source} is the label. Name it with --label, one of:\n"
        f"{listed}",
        "label",
        "Which column is the label?",
        answers,
    )


def _has_few_values(column: "pd.Series[str]") -> bool:
    return column.nunique() <= MAX_CLASSES and column.nunique() < len(column)


def settle_meanings(
    values: Sequence[str], choices: Choices, what: str, counts: dict[Any, int]
) -> Meanings:
    """Return which of the values are normal and abnormal, as chosen or as their words say.

    Parameters
    ----------
    values : sequence of str
        The values, without the empty one.
    choices : Choices
    what : str
        The name of the column or folder in messages.
    counts : dict
        How often each value occurs.

    Raises
    ------
    UndecidedError
        Neither choices nor words say what is normal.
    RecipeError
        A chosen value does not occur, or a value that occurs is not chosen.
    """
    normal, abnormal = choices.normal or (), choices.abnormal or ()
    there = f"{what} holds {show_counts(counts)}"
    strange = [value for value in (*normal, *abnormal) if value not in values]
    if strange:
        raise RecipeError(
            f"{strange[0]!r} does not occur: {there}. Correct --normal or --abnormal."
        )
    if twice := set(normal) & set(abnormal):
        raise RecipeError(f"{min(twice)!r} is given as --normal and as --abnormal. Choose one.")
    rest = [value for value in values if value not in (*normal, *abnormal)]
    guess = guess_meanings(values)
    unknown = tuple(v for v in rest if v in (_words_for_unknown(values)))
    rest = [value for value in rest if value not in unknown]
    if normal and abnormal and rest:
        raise RecipeError(
            f"{', '.join(map(repr, rest))} is neither --normal nor --abnormal: {there}. Name it "
            "too."
        )
    if abnormal:
        return Meanings(normal or tuple(rest), abnormal, unknown)
    if normal:
        return Meanings(normal, tuple(rest), unknown)
    if guess is None and len(values) == len(rest) == 1 and counts.get(""):
        if _is_normal(values[0]):
            raise UndecidedError(
                f"no value means abnormal: {there}. Confirm that with --normal {values[0]!r}, and "
                "say with --empty what an empty field means, or choose another column with "
                "--label.",
                "normal",
                "Which mean normal?",
                tuple(values),
            )
        return Meanings((), tuple(values))
    if guess is None:
        raise UndecidedError(
            f"what is abnormal cannot be told from the words: {there}. Name what is abnormal with "
            "--abnormal, once for each value; all others are normal then.",
            "abnormal",
            "Which mean abnormal?",
            tuple(values),
        )
    return guess


def _is_normal(value: str) -> bool:
    """Return whether a label's only value is a word for normal, such as 0, no or benign."""
    found = [guess_meanings([value, other]) for other in ("abnormal", "malignant", "y")]
    return any(guess is not None and value in guess.normal for guess in found)


def _words_for_unknown(values: Sequence[str]) -> Collection[str]:
    """Return the values that are words for unknown."""
    guess = guess_meanings([*values, "normal", "abnormal"])
    return guess.unknown if guess else ()


def show_values(values: Sequence[str], most: int = 6) -> str:
    """Return the first few values as text."""
    shown = ", ".join(values[:most])
    return f"{shown}, …" if len(values) > most else shown or "none"


def show_counts(counts: dict[Any, int], most: int = MAX_CLASSES) -> str:
    """Return the first few values as text, each with its number of rows."""
    shown = [f"{value!r} ({n:,})" if value else f"nothing ({n:,})" for value, n in counts.items()]
    return ", ".join(shown[:most]) + (", …" if len(shown) > most else "")


def _count(column: "pd.Series[str]") -> str:
    return show_counts(column.value_counts().to_dict(), 6)
