"""Tables of several targets side by side: for terminal, Markdown, CSV and LaTeX."""

from pathlib import Path
from typing import Any

from medembed.core.files import write_atomically
from medembed.core.text import to_csv
from medembed.report.comparison import make_directory, write_tables
from medembed.report.tables import (
    MISSING,
    Table,
    format_interval,
    make_table,
    render_table,
    table_width,
)
from medembed.results.comparison_schema import ComparisonResult, Score
from medembed.results.target_comparison import MEANS, TargetsComparison

__all__ = [
    "MEAN",
    "render_targets",
    "tabulate_means",
    "tabulate_target",
    "tabulate_targets",
    "write_target_tables",
]

MEAN = "mean"
"""The last row: means over targets."""


def render_targets(result: TargetsComparison, table_format: str = "table", width: int = 80) -> str:
    """Return a comparison by target as text: AUROCs side by side, then each target's table.

    Parameters
    ----------
    result : dict
        What `target_comparison.compare_targets` returned.
    table_format : {"table", "markdown", "csv", "latex"}
        "csv" has every score at full precision, a line for each target and head.
    width : int
        Columns of the terminal, only for "table".
    """
    if table_format == "csv":
        return _csv(result)
    tables = [
        *_side_by_side(result, width if table_format == "table" else None),
        *(tabulate_target(name, own) for name, own in result["targets"].items()),
    ]
    return "\n\n".join(render_table(own, table_format, width).rstrip() for own in tables)


def write_target_tables(result: TargetsComparison, directory: Path) -> list[Path]:
    """Write the tables of every target below its name, and ``targets`` as .csv and .tex.

    Raises
    ------
    RunError
        `directory` is a file.
    """
    written = [
        path
        for name, own in result["targets"].items()
        for path in write_tables(own, make_directory(directory) / name)
    ]
    latex = (tabulate_targets(result), tabulate_means(result))
    texts = {
        "csv": _csv(result),
        "tex": "\n\n".join(render_table(own, "latex") for own in latex),
    }
    for ending, text in texts.items():
        path = directory / f"targets.{ending}"
        write_atomically(path, f"{text}\n".encode())
        written.append(path)
    return written


def tabulate_targets(result: TargetsComparison) -> Table:
    """Return the AUROC of every head by target, with means over targets in the last row."""
    heads = [row["head"] for row in result["macro"] if not row["baseline"]]
    return _tabulate(result, heads)


def tabulate_means(result: TargetsComparison) -> Table:
    """Return the means over targets of every head and score."""
    shown = {"auroc": "AUROC [95 %]", "average_precision": "AP", "macro_f1": "Macro-F1"}
    shown |= {"sensitivity": "Sens.", "specificity": "Spec.", "brier": "Brier"}
    rows = []
    for row in result["macro"]:
        first, *others = (row["scores"][name] for name in shown)
        numbers = (MISSING if own["value"] is None else f"{own['value']:.3f}" for own in others)
        rows.append([row["head"], f"{len(row['targets'])}", format_interval(first), *numbers])
    return Table("Means over targets", ["Head", "Targets", *shown.values()], 1, [rows])


def tabulate_target(name: str, result: ComparisonResult) -> Table:
    """Return the table of one target's heads, without notes."""
    table = make_table(result)
    return Table(f"{name}: {table.title.lower()}", table.columns, table.n_names, table.sections)


def _side_by_side(result: TargetsComparison, width: int | None) -> list[Table]:
    """Return `tabulate_targets`, in as many tables as its heads need at this width."""
    heads = [row["head"] for row in result["macro"] if not row["baseline"]]
    whole = _tabulate(result, heads)
    if width is None or table_width(whole) <= width:
        return [whole]
    parts: list[list[str]] = []
    for head in heads:
        if parts and table_width(_tabulate(result, [*parts[-1], head])) <= width:
            parts[-1].append(head)
        else:
            parts.append([head])
    tables = [_tabulate(result, part) for part in parts]
    return [
        *(Table(own.title, own.columns, own.n_names, own.sections) for own in tables[:-1]),
        tables[-1],
    ]


def _tabulate(result: TargetsComparison, heads: list[str]) -> Table:
    plural = "studies" if result["level"] == "study" else "images"
    rows = []
    for name, own in result["targets"].items():
        scores = {row["head"]: row["scores"]["auroc"] for row in own["rows"]}
        test = own["test"]
        cells = [format_interval(scores[head]) if head in scores else MISSING for head in heads]
        rows.append([name, f"{test['n']} ({test['n_abnormal']})", *cells])
    means = {row["head"]: row["scores"]["auroc"] for row in result["macro"]}
    last = [MEAN, "", *(format_interval(means[head]) for head in heads)]
    title = f"AUROC [95 %] by target, test {plural}"
    return Table(title, ["Target", "n (pos.)", *heads], 1, [rows, [last]], result["notes"])


def _csv(result: TargetsComparison) -> str:
    names = [f"{name}{end}" for name in MEANS for end in ("", "_low", "_high")]
    lines: list[list[Any]] = [["target", "n", "n_abnormal", "head", *names]]
    for name, own in result["targets"].items():
        sizes = [own["test"]["n"], own["test"]["n_abnormal"]]
        lines += [[name, *sizes, row["head"], *_numbers(row["scores"])] for row in own["rows"]]
    for mean in result["macro"]:
        lines.append([MEAN, None, None, mean["head"], *_numbers(mean["scores"])])
    return to_csv(lines).rstrip("\n")


def _numbers(scores: dict[str, Score]) -> list[float | None]:
    found = [scores[name] for name in MEANS]
    return [number for own in found for number in (own["value"], own["low"], own["high"])]
