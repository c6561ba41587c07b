"""A comparison as text: for the terminal, Markdown, CSV and LaTeX."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from medembed.core.errors import RunError
from medembed.core.text import mask_controls, to_csv, to_latex, to_markdown
from medembed.evaluation.scores import SCORES
from medembed.results.comparison_schema import ComparedHead, ComparisonResult
from medembed.results.methods import name_compared_classes
from medembed.results.significance import SIGNIFICANCE, row_name

__all__ = [
    "FORMATS",
    "GROUPINGS",
    "MISSING",
    "NOT_ESTIMABLE",
    "Table",
    "format_count",
    "format_counted",
    "format_interval",
    "format_p",
    "format_value",
    "head_of_counts",
    "make_table",
    "make_tables",
    "render",
    "render_table",
    "render_terminal",
    "share_of_train",
    "table_width",
]

FORMATS = ("table", "markdown", "csv", "latex")
GROUPINGS = {"region": "regions", "views": "views"}
"""Values of `by`, and the key of a comparison's row that holds those scores."""
NOT_ESTIMABLE = "not estimable"
MISSING = "–"
WIDE = 100
"""Terminal width from which headings fit; below it "Macro-F1" takes two lines."""
COLUMNS = {
    "macro_f1": "Macro-F1",
    "sensitivity": "Sens.",
    "specificity": "Spec.",
    "kappa": "κ",
}
"""The decision scores shown next to AUROC; macro-F1 is the mean over both classes."""
SHARES = ("accuracy", "sensitivity", "specificity")
"""Scores with counts in a CSV."""
FIT = {"brier": "Brier [95 %]", "slope": "Slope [95 %]", "intercept": "Intercept [95 %]"}
"""Measures of calibration, the leading one first."""


@dataclass(frozen=True)
class Table:
    """Cells of text under a title, with notes below.

    Attributes
    ----------
    title : str
        One line.
    columns : list of str
        Headings.
    n_names : int
        Number of columns, from the left, that hold names; the others hold numbers.
    sections : list of list of list of str
        Groups of rows of cells, each row as long as `columns`.
    notes : list of str
        One sentence each.
    n_spanning : int
        How many columns, from the left, hold one name for all rows of a section, on the page.
    """

    title: str
    columns: list[str]
    n_names: int
    sections: list[list[list[str]]]
    notes: list[str] = field(default_factory=list)
    n_spanning: int = 0

    @property
    def rows(self) -> list[list[str]]:
        """All rows, without their grouping."""
        return [row for section in self.sections for row in section]


def render(
    result: ComparisonResult,
    *,
    table_format: str = "table",
    by: str | None = None,
    width: int = 80,
    more: Sequence[Table] = (),
) -> str:
    """Return a comparison as text.

    Parameters
    ----------
    result : dict
        A comparison.
    table_format : {"table", "markdown", "csv", "latex"}
        "table" is for a terminal; "csv" has every score at full precision.
    by : {"region", "views"}, optional
        Show the trained heads within each region or number of views.
    width : int
        Columns of the terminal, only for "table".
    more : sequence of Table
        Further tables to append; not for "csv".

    Raises
    ------
    RunError
        The format or grouping is unknown.
    """
    if table_format not in FORMATS:
        raise RunError(f"format {table_format!r} is unknown. Choose one of: {', '.join(FORMATS)}.")
    if by is not None and by not in GROUPINGS:
        raise RunError(f"grouping {by!r} is unknown. Choose one of: {', '.join(GROUPINGS)}.")
    if table_format == "csv":
        return _csv(result, by)
    table, fit = make_table(result, by, with_counts=True), None
    if table_format == "table" and table_width(table) > width:
        table = make_table(result, by)
    if by is None:
        fit = _fit_table(result)
    if table_format == "latex":
        return "\n\n".join(map(_latex, (table, *more)))
    tables = _with_notes_last([own for own in (table, *more, fit) if own is not None])
    if table_format == "table":
        return "\n\n".join(render_terminal(own, width) for own in tables)
    return "\n\n".join(_markdown(own) for own in tables)


def make_tables(result: ComparisonResult, by: str | None = None) -> list[Table]:
    """Return `make_table` and, without grouping, the calibration table; the last has the notes."""
    fit = _fit_table(result) if by is None else None
    return _with_notes_last([own for own in (make_table(result, by), fit) if own is not None])


def _with_notes_last(tables: list[Table]) -> list[Table]:
    """Return the tables with the first one's notes, which apply to all, below the last."""
    if len(tables) > 1:
        first, last = tables[0], tables[-1]
        tables[-1] = replace(last, notes=[*last.notes, *first.notes])
        tables[0] = replace(first, notes=[])
    return tables


