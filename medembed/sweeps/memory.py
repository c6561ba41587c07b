"""The memory that a sweep needs, estimated before it loads rows."""

from dataclasses import dataclass

from medembed.core.errors import TrainingDataError
from medembed.core.system import available_memory
from medembed.sweeps.processes import choose_jobs

__all__ = ["MemoryNeed", "fit_jobs"]

PARENT_BYTES = 500_000_000
"""The program with its libraries, without any rows."""
PROCESS_BYTES = 400_000_000
"""The same of a training process."""
COPIES = 2.5
"""Copies of the training rows in a training process: those it takes out of the table, those that it
scales, and half a one for bins, weights and gradients."""
SPAN_COPIES = 2
"""As many more where rows are fewer than columns and perceptrons train on a basis of the rows, of
which the parent keeps one per fold."""
ROW_BYTES = 2_800
"""What a row takes while heads are scored: its names, and the predictions of several heads."""
FLOAT32 = 4


@dataclass(frozen=True)
class MemoryNeed:
    """What a sweep's rows take; `bytes_with` is an upper bound of all its processes' memory.

    It was at most twice the measured peak, see `docs/explanations/sizing.md`.

    Attributes
    ----------
    n_rows, n_trained, n_columns : int
        The rows of the table, those of them that are trained on, and the columns of the widest
        pooling, with covariates.
    n_joined : int
        How many of the columns are covariates: joining them makes another table.
    n_folds : int
        The sweep's folds.
    """

    n_rows: int
    n_trained: int
    n_columns: int
    n_joined: int = 0
    n_folds: int = 5

    def bytes_with(self, jobs: int) -> int:
        """Return the bytes for a number of processes; with 1 this process trains."""
        table = self.n_rows * self.n_columns * FLOAT32
        trained = self.n_trained * self.n_columns * FLOAT32
        is_wide = self.n_trained < self.n_columns
        copies = (COPIES + SPAN_COPIES * is_wide) * trained
        kept = self.n_folds * is_wide * trained
        loading = table * (2 if self.n_joined else 1)
        scoring = self.n_rows * ROW_BYTES
        if jobs == 1:
            return int(PARENT_BYTES + max(loading, table + max(kept + copies, scoring)))
        # (processes share a second copy of the table)
        training = kept + jobs * (PROCESS_BYTES + copies)
        return int(PARENT_BYTES + max(loading, 2 * table + max(training, scoring)))

    def bytes_of_rows(self, jobs: int) -> int:
        """Return the part of `bytes_with` that grows with the rows."""
        return self.bytes_with(jobs) - MemoryNeed(0, 0, 0).bytes_with(jobs)

    def describe(self, jobs: int) -> str:
        """Return how much that is, and for what."""
        processes = "1 process" if jobs == 1 else f"{jobs} processes"
        rows = f"{self.n_rows:,} rows × {self.n_columns:,} columns"
        return f"up to {self.bytes_with(jobs) / 1e9:,.1f} GB of memory ({rows}, {processes})"


def fit_jobs(need: MemoryNeed, asked: int | None, others: str = "") -> int:
    """Return the number of training processes on this machine whose memory is free.

    Parameters
    ----------
    asked : int, optional
        The requested number; by default as many as there are cores and as fit.
    others : str
        What else takes less memory, as the end of a sentence.

    Raises
    ------
    TrainingDataError
        The requested number needs more than is free, or even one process does.
    """
    jobs, free = choose_jobs(asked), available_memory()
    fitting = next((n for n in range(jobs, 0, -1) if need.bytes_with(n) <= free), 0)
    if fitting == jobs or (fitting and asked is None):
        return fitting
    message = f"this sweep needs {need.describe(jobs)}, and there are {free / 1e9:,.1f} GB. "
    if fitting:
        raise TrainingDataError(f"{message}--jobs {fitting} fits; the results are the same.")
    alone = "" if jobs == 1 else f"With --jobs 1 it is {need.bytes_with(1) / 1e9:,.1f} GB. "
    raise TrainingDataError(f"{message}{alone}Use {others or 'a machine with more'}.")
