"""Scores by the number of unfrozen encoder blocks, and by the number of training patients."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from medembed.report.figures.captions import (
    LEGEND,
    MAX_SERIES,
    describe_intervals,
    describe_shown,
    describe_test,
    elide,
    flatten,
    is_known,
    thin,
    write_csv,
)
from medembed.report.figures.plotting import (
    AXIS,
    LINES,
    MARKERS,
    Plot,
    Theme,
    add_legend,
    add_points,
    make_plot,
    scale_scores,
    start_figure,
)
from medembed.report.tables import format_interval
from medembed.results.comparison_schema import ComparisonResult

__all__ = ["Slots", "plot_depths", "plot_efficiency"]

WIDEST, ALL = 0.035, 0.14
"""Shares of the axis: between two heads at one value, and for all heads there."""
FULLEST = 0.5
"""Share of the distance to the next value that all heads together may take."""
MARGIN = 0.09
"""Share of the axis left free at either end."""


@dataclass(frozen=True)
class Slots:
    """Positions of the points of `n_heads` heads around each of `values`.

    Attributes
    ----------
    values : sequence of float
        Increasing, at least one; above 0 if the axis is logarithmic.
    n_heads : int
    is_log : bool
        Whether the axis is logarithmic.
    """

    values: Sequence[float]
    n_heads: int
    is_log: bool = False

    @property
    def ends(self) -> tuple[float, float]:
        """The ends of the axis."""
        low, high = self._margins()
        return self._backward(low), self._backward(high)

    def share(self, value: float) -> float:
        """Return the position of a value, 0 and 1 being the ends of the axis."""
        low, high = self._margins()
        return (self._forward(value) - low) / (high - low)

    def place(self, value: float, head: int, k: int = 0, n: int = 1) -> float:
        """Return the position of the k-th of a head's n points at a value."""
        from_middle = head - (self.n_heads - 1) / 2 + 0.7 * (k - (n - 1) / 2) / n
        return self._backward(self._forward(value) + self._width(value) * from_middle)

    def _width(self, value: float) -> float:
        """Return the distance between two heads at a value, in units of the axis."""
        low, high = self._margins()
        gaps = [abs(self._forward(value) - self._forward(other)) for other in self.values]
        nearest = min((gap for gap in gaps if gap), default=high - low)
        free = min(ALL * (high - low), FULLEST * nearest)
        return min(WIDEST * (high - low), free / self.n_heads)

    def _margins(self) -> tuple[float, float]:
        low, high = self._forward(self.values[0]), self._forward(self.values[-1])
        margin = MARGIN * (high - low) or 1.0
        return low - margin, high + margin

    def _forward(self, value: float) -> float:
        return math.log10(value) if self.is_log else float(value)

    def _backward(self, place: float) -> float:
        return 10.0**place if self.is_log else place


AUROC, MACRO_F1 = ("auroc", "AUROC"), ("macro_f1", "Macro-F1")
MAX_LABEL = 300
"""Points available for a name in the legend, which here holds only names."""

Series = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class _Trend:
    """The properties in which the trend figures differ.

    Attributes
    ----------
    by, axis : str
        The key of a point's value on the axis, and the axis' name.
    panels : tuple of (str, str)
        Scores and their names, from the top.
    height : float
        Height of a panel in inches.
    is_log : bool
        Whether the axis is logarithmic.
    """

    name: str
    title: str
    by: str
    axis: str
    panels: tuple[tuple[str, str], ...]
    height: float
    is_log: bool


DEPTHS = _Trend(
    "depths",
    "Scores by unfreezing depth",
    "depth",
    "Encoder blocks trained with the head (0: none)",
    (AUROC, MACRO_F1),
    2.0,
    is_log=False,
)
EFFICIENCY = _Trend(
    "efficiency",
    "AUROC by number of training patients",
    "train_fraction",
    "Share and number of the training patients (log scale)",
    (AUROC,),
    3.0,
    is_log=True,
)


def plot_depths(result: ComparisonResult) -> Plot | None:
    """Draw AUROC and macro-F1 over the number of encoder blocks that were trained with the head.

    Adapters ("lora8") form a separate series, which the caption explains.
    Returns None if no head was trained at several depths, or no score is estimable.
    """
    return _plot_trend(result, result.get("depths") or [], DEPTHS, lambda depth, _: f"{depth}")


def plot_efficiency(result: ComparisonResult) -> Plot | None:
    """Draw each head's AUROC over the share of the training patients that it was given.

    Returns None if no head was given several shares, or no score is estimable.
    """
    return _plot_trend(result, result.get("efficiency") or [], EFFICIENCY, _label_share)


def _label_share(share: float, points: Series) -> str:
    """Return a share in percent, with the number of patients if that is equal for all points."""
    counts = {point.get("n_train_patients") for point in points}
    n = counts.pop() if len(counts) == 1 else None
    return f"{100 * share:.3g} %" + ("" if n is None else f"\n({n:,})")


