"""Files of images: their suffixes, and one that is read in order wherever it lies."""

import io
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["IMAGE_SUFFIXES", "StreamFile"]

IMAGE_SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".dcm", ".dicom"),
}
"""Of files that are taken for images."""


@dataclass(frozen=True)
class StreamFile:
    """A file that holds images, read in order: on a disk, in a bucket, or at a hub.

    Attributes
    ----------
    name : str
        What the names of its images begin with.
    place : str
        Where it is, for messages.
    open : callable
        Returns the file, opened for reading.
    size : int
        Bytes; -1 if they are not known.
    split : str
        The data set's own name of the split that the file belongs to; "" if it has none.
    """

    name: str
    place: str
    open: Callable[[], io.BufferedIOBase]
    size: int = -1
    split: str = ""
