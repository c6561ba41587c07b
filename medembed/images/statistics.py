"""What a film tells without anything being seen in it: its brightness, size, sharpness, border.

A score that these few numbers reach already is no merit of an encoder: scanners, exposures and
cropping go with hospitals and with diagnoses.
"""

from collections.abc import Callable, Sequence

import numpy as np

from medembed.core.errors import ImageError
from medembed.core.locations import Location
from medembed.images.intensity import DEFAULT_INTENSITY, Intensity
from medembed.images.load import read_contents

__all__ = ["STATISTICS", "measure_files", "measure_image"]

STATISTICS = (
    *("mean", "spread", "size", "aspect", "sharpness"),
    *("border_mean", "border_spread"),
)
"""Names of the statistics, in the order of `measure_image`."""

_BORDER = 32  # the border is this part of the shorter side wide
_ROWS = 512  # at a time, so that memory does not grow with the film


def measure_image(pixels: np.ndarray) -> np.ndarray:
    """Return the statistics of a decoded image, before it is resized.

    Parameters
    ----------
    pixels : ndarray
        uint8 (H, W), 0 black.

    Returns
    -------
    ndarray
        float32 (7,), in the order of `STATISTICS`:

        - mean, spread: mean and standard deviation of the grey levels, 0 to 255;
        - size: log2 of the number of pixels;
        - aspect: log2 of width over height;
        - sharpness: log2 of 1 + the variance of the Laplacian with four neighbours
          (Pech-Pacheco et al., ICPR 2000, 3:314–317), 0 for fewer than three rows or columns;
        - border_mean, border_spread: mean and standard deviation of the grey levels in a frame
          whose width is 1/32 of the shorter side, at least 1 pixel.
    """
    height, width = pixels.shape
    counts = _count_levels(pixels)
    frame = max(1, min(height, width) // _BORDER)
    inner = _count_levels(pixels[frame:-frame, frame:-frame])
    return np.array(
        [
            *_mean_and_spread(counts),
            np.log2(height * width),
            np.log2(width / height),
            np.log2(1 + _laplacian_variance(pixels)),
            *_mean_and_spread(counts - inner),
        ],
        np.float32,
    )


def _count_levels(pixels: np.ndarray) -> np.ndarray:
    """Return how often each of the 256 grey levels occurs."""
    counts = np.zeros(256, np.int64)
    for start in range(0, len(pixels), _ROWS):
        counts += np.bincount(pixels[start : start + _ROWS].ravel(), minlength=256)
    return counts


def _mean_and_spread(counts: np.ndarray) -> tuple[float, float]:
    """Return mean and standard deviation of grey levels, from how often each occurs."""
    levels = np.arange(len(counts))
    mean = float(levels @ counts / counts.sum())
    return mean, float(np.sqrt((levels - mean) ** 2 @ counts / counts.sum()))


def _laplacian_variance(pixels: np.ndarray) -> float:
    n = total = squares = 0  # whole numbers: the result does not depend on the order
    for start in range(1, len(pixels) - 1, _ROWS):
        part = pixels[start - 1 : start + _ROWS + 1].astype(np.int16)
        middle = part[1:-1, 1:-1]
        found = part[:-2, 1:-1] + part[2:, 1:-1] + part[1:-1, :-2] + part[1:-1, 2:] - 4 * middle
        n += found.size
        total += int(found.sum(dtype=np.int64))
        squares += int(np.square(found, dtype=np.int32).sum(dtype=np.int64))
    return squares / n - (total / n) ** 2 if n else 0.0


def measure_files(
    paths: Sequence[Location],
    sha256: Sequence[str],
    intensity: Intensity = DEFAULT_INTENSITY,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Return the statistics of files, float32 (n, 7), decoded as extraction decodes them.

    Parameters
    ----------
    paths, sha256 : sequences
        The files, and the hashes that their bytes must have.
    intensity : Intensity
        Which window of a DICOM to use.
    progress : callable, optional
        Called as progress(done, total) with files.

    Raises
    ------
    ImageError
        A file is missing, holds other bytes or is no complete image; the first is named.
    StorageError
        A bucket refuses, or keeps failing.
    """
    found = []
    readings = read_contents(paths, sha256, measure_image, intensity)
    for path, reading in zip(paths, readings, strict=True):
        if reading.pixels is None:
            reason = reading.reason or "its bytes are not those of the manifest"
            raise ImageError(f"{path} cannot be measured: {reason}. Restore the file.")
        found.append(reading.pixels)
        if progress:
            progress(len(found), len(paths))
    return np.stack(found) if found else np.empty((0, len(STATISTICS)), np.float32)
