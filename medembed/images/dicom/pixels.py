"""Decode a DICOM file's bytes into a grey array, or raise an error that gives the reason.

The order of transforms is the standard's (PS3.4 N.2, figure N.2-1): stored values, of which only
Bits Stored count (PS3.5 8.1.1); modality LUT or rescale (PS3.3 C.11.1);
VOI LUT or window (C.11.2), once; then the presentation: MONOCHROME1, whose lowest value is white
(C.7.6.3.1.2), and Presentation LUT Shape INVERSE (C.11.6), which means inversion in DX images too
(C.8.11.3), are inverted last and once. Pixels of the padding value or range (C.7.5.1.1.2) do not
affect the choice of a range and become black. Colour becomes luminance, as in other formats.
Only the elements that decoding requires are read: a patient's name, number or dates are never
parsed and never appear in a message.

The meaning of stored values is computed once per bit pattern that occurs, at most 65,536.
"""

import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from medembed.core.errors import ImageError
from medembed.images.container_checks import padded_jpeg
from medembed.images.dicom.codecs import OWN, decode_jpeg, require_codec
from medembed.images.dicom.codestreams import FAMILIES, read_codestream
from medembed.images.dicom.file import (
    UID,
    Dataset,
    apply_color_lut,
    encapsulate,
    get_decoder,
    get_frame,
    quiet_pydicom,
    read_dicom,
    why_no_image,
)
from medembed.images.dicom.windows import FUNCTIONAL_GROUPS, find_transforms
from medembed.images.intensity import Intensity, Levels, shares_of_white
from medembed.images.types import Radiograph, channels_differ, refuse_size
from medembed.images.versions import FIRST_VERSION

__all__ = [
    "OVERLAY_BITS",
    "decode_dicom",
]

BLOCK = 1 << 22  # pixels counted at once: numpy counts by copies of 64 bits
OVERLAY_GROUPS = range(0x6000, 0x6020, 2)  # PS3.5 7.6
_BIT_POSITION = 0x0102
OVERLAY_BITS = " ".join(f"0x{group:04x}{_BIT_POSITION:04x}" for group in OVERLAY_GROUPS)
"""Tags of Overlay Bit Position: 0, or the position of an overlay in the pixels' unused bits."""
MARGIN = 1 / 8  # of the range: how far a lossy codec may overshoot at edges
FEW = 0.01  # share of the pixels that may overshoot farther, as at the edges of markers


def _overlay_bits(dataset: Any) -> int:
    """Return a mask of the bits of a pixel's word in which overlays are declared."""
    mask = 0
    for group in OVERLAY_GROUPS:
        position = dataset.get((group, _BIT_POSITION))
        value = getattr(position, "value", None)
        if isinstance(value, int) and 0 < value < 16:
            mask |= 1 << value
    return mask


