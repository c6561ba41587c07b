"""The score by layer in words, and as a table."""

from medembed.report.tables import MISSING, Table, format_interval, format_p
from medembed.results.comparison_schema import ComparisonResult, LayerPoint, LayerSeries, LayerTest

__all__ = ["describe_layers", "name_series", "tabulate_layers"]


def name_series(result: ComparisonResult, series: LayerSeries) -> str:
    """Return who was probed on what, together with the run's name if there are several runs."""
    own = f"{series['head']} on {series['pooling']}"
    return f"{series['run']}/{own}" if len(result["runs"]) > 1 else own


def describe_layers(series: LayerSeries) -> str:
    """Return a few sentences: the best layer, how it differs from the last, what may follow.

    `series` is an entry that `results.ablations.compare_layers` made.
    """
    points = {point["pooling"]: point for point in series["points"]}
    best, last = points[series["best"]], points[series["last"]]
    of = f" of {series['n_blocks']}" if series["n_blocks"] and best["block"] else ""
    found = (
        f"{series['head']} on {series['pooling']}: best {_place(best)}{of}, out-of-fold AUROC "
        f"{format_interval(best['auroc'])}"
    )
    test = best["versus_last"]
    if test is None:
        return f"{found}; no earlier layer scores higher."
    found += (
        f"; {_place(last)} {format_interval(last['auroc'])} (difference {_show(test)}, p "
        f"{format_p(test['p_holm'])} after Holm's correction). The best of several looks better "
        "than it is."
    )
    if series["unfreeze"] is None:
        return found
    return (
        f"{found} The blocks above {best['block']} add nothing here: medembed finetune --unfreeze "
        f"{series['unfreeze']} trains them."
    )


def tabulate_layers(result: ComparisonResult) -> Table | None:
    """Return every layer's score and its test against the last; None if there are none."""
    sections = [
        [
            [name_series(result, series), _name(point), *_show_scores(point)]
            for point in series["points"]
        ]
        for series in result.get("layers") or []
    ]
    if not sections:
        return None
    columns = ["Probe", "After block", "AUROC, out-of-fold [95 %]"]
    columns += ["Difference from the last [95 %]", "p (Holm)"]
    return Table("Scores by layer of the encoder", columns, 2, sections, n_spanning=1)


def _show_scores(point: LayerPoint) -> list[str]:
    test = point["versus_last"]
    against = [MISSING, MISSING] if test is None else [_show(test), format_p(test["p_holm"])]
    return [format_interval(point["auroc"]), *against]


def _place(point: LayerPoint) -> str:
    return "at the output" if point["block"] is None else f"after block {point['block']}"


def _name(point: LayerPoint) -> str:
    return "output" if point["block"] is None else f"{point['block']}"


def _show(test: LayerTest) -> str:
    if test["low"] is None:
        return f"{test['difference']:+.3f}"
    return f"{test['difference']:+.3f} [{test['low']:+.3f}, {test['high']:+.3f}]"
