"""Apply a reviewer's labels to a manifest, and keep what changed.

A review is a table of one row per image: `sha256`, `new_label` (0 normal, 1 abnormal, empty: not
reviewed), and optionally `label`, the label that the reviewer was shown, and `chosen_by`, why the
image was reviewed; see `prediction.worklist`. Embeddings are found by hash, so none is made anew.
"""

import hashlib
import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd

from medembed.core.errors import ManifestError
from medembed.core.files import json_bytes, read_plain, writing_atomically
from medembed.core.schema import ClosedRecord, Digest, Field, parse
from medembed.core.text import Summarised, Summary, counted
from medembed.dataset.build_file import build_path, move_build
from medembed.dataset.foreign_tables import read_foreign_table
from medembed.dataset.manifest import (
    Manifest,
    check_destination,
    make_manifest,
    read_manifest,
    write_manifest,
)

__all__ = [
    "AT_RANDOM",
    "CHOSEN_BY",
    "AppliedReview",
    "Change",
    "Relabelled",
    "Relabelling",
    "count_sought",
    "relabel",
    "relabelling_path",
    "write_relabelled",
]

Label = Annotated[int, Field(ge=0, le=1)]
MAX_BYTES = 1 << 28
CHOSEN_BY = "chosen_by"
"""The covariate that tells why an image was labelled: `AT_RANDOM`, or what a worklist sought."""
AT_RANDOM = "random"
_LABELS = {"0": "0", "1": "1", "normal": "0", "abnormal": "1"}
_N_NAMED = 3


class Change(ClosedRecord):
    """One image's label before and after; null is no label."""

    sha256: Digest
    before: Label | None
    after: Label


class AppliedReview(ClosedRecord):
    """One review that was applied."""

    sha256: Digest = Field(description="Of the review's file.")
    before: Digest = Field(description="Digest of the manifest that was reviewed.")
    after: Digest = Field(description="Digest of the manifest with the review's labels.")
    changes: list[Change]


class Relabelling(ClosedRecord):
    """`MANIFEST.relabelling.json`: every change of a label since the manifest was built."""

    format: Literal["medembed-relabelling"]
    version: Literal[1]
    reviews: list[AppliedReview]


@dataclass(frozen=True, repr=False)
class Relabelled(Summarised):
    """A manifest after a review.

    Attributes
    ----------
    reviewed, manifest : Manifest
        Before and after.
    review : AppliedReview
        What changed.
    n_confirmed : int
        Reviewed images that keep their label.
    """

    reviewed: Manifest
    manifest: Manifest
    review: AppliedReview
    n_confirmed: int

    def as_dict(self) -> dict[str, int]:
        """Return the counts that `manifest relabel --json` prints."""
        before = pd.Series([own.before for own in self.review.changes], dtype=object)
        after = pd.Series([own.after for own in self.review.changes], dtype=object)
        return {
            "changed": len(after),
            "to_abnormal": int(((before == 0) & (after == 1)).sum()),
            "to_normal": int(((before == 1) & (after == 0)).sum()),
            "labelled": int(before.isna().sum()),
            "confirmed": self.n_confirmed,
        }

    def summarise(self) -> Summary:
        """Return how many labels changed, and how."""
        n = self.as_dict()
        return Summary(
            f"Relabelled: {counted(n['changed'], 'image')} changed, {n['confirmed']} confirmed",
            {
                "normal to abnormal": str(n["to_abnormal"]),
                "abnormal to normal": str(n["to_normal"]),
                "labelled for the first time": str(n["labelled"]),
            },
        )


def relabel(manifest: Manifest | str | Path, review: str | Path) -> Relabelled:
    """Return a manifest with the labels of a review.

    If the label level is "study", an image's new label holds for all images of its study. It always
    holds for every image with the same bytes.

    Parameters
    ----------
    manifest : Manifest or path
    review : path
        A table (CSV, Excel, Parquet) as described at the head of this module.

    Raises
    ------
    ManifestError
        The table cannot be read or lacks a column, a label is not 0, 1 or empty, an image is not in
        the manifest or has another label there than the reviewer was shown, or two rows contradict
        each other.
    """
    known, path = read_manifest(manifest), Path(review)
    reviewed = _read_review(path)
    rows = known.rows
    _match(rows, reviewed, path)
    unit = "study" if known.label_level == "study" else "sha256"
    first = rows.drop_duplicates("sha256").set_index("sha256", drop=False)
    reviewed["unit"] = first[unit].reindex(reviewed["sha256"]).to_numpy()
    labels = _one_each(reviewed, "new_label", unit, path).astype("Int8")
    old = rows["label"]
    new = rows[unit].map(labels).astype("Int8").fillna(old)
    changed = new.notna() & (old.isna() | (new != old).fillna(False))
    table = rows.assign(label=new.astype("string").fillna("")).astype(str)
    if CHOSEN_BY in reviewed:
        chosen = rows[unit].map(_one_each(reviewed, CHOSEN_BY, unit, path))
        table[CHOSEN_BY] = chosen.fillna(rows.get(CHOSEN_BY, "")).astype(str)
    made = make_manifest(table, known.label_level, source=str(path))
    changes = [
        Change(sha256=key, before=None if pd.isna(a) else int(a), after=int(b))
        for key, a, b in zip(rows["sha256"][changed], old[changed], new[changed], strict=True)
    ]
    return Relabelled(
        known,
        made,
        AppliedReview(
            sha256=hashlib.sha256(read_plain(path)).hexdigest(),
            before=known.digest(),
            after=made.digest(),
            changes=changes,
        ),
        n_confirmed=int(rows[unit].isin(labels.index).sum()) - len(changes),
    )


