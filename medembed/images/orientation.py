"""Read an image's EXIF orientation, and the TIFF directories that hold it."""

import re
import struct
from dataclasses import dataclass

from PIL import Image

__all__ = [
    "TURNS",
    "UNREAD",
    "Directory",
    "Header",
    "orientation_of",
    "read_directory",
    "read_header",
    "turn_upright",
]

TURNS: dict[int, Image.Transpose | None] = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF 4.6.4 A, tag 0x0112: the operation that turns the stored rows and columns upright."""

UNREAD = "an orientation that cannot be read counts as none"
_ORIENTATION = 0x0112
_IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
# TIFF 6.0, section 2: the types of whole numbers.
_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 16: "Q"}
_BYTES = (1, 2, 7)
_MAGIC = {(b"II", b"*\0"), (b"MM", b"\0*"), (b"II", b"\0*"), (b"MM", b"*\0")}  # the last two: wrong
_BIG_MAGIC = {(b"II", b"+\0"), (b"MM", b"\0+")}
_MAX_ENTRIES = 65_535  # of a TIFF; a BigTIFF may claim more


@dataclass(frozen=True)
class Header:
    """The header of a TIFF, or of EXIF, which has the format of a TIFF.

    Attributes
    ----------
    order : str
        "<" or ">".
    word : str
        "I", or "Q" in BigTIFF: struct's code of an offset.
    first : int
        Offset of the first directory.
    size : int
        Bytes of this header; the offset comes last.
    """

    order: str
    word: str
    first: int
    size: int


@dataclass(frozen=True)
class Directory:
    """One directory of tags, an IFD (TIFF 6.0, section 2).

    Attributes
    ----------
    header : Header
    start : int
        Its offset.
    entries : list of (int, bytes)
        Each tag and its unparsed entry: tag, type, count, value or offset. If a tag has two
        entries the first counts, as in Pillow.
    next : int
        Offset of the next one; 0 after the last.
    is_whole : bool
        Whether the data hold all entries that the directory declares.
    """

    header: Header
    start: int
    entries: list[tuple[int, bytes]]
    next: int
    is_whole: bool

    def has(self, tag: int) -> bool:
        """Return whether the directory has this tag."""
        return any(tag == own for own, _ in self.entries)

    def integer(self, tag: int) -> int | None:
        """Return a tag's single whole number, or None."""
        kind, count, value = self._fields(tag)
        code = _INTEGERS.get(kind)
        if code is None or count != 1 or struct.calcsize(code) > len(value):
            return None
        return int(struct.unpack_from(self.header.order + code, value)[0])

    def content(self, tag: int, data: bytes, most: int) -> bytes | None:
        """Return up to `most` bytes of a tag that holds bytes, or None."""
        kind, count, value = self._fields(tag)
        if kind not in _BYTES or count <= len(value):
            return None
        (offset,) = struct.unpack(self.header.order + self.header.word, value)
        return data[offset : offset + min(count, most)] if offset + count <= len(data) else None

    def written(self, keep: set[int]) -> bytes:
        """Return the directory rewritten as the last of its file, with only these tags."""
        order, word = self.header.order, self.header.word
        kept = [entry for tag, entry in self.entries if tag in keep]
        count = struct.pack(order + ("H" if word == "I" else "Q"), len(kept))
        return count + b"".join(kept) + struct.pack(order + word, 0)

    def _fields(self, tag: int) -> tuple[int, int, bytes]:
        entry = next((entry for own, entry in self.entries if own == tag), None)
        if entry is None:
            return 0, 0, b""
        order, word = self.header.order, self.header.word
        kind, count = struct.unpack_from(f"{order}H{word}", entry, 2)
        return kind, count, entry[4 + struct.calcsize(word) :]


def read_header(data: bytes) -> Header | None:
    """Return the header of a TIFF or of EXIF, or None if there is no valid header."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2], "")
    if (data[:2], data[2:4]) in _MAGIC and len(data) >= 8:
        return Header(order, "I", struct.unpack_from(order + "I", data, 4)[0], 8)
    if (data[:2], data[2:4]) in _BIG_MAGIC and len(data) >= 16:
        return Header(order, "Q", struct.unpack_from(order + "Q", data, 8)[0], 16)
    return None


def read_directory(data: bytes, start: int, header: Header) -> Directory | None:
    """Return the directory at `start` as far as the data reach, or None if there is none."""
    order, word = header.order, header.word
    counter = order + ("H" if word == "I" else "Q")
    begin, size = start + struct.calcsize(counter), 4 + 2 * struct.calcsize(word)
    if start < header.size or begin > len(data):
        return None
    (count,) = struct.unpack_from(counter, data, start)
    entries = []
    last = begin + min(count, _MAX_ENTRIES) * size
    for place in range(begin, min(last, len(data) - size + 1), size):
        (tag,) = struct.unpack_from(order + "H", data, place)
        entries.append((tag, data[place : place + size]))
    end = begin + count * size
    has_next = end + struct.calcsize(word) <= len(data)
    following = struct.unpack_from(order + word, data, end)[0] if has_next else 0
    return Directory(header, start, entries, following, end <= len(data))


def orientation_of(exif: bytes | None, xmp: bytes | None) -> int | None:
    """Return the orientation in EXIF, else XMP: 1 to 8, 1 if absent, None if unreadable."""
    if exif is not None:
        found = _from_exif(exif)
        if found is None or found:
            return found
    match = _IN_XMP.search(xmp or b"")
    value = int(match[1]) if match else 1
    return value if value in TURNS else None


def turn_upright(image: Image.Image, orientation: int | None) -> Image.Image:
    """Return an image turned upright, or unchanged if its orientation is unreadable."""
    turn = TURNS[orientation or 1]
    return image if turn is None else image.transpose(turn)


def _from_exif(exif: bytes) -> int | None:
    """Return 1 to 8, 0 if EXIF holds no orientation, None if it is unreadable."""
    for _ in range(2):  # some write its name twice
        exif = exif.removeprefix(b"Exif\0\0")
    if not exif:
        return 0
    header = read_header(exif)
    directory = None if header is None else read_directory(exif, header.first, header)
    if directory is None:
        return None
    if not directory.has(_ORIENTATION):
        return 0 if directory.is_whole else None
    value = directory.integer(_ORIENTATION)
    return value if value in TURNS else None
