"""The tables of the page, as cells of text, with numbers for columns that can be sorted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medembed.report.operating_tables import confusion_of, name_point, points_of
from medembed.report.tables import (
    MISSING,
    NOT_ESTIMABLE,
    Table,
    format_count,
    format_interval,
    format_p,
    format_value,
    make_table,
    share_of_train,
)
from medembed.results.comparison_schema import ComparedHead, ComparisonResult, Pair, PointDocument
from medembed.results.methods import name_compared_classes
from medembed.results.significance import row_name

__all__ = [
    "LOWER_IS_BETTER",
    "Coverage",
    "Deferrals",
    "Leaderboard",
    "tabulate_calibrations",
    "tabulate_coverage",
    "tabulate_decisions",
    "tabulate_deferrals",
    "tabulate_heads",
    "tabulate_pairs",
    "tabulate_seeds",
]

LEADERBOARD = {
    "auroc": "AUROC [95 %]",
    "average_precision": "Average precision [95 %]",
    "macro_f1": "Macro-F1",
    "kappa": "κ [95 %]",
    "brier": "Brier",
    "ece": "ECE",
}
LOWER_IS_BETTER = ("Brier", "ECE", "p")
"""Columns of the leaderboard that are sorted with the lowest first."""
DECISIONS = {
    "sensitivity": "Sensitivity [95 %]",
    "specificity": "Specificity [95 %]",
    "ppv": "PPV [95 %]",
    "npv": "NPV [95 %]",
}
CONFUSION = {"tp": "TP", "fn": "FN", "fp": "FP", "tn": "TN"}
AGREEMENT = {"accuracy": "Accuracy [95 %]", "macro_f1": "Macro-F1 [95 %]", "kappa": "κ [95 %]"}
COVERAGE = 0.9
"""The promised coverage that is shown by region."""
CALIBRATIONS = {
    "none": "none",
    "platt": "Platt (used)",
    "temperature": "temperature",
    "isotonic": "isotonic",
}


FITS = {
    "brier": "Brier [95 %]",
    "slope": "Slope, 1 is right [95 %]",
    "intercept": "Intercept, 0 is right [95 %]",
    "ece": "ECE [at most]",
}


@dataclass(frozen=True)
class Leaderboard(Table):
    """A table that a reader may sort.

    Attributes
    ----------
    values : tuple of list of float or None
        A row's values, one per cell, None for what is text.
    kinds : tuple of str
        Per row "baseline", or nothing.
    """

    values: tuple[list[float | None], ...] = ()
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Deferrals:
    """What prediction sets do on test, and why heads have none.

    Attributes
    ----------
    table : Table
    without : list of str
        Of each head that has no sets, the reason.
    warnings : list of str
    """

    table: Table
    without: list[str]
    warnings: list[str]


@dataclass(frozen=True)
class Coverage:
    """What sets do in each region.

    Attributes
    ----------
    table : Table
    min_group : int
        How many patients of each class a region needs for a promise of its own.
    """

    table: Table
    min_group: int


def tabulate_heads(result: ComparisonResult) -> Leaderboard:
    """Return the leaderboard."""
    main, efficiency = make_table(result), bool(result["efficiency"])
    rows, sorted_by = [], []
    for row, line in zip(result["rows"], main.rows, strict=True):
        scores = [row["scores"][score] for score in LEADERBOARD]
        cells = [_name(result, row), *map(_score, scores, LEADERBOARD.values()), line[-1]]
        values = [None, *(score["value"] for score in scores), _p_of(row)]
        if efficiency:
            cells.insert(1, share_of_train(row))
            values.insert(1, row["train_fraction"])
        rows.append(cells)
        sorted_by.append(values)
    extra = ["Train"] if efficiency else []
    return Leaderboard(
        f"{main.title}, best AUROC first",
        ["Head", *extra, *LEADERBOARD.values(), "p"],
        1,
        [rows],
        main.notes[:1],
        values=tuple(sorted_by),
        kinds=tuple("baseline" if row["baseline"] else "" for row in result["rows"]),
    )


def tabulate_decisions(result: ComparisonResult) -> list[Table]:
    """Return tables of each trained head's decisions at each operating point.

    Shares with counts; the confusion matrix and its summary scores; predictive values at another
    prevalence, if the comparison has one.
    """

    def shares(point: PointDocument) -> list[str]:
        return [_unbroken(point["scores"][score]) for score in DECISIONS]

    def matrix(point: PointDocument) -> list[str]:
        counts = [f"{confusion_of(point)[name]:,}" for name in CONFUSION]
        return [*counts, *(format_count(point["scores"][score]) for score in AGREEMENT)]

    def elsewhere(point: PointDocument) -> list[str]:
        return [format_interval(point["at_prevalence"][score]) for score in ("ppv", "npv")]

    found = [
        _of_points(
            result,
            "Decisions at thresholds of the calibrated probability, which were chosen on "
            "out-of-fold predictions of train, or given",
            list(DECISIONS.values()),
            shares,
        ),
        _of_points(
            result,
            "The same decisions: true and false positives and negatives, and what sums them up",
            [*CONFUSION.values(), *AGREEMENT.values()],
            matrix,
        ),
    ]
    if result["prevalence"] is not None:
        title = (
            f"Predictive values where a share of {result['prevalence']:g} is "
            f"{name_compared_classes(result).positive}, from sensitivity and specificity "
            "(Bayes' rule, limits by MOVER)"
        )
        found.append(_of_points(result, title, ["PPV [95 %]", "NPV [95 %]"], elsewhere))
    return found


def tabulate_deferrals(result: ComparisonResult) -> Deferrals | None:
    """Return a table of each trained head's prediction sets on test, or None if none has any."""
    able = [row for row in _trained(result) if row["deferral"]]
    if not able:
        return None
    sections, classes, titles = [], name_compared_classes(result), _deferral_titles(result)
    for row in able:
        lines = [["none deferred", MISSING, MISSING, MISSING, format_interval(_complement(row))]]
        lines += [
            [f"{100 * own['nominal']:g} %", *(format_count(own[share]) for share in titles)]
            for own in _levels(row)
        ]
        sections.append([[_name(result, row), *cells] for cells in lines])
    others = [row for row in _trained(result) if not row["deferral"]]
    title = (
        f"What each promised coverage gives on test: shares of {classes.negative}, "
        f"{classes.positive}, all and decided studies; where none is deferred, Youden's threshold "
        "decides"
    )
    columns = ["Head", "Promised coverage", *titles.values()]
    return Deferrals(
        Table(title, columns, 2, sections, n_spanning=1),
        [f"{_name(result, row)}: {classes.reword(row['deferral_note'] or '')}" for row in others],
        [
            f"{_name(result, row)}: {classes.reword(row['deferral']['warning'])}"
            for row in able
            if row["deferral"] and row["deferral"]["warning"]
        ],
    )


