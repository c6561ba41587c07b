"""What a DICOM's header claims, held against its pixels: bits, length, windows, one grey."""

import io
from typing import Any

import imagecodecs
import numpy as np
import pytest
from made_dicom import DEEP, RAMP, change, dataset, dicom, jpeg, put_frame, read, write
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.filewriter import dcmwrite
from pydicom.sequence import Sequence
from pydicom.uid import (
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from medembed.core.errors import ImageError
from medembed.images.decode import decode_image
from medembed.images.intensity import Intensity

SMOOTH = np.clip(np.add.outer(20 * np.arange(40), 14 * np.arange(56)), 0, 1023).astype(np.uint16)
TEN = {"BitsStored": 10, "WindowCenter": 512, "WindowWidth": 1024}
TWELVE = {"BitsStored": 12, "WindowCenter": 2048, "WindowWidth": 4096}
WORDS = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian,
         DeflatedExplicitVRLittleEndian, RLELossless)  # fmt: skip


def framed(frame: bytes, syntax: str, pixels: np.ndarray, **elements: Any) -> bytes:
    """Put a compressed frame into a file whose header says what the elements say."""
    made = dataset(pixels, **elements)
    write(made)
    put_frame(made, frame, syntax)
    file = io.BytesIO()
    dcmwrite(file, made, enforce_file_format=True)
    return file.getvalue()


def film_with_lines() -> np.ndarray:
    film = SMOOTH.copy()
    film[10:36:4, 8:50] = 1023  # as edges of markers do, lines make a lossy codec overshoot
    film[12:36:4, 8:50] = 0
    return film


def shown(numbers: np.ndarray) -> np.ndarray:
    """Show 10 bits by a window of all of them; what lies above is white."""
    return np.round(np.minimum(numbers, 1023) / 1023 * 255).astype(np.uint8)


# --- Bits Stored --------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", [50, 75, 96])
def test_a_lossy_jpeg_that_overshoots_bits_stored_is_clipped(quality: int) -> None:
    film = film_with_lines()
    frame = imagecodecs.jpeg8_encode(film, level=quality, bitspersample=12)
    numbers = imagecodecs.jpeg8_decode(frame)
    assert numbers.max() > 1023
    decoded = decode_image(framed(frame, JPEGExtended12Bit, film, **TEN))
    assert np.array_equal(decoded.pixels, shown(numbers))
    assert decoded.since == 1


def test_a_lossy_jpeg_2000_and_jpeg_ls_are_clipped_too() -> None:
    film = film_with_lines()
    near = imagecodecs.jpegls_encode(np.minimum(film + 3, 1026), level=3)
    numbers = imagecodecs.jpegls_decode(near)
    assert numbers.max() > 1023
    decoded = decode_image(framed(near, JPEGLSNearLossless, film, **TEN))
    assert np.array_equal(decoded.pixels, shown(numbers))
    lossy = imagecodecs.jpeg2k_encode(film, level=44, codecformat="j2k", bitspersample=12)
    numbers = imagecodecs.jpeg2k_decode(lossy)
    assert numbers.max() > 1023
    assert decode_image(framed(lossy, JPEG2000, film, **TEN)).pixels.max() == 255


def test_a_lossy_image_that_needs_more_bits_is_not_clipped_to_white() -> None:
    for film in (DEEP, (SMOOTH * 2).astype(np.uint16)):  # 12 bits, and 11
        frame = imagecodecs.jpeg8_encode(film, level=90, bitspersample=12)
        with pytest.raises(ImageError, match="compressed data need more than 10 bits"):
            decode_image(framed(frame, JPEGExtended12Bit, film, **TEN))


def claiming(film: np.ndarray, syntax: UID, stored: int, **elements: Any) -> bytes:
    """Write 12 bits whose header says that fewer are stored."""
    whole = dicom(film, syntax, BitsStored=12, **elements)
    return change(whole, BitsStored=stored, HighBit=stored - 1)


