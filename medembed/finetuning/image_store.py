"""The images that training sees, decoded once: in a file that is mapped, or as a trunk's tokens.

Augmentation keeps within what positioning and exposure vary from one radiograph to the next; a
mirrored image is another side of the body, so mirroring is only done where it is asked for. What is
done to an image follows from seed, epoch and image alone, whatever batch it is in.
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

from medembed.cache.pending import make_plan
from medembed.encoders.devices import current_gpu, free_memory, is_memory_error, on_gpu, pinned
from medembed.encoders.preprocessing import Preprocessing
from medembed.extraction.image_store import read_all
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


Progress = Callable[[int, int], None]


class Images(Protocol):
    """Gives batches of the rows that training sees."""

    def take(self, rows: np.ndarray, device: str) -> torch.Tensor:
        """Give rows, (n,) int, on a device, as `Network` takes them."""
        ...


@dataclass(frozen=True, eq=False)
class PixelImages:
    """Prepared grey images.

    Attributes
    ----------
    pixels : ndarray
        uint8 (m, height, width), each content once, see `extraction.image_store`.
    places : (n,) int64
        Where each row's pixels are.
    codes : (n,) int64
        A number of each content's own, which its variations follow from.
    """

    pixels: np.ndarray
    places: np.ndarray
    codes: np.ndarray

    def take(self, rows: np.ndarray, device: str) -> torch.Tensor:
        """Give uint8 (n, height, width); see `Images.take`."""
        return torch.from_numpy(self.pixels[self.places[rows]]).to(device)

    def vary(
        self, taken: torch.Tensor, rows: np.ndarray, *, seed: int, epoch: int, flips: bool
    ) -> torch.Tensor:
        """Give rows that were taken as they are trained on in this epoch, each in its own way."""
        variations = draw_variations(self.codes[rows], seed=seed, epoch=epoch, flips=flips)
        return augment(taken, variations)

    def of(self, kept: np.ndarray) -> "PixelImages":
        """Give the images of some of the rows, (n,) int."""
        return PixelImages(self.pixels, self.places[kept], self.codes[kept])


def read_images(
    rows: pd.DataFrame,
    image_root: Path,
    preprocessing: Preprocessing,
    directory: Path,
    *,
    limits: Limits = DEFAULT_LIMITS,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> tuple[PixelImages, pd.DataFrame]:
    """Decode the images of a manifest's rows, into a file on the disk of `directory`.

    Returns
    -------
    PixelImages
        Of all rows; black where the image failed.
    DataFrame
        `rows.FAILED_COLUMNS` of the rows whose images could not be read or decoded.

    Raises
    ------
    ManifestError, MedembedError
        As `extraction.image_store.read_all`.
    """
    contents = make_plan(rows, None).pending
    read = read_all(
        contents,
        image_root,
        preprocessing,
        limits=limits,
        directory=directory,
        remedy="Free some, or choose another --out.",
        progress=progress,
        tell=tell,
    )
    place = {content.sha256: i for i, content in enumerate(contents)}
    digests = rows["sha256"].tolist()
    places = np.array([place[digest] for digest in digests], np.int64)
    codes = np.array([int(digest[:15], 16) for digest in digests], np.int64)
    records = [
        {**read.failures[i], "image": image}
        for i, image in zip(places.tolist(), rows["image"], strict=True)
        if i in read.failures
    ]
    failed = pd.DataFrame(records, columns=[*FAILED_COLUMNS], dtype=object)
    return PixelImages(read.pixels, places, codes), failed


@dataclass(frozen=True, eq=False)
class VectorImages:
    """Pooled vectors, float32 (n, d), which stay as they are while only the head trains."""

    X: np.ndarray

    def take(self, rows: np.ndarray, device: str) -> torch.Tensor:
        """Give float32 (n, d); see `Images.take`."""
        return torch.from_numpy(self.X[rows]).to(device)


def take_ahead(
    images: Images, parts: Sequence[np.ndarray], device: str
) -> Generator[torch.Tensor, None, None]:
    """Take parts of the rows in turn, each read while the caller computes with the last one.

    On CUDA a part is read into pinned memory, from which the GPU fetches it by itself.

    Parameters
    ----------
    parts : sequence of (n,) int arrays

    Yields
    ------
    Tensor
        What `images.take` gives of each part, on the device.
    """
    gpu = current_gpu(device)

    def read(rows: np.ndarray) -> torch.Tensor:
        with on_gpu(gpu):  # of this thread, which would begin on the first
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
    """Compute what does not depend on its batch, `size` rows at once, or fewer where memory lacks.

    Yields
    ------
    ndarray
        What `compute` gives of the next rows.

    Raises
    ------
    MemoryError, RuntimeError
        Not even one row fits; `devices.is_memory_error` tells.
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
