"""Foreign text: a normal form for comparison, and a safe form for each place that displays it.

A name, a reason or a column's title may hold anything: a terminal escape, a bidirectional control,
a spreadsheet formula, LaTeX, HTML. This module has one function for each place of display; formats
that programs read (manifests, Parquet, JSON) hold the text unchanged.
"""

import csv
import io
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Summarised",
    "Summary",
    "count_values",
    "counted",
    "mask_controls",
    "normalise",
    "one_line",
    "printable",
    "to_csv",
    "to_csv_cell",
    "to_figure",
    "to_html",
    "to_html_cell",
    "to_latex",
    "to_markdown",
    "without_credentials",
]

_FORMULA = frozenset("=+-@＝＋－＠")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_MARKDOWN = re.compile(r"([\\`*_{}\[\]|#~])")
_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\symbol{34}",  # a shorthand of babel
    "�": "?",
    "κ": r"$\kappa$",
    "≈": r"$\approx$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "–": "--",
    "−": "$-$",
}
_INVISIBLE = "\u180e\u200b\u200c\u200d\u2060\ufeff"  # zero-width; `str.strip` leaves them


def normalise(text: str) -> str:
    """Return the normal form by which two texts are compared.

    The text is converted to Unicode NFC and stripped of blanks at both ends: all characters of
    `str.isspace`, including U+00A0, and zero-width characters. Only blanks become "".
    """
    text = unicodedata.normalize("NFC", text)
    start, end = 0, len(text)
    while start < end and _is_blank(text[start]):
        start += 1
    while end > start and _is_blank(text[end - 1]):
        end -= 1
    return text[start:end]


def mask_controls(text: str, *, keep: str = "") -> str:
    """Return text with � for each control character, except those in `keep`.

    These are the characters of Unicode's category C: controls, such as a newline or an escape,
    bidirectional marks, hidden and unassigned characters; and line and paragraph separators.
    """
    if text.isprintable():
        return text
    return "".join("�" if _is_obeyed(c) and c not in keep else c for c in text)


def printable(text: str, *, keep: str = "\n\t") -> str:
    """Return text for a terminal, with the characters of `mask_controls` as Python escapes.

    Names and reasons come from foreign files, and an escape shows which character is there.
    """
    if text.isprintable():
        return text
    return "".join(ascii(c)[1:-1] if _is_obeyed(c) and c not in keep else c for c in text)


def to_csv_cell(value: Any) -> Any:
    """Return a cell of a CSV file that a spreadsheet displays instead of evaluating.

    Text that begins with one of `= + - @`, of either width, gets a leading apostrophe, as OWASP
    recommends, unless it is a number; controls are masked. Other values are returned unchanged.

    >>> to_csv_cell("=HYPERLINK(A1)"), to_csv_cell("-0.5")
    ("'=HYPERLINK(A1)", '-0.5')
    """
    if not isinstance(value, str):
        return value
    text = mask_controls(value)
    is_formula = text.lstrip()[:1] in _FORMULA and not _NUMBER.fullmatch(text)
    return f"'{text}" if is_formula else text


def to_csv(lines: Iterable[Iterable[Any]]) -> str:
    """Return lines as CSV, numbers at full precision, each cell as `to_csv_cell` has it."""
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerows(map(to_csv_cell, line) for line in lines)
    return output.getvalue()


def to_latex(text: str) -> str:
    """Return text escaped for LaTeX, with controls as `?`.

    If the text begins with `[` or `*`, which a preceding end of a table row would read as an
    option, an empty group is put before it.
    """
    shown = "".join(_LATEX.get(c, c) for c in mask_controls(text))
    return f"{{}}{shown}" if shown.lstrip()[:1] in ("[", "*") else shown


def to_markdown(text: str) -> str:
    """Return text escaped for Markdown: no markup, HTML or line break takes effect."""
    return to_html(_MARKDOWN.sub(r"\\\1", mask_controls(text)), quotes=False)


def to_html_cell(text: str) -> str:
    """Return text as a cell of an HTML table shows it: one line, with all controls masked."""
    return to_html(mask_controls(text))


def to_figure(text: str) -> str:
    """Return text as a line of a figure holds it: in NFC, without marks that pile up."""
    shown = mask_controls(unicodedata.normalize("NFC", text))
    return "".join(c for c in shown if unicodedata.category(c) not in {"Mn", "Me"})


def one_line(text: object, most: int | None = None) -> str:
    """Return text, or what an error of a library says, with single blanks for all white space.

    Of longer text only the first `most` characters.
    """
    return " ".join(str(text).split())[:most]


def to_html(text: str, *, quotes: bool = True) -> str:
    """Return text escaped for HTML, in an element or an attribute; blanks are unchanged."""
    shown = mask_controls(text, keep="\n\t")
    shown = shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return shown.replace('"', "&#34;").replace("'", "&#39;") if quotes else shown


def counted(n: int, noun: str) -> str:
    """Return a count with its noun.

    >>> counted(1, "study"), counted(1199, "study")
    ('1 study', '1,199 studies')
    """
    if n == 1:
        return f"1 {noun}"
    return f"{n:,} {noun[:-1]}ies" if noun.endswith("y") else f"{n:,} {noun}s"


def count_values(counts: Mapping[Any, int], *, most: int = 6) -> str:
    """Return how often values occur, ``hand 12, wrist 3``, for the first `most` of them."""
    shown = [f"{name} {n:,}" for name, n in list(counts.items())[:most]]
    return ", ".join([*shown, "…"] if len(counts) > most else shown)


@dataclass(frozen=True)
class Summary:
    """A summary of an object at a glance.

    Attributes
    ----------
    title : str
        One line.
    facts : mapping of str to str
        Names and values, in order. Text from data is unchanged: it is escaped here for display.
    """

    title: str
    facts: Mapping[str, str]

    def as_text(self) -> str:
        """Return title and facts, a line each, for a terminal."""
        width = max(map(len, self.facts), default=0)
        lines = [f"  {name:<{width}}  {value}" for name, value in self.facts.items()]
        return "\n".join(printable(line, keep="") for line in (self.title, *lines))

    def as_html(self) -> str:
        """Return a table under its title, for a notebook."""
        rows = [
            f'<tr><th style="text-align: left">{to_html_cell(name)}</th>'
            f'<td style="text-align: left">{to_html_cell(value)}</td></tr>'
            for name, value in self.facts.items()
        ]
        title = f"<caption>{to_html_cell(self.title)}</caption>"
        return f"<table>{title}<tbody>{''.join(rows)}</tbody></table>"


class Summarised(ABC):
    """An object that prints as its summary, in a terminal and in a notebook."""

    @abstractmethod
    def summarise(self) -> Summary:
        """Return counts and names, without anything that identifies a patient."""

    def __repr__(self) -> str:
        return self.summarise().as_text()

    def _repr_html_(self) -> str:
        return self.summarise().as_html()


def _is_obeyed(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] == "C" or category in ("Zl", "Zp")


def _is_blank(character: str) -> bool:
    return character.isspace() or character in _INVISIBLE


def without_credentials(address: str) -> str:
    """Return a URL without what stands before an @, where some write a password or a secret key."""
    return re.sub("://.*@", "://…@", address, flags=re.DOTALL)
