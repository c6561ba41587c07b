"""A comparison as text: for the terminal, Markdown, CSV and LaTeX."""

import csv
import io
from dataclasses import dataclass
from typing import Any

from medembed.errors import RunError

__all__ = ["FORMATS", "NOT_ESTIMABLE", "Table", "make_table", "render"]

FORMATS = ("table", "markdown", "csv", "latex")
NOT_ESTIMABLE = "not estimable"
TIED = "≈"
COLUMNS = {
    "auroc": "AUROC",
    "macro_f1": "F1",
    "sensitivity": "Sens.",
    "specificity": "Spec.",
    "kappa": "κ",
}
"""The scores of the main table; F1 is the mean over both classes."""


@dataclass(frozen=True)
class Table:
    """Cells of text under a title, with notes below.

    Attributes
    ----------
    title : str
        One line.
    columns : list of str
        Headings; the first `n_names` columns are names, the others numbers.
    rows : list of list of str
        One list per row, as long as `columns`.
    notes : list of str
        One sentence each.
    n_names : int
        How many columns hold names.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]
    n_names: int


def render(result: dict[str, Any], *, table_format: str = "table", by: str | None = None) -> str:
    """Turn what `compare` returns into text.

    Parameters
    ----------
    result : dict
        A comparison.
    table_format : {"table", "markdown", "csv", "latex"}
        "table" is for a terminal of 80 columns; "csv" has full precision and every score.
    by : {"region", "views"}, optional
        One column of AUROC for each region or number of views.

    Raises
    ------
    RunError
        An unknown format or grouping.
    """
    if table_format not in FORMATS:
        raise RunError(f"format {table_format!r} is unknown. Choose one of: {', '.join(FORMATS)}.")
    if table_format == "csv":
        return _csv(result, by)
    table = make_table(result, by)
    return {"table": _terminal, "markdown": _markdown, "latex": _latex}[table_format](table)


def make_table(result: dict[str, Any], by: str | None = None) -> Table:
    """Choose the columns and write the cells.

    Raises
    ------
    RunError
        An unknown grouping.
    """
    _require_grouping(by)
    n_names = 2 if len(result["runs"]) > 1 else 1
    names = ["Run", "Head"][-n_names:]
    plural = "studies" if result["level"] == "study" else "images"
    if by is None:
        columns = [*names, "AUROC [95 %]", *list(COLUMNS.values())[1:], "p"]
        rows = [[*_names(row, n_names), *_cells(row)] for row in result["rows"]]
        notes = [*result["notes"][:-1], "p: difference in AUROC to the best head.", result["notes"][-1]]
        return Table(f"Heads on test {plural}", columns, rows, notes, n_names)
    groups = _group_names(result, by)
    unit = "region" if by == "region" else "number of views"
    rows = [
        [group, *_group_counts(result, by, group)]
        + [_interval(row[_field(by)][group]["auroc"]) for row in _trained(result)]
        for group in groups
    ]
    if by == "region":
        rows.append(["mean", "", *(_interval(row["mean_over_regions"]["auroc"]) for row in _trained(result))])
    heads = ["/".join(_names(row, n_names)) for row in _trained(result)]
    title = f"AUROC by {unit}, test {plural}"
    return Table(title, [unit.capitalize(), "n (abnormal)", *heads], rows, result["notes"], 1)
