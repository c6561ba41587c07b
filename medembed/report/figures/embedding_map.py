"""The map of a run: its images in two dimensions, by label and by region."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from medembed.core.text import to_figure
from medembed.dataset.targets import ClassNames, name_classes
from medembed.report.figures.captions import LEGEND, elide, write_csv
from medembed.report.figures.plotting import (
    MARKERS,
    Plot,
    Theme,
    add_legend,
    make_plot,
    start_figure,
)
from medembed.results.embedding_map import EmbeddingMap

__all__ = ["MAP", "plot_map"]

MAP = "map"
"""The figure's name."""

MAX_POINTS = 2000
"""Images drawn, those whose SHA-256 comes first: more would hide each other and swell the page."""
MAX_POOLINGS, MAX_REGIONS = 3, 6
_METHODS = {"pca": "principal components", "tsne": "t-SNE"}
OTHERS = "other regions"


def plot_map(run: str, found: EmbeddingMap, classes: ClassNames | None = None) -> Plot:
    """Draw the map of the run of this name, a column of axes per pooling.

    `classes` are those of the run's target, by default normal and abnormal.
    """
    labels = (*(classes or name_classes(None)), "unlabelled")
    rows = _choose(found.rows)
    method = _METHODS[found.info.method]
    n_all = found.rows["sha256"].nunique()
    n_drawn = rows["sha256"].nunique()
    some = f"{n_drawn:,} of the {n_all:,} images" if n_drawn < n_all else f"{n_all:,} images"
    about = (
        f"{some} of run {run} by {method} of each pooling, computed without labels. Nearness on "
        "the map is only a hint: most of what tells images apart is lost in two dimensions."
    )

    def draw(theme: Theme) -> Figure:
        return _draw(theme, about, rows, found, labels)

    poolings = list(dict.fromkeys(rows["pooling"]))
    return make_plot(
        MAP,
        "Map of the embeddings",
        draw,
        caption=about,
        alt=f"Images as points in two dimensions, by label and region, for {', '.join(poolings)}.",
        csv=write_csv([{str(k): v for k, v in row.items()} for row in _records(rows)]),
    )


def _choose(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that are drawn: equally many images of each pooling."""
    poolings = list(dict.fromkeys(rows["pooling"]))[:MAX_POOLINGS]
    names = sorted(rows["sha256"].unique())[:MAX_POINTS]
    return rows[rows["pooling"].isin(poolings) & rows["sha256"].isin(names)]


def _records(rows: pd.DataFrame) -> list[Any]:
    """Return rows as dicts, None for an unknown label."""
    return rows.astype({"label": object}).where(rows.notna(), None).to_dict("records")


def _draw(
    theme: Theme, about: str, rows: pd.DataFrame, found: EmbeddingMap, labels: Sequence[str]
) -> Figure:
    label = rows["label"].map({0: labels[0], 1: labels[1]}).fillna(labels[2])
    frequent = rows["region"].value_counts(sort=True).index[:MAX_REGIONS].tolist()
    if rows["region"].nunique() > MAX_REGIONS:
        frequent = [*frequent[: MAX_REGIONS - 1], OTHERS]
    region = rows["region"].where(rows["region"].isin(frequent), OTHERS)
    kinds = [("label", label, [name for name in labels if (label == name).any()])]
    if len(frequent) > 1:
        kinds.append(("region", region, frequent))
    poolings = list(dict.fromkeys(rows["pooling"]))
    n_entries = sum(len(names) for _, _, names in kinds)
    figure = start_figure("Map of the embeddings", about, body=2.6 * len(kinds), n_labels=n_entries)
    grid = figure.subplots(len(kinds), len(poolings), squeeze=False)
    entries: list[Any] = []
    for line, (kind, groups, names) in zip(grid, kinds, strict=True):
        for axes, pooling in zip(line, poolings, strict=True):
            drawn = _scatter(axes, theme, rows[rows["pooling"] == pooling], groups, names)
            _name_axes(axes, pooling, kind, found)
        entries += [(point, f"{kind}: {name}") for point, name in zip(drawn, names, strict=True)]
    width = 4.0 * 72
    texts = [elide(to_figure(text), width, LEGEND) for _, text in entries]
    add_legend(figure, [point for point, _ in entries], texts)
    return figure


def _scatter(
    axes: Any, theme: Theme, rows: pd.DataFrame, groups: "pd.Series[str]", names: list[str]
) -> list[Any]:
    """Draw points group by group, and return one of each group for the legend."""
    own = groups[rows.index]
    drawn = []
    for i, name in enumerate(names):
        points = rows[own == name]
        drawn += axes.plot(
            points["x"].to_numpy(),
            points["y"].to_numpy(),
            ls="",
            marker=MARKERS[i % len(MARKERS)],
            ms=2.2,
            mew=0,
            alpha=0.6,
            color=theme.series[i % len(theme.series)],
        )
    axes.set_xticks([])
    axes.set_yticks([])
    return drawn


def _name_axes(axes: Any, pooling: str, kind: str, found: EmbeddingMap) -> None:
    axes.set_title(f"{pooling}, by {kind}", fontsize=LEGEND, parse_math=False)
    shares = found.info.explained.get(pooling) or []
    if len(shares) == 2:
        axes.set_xlabel(f"{100 * shares[0]:.0f} % of the variance", fontsize=LEGEND)
        axes.set_ylabel(f"{100 * shares[1]:.0f} %", fontsize=LEGEND)
