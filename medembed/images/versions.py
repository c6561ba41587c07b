"""The version of the decoder, and whether rows made by two versions are compatible.

The version is one number, and raising it changed the decoding of few files. Whether a file may
join rows of an older version is therefore decided per file from its bytes (`Radiograph.since`): an
8-bit grey PNG or JPEG has the same pixels under versions 1 and 2.

Changes in version 2 to files that version 1 decoded:

- an alpha channel that is 0 everywhere is ignored; it used to make the image black;
- a DICOM's window and rescale in functional groups are applied; they used to be ignored;
- images of one grey level, and DICOM whose unsigned values exceed Bits Stored, are refused.

A file that version 1 refused has no older pixels to compare with and counts as unchanged.
"""

import struct
from typing import Any

__all__ = ["FIRST_VERSION", "IMAGES_VERSION", "go_together", "may_have_changed", "why_changed"]

FIRST_VERSION = 1
IMAGES_VERSION = 2
"""Part of every cache's spec: raise it whenever any decoded pixel changes."""

# Bytes per pixel below which an image may have a single grey level: such a JPEG takes at most 0.018
# (6 bits for each block of 64 samples, chroma halved), such a PNG 0.001; and bytes of headers.
ONE_GREY, HEADERS = 1 / 40, 1024
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}


def go_together(first: Any, second: Any) -> bool:
    """Return whether rows of two versions are compatible for files whose pixels are equal."""
    known = range(FIRST_VERSION, IMAGES_VERSION + 1)
    return all(type(version) is int and version in known for version in (first, second))


def why_changed(since: int, version: Any, what: str) -> str:
    """Return why an image cannot join rows of an older version, or nothing if it can.

    Parameters
    ----------
    since : int
        The image's `Radiograph.since`.
    version : int or anything else
        Version of the rows; a value that is not a number is not one of ours, and is left to the
        comparison of specs.
    what : str
        The holder or reader of these rows, used as the subject of a sentence.
    """
    if type(version) is not int or since <= version:
        return ""
    return (
        f"is decoded differently since images_version {since}, and {what} is of images_version "
        f"{version}"
    )


def may_have_changed(head: bytes, size: int) -> bool:
    """Return whether version 2 may refuse or change a file that version 1 decoded.

    Only the first bytes are examined. A PNG without alpha or a JPEG can be affected only if it has
    a single grey level, and is then small.

    Parameters
    ----------
    head : bytes
        The first bytes, a few thousand.
    size : int
        Size of the whole file in bytes.
    """
    if head.startswith(b"\x89PNG\r\n\x1a\n") and len(head) >= 26:
        width, height, _, colour_type = struct.unpack_from(">IIBB", head, 16)
        return colour_type in (3, 4, 6) or size < HEADERS + ONE_GREY * width * height
    if head.startswith(b"\xff\xd8\xff"):
        return size < HEADERS + ONE_GREY * _pixels_of_jpeg(head)
    return True


def _pixels_of_jpeg(head: bytes) -> int:
    """Return the pixels that the frame header declares (ITU T.81, B.2.2), 0 if it comes later."""
    position = 2
    while position + 9 <= len(head) and head[position] == 0xFF:
        marker, length = struct.unpack_from(">BH", head, position + 1)
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", head, position + 5)
            return int(width * height)
        position += 2 + length
    return 0
