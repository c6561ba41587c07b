"""Thumbnails of radiographs for a page, by the hash of their bytes."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from medembed.core.errors import ManifestError
from medembed.dataset.manifest import Manifest, existing_root, image_path
from medembed.images.load import read_content
from medembed.report.gallery import Thumbnail

__all__ = ["SIDE", "make_thumbnails"]

SIDE = 320
"""Pixels of the longer side."""
QUALITY = 85


def make_thumbnails(
    manifest: Manifest, image_root: str | Path, wanted: Sequence[str], *, with_names: bool = False
) -> dict[str, Thumbnail]:
    """Return grey JPEG thumbnails by SHA-256, of those images that are there and still the same.

    Parameters
    ----------
    manifest : Manifest
        Says where an image lies.
    image_root : str or Path
        What its paths are relative to.
    wanted : sequence of str
        SHA-256 of the files' bytes, hex.
    with_names : bool
        Whether a thumbnail carries the path of its image, which may name a patient.

    Raises
    ------
    PathNotFoundError
        `image_root` is not a directory.

    Notes
    -----
    An image that the manifest does not have, that lies outside the root, that cannot be read or
    decoded, or whose bytes are not the manifest's is left out: the page counts what it shows.
    """
    root, rows = existing_root(image_root), manifest.rows
    rows = rows[rows["sha256"].isin(list(wanted))].drop_duplicates("sha256")
    found = {}
    for sha256, name in zip(rows["sha256"], rows["image"], strict=True):
        try:
            reading = read_content([image_path(root, name)], sha256, _shrink)
        except ManifestError:  # leads out of the root
            continue
        if reading.pixels is not None:
            found[sha256] = _encode(reading.pixels, name if with_names else None)
    return found


def _shrink(pixels: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(pixels)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def _encode(pixels: np.ndarray, name: str | None) -> Thumbnail:
    output = io.BytesIO()
    Image.fromarray(pixels).save(output, "JPEG", quality=QUALITY)
    height, width = pixels.shape
    return Thumbnail(output.getvalue(), width, height, name)
