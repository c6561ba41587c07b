"""AUROC of a linear probe by layer of the encoder, out-of-fold."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from medembed.report.figures.captions import (
    LEGEND,
    MAX_SERIES,
    describe_intervals,
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
    REFERENCE,
    Plot,
    Theme,
    add_legend,
    add_points,
    make_plot,
    scale_scores,
    start_figure,
)
from medembed.report.figures.trends import MAX_LABEL, Slots
from medembed.report.layers import describe_layers, name_series
from medembed.report.tables import format_interval
from medembed.results.comparison_schema import ComparisonResult, LayerPoint, LayerSeries, LayerTest

__all__ = ["plot_layers"]

TITLE = "AUROC by layer of the encoder"
OUTPUT = "output"


def plot_layers(result: ComparisonResult) -> Plot | None:
    """Draw the probe's out-of-fold AUROC after each block, and a line at that of the last.

    Returns None if no sweep tried several blocks, or no score is estimable.
    """
    drawn = [own for own in result.get("layers") or [] if any(map(_is_drawn, own["points"]))]
    series = drawn[:MAX_SERIES]
    if not series:
        return None
    names = [elide(name_series(result, own), MAX_LABEL, LEGEND) for own in series]
    scores = [point["auroc"] for own in series for point in own["points"]]
    bars = describe_intervals("Bars", scores, "patients as clusters")
    left_out = f" The first {len(series)} of {len(drawn)}." if len(drawn) > len(series) else ""
    synthetic = " Synthetic images." if result["synthetic"] else ""
    about = (
        f"n = {series[0]['n']:,} training studies, {series[0]['n_patients']:,} patients, predicted "
        f"out-of-fold; test is not looked at. {bars} Dotted: the last layer.{left_out}{synthetic}"
    )

    def draw(theme: Theme) -> Figure:
        return _draw(theme, about, series, names)

    found = " ".join(describe_layers(own) for own in series)
    numbers = [
        f"{name}, {_tick(point)}: {format_interval(point['auroc'])}"
        for name, own in zip(names, series, strict=True)
        for point in own["points"]
    ]
    return make_plot(
        "layers",
        TITLE,
        draw,
        caption=f"{about} {found}",
        alt=f"{TITLE}, out-of-fold. {'; '.join(numbers)}.",
        csv=_write_points(series),
    )


def _is_drawn(point: LayerPoint) -> bool:
    return is_known(point["auroc"])


def _tick(point: LayerPoint) -> str:
    return OUTPUT if point["block"] is None else f"{point['block']}"


def _place(own: LayerSeries, point: LayerPoint) -> int:
    """Return where a layer stands on the axis; the tower's own output after the last block."""
    if point["block"] is not None:
        return int(point["block"])
    blocks = [other["block"] for other in own["points"] if other["block"] is not None]
    return int(own["n_blocks"] or max(blocks)) + 1


def _draw(theme: Theme, about: str, series: list[LayerSeries], names: list[str]) -> Figure:
    figure = start_figure(TITLE, about, body=3.2, n_labels=len(series))
    axes = figure.subplots()
    ticks = {_place(own, point): _tick(point) for own in series for point in own["points"]}
    slots = Slots(sorted(ticks), len(series))
    for i, own in enumerate(series):
        known = [point for point in own["points"] if _is_drawn(point)]
        places = [slots.place(_place(own, point), i) for point in known]
        values: list[Any] = [point["auroc"]["value"] for point in known]
        axes.plot(places, values, color=theme.series[i], ls=LINES[i], lw=1.4)
        add_points(axes, theme, i, places, [point["auroc"] for point in known])
        if known[-1]["pooling"] == own["last"]:
            axes.axhline(values[-1], color=theme.series[i], **REFERENCE)
    scale_scores(axes, [point["auroc"] for own in series for point in own["points"]])
    axes.set_xlim(*slots.ends)
    labels = thin([AXIS * slots.share(x) for x in ticks], list(ticks.values()), LEGEND)
    axes.set_xticks(list(ticks), labels, fontsize=LEGEND)
    axes.set_xlabel("Block of the encoder")
    axes.set_ylabel("AUROC, out-of-fold")
    lines = [
        Line2D([], [], color=theme.series[i], ls=LINES[i], marker=MARKERS[i], ms=5, lw=1.4)
        for i in range(len(series))
    ]
    add_legend(figure, lines, names)
    return figure


def _write_points(series: list[LayerSeries]) -> str:
    return write_csv(
        [
            {
                "run": own["run"],
                "head": own["head"],
                "pooling": point["pooling"],
                "block": _tick(point),
                **flatten("auroc", point["auroc"]),
                **_flatten_test(point["versus_last"]),
            }
            for own in series
            for point in own["points"]
        ]
    )


def _flatten_test(test: LayerTest | None) -> dict[str, Any]:
    return {
        "difference_from_last": test and test["difference"],
        "difference_low": test and test["low"],
        "difference_high": test and test["high"],
        "p": test and test["p"],
        "p_holm": test and test["p_holm"],
    }