@pytest.mark.parametrize("syntax", WORDS, ids=lambda uid: uid.keyword)
@pytest.mark.parametrize("stored", [8, 10, 11])
def test_values_above_bits_stored_are_refused_and_not_folded(syntax: UID, stored: int) -> None:
    film = (SMOOTH * 4).astype(np.uint16)
    assert decode_image(dicom(film, syntax, **TWELVE)).pixels.max() > 200
    for elements in ({}, {"WindowCenter": 2048, "WindowWidth": 4096}):
        with pytest.raises(ImageError, match=f"more than the {stored} bits") as caught:
            decode_image(claiming(film, syntax, stored, **elements))
        assert caught.value.since == 2
    one = (SMOOTH >> 3).astype(np.uint16)
    one[20, 20] = 1 << stored  # a single pixel is enough: where it comes from nobody knows
    with pytest.raises(ImageError, match=f"more than the {stored} bits"):
        decode_image(claiming(one, syntax, stored))


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless, JPEGLosslessSV1])
def test_lossless_values_above_bits_stored_are_refused(syntax: UID) -> None:
    data = dicom((SMOOTH * 4).astype(np.uint16), syntax, **TWELVE)
    assert decode_image(data).pixels.max() > 200
    with pytest.raises(ImageError, match="need more than 10 bits"):
        decode_image(change(data, BitsStored=10, HighBit=9))
    one = SMOOTH.copy()
    one[20, 20] = 1024  # no codec overshoots that loses nothing
    with pytest.raises(ImageError, match="need more than 10 bits"):
        decode_image(change(dicom(one, syntax, **TWELVE), BitsStored=10, HighBit=9))


def test_an_overlay_accounts_for_its_own_bit_alone() -> None:
    plain = decode_image(dicom(SMOOTH, **TEN)).pixels
    for syntax in WORDS:
        made = dataset(SMOOTH | (RAMP.astype(np.uint16) & 1) << 12, **TEN)
        made.add_new((0x6002, 0x0100), "US", 16)
        made.add_new((0x6002, 0x0102), "US", 12)
        assert np.array_equal(decode_image(write(made, syntax)).pixels, plain)
        made = dataset(SMOOTH | (RAMP.astype(np.uint16) & 1) << 13, **TEN)
        made.add_new((0x6002, 0x0102), "US", 12)
        made.add_new((0x6000, 0x0102), "US", 0)  # an overlay that lies elsewhere
        with pytest.raises(ImageError, match="no overlay is declared"):
            decode_image(write(made, syntax))


def test_signed_values_may_fill_the_word_by_their_sign_alone() -> None:
    signed = (SMOOTH.astype(np.int16) - 512).astype(np.int16)
    window = {"BitsStored": 10, "WindowCenter": 0, "WindowWidth": 1024}
    plain = decode_image(dicom(SMOOTH, **TEN)).pixels
    assert np.array_equal(decode_image(dicom(signed, **window)).pixels, plain)
    assert np.array_equal(decode_image(dicom(signed & 0x3FF, **window)).pixels, plain)
    for film in (signed * 4, np.abs(signed) * 4):
        with pytest.raises(ImageError, match="more than the 10 bits"):
            decode_image(dicom(film.astype(np.int16), **window))


@pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, JPEGLSLossless, JPEG2000Lossless])
def test_8_bits_in_words_of_16_are_read(syntax: UID) -> None:
    encoders = {
        JPEGBaseline8Bit: lambda: jpeg(dataset(RAMP)),
        JPEGLSLossless: lambda: imagecodecs.jpegls_encode(RAMP),
        JPEG2000Lossless: lambda: imagecodecs.jpeg2k_encode(
            RAMP, level=0, codecformat="j2k", reversible=True
        ),
    }
    frame = encoders[syntax]()
    plain = decode_image(framed(frame, syntax, RAMP)).pixels
    assert np.abs(plain.astype(int) - RAMP).max() <= 4
    for stored in (8, 12):
        whole = {"WindowCenter": 128, "WindowWidth": 256}
        data = framed(frame, syntax, RAMP.astype(np.uint16), BitsStored=stored, **whole)
        assert np.array_equal(decode_image(data).pixels, plain)


