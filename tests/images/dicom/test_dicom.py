"""DICOM becomes grey by the standard's transforms; pydicom's own functions are the oracle."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_dicom import DEEP, RAMP, change, dataset, dicom, put_frame, read, relabelled, write
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from medembed.core.errors import ImageError
from medembed.encoders.loading import load_encoder
from medembed.encoders.preprocessing import prepare
from medembed.images.decode import IMAGES_VERSION, decode_image
from medembed.images.dicom import codecs
from medembed.images.dicom import file as dicom_file
from medembed.images.dicom.codestreams import read_codestream
from medembed.images.intensity import Intensity, apply_modality, robust_range

WHOLE = {"BitsStored": 12, "WindowCenter": 2048, "WindowWidth": 4096}
NEGATIVE_12 = (DEEP.astype(np.int16) - 2048).astype(np.int16)


def to_8_bits(shares: np.ndarray) -> np.ndarray:
    return np.floor(np.round(255 * np.clip(shares, 0, 1), 6) + 0.5).astype(np.uint8)


def oracle(data: bytes) -> np.ndarray:
    """Render by pydicom's functions alone, from the range that they give to the window's output."""
    made = read(data)
    values = apply_modality_lut(made.pixel_array, made)
    with np.errstate(over="ignore"):
        windowed = apply_voi_lut(values, made)
    if made.get("VOILUTSequence"):
        low, high = 0.0, 2.0 ** made.VOILUTSequence[0].LUTDescriptor[2] - 1
    elif made.get("ModalityLUTSequence"):
        low, high = 0.0, 2.0 ** made.ModalityLUTSequence[0].LUTDescriptor[2] - 1
    else:
        bits, signed = made.BitsStored, made.PixelRepresentation
        ends = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2**bits - 1])
        low, high = ends * float(made.get("RescaleSlope", 1)) + float(
            made.get("RescaleIntercept", 0)
        )
    shares = (windowed.astype(np.float64) - low) / (high - low)
    return to_8_bits(1 - shares if made.PhotometricInterpretation == "MONOCHROME1" else shares)


def decoded(data: bytes, **choice: Any) -> np.ndarray:
    return decode_image(data, Intensity(**choice)).pixels


def lut(entries: np.ndarray, first: int, bits: int, *, name: str = "") -> Sequence:
    item = Dataset()
    item.LUTDescriptor = [len(entries) % 65536, first, bits]
    item["LUTDescriptor"].VR = "SS" if first < 0 else "US"
    item.LUTData = entries.astype("<u2").tobytes()
    item["LUTData"].VR = "OW"
    if name:
        item.LUTExplanation = name
    return Sequence([item])


# --- modality, window, presentation against the oracle ----------------------------------------


@pytest.mark.parametrize("bits", range(8, 17))
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_every_depth_and_sign_is_windowed_as_pydicom_does(
    bits: int, signed: bool, photometric: str
) -> None:
    top = 1 << bits
    values = np.random.default_rng(bits).integers(0, top, (40, 56)) - (top // 2 if signed else 0)
    kind = ("i" if signed else "u") + ("1" if bits == 8 else "2")
    elements = {"BitsStored": bits, "PhotometricInterpretation": photometric}
    elements |= {"WindowCenter": 3.5 if signed else top / 3, "WindowWidth": top / 2 + 1}
    data = dicom(values.astype(kind), **elements)
    assert np.array_equal(decoded(data), oracle(data))


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(
    "window", [(2048, 4096), (1000.5, 300), (-3000, 40), (2048, 1), (9e3, 2e4)]
)
@pytest.mark.parametrize("rescale", [None, (1, 0), (2.5, -1024)])
def test_every_window_function_is_pydicoms(
    function: str | None, window: tuple[float, float], rescale: tuple[float, float] | None
) -> None:
    elements = {"BitsStored": 12, "VOILUTFunction": function}
    elements |= dict(zip(("WindowCenter", "WindowWidth"), window, strict=True))
    if rescale:
        elements |= dict(zip(("RescaleSlope", "RescaleIntercept"), rescale, strict=True))
    data = dicom(DEEP, **elements)
    expected = oracle(data)
    if np.ptp(expected) == 0:  # wholly beside the values: as if it were not there
        data = dicom(DEEP, **{**elements, "WindowCenter": None, "WindowWidth": None})
        expected = decoded(data)
        assert np.ptp(expected) > 200
    assert np.array_equal(decoded(dicom(DEEP, **elements)), expected)


def test_a_negative_slope_does_not_turn_black_into_white() -> None:
    """pydicom 3.0 takes the output's range from the slope and inverts the image (C.11.2.1.2)."""
    data = dicom(
        DEEP,
        BitsStored=12,
        RescaleSlope=-1,
        RescaleIntercept=4095,
        WindowCenter=2048,
        WindowWidth=4096,
    )
    assert np.array_equal(decoded(data), 255 - decoded(dicom(DEEP, **WHOLE)))
    assert np.array_equal(oracle(data), decoded(data))  # once scaled by its own range it agrees


