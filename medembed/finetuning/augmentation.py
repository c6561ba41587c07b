"""Vary radiographs while they are trained on: a little turned, shifted, scaled, brighter, starker.

Within what positioning and exposure vary from one radiograph to the next; a mirrored image is
another side of the body, so mirroring is only done where it is asked for. What is done to an image
follows from seed, epoch and image alone, whatever batch it is in.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

__all__ = ["ROTATION", "SCALE", "SHIFT", "augment", "draw_variations"]

ROTATION = 10.0  # degrees
SHIFT = 0.05  # of the image's side
SCALE = 0.1
BRIGHTNESS = 0.1  # of the range of grey levels
CONTRAST = 0.1
_STREAM = 1 << 22  # of random numbers, apart from those of order and start


def draw_variations(
    codes: Sequence[int] | np.ndarray, *, seed: int, epoch: int, flips: bool
) -> np.ndarray:
    """Draw what is done to each image.

    Parameters
    ----------
    codes : sequence of int
        A number of each image's own, at least 0.

    Returns
    -------
    ndarray
        float32 (n, 7): angle in radians, shift right and down in sides, factor of size, added
        brightness, factor of contrast, 1 or -1 (mirrored).
    """
    drawn = np.stack(
        [np.random.default_rng([seed, _STREAM, epoch, int(code)]).random(7) for code in codes]
    )
    even = 2 * drawn - 1
    return np.column_stack(
        [
            math.radians(ROTATION) * even[:, 0],
            SHIFT * even[:, 1],
            SHIFT * even[:, 2],
            1 + SCALE * even[:, 3],
            BRIGHTNESS * even[:, 4],
            1 + CONTRAST * even[:, 5],
            np.where(flips & (drawn[:, 6] < 0.5), -1.0, 1.0),
        ]
    ).astype(np.float32)


def augment(pixels: torch.Tensor, variations: np.ndarray) -> torch.Tensor:
    """Vary a batch on its device; what is turned or shifted in from outside is black.

    Parameters
    ----------
    pixels : Tensor
        uint8 (n, height, width).
    variations : ndarray
        Of `draw_variations`.

    Returns
    -------
    Tensor
        uint8 (n, height, width).
    """
    angle, right, down, size, brightness, contrast, mirrored = (
        torch.from_numpy(np.ascontiguousarray(column)).to(pixels.device) for column in variations.T
    )
    grey = pixels.float()
    mean = grey.mean(dim=(1, 2), keepdim=True)
    grey = (grey - mean) * contrast[:, None, None] + mean + 255 * brightness[:, None, None]
    height, width = pixels.shape[1:]
    cos, sin, aspect = torch.cos(angle) / size, torch.sin(angle) / size, height / width
    # From a place in the result to one in the image, both in -1..1 from edge to edge.
    rows = (
        torch.stack([mirrored * cos, mirrored * sin * aspect, -2 * right * mirrored], dim=1),
        torch.stack([-sin / aspect, cos, -2 * down], dim=1),
    )
    shape = [len(pixels), 1, height, width]
    grid = functional.affine_grid(torch.stack(rows, dim=1), shape, align_corners=False)
    varied = functional.grid_sample(grey.clamp(0, 255)[:, None], grid, align_corners=False)
    return varied[:, 0].round().to(torch.uint8)
