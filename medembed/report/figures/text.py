"""Text that fits its place: names cut, sentences wrapped, colliding tick labels left out.

Widths are measured, not guessed from the number of characters: a row of W is three times as wide
as one of i.
"""

import unicodedata
import warnings
from collections.abc import Sequence
from typing import Any

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from medembed.core.text import mask_controls

__all__ = ["FONT", "LEGEND", "SMALL", "clean", "elide", "measure", "thin", "wrap"]

FONT = "DejaVu Sans"
"""Comes with matplotlib, so that every machine draws the same."""
SMALL, LEGEND = 8, 9
"""Font sizes in points; what is neither small nor a legend has 10."""
PLAIN: dict[str, Any] = dict.fromkeys(("style", "variant", "weight", "stretch"), "normal")
"""All said, so that the user's settings have no say."""
LONGEST = 200
GAP = 3.0
"""Points between two tick labels."""


def clean(text: str) -> str:
    """Keep what a line of a figure can hold: no control characters, no marks that pile up."""
    shown = mask_controls(unicodedata.normalize("NFC", text))
    return "".join(c for c in shown if unicodedata.category(c) not in {"Mn", "Me"})


def measure(text: str, size: float) -> float:
    """Return the width in points of one line at a font size in points."""
    properties = FontProperties(family=FONT, **PLAIN, size=size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        width, _, _ = text_to_path.get_text_width_height_descent(text, properties, ismath=False)
    return float(width)


def elide(text: str, width: float, size: float) -> str:
    """Clean `text` and cut out its middle until it is at most `width` points wide.

    Both ends of a name tell it apart: the first letters of a run's, and the head's after it.
    """
    text = clean(text)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]}…{text[-LONGEST // 2 :]}"
    shown, n_kept = text, len(text)
    while n_kept > 1 and measure(shown, size) > width:
        n_kept -= 1
        shown = f"{text[: (n_kept + 1) // 2]}…{text[len(text) - n_kept // 2 :]}"
    return shown


def wrap(text: str, width: float, size: float) -> list[str]:
    """Break `text` between words into lines of at most `width` points."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and measure(longer, size) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def thin(places: Sequence[float], labels: Sequence[str], size: float) -> list[str]:
    """Blank those tick labels that would touch another; the last and the first come before others.

    Parameters
    ----------
    places : sequence of float
        Where the labels are centred, in points along the axis.
    labels : sequence of str
        One line or several.
    size : float
        Of the font, in points.
    """
    widths = [max(measure(line, size) for line in label.split("\n")) for label in labels]
    shown: list[int] = []
    for i in dict.fromkeys([len(labels) - 1, *range(len(labels))]):
        apart = (abs(places[i] - places[j]) - (widths[i] + widths[j]) / 2 for j in shown)
        if all(gap >= GAP for gap in apart):
            shown.append(i)
    return [label if i in shown else "" for i, label in enumerate(labels)]
