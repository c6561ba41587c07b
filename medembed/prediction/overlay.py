"""Draw heat maps over the images they explain, as PNG, with their numbers in a CSV file.

Orange indicates abnormal and sky blue normal, two of the colours that Okabe and Ito chose for all
types of colour vision (2008). Each cell is drawn in one colour, without interpolation between
cells.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medembed.core.errors import ImageError
from medembed.core.files import write_atomically
from medembed.core.locations import Location
from medembed.encoders.preprocessing import Preprocessing, place_image
from medembed.heads.base import Head
from medembed.images.load import read_content
from medembed.prediction.attribution import Explainer
from medembed.prediction.encode import Embedder
from medembed.results.predictions import image_code

__all__ = ["DISCLAIMER", "Pictures", "draw_overlay", "overlay_name", "write_overlay"]

DISCLAIMER = "Research software, not a medical device"
COLUMNS = ("row", "column", "left", "top", "right", "bottom", "logit")
ABNORMAL, NORMAL = (230, 159, 0), (86, 180, 233)
LONGER_SIDE = 896  # of the drawn image; the picture itself is at least as wide as its legend
LEGEND_WIDTH = 640
OPACITY = 0.7  # of the strongest cell, so that the bone under it stays visible
_PAPER, _INK = (20, 20, 20), (235, 235, 235)
_MARGIN, _LINE, _FONT_SIZE = 12, 24, 17


def overlay_name(sha256: str) -> str:
    """Return a picture's anonymous file name, from the hash of the image's hash."""
    return f"{image_code(sha256)}.png"


def write_overlay(
    path: Path,
    image: np.ndarray,
    heat: np.ndarray,
    preprocessing: Preprocessing,
    *,
    notes: Sequence[str] = (),
) -> None:
    """Write a picture, and its numbers in a `.csv` beside it; each file is complete or absent.

    Parameters
    ----------
    path : Path
        Ends in `.png`; see `overlay_name`.
    image : uint8 array of shape (H, W)
        The decoded image, before preparation.
    heat : float array of shape (rows, columns)
        A heat map from `attribution.Explainer`.
    preprocessing : Preprocessing
        The encoder's preprocessing, which determines the image's position in its input.
    notes : sequence of str
        Lines for the legend; none may name a patient.

    Notes
    -----
    The CSV has a line per cell: `row`, `column` from 0, its edges `left`, `top`, `right`, `bottom`
    in pixels of the image, and its `logit`. If the image was padded, cells in the padding have
    edges outside it. The grid is assumed to divide the input evenly: if the patch does not divide
    the side (14 pixels of 384), the last cells are off by less than one cell.

    Raises
    ------
    ImageError
        The image or the map is empty, or has a wrong shape or dtype.
    OSError
        The directory is missing, not writable, or full.
    """
    picture = draw_overlay(image, heat, preprocessing, notes=notes)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_atomically(path.with_suffix(".csv"), _table(image.shape, heat, preprocessing))
    write_atomically(path, buffer.getvalue())


def draw_overlay(
    image: np.ndarray,
    heat: np.ndarray,
    preprocessing: Preprocessing,
    *,
    notes: Sequence[str] = (),
) -> Image.Image:
    """Return the picture that `write_overlay` writes: the image with its map above a legend."""
    _check(image, heat)
    scale = LONGER_SIDE / max(image.shape)
    size = tuple(max(1, round(side * scale)) for side in image.shape)
    grey = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    top = float(np.abs(heat).max())
    rows, columns = _cells_of(image.shape, (size[0], size[1]), heat.shape, preprocessing)
    shares = (heat / top if top > 0 else np.zeros_like(heat))[np.ix_(rows, columns)]
    drawn = Image.fromarray(_blend(np.asarray(grey), shares))
    if heat.max() > 0:
        _mark_peak(drawn, heat, rows, columns)
    legend = _draw_legend(max(LEGEND_WIDTH, drawn.width), top, notes)
    picture = Image.new("RGB", (legend.width, drawn.height + legend.height), _PAPER)
    picture.paste(drawn, ((picture.width - drawn.width) // 2, 0))
    picture.paste(legend, (0, drawn.height))
    return picture


def _check(image: np.ndarray, heat: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 2 or 0 in image.shape:
        found = f"{image.dtype} {image.shape}"
        raise ImageError(f"an image to draw on is uint8 (H, W) and not empty; this is {found}")
    if heat.ndim != 2 or 0 in heat.shape or not np.isfinite(heat).all():
        raise ImageError(f"a heat map is (rows, columns) of finite numbers; this is {heat.shape}")


def _edges(
    shape: tuple[int, ...], grid: tuple[int, ...], preprocessing: Preprocessing
) -> tuple[np.ndarray, np.ndarray]:
    """Return the edges of a grid's rows and columns in pixels of the image."""
    *start, height, width = place_image(shape, preprocessing)
    whole = (preprocessing.height, preprocessing.width)
    along = [
        (np.arange(n + 1) * side / n - first) * length / inner
        for n, side, first, length, inner in zip(
            grid, whole, start, shape, (height, width), strict=True
        )
    ]
    return along[0], along[1]


