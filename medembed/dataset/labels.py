"""A table beside the images: where it is, what columns it has, what its labels mean."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from medembed.dataset.listing import refuse
from medembed.dataset.recipe_format import MEANINGS, Label
from medembed.errors import PathNotFoundError, RecipeError

__all__ = ["find_table", "need_columns", "read_labels"]


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
        Values that the recipe does not know, unless it says what others mean.
    """
    meaning = {
        **dict.fromkeys(spec.normal, "0"),
        **dict.fromkeys(spec.abnormal, "1"),
        "": MEANINGS[spec.empty],
    }
    strange = values[~values.isin(list(meaning))]
    if len(strange) and not spec.others:
        counted = [f"{value!r} in {n} rows" for value, n in strange.value_counts().items()]
        remedy = "labels that the recipe does not know; add them to [label], or set `others`:"
        refuse(counted, source, remedy)
    return values.map(meaning).fillna(MEANINGS.get(spec.others, ""))
