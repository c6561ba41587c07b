"""Training processes, on this machine or on Ray. A process that dies loses only its own item.

On Linux all processes are forked from one that has imported the libraries and computed nothing, so
that these are imported once, and are in memory once. Elsewhere each process imports them.
"""

import errno
import heapq
import io
import multiprocessing
import multiprocessing.resource_tracker
import os
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.backend import resource_tracker as loky_tracker

from medembed.core.errors import TrainingDataError
from medembed.core.ray_cluster import connected_to_ray
from medembed.core.system import choose_processes, end_with_parent, free_bytes

__all__ = ["BACKENDS", "Died", "Pool", "choose_jobs", "start_early"]

BACKENDS = ("loky", "ray")
JOB_BYTES = 500_000_000
"""Memory that a training process takes, with PyTorch loaded and some embeddings."""

_TRAINING = ("medembed.sweeps.training", "medembed.heads.batched_mlp", "medembed.heads.lightgbm")
"""What training processes import, which takes seconds."""
_IDLE_SECONDS = 60
_SHARED_MEMORY = Path("/dev/shm")  # nosec B108
_LEAST_SHARED_MEMORY = 2_000_000_000
"""Below this, the space in `_SHARED_MEMORY` is that of a container, and a disk holds more."""


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
            if choose_jobs(jobs) > 1:
                _start_server()
        yield
    finally:
        _end_processes()


class Pool:
    """Runs functions of items, with one large object shared by all.

    Items are submitted, and `wait` returns one result after the other, in the order of completion;
    more may be submitted between. An item whose process dies is repeated alone, as is what ran
    beside it: only the guilty one fails.

    Parameters
    ----------
    shared : object
        The functions' first argument, for all items. Its arrays are in memory once, read-only, for
        any number of processes on a machine.
    jobs : int, optional
        Processes; one per core by default. With 1 (and `loky`) everything runs in this process.
    backend : {"loky", "ray"}
        Processes on this machine, or on the Ray cluster at `RAY_ADDRESS`.
    """

    def __init__(self, shared: Any, jobs: int | None = None, backend: str = "loky") -> None:
        if backend not in BACKENDS:
            raise TrainingDataError(
                f"backend {backend!r} is unknown. Choose one of: {', '.join(BACKENDS)}."
            )
        self._shared, self._jobs, self._name = shared, jobs, backend
        self._waiting: list[_Item] = []
        self._suspected: list[_Item] = []
        self._flying: dict[Any, _Item] = {}
        self._n_submitted = 0
        self._backend: Any = None

    def __enter__(self) -> "Pool":
        if self._name == "ray":
            self._backend = _Ray(self._shared, self._jobs)
            self._jobs = self._backend.jobs
            return self
        self._jobs = choose_jobs(self._jobs)
        self._backend = _Here(self._shared) if self._jobs == 1 else _Local(self._shared, self._jobs)
        return self

    def __exit__(self, *error: object) -> None:
        self._backend.close(working=bool(self._flying))

    @property
    def jobs(self) -> int:
        """Maximum number of processes."""
        return self._jobs or 1

    @property
    def folder(self) -> Path | None:
        """Where processes of this machine may keep what later items read; gone with the pool."""
        return self._backend.folder  # type: ignore[no-any-return]

    def submit(
        self, function: Callable[[Any, Any], Any], item: Any, *, rank: int = 0, alone: bool = False
    ) -> int:
        """Add an item, and return its number.

        Items of a lower rank go first. One that is known to kill its process goes `alone`.
        """
        number, self._n_submitted = self._n_submitted, self._n_submitted + 1
        queue = self._suspected if alone else self._waiting
        heapq.heappush(queue, _Item(rank, number, function, item))
        return number

    def wait(self) -> tuple[int, Any]:
        """Return (number, result or `Died`) of the next item to end.

        Raises
        ------
        LookupError
            All items have ended.
        OSError
            There is no room for the shared object.
        """
        while True:
            self._send()
            if not self._flying:
                raise LookupError("no item is left")
            done, is_alone = self._backend.wait(list(self._flying)), self._is_alone
            for future in done[:1]:
                item = self._flying.pop(future)
                try:
                    return item.number, self._backend.result(future)
                except self._backend.broken as error:
                    if is_alone:
                        return item.number, Died(f"the process died: {_first_line(error)}")
                    self._suspected += [item, *self._flying.values()]
                    heapq.heapify(self._suspected)
                    self._flying.clear()
                except Exception as error:  # errors of functions are results: this is the pool's
                    return item.number, Died(_first_line(error))

    def run(
        self, function: Callable[[Any, Any], Any], items: Sequence[Any]
    ) -> Iterator[tuple[int, Any]]:
        """Yield (index of the item, result or `Died`) in the order of completion."""
        numbers = {self.submit(function, item): i for i, item in enumerate(items)}
        for _ in items:
            number, result = self.wait()
            yield numbers[number], result

    def _send(self) -> None:
        """Keep one more item on its way than there are processes; suspected ones go alone."""
        self._is_alone = False
        if self._suspected:
            if not self._flying:
                self._is_alone = True
                self._send_one(heapq.heappop(self._suspected))
            return
        while self._waiting and len(self._flying) < self.jobs + self._backend.n_ahead:
            self._send_one(heapq.heappop(self._waiting))

    def _send_one(self, item: "_Item") -> None:
        self._flying[self._backend.submit(item)] = item


