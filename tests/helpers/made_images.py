"""Small images of known pixels, and files of them that are made byte by byte."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

RAMP = np.add.outer(3 * np.arange(40), 2 * np.arange(56)).astype(np.uint8)
NOISE = np.random.default_rng(0).integers(0, 256, (40, 56), dtype=np.uint8)
DEEP = np.random.default_rng(1).integers(0, 65536, (40, 56), dtype=np.uint16)
COLOURS = np.random.default_rng(2).integers(0, 256, (40, 56, 4), dtype=np.uint8)


def encode(pixels: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def png(
    rows: list[bytes], size: tuple[int, int], bits: int, colour_type: int, *extra: bytes
) -> bytes:
    """Write a PNG by hand, of unfiltered rows: independent of Pillow's writer."""
    header = struct.pack(">IIBBBBB", size[1], size[0], bits, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    body = chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def grey_png(samples: np.ndarray, bits: int, *extra: bytes) -> bytes:
    if bits == 16:
        rows = [row.astype(">u2").tobytes() for row in samples]
    else:
        unpacked = [np.unpackbits(row[:, None], axis=1)[:, 8 - bits :].ravel() for row in samples]
        rows = [np.packbits(row).tobytes() for row in unpacked]
    return png(rows, samples.shape, bits, 0, *extra)


def tiff(samples: np.ndarray, photometric: int | None = 1, **tags: tuple[str, float]) -> bytes:
    """Write a one-strip TIFF by hand; `tags` as t281=("H", 4095): struct code and value."""
    kinds = {"H": 3, "I": 4, "h": 8, "f": 11}
    sample_format = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    entries = {256: ("I", samples.shape[1]), 257: ("I", samples.shape[0]), 259: ("H", 1)}
    entries |= {258: ("H", samples.itemsize * 8), 262: ("H", photometric), 277: ("H", 1)}
    entries |= {278: ("I", samples.shape[0]), 279: ("I", samples.nbytes), 273: ("I", 0)}
    entries |= {339: ("H", sample_format)}
    entries |= {int(name[1:]): value for name, value in tags.items()}
    if photometric is None:
        del entries[262]
    start = 8 + 2 + 12 * len(entries) + 4
    entries[273] = ("I", start)
    directory = struct.pack("<H", len(entries))
    for tag, (code, value) in sorted(entries.items()):
        field = struct.pack("<" + code, value).ljust(4, b"\0")
        directory += struct.pack("<HHI", tag, kinds[code], 1) + field
    little = samples.astype(samples.dtype.newbyteorder("<")).tobytes()
    return struct.pack("<2sHI", b"II", 42, 8) + directory + struct.pack("<I", 0) + little


def luminance(rgb: np.ndarray) -> np.ndarray:
    """ITU-R BT.601 in the 16-bit fixed point of Pillow's mode L."""
    weighted = rgb.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
    return ((weighted + 0x8000) >> 16).astype(np.uint8)


def bmp_with_alpha(grey: np.ndarray, alpha: np.ndarray) -> bytes:
    """Write a BMP of 32 bits with a mask for alpha, bottom up."""
    height, width = grey.shape
    fields = (56, width, height, 1, 32, 3, 4 * grey.size, 0, 0, 0, 0)
    header = struct.pack("<IiiHHIIiiII4I", *fields, 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    start = 14 + len(header)
    body = np.dstack([grey, grey, grey, alpha]).astype(np.uint8)[::-1].tobytes()
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + header + body