def _plot_trend(
    result: ComparisonResult,
    series: Series,
    trend: _Trend,
    label: Callable[[Any, Series], str],
) -> Plot | None:
    rest = describe_shown(result, n_all=len(series))
    series = series[:MAX_SERIES]
    points = [point for own in series for point in own["points"]]
    scores = [point[score] for point in points for score, _ in trend.panels]
    bars = describe_intervals("Bars", scores, "patients as clusters")
    if not any(is_known(point[score]) for score, _ in trend.panels for point in points):
        return None
    names = [elide(own["head"], MAX_LABEL, LEGEND) for own in series]
    places = sorted({point[trend.by] for point in points})
    ticks = {x: label(x, [point for point in points if point[trend.by] == x]) for x in places}

    def draw(theme: Theme) -> Figure:
        about = f"{describe_test(result)} {bars}{rest}"
        return _draw_trend(theme, about, series, trend, names, ticks)

    numbers = [
        f"{name}, {' '.join(ticks[point[trend.by]].split())}: "
        + ", ".join(f"{title} {format_interval(point[score])}" for score, title in trend.panels)
        for name, own in zip(names, series, strict=True)
        for point in own["points"]
    ]
    return make_plot(
        trend.name,
        trend.title,
        draw,
        caption=f"{describe_test(result)} {bars}{_describe_lines(series, trend)}"
        f"{_describe_adapters(series)}{rest}",
        alt=f"{trend.title} on test. {'; '.join(numbers)}.",
        csv=_write_points(series),
    )


def _draw_trend(
    theme: Theme,
    about: str,
    series: Series,
    trend: _Trend,
    names: list[str],
    ticks: dict[float, str],
) -> Figure:
    body = trend.height * len(trend.panels) + 0.4
    figure = start_figure(trend.title, about, body=body, n_labels=len(series))
    panels = figure.subplots(len(trend.panels), 1, sharex=True, squeeze=False)[:, 0]
    slots = Slots(tuple(ticks), len(series), is_log=trend.is_log)
    for axes, (score, title) in zip(panels, trend.panels, strict=True):
        for i, own in enumerate(series):
            known = [point for point in own["points"] if is_known(point[score])]
            _draw_series(axes, theme, i, known, score, trend.by, slots)
        scores = [point[score] for own in series for point in own["points"]]
        scale_scores(axes, scores)
        axes.set_ylabel(title)
    _set_ticks(panels[-1], ticks, slots)
    panels[-1].set_xlabel(trend.axis)
    lines = [
        Line2D([], [], color=theme.series[i], ls=LINES[i], marker=MARKERS[i], ms=5, lw=1.4)
        for i in range(len(series))
    ]
    add_legend(figure, lines, names)
    return figure


def _draw_series(
    axes: Any, theme: Theme, i: int, points: Series, score: str, by: str, slots: Slots
) -> None:
    """Draw one head's points, and a line through their means at each value."""
    values: dict[float, list[float]] = {}
    places = []
    for point, k, n in _number(points, by):
        values.setdefault(point[by], []).append(point[score]["value"])
        places.append(slots.place(point[by], i, k, n))
    middles = [slots.place(x, i) for x in values]
    means = [fmean(own) for own in values.values()]
    axes.plot(middles, means, color=theme.series[i], ls=LINES[i], lw=1.4)
    add_points(axes, theme, i, places, [point[score] for point in points])


def _number(points: Series, by: str) -> Iterator[tuple[Mapping[str, Any], int, int]]:
    """Yield each point with its index among the points at its value, and their number."""
    n, seen = Counter(point[by] for point in points), Counter[float]()
    for point in points:
        yield point, seen[point[by]], n[point[by]]
        seen[point[by]] += 1


def _set_ticks(axes: Any, ticks: dict[float, str], slots: Slots) -> None:
    if slots.is_log:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xlim(*slots.ends)
    labels = thin([AXIS * slots.share(x) for x in ticks], list(ticks.values()), LEGEND)
    axes.set_xticks(list(ticks), labels, fontsize=LEGEND)


def _describe_lines(series: Series, trend: _Trend) -> str:
    counts = [Counter(point[trend.by] for point in own["points"]) for own in series]
    if max(n for own in counts for n in own.values()) == 1:
        return ""
    return " Lines join the means of runs that stand at one place."


def _describe_adapters(series: Series) -> str:
    found = [re.match(r"lora(\d+)(?=$|-s\d| of )", own["head"]) for own in series]
    ranks = sorted({int(match[1]) for match in found if match})
    if not ranks:
        return ""
    names = ", ".join(f"lora{rank}" for rank in ranks)
    return f" {names}: adapters of that rank train in those blocks, not the blocks themselves."


def _write_points(series: Series) -> str:
    return write_csv(
        [
            {
                "head": own["head"],
                **{name: value for name, value in point.items() if not isinstance(value, dict)},
                **flatten("auroc", point["auroc"]),
                **flatten("macro_f1", point["macro_f1"]),
            }
            for own in series
            for point in own["points"]
        ]
    )
