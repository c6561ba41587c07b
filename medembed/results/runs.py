"""The run directory: what was asked, every trial, the winners' predictions, their scores.

Layout::

    run.json              format, version, kind, the question asked, seed, versions, times, data
    trials.jsonl          one line per trial and fold, appended and synced when it ends
    predictions.parquet   every head's winner: out-of-fold on `train`, final on `test`
    models/<head>/        the winners, refitted and packaged
    folds/                unfinished runs only: trials' predictions on their held-out folds
    scores.json           written last: without this file a run is unfinished
"""

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Container, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medembed.core.errors import PathNotFoundError, RunError
from medembed.core.files import (
    append_synced,
    as_path,
    describe_error,
    hold_lock,
    json_bytes,
    open_plain,
    read_plain,
    write_atomically,
)
from medembed.core.schema import as_json
from medembed.core.text import Summarised, Summary
from medembed.results.run_schema import (
    PREDICTION_COLUMNS,
    RUN_FORMAT,
    RUN_VERSION,
    TRIAL_COLUMNS,
    TrialRecord,
    check_info,
    check_predictions,
    check_scores,
    check_trial,
    find_difference,
    summarise_info,
)

if TYPE_CHECKING:
    from medembed.heads.packaging import Model
    from medembed.results.comparison_schema import ComparisonResult

__all__ = [
    "PREDICTION_COLUMNS",
    "RUN_VERSION",
    "Run",
    "RunLike",
    "create_run",
    "open_run",
    "refuse_foreign",
    "utc_now",
]