def test_an_error_names_the_samples_that_differ() -> None:
    frame = imagecodecs.jpeg8_encode(np.dstack([RAMP] * 3), level=95)
    with pytest.raises(ImageError, match=r"1 sample\(s\) per pixel, its compressed data 3"):
        decode_image(framed(frame, JPEGBaseline8Bit, RAMP))


# --- length -------------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", WORDS[:4], ids=lambda uid: uid.keyword)
def test_zeros_after_the_pixels_are_padding(syntax: UID) -> None:
    plain = decode_image(dicom(DEEP, syntax, **TWELVE)).pixels
    size = DEEP.nbytes
    for surplus in (2, 512, 2048, size):
        made = dataset(DEEP, **TWELVE)
        made.PixelData += bytes(surplus)
        assert np.array_equal(decode_image(write(made, syntax)).pixels, plain), surplus
    for surplus in (bytes(size + 2), bytes(600) + b"\0\1", b"\1" + bytes(999)):
        made = dataset(DEEP, **TWELVE)
        made.PixelData += surplus
        with pytest.raises(ImageError, match=f"bytes of pixels; its 40 rows take {size}"):
            decode_image(write(made, syntax))


def test_padding_of_others_is_padding() -> None:
    with open(str(get_testdata_file("MR_small_padded.dcm")), "rb") as file:
        padded = file.read()
    with open(str(get_testdata_file("MR_small.dcm")), "rb") as file:
        plain = file.read()
    assert np.array_equal(decode_image(padded).pixels, decode_image(plain).pixels)


# --- windows ------------------------------------------------------------------------------------

NARROW = "a window narrower than any can be counts as none"
HALF = "a window without its center or its width counts as none"
NO_NUMBER = "a window of something else than finite numbers counts as none"
BESIDE = "a window wholly beside the image's values counts as none"
NO_WINDOWS: list[tuple[dict[str, Any], str]] = [
    ({"WindowCenter": 2048, "WindowWidth": 0}, NARROW),
    ({"WindowCenter": 2048, "WindowWidth": -400}, NARROW),
    ({"WindowCenter": 2048, "WindowWidth": 0.5}, NARROW),
    ({"WindowCenter": 9, "WindowWidth": 0, "VOILUTFunction": "LINEAR_EXACT"}, NARROW),
    ({"WindowCenter": 9, "WindowWidth": 0, "VOILUTFunction": "SIGMOID"}, NARROW),
    ({"WindowCenter": 2048}, HALF),
    ({"WindowWidth": 4096}, HALF),
    ({"WindowCenter": "", "WindowWidth": 4096}, HALF),
    ({"WindowCenter": 90000, "WindowWidth": 9}, BESIDE),
    ({"WindowCenter": -2000, "WindowWidth": 400}, BESIDE),
    ({"WindowCenter": -2000, "WindowWidth": 9, "VOILUTFunction": "SIGMOID"}, BESIDE),
]


@pytest.mark.parametrize(("window", "note"), NO_WINDOWS)
@pytest.mark.parametrize("intent", [None, "FOR PRESENTATION", "FOR PROCESSING"])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_window_that_is_none_counts_as_absent(
    window: dict[str, Any], note: str, intent: str | None, photometric: str
) -> None:
    common = {"BitsStored": 12, "PresentationIntentType": intent}
    common["PhotometricInterpretation"] = photometric
    decoded = decode_image(dicom(DEEP, **common, **window))
    assert np.array_equal(decoded.pixels, decode_image(dicom(DEEP, **common)).pixels)
    assert (decoded.notes, decoded.since) == ((note,), 1)


