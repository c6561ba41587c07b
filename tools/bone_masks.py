"""Locate the bones in a synthetic radiograph without drawing it.

The mask of its finding is returned by `synthetic.render`.
"""

import numpy as np
from numpy.typing import NDArray

from medembed.demo.anatomy import frame_bone, project, reach_of, tube
from medembed.demo.cohort import DemoView
from medembed.demo.synthetic import draw_pose

__all__ = ["locate_bones", "pool_mask"]


def locate_bones(view: DemoView, *, size: int = 256) -> NDArray[np.bool_]:
    """Return the pixels that show bone, bool (size, size), in the geometry of `render_view`.

    All bones count, including those that never have a finding; the collimator's border, which may
    hide some, is not subtracted. A displaced fragment counts at its place before the break.
    """
    skeleton, pose = draw_pose(view.seed, view.region, view.projection)
    covered = np.zeros((size, size), np.bool_)
    for bone in skeleton.bones:
        flat = project(bone, pose)
        frame = frame_bone(flat, size, reach_of(flat))
        if frame is not None:
            nothing = np.zeros((size, size), np.float32)
            covered[frame.box] |= tube(flat, frame, nothing) > 0
    return covered


def pool_mask(mask: NDArray[np.bool_], grid: tuple[int, int]) -> NDArray[np.bool_]:
    """Return which cells of a grid contain any of a mask's pixels, bool (rows, columns).

    The grid covers the whole mask, as for an image that was stretched to the encoder's size; a
    pixel between two cells belongs to both.
    """
    edges = [
        [(k * length // n, -(-(k + 1) * length // n)) for k in range(n)]
        for length, n in zip(mask.shape, grid, strict=True)
    ]
    return np.array([[mask[t:b, x:y].any() for x, y in edges[1]] for t, b in edges[0]])