@dataclass(frozen=True, order=True)
class _Item:
    rank: int
    number: int
    function: Callable[[Any, Any], Any] = field(compare=False)
    argument: Any = field(compare=False)


class _Here:
    """Runs items in this process, one after the other."""

    folder, broken, n_ahead = None, (), 0

    def __init__(self, shared: Any) -> None:
        self._shared = shared

    def submit(self, item: _Item) -> Any:
        return lambda: item.function(self._shared, item.argument)

    def wait(self, futures: Sequence[Any]) -> Sequence[Any]:
        return futures

    def result(self, future: Any) -> Any:
        return future()

    def close(self, *, working: bool) -> None:
        pass


class _Local:
    """Processes of this machine, kept for the next pool; they read `shared` from a file."""

    broken, n_ahead = (BrokenExecutor,), 1

    def __init__(self, shared: Any, jobs: int) -> None:
        self._jobs = jobs
        self.folder = Path(tempfile.mkdtemp(prefix="medembed-", dir=_shared_folder()))
        loky_tracker.register(str(self.folder), "folder")  # is removed if this process is killed
        try:
            self._shared = _store_arrays(shared, self.folder)
        except OSError as error:
            self.close(working=False)
            _refuse_full_disk(error, self.folder.parent)
            raise

    def submit(self, item: _Item) -> Future[Any]:
        with _quiet(), _deaf():
            executor = _start_processes(self._jobs)
            return executor.submit(  # type: ignore[no-any-return]
                _call, item.function, str(self.folder), self._shared, item.argument
            )

    def wait(self, futures: Sequence[Future[Any]]) -> Sequence[Future[Any]]:
        with _quiet():
            return list(wait(futures, return_when=FIRST_COMPLETED).done)

    def result(self, future: Future[Any]) -> Any:
        return future.result()

    def close(self, *, working: bool) -> None:
        if working:
            _end_processes()
        shutil.rmtree(self.folder, ignore_errors=True)
        loky_tracker.unregister(str(self.folder), "folder")


@dataclass(frozen=True)
class _StoredArray:
    path: str


def _store_arrays(shared: Any, folder: Path) -> Any:
    """Return `shared`, an array or a dataclass, with arrays written to files in their place."""
    if isinstance(shared, np.ndarray):
        if not shared.size or shared.dtype.hasobject:
            return shared
        path = folder / f"{len(list(folder.iterdir()))}.npy"
        array = np.ascontiguousarray(shared)
        with open(path, "wb") as file:  # (np.save does not say that a disk is full)
            header = np.lib.format.header_data_from_array_1_0(array)
            np.lib.format.write_array_header_1_0(file, header)
            file.write(array.view(np.uint8).data if array.ndim else array.tobytes())
        return _StoredArray(str(path))
    if not is_dataclass(shared) or isinstance(shared, type):
        return shared
    values = {f.name: getattr(shared, f.name) for f in fields(shared)}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    return replace(shared, **{name: _store_arrays(value, folder) for name, value in arrays.items()})