def count_sought(rows: pd.DataFrame) -> int:
    """Return the labelled studies of test that a worklist sought out, by `CHOSEN_BY`."""
    if CHOSEN_BY not in rows:
        return 0
    is_sought = (rows["split"] == "test") & rows["label"].notna()
    return int(rows["study"][is_sought & ~rows[CHOSEN_BY].isin(["", AT_RANDOM])].nunique())


def relabelling_path(manifest_path: str | Path) -> Path:
    """Return the path of the changes of a manifest's labels."""
    return Path(manifest_path).with_suffix(".relabelling.json")


def write_relabelled(relabelled: Relabelled, source: str | Path, target: str | Path) -> None:
    """Write the manifest, all changes of its labels since it was built, and its build file.

    Parameters
    ----------
    source : path
        The file of the manifest that was reviewed, beside which earlier changes are looked for.
    target : path
        The manifest to write.

    Raises
    ------
    ManifestError
        `target` is `source`, or not a manifest's name, or the earlier changes are damaged.
    """
    check_destination(target)
    if Path(target).resolve() == Path(source).resolve():
        raise ManifestError(
            f"{target} is the manifest that was reviewed. Name another file: runs of the old "
            "labels need the old manifest."
        )
    reviews = [*_read_reviews(source, relabelled.review.before), relabelled.review]
    record = Relabelling(format="medembed-relabelling", version=1, reviews=reviews)
    data = json_bytes(record.model_dump(mode="json"))
    build = move_build(source, relabelled.reviewed, relabelled.manifest)
    with ExitStack() as files:
        own = writing_atomically(relabelling_path(target), len(data))
        files.enter_context(own).write(data)
        if build is not None:
            files.enter_context(writing_atomically(build_path(target), len(build))).write(build)
        write_manifest(relabelled.manifest, target)


def _read_review(path: Path) -> pd.DataFrame:
    """Return the reviewed rows: `sha256`, `new_label` (0 or 1), and further columns as text."""
    table = read_foreign_table(path, ManifestError, as_written=["sha256"]).rows
    missing = [name for name in ("sha256", "new_label") if name not in table]
    if missing:
        columns = "columns" if len(missing) > 1 else "column"
        raise ManifestError(
            f"{path} lacks the {columns} {' and '.join(missing)}. A review has sha256 and "
            "new_label (0 normal, 1 abnormal, empty: not reviewed), as `medembed worklist` "
            "writes it."
        )
    table["sha256"] = table["sha256"].str.strip().str.lower()
    table["row"] = table.index + 2
    table = table[table["new_label"] != ""].reset_index(drop=True)
    labels = table["new_label"].str.lower().map(_LABELS)
    if labels.isna().any():
        wrong = table[labels.isna()]
        raise ManifestError(
            f"{path}: new_label must be 0 (normal), 1 (abnormal) or empty, not "
            f"{wrong['new_label'].iloc[0]!r} ({_rows(wrong)})"
        )
    if table.empty:
        raise ManifestError(f"{path} has no new_label: fill in 0 (normal) or 1 (abnormal).")
    return table.assign(new_label=labels.astype(int))


def _match(rows: pd.DataFrame, reviewed: pd.DataFrame, path: Path) -> None:
    """Refuse reviewed images that the manifest lacks, or that had another label in the review."""
    unknown = reviewed[~reviewed["sha256"].isin(rows["sha256"])]
    if len(unknown):
        raise ManifestError(
            f"{path}: {len(unknown)} of {len(reviewed)} reviewed images are not in the manifest, "
            f"such as {unknown['sha256'].iloc[0][:12]}… ({_rows(unknown)}). Apply a review to the "
            "manifest that it was made from."
        )
    if "label" not in reviewed:
        return
    now = rows.drop_duplicates("sha256").set_index("sha256")["label"].astype("string").fillna("")
    other = reviewed[now.reindex(reviewed["sha256"]).to_numpy() != reviewed["label"].to_numpy()]
    if len(other):
        raise ManifestError(
            f"{path}: {len(other)} reviewed images had another label when they were reviewed "
            f"({_rows(other)}). Apply the review to the manifest that it was made from."
        )


def _one_each(reviewed: pd.DataFrame, column: str, unit: str, path: Path) -> "pd.Series[Any]":
    """Return the value of each unit, by unit; refuse two values of one."""
    pairs = reviewed[["unit", column]].drop_duplicates()
    twice = pairs["unit"][pairs["unit"].duplicated()]
    if len(twice):
        wrong = reviewed[reviewed["unit"] == twice.iloc[0]]
        what = "views of one study" if unit == "study" else "rows of one image"
        raise ManifestError(f"{path}: {what} contradict each other in {column} ({_rows(wrong)})")
    return pairs.set_index("unit")[column]


def _rows(table: pd.DataFrame) -> str:
    shown = ", ".join(map(str, table["row"][:_N_NAMED]))
    more = len(table) - _N_NAMED
    return f"row{'s' if len(table) > 1 else ''} {shown}" + (f" and {more} more" if more > 0 else "")


def _read_reviews(manifest_path: str | Path, digest: str) -> list[AppliedReview]:
    """Return earlier reviews of a manifest; none if the file beside it belongs to another."""
    path = relabelling_path(manifest_path)
    try:
        document = json.loads(read_plain(path, max_bytes=MAX_BYTES))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(
            f"{path}, which holds earlier changes of labels, cannot be read: {error}. Restore it, "
            "or move it to give up that record."
        ) from error
    record = parse(Relabelling, document, ManifestError, str(path))
    return record.reviews if record.reviews and record.reviews[-1].after == digest else []
