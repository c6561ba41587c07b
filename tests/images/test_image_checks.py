"""The same checks in every decoder: one grey, empty alpha, metadata that is broken, orientation."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_images import (
    COLOURS,
    DEEP,
    NOISE,
    RAMP,
    bmp_with_alpha,
    chunk,
    encode,
    grey_png,
    luminance,
    png,
    tiff,
)
from PIL import Image, ImageOps

from medembed.core.errors import ImageError
from medembed.images import metadata_stripping
from medembed.images.decode import decode_image
from medembed.images.metadata_stripping import bare_jpeg, bare_png, bare_tiff
from medembed.images.orientation import UNREAD

UNUSED = "an alpha channel that is 0 everywhere is ignored"
KINDS: list[tuple[str, dict[str, Any]]] = [
    *(("PNG", {}), ("JPEG", {}), ("TIFF", {}), ("BMP", {}), ("GIF", {})),
    *(("WEBP", {"lossless": True}), ("TIFF", {"compression": "tiff_lzw"})),
]


# --- one grey -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("grey", [0, 37, 255])
def test_an_image_of_one_grey_is_refused_in_every_format(
    kind: str, options: dict[str, Any], grey: int
) -> None:
    name = {0: r"0 \(black\)", 255: r"255 \(white\)"}.get(grey, str(grey))
    flat = np.full((40, 56), grey, np.uint8)
    with pytest.raises(ImageError, match=f"all pixels have the same grey, {name}") as caught:
        decode_image(encode(flat, kind, **options))
    assert caught.value.since == 2
    flat[33, 50] ^= 128  # one pixel is enough
    assert np.ptp(decode_image(encode(flat, kind, **options)).pixels) > 0


def test_one_grey_is_judged_on_decoded_pixels() -> None:
    """Two entries of one colour are one grey, and so are samples that 8 bits cannot tell apart."""
    image = Image.frombytes("P", (56, 40), (NOISE & 1).tobytes())
    image.putpalette([90, 90, 90] * 2)
    almost = np.where(NOISE > 99, 25700, 25701).astype(np.uint16)
    for data in (encode(image, "PNG"), grey_png(almost, 16)):
        with pytest.raises(ImageError, match="the same grey"):
            decode_image(data)


# --- alpha that is 0 everywhere -----------------------------------------------------------------


def with_alpha(alpha: np.ndarray) -> dict[str, tuple[bytes, np.ndarray]]:
    """Write images of every kind that has alpha: file, and its grey without it."""
    rgb, grey = COLOURS[..., :3], NOISE
    rgba = np.dstack([rgb, alpha])
    palette = Image.frombytes("P", (56, 40), NOISE.tobytes())
    palette.putpalette(np.repeat(np.arange(256, dtype=np.uint8), 3).tobytes())
    deep = [np.dstack([DEEP, alpha.astype(np.uint16) * 257])[row].astype(">u2").tobytes()
            for row in range(40)]  # fmt: skip
    return {
        "PNG": (encode(rgba, "PNG"), luminance(rgb)),
        "PNG, grey": (encode(Image.fromarray(np.dstack([grey, alpha]), "LA"), "PNG"), grey),
        "PNG, palette": (encode(palette, "PNG", transparency=bytes([alpha.max()] * 256)), grey),
        "PNG, 16 bits": (png(deep, (40, 56), 16, 4), (DEEP >> 8).astype(np.uint8)),
        "TIFF": (encode(rgba, "TIFF"), luminance(rgb)),
        "WebP": (encode(rgba, "WEBP", lossless=True, exact=True), luminance(rgb)),
        "BMP": (bmp_with_alpha(grey, alpha), grey),
    }


def test_an_alpha_that_is_0_everywhere_is_ignored() -> None:
    for name, (data, expected) in with_alpha(np.zeros((40, 56), np.uint8)).items():
        decoded = decode_image(data)
        assert np.array_equal(decoded.pixels, expected), name
        assert decoded.notes == (UNUSED,), name
        assert decoded.since == 2, name


def test_an_alpha_that_says_anything_is_composited_as_ever() -> None:
    alpha = np.zeros((40, 56), np.uint8)
    alpha[7, 8:11] = 255
    for name, (data, expected) in with_alpha(alpha).items():
        decoded = decode_image(data)
        shown = expected if name == "PNG, palette" else np.where(alpha == 255, expected, 0)
        assert np.array_equal(decoded.pixels, shown), name
        assert (decoded.notes, decoded.since) == ((), 1), name


# --- what no pixel needs ------------------------------------------------------------------------

LARGE = np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8).tobytes()
ANCILLARY = {
    "a large colour profile": (b"iCCP", b"x\0\0" + zlib.compress(LARGE)),
    "a colour profile that is none": (b"iCCP", b"no zlib, no name"),
    "a large comment": (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3_000_000))),
    "a comment of another compression": (b"zTXt", b"Comment\0\x07abc"),
    "a large international comment": (b"iTXt", b"Title\0\1\0en\0\0" + zlib.compress(LARGE)),
    "a comment without a name": (b"tEXt", b""),
    "a short resolution": (b"pHYs", b"\0\0"),
    "a short gamma": (b"gAMA", b"\0"),
    "a short rendering intent": (b"sRGB", b""),
    "short chromaticities": (b"cHRM", b"\0" * 5),
    "an animation of one frame, broken": (b"fcTL", b"\0"),
    "a private chunk": (b"meDi", b"\xff" * 999),
}


@pytest.mark.parametrize("name", ANCILLARY)
def test_a_broken_or_large_ancillary_chunk_costs_no_png(name: str) -> None:
    for pixels in (NOISE, DEEP, COLOURS):
        plain = encode(pixels, "PNG")
        data = plain[:33] + chunk(*ANCILLARY[name]) + plain[33:]
        after = plain[:-12] + chunk(*ANCILLARY[name]) + plain[-12:]
        for changed in (data, after):
            assert np.array_equal(decode_image(changed).pixels, decode_image(plain).pixels)
        assert bare_png(data).data == plain


@given(
    kind=st.sampled_from([b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP", b"pHYs", b"tIME", b"prVt"]),
    body=st.binary(max_size=60),
)
@settings(max_examples=80, deadline=None)
def test_no_ancillary_chunk_costs_a_png(kind: bytes, body: bytes) -> None:
    plain = encode(NOISE, "PNG")
    seen = decode_image(plain[:33] + chunk(kind, body) + plain[33:]).pixels
    assert np.array_equal(np.sort(seen, axis=None), np.sort(NOISE, axis=None))


def test_damage_to_chunks_is_borne_only_where_no_pixel_needs_them() -> None:
    image = Image.frombytes("P", (56, 40), NOISE.tobytes())
    image.putpalette(np.repeat(np.arange(256, dtype=np.uint8), 3).tobytes())
    plain = encode(image, "PNG", transparency=bytes(range(256)))
    text = chunk(b"tEXt", b"Author\0nobody")
    torn = text[:-1] + bytes([text[-1] ^ 1])
    data = plain[:33] + torn + plain[33:]
    assert np.array_equal(decode_image(data).pixels, decode_image(plain).pixels)
    for kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT"):
        damaged = bytearray(plain)
        damaged[plain.index(kind) + 5] ^= 4
        with pytest.raises(ImageError, match=f"checksum of its '{kind.decode()}' chunk is wrong"):
            decode_image(bytes(damaged))
    unknown = plain.replace(b"IDAT", b"iDAT")  # a flipped bit: not one that may be left out
    with pytest.raises(ImageError, match="checksum of its 'iDAT' chunk is wrong"):
        decode_image(unknown)


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


@given(
    marker=st.sampled_from([*range(0xE0, 0xF0), 0xFE]),
    begin=st.sampled_from([b"", b"JFIF\0", b"Adobe", b"Exif\0\0", b"ICC_PROFILE\0", b"MPF\0",
                           b"Photoshop 3.0\0", b"http://ns.adobe.com/xap/1.0/\0"]),
    body=st.binary(max_size=9),
    progressive=st.booleans(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_no_application_segment_or_comment_costs_a_jpeg(
    marker: int, begin: bytes, body: bytes, progressive: bool
) -> None:
    for image in (RAMP, COLOURS[..., :3]):
        plain = encode(image, "JPEG", progressive=progressive)
        if marker == 0xEE and begin == b"Adobe" and len(body) >= 7:
            continue  # a whole one says what the components are
        if marker == 0xE0 and begin == b"JFIF\0" and len(body) >= 9:
            continue
        data = plain[:2] + segment(marker, begin + body) + plain[2:]
        assert np.array_equal(decode_image(data).pixels, decode_image(plain).pixels)


def test_a_jpegs_colours_need_its_adobe_segment() -> None:
    """Without it, an RGB JPEG would be taken for luminance and chroma."""
    data = encode(COLOURS[..., :3], "JPEG", quality=95, keep_rgb=True)
    assert b"Adobe" in bare_jpeg(data).data
    noted = data[:2] + segment(0xFE, b"note") + segment(0xE2, b"ICC_PROFILE\0") + data[2:]
    assert bare_jpeg(noted).data == data
    assert np.abs(decode_image(data).pixels.astype(int) - luminance(COLOURS[..., :3])).mean() < 9


# --- orientation --------------------------------------------------------------------------------

XMP = b'<x tiff:Orientation="6"/>'


def exif(orientation: int, kind: int = 3, count: int = 1) -> bytes:
    entry = struct.pack("<HHIHH", 0x0112, kind, count, orientation, 0)
    return b"II*\0\x08\0\0\0\x01\0" + entry + bytes(4)


def with_exif(kind: str, body: bytes) -> bytes:
    data = encode(NOISE, kind, **({"lossless": True} if kind == "WEBP" else {}))
    if kind == "PNG":
        return data[:33] + chunk(b"eXIf", body) + data[33:]
    if kind == "JPEG":
        return data[:2] + segment(0xE1, b"Exif\0\0" + body) + data[2:]
    return encode(NOISE, "WEBP", lossless=True, exif=body)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "body",
    [bytes(40), b"\0\x08\0\x02\x01\x12\0\x03", exif(0), exif(9), exif(6, kind=2), exif(6, count=2),
     exif(6)[:9], b"II*\0\xff\xff\xff\x7f"],
)  # fmt: skip
def test_an_orientation_that_cannot_be_read_counts_as_none(kind: str, body: bytes) -> None:
    plain = decode_image(encode(NOISE, kind, **({"lossless": True} if kind == "WEBP" else {})))
    decoded = decode_image(with_exif(kind, body))
    assert np.array_equal(decoded.pixels, plain.pixels)
    assert (decoded.notes, decoded.since) == ((UNREAD,), 1)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_without_an_orientation_says_nothing(kind: str) -> None:
    entry = struct.pack("<HHIHH", 0x0100, 3, 1, 6, 0)
    for body in (b"II*\0\x08\0\0\0\x01\0" + entry + bytes(4), b"MM\0*\0\0\0\x08\0\0" + bytes(4)):
        assert decode_image(with_exif(kind, body)).notes == ()


def places_of_orientation() -> dict[str, bytes]:
    """Write it in all places that Pillow looks in."""
    plain, photo = encode(NOISE, "PNG"), encode(NOISE, "JPEG", quality=95)
    raw = b"\nexif\n      40\n" + (b"Exif\0\0" + exif(6)).hex().encode()
    texts = [
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)),
        chunk(b"tEXt", b"Raw profile type exif\0" + raw),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0en\0x\0" + zlib.compress(XMP)),
        chunk(b"eXIf", exif(6)),
        chunk(b"eXIf", exif(6, kind=4)),
    ]
    found = {f"PNG {i}": plain[:33] + text + plain[33:] for i, text in enumerate(texts)}
    xap = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)
    both = segment(0xE1, b"Exif\0\0" + exif(6)) + segment(0xE1, xap[4:].replace(b"6", b"3"))
    parts = exif(6)
    split = segment(0xE1, b"Exif\0\0" + parts[:12]) + segment(0xE1, b"Exif\0\0" + parts[12:])
    for name, segments in {"XMP": xap, "both": both, "split": split}.items():
        found[f"JPEG {name}"] = photo[:2] + segments + photo[2:]
    found["WebP XMP"] = encode(NOISE, "WEBP", lossless=True, xmp=XMP)
    found["TIFF XMP"] = encode(NOISE, "TIFF", tiffinfo={700: XMP})
    found["TIFF"] = encode(NOISE, "TIFF", tiffinfo={274: 6})
    return found


def test_orientation_is_found_wherever_pillow_finds_it() -> None:
    for name, data in places_of_orientation().items():
        with Image.open(io.BytesIO(data)) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("L"))
        decoded = decode_image(data)
        assert decoded.pixels.shape == (56, 40), name
        assert np.array_equal(decoded.pixels, expected), name
        assert decoded.notes == (), name


def test_a_checksum_tells_that_an_orientation_cannot_be_read() -> None:
    plain = encode(NOISE, "PNG")
    body = chunk(b"eXIf", exif(6))
    decoded = decode_image(plain[:33] + body[:-1] + bytes([body[-1] ^ 1]) + plain[33:])
    assert (decoded.pixels.shape, decoded.notes) == (NOISE.shape, (UNREAD,))


# --- TIFF: tags and pages -----------------------------------------------------------------------


@pytest.mark.parametrize("tag", [270, 282, 305, 34675, 34665, 34853, 37724, 42112, 65000])
@pytest.mark.parametrize("kind", [2, 4, 7, 13, 99])
def test_a_broken_tag_that_no_pixel_needs_costs_no_tiff(tag: int, kind: int) -> None:
    """Its count is absurd, and its offset beyond the file."""
    data = bytearray(tiff(DEEP, **{f"t{tag}": ("I", 0x7FFFFFF0)}))
    place = data.index(struct.pack("<HH", tag, 4))
    struct.pack_into("<HI", data, place + 2, kind, 0x7FFFFFFF)
    decoded = decode_image(bytes(data))
    assert np.array_equal(decoded.pixels, decode_image(tiff(DEEP)).pixels)
    assert decoded.notes == ()


def test_an_orientation_of_a_tiff_that_cannot_be_read_counts_as_none() -> None:
    plain = decode_image(tiff(DEEP)).pixels
    for value in (("H", 0), ("H", 77), ("f", 6.0)):
        decoded = decode_image(tiff(DEEP, t274=value))
        assert np.array_equal(decoded.pixels, plain)
        assert decoded.notes == (UNREAD,)


def pages(*images: tuple[np.ndarray, dict[int, int]], big: bool = False) -> bytes:
    """Write a TIFF of several pages with these tags."""
    first, *others = [Image.fromarray(pixels) for pixels, _ in images]
    for image, (_, tags) in zip(others, images[1:], strict=True):
        image.encoderinfo = {"tiffinfo": tags}
    return encode(
        first, "TIFF", save_all=True, append_images=others, tiffinfo=images[0][1], big_tiff=big
    )


SMALL, MASK = RAMP[::4, ::4].copy(), (NOISE > 99).astype(np.uint8) * 255


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("film", [NOISE, DEEP])
def test_thumbnails_and_masks_of_a_tiff_are_passed_over(film: np.ndarray, big: bool) -> None:
    expected = decode_image(encode(film, "TIFF")).pixels
    page, thumb, mask = (film, {}), (SMALL, {254: 1}), (MASK, {254: 4})
    small_mask, old = (SMALL, {254: 5}), (SMALL, {255: 2})
    orders = [(page, thumb), (thumb, page), (mask, page, thumb), (page, small_mask, old)]
    for order in orders:
        assert np.array_equal(decode_image(pages(*order, big=big)).pixels, expected)
    alone = decode_image(pages(thumb, big=big)).pixels  # there is no other to take
    assert np.array_equal(alone, SMALL)


def test_several_real_pages_of_a_tiff_are_refused() -> None:
    for order in ([(NOISE, {}), (RAMP, {})], [(NOISE, {254: 2}), (SMALL, {254: 1}), (RAMP, {})]):
        with pytest.raises(ImageError, match="the TIFF holds more than one picture"):
            decode_image(pages(*order))
    with pytest.raises(ImageError, match="all thumbnails or masks"):
        decode_image(pages((SMALL, {254: 1}), (MASK, {254: 4})))


def test_the_pages_of_a_tiff_may_not_go_round_or_on_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    thumb, data = (SMALL, {254: 1}), bytearray(tiff(NOISE))
    place = 8 + 2 + 12 * int.from_bytes(data[8:10], "little")
    for next_page in (8, len(data) - 1, 0x7FFFFFFF):
        data[place : place + 4] = struct.pack("<I", next_page)
        with pytest.raises(ImageError, match="cannot all be found"):
            decode_image(bytes(data))
    monkeypatch.setattr(metadata_stripping, "MAX_PAGES", 3)
    assert decode_image(pages((NOISE, {}), thumb, thumb)).pixels.shape == NOISE.shape
    with pytest.raises(ImageError, match="more than 3 pages"):
        decode_image(pages((NOISE, {}), thumb, thumb, thumb))


def test_a_tiff_is_read_as_it_stands_where_pillow_has_to_say_what_is_wrong() -> None:
    assert bare_tiff(b"II*\0").data == b"II*\0"
    assert bare_tiff(b"II*\0" + struct.pack("<I", 99)).data == b"II*\0" + struct.pack("<I", 99)
