"""Map the stored values of a grey DICOM image to shares of white: modality, then VOI.

Every step works on a table of all values that the image's bits can hold, at most 65,536, instead
of on the pixels: the arithmetic is identical, and time and memory do not grow with the image.
Clauses are those of the DICOM standard (PS3.3 2024). pydicom's functions serve as an oracle in the
tests but are not used here, since they deviate from the standard: `apply_windowing` inverts an
image whose
Rescale Slope is negative, `apply_voi` wraps indices beyond 255 into a table of 8 bits, and
`apply_modality_lut` overflows in signed 16 bits and knows no tables of 10 or 12 bits.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from medembed.core.errors import ImageError
from medembed.images.dicom.windows import DEPTH_IN_USE, FIRST_WINDOW, NO_WINDOW, apply_voi, look_up

__all__ = [
    "DEFAULT_INTENSITY",
    "FIRST_WINDOW",
    "NO_WINDOW",
    "Intensity",
    "Levels",
    "Shares",
    "apply_modality",
    "robust_range",
    "shares_of_white",
]

_PERCENTILES = re.compile(r"^(.+), ([0-9.]+) to ([0-9.]+) %$", re.DOTALL)
PLATEAU = 0.005  # share of pixels above which a value at an end is a border or marker, not anatomy


@dataclass(frozen=True)
class Intensity:
    """How a DICOM image's values are mapped to grey where the file leaves a choice.

    Attributes
    ----------
    window : str
        "first": the first VOI LUT, else the first window. "none": neither, as if the file had
        none. Any other value is the explanation (LUT Explanation, Window Center & Width
        Explanation) of the one to use, ignoring case.
    low, high : float
        Percentiles that become black and white if the file has neither; see `robust_range`.

    Raises
    ------
    ImageError
        The window has no name, or the percentiles are not 0 <= low < high <= 100.
    """

    window: str = FIRST_WINDOW
    low: float = 1.0
    high: float = 99.0

    def __post_init__(self) -> None:
        if not self.window.strip() or not 0 <= self.low < self.high <= 100:
            raise ImageError(
                f"window {self.window!r} with percentiles {self.low:g} and {self.high:g} is no "
                "choice: a window has a name, and percentiles are 0 <= low < high <= 100"
            )

    def as_spec(self) -> str | None:
        """Return the entry in a cache's spec, None for the default, so that older caches match.

        A cache made with a named window shares no rows with one made without, even for formats
        that these choices do not affect.
        """
        if self == DEFAULT_INTENSITY:
            return None
        name = self.window.strip().casefold()
        default = (self.low, self.high) == (DEFAULT_INTENSITY.low, DEFAULT_INTENSITY.high)
        return name if default else f"{name}, {self.low:g} to {self.high:g} %"

    @classmethod
    def from_spec(cls, entry: object) -> "Intensity":
        """Return what `as_spec` wrote as `entry`; ImageError if it wrote no such thing."""
        if entry is None:
            return DEFAULT_INTENSITY
        found = _PERCENTILES.match(str(entry))
        if found is None:
            return cls(str(entry))
        try:
            return cls(found[1], float(found[2]), float(found[3]))
        except ValueError as error:
            raise ImageError(f"the window {entry!r} is none: {error}") from error


DEFAULT_INTENSITY = Intensity()


@dataclass(frozen=True)
class Levels:
    """Every value that a stored pixel can have.

    Attributes
    ----------
    stored : ndarray
        int64 (2 ** bits,), in the order of the bit patterns: 0, 1, … and, where signed, from the
        middle on negative.
    counts : ndarray
        int64 (2 ** bits,): the number of pixels with each value, padding excluded.
    bits : int
        Bits Stored, 1 to 16.
    """

    stored: np.ndarray
    counts: np.ndarray
    bits: int


@dataclass(frozen=True)
class Shares:
    """The result of the transforms for every stored value.

    Attributes
    ----------
    white : ndarray
        float64 (2 ** bits,), 0 black to 1 white, before the presentation.
    notes : tuple of str
        Why a window of the file was skipped.
    """

    white: np.ndarray
    notes: tuple[str, ...]


def apply_modality(stored: np.ndarray, dataset: Any) -> tuple[np.ndarray, float, float]:
    """Apply the modality LUT, or rescale slope and intercept (PS3.3 C.11.1).

    Parameters
    ----------
    stored : ndarray
        int64 (n,), stored values.
    dataset : pydicom.Dataset

    Returns
    -------
    ndarray
        float64 (n,).
    low, high : float
        The range of the output (C.11.1.1.1 for tables).

    Raises
    ------
    ImageError
        A table contradicts itself, or slope and intercept are not two finite numbers.
    """
    items = dataset.get("ModalityLUTSequence")
    if items:
        output, top = look_up(stored, items[0], "modality LUT")
        return output, 0.0, top
    slope, intercept = (_number(dataset, name) for name in ("RescaleSlope", "RescaleIntercept"))
    if slope is None and intercept is None:
        slope, intercept = 1.0, 0.0
    if slope is None or intercept is None or slope == 0:
        raise ImageError(
            "the DICOM's rescale slope and intercept are not both there, or the slope is 0"
        )
    output = stored * slope + intercept
    return output, float(output.min()), float(output.max())


def shares_of_white(
    levels: Levels, dataset: Any, intensity: Intensity, *, modality: Any = None, voi: Any = None
) -> Shares:
    """Apply the modality and VOI transforms, but not the presentation.

    If the file has a VOI LUT or window, it alone is applied (PS3.3 C.11.2); an invalid one counts
    as absent, see `windows.apply_voi`. Otherwise the range is that of Bits Stored, if the values
    are already meant for presentation (Presentation Intent Type FOR PRESENTATION, or 8 bits that
    are not FOR PROCESSING; without a VOI LUT the transform is the identity, PS3.4 N.2.1.2) and use
    that range; else `robust_range`.

    Parameters
    ----------
    modality, voi : pydicom.Dataset, optional
        The data sets that hold the transforms, by default `dataset`.

    Raises
    ------
    ImageError
        A transform contradicts itself, the named one is missing, or it hides the whole image.
    """
    values, low, high = apply_modality(levels.stored, dataset if modality is None else modality)
    seen = levels.counts > 0
    shares, notes = apply_voi(values, seen, dataset if voi is None else voi, intensity.window)
    if shares is not None:
        if np.ptp(values[seen]) > 0 and np.ptp(np.rint(255 * shares[seen])) == 0:
            raise ImageError("the DICOM's window shows nothing of the image: all of one grey")
        return Shares(shares, notes)
    used = values[seen].max()
    if not _is_for_presentation(dataset, levels.bits) or used - low < DEPTH_IN_USE * (high - low):
        low, high = robust_range(values, levels.counts, intensity.low, intensity.high)
    return Shares(np.clip((values - low) / (high - low), 0, 1), notes)


def robust_range(
    values: np.ndarray, counts: np.ndarray, low: float, high: float
) -> tuple[float, float]:
    """Return percentiles unaffected by burnt-in markers, electronic shutters and clipped air.

    The lowest and the highest value that occur are excluded if at least 0.5 % of the pixels have
    exactly that value: a border, a filled box or letter, or a saturated background has one grey
    level. The percentiles `low` and `high` are taken from the remaining pixels, so markers with
    several grey levels may cover up to 1 % of them. An image and its negative have mirrored ranges.

    Parameters
    ----------
    values, counts : ndarray
        (n,): each value and the number of pixels that have it.
    low, high : float
        Percent.

    Raises
    ------
    ImageError
        All pixels have one value.
    """
    seen = counts > 0
    greys, place = np.unique(values[seen], return_inverse=True)
    numbers = np.bincount(place, weights=counts[seen])
    if len(greys) < 2:
        raise ImageError(
            f"all pixels of the DICOM have the same value, {greys[0]:g}: the file shows nothing"
        )
    is_border = numbers >= PLATEAU * numbers.sum()
    inner = slice(int(is_border[0]), len(greys) - int(is_border[-1]))
    if len(greys[inner]) >= 2:
        greys, numbers = greys[inner], numbers[inner]
    total = numbers.sum()
    first = np.searchsorted(np.cumsum(numbers), low / 100 * total, side="right")
    last = np.searchsorted(np.cumsum(numbers[::-1]), (100 - high) / 100 * total, side="right")
    first, last = min(int(first), len(greys) - 1), max(len(greys) - 1 - int(last), 0)
    if first >= last:  # nearly all pixels have one value
        return float(greys[0]), float(greys[-1])
    return float(greys[first]), float(greys[last])


def _is_for_presentation(dataset: Any, bits: int) -> bool:
    intent = str(dataset.get("PresentationIntentType") or "").strip().upper()
    return intent == "FOR PRESENTATION" or (bits <= 8 and intent != "FOR PROCESSING")


def _number(dataset: Any, keyword: str) -> float | None:
    """Return a decimal string as a number, None if it is empty."""
    value = dataset.get(keyword)
    if value is None or value == "":
        return None
    if not math.isfinite(float(value)):
        raise ImageError(f"the DICOM's {keyword} is not a finite number")
    return float(value)
