"""Decode a file's bytes into a grey array, or raise an error that gives the reason."""

import io
import math
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from medembed.core.errors import ImageError
from medembed.images.container_checks import (
    PNG_SIGNATURE,
    PngFacts,
    check_jpeg,
    check_png,
    check_png_rows,
    padded_jpeg,
)
from medembed.images.intensity import DEFAULT_INTENSITY, Intensity
from medembed.images.metadata_stripping import Bare, bare_jpeg, bare_png, bare_tiff
from medembed.images.orientation import UNREAD, orientation_of, turn_upright
from medembed.images.types import (
    MAX_PIXELS,
    Radiograph,
    channels_differ,
    refuse_one_grey,
    refuse_size,
)
from medembed.images.versions import FIRST_VERSION, IMAGES_VERSION

__all__ = [
    "BARE_DICOM",
    "IMAGES_VERSION",
    "MAX_PIXELS",
    "Radiograph",
    "decode_image",
]

MAX_DIRECTORIES = 100
MAX_ENTRIES = 4096
MAX_VALUES = 1 << 18
"""Most values in one entry: one strip per row and plane of the tallest image with four planes.
Pillow turns a million strips into a gigabyte of objects."""
_BYTES = (1, 2, 7)  # TIFF 6.0, section 2: BYTE, ASCII, UNDEFINED stay bytes
_STRIPS = (273, 279, 324, 325)  # StripOffsets, StripByteCounts, TileOffsets, TileByteCounts


