import hashlib
import io
import struct
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_images import COLOURS, DEEP, NOISE, RAMP, chunk, encode, grey_png, luminance, png, tiff
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from medembed.core.errors import ImageError
from medembed.images import decode
from medembed.images.decode import IMAGES_VERSION, MAX_PIXELS, decode_image


def to_8_bits(samples: np.ndarray, low: float = 0, high: float = 65535) -> np.ndarray:
    exact = (samples.astype(np.float64) - low) * 255 / (high - low)
    return np.floor(exact + 0.5).astype(np.uint8)


# --- what a pixel becomes --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF"])
def test_8_bit_grey_is_untouched(kind: str) -> None:
    decoded = decode_image(encode(NOISE, kind))
    assert np.array_equal(decoded.pixels, NOISE)
    assert decoded.pixels.dtype == np.uint8
    assert not decoded.colour


def test_lossless_webp_and_compressed_tiff_are_untouched() -> None:
    assert np.array_equal(decode_image(encode(NOISE, "WEBP", lossless=True)).pixels, NOISE)
    for compression in ("tiff_lzw", "tiff_deflate", "packbits", "tiff_adobe_deflate"):
        data = encode(NOISE, "TIFF", compression=compression)
        assert np.array_equal(decode_image(data).pixels, NOISE), compression


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_are_spread_over_the_range(bits: int) -> None:
    samples = (NOISE >> (8 - bits)).astype(np.uint8)
    expected = samples * (255 // ((1 << bits) - 1))
    assert np.array_equal(decode_image(grey_png(samples, bits)).pixels, expected)


def test_16_bits_are_divided_by_257_and_rounded() -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.round(ramp / 257).astype(np.uint8)
    for data in (grey_png(ramp, 16), encode(ramp, "PNG"), encode(ramp, "TIFF"), tiff(ramp)):
        assert np.array_equal(decode_image(data).pixels, expected)
    big_endian = Image.frombytes("I;16B", (256, 256), ramp.astype(">u2").tobytes())
    assert np.array_equal(decode_image(encode(big_endian, "TIFF")).pixels, expected)


def test_grey_in_rgb_is_grey_and_colour_is_counted() -> None:
    grey = np.repeat(NOISE[..., None], 3, axis=2)
    decoded = decode_image(encode(grey, "PNG"))
    assert np.array_equal(decoded.pixels, NOISE)
    assert not decoded.colour
    coloured = decode_image(encode(COLOURS[..., :3], "PNG"))
    assert np.array_equal(coloured.pixels, luminance(COLOURS[..., :3]))
    assert coloured.colour
    one_pixel = grey.copy()
    one_pixel[7, 8, 2] ^= 1
    assert decode_image(encode(one_pixel, "PNG")).colour


def test_alpha_is_composited_over_black_before_luminance() -> None:
    decoded = decode_image(encode(COLOURS, "PNG"))
    expected = COLOURS[..., :3].astype(float) @ [0.299, 0.587, 0.114] * COLOURS[..., 3] / 255
    assert np.abs(decoded.pixels - expected).max() <= 1.5
    assert decoded.colour
    with_alpha = Image.merge("LA", [Image.fromarray(NOISE), Image.fromarray(RAMP)])
    decoded = decode_image(encode(with_alpha, "PNG"))
    assert np.abs(decoded.pixels - NOISE.astype(float) * RAMP / 255).max() <= 1
    assert not decoded.colour


def test_palettes_are_expanded_with_their_transparency() -> None:
    palette = np.random.default_rng(3).integers(0, 256, (256, 3), dtype=np.uint8)
    image = Image.fromarray(NOISE, "L").convert("L")
    image = Image.frombytes("P", image.size, NOISE.tobytes())
    image.putpalette(palette.tobytes())
    expected = luminance(palette)[NOISE]
    for kind in ("PNG", "TIFF", "BMP", "GIF"):
        decoded = decode_image(encode(image, kind))
        assert np.array_equal(decoded.pixels, expected), kind
        assert decoded.colour, kind
    decoded = decode_image(encode(image, "PNG", transparency=bytes(100)))  # entries 0 to 99
    assert np.array_equal(decoded.pixels, np.where(NOISE < 100, 0, expected))


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_a_transparent_grey_becomes_black(bits: int) -> None:
    samples = DEEP if bits == 16 else (NOISE >> (8 - bits)).astype(np.uint8)
    key = int(samples[5, 5]) or 1
    data = grey_png(samples, bits, chunk(b"tRNS", struct.pack(">H", key)))
    plain = decode_image(grey_png(samples, bits)).pixels
    assert np.array_equal(decode_image(data).pixels, np.where(samples == key, 0, plain))


def test_of_two_greys_a_transparent_one_leaves_no_image() -> None:
    """White made transparent is black, as the rest is; black made transparent stays as it is."""
    samples = NOISE >> 7
    with pytest.raises(ImageError, match=r"all pixels have the same grey, 0 \(black\)"):
        decode_image(grey_png(samples, 1, chunk(b"tRNS", b"\0\1")))
    seen = decode_image(grey_png(samples, 1, chunk(b"tRNS", b"\0\0"))).pixels
    assert np.array_equal(seen, samples * 255)


def test_a_transparent_colour_becomes_black() -> None:
    rgb = COLOURS[..., :3]
    key = struct.pack(">HHH", *rgb[3, 4].tolist())
    data = png([row.tobytes() for row in rgb], (40, 56), 8, 2, chunk(b"tRNS", key))
    matches = (rgb == rgb[3, 4]).all(axis=2)
    assert np.array_equal(decode_image(data).pixels, np.where(matches, 0, luminance(rgb)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_orientation_is_applied_once(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(RAMP, kind, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(decode_image(data).pixels, expected)
    assert (decode_image(data).pixels.shape == RAMP.shape) == (orientation < 5)


def test_orientation_holds_for_deep_images() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    expected = np.rot90(to_8_bits(DEEP), -1)
    assert np.array_equal(decode_image(encode(DEEP, "PNG", exif=exif)).pixels, expected)
    assert np.array_equal(decode_image(tiff(DEEP, t274=("H", 6))).pixels, expected)


def test_jpegs_of_every_colour_space_are_read() -> None:
    smooth = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=2)
    for mode in ("L", "RGB", "CMYK"):
        image = Image.fromarray(smooth).convert(mode)
        data = encode(image, "JPEG", quality=95)
        decoded = decode_image(data)
        with Image.open(io.BytesIO(data)) as opened:
            expected = np.asarray(opened.convert("RGB").convert("L")).astype(int)
        assert np.abs(decoded.pixels - expected).max() <= 1, mode  # libjpeg's release may round
        assert decoded.colour == (mode != "L")
    assert np.array_equal(  # grey kept as RGB stays grey through JPEG
        decode_image(encode(np.repeat(RAMP[..., None], 3, axis=2), "JPEG")).colour, False
    )


# --- TIFF's declarations ---------------------------------------------------------------------


def test_white_is_zero_is_inverted_at_every_depth() -> None:
    assert np.array_equal(decode_image(tiff(NOISE, 0)).pixels, 255 - NOISE)
    assert np.array_equal(decode_image(tiff(DEEP, 0)).pixels, 255 - to_8_bits(DEEP))
    floats = (NOISE / 255).astype(np.float32)
    data = tiff(floats, 0, t340=("f", 0.0), t341=("f", 1.0))
    assert np.array_equal(decode_image(data).pixels, 255 - NOISE)


@pytest.mark.parametrize("tags", [("t280", "t281"), ("t340", "t341")])
def test_a_declared_range_is_spread_over_8_bits(tags: tuple[str, str]) -> None:
    twelve = (DEEP >> 4).astype(np.uint16)
    data = tiff(twelve, **{tags[1]: ("H", 4095)})
    assert np.array_equal(decode_image(data).pixels, to_8_bits(twelve, 0, 4095))
    low, high = int(twelve.min()), int(twelve.max())
    data = tiff(twelve, **{tags[0]: ("H", low), tags[1]: ("H", high)})
    assert np.array_equal(decode_image(data).pixels, to_8_bits(twelve, low, high))


def test_signed_long_and_float_samples_need_a_declared_range() -> None:
    signed = (DEEP.astype(np.int32) - 32768).astype(np.int16)
    long = DEEP.astype(np.int32) * 1000
    floats = (DEEP / 65535).astype(np.float32)
    for samples, low, high in [(signed, -32768, 32767), (long, 0, 65535000), (floats, 0, 1)]:
        with pytest.raises(ImageError, match=r"samples of unknown range.*SMaxSampleValue"):
            decode_image(tiff(samples))
        data = tiff(samples, t340=("f", low), t341=("f", high))
        ours = decode_image(data).pixels.astype(int)
        assert np.abs(ours - to_8_bits(samples, low, high)).max() <= 1  # float32 tag
        assert (ours.min(), ours.max()) == (0, 255)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (tiff(DEEP, t281=("H", 4095)), "leave the declared range 0 to 4095"),
        (tiff(DEEP, t280=("H", 9), t281=("H", 9)), "not a range"),
        (tiff(DEEP, t341=("f", float("nan"))), "not finite"),
        (tiff(np.full((4, 4), np.nan, np.float32), t341=("f", 1.0)), "leave the declared range"),
        (tiff(NOISE, None), "whether 0 is black or white"),
        (tiff(NOISE.view(np.int8)), "signed"),
        (tiff(NOISE, t257=("I", 60)), "do not cover the image"),
    ],
)
def test_contradictory_tiffs_are_refused(data: bytes, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        decode_image(data)


@pytest.mark.parametrize("write", [lambda x: grey_png(x, 16), tiff])
def test_undeclared_12_bit_data_are_refused_and_not_rendered_black(
    write: Callable[[np.ndarray], bytes],
) -> None:
    with pytest.raises(ImageError, match=r"12 bits or fewer .* Scale it to 16 bits, or save"):
        decode_image(write((DEEP >> 4).astype(np.uint16)))
    decode_image(write((DEEP >> 3).astype(np.uint16)))


def test_undeclared_12_bit_colour_is_refused() -> None:
    dark = np.random.default_rng(0).integers(0, 4096, (40, 56 * 3), dtype=np.uint16)
    for shift, refused in [(0, True), (4, False)]:
        rows = [row.astype(">u2").tobytes() for row in dark << shift]
        data = png(rows, (40, 56), 16, 2)
        if refused:
            with pytest.raises(ImageError, match="almost black"):
                decode_image(data)
        else:
            assert decode_image(data).colour


def test_significant_bits_do_not_narrow_a_pngs_range() -> None:
    """PNG 11.3.2.7: samples fill the bit depth whatever sBIT says of their origin."""
    data = grey_png(DEEP, 16, chunk(b"sBIT", b"\x0c"))
    assert np.array_equal(decode_image(data).pixels, to_8_bits(DEEP))


# --- what is refused -------------------------------------------------------------------------


def apng() -> bytes:
    frames = [Image.fromarray(NOISE), Image.fromarray(RAMP)]
    return encode(frames[0], "PNG", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "the file is empty"),
        (b"\0" * 128 + b"DICM" + b"\0" * 20, "of an unknown kind and holds no image"),
        (b"<html>not here</html>", r"not an image of a known kind \(PNG, JPEG, TIFF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not an image"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "not an image"),
        (apng(), "the PNG is animated"),
        (
            encode(NOISE, "GIF", save_all=True, append_images=[Image.fromarray(RAMP)]),
            "the GIF holds more than one picture",
        ),
        (
            encode(NOISE, "TIFF", save_all=True, append_images=[Image.fromarray(RAMP)]),
            "the TIFF holds more than one picture",
        ),
        (
            encode(NOISE, "WEBP", save_all=True, append_images=[Image.fromarray(RAMP)]),
            "the WebP holds more than one picture",
        ),
        (png([], (0, 0), 8, 0), "header chunk is damaged"),
        (png([], (1 << 16, 1 << 16), 8, 0), "4295 megapixels; the limit is 80"),
        (tiff(NOISE, t256=("I", 100_000), t257=("I", 100_000)), "10000 megapixels"),
        (png([row.tobytes() for row in NOISE[:30]], (40, 56), 8, 0), "end before its last row"),
        (b"\xff\xd8\xff\xe0", "no end-of-image marker"),
    ],
)
def test_what_is_not_one_whole_still_image_is_refused_with_the_reason(
    data: bytes, said: str
) -> None:
    with pytest.raises(ImageError, match=said):
        decode_image(data)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("TIFF", {}),
        ("BMP", {}),
        ("GIF", {}),
        ("WEBP", {}),
    ],
)
def test_no_part_of_a_file_is_taken_for_the_whole(kind: str, options: dict[str, object]) -> None:
    data = encode(NOISE, kind, **options)
    whole = decode_image(data).pixels
    step = max(1, len(data) // 60)
    for length in [*range(0, len(data), step), len(data) - 2, len(data) - 1]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of torn EXIF and TIFF directories
            try:
                part = decode_image(data[:length]).pixels
            except ImageError:
                continue
        assert np.array_equal(part, whole), f"{length} of {len(data)} bytes"


def test_a_jpeg_cut_short_and_closed_again_is_no_grey_band() -> None:
    for options in ({}, {"restart_marker_rows": 1}):
        for image in (np.kron(NOISE, np.ones((4, 4), np.uint8)), COLOURS[..., :3]):
            data = encode(image, "JPEG", quality=90, **options)
            for share in (0.5, 0.8, 0.95):
                cut = data[: int(len(data) * share)].rstrip(b"\xff") + b"\xff\xd9"
                with pytest.raises(ImageError, match="end before its last row"):
                    decode_image(cut)
            assert decode_image(data).pixels.shape == image.shape[:2]


def test_a_whole_jpeg_may_end_in_mid_grey() -> None:
    flat = np.full((40, 56), 128, np.uint8)
    flat[:8] = RAMP[:8]  # a row of blocks; all others are of the grey that fills up
    for image in (flat, np.repeat(flat[..., None], 3, axis=2)):
        assert (decode_image(encode(image, "JPEG")).pixels[8:] == 128).all()


def test_bytes_after_the_end_are_tolerated() -> None:
    for kind in ("PNG", "JPEG", "TIFF"):
        data = encode(NOISE, kind)
        after = decode_image(data + b"\0\xff\xd9trailing")
        assert np.array_equal(after.pixels, decode_image(data).pixels), kind


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_any_flipped_bit_of_a_png_is_seen(place: float, bit: int) -> None:
    data = bytearray(encode(NOISE, "PNG"))
    data[int(place * len(data))] ^= 1 << bit
    with pytest.raises(ImageError):
        decode_image(bytes(data))


def test_a_wrong_checksum_of_image_data_is_seen() -> None:
    """Pillow skips these four bytes."""
    data = bytearray(encode(NOISE, "PNG"))
    data[data.index(b"IEND") - 5] ^= 1
    with pytest.raises(ImageError, match="checksum of its 'IDAT' chunk is wrong"):
        decode_image(bytes(data))


SEEDS = [
    encode(NOISE, "PNG"),
    encode(COLOURS, "PNG"),
    encode(DEEP, "PNG"),
    encode(RAMP, "JPEG"),
    encode(COLOURS[..., :3], "JPEG", progressive=True),
    encode(DEEP, "TIFF"),
    encode(RAMP, "TIFF", compression="tiff_lzw"),
    tiff(DEEP, t281=("H", 65535)),
    encode(RAMP, "BMP"),
    encode(RAMP, "GIF"),
    encode(RAMP, "WEBP"),
]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of what it skips
@given(
    seed=st.sampled_from(SEEDS),
    edits=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=4)), min_size=1, max_size=4
    ),
    keep=st.floats(0.1, 1),
    mend=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_damage_is_an_image_error_or_an_image(
    seed: bytes, edits: list[tuple[float, bytes]], keep: float, mend: bool
) -> None:
    data = bytearray(seed)
    for place, new in edits:
        start = int(place * len(data))
        data[start : start + len(new)] = new
    data = data[: int(len(data) * keep) + 1]
    damaged = mend_checksums(bytes(data)) if mend else bytes(data)
    try:
        decoded = decode_image(damaged)
    except ImageError:
        return
    assert decoded.pixels.dtype == np.uint8
    assert decoded.pixels.ndim == 2
    assert 0 < decoded.pixels.size <= MAX_PIXELS


