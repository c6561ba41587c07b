"""Images of training rows, batch by batch: taken ahead, varied by augmentation, or as vectors.

Augmentation stays within the natural variation of positioning and exposure between radiographs; a
mirrored image shows the other side of the body, so mirroring is done only on request. The
augmentation of an image depends only on seed, epoch and image, not on its batch.
"""

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from torch.nn import functional

from medembed.core.locations import Location
from medembed.encoders.devices import current_gpu, free_memory, is_memory_error, on_gpu, pinned
from medembed.encoders.preprocessing import Preprocessing
from medembed.extraction.image_store import read_rows
from medembed.finetuning.data_split import FAILED_COLUMNS
from medembed.images.load import DEFAULT_LIMITS, Limits

__all__ = [
    "ROTATION",
    "SCALE",
    "SHIFT",
    "Images",
    "PixelImages",
    "VectorImages",
    "augment",
    "compute_rows",
    "draw_variations",
    "read_images",
    "take_ahead",
]

ROTATION = 10.0  # degrees
SHIFT = 0.05  # of the image's side
SCALE = 0.1
BRIGHTNESS = 0.1  # of the range of grey levels
CONTRAST = 0.1
_STREAM = 1 << 22  # of random numbers, separate from those for order and initialisation


def draw_variations(
    codes: Sequence[int] | np.ndarray, *, seed: int, epoch: int, flips: bool
) -> np.ndarray:
    """Return random augmentation parameters for each image.

    Parameters
    ----------
    codes : sequence of int
        A unique number of each image, at least 0.

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
    """Return an augmented batch, on its device; areas moved in from outside are black.

    Parameters
    ----------
    pixels : Tensor
        uint8 (n, height, width).
    variations : ndarray
        From `draw_variations`.

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
    # Maps coordinates in the result to the image, both in -1..1 from edge to edge.
    rows = (
        torch.stack([mirrored * cos, mirrored * sin * aspect, -2 * right * mirrored], dim=1),
        torch.stack([-sin / aspect, cos, -2 * down], dim=1),
    )
    shape = [len(pixels), 1, height, width]
    grid = functional.affine_grid(torch.stack(rows, dim=1), shape, align_corners=False)
    varied = functional.grid_sample(grey.clamp(0, 255)[:, None], grid, align_corners=False)
    return varied[:, 0].round().to(torch.uint8)


Progress = Callable[[int, int], None]


class Images(Protocol):
    """Provides batches of the training rows."""

    def take(self, rows: np.ndarray, device: str) -> torch.Tensor:
        """Return rows, (n,) int, on a device, in the form that `Network` takes."""
        ...


@dataclass(frozen=True, eq=False)
class PixelImages:
    """Prepared grey images.

    Attributes
    ----------
    pixels : ndarray
        uint8 (m, height, width), each content once, see `extraction.image_store`.
    places : (n,) int64
        Index of each row's pixels.
    codes : (n,) int64
        A unique number of each content, which determines its augmentation.
    """

    pixels: np.ndarray
    places: np.ndarray
    codes: np.ndarray

    def take(self, rows: np.ndarray, device: str) -> torch.Tensor:
        """Return uint8 (n, height, width); see `Images.take`."""
        return torch.from_numpy(self.pixels[self.places[rows]]).to(device)

    def vary(
        self, taken: torch.Tensor, rows: np.ndarray, *, seed: int, epoch: int, flips: bool
    ) -> torch.Tensor:
        """Return taken rows with this epoch's augmentation, individual for each image."""
        variations = draw_variations(self.codes[rows], seed=seed, epoch=epoch, flips=flips)
        return augment(taken, variations)

    def of(self, kept: np.ndarray) -> "PixelImages":
        """Return the images of some of the rows, (n,) int."""
        return PixelImages(self.pixels, self.places[kept], self.codes[kept])


def read_images(
    rows: pd.DataFrame,
    image_root: Location,
    preprocessing: Preprocessing,
    directory: Path,
    *,
    limits: Limits = DEFAULT_LIMITS,
    progress: Progress | None = None,
    on_status: Callable[[str], None] | None = None,
) -> tuple[PixelImages, pd.DataFrame]:
    """Return the decoded images of a manifest's rows, in a file on the disk of `directory`.

    Returns
    -------
    PixelImages
        Images of all rows; black if the image failed.
    DataFrame
        `rows.FAILED_COLUMNS` of the rows whose images could not be read or decoded.

    Raises
    ------
    ManifestError, MedembedError
        The images cannot be read; see `extraction.image_store.read_rows`.
    """
    read = read_rows(
        rows,
        image_root,
        preprocessing,
        limits=limits,
        directory=directory,
        remedy="Free some, or choose another --out.",
        progress=progress,
        on_status=on_status,
    )
    codes = np.array([int(sha256[:15], 16) for sha256 in rows["sha256"]], np.int64)
    failed = pd.DataFrame(read.failures, columns=[*FAILED_COLUMNS], dtype=object)
    return PixelImages(read.pixels, read.places, codes), failed


@dataclass(frozen=True, eq=False)
class VectorImages:
    """Pooled vectors, float32 (n, d), which do not change while only the head trains."""

    X: np.ndarray

    def take(self, rows: np.ndarray, device: str) -> torch.Tensor:
        """Return float32 (n, d); see `Images.take`."""
        return torch.from_numpy(self.X[rows]).to(device)


def take_ahead(
    images: Images, parts: Sequence[np.ndarray], device: str
) -> Generator[torch.Tensor, None, None]:
    """Yield parts of the rows in turn, each read while the caller computes with the previous one.

    On CUDA a part is read into pinned memory, from which the GPU copies it asynchronously.

    Parameters
    ----------
    parts : sequence of (n,) int arrays

    Yields
    ------
    Tensor
        The result of `images.take` for each part, on the device.
    """
    gpu = current_gpu(device)

    def read(rows: np.ndarray) -> torch.Tensor:
        with on_gpu(gpu):  # selected per thread, which would otherwise use the first one
            taken = images.take(rows, "cpu")
            return taken if gpu is None else pinned(taken.shape, taken.dtype).copy_(taken)

    with ThreadPoolExecutor(1, "reading") as thread:
        following = thread.submit(read, parts[0]) if parts else None
        for rows in (*parts[1:], None):
            if following is None:
                return
            taken = following.result()
            following = None if rows is None else thread.submit(read, rows)
            yield taken.to(device, non_blocking=True)


def compute_rows(
    compute: Callable[[torch.Tensor], torch.Tensor],
    images: Images,
    rows: np.ndarray,
    device: str,
    size: int,
) -> Iterator[np.ndarray]:
    """Yield batch-independent results, `size` rows at once, or fewer if memory is short.

    Yields
    ------
    ndarray
        The result of `compute` for the next rows.

    Raises
    ------
    MemoryError, RuntimeError
        Not even one row fits; see `devices.is_memory_error`.
    """
    start = 0
    while start < len(rows):
        parts = [rows[i : i + size] for i in range(start, len(rows), size)]
        try:
            with closing(take_ahead(images, parts, device)) as taking:
                for taken in taking:
                    done = compute(taken).cpu().numpy()
                    start += len(done)
                    yield done
            return
        except (MemoryError, RuntimeError) as error:
            if size == 1 or not is_memory_error(error):
                raise
        # Not inside the handler: the error's frames hold the tensors that are to be freed.
        size = max(1, min(size, len(rows) - start) // 2)
        free_memory()
