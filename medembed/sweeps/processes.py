"""Training processes of this machine: how many, how they start, and how they end.

On Linux all are forked from one process that has imported the libraries and computed nothing, so
that these are imported once, and are in memory once. Elsewhere each process imports them.
"""

import atexit
import io
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from multiprocessing.connection import wait
from typing import Any

import joblib
from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.backend import resource_tracker as loky_tracker

from medembed.core.errors import TrainingDataError
from medembed.core.system import choose_processes

__all__ = [
    "are_starting",
    "choose_jobs",
    "deaf",
    "end_processes",
    "quiet",
    "start_early",
    "start_importing",
    "start_processes",
    "start_server",
]

JOB_BYTES = 500_000_000
"""Memory that a training process takes, with PyTorch loaded and some embeddings."""

_TRAINING = ("medembed.sweeps.training", "medembed.heads.batched_mlp", "medembed.heads.lightgbm")
"""What training processes import, which takes seconds."""
_IDLE_SECONDS = 60


def choose_jobs(asked: int | None) -> int:
    """Return the number of training processes on this machine, one per core by default.

    Raises
    ------
    TrainingDataError
        More processes are requested than its cores and memory allow.
    """
    most = choose_processes(asked, "--jobs", JOB_BYTES, TrainingDataError)
    return asked or min(most, joblib.cpu_count())


@contextmanager
def start_early(jobs: int | None) -> Iterator[None]:
    """Import what training processes need while this process goes on; end them with the context.

    None is started for a number that `choose_jobs` refuses.

    Parameters
    ----------
    jobs : int, optional
        As `Pool` will be asked for.
    """
    try:
        with suppress(TrainingDataError):
            start_importing(jobs)
        yield
    finally:
        end_processes()


def start_importing(jobs: int | None) -> None:
    """Import what training processes need while this process goes on; see `choose_jobs`."""
    if choose_jobs(jobs) > 1:
        start_server()


if sys.platform == "linux":  # (elsewhere libraries do not bear a fork)
    from multiprocessing import context, forkserver, popen_forkserver, reduction, spawn, util

    class _ForkedPopen(popen_forkserver.Popen):
        """Starts a process from a fork server of ours, without running the user's program in it.

        Python's own would run the main module again, so that a script that calls `sweep` would
        have to be written with this in mind.
        """

        _fds: list[int]

        def _launch(self, process_obj: Any) -> None:
            prepared = spawn.get_preparation_data(process_obj._name)
            for key in ("init_main_from_name", "init_main_from_path"):
                prepared.pop(key, None)
            sent = io.BytesIO()
            context.set_spawning_popen(self)
            try:
                reduction.dump(prepared, sent)
                reduction.dump(process_obj, sent)
            finally:
                context.set_spawning_popen(None)
            server = _fork_server()
            self.sentinel, written = server.connect_to_new_process(self._fds)
            held = os.dup(written)  # the process sees by its end that this one has ended
            self.finalizer = util.Finalize(self, _close_all, ((held, self.sentinel),))
            with open(written, "wb") as file:
                file.write(sent.getbuffer())
            self._await_start()

        def _await_start(self) -> None:
            self.pid = forkserver.read_signed(self.sentinel)

    class _FirstPopen(_ForkedPopen):
        """Starts a process without awaiting it; `sentinel` is ready when it has started."""

        def _await_start(self) -> None:
            pass

    class _ForkedProcess(context.ForkServerProcess):
        @staticmethod
        def _Popen(process_obj: Any) -> Any:  # noqa: N802 (its name in the base class)
            return _ForkedPopen(process_obj)

    class _ForkContext(context.ForkServerContext):
        Process = _ForkedProcess


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


@cache
def _context() -> Any:
    """Return the context in which processes start; None: loky's own."""
    return _ForkContext() if sys.platform == "linux" else None


@cache
def _fork_server() -> Any:
    if sys.platform != "linux":
        return None
    server = forkserver.ForkServer()
    server.set_forkserver_preload(list(_TRAINING))
    return server


_start: Any = None
"""The first process that the fork server starts, until it has: by then it has imported."""


def are_starting() -> bool:
    """Return whether libraries are still imported, so that a process could not start at once."""
    global _start
    if _start is not None and wait([_start.sentinel], timeout=0):
        _start = None
    return _start is not None


def start_server() -> None:
    """Start the fork server, unless it runs; it answers when it has imported the libraries."""
    global _start
    server = _fork_server()
    if server is None:
        return
    is_new = server._forkserver_pid is None
    with deaf(), _one_thread_each():
        server.ensure_running()
    if is_new:
        _start = _FirstPopen(_context().Process(target=_do_nothing))
        atexit.register(_end_unfinished_start)


def _do_nothing() -> None:
    pass


def _end_unfinished_start() -> None:
    """Kill a fork server that still imports: nobody will need it."""
    global _start
    if are_starting():
        server = _fork_server()
        os.kill(server._forkserver_pid, signal.SIGKILL)
        server._stop()
        _start = None


_executors: dict[int, Any] = {}
"""The processes of this machine, if there are any, by their number."""


def start_processes(jobs: int) -> Any:
    """Return the executor of these processes: that of an earlier pool, unless a process died."""
    executor = _executors.get(jobs)
    if executor is None or executor._flags.broken or executor._flags.shutdown:
        _end_executors()
        start_server()
        executor = ProcessPoolExecutor(
            jobs, context=_context(), timeout=_IDLE_SECONDS, env=_ONE_THREAD
        )
        _executors[jobs] = executor
    return executor


def end_processes() -> None:
    """Kill the processes: nothing is lost with them, and to end by themselves takes a second."""
    _end_unfinished_start()
    _end_executors()


def _end_executors() -> None:
    while _executors:
        _, executor = _executors.popitem()
        with quiet(), _ignoring_thread_errors(), suppress(Exception):
            executor.shutdown(wait=True, kill_workers=True)


_ONE_THREAD = dict.fromkeys(
    (
        "BLIS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "NUMEXPR_NUM_THREADS",
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "VECLIB_MAXIMUM_THREADS",
    ),
    "1",
)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let libraries of processes that start now compute with one thread."""
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(_ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def deaf() -> Iterator[None]:
    """Shield processes started now from a terminal's signals: this process ends them itself.

    This process hears of an interruption afterwards: a process that had just started would be
    forgotten, and go on.
    """
    for tracker in (multiprocessing.resource_tracker, loky_tracker):
        tracker.ensure_running()  # starting one later would admit the signal again
    signals = {signal.SIGINT, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    heard: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():  # other threads may get the signal
        handlers = {
            number: signal.signal(number, lambda number, _: heard.append(number))
            for number in signals
        }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if heard:
            signal.raise_signal(heard[0])


@contextmanager
def quiet() -> Iterator[None]:
    """Silence loky's warning of a restarted worker: one that grew had more work, not a leak."""
    with warnings.catch_warnings():
        message = "A worker stopped while some jobs were given"
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