def mend_checksums(data: bytes) -> bytes:
    """Give a damaged PNG right checksums, so that the damage reaches Pillow."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    mended, position = data[:8], 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        body = data[position + 8 : position + 8 + min(length, len(data))]
        mended += chunk(data[position + 4 : position + 8], body)
        position += 12 + len(body)
    return mended


def test_pillow_told_to_be_lenient_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    # The header of a TIFF is whole; only Pillow itself notices that the strip is short.
    with pytest.raises(ImageError, match="truncated"):
        decode_image(tiff(NOISE)[:-300])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_threads_do_not_lift_each_others_strictness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    good, bad = encode(np.tile(NOISE, (8, 8)), "PNG"), tiff(NOISE)[:-300]

    def refused(data: bytes) -> bool:
        try:
            decode_image(data)
        except ImageError:
            return True
        return False

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(refused, [good, bad] * 100))
    assert answers == [False, True] * 100
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_an_unexpected_error_of_the_reader_is_an_image_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for error in (KeyError("tag"), MemoryError(), RecursionError(), OverflowError("big")):

        def fail(*_: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
        with pytest.raises(ImageError, match="the PNG"):
            decode_image(encode(NOISE, "PNG"))


# --- real files ------------------------------------------------------------------------------


def test_real_radiographs_decode_and_the_torn_ones_are_refused(shared_data: Path) -> None:
    refused = {}
    for path in sorted((shared_data / "fracatlas" / "images").glob("*/*.jpg")):
        try:
            decoded = decode_image(path.read_bytes())
        except ImageError as error:
            refused[path.name] = str(error)
            continue
        with Image.open(path) as image:
            assert np.array_equal(decoded.pixels, np.asarray(image.convert("L"))), path.name
        assert not decoded.colour, path.name
    assert sorted(refused) == ["IMG0004134.jpg", "IMG0004143.jpg"]
    assert all("truncated" in reason for reason in refused.values())


def test_real_16_bit_radiographs_span_the_range_unsaturated(shared_data: Path) -> None:
    paths = sorted((shared_data / "grazpedwri").glob("*/*.png"))
    assert len(paths) == 3
    for path in paths:
        pixels = decode_image(path.read_bytes()).pixels
        with Image.open(path) as image:
            assert np.abs(pixels - np.asarray(image) / 257).max() <= 0.5
        assert (pixels.min(), pixels.max()) == (0, 255)
        assert (pixels == 255).mean() < 0.001
        assert len(np.unique(pixels)) > 150


# --- yesterday's pixels ----------------------------------------------------------------------


def golden_files() -> dict[str, bytes]:
    """Write files of lossless formats whose decoded pixels must never change unannounced."""
    exif = Image.Exif()
    exif[0x0112] = 7
    rgb = [row.tobytes() for row in COLOURS[..., :3]]
    two_tones = np.repeat(RAMP, 2, axis=1)[:, ::2]
    return {
        "grey 8": encode(NOISE, "PNG"),
        "grey 2": grey_png(NOISE >> 6, 2),
        "grey 16": grey_png(DEEP, 16),
        "grey 16 with a transparent level": grey_png(
            DEEP >> 15 << 15 | 9, 16, chunk(b"tRNS", b"\0\x09")
        ),
        "rgb": png(rgb, (40, 56), 8, 2),
        "rgba": encode(COLOURS, "PNG"),
        "grey and alpha": encode(Image.fromarray(COLOURS[..., :2], "LA"), "PNG"),
        "orientation 7": encode(two_tones, "PNG", exif=exif),
        "tiff white is zero 16": tiff(DEEP, 0),
        "tiff 12 bits declared": tiff((DEEP >> 4).astype(np.uint16), t281=("H", 4095)),
        "tiff float": tiff(DEEP / np.float32(65535), t340=("f", 0.0), t341=("f", 1.0)),
    }


GOLDEN = {
    "version": 2,
    "grey 8": "626889dbb7a10b6c",
    "grey 2": "68233182f509c29a",
    "grey 16": "410ae5936a7aa506",
    "grey 16 with a transparent level": "0ae4a860c6abea4a",
    "rgb": "2fb89dc6f9ea8926",
    "rgba": "9137b17881d8893c",
    "grey and alpha": "134a37d4a67c89cc",
    "orientation 7": "edd98d29329d90bb",
    "tiff white is zero 16": "7cfeac94b7170c9f",
    "tiff 12 bits declared": "80abb5804465f97e",
    "tiff float": "410ae5936a7aa506",
}


def test_decoded_pixels_change_only_with_images_version() -> None:
    """If this fails and the change is meant: raise IMAGES_VERSION and write the new hashes."""
    hashes = {}
    for name, data in golden_files().items():
        pixels = decode_image(data).pixels
        content = repr(pixels.shape).encode() + pixels.tobytes()
        hashes[name] = hashlib.sha256(content).hexdigest()[:16]
    assert {"version": decode.IMAGES_VERSION, **hashes} == GOLDEN
    assert IMAGES_VERSION == 2