def make_table(
    result: ComparisonResult, by: str | None = None, *, with_counts: bool = False
) -> Table:
    """Return the table of a comparison, overall or `by` a grouping."""
    plural = "studies" if result["level"] == "study" else "images"
    if by is not None:
        return _grouped_table(result, by, plural, with_counts)
    several = len(result["runs"]) > 1
    shown = list(COLUMNS)[: -1 if several else None]  # the runs' names need the width of one
    extra = ["Train"] if result.get("efficiency") else []
    columns = ["Head", *extra, "AUROC [95 %]", *(COLUMNS[name] for name in shown), "p"]
    rows = [
        [
            row_name(row, several=several),
            *(share_of_train(row) for _ in extra),
            *_cells(row["scores"], shown, with_counts),
            _p_value(row),
        ]
        for row in result["rows"]
    ]
    legend = (
        "p: difference in AUROC to the best (paired DeLong over patients, t, Holm); "
        f"≈ not significant at {SIGNIFICANCE}."
    )
    return Table(f"Heads on test {plural}", columns, 1, [rows], [legend, *result["notes"]])


def format_interval(score: Mapping[str, Any], digits: int = 3) -> str:
    """Return a score with its interval, ``0.931 [0.902, 0.956]``, or bound, ``[≤ 0.080]``.

    Without decimals where a limit reaches 100, as a slope's does on a few studies.
    """
    if score["value"] is None:
        return NOT_ESTIMABLE
    if any(abs(score[end] or 0) >= 100 for end in ("value", "low", "high")):
        digits = 0
    value, low, high = (
        "" if score[end] is None else f"{score[end]:.{digits}f}" for end in ("value", "low", "high")
    )
    if not high:
        return value
    return f"{value} [{f'{low}, {high}' if low else f'≤ {high}'}]"


def format_p(p: float | None) -> str:
    """Return a p-value to three decimals, or that it is below 0.001."""
    if p is None:
        return MISSING
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def share_of_train(row: ComparedHead) -> str:
    """Return the share of the training patients that a head was given, as text."""
    share = row["train_fraction"]
    return MISSING if share is None else f"{100 * share:.3g} %"


def format_count(score: Mapping[str, Any]) -> str:
    """Return a share with its interval and counts, ``0.909 [0.623, 0.984] 10/11``."""
    return format_interval(score) + _count(score)


def format_value(score: Mapping[str, Any]) -> str:
    """Return a score without interval, to three decimals."""
    return MISSING if score["value"] is None else f"{score['value']:.3f}"


def format_counted(score: Mapping[str, Any]) -> str:
    """Return a score without interval, but with the counts of a share: ``0.909 10/11``."""
    return format_value(score) + _count(score)


def _count(score: Mapping[str, Any]) -> str:
    return f" {score['k']:,}/{score['n']:,}" if score.get("n") else ""


def _fit_table(result: ComparisonResult) -> Table | None:
    """Return a table of the trained heads' calibration, or None if it is unknown."""
    several = len(result["runs"]) > 1
    rows = [
        [
            row_name(row, several=several),
            *(format_interval(row["fit"][name], 2 + (name == "brier")) for name in FIT),
        ]
        for row in result["rows"]
        if row.get("fit") and not row["baseline"]
    ]
    plural = "studies" if result["level"] == "study" else "images"
    title = f"Calibration on test {plural}: slope 1 and intercept 0 are right"
    return Table(title, ["Head", *FIT.values()], 1, [rows], []) if rows else None


def _grouped_table(result: ComparisonResult, by: str, plural: str, with_counts: bool) -> Table:
    shown = list(COLUMNS)[:-1]
    group = "Region" if by == "region" else "Views"
    columns = [group, head_of_counts(result), "Head", "AUROC [95 %]"]
    sections = [
        [
            [
                *(_group_cells(name, block) if i == 0 else ["", ""]),
                head,
                *_cells(block, shown, with_counts),
            ]
            for i, (head, block) in enumerate(blocks)
        ]
        for name, blocks in _groups(result, by)
    ]
    columns += [COLUMNS[name] for name in shown]
    unit = "region" if by == "region" else "number of views of the study"
    title = f"Heads by {unit}, test {plural}"
    return Table(title, columns, 3, sections, result["notes"], n_spanning=2)


def head_of_counts(result: ComparisonResult) -> str:
    """Return the heading of a column with rows, and those of the positive class in brackets."""
    is_label = name_compared_classes(result).positive == "abnormal"
    return "n (abn.)" if is_label else "n (pos.)"


def _group_cells(name: str, block: dict[str, Any]) -> list[str]:
    return [name, f"{block['n']} ({block['n_abnormal']})" if "n" in block else ""]