def tabulate_coverage(result: ComparisonResult) -> Coverage | None:
    """Return a table of sets that promise 90 % by region, or None with at most one region."""
    sections, least, classes = [], 0, name_compared_classes(result)
    titles = {name: own for name, own in _deferral_titles(result).items() if name != "error"}
    for row in _trained(result):
        if not row["deferral"]:
            continue
        level = next(own for own in _levels(row) if own["nominal"] == COVERAGE)
        regions, least = level["regions"], row["deferral"]["min_group"]
        if len(regions) < 2:
            continue
        section = []
        for region, own in regions.items():
            promised = "all regions" if own["coverage_of"] == "marginal" else "this region"
            shares = (format_interval(own[share]) for share in titles)
            studies = f"{own['n'] - own['n_abnormal']:,} + {own['n_abnormal']:,}"
            section.append([_name(result, row), region, studies, promised, *shares])
        sections.append(section)
    if not sections:
        return None
    title = "What a promised coverage of 90 % gives on test, by region"
    counts = f"{_capitalised(classes.negative)} + {classes.positive}"
    columns = ["Head", "Region", counts, "Promised for", *titles.values()]
    return Coverage(Table(title, columns, 3, sections, n_spanning=1), least)


def _deferral_titles(result: ComparisonResult) -> dict[str, str]:
    """Return the headings of shares of prediction sets, by their names in the comparison."""
    classes = name_compared_classes(result)
    return {
        "coverage_normal": f"{_capitalised(classes.negative)} covered [95 %]",
        "coverage_abnormal": f"{_capitalised(classes.positive)} covered [95 %]",
        "deferred": "Deferred [95 %]",
        "error": "Decided wrongly [95 %]",
    }


def _capitalised(name: str) -> str:
    return f"{name[:1].upper()}{name[1:]}"


