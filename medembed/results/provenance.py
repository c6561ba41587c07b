"""What `run.json` says about data and encoder, and that in words for a page.

No absolute path and no name of a patient or file goes in: images go by their SHA-256.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from medembed.core.text import counted
from medembed.dataset.build_file import KeptBuild
from medembed.dataset.manifest import count_rows
from medembed.results.run_schema import CV_METHOD
from medembed.results.runs import Run

__all__ = [
    "describe_run",
    "describe_source",
    "list_left_out",
    "public_name",
    "summarise_data",
]

DATA_COLUMNS = ("images", "studies", "patients", "abnormal", "unlabelled", "left_out")
CODE_DIGITS = 16
N_LISTED = 500
"""Left-out images listed in `run.json`; all are counted, and the cache has them all."""


def summarise_data(
    rows: pd.DataFrame,
    failed: pd.DataFrame,
    label_level: str,
    build: KeptBuild | None = None,
) -> dict[str, Any]:
    """Count a manifest's rows and those left out, overall and by split.

    Parameters
    ----------
    rows : DataFrame
        All rows of the manifest. Where a covariate `synthetic` is 1 throughout, so is the data;
        a covariate `licence` of one value is passed on.
    failed : DataFrame
        The rows left out, with column image.
    label_level : {"study", "image"}
        Of the manifest.
    build : KeptBuild, optional
        What `dataset.build_file.read_build` returns.

    Returns
    -------
    dict
        JSON values: the counts of `count_rows`, ``left_out``, ``left_out_test``, ``splits``,
        ``label_level``, ``synthetic``, ``licence``, and ``build`` where there is one.
    """
    is_left_out = rows["image"].isin(failed["image"])
    splits = {
        str(name): {**count_rows(part), "left_out": int(is_left_out[part.index].sum())}
        for name, part in sorted(rows.groupby("split"), reverse=True)
    }
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
    }


def _is_synthetic(rows: pd.DataFrame) -> bool:
    """Say whether a manifest's covariate `synthetic` is 1 throughout."""
    return "synthetic" in rows and bool(rows["synthetic"].eq("1").all())


def list_left_out(rows: pd.DataFrame, failed: pd.DataFrame) -> list[dict[str, str]]:
    """Name the first left-out images by SHA-256, with split, stage and reason."""
    listed = failed.head(N_LISTED).merge(rows[["image", "split"]], on="image", how="left")
    found = listed[["sha256", "split", "stage", "reason"]].astype(str).to_dict("records")
    return [{str(name): str(value) for name, value in record.items()} for record in found]


def public_name(reference: str | Path) -> str:
    """Return a path or hub id as it may be shown: of an absolute path only the last part."""
    text = str(reference)
    if Path(text).is_absolute() or text.startswith("~") or ".." in Path(text).parts:
        return Path(text).name
    return text


def describe_source(
    recorded: Mapping[str, Any], fingerprint: str, preprocessing: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what `run.json` keeps of the encoder behind a cache, whose three entries these are."""
    return {
        "source": public_name(recorded.get("source") or "unknown"),
        "revision": recorded.get("revision"),
        "precision": recorded.get("precision"),
        "fingerprint": fingerprint,
        "preprocessing": dict(preprocessing),
    }


def describe_run(run: Run, name: str) -> dict[str, Any]:
    """Return what the page shows about one run, as text.

    Parameters
    ----------
    run : Run
        The run.
    name : str
        How the page calls it.

    Returns
    -------
    dict
        ``name``, ``facts``, ``data``, ``winners``, ``left_out`` and ``command``.
    """
    info = run.info
    return {
        "name": name,
        "facts": [{"name": key, "value": value} for key, value in _facts(info).items() if value],
        "data": _data(info.get("data", {})),
        "winners": _winners(info.get("leaderboard", []), info.get("cv_method")),
        "left_out": _left_out(info),
        "command": info.get("command", ""),
    }


def _facts(info: Mapping[str, Any]) -> dict[str, str]:
    asked, data = info.get("asked", {}), info.get("data", {})
    encoder, times = info.get("encoder", {}), info.get("times", {})
    versions = info.get("versions", {})
    return {
        "Encoder": _text(encoder.get("source")),
        "Revision": _text(encoder.get("revision")),
        "Encoder fingerprint": _text(encoder.get("fingerprint"))[:CODE_DIGITS],
        "Input": _input(encoder.get("preprocessing", {})),
        "Precision": _text(encoder.get("precision")),
        "Pooling": _text(asked.get("pooling")),
        "Manifest digest": _text(asked.get("manifest"))[:CODE_DIGITS],
        "Labels are per": _text(data.get("label_level")),
        "Licence": _text(data.get("licence")),
        "Folds": _text(asked.get("n_folds")),
        "Configurations per head": _counts(asked.get("n_configs")),
        "Covariates": ", ".join(asked.get("covariates", [])),
        "Share of training patients": _share(asked.get("train_fraction", 1.0)),
        "Chosen by": _text(asked.get("metric")),
        "Seed": _text(info.get("seed")),
        "Started": _text(times.get("started")),
        "Ended": _text(times.get("ended")),
        "Versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }


def _counts(value: Any) -> str:
    """Write configurations per head: a number of all of them, or one of each."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(number)}" for name, number in value.items())
    return _text(value)


