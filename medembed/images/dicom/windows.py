"""Choose and apply a DICOM's VOI LUT or window (PS3.3 C.11.2).

Enhanced objects, and legacy ones converted to them, hold window and rescale in items of their
Shared or Per-frame Functional Groups Sequence (PS3.3 C.7.6.16) instead of the top level.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from medembed.core.errors import ImageError

__all__ = [
    "DEPTH_IN_USE",
    "FIRST_WINDOW",
    "FUNCTIONAL_GROUPS",
    "NO_WINDOW",
    "Transforms",
    "apply_voi",
    "find_transforms",
    "look_up",
]

DEPTH_IN_USE = 1 / 16  # of the declared range; below, the depth is not what Bits Stored says


def look_up(values: np.ndarray, item: Any, name: str) -> tuple[np.ndarray, float]:
    """Return values looked up in a table (C.11.1.1, C.11.2.1.1), and its bits' greatest output.

    Values below the first mapped one get the first entry, values above the last one the last.
    """
    descriptor = _words(item, "LUTDescriptor")
    if len(descriptor) != 3:
        raise ImageError(f"the DICOM's {name} has no descriptor of three values")
    n_entries, bits = int(descriptor[0]) % 65536 or 65536, int(descriptor[2])
    if not 8 <= bits <= 16:
        raise ImageError(f"the DICOM's {name} has {bits} bits per entry; 8 to 16 are defined")
    first = int(descriptor[1])
    if first > 32767 and values.min() < 0:  # written as US though the input is signed
        first -= 65536
    entries = _entries(item, n_entries, bits, name)
    top = float((1 << bits) - 1)
    if entries.max() > top or entries.max() < DEPTH_IN_USE * top:
        raise ImageError(
            f"the DICOM's {name} reaches {entries.max()}, which does not fit its {bits} bits"
        )
    index = np.clip(np.rint(values) - first, 0, n_entries - 1).astype(np.int64)
    return entries[index].astype(np.float64), top


def _entries(item: Any, n_entries: int, bits: int, name: str) -> np.ndarray:
    """Read LUT Data: words, or for 8 bits also bytes, two in a word."""
    words = _words(item, "LUTData")
    if len(words) == n_entries:
        return words
    if bits == 8 and len(words) == (n_entries + 1) // 2:
        return words.astype("<u2").view(np.uint8)[:n_entries].astype(np.int64)
    raise ImageError(f"the DICOM's {name} has {len(words)} entries, not {n_entries}")


def _words(item: Any, keyword: str) -> np.ndarray:
    """Read an element of VR US, SS or OW as int64; OW is little endian once read by pydicom."""
    value = item.get(keyword)
    if isinstance(value, bytes):
        kind = "<u2" if getattr(item, "original_encoding", (None, True))[1] is not False else ">u2"
        return np.frombuffer(value[: len(value) // 2 * 2], kind).astype(np.int64)
    return np.atleast_1d(np.asarray(() if value is None else value, dtype=np.int64))


FUNCTIONAL_GROUPS = ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence")
_RESCALE = ("RescaleSlope", "RescaleIntercept")


@dataclass(frozen=True)
class Transforms:
    """The data sets that hold the modality and the VOI transform of the one frame.

    Attributes
    ----------
    modality, voi : pydicom.Dataset
    are_nested : bool
        Whether one of them is in a functional group and changes values.
    """

    modality: Any
    voi: Any
    are_nested: bool


def find_transforms(dataset: Any) -> Transforms:
    """Return the one frame's transforms: per-frame items take precedence over shared ones."""
    modality = _item(dataset, "PixelValueTransformationSequence", _RESCALE)
    voi = _item(dataset, "FrameVOILUTSequence", ("WindowCenter", "WindowWidth", "VOILUTSequence"))
    rescale = [None if modality is None else modality.get(name) for name in _RESCALE]
    return Transforms(
        dataset if modality is None else modality,
        dataset if voi is None else voi,
        voi is not None or rescale not in ([None, None], [1, 0]),
    )


def _item(dataset: Any, macro: str, holds: tuple[str, ...]) -> Any:
    for group in FUNCTIONAL_GROUPS:
        for groups in list(dataset.get(group) or ())[:1]:
            for item in list(groups.get(macro) or ())[:1]:
                if any(name in item for name in holds):
                    return item
    return None


FIRST_WINDOW = "first"
NO_WINDOW = "none"
BESIDE = "wholly beside the image's values"


@dataclass(frozen=True)
class _Window:
    """One window; a value that is not a number is NaN."""

    center: float
    width: float
    name: str
    fault: str


