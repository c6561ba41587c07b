"""Two DICOM images of one exposure: what a detector gave, and what a reader is shown.

A detector's raw values (FOR PROCESSING) are often stored beside the finished film (FOR
PRESENTATION; PS3.3 C.8.11.1.1.1), in the same study. They are one view, not two.
"""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from medembed.dataset.recipes.listing import count_of, first_names
from medembed.images.dicom.terms import text

__all__ = ["TAGS", "Rendering", "describe_double", "find_doubles", "read_rendering"]

TAGS = (
    "PresentationIntentType IrradiationEventUID SourceImageSequence AcquisitionDateTime "
    "AcquisitionDate AcquisitionTime"
)
INTENTS = {"presentation": "FOR PRESENTATION", "processing": "FOR PROCESSING"}
OTHER = {"presentation": "processing", "processing": "presentation"}


@dataclass(frozen=True)
class Rendering:
    """What tells an image's exposure; nothing of it is written.

    Parameters
    ----------
    intent : str
        FOR PRESENTATION, FOR PROCESSING, or another text.
    instance : str
        SOPInstanceUID.
    events, sources : frozenset of str
        UIDs of its irradiation events, and of the images that it was made of.
    taken : str
        Date and time of the acquisition to the second.
    """

    intent: str
    instance: str
    events: frozenset[str]
    sources: frozenset[str]
    taken: str


def read_rendering(dataset: Any) -> Rendering:
    """Read what tells an image's exposure."""
    taken = text(dataset, "AcquisitionDateTime")
    date, time = text(dataset, "AcquisitionDate"), text(dataset, "AcquisitionTime")
    sources = dataset.get("SourceImageSequence") or ()
    return Rendering(
        intent=text(dataset, "PresentationIntentType").upper(),
        instance=text(dataset, "SOPInstanceUID"),
        events=_several(dataset.get("IrradiationEventUID")),
        sources=frozenset(text(item, "ReferencedSOPInstanceUID") for item in sources) - {""},
        taken=(taken or (date + time if date and time else ""))[:14],
    )


def find_doubles(rows: pd.DataFrame, wanted: str) -> tuple["pd.Series[bool]", list[str]]:
    """Find the images that show an exposure again, of which the wanted rendering is there.

    Parameters
    ----------
    rows : pandas.DataFrame
        Columns `image`, `exam` (the DICOM study), `region`, `laterality`, `view`, `rendering`.
    wanted : {"presentation", "processing", "both"}

    Returns
    -------
    pandas.Series of bool
        Which images to leave out.
    list of str
        A notice of the images that have the other intent alone.
    """
    if wanted not in OTHER:
        return pd.Series(data=False, index=rows.index), []
    doubles: list[Any] = []
    intents = rows["rendering"].map(lambda rendering: rendering.intent)
    is_other = intents == INTENTS[OTHER[wanted]]
    for _, part in rows[is_other | (intents == INTENTS[wanted])].groupby("exam", sort=False):
        shown = list(part[~is_other[part.index]].itertuples())
        again = part[is_other[part.index]].itertuples()
        doubles += [row.Index for row in again if any(_is_same(row, other) for other in shown)]
    is_double = pd.Series(rows.index.isin(doubles), index=rows.index)
    lone = rows["image"][is_other & ~is_double].tolist()
    if not lone:
        return is_double, []
    return is_double, [
        f"{count_of(len(lone), 'image')} {INTENTS[OTHER[wanted]]} kept, as there is none "
        f"{INTENTS[wanted]} of the same exposure: {first_names(lone)}"
    ]


def describe_double(wanted: str) -> str:
    """Say why an image is left out by `find_doubles`."""
    if wanted not in OTHER:
        return ""
    return f"{INTENTS[OTHER[wanted]]} beside {INTENTS[wanted]} of the same exposure"


def _is_same(one: Any, other: Any) -> bool:
    """Tell whether two images of one study, as rows, show one exposure."""
    a, b = one.rendering, other.rendering
    if a.events and b.events:
        return bool(a.events & b.events)
    if a.instance in b.sources or b.instance in a.sources:
        return True
    if a.taken and b.taken:
        return bool(a.taken == b.taken)
    pairs = ((getattr(one, name), getattr(other, name)) for name in ("laterality", "view"))
    return one.region == other.region and all(x == y or not x or not y for x, y in pairs)


def _several(value: Any) -> frozenset[str]:
    values = [value] if value is None or isinstance(value, str) else value
    return frozenset(str(item).strip(" \0") for item in values if item) - {""}
