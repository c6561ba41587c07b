"""What the files of a run look like, for whoever reads one that was damaged or edited.

`describe_failure` is a ledger's entry for a trial that failed; `is_final` tells whether the trial
would fail again.
"""

import json
import os
from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from medembed.core.errors import RunError
from medembed.core.schema import (
    AnyTable,
    Count,
    Field,
    Given,
    Record,
    Texts,
    Whole,
    parse,
)
from medembed.core.text import Summary, counted
from medembed.dataset.build_file import KeptBuild

__all__ = [
    "CV_METHOD",
    "PREDICTION_COLUMNS",
    "RUN_FORMAT",
    "RUN_VERSION",
    "TRIAL_COLUMNS",
    "Asked",
    "Data",
    "Encoder",
    "LeaderboardEntry",
    "Preprocessing",
    "RunInfo",
    "ScoresInfo",
    "TrialRecord",
    "check_info",
    "check_predictions",
    "check_scores",
    "check_trial",
    "describe_failure",
    "find_difference",
    "is_final",
    "summarise_info",
]

RUN_FORMAT: Literal["medembed-run"] = "medembed-run"
RUN_VERSION: Literal[1] = 1
_MAX_CHARACTERS = 500
_FINAL = "TrainingDataError"


def describe_failure(error: Exception) -> str:
    """Return the error's type and message, at most 500 characters."""
    return f"{type(error).__name__}: {error}"[:_MAX_CHARACTERS]


def is_final(failure: object) -> bool:
    """Whether a failure as `describe_failure` has it would come again.

    What data or parameters do not allow would fail again; a full memory might not.
    """
    return str(failure).startswith(_FINAL)


CV_METHOD = "inner-split"
"""How cross-validated scores are made: what decides when to stop and what to choose are patients of
the folds that are learnt from. Runs of before say nothing: the scored fold decided."""

TRIAL_COLUMNS = [
    *("trial", "head", "pooling", "params", "fold", "score"),
    *("best_epoch", "seconds", "status", "error", "key"),
]
PREDICTION_COLUMNS = {
    "sha256": pa.string(),
    "patient": pa.int64(),
    "study": pa.int64(),
    "region": pa.string(),
    "label": pa.int8(),
    "split": pa.string(),
    "fold": pa.int16(),
    "head": pa.string(),
    "trial": pa.int32(),
    "probability": pa.float64(),
}
"""Columns of `predictions.parquet`; label, fold and trial may be null, study-level heads leave
sha256 empty, probability lies in [0, 1]."""


class Asked(Record):
    """The question that a run answers, as far as others read it."""

    train_fraction: Given[float] = Field(None, gt=0, le=1)
    """Share of the training patients; all where there is none."""
    covariates: Texts = ()
    metric: Given[str] = None


class Data(Record):
    """What a run counts of its manifest and of the images that were left out."""

    images: Given[Count] = None
    studies: Given[Count] = None
    patients: Given[Count] = None
    abnormal: Given[Count] = None
    unlabelled: Given[Count] = None
    left_out: Given[Count] = None
    left_out_test: Given[Count] = None
    splits: Given[dict[str, AnyTable]] = None
    build: KeptBuild | None = None
    """What the manifest's build found, where it was at hand."""


class Preprocessing(Record):
    """How files became an encoder's input."""

    size: Given[list[Whole]] = None


class Encoder(Record):
    """The encoder behind a run's embeddings."""

    source: str | None = None
    revision: str | None = None
    preprocessing: Given[Preprocessing] = None


class LeaderboardEntry(Record):
    """The winner of a head, or why there is none."""

    head: str
    params: AnyTable | None = None
    cv: float | None = None
    seconds: float | None = None
    trial: Whole | None = None
    depth: Whole | None = None
    seed: Whole | None = None
    n_tried: Count | None = None
    cv_method: str | None = None


class RunInfo(Record):
    """`run.json`: what is read of it; keys that only older or later runs have may be absent."""

    format: Literal["medembed-run"] = RUN_FORMAT
    version: Literal[1] = RUN_VERSION
    kind: str
    asked: Asked
    times: AnyTable
    command: Given[str] = None
    seed: Whole | None = None
    cv_method: str | None = None
    versions: Given[AnyTable] = None
    data: Given[Data] = None
    encoder: Given[Encoder] = None
    leaderboard: Given[list[LeaderboardEntry]] = None
    left_out: Given[list[AnyTable]] = None
    decisions: Given[dict[str, AnyTable]] = None


