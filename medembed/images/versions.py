"""Which version of decoding pixels come from, and whether rows of two versions go together.

The version is one number, and few files are decoded otherwise since it was raised. So whether a
file may join rows of an older version is decided for each file by its own bytes
(`Radiograph.since`): an 8-bit grey PNG or JPEG has the same pixels under versions 1 and 2.

What version 2 changed of files that version 1 decoded:

- an alpha channel that is 0 everywhere is ignored, where it made the image black;
- a DICOM's window and rescale in functional groups are applied, where they were passed over;
- images of one grey, and DICOM whose unsigned values need more than Bits Stored, are refused.

A file that version 1 refused has no older pixels to differ from, and counts as unchanged.
"""

import struct
from typing import Any

__all__ = ["FIRST_VERSION", "IMAGES_VERSION", "go_together", "may_have_changed", "why_changed"]

FIRST_VERSION = 1
IMAGES_VERSION = 2
"""Part of every cache's spec: raise it whenever any decoded pixel changes."""

# Bytes of a file for each pixel, below which all may be of one grey: such a JPEG takes 0.018 at
# most (6 bits for each block of 64 samples, chroma halved), such a PNG 0.001; and of its headers.
ONE_GREY, HEADERS = 1 / 40, 1024
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}


def go_together(first: Any, second: Any) -> bool:
    """Tell whether rows of two versions may stand together where each file's pixels are equal."""
    known = range(FIRST_VERSION, IMAGES_VERSION + 1)
    return all(type(version) is int and version in known for version in (first, second))


def why_changed(since: int, version: Any, what: str) -> str:
    """Say why an image cannot join rows of an older version; empty where it can.

    Parameters
    ----------
    since : int
        `Radiograph.since` of the image.
    version : int or anything else
        That of the rows; what is no number is none of ours, and is left to whoever compares specs.
    what : str
        What holds or reads these rows, as the subject of a sentence.
    """
    if type(version) is not int or since <= version:
        return ""
    return (
        f"is decoded otherwise since images_version {since}, and {what} is of images_version "
        f"{version}"
    )


def may_have_changed(head: bytes, size: int) -> bool:
    """Tell by its first bytes whether a file that version 1 decoded may be none of version 2.

    A PNG without alpha and a JPEG can only if they are of one grey, and then they are small.

    Parameters
    ----------
    head : bytes
        The first bytes, some thousand.
    size : int
        Of the whole file, in bytes.
    """
    if head.startswith(b"\x89PNG\r\n\x1a\n") and len(head) >= 26:
        width, height, _, colour_type = struct.unpack_from(">IIBB", head, 16)
        return colour_type in (3, 4, 6) or size < HEADERS + ONE_GREY * width * height
    if head.startswith(b"\xff\xd8\xff"):
        return size < HEADERS + ONE_GREY * _pixels_of_jpeg(head)
    return True


def _pixels_of_jpeg(head: bytes) -> int:
    """Count the pixels that the frame header names (ITU T.81, B.2.2); 0 where it comes later."""
    position = 2
    while position + 9 <= len(head) and head[position] == 0xFF:
        marker, length = struct.unpack_from(">BH", head, position + 1)
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", head, position + 5)
            return int(width * height)
        position += 2 + length
    return 0
