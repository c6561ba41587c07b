"""Reliability of probabilities before and after each calibration."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from medembed.report.figures.captions import (
    LEGEND,
    SMALL,
    describe_intervals,
    describe_shown,
    describe_test,
    elide,
    flatten,
    has_interval,
    label_rows,
    name_rows,
    name_units,
    shown_rows,
    write_csv,
)
from medembed.report.figures.plotting import (
    MARKERS,
    REFERENCE,
    Plot,
    Theme,
    make_plot,
    start_figure,
)
from medembed.report.tables import format_interval
from medembed.results.comparison_schema import CalibrationCurve, CalibrationPanel, ComparisonResult
from medembed.results.methods import OF_SHARES, name_compared_classes

__all__ = ["plot_calibration"]

METHODS = {
    "none": "Not calibrated",
    "platt": "Platt scaling (used)",
    "temperature": "Temperature scaling",
    "isotonic": "Isotonic regression",
}
SCORES = {"brier": "Brier", "ece": "ECE"}
PANEL_WIDTH = 145
"""Points above a panel."""


def plot_calibration(result: ComparisonResult) -> Plot | None:
    """Draw the reliability of the best trained head before and after each calibration.

    Returns None if the test rows have one class, no head was trained, or the comparison holds no
    calibrations.
    """
    rows = shown_rows(result, 1)
    panels = rows[0].get("calibrations") if rows else None
    if not panels:
        return None
    name, positive = label_rows(result, rows)[0], name_compared_classes(result).positive

    def draw(theme: Theme) -> Figure:
        return _draw_panels(theme, result, name, panels)

    numbers = [f"{_title(method)}: {_scores(panel, ', ')}" for method, panel in panels.items()]
    return make_plot(
        "calibration",
        "Calibration",
        draw,
        caption=f"{describe_test(result)} {name}: points, the share {positive} within each bin of "
        f"probabilities{_describe_curve(panels)}; dotted, perfect calibration; strips, test "
        f"{name_units(result)} in each bin. {_describe_intervals(panels)}"
        f"{describe_shown(result, 1)}",
        alt=f"Reliability of {name} on test. {'; '.join(numbers)}.",
        csv=_write_bins(name_rows(result, rows)[0], panels),
    )


def _draw_panels(
    theme: Theme, result: ComparisonResult, name: str, panels: Mapping[str, CalibrationPanel]
) -> Figure:
    about = f"Head: {name}. {describe_test(result)} {_describe_intervals(panels)}"
    about += describe_shown(result, 1)
    n_lines, positive = (len(panels) + 1) // 2, name_compared_classes(result).positive
    figure = start_figure("Calibration", about, body=2.9 * n_lines)
    grid = figure.add_gridspec(2 * n_lines, 2, height_ratios=(4, 1) * n_lines)
    top = max((own["n"] for panel in panels.values() for own in panel["bins"]), default=1)
    for i, (method, panel) in enumerate(panels.items()):
        line, column = divmod(i, 2)
        axes = figure.add_subplot(grid[2 * line, column])
        strip = figure.add_subplot(grid[2 * line + 1, column], sharex=axes)
        _draw_reliability(axes, theme, method, panel)
        _draw_counts(strip, theme, panel, top)
        if column == 0:
            axes.set_ylabel(elide(f"Share {positive}", PANEL_WIDTH, LEGEND), fontsize=LEGEND)
            strip.set_ylabel(name_units(result).capitalize(), fontsize=SMALL)
        if i + 2 >= len(panels):
            told = elide(f"Probability of {positive}", PANEL_WIDTH, LEGEND)
            strip.set_xlabel(told, fontsize=LEGEND)
    return figure


def _band(panel: CalibrationPanel) -> list[float | None]:
    """Return the lower limits of the curve's band."""
    return list((panel.get("curve") or {}).get("low", []))


def _describe_curve(panels: Mapping[str, CalibrationPanel]) -> str:
    """Return a description of the line and its band, or nothing without a line."""
    bands = [_band(panel) for panel in panels.values()]
    if not any(bands):
        return ""
    has_band = any(end is not None for band in bands for end in band)
    with_band = " with its pointwise 95 % band" if has_band else ""
    return f"; line, the logistic recalibration{with_band}"


