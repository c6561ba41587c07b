"""Tables of DICOM: what a modality LUT or a VOI LUT makes of values (PS3.3 C.11.1, C.11.2)."""

from typing import Any

import numpy as np

from medembed.core.errors import ImageError

__all__ = ["DEPTH_IN_USE", "look_up"]

DEPTH_IN_USE = 1 / 16  # of the declared range; below, the depth is not what Bits Stored says


def look_up(values: np.ndarray, item: Any, name: str) -> tuple[np.ndarray, float]:
    """Look values up in a table (C.11.1.1, C.11.2.1.1); also give the greatest output of its bits.

    Values below the first that is mapped get the first entry, those beyond the last the last.
    """
    descriptor = _words(item, "LUTDescriptor")
    if len(descriptor) != 3:
        raise ImageError(f"the DICOM's {name} has no descriptor of three values")
    n_entries, bits = int(descriptor[0]) % 65536 or 65536, int(descriptor[2])
    if not 8 <= bits <= 16:
        raise ImageError(f"the DICOM's {name} has {bits} bits per entry; 8 to 16 are defined")
    first = int(descriptor[1])
    if first > 32767 and values.min() < 0:  # written as US though the input is signed
        first -= 65536
    entries = _entries(item, n_entries, bits, name)
    top = float((1 << bits) - 1)
    if entries.max() > top or entries.max() < DEPTH_IN_USE * top:
        raise ImageError(
            f"the DICOM's {name} reaches {entries.max()}, which does not fit its {bits} bits"
        )
    index = np.clip(np.rint(values) - first, 0, n_entries - 1).astype(np.int64)
    return entries[index].astype(np.float64), top


def _entries(item: Any, n_entries: int, bits: int, name: str) -> np.ndarray:
    """Read LUT Data: words, or for 8 bits also bytes, two in a word."""
    words = _words(item, "LUTData")
    if len(words) == n_entries:
        return words
    if bits == 8 and len(words) == (n_entries + 1) // 2:
        return words.astype("<u2").view(np.uint8)[:n_entries].astype(np.int64)
    raise ImageError(f"the DICOM's {name} has {len(words)} entries, not {n_entries}")


def _words(item: Any, keyword: str) -> np.ndarray:
    """Read an element of VR US, SS or OW as int64; OW is little endian once read by pydicom."""
    value = item.get(keyword)
    if isinstance(value, bytes):
        kind = "<u2" if getattr(item, "original_encoding", (None, True))[1] is not False else ">u2"
        return np.frombuffer(value[: len(value) // 2 * 2], kind).astype(np.int64)
    return np.atleast_1d(np.asarray(() if value is None else value, dtype=np.int64))
