"""Read elements of a DICOM file, in silence and within bounds; say what kind of object it is."""

import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from medembed.dataset.dicom_library import UID, Dataset, dcmread
from medembed.dataset.radiograph import MAX_PIXELS
from medembed.errors import ImageError

__all__ = ["quiet_pydicom", "read_dicom", "why_no_image"]

DEFLATED = b"1.2.840.10008.1.2.1.99"
MAX_META = 65_536  # bytes of preamble and group 2
LONG = (b"OB", b"OD", b"OF", b"OL", b"OW", b"SQ", b"UC", b"UN", b"UR", b"UT")  # PS3.5 7.1.2
MAX_INFLATED = 6 * MAX_PIXELS  # bytes: three samples of 16 bits
_lock = threading.RLock()


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Keep pydicom's warnings, which quote elements, from the terminal; one thread at a time."""
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="The decoded RLE segment contains")  # too many
        yield


def read_dicom(file: Any, tags: str, *, with_pixels: bool = True) -> Dataset:
    """Read some elements of a DICOM file, and those of its group 2.

    Parameters
    ----------
    file : binary file
        At its beginning.
    tags : str
        Keywords, with blanks between them.
    with_pixels : bool
        False ends before the pixel data.

    Raises
    ------
    ImageError
        It is no DICOM, or inflates to more than any image takes.
    """
    begins = file.read(MAX_META)
    has_preamble = begins[128:132] == b"DICM"
    end, syntax = _walk_group_2(begins, 132 if has_preamble else 0)
    if DEFLATED in begins[: max(end, 2048)]:
        _refuse_bomb(begins[end:] + file.read() if DEFLATED in syntax else b"")
    file.seek(0)
    dataset = dcmread(
        file, force=not has_preamble, stop_before_pixels=not with_pixels, specific_tags=tags.split()
    )
    if not has_preamble and not _known_name(dataset).endswith("Storage"):
        raise ImageError("not an image of a known kind, nor a DICOM without its preamble")
    return dataset


def why_no_image(dataset: Dataset) -> str:
    """Say why a DICOM object is not one still image; empty if it is, as far as its header tells."""
    frames = dataset.get("NumberOfFrames")
    if frames is not None and int(frames) > 1:
        return f"holds {int(frames)} frames; only still images are read"
    if "Rows" in dataset and "Columns" in dataset:
        return ""
    name = _known_name(dataset)
    return f"is {name or 'an object of an unknown kind'} and holds no image"


def _known_name(dataset: Dataset) -> str:
    """Name the SOP class if the standard has it; a file's own text is never repeated."""
    meta = getattr(dataset, "file_meta", None) or {}
    uid = UID(str(dataset.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or ""))
    return str(uid.name) if uid and uid.name != uid else ""


def _walk_group_2(begins: bytes, position: int) -> tuple[int, bytes]:
    """Give where group 2 ends and the transfer syntax in it (PS3.10 7.1: explicit VR)."""
    syntax = b""
    while begins[position : position + 2] == b"\x02\0" and position + 12 <= len(begins):
        is_long = begins[position + 4 : position + 6] in LONG
        kind, skip = ("<I", 8) if is_long else ("<H", 6)
        length = struct.unpack_from(kind, begins, position + skip)[0]
        start = position + (12 if is_long else 8)
        if begins[position + 2 : position + 4] == b"\x10\0":
            syntax = begins[start : start + length]
        position = start + length
    return position, syntax


def _refuse_bomb(deflated: bytes) -> None:
    """Inflate a data set (PS3.5 A.5) as far as an image may go: pydicom has no limit."""
    stream, count = zlib.decompressobj(-zlib.MAX_WBITS), 0
    try:
        while deflated and not stream.eof and count <= MAX_INFLATED:
            count += len(stream.decompress(deflated, 1 << 20))
            deflated = stream.unconsumed_tail
    except zlib.error as error:
        raise ImageError("the DICOM's deflated data are damaged") from error
    if count > MAX_INFLATED:
        raise ImageError(f"the DICOM inflates to more than {MAX_INFLATED / 1e6:,.0f} MB")
    if not stream.eof:
        raise ImageError("the DICOM's deflated data end early: the file is truncated")