def _describe_intervals(panels: Mapping[str, CalibrationPanel]) -> str:
    """Return a description of the bars and brackets that are drawn."""
    bins = [
        {"low": own["share_low"], "high": own["share_high"]}
        for panel in panels.values()
        for own in panel["bins"]
    ]
    told = [describe_intervals("Bars", bins, OF_SHARES)] if any(map(has_interval, bins)) else []
    if any(own is not None for panel in panels.values() for own in _band(panel)):
        told.append("Band: 95 %, Student's t on the log-odds, patients as clusters.")
    if any(has_interval(panel["brier"]) for panel in panels.values()):
        told.append("In brackets: 95 % intervals of the Brier score, Student's t on the log-odds.")
    if any(has_interval(panel["ece"]) for panel in panels.values()):
        told.append("ECE has only an upper bound.")
    return " ".join(told) if told else describe_intervals("", bins, "")


def _draw_reliability(axes: Any, theme: Theme, method: str, panel: CalibrationPanel) -> None:
    colour = theme.series[0]
    filled = [own for own in panel["bins"] if own["n"] and own["mean_probability"] is not None]
    axes.plot([0, 1], [0, 1], color=theme.ink, **REFERENCE)
    _draw_curve(axes, theme, panel.get("curve") or {})
    for own in filled:
        if own["share_low"] is not None:
            ends = [own["share_low"], own["share_high"]]
            axes.plot([own["mean_probability"]] * 2, ends, color=colour, lw=1.4)
    points = [(own["mean_probability"], own["share_abnormal"]) for own in filled]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, marker=MARKERS[0], ms=4, ls="none")
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    axes.tick_params(labelsize=SMALL, labelbottom=False)
    axes.set_title(_title(method), loc="left", fontsize=LEGEND, fontweight="bold", pad=27)
    axes.annotate(
        _scores(panel, "\n"),
        (0, 1),
        (0, 4),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=SMALL,
        linespacing=1.1,
    )


def _draw_curve(axes: Any, theme: Theme, curve: CalibrationCurve) -> None:
    """Draw the logistic line and its band, if available."""
    if not curve.get("probability"):
        return
    places, colour = curve["probability"], theme.series[0]
    axes.plot(places, curve["share"], color=colour, lw=1.2)
    if curve["low"][0] is not None:
        axes.fill_between(places, curve["low"], curve["high"], color=colour, alpha=0.18, lw=0)


def _draw_counts(strip: Any, theme: Theme, panel: CalibrationPanel, top: int) -> None:
    """Draw how many rows each bin holds, on one scale for all panels."""
    bins = panel["bins"]
    strip.bar(
        [own["low"] for own in bins],
        [own["n"] for own in bins],
        width=[own["high"] - own["low"] for own in bins],
        align="edge",
        color=theme.ink,
        alpha=0.35,
        edgecolor=theme.background,
        lw=0.5,
    )
    strip.set(ylim=(0, 1.15 * max(top, 1)), yticks=(0, max(top, 1)))
    strip.set_yticklabels(("0", f"{top:,}"))
    strip.tick_params(labelsize=SMALL)
    strip.grid(visible=False)


def _title(method: str) -> str:
    return METHODS.get(method) or elide(method, PANEL_WIDTH, LEGEND)


def _scores(panel: Mapping[str, Any], separator: str) -> str:
    return separator.join(
        f"{title} {format_interval(panel[score])}" for score, title in SCORES.items()
    )


def _write_bins(head: str, panels: Mapping[str, CalibrationPanel]) -> str:
    """Return a CSV of the bins, then the curves, whose points have no count."""
    empty = {**flatten("brier", None), **flatten("ece", None), "bin_low": None, "bin_high": None}
    curves = [
        {
            "head": head,
            "calibration": method,
            "kind": "curve",
            **empty,
            "n": "",
            "mean_probability": place,
            "share_abnormal": panel["curve"]["share"][k],
            "share_abnormal_low": panel["curve"]["low"][k],
            "share_abnormal_high": panel["curve"]["high"][k],
        }
        for method, panel in panels.items()
        for k, place in enumerate((panel.get("curve") or {}).get("probability", []))
    ]
    return write_csv(
        [
            {
                "head": head,
                "calibration": method,
                "kind": "bin",
                **flatten("brier", panel["brier"]),
                **flatten("ece", panel["ece"]),
                **{f"bin_{end}": own[end] for end in ("low", "high")},
                "n": own["n"],
                "mean_probability": own["mean_probability"],
                "share_abnormal": own["share_abnormal"],
                "share_abnormal_low": own["share_low"],
                "share_abnormal_high": own["share_high"],
            }
            for method, panel in panels.items()
            for own in panel["bins"]
        ]
        + curves
    )
