"""Decision curves: net benefit over thresholds, compared with treating all and none."""

from typing import Any

from matplotlib.figure import Figure

from medembed.report.figures.captions import (
    MAX_SERIES,
    describe_intervals,
    describe_shown,
    describe_test,
    label_rows,
    name_rows,
    shown_rows,
    write_csv,
)
from medembed.report.figures.plotting import (
    LINES,
    REFERENCE,
    Plot,
    Theme,
    add_legend,
    make_plot,
    start_figure,
)
from medembed.results.comparison_schema import ComparedHead, ComparisonResult, Curve
from medembed.results.methods import name_compared_classes

__all__ = ["plot_decision_curve"]

TITLE = "Decision curves"
METHOD = "Student's t on what each patient adds"
TOLD = (0.1, 0.2, 0.5)
"""Thresholds whose net benefit is listed in the alternative text."""
HEADROOM = 0.15
"""Share of the height above the highest line, and also below zero."""


def plot_decision_curve(result: ComparisonResult) -> Plot | None:
    """Draw the net benefit of the best trained heads, with a 95 % band around the best.

    Returns None if the test rows have one class, no head was trained, or the comparison holds no
    net benefit.
    """
    able = [row for row in shown_rows(result, len(result["rows"])) if row.get("net_benefit")]
    rows = able[:MAX_SERIES]
    if not rows:
        return None
    names, positive = label_rows(result, rows), name_compared_classes(result).positive

    def draw(theme: Theme) -> Figure:
        return _draw_curves(theme, result, rows, names)

    numbers = [
        f"{name}, at {threshold:g}: {_describe_benefit(row['net_benefit'], threshold)}"
        for name, row in zip(names, rows, strict=True)
        for threshold in TOLD
    ]
    return make_plot(
        "decision_curve",
        TITLE,
        draw,
        caption=f"{describe_test(result)} Net benefit of calibrated probabilities: the share of "
        "studies found, less the false alarms at the price that the threshold gives them. A head "
        f"is of use where its line is above both references: all called {positive} (treat all), "
        f"none called {positive} (treat none). "
        f"{_describe_band(rows[0], f'Band of {names[0]}, pointwise')}"
        f"{describe_shown(result, n_all=len(able))}",
        alt=f"{TITLE} on test: net benefit. {'; '.join(numbers)}.",
        csv=_write_curves(name_rows(result, rows), rows),
    )


def _describe_band(row: ComparedHead, what: str) -> str:
    """Return a sentence that explains the band, or its absence."""
    ends = zip(row["net_benefit"]["low"], row["net_benefit"]["high"], strict=True)
    return describe_intervals(what, [{"low": low, "high": high} for low, high in ends], METHOD)


def _draw_curves(
    theme: Theme, result: ComparisonResult, rows: list[ComparedHead], names: list[str]
) -> Figure:
    about = f"{describe_test(result)} {_describe_band(rows[0], 'Band')}{describe_shown(result)}"
    figure = start_figure(TITLE, about, body=3.6, n_labels=len(names) + 2)
    axes = figure.add_subplot()
    curves = [row["net_benefit"] for row in rows]
    best: Any = curves[0]  # its lists are looked up by name
    colour = theme.series[0]
    known = [k for k, low in enumerate(best["low"]) if low is not None]
    places, low, high = ([best[name][k] for k in known] for name in ("thresholds", "low", "high"))
    axes.fill_between(
        places,
        low,
        high,
        color=colour,
        alpha=0.18,
        lw=0,
    )
    drawn = [value for own in curves for value in own["value"]]
    top = max(0.02, *drawn, *(best["high"][k] for k in known)) * (1 + HEADROOM)
    bottom = -HEADROOM * top
    lines = [
        axes.plot(
            own["thresholds"],
            [max(value, bottom) for value in own["value"]],
            color=theme.series[i],
            ls=LINES[i],
            lw=1.6,
        )[0]
        for i, own in enumerate(curves)
    ]
    falling = _until(best["thresholds"], best["treat_all"], bottom)
    everyone = axes.plot(*falling, color=theme.ink, **REFERENCE)[0]
    nobody = axes.plot([0, 1], [0, 0], color=theme.ink, alpha=0.5, lw=0.9)[0]
    axes.set(xlim=(0, 1), ylim=(bottom, top))
    axes.set_xlabel("Threshold of the calibrated probability")
    axes.set_ylabel("Net benefit")
    references = ["treat all", "treat none"]
    add_legend(figure, [*lines, everyone, nobody], [*names, *references])
    return figure


def _until(places: list[float], values: list[float], end: float) -> tuple[list[float], list[float]]:
    """Return a falling line down to `end`, including the point where it reaches `end`."""
    n = sum(value > end for value in values)
    if n in (0, len(values)):
        return places[:n], values[:n]
    share = (values[n - 1] - end) / (values[n - 1] - values[n])
    last = places[n - 1] + share * (places[n] - places[n - 1])
    return [*places[:n], last], [*values[:n], end]


def _describe_benefit(curve: Curve, threshold: float) -> str:
    k = min(range(len(curve["thresholds"])), key=lambda i: abs(curve["thresholds"][i] - threshold))
    value, low, high = (curve[name][k] for name in ("value", "low", "high"))
    if value is None:
        return "not estimable"
    return f"{value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")


def _write_curves(names: list[str], rows: list[ComparedHead]) -> str:
    return write_csv(
        [
            {
                "head": name,
                "threshold": threshold,
                "net_benefit": curve["value"][k],
                "net_benefit_low": curve["low"][k],
                "net_benefit_high": curve["high"][k],
                "treat_all": curve["treat_all"][k],
                "treat_none": 0.0,
            }
            for name, curve in zip(names, (row["net_benefit"] for row in rows), strict=True)
            for k, threshold in enumerate(curve["thresholds"])
        ]
    )
