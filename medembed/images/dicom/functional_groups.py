"""Where a DICOM image keeps its transforms: in the data set, or in its functional groups.

Enhanced objects, and legacy ones converted to them, hold window and rescale in items of their
Shared or Per-frame Functional Groups Sequence (PS3.3 C.7.6.16), as if at the top for each frame.
"""

from dataclasses import dataclass
from typing import Any

__all__ = ["FUNCTIONAL_GROUPS", "Transforms", "find_transforms"]

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
    """Find the items of the one frame: what a frame says of itself goes before what all share."""
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
