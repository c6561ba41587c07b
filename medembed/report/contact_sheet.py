"""A contact sheet: a film and those that resemble it, as one PNG or one HTML page."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from medembed.core.errors import ArgumentError
from medembed.core.files import write_atomically
from medembed.core.text import to_figure
from medembed.report.figures.captions import elide
from medembed.report.gallery import CODE_DIGITS, Thumbnail

__all__ = ["SUFFIXES", "Frame", "label_of", "write_contact_sheet"]

SUFFIXES = (".html", ".png")
_COLUMNS, _INCHES, _DPI = 4, 2.4, 100
_SMALL = 8.0  # points


@dataclass(frozen=True)
class Frame:
    """A film on the sheet.

    Attributes
    ----------
    sha256 : str
    title, detail : str
        Two lines below the film.
    """

    sha256: str
    title: str
    detail: str


def label_of(label: int | None) -> str:
    """Return the word for a label."""
    return "unlabelled" if label is None else ("normal", "abnormal")[label]


def write_contact_sheet(
    path: Path, title: str, frames: Sequence[Frame], thumbnails: Mapping[str, Thumbnail]
) -> None:
    """Write films with two lines each, the first film first; complete or not at all.

    Parameters
    ----------
    path : Path
        Ends in one of `SUFFIXES`.
    title : str
        One line above all.
    frames : sequence of Frame
    thumbnails : mapping of str to Thumbnail
        By SHA-256; a film that has none is an empty frame. A film is named by its first digits, or
        by its thumbnail's name if there is one.

    Raises
    ------
    ArgumentError
        The suffix is another.
    """
    if path.suffix not in SUFFIXES:
        raise ArgumentError(f"{path} ends in none of {', '.join(SUFFIXES)}: name the file so")
    write = _as_html if path.suffix == ".html" else _as_png
    write_atomically(path, write(title, frames, thumbnails))


def _name(frame: Frame, thumbnails: Mapping[str, Thumbnail]) -> str:
    shown = thumbnails.get(frame.sha256)
    return shown.name if shown and shown.name else frame.sha256[:CODE_DIGITS]


def _as_html(title: str, frames: Sequence[Frame], thumbnails: Mapping[str, Thumbnail]) -> bytes:
    environment = Environment(
        loader=PackageLoader("medembed", "report/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    cards = []
    for frame in frames:
        shown = thumbnails.get(frame.sha256)
        data = base64.b64encode(shown.jpeg).decode() if shown else None
        cards.append(
            {"frame": frame, "name": _name(frame, thumbnails), "film": shown, "data": data}
        )
    text = environment.get_template("contact_sheet.html.j2").render(title=title, cards=cards)
    return text.encode()


def _as_png(title: str, frames: Sequence[Frame], thumbnails: Mapping[str, Thumbnail]) -> bytes:
    n_rows = -(-len(frames) // _COLUMNS)
    size = (_COLUMNS * _INCHES, n_rows * (_INCHES + 0.6) + 0.4)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    figure.suptitle(_fit(title, size[0]), fontsize=10, parse_math=False)
    grid = figure.subplots(n_rows, _COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, frame in zip(grid.flat, frames, strict=False):
        axes.set_axis_on()
        axes.set_xticks([])
        axes.set_yticks([])
        shown = thumbnails.get(frame.sha256)
        if shown:
            film = Image.open(io.BytesIO(shown.jpeg))
            axes.imshow(film, cmap="gray", vmin=0, vmax=255)
        else:
            axes.set_box_aspect(1)
            axes.text(0.5, 0.5, "not available", ha="center", va="center", fontsize=_SMALL)
        lines = (frame.title, frame.detail, _name(frame, thumbnails))
        text = "\n".join(_fit(line, _INCHES - 0.2) for line in lines)
        axes.set_xlabel(text, fontsize=_SMALL, parse_math=False)
    output = io.BytesIO()
    figure.savefig(output, format="png", metadata={"Software": None})
    return output.getvalue()


def _fit(text: str, inches: float) -> str:
    return elide(to_figure(text), inches * 72, _SMALL)
