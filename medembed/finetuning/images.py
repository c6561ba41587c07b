"""The images that training sees, decoded once: in a file that is mapped, or as a trunk's tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import torch

from medembed.cache.plan import make_plan
from medembed.dataset.reading import DEFAULT_LIMITS, Limits
from medembed.encoders.preprocessing import Preprocessing
from medembed.extraction.prepared import read_all
from medembed.finetuning.augmentation import augment, draw_variations
from medembed.finetuning.rows import FAILED_COLUMNS

__all__ = ["Images", "PixelImages", "VectorImages", "read_images"]

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
        uint8 (m, height, width), each content once, see `extraction.prepared`.
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

    def take_varied(
        self, rows: np.ndarray, device: str, *, seed: int, epoch: int, flips: bool
    ) -> torch.Tensor:
        """Give rows as they are trained on in this epoch, each varied in its own way."""
        variations = draw_variations(self.codes[rows], seed=seed, epoch=epoch, flips=flips)
        return augment(self.take(rows, device), variations)

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
        As `extraction.prepared.read_all`.
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
