"""Which transfer syntaxes of DICOM can be decoded here, by which codec, and what to install."""

from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from medembed.core.errors import ImageError
from medembed.images.dicom.file import UID, get_decoder

__all__ = ["OWN", "Codec", "decode_jpeg", "list_codecs", "require_codec"]

OWN = "imagecodecs"  # called directly, as it is not a plugin of pydicom; all others are
# In order of preference. Only the first codec that is installed is used, so that one installation
# always produces the same pixels. pydicom recommends pylibjpeg-libjpeg for 12-bit and lossless
# JPEG, which is under the GPL; imagecodecs (BSD) decodes both with libjpeg-turbo 3. pylibjpeg-rle
# is seven times as fast as pydicom at RLE, but panics on damaged data, which `except Exception`
# does not catch.
_JPEG_2000 = ("pylibjpeg", "pillow")
_PLUGINS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "1.2.840.10008.1.2.5": ("RLE", "pydicom", ("pydicom",)),
    "1.2.840.10008.1.2.4.50": ("JPEG", "pillow", ("pillow",)),
    "1.2.840.10008.1.2.4.51": ("JPEG of 12 bits", OWN, (OWN, "pylibjpeg")),
    "1.2.840.10008.1.2.4.57": ("lossless JPEG", OWN, (OWN, "pylibjpeg")),
    "1.2.840.10008.1.2.4.70": ("lossless JPEG", OWN, (OWN, "pylibjpeg")),
    "1.2.840.10008.1.2.4.80": ("JPEG-LS", "pyjpegls", ("pyjpegls", "pylibjpeg")),
    "1.2.840.10008.1.2.4.81": ("JPEG-LS", "pyjpegls", ("pyjpegls", "pylibjpeg")),
    "1.2.840.10008.1.2.4.90": ("JPEG 2000", "pylibjpeg-openjpeg", _JPEG_2000),
    "1.2.840.10008.1.2.4.91": ("JPEG 2000", "pylibjpeg-openjpeg", _JPEG_2000),
    "1.2.840.10008.1.2.4.201": ("HTJ2K", "pylibjpeg-openjpeg", ("pylibjpeg",)),
    "1.2.840.10008.1.2.4.202": ("HTJ2K", "pylibjpeg-openjpeg", ("pylibjpeg",)),
    "1.2.840.10008.1.2.4.203": ("HTJ2K", "pylibjpeg-openjpeg", ("pylibjpeg",)),
}
_NATIVE = ("", ".1", ".1.99", ".2")  # 1.2.840.10008.1.2: implicit, explicit, deflated, big endian


@dataclass(frozen=True)
class Codec:
    """One family of compressed pixel data.

    Attributes
    ----------
    name : str
        Its usual name.
    plugin : str
        The installed codec; empty if there is none.
    remedy : str
        What to install if no codec is.
    """

    name: str
    plugin: str
    remedy: str


def list_codecs() -> list[Codec]:
    """Return every family of compressed pixel data, and whether it can be decoded here."""
    found = {}
    for uid, (name, package, plugins) in _PLUGINS.items():
        found[name] = Codec(name, _first(uid, plugins), _remedy(package))
    return list(found.values())


def require_codec(syntax: UID, bits: int) -> str:
    """Return the plugin that decodes a transfer syntax, or an empty string if uncompressed.

    Parameters
    ----------
    syntax : pydicom.uid.UID
    bits : int
        Bits Stored.

    Raises
    ------
    ImageError
        The syntax is not supported, or its codec is not installed; the message then names the
        package to install.
    """
    uid = str(syntax)
    if uid in [f"1.2.840.10008.1.2{end}" for end in _NATIVE]:
        return ""
    if uid not in _PLUGINS:
        known = f": {syntax.name}" if syntax.name != syntax else ""
        raise ImageError(f"the DICOM's transfer syntax is not read{known}")
    name, package, plugins = _PLUGINS[uid]
    if name == "JPEG of 12 bits" and bits == 8:
        plugins = ("pillow", *plugins)
    plugin = _first(uid, plugins)
    if not plugin:
        raise ImageError(f"no codec for {name} is installed: {_remedy(package)}")
    return plugin


def decode_jpeg(frame: bytes, photometric: str) -> np.ndarray:
    """Decode a JPEG of any process and depth with imagecodecs, colour to RGB.

    Returns
    -------
    ndarray
        uint8 or uint16, (H, W) or (H, W, 3); signed samples as their bit patterns.
    """
    import imagecodecs

    space = {"RGB": "RGB", "YBR_FULL": "YCBCR", "YBR_FULL_422": "YCBCR"}.get(photometric)
    pixels: np.ndarray = imagecodecs.jpeg8_decode(
        frame, colorspace=space, outcolorspace="RGB" if space else None
    )
    return pixels


def _first(uid: str, plugins: tuple[str, ...]) -> str:
    there = set(get_decoder(UID(uid)).available_plugins)
    if find_spec(OWN):
        there.add(OWN)
    return next((plugin for plugin in plugins if plugin in there), "")


def _remedy(package: str) -> str:
    return f"pip install 'medembed[dicom]', which brings {package}"
