"""Counts of a manifest by split, region and class, and what later steps would lack."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from medembed.dataset.checks import SPLITS
from medembed.dataset.recipes.listing import count_of

__all__ = ["SplitCount", "count_splits", "describe_splits", "find_gaps", "find_small_parts"]

EVERY = ""  # in place of a region: all of them
CLASSES = {0: "normal", 1: "abnormal"}
ENOUGH_PATIENTS = 20  # of test; with fewer an interval says nothing, or is not given
ENOUGH_OF_CLASS = 10  # patients of test
COUNTED = ("images", "studies", "patients")
MAX_REGIONS = 12  # lines of a split in the table for the terminal
WIDTH = 80


@dataclass(frozen=True)
class SplitCount:
    """The counts of one split, region and label.

    Parameters
    ----------
    split, region : str
    label : int or None
        0 normal, 1 abnormal, None unknown.
    images, studies, patients : int
    """

    split: str
    region: str
    label: int | None
    images: int = 0
    studies: int = 0
    patients: int = 0


NOTHING = SplitCount("", "", None)


def count_splits(rows: pd.DataFrame) -> list[SplitCount]:
    """Return counts of a manifest's rows by split, region and label.

    If any row is labelled, both classes of each split and region are listed, including zeros.

    Parameters
    ----------
    rows : pandas.DataFrame
        `Manifest.rows`.

    Returns
    -------
    list of SplitCount
        In the order train, test; regions by name; normal, abnormal, unknown.
    """
    found = _count(rows, ["split", "region", "label"])
    classes: tuple[int | None, ...] = (*CLASSES, None) if rows["label"].notna().any() else (None,)
    return [
        found.get((split, region, label)) or SplitCount(split, region, label)
        for split in SPLITS
        for region in sorted(rows["region"].unique())
        for label in classes
        if label is not None or (split, region, label) in found
    ]


def find_gaps(rows: pd.DataFrame, *, is_labelled: bool) -> list[str]:
    """Return a sentence for each split without patients or a class, and what that prevents.

    Parameters
    ----------
    rows : pandas.DataFrame
        `Manifest.rows`.
    is_labelled : bool
        Whether the data set is meant to have labels.
    """
    gaps = []
    lost = {"train": "nothing can be trained on it", "test": "nothing can be scored on it"}
    for split in SPLITS:
        part = rows[rows["split"] == split]
        if part.empty:
            others = count_of(rows["patient"].nunique(), "patient")
            gaps.append(
                f"{split} has no patients, so {lost[split]}; the data set has {others}, and each "
                "patient is in a single split"
            )
            continue
        labels = part["label"].dropna()
        if is_labelled and labels.empty:
            gaps.append(f"{split} has no labelled images, so {lost[split]}")
        elif is_labelled and labels.nunique() < len(CLASSES):
            lacking = CLASSES[1 - int(labels.iloc[0])]
            gaps.append(
                f"{split} has no {lacking} images among {len(labels)} labelled ones, so "
                f"{lost[split]}: that requires both classes"
            )
    return gaps


def find_small_parts(rows: pd.DataFrame, *, is_labelled: bool) -> list[str]:
    """Return a sentence if test is too small for intervals and comparisons; see `find_gaps`."""
    test = rows[(rows["split"] == "test") & rows["label"].notna()]
    if not is_labelled or test["label"].nunique() < len(CLASSES):
        return []  # a gap, which `find_gaps` reports
    n_patients = test["patient"].nunique()
    of_class = [test["patient"][test["label"] == label].nunique() for label in CLASSES]
    if n_patients >= ENOUGH_PATIENTS and min(of_class) >= ENOUGH_OF_CLASS:
        return []
    return [
        f"test is small: {count_of(n_patients, 'patient')}, {of_class[0]} with normal images and "
        f"{of_class[1]} with abnormal ones. Below {ENOUGH_PATIENTS}, or {ENOUGH_OF_CLASS} of a "
        "class, intervals will be wide or missing, and heads cannot be told apart"
    ]


def describe_splits(rows: pd.DataFrame, width: int = WIDTH) -> list[str]:
    """Return lines of at most `width` columns with the counts of each split and region.

    Regions beyond the 12 largest are only counted; `count_splits` has all.
    """
    is_labelled = rows["label"].notna().any()
    classes: tuple[int | None, ...] = tuple(CLASSES) if is_labelled else (None,)
    regions = rows["region"].value_counts().index.tolist()
    shown = sorted(regions[:MAX_REGIONS])
    shown = [EVERY, *shown] if len(regions) > 1 else shown
    by = ["split", "region", "label"]
    counts = {**_count(rows, by), **_count(rows.assign(region=EVERY), by)}
    lines = [(("split", "region"), [name for _ in classes for name in COUNTED])]
    for split in SPLITS:
        for region in shown:
            found = [counts.get((split, region, label), NOTHING) for label in classes]
            cells = [f"{getattr(count, name):,}" for count in found for name in COUNTED]
            first = split if region == shown[0] else ""
            lines.append(((first, region or "all"), cells))
    text = _align(lines, width)
    if is_labelled:
        text.insert(0, _head(text[0], text[0].index("images")))
    if len(regions) > MAX_REGIONS:
        text.append(f"… and {len(regions) - MAX_REGIONS} more regions")
    return text + list(_unlabelled(counts) if is_labelled else ())


def _count(rows: pd.DataFrame, by: Sequence[str]) -> dict[tuple[str, str, int | None], SplitCount]:
    """Return counts of rows by the columns `by`: split, region and label, or some of them."""
    groups = rows.groupby(list(by), sort=False, dropna=False, observed=True)
    table = groups.agg(images=("image", "size"), studies=("study", "nunique"),
                       patients=("patient", "nunique"))  # fmt: skip
    found = {}
    for (split, region, label), counted in zip(table.index, table.to_numpy().tolist(), strict=True):
        known = None if pd.isna(label) else int(label)
        found[str(split), str(region), known] = SplitCount(str(split), str(region), known, *counted)
    return found


def _align(lines: Sequence[tuple[tuple[str, str], list[str]]], width: int) -> list[str]:
    """Return aligned lines: numbers to the right, regions cut to the room that is left."""
    widths = [max(map(len, column)) for column in zip(*(cells for _, cells in lines), strict=True)]
    room = max(width - sum(widths) - len(widths) - len(COUNTED) - len(SPLITS[0]), 8)
    longest = min(room, max(len(names[1]) for names, _ in lines))
    return [
        f"{split:<5} {_cut(region, longest):<{longest}} "
        + "  ".join(
            " ".join(f"{cell:>{n}}" for cell, n in zip(cells[i : i + 3], widths[i:], strict=False))
            for i in range(0, len(cells), len(COUNTED))
        )
        for (split, region), cells in lines
    ]


def _head(line: str, start: int) -> str:
    """Return a line with the names of the classes above the first of their columns."""
    second = line.index("images", start + 1)
    return f"{'':<{start}}{CLASSES[0]:<{second - start}}{CLASSES[1]}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _unlabelled(counts: dict[tuple[str, str, int | None], SplitCount]) -> Iterator[str]:
    for split in SPLITS:
        found = counts.get((split, EVERY, None))
        if found:
            images, patients = count_of(found.images, "image"), count_of(found.patients, "patient")
            yield f"{split}: also {images} without a label, of {patients}"
