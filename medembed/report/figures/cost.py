"""The cost of heads: seconds of training against AUROC."""

import math

from matplotlib.figure import Figure

from medembed.report.figures.captions import (
    LEGEND,
    MAX_SERIES,
    describe_intervals,
    describe_shown,
    describe_test,
    flatten,
    label_rows,
    name_rows,
    shown_rows,
    thin,
    write_csv,
)
from medembed.report.figures.plotting import (
    AXIS,
    Plot,
    Theme,
    add_legend,
    add_points,
    make_plot,
    scale_scores,
    start_figure,
)
from medembed.report.tables import format_interval
from medembed.results.comparison_schema import ComparedHead, ComparisonResult
from medembed.results.methods import of_score

__all__ = ["plot_cost"]

MIN_RATIO = 8.0
"""Least ratio of the axis' ends, so that it holds at least two of 1, 2, 5, 10, 20, 50, …"""
MAX_TICKS = 7
MAX_LABEL = 150
"""Points that a name may take in the legend, beside a score and a time."""


def plot_cost(result: ComparisonResult) -> Plot | None:
    """Draw AUROC with its 95 % interval over the seconds that each head's trials took.

    Returns None if fewer than two heads have a time, or the test rows have one class.
    """
    timed = [row for row in shown_rows(result, len(result["rows"])) if row.get("seconds")]
    rows = timed[:MAX_SERIES]
    if len(rows) < 2:
        return None
    scores = [row["scores"]["auroc"] for row in rows]
    draws = describe_intervals("Bars", scores, of_score("auroc"))
    draws += describe_shown(result, n_all=len(timed))
    names = label_rows(result, rows, MAX_LABEL)
    labels = [
        f"{name}  {format_interval(row['scores']['auroc'])}, "
        f"{_format_seconds(row['seconds'] or 0.0)}"
        for name, row in zip(names, rows, strict=True)
    ]

    def draw(theme: Theme) -> Figure:
        about = f"{describe_test(result)} {draws}"
        return _draw_cost(theme, about, rows, labels)

    return make_plot(
        "cost",
        "Cost and AUROC",
        draw,
        caption=f"{describe_test(result)} Time: of all the head's trials in its sweep, summed. "
        f"{draws}",
        alt=f"AUROC over training time. {'; '.join(labels)}.",
        csv=write_csv(
            [
                {
                    "head": name,
                    "seconds": row["seconds"],
                    **flatten("auroc", row["scores"]["auroc"]),
                }
                for name, row in zip(name_rows(result, rows), rows, strict=True)
            ]
        ),
    )


def _draw_cost(theme: Theme, about: str, rows: list[ComparedHead], labels: list[str]) -> Figure:
    figure = start_figure("Cost and AUROC", about, body=3.1, n_labels=len(rows))
    axes = figure.add_subplot()
    scores = [row["scores"]["auroc"] for row in rows]
    points = [
        add_points(axes, theme, i, [row["seconds"] or 0.0], [row["scores"]["auroc"]])
        for i, row in enumerate(rows)
    ]
    low, high = _ends([row["seconds"] or 0.0 for row in rows])
    ticks = _ticks(low, high)
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xlim(low, high)
    scale_scores(axes, scores)
    places = [AXIS * math.log(tick / low) / math.log(high / low) for tick in ticks]
    axes.set_xticks(
        ticks, thin(places, [_format_number(tick) for tick in ticks], LEGEND), fontsize=LEGEND
    )
    axes.set_xlabel("Training time of all trials, seconds (log scale)")
    axes.set_ylabel("AUROC on test")
    add_legend(figure, points, labels)
    return figure


def _ends(seconds: list[float]) -> tuple[float, float]:
    low, high = min(seconds) / 1.5, max(seconds) * 1.5
    widening = max(1.0, math.sqrt(MIN_RATIO * low / high))
    return low / widening, high * widening


def _ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten between the ends, or only the powers."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1,)):
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= MAX_TICKS:
            break
    return ticks


def _format_seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def _format_number(number: float) -> str:
    return f"{number:,.0f}" if number >= 1 else f"{number:g}"
