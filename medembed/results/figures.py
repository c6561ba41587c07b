"""The figures of a comparison, as SVG for light and dark pages, PNG, and the CSV behind them.

Equal input gives equal bytes: matplotlib's own fonts, a fixed salt for SVG ids, no dates.
"""

import io
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from medembed.results.alignment import TestSet
from medembed.results.comparison import counted, row_name
from medembed.results.curves import roc_band, roc_curve
from medembed.results.tables import NOT_ESTIMABLE, format_interval, render

__all__ = ["Plot", "Theme", "plot_regions", "plot_roc"]

MAX_SERIES = 6
"""Heads drawn in one figure: as many as the palette can keep apart."""
MAX_NAME = 36


@dataclass(frozen=True)
class Theme:
    """Colours of a figure: ink for text, a faint one for grids, one per head."""

    ink: str
    faint: str
    background: str
    series: tuple[str, ...]


# Okabe and Ito's palette (Color Universal Design, 2008), the dark one lightened; heads differ by
# line style and marker as well.
LIGHT = Theme(
    "#1b1f24", "#d5dae0", "#ffffff",
    ("#0072B2", "#D55E00", "#009E73", "#B0588D", "#A87400", "#2B8CC4"),
)  # fmt: skip
DARK = Theme(
    "#e6e9ee", "#3b424b", "#14181d",
    ("#56B4E9", "#E69F00", "#2FC49B", "#E79AC8", "#F0E442", "#9DB8FF"),
)  # fmt: skip
MARKERS = "os^DvP"
LINES = ("-", "--", "-.", ":", (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1)))


@dataclass(frozen=True)
class Plot:
    """One figure in all its forms.

    Attributes
    ----------
    name : str
        Stem of its files.
    title, caption, alt : str
        What it shows; what is n and what the intervals are; the same for who cannot see it.
    light_svg, dark_svg, png : bytes
        SVG on a transparent ground for the two colour schemes; PNG on white, 200 dpi.
    csv : str
        The numbers behind it.
    """

    name: str
    title: str
    caption: str
    alt: str
    light_svg: bytes
    dark_svg: bytes
    png: bytes
    csv: str


def plot_roc(result: dict[str, Any], test_set: TestSet) -> Plot | None:
    """Draw the ROC curves of the trained heads, with a 95 % band around the best.

    Returns None where the test rows are of one class or no head was trained.
    """
    rows = _shown_rows(result)
    contenders = {(c.run, c.head): c for c in test_set.contenders}
    chosen = [contenders[row["run"], row["head"]] for row in rows]
    curves = [roc_curve(test_set.y, contender.probability) for contender in chosen]
    if not curves or curves[0].empty:
        return None
    band = roc_band(
        test_set.y,
        chosen[0].probability,
        test_set.patients,
        n_resamples=result["n_resamples"],
        seed=result["seed"],
    )
    labels = [f"{_name(result, row)}  {format_interval(row['scores']['auroc'])}" for row in rows]
    best = _name(result, rows[0])
    caption = (
        f"{_describe_test(result)} Band: pointwise 95 % of {best}; AUROC in the legend with 95 % "
        f"interval. {_describe_bootstrap(result)}"
    )

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(5.2, 5.2 + 0.21 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        axes.fill_between(
            band["fpr"], band["low"], band["high"], color=theme.series[0], alpha=0.18, lw=0
        )
        axes.plot([0, 1], [0, 1], color=theme.ink, alpha=0.5, lw=0.9, ls=(0, (2, 3)))
        lines = [
            axes.plot(curve["fpr"], curve["tpr"], color=theme.series[i], ls=LINES[i], lw=1.7)[0]
            for i, curve in enumerate(curves)
        ]
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
        axes.set_xlabel("False-positive rate (1 − specificity)")
        axes.set_ylabel("True-positive rate (sensitivity)")
        _add_title(axes, "ROC curves", result)
        _add_legend(figure, lines, labels, "AUROC [95 % interval]")
        return figure

    parts = [
        curve.assign(head=_name(result, row), low=np.nan, high=np.nan, kind="curve")
        for curve, row in zip(curves, rows, strict=True)
    ]
    parts.append(band.assign(head=best, threshold=np.nan, kind="band"))
    columns = ["head", "kind", "fpr", "tpr", "threshold", "low", "high"]
    table = pd.concat([part[columns] for part in parts])
    csv = table.to_csv(index=False, lineterminator="\n")
    alt = f"ROC curves on test. AUROC with 95 % interval: {'; '.join(labels)}."
    return Plot("roc", "ROC curves", caption, alt, **_render(draw), csv=csv)


def plot_regions(result: dict[str, Any]) -> Plot | None:
    """Draw each trained head's AUROC with its 95 % interval in every region."""
    rows = _shown_rows(result)
    if not rows:
        return None
    regions = list(rows[0]["regions"])
    labels = [_name(result, row) for row in rows]
    caption = (
        f"{_describe_test(result)} Bars: 95 % intervals, left out where too few patients stand "
        f"behind them; n: test rows, abnormal in brackets; the mean is over regions of both "
        f"classes. {_describe_bootstrap(result)}"
    )

    def draw(theme: Theme) -> Figure:
        height = (len(regions) + 1) * (0.2 + 0.16 * len(rows)) + 1.35 + 0.21 * len(rows)
        figure = Figure(figsize=(5.2, height), layout="constrained")
        axes = figure.add_subplot()
        lines = [_draw_head(axes, theme, i, row, len(rows)) for i, row in enumerate(rows)]
        axes.axvline(0.5, color=theme.ink, alpha=0.5, lw=0.9, ls=(0, (2, 3)))
        axes.axhline(len(regions) - 0.5, color=theme.faint, lw=0.9)
        axes.set_xlim(*_limits(rows))
        axes.set_ylim(len(regions) + 0.5, -0.5)
        axes.set_yticks(range(len(regions) + 1), _region_labels(rows[0]))
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("AUROC (0.5: chance)")
        axes.set_ylabel("Region")
        _add_title(axes, "AUROC by region", result)
        _add_legend(figure, lines, labels, None)
        for y, region in enumerate(regions):
            if rows[0]["regions"][region]["auroc"]["value"] is None:
                x = sum(_limits(rows)) / 2
                axes.text(x, y, NOT_ESTIMABLE + ": one class", ha="center", va="center", alpha=0.75)
        return figure

    cells = [
        f"{_clean(region)}: "
        + ", ".join(
            f"{label} {format_interval(row['regions'][region]['auroc'])}"
            for row, label in zip(rows, labels, strict=True)
        )
        for region in regions
    ]
    alt = f"AUROC with 95 % interval by region. {'; '.join(cells)}."
    csv = render(result, table_format="csv", by="region") + "\n"
    return Plot("regions", "AUROC by region", caption, alt, **_render(draw), csv=csv)


def _draw_head(axes: Any, theme: Theme, i: int, row: dict[str, Any], n_heads: int) -> Any:
    """Draw one head's points and intervals, offset so that heads stand side by side."""
    blocks = [*row["regions"].values(), row["mean_over_regions"]]
    scores = [block.get("auroc", {"value": None}) for block in blocks]
    offset = (i - (n_heads - 1) / 2) * min(0.2, 0.72 / n_heads)
    known = [(y + offset, score) for y, score in enumerate(scores) if score["value"] is not None]
    for y, score in known:
        if score["low"] is not None:
            axes.plot([score["low"], score["high"]], [y, y], color=theme.series[i], lw=1.5)
    points = axes.plot(
        [score["value"] for _, score in known],
        [y for y, _ in known],
        color=theme.series[i],
        marker=MARKERS[i],
        ms=5,
        ls="none",
    )
    return points[0]


def _limits(rows: list[dict[str, Any]]) -> tuple[float, float]:
    found = [
        bound
        for row in rows
        for block in [*row["regions"].values(), row["mean_over_regions"]]
        for bound in block.get("auroc", {}).values()
        if bound is not None
    ]
    return min([0.48, *found]) - 0.02, 1.02


def _region_labels(row: dict[str, Any]) -> list[str]:
    labels = [
        f"{_clean(name)}\nn = {block['n']:,} ({block['n_abnormal']:,})"
        for name, block in row["regions"].items()
    ]
    n = row["mean_over_regions"]["n_regions"]
    return [*labels, f"mean of\n{n} regions" if n != 1 else "mean of\n1 region"]


def _shown_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if not row["baseline"]][:MAX_SERIES]


