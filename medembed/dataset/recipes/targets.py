"""Targets of a recipe: the answers of a table's columns as 0, 1 and empty."""

import re
from collections.abc import Iterable, Mapping

import pandas as pd

from medembed.dataset.covariates import MAX_CATEGORIES
from medembed.dataset.recipes.listing import count_of, refuse
from medembed.dataset.recipes.schema import Target
from medembed.dataset.targets import target_column

__all__ = ["ANSWERS", "read_targets"]

ANSWERS = {
    "negative": "0",
    "normal": "0",
    "positive": "1",
    "abnormal": "1",
    "unknown": "",
    "ignore": "",
}
"""The meanings of values in `[targets.NAME]`, and how a manifest's table writes them."""
_RANKS = ("0", "", "1")  # in Kleene's logic "or" is the highest
_WRAPPING = "[](){}'\" \t"
"""What PadChest and others write around the values of one field."""


def read_targets(table: pd.DataFrame, targets: Mapping[str, Target], source: str) -> pd.DataFrame:
    """Return a column `target_NAME` of "0", "1" and "" for each target, on the table's index.

    Parameters
    ----------
    table : pandas.DataFrame
        The columns that `targets` name, all strings.
    targets : mapping of str to Target
        The recipe's `[targets]`.
    source : str
        The name of the table in messages.

    Raises
    ------
    RecipeError
        A value has no meaning or two, or two targets have one name.
    """
    columns: dict[str, pd.Series[str]] = {}
    for name, spec in targets.items():
        values = table[spec.column]
        parts = {value: _split(value, spec.separator) for value in values.unique()}
        found = sorted({part for own in parts.values() for part in own})
        if spec.each_value:
            meanings = _meanings_of_each(name, spec, found, source)
        else:
            meanings = {name: _meanings(name, spec, found, source)}
        for own, meaning in meanings.items():
            column = target_column(own)
            refuse(
                [column] if column in columns else [],
                source,
                "two of [targets] make one column; rename one:",
            )
            answers = {
                value: _combine(map(meaning.__getitem__, each), ANSWERS[spec.empty])
                for value, each in parts.items()
            }
            columns[column] = values.map(answers)
    return pd.DataFrame(columns, index=table.index, dtype=str)


def _split(field_text: str, separator: str) -> list[str]:
    """Return the values of one field, without what is written around them."""
    if not separator:
        return [field_text] if field_text else []
    parts = (part.strip(_WRAPPING) for part in field_text.split(separator))
    return [part for part in parts if part]


def _combine(answers: Iterable[str], empty: str) -> str:
    """Return the answer of a field from those of its values; `empty` is that of none."""
    return max(answers, key=_RANKS.index, default=empty)


def _meanings(name: str, spec: Target, found: list[str], source: str) -> dict[str, str]:
    """Return the meaning of each value that occurs."""
    pairs = [
        *((value, "0") for value in (*spec.negative, *spec.normal)),
        *((value, "1") for value in (*spec.positive, *spec.abnormal)),
        *((value, ANSWERS[spec.uncertain]) for value in spec.uncertain_values),
    ]
    listed = dict(pairs)
    torn = sorted({value for value, meaning in pairs if meaning != listed[value]})
    refuse(list(map(repr, torn)), source, f"values that [targets.{name}] gives two meanings:")
    strange = [value for value in found if value not in listed]
    if strange and not spec.others:
        remedy = (
            f"column {spec.column!r} has values that [targets.{name}] does not know; list them, or "
            "set `others`:"
        )
        refuse(list(map(repr, strange)), source, remedy)
    return {**dict.fromkeys(strange, ANSWERS.get(spec.others, "")), **listed}


def _meanings_of_each(
    name: str, spec: Target, found: list[str], source: str
) -> dict[str, dict[str, str]]:
    """Return, for the target of each value, the meaning of all values."""
    values = [value for value in found if value not in spec.uncertain_values]
    if len(values) > MAX_CATEGORIES:
        refuse(
            [f"{count_of(len(values), 'value')} in column {spec.column!r}"],
            source,
            f"[targets.{name}] makes a target of every value, and at most {MAX_CATEGORIES} are "
            "allowed; list positive values instead:",
        )
    named: dict[str, list[str]] = {}
    for value in values:
        slug = re.sub("[^a-z0-9]+", "_", value.lower()).strip("_") or "other"
        named.setdefault(f"{name}_{slug}", []).append(value)
    refuse(
        [f"{own}: {', '.join(map(repr, each))}" for own, each in named.items() if len(each) > 1],
        source,
        f"[targets.{name}] would give several values one name; list positive values instead:",
    )
    uncertain = dict.fromkeys(spec.uncertain_values, ANSWERS[spec.uncertain])
    return {
        own: {**dict.fromkeys(values, "0"), **uncertain, value: "1"}
        for own, (value,) in named.items()
    }
