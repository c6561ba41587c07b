"""How much a TIFF's directories name, before a reader makes room for all of it."""

import struct

from medembed.core.errors import ImageError

__all__ = ["check_directories"]

MAX_DIRECTORIES = 100
MAX_ENTRIES = 4096
MAX_VALUES = 1 << 18
"""Numbers in one entry: a strip a row of four planes, of the highest image. Of a million strips
Pillow makes a gigabyte of objects."""
_BYTES = (1, 2, 7)  # TIFF 6.0, section 2: BYTE, ASCII, UNDEFINED stay bytes
_STRIPS = (273, 279, 324, 325)  # StripOffsets, StripByteCounts, TileOffsets, TileByteCounts


def check_directories(data: bytes) -> None:
    """Refuse a TIFF that names more strips, tiles, values or pictures than any image has.

    Where a directory ends early, nothing is said: its reader will.

    Raises
    ------
    ImageError
        So it is.
    """
    order = "<" if data[:2] == b"II" else ">"
    is_big = data[2:4] in (b"+\0", b"\0+")  # BigTIFF, section "Proposal"
    word, short, entry = ("Q", "Q", "HHQ8x") if is_big else ("I", "H", "HHI4x")
    seen: set[int] = set()
    try:
        (place,) = struct.unpack_from(order + word, data, 8 if is_big else 4)
        while place and place not in seen:
            if len(seen) == MAX_DIRECTORIES:
                raise ImageError(f"the TIFF holds more than {MAX_DIRECTORIES} pictures")
            seen.add(place)
            (n_entries,) = struct.unpack_from(order + short, data, place)
            if n_entries > MAX_ENTRIES:
                raise ImageError(f"the TIFF has {n_entries:,} entries in a directory")
            place += struct.calcsize(order + short)
            size = struct.calcsize(order + entry)
            for start in range(place, place + n_entries * size, size):
                _check_entry(*struct.unpack_from(order + entry, data, start))
            (place,) = struct.unpack_from(order + word, data, place + n_entries * size)
    except struct.error:
        return


def _check_entry(tag: int, kind: int, count: int) -> None:
    if count > MAX_VALUES and kind not in _BYTES:
        what = "strips or tiles" if tag in _STRIPS else f"values in its tag {tag}"
        raise ImageError(f"the TIFF has {count:,} {what}; more than {MAX_VALUES:,} are not read")
