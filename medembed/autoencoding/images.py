"""The images of `train`, read, hashed, prepared, and parted by patient; never those of `test`."""

import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from medembed.dataset.manifest import Manifest, image_path
from medembed.dataset.reading import Content, Reading
from medembed.dataset.splits import split_patients
from medembed.encoders.preprocessing import Preprocessing
from medembed.errors import ManifestError, MedembedError, PathNotFoundError, TrainingDataError
from medembed.extraction.decoder import open_slots
from medembed.extraction.decoding import Decoders
from medembed.machine import count_cores

__all__ = ["HELD_OUT", "TrainingImages", "draw_held_out", "read_images"]

HELD_OUT = 0.1
"""Share of the studies of `train` that early stopping looks at and nothing is learned from."""
_AHEAD = 32  # images per decoder process that may be begun and not yet taken


@dataclass(frozen=True, eq=False)
class TrainingImages:
    """Prepared images, each content once.

    Parameters
    ----------
    pixels : ndarray
        uint8 (n, height, width), mapped from a temporary file that ends with it.
    learned, held_out : ndarray
        int, disjoint and neither empty: the images to learn from, and those of other patients.
    failures : list of dict
        `image`, `sha256`, `stage`, `reason` of each content that could not be read or decoded.
    digest : str
        SHA-256 (hex) over the hashes of both parts: the same for the same images.
    """

    pixels: np.ndarray
    learned: np.ndarray
    held_out: np.ndarray
    failures: list[dict[str, str]]
    digest: str


def draw_held_out(rows: pd.DataFrame, seed: int) -> np.ndarray:
    """Choose the patients that early stopping looks at, as `split_patients` does, without labels.

    Parameters
    ----------
    rows : pandas.DataFrame
        Those of `train`, with columns `patient` and `study`.

    Returns
    -------
    ndarray of bool, (n_rows,)
        Whether the row's patient is held out: about `HELD_OUT` of the studies, of one patient at
        least.

    Raises
    ------
    TrainingDataError
        There is one patient only, or none.
    """
    n_patients = rows["patient"].nunique()
    if n_patients < 2:
        raise TrainingDataError(
            f"split train holds {len(rows)} images of {n_patients} patients, and an autoencoder "
            "needs two patients: one to learn from and one to stop by. Add patients to split "
            "train, or correct the manifest's split column."
        )
    blind = rows.assign(label=pd.array([pd.NA] * len(rows), dtype="Int8"), region="")
    parts = split_patients(blind, fraction=max(HELD_OUT, 1 / n_patients), seed=seed)
    held_out: np.ndarray = parts == "test"
    return held_out


