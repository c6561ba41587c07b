"""The result that every image decoder returns, and the limits that apply to all of them."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops

from medembed.core.errors import ImageError
from medembed.images.versions import FIRST_VERSION

__all__ = ["MAX_PIXELS", "Radiograph", "channels_differ", "refuse_one_grey", "refuse_size"]

MAX_PIXELS = 80_000_000
"""A 35 x 43 cm film digitised at 20 dots per mm has 60 million; below Pillow's own limit."""


@dataclass(frozen=True)
class Radiograph:
    """One decoded image.

    Attributes
    ----------
    pixels : ndarray
        uint8 (H, W), 0 black.
    colour : bool
        Whether the file's channels differed and were reduced to luminance.
    notes : tuple of str
        Parts of the file that were ignored as implausible: an orientation, a window. The notes
        quote no value of the file, so that equal ones can be counted.
    since : int
        The `images_version` that first produced these pixels; see `images.versions`.
    """

    pixels: np.ndarray
    colour: bool
    notes: tuple[str, ...] = ()
    since: int = FIRST_VERSION


def refuse_size(width: int, height: int, kind: str) -> None:
    """Raise ImageError if an image of a `kind` is empty or larger than `MAX_PIXELS`."""
    if width < 1 or height < 1:
        raise ImageError(f"the {kind} is {width} x {height}: it holds no pixels")
    if width * height > MAX_PIXELS:
        megapixels = f"{width * height / 1e6:.0f} megapixels"
        raise ImageError(f"{width} x {height} is {megapixels}; the limit is {MAX_PIXELS / 1e6:.0f}")


def refuse_one_grey(pixels: np.ndarray) -> None:
    """Raise ImageError if all pixels, uint8 (H, W), are equal: the file then shows nothing."""
    grey = pixels[0, 0]
    middle = pixels[len(pixels) // 2]  # differs in nearly every radiograph, and is soon compared
    if (middle == grey).all() and (pixels == grey).all():
        name = {0: " (black)", 255: " (white)"}.get(int(grey), "")
        reason = f"all pixels have the same grey, {grey}{name}: the file shows nothing"
        raise ImageError(reason, since=2)


def channels_differ(picture: Image.Image) -> bool:
    """Return whether an RGB picture holds colour."""
    red, green, blue = picture.split()
    pairs = (ImageChops.difference(red, green), ImageChops.difference(green, blue))
    return any(pair.getbbox() is not None for pair in pairs)
