"""The words and numbers of figures: which heads, what n is, what the intervals are, the CSV."""

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from medembed.core.text import counted, to_csv_cell
from medembed.report.figures.text import LEGEND, elide
from medembed.results.significance import row_name

__all__ = [
    "MAX_SERIES",
    "describe_shown",
    "describe_test",
    "flatten",
    "has_interval",
    "is_known",
    "label_rows",
    "name_rows",
    "name_units",
    "shown_rows",
    "tell_intervals",
    "write_csv",
]

MAX_SERIES = 6
"""Heads drawn in one figure: as many as the palette can keep apart."""
MAX_NAME = 200
"""Points that a name may take in a legend, so that a score and its interval fit beside it."""


def shown_rows(result: dict[str, Any], n: int = MAX_SERIES) -> list[dict[str, Any]]:
    """Return the best trained heads; none where no score tells which is best."""
    trained = [row for row in result["rows"] if not row["baseline"]]
    return trained[:n] if trained and is_known(trained[0]["scores"]["auroc"]) else []


def is_known(score: dict[str, Any] | None) -> bool:
    """Tell whether a score has a value."""
    return score is not None and score.get("value") is not None


def has_interval(score: dict[str, Any] | None) -> bool:
    """Tell whether a score has an interval, or a bound on one side."""
    return score is not None and any(score.get(end) is not None for end in ("low", "high"))


def tell_intervals(what: str, scores: Iterable[dict[str, Any] | None], how: str) -> str:
    """Return the sentence that says what shows the intervals of a figure's scores, if any has one.

    `how` names the method.
    """
    if any(map(has_interval, scores)):
        return f"{what}: 95 % intervals, {how}."
    return "No score here has an interval."


def name_rows(result: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return whole names, for tables."""
    return [row_name(row, several=len(result["runs"]) > 1) for row in rows]


def label_rows(
    result: dict[str, Any], rows: Sequence[dict[str, Any]], width: float = MAX_NAME
) -> list[str]:
    """Return names that a legend has room for, at most `width` points wide."""
    return [elide(name, width, LEGEND) for name in name_rows(result, rows)]


def name_units(result: dict[str, Any]) -> str:
    """Return what the test rows are: studies or images."""
    return "studies" if result["level"] == "study" else "images"


def describe_test(result: dict[str, Any]) -> str:
    """Return the sentence that says what n is."""
    test = result["test"]
    return (
        f"n = {counted(test['n'], 'test ' + result['level'])} ({test['n_abnormal']:,} abnormal), "
        f"{counted(test['n_patients'], 'patient')}."
    )


def describe_shown(
    result: dict[str, Any], n_shown: int = MAX_SERIES, n_all: int | None = None
) -> str:
    """Return sentences, each after a blank, on heads that are not drawn and synthetic images.

    `n_all` heads could have been drawn, by default all that were trained.
    """
    if n_all is None:
        n_all = sum(not row["baseline"] for row in result["rows"])
    best = "The best" if n_shown == 1 else f"The best {n_shown}"
    shown = f" {best} of {n_all} heads." if n_all > n_shown else ""
    synthetic = " Synthetic images." if result["synthetic"] else ""
    return f"{shown}{synthetic}"


def flatten(name: str, score: dict[str, Any] | None) -> dict[str, float | None]:
    """Return a score as cells of a table: the value under `name`, and the ends of its interval."""
    score = score or {}
    ends = {f"{name}_{end}": score.get(end) for end in ("low", "high")}
    return {name: score.get("value"), **ends}


def write_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as CSV at full precision, counts without a decimal point."""
    table = pd.DataFrame(list(rows), dtype=object).map(to_csv_cell)
    return str(table.to_csv(index=False, lineterminator="\n"))
