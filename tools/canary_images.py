"""Draw the four images of extraction's canary by formula; nothing in them comes from a person.

Kept so that the files can be regenerated (`python -m tools.canary_images DIR`). A change to any of
them requires a new `CANARY_VERSION`, since caches hold embeddings of the old ones.

Every image has detail from one pixel up to a quarter of its side, so that for any input size of a
tower some of it lies where Pillow's filters differ; no side has one of the usual input sizes, at
which resizing would have no effect. The four differ in brightness, contrast and texture as much as
possible: the distances between their embeddings are the canary's yardstick, and the longer it is,
the smaller is bfloat16's rounding in comparison.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["IMAGES", "bones", "checks", "haze", "main", "rings"]

Array = NDArray[np.float64]


def bones() -> Image.Image:
    """Draw two bright shafts with trabeculae and wires on black: 8-bit grey, 611 × 443."""
    y, x = _grid(611, 443)
    grey = np.zeros_like(y)
    for middle, lean, half in ((0.30, 0.10, 0.11), (0.68, -0.07, 0.16)):
        across = (x / 443 - middle - lean * (y / 611 - 0.5)) / (half * (1 + (y / 611 - 0.5) ** 2))
        shaft = np.sqrt(np.clip(1 - across**2, 0, 1)) - 0.7 * np.sqrt(
            np.clip(0.55 - across**2, 0, 1)
        )
        grey = np.maximum(grey, np.where(np.abs(across) < 1, 0.35 + shaft, 0))
    mesh = sum(
        np.sin(2 * np.pi * (x * np.cos(turn) + y * np.sin(turn)) / wave)
        for wave, turn in ((2.7, 0.4), (5.3, 1.9), (9.1, 2.6), (17.0, 1.1), (41.0, 0.2))
    )
    grey *= 1 + 0.16 * mesh
    for number, width in enumerate((1, 2, 3, 5, 8, 13)):
        wire = np.abs(x - 60 * (number + 1) - 0.25 * (y - 305)) < width / 2
        grey = np.where(wire & (np.abs(y - 305) < 200), 1.0, grey)
    return Image.fromarray(_levels(grey, 16).astype(np.uint8))


def haze() -> Image.Image:
    """Draw a bright field with faint clouds and dark cracks: colour JPEG, 523 × 677."""
    y, x = _grid(523, 677)
    grey = 0.75 + 0.12 * np.sin(x / 61 + np.sin(y / 47)) * np.cos(y / 83 - np.sin(x / 39))
    for number, width in enumerate((2, 3, 5, 9, 14, 22, 30)):
        bend = 40 * np.sin(x / (23 + 9 * number)) + 0.35 * x
        away = np.abs(y - 60 - 75 * number - bend / 3)
        grey -= 0.75 * np.clip(width / 2 + 0.5 - away, 0, 1)
    tint = np.stack([grey, grey * 0.98, grey * 0.93], axis=-1)
    return Image.fromarray(np.floor(np.clip(tint, 0, 1) * 255 + 0.5).astype(np.uint8))


def rings() -> Image.Image:
    """Draw a zone plate, finer outwards, around a bright core: 16-bit grey, 331 × 461."""
    y, x = _grid(331, 461)
    square = ((x - 230) ** 2 + (y - 165) ** 2) / 331
    grey = 0.15 + 0.15 * np.cos(np.pi * square * 0.3) + 0.7 * np.exp(-square / 6)
    return Image.fromarray((_levels(grey, 6) * 257).astype(np.uint16))


def checks() -> Image.Image:
    """Draw checkerboards, mostly fine, in pale and dark, partly see-through: RGBA, 467 × 701."""
    y, x = _grid(467, 701)
    sides = np.array((2, 3, 2, 3, 5, 2, 3, 8, 21, 55))
    side = sides[(x // 71 + y // 117 * 3).astype(int) % len(sides)]
    on = (x // side + y // side) % 2 == 0
    image = np.zeros((467, 701, 4), np.uint8)
    image[..., :3] = np.where(on[..., None], (255, 244, 228), (16, 24, 40))
    image[..., 3] = np.where(y % 117 < 100, 255, 128)
    return Image.fromarray(image)


IMAGES: Mapping[str, tuple[Callable[[], Image.Image], Mapping[str, Any]]] = {
    "bones.png": (bones, {"optimize": True}),
    "haze.jpg": (haze, {"quality": 90, "optimize": True}),
    "rings.png": (rings, {"optimize": True}),
    "checks.png": (checks, {"optimize": True}),
}
"""File name -> the function that draws it, and Pillow's options for writing it."""


def main() -> None:
    """Write the files into the directory given on the command line."""
    parser = argparse.ArgumentParser(description="Draw the images of extraction's canary.")
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    for name, (draw, options) in IMAGES.items():
        draw().save(directory / name, **options)


def _grid(height: int, width: int) -> tuple[Array, Array]:
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    return y, x


def _levels(grey: Array, count: int) -> Array:
    """Return 0..1 rounded to `count` of the levels 0..255: fewer levels make smaller files."""
    step = np.floor(np.clip(grey, 0, 1) * (count - 1) + 0.5)
    return np.floor(step * 255 / (count - 1) + 0.5)


if __name__ == "__main__":
    main()