def read_images(
    manifest: Manifest,
    image_root: Path,
    preprocessing: Preprocessing,
    *,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> TrainingImages:
    """Read what a manifest has in `train`, as `extract` does, into a temporary file.

    A content of several rows is held out only if all their patients are.

    Parameters
    ----------
    progress : callable, optional
        Called as progress(done, total) with distinct contents.
    tell : callable, optional
        Called with what is being done, and the size of the temporary file.

    Raises
    ------
    PathNotFoundError
        None of the images is below the root.
    ManifestError
        Files whose bytes are not the manifest's, all of them at once.
    TrainingDataError
        Too few patients, or of one of the two parts no image could be read.
    MedembedError
        There is no room for the temporary file.
    """
    rows = manifest.rows[manifest.rows["split"] == "train"]
    contents, is_held_out = _list_contents(rows, draw_held_out(rows, seed))
    _refuse_empty_root(contents, image_root)
    pixels = _make_room((len(contents), preprocessing.height, preprocessing.width))
    if tell:
        tell(f"Reading into {pixels.nbytes / 1e6:,.1f} MB")
    read = _Read(pixels)
    n_decoders = min(count_cores(), len(contents))
    with Decoders(n_decoders, preprocessing) as decoders:
        for pair in decoders.read(contents, image_root, _AHEAD * n_decoders):
            if pair is None:
                continue
            read.take(*pair)
            if progress:
                progress(read.n_seen, len(contents))
    _refuse_other_bytes(read.other_bytes)
    return _part(read, contents, is_held_out)


class _Read:
    """What reading has given so far: pixels in the first rows of the file, and where they go."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        self.places: list[int] = []  # of the contents whose pixels are there
        self.failures: list[dict[str, str]] = []
        self.other_bytes: list[str] = []
        self.n_seen = 0

    def take(self, content: Content, reading: Reading) -> None:
        if reading.pixels is not None:
            self.pixels[len(self.places)] = reading.pixels
            self.places.append(self.n_seen)
        elif reading.stage is None:
            self.other_bytes.append(
                f"{content.images[0]}: sha256 {reading.other_sha256}, the manifest says "
                f"{content.sha256}"
            )
        else:
            self.failures.append(
                {
                    "image": content.images[0],
                    "sha256": content.sha256,
                    "stage": reading.stage,
                    "reason": reading.reason,
                }
            )
        self.n_seen += 1


def _list_contents(rows: pd.DataFrame, is_held_out: np.ndarray) -> tuple[list[Content], np.ndarray]:
    by_content = rows.assign(held_out=is_held_out).groupby("sha256", sort=False)
    found = by_content.agg(images=("image", tuple), held_out=("held_out", "all"))
    named = zip(found.index, found["images"], strict=True)
    contents = [Content(str(sha256), images) for sha256, images in named]
    return contents, found["held_out"].to_numpy(dtype=bool)


def _part(read: _Read, contents: Sequence[Content], is_held_out: np.ndarray) -> TrainingImages:
    places = np.array(read.places, dtype=np.int64)
    parts = {"learn from": ~is_held_out[places], "stop by": is_held_out[places]}
    for purpose, chosen in parts.items():
        if not chosen.any():
            raise TrainingDataError(
                f"of the patients of split train to {purpose} no image could be read: "
                f"{len(read.failures)} of {len(contents)} images failed, the first "
                f"{_describe(read.failures)}. Mend these files, or add patients."
            )
    digest = hashlib.sha256()
    for place in read.places:
        digest.update(f"{contents[place].sha256} {is_held_out[place]}\n".encode())
    return TrainingImages(
        read.pixels[: len(places)],
        np.flatnonzero(parts["learn from"]),
        np.flatnonzero(parts["stop by"]),
        read.failures,
        digest.hexdigest(),
    )


def _describe(failures: list[dict[str, str]]) -> str:
    if not failures:
        return "none"
    first = failures[0]
    return f"{first['image']} ({first['stage']}: {first['reason']})"


def _refuse_empty_root(contents: Sequence[Content], root: Path) -> None:
    images = (image for content in contents for image in content.images)
    if not any(image_path(root, image).is_file() for image in images):
        raise PathNotFoundError(
            f"none of the {len(contents)} images of split train is below {root}, such as "
            f"{contents[0].images[0]}: is it the --image-root that the manifest was built from?"
        )


def _refuse_other_bytes(problems: list[str]) -> None:
    if problems:
        raise ManifestError(
            f"{len(problems)} image(s) hold other bytes than the manifest says, and nothing was "
            "trained. Restore these files, or build the manifest again:",
            problems,
        )


def _make_room(shape: tuple[int, int, int]) -> np.ndarray:
    """Map a file without a name, all of it reserved: a lack of room later would be a bus error."""
    n_bytes = math.prod(shape)
    with tempfile.TemporaryFile() as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, n_bytes)
            file.truncate(n_bytes)
        except OSError as error:
            raise MedembedError(
                f"no room for {n_bytes / 1e6:,.0f} MB of prepared images in "
                f"{tempfile.gettempdir()}: {error.strerror or error}. Set TMPDIR to a larger disk, "
                "or give a smaller --size."
            ) from error
        return open_slots(file.fileno(), shape)
