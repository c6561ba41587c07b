"""Training processes, on this machine or on Ray. A process that dies loses only its own item."""

import errno
import multiprocessing.resource_tracker
import os
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import joblib
from joblib.externals.loky.backend import resource_tracker as loky_tracker

from medembed.core.errors import TrainingDataError
from medembed.core.ray_cluster import connected_to_ray
from medembed.core.system import choose_processes, end_with_parent, free_bytes

__all__ = ["BACKENDS", "Died", "Pool", "choose_jobs", "start_early"]

BACKENDS = ("loky", "ray")
JOB_BYTES = 500_000_000
"""Memory that a training process takes, with PyTorch loaded and some embeddings."""


_TRAINING = "medembed.sweeps.training"
"""What training processes import, which takes seconds."""


@dataclass(frozen=True)
class Died:
    """Takes the place of a missing result and holds the reason, such as a process that died."""

    reason: str


def choose_jobs(asked: int | None) -> int:
    """Return the number of training processes on this machine, one per core by default.

    Raises
    ------
    TrainingDataError
        More processes are requested than its cores and memory allow.
    """
    most = choose_processes(asked, "--jobs", JOB_BYTES, TrainingDataError)
    return asked or min(most, joblib.cpu_count())


_early: list[Any] = []
"""What `start_early` has begun: generators, which closed unread end their processes."""


@contextmanager
def start_early(jobs: int | None, n_items: int) -> Iterator[None]:
    """Start processes of this machine, which import what they need while this one goes on.

    A `Pool` within the context finds them ready. None is started for a number that `choose_jobs`
    refuses.

    Parameters
    ----------
    jobs : int, optional
        As `Pool` will be asked for.
    n_items : int
        How many items its first run will have.
    """
    with suppress(TrainingDataError):
        n = min(choose_jobs(jobs), n_items)
        if n > 1:
            _early.append(_start([joblib.delayed(import_module)(_TRAINING)] * n, n))
    try:
        yield
    finally:
        with _quiet(), _ignoring_thread_errors():
            while _early:
                _early.pop().close()


def _await_early() -> None:
    while _early:
        with suppress(Exception):  # a process that cannot import says so when it has work
            for _ in _early.pop():
                pass


def _start(calls: Sequence[Any], jobs: int) -> Any:
    """Return the unordered results of calls in processes on this machine, as they come."""
    with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
        parallel = joblib.Parallel(
            n_jobs=jobs, batch_size=1, return_as="generator_unordered", mmap_mode="r"
        )
        with _deaf():
            return parallel(calls)


class Pool:
    """Runs a function over items, with one large object shared by all.

    Parameters
    ----------
    shared : object
        The function's first argument, for all items. Its arrays are in memory once, read-only, for
        any number of processes on a machine.
    jobs : int, optional
        Processes; one per core by default. With 1 (and `loky`) everything runs in this process.
    backend : {"loky", "ray"}
        Processes on this machine, or on the Ray cluster at `RAY_ADDRESS`, through joblib.
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
                self._results.close()  # if results are missing: ends the processes
        self._stack.close()

    @property
    def jobs(self) -> int:
        """Maximum number of processes."""
        return self._jobs or 1

    def run(
        self,
        function: Callable[[Any, Any], Any],
        items: Sequence[Any],
        *,
        suspected: bool = False,
    ) -> Iterator[tuple[int, Any]]:
        """Yield (index of the item, result or `Died`) in the order of completion.

        Parameters
        ----------
        suspected : bool
            Whether one of the items is known to kill its process: the items then run one after the
            other, since running them together would only restart all of them.
        """
        if self.jobs == 1 and self._backend == "loky":
            for i, item in enumerate(items):
                yield i, function(self._shared, item)
            return
        waiting = dict(enumerate(items))
        if not waiting:
            return
        if not suspected:
            n_processes = max(2, min(self.jobs, len(items)))  # for one, joblib would start none
            with suppress(Exception):  # errors of the function are results: this is the pool's
                for i, result in self._in_processes(function, waiting, n_processes):
                    del waiting[i]
                    yield i, result
                return
        # A fit took down its process and the concurrent ones. Run alone, only the guilty one fails.
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
        with _quiet():
            _await_early()
            self._results = _start(calls, jobs)
            yield from self._results

    def _on_ray(self, calls: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Yield the results of calls in slices, as Ray returns results only for a whole slice.

        The actors are kept for later calls, unless one of them died.
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
    """Raise if there was no room for the arrays that processes share, which is no trial's fault.

    joblib maps the arrays from a file, and reports the failure only in the text of its error.
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
            f"--jobs {asked} is more than the {cores} cores of this Ray cluster, and some would "
            "never start. Use no more than that, or omit --jobs."
        )
    return asked or max(1, cores)


@contextmanager
def _deaf() -> Iterator[None]:
    """Shield processes started now from a terminal's signals: this process ends them itself."""
    for tracker in (multiprocessing.resource_tracker, loky_tracker):
        tracker.ensure_running()  # starting one later would admit the signal again
    signals = {signal.SIGINT, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence joblib's warnings of jobs cancelled by an interruption, or of a restarted worker.

    The ledger knows which trials are missing, and a worker that grew had more work, not a leak.
    """
    with warnings.catch_warnings():
        for message in (".*have been cancelled", "A worker stopped while some jobs were given"):
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield


@contextmanager
def _ignoring_thread_errors() -> Iterator[None]:
    """Silence loky's thread, which looks for jobs that were cancelled before it sent them."""
    before = threading.excepthook
    threading.excepthook = lambda _: None
    try:
        yield
    finally:
        threading.excepthook = before


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
    """Make this process end with its parent; those of a killed sweep would linger for minutes."""
    end_with_parent()
