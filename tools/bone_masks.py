"""Say where in a synthetic radiograph the bones lie, without drawing it.

Where its finding lies is the mask that `synthetic.render` gives.
"""

import numpy as np
from numpy.typing import NDArray

from medembed.demo.anatomy import frame_bone, project, reach_of, tube
from medembed.demo.cohort import DemoView
from medembed.demo.synthetic import draw_pose

__all__ = ["locate_bones", "pool_mask"]


def locate_bones(view: DemoView, *, size: int = 256) -> NDArray[np.bool_]:
    """Return the pixels under which there is bone, bool (size, size), as `render_view` places it.

    All bones count, with those on which no finding is ever put; the collimator's border, which may
    hide some, is not taken away. Of a displaced fragment it is the place before the break.
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
    """Return which cells of a grid hold any of a mask's pixels, bool (rows, columns).

    The grid lies over the whole mask, as over an image that was stretched to the encoder's size;
    a pixel between two cells belongs to both.
    """
    edges = [
        [(k * length // n, -(-(k + 1) * length // n)) for k in range(n)]
        for length, n in zip(mask.shape, grid, strict=True)
    ]
    return np.array([[mask[t:b, x:y].any() for x, y in edges[1]] for t, b in edges[0]])