def _check_directories(data: bytes) -> None:
    """Refuse a TIFF that declares more strips, tiles, values or pictures than any image has.

    A directory that ends early is left for its reader to report.

    Raises
    ------
    ImageError
        A limit is exceeded.
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


_READERS: dict[str, tuple[tuple[bytes, ...], type[ImageFile.ImageFile]]] = {
    "PNG": ((PNG_SIGNATURE,), PngImagePlugin.PngImageFile),
    "JPEG": ((b"\xff\xd8\xff",), JpegImagePlugin.JpegImageFile),
    "TIFF": ((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), TiffImagePlugin.TiffImageFile),
    "BMP": ((b"BM",), BmpImagePlugin.BmpImageFile),
    "GIF": ((b"GIF87a", b"GIF89a"), GifImagePlugin.GifImageFile),
    "WebP": ((b"RIFF",), WebPImagePlugin.WebPImageFile),
}
BARE_DICOM = (b"\x02\0", b"\x08\0", b"\0\x08")
"""A DICOM file without its preamble begins with group 2 or 8 (PS3.10, 7.1), last in big endian."""
_DEEP_MODES = ("I", "F")  # and all that begin with I;16
_PLAIN_MODES = ("1", "L", "P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_ALPHA_MODES = ("PA", "LA", "La", "RGBA", "RGBa")
_NO_ALPHA = "an alpha channel that is 0 everywhere is ignored"
# TIFF 6.0, section 8, and SampleFormat's section 19
_BITS, _PHOTOMETRIC, _SAMPLES, _PLANAR, _SAMPLE_FORMAT = 258, 262, 277, 284, 339
_MIN_TAGS, _MAX_TAGS = (340, 280), (341, 281)
_WHITE_IS_ZERO = 0


def decode_image(data: bytes, intensity: Intensity = DEFAULT_INTENSITY) -> Radiograph:
    """Return one complete still image as upright 8-bit grey.

    Colour becomes luminance (ITU-R BT.601, as Pillow's mode L), alpha is composited over black,
    palettes are expanded, EXIF orientation is applied. Parts that decoding does not require, such
    as a broken colour profile or comment, are skipped. Samples deeper than 8 bits are mapped
    linearly from their declared range to 0..255 and rounded: the range is that of the bit depth,
    or a TIFF's SMinSampleValue/MinSampleValue and SMaxSampleValue/MaxSampleValue. A PNG's sBIT
    does not narrow the range: its samples fill their bit depth by definition (PNG, 11.3.2.7).
    Gamma and colour profiles are ignored, as in the encoders' own processors. The conversion of
    DICOM to grey is described in `images.dicom.pixels`.

    Parameters
    ----------
    data : bytes
        The complete file.
    intensity : Intensity
        Which window of a DICOM to use; ignored for other formats.

    Raises
    ------
    ImageError
        The bytes are not one complete still image of a known format, all pixels have one grey
        level, or the range of the samples is unknown; the message is the reason. Safe to call
        from several threads.
    """
    name = _identify(data)
    if name == "DICOM":
        from medembed.images.dicom.pixels import (
            decode_dicom,  # only here: pydicom takes 0.2 s to import
        )

        radiograph = decode_dicom(data, intensity)
    else:
        radiograph = _decode_other(name, data)
    refuse_one_grey(radiograph.pixels)
    return radiograph


def _decode_other(name: str, data: bytes) -> Radiograph:
    try:
        with _strict_pillow():
            return _decode(name, data)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError(f"the {name} does not fit in memory") from error
    except Exception as error:  # Pillow's readers raise nearly every builtin error on bad input
        reason = str(error) or type(error).__name__
        raise ImageError(f"the {name} cannot be decoded: {reason}") from error


def _identify(data: bytes) -> str:
    if not data:
        raise ImageError("the file is empty")
    if data[128:132] == b"DICM":
        return "DICOM"
    for name, (signatures, _) in _READERS.items():
        if data.startswith(signatures) and (name != "WebP" or data[8:12] == b"WEBP"):
            return name
    if data.startswith(BARE_DICOM):
        return "DICOM"
    raise ImageError(f"not an image of a known kind ({', '.join(_READERS)}, DICOM)")


def _decode(name: str, data: bytes) -> Radiograph:
    facts = check_png(data) if name == "PNG" else None
    bare = _BARE.get(name, Bare)(data)
    end = check_jpeg(bare.data) if name == "JPEG" else None
    if name == "TIFF":
        _check_directories(bare.data)
    # The class itself, not Image.open: that one warns about size through global state.
    image = _READERS[name][1](io.BytesIO(bare.data))
    _check_header(name, image)
    image.load()
    if facts is not None and not _reaches_the_last_row(image, facts):
        check_png_rows(data, facts)
    if end is not None:
        _check_scan_is_whole(image, bare.data, end)
    orientation, has_alpha = bare.orientation, True
    if name not in _BARE:
        orientation = orientation_of(image.info.get("exif"), image.info.get("xmp"))
    if image.mode in _DEEP_MODES or image.mode.startswith("I;16"):
        grey, colour = Image.fromarray(_grey_from_deep(image, facts)), False
    else:
        grey, colour, has_alpha = _grey_from_plain(image, facts)
    pixels = np.array(turn_upright(grey, orientation))
    notes = [UNREAD] * (orientation is None) + [_NO_ALPHA] * (not has_alpha)
    since = FIRST_VERSION if has_alpha else 2  # before, such an alpha made the image black
    return Radiograph(np.ascontiguousarray(pixels), colour, tuple(notes), since)


_BARE = {"PNG": bare_png, "JPEG": bare_jpeg, "TIFF": bare_tiff}


def _check_header(name: str, image: ImageFile.ImageFile) -> None:
    refuse_size(*image.size, name)
    if name not in _BARE and getattr(image, "is_animated", False):
        raise ImageError(f"the {name} holds more than one picture; only still images are read")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_tiff(image)


def _check_tiff(image: TiffImagePlugin.TiffImageFile) -> None:
    tags: Any = image.tag_v2
    if _PHOTOMETRIC not in tags:
        raise ImageError("the TIFF does not say whether 0 is black or white")
    if image.mode == "L" and tags.get(_SAMPLE_FORMAT, (1,))[0] != 1:
        raise ImageError("the TIFF's 8-bit samples are signed, which is not read")
    # Pillow leaves black what no strip or tile covers; libtiff, with one tile, checks by itself.
    boxes = [tile.extents or (0, 0, 0, 0) for tile in image.tile]
    covered = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes)
    planes = tags.get(_SAMPLES, 1) if tags.get(_PLANAR, 1) == 2 and len(boxes) > 1 else 1
    if covered < planes * image.size[0] * image.size[1]:
        raise ImageError("the TIFF's strips do not cover the image: it is truncated or damaged")


def _reaches_the_last_row(image: ImageFile.ImageFile, facts: PngFacts) -> bool:
    """Return whether the last row proves that it was in the file: Pillow leaves missing rows black.

    This spares most files a second inflation, which takes a third of their decoding time.
    """
    width, height = image.size
    last_row = image.crop((0, height - 1, width, height)).tobytes()
    return not facts.interlaced and any(last_row)


def _check_scan_is_whole(image: ImageFile.ImageFile, data: bytes, end: int) -> None:
    """Refuse a JPEG that libjpeg has padded with mid-grey: 128, or 127 if inverted."""
    corner: Any = image.getpixel((image.size[0] - 1, image.size[1] - 1))
    if not set(np.atleast_1d(corner).tolist()) <= {127, 128}:
        return
    again = JpegImagePlugin.JpegImageFile(io.BytesIO(padded_jpeg(data, end)))
    again.load()
    if again.tobytes() != image.tobytes():
        raise ImageError("the JPEG's image data end before its last row: the file is truncated")


def _grey_from_plain(
    image: ImageFile.ImageFile, facts: PngFacts | None
) -> tuple[Image.Image, bool, bool]:
    """Return the grey picture, whether it had colour, and False if its alpha is 0 everywhere."""
    if image.mode not in _PLAIN_MODES:
        raise ImageError(f"colour space {image.mode} is not read; save the image as grey")
    picture: Image.Image = image
    if image.mode not in ("P", "PA"):
        image.info.pop("transparency", None)  # the colour key is applied below, in file's units
    has_alpha = True
    if image.mode in _ALPHA_MODES or (image.mode == "P" and "transparency" in image.info):
        picture = image.convert("RGBA")
        _check_depth_is_used(picture.convert("RGB"), image, facts)
        has_alpha = picture.getchannel("A").getextrema() != (0, 0)
        if has_alpha:
            black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
            picture = Image.alpha_composite(black, picture)
    if picture.mode not in ("1", "L"):
        picture = picture.convert("RGB")
        _check_depth_is_used(picture, image, facts)
    colour = picture.mode == "RGB" and channels_differ(picture)
    grey = picture.convert("L")
    if facts is not None and facts.colour_key is not None:
        grey = _without_colour_key(picture, grey, facts)
    return grey, colour, has_alpha


def _without_colour_key(picture: Image.Image, grey: Image.Image, facts: PngFacts) -> Image.Image:
    key = facts.colour_key or ()
    if facts.bits == 16:
        raise ImageError("a transparent colour in 16-bit RGB is not read; save without it")
    values = np.asarray(picture.convert("L") if len(key) == 1 else picture)
    scaled = [value * 255 // ((1 << facts.bits) - 1) for value in key]
    opaque = (values.reshape(*values.shape[:2], -1) != np.array(scaled)).any(axis=-1)
    return Image.fromarray(np.asarray(grey) * opaque.astype(np.uint8))


def _check_depth_is_used(rgb: Image.Image, image: ImageFile.ImageFile, facts: Any) -> None:
    """Refuse 16-bit colour that would turn almost black, as Pillow keeps only the upper byte."""
    bits = facts.bits if facts is not None else _tiff_bits(image)
    if bits == 16:
        extrema: Any = rgb.getextrema()
        _refuse_undeclared_depth(max(high for _, high in extrema) * 256)


def _grey_from_deep(image: ImageFile.ImageFile, facts: PngFacts | None) -> np.ndarray:
    samples = np.asarray(image)
    low, high, declared = _declared_range(image)
    lowest, highest = samples.min(), samples.max()
    if not declared:
        _refuse_undeclared_depth(highest)
    if not (low <= lowest and highest <= high):  # so written, NaN is outside too
        found = f"{lowest:g} to {highest:g}"
        raise ImageError(f"samples from {found} leave the declared range {low:g} to {high:g}")
    grey = _to_8_bits(samples, low, high)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        white_is_zero = image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
        return 255 - grey if white_is_zero else grey  # Pillow inverts 8 bits, not deeper ones
    if facts is not None and facts.colour_key is not None:
        grey[samples == facts.colour_key[0]] = 0
    return grey


def _to_8_bits(samples: np.ndarray, low: float, high: float) -> np.ndarray:
    values = np.arange(65536) if samples.dtype.kind == "u" and samples.itemsize == 2 else samples
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    grey = np.floor(np.clip(scaled, 0, 255) + 0.5).astype(np.uint8)
    return grey if values is samples else grey.take(samples)


def _declared_range(image: ImageFile.ImageFile) -> tuple[float, float, bool]:
    """Return low, high, and whether the file declares them beyond its number of bits."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 0.0, 65535.0, False
    bits = _tiff_bits(image)
    unsigned = image.mode.startswith("I;16")
    low = _sample_value(image, _MIN_TAGS)
    high = _sample_value(image, _MAX_TAGS)
    if not unsigned and high is None:
        raise ImageError(
            f"{bits}-bit {'float' if image.mode == 'F' else 'integer'} samples of unknown range; "
            "save as 16-bit, or declare the range by the TIFF tags SMinSampleValue and "
            "SMaxSampleValue"
        )
    depth = float((1 << bits) - 1)
    low, high = (0.0 if low is None else low), (depth if high is None else high)
    if not low < high:
        raise ImageError(f"the TIFF declares samples from {low:g} to {high:g}, not a range")
    return low, high, not unsigned or high < 65535


def _tiff_bits(image: ImageFile.ImageFile) -> int:
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 8
    return int(np.atleast_1d(image.tag_v2.get(_BITS, 1))[0])


def _sample_value(image: TiffImagePlugin.TiffImageFile, tags: tuple[int, ...]) -> float | None:
    for tag in tags:
        if tag in image.tag_v2:
            value = float(np.atleast_1d(np.asarray(image.tag_v2[tag], dtype=np.float64))[0])
            if not math.isfinite(value):
                raise ImageError(f"the TIFF declares a range that is not finite (tag {tag})")
            return value
    return None


def _refuse_undeclared_depth(highest: float) -> None:
    if highest < 4096:
        raise ImageError(
            f"16-bit samples that reach only {highest:g}: this looks like data of 12 bits or "
            "fewer whose range is not declared, and would be rendered almost black. Scale it to "
            "16 bits, or save it as TIFF with the tag MaxSampleValue"
        )


_strict_lock = threading.Lock()
_strict_users = 0
_lenient_before = False


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Keep Pillow from accepting truncated files while any thread decodes.

    Pillow's switch is global and other libraries set it, so it is restored when the last thread
    leaves.
    """
    global _strict_users, _lenient_before
    with _strict_lock:
        if _strict_users == 0:
            _lenient_before = ImageFile.LOAD_TRUNCATED_IMAGES
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        _strict_users += 1
    try:
        yield
    finally:
        with _strict_lock:
            _strict_users -= 1
            if _strict_users == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _lenient_before
