"""Train configurations fold by fold, and keep a ledger of it.

Each fit uses one thread, so that numbers do not depend on how many run side by side.
"""

import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import joblib
import numpy as np
import pandas as pd
from joblib.externals.loky.process_executor import TerminatedWorkerError
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from medembed.errors import TrainingDataError
from medembed.evaluation.scores import by_study, score
from medembed.heads.registry import default_space, make_head
from medembed.results.runs import RUN_VERSION, Run

__all__ = ["Task", "Training", "digest", "list_tasks", "one_thread", "run_trials", "to_studies"]

SELECTION_THRESHOLD = 0.5
"""For metrics that are decisions: configurations are compared before a threshold is fitted."""


@dataclass(frozen=True)
class Training:
    """The labelled, embedded train rows, in the manifest's order.

    Attributes
    ----------
    X, y, folds, studies : arrays of shape (n, d) float32, (n,) int8, (n,) int64, (n,) int64
        Embeddings, labels 0 or 1, fold numbers, study codes.
    """

    X: NDArray[Any]
    y: NDArray[Any]
    folds: NDArray[Any]
    studies: NDArray[Any]

    def rows_of(self, fold: int) -> NDArray[Any]:
        """Mark the rows of one fold, bool of shape (n,)."""
        return np.asarray(self.folds == fold)


@dataclass(frozen=True)
class Task:
    """One configuration on one held-out fold."""

    head: str
    trial: int
    params: dict[str, Any]
    fold: int
    key: str


def list_tasks(
    heads: Sequence[str], n_configs: int, n_folds: int, seed: int, question: Mapping[str, Any]
) -> list[Task]:
    """List every configuration on every fold; `question` goes into each key."""
    shared = {name: question[name] for name in question if name not in ("heads", "n_configs")}
    shared["version"] = RUN_VERSION
    tasks = []
    for head in heads:
        for trial, params in enumerate(default_space(head, n_configs, seed)):
            for fold in range(n_folds):
                key = digest([shared, head, params, fold])[:32]
                tasks.append(Task(head, trial, params, fold, key))
    return tasks


def run_trials(
    run: Run,
    tasks: Sequence[Task],
    training: Training,
    settings: Mapping[str, Any],
    jobs: int | None,
    progress: Callable[[int, int], None] | None,
) -> dict[str, dict[str, Any]]:
    """Train what the ledger lacks and return all records by key. Failed trials are tried again."""
    pooling = run.info["asked"]["pooling"]
    sizes = np.bincount(training.folds)
    records = {record["key"]: record for record in run.trial_records()}
    done = {task.key for task in tasks if _is_done(run, records.get(task.key), sizes[task.fold])}
    waiting = [task for task in tasks if task.key not in done]
    n_done = len(tasks) - len(waiting)
    if progress is not None:
        progress(n_done, len(tasks))
    for task, outcome in _train_all(waiting, training, settings, jobs):
        probability = outcome.pop("probability")
        if probability is not None:
            run.keep_fold(task.key, probability)
        record = {
            "trial": task.trial,
            "head": task.head,
            "pooling": pooling,
            "params": task.params,
            "fold": task.fold,
            **outcome,
            "key": task.key,
        }
        run.append_trial(record)
        records[task.key] = record
        n_done += 1
        if progress is not None:
            progress(n_done, len(tasks))
    return records


def _is_done(run: Run, record: Mapping[str, Any] | None, n_rows: int) -> bool:
    if record is None or record["status"] != "ok":
        return False
    kept = run.kept_fold(record["key"])
    return kept is not None and len(kept) == n_rows


def _train_all(
    tasks: Sequence[Task],
    training: Training,
    settings: Mapping[str, Any],
    jobs: int | None,
) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Yield each task with its outcome as it ends, in no particular order."""
    n_jobs = max(1, min(jobs or joblib.cpu_count(), len(tasks)))
    if n_jobs == 1:
        for task in tasks:
            yield _train_fold(task, training, settings)
        return
    waiting = {task.key: task for task in tasks}
    try:
        for task, outcome in _in_processes(tasks, training, settings, n_jobs):
            del waiting[task.key]
            yield task, outcome
        return
    except TerminatedWorkerError:
        pass
    # A fit took its process down, and all that ran beside it. Alone, only the guilty one falls.
    for task in waiting.values():
        try:
            yield from _in_processes([task], training, settings, 2)
        except TerminatedWorkerError as error:
            yield task, _failure(f"the process died: {str(error).splitlines()[0]}", 0.0)


def _in_processes(
    tasks: Iterable[Task], training: Training, settings: Mapping[str, Any], n_jobs: int
) -> Iterator[tuple[Task, dict[str, Any]]]:
    with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
        parallel = joblib.Parallel(
            n_jobs=n_jobs, batch_size=1, return_as="generator_unordered", mmap_mode="r"
        )
        yield from parallel(joblib.delayed(_train_fold)(task, training, settings) for task in tasks)


def _train_fold(
    task: Task, training: Training, settings: Mapping[str, Any]
) -> tuple[Task, dict[str, Any]]:
    """Train one configuration without one fold and score it there; errors become a record."""
    started = time.perf_counter()
    try:
        head = make_head(task.head, task.params, seed=settings["seed"])
        held = training.rows_of(task.fold)
        X_val, y_val = training.X[held], training.y[held]
        with one_thread():
            head.fit(training.X[~held], training.y[~held], X_val=X_val, y_val=y_val)
            probability = np.asarray(head.predict_proba(X_val)[:, 1], np.float64)
        value = _study_score(training, held, probability, settings["metric"])
    except Exception as error:
        return task, _failure(f"{type(error).__name__}: {error}", time.perf_counter() - started)
    return task, {
        "score": value,
        "best_epoch": head.best_epoch_,
        "seconds": time.perf_counter() - started,
        "status": "ok",
        "error": None,
        "probability": probability,
    }


def _failure(reason: str, seconds: float) -> dict[str, Any]:
    nothing = {"score": None, "best_epoch": None, "probability": None}
    return {**nothing, "seconds": seconds, "status": "error", "error": reason[:500]}


@contextmanager
def one_thread() -> Iterator[None]:
    """Hold numeric libraries to one thread: sums in another order would change the last digits."""
    torch = sys.modules.get("torch")
    n_before = torch.get_num_threads() if torch else 0
    with threadpool_limits(1), warnings.catch_warnings():
        # A configuration that converges badly is told by its score.
        warnings.simplefilter("ignore")
        if torch:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if torch:
                torch.set_num_threads(n_before)


def _study_score(
    training: Training, rows: NDArray[Any], probability: NDArray[np.float64], metric: str
) -> float:
    studies = to_studies(training, rows, probability)
    y = studies["label"].to_numpy(np.int8)
    value = float(score(y, studies["probability"].to_numpy(), SELECTION_THRESHOLD)[metric])
    if not np.isfinite(value):
        raise TrainingDataError(f"{metric} is not estimable on this fold")
    return value


def to_studies(
    training: Training, rows: NDArray[Any], probability: NDArray[np.float64]
) -> pd.DataFrame:
    """Return one row per study for some of the training rows, see `by_study`."""
    columns = {"study": training.studies[rows], "label": training.y[rows]}
    return by_study(pd.DataFrame({**columns, "probability": probability}))


def digest(document: Any) -> str:
    """Hash JSON values: SHA-256 in hex."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
