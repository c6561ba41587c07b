"""The schema of a run's files, which refuses files that were damaged or edited.

`describe_failure` makes the ledger's entry for a trial that failed; `is_final` decides whether the
trial would fail again.
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
    "LayerPoint",
    "LayerSeries",
    "LayerTest",
    "LeaderboardEntry",
    "Preprocessing",
    "RunInfo",
    "ScoresInfo",
    "TrialRecord",
    "WithoutSuspects",
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
    """Return whether a failure described by `describe_failure` would recur.

    Errors in data or parameters recur; running out of memory may not.
    """
    return str(failure).startswith(_FINAL)


CV_METHOD = "inner-split"
"""How cross-validated scores are made: patients of the training folds decide when to stop and what
to choose. Older runs lack this entry: the scored fold decided there."""

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
"""Columns of `predictions.parquet`; label, fold and trial may be null, sha256 is empty for heads
that predict studies, and probability lies in [0, 1]."""


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
    sought_test: Given[Count] = None
    """Labelled test studies that a worklist sought out, if there are any."""
    build: KeptBuild | None = None
    """What the manifest's build found, if it was available."""


class Preprocessing(Record):
    """How files became an encoder's input."""

    size: Given[list[Whole]] = None


class Encoder(Record):
    """The encoder behind a run's embeddings."""

    source: str | None = None
    revision: str | None = None
    preprocessing: Given[Preprocessing] = None


class LeaderboardEntry(Record):
    """The winner of a head, or why the head has none."""

    head: str
    params: AnyTable | None = None
    cv: float | None = None
    seconds: float | None = None
    trial: Whole | None = None
    depth: Whole | None = None
    seed: Whole | None = None
    n_tried: Count | None = None
    cv_method: str | None = None


class LayerTest(Record):
    """How a layer's AUROC differs from that of the last."""

    difference: float | None
    low: float | None
    high: float | None
    p_holm: float | None


class LayerPoint(Record):
    """A layer's AUROC, out-of-fold."""

    pooling: str
    block: Whole | None
    auroc: AnyTable
    versus_last: LayerTest | None


class LayerSeries(Record):
    """A linear probe by layer of the encoder; see `results.layers`."""

    head: str
    pooling: str
    n: Count
    n_patients: Count
    n_blocks: Count | None
    points: list[LayerPoint]
    best: str
    last: str
    unfreeze: Count | None


class WithoutSuspects(Record):
    """Studies and images of train that were not trained on, because an audit suspects labels."""

    studies: Count
    images: Count


class RunInfo(Record):
    """`run.json`, as far as it is read; keys that only older or newer runs have may be absent."""

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
    layers: Given[list[LayerSeries]] = None
    """Where a sweep tried several blocks of the encoder."""
    left_out: Given[list[AnyTable]] = None
    decisions: Given[dict[str, AnyTable]] = None
    lacking: Given[dict[str, str]] = None
    """Baselines that were asked for and had nothing to read, and why."""
    without_suspects: Given[WithoutSuspects] = None


class ScoresInfo(Record):
    """`scores.json`: a comparison of the run with itself, with fewer entries in older runs.

    For an evaluation on other data, also the differences from the model's own test.
    """

    level: Given[Literal["study", "image"]] = None
    n_resamples: Given[Count] = None
    seed: Given[Whole] = None
    test: Given[AnyTable] = None
    runs: Given[list[AnyTable]] = None
    rows: Given[list[AnyTable]] = None
    """An entry for each head, like those of `medembed compare --json` but without `seconds`."""
    notes: Given[list[str]] = None
    called_abnormal: AnyTable | None = None
    drop: AnyTable | None = None
    calibration: AnyTable | None = None
    recalibrated: AnyTable | None = None
    drift: AnyTable | None = None
    predictions_sha256: str | None = None
    """Digest of the `predictions.parquet` that an evaluation scored."""


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
    """This field and those below are only in fine-tuning's lines."""
    lora: Whole | None = None
    seed: Whole | None = None
    trainable: Whole | None = None
    encoder: str | None = None
    history: tuple[AnyTable, ...] = Field(default=(), strict=False)


def check_info(info: object, run: str | os.PathLike[str]) -> RunInfo:
    """Return the typed content of a `run.json`.

    Raises
    ------
    RunError
        An entry that a comparison or a page reads has a value that no run writes.
    """
    way_out = "It was damaged or edited. Restore it, or sweep again into another --out."
    return parse(RunInfo, info, RunError, f"run.json of {os.fspath(run)}", way_out)


def check_scores(scores: object, path: str | os.PathLike[str]) -> None:
    """Check the content of a `scores.json`.

    Raises
    ------
    RunError
        An entry has a value that no run writes.
    """
    parse(ScoresInfo, scores, RunError, path, "Delete the run and sweep or evaluate again.")


def check_trial(record: object, where: str) -> TrialRecord:
    """Return the typed content of a ledger's line.

    Raises
    ------
    RunError
        The line does not describe a trial.
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
    """Return the first difference between two questions, as part of a sentence, or None."""
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
    """Return the kind of a run, its heads with their scores, and its data, from its `run.json`."""
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
