"""Draw the synthetic images on which the demo's encoder is trained and measured."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medembed.core.system import count_cores, end_with_parent
from medembed.demo.anatomy import REGIONS
from medembed.demo.synthetic import KINDS, PROJECTIONS, render

__all__ = ["IMAGE_SIZE", "N_PATCHES", "TrainingSet", "draw_training_set", "shrink"]

IMAGE_SIZE = 128  # pixels per side of the encoder's input
N_PATCHES = 16  # patches a side: 8 pixels each
_RENDER_SIZE = 256
_CHUNK = 250  # images per task, so that processes stay busy to the end


@dataclass(frozen=True)
class TrainingSet:
    """Images with all labels that the encoder is trained on.

    `images` uint8 (n, 128, 128); `patches` bool (n, 16, 16), the finding's mask max-pooled to
    patches; `kinds` int64 (n,), 0 normal, else 1 + index into `KINDS`; `regions` int64 (n,).
    """

    images: NDArray[np.uint8]
    patches: NDArray[np.bool_]
    kinds: NDArray[np.int64]
    regions: NDArray[np.int64]


def draw_training_set(
    seeds: range, *, severities: tuple[float, float] = (0.25, 1.0), jobs: int | None = None
) -> TrainingSet:
    """Return one rendered image per seed: half normal, with evenly mixed kinds, regions and views.

    An image whose finding has no visible pixel (behind the border, or too faint) counts as normal.

    Parameters
    ----------
    seeds
        Seeds to use, each for one image; the result depends on nothing else.
    severities
        Range from which a finding's severity is drawn evenly.
    jobs
        Processes to use; by default one per core. 1 renders in this process.
    """
    jobs = jobs or count_cores()
    chunks = [seeds[i : i + _CHUNK] for i in range(0, len(seeds), _CHUNK)]
    draw = partial(_draw_chunk, severities=severities)
    if jobs == 1 or len(chunks) == 1:
        parts = [draw(chunk) for chunk in chunks]
    else:
        # Spawned, not forked: the caller may already run torch's threads.
        with ProcessPoolExecutor(
            jobs, mp_context=get_context("spawn"), initializer=end_with_parent
        ) as pool:
            parts = list(pool.map(draw, chunks))
    return TrainingSet(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.patches for part in parts]),
        np.concatenate([part.kinds for part in parts]),
        np.concatenate([part.regions for part in parts]),
    )


def _draw_chunk(seeds: range, severities: tuple[float, float]) -> TrainingSet:
    images = np.empty((len(seeds), IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    patches = np.empty((len(seeds), N_PATCHES, N_PATCHES), np.bool_)
    kinds = np.zeros(len(seeds), np.int64)
    regions = np.zeros(len(seeds), np.int64)
    for i, seed in enumerate(seeds):
        choice = np.random.default_rng((seed, 10))  # a stream that the renderer does not use
        region, kind, projection = choice.integers((len(REGIONS), len(KINDS), len(PROJECTIONS)))
        abnormal, severity = choice.random() < 0.5, float(choice.uniform(*severities))
        rendered = render(
            seed,
            REGIONS[region],
            KINDS[kind] if abnormal else None,
            severity,
            projection=int(projection),
            size=_RENDER_SIZE,
        )
        images[i] = shrink(rendered.pixels)
        patches[i] = _pool_mask(rendered.mask)
        kinds[i] = 1 + kind if patches[i].any() else 0
        regions[i] = region
    return TrainingSet(images, patches, kinds, regions)


def shrink(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return pixels resized to the encoder's input, exactly as by its processor (PIL, bilinear)."""
    resized = Image.fromarray(pixels).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def _pool_mask(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    cell = len(mask) // N_PATCHES
    cells = mask.reshape(N_PATCHES, cell, N_PATCHES, cell)
    return np.asarray(cells.any(axis=(1, 3)))