@pytest.mark.parametrize("value", ["NaN", "inf", "-inf"])
def test_a_window_of_no_finite_number_counts_as_absent(value: str) -> None:
    plain = decode_image(dicom(DEEP)).pixels
    for keyword in ("WindowCenter", "WindowWidth"):
        elements = {"WindowCenter": 77777777, "WindowWidth": 88888888, keyword: 99999999}
        data = dicom(DEEP, **elements).replace(b"99999999", value.encode().ljust(8))
        decoded = decode_image(data)
        assert np.array_equal(decoded.pixels, plain)
        assert decoded.notes == (NO_NUMBER,)


def test_the_next_window_is_taken_where_the_first_is_none() -> None:
    names = {"WindowCenterWidthExplanation": ["BAD", "GOOD", "FAR"]}
    windows = {"WindowCenter": [9, 1500, 90000], "WindowWidth": [0, 700, 9]}
    data = dicom(DEEP, BitsStored=12, **windows, **names)
    good = decode_image(dicom(DEEP, BitsStored=12, WindowCenter=1500, WindowWidth=700)).pixels
    decoded = decode_image(data)
    assert np.array_equal(decoded.pixels, good)
    assert decoded.notes == (NARROW,)
    assert decode_image(data, Intensity("good")).notes == ()
    for name, why in (("bad", "narrower than any can be"), ("far", "wholly beside")):
        with pytest.raises(ImageError, match=f"window named '{name}' is none: it is {why}"):
            decode_image(data, Intensity(name))
    halves = dicom(DEEP, BitsStored=12, WindowCenter=[1500, 2000], WindowWidth=700)
    assert np.array_equal(decode_image(halves).pixels, good)


def test_a_table_beside_the_image_counts_as_absent() -> None:
    item = Dataset()
    item.LUTDescriptor = [256, 5000, 12]
    item["LUTDescriptor"].VR = "US"
    item.LUTData = (np.arange(256) * 16).astype("<u2").tobytes()
    item["LUTData"].VR = "OW"
    decoded = decode_image(dicom(DEEP, BitsStored=12, VOILUTSequence=Sequence([item])))
    assert np.array_equal(decoded.pixels, decode_image(dicom(DEEP, BitsStored=12)).pixels)
    assert decoded.notes == (BESIDE,)


def test_window_none_shows_a_file_as_if_it_had_none() -> None:
    item = Dataset()
    item.LUTDescriptor = [4096, 0, 12]
    item["LUTDescriptor"].VR = "US"
    item.LUTData = np.arange(4096)[::-1].astype("<u2").tobytes()
    item["LUTData"].VR = "OW"
    windows = {"WindowCenter": 900, "WindowWidth": 50, "WindowCenterWidthExplanation": "none"}
    for more in ({}, {"VOILUTSequence": Sequence([item])}, {"PresentationLUTShape": "INVERSE"}):
        plain = {name: value for name, value in more.items() if name != "VOILUTSequence"}
        expected = decode_image(dicom(DEEP, BitsStored=12, **plain))
        for name in ("none", "None", " NONE "):
            data = dicom(DEEP, BitsStored=12, **windows, **more)
            decoded = decode_image(data, Intensity(name))
            assert np.array_equal(decoded.pixels, expected.pixels)
            assert decoded.notes == ()
    assert Intensity("None").as_spec() == Intensity(" none").as_spec() == "none"


# --- functional groups --------------------------------------------------------------------------


def enhanced(shared: dict[str, Any], frame: dict[str, Any], **elements: Any) -> bytes:
    """Write a file whose transforms are in functional groups: macro -> its one item's elements."""
    made = dataset(DEEP, BitsStored=12, **elements)
    groups = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
    for keyword, macros in zip(groups, (shared, frame), strict=True):
        group = Dataset()
        for macro, values in macros.items():
            item = Dataset()
            for name, value in values.items():
                setattr(item, name, value)
            setattr(group, macro, Sequence([item]))
        setattr(made, keyword, Sequence([group]))
    return write(made)