def _share(fraction: float) -> str:
    return "" if fraction == 1 else f"{fraction:.3g}"


def _input(preprocessing: Mapping[str, Any]) -> str:
    size = preprocessing.get("size")
    if not size:
        return ""
    details = [_text(preprocessing.get(name)) for name in ("fit", "resample")]
    return ", ".join([" × ".join(map(str, size)), *filter(None, details)])


def _data(data: Mapping[str, Any]) -> dict[str, Any]:
    parts = {**data.get("splits", {}), "all": data}
    rows = [
        {"cells": [name, *(_text(part.get(column, 0)) for column in DATA_COLUMNS)], "kind": ""}
        for name, part in parts.items()
    ]
    headings = [column.capitalize().replace("_", " ") for column in DATA_COLUMNS]
    return {"columns": ["Split", *headings], "rows": rows}


def _winners(leaderboard: list[dict[str, Any]], cv_method: Any) -> dict[str, Any]:
    rows = []
    for entry in leaderboard:
        chosen = entry.get("params") or {}
        params = ", ".join(f"{name} = {value}" for name, value in chosen.items())
        params = params or "the head's defaults"
        older = entry.get("cv_method", cv_method) != CV_METHOD
        cv = "failed" if entry.get("cv") is None else f"{entry['cv']:.3f}{'†' if older else ''}"
        tried = entry.get("n_tried")
        cv += "" if entry.get("cv") is None or tried is None else f" (best of {tried:,})"
        details = params if entry.get("cv") is not None else _text(entry.get("error"))
        seconds = entry.get("seconds")
        cells = [entry["head"], details, cv, "" if seconds is None else f"{seconds:.1f}"]
        rows.append({"cells": cells, "kind": ""})
    return {"columns": ["Head", "Parameters", "Cross-validated", "Seconds"], "rows": rows}


def _left_out(info: Mapping[str, Any]) -> dict[str, Any]:
    images = info.get("left_out", [])
    data = info.get("data", {})
    rows = [
        {
            "cells": [
                _text(image.get("sha256"))[:CODE_DIGITS],
                *(_text(image.get(name)) for name in ("split", "stage", "reason")),
            ],
            "kind": "",
        }
        for image in images
    ]
    n, n_test = max(data.get("left_out", 0), len(images)), data.get("left_out_test", 0)
    sentence = (
        f"{counted(n, 'image')} could not be embedded, {n_test:,} of them in test. They were "
        "neither trained on nor scored. Images go by the first digits of their SHA-256."
    )
    if not n:
        sentence = "No image was left out."
    elif n > len(images):
        listed = (
            f"The first {len(images):,} are shown." if images else "Which ones is not recorded."
        )
        sentence += f" {listed}"
    columns = ["Image (SHA-256)", "Split", "Stage", "Reason"]
    return {"columns": columns, "rows": rows, "sentence": sentence}


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
