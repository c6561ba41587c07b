"""How well heads rank: ROC and precision-recall curves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from medembed.core.text import to_csv_cell
from medembed.report.figures.captions import (
    describe_shown,
    describe_test,
    has_interval,
    label_rows,
    name_rows,
    shown_rows,
    tell_intervals,
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
from medembed.results.alignment import TestSet
from medembed.results.curves import (
    precision_recall_band,
    precision_recall_curve,
    roc_band,
    roc_curve,
)
from medembed.results.methods import of_score
from medembed.results.tables import format_interval

__all__ = ["plot_precision_recall", "plot_roc"]


@dataclass(frozen=True)
class _Kind:
    """What tells one curve of ranking from the other."""

    name: str
    title: str
    score: str
    score_title: str
    x: str
    x_label: str
    y: str
    y_label: str
    step: Literal["pre"] | None
    curve: Callable[..., pd.DataFrame]
    band: Callable[..., pd.DataFrame]


ROC = _Kind(
    "roc",
    "ROC curves",
    "auroc",
    "AUROC",
    "fpr",
    "False-positive rate (1 − specificity)",
    "tpr",
    "True-positive rate (sensitivity)",
    None,
    roc_curve,
    roc_band,
)
PRECISION_RECALL = _Kind(
    "precision_recall",
    "Precision-recall curves",
    "average_precision",
    "Average precision",
    "recall",
    "Recall (sensitivity)",
    "precision",
    "Precision (positive predictive value)",
    "pre",
    precision_recall_curve,
    precision_recall_band,
)


def plot_roc(result: dict[str, Any], test_set: TestSet) -> Plot | None:
    """Draw the ROC curves of the trained heads, with a 95 % band around the best.

    Returns None where the test rows are of one class or no head was trained.
    """
    return _plot_curves(result, test_set, ROC, ([0, 1], "chance"))


def plot_precision_recall(result: dict[str, Any], test_set: TestSet) -> Plot | None:
    """Draw precision over recall of the trained heads, with a 95 % band around the best.

    Returns None where the test rows are of one class or no head was trained.
    """
    share = result["test"]["n_abnormal"] / max(result["test"]["n"], 1)
    reference = ([share, share], f"chance: {share:.3f}, the share abnormal")
    return _plot_curves(result, test_set, PRECISION_RECALL, reference)


def _plot_curves(
    result: dict[str, Any], test_set: TestSet, kind: _Kind, chance: tuple[list[float], str]
) -> Plot | None:
    rows = shown_rows(result)
    if not rows:
        return None
    contenders = {(c.run, c.head): c for c in test_set.contenders}
    chosen = [contenders[row["run"], row["head"]] for row in rows]
    curves = [kind.curve(test_set.y, contender.probability) for contender in chosen]
    asked = {"n_resamples": result["n_resamples"], "seed": result["seed"]}
    band = kind.band(test_set.y, chosen[0].probability, test_set.patients, **asked)
    names = label_rows(result, rows)
    scores = [format_interval(row["scores"][kind.score]) for row in rows]
    labels = [f"{name}  {score}" for name, score in zip(names, scores, strict=True)]

    def draw(theme: Theme) -> Figure:
        return _draw_curves(theme, about, kind, curves, band, labels, title, chance)

    known = [row["scores"][kind.score] for row in rows]
    intervals = tell_intervals("In brackets", known, of_score(kind.score))
    title = f"{kind.score_title} [95 % interval]" if any(map(has_interval, known)) else ""
    title = title or kind.score_title
    has_band = bool(band["low"].notna().any())
    best = f"Band: pointwise 95 % of {names[0]}, by bootstrap resamples of patients."
    about = " ".join([describe_test(result), *([best] if has_band else []), intervals])
    about += describe_shown(result)
    return make_plot(
        kind.name,
        kind.title,
        draw,
        caption=about,
        alt=f"{kind.title} on test. {title}: {'; '.join(labels)}.",
        csv=_write_curves(kind, name_rows(result, rows), curves, band),
    )


def _draw_curves(
    theme: Theme,
    about: str,
    kind: _Kind,
    curves: list[pd.DataFrame],
    band: pd.DataFrame,
    labels: list[str],
    title: str,
    chance: tuple[list[float], str],
) -> Figure:
    figure = start_figure(kind.title, about, body=4.75, n_labels=len(labels) + 2)
    axes = figure.add_subplot()
    ends, colour = (band["low"], band["high"]), theme.series[0]
    axes.fill_between(band[kind.x], *ends, step=kind.step, color=colour, alpha=0.18, lw=0)
    reference = axes.plot([0, 1], chance[0], color=theme.ink, **REFERENCE)
    steps = f"steps-{kind.step}" if kind.step else "default"
    lines = [
        axes.plot(
            *(curve[kind.x], curve[kind.y]),
            color=theme.series[i],
            ls=LINES[i],
            lw=1.7,
            drawstyle=steps,
        )[0]
        for i, curve in enumerate(curves)
    ]
    # at the bottom: what is left of the height would come between the axes and their legend
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal", anchor="S")
    axes.set_xlabel(kind.x_label)
    axes.set_ylabel(kind.y_label)
    add_legend(figure, [*lines, *reference], [*labels, chance[1]], title)
    return figure


def _write_curves(
    kind: _Kind, names: list[str], curves: list[pd.DataFrame], band: pd.DataFrame
) -> str:
    parts = [
        curve.assign(head=name, low=np.nan, high=np.nan, kind="curve")
        for curve, name in zip(curves, names, strict=True)
    ]
    parts.append(band.assign(head=names[0], threshold=np.nan, kind="band"))
    columns = ["head", "kind", kind.x, kind.y, "threshold", "low", "high"]
    table = pd.concat([part[columns] for part in parts])
    table["head"] = table["head"].map(to_csv_cell)
    return str(table.to_csv(index=False, lineterminator="\n"))