def test_windows_and_rescale_in_functional_groups_are_read() -> None:
    window = {"WindowCenter": 900, "WindowWidth": 500, "VOILUTFunction": "SIGMOID"}
    other = {"WindowCenter": 3000, "WindowWidth": 99}
    rescale = {"RescaleSlope": -1, "RescaleIntercept": 2000, "RescaleType": "US"}
    voi, modality = "FrameVOILUTSequence", "PixelValueTransformationSequence"
    cases = [
        (({voi: window}, {}), window),
        (({}, {voi: window}), window),
        (({voi: other}, {voi: window}), window),
        (({modality: rescale}, {voi: window}), window | rescale),
        (({voi: window, modality: rescale}, {}), window | rescale),
        (({modality: rescale}, {}), rescale),
    ]
    for groups, flat in cases:
        decoded = decode_image(enhanced(*groups))
        assert np.array_equal(
            decoded.pixels, decode_image(dicom(DEEP, BitsStored=12, **flat)).pixels
        )
        assert decoded.since == 2
    nested = decode_image(enhanced({voi: window}, {}, WindowCenter=2048, WindowWidth=4096))
    assert np.array_equal(nested.pixels, decode_image(enhanced({voi: window}, {})).pixels)


def test_functional_groups_that_change_nothing_leave_the_file_as_it_was() -> None:
    top = {"WindowCenter": 900, "WindowWidth": 500}
    identity = {"RescaleSlope": 1, "RescaleIntercept": 0}
    expected = decode_image(dicom(DEEP, BitsStored=12, **top))
    for groups in (({}, {}), ({"PixelValueTransformationSequence": identity}, {}),
                   ({"FrameVOILUTSequence": {"VOILUTFunction": "SIGMOID"}}, {})):  # fmt: skip
        decoded = decode_image(enhanced(*groups, **top))
        assert np.array_equal(decoded.pixels, expected.pixels)
        assert decoded.since == 1
    far = {"FrameVOILUTSequence": {"WindowCenter": 9e5, "WindowWidth": 9}}
    decoded = decode_image(enhanced(far, {}))
    assert decoded.notes == (BESIDE,)


# --- one grey -----------------------------------------------------------------------------------


def test_a_dicom_of_one_grey_is_refused_in_every_kind() -> None:
    flat, bytes_ = np.full((40, 56), 700, np.uint16), np.full((40, 56), 37, np.uint8)
    colour = np.full((40, 56, 3), (9, 80, 30), np.uint8)
    window = {"WindowCenter": 600, "WindowWidth": 1000, "BitsStored": 12}
    for data in (
        *(dicom(flat, syntax, **window) for syntax in (*WORDS, JPEGLSLossless, JPEG2000Lossless)),
        dicom(flat, BitsStored=12, PresentationIntentType="FOR PRESENTATION"),
        dicom(flat, **window, PhotometricInterpretation="MONOCHROME1"),
        *(
            dicom(bytes_),
            dicom(bytes_, JPEGBaseline8Bit),
            dicom(colour),
            dicom(colour, RLELossless),
        ),
    ):
        with pytest.raises(ImageError, match=r"all pixels have the same grey, \d+") as caught:
            decode_image(data)
        assert caught.value.since == 2
    with pytest.raises(ImageError, match="have the same value, 700: the file shows nothing"):
        decode_image(dicom(flat, BitsStored=12))


def test_a_frame_is_judged_as_the_same_image_alone_is() -> None:
    flat = Image.new("L", (56, 40), 99)
    file = io.BytesIO()
    flat.save(file, "JPEG")
    for data in (file.getvalue(), framed(file.getvalue(), JPEGBaseline8Bit, RAMP)):
        with pytest.raises(ImageError, match="all pixels have the same grey, 99"):
            decode_image(data)
    assert read(dicom(RAMP)).BitsStored == 8
