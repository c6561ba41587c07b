"""The figures of a comparison, as SVG for light and dark pages, on request PNG and PDF, and as CSV.

A figure with nothing to show is None, such as for scores of one class, for runs that did not record
times, or for heads of a single depth.
"""

from collections.abc import Callable, Sequence
from functools import partial

from matplotlib.figure import Figure

from medembed.report.figures.calibration import plot_calibration
from medembed.report.figures.confusion import plot_confusion
from medembed.report.figures.cost import plot_cost
from medembed.report.figures.decision_curve import plot_decision_curve
from medembed.report.figures.deferral import plot_deferral
from medembed.report.figures.flow import plot_flow
from medembed.report.figures.plotting import OPTIONAL_FORMATS, Plot
from medembed.report.figures.roc_pr import plot_precision_recall, plot_roc
from medembed.report.figures.subgroups import plot_regions, plot_views
from medembed.report.figures.trends import plot_depths, plot_efficiency
from medembed.results.alignment import TestSet
from medembed.results.comparison_schema import ComparisonResult

__all__ = [
    "FIGURES",
    "OPTIONAL_FORMATS",
    "Plot",
    "draw_figure",
    "plot_all",
    "plot_calibration",
    "plot_confusion",
    "plot_cost",
    "plot_decision_curve",
    "plot_deferral",
    "plot_depths",
    "plot_efficiency",
    "plot_flow",
    "plot_precision_recall",
    "plot_regions",
    "plot_roc",
    "plot_views",
]


_OF_ROWS: dict[str, Callable[[ComparisonResult, TestSet], Plot | None]] = {
    "roc": plot_roc,
    "precision_recall": plot_precision_recall,
}
_OF_RESULT: dict[str, Callable[[ComparisonResult], Plot | None]] = {
    "cost": plot_cost,
    "regions": plot_regions,
    "views": plot_views,
    "confusion": plot_confusion,
    "decision_curve": plot_decision_curve,
    "calibration": plot_calibration,
    "deferral": plot_deferral,
    "depths": plot_depths,
    "efficiency": plot_efficiency,
    "flow": plot_flow,
}
FIGURES = (*_OF_ROWS, *_OF_RESULT)
"""The names of all figures, in the order of the page."""


def plot_all(
    result: ComparisonResult,
    test_set: TestSet,
    progress: Callable[[int, int], None] | None = None,
    formats: Sequence[str] = (),
) -> list[Plot]:
    """Return the figures that apply, in the order of the page.

    Parameters
    ----------
    result : dict
        A comparison from `compare_runs`.
    test_set : TestSet
        The test rows that were compared.
    progress : callable, optional
        Called as progress(done, total) with figures, drawn or found to have nothing to show.
    formats : sequence of str
        Of `OPTIONAL_FORMATS`, drawn together with the SVG.
    """
    drawn = [
        *(partial(plot, result, test_set) for plot in _OF_ROWS.values()),
        *(partial(plot, result) for plot in _OF_RESULT.values()),
    ]
    plots = []
    for done, draw in enumerate(drawn):
        if progress is not None:
            progress(done, len(drawn))
        plot = draw()
        if plot is not None:
            plot.save(("svg", *formats))
            plots.append(plot)
    if progress is not None:
        progress(len(drawn), len(drawn))
    return plots


def draw_figure(name: str, result: ComparisonResult, test_set: TestSet) -> Figure | None:
    """Return the figure of that name, one of `FIGURES`, or None if it has nothing to show."""
    plot = _OF_ROWS[name](result, test_set) if name in _OF_ROWS else _OF_RESULT[name](result)
    return None if plot is None else plot.figure()
