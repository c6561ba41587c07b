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
from medembed.results.comparison_schema import LayerSeries

__all__ = [
    "CV_METHOD",
    "PREDICTION_COLUMNS",
    "RUN_FORMAT",
    "RUN_VERSION",
    "TRIAL_COLUMNS",
    "Data",
    "InputImage",
    "LeaderboardEntry",
    "LeftOutImage",
    "Question",
    "RowCounts",
    "RunEncoder",
    "RunInfo",
    "ScoresInfo",
    "Times",
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


class Question(Record):
    """The question that a run answers, as far as others read it."""

    target: str | None = None
    """The manifest's target that was predicted; the label where there is none."""
    pooling: str | None = None
    manifest: str | None = None
    """The manifest's digest; not every run names one."""
    metric: Given[str] = None
    n_folds: Whole | None = None
    n_configs: Whole | dict[str, Whole] | None = None
    """Of every head, or of each."""
    covariates: Texts = ()
    train_fraction: Given[float] = Field(None, gt=0, le=1)
    """Share of the training patients; all where there is none."""
    split: str | None = None
    """The only split that an evaluation read; all where it is null."""

    @property
    def share(self) -> float:
        """The share of training patients, 1 where none was asked for."""
        return 1.0 if self.train_fraction is None else self.train_fraction


class Times(Record):
    """When a run began and ended, in UTC."""

    started: str | None = None
    ended: str | None = None


class RowCounts(Record):
    """What a run counts of a manifest's rows."""

    images: Given[Count] = None
    studies: Given[Count] = None
    patients: Given[Count] = None
    abnormal: Given[Count] = None
    abnormal_studies: Given[Count] = None
    unlabelled: Given[Count] = None
    left_out: Given[Count] = None


class Data(RowCounts):
    """What a run knows of its manifest and of the images that were left out."""

    left_out_test: Given[Count] = None
    splits: dict[str, RowCounts] = Field(default_factory=dict)
    label_level: str | None = None
    synthetic: bool = False
    licence: str | None = None
    build: KeptBuild | None = None
    """What the manifest's build found, if it was available."""
    sought_test: Given[Count] = None
    """Labelled test studies that a worklist sought out, if there are any."""


class LeftOutImage(Record):
    """An image without an embedding, and why."""

    sha256: str | None = None
    split: str | None = None
    stage: str | None = None
    reason: str | None = None


class InputImage(Record):
    """How files became an encoder's input."""

    size: Given[list[Whole]] = None
    fit: str | None = None
    resample: str | None = None


class RunEncoder(Record):
    """The encoder behind a run's embeddings."""

    source: str | None = None
    revision: str | None = None
    precision: str | None = None
    fingerprint: str | None = None
    preprocessing: InputImage = Field(default_factory=InputImage)


class LeaderboardEntry(Record):
    """The winner of a head, or why the head has none."""

    head: str
    pooling: str | None = None
    trial: Whole | None = None
    params: AnyTable | None = None
    cv: float | None = None
    seconds: float | None = None
    error: str | None = None
    depth: Whole | None = None
    seed: Whole | None = None
    n_tried: Count | None = None
    cv_method: str | None = None
    encoder: str | None = None
    """The fingerprint of an encoder that was adapted with the head."""


class WithoutSuspects(Record):
    """Studies and images of train that were not trained on, because an audit suspects labels."""

    studies: Count
    images: Count


class RunInfo(Record):
    """`run.json`, as far as it is read; keys that only older or newer runs have may be absent."""

    format: Literal["medembed-run"] = RUN_FORMAT
    version: Literal[1] = RUN_VERSION
    kind: str
    asked: Question
    times: Times
    command: str = ""
    seed: Whole | None = None
    cv_method: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    data: Data = Field(default_factory=Data)
    encoder: RunEncoder = Field(default_factory=RunEncoder)
    leaderboard: list[LeaderboardEntry] = Field(default_factory=list)
    layers: Given[list[LayerSeries]] = None
    """Where a sweep tried several blocks of the encoder."""
    left_out: list[LeftOutImage] = Field(default_factory=list)
    decisions: dict[str, AnyTable] = Field(default_factory=dict)
    """By head, of a run that trained nothing; see `results.decisions`."""
    lacking: dict[str, str] = Field(default_factory=dict)
    """Baselines that were asked for and had nothing to read, and why."""
    without_suspects: Given[WithoutSuspects] = None

    def winner(self, head: str) -> LeaderboardEntry:
        """Return the head's row of the leaderboard; one without values where it has none."""
        named = (entry for entry in self.leaderboard if entry.head == head)
        return next(named, LeaderboardEntry(head=head))


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


def summarise_info(name: str, info: RunInfo, is_complete: bool) -> Summary:
    """Return the kind of a run, its heads with their scores, and its data, from its `run.json`."""
    data = info.data
    heads = [own.head if own.cv is None else f"{own.head} {own.cv:.3f}" for own in info.leaderboard]
    known = {"image": data.images, "patient": data.patients}
    counts = [counted(n, noun) for noun, n in known.items() if n is not None]
    if data.synthetic:
        counts.append("synthetic")
    return Summary(
        f"Run {name}: {info.kind}, {'complete' if is_complete else 'unfinished'}",
        {
            f"heads, cv {info.asked.metric or 'score'}": ", ".join(heads) or "none yet",
            "data": ", ".join(counts) or "not known",
            "encoder": info.encoder.source or "not known",
        },
    )
