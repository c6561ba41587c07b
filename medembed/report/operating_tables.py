"""Decisions at operating points, as tables for the terminal, papers and the page."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

from medembed.core.text import to_csv
from medembed.evaluation.thresholds import SHOWN
from medembed.report.tables import (
    Table,
    format_count,
    format_counted,
    format_interval,
    table_width,
)
from medembed.results.comparison_schema import ComparedHead, ComparisonResult, PointDocument
from medembed.results.methods import name_compared_classes
from medembed.results.operating_points import POINT_SCORES
from medembed.results.significance import row_name

__all__ = [
    "PREDICTIVE",
    "SHARES",
    "asks_for_points",
    "confusion_of",
    "name_point",
    "points_csv",
    "points_of",
    "tabulate_points",
]

SHARES = {"sensitivity": "Sens.", "specificity": "Spec.", "ppv": "PPV", "npv": "NPV"}
PREDICTIVE = {"ppv": "PPV", "npv": "NPV"}
CONFUSION = ("tp", "fn", "fp", "tn")
_NAMES = {"youden": "Youden"}
_NOTE = (
    "From: the threshold of the calibrated probability, chosen on out-of-fold predictions of "
    "train, or given."
)


def tabulate_points(result: ComparisonResult, width: int | None = None) -> list[Table]:
    """Return tables of trained heads' decisions at each operating point, if recorded.

    Parameters
    ----------
    result : mapping
        A comparison; older ones have no operating points.
    width : int, optional
        Columns of the terminal: intervals and confusion matrix are left out if they do not fit.

    Returns
    -------
    list of Table
        One for the test rows, and one at another prevalence if the comparison has it.
    """
    if not any(points for _, points in _heads(result)):
        return []
    for layout in (_FULL, _SHORT):
        table = _table(result, layout)
        if width is None or table_width(table) <= width:
            break
    else:
        table = _stack(_table(result, _NARROW))
    return [table, *_at_prevalence(result)]


def asks_for_points(result: ComparisonResult) -> bool:
    """Return whether additional operating points or a prevalence were requested."""
    return len(result["operating_points"]) > len(SHOWN) or result["prevalence"] is not None


def points_csv(result: ComparisonResult) -> str:
    """Return every head's operating points as CSV at full precision."""
    shares = [f"{name}_{part}" for name in ("accuracy", *SHARES) for part in ("k", "n")]
    scores = [f"{name}{end}" for name in POINT_SCORES for end in ("", "_low", "_high")]
    given = [f"{name}_at_prevalence{end}" for name in PREDICTIVE for end in ("", "_low", "_high")]
    heading = ["run", "head", "operating_point", "threshold", *scores, *shares, *CONFUSION]
    lines: list[list[Any]] = [[*heading, "prevalence", *given]]
    for row in result["rows"]:
        for point in points_of(row):
            told: Mapping[str, Mapping[str, Any]] = point["scores"]
            matrix = confusion_of(point)
            at = point.get("at_prevalence") or {}
            lines.append(
                [
                    *(row["run"], row["head"]),
                    *(point["name"], point["threshold"]),
                    *(told[name][end] for name in POINT_SCORES for end in _ENDS),
                    *(told[n].get(part) for n in ("accuracy", *SHARES) for part in ("k", "n")),
                    *(matrix.get(name) for name in CONFUSION),
                    at.get("prevalence"),
                    *((at.get(name) or {}).get(end) for name in PREDICTIVE for end in _ENDS),
                ]
            )
    return to_csv(lines).rstrip("\n")


def points_of(row: ComparedHead) -> list[PointDocument]:
    """Return the operating points of a comparison's row that have a threshold."""
    return [own for own in row.get("operating_points", []) if own["threshold"] is not None]


def confusion_of(point: PointDocument) -> Mapping[str, int]:
    """Return the confusion matrix at an operating point that has a threshold, by `CONFUSION`."""
    return cast("Mapping[str, int]", point["confusion"] or {})


def name_point(name: str) -> str:
    """Return an operating point's name for tables."""
    return _NAMES.get(name, name)


_ENDS = ("value", "low", "high")


def _heads(result: ComparisonResult) -> Iterator[tuple[str, list[PointDocument]]]:
    several = len(result.get("runs", [])) > 1
    for row in result["rows"]:
        if not row["baseline"]:
            yield row_name(row, several=several), points_of(row)


class _Layout(NamedTuple):
    """The optional parts of a table of decisions: intervals, the confusion matrix."""

    has_intervals: bool
    has_matrix: bool


_FULL, _SHORT, _NARROW = _Layout(True, True), _Layout(False, True), _Layout(False, False)


def _table(result: ComparisonResult, layout: _Layout) -> Table:
    write = format_count if layout.has_intervals else format_counted
    names = [f"{title} [95 %]" if layout.has_intervals else title for title in SHARES.values()]
    matrix: Sequence[str] = CONFUSION if layout.has_matrix else ()
    columns = ["Head", "Operating point", "From", *names, *(name.upper() for name in matrix)]

    def cells(point: PointDocument) -> list[str]:
        counts = [f"{confusion_of(point)[name]:,}" for name in matrix]
        return [*(write(point["scores"][name]) for name in SHARES), *counts]

    title, notes = f"Decisions on test {_plural(result)}", [_NOTE, _explain_counts(result)]
    return Table(title, columns, 2, _lines(result, cells), notes[: 1 if layout.has_matrix else 2])


def _explain_counts(result: ComparisonResult) -> str:
    negative, positive = name_compared_classes(result)
    return (
        f"x/n: found of all {positive}, passed of all {negative}, {positive} of those called so, "
        f"{negative} of those called so."
    )


def _stack(table: Table) -> Table:
    """Return the table with each share's counts on a separate line."""
    sections = []
    for section in table.sections:
        lines = []
        for names, shares in ((row[:3], row[3:]) for row in section):
            parts = [share.partition(" ") for share in shares]
            lines += [[*names, *(value for value, _, _ in parts)]]
            lines += [["", "", "", *(counts for _, _, counts in parts)]]
        sections.append(lines)
    return replace(table, sections=sections)


def _at_prevalence(result: ComparisonResult) -> list[Table]:
    prevalence = result.get("prevalence")
    if prevalence is None:
        return []
    columns = ["Head", "Operating point", "PPV [95 %]", "NPV [95 %]"]

    def cells(point: PointDocument) -> list[str]:
        return [format_interval(point["at_prevalence"][name]) for name in PREDICTIVE]

    positive = name_compared_classes(result).positive
    title = f"Predictive values where a share of {prevalence:g} is {positive}"
    note = (
        "From sensitivity and specificity by Bayes' rule, with limits from theirs (MOVER); they "
        "hold where both are what they are on these rows."
    )
    lines = [[[*row[:2], *row[3:]] for row in section] for section in _lines(result, cells)]
    return [Table(title, columns, 2, lines, [note])]


def _lines(
    result: ComparisonResult, cells: Callable[[PointDocument], list[str]]
) -> list[list[list[str]]]:
    return [
        [
            [
                "" if i else head,
                name_point(point["name"]),
                f"{point['threshold']:.3f}",
                *cells(point),
            ]
            for i, point in enumerate(points)
        ]
        for head, points in _heads(result)
    ]


def _plural(result: ComparisonResult) -> str:
    return "studies" if result["level"] == "study" else "images"