@pytest.mark.parametrize("bits", [8, 16])
def test_a_modality_lut_is_pydicoms(bits: int) -> None:
    entries = np.random.default_rng(0).integers(0, 1 << bits, 3000)
    table = lut(entries, 100, bits)
    values = apply_modality_lut(DEEP, read(dicom(DEEP, BitsStored=12, ModalityLUTSequence=table)))
    made = dataset(DEEP, ModalityLUTSequence=table)
    ours, low, high = apply_modality(np.arange(4096), made)
    assert np.array_equal(ours[DEEP], values)
    assert (low, high) == (0, (1 << bits) - 1)
    data = dicom(DEEP, BitsStored=12, ModalityLUTSequence=table, WindowCenter=100, WindowWidth=150)
    assert np.array_equal(decoded(data), oracle(data))


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("signed", [False, True])
def test_a_voi_lut_is_pydicoms_and_goes_before_a_window(bits: int, signed: bool) -> None:
    entries = np.sort(np.random.default_rng(0).integers(0, 1 << bits, 250))
    entries[-1] = (1 << bits) - 1
    pixels = NEGATIVE_12 if signed else DEEP
    table = lut(entries, -1000 if signed else 1000, bits)
    data = dicom(pixels, **WHOLE, VOILUTSequence=table)
    assert np.array_equal(decoded(data), oracle(data))


