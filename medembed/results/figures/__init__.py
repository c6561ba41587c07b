"""The figures of a comparison, as SVG for light and dark pages, PNG, PDF, and the CSV behind them.

A figure that has nothing to show is None: scores of one class, times that no sweep wrote down,
heads of one depth.
"""

from typing import Any

from medembed.results.alignment import TestSet
from medembed.results.figures.calibration import plot_calibration
from medembed.results.figures.cost import plot_cost
from medembed.results.figures.decisions import plot_confusion
from medembed.results.figures.deferral import plot_deferral
from medembed.results.figures.groups import plot_regions, plot_views
from medembed.results.figures.plotting import Plot
from medembed.results.figures.ranking import plot_precision_recall, plot_roc
from medembed.results.figures.trends import plot_depths, plot_efficiency

__all__ = [
    "Plot",
    "plot_all",
    "plot_calibration",
    "plot_confusion",
    "plot_cost",
    "plot_deferral",
    "plot_depths",
    "plot_efficiency",
    "plot_precision_recall",
    "plot_regions",
    "plot_roc",
    "plot_views",
]


def plot_all(result: dict[str, Any], test_set: TestSet) -> list[Plot]:
    """Draw the figures that apply, in the order of the page.

    Parameters
    ----------
    result : dict
        A comparison, as `compare_runs` returns it.
    test_set : TestSet
        The rows that it was made of.
    """
    plots = [plot(result, test_set) for plot in (plot_roc, plot_precision_recall)]
    plots += [
        plot(result)
        for plot in (
            plot_cost,
            plot_regions,
            plot_views,
            plot_confusion,
            plot_calibration,
            plot_deferral,
            plot_depths,
            plot_efficiency,
        )
    ]
    return [plot for plot in plots if plot is not None]
