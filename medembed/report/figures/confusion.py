"""Confusion matrices of heads at every operating point."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from medembed.report.figures.captions import (
    LEGEND,
    SMALL,
    describe_intervals,
    describe_shown,
    describe_test,
    elide,
    flatten,
    label_rows,
    name_rows,
    shown_rows,
    write_csv,
)
from medembed.report.figures.plotting import Plot, Theme, make_plot, start_figure
from medembed.report.operating_tables import confusion_of, name_point, points_of
from medembed.report.tables import format_interval
from medembed.results.comparison_schema import ComparedHead, ComparisonResult, PointDocument
from medembed.results.methods import OF_SHARES, name_compared_classes

__all__ = ["plot_confusion"]

TITLE = "Confusion matrices"
MAX_MATRICES = 3
MAX_POINTS = 6
LINE_HEIGHT = 1.7
"""Height in inches of the matrices of one operating point."""
PANEL_WIDTH = 92
"""Points above a matrix."""
CLASS_WIDTH = 60
"""Points for a class beside or below a matrix."""
COUNTS = ("tn", "fp", "fn", "tp")
DARKEST = 0.5
"""Opacity of a cell that holds its whole row, at which text stays readable in both themes."""


def plot_confusion(result: ComparisonResult) -> Plot | None:
    """Draw the confusion matrices of the best trained heads at each operating point.

    Returns None if the test rows have one class, no head was trained, or the comparison holds no
    operating points.
    """
    rows = [row for row in shown_rows(result, MAX_MATRICES) if points_of(row)]
    if not rows:
        return None
    names = [point["name"] for point in points_of(rows[0])][:MAX_POINTS]

    def draw(theme: Theme) -> Figure:
        return _draw_matrices(theme, result, rows, names)

    sentences = [
        f"{name} at {_title(point)}: {found['tn']:,} true negative, "
        f"{found['fp']:,} false positive, {found['fn']:,} false negative, "
        f"{found['tp']:,} true positive"
        for name, row in zip(label_rows(result, rows), rows, strict=True)
        for point in points_of(row)
        for found in [confusion_of(point)]
    ]
    n_all = len(result["operating_points"])
    most = f" The first {MAX_POINTS} of {n_all} operating points." if n_all > MAX_POINTS else ""
    return make_plot(
        "confusion",
        TITLE,
        draw,
        caption=f"{describe_test(result)} Cells: counts and shares of the row, at thresholds that "
        "were chosen on out-of-fold predictions of train, or given; below, sensitivity and "
        f"specificity.{most} {_describe_intervals(rows)}{describe_shown(result, MAX_MATRICES)}",
        alt=f"{TITLE} on test. {'; '.join(sentences)}.",
        csv=write_csv(
            [
                {
                    "head": name,
                    "operating_point": point["name"],
                    "threshold": point["threshold"],
                    **{count: confusion_of(point)[count] for count in COUNTS},
                    **flatten("sensitivity", point["scores"]["sensitivity"]),
                    **flatten("specificity", point["scores"]["specificity"]),
                }
                for name, row in zip(name_rows(result, rows), rows, strict=True)
                for point in points_of(row)
            ]
        ),
    )


def _draw_matrices(
    theme: Theme, result: ComparisonResult, rows: list[ComparedHead], names: list[str]
) -> Figure:
    about = (
        f"{describe_test(result)} Cells: counts and shares of the row. {_describe_intervals(rows)}"
    )
    about += describe_shown(result, MAX_MATRICES)
    several, classes = len(result["runs"]) > 1, _label_classes(result)
    figure = start_figure(TITLE, about, body=LINE_HEIGHT * len(names) + (0.5 if several else 0.3))
    grid = figure.subplots(len(names), len(rows), squeeze=False)
    for i, row in enumerate(rows):
        told = {point["name"]: point for point in points_of(row)}
        heads = (row["run"], row["head"]) if several else (row["head"],)
        title = "\n".join(elide(name, PANEL_WIDTH, LEGEND) for name in heads)
        grid[0, i].set_title(title, fontsize=LEGEND)
        for line, name in enumerate(names):
            axes, point = grid[line, i], told.get(name)
            if point is None:  # an external model that does not record it
                axes.set_axis_off()
                continue
            _draw_matrix(axes, theme, confusion_of(point), classes)
            axes.set_xlabel(_describe_matrix(point), fontsize=SMALL)
            axes.set_yticks((0, 1), ("", ""))
    for line, name in enumerate(names):
        counts = _row_sums(confusion_of(points_of(rows[0])[line]))
        labels = [f"{own}\nn = {n:,}" for own, n in zip(classes, counts, strict=True)]
        grid[line, 0].set_yticks((0, 1), labels, fontsize=SMALL)
        grid[line, 0].set_ylabel(name_point(name), fontsize=LEGEND)
    return figure


def _describe_intervals(rows: list[ComparedHead]) -> str:
    points = [point for row in rows for point in points_of(row)]
    scores = [own["scores"][name] for own in points for name in ("sensitivity", "specificity")]
    return describe_intervals("In brackets", scores, OF_SHARES)


def _label_classes(result: ComparisonResult) -> tuple[str, ...]:
    """Return what the classes are called, as far as there is room."""
    return tuple(elide(name, CLASS_WIDTH, SMALL) for name in name_compared_classes(result))


def _draw_matrix(
    axes: Any, theme: Theme, confusion: Mapping[str, int], classes: Sequence[str]
) -> None:
    sums = _row_sums(confusion)
    for k, name in enumerate(COUNTS):
        line, column = divmod(k, 2)
        share = confusion[name] / max(sums[line], 1)
        axes.add_patch(
            Rectangle(
                (column - 0.5, line - 0.5),
                *(1, 1),
                facecolor=theme.series[0],
                alpha=DARKEST * share,
                lw=0,
            )
        )
        text = f"{confusion[name]:,}\n{100 * share:.1f} %"
        axes.text(column, line, text, ha="center", va="center", fontsize=LEGEND)
    axes.set(xlim=(-0.5, 1.5), ylim=(1.5, -0.5), anchor="N")
    axes.set_box_aspect(0.65)
    axes.set_xticks((0, 1), classes, fontsize=SMALL)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)


def _row_sums(confusion: Mapping[str, int]) -> tuple[int, int]:
    return confusion["tn"] + confusion["fp"], confusion["fn"] + confusion["tp"]


def _title(point: PointDocument) -> str:
    return f"{name_point(point['name'])} ({point['threshold']:.3f})"


def _describe_matrix(point: PointDocument) -> str:
    return (
        f"from {point['threshold']:.3f} on\n"
        f"sens. {format_interval(point['scores']['sensitivity'], 2)}\n"
        f"spec. {format_interval(point['scores']['specificity'], 2)}"
    )