def _name(result: dict[str, Any], row: dict[str, Any]) -> str:
    return _clean(row_name(row, several=len(result["runs"]) > 1))


def _clean(text: str) -> str:
    """Keep what a font can draw, and not more than a label has room for."""
    text = "".join("�" if unicodedata.category(c).startswith("C") else c for c in text)
    return text if len(text) <= MAX_NAME else f"{text[: MAX_NAME - 1]}…"


def _describe_test(result: dict[str, Any]) -> str:
    test = result["test"]
    return (
        f"n = {counted(test['n'], 'test ' + result['level'])} ({test['n_abnormal']:,} abnormal), "
        f"{counted(test['n_patients'], 'patient')}."
    )


def _describe_bootstrap(result: dict[str, Any]) -> str:
    n_trained = sum(not row["baseline"] for row in result["rows"])
    shown = f" The best {MAX_SERIES} of {n_trained} heads." if n_trained > MAX_SERIES else ""
    synthetic = " Synthetic images." if result["synthetic"] else ""
    return f"{result['n_resamples']:,} bootstrap resamples of patients.{shown}{synthetic}"


def _add_title(axes: Any, title: str, result: dict[str, Any]) -> None:
    about = f"{_describe_test(result)}\nIntervals: 95 %, {_describe_bootstrap(result)}"
    axes.set_title(f"{title}\n", loc="left", fontsize=12, fontweight="bold", pad=16)
    axes.annotate(
        about, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=8
    )


def _add_legend(figure: Figure, lines: list[Any], labels: list[str], title: str | None) -> None:
    places = [str(i) for i in range(len(labels))]  # matplotlib hides labels that begin with _
    legend = figure.legend(
        lines, places, loc="outside lower center", frameon=False, title=title, fontsize=9
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)


def _render(draw: Callable[[Theme], Figure]) -> dict[str, bytes]:
    return {
        "light_svg": _save(draw, LIGHT, "svg"),
        "dark_svg": _save(draw, DARK, "svg"),
        "png": _save(draw, LIGHT, "png"),
    }


def _save(draw: Callable[[Theme], Figure], theme: Theme, file_format: str) -> bytes:
    """Draw and save; the user's matplotlib settings are set aside and stay as they are."""
    metadata = {"Date": None, "Creator": None} if file_format == "svg" else {"Software": None}
    output = io.BytesIO()
    with matplotlib.style.context(_style(theme), after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = draw(theme)
        FigureCanvasAgg(figure)
        figure.savefig(
            output,
            format=file_format,
            dpi=200,
            metadata=metadata,
            transparent=file_format == "svg",
        )
    return output.getvalue()


def _style(theme: Theme) -> dict[str, Any]:
    ink = dict.fromkeys(
        ["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"],
        theme.ink,
    )
    return {
        **ink,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "grid.color": theme.faint,
        "grid.linewidth": 0.8,
        "svg.fonttype": "path",
        "svg.hashsalt": "medembed",
        "text.parse_math": False,
    }
