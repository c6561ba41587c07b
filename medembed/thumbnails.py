"""Thumbnails of radiographs for a page, by the hash of their bytes."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from medembed.dataset.images import decode_image
from medembed.dataset.manifest import Manifest, existing_root, image_path
from medembed.errors import ImageError
from medembed.results.gallery import Thumbnail

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
    An image that the manifest does not have, that cannot be read or decoded, or whose bytes are
    not the manifest's is left out: the page counts what it shows.
    """
    root, rows = existing_root(image_root), manifest.rows
    rows = rows[rows["sha256"].isin(list(wanted))].drop_duplicates("sha256")
    found = {}
    for sha256, name in zip(rows["sha256"], rows["image"], strict=True):
        try:
            data = image_path(root, name).read_bytes()
        except OSError:
            continue
        if hashlib.sha256(data).hexdigest() == sha256:
            try:
                found[sha256] = _shrink(data, name if with_names else None)
            except ImageError:
                continue
    return found


def _shrink(data: bytes, name: str | None) -> Thumbnail:
    picture = Image.fromarray(decode_image(data).pixels)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    output = io.BytesIO()
    picture.save(output, "JPEG", quality=QUALITY)
    return Thumbnail(output.getvalue(), picture.width, picture.height, name)