class _Ray:
    """Runs items as tasks of a Ray cluster."""

    folder, n_ahead = None, 1

    def __init__(self, shared: Any, asked: int | None) -> None:
        with ExitStack() as stack:
            ray = self._ray = stack.enter_context(connected_to_ray("--backend ray"))
            self.jobs = _choose_on_ray(asked, int(ray.cluster_resources().get("CPU", 1)))
            self.broken = (ray.exceptions.RaySystemError, ray.exceptions.WorkerCrashedError)
            self._shared = ray.put(shared)
            self._task = ray.remote(num_cpus=1, max_retries=0)(_call_on_ray)
            self._connection = stack.pop_all()

    def submit(self, item: _Item) -> Any:
        return self._task.remote(item.function, self._shared, item.argument)

    def wait(self, futures: Sequence[Any]) -> Sequence[Any]:
        return self._ray.wait(futures, num_returns=1)[0]  # type: ignore[no-any-return]

    def result(self, future: Any) -> Any:
        return self._ray.get(future)

    def close(self, *, working: bool) -> None:
        self._connection.close()


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _shared_folder() -> Path:
    """Return where the arrays that processes share are kept, in memory if there is room."""
    if named := os.environ.get("JOBLIB_TEMP_FOLDER"):
        return Path(named)
    if _SHARED_MEMORY.is_dir() and free_bytes(_SHARED_MEMORY) >= _LEAST_SHARED_MEMORY:
        return _SHARED_MEMORY
    return Path(tempfile.gettempdir())


def _refuse_full_disk(error: OSError, place: Path) -> None:
    if error.errno != errno.ENOSPC:
        return
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


# Starting and ending processes of this machine

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
            self.pid = forkserver.read_signed(self.sentinel)

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


def _start_server() -> None:
    if (server := _fork_server()) is not None:
        with _deaf(), _one_thread_each():
            server.ensure_running()


_executors: dict[int, Any] = {}
"""The processes of this machine, if there are any, by their number."""


def _start_processes(jobs: int) -> Any:
    """Return the executor of these processes: that of an earlier pool, unless a process died."""
    executor = _executors.get(jobs)
    if executor is None or executor._flags.broken or executor._flags.shutdown:
        _end_processes()
        _start_server()
        executor = ProcessPoolExecutor(
            jobs, context=_context(), timeout=_IDLE_SECONDS, env=_ONE_THREAD
        )
        _executors[jobs] = executor
    return executor


def _end_processes() -> None:
    """Kill the processes: nothing is lost with them, and to end by themselves takes a second."""
    while _executors:
        _, executor = _executors.popitem()
        with _quiet(), _ignoring_thread_errors(), suppress(Exception):
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
def _deaf() -> Iterator[None]:
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
def _quiet() -> Iterator[None]:
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


# In a process


def _call(function: Callable[[Any, Any], Any], pool: str, shared: Any, item: Any) -> Any:
    _end_with_parent()
    if pool not in _restored:
        _restored.clear()
        _restored[pool] = _restore_arrays(shared)
    return function(_restored[pool], item)


def _call_on_ray(function: Callable[[Any, Any], Any], shared: Any, item: Any) -> Any:
    return function(shared, item)


_restored: dict[str, Any] = {}
"""The shared object of the last pool, by the pool's folder."""


def _restore_arrays(shared: Any) -> Any:
    if isinstance(shared, _StoredArray):
        return np.load(shared.path, mmap_mode="r", allow_pickle=False)
    if not is_dataclass(shared) or isinstance(shared, type):
        return shared
    values = {f.name: getattr(shared, f.name) for f in fields(shared)}
    stored = {name: value for name, value in values.items() if isinstance(value, _StoredArray)}
    return replace(shared, **{name: _restore_arrays(value) for name, value in stored.items()})


@cache
def _end_with_parent() -> None:
    """Make this process end with its parent; those of a killed sweep would linger for minutes."""
    parent = multiprocessing.parent_process()
    if parent is None:
        end_with_parent()
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
