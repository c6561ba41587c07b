"""What `run.json` records about data and encoder.

No absolute path and no name of a patient or file is recorded: images are named by their SHA-256.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from medembed.core.locations import BucketPath, Location
from medembed.dataset.build_file import KeptBuild
from medembed.dataset.manifest import count_rows
from medembed.dataset.relabelling import count_sought

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
) -> dict[str, Any]:
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
    dict
        JSON values: the counts of `count_rows`, ``left_out``, ``left_out_test``, ``splits``,
        ``label_level``, ``synthetic``, ``licence``; ``build`` if given; and ``sought_test``, see
        `relabelling.count_sought`, if there are any.
    """
    is_left_out = rows["image"].isin(failed["image"])
    splits = {
        str(name): {**count_rows(part), "left_out": int(is_left_out[part.index].sum())}
        for name, part in sorted(rows.groupby("split"), reverse=True)
    }
    n_sought = count_sought(rows)
    licences: list[Any] = list(rows["licence"].unique()) if "licence" in rows else []
    return {
        **count_rows(rows),
        "left_out": int(is_left_out.sum()),
        "left_out_test": splits.get("test", {}).get("left_out", 0),
        "splits": splits,
        "label_level": label_level,
        "synthetic": _is_synthetic(rows),
        "licence": str(licences[0]) if len(licences) == 1 else None,
        **({} if build is None else {"build": build.model_dump()}),
        **({"sought_test": n_sought} if n_sought else {}),
    }


def _is_synthetic(rows: pd.DataFrame) -> bool:
    """Return whether a manifest's covariate `synthetic` is 1 throughout."""
    return "synthetic" in rows and bool(rows["synthetic"].eq("1").all())


def list_left_out(rows: pd.DataFrame, failed: pd.DataFrame) -> list[dict[str, str]]:
    """Return the first left-out images by SHA-256, with split, stage and reason."""
    listed = failed.head(N_LISTED).merge(rows[["image", "split"]], on="image", how="left")
    found = listed[["sha256", "split", "stage", "reason"]].astype(str).to_dict("records")
    return [{str(name): str(value) for name, value in record.items()} for record in found]


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
    recorded: Mapping[str, Any], fingerprint: str, preprocessing: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what `run.json` records of a cache's encoder, from these entries of the cache."""
    return {
        "source": public_name(recorded.get("source") or "unknown"),
        "revision": recorded.get("revision"),
        "precision": recorded.get("precision"),
        "fingerprint": fingerprint,
        "preprocessing": dict(preprocessing),
    }