def _cells_of(
    shape: tuple[int, ...],
    size: tuple[int, int],
    grid: tuple[int, ...],
    preprocessing: Preprocessing,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the grid row of each pixel row of a drawing of `size`, and likewise for columns."""
    found = []
    for edges, n, length, drawn in zip(
        _edges(shape, grid, preprocessing), grid, shape, size, strict=True
    ):
        middles = (np.arange(drawn) + 0.5) * length / drawn
        found.append(np.clip(np.searchsorted(edges, middles, side="right") - 1, 0, n - 1))
    return found[0], found[1]


def _blend(grey: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Tint grey (H, W) by shares (H, W) of the scale, from -1 to 1."""
    colour = np.where(shares[:, :, None] > 0, ABNORMAL, NORMAL)
    opacity = OPACITY * np.abs(shares)[:, :, None]
    blended = (1 - opacity) * grey[:, :, None] + opacity * colour
    return np.asarray(blended + 0.5, np.float64).astype(np.uint8)


def _mark_peak(drawn: Image.Image, heat: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> None:
    peak = np.unravel_index(int(heat.argmax()), heat.shape)
    down, across = np.flatnonzero(rows == peak[0]), np.flatnonzero(columns == peak[1])
    if len(down) and len(across):  # in a padded image the peak may lie in the padding
        box = [across[0], down[0], across[-1], down[-1]]
        ImageDraw.Draw(drawn).rectangle([int(edge) for edge in box], outline=(255, 255, 255))


def _draw_legend(width: int, top: float, notes: Sequence[str]) -> Image.Image:
    lines = ["Logit per cell; the strongest for abnormal is framed", *notes, DISCLAIMER]
    height = 2 * _MARGIN + 2 * _LINE + _LINE * len(lines)
    legend = Image.new("RGB", (width, height), _PAPER)
    draw, font = ImageDraw.Draw(legend), ImageFont.load_default(_FONT_SIZE)
    # The bar is tinted like cells on mid-grey bone.
    ramp = np.tile(np.linspace(-1, 1, width - 2 * _MARGIN), (_LINE - 6, 1))
    bar = Image.fromarray(_blend(np.full(ramp.shape, 90.0), ramp))
    legend.paste(bar, (_MARGIN, _MARGIN))
    y = _MARGIN + _LINE
    words = (f"-{top:.3g} normal", "0", f"abnormal +{top:.3g}")
    for word, x, anchor in zip(
        words, (_MARGIN, width // 2, width - _MARGIN), ("la", "ma", "ra"), strict=True
    ):
        draw.text((x, y), word, fill=_INK, font=font, anchor=anchor)
    for number, line in enumerate(lines):
        draw.text((_MARGIN, y + _LINE * (number + 1)), line, fill=_INK, font=font)
    return legend


def _table(shape: tuple[int, ...], heat: np.ndarray, preprocessing: Preprocessing) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    down, across = (edges.round(2) for edges in _edges(shape, heat.shape, preprocessing))
    for row, column in np.ndindex(*heat.shape):
        edges = (across[column], down[row], across[column + 1], down[row + 1])
        value = f"{heat[row, column]:.6g}"
        writer.writerow([row, column, *(f"{edge:g}" for edge in edges), value])
    return text.getvalue().encode()


class Pictures:
    """Draws explanations of a head; the directory is created if it does not exist.

    A picture explains a single image, even if the head judges studies, and is named by
    `overlay_name`.

    Raises
    ------
    EncoderError, ModelError
        The encoder cannot be loaded, or the encoder or the head cannot be explained.
    OSError
        The directory cannot be created.
    """

    def __init__(self, directory: Path, embedder: Embedder, head: Head) -> None:
        self._explainer = Explainer(embedder.encoder, head, embedder.card.pooling)
        self._embedder, self._directory = embedder, directory
        directory.mkdir(parents=True, exist_ok=True)

    def draw(
        self,
        path: Location,
        sha256: str,
        pixels: np.ndarray,
        covariates: np.ndarray,
        probability: float,
    ) -> str | None:
        """Write the picture of an image with its numbers, and return its path.

        Parameters
        ----------
        path, sha256
            The image's file, which is read again, since the picture shows the unprepared image.
        pixels : uint8 (height, width)
            The prepared image.
        covariates : float32 (k,)
        probability : float
            Calibrated probability of abnormal, in [0, 1], for the legend.

        Returns
        -------
        str or None
            The picture's path; None if the file has changed meanwhile.
        """
        reading = read_content(
            [path], sha256, _as_it_is, self._embedder.intensity, self._embedder.limits
        )
        if reading.pixels is None:
            return None
        known = covariates[None] if len(covariates) else None
        heat = self._explainer.heat_maps(pixels[None], known)[0]
        place = self._directory / overlay_name(sha256)
        write_overlay(
            place,
            reading.pixels,
            heat,
            self._embedder.encoder.preprocessing,
            notes=(f"Probability of abnormal, calibrated: {probability:.3f}",),
        )
        return str(place)


def _as_it_is(pixels: np.ndarray) -> np.ndarray:
    return pixels
