"""The text and numbers of figures: heads, sample sizes, explanations of intervals, and the CSV.

Text is made to fit: names are shortened, sentences wrapped, colliding tick labels left out. Widths
are measured instead of estimated from the number of characters: a row of W is three times as wide
as one of i.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from medembed.core.text import counted, to_csv_cell, to_figure
from medembed.results.comparison_schema import ComparedHead, ComparisonResult
from medembed.results.methods import name_compared_classes
from medembed.results.significance import row_name

__all__ = [
    "FONT",
    "LEGEND",
    "MAX_SERIES",
    "SMALL",
    "describe_intervals",
    "describe_shown",
    "describe_test",
    "elide",
    "flatten",
    "has_interval",
    "is_known",
    "label_rows",
    "measure",
    "name_rows",
    "name_units",
    "shown_rows",
    "thin",
    "wrap",
    "write_csv",
]

FONT = "DejaVu Sans"
"""Ships with matplotlib, so that every machine draws identical text."""
SMALL, LEGEND = 8, 9
"""Font sizes in points; text that is neither small nor a legend has 10."""
PLAIN: dict[str, Any] = dict.fromkeys(("style", "variant", "weight", "stretch"), "normal")
"""All properties are set, so that the user's settings have no effect."""
LONGEST = 200
GAP = 3.0
"""Points between two tick labels."""


def measure(text: str, size: float) -> float:
    """Return the width in points of one line at a font size in points."""
    properties = FontProperties(family=FONT, **PLAIN, size=size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        width, _, _ = text_to_path.get_text_width_height_descent(text, properties, ismath=False)
    return float(width)


def elide(text: str, width: float, size: float) -> str:
    """Return cleaned `text`, with its middle cut out until it is at most `width` points wide.

    Both ends of a name distinguish it: the beginning of the run's name and the head after it.
    """
    text = to_figure(text)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]}…{text[-LONGEST // 2 :]}"
    shown, n_kept = text, len(text)
    while n_kept > 1 and measure(shown, size) > width:
        n_kept -= 1
        shown = f"{text[: (n_kept + 1) // 2]}…{text[len(text) - n_kept // 2 :]}"
    return shown


def wrap(text: str, width: float, size: float) -> list[str]:
    """Return `text` broken between words into lines of at most `width` points."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and measure(longer, size) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def thin(places: Sequence[float], labels: Sequence[str], size: float) -> list[str]:
    """Return tick labels, blanked if they would touch another; last and first have priority.

    Parameters
    ----------
    places : sequence of float
        Centres of the labels, in points along the axis.
    labels : sequence of str
        One line or several.
    size : float
        Font size in points.
    """
    widths = [max(measure(line, size) for line in label.split("\n")) for label in labels]
    shown: list[int] = []
    for i in dict.fromkeys([len(labels) - 1, *range(len(labels))]):
        apart = (abs(places[i] - places[j]) - (widths[i] + widths[j]) / 2 for j in shown)
        if all(gap >= GAP for gap in apart):
            shown.append(i)
    return [label if i in shown else "" for i, label in enumerate(labels)]


MAX_SERIES = 6
"""Most heads in one figure: as many as the palette can distinguish."""
MAX_NAME = 200
"""Points that a name may take in a legend, so that a score and its interval fit beside it."""


def shown_rows(result: ComparisonResult, n: int = MAX_SERIES) -> list[ComparedHead]:
    """Return the best trained heads, or none if no score determines the best."""
    trained = [row for row in result["rows"] if not row["baseline"]]
    return trained[:n] if trained and is_known(trained[0]["scores"]["auroc"]) else []


def is_known(score: Mapping[str, Any] | None) -> bool:
    """Return whether a score has a value."""
    return score is not None and score.get("value") is not None


def has_interval(score: Mapping[str, Any] | None) -> bool:
    """Return whether a score has an interval, or a one-sided bound."""
    return score is not None and any(score.get(end) is not None for end in ("low", "high"))


def describe_intervals(what: str, scores: Iterable[Mapping[str, Any] | None], how: str) -> str:
    """Return the sentence on how a figure shows its scores' intervals, or that there are none.

    `how` names the method.
    """
    if any(map(has_interval, scores)):
        return f"{what}: 95 % intervals, {how}."
    return "No score here has an interval."


def name_rows(result: ComparisonResult, rows: Sequence[ComparedHead]) -> list[str]:
    """Return whole names, for tables."""
    return [row_name(row, several=len(result["runs"]) > 1) for row in rows]


def label_rows(
    result: ComparisonResult, rows: Sequence[ComparedHead], width: float = MAX_NAME
) -> list[str]:
    """Return names that a legend has room for, at most `width` points wide."""
    return [elide(name, width, LEGEND) for name in name_rows(result, rows)]


def name_units(result: ComparisonResult) -> str:
    """Return the unit of the test rows: studies or images."""
    return "studies" if result["level"] == "study" else "images"


def describe_test(result: ComparisonResult) -> str:
    """Return the sentence that explains n."""
    test, positive = result["test"], name_compared_classes(result).positive
    return (
        f"n = {counted(test['n'], 'test ' + result['level'])} ({test['n_abnormal']:,} {positive}), "
        f"{counted(test['n_patients'], 'patient')}."
    )


def describe_shown(
    result: ComparisonResult, n_shown: int = MAX_SERIES, n_all: int | None = None
) -> str:
    """Return sentences, each after a blank, on heads that are not drawn and on synthetic images.

    `n_all` heads could have been drawn, by default all that were trained.
    """
    if n_all is None:
        n_all = sum(not row["baseline"] for row in result["rows"])
    best = "The best" if n_shown == 1 else f"The best {n_shown}"
    shown = f" {best} of {n_all} heads." if n_all > n_shown else ""
    synthetic = " Synthetic images." if result["synthetic"] else ""
    return f"{shown}{synthetic}"


def flatten(name: str, score: Mapping[str, Any] | None) -> dict[str, float | None]:
    """Return a score as cells of a table: the value under `name`, and its interval's limits."""
    score = score or {}
    ends = {f"{name}_{end}": score.get(end) for end in ("low", "high")}
    return {name: score.get("value"), **ends}


def write_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV at full precision, counts without a decimal point."""
    table = pd.DataFrame(list(rows), dtype=object).map(to_csv_cell)
    return str(table.to_csv(index=False, lineterminator="\n"))
