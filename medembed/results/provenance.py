"""What `run.json` records about data and encoder.

No absolute path and no name of a patient or file is recorded: images are named by their SHA-256.
"""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from medembed.core.errors import RunError
from medembed.core.locations import BucketPath, Location
from medembed.core.schema import parse
from medembed.dataset.build_file import KeptBuild
from medembed.dataset.manifest import count_rows
from medembed.dataset.relabelling import count_sought
from medembed.results.run_schema import Data, LeftOutImage, RowCounts, RunEncoder

__all__ = [
    "describe_source",
    "list_left_out",
    "public_name",
    "summarise_data",
]

N_LISTED = 500
"""Left-out images listed in `run.json`; all are counted, and the cache has them all."""


def summarise_data(
    rows: pd.DataFrame,
    failed: pd.DataFrame,
    label_level: str,
    build: KeptBuild | None = None,
) -> Data:
    """Return counts of a manifest's rows and of those left out, overall and by split.

    Parameters
    ----------
    rows : DataFrame
        All rows of the manifest. The data counts as synthetic if a covariate `synthetic` is 1
        throughout; a covariate `licence` with a single value is recorded.
    failed : DataFrame
        The rows left out, with column image.
    label_level : {"study", "image"}
        The manifest's label level.
    build : KeptBuild, optional
        The manifest's build, from `dataset.build_file.read_build`.

    Returns
    -------
    Data
        `build` is set if given, and `sought_test` if there are any: see `relabelling.count_sought`.
    """
    is_left_out = rows["image"].isin(failed["image"])
    splits = {
        str(name): RowCounts(**count_rows(part), left_out=int(is_left_out[part.index].sum()))
        for name, part in sorted(rows.groupby("split"), reverse=True)
    }
    n_sought = count_sought(rows)
    licences: list[object] = list(rows["licence"].unique()) if "licence" in rows else []
    found = {
        **count_rows(rows),
        "left_out": int(is_left_out.sum()),
        "left_out_test": splits["test"].left_out if "test" in splits else 0,
        "splits": splits,
        "label_level": label_level,
        "synthetic": _is_synthetic(rows),
        "licence": str(licences[0]) if len(licences) == 1 else None,
        **({} if build is None else {"build": build}),
        **({"sought_test": n_sought} if n_sought else {}),
    }
    return Data.model_validate(found)


def _is_synthetic(rows: pd.DataFrame) -> bool:
    """Return whether a manifest's covariate `synthetic` is 1 throughout."""
    return "synthetic" in rows and bool(rows["synthetic"].eq("1").all())


def list_left_out(rows: pd.DataFrame, failed: pd.DataFrame) -> list[LeftOutImage]:
    """Return the first left-out images by SHA-256, with split, stage and reason."""
    listed = failed.head(N_LISTED).merge(rows[["image", "split"]], on="image", how="left")
    found = listed[["sha256", "split", "stage", "reason"]].astype(str)
    return [LeftOutImage.model_validate(record) for record in found.to_dict("records")]


def public_name(reference: str | Location) -> str:
    """Return a path or hub id that may be published: only the last part of an absolute path.

    Of a bucket's prefix too: a bucket's name may be that of a hospital.
    """
    text = str(reference)
    if isinstance(reference, BucketPath) or "://" in text:
        return Path(text).name
    if Path(text).is_absolute() or text.startswith("~") or ".." in Path(text).parts:
        return Path(text).name
    return text


def describe_source(
    recorded: Mapping[str, object], fingerprint: str, preprocessing: Mapping[str, object]
) -> RunEncoder:
    """Return what `run.json` records of a cache's encoder, from these entries of the cache.

    Raises
    ------
    RunError
        The cache holds what no extraction writes.
    """
    found = {
        "source": public_name(str(recorded.get("source") or "unknown")),
        "revision": recorded.get("revision"),
        "precision": recorded.get("precision"),
        "fingerprint": fingerprint,
        "preprocessing": dict(preprocessing),
    }
    return parse(RunEncoder, found, RunError, "the cache's encoder", "Extract into another cache.")
