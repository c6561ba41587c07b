"""The images that training sees, decoded once: in a file that is mapped, or as a trunk's tokens."""

import copy
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch

from medembed.cache.plan import Contents, make_plan
from medembed.dataset.manifest import image_path
from medembed.encoders.preprocessing import Preprocessing
from medembed.errors import ManifestError, PathNotFoundError, RunError
from medembed.extraction.decoding import Decoders
from medembed.finetuning.augmentation import augment, draw_variations
from medembed.machine import count_cores, free_bytes

__all__ = ["FAILED_COLUMNS", "Images", "PixelImages", "VectorImages", "refuse_empty_root"]

FAILED_COLUMNS = ("image", "sha256", "stage", "reason")
_AHEAD = 64  # images that are read ahead of the one that is taken

Progress = Callable[[int, int], None]


class Images(Protocol):
    """Gives batches of the rows that training sees."""

    def take(self, rows: np.ndarray, device: str) -> torch.Tensor:
        """Give rows, (n,) int, on a device, as `Network` takes them."""
        ...

    def take_varied(
        self, rows: np.ndarray, device: str, *, seed: int, epoch: int, flips: bool
    ) -> torch.Tensor:
        """Give rows as they are trained on in this epoch, each varied in its own way."""
        ...


class PixelImages(AbstractContextManager["PixelImages"]):
    """Prepared grey images in a temporary file of the run's directory.

    The file has no name, so that it ends with the process.

    Parameters
    ----------
    rows : DataFrame
        Columns `image` and `sha256` of the manifest's rows.
    image_root : Path
        Where they are.
    preprocessing : Preprocessing
        The encoder's.
    directory : Path
        On the disk that the file is to be on.

    Attributes
    ----------
    failed : DataFrame
        `FAILED_COLUMNS` of the rows whose images could not be read or decoded; set by `read`.
    """

    def __init__(
        self, rows: pd.DataFrame, image_root: Path, preprocessing: Preprocessing, directory: Path
    ) -> None:
        self._rows, self._root, self._preprocessing = rows, image_root, preprocessing
        plan = make_plan(rows, None)
        self._contents: Contents = plan.pending
        self.shape = (len(self._contents), preprocessing.height, preprocessing.width)
        self._directory = directory
        self.failed = pd.DataFrame(columns=[*FAILED_COLUMNS], dtype=object)

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        return int(np.prod(self.shape))

    def __enter__(self) -> "PixelImages":
        free = free_bytes(self._directory)
        if free < self.n_bytes:
            raise RunError(
                f"the decoded images would take {self.n_bytes / 1e6:,.1f} MB beside the run, and "
                f"the disk of {self._directory} has {free / 1e6:,.1f} MB free. Free some, or "
                "choose another --out."
            )
        self._file = tempfile.TemporaryFile(dir=self._directory)
        try:
            if hasattr(os, "posix_fallocate"):  # a lack later would be a bus error
                os.posix_fallocate(self._file.fileno(), 0, self.n_bytes)
            self._file.truncate(self.n_bytes)
            self._pixels = np.memmap(self._file, np.uint8, "r+", shape=self.shape)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del self._pixels
        self._file.close()

    def read(self, progress: Progress | None = None) -> None:
        """Decode all images.

        Raises
        ------
        ManifestError
            Files hold other bytes than the manifest says; names them.
        MedembedError
            The decoders die, whatever the image.
        """
        failed: dict[str, tuple[str, str]] = {}
        others = []
        n, done = len(self._contents), 0
        with Decoders(min(count_cores(), max(1, n)), self._preprocessing) as decoders:
            for pair in decoders.read(self._contents, self._root, _AHEAD):
                if pair is None:
                    continue
                content, reading = pair
                if reading.pixels is not None:
                    self._pixels[done] = reading.pixels
                elif reading.stage is None:
                    others.append(
                        f"{content.images[0]}: sha256 {reading.other_sha256}, the manifest says "
                        f"{content.sha256}"
                    )
                else:
                    failed[content.sha256] = (reading.stage, reading.reason)
                done += 1
                if progress is not None:
                    progress(done, n)
        if others:
            raise ManifestError(
                f"{len(others)} image(s) hold other bytes than the manifest says. Restore these "
                "files, or build the manifest again:",
                others,
            )
        self._find_places(failed)

    def take(self, rows: np.ndarray, device: str) -> torch.Tensor:
        """Give uint8 (n, height, width); see `Images.take`."""
        return torch.from_numpy(self._pixels[self._places[rows]]).to(device)

    def take_varied(
        self, rows: np.ndarray, device: str, *, seed: int, epoch: int, flips: bool
    ) -> torch.Tensor:
        """Give uint8 (n, height, width); see `Images.take_varied`."""
        codes = self._codes[rows]
        variations = draw_variations(codes, seed=seed, epoch=epoch, flips=flips)
        return augment(self.take(rows, device), variations)

    def of(self, kept: np.ndarray) -> "PixelImages":
        """Give the images of some of the rows, (n,) int, from the same file."""
        chosen = copy.copy(self)
        chosen._places, chosen._codes = self._places[kept], self._codes[kept]
        return chosen

    def _find_places(self, failed: dict[str, tuple[str, str]]) -> None:
        place = {content.sha256: i for i, content in enumerate(self._contents)}
        digests = self._rows["sha256"].tolist()
        self._places = np.array([place[digest] for digest in digests], np.int64)
        self._codes = np.array([int(digest[:15], 16) for digest in digests], np.int64)
        records = [
            (image, digest, *failed[digest])
            for image, digest in zip(self._rows["image"], digests, strict=True)
            if digest in failed
        ]
        self.failed = pd.DataFrame(records, columns=[*FAILED_COLUMNS], dtype=object)


@dataclass(frozen=True, eq=False)
class VectorImages:
    """Pooled vectors, float32 (n, d), which stay as they are while only the head trains."""

    X: np.ndarray

    def take(self, rows: np.ndarray, device: str) -> torch.Tensor:
        """Give float32 (n, d); see `Images.take`."""
        return torch.from_numpy(self.X[rows]).to(device)

    def take_varied(self, rows: np.ndarray, device: str, **_: Any) -> torch.Tensor:
        """Give the same: an image that was varied would have other vectors."""
        raise NotImplementedError("pooled vectors cannot be varied")


def refuse_empty_root(root: Path, images: Sequence[str]) -> None:
    """Refuse a root that is not there, or holds none of the images.

    Raises
    ------
    PathNotFoundError
        So it is.
    """
    if not root.is_dir():
        raise PathNotFoundError(f"image root {root} is not a directory: give --image-root DIR")
    if not any(image_path(root, image).is_file() for image in images):
        raise PathNotFoundError(
            f"none of the {len(images)} images to train on is below {root}, such as {images[0]}: "
            "is it the --image-root that the manifest was built from?"
        )