def _count_patterns(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a view of the pixels as bit patterns, and the count of each pattern.

    Parameters
    ----------
    pixels : ndarray
        Integers of 8 or 16 bits, signed or not, of any byte order.

    Returns
    -------
    patterns : uint8 or uint16, in the shape of `pixels`
    numbers : int64 (2 ** (8 * itemsize),)
        Number of pixels with each pattern.
    """
    native = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    patterns = native.view(f"u{native.itemsize}")
    n_patterns = 1 << 8 * native.itemsize
    blocks = np.array_split(patterns.ravel(), 1 + patterns.size // BLOCK)
    numbers = np.sum([np.bincount(block, minlength=n_patterns) for block in blocks], axis=0)
    return patterns, numbers


def _find_levels(
    kind: np.dtype,
    numbers: np.ndarray,
    stored: int,
    *,
    high: int | None,
    signed: bool,
    overlay: int = 0,
    lossy: bool = False,
) -> np.ndarray:
    """Return each bit pattern's position among the 2 ** `stored` values of Bits Stored.

    Parameters
    ----------
    kind : dtype
        Of the pixels.
    numbers : int64 (n,)
        Number of pixels with each pattern.
    stored : int
        Bits Stored.
    high : int or None
        High Bit if pixels are words as stored in the file; None if they are numbers decoded by a
        codec.
    signed : bool
        Whether words are two's complement.
    overlay : int
        Mask of the bits that hold overlays.
    lossy : bool
        Whether numbers may lie slightly outside the range because the codec is lossy; they are
        clipped to it.

    Returns
    -------
    ndarray
        int64 (n,), 0 to 2 ** `stored` - 1, in the order of the bit patterns of that many bits.

    Raises
    ------
    ImageError
        Pixels exceed Bits Stored: masking would wrap bright values to dark ones.
    """
    patterns = np.arange(len(numbers))
    if high is None:
        patterns = _numbers(patterns, numbers, kind, stored, lossy)
    else:
        _refuse_stray_bits(patterns[numbers > 0], stored, high, signed, overlay, len(numbers) - 1)
        patterns = patterns >> (high - stored + 1)
    places: np.ndarray = patterns & ((1 << stored) - 1)
    return places


def _numbers(
    patterns: np.ndarray, numbers: np.ndarray, kind: np.dtype, stored: int, lossy: bool
) -> np.ndarray:
    top, half = 1 << stored, len(patterns) // 2
    low, high = 0, top
    if kind.kind == "i":
        patterns = np.where(patterns < half, patterns, patterns - 2 * half)
        low, high = -top // 2, top // 2
    outside = (patterns < low) | (patterns >= high)
    if numbers[outside].any():
        margin = MARGIN * top
        far = (patterns < low - margin) | (patterns >= high + margin)
        if not lossy or numbers[far].sum() > FEW * numbers.sum():
            raise ImageError(f"the DICOM's compressed data need more than {stored} bits")
    clipped: np.ndarray = np.clip(patterns, low, high - 1)
    return clipped


def _refuse_stray_bits(
    found: np.ndarray, stored: int, high: int, signed: bool, overlay: int, word: int
) -> None:
    """Refuse words with bits above High Bit that neither an overlay nor a sign accounts for."""
    above = word & ~((2 << high) - 1) & ~overlay
    strays = found & above
    if signed:  # sign-extended or not, both are met
        is_negative = (found >> high & 1).astype(bool)
        strays = np.where(is_negative & (strays == above), 0, strays)
    if strays.any():
        raise ImageError(
            f"the DICOM's pixels need more than the {stored} bits that it says are stored, and no "
            "overlay is declared in the others",
            since=2,
        )


PIXEL_TAGS = (
    "SOPClassUID BitsAllocated BitsStored HighBit PixelRepresentation Rows Columns "
    "SamplesPerPixel PlanarConfiguration PhotometricInterpretation NumberOfFrames "
    "PixelPaddingValue PixelPaddingRangeLimit ModalityLUTSequence RescaleSlope RescaleIntercept "
    "VOILUTSequence WindowCenter WindowWidth WindowCenterWidthExplanation VOILUTFunction "
    "PresentationIntentType PresentationLUTShape RedPaletteColorLookupTableDescriptor "
    "GreenPaletteColorLookupTableDescriptor BluePaletteColorLookupTableDescriptor "
    "RedPaletteColorLookupTableData GreenPaletteColorLookupTableData "
    "BluePaletteColorLookupTableData SegmentedRedPaletteColorLookupTableData "
    "SegmentedGreenPaletteColorLookupTableData SegmentedBluePaletteColorLookupTableData "
    f"PixelData FloatPixelData DoubleFloatPixelData {' '.join(FUNCTIONAL_GROUPS)} {OVERLAY_BITS}"
)
# Transfer syntaxes whose data may be lossy; decoded values may leave the range that was encoded.
LOSSY = [f"1.2.840.10008.1.2.4.{end}" for end in ("50", "51", "81", "91", "203")]
GREY = ("MONOCHROME1", "MONOCHROME2")
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")


def decode_dicom(data: bytes, intensity: Intensity) -> Radiograph:
    """Return the image of a DICOM file that holds exactly one.

    Supported are 1 to 16 bits of grey, signed and unsigned, palettes and 8 bits of colour, in every
    transfer syntax that pydicom and the installed codecs decode.

    Parameters
    ----------
    data : bytes
        The complete file; its preamble may be missing if the SOP class is known.
    intensity : Intensity
        Which window to use; see `images.intensity`.

    Raises
    ------
    ImageError
        The file holds no image or several, contradicts itself or is damaged, or a codec is
        missing; the message quotes no text of the file. Safe to call from several threads, which
        wait for each other.
    """
    with quiet_pydicom():
        try:
            dataset = read_dicom(io.BytesIO(data), PIXEL_TAGS)
            reason = why_no_image(dataset)
            if reason:
                raise ImageError(f"the DICOM {reason}")
            return _render(dataset, intensity)
        except ImageError:
            raise
        except MemoryError as error:
            raise ImageError("the DICOM does not fit in memory") from error
        except Exception as error:  # their texts may quote an element's value
            name = type(error).__name__
            raise ImageError(f"the DICOM is damaged: decoding ends in a {name}") from error


@dataclass(frozen=True)
class _Header:
    """PS3.3 C.7.6.3, table C.7-11a."""

    rows: int
    columns: int
    samples: int
    allocated: int
    stored: int
    high: int
    signed: bool
    photometric: str
    syntax: UID

    @property
    def encapsulated(self) -> bool:
        return bool(self.syntax.is_encapsulated)


def _read_header(dataset: Dataset) -> _Header:
    stored = _whole(dataset, "BitsStored")
    header = _Header(
        rows=_whole(dataset, "Rows"),
        columns=_whole(dataset, "Columns"),
        samples=_whole(dataset, "SamplesPerPixel"),
        allocated=_whole(dataset, "BitsAllocated"),
        stored=stored,
        high=_whole(dataset, "HighBit", stored - 1),
        signed=_whole(dataset, "PixelRepresentation") != 0,
        photometric=str(dataset.get("PhotometricInterpretation") or "").strip(),
        syntax=_syntax(dataset),
    )
    refuse_size(header.columns, header.rows, "DICOM")
    grey = header.photometric in GREY or header.photometric == "PALETTE COLOR"
    if not grey and header.photometric not in COLOURS:
        raise ImageError("the DICOM's photometric interpretation is missing or not read")
    if header.samples != (1 if grey else 3):
        raise ImageError(f"the DICOM has {header.samples} samples per pixel, against its kind")
    depth = (header.allocated, header.stored)
    if header.allocated not in (8, 16) or not 1 <= header.stored <= header.allocated:
        raise ImageError("the DICOM has {1} bits stored in {0}; read are 1 to 16".format(*depth))
    if not grey and depth != (8, 8):
        raise ImageError("the DICOM has {1} bits of colour in {0}; 8 are read".format(*depth))
    if _whole(dataset, "PixelRepresentation") not in (0, 1):
        raise ImageError("the DICOM's pixels are neither unsigned (0) nor signed (1)")
    if not header.stored - 1 <= header.high < header.allocated:
        raise ImageError(f"the DICOM's high bit is {header.high} of {header.stored} bits stored")
    return header


def _whole(dataset: Dataset, keyword: str, default: int | None = None) -> int:
    value = dataset.get(keyword)
    if value is None and default is not None:
        return default
    if not isinstance(value, int):
        raise ImageError(f"the DICOM's {keyword} is missing or damaged")
    return int(value)


def _syntax(dataset: Dataset) -> UID:
    uid = getattr(dataset, "file_meta", {}).get("TransferSyntaxUID")
    if uid:
        return UID(uid)
    implicit, little = dataset.original_encoding  # as pydicom found it in a file without group 2
    names = {(True, True): "1.2.840.10008.1.2", (False, True): "1.2.840.10008.1.2.1"}
    return UID(names.get((bool(implicit), bool(little)), "1.2.840.10008.1.2.2"))


def _render(dataset: Dataset, intensity: Intensity) -> Radiograph:
    header = _read_header(dataset)
    if "PixelData" not in dataset:
        raise ImageError("the DICOM holds no whole numbers as pixels, or was cut before their end")
    require_codec(header.syntax, header.stored)
    is_split = bool(dataset["PixelData"].is_undefined_length)
    if is_split != header.encapsulated:
        raise ImageError("the DICOM's pixel data are not in its transfer syntax")
    dataset.file_meta.TransferSyntaxUID = header.syntax
    pixels = _decode(dataset, header)
    if header.samples == 3:
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        return Radiograph(np.array(picture.convert("L")), channels_differ(picture))
    stored = np.arange(1 << header.stored)
    if header.signed:
        stored[len(stored) // 2 :] -= len(stored)
    patterns, numbers = _count_patterns(pixels)
    places = _levels(pixels.dtype, numbers, header, dataset)
    counts = np.bincount(places, weights=numbers, minlength=len(stored)).astype(np.int64)
    if header.photometric == "PALETTE COLOR":
        table, colour = _palette(stored, counts, dataset)
        shown = Radiograph(table, colour)
    else:
        shown = _grey(Levels(stored, counts, header.stored), dataset, header, intensity)
    return replace(shown, pixels=shown.pixels.take(places).take(patterns))


def _levels(kind: np.dtype, numbers: np.ndarray, header: _Header, dataset: Dataset) -> np.ndarray:
    is_coded = header.syntax in FAMILIES  # the codec gives numbers, not bits in a word
    return _find_levels(
        kind,
        numbers,
        header.stored,
        high=None if is_coded else header.high,
        signed=header.signed,
        overlay=0 if is_coded else _overlay_bits(dataset),
        lossy=header.syntax in LOSSY,
    )


def _grey(levels: Levels, dataset: Dataset, header: _Header, intensity: Intensity) -> Radiograph:
    """Tabulate the grey of each stored value: pixels are uint8 (2 ** bits,)."""
    is_padding = _padding(levels.stored, dataset)
    counts = np.where(is_padding, 0, levels.counts)
    if not counts.any():
        raise ImageError("all pixels of the DICOM are padding")
    found = find_transforms(dataset)
    seen = Levels(levels.stored, counts, levels.bits)
    shown = shares_of_white(seen, dataset, intensity, modality=found.modality, voi=found.voi)
    shares = shown.white
    shape = str(dataset.get("PresentationLUTShape") or "").strip().upper()
    if header.photometric == "MONOCHROME1" or shape == "INVERSE":
        shares = 1 - shares
    # Rounded first, so that halves, and those of the negative, do not depend on the last bit.
    table = np.floor(np.round(255 * shares, 6) + 0.5).astype(np.uint8)
    table[is_padding] = 0
    since = 2 if found.are_nested else FIRST_VERSION  # before, functional groups were passed over
    return Radiograph(table, False, shown.notes, since)


def _padding(stored: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Return which stored values are padding (PS3.3 C.7.5.1.1.2), both range ends included."""
    value, limit = (dataset.get(f"PixelPadding{name}") for name in ("Value", "RangeLimit"))
    if not isinstance(value, int):
        return np.zeros(len(stored), bool)
    ends = [int(value), int(limit) if isinstance(limit, int) else int(value)]
    if stored.min() < 0:  # written as US though the pixels are signed
        ends = [end - 65536 if end > 32767 else end for end in ends]
    return (stored >= min(ends)) & (stored <= max(ends))


def _palette(stored: np.ndarray, counts: np.ndarray, dataset: Dataset) -> tuple[np.ndarray, bool]:
    """Tabulate the luminance of each entry (PS3.3 C.7.6.3.1.5, C.7.6.3.1.6)."""
    colours = apply_color_lut(stored.astype(np.int32), dataset)[..., :3]
    if colours.dtype == np.uint16:
        colours = (colours >> 8).astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(colours[None, counts > 0]))
    table = np.array(Image.fromarray(np.ascontiguousarray(colours[None])).convert("L"))[0]
    return table, channels_differ(picture)


