"""A table beside the images: where it is, what columns it has, what its labels mean."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from medembed.core.errors import PathNotFoundError, RecipeError
from medembed.dataset.identities import key_texts
from medembed.dataset.recipes.listing import refuse
from medembed.dataset.recipes.schema import MEANINGS
from medembed.dataset.recipes.sections import Label
from medembed.dataset.suspicious_values import is_missing_word, list_examples

__all__ = ["doubt_labels", "find_table", "need_columns", "read_labels"]


def find_table(file: str, root: Path, recipe_path: Path) -> Path:
    """Find a table in the image root, beside it, or beside the recipe."""
    candidates = [root / file, root.parent / file, recipe_path.parent / file]
    for candidate in candidates:
        if candidate.exists() and not candidate.is_dir():
            return candidate
    raise PathNotFoundError(
        f"no table {file} in {root}, beside it, or beside the recipe. Give --image-root the "
        "directory that the dataset was unpacked into, or correct `file` in the recipe."
    )


def need_columns(table: pd.DataFrame, names: Iterable[str], path: Path) -> None:
    """Raise RecipeError where a table lacks columns; empty names stand for none."""
    missing = sorted({name for name in names if name and name not in table})
    if missing:
        raise RecipeError(
            f"{path} has no column {', '.join(map(repr, missing))}; its columns are "
            f"{', '.join(map(repr, table.columns))}. Correct the recipe."
        )


def read_labels(values: "pd.Series[str]", spec: Label, source: str) -> "pd.Series[str]":
    """Turn a table's values into "0", "1" and "", as the recipe says they mean.

    Raises
    ------
    RecipeError
        Values that the recipe does not know, unless it says what others mean; or a value that it
        gives two meanings.
    """
    pairs = [*((v, "0") for v in spec.normal), *((v, "1") for v in spec.abnormal)]
    meaning = {**dict(pairs), "": MEANINGS[spec.empty]}
    torn = sorted({value for value, one in pairs if one != meaning[value]})
    torn += sorted(set(spec.normal) & set(spec.abnormal) - set(torn))
    refuse(
        list(map(repr, torn)),
        source,
        "values that [label] gives two meanings (of a blank `empty` says it):",
    )
    strange = values[~values.isin(list(meaning))]
    if len(strange) and not spec.others:
        counted = [f"{value!r} in {n} rows" for value, n in strange.value_counts().items()]
        remedy = "labels that the recipe does not know; add them to [label], or set `others`:"
        refuse(counted, source, remedy)
    return values.map(meaning).fillna(MEANINGS.get(spec.others, ""))


def doubt_labels(values: "pd.Series[str]", spec: Label, source: str) -> list[str]:
    """Warn of values that only `others` gives a meaning, and that look like a slip.

    They look like a value that the recipe lists, or are a word that usually means missing.
    """
    if not spec.others:
        return []  # `read_labels` refuses them all
    listed = (*spec.normal, *spec.abnormal)
    counts = values[~values.isin(["", *listed])].value_counts()
    meant = dict(zip(key_texts(listed), listed, strict=True))
    found = []
    for value, key in zip(counts.index, key_texts(counts.index), strict=True):
        if key in meant:
            found.append(f"{value!r} in {counts[value]} rows looks like {meant[key]!r}")
        elif is_missing_word(value):
            found.append(f"{value!r} in {counts[value]} rows usually means missing")
    if not found:
        return []
    return [
        f"{source}: labels that [label] does not list count as {spec.others}: "
        f"{list_examples(found)}. List them"
    ]
