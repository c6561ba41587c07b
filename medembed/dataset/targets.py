"""Targets: further questions about the images, each a manifest column `target_NAME`.

A target's values are 0 (negative), 1 (positive) and empty (unknown), as in `label`, which is a
manifest's first target and goes by that name. A target is never a covariate: it may give the label
away.
"""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import NamedTuple

import pandas as pd

from medembed.core.errors import ManifestError

__all__ = [
    "LABEL",
    "VALUES",
    "ClassNames",
    "check_targets",
    "count_target",
    "describe_targets",
    "is_target",
    "list_targets",
    "name_classes",
    "name_problem",
    "select_target",
    "target_column",
]

LABEL = "label"
"""The name of a manifest's first target, whose column has no prefix."""
VALUES = ("0", "1", "")
_PREFIX = "target_"


class ClassNames(NamedTuple):
    """What a target's two classes are called."""

    negative: str
    positive: str

    def reword(self, sentence: str) -> str:
        """Return a sentence of `evaluation`, which knows normal and abnormal, in these words.

        >>> name_classes("metal").reword("2 patients with abnormal rows")
        '2 patients with metal rows'
        """
        own = {"normal": self.negative, "abnormal": self.positive}
        return re.sub(r"\b(?:ab)?normal\b", lambda found: own[found[0]], sentence)


def is_target(column: str) -> bool:
    """Return whether a column is a target by its name; `label` is not among these columns."""
    return column.startswith(_PREFIX)


def target_column(name: str) -> str:
    """Return the column of a target.

    >>> target_column("metal"), target_column("label")
    ('target_metal', 'label')
    """
    return name if name == LABEL else f"{_PREFIX}{name}"


def name_problem(name: str) -> str | None:
    """Return what is wrong with a target's name, as the end of a sentence, or None."""
    if not re.fullmatch("[a-z0-9_]+", name):
        return "a target's name consists of a to z, 0 to 9 and _"
    if name == LABEL:
        return f"{LABEL} is the name of the manifest's own label"
    return None


def name_classes(target: str | None) -> ClassNames:
    """Return what a target's classes are called, in decisions and wherever they are counted.

    >>> name_classes("metal")
    ClassNames(negative='no metal', positive='metal')
    >>> name_classes(None)
    ClassNames(negative='normal', positive='abnormal')
    """
    if target in (None, LABEL):
        return ClassNames("normal", "abnormal")
    return ClassNames(f"no {target}", str(target))


def list_targets(columns: Iterable[str]) -> list[str]:
    """Return the names of a manifest's targets: `label`, then the others in column order."""
    return [LABEL, *(name.removeprefix(_PREFIX) for name in columns if is_target(name))]


def check_targets(names: Sequence[str], columns: Iterable[str]) -> list[str]:
    """Return the requested targets, each once.

    Raises
    ------
    ManifestError
        The manifest with these columns has no such target; the message names the nearest.
    """
    known = list_targets(columns)
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Its targets are {', '.join(known)}."
            raise ManifestError(
                f"the manifest has no target {name!r}. {hint} A target is a column {_PREFIX}NAME "
                "of 0, 1 and empty, which [targets.NAME] in a recipe makes."
            )
    return list(dict.fromkeys(names))


def select_target(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return a manifest's rows with a target in place of the label: Int8, `<NA>` unknown."""
    if name == LABEL:
        return rows
    return rows.assign(label=rows[target_column(name)].map({"0": 0, "1": 1}).astype("Int8"))


def count_target(rows: pd.DataFrame, name: str) -> dict[str, int]:
    """Return the numbers of a target's `positive`, `negative` and `unknown` images."""
    label = select_target(rows, name)["label"]
    return {
        "positive": int(label.eq(1).sum()),
        "negative": int(label.eq(0).sum()),
        "unknown": int(label.isna().sum()),
    }


def describe_targets(rows: pd.DataFrame) -> list[str]:
    """Return a sentence with the counts of each target but the label, and what they prevent."""
    _, *names = list_targets(rows.columns)
    return [_describe(rows, name) for name in names]


def _describe(rows: pd.DataFrame, name: str) -> str:
    counts = count_target(rows, name)
    told = ", ".join(f"{n:,} {answer}" for answer, n in counts.items() if n or answer != "unknown")
    sentence = f"target {name}: {told}"
    lost = {"train": "nothing can be trained on it", "test": "it cannot be scored"}
    for split, loss in lost.items():
        found = count_target(rows[rows["split"] == split], name)
        lacking = [answer for answer in ("positive", "negative") if not found[answer]]
        if lacking:
            return f"{sentence}; {split} has no {' and no '.join(lacking)} image, so {loss}"
    return sentence