def tabulate_calibrations(result: ComparisonResult) -> Table:
    """Return a table of each trained head's calibration, before and after scaling."""
    sections = []
    for row in _trained(result):
        own = row["calibrations"]
        known: dict[str, Mapping[str, Any]] = {
            method: own[method] for method in CALIBRATIONS if method in own
        }
        sections.append(
            [
                [
                    *(_name(result, row), CALIBRATIONS[method]),
                    *(format_interval(found[score]) for score in FITS if score in found),
                ]
                for method, found in known.items()
            ]
        )
    title = "Calibration before and after scaling, fitted on out-of-fold predictions of train"
    return Table(title, ["Head", "Scaling", *FITS.values()], 2, sections, n_spanning=1)


def tabulate_pairs(result: ComparisonResult) -> Table:
    """Return a table of paired differences in AUROC, the smallest p first."""
    pairs = sorted(result["paired"], key=lambda pair: (pair["p_holm"] is None, pair["p_holm"]))
    rows = [
        [
            *(pair["a"], pair["b"], _difference(pair)),
            *(format_p(pair[name]) for name in ("p_holm", "p", "p_bootstrap")),
            format_p(pair["mcnemar"]["p"]),
        ]
        for pair in pairs
    ]
    tests = ("p (Holm)", "p (DeLong, t)", "p (bootstrap)", "p (McNemar)")
    columns = ["A", "B", "A − B [95 %]", *tests]
    title = "Differences in AUROC between heads on the same test rows"
    return Table(title, columns, 2, [rows])


def tabulate_seeds(result: ComparisonResult) -> Table:
    """Return a table of the spread over seeds and over samples of patients."""
    sections = []
    for own in result["seeds"]:
        section = []
        for title, spread in {"AUROC": own["auroc"], "Macro-F1": own["macro_f1"]}.items():
            numbers = (spread["mean"], spread["seed_sd"], spread["sampling_sd"])
            texts = [MISSING if number is None else f"{number:.4f}" for number in numbers]
            section.append([own["head"], f"{own['n_seeds']}", title, *texts])
        sections.append(section)
    title = "Spread over seeds beside that of sampling (standard deviations)"
    columns = ["Head", "Seeds", "Score", "Mean", "Over seeds", "Over resamples of patients"]
    return Table(title, columns, 3, sections, n_spanning=2)


def _unbroken(score: Mapping[str, Any]) -> str:
    """Return a share as text that breaks before its counts, and not within its interval."""
    interval = format_interval(score)
    return format_count(score).replace(interval, interval.replace(" ", "\u00a0"), 1)


def _of_points(
    result: ComparisonResult,
    title: str,
    columns: list[str],
    write: Callable[[PointDocument], list[str]],
) -> Table:
    sections = [
        [
            [
                *(_name(result, row), name_point(point["name"]), f"{point['threshold']:.3f}"),
                *write(point),
            ]
            for point in points_of(row)
        ]
        for row in _trained(result)
    ]
    columns = ["Head", "Operating point", "Threshold", *columns]
    return Table(title, columns, 2, sections, n_spanning=1)


def _levels(row: ComparedHead) -> Sequence[Mapping[str, Any]]:
    """Return a head's prediction sets at each nominal coverage, whose shares go by their names."""
    return row["deferral"]["levels"] if row["deferral"] else []


def _complement(row: ComparedHead) -> dict[str, float | None]:
    """Return the share of wrong decisions if every study is decided."""
    ends = {"value": "value", "low": "high", "high": "low"}
    accuracy: Mapping[str, Any] = row["scores"]["accuracy"]
    return {a: None if accuracy[b] is None else 1 - accuracy[b] for a, b in ends.items()}


def _trained(result: ComparisonResult) -> Sequence[ComparedHead]:
    return [row for row in result["rows"] if not row["baseline"]]


def _name(result: ComparisonResult, row: ComparedHead) -> str:
    return row_name(row, several=len(result["runs"]) > 1)


def _score(score: Mapping[str, Any], heading: str) -> str:
    return format_interval(score) if "[" in heading else format_value(score)


def _p_of(row: ComparedHead) -> float | None:
    """Return the sort key of column p: the best head has no p and comes first."""
    return 2.0 if row["versus_best"] is None else row["versus_best"]["p_holm"]


def _difference(pair: Pair) -> str:
    if pair["difference"] is None:
        return NOT_ESTIMABLE
    interval = "" if pair["low"] is None else f" [{pair['low']:+.3f}, {pair['high']:+.3f}]"
    return f"{pair['difference']:+.3f}{interval}"