def _groups(result: ComparisonResult, by: str) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Yield each group's name with the trained heads' names and their scores in it."""
    several = len(result["runs"]) > 1
    trained: list[tuple[str, Mapping[str, Any]]] = [
        (row_name(row, several=several), row) for row in result["rows"] if not row["baseline"]
    ]
    for name in trained[0][1][GROUPINGS[by]] if trained else ():
        yield name, [(head, row[GROUPINGS[by]][name]) for head, row in trained]
    if by == "region" and trained:
        yield "mean", [(head, row["mean_over_regions"]) for head, row in trained]


def _cells(scores: dict[str, Any], names: Sequence[str], with_counts: bool) -> list[str]:
    nothing = {"value": None}  # a mean over no region at all has no scores
    write = format_counted if with_counts else format_value
    numbers = [write(scores.get(name, nothing)) for name in names]
    return [format_interval(scores.get("auroc", nothing)), *numbers]


def _p_value(row: ComparedHead) -> str:
    if row["versus_best"] is None:
        return "best"
    text = format_p(row["versus_best"]["p_holm"])
    return f"{text} ≈" if row["versus_best"]["tied"] else text


def render_table(table: Table, table_format: str, width: int = 80) -> str:
    """Return a table as "table" (for a terminal `width` columns wide), "markdown" or "latex"."""
    if table_format == "latex":
        return _latex(table)
    return _markdown(table) if table_format == "markdown" else render_terminal(table, width)


def render_terminal(table: Table, width: int) -> str:
    """Return a table for a terminal `width` columns wide, with its notes below."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    headings = [
        column.replace("-", "-\n") if width < WIDE and i >= table.n_names else column
        for i, column in enumerate(table.columns)
    ]
    longest = [
        max(len(line) for cell in cells for line in cell.split("\n"))
        for cells in zip(headings, *table.rows, strict=True)
    ]
    is_tight = sum(longest) + 3 * len(longest) - 1 > width  # then gaps of two keep names whole
    grid = RichTable(
        title=table.title,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title_justify="left",
        padding=(0, 0, 0, 1) if is_tight else (0, 1),
    )
    for i, heading in enumerate(headings):
        if i < table.n_names:
            grid.add_column(heading, overflow="fold")
        else:
            grid.add_column(heading, justify="right", no_wrap=True)
    for section in table.sections:
        for row in section:
            grid.add_row(*(Text(mask_controls(cell)) for cell in row))
        grid.add_section()
    output = io.StringIO()
    console = Console(file=output, width=width, color_system=None, force_terminal=False)
    if table.rows:
        console.print(grid)
    else:
        console.print(Text(table.title))
    for note in table.notes:
        console.print(Text(mask_controls(note)))
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines())


def table_width(table: Table) -> int:
    """Return the terminal width at which `render_terminal` folds no name."""
    columns = list(zip(table.columns, *table.rows, strict=True))
    return sum(max(map(len, cells)) for cells in columns) + 3 * len(columns) - 1


def _markdown(table: Table) -> str:
    ruler = ["---"] * table.n_names + ["---:"] * (len(table.columns) - table.n_names)
    lines = [f"| {' | '.join(map(to_markdown, row))} |" for row in (table.columns, *table.rows)]
    lines.insert(1, f"| {' | '.join(ruler)} |")
    notes = [f"- {to_markdown(note)}" for note in table.notes]
    return "\n".join([f"**{table.title}**", "", *lines, "", *notes])


def _latex(table: Table) -> str:
    """Return a table as a `booktabs` tabular, with the notes as comments."""
    alignment = "l" * table.n_names + "r" * (len(table.columns) - table.n_names)
    bodies = [
        "\n".join(" & ".join(map(to_latex, row)) + r" \\" for row in section)
        for section in table.sections
    ]
    return "\n".join(
        [
            *(f"% {mask_controls(line)}" for line in (table.title, *table.notes)),
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
            " & ".join(map(to_latex, table.columns)) + r" \\",
            r"\midrule",
            "\n\\midrule\n".join(bodies),
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def _csv(result: ComparisonResult, by: str | None) -> str:
    names = [name for score in SCORES for name in (score, f"{score}_low", f"{score}_high")]
    counts = [f"{name}_{part}" for name in SHARES for part in ("k", "n")]
    lines: list[list[Any]] = []
    if by is None:
        about = ["run", "head", "train_fraction", "depth", "seed", "threshold"]
        fits = [f"{name}{end}" for name in FIT if name != "brier" for end in ("", "_low", "_high")]
        lines.append([*about, *names, "p_holm", *fits, *counts])
        for row in result["rows"]:
            p = row["versus_best"]["p_holm"] if row["versus_best"] else None
            cells = [cast("Mapping[str, Any]", row)[name] for name in about]
            scores = _numbers(row["scores"], SCORES)
            fit = _numbers(row.get("fit") or {}, [name for name in FIT if name != "brier"])
            lines.append([*cells, *scores, p, *fit, *_counts(row["scores"])])
    else:
        lines.append([by, "n", "n_abnormal", "head", *names, *counts])
        for name, blocks in _groups(result, by):
            for head, block in blocks:
                sizes = [block.get("n"), block.get("n_abnormal")]
                numbers = [*_numbers(block, SCORES), *_counts(block)]
                lines.append([name, *sizes, head, *numbers])
    return to_csv(lines).rstrip("\n")


def _counts(scores: dict[str, Any]) -> list[int | None]:
    return [scores.get(name, {}).get(part) for name in SHARES for part in ("k", "n")]


def _numbers(scores: dict[str, Any], names: Sequence[str]) -> list[float | None]:
    missing = {"value": None, "low": None, "high": None}
    found = [scores.get(name, missing) for name in names]
    return [score[part] for score in found for part in ("value", "low", "high")]