def test_a_long_voi_lut_of_8_bits_does_not_wrap() -> None:
    """pydicom 3.0 keeps the index in the table's own 8 bits."""
    entries = np.arange(4096) // 16
    data = dicom(DEEP, BitsStored=12, VOILUTSequence=lut(entries, 0, 8))
    assert np.array_equal(decoded(data), (DEEP // 16).astype(np.uint8))
    packed = dataset(DEEP, BitsStored=12, VOILUTSequence=lut(entries, 0, 8))
    packed.VOILUTSequence[0].LUTData = entries.astype(np.uint8).tobytes()
    assert np.array_equal(decoded(write(packed)), (DEEP // 16).astype(np.uint8))


def test_a_voi_lut_after_a_rescale_takes_the_nearest_entry() -> None:
    entries = np.arange(4096) * 16
    data = dicom(DEEP, BitsStored=12, RescaleSlope=0.5, RescaleIntercept=0.25,
                 VOILUTSequence=lut(entries, 0, 16))  # fmt: skip
    expected = to_8_bits(entries[np.rint(DEEP * 0.5 + 0.25).astype(int)] / 65535)
    assert np.array_equal(decoded(data), expected)


def test_several_windows_and_tables_are_chosen_by_place_or_name() -> None:
    windows = {"WindowCenter": [2048, 1000], "WindowWidth": [4096, 500]}
    windows["WindowCenterWidthExplanation"] = ["NORMAL", "Bone "]
    data = dicom(DEEP, BitsStored=12, **windows)
    first = decoded(dicom(DEEP, **WHOLE))
    second = decoded(dicom(DEEP, BitsStored=12, WindowCenter=1000, WindowWidth=500))
    assert np.array_equal(decoded(data), first)
    assert np.array_equal(decoded(data, window="normal"), first)
    assert np.array_equal(decoded(data, window="BONE"), second)
    with pytest.raises(ImageError, match="none of the DICOM's 2 VOI LUTs and windows is named"):
        decoded(data, window="lung")
    table = lut(np.arange(4096)[::-1], 0, 12, name="reversed")
    both = dicom(DEEP, BitsStored=12, **windows, VOILUTSequence=table)
    assert np.array_equal(decoded(both), 255 - first)
    assert np.array_equal(decoded(both, window="Bone"), second)
    assert np.array_equal(decoded(both, window="reversed"), 255 - first)


@given(
    bits=st.integers(8, 16),
    center=st.floats(-100, 5000),
    width=st.floats(1, 9000),
    slope=st.sampled_from([1.0, 0.5, 3.0]),
    intercept=st.integers(-2000, 100),
    function=st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]),
    photometric=st.sampled_from(["MONOCHROME1", "MONOCHROME2"]),
)
@settings(max_examples=60, deadline=None)
def test_any_window_is_pydicoms_within_one_grey(
    bits: int, center: float, width: float, slope: float, intercept: int, function: str, **kind: str
) -> None:
    pixels = np.random.default_rng(0).integers(0, 1 << bits, (9, 11)).astype(np.uint16)
    data = dicom(pixels, BitsStored=bits, WindowCenter=f"{center:.5g}", WindowWidth=f"{width:.5g}",
                 RescaleSlope=slope, RescaleIntercept=intercept, VOILUTFunction=function,
                 PhotometricInterpretation=kind["photometric"])  # fmt: skip
    expected = oracle(data).astype(int)
    if np.ptp(expected) > 1:
        assert np.abs(decoded(data) - expected).max() <= 1


@given(pixels=st.binary(min_size=24, max_size=24), bits=st.integers(8, 16))
@settings(max_examples=50, deadline=None)
def test_a_full_window_gives_back_what_was_stored(pixels: bytes, bits: int) -> None:
    stored = np.frombuffer(pixels, np.uint16).reshape(3, 4) >> (16 - bits)
    top = (1 << bits) - 1
    data = dicom(stored, BitsStored=bits, WindowCenter=(top + 1) / 2, WindowWidth=top + 1)
    if np.ptp(stored):
        try:
            assert np.array_equal(decoded(data), to_8_bits(stored / top))
        except ImageError:
            assert np.ptp(to_8_bits(stored / top)) == 0


# --- MONOCHROME1 and presentation --------------------------------------------------------------


@pytest.mark.parametrize(
    "window",
    [
        {},
        {"WindowCenter": 1024, "WindowWidth": 5},
        {"WindowCenter": 1500, "WindowWidth": 777},
        {"WindowCenter": 1500, "WindowWidth": 777, "VOILUTFunction": "SIGMOID"},
        {"WindowCenter": 1500, "WindowWidth": 777, "VOILUTFunction": "LINEAR_EXACT"},
    ],
)
def test_monochrome_1_and_2_of_one_image_give_equal_pixels(window: dict[str, Any]) -> None:
    image = np.clip(np.random.default_rng(3).normal(1500, 400, (64, 64)), 0, 4095).astype(np.uint16)
    mirrored = dict(window)
    if window:  # what the window does to x it does to 4095 - x
        shift = 1 if "VOILUTFunction" not in window else 0
        mirrored["WindowCenter"] = 4095 + shift - window["WindowCenter"]
    two = dicom(image, BitsStored=12, PhotometricInterpretation="MONOCHROME2", **window)
    one = dicom(4095 - image, BitsStored=12, PhotometricInterpretation="MONOCHROME1", **mirrored)
    assert np.array_equal(decoded(one), decoded(two))
    assert np.ptp(decoded(one)) > 200
    encoder = load_encoder("demo", device="cpu")
    pixels = np.stack([prepare(decoded(data), encoder.preprocessing) for data in (one, two)])
    first, second = encoder.encode(pixels, ["mean"])["mean"]
    assert np.array_equal(first, second)


def test_inversion_is_last_and_once() -> None:
    window = {"BitsStored": 12, "WindowCenter": 900, "WindowWidth": 600}
    plain = decoded(dicom(DEEP, **window))
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        for shape in (None, "IDENTITY", "INVERSE"):
            data = dicom(
                DEEP, **window, PhotometricInterpretation=photometric, PresentationLUTShape=shape
            )
            inverted = photometric == "MONOCHROME1" or shape == "INVERSE"
            assert np.array_equal(decoded(data), 255 - plain if inverted else plain)


def test_what_is_for_presentation_is_not_windowed_twice() -> None:
    dim = (DEEP // 2 + 700).astype(np.uint16)
    shown = {"BitsStored": 12, "PresentationIntentType": "FOR PRESENTATION"}
    expected = to_8_bits(dim / 4095)
    assert np.array_equal(decoded(dicom(dim, **shown)), expected)
    identity = shown | {"WindowCenter": 2048, "WindowWidth": 4096}
    assert np.array_equal(decoded(dicom(dim, **identity)), expected)
    processed = decoded(dicom(dim, BitsStored=12, PresentationIntentType="FOR PROCESSING"))
    assert (processed.min(), processed.max()) == (0, 255)
    assert np.array_equal(decoded(dicom(RAMP)), RAMP)  # 8 bits are shown as they are, like a PNG's


def test_a_depth_that_is_not_used_does_not_leave_the_image_black() -> None:
    declared_16 = dicom(DEEP, PresentationIntentType="FOR PRESENTATION")
    assert decoded(declared_16).max() >= 240  # 4095 of 65535 reaches a sixteenth, nearly
    assert decoded(dicom(DEEP, BitsStored=16)).max() == 255


# --- without a window -------------------------------------------------------------------------


def anatomy() -> np.ndarray:
    generator = np.random.default_rng(5)
    return np.clip(generator.normal(1800, 300, (200, 200)), 900, 2900).astype(np.uint16)


@pytest.mark.parametrize("value", [0, 4095, 65535])
@pytest.mark.parametrize("side", [10, 20, 40])  # 0.25 %, 1 %, 4 % of the image
def test_a_burnt_in_marker_does_not_move_the_range(value: int, side: int) -> None:
    plain, marked = anatomy(), anatomy()
    marked[5 : 5 + side, 5 : 5 + side] = value
    before, after = (decoded(dicom(pixels)).astype(int) for pixels in (plain, marked))
    inside = np.ones(plain.shape, bool)
    inside[5 : 5 + side, 5 : 5 + side] = False
    assert np.abs(before - after)[inside].max() <= 6
    assert set(after[~inside]) == {0 if value == 0 else 255}


def test_letters_of_several_greys_and_a_shutter_do_not_move_the_range() -> None:
    plain, marked = anatomy(), anatomy()
    marked[:, :60] = marked[:, 150:] = 0  # collimation, more than half of the image
    marked[8:14, 70:85] = np.random.default_rng(0).integers(3500, 4096, (6, 15))
    before, after = decoded(dicom(plain)).astype(int), decoded(dicom(marked)).astype(int)
    assert np.abs(before - after)[30:, 60:150].max() <= 16
    assert after[:, :60].max() == 0


def test_the_range_of_a_negative_is_the_mirror_image() -> None:
    values = np.arange(4096.0)
    counts = np.bincount(anatomy().ravel(), minlength=4096)
    counts[0] = 9000
    low, high = robust_range(values, counts, 1, 99)
    assert robust_range(values, counts[::-1], 1, 99) == (4095 - high, 4095 - low)
    assert 900 <= low < high <= 2900


def test_other_percentiles_are_a_choice() -> None:
    wide = decoded(dicom(anatomy()), low=0, high=100).astype(int)
    assert (wide == 0).sum() < (decoded(dicom(anatomy())) == 0).sum()
    with pytest.raises(ImageError, match="0 <= low < high <= 100"):
        Intensity(low=60, high=40)
    with pytest.raises(ImageError, match="a window has a name"):
        Intensity(window=" ")


def test_padding_is_black_and_sets_no_range() -> None:
    pixels = anatomy().astype(np.int16)
    plain = decoded(dicom(pixels))
    padded = pixels.copy()
    padded[:80] = -2000
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        data = dicom(padded, PixelPaddingValue=-2000, PhotometricInterpretation=photometric)
        shown = decoded(data)
        assert (shown[:80] == 0).all()
        expected = 255 - plain if photometric == "MONOCHROME1" else plain
        assert np.abs(shown[80:].astype(int) - expected[80:]).max() <= 4
    padded[:80] = np.random.default_rng(0).integers(-2000, -1500, (80, 200))
    made = dataset(padded, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1500)
    shown = decoded(write(made))
    assert (shown[:80] == 0).all()
    assert np.abs(shown[80:].astype(int) - plain[80:]).max() <= 4
    with pytest.raises(ImageError, match="all pixels of the DICOM are padding"):
        decoded(dicom(pixels, PixelPaddingValue=0, PixelPaddingRangeLimit=4000))


def test_16_bits_of_a_wrist_are_close_to_their_8_bit_rendering(shared_data: Path) -> None:
    for path in sorted((shared_data / "grazpedwri").glob("*/*.png")):
        deep = np.asarray(Image.open(path)).astype(np.uint16)
        plain = decode_image(path.read_bytes()).pixels.astype(int)
        as_dicom = {
            "window": dicom(deep, WindowCenter=32768, WindowWidth=65536),
            "presentation": dicom(deep, PresentationIntentType="FOR PRESENTATION"),
        }
        for data in as_dicom.values():
            assert np.abs(decoded(data) - plain).max() <= 1
        unnamed = decoded(dicom(deep))
        saturated = np.isin(unnamed, [0, 255]).mean() - np.isin(plain, [0, 255]).mean()
        assert saturated < 0.05
        assert np.corrcoef(unnamed.ravel(), plain.ravel())[0, 1] > 0.98


# --- bits, syntaxes, colour --------------------------------------------------------------------


def with_overlays(pixels: np.ndarray, positions: list[tuple[int, int, int]]) -> bytes:
    """Declare overlays in the unused bits of pixels: group, element and position of each."""
    made = dataset(pixels, **WHOLE)
    for group, element, position in positions:
        made.add_new((group, 0x0100), "US", 16)
        made.add_new((group, element), "US", position)
    return write(made)


def test_bits_beside_the_stored_ones_are_masked() -> None:
    plain = decoded(dicom(DEEP, **WHOLE))
    overlay = np.random.default_rng(0).integers(0, 16, DEEP.shape).astype(np.uint16)
    above = [(0x6000 + 2 * i, 0x0102, 12 + i) for i in range(4)]
    assert np.array_equal(decoded(with_overlays(DEEP | overlay << 12, above)), plain)
    left = dicom(DEEP << 4 | overlay, **WHOLE, HighBit=15)
    assert np.array_equal(decoded(left), plain)
    signed = {"BitsStored": 12, "WindowCenter": 0, "WindowWidth": 4096}
    bare = (NEGATIVE_12 & 0xFFF).astype(np.int16)  # not sign-extended
    assert np.array_equal(decoded(dicom(bare, **signed)), decoded(dicom(NEGATIVE_12, **signed)))
    assert np.array_equal(decoded(dicom(NEGATIVE_12, **signed)), plain)


SYNTAXES = [
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEG2000Lossless,
]


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.keyword)
@pytest.mark.parametrize("signed", [False, True])
def test_every_lossless_syntax_gives_the_same_pixels(syntax: str, signed: bool) -> None:
    for bits in (8, 12, 16):
        values = np.random.default_rng(bits).integers(0, 1 << bits, (33, 47))
        values -= (1 << bits - 1) * signed
        pixels = values.astype(("i" if signed else "u") + ("1" if bits == 8 else "2"))
        window = {"WindowCenter": values.mean(), "WindowWidth": (1 << bits) / 3}
        if signed and bits == 12 and syntax == JPEGLosslessSV1:  # liblj92 takes bit patterns
            pixels = (pixels & 0xFFF).astype(np.int16)
        plain = decoded(dicom(pixels, BitsStored=bits, **window))
        assert np.array_equal(decoded(dicom(pixels, syntax, BitsStored=bits, **window)), plain)


def test_jpeg_is_what_pillow_gives() -> None:
    data = dicom(RAMP, JPEGBaseline8Bit)
    frame = get_frame(read(data).PixelData, 0, number_of_frames=1)
    assert np.array_equal(decoded(data), decode_image(frame).pixels)


def test_colour_becomes_luminance_as_in_other_images() -> None:
    colours = np.random.default_rng(2).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).save(file, "PNG")
    plain = decode_image(file.getvalue())
    for data in (dicom(colours), dicom(colours, RLELossless)):
        shown = decode_image(data)
        assert np.array_equal(shown.pixels, plain.pixels)
        assert shown.colour
    planes = dataset(colours, PlanarConfiguration=1)
    planes.PixelData = np.ascontiguousarray(colours.transpose(2, 0, 1)).tobytes()
    assert np.array_equal(decoded(write(planes)), plain.pixels)
    grey = np.repeat(RAMP[..., None], 3, axis=2)
    assert not decode_image(dicom(grey)).colour
    assert np.array_equal(decoded(dicom(grey)), RAMP)


@pytest.mark.parametrize(
    "name", ["examples_palette.dcm", "examples_rgb_color.dcm", "SC_rgb_dcmtk_+eb+cy+np.dcm",
             "SC_ybr_full_422_uncompressed.dcm", "SC_rgb_jpeg_gdcm.dcm", "examples_jpeg2k.dcm",
             "GDCMJ2K_TextGBR.dcm"]
)  # fmt: skip
def test_colour_of_others_is_what_pydicom_decodes(name: str) -> None:
    path = Path(str(get_testdata_file(name)))
    made = pydicom.dcmread(path)
    if name == "SC_rgb_jpeg_gdcm.dcm":  # lossless JPEG, for which pydicom has no codec here
        pixels = pydicom.dcmread(str(get_testdata_file("SC_rgb_dcmtk_+eb+cr.dcm"))).pixel_array
    else:
        pixels = made.pixel_array
    if made.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, made)
        pixels = (pixels >> 8).astype(np.uint8) if pixels.dtype == np.uint16 else pixels
    expected = np.array(Image.fromarray(pixels[..., :3]).convert("L"))
    assert np.abs(decode_image(path.read_bytes()).pixels.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm",
    "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "693_J2KI.dcm",
    "J2K_pixelrep_mismatch.dcm", "JPEGLSNearLossless_16.dcm", "image_dfl.dcm"])  # fmt: skip
