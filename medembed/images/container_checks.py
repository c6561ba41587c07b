"""Check that a PNG or JPEG container is complete, because Pillow accepts some damaged files.

Pillow skips the checksums of a PNG's image data, leaves rows black when the compressed stream
ends early, and fills in mid-grey when a JPEG's scan is cut short but an end marker follows.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from medembed.core.errors import ImageError
from medembed.images.types import refuse_size

__all__ = [
    "PNG_SIGNATURE",
    "PngFacts",
    "check_jpeg",
    "check_png",
    "check_png_rows",
    "is_ancillary",
    "padded_jpeg",
]

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # PNG colour type -> samples per pixel
# Adam7: first row, first column, row step, column step of each pass (PNG, section 8.2)
_PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2))
_ADAM7 = (*_PASSES, (1, 0, 2, 1))
# Registered chunks that decoding does not require (PNG, 11.3, and its extensions): damage to them
# is tolerated. A chunk with an unknown name is not: it may be an IDAT whose name is damaged.
_UNNEEDED = set(
    b"cHRM gAMA iCCP sBIT sRGB cICP mDCV cLLI bKGD hIST pHYs sPLT eXIf tIME tEXt zTXt iTXt "
    b"oFFs pCAL sCAL sTER gIFg gIFx gIFt dSIG".split()
)
# In a scan 0xff is followed by 0 (stuffing), a restart marker, fill, or a real marker.
_MARKER_IN_SCAN = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])", re.DOTALL)
# What may follow a scan: DHT, EOI, SOS, DQT, DNL, DRI, APPn, COM (ITU T.81, figure B.2).
_AFTER_SCAN = {0xC4, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD, *range(0xE0, 0xF0), 0xFE}
_STANDALONE = {0x01, *range(0xD0, 0xD8)}
MAX_SCANS = 100
"""Most scans of a progressive JPEG: each covers all pixels, and encoders write about ten. libtiff
sets the same limit (LIBTIFF_JPEG_MAX_ALLOWED_SCAN_NUMBER)."""
MOST_SURPLUS = 1 << 20  # bytes beyond the last row that are tolerated, as in libpng
_JUNK = b"\x5a\xa5\x3c\x69" * 2048


@dataclass(frozen=True)
class PngFacts:
    """What a PNG's chunks say about its samples.

    Attributes
    ----------
    bits : int
        Bits per sample.
    colour_type : int
        0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGB with alpha.
    colour_key : tuple of int or None
        The sample values that mean "transparent" (tRNS of colour types 0 and 2).
    interlaced : bool
        Whether rows come in seven passes.
    n_bytes : int
        Size of the inflated image data.
    """

    bits: int
    colour_type: int
    colour_key: tuple[int, ...] | None
    interlaced: bool
    n_bytes: int


def check_png(data: bytes) -> PngFacts:
    """Check every chunk and its checksum, but not that the image data reach the last row.

    Bytes after IEND are tolerated, and so is damage to a chunk that decoding does not require.

    Raises
    ------
    ImageError
        The PNG is truncated, damaged or animated, or exceeds `types.MAX_PIXELS`.
    """
    header: tuple[int, ...] | None = None
    key: bytes | None = None
    for kind, body in _png_chunks(data):
        if kind == b"IHDR" and header is None:
            header = _png_header(body)
        elif kind == b"acTL" and len(body) == 8 and struct.unpack(">I", body[:4])[0] > 1:
            raise ImageError("the PNG is animated; only still images are read")
        elif kind == b"tRNS":
            key = body
    if header is None:
        raise ImageError("the PNG has no header chunk")
    _, _, bits, colour_type, interlace = header
    colour_key = _colour_key(key, bits, colour_type)
    return PngFacts(bits, colour_type, colour_key, bool(interlace), _png_length(*header))


def check_png_rows(data: bytes, facts: PngFacts) -> None:
    """Inflate a PNG's image data to check that they are complete.

    Raises
    ------
    ImageError
        The data end early, run on for more than 1 MiB, or are damaged.
    """
    inflated = _Inflated()
    for kind, body in _png_chunks(data):
        if kind == b"IDAT":
            inflated.feed(body, facts.n_bytes + MOST_SURPLUS)
    if inflated.count < facts.n_bytes:
        raise ImageError("the PNG's image data end before its last row: the file is truncated")


def is_ancillary(kind: bytes) -> bool:
    """Return whether a PNG can be displayed without chunks of this kind (PNG, 5.4)."""
    return kind.isalpha() and bool(kind[0] & 0x20)


def check_jpeg(data: bytes) -> int:
    """Walk a JPEG's markers to the end of the image.

    Bytes after the end marker are tolerated. Flipped bits inside a scan go undetected unless they
    form a marker, because JPEG has no checksum.

    Returns
    -------
    int
        Offset of the end-of-image marker.

    Raises
    ------
    ImageError
        The end marker is missing (truncated), a marker is misplaced (damaged), or there are more
        than `MAX_SCANS` scans.
    """
    position, n_scans = 2, 0
    while True:
        position = data.find(b"\xff", position)
        if position < 0 or position + 1 >= len(data):
            raise ImageError("the JPEG is truncated: it has no end-of-image marker")
        marker = data[position + 1]
        if marker == 0xD9:
            return position
        position += 2 if marker not in (0x00, 0xFF) else 1
        if marker in (0x00, 0xFF) or marker in _STANDALONE:
            continue
        if position + 2 > len(data):
            raise ImageError("the JPEG is truncated: it has no end-of-image marker")
        position += max(2, int.from_bytes(data[position : position + 2], "big"))
        if marker == 0xDA:
            n_scans += 1
            if n_scans > MAX_SCANS:
                raise ImageError(f"the JPEG has more than {MAX_SCANS} scans, which take for ever")
            position = _end_of_scan(data, position)


def padded_jpeg(data: bytes, end: int) -> bytes:
    """Return a JPEG with meaningless scan data inserted before the end marker at `end`.

    A decoder that already has all blocks ignores the insertion; one that lacks blocks draws it.
    If the two decoded images differ, the scan ends early.
    """
    return data[:end] + _JUNK + data[end:]


class _Inflated:
    """Counts the bytes that a zlib stream inflates to, without keeping them."""

    def __init__(self) -> None:
        self.count = 0
        self._stream = zlib.decompressobj()

    def feed(self, body: bytes, most: int) -> None:
        if self._stream.eof:
            return
        try:
            while body and not self._stream.eof:
                self.count += len(self._stream.decompress(body, 1 << 18))
                body = self._stream.unconsumed_tail
                if self.count > most:  # a few megabytes can inflate for minutes
                    raise ImageError("the PNG's image data go on far beyond its last row")
        except zlib.error as error:
            raise ImageError(f"the PNG's image data are damaged: {error}") from error


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = len(PNG_SIGNATURE)
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            break
        kind = data[position + 4 : position + 8]
        body = data[position + 8 : end]
        (checksum,) = struct.unpack_from(">I", data, end)
        if kind not in _UNNEEDED and zlib.crc32(body, zlib.crc32(kind)) != checksum:
            name = kind.decode("ascii", "replace")
            raise ImageError(f"the PNG is damaged: checksum of its {name!r} chunk is wrong")
        if kind == b"IEND":
            return
        yield kind, body
        position = end + 4
    raise ImageError("the PNG is truncated: it ends before its IEND chunk")


def _png_header(body: bytes) -> tuple[int, ...]:
    if len(body) != 13:
        raise ImageError("the PNG's header chunk is damaged")
    width, height, bits, colour_type, _, _, interlace = struct.unpack(">IIBBBBB", body)
    if not width or not height or colour_type not in _CHANNELS or bits not in (1, 2, 4, 8, 16):
        raise ImageError("the PNG's header chunk is damaged")
    refuse_size(width, height, "PNG")
    return width, height, bits, colour_type, interlace


def _png_length(width: int, height: int, bits: int, colour_type: int, interlace: int) -> int:
    """Return the number of bytes of a complete inflated image: every row and its filter byte."""
    passes = _ADAM7 if interlace else ((0, 0, 1, 1),)
    total = 0
    for row, column, row_step, column_step in passes:
        n_rows = max(0, -(-(height - row) // row_step))
        n_columns = max(0, -(-(width - column) // column_step))
        if n_columns:
            total += n_rows * (1 + (n_columns * bits * _CHANNELS[colour_type] + 7) // 8)
    return total


def _colour_key(body: bytes | None, bits: int, colour_type: int) -> tuple[int, ...] | None:
    n_samples = {0: 1, 2: 3}.get(colour_type)
    if body is None or n_samples is None:
        return None
    if len(body) != 2 * n_samples:
        raise ImageError("the PNG's transparency chunk is damaged")
    return tuple(value & ((1 << bits) - 1) for value in struct.unpack(f">{n_samples}H", body))


def _end_of_scan(data: bytes, position: int) -> int:
    found = _MARKER_IN_SCAN.search(data, position)
    if found is None:
        raise ImageError("the JPEG is truncated: it has no end-of-image marker")
    if found[1][0] not in _AFTER_SCAN:
        raise ImageError(f"the JPEG is damaged: marker ff{found[1].hex()} in its image data")
    return found.start()