def _decode(dataset: Dataset, header: _Header) -> np.ndarray:
    """Decode the stored values; unused bits of uncompressed data are left unchanged."""
    options: dict[str, Any] = {"index": 0, "decoding_plugin": ""}
    if not header.encapsulated:
        _check_length(dataset, header)
        options["correct_unused_bits"] = False
        return _as_array(dataset, options)
    options["decoding_plugin"] = require_codec(header.syntax, header.stored)
    if header.syntax not in FAMILIES:
        return _as_array(dataset, options | {"correct_unused_bits": False})
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    found = read_codestream(frame, header.syntax)
    if (found.width, found.height) != (header.columns, header.rows):
        raise ImageError(
            f"the DICOM says {header.columns} x {header.rows}, its compressed data "
            f"{found.width} x {found.height}"
        )
    if found.components != header.samples:
        raise ImageError(
            f"the DICOM says {header.samples} sample(s) per pixel, its compressed data "
            f"{found.components}"
        )
    if found.bits > header.allocated:
        raise ImageError(f"the DICOM's compressed data have {found.bits} bits: too many")
    if found.bits <= 8 < header.allocated:  # an older file's 8 bits in words, decoded as bytes
        dataset.BitsAllocated, dataset.BitsStored = 8, min(8, header.stored)
        dataset.HighBit = dataset.BitsStored - 1
    pixels = _decode_frame(dataset, frame, header, options)
    if FAMILIES[header.syntax][0] == "JPEG" and _may_end_early(pixels):
        again = _decode_frame(dataset, padded_jpeg(frame, found.end), header, options)
        if not np.array_equal(again, pixels):
            raise ImageError("the DICOM's JPEG data end before their last row: truncated")
    return pixels