def test_files_of_other_makers_are_what_pydicom_gives(name: str) -> None:
    data = Path(str(get_testdata_file(name))).read_bytes()
    if name != "image_dfl.dcm":
        data = change(data, WindowCenter="900", WindowWidth="1500")
    assert np.array_equal(decoded(data), oracle(data))


def test_12_bit_jpeg_is_read_at_its_depth() -> None:
    path = Path(str(get_testdata_file("JPGExtended.dcm")))
    shown = decode_image(path.read_bytes()).pixels
    assert shown.shape == (1024, 256)
    assert np.unique(shown).size > 60


def test_real_computed_radiographs_are_what_pydicom_gives(shared_data: Path) -> None:
    paths = sorted((shared_data / "dicom").glob("*.dcm"))
    assert len(paths) == 3
    for path in paths:
        data = path.read_bytes()
        shown = decode_image(data).pixels
        assert shown.std() > 20
        assert np.array_equal(shown, oracle(data))
        # Without their windows the borders of the detector do not set the range, nor does the "R".
        bare = decode_image(change(data, WindowCenter=None, WindowWidth=None)).pixels
        middle = slice(shown.shape[0] // 4, -shown.shape[0] // 4), slice(700, 1100)
        assert np.isin(bare[middle], [0, 255]).mean() < 0.1
        assert np.corrcoef(bare[middle].ravel(), shown[middle].ravel())[0, 1] > 0.98
    lossy, lossless = (decode_image(path.read_bytes()).pixels.astype(int) for path in paths[1:])
    assert np.abs(lossy - lossless).mean() < 1


# --- files without a preamble, and what is refused ----------------------------------------------


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_a_file_without_preamble_or_group_2_is_read_if_its_class_is_known(syntax: str) -> None:
    data = dicom(DEEP, syntax, **WHOLE)
    assert np.array_equal(decoded(data[132:]), decoded(data))
    made = read(data)
    file = io.BytesIO()
    del made.file_meta
    pydicom.dcmwrite(file, made, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=True)
    assert np.array_equal(decoded(file.getvalue()), decoded(data))
    with pytest.raises(ImageError, match="not an image of a known kind"):
        decoded(b"\x08\0\x16\0UI\x04\x001.2\0" + bytes(100))


def encapsulated_pdf() -> bytes:
    made = dataset(DEEP, Rows=None, Columns=None, PixelData=None)
    made.SOPClassUID = "1.2.840.10008.5.1.4.1.1.104.1"
    return write(made)


REFUSED = {
    "frames": (dicom(DEEP, NumberOfFrames=2), "holds 2 frames; only still images"),
    "pdf": (encapsulated_pdf(), "is Encapsulated PDF Storage and holds no image"),
    "no pixels": (dicom(DEEP, PixelData=None), "no whole numbers as pixels"),
    "rows": (dicom(DEEP, Rows=None), "holds no image"),
    "empty": (dicom(DEEP, Rows=0), "it holds no pixels"),
    "huge": (dicom(DEEP, Rows=60000, Columns=60000), "3600 megapixels; the limit is 80"),
    "short": (dicom(DEEP, Rows=41), "holds 4480 bytes of pixels; its 41 rows take 4592"),
    "long": (dicom(DEEP, Rows=30), "its 30 rows take 3360"),
    "narrow": (dicom(DEEP, Columns=50), "its 40 rows take 4000"),
    "32 bits": (dicom(DEEP.astype(np.uint32)), "32 bits stored in 32"),
    "1 bit": (dicom(DEEP, BitsStored=17), "17 bits stored in 16"),
    "no bits": (dicom(DEEP, BitsAllocated=None), "BitsAllocated is missing"),
    "high bit": (dicom(DEEP, BitsStored=12, HighBit=9), "high bit is 9 of 12"),
    "sign": (dicom(DEEP, PixelRepresentation=7), "neither unsigned"),
    "samples": (dicom(DEEP, SamplesPerPixel=3), "3 samples per pixel"),
    "photometric": (dicom(DEEP, PhotometricInterpretation="HSV"), "photometric interpretation"),
    "no photometric": (dicom(DEEP, PhotometricInterpretation=None), "photometric interpretation"),
    "slope": (dicom(DEEP, RescaleSlope=1), "slope and intercept are not both there"),
    "slope 0": (dicom(DEEP, RescaleSlope=0, RescaleIntercept=0), "slope is 0"),
    "function": (
        dicom(DEEP, WindowCenter=1, WindowWidth=9, VOILUTFunction="CUBIC"),
        "none of LINEAR, LINEAR_EXACT, SIGMOID",
    ),
    "faint": (dicom(DEEP, WindowCenter=9, WindowWidth=1e300), "shows nothing of the image"),
    "one value": (dicom(np.full((9, 9), 7, np.uint16)), "all pixels of the DICOM have the same"),
    "table": (dicom(DEEP, VOILUTSequence=lut(np.arange(9), 0, 20)), "20 bits per entry"),
    "dim table": (dicom(DEEP, VOILUTSequence=lut(np.arange(99), 0, 16)), "does not fit its 16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_shown_rightly_is_refused_with_the_reason(name: str) -> None:
    data, said = REFUSED[name]
    with pytest.raises(ImageError, match=said):
        decoded(data)


def test_other_objects_than_images_are_refused_by_name() -> None:
    for name, said in {
        "test-SR.dcm": "Comprehensive SR Storage and holds no image",
        "rtplan.dcm": "RT Plan Storage",
        "waveform_ecg.dcm": "12-lead ECG Waveform Storage",
        "rtdose.dcm": "15 frames",
    }.items():
        with pytest.raises(ImageError, match=said):
            decoded(Path(str(get_testdata_file(name))).read_bytes())


def test_a_transfer_syntax_that_is_not_the_datas_is_refused() -> None:
    explicit = {*SYNTAXES[2:], ExplicitVRLittleEndian, JPEGBaseline8Bit}
    for syntax in (RLELossless, JPEGLSLossless, JPEG2000Lossless, JPEGLosslessSV1):
        for other in explicit - {syntax}:
            native = other in (ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian)
            said = "not in its transfer syntax|deflated data" if native else "DICOM"
            with pytest.raises(ImageError, match=said):
                decoded(relabelled(dicom(DEEP, syntax, **WHOLE), other))
    for other in explicit - {ExplicitVRLittleEndian}:
        with pytest.raises(ImageError):
            decoded(relabelled(dicom(DEEP, **WHOLE), other))


@pytest.mark.parametrize("syntax", [*SYNTAXES[3:], JPEGBaseline8Bit], ids=lambda uid: uid.keyword)
def test_no_part_of_a_compressed_frame_is_taken_for_the_whole(syntax: str) -> None:
    pixels = RAMP if syntax == JPEGBaseline8Bit else DEEP
    stored = {} if syntax == JPEGBaseline8Bit else WHOLE
    data = dicom(pixels, syntax, **stored)
    frame = get_frame(read(data).PixelData, 0, number_of_frames=1)
    whole = decoded(data)
    for share in np.linspace(0.05, 0.97, 18):
        for end in (b"", b"\xff\xd9"):
            made = dataset(pixels, **stored)
            write(made)
            cut = frame[: int(len(frame) * share)].rstrip(b"\xff") + end
            put_frame(made, cut, syntax)
            file = io.BytesIO()
            pydicom.dcmwrite(file, made)
            try:
                assert np.array_equal(decoded(file.getvalue()), whole)
            except ImageError:
                continue


def test_a_frame_of_another_size_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ImageError, match="damaged"):
        decoded(change(dicom(DEEP, RLELossless, **WHOLE), Rows=39))
    for syntax in SYNTAXES[4:]:
        data = change(dicom(DEEP, syntax, **WHOLE), Rows=39)
        with monkeypatch.context() as patched:
            patched.setattr(
                "medembed.images.dicom.pixels._decode_frame", lambda *_: pytest.fail("decoded")
            )
            with pytest.raises(ImageError, match="says 56 x 39, its compressed data 56 x 40"):
                decoded(data)


def test_a_deflated_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = dicom(np.zeros((4000, 4000), np.uint16), DeflatedExplicitVRLittleEndian)
    assert len(data) < 100_000
    monkeypatch.setattr(dicom_file, "MAX_INFLATED", 10_000_000)
    with pytest.raises(ImageError, match="inflates to more than 10 MB"):
        decoded(data)
    with pytest.raises(ImageError, match="end early"):
        decoded(dicom(DEEP, DeflatedExplicitVRLittleEndian)[:-900])


def test_a_missing_codec_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "find_spec", lambda _: None)

    class Nothing:
        available_plugins = ()

    monkeypatch.setattr(codecs, "get_decoder", lambda _: Nothing())
    for syntax, said in {
        JPEGLosslessSV1: r"lossless JPEG is installed: pip install 'medembed\[dicom\]'.*codecs",
        JPEGLSLossless: r"JPEG-LS is installed: pip install.*pyjpegls",
        JPEG2000Lossless: r"JPEG 2000 is installed: pip install.*pylibjpeg-openjpeg",
    }.items():
        with pytest.raises(ImageError, match=said):
            decoded(dicom(DEEP, syntax, **WHOLE))
    assert not any(codec.plugin for codec in codecs.list_codecs())


def test_an_unknown_transfer_syntax_is_not_repeated() -> None:
    data = dicom(DEEP).replace(b"1.2.840.10008.1.2.1\0", b"1.2.826.0.1.3680043.")
    with pytest.raises(ImageError, match=r"transfer syntax is not read$"):
        decoded(data)


@pytest.mark.parametrize("syntax", SYNTAXES[4:], ids=lambda uid: uid.keyword)
def test_the_end_of_a_codestream_is_found_without_its_codec(syntax: str) -> None:
    frame = get_frame(read(dicom(DEEP, syntax, **WHOLE)).PixelData, 0, number_of_frames=1)
    found = read_codestream(frame, syntax)
    assert (found.width, found.height, found.components, found.bits) == (56, 40, 1, 12)
    assert frame[found.end : found.end + 2] == b"\xff\xd9"
    for length in range(0, found.end, 41):
        with pytest.raises(ImageError):
            read_codestream(frame[:length], syntax)
        if syntax == JPEG2000Lossless:  # its tile-parts say how long they are
            with pytest.raises(ImageError):
                read_codestream(frame[:length] + b"\xff\xd9", syntax)


def test_a_jpeg_2000_without_one_of_its_tiles_is_seen() -> None:
    file = io.BytesIO()
    Image.fromarray(RAMP).save(file, "JPEG2000", tile_size=(20, 20), no_jp2=True)
    frame = file.getvalue()
    assert read_codestream(frame, JPEG2000Lossless).end == len(frame) - 2
    first = frame.index(b"\xff\x90")
    length = int.from_bytes(frame[first + 6 : first + 10])
    with pytest.raises(ImageError, match="end before their last tile"):
        read_codestream(frame[:first] + frame[first + length :], JPEG2000Lossless)


def test_no_text_of_the_file_is_in_an_error() -> None:
    not_a_number = dicom(DEEP, RescaleSlope="12345678", RescaleIntercept=9)
    with pytest.raises(ImageError, match="damaged") as caught:
        decoded(not_a_number.replace(b"12345678", b"DOE JOHN"))
    assert "DOE" not in str(caught.value)
    window = dicom(DEEP, WindowCenter="12345678", WindowWidth=9)
    shown = decode_image(window.replace(b"12345678", b"DOE JOHN"))
    assert shown.notes == ("a window of something else than finite numbers counts as none",)
    assert np.array_equal(shown.pixels, decoded(dicom(DEEP)))
    for keyword in ("PhotometricInterpretation", "VOILUTFunction"):
        data = dicom(DEEP, WindowCenter=1, WindowWidth=99, **{keyword: "DOE JOHN"})
        with pytest.raises(ImageError) as caught:
            decoded(data)
        assert "DOE" not in str(caught.value)


# --- yesterday's pixels -----------------------------------------------------------------------


def golden_files() -> dict[str, bytes]:
    """Write files whose decoded pixels must never change unannounced."""
    return {
        "window": dicom(DEEP, **WHOLE),
        "sigmoid": dicom(DEEP, BitsStored=12, WindowCenter=900, WindowWidth=500,
                         VOILUTFunction="SIGMOID"),
        "table": dicom(DEEP, BitsStored=12, VOILUTSequence=lut(np.arange(4096) ** 2 >> 12, 0, 12)),
        "percentiles": dicom(DEEP, PresentationIntentType="FOR PROCESSING"),
        "monochrome 1": dicom(NEGATIVE_12, BitsStored=12, PhotometricInterpretation="MONOCHROME1"),
        "8 bits": dicom(RAMP),
    }  # fmt: skip


GOLDEN = {
    "window": "80abb5804465f97e",
    "sigmoid": "cb6351fb13e8da3c",
    "table": "6efc10f072c14179",
    "percentiles": "7acebeeed90cd237",
    "monochrome 1": "d83f0b20da54e39b",
    "8 bits": "737560bd658e1751",
}


def test_decoded_pixels_of_dicom_are_those_of_the_version() -> None:
    """If this fails and the change is meant: raise IMAGES_VERSION and write the new hashes."""
    hashes = {}
    for name, data in golden_files().items():
        pixels = decoded(data)
        hashes[name] = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
    assert {name: value[:16] for name, value in hashes.items()} == GOLDEN, json.dumps(hashes)
    assert IMAGES_VERSION == 2
