"""Strip a PNG, JPEG or TIFF to what decoding its pixels requires, and read its orientation.

Comments, colour profiles, resolutions, EXIF, XMP and private tags change no pixel here, but a
reader that parses them all rejects an image whose profile is broken or large. Pillow is therefore
handed the file without them. Only the orientation is read from them first, within bounds.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from medembed.core.errors import ImageError
from medembed.images.container_checks import PNG_SIGNATURE, is_ancillary
from medembed.images.orientation import (
    TURNS,
    Directory,
    orientation_of,
    read_directory,
    read_header,
)

__all__ = ["Bare", "bare_jpeg", "bare_png", "bare_tiff"]

MAX_TEXT = 1 << 20  # bytes of EXIF or XMP that are inflated, as Pillow does
MAX_PAGES = 64  # of a TIFF, thumbnails and masks included
# TIFF 6.0 and its supplements: what says how samples are stored and what they mean.
_TIFF_TAGS = {
    *(256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 280, 281, 284, 292, 293, 317, 320),
    *(322, 323, 324, 325, 332, 338, 339, 340, 341, 347, *range(512, 522), 529, 530, 532),
    *(32995, 32997, 32998, 50674),  # Matteing, ImageDepth, TileDepth, LercParameters
}
_NEW_SUBFILE, _SUBFILE, _ORIENTATION, _XMP = 254, 255, 274, 700
_ASIDE = 0b101  # of NewSubfileType: a reduced copy, a transparency mask
_REDUCED = 2  # of SubfileType, which NewSubfileType replaced
_EXIF, _XAP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_RAW_EXIF, _PNG_XMP = b"Raw profile type exif", b"XML:com.adobe.xmp"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_DAMAGED = b"\0"  # in place of EXIF that is there, and that nobody can read


@dataclass(frozen=True)
class Bare:
    """A file stripped to what decoding its pixels requires.

    Attributes
    ----------
    data : bytes
        A complete file in the original format.
    orientation : int or None
        EXIF orientation 1 to 8 that `data` no longer carries; 1 if the file has none, None if it
        has one that cannot be read.
    """

    data: bytes
    orientation: int | None = 1


def bare_png(data: bytes) -> Bare:
    """Return a PNG that `check_png` has passed without its ancillary chunks, except tRNS.

    An APNG's animation control is dropped as well, so the still image that every PNG holds is read.
    """
    whole, kept, begin, exif, xmp = memoryview(data), [], 0, None, None
    for kind, start, end in _png_chunks(data):
        if not is_ancillary(kind) or kind == b"tRNS":
            continue
        kept.append(whole[begin:start])
        begin = end
        if kind == b"eXIf":
            exif = data[start + 8 : end - 4] if _is_intact(data, start, end) else _DAMAGED
        elif kind in _TEXTS:
            keyword = data[start + 8 : start + 8 + 80].split(b"\0", 1)[0]
            if keyword == _RAW_EXIF and exif is None:
                exif = _from_hex(_text(kind, data[start + 8 : end - 4]))
            elif keyword == _PNG_XMP:
                xmp = _text(kind, data[start + 8 : end - 4]) or xmp
    kept.append(whole[begin:])
    return Bare(b"".join(kept) if begin else data, orientation_of(exif, xmp))


def bare_jpeg(data: bytes) -> Bare:
    """Return a JPEG without the comments and application segments before its first scan.

    Complete JFIF and Adobe segments are kept, because they define the components.
    """
    whole, kept, begin, exif, xmp = memoryview(data), [], 0, None, None
    for marker, start, end in _jpeg_segments(data):
        body = data[start + 4 : end]
        if marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 14:
            continue
        if marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            continue
        kept.append(whole[_marker(data, begin) : start])
        begin = end
        if marker == 0xE1 and body.startswith(_EXIF):
            exif = body if exif is None else exif + body[len(_EXIF) :]
        elif marker == 0xE1 and body.startswith(_XAP):
            xmp = body[len(_XAP) :]
    if not begin:
        return Bare(data, orientation_of(exif, xmp))
    kept.append(whole[_marker(data, begin) :])
    return Bare(b"".join(kept), orientation_of(exif, xmp))


def _marker(data: bytes, begin: int) -> int:
    """Return the offset of the next marker, if any: no stray bytes may directly follow SOI."""
    return max(begin, data.find(b"\xff", begin)) if begin else 0


def bare_tiff(data: bytes) -> Bare:
    """Return a one-page TIFF with only the tags that decoding requires.

    The page is the only one that is neither a thumbnail nor a mask.

    Raises
    ------
    ImageError
        The file holds more than one picture, or only thumbnails and masks.
    """
    header = read_header(data)
    page = _choose_page(data)
    if header is None or page is None:
        return Bare(data)  # Pillow says what is wrong
    turned = page.integer(_ORIENTATION)
    orientation: int | None = 1
    keep = _TIFF_TAGS
    if not page.has(_ORIENTATION):
        orientation = orientation_of(None, page.content(_XMP, data, MAX_TEXT))
    elif turned not in TURNS:
        orientation, keep = None, _TIFF_TAGS - {_ORIENTATION}
    bare = page.written(keep)
    start, end = page.start, page.start + len(bare)
    offset = struct.pack(header.order + header.word, page.start)
    whole = memoryview(data)
    parts: list[bytes | memoryview] = [whole[: header.size - len(offset)], offset]
    parts += [whole[header.size : start], bare, whole[end:]]
    return Bare(b"".join(parts), orientation)


def _choose_page(data: bytes) -> Directory | None:
    """Return the one page to read, or None if the first page cannot be read at all."""
    header = read_header(data)
    real: list[Directory] = []
    aside: list[Directory] = []
    seen: set[int] = set()
    offset = header.first if header else 0
    while header and offset:
        page = None if offset in seen else read_directory(data, offset, header)
        if page is None or not page.is_whole:
            if not seen:
                return None
            raise ImageError("the TIFF's pages cannot all be found: it is truncated or damaged")
        seen.add(offset)
        (aside if _is_aside(page) else real).append(page)
        if len(real) > 1:
            raise ImageError("the TIFF holds more than one picture; only still images are read")
        if len(seen) > MAX_PAGES:
            raise ImageError(f"the TIFF has more than {MAX_PAGES} pages; one picture is read")
        offset = page.next
    if not real and len(aside) > 1:
        raise ImageError("the TIFF's pages are all thumbnails or masks of an image that it lacks")
    return next(iter(real + aside), None)


def _is_aside(page: Directory) -> bool:
    new = page.integer(_NEW_SUBFILE)
    if new is not None:
        return bool(new & _ASIDE)
    return page.integer(_SUBFILE) == _REDUCED


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield each chunk's kind, where it starts, and where its checksum ends."""
    position = len(PNG_SIGNATURE)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IEND":
            return
        yield kind, position, position + 12 + length
        position += 12 + length


