"""An encoder that accepts unprepared images: files, and arrays of any size.

A plain encoder reads prepared images, as caches and models require. `ImageEncoder` decodes files
and prepares images exactly as extraction does, so that equal files produce equal rows.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from medembed.core.errors import ArgumentError, EncoderError, ImageError, PathNotFoundError
from medembed.core.files import as_path, read_plain
from medembed.core.poolings import DEFAULT_POOLINGS, block_of, expand_blocks, list_names
from medembed.encoders import loading
from medembed.encoders.preprocessing import Preprocessing, prepare
from medembed.encoders.protocol import Encoder
from medembed.images.decode import decode_image
from medembed.images.intensity import DEFAULT_INTENSITY, Intensity

__all__ = ["EncoderLike", "ImageEncoder", "find_tower", "load_encoder", "name_encoder"]

BATCH_SIZE = 16
ATTRIBUTES = (
    *("source", "revision", "fingerprint", "preprocessing", "dimensions", "device", "precision"),
    "encode",
)

EncoderLike = Encoder | str | os.PathLike[str]
"""An encoder, or a reference that `load_encoder` accepts."""

_Images = str | os.PathLike[str] | np.ndarray | Sequence[str | os.PathLike[str] | np.ndarray]


class ImageEncoder:
    """A frozen encoder that decodes and prepares its images itself.

    Parameters
    ----------
    tower : Encoder
        The encoder of prepared images. Its attributes, described in `encoders.protocol.Encoder`,
        are also available here.
    """

    def __init__(self, tower: Encoder) -> None:
        self.tower = tower
        self.source: str = tower.source
        self.revision: str | None = tower.revision
        self.fingerprint: str = tower.fingerprint
        self.preprocessing: Preprocessing = tower.preprocessing
        self.dimensions: Mapping[str, tuple[int, ...]] = tower.dimensions
        self.device: str = tower.device
        self.precision: str = tower.precision

    def encode(
        self,
        images: _Images,
        poolings: Sequence[str] = DEFAULT_POOLINGS,
        *,
        batch_size: int = BATCH_SIZE,
        intensity: Intensity = DEFAULT_INTENSITY,
    ) -> dict[str, np.ndarray]:
        """Return the embeddings of images.

        Parameters
        ----------
        images : path, uint8 array, or sequence of them
            Files in every format that `extract` reads; arrays (H, W), 0 black, of any size; or one
            array (n, H, W). A single image is a batch of one.
        poolings : sequence of str
            Which of the encoder's poolings to return.
        batch_size : int
            Images in one pass.
        intensity : Intensity
            Which window of a DICOM to use.

        Returns
        -------
        dict of str to ndarray
            pooling -> float32 (n, ...), in the order of the images.

        Raises
        ------
        ArgumentError
            An image is neither a path nor such an array.
        PathNotFoundError
            A file does not exist.
        ImageError
            A file is not one complete image; the message names it.
        EncoderError
            The encoder lacks a pooling, or fails.
        """
        if batch_size < 1:
            raise EncoderError(f"batch_size is {batch_size}; it must be at least 1.")
        poolings = [poolings] if isinstance(poolings, str) else list(poolings)
        poolings = list(expand_blocks(poolings, self.dimensions))
        unknown = [name for name in poolings if name not in self.dimensions]
        if unknown:
            raise EncoderError(
                f"encoder {self.source} has no pooling {unknown[0]!r}; choose among "
                f"{list_names(self.dimensions)}."
            )
        size = (self.preprocessing.height, self.preprocessing.width)
        if _is_grey(images, 3) and images.shape[1:] == size and len(images) <= batch_size:
            return self.tower.encode(images, poolings)  # prepared already, as extraction has it
        listed = _list_images(images)
        nothing = {name: np.empty((0, *self.dimensions[name]), np.float32) for name in poolings}
        parts: list[Mapping[str, np.ndarray]] = [nothing]
        for start in range(0, len(listed), batch_size):
            chosen = listed[start : start + batch_size]
            pixels = np.empty((len(chosen), *size), np.uint8)
            for place, image in enumerate(chosen):
                pixels[place] = prepare(_read(image, intensity), self.preprocessing)
            parts.append(self.tower.encode(pixels, poolings))
        return {name: np.concatenate([part[name] for part in parts]) for name in poolings}

    def __repr__(self) -> str:
        shapes = {
            name: " × ".join(map(str, shape))
            for name, shape in self.dimensions.items()
            if block_of(name) is None
        }
        n_blocks = max((at[1] for name in self.dimensions if (at := block_of(name))), default=0)
        blocks = f", each of {n_blocks} blocks (--layers)" if n_blocks else ""
        size = f"{self.preprocessing.height} × {self.preprocessing.width}"
        offered = ", ".join(f"{name} ({shape})" for name, shape in shapes.items())
        return (
            f"Encoder {name_encoder(self)} on {self.device} in {self.precision}: images of {size}; "
            f"poolings {offered}{blocks}"
        )


def load_encoder(
    ref: EncoderLike,
    *,
    device: str = "auto",
    precision: str = "auto",
    fit: str = "stretch",
    poolings: Sequence[str] = DEFAULT_POOLINGS,
    progress: Callable[[int, int], None] | None = None,
) -> ImageEncoder:
    """Load an encoder by hub id (`owner/name[@revision]`), directory, or `demo`.

    Parameters
    ----------
    ref : str, path or Encoder
        An encoder object is wrapped so that it also accepts files; the other arguments are then
        ignored.
    device, precision, fit, poolings, progress
        See `encoders.loading.load_encoder`.

    Raises
    ------
    ArgumentError
        `ref` is none of these.
    DeviceMemoryError, EncoderError
        The encoder cannot be loaded; see `encoders.loading.load_encoder`.
    """
    if isinstance(ref, ImageEncoder):
        return ref
    options: dict[str, Any] = {"device": device, "precision": precision, "fit": fit}
    return ImageEncoder(find_tower(ref, poolings=poolings, progress=progress, **options))


def find_tower(encoder: EncoderLike, **options: Any) -> Encoder:
    """Return the encoder of prepared images; a reference is loaded with these options.

    Raises
    ------
    ArgumentError
        `encoder` is neither an encoder nor a reference to one.
    EncoderError
        The encoder cannot be loaded.
    """
    if isinstance(encoder, ImageEncoder):
        return encoder.tower
    if isinstance(encoder, Encoder):
        return encoder
    if isinstance(encoder, str | os.PathLike):
        return loading.load_encoder(encoder, **options)
    lacks = [name for name in ATTRIBUTES if not hasattr(encoder, name)]
    raise ArgumentError(
        "an encoder is given as a hub id, a directory, demo, or as an object with the attributes "
        f"{', '.join(ATTRIBUTES)}; this is of type {type(encoder).__name__} and lacks "
        f"{', '.join(lacks)}."
    )


def name_encoder(encoder: EncoderLike) -> str:
    """Return the reference that loads an encoder: `source`, or `source@revision`."""
    if isinstance(encoder, str | os.PathLike):
        return os.fspath(encoder)
    return f"{encoder.source}@{encoder.revision}" if encoder.revision else encoder.source


def _list_images(images: Any) -> list[Any]:
    if isinstance(images, str | os.PathLike) or _is_grey(images, 2):
        return [images]
    if isinstance(images, Iterable) and not isinstance(images, Mapping | bytes):
        return list(images)
    raise ArgumentError(
        "images are paths, or uint8 arrays of shape (H, W), one or a list of them; this is of type "
        f"{type(images).__name__}."
    )


def _is_grey(image: Any, ndim: int) -> TypeGuard[np.ndarray]:
    return isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == ndim


def _read(image: Any, intensity: Intensity) -> np.ndarray:
    if isinstance(image, np.ndarray):
        if not _is_grey(image, 2) or not image.size:
            raise ArgumentError(
                f"an array is uint8 of shape (H, W), 0 black; this is {image.dtype} {image.shape}. "
                "Bring deeper or coloured images to 8-bit grey, or give their files."
            )
        return image
    path = as_path(image, "an image", "a uint8 array")
    try:
        return _decode(path, intensity)
    except FileNotFoundError as error:
        raise PathNotFoundError(f"there is no image at {path}.") from error
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror or error}.") from error


def _decode(path: Path, intensity: Intensity) -> np.ndarray:
    data = read_plain(path)
    try:
        return decode_image(data, intensity).pixels
    except ImageError as error:
        raise ImageError(f"{path} cannot be decoded: {error}", error.since) from error