def apply_voi(
    values: np.ndarray, seen: np.ndarray, item: Any, wanted: str
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Apply the requested VOI LUT or window.

    An invalid window counts as absent and the next one is used. A window is invalid if its center
    or width is missing or not a finite number, its width is below its function's minimum
    (C.11.2.1.2.1: 1 for LINEAR, above 0 for LINEAR_EXACT and SIGMOID), or it lies entirely outside
    the image's values, so that all pixels would be black or all white.

    Parameters
    ----------
    values : float64 (n,)
        Output of the modality transform.
    seen : bool (n,)
        Which of the values occur in the image.
    item : pydicom.Dataset
        The data set, or the item of Frame VOI LUT Sequence.
    wanted : str
        `Intensity.window`.

    Returns
    -------
    shares : float64 (n,) or None
        0 black to 1 white; None where there is nothing to apply.
    notes : tuple of str
        Why windows were skipped.

    Raises
    ------
    ImageError
        A table or the function contradicts itself; or no window has the requested name, or the
        window with that name is invalid.
    """
    wanted = wanted.strip().casefold()
    if wanted == NO_WINDOW:
        return None, ()
    function = str(item.get("VOILUTFunction") or "LINEAR").strip().upper()
    tables = list(item.get("VOILUTSequence") or ())
    windows = _read_windows(item, function)
    candidates: list[Any] = [*tables, *windows]
    if wanted != FIRST_WINDOW and candidates:
        candidates = [_find(wanted, tables, windows)]
    notes: list[str] = []
    for candidate in candidates:
        fault, shares = _apply(values, candidate, function)
        if shares is not None and _is_beside(values[seen], shares[seen]):
            fault = BESIDE
        if not fault:
            return shares, tuple(notes)
        if wanted != FIRST_WINDOW:
            raise ImageError(f"the DICOM's window named {wanted!r} is none: it is {fault}")
        notes.append(f"a window {fault} counts as none")
    return None, tuple(dict.fromkeys(notes))


def _apply(values: np.ndarray, candidate: Any, function: str) -> tuple[str, np.ndarray | None]:
    if not isinstance(candidate, _Window):
        output, top = look_up(values, candidate, "VOI LUT")
        return "", output / top
    if candidate.fault:
        return candidate.fault, None
    return "", _window(values, candidate.center, candidate.width, function)


def _is_beside(values: np.ndarray, shares: np.ndarray) -> bool:
    greys = np.rint(255 * shares)
    ends = (greys == 0).all() or (greys == 255).all()
    return bool(ends and np.ptp(values) > 0)


def _read_windows(item: Any, function: str) -> list[_Window]:
    centers, widths = _numbers(item, "WindowCenter"), _numbers(item, "WindowWidth")
    names = _several(item, "WindowCenterWidthExplanation")
    windows = []
    for place in range(max(len(centers), len(widths))):
        center = centers[place] if place < len(centers) else None
        width = widths[place] if place < len(widths) else None
        name = str(names[place] or "").strip().casefold() if place < len(names) else ""
        fault = _fault(center, width, function)
        windows.append(_Window(center or 0.0, width or 0.0, name, fault))
    return windows


def _fault(center: float | None, width: float | None, function: str) -> str:
    if center is None or width is None:
        return "without its center or its width"
    if not (math.isfinite(center) and math.isfinite(width)):
        return "of something else than finite numbers"
    if width < 1 if function == "LINEAR" else width <= 0:
        return "narrower than any can be"
    return ""


def _find(wanted: str, tables: list[Any], windows: list[_Window]) -> Any:
    names = [str(table.get("LUTExplanation") or "").strip().casefold() for table in tables]
    names += [window.name for window in windows]
    if wanted not in names:
        raise ImageError(
            f"none of the DICOM's {len(names)} VOI LUTs and windows is named {wanted!r}"
        )
    return [*tables, *windows][names.index(wanted)]


def _window(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """Apply a window (C.11.2.1.2.1, C.11.2.1.3) with y from 0 to 1."""
    if function == "SIGMOID":
        with np.errstate(over="ignore"):  # exp of what lies far below the window: 1 / inf is 0
            sigmoid: np.ndarray = 1 / (1 + np.exp(-4 * (values - center) / width))
        return sigmoid
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
        if width == 0:
            return (values > center).astype(np.float64)
    elif function != "LINEAR_EXACT":
        raise ImageError("the DICOM's VOI LUT function is none of LINEAR, LINEAR_EXACT, SIGMOID")
    ramp: np.ndarray = np.clip((values - center) / width + 0.5, 0, 1)
    return ramp


def _numbers(item: Any, keyword: str) -> list[float | None]:
    """Return decimal strings as numbers: None if empty, NaN if not a number."""
    try:
        return [_number(value) for value in _several(item, keyword)]
    except ValueError:  # pydicom's, of the whole element; its text quotes the value
        return [math.nan]


def _number(value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _several(item: Any, keyword: str) -> list[Any]:
    value = item.get(keyword)
    if value is None or value == "":
        return []
    return list(value) if not isinstance(value, str) and hasattr(value, "__iter__") else [value]
