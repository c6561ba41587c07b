"""ROC and precision-recall curves of heads, and their bands."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from medembed.core.text import to_csv_cell
from medembed.evaluation.bootstrap import draw, patient_codes, percentiles
from medembed.evaluation.scores import Scorer
from medembed.report.figures.captions import (
    LEGEND,
    describe_intervals,
    describe_shown,
    describe_test,
    elide,
    has_interval,
    label_rows,
    name_rows,
    shown_rows,
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
from medembed.report.tables import format_interval
from medembed.results.alignment import TestSet
from medembed.results.comparison_schema import ComparisonResult
from medembed.results.methods import name_compared_classes, of_score

__all__ = [
    "plot_precision_recall",
    "plot_roc",
    "precision_recall_band",
    "precision_recall_curve",
    "roc_band",
    "roc_curve",
]

GRID = np.linspace(0, 1, 101)
"""False-positive rates, or recalls, at which a band is computed."""
LABEL_WIDTH = 120
"""Points for a class in a legend."""
ROUNDING = 1e-9
"""Tolerance by which a recall of 57 in 100 reaches 0.57 despite rounding."""

Floats = NDArray[np.float64]


def roc_curve(y: NDArray[Any], probability: NDArray[Any]) -> pd.DataFrame:
    """Return the empirical ROC curve, from no row called abnormal to all rows.

    Parameters
    ----------
    y, probability : arrays of shape (n,)
        Labels 0 or 1 and probabilities of abnormal.

    Returns
    -------
    DataFrame
        Columns fpr, tpr (in [0, 1]) and threshold (infinite in the first row). One row per
        distinct probability; empty if the labels have one class.
    """
    return _curve(
        y,
        probability,
        lambda positives, negatives: {
            "fpr": negatives / negatives[-1],
            "tpr": positives / positives[-1],
        },
    )


def precision_recall_curve(y: NDArray[Any], probability: NDArray[Any]) -> pd.DataFrame:
    """Return the empirical precision-recall curve, from no row called abnormal to all rows.

    Between two rows the precision is that of the lower threshold, so that the area below the
    steps is the average precision; connecting the points by lines would be optimistic (Davis and
    Goadrich, The relationship between precision-recall and ROC curves, ICML 2006).

    Parameters
    ----------
    y, probability : arrays of shape (n,)
        Labels 0 or 1 and probabilities of abnormal.

    Returns
    -------
    DataFrame
        Columns recall, precision (in [0, 1]) and threshold. One row per distinct probability after
        a first row of recall 0, precision 1, threshold infinite, as in scikit-learn; empty if the
        labels have one class.
    """
    return _curve(
        y,
        probability,
        lambda positives, negatives: {
            "recall": positives / positives[-1],
            "precision": np.r_[1.0, positives[1:] / (positives + negatives)[1:]],
        },
    )


def _curve(
    y: NDArray[Any],
    probability: NDArray[Any],
    rates: Callable[[Floats, Floats], dict[str, Floats]],
) -> pd.DataFrame:
    """Return two rates of the rows called abnormal, by class, and the threshold of each point."""
    positives, negatives, ends = _cumulated(y, probability, np.ones((1, len(y))))
    if not positives[0, -1] or not negatives[0, -1]:
        names = [*rates(np.ones(1), np.ones(1)), "threshold"]
        return pd.DataFrame(columns=names, dtype=np.float64)
    thresholds = _thresholds(probability, ends)
    return pd.DataFrame({**rates(positives[0], negatives[0]), "threshold": thresholds})


def roc_band(
    y: NDArray[Any],
    probability: NDArray[Any],
    patients: NDArray[Any],
    *,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the pointwise 95 % band of the ROC curve from a bootstrap over patients.

    The band is vertical: at each false-positive rate the percentiles of the resampled curves'
    sensitivities (Fawcett, An introduction to ROC analysis, 2006, section 8.1).

    Parameters
    ----------
    y, probability, patients : arrays of shape (n,)
        Labels, probabilities of abnormal, and each row's patient.
    n_resamples, seed : int
        Number of resamples, and their random seed.

    Returns
    -------
    DataFrame
        Columns fpr, tpr, low, high at 101 rates; low and high are NaN if not estimable.
    """
    scorer = _OnGrid(y, probability, _sensitivities)
    return _band(scorer, patients, ["fpr", "tpr"], n_resamples, seed)


