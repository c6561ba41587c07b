"""Scores by body region, and by a study's number of views."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from matplotlib.figure import Figure

from medembed.report.figures.captions import (
    LEGEND,
    describe_intervals,
    describe_shown,
    describe_test,
    elide,
    has_interval,
    is_known,
    label_rows,
    shown_rows,
)
from medembed.report.figures.plotting import (
    REFERENCE,
    Plot,
    Theme,
    add_legend,
    add_points,
    make_plot,
    start_figure,
)
from medembed.report.tables import GROUPINGS, NOT_ESTIMABLE, format_interval, render
from medembed.results.comparison_schema import ComparedHead, ComparisonResult
from medembed.results.methods import name_compared_classes, of_score

__all__ = ["plot_regions", "plot_views"]

MAX_LABEL = 130
"""Points available for a region's name beside the axis."""
UNKNOWN: Mapping[str, Any] = {"value": None, "low": None, "high": None}


@dataclass(frozen=True)
class _Lines:
    """The lines of a figure, one per group of test rows.

    Attributes
    ----------
    labels : list of str
        Names with counts, for the axis.
    scores : list of list of dict
        AUROC of each head in every group.
    n_means : int
        How many lines, at the end, are means over the others.
    """

    labels: list[str]
    scores: list[list[Mapping[str, Any]]]
    n_means: int = 0


def plot_regions(result: ComparisonResult) -> Plot | None:
    """Draw each trained head's AUROC with its 95 % interval in every region.

    Returns None if no region has an AUROC.
    """
    rows = shown_rows(result)
    if not rows:
        return None
    means = [row["mean_over_regions"] for row in rows]
    lines = _collect(rows, "region", list(rows[0]["regions"]))
    n = means[0]["n_regions"]
    lines = _Lines(
        [*lines.labels, f"mean of\n{n} region{'' if n == 1 else 's'}"],
        [[*own, mean.get("auroc", UNKNOWN)] for own, mean in zip(lines.scores, means, strict=True)],
        n_means=1,
    )
    meaning = "the mean is over regions of both classes"
    return _plot_groups(result, rows, lines, "region", "AUROC by region", "Region", meaning)


def plot_views(result: ComparisonResult) -> Plot | None:
    """Draw each trained head's AUROC with its 95 % interval by the study's number of views.

    Returns None if no number of views has an AUROC.
    """
    rows = shown_rows(result)
    if not rows:
        return None
    names = [f"{name} view{'' if name == '1' else 's'}" for name in rows[0]["views"]]
    lines = _collect(rows, "views", names)
    title, meaning = "AUROC by number of views", "views: of the whole study"
    return _plot_groups(result, rows, lines, "views", title, "Views of the study", meaning)


def _collect(rows: Sequence[ComparedHead], by: str, names: Sequence[str]) -> _Lines:
    field, heads = GROUPINGS[by], cast("Sequence[Mapping[str, Any]]", rows)
    counts = [f"n = {own['n']:,} ({own['n_abnormal']:,})" for own in heads[0][field].values()]
    labels = [
        f"{elide(name, MAX_LABEL, LEGEND)}\n{count}"
        for name, count in zip(names, counts, strict=True)
    ]
    return _Lines(labels, [[block["auroc"] for block in row[field].values()] for row in heads])


def _plot_groups(
    result: ComparisonResult,
    rows: list[ComparedHead],
    lines: _Lines,
    by: str,
    title: str,
    axis: str,
    meaning: str,
) -> Plot | None:
    if not any(is_known(score) for own in lines.scores for score in own):
        return None
    names, positive = label_rows(result, rows), name_compared_classes(result).positive

    def draw(theme: Theme) -> Figure:
        return _draw_groups(theme, result, lines, names, title, axis)

    cells = [
        f"{' '.join(label.split())}: "
        + ", ".join(
            f"{name} {format_interval(own[i])}"
            for name, own in zip(names, lines.scores, strict=True)
        )
        for i, label in enumerate(lines.labels)
    ]
    return make_plot(
        GROUPINGS[by],
        title,
        draw,
        caption=f"{describe_test(result)} {_describe_intervals(lines)} n: test rows, "
        f"{positive} in brackets; {meaning}.{describe_shown(result)}",
        alt=f"{title}. {'; '.join(cells)}.",
        csv=render(result, table_format="csv", by=by) + "\n",
    )


def _describe_intervals(lines: _Lines) -> str:
    """Return a sentence that explains the bars, and why some are missing."""
    known = [score for own in lines.scores for score in own if is_known(score)]
    told = describe_intervals("Bars", known, of_score("auroc"))
    n_with = sum(map(has_interval, known))
    return told + (
        " Where too few patients stand behind a score, it has none." * (0 < n_with < len(known))
    )


def _draw_groups(
    theme: Theme,
    result: ComparisonResult,
    lines: _Lines,
    names: list[str],
    title: str,
    axis: str,
) -> Figure:
    n_lines, n_heads = len(lines.labels), len(names)
    positive = name_compared_classes(result).positive
    about = f"{describe_test(result)} In brackets: {positive}. {_describe_intervals(lines)}"
    about += describe_shown(result)
    body = n_lines * max(0.38, 0.2 + 0.16 * n_heads) + 0.6
    figure = start_figure(title, about, body=body, n_labels=n_heads)
    axes = figure.add_subplot()
    drawn = [
        add_points(axes, theme, i, _places(i, n_heads, n_lines), own, horizontal=True)
        for i, own in enumerate(lines.scores)
    ]
    low, high = _limits(lines)
    axes.axvline(0.5, color=theme.ink, **REFERENCE)
    if lines.n_means:
        axes.axhline(n_lines - lines.n_means - 0.5, color=theme.faint, lw=0.9)
    axes.set(xlim=(low, high), ylim=(n_lines - 0.5, -0.5))
    axes.set_yticks(range(n_lines), lines.labels, fontsize=LEGEND)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("AUROC (0.5: chance)")
    axes.set_ylabel(axis)
    add_legend(figure, drawn, names)
    for place, score in enumerate(lines.scores[0]):
        if not is_known(score):
            axes.text((low + high) / 2, place, NOT_ESTIMABLE, ha="center", va="center", alpha=0.75)
    return figure


def _places(i: int, n_heads: int, n_lines: int) -> list[float]:
    """Return the positions of a head's points, so that heads are drawn side by side."""
    offset = (i - (n_heads - 1) / 2) * min(0.2, 0.72 / n_heads)
    return [line + offset for line in range(n_lines)]


def _limits(lines: _Lines) -> tuple[float, float]:
    scores = [score for own in lines.scores for score in own]
    ends = [score.get(name) for score in scores for name in ("value", "low", "high")]
    found = [end for end in ends if end is not None]
    return min([0.48, *found]) - 0.02, 1.02