class Run(Summarised):
    """One run directory.

    Parameters
    ----------
    path : Path
        The directory.
    document : dict
        The content of `run.json`, as JSON values.

    Attributes
    ----------
    info : RunInfo
        The document, typed.
    comparison : ComparisonResult, optional
        What this process found when it scored the run, see `comparison.score_run`.

    Raises
    ------
    RunError
        An entry has a value that no run writes.
    """

    comparison: "ComparisonResult | None" = None

    def __init__(self, path: Path, document: Mapping[str, object]) -> None:
        self.path = path
        self.info = check_info(document, path)
        self._document = document

    @property
    def name(self) -> str:
        """The name of the directory, which tables and pages show in place of the path."""
        return self.path.resolve().name

    @property
    def is_complete(self) -> bool:
        """Whether the run has ended: `scores.json` is written last."""
        return (self.path / "scores.json").exists()

    @property
    def leaderboard(self) -> pd.DataFrame:
        """The winners, best first: a row per head, with the columns of `--json`."""
        board: Any = self._document.get("leaderboard", [])
        return pd.DataFrame(board, columns=None if board else TRIAL_COLUMNS[:4])

    def as_dict(self) -> dict[str, object]:
        """Return what `medembed sweep --json` and `medembed finetune --json` print."""
        return {"run": str(self.path), "leaderboard": self._document["leaderboard"]}

    def model(self, head: str) -> "Model":
        """Return a head's packaged model, which `Predictor` and `evaluate` take.

        Raises
        ------
        RunError
            The run has no model of that head; the message names those that it has.
        ModelError
            The model is damaged.
        """
        saved = sorted(path.parent.name for path in (self.path / "models").glob("[!.]*/model.json"))
        if head not in saved:
            raise RunError(
                f"run at {self.path} has no model of the head {head!r}. Choose among: "
                f"{', '.join(saved) or 'none, since it has not packaged any'}."
            )
        from medembed.heads.packaging import load_model  # scikit-learn

        return load_model(self.model_path(head))

    def best_head(self) -> str:
        """Return the head with the best mean score in cross-validation, never on test.

        Raises
        ------
        RunError
            The run has packaged no head of a leaderboard; an evaluation never has.
        """
        for entry in self.info.leaderboard:
            if (self.model_path(entry.head) / "model.json").is_file():
                return entry.head
        raise RunError(
            f"run at {self.path} has packaged no model. Name a run of `medembed sweep` or "
            "`medembed finetune` that has ended, or a model's own directory."
        )

    def summarise(self) -> Summary:
        """Return the kind of run, its heads with their scores, and counts of its data."""
        return summarise_info(self.name, self.info, self.is_complete)

    def update_info(self, **changes: object) -> None:
        """Replace entries of `run.json`, atomically.

        Raises
        ------
        RunError
            A value is none that a run may have; `run.json` is as it was.
        """
        document = {**self._document, **as_json(changes)}
        self.info = check_info(document, self.path)
        self._document = document
        write_atomically(self.path / "run.json", json_bytes(document))

    def end(self, **changes: object) -> None:
        """Replace entries of `run.json`, and record that the training has ended."""
        times = self.info.times.model_dump(exclude_unset=True)
        self.update_info(**changes, times={**times, "ended": utc_now()})

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for writing and mend a torn last line of the ledger.

        Raises
        ------
        RunError
            Another process is writing to this run.
        """
        refusal = RunError(
            f"run at {self.path} is being written by another process. "
            "Wait for it to end, or choose another --out."
        )
        with hold_lock(self.path / ".lock", refusal):
            self._mend_ledger()
            yield

    def append_trial(self, record: TrialRecord) -> None:
        """Append one line to the ledger; the line is on disk when this returns."""
        append_synced(self._ledger_path, _line(record))

    def trial_records(self) -> list[TrialRecord]:
        """Return the ledger's records, oldest first, without a torn last line.

        Raises
        ------
        RunError
            A line before the last does not describe a trial.
        """
        if not self._ledger_path.exists():
            return []
        *lines, _torn = read_plain(self._ledger_path).split(b"\n")
        return [self._parse_trial(number, line) for number, line in enumerate(lines, start=1)]

    def trials(self) -> pd.DataFrame:
        """Return the ledger as a table, one row per trial and fold."""
        records = [record.model_dump() for record in self.trial_records()]
        return pd.DataFrame(records, columns=TRIAL_COLUMNS)

    def write_predictions(self, predictions: pd.DataFrame) -> None:
        """Write `predictions.parquet`, whole; equal rows give equal bytes."""
        schema = pa.schema(list(PREDICTION_COLUMNS.items()))
        table = pa.Table.from_pandas(
            predictions[list(PREDICTION_COLUMNS)], schema=schema, preserve_index=False
        ).replace_schema_metadata(None)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        write_atomically(self.path / "predictions.parquet", buffer.getvalue())

    def predictions(self) -> pd.DataFrame:
        """Return `predictions.parquet`: the `PREDICTION_COLUMNS`, with label as nullable Int8.

        Raises
        ------
        RunError
            The file is missing, damaged or lacks a column, or no run writes one of its values.
        """
        path = self.path / "predictions.parquet"
        try:
            # opened here, since Arrow refuses paths that are not UTF-8
            with open_plain(path) as file:
                table = pq.read_table(file, columns=list(PREDICTION_COLUMNS))
            table = table.cast(pa.schema(list(PREDICTION_COLUMNS.items())))
            check_predictions(table)
            frame: pd.DataFrame = table.to_pandas()
        except (OSError, ValueError, pa.ArrowException) as error:
            raise RunError(
                f"predictions of the run at {self.path} cannot be read ({path.name}: "
                f"{describe_error(error)}). Delete the run and sweep again."
            ) from None
        return frame.astype({"label": "Int8", "fold": "Int16", "trial": "Int32"})

    def write_scores(self, scores: Mapping[str, object]) -> None:
        """Write `scores.json`, which completes the run."""
        write_atomically(self.path / "scores.json", json_bytes(scores))

    def scores(self) -> dict[str, Any]:
        """Return the content of `scores.json`.

        Raises
        ------
        RunError
            The file cannot be read, or an entry has a value that no run writes.
        """
        path = self.path / "scores.json"
        scores = _read_json(path)
        check_scores(scores, path)
        return scores

    def keep_fold(self, key: str, probability: NDArray[np.float64]) -> None:
        """Keep one training's predictions of its held-out fold until the run is complete."""
        directory = self.path / "folds"
        directory.mkdir(exist_ok=True)
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(probability, np.float64), allow_pickle=False)
        write_atomically(directory / f"{key}.npy", buffer.getvalue())

    def kept_fold(self, key: str) -> NDArray[np.float64] | None:
        """Return what `keep_fold` kept, or None if that is missing or damaged."""
        try:
            with open_plain(self.path / "folds" / f"{key}.npy") as file:
                kept = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return kept if kept.dtype == np.float64 and kept.ndim == 1 else None

    def drop_folds(self) -> None:
        """Remove what `keep_fold` kept, once `predictions.parquet` holds it."""
        shutil.rmtree(self.path / "folds", ignore_errors=True)

    def forget_trials(self, keys: Container[str]) -> None:
        """Remove the lines of these keys from the ledger, atomically, to repeat those trials."""
        kept = [record for record in self.trial_records() if record.key not in keys]
        write_atomically(self._ledger_path, b"".join(map(_line, kept)))

    def drop_partial_models(self) -> None:
        """Remove what a process that was killed while saving a model has left behind."""
        for left in (self.path / "models").glob(".*.partial"):
            shutil.rmtree(left, ignore_errors=True)

    def model_path(self, head: str) -> Path:
        """Return the directory in which the winner of `head` is packaged.

        Raises
        ------
        RunError
            The name cannot be that of a directory.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", head):
            raise RunError(f"head name {head!r} cannot name a directory")
        return self.path / "models" / head

    def require_complete(self) -> None:
        """Refuse an unfinished run, naming the command that finishes it.

        Raises
        ------
        RunError
            The run has no scores yet.
        """
        if not self.is_complete:
            raise RunError(
                f"run at {self.path} is unfinished. Finish it with the command that began it, "
                f"with --out {self.path}: {self.info.command or 'medembed sweep'}"
            )

    def require_manifest(self, digest: str) -> None:
        """Refuse a manifest, by its digest, that the run was not made from.

        Raises
        ------
        RunError
            The run names another; not every run names one.
        """
        own = self.info.asked.manifest
        if own is not None and own != digest:
            raise RunError(
                f"the run at {self.path} was made from another manifest. Give the one that it was "
                "made from, or sweep again with this one."
            )

    @property
    def _ledger_path(self) -> Path:
        return self.path / "trials.jsonl"

    def _mend_ledger(self) -> None:
        if not self._ledger_path.exists():
            return
        with open_plain(self._ledger_path, "r+b") as file:
            content = file.read()
            end = content.rfind(b"\n") + 1
            if end < len(content):
                file.truncate(end)
                os.fsync(file.fileno())

    def _parse_trial(self, number: int, line: bytes) -> TrialRecord:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = line.decode(errors="replace")
        return check_trial(record, f"line {number} of {self._ledger_path}")


RunLike = Run | str | os.PathLike[str]
"""A run, or the path of its directory."""


def _line(record: TrialRecord) -> bytes:
    """Return a ledger's line of the fields that were set: only fine-tuning writes its own keys."""
    document = record.model_dump(exclude_unset=True)
    return (json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n").encode()


def open_run(path: RunLike) -> Run:
    """Return the run in a directory; a `Run` is read again from its path.

    Raises
    ------
    PathNotFoundError
        There is no such directory.
    RunError
        The directory is not a run or of another version, or an entry of `run.json` that a
        comparison reads has a value that no run writes.
    """
    path = path.path if isinstance(path, Run) else as_path(path, "a run", "a Run")
    if not path.is_dir():
        if path.exists():
            raise RunError(f"{path} is a file, and a run is a directory. Name another run.")
        raise PathNotFoundError(f"run {path} does not exist. `medembed sweep` makes one.")
    if not (path / "run.json").exists():
        if names := _name_target_runs(path):
            raise RunError(
                f"{path} is not a run: it holds one for each target, {', '.join(names)}. Name one, "
                f"such as {path / names[0]}."
            )
        raise RunError(f"{path} is not a run: it has no run.json. `medembed sweep` makes one.")
    info = _read_json(path / "run.json")
    if info.get("format") != RUN_FORMAT:
        raise RunError(f"{path} is not a run: its run.json has format {info.get('format')!r}.")
    if info.get("version") != RUN_VERSION:
        raise RunError(
            f"run at {path} has version {info.get('version')!r}; this medembed reads version "
            f"{RUN_VERSION}. Use the medembed that made it, or sweep again."
        )
    return Run(path, info)


def create_run(
    path: str | Path, asked: Mapping[str, object], *, details: Mapping[str, object] | None = None
) -> Run:
    """Create a run directory, or return the run in it if that answers an equal question.

    Parameters
    ----------
    path : str or Path
        The directory: absent, empty, or a run with an equal question.
    asked : mapping
        The question: everything that decides the result, as JSON values.
    details : mapping, optional
        Further entries of `run.json` (versions, data, command), recorded but not compared: JSON
        values, or records of `run_schema`.

    Raises
    ------
    RunError
        The directory is not empty and not a run, or answers another question.
    """
    path = as_path(path, "a run directory")
    asked = json.loads(json.dumps(dict(asked), allow_nan=False))
    if path.is_dir() and (path / "run.json").exists():
        run = open_run(path)
        difference = find_difference(as_json(run.info.asked), asked)
        if difference is not None:
            raise RunError(
                f"run at {path} answers another question: {difference}. Choose another --out, or "
                "repeat the options of that run."
            )
        return run
    refuse_foreign(path)
    path.mkdir(parents=True, exist_ok=True)
    head = {"format": RUN_FORMAT, "version": RUN_VERSION, "kind": "sweep", **(details or {})}
    times = {"started": utc_now(), "ended": None}
    run = Run(path, as_json({**head, "asked": asked, "times": times}))
    run.update_info()
    return run


def utc_now() -> str:
    """Return the time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def refuse_foreign(path: Path) -> None:
    """Raise RunError unless a directory is absent or empty, so that a run can be made there."""
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file. Choose another --out.")
    # A crash between the directory and its run.json leaves at most a hidden partial file.
    if path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir()):
        if names := _name_target_runs(path):
            raise RunError(
                f"{path} holds a run for each target: {', '.join(names)}. Choose another --out, or "
                "repeat --target."
            )
        raise RunError(f"{path} is not empty and not a run. Choose another --out.")


def _name_target_runs(path: Path) -> list[str]:
    """Return the targets whose runs a directory holds; see `results.targets`."""
    if not (path / "targets.json").is_file():
        return []
    return sorted(run.parent.name for run in path.glob("*/run.json")) or ["none yet"]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(read_plain(path))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(
            f"{path} cannot be read ({describe_error(error)}). Delete the run and sweep again."
        ) from None
    if not isinstance(document, dict):
        raise RunError(f"{path} does not hold a JSON object. Delete the run and sweep again.")
    return document
