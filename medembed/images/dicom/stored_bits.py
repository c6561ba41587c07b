"""Which stored value each bit pattern of a DICOM's pixels means, or why one means none.

Worked out on the patterns that occur, at most 65,536, not on the pixels.
"""

from typing import Any

import numpy as np

from medembed.core.errors import ImageError

__all__ = ["OVERLAY_BITS", "count_patterns", "find_levels", "overlay_bits"]

BLOCK = 1 << 22  # pixels counted at once: numpy counts by copies of 64 bits
OVERLAY_GROUPS = range(0x6000, 0x6020, 2)  # PS3.5 7.6
_BIT_POSITION = 0x0102
OVERLAY_BITS = " ".join(f"0x{group:04x}{_BIT_POSITION:04x}" for group in OVERLAY_GROUPS)
"""Tags of Overlay Bit Position: 0, or that of overlays which lie in the pixels' unused bits."""
MARGIN = 1 / 8  # of the range: what a lossy codec may overshoot by at the edges of what it coded
FEW = 0.01  # share of the pixels that may lie farther out, as edges of markers do


def overlay_bits(dataset: Any) -> int:
    """Give the bits of a pixel's word that overlays are declared to lie in, as a mask."""
    mask = 0
    for group in OVERLAY_GROUPS:
        position = dataset.get((group, _BIT_POSITION))
        value = getattr(position, "value", None)
        if isinstance(value, int) and 0 < value < 16:
            mask |= 1 << value
    return mask


def count_patterns(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """View pixels as their bit patterns, and count these.

    Parameters
    ----------
    pixels : ndarray
        Integers of 8 or 16 bits, signed or not, of any byte order.

    Returns
    -------
    patterns : uint8 or uint16, in the shape of `pixels`
    numbers : int64 (2 ** (8 * itemsize),)
        How many pixels have each.
    """
    native = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    patterns = native.view(f"u{native.itemsize}")
    n_patterns = 1 << 8 * native.itemsize
    blocks = np.array_split(patterns.ravel(), 1 + patterns.size // BLOCK)
    numbers = np.sum([np.bincount(block, minlength=n_patterns) for block in blocks], axis=0)
    return patterns, numbers


def find_levels(
    kind: np.dtype,
    numbers: np.ndarray,
    stored: int,
    *,
    high: int | None,
    signed: bool,
    overlay: int = 0,
    lossy: bool = False,
) -> np.ndarray:
    """Give each bit pattern its place among the 2 ** `stored` values that Bits Stored can hold.

    Parameters
    ----------
    kind : dtype
        Of the pixels.
    numbers : int64 (n,)
        How many pixels have each pattern.
    stored : int
        Bits Stored.
    high : int or None
        High Bit, where pixels are words as they lie in the file; None where they are the numbers
        that a codec gave.
    signed : bool
        Whether words are two's complement.
    overlay : int
        Mask of the bits that overlays lie in.
    lossy : bool
        Whether numbers may lie a little beyond the range because the codec is lossy; these become
        its ends.

    Returns
    -------
    ndarray
        int64 (n,), 0 to 2 ** `stored` - 1, in the order of the bit patterns of that many bits.

    Raises
    ------
    ImageError
        Pixels need more than Bits Stored: masking them would fold bright into dark.
    """
    patterns = np.arange(len(numbers))
    if high is None:
        patterns = _numbers(patterns, numbers, kind, stored, lossy)
    else:
        _refuse_stray_bits(patterns[numbers > 0], stored, high, signed, overlay, len(numbers) - 1)
        patterns = patterns >> (high - stored + 1)
    places: np.ndarray = patterns & ((1 << stored) - 1)
    return places


def _numbers(
    patterns: np.ndarray, numbers: np.ndarray, kind: np.dtype, stored: int, lossy: bool
) -> np.ndarray:
    top, half = 1 << stored, len(patterns) // 2
    low, high = 0, top
    if kind.kind == "i":
        patterns = np.where(patterns < half, patterns, patterns - 2 * half)
        low, high = -top // 2, top // 2
    outside = (patterns < low) | (patterns >= high)
    if numbers[outside].any():
        margin = MARGIN * top
        far = (patterns < low - margin) | (patterns >= high + margin)
        if not lossy or numbers[far].sum() > FEW * numbers.sum():
            raise ImageError(f"the DICOM's compressed data need more than {stored} bits")
    clipped: np.ndarray = np.clip(patterns, low, high - 1)
    return clipped


def _refuse_stray_bits(
    found: np.ndarray, stored: int, high: int, signed: bool, overlay: int, word: int
) -> None:
    """Refuse words with bits above High Bit that neither an overlay nor a sign accounts for."""
    above = word & ~((2 << high) - 1) & ~overlay
    strays = found & above
    if signed:  # sign-extended or not, both are met
        is_negative = (found >> high & 1).astype(bool)
        strays = np.where(is_negative & (strays == above), 0, strays)
    if strays.any():
        raise ImageError(
            f"the DICOM's pixels need more than the {stored} bits that it says are stored, and no "
            "overlay is declared in the others",
            since=2,
        )
