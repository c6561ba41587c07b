"""Lay one bone on the image grid and say how much of it a ray meets."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medembed.demo.anatomy import Bone

__all__ = ["Array", "Frame", "frame_bone", "reach_of", "tube"]

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Frame:
    """The part of the image around one bone.

    `box` is where it lies; `along` runs from 0 at the bone's start to 1 at its end, `across` is
    the signed distance from the axis; `across`, `length` (of the axis) and `pixel` are in half
    image sides.
    """

    box: tuple[slice, slice]
    along: Array
    across: Array
    length: float
    pixel: float


def reach_of(bone: Bone) -> float:
    """Return how far from its axis a projected bone may be seen, in half image sides."""
    return bone.width * (1.3 + max(bone.flare)) + abs(bone.bow)


def frame_bone(bone: Bone, size: int, reach: float) -> Frame | None:
    """Return the pixels within `reach` of a projected bone, None where all lie outside."""
    ends = np.array((bone.start[:2], bone.end[:2]))
    low = np.floor((ends.min(0) - reach + 1) * size / 2).astype(int).clip(0, size)
    high = np.ceil((ends.max(0) + reach + 1) * size / 2).astype(int).clip(0, size)
    if np.any(high <= low):
        return None
    pixel = 2 / size
    x = (np.arange(low[0], high[0], dtype=np.float32) + np.float32(0.5)) * np.float32(pixel) - 1
    y = (np.arange(low[1], high[1], dtype=np.float32) + np.float32(0.5)) * np.float32(pixel) - 1
    axis = ends[1] - ends[0]
    length = max(float(np.sqrt(np.sum(axis**2))), 1e-3)
    dx, dy = (np.float32(value / length) for value in axis)
    x, y = x - np.float32(ends[0, 0]), y - np.float32(ends[0, 1])
    along: Array = (x * dx)[None, :] + (y * dy)[:, None]
    across: Array = (y * dx)[:, None] - (x * dy)[None, :]
    along = along / np.float32(length)
    if bone.bow:
        across -= np.float32(4 * bone.bow) * along * (1 - along)
    box = (slice(low[1], high[1]), slice(low[0], high[0]))
    return Frame(box, along, across, length, pixel)


def _half_width(bone: Bone, along: Array) -> Array:
    near, far = np.maximum(1 - along * 4, 0), np.maximum(along * 4 - 3, 0)
    near, far = np.minimum(near, 1.25), np.minimum(far, 1.25)
    flare = np.float32(bone.flare[0]) * near * near + np.float32(bone.flare[1]) * far * far
    width: Array = np.float32(bone.width) * (1 + flare)
    return width


def tube(bone: Bone, frame: Frame, texture: Array) -> Array:
    """Return what a ray meets in `bone`: cortex is dense, marrow mostly not."""
    along, width = frame.along, _half_width(bone, frame.along)
    beyond = np.maximum(np.abs(along - np.float32(0.5)) - np.float32(0.5), 0)
    beyond *= np.float32(1.7 * frame.length)
    radius = (frame.across**2 + beyond**2) / (width * width)
    middle = (2 * along - 1) ** 2
    marrow = np.float32(bone.marrow) + np.float32(0.92 - bone.marrow) * np.minimum(middle**2, 1)
    outer = np.sqrt(np.maximum(1 - radius, 0))
    inner = np.sqrt(np.maximum(marrow * marrow - radius, 0))
    met: Array = outer - inner * (np.float32(0.66) + np.float32(0.1) * texture[frame.box])
    return met
