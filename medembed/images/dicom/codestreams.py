"""Check that a DICOM's compressed frame is complete and matches its transfer syntax.

Codecs pad missing data, a JPEG with grey and a JPEG 2000 with a blurred image, and allocate
whatever size a codestream claims. Size, components and the end of the stream are therefore read
here first. Flipped bits inside coded data go undetected: none of these formats has a checksum.
"""

import re
import struct
from dataclasses import dataclass

from medembed.core.errors import ImageError
from medembed.images.container_checks import check_jpeg
from medembed.images.types import refuse_size

__all__ = ["FAMILIES", "Codestream", "read_codestream"]

# PS3.5 A.4: transfer syntaxes, and the frame header (SOF) that their JPEG streams have.
FAMILIES: dict[str, tuple[str, set[int]]] = {
    "1.2.840.10008.1.2.4.50": ("JPEG", {0xC0}),
    "1.2.840.10008.1.2.4.51": ("JPEG", {0xC0, 0xC1}),
    "1.2.840.10008.1.2.4.57": ("JPEG", {0xC3}),
    "1.2.840.10008.1.2.4.70": ("JPEG", {0xC3}),
    "1.2.840.10008.1.2.4.80": ("JPEG-LS", {0xF7}),
    "1.2.840.10008.1.2.4.81": ("JPEG-LS", {0xF7}),
    "1.2.840.10008.1.2.4.90": ("JPEG 2000", set()),
    "1.2.840.10008.1.2.4.91": ("JPEG 2000", set()),
    "1.2.840.10008.1.2.4.201": ("JPEG 2000", set()),
    "1.2.840.10008.1.2.4.202": ("JPEG 2000", set()),
    "1.2.840.10008.1.2.4.203": ("JPEG 2000", set()),
}
_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
# In a JPEG-LS scan a byte after 0xff has its highest bit clear (ISO 14495-1, A.1), unless a marker.
_MARKER_IN_LS_SCAN = re.compile(rb"\xff([\x80-\xcf\xd8-\xfe])", re.DOTALL)
_JP2 = b"\0\0\0\x0cjP  "
_MAX_TILES = 65_535  # ISO 15444-1, A.4.2
_SIZ, _SOT, _EOC = b"\xff\x51", b"\xff\x90", b"\xff\xd9"


@dataclass(frozen=True)
class Codestream:
    """The contents of a frame's own header.

    Attributes
    ----------
    width, height, components, bits : int
        Size, samples per pixel, and bits of a sample.
    end : int
        Offset of the marker that ends the image.
    """

    width: int
    height: int
    components: int
    bits: int
    end: int


def read_codestream(frame: bytes, syntax: str) -> Codestream:
    """Read the header of a frame and walk to its end.

    Parameters
    ----------
    frame : bytes
        All fragments joined.
    syntax : str
        Transfer syntax UID, one of `FAMILIES`.

    Raises
    ------
    ImageError
        The frame has another format, is damaged, or ends early.
    """
    family, headers = FAMILIES[syntax]
    try:
        if family == "JPEG 2000":
            return _read_j2k(frame)
        return _read_jpeg(frame, family, headers)
    except (struct.error, IndexError) as error:
        raise ImageError(f"the DICOM's {family} data end in their header: truncated") from error


def _read_jpeg(frame: bytes, family: str, headers: set[int]) -> Codestream:
    if not frame.startswith(b"\xff\xd8"):
        raise ImageError(f"the DICOM's pixel data are not {family}, as its transfer syntax says")
    position, size = 2, (0, 0, 0, 0)
    while True:  # from segment to segment, up to the first scan (ITU T.81, B.1.1)
        marker, length = frame[position + 1], int.from_bytes(frame[position + 2 : position + 4])
        if frame[position] != 0xFF or (marker != 0xFF and length < 2):
            raise ImageError(f"the DICOM's {family} data are damaged before their first scan")
        if marker in _FRAME_HEADERS:
            if marker not in headers:
                raise ImageError(
                    f"the DICOM's transfer syntax says {family} of another process than its data"
                )
            size = struct.unpack_from(">BHHB", frame, position + 4)
        position += 1 if marker == 0xFF else 2 + length
        if marker == 0xDA:
            break
    bits, height, width, components = size
    end = check_jpeg(frame) if family == "JPEG" else _end_of_jpeg_ls(frame, position)
    return Codestream(width, height, components, bits, end)


def _end_of_jpeg_ls(frame: bytes, position: int) -> int:
    while True:
        found = _MARKER_IN_LS_SCAN.search(frame, position)
        if found is None:
            raise ImageError("the DICOM's JPEG-LS data have no end-of-image marker: truncated")
        if found[1] == b"\xd9":
            return found.start()
        length = int.from_bytes(frame[found.end() : found.end() + 2])
        position = found.end() + max(2, length)


def _read_j2k(frame: bytes) -> Codestream:
    """Read SIZ, then step over all tile-parts to EOC (ISO 15444-1, A.4 to A.5.1)."""
    boxes = frame.find(b"jp2c") + 4 if frame.startswith(_JP2) else 0  # some wrap it into a file
    start = frame.find(b"\xff\x4f" + _SIZ, boxes, boxes + 4)
    if start < 0:
        raise ImageError("the DICOM's pixel data are not JPEG 2000, as its transfer syntax says")
    x, y, x0, y0, tile_x, tile_y, tile_x0, tile_y0, components, depth = struct.unpack_from(
        ">8IHB", frame, start + 8
    )
    refuse_size(x - x0, y - y0, "DICOM's JPEG 2000")
    n_tiles = _n_tiles(x - tile_x0, tile_x) * _n_tiles(y - tile_y0, tile_y)
    if not 0 < n_tiles < _MAX_TILES:
        raise ImageError("the DICOM's JPEG 2000 data are damaged: they name no tiles")
    position = start + 2
    while frame[position : position + 2] != _SOT:
        if frame[position] != 0xFF:
            raise ImageError("the DICOM's JPEG 2000 data are damaged in their header")
        position += 2 + struct.unpack_from(">H", frame, position + 2)[0]
    seen: set[int] = set()
    while frame[position : position + 2] == _SOT:
        tile, length = struct.unpack_from(">HI", frame, position + 4)
        seen.add(tile)
        position = position + length if length else frame.rfind(_EOC)
        if length and length < 14:
            break
    if frame[position : position + 2] != _EOC or seen != set(range(n_tiles)):
        raise ImageError("the DICOM's JPEG 2000 data end before their last tile: truncated")
    return Codestream(x - x0, y - y0, components, (depth & 0x7F) + 1, position)


def _n_tiles(size: int, tile: int) -> int:
    return -(-size // tile) if tile else 0