def _is_intact(data: bytes, start: int, end: int) -> bool:
    return zlib.crc32(data[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end])


def _text(kind: bytes, body: bytes) -> bytes:
    """Return the text of a text chunk (PNG, 11.3.3), or nothing if it is damaged."""
    _, _, rest = body.partition(b"\0")
    compressed = kind == b"zTXt"
    if kind == b"iTXt":
        fields = rest[2:].split(b"\0", 2)  # language, translated keyword, text
        compressed = rest[:1] != b"\0"
        rest = (rest[1:2] if compressed else b"") + (fields[2] if len(fields) == 3 else b"")
    if not compressed:
        return rest
    try:
        return zlib.decompressobj().decompress(rest[1:], MAX_TEXT)
    except zlib.error:
        return b""


def _from_hex(text: bytes) -> bytes:
    """Decode a profile as ImageMagick writes it: blank line, name, length, then hex digits."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return _DAMAGED


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of the comments and application segments before the first scan.

    Bytes between segments are skipped, as in Pillow and libjpeg. Iteration stops at the first
    invalid segment; whatever follows is kept unchanged.
    """
    position = 2
    while True:
        position = data.find(b"\xff", position)
        if position < 0 or position + 4 > len(data):
            return
        marker = data[position + 1]
        if marker in (0x00, 0xFF):  # no marker; fill
            position += 1
            continue
        length = int.from_bytes(data[position + 2 : position + 4])
        end = position + 2 + length
        if marker < 0xC0 or 0xD0 <= marker <= 0xDA or length < 2 or end > len(data):
            return
        if 0xE0 <= marker <= 0xEF or marker == 0xFE:
            yield marker, position, end
        position = end
