"""A checkpoint's image preprocessing, read from its own file."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medembed.core.errors import EncoderError
from medembed.encoders.checkpoint_files import (
    OPEN_CLIP_CONFIG,
    checkpoint_name,
    find_config,
    holds_file,
    is_open_clip_config,
    is_timm_config,
    read_json,
)

__all__ = [
    "FITS",
    "PROCESSOR_FILES",
    "RESAMPLES",
    "Preprocessing",
    "channel_levels",
    "place_image",
    "prepare",
    "read_preprocessing",
]

FITS = ("stretch", "pad")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
RESAMPLES = {
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
# Defaults of these transformers classes if the file lacks `resample`.
_DEFAULT_RESAMPLE = {
    "BitImageProcessor": "bicubic",
    "CLIPImageProcessor": "bicubic",
    "ConvNextImageProcessor": "bicubic",
    "DeiTImageProcessor": "bicubic",
    "Gemma3ImageProcessor": "bilinear",
    "SiglipImageProcessor": "bicubic",
    "ViTImageProcessor": "bilinear",
}
# These classes crop if the file lacks `do_center_crop`.
_CROPPING = ("BitImageProcessor", "CLIPImageProcessor", "DeiTImageProcessor")
# Steps of transformers' processors that this pipeline does not support.
_FOREIGN_STEPS = ("do_pan_and_scan", "do_pad", "do_image_splitting")


# What open_clip takes where its config says nothing: OpenAI's.
_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
_TORCHVISION = {
    "size": {"height": 224, "width": 224},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": int(RESAMPLES["bilinear"]),
}


@dataclass(frozen=True)
class Preprocessing:
    """The conversion of a grey uint8 image into the tower's input.

    Attributes
    ----------
    height, width : int
        Size of the tower's input in pixels.
    fit : {"stretch", "pad"}
        Whether the aspect ratio is changed, or kept with black padding.
    resample : str
        A name in `RESAMPLES`, Pillow's filter of that name.
    mean, std : tuple of float
        Per channel (red, green, blue), in units of the rescaled pixel.
    rescale : float
        Factor on the uint8 value before `mean` and `std`, usually 1/255.
    """

    height: int
    width: int
    fit: str
    resample: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float

    def as_dict(self) -> dict[str, object]:
        """Return the JSON-able form used in a cache's spec."""
        return {
            "size": [self.height, self.width],
            "fit": self.fit,
            "resample": self.resample,
            "rescale": self.rescale,
            "mean": list(self.mean),
            "std": list(self.std),
        }


def read_preprocessing(directory: Path, fit: str = "stretch") -> Preprocessing:
    """Return a checkpoint's image preprocessing: its size, filter, scale, mean and std.

    Parameters
    ----------
    directory : Path
        Holds `preprocessor_config.json`, or `processor_config.json` with an `image_processor`; or
        timm's `config.json`; or `open_clip_config.json`. A file is of torchvision's weights, which
        come without their own: they expect ImageNet's mean and deviation, 224 pixels, bilinear.
    fit : {"stretch", "pad"}
        `stretch` matches the processor itself, except for a centre crop.

    Notes
    -----
    Processors of ResNet, ConvNeXt, DINOv2 and others resize the shortest edge and crop the centre.
    Here the whole image is resized to the size of the crop: a centre crop removes a radiograph's
    ends, up to half of a long bone, and any findings there.

    Raises
    ------
    EncoderError
        The file is missing, a value is missing or out of range, a step is not supported, or two
        files disagree.
    """
    if fit not in FITS:
        raise EncoderError(f"fit {fit!r} is unknown. Choose one of: {', '.join(FITS)}.")
    if directory.is_file():
        return _parse(directory, _TORCHVISION, fit)
    own = find_config(directory)
    if own.name == OPEN_CLIP_CONFIG:
        config = read_json(own)
        if not is_open_clip_config(config):
            raise EncoderError(
                f"{own.name} of {checkpoint_name(directory)} describes no image tower."
            )
        return _parse(own, _read_open_clip(config), fit)
    if not any(holds_file(directory / name) for name in PROCESSOR_FILES) and holds_file(own):
        config = read_json(own)
        if is_timm_config(config):
            return _parse(own, _as_processor(config["pretrained_cfg"]), fit)
    (path, config), *others = _read_configs(Path(directory))
    found = _parse(path, config, fit)
    for other, its in others:
        _refuse_other(path, found, other, its)
    return found


def _parse(path: Path, config: Mapping[str, Any], fit: str) -> Preprocessing:
    _refuse_foreign_steps(path, config)
    height, width = _read_size(path, config)
    normalised = bool(config.get("do_normalize", True))
    mean = _read_triple(path, config, "image_mean") if normalised else (0.0, 0.0, 0.0)
    std = _read_triple(path, config, "image_std") if normalised else (1.0, 1.0, 1.0)
    if min(std) <= 0:
        raise EncoderError(f"{path.name}: image_std {list(std)} is not positive.")
    resample = _read_resample(path, config)
    found = Preprocessing(height, width, fit, resample, mean, std, _read_rescale(path, config))
    with np.errstate(all="ignore"):  # the file's numbers may exceed single precision
        if not np.isfinite(channel_levels(found)).all():
            raise EncoderError(
                f"{path.name}: image_mean {list(mean)}, image_std {list(std)} and rescale_factor "
                f"{found.rescale} give no finite input. Copy the file from the original."
            )
    return found


