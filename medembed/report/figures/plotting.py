"""Common parts of all figures: colours, the sheet with its title and legend, the files.

Equal input gives equal bytes: matplotlib's own fonts, a fixed salt for SVG ids, no dates. A figure
is drawn once for all its files: the dark SVG is the light one in the other theme's colours.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib.style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from medembed.report.figures.captions import FONT, LEGEND, SMALL, is_known, wrap

__all__ = [
    "AXIS",
    "DARK",
    "LIGHT",
    "LINES",
    "MARKERS",
    "OPTIONAL_FORMATS",
    "REFERENCE",
    "WIDTH",
    "Plot",
    "Theme",
    "add_legend",
    "add_points",
    "make_plot",
    "scale_scores",
    "start_figure",
    "themed_svg",
]

WIDTH = 5.2
"""Width in inches of a column of the page, and of most journals."""
DPI = 200
AXIS = (WIDTH - 0.9) * 72
"""Approximate length of a horizontal axis in points."""
MARGIN = 0.08
"""Inches between the edge and the text at the top."""


@dataclass(frozen=True)
class Theme:
    """Colours of a figure: ink for text, a faint colour for grids, one colour per head."""

    ink: str
    faint: str
    background: str
    series: tuple[str, ...]


# Okabe and Ito's palette (Color Universal Design, 2008), the dark one lightened; heads differ by
# line style and marker as well.
LIGHT = Theme(
    "#1b1f24", "#d5dae0", "#ffffff",
    ("#0072B2", "#D55E00", "#009E73", "#B0588D", "#A87400", "#2B8CC4"),
)  # fmt: skip
DARK = Theme(
    "#e6e9ee", "#3b424b", "#14181d",
    ("#56B4E9", "#E69F00", "#2FC49B", "#E79AC8", "#F0E442", "#9DB8FF"),
)  # fmt: skip
MARKERS = "os^DvP"
LINES = ("-", "--", "-.", ":", (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1)))
REFERENCE: dict[str, Any] = {"alpha": 0.5, "lw": 0.9, "ls": (0, (2, 3))}
"""Style of reference lines: chance, perfect calibration."""
METADATA: dict[str, dict[str, str | None]] = {
    "svg": {"Date": None, "Creator": None},
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": "medembed", "Producer": "matplotlib"},
}
OPTIONAL_FORMATS = ("png", "pdf")
"""Formats that are written only on request: they take twice the time of the SVG."""


@dataclass(frozen=True)
class Plot:
    """One figure, which is drawn when one of its files is first asked for.

    Attributes
    ----------
    name : str
        Stem of its files.
    title, caption, alt : str
        What the figure shows; an explanation of n and the intervals; alternative text.
    csv : str
        The numbers behind it.
    draw : callable
        Draws the figure in the colours of a theme.
    """

    name: str
    title: str
    caption: str
    alt: str
    csv: str
    draw: Callable[[Theme], Figure] = field(compare=False, repr=False)
    _files: dict[str, bytes] = field(default_factory=dict, init=False, compare=False, repr=False)

    def figure(self) -> Figure:
        """Return a new figure, to be shown, changed or saved."""
        return _draw(self.draw, LIGHT)

    def save(self, formats: Sequence[str] = ("svg",)) -> dict[str, bytes]:
        """Return the figure in these formats, of "svg", "png" and "pdf", drawn at most once.

        SVG has a transparent background; PNG of 200 dpi and PDF with embedded fonts are on white,
        for papers.
        """
        missing = [name for name in formats if name not in self._files]
        if missing:
            self._files.update(_save(self.draw, LIGHT, missing))
        return {name: self._files[name] for name in formats}

    @property
    def light_svg(self) -> bytes:
        """SVG for pages on a light background."""
        return self.save()["svg"]

    @property
    def dark_svg(self) -> bytes:
        """SVG for pages on a dark background."""
        if "dark" not in self._files:
            dark = _recolour(self.light_svg)
            if dark is None:
                dark = _save(self.draw, DARK, ("svg",))["svg"]
            self._files["dark"] = dark
        return self._files["dark"]


class _Sheet(Figure):
    """A figure that a notebook shows even if pyplot was never imported."""

    def _repr_png_(self) -> bytes:
        output = io.BytesIO()
        self.savefig(output, format="png")
        return output.getvalue()


def make_plot(
    name: str, title: str, draw: Callable[[Theme], Figure], *, caption: str, alt: str, csv: str
) -> Plot:
    """Return the figure with the text and the numbers that go with it."""
    return Plot(name, title, caption, alt, csv, draw)


def start_figure(title: str, about: str, *, body: float, n_labels: int = 0) -> Figure:
    """Return a figure with its title and the text below.

    Parameters
    ----------
    title, about : str
        One line in bold; sentences in small type, which are wrapped.
    body : float
        Height of the axes in inches.
    n_labels : int
        Lines of the legend, which is placed below the axes.
    """
    lines = wrap(about, (WIDTH - 4 * MARGIN) * 72, SMALL)
    header = 0.4 + 0.15 * len(lines)
    height = header + body + (0.2 * n_labels + 0.25 if n_labels else 0)
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - header / height))
    figure = _Sheet(figsize=(WIDTH, height), dpi=DPI, layout=layout)
    left, top = MARGIN / WIDTH, 1 - MARGIN / height
    # the id tells pages, which have the text in HTML, how much to cut off at the top
    place = f"header-{header * 72:.0f}"
    figure.text(left, top, title, fontsize=12, fontweight="bold", va="top", gid=place)
    figure.text(left, top - 0.24 / height, "\n".join(lines), fontsize=SMALL, va="top")
    return figure


def add_legend(
    figure: Figure, lines: Sequence[Any], labels: Sequence[str], title: str | None = None
) -> None:
    """Add a legend below the axes."""
    places = [str(i) for i in range(len(labels))]  # matplotlib hides labels that begin with _
    legend = figure.legend(
        lines, places, loc="outside lower center", frameon=False, title=title, fontsize=LEGEND
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)


def add_points(
    axes: Any,
    theme: Theme,
    i: int,
    places: Sequence[float],
    scores: Sequence[Mapping[str, Any]],
    *,
    horizontal: bool = False,
) -> Any:
    """Draw the i-th head's scores with their intervals, leaving out those not estimable.

    Parameters
    ----------
    places : sequence of float
        Position of each score on the other axis.
    horizontal : bool
        Whether the scores are on the horizontal axis.
    """
    colour = theme.series[i]
    known = [pair for pair in zip(places, scores, strict=True) if is_known(pair[1])]
    for place, score in known:
        if score["low"] is not None:
            ends, both = [score["low"], score["high"]], [place, place]
            axes.plot(*((ends, both) if horizontal else (both, ends)), color=colour, lw=1.5)
    values, own = [score["value"] for _, score in known], [place for place, _ in known]
    xy = (values, own) if horizontal else (own, values)
    return axes.plot(*xy, color=colour, marker=MARKERS[i], ms=5, ls="none")[0]


def scale_scores(axes: Any, scores: Sequence[Mapping[str, Any]]) -> None:
    """Scale the vertical axis to all scores and intervals, with a margin and round numbers."""
    ends = [score.get(name) for score in scores for name in ("value", "low", "high")]
    found = [end for end in ends if end is not None]
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    margin = max(0.01, 0.08 * (high - low))
    axes.set_ylim(low - margin, high + margin)
    # not matplotlib's own choice, which depends on the size of the axes and also affects it
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))


def _save(
    draw: Callable[[Theme], Figure], theme: Theme, formats: Sequence[str]
) -> dict[str, bytes]:
    """Draw once and save."""
    saved = {}
    with _styled(theme):
        figure = _draw(draw, theme)
        for file_format in formats:
            output, about = io.BytesIO(), METADATA[file_format]
            if file_format == "svg":
                _print_svg(figure, output, about)
            else:
                figure.savefig(output, format=file_format, dpi=DPI, metadata=about)
            saved[file_format] = output.getvalue()
    return saved


def _print_svg(figure: Figure, output: io.BytesIO, about: dict[str, str | None]) -> None:
    """Write as `savefig` does with `transparent`, without its extra pass over the layout."""
    patches = [figure.patch, *(axes.patch for axes in figure.axes)]
    colours = [patch.get_facecolor() for patch in patches]
    for patch in patches:
        patch.set_facecolor("none")
    FigureCanvasSVG(figure).print_svg(output, metadata=about)  # type: ignore[no-untyped-call]
    for patch, colour in zip(patches, colours, strict=True):
        patch.set_facecolor(colour)


def themed_svg(svg: bytes) -> bytes | None:
    """Return a figure for a page: without the text above it, in the colours of the page's theme.

    Returns
    -------
    bytes or None
        None if the figure has a colour of no theme.
    """
    light, dark = _colours_of(LIGHT), _colours_of(DARK)
    names = {colour.encode(): b"var(--c%d)" % k for k, colour in enumerate(light)}
    if not names.keys() >= {found.lower() for found in _COLOUR.findall(svg)}:
        return None
    themed = _COLOUR.sub(lambda found: names[found[0].lower()], svg)
    rules = [
        f":root{{{''.join(f'--c{k}:{colour};' for k, colour in enumerate(colours))}}}"
        for colours in (light, dark)
    ]
    style = f"<style>{rules[0]}@media (prefers-color-scheme:dark){{{rules[1]}}}</style>"
    themed = re.sub(rb"(<svg [^>]*>)", rb"\1" + style.encode(), themed, count=1)
    cut = re.search(rb'id="header-([0-9]+)"', themed)
    return _cut_top(themed, int(cut[1])) if cut else themed


def _cut_top(svg: bytes, points: int) -> bytes:
    def cut(found: re.Match[bytes]) -> bytes:
        width, height = float(found[2]), float(found[3]) - points
        return b'viewBox="0 %d %g %g"' % (points, width, height)

    svg = re.sub(rb'viewBox="0 (0) ([0-9.]+) ([0-9.]+)"', cut, svg, count=1)
    return re.sub(rb' (?:width|height)="[0-9.]+pt"', b"", svg, count=2)


def _recolour(svg: bytes) -> bytes | None:
    """Return a light SVG in the dark theme's colours, or None if it has a colour of no theme."""
    pairs = zip(_colours_of(LIGHT), _colours_of(DARK), strict=True)
    known = {light.encode(): dark.encode() for light, dark in pairs}
    if not known.keys() >= {found.lower() for found in _COLOUR.findall(svg)}:
        return None
    return _COLOUR.sub(lambda found: known[found[0].lower()], svg)


_COLOUR = re.compile(rb"#[0-9A-Fa-f]{6}\b")


def _colours_of(theme: Theme) -> list[str]:
    return [c.lower() for c in (theme.ink, theme.faint, theme.background, *theme.series)]


def _draw(draw: Callable[[Theme], Figure], theme: Theme) -> Figure:
    """Draw and fix the layout, so that all formats are identical."""
    with _styled(theme):
        figure = draw(theme)
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figure


@contextmanager
def _styled(theme: Theme) -> Iterator[None]:
    """Ignore the user's matplotlib settings temporarily, without changing them."""
    with matplotlib.style.context(_style(theme), after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _style(theme: Theme) -> dict[str, Any]:
    ink = dict.fromkeys(
        ["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"],
        theme.ink,
    )
    return {
        **ink,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "font.family": FONT,
        "font.size": 10,
        "grid.color": theme.faint,
        "grid.linewidth": 0.8,
        "pdf.fonttype": 42,  # journals refuse Type 3 fonts
        "svg.fonttype": "path",
        "svg.hashsalt": "medembed",
        "text.parse_math": False,
    }
