"""Coverage and error of a head against the share of studies deferred to a reader."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from medembed.report.figures.captions import (
    MAX_SERIES,
    describe_intervals,
    describe_shown,
    describe_test,
    flatten,
    is_known,
    label_rows,
    name_rows,
    shown_rows,
    write_csv,
)
from medembed.report.figures.plotting import (
    LINES,
    MARKERS,
    REFERENCE,
    Plot,
    Theme,
    add_legend,
    make_plot,
    scale_scores,
    start_figure,
)
from medembed.report.tables import format_interval
from medembed.results.comparison_schema import ComparisonResult
from medembed.results.methods import OF_SHARES

__all__ = ["plot_deferral"]

TITLE = "Coverage and error against the share deferred"
PANELS = (("coverage", "Coverage"), ("error", "Error among decided"))
SHARES = ("coverage", "coverage_normal", "coverage_abnormal", "deferred", "empty", "error")

_Deferral = Mapping[str, Any]
"""A `Deferral`, whose shares are looked up by name."""


def plot_deferral(result: ComparisonResult) -> Plot | None:
    """Draw the coverage of sets and the error of decisions over the share deferred.

    Each line covers the promised coverages, as far as a lower promise defers less. Returns None if
    no trained head has prediction sets.
    """
    able = [row for row in shown_rows(result, len(result["rows"])) if row.get("deferral")]
    rows = able[:MAX_SERIES]
    if not rows:
        return None
    names = label_rows(result, rows)
    deferrals: list[_Deferral] = [row["deferral"] or {} for row in rows]
    told = [own[share] for head in deferrals for own in head["levels"] for share in _scores()]
    draws = describe_intervals("Bars", told, OF_SHARES) + describe_shown(result, n_all=len(able))

    def draw(theme: Theme) -> Figure:
        return _draw_panels(theme, result, deferrals, names, draws)

    promised = ", ".join(f"{100 * own['nominal']:g}" for own in deferrals[0]["levels"])
    numbers = [
        f"{name}, promised {100 * own['nominal']:g} %: "
        + ", ".join(f"{share} {format_interval(own[share])}" for share in ("deferred", *_scores()))
        for name, head in zip(names, deferrals, strict=True)
        for own in head["levels"]
    ]
    return make_plot(
        "deferral",
        TITLE,
        draw,
        caption=f"{describe_test(result)} Deferred: sets of both classes or of neither; where a "
        f"line turns back, those of neither grow. Points: {promised} % promised (dotted). "
        f"{draws}",
        alt=f"{TITLE} on test. {'; '.join(numbers)}.",
        csv=_write_levels(name_rows(result, rows), deferrals),
    )


def _draw_panels(
    theme: Theme,
    result: ComparisonResult,
    deferrals: list[_Deferral],
    names: list[str],
    draws: str,
) -> Figure:
    about = f"{describe_test(result)} Points: promised coverage. {draws}"
    figure = start_figure(TITLE, about, body=4.6, n_labels=len(names))
    panels = figure.subplots(2, 1, sharex=True)
    for axes, (share, title) in zip(panels, PANELS, strict=True):
        lines = [_draw_head(axes, theme, i, head, share) for i, head in enumerate(deferrals)]
        told = [own[share] for head in deferrals for own in head["levels"]]
        drawn = [{"value": y} for head in deferrals for y in _curve(head, share)[1]]
        scale_scores(axes, [*told, *drawn])
        axes.set_ylabel(title)
    for own in deferrals[0]["levels"]:
        panels[0].axhline(own["nominal"], color=theme.ink, **REFERENCE)
    panels[1].set_xlim(-0.03, 1.03)
    panels[1].set_xlabel("Share deferred")
    add_legend(figure, lines, names)
    return figure


def _draw_head(axes: Any, theme: Theme, i: int, deferral: _Deferral, share: str) -> Any:
    """Draw a head's line, and points with bars at the promised coverages."""
    colour = theme.series[i]
    line = axes.plot(*_curve(deferral, share), color=colour, ls=LINES[i], lw=1.4)[0]
    for own in deferral["levels"]:
        if is_known(own[share]) and is_known(own["deferred"]):
            x = own["deferred"]["value"]
            if own[share]["low"] is not None:
                ends = [own[share]["low"], own[share]["high"]]
                axes.plot([x, x], ends, color=colour, lw=1.5)
            axes.plot([x], [own[share]["value"]], color=colour, marker=MARKERS[i], ms=5, ls="none")
    line.set(marker=MARKERS[i], markevery=[], ms=5)
    return line


def _curve(deferral: _Deferral, share: str) -> tuple[list[float], list[float]]:
    """Return the line, down to the least share deferred or the lowest promise with an interval."""
    curve = deferral["curve"]
    least = min(curve["deferred"])
    last = max(
        curve["alpha"][curve["deferred"].index(least)],
        *(own["alpha"] for own in deferral["levels"]),
    )
    points = zip(curve["alpha"], curve["deferred"], curve[share], strict=True)
    kept = [(x, y) for alpha, x, y in points if alpha <= last and y is not None]
    return [x for x, _ in kept], [y for _, y in kept]


def _scores() -> tuple[str, ...]:
    return tuple(share for share, _ in PANELS)


def _write_levels(names: list[str], deferrals: list[_Deferral]) -> str:
    """Return a CSV of the promised levels with intervals, then the curves without."""
    told = [
        {
            "head": name,
            "kind": "level",
            "promised": own["nominal"],
            **{key: cell for share in SHARES for key, cell in flatten(share, own[share]).items()},
        }
        for name, head in zip(names, deferrals, strict=True)
        for own in head["levels"]
    ]
    drawn = [
        {
            "head": name,
            "kind": "curve",
            "promised": round(1 - curve["alpha"][k], 6),
            **{share: curve[share][k] for share in SHARES},
        }
        for name, curve in zip(names, (head["curve"] for head in deferrals), strict=True)
        for k in range(len(curve["alpha"]))
    ]
    return write_csv([*told, *drawn])
