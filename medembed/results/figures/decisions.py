"""What heads call abnormal: confusion matrices at Youden's threshold."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from medembed.results.figures.lettering import LEGEND, SMALL, elide
from medembed.results.figures.plotting import Plot, Theme, make_plot, start_figure
from medembed.results.figures.wording import (
    describe_shown,
    describe_test,
    flatten,
    label_rows,
    name_rows,
    shown_rows,
    tell_intervals,
    write_csv,
)
from medembed.results.methods import OF_SHARES
from medembed.results.tables import format_interval

__all__ = ["plot_confusion"]

TITLE = "Confusion matrices at Youden's threshold"
MAX_MATRICES = 3
PANEL_WIDTH = 92
"""Points above a matrix."""
COUNTS = ("tn", "fp", "fn", "tp")
CLASSES = ("normal", "abnormal")
DARKEST = 0.5
"""Opacity of a cell that holds its whole row: the ink on it stays readable in both themes."""


def plot_confusion(result: dict[str, Any]) -> Plot | None:
    """Draw the confusion matrices of the best trained heads at Youden's threshold.

    Returns None where the test rows are of one class, no head was trained, or the comparison holds
    no matrices.
    """
    rows = [row for row in shown_rows(result, MAX_MATRICES) if row.get("confusion")]
    if not rows:
        return None

    def draw(theme: Theme) -> Figure:
        return _draw_matrices(theme, result, rows)

    sentences = [
        f"{name}: {row['confusion']['tn']:,} true negative, {row['confusion']['fp']:,} false "
        f"positive, {row['confusion']['fn']:,} false negative, {row['confusion']['tp']:,} true "
        "positive"
        for name, row in zip(label_rows(result, rows), rows, strict=True)
    ]
    return make_plot(
        "confusion",
        TITLE,
        draw,
        caption=f"{describe_test(result)} Cells: counts and shares of the row, at Youden's "
        "threshold, which was chosen on out-of-fold predictions of train; below, sensitivity and "
        f"specificity. {_tell_intervals(rows)}{describe_shown(result, MAX_MATRICES)}",
        alt=f"{TITLE} on test. {'; '.join(sentences)}.",
        csv=write_csv(
            [
                {
                    "head": name,
                    "threshold": row["confusion"]["threshold"],
                    **{count: row["confusion"][count] for count in COUNTS},
                    **flatten("sensitivity", row["scores"]["sensitivity"]),
                    **flatten("specificity", row["scores"]["specificity"]),
                }
                for name, row in zip(name_rows(result, rows), rows, strict=True)
            ]
        ),
    )


def _draw_matrices(theme: Theme, result: dict[str, Any], rows: list[dict[str, Any]]) -> Figure:
    about = f"{describe_test(result)} Cells: counts and shares of the row. {_tell_intervals(rows)}"
    about += describe_shown(result, MAX_MATRICES)
    several = len(result["runs"]) > 1
    figure = start_figure(TITLE, about, body=2.9 if several else 2.7)
    for i, row in enumerate(rows):
        axes = figure.add_subplot(1, len(rows), i + 1)
        _draw_matrix(axes, theme, row["confusion"])
        names = (row["run"], row["head"]) if several else (row["head"],)
        title = "\n".join(elide(name, PANEL_WIDTH, LEGEND) for name in names)
        axes.set_title(title, fontsize=LEGEND)
        axes.set_xlabel(_describe_matrix(row), fontsize=SMALL)
        if i == 0:
            counts = _row_sums(row["confusion"])
            labels = [f"{name}\nn = {n:,}" for name, n in zip(CLASSES, counts, strict=True)]
            axes.set_yticks((0, 1), labels, fontsize=SMALL)
            axes.set_ylabel("Label", fontsize=LEGEND)
        else:
            axes.set_yticks((0, 1), ("", ""))
    return figure


def _tell_intervals(rows: list[dict[str, Any]]) -> str:
    scores = [row["scores"][name] for row in rows for name in ("sensitivity", "specificity")]
    return tell_intervals("In brackets", scores, OF_SHARES)


def _draw_matrix(axes: Any, theme: Theme, confusion: dict[str, Any]) -> None:
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
    axes.set(xlim=(-0.5, 1.5), ylim=(1.5, -0.5), aspect="equal", anchor="N")
    axes.set_xticks((0, 1), CLASSES, fontsize=SMALL)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)


def _row_sums(confusion: dict[str, Any]) -> tuple[int, int]:
    return confusion["tn"] + confusion["fp"], confusion["fn"] + confusion["tp"]


def _describe_matrix(row: dict[str, Any]) -> str:
    return (
        f"Called at {row['confusion']['threshold']:.3f}\n\n"
        f"sensitivity\n{format_interval(row['scores']['sensitivity'])}\n"
        f"specificity\n{format_interval(row['scores']['specificity'])}"
    )
