"""Text of others is shown, not obeyed: in terminals, CSV, LaTeX, Markdown and HTML."""

import csv
import html
import io
import re
import unicodedata
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jinja2 import Environment

from medembed.core import text
from medembed.core.text import (
    mask_controls,
    printable,
    to_csv_cell,
    to_figure,
    to_html,
    to_latex,
    to_markdown,
)
from medembed.report import page
from medembed.report.figures.captions import write_csv

BIDI = [*map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C))]
OBEYED = [*BIDI, "\x00", "\x07", "\x1b", "\x7f", "\x9b", "\u2028", "\u2029", "\ud800", "\ufeff"]
TEXTS = st.one_of(
    st.text(),
    st.text(st.sampled_from([*OBEYED, *"=+-@\t\r\n \\{}[]<>&\"'%$#_^~|*`a1.é"])),
)


@pytest.mark.parametrize("character", OBEYED, ids=ascii)
def test_no_place_obeys_a_mark_that_turns_or_moves(character: str) -> None:
    name = f"left{character}right"
    shown = [
        mask_controls(name),
        to_csv_cell(name),
        to_markdown(name),
        to_html(name),
        to_figure(name),
    ]
    assert shown == ["left�right"] * 5
    assert to_latex(name) == "left?right"
    assert printable(name) == f"left{ascii(character)[1:-1]}right"


@given(TEXTS)
@example("\x1b[2J\u202egnp.exe")
def test_what_is_shown_has_nothing_to_obey(name: str) -> None:
    for shown in (mask_controls(name), str(to_csv_cell(name)), to_latex(name), to_markdown(name)):
        assert shown.replace("\u3000", " ").isprintable() or not name.isprintable()
        assert not any(unicodedata.category(c)[0] == "C" for c in shown)
        assert not set(shown) & set("\u2028\u2029\n\r\t")
    for shown in (to_html(name), printable(name)):
        assert all(unicodedata.category(c)[0] != "C" or c in "\n\t" for c in shown)
    plain = all(unicodedata.category(c)[0] not in "CZ" for c in name)
    if plain:
        assert mask_controls(name) == printable(name) == name


FORMULAS = [
    "=1+1",
    '=HYPERLINK("http://x.example","a")',
    "+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(A1:A9)",
    " =1+1",
    "\u00a0=1",
    "＝1+1",
    "-",
    "-patient",
    "+1 234",
    "-1e",
    "--1",
    "=",
    "@",
]


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_is_text_in_a_spreadsheet(name: str) -> None:
    assert to_csv_cell(name) == f"'{name}"


@pytest.mark.parametrize("name", ["\t=1+1", "\r=1+1", "\n=1", "\x00=1"])
def test_a_control_before_a_formula_is_shown(name: str) -> None:
    assert to_csv_cell(name) == f"�{name[1:]}"


@pytest.mark.parametrize(
    "value", ["-1.5", "+2", "-.5", "1e-05", "-1E+3", "7.", "–", "a=b", "", 'a "b"', -1.5, 3, None]
)
def test_numbers_and_other_text_stay_as_they_are(value: Any) -> None:
    assert to_csv_cell(value) == value
    assert type(to_csv_cell(value)) is type(value)


@given(TEXTS)
def test_no_cell_begins_like_a_formula(name: str) -> None:
    cell = to_csv_cell(name)
    assert cell[:1] not in {"=", "+", "-", "@", "\t", "\r"} or float(cell) is not None
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow([cell, 1])
    assert list(csv.reader(io.StringIO(line.getvalue()))) == [[cell, "1"]]
    assert cell.removeprefix("'") == mask_controls(name).removeprefix("'") or name[:1] == "'"


def test_figures_data_hold_no_formula() -> None:
    rows = [{"head": "=1+1", "auroc": -0.5, "n": 3}, {"head": "b\u202e", "auroc": 0.1, "n": None}]
    read = pd.read_csv(io.StringIO(write_csv(rows)))
    assert read["head"].tolist() == ["'=1+1", "b�"]
    assert read["auroc"].tolist() == [-0.5, 0.1]


@given(TEXTS)
def test_html_reads_back_as_the_text_that_is_shown(name: str) -> None:
    shown = to_html(name)
    assert not set(shown) & set("<>\"'")
    assert html.unescape(shown) == mask_controls(name, keep="\n\t")


@given(TEXTS)
def test_latex_reads_back_as_the_text_that_is_shown(name: str) -> None:
    """Undo each escape: no special character is left over that stands for itself."""
    shown = to_latex(name)
    back = re.sub(
        r"\\textbackslash\{\}|\\[a-z]+\{\}|\\symbol\{34\}|\\[&%$#_{}]|\$\\[a-z]+\$|--",
        "",
        shown,
    )
    assert shown.lstrip()[:1] not in ("[", "*")
    assert not set(back.removeprefix("{}")) & set('&%$#_{}~^\\<>|"')
    if set(name) <= set("abc123 .,;:"):
        assert shown == name


def test_latex_escapes_every_special_character() -> None:
    assert to_latex(r"a_b & 50% $x$ #1 {y} ~^ \input{z} <|> [c]*") == (
        r"a\_b \& 50\% \$x\$ \#1 \{y\} \textasciitilde{}\textasciicircum{} "
        r"\textbackslash{}input\{z\} \textless{}\textbar{}\textgreater{} [c]*"
    )
    assert [to_latex(name) for name in ("[2cm]x", "*", " [a")] == ["{}[2cm]x", "{}*", "{} [a"]


def test_markdown_escapes_markup_and_html() -> None:
    assert to_markdown("a|b *c* [d](e) <img src=x> `f` #g\n# h") == (
        r"a\|b \*c\* \[d\](e) &lt;img src=x&gt; \`f\` \#g�\# h"
    )


def test_the_page_shows_what_would_turn_a_line_around(tmp_path: Path) -> None:
    """Every expression of a template goes through one function, in elements and attributes."""
    environment = Environment(autoescape=True, finalize=page._show)
    template = environment.from_string(
        '<b title="{{ name }}">{{ name }}</b>{{ 1.5 }}{{ list|join }}'
    )
    name = "\u202e<script>'\"\x1b"
    shown = template.render(name=name, list=["\u2066", "&"])
    escaped = "�&lt;script&gt;&#39;&#34;�"
    assert shown == f'<b title="{escaped}">{escaped}</b>1.5�&amp;'


def test_there_is_one_place_that_cleans_text_of_others() -> None:
    """No other module asks for Unicode's categories, but to measure letters and compare names."""
    package = Path(text.__file__).parents[1]
    users = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if "unicodedata.category" in path.read_text()
    }
    assert users == {"core/text.py", "dataset/identities.py"}
