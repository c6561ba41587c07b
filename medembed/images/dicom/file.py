"""Read elements of a DICOM file within bounds and without warnings, and identify the object.

pydicom is imported without GDCM. If python-gdcm is installed, pydicom imports it to offer its
codecs, and python-gdcm's copies of zlib, libjpeg and others then take precedence in every library
loaded later: zlib aborts the process ("double free or corruption", python-gdcm 3.2.6). GDCM's
codecs are not needed here.
"""

import io
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from medembed.core.errors import ImageError
from medembed.images.types import MAX_PIXELS

__all__ = [
    "UID",
    "Dataset",
    "apply_color_lut",
    "dcmread",
    "encapsulate",
    "get_decoder",
    "get_frame",
    "quiet_pydicom",
    "read_dicom",
    "why_no_image",
]

_gdcm = sys.modules.get("gdcm")
if _gdcm is None:
    sys.modules["gdcm"] = None  # type: ignore[assignment]  # makes its import fail
try:
    from pydicom import Dataset, dcmread
    from pydicom.encaps import encapsulate, get_frame
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.pixels.processing import apply_color_lut
    from pydicom.uid import UID
finally:
    if _gdcm is None:
        del sys.modules["gdcm"]


DEFLATED = b"1.2.840.10008.1.2.1.99"
PLAIN = b"1.2.840.10008.1.2.1".ljust(len(DEFLATED), b"\0")
PIXEL_GROUP = 0x7FE0
MAX_READS = 1_000_000  # an element takes two or three; images have some hundred elements
MAX_VALUE = 1 << 22  # bytes of an element beside the pixels: 32 look-up tables of the largest size
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
        Positioned at the beginning of the file.
    tags : str
        Keywords, separated by blanks.
    with_pixels : bool
        If False, reading stops before the pixel data.

    Raises
    ------
    ImageError
        The file is not DICOM, or its inflated size or number of elements exceeds that of any
        image.
    """
    begins = file.read(132)
    has_preamble = begins[128:] == b"DICM"
    file.seek(0)
    counted = _Counted(file, most=None if with_pixels else MAX_VALUE)
    options: dict[str, Any] = {"force": not has_preamble, "specific_tags": tags.split()}
    options["stop_before_pixels"] = not with_pixels
    try:
        dataset = dcmread(counted, **options)
    except _Deflated:
        dataset = dcmread(_Counted(_inflated(file), most=None), **options)
    if not has_preamble and not _known_name(dataset).endswith("Storage"):
        raise ImageError("not an image of a known kind, nor a DICOM without its preamble")
    for tag in dataset.keys():  # noqa: SIM118 # items would be converted, which is to be prevented
        value = dataset.get_item(tag).value
        if tag >> 16 != PIXEL_GROUP and isinstance(value, bytes) and len(value) > MAX_VALUE:
            raise ImageError(f"the DICOM has an element of {len(value):,} bytes beside its pixels")
    return dataset


def why_no_image(dataset: Dataset) -> str:
    """Return why a DICOM object is not one still image, or nothing if its header describes one."""
    frames = dataset.get("NumberOfFrames")
    if frames is not None and int(frames) > 1:
        return f"holds {int(frames)} frames; only still images are read"
    if "Rows" in dataset and "Columns" in dataset:
        return ""
    name = _known_name(dataset)
    return f"is {name or 'an object of an unknown kind'} and holds no image"


def _known_name(dataset: Dataset) -> str:
    """Return the standard's name of the SOP class; a file's own text is never repeated."""
    meta = getattr(dataset, "file_meta", None) or {}
    uid = UID(str(dataset.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or ""))
    return str(uid.name) if uid and uid.name != uid else ""


class _Deflated(Exception):  # noqa: N818 # no error
    """A data set is deflated (PS3.5 A.5) and begins at the file's current position."""


class _Counted:
    """A binary file with a limit on reads; pydicom reads each element at least once.

    Parameters
    ----------
    most : int or None
        Bytes that may be read at once.
    """

    def __init__(self, file: Any, most: int | None) -> None:
        self._file, self._most, self._left = file, most, MAX_READS
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """Read as the file does.

        Raises
        ------
        ImageError
            There are too many reads, or one is too large.
        _Deflated
            The whole remainder is requested: pydicom is about to inflate it, without any limit.
            Only pydicom knows, because the transfer syntax may be anywhere in group 2.
        """
        if size < 0:
            raise _Deflated
        self._left -= 1
        if self._left < 0:
            raise ImageError("the DICOM has far more elements than any image")
        if self._most is not None and size > self._most:
            raise ImageError(f"the DICOM has an element of {size:,} bytes before its pixels")
        data: bytes = self._file.read(size)
        return data


def _inflated(file: Any) -> io.BytesIO:
    """Return an uncompressed copy of a file positioned at its deflated data set."""
    start = file.tell()
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = stream.decompress(file.read(MAX_INFLATED), MAX_INFLATED + 1)
    except zlib.error as error:
        raise ImageError("the DICOM's deflated data are damaged") from error
    if len(data) > MAX_INFLATED:
        raise ImageError(f"the DICOM inflates to more than {MAX_INFLATED / 1e6:,.0f} MB")
    if not stream.eof:
        raise ImageError("the DICOM's deflated data end early: the file is truncated")
    file.seek(0)
    # The same element with the plain syntax's name, padded as UIDs are.
    return io.BytesIO(file.read(start).replace(DEFLATED, PLAIN) + data)