def prepare(pixels: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Return a grey image resized to the tower's input, like transformers' PIL processor.

    Pillow resamples each channel separately in the same fixed-point arithmetic, so resizing the
    grey channel equals resizing its RGB copy at a third of the cost.

    Parameters
    ----------
    pixels : ndarray
        uint8 (H, W), 0 black.

    Returns
    -------
    ndarray
        uint8 (height, width).

    Raises
    ------
    EncoderError
        `pixels` is not a non-empty uint8 image.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or 0 in pixels.shape:
        found = f"{pixels.dtype} {pixels.shape}"
        raise EncoderError(f"an image to prepare is uint8 (H, W) and not empty; this is {found}.")
    target = (preprocessing.height, preprocessing.width)
    if preprocessing.fit == "stretch":
        return _resize(pixels, target, preprocessing.resample)
    top, left, height, width = place_image(pixels.shape, preprocessing)
    framed = np.zeros(target, dtype=np.uint8)
    resized = _resize(pixels, (height, width), preprocessing.resample)
    framed[top : top + height, left : left + width] = resized
    return framed


def place_image(shape: tuple[int, ...], preprocessing: Preprocessing) -> tuple[int, int, int, int]:
    """Return the place in the tower's input where `prepare` puts an image of shape (H, W).

    Returns
    -------
    tuple of int
        Top, left, height and width in pixels of the input; all of it, except with `pad`.
    """
    target = (preprocessing.height, preprocessing.width)
    if preprocessing.fit == "stretch":
        return 0, 0, *target
    inner = _inner_size(shape, target)
    return (target[0] - inner[0]) // 2, (target[1] - inner[1]) // 2, *inner


def channel_levels(preprocessing: Preprocessing) -> np.ndarray:
    """Return a table of each of the 256 grey levels' value in each channel.

    A single uint8 channel can thus be transferred to the device and looked up there. The result
    equals that of transformers to the last bit, which multiplies in float64, rounds to float32, and
    subtracts and divides in float32.

    Returns
    -------
    ndarray
        float32 (3, 256).
    """
    levels = (np.arange(256, dtype=np.float64) * preprocessing.rescale).astype(np.float32)
    mean = np.array(preprocessing.mean, dtype=np.float32)[:, None]
    std = np.array(preprocessing.std, dtype=np.float32)[:, None]
    table: np.ndarray = (levels[None] - mean) / std
    return table


def _read_configs(directory: Path) -> list[tuple[Path, Mapping[str, Any]]]:
    """Return the files that describe the processor, starting with the one that transformers uses.

    Since 5.0 this is the one nested in processor_config.json, if present; before it was the other.
    """
    own, whole = (directory / name for name in PROCESSOR_FILES)
    found = [
        (path, config)
        for path in (whole, own)
        if holds_file(path) and (config := _describes_images(read_json(path), nested=path == whole))
    ]
    if found:
        return found
    if holds_file(own):
        raise EncoderError(
            f"{own.name} of {checkpoint_name(directory)} holds no image size. "
            "Copy the file from the original."
        )
    raise EncoderError(
        f"{checkpoint_name(directory)} holds neither {PROCESSOR_FILES[0]} nor a "
        f"{PROCESSOR_FILES[1]} with an image_processor: the size and scaling that its tower "
        "expects are unknown. Copy the file from the original checkpoint."
    )


def _as_processor(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what timm's `pretrained_cfg` says of images in the words of a processor's file."""
    size = config.get("input_size")
    is_size = isinstance(size, list) and len(size) == 3 and size[0] == 3
    resample = RESAMPLES.get(str(config.get("interpolation", "bicubic")))
    return {
        "size": {"height": size[1], "width": size[2]} if is_size else size,  # type: ignore[index]
        "image_mean": config.get("mean"),
        "image_std": config.get("std"),
        "resample": config.get("interpolation") if resample is None else int(resample),
    }


def _read_open_clip(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what open_clip's config says of images in the words of a processor's file.

    open_clip crops the centre after it resized the shortest side, or squashes, or pads; this and
    the other processors' crops are left out alike.
    """
    images = config.get("preprocess_cfg")
    images = images if isinstance(images, Mapping) else {}
    side = config["model_cfg"]["vision_cfg"].get("image_size", 224)
    sides = {"height": side[0], "width": side[1]} if _is_pair(side) else side
    resample = RESAMPLES.get(str(images.get("interpolation") or "bicubic"))
    return {
        "size": sides,
        "image_mean": images.get("mean") or _CLIP_MEAN,
        "image_std": images.get("std") or _CLIP_STD,
        "resample": images.get("interpolation") if resample is None else int(resample),
    }


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2


def _describes_images(config: Any, *, nested: bool) -> Mapping[str, Any] | None:
    """Return the image processor's part of a file: a nested entry, or the file itself."""
    if not isinstance(config, dict):
        return None
    inner = config.get("image_processor")
    if nested and inner and not (isinstance(inner, dict) and "size" in inner):
        raise EncoderError(
            f"image_processor of {PROCESSOR_FILES[1]} holds no image size. Copy the file from the "
            "original."
        )
    places = (inner, config) if nested else (config, inner)
    return next((place for place in places if isinstance(place, dict) and "size" in place), None)


def _refuse_other(path: Path, found: Preprocessing, other: Path, config: Mapping[str, Any]) -> None:
    """Refuse a second file that would prepare images differently."""
    name = checkpoint_name(path.parent)
    try:
        its = _parse(other, config, found.fit)
    except EncoderError as error:
        what = str(error)
    else:
        keys = (field.name for field in fields(found))
        key = next((key for key in keys if getattr(found, key) != getattr(its, key)), None)
        if key is None:
            return
        what = f"{key} is {getattr(found, key)} in the one, {getattr(its, key)} in the other."
    raise EncoderError(
        f"{path.name} and {other.name} of {name} disagree on how images are prepared: {what} "
        f"transformers reads the first since its release 5.0, and read the second before. Keep the "
        "one that belongs to the weights."
    )


def _refuse_foreign_steps(path: Path, config: Mapping[str, Any]) -> None:
    for step in _FOREIGN_STEPS:
        if config.get(step):
            raise EncoderError(f"{path.name} asks for {step}, which medembed does not do.")
    if config.get("do_resize") is False:
        raise EncoderError(f"{path.name} says do_resize false; images differ in size.")


def _read_size(path: Path, config: Mapping[str, Any]) -> tuple[int, int]:
    kind = _kind_of(config)
    size = config["size"]
    if config.get("do_center_crop", kind in _CROPPING):
        size = config.get("crop_size")
        if size is None:
            raise EncoderError(
                f"{path.name} asks for do_center_crop and gives no crop_size. Add it."
            )
    elif isinstance(size, dict) and (kind == "ConvNextImageProcessor" or "crop_pct" in config):
        size = size.get("shortest_edge", size)  # this class crops a square of this size
    if isinstance(size, int):
        size = {"height": size, "width": size}
    if isinstance(size, dict):
        sides = (size.get("height"), size.get("width"))
        if all(type(side) is int and 0 < side <= 16384 for side in sides):
            return sides[0], sides[1]  # type: ignore[return-value]
    raise EncoderError(
        f"{path.name}: size {size!r} is not a fixed height and width, which the tower needs."
    )


def _kind_of(config: Mapping[str, Any]) -> str:
    """Return the processor's class without its backend; early releases used another key."""
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    kind = kind.removesuffix("Fast").removesuffix("Pil")
    return kind.replace("FeatureExtractor", "ImageProcessor")


def _read_resample(path: Path, config: Mapping[str, Any]) -> str:
    code = config.get("resample")
    if code is None and _kind_of(config) in _DEFAULT_RESAMPLE:
        return _DEFAULT_RESAMPLE[_kind_of(config)]
    for name, filter_ in RESAMPLES.items():
        if type(code) is int and code == int(filter_):
            return name
    raise EncoderError(f"{path.name}: resample {code!r} is not one of Pillow's filters.")


def _read_triple(path: Path, config: Mapping[str, Any], key: str) -> tuple[float, float, float]:
    value = config.get(key)
    values = [value] * 3 if isinstance(value, int | float) else value
    if isinstance(values, list) and len(values) == 3 and all(map(_is_number, values)):
        return float(values[0]), float(values[1]), float(values[2])
    raise EncoderError(f"{path.name}: {key} {value!r} is not three numbers.")


def _read_rescale(path: Path, config: Mapping[str, Any]) -> float:
    if not config.get("do_rescale", True):
        return 1.0
    factor = config.get("rescale_factor", 1 / 255)  # transformers' default for every processor
    if _is_number(factor) and factor > 0:
        return float(factor)
    raise EncoderError(f"{path.name}: rescale_factor {factor!r} is not a positive number.")


def _is_number(value: object) -> bool:
    """Return whether a value is a finite number; an integer may be too large for any float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max


def _inner_size(shape: tuple[int, ...], target: tuple[int, int]) -> tuple[int, int]:
    scale = min(target[0] / shape[0], target[1] / shape[1])
    height = min(target[0], max(1, round(shape[0] * scale)))
    return height, min(target[1], max(1, round(shape[1] * scale)))


def _resize(pixels: np.ndarray, size: tuple[int, int], resample: str) -> np.ndarray:
    image = Image.fromarray(pixels).resize((size[1], size[0]), resample=RESAMPLES[resample])
    return np.array(image)
