"""Tables of a column's groups and the gaps between them, for terminal, paper and page."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from medembed.core.files import write_atomically
from medembed.core.text import to_csv
from medembed.dataset.covariate_bands import find_groupings
from medembed.dataset.manifest import Manifest
from medembed.evaluation.unpaired import GAP_SCORES, GROUP_SCORES
from medembed.report.operating_tables import asks_for_points, tabulate_points
from medembed.report.retrieval import tabulate_retrieval
from medembed.report.tables import (
    NOT_ESTIMABLE,
    Table,
    format_interval,
    format_p,
    format_value,
    head_of_counts,
    render,
    render_table,
)
from medembed.results.alignment import TestSet
from medembed.results.comparison_schema import ComparisonResult, GapDocument, Group, Score
from medembed.results.methods import name_compared_classes
from medembed.results.significance import row_name
from medembed.results.subgroups import (
    compare_groups,
    describe_gaps,
    find_test_rows,
    join_column,
)

__all__ = [
    "ColumnSection",
    "ColumnSections",
    "render_comparison",
    "render_groups",
    "tabulate_columns",
    "write_group_tables",
]

SHOWN = {"macro_f1": "F1", "sensitivity": "Sens.", "specificity": "Spec."}
"""The decision scores shown next to AUROC, as in the table by region."""
WORDS = {
    "auroc": "AUROC",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "brier": "Brier score",
}
METHOD = (
    "Gaps: intervals by MOVER from those of both groups, with what patients in both bring; p after "
    "Holm's correction over all gaps of a head by this column."
)


def render_comparison(
    result: ComparisonResult, table_format: str = "table", by: str | None = None, width: int = 80
) -> str:
    """Return everything that a comparison was asked for as text.

    Groups and gaps of a column if it has them; otherwise its heads, grouped if `by` is "region" or
    "views", and operating points and retrieval if they were requested. For formats see
    `tables.render`.

    Raises
    ------
    RunError
        The format or grouping is unknown.
    """
    retrieval = tabulate_retrieval(result)
    if "groups" in result:
        groups = render_groups(result, table_format, width)
        found = [] if table_format == "csv" else retrieval
        return "\n\n".join([groups, *(render_table(own, table_format, width) for own in found)])
    more = tabulate_points(result, width if table_format == "table" else None)
    more = more if asks_for_points(result) or not by else []
    more = [*more, *retrieval]
    return render(result, table_format=table_format, by=by, width=width, more=more)


def render_groups(result: ComparisonResult, table_format: str = "table", width: int = 80) -> str:
    """Return the `groups` and `gaps` of a comparison as text, a table of each.

    Parameters
    ----------
    result : dict
        A comparison by a column.
    table_format : {"table", "markdown", "csv", "latex"}
        "csv" has every score at full precision, with the gaps after an empty line.
    width : int
        Columns of the terminal, only for "table".
    """
    if table_format == "csv":
        return f"{_write_groups(result)}\n{_write_gaps(result)}".rstrip("\n")
    tables = _tabulate_groups(result), _tabulate_gaps(result)
    return "\n\n".join(render_table(table, table_format, width) for table in tables)


def write_group_tables(result: ComparisonResult, directory: Path) -> list[Path]:
    """Write ``groups`` and ``gaps`` of a comparison, each as ``.csv`` and ``.tex``."""
    texts = {
        "groups.csv": _write_groups(result),
        "groups.tex": render_table(_tabulate_groups(result), "latex") + "\n",
        "gaps.csv": _write_gaps(result),
        "gaps.tex": render_table(_tabulate_gaps(result), "latex") + "\n",
    }
    for name, text in texts.items():
        write_atomically(directory / name, text.encode())
    return [directory / name for name in texts]


@dataclass(frozen=True)
class ColumnSection:
    """What the page shows by one column of the manifest.

    Attributes
    ----------
    column : str
    groups : Table
        Scores of each group.
    gaps : Table
        Differences between groups.
    summary : str
        What the gaps come to, in a sentence.
    notes : list of str
        One sentence each.
    """

    column: str
    groups: Table
    gaps: Table
    summary: str
    notes: list[str]


@dataclass(frozen=True)
class ColumnSections:
    """The page's sections by columns, and what holds for all.

    Attributes
    ----------
    sections : list of ColumnSection
    notes : list of str
        How gaps are tested, which columns are left out, and why.
    """

    sections: list[ColumnSection]
    notes: list[str]


def tabulate_columns(
    result: ComparisonResult, test_set: TestSet, manifest: Manifest
) -> ColumnSections:
    """Return the page's sections by every column of the manifest that can be grouped.

    Raises
    ------
    ManifestError, RunError
        The test rows cannot be matched to the manifest; see `columns.find_test_rows`.
    """
    rows = find_test_rows(test_set, manifest)
    groupings, left_out = find_groupings(rows)
    sections = []
    for grouping in groupings:
        own = join_column(test_set, rows, grouping)
        found: ComparisonResult = {**result, **compare_groups(result["rows"], test_set, own)}
        sections.append(
            ColumnSection(
                grouping.column,
                _tabulate_groups(found),
                _tabulate_gaps(found),
                describe_gaps(found["gaps"], several=len(result["runs"]) > 1),
                [*found["groups"]["notes"], *_explain_absent(found)],
            )
        )
    notes = [METHOD] if sections else []
    notes += [f"Not shown by {name}: it {reason}." for name, reason in left_out.items()]
    return ColumnSections(sections, notes)


def _tabulate_gaps(result: ComparisonResult) -> Table:
    """Return a table of the gaps of every trained head between groups."""
    several = len(result["runs"]) > 1
    sections: dict[str, list[list[str]]] = {}
    for gap in result["gaps"]:
        head = row_name(gap, several=several)
        section = sections.setdefault(head, [])
        cells = [WORDS[gap["score"]], f"{gap['a']} − {gap['b']}", _difference(gap)]
        section.append(["" if section else head, *cells, format_p(gap["p_holm"])])
    notes = [describe_gaps(result["gaps"], several=several)]
    notes += [METHOD] if result["gaps"] else []
    title = f"Gaps between groups by {result['groups']['column']}"
    columns = ["Head", "Score", "Groups", "Difference [95 %]", "p (Holm)"]
    return Table(title, columns, 3, list(sections.values()), notes, n_spanning=1)


def _tabulate_groups(result: ComparisonResult) -> Table:
    groups, plural = result["groups"], "studies" if result["level"] == "study" else "images"
    sections = []
    for group, blocks in _blocks(result):
        name = [group["name"], f"{group['n']} ({group['n_abnormal']})"]
        sections.append(
            [
                [*(name if i == 0 else ["", ""]), head, *_cells(block)]
                for i, (head, block) in enumerate(blocks)
            ]
        )
    columns = [groups["column"], head_of_counts(result), "Head", "AUROC [95 %]", *SHOWN.values()]
    title = f"Heads by {groups['column']}, test {plural}"
    notes = [*groups["notes"], *_explain_absent(result)]
    return Table(title, columns, 3, sections, [*notes, *result["notes"]], n_spanning=2)


def _blocks(
    result: ComparisonResult,
) -> Iterator[tuple[Group, list[tuple[str, dict[str, Score]]]]]:
    """Yield each group with the trained heads' names and their scores in it."""
    several = len(result["runs"]) > 1
    priors = {(row["run"], row["head"]) for row in result["rows"] if row["baseline"]}
    rows = [row for row in result["groups"]["rows"] if (row["run"], row["head"]) not in priors]
    for group in result["groups"]["groups"]:
        yield (
            group,
            [(row_name(row, several=several), row["groups"][group["name"]]) for row in rows],
        )


