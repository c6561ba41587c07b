"""The images of a manifest's rows, read, hashed and prepared once, into a mapped file."""

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd

from medembed.cache.pending import make_plan
from medembed.core import object_store
from medembed.core.errors import ManifestError, MedembedError, PathNotFoundError
from medembed.core.locations import BucketPath, Location
from medembed.core.system import choose_processes, default_decoders, reserve
from medembed.dataset.manifest import existing_images, image_path
from medembed.encoders.preprocessing import Preprocessing
from medembed.extraction.decode_pool import DECODER_BYTES, Decoders
from medembed.extraction.decode_worker import open_slots
from medembed.images.load import DEFAULT_LIMITS, Content, Limits

__all__ = [
    "PreparedImages",
    "describe_other_bytes",
    "read_rows",
    "refuse_empty_root",
]

_AHEAD = 32  # images per decoder process that may be in progress or waiting


@dataclass(frozen=True, eq=False)
class PreparedImages:
    """Prepared images of rows, each content once.

    Attributes
    ----------
    pixels : ndarray
        uint8 (m, height, width), one per content in the order of its first row, mapped from an
        unnamed file that is freed together with the array; black for images that failed.
    sha256 : list of str
        The contents.
    places : ndarray
        int64 (n,): the index of each row's content.
    failures : list of dict
        `image`, `sha256`, `stage`, `reason` of each row whose image could not be read or decoded,
        in the order of rows.
    """

    pixels: np.ndarray
    sha256: list[str]
    places: np.ndarray
    failures: list[dict[str, str]]

    @property
    def is_read(self) -> np.ndarray:
        """Whether each content could be read and decoded, bool (m,)."""
        return ~np.isin(self.sha256, [failure["sha256"] for failure in self.failures])


def read_rows(
    rows: pd.DataFrame,
    image_root: Location,
    preprocessing: Preprocessing,
    *,
    limits: Limits = DEFAULT_LIMITS,
    directory: Path | None = None,
    remedy: str,
    progress: Callable[[int, int], None] | None = None,
    on_status: Callable[[str], None] | None = None,
) -> PreparedImages:
    """Return the images of rows, read and prepared as by `extract`, in a temporary file.

    Parameters
    ----------
    rows : DataFrame
        Rows of a manifest, with `image` and a complete `sha256`.
    limits : Limits
        Limits on size and time beyond which an image counts as failed.
    directory : Path, optional
        A directory on the disk to write the file to; by default that of temporary files.
    remedy : str
        What to do if the file does not fit, a full sentence.
    progress : callable, optional
        Called as progress(done, total) with distinct contents.
    on_status : callable, optional
        Called with a message that gives the size of the file.

    Raises
    ------
    ManifestError
        Files whose bytes differ from the manifest's, all listed at once; or a path leads out of
        the root.
    MedembedError
        There is no room for the file, or the decoders die on every image.
    """
    contents = make_plan(rows, None).pending
    shape = (len(contents), preprocessing.height, preprocessing.width)
    pixels = _make_room(shape, directory, remedy)
    if on_status:
        on_status(f"Reading into {pixels.nbytes / 1e6:,.1f} MB")
    failures: dict[str, dict[str, str]] = {}
    others, done = [], 0
    n_decoders = choose_processes(
        None, "--decoders", DECODER_BYTES, MedembedError, default=default_decoders()
    )
    n_decoders = min(n_decoders, max(1, len(contents)))
    with Decoders(n_decoders, preprocessing, limits=limits) as decoders:
        for pair in decoders.read(contents, image_root, _AHEAD * n_decoders):
            if pair is None:
                continue
            content, reading = pair
            if reading.pixels is not None:
                pixels[done] = reading.pixels
            elif reading.stage is None:
                others.append(describe_other_bytes(content, str(reading.other_sha256)))
            else:
                failures[content.sha256] = {"stage": reading.stage, "reason": reading.reason}
            done += 1
            if progress:
                progress(done, len(contents))
    if others:
        raise ManifestError(
            f"{len(others)} image(s) hold other bytes than the manifest says, and nothing was "
            "trained. Restore these files, or build the manifest again:",
            others,
        )
    place = {content.sha256: i for i, content in enumerate(contents)}
    return PreparedImages(
        pixels,
        list(place),
        np.array([place[sha256] for sha256 in rows["sha256"]], np.int64),
        [
            {"image": image, "sha256": sha256, **failures[sha256]}
            for image, sha256 in zip(rows["image"], rows["sha256"], strict=True)
            if sha256 in failures
        ],
    )


def describe_other_bytes(content: Content, found: str) -> str:
    """Return a line which reports that a file's SHA-256, `found`, differs from the manifest's."""
    return f"{', '.join(content.images)}: sha256 {found}, the manifest says {content.sha256}"


def refuse_empty_root(root: Location, images: Iterable[str], n_images: int, purpose: str) -> None:
    """Refuse a root that does not exist or contains none of the images.

    Parameters
    ----------
    root : Path or BucketPath
        The image root.
    images : iterable of str
        The images' paths in the manifest; iterated only until one is found.
    n_images : int
        Number of images.
    purpose : str
        What the images are for, such as "to embed".

    Raises
    ------
    PathNotFoundError
        The root or every image below it is missing.
    """
    existing_images(root)
    first, images = None, iter(images)
    while some := list(islice(images, object_store.AHEAD if isinstance(root, BucketPath) else 1)):
        first = first or some[0]
        if _has_one(root, some):
            return
    raise PathNotFoundError(
        f"none of the {n_images} images {purpose} is below {root}, such as {first}: "
        "is it the --image-root that the manifest was built from?"
    )


def _has_one(root: Location, images: Sequence[str]) -> bool:
    if not isinstance(root, BucketPath):
        return any(image_path(root, image).is_file() for image in images)
    paths = [image_path(root, image) for image in images]
    if object_store.object_exists(paths[0]):
        return True
    with ThreadPoolExecutor(object_store.AHEAD) as pool:
        return any(pool.map(object_store.object_exists, paths[1:]))


def _make_room(shape: tuple[int, int, int], directory: Path | None, remedy: str) -> np.ndarray:
    n_bytes = math.prod(shape)
    with tempfile.TemporaryFile(dir=directory) as file:
        try:
            reserve(file.fileno(), n_bytes)
        except OSError as error:
            where = directory or tempfile.gettempdir()
            raise MedembedError(
                f"no room for {n_bytes / 1e6:,.0f} MB of prepared images in {where}: "
                f"{error.strerror or error}. {remedy}"
            ) from error
        return open_slots(file.fileno(), shape)
