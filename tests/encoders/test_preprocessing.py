"""The oracle is transformers' own PIL image processors."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from medembed.core.errors import EncoderError
from medembed.encoders.preprocessing import (
    RESAMPLES,
    Preprocessing,
    channel_levels,
    prepare,
    read_preprocessing,
)
from medembed.images.decode import decode_image

HALF = (0.5, 0.5, 0.5)


def save_config(directory: Path, name: str = "preprocessor_config.json", **changes: object) -> Path:
    config: dict[str, object] = {
        "image_processor_type": "Gemma3ImageProcessor",
        "size": {"height": 40, "width": 40},
        "resample": 2,
        "rescale_factor": 1 / 255,
        "image_mean": list(HALF),
        "image_std": list(HALF),
    }
    config |= changes
    config = {key: value for key, value in config.items() if value != "left out"}
    (directory / name).write_text(json.dumps(config))
    return directory


def transformers_pixels(directory: Path, image: Image.Image, kind: str) -> np.ndarray:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    kinds = {"gemma3": Gemma3ImageProcessorPil, "siglip": SiglipImageProcessorPil}
    processor = kinds[kind].from_pretrained(directory)
    return np.asarray(processor(image, return_tensors="np")["pixel_values"])[0]


def our_pixels(directory: Path, pixels: np.ndarray) -> np.ndarray:
    preprocessing = read_preprocessing(directory)
    return channel_levels(preprocessing)[:, prepare(pixels, preprocessing)]


@pytest.mark.parametrize("kind", ["gemma3", "siglip"])
@pytest.mark.parametrize("resample", [2, 3, 1])
@pytest.mark.parametrize("shape", [(25, 31), (40, 40), (97, 33), (300, 410)])
def test_pixels_equal_transformers_to_the_last_bit(
    tmp_path: Path, kind: str, resample: int, shape: tuple[int, int]
) -> None:
    names = {"gemma3": "Gemma3ImageProcessor", "siglip": "SiglipImageProcessor"}
    save_config(tmp_path, resample=resample, image_processor_type=names[kind])
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    theirs = transformers_pixels(tmp_path, Image.fromarray(pixels).convert("RGB"), kind)
    assert np.array_equal(our_pixels(tmp_path, pixels), theirs)


CROPPED = {"size": {"shortest_edge": 40}, "crop_size": {"height": 40, "width": 40}}
SQUARE_OUT = [
    ("ViT", (97, 33), {}),
    ("Bit", (64, 64), {**CROPPED, "do_center_crop": True}),
    ("DeiT", (64, 64), {"crop_size": {"height": 40, "width": 40}, "do_center_crop": True}),
    ("ConvNext", (97, 133), {"size": {"shortest_edge": 384}, "crop_pct": 0.875}),
]


@pytest.mark.parametrize(("name", "shape", "changes"), SQUARE_OUT)
def test_pixels_of_a_backbone_equal_transformers_where_nothing_is_cut(
    tmp_path: Path, name: str, shape: tuple[int, int], changes: dict[str, object]
) -> None:
    import transformers

    kind = f"{name}ImageProcessor"
    save_config(tmp_path, resample=3, image_processor_type=kind, **changes)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    processor = getattr(transformers, f"{kind}Pil").from_pretrained(tmp_path)
    copy = Image.fromarray(pixels).convert("RGB")
    theirs = np.asarray(processor(copy, return_tensors="np")["pixel_values"])[0]
    assert np.array_equal(our_pixels(tmp_path, pixels), theirs)


@pytest.mark.parametrize(
    "changes",
    [
        {**CROPPED, "image_processor_type": "BitImageProcessor", "do_center_crop": True},
        {**CROPPED, "image_processor_type": "BitImageProcessor"},  # its class crops
        {**CROPPED, "size": {"shortest_edge": 46}, "image_processor_type": "CLIPImageProcessor"},
        {"size": 46, "crop_size": 40, "feature_extractor_type": "DeiTFeatureExtractor"},
        {"size": {"shortest_edge": 40}, "crop_pct": 0.875},
        {"size": {"shortest_edge": 40}, "image_processor_type": "ConvNextImageProcessorFast"},
        {"size": 40, "feature_extractor_type": "ConvNextFeatureExtractor"},  # as early releases
        {"size": 40, "feature_extractor_type": "ViTFeatureExtractor", "do_center_crop": False},
    ],
)
def test_the_whole_image_is_brought_to_the_size_of_a_centre_crop(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    if "feature_extractor_type" in changes:
        changes = {**changes, "image_processor_type": "left out"}
    preprocessing = read_preprocessing(save_config(tmp_path, **changes))
    assert (preprocessing.height, preprocessing.width) == (40, 40)
    ends = np.zeros((400, 80), np.uint8)
    ends[:20] = ends[-20:] = 255  # a centre crop of a long bone would lose both
    prepared = prepare(ends, preprocessing)
    assert prepared[0].min() == prepared[-1].min() == 255
    assert prepared[10:30].max() == 0


@pytest.mark.parametrize("name", ["Bit", "CLIP", "ConvNext", "DeiT", "Gemma3", "Siglip", "ViT"])
def test_filters_left_out_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    import transformers

    kind = f"{name}ImageProcessor"
    crop = {"crop_size": 40, "resample": "left out", "image_processor_type": kind}
    ours = read_preprocessing(save_config(tmp_path, **crop)).resample
    assert RESAMPLES[ours] == getattr(transformers, f"{kind}Pil").resample


def test_uneven_mean_and_std_equal_transformers(tmp_path: Path) -> None:
    save_config(tmp_path, image_mean=[0.48, 0.45, 0.4], image_std=[0.22, 0.23, 0.29])
    pixels = np.random.default_rng(1).integers(0, 256, (60, 50), dtype=np.uint8)
    theirs = transformers_pixels(tmp_path, Image.fromarray(pixels).convert("RGB"), "gemma3")
    assert np.array_equal(our_pixels(tmp_path, pixels), theirs)


def test_real_radiographs_equal_transformers_at_896(tmp_path: Path, shared_data: Path) -> None:
    save_config(tmp_path, size={"height": 896, "width": 896})
    for path in sorted((shared_data / "fracatlas" / "images" / "Fractured").glob("*.jpg"))[:3]:
        with Image.open(path) as image:
            theirs = transformers_pixels(tmp_path, image.convert("RGB"), "gemma3")
        ours = our_pixels(tmp_path, decode_image(path.read_bytes()).pixels)
        assert np.array_equal(ours, theirs), path.name


def test_values_are_those_of_the_file_and_not_constants(tmp_path: Path) -> None:
    save_config(
        tmp_path,
        size={"height": 30, "width": 50},
        resample=3,
        rescale_factor=0.01,
        image_mean=[0.1, 0.2, 0.3],
        image_std=0.7,
    )
    assert read_preprocessing(tmp_path, "pad").as_dict() == {
        "size": [30, 50],
        "fit": "pad",
        "resample": "bicubic",
        "rescale": 0.01,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.7, 0.7, 0.7],
    }


def test_the_processor_may_be_nested_in_processor_config(tmp_path: Path) -> None:
    save_config(tmp_path)
    alone = read_preprocessing(tmp_path)
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": config}))
    assert read_preprocessing(tmp_path) == alone


def test_what_the_file_leaves_out_is_what_its_class_does(tmp_path: Path) -> None:
    left_out = {"resample": "left out", "rescale_factor": "left out"}
    gemma = read_preprocessing(save_config(tmp_path, **left_out))
    assert (gemma.resample, gemma.rescale) == ("bilinear", 1 / 255)
    siglip = save_config(tmp_path, image_processor_type="SiglipImageProcessor", **left_out)
    assert read_preprocessing(siglip).resample == "bicubic"


def test_switched_off_steps_are_switched_off(tmp_path: Path) -> None:
    save_config(tmp_path, do_rescale=False, do_normalize=False, image_mean=None, image_std=None)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 50), dtype=np.uint8)
    theirs = transformers_pixels(tmp_path, Image.fromarray(pixels).convert("RGB"), "gemma3")
    assert np.array_equal(our_pixels(tmp_path, pixels), theirs)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size": {"shortest_edge": 40}}, "shortest_edge"),
        ({"size": {"height": 0, "width": 4}}, "fixed height and width"),
        ({"size": "left out"}, "no image size"),
        ({"resample": 17}, "resample 17"),
        ({"resample": "left out", "image_processor_type": "OtherProcessor"}, "resample None"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_mean": "left out"}, "image_mean"),
        ({"image_mean": [10**400, 0.5, 0.5]}, "image_mean"),
        ({"image_std": [0.5, 0.0, 0.5]}, "not positive"),
        ({"image_std": [0.5, 1e-50, 0.5]}, "no finite input"),
        ({"image_mean": [0.5, 1e300, 0.5]}, "no finite input"),
        ({"rescale_factor": "1/255"}, "rescale_factor"),
        ({"do_resize": False}, "do_resize"),
        ({"do_pan_and_scan": True}, "do_pan_and_scan"),
        ({"do_center_crop": True}, "do_center_crop and gives no crop_size"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 40}}, "fixed height and width"),
        ({"do_center_crop": True, "crop_size": 40, "do_resize": False}, "do_resize"),
        ({"size": {"longest_edge": 40}, "crop_pct": 0.9}, "longest_edge"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    save_config(tmp_path, **changes)
    with pytest.raises(EncoderError, match=said):
        read_preprocessing(tmp_path)


def test_no_processor_file_and_broken_json_are_named(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"neither preprocessor_config\.json nor"):
        read_preprocessing(tmp_path)
    for text in ("{", "[" * 200_000):
        (tmp_path / "preprocessor_config.json").write_text(text)
        with pytest.raises(EncoderError, match="cannot be read"):
            read_preprocessing(tmp_path)
    with pytest.raises(EncoderError, match="fit 'crop' is unknown"):
        read_preprocessing(tmp_path, "crop")


@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    target=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    resample=st.sampled_from(sorted(RESAMPLES)),
)
@settings(max_examples=60, deadline=None)
def test_padding_keeps_the_aspect_ratio_in_a_black_frame(
    shape: tuple[int, int], target: tuple[int, int], resample: str
) -> None:
    preprocessing = Preprocessing(*target, "pad", resample, HALF, HALF, 1 / 255)
    framed = prepare(np.full(shape, 255, dtype=np.uint8), preprocessing)
    assert framed.shape == target
    assert framed.dtype == np.uint8
    rows, columns = np.flatnonzero(framed.any(axis=1)), np.flatnonzero(framed.any(axis=0))
    inner = framed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert (inner == 255).all()
    assert inner.shape[0] == target[0] or inner.shape[1] == target[1]
    scale = min(target[0] / shape[0], target[1] / shape[1])
    assert abs(inner.shape[0] - max(1, shape[0] * scale)) <= 0.5
    assert abs(inner.shape[1] - max(1, shape[1] * scale)) <= 0.5
    assert abs(rows[0] - (target[0] - 1 - rows[-1])) <= 1  # centred


def test_padding_equals_pillows_own() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90), dtype=np.uint8)
    preprocessing = Preprocessing(48, 48, "pad", "bilinear", HALF, HALF, 1 / 255)
    theirs = ImageOps.pad(Image.fromarray(pixels), (48, 48), Image.Resampling.BILINEAR, color=0)
    assert np.array_equal(prepare(pixels, preprocessing), np.asarray(theirs))


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((4, 4), np.float32), np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4), np.uint8)],
)
def test_only_a_grey_uint8_image_is_prepared(pixels: np.ndarray) -> None:
    with pytest.raises(EncoderError, match="uint8"):
        prepare(pixels, Preprocessing(8, 8, "stretch", "bilinear", HALF, HALF, 1 / 255))