def _decode_frame(
    dataset: Dataset, frame: bytes, header: _Header, options: dict[str, Any]
) -> np.ndarray:
    if options["decoding_plugin"] == OWN:
        return decode_jpeg(frame, header.photometric)
    dataset.PixelData = encapsulate([frame])
    return _as_array(dataset, options)


def _as_array(dataset: Dataset, options: dict[str, Any]) -> np.ndarray:
    decoder = get_decoder(dataset.file_meta.TransferSyntaxUID)
    pixels: np.ndarray = decoder.as_array(dataset, **options)[0]
    return pixels


def _check_length(dataset: Dataset, header: _Header) -> None:
    """Check the number of bytes against rows and columns; pydicom silently ignores a surplus."""
    row = header.columns * header.samples * header.allocated // 8
    if header.photometric == "YBR_FULL_422":  # PS3.3 C.7.6.3.1.2: two pixels in four samples
        row = header.columns * 2
    found, needed = len(dataset.PixelData), row * header.rows
    if needed <= found < needed + max(row, 2):
        return
    if not _is_padded(dataset.PixelData, needed):
        raise ImageError(
            f"the DICOM holds {found} bytes of pixels; its {header.rows} rows take {needed}"
        )
    dataset.PixelData = dataset.PixelData[:needed]


def _is_padded(data: bytes, needed: int) -> bool:
    """Return whether pixels are followed only by zeros, at most as many bytes as the pixels.

    One byte makes the length even (PS3.5 7.1.1); some writers pad to a disk block, or leave room
    for another frame. A surplus that is not zero belongs to the image, so the header is wrong.
    """
    surplus = data[needed:]
    return needed <= len(data) <= 2 * needed and surplus.count(0) == len(surplus)


def _may_end_early(pixels: np.ndarray) -> bool:
    """Return whether the last pixels are all equal, like those a codec pads missing data with."""
    return bool((pixels[-1, -8:] == pixels[-1, -1]).all())
