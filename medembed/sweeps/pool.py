"""Processes that train: on this machine, or on Ray. One that dies costs what it was doing."""

import errno
import multiprocessing.resource_tracker
import os
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import joblib
from joblib.externals.loky.backend import resource_tracker as loky_tracker

from medembed.core.errors import TrainingDataError
from medembed.core.ray_cluster import connected_to_ray
from medembed.core.system import choose_processes, end_with_parent, free_bytes

__all__ = ["BACKENDS", "Died", "Pool", "choose_jobs"]

BACKENDS = ("loky", "ray")
JOB_BYTES = 500_000_000
"""Memory that a process takes which trains, with PyTorch loaded and some embeddings."""


@dataclass(frozen=True)
class Died:
    """What took the place of a result: why there is none, such as a process that is gone."""

    reason: str


def choose_jobs(asked: int | None) -> int:
    """Decide how many processes of this machine train; one a core by default.

    Raises
    ------
    TrainingDataError
        More are asked for than its cores and memory bear.
    """
    most = choose_processes(asked, "--jobs", JOB_BYTES, TrainingDataError)
    return asked or min(most, joblib.cpu_count())


class Pool:
    """Run a function over items, with one large thing that all share.

    Parameters
    ----------
    shared : object
        Its first argument, for all items. Its arrays lie in memory once, read-only, however many
        processes there are on a machine.
    jobs : int, optional
        Processes; one per core by default. With 1 (and `loky`) all runs in this process.
    backend : {"loky", "ray"}
        Processes of this machine, or of the Ray cluster at `RAY_ADDRESS`, through joblib.
    """

    def __init__(self, shared: Any, jobs: int | None = None, backend: str = "loky") -> None:
        if backend not in BACKENDS:
            raise TrainingDataError(
                f"backend {backend!r} is unknown. Choose one of: {', '.join(BACKENDS)}."
            )
        self._shared, self._jobs, self._backend = shared, jobs, backend
        self._stack = ExitStack()
        self._parallel: Any = None
        self._results: Any = None

    def __enter__(self) -> "Pool":
        if self._backend == "ray":
            ray = self._stack.enter_context(connected_to_ray("--backend ray"))
            from ray.util.joblib import register_ray

            register_ray()
            self._jobs = _choose_on_ray(self._jobs, int(ray.cluster_resources().get("CPU", 1)))
            self._shared = _OnRay(ray.put(self._shared))
        else:
            self._jobs = choose_jobs(self._jobs)
        return self

    def __exit__(self, *error: object) -> None:
        if self._results is not None:
            with _quiet():
                self._results.close()  # where all did not come: ends the processes
        self._stack.close()

    @property
    def jobs(self) -> int:
        """Processes at most."""
        return self._jobs or 1

    def run(
        self,
        function: Callable[[Any, Any], Any],
        items: Sequence[Any],
        *,
        suspected: bool = False,
    ) -> Iterator[tuple[int, Any]]:
        """Yield (number of the item, result or `Died`) as they end, in no particular order.

        Parameters
        ----------
        suspected : bool
            Whether one of the items is known to end its process: they run one after the other,
            since together they would only have to begin again.
        """
        if self.jobs == 1 and self._backend == "loky":
            for i, item in enumerate(items):
                yield i, function(self._shared, item)
            return
        waiting = dict(enumerate(items))
        if not waiting:
            return
        if not suspected:
            n_processes = max(2, min(self.jobs, len(items)))  # of one joblib would make none
            with suppress(Exception):  # the function's own errors are results: this is the pool's
                for i, result in self._in_processes(function, waiting, n_processes):
                    del waiting[i]
                    yield i, result
                return
        # A fit took its process down, and all that ran beside it. Alone, only the guilty one falls.
        for i, item in waiting.items():
            try:
                yield from self._in_processes(function, {i: item}, 2)
            except Exception as error:
                _refuse_full_disk(error)
                reason = str(error) or type(error).__name__
                yield i, Died(f"the process died: {reason.splitlines()[0]}")

    def _in_processes(
        self, function: Callable[[Any, Any], Any], items: dict[int, Any], jobs: int
    ) -> Iterator[tuple[int, Any]]:
        call = joblib.delayed(_call)
        calls = [call(function, self._shared, i, item) for i, item in items.items()]
        if self._backend == "ray":
            yield from self._on_ray(calls)
            return
        with joblib.parallel_config(backend="loky", inner_max_num_threads=1), _quiet():
            parallel = joblib.Parallel(
                n_jobs=jobs, batch_size=1, return_as="generator_unordered", mmap_mode="r"
            )
            with _deaf():
                self._results = parallel(calls)
            yield from self._results

    def _on_ray(self, calls: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Yield the results of calls in slices: Ray gives none before all of a slice are there.

        The actors are kept for the next calls, unless one of them died.
        """
        if self._parallel is None:
            with joblib.parallel_config(backend="ray"):
                self._parallel = joblib.Parallel(n_jobs=self.jobs)
                self._parallel.__enter__()
            self._stack.callback(self._end_actors)
        try:
            for start in range(0, len(calls), 2 * self.jobs):
                yield from self._parallel(calls[start : start + 2 * self.jobs])
        except Exception:
            self._end_actors()
            raise

    def _end_actors(self) -> None:
        parallel, self._parallel = self._parallel, None
        if parallel is not None:
            parallel.__exit__(None, None, None)


def _refuse_full_disk(error: Exception) -> None:
    """Raise where the arrays that processes share found no room: no trial is to blame for that.

    joblib maps them from a file, and tells of its troubles in words alone.
    """
    if os.strerror(errno.ENOSPC) not in f"{error} {error.__cause__}":
        return
    named = os.environ.get("JOBLIB_TEMP_FOLDER")
    place = Path(named or ("/dev/shm" if Path("/dev/shm").exists() else tempfile.gettempdir()))  # nosec B108
    raise OSError(
        errno.ENOSPC,
        f"{os.strerror(errno.ENOSPC)} for the embeddings that processes share; "
        f"{free_bytes(place):,} bytes are free. Set JOBLIB_TEMP_FOLDER to a larger disk, or give "
        "--jobs 1",
        str(place),
    ) from error


def _choose_on_ray(asked: int | None, cores: int) -> int:
    if asked is not None and asked > max(1, cores):
        raise TrainingDataError(
            f"--jobs {asked} is more than the {cores} cores of this Ray, and some would never "
            "begin. Give no more, or leave it out."
        )
    return asked or max(1, cores)


@contextmanager
def _deaf() -> Iterator[None]:
    """Keep a terminal's signals from processes that start now: this one is told, and ends them."""
    for tracker in (multiprocessing.resource_tracker, loky_tracker):
        tracker.ensure_running()  # starting one would let the signal in again
    signals = {signal.SIGINT, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Let joblib not warn of what an interruption cancels, or of a process that it renews.

    The ledger knows what is missing, and a process that has grown is not a leak: it had more to do.
    """
    with warnings.catch_warnings():
        for message in (".*have been cancelled", "A worker stopped while some jobs were given"):
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield


@dataclass(frozen=True)
class _OnRay:
    reference: Any

    def get(self) -> Any:
        import ray

        return ray.get(self.reference)


def _call(function: Callable[[Any, Any], Any], shared: Any, i: int, item: Any) -> tuple[int, Any]:
    if isinstance(shared, _OnRay):
        return i, function(shared.get(), item)
    _end_with_parent()
    return i, function(shared, item)


@cache
def _end_with_parent() -> None:
    """Say it once in a process: those that a killed sweep has left would wait for minutes."""
    end_with_parent()