def precision_recall_band(
    y: NDArray[Any],
    probability: NDArray[Any],
    patients: NDArray[Any],
    *,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the pointwise 95 % band of the precision-recall curve, computed as in `roc_band`.

    The precision at each recall is that of the highest threshold that reaches it; at recall 0, of
    the highest threshold that detects any abnormal row.

    Returns
    -------
    DataFrame
        Columns recall, precision, low, high at 101 recalls; low and high are NaN if not
        estimable.
    """
    scorer = _OnGrid(y, probability, _precisions)
    return _band(scorer, patients, ["recall", "precision"], n_resamples, seed)


class _OnGrid(Scorer):
    """Read a curve at each place of `GRID`, for use with `draw`.

    Parameters
    ----------
    read : callable
        Returns the curve's values on the grid from one resample's numbers of abnormal and normal
        rows at or above each threshold, both of shape (g + 1,).
    """

    def __init__(
        self,
        y: NDArray[Any],
        probability: NDArray[Any],
        read: Callable[[Floats, Floats], Floats],
    ) -> None:
        super().__init__(y, probability, 0.5)
        self.names = tuple(f"{place:.2f}" for place in GRID)
        self._data = (np.asarray(y), np.asarray(probability, np.float64))
        self._read = read

    def __call__(self, weights: NDArray[Any]) -> dict[str, NDArray[Any]]:
        positives, negatives, _ = _cumulated(*self._data, weights)
        found = np.full((len(weights), len(GRID)), np.nan)
        for i in np.flatnonzero((positives[:, -1] > 0) & (negatives[:, -1] > 0)):
            found[i] = self._read(positives[i], negatives[i])
        return dict(zip(self.names, found.T, strict=True))


def _sensitivities(positives: Floats, negatives: Floats) -> Floats:
    # np.interp needs increasing rates: on a vertical segment it takes the top, like the curve
    rates, sensitivities = negatives / negatives[-1], positives / positives[-1]
    return np.asarray(np.interp(GRID, rates, sensitivities))


def _precisions(positives: Floats, negatives: Floats) -> Floats:
    wanted = np.maximum(GRID - ROUNDING, ROUNDING)
    first = np.searchsorted(positives / positives[-1], wanted)
    return positives[first] / (positives[first] + negatives[first])


def _band(
    scorer: _OnGrid, patients: NDArray[Any], columns: list[str], n_resamples: int, seed: int
) -> pd.DataFrame:
    codes = patient_codes(patients)
    truth, draws = draw([scorer], [np.arange(len(codes))], codes, n_resamples, seed)
    rows = [
        (place, truth[0][name], *percentiles(truth[0][name], draws[0][name]))
        for place, name in zip(GRID, scorer.names, strict=True)
    ]
    return pd.DataFrame(rows, columns=[*columns, "low", "high"])


def _thresholds(probability: NDArray[Any], ends: NDArray[np.intp]) -> Floats:
    falling = np.sort(np.asarray(probability, np.float64))[::-1]
    return np.concatenate([[np.inf], falling[ends]])


def _cumulated(
    y: NDArray[Any], probability: NDArray[Any], weights: NDArray[Any]
) -> tuple[Floats, Floats, NDArray[np.intp]]:
    """Return counts of abnormal and normal rows at or above each distinct probability, descending.

    The arrays have shape (B, g + 1), beginning with 0; the third result is the index of the last
    row of each of the g distinct probabilities.
    """
    order = np.argsort(-np.asarray(probability, np.float64), kind="stable")
    falling = np.asarray(probability, np.float64)[order]
    ends = np.flatnonzero(np.r_[falling[1:] != falling[:-1], True])
    ordered, abnormal = weights[:, order], np.asarray(y)[order] == 1
    start = np.zeros((len(weights), 1))
    positives = np.cumsum(ordered * abnormal, axis=1)[:, ends]
    negatives = np.cumsum(ordered * ~abnormal, axis=1)[:, ends]
    return np.hstack([start, positives]), np.hstack([start, negatives]), ends


@dataclass(frozen=True)
class _Kind:
    """The properties in which the two ranking curves differ."""

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


def plot_roc(result: ComparisonResult, test_set: TestSet) -> Plot | None:
    """Draw the ROC curves of the trained heads, with a 95 % band around the best.

    Returns None where the test rows are of one class or no head was trained.
    """
    return _plot_curves(result, test_set, ROC, ([0, 1], "chance"))


def plot_precision_recall(result: ComparisonResult, test_set: TestSet) -> Plot | None:
    """Draw precision over recall of the trained heads, with a 95 % band around the best.

    Returns None where the test rows are of one class or no head was trained.
    """
    share = result["test"]["n_abnormal"] / max(result["test"]["n"], 1)
    positive = elide(name_compared_classes(result).positive, LABEL_WIDTH, LEGEND)
    reference = ([share, share], f"chance: {share:.3f}, the share {positive}")
    return _plot_curves(result, test_set, PRECISION_RECALL, reference)


def _plot_curves(
    result: ComparisonResult, test_set: TestSet, kind: _Kind, chance: tuple[list[float], str]
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
    intervals = describe_intervals("In brackets", known, of_score(kind.score))
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
    # at the bottom: otherwise the remaining height would separate the axes from their legend
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