class ScoresInfo(Record):
    """`scores.json`: a comparison of the run with itself, which older runs have less of.

    Of an evaluation elsewhere also how it differs from the model's own test.
    """

    level: Given[Literal["study", "image"]] = None
    n_resamples: Given[Count] = None
    seed: Given[Whole] = None
    test: Given[AnyTable] = None
    runs: Given[list[AnyTable]] = None
    rows: Given[list[AnyTable]] = None
    """A table for each head, as `medembed compare --json` has it, without `seconds`."""
    notes: Given[list[str]] = None
    called_abnormal: AnyTable | None = None
    drop: AnyTable | None = None
    calibration: AnyTable | None = None
    recalibrated: AnyTable | None = None
    drift: AnyTable | None = None
    predictions_sha256: str | None = None
    """Of the `predictions.parquet` that an evaluation scored."""


class TrialRecord(Record):
    """A line of `trials.jsonl`: how a trial ended on a fold."""

    trial: Whole
    head: str
    pooling: str
    params: AnyTable
    fold: Whole
    score: float | None
    best_epoch: Whole | None
    seconds: float
    status: str
    error: str | None
    key: str
    depth: Whole | None = None
    """From here on of fine-tuning alone."""
    lora: Whole | None = None
    seed: Whole | None = None
    trainable: Whole | None = None
    encoder: str | None = None
    history: tuple[AnyTable, ...] = Field(default=(), strict=False)


def check_info(info: object, run: str | os.PathLike[str]) -> RunInfo:
    """Return what a `run.json` says, typed.

    Raises
    ------
    RunError
        An entry that a comparison or a page reads is not what a run writes there.
    """
    way_out = "It was damaged or edited. Restore it, or sweep again into another --out."
    return parse(RunInfo, info, RunError, f"run.json of {os.fspath(run)}", way_out)


def check_scores(scores: object, path: str | os.PathLike[str]) -> None:
    """Check what a `scores.json` says.

    Raises
    ------
    RunError
        An entry is not what a run writes there.
    """
    parse(ScoresInfo, scores, RunError, path, "Delete the run and sweep or evaluate again.")


def check_trial(record: object, where: str) -> TrialRecord:
    """Return what a line of a ledger says, typed.

    Raises
    ------
    RunError
        It is none.
    """
    way_out = "Delete that line and run the sweep again: only that trial is repeated."
    return parse(TrialRecord, record, RunError, where, way_out)


def check_predictions(table: pa.Table) -> None:
    """Raise ValueError for a value that no run writes."""
    probability, label, fold = (table[name] for name in ("probability", "label", "fold"))
    is_right = {
        "sha256": pc.match_substring_regex(table["sha256"], "^([0-9a-f]{64})?$"),
        "split": pc.is_in(table["split"], pa.array(["train", "test"])),
        "label": pc.is_in(label, pa.array([0, 1, None], pa.int8())),
        "fold": pc.fill_null(pc.greater_equal(fold, 0), True),
        "probability": pc.and_(pc.greater_equal(probability, 0), pc.less_equal(probability, 1)),
        **{name: pc.is_valid(table[name]) for name in ("patient", "study", "region", "head")},
    }
    for name, flags in is_right.items():
        n_wrong = len(table) - (pc.sum(flags).as_py() or 0)
        if n_wrong:
            raise ValueError(f"{n_wrong} of {len(table)} rows have a {name} that no run writes")


def find_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return the first thing that two questions ask otherwise, as part of a sentence, or None."""
    found = _first_difference(before, now)
    if found is None:
        return None
    name, there, here = found
    return f"{name} was {_short(there)} there and is {_short(here)} here"


def _first_difference(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> tuple[str, Any, Any] | None:
    for name in [*now, *(name for name in before if name not in now)]:
        a, b = before.get(name), now.get(name)
        if a == b and (name in before) == (name in now):
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            return _first_difference(a, b, f"{prefix}{name}.")
        return f"{prefix}{name}", a, b
    return None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:12]}…{text[-5:]}"


def summarise_info(name: str, info: Mapping[str, Any], is_complete: bool) -> Summary:
    """Return what kind of run a `run.json` is of, its heads with their scores, and its data."""
    data, metric = info.get("data", {}), info["asked"].get("metric", "score")
    heads = [
        own["head"] if own.get("cv") is None else f"{own['head']} {own['cv']:.3f}"
        for own in info.get("leaderboard", [])
    ]
    counts = [
        counted(data[f"{noun}s"], noun) for noun in ("image", "patient") if f"{noun}s" in data
    ]
    if data.get("synthetic"):
        counts.append("synthetic")
    return Summary(
        f"Run {name}: {info['kind']}, {'complete' if is_complete else 'unfinished'}",
        {
            f"heads, cv {metric}": ", ".join(heads) or "none yet",
            "data": ", ".join(counts) or "not known",
            "encoder": info.get("encoder", {}).get("source") or "not known",
        },
    )