def _explain_absent(result: ComparisonResult) -> list[str]:
    """Return, for each group, the first reason why a score with gaps has no interval."""
    found: dict[str, str] = {}
    classes = name_compared_classes(result)
    for group, blocks in _blocks(result):
        for score in GAP_SCORES:
            for _, block in blocks:
                if "reason" in block[score]:
                    found.setdefault(group["name"], classes.reword(block[score]["reason"]))
    return [f"No interval, {name}: {reason}." for name, reason in found.items()]


def _cells(block: Mapping[str, Score]) -> list[str]:
    return [format_interval(block["auroc"]), *(format_value(block[name]) for name in SHOWN)]


def _difference(gap: GapDocument) -> str:
    if gap["difference"] is None:
        return NOT_ESTIMABLE
    if gap["low"] is None:
        return f"{gap['difference']:+.3f}"
    return f"{gap['difference']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]"


def _write_groups(result: ComparisonResult) -> str:
    ends = ("", "_low", "_high")
    names = [f"{score}{end}" for score in GROUP_SCORES for end in ends]
    about = [result["groups"]["column"], "n", "n_abnormal", "n_patients", "head"]
    lines: list[Sequence[Any]] = [[*about, *names]]
    for group, blocks in _blocks(result):
        counts = [group["n"], group["n_abnormal"], group["n_patients"]]
        for head, block in blocks:
            scores = [dict(block[s])[e] for s in GROUP_SCORES for e in ("value", "low", "high")]
            lines.append([group["name"], *counts, head, *scores])
    return to_csv(lines)


def _write_gaps(result: ComparisonResult) -> str:
    several = len(result["runs"]) > 1
    names = ["score", "a", "b", "difference", "low", "high", "p", "p_holm", "method"]
    lines: list[Sequence[Any]] = [["head", *names]]
    lines += [
        [row_name(gap, several=several), *(cast("Mapping[str, Any]", gap)[name] for name in names)]
        for gap in result["gaps"]
    ]
    return to_csv(lines)
