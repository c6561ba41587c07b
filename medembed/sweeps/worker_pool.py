"""Training processes, on this machine or on Ray. A process that dies loses only its own item.

`processes` says how those of this machine start. While they import libraries, which takes seconds,
this process runs the items that are marked as safe.
"""

import errno
import heapq
import multiprocessing
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from joblib.externals.loky.backend import resource_tracker as loky_tracker

from medembed.core.errors import TrainingDataError
from medembed.core.ray_cluster import connected_to_ray
from medembed.core.system import end_with_parent, free_bytes
from medembed.sweeps.processes import (
    are_starting,
    choose_jobs,
    deaf,
    end_processes,
    quiet,
    start_processes,
    start_server,
)

__all__ = ["BACKENDS", "Died", "Pool"]

BACKENDS = ("loky", "ray")
_SHARED_MEMORY = Path("/dev/shm")  # nosec B108
_LEAST_SHARED_MEMORY = 2_000_000_000
"""Below this, the space in `_SHARED_MEMORY` is that of a container, and a disk holds more."""


@dataclass(frozen=True)
class Died:
    """Takes the place of a missing result and holds the reason, such as a process that died."""

    reason: str


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
        self,
        function: Callable[[Any, Any], Any],
        item: Any,
        *,
        rank: int = 0,
        alone: bool = False,
        safe: bool = False,
    ) -> int:
        """Add an item, and return its number.

        Items of a lower rank go first. One that is known to kill its process goes `alone`. One that
        is `safe` never does, and needs no library that takes long to import: this process runs it
        if the others are still starting.
        """
        number, self._n_submitted = self._n_submitted, self._n_submitted + 1
        queue = self._suspected if alone else self._waiting
        heapq.heappush(queue, _Item(rank, number, function, item, safe))
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
            if self._backend.is_starting and (safe := self._take_safe()):
                return safe.number, self._run_here(safe)
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
        self,
        function: Callable[[Any, Any], Any],
        items: Sequence[Any],
        *,
        is_safe: Callable[[Any], bool] = lambda _: False,
    ) -> Iterator[tuple[int, Any]]:
        """Yield (index of the item, result or `Died`) in the order of completion.

        See `submit` for items that are safe.
        """
        numbers = {
            self.submit(function, item, safe=is_safe(item)): i for i, item in enumerate(items)
        }
        for _ in items:
            number, result = self.wait()
            yield numbers[number], result

    def _take_safe(self) -> "_Item | None":
        item = min((item for item in self._waiting if item.safe), default=None)
        if item is not None:
            self._waiting.remove(item)
            heapq.heapify(self._waiting)
        return item

    def _run_here(self, item: "_Item") -> Any:
        try:
            return item.function(self._shared, item.argument)
        except Exception as error:
            return Died(_first_line(error))

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
    safe: bool = field(compare=False, default=False)


class _Here:
    """Runs items in this process, one after the other."""

    folder, broken, n_ahead, is_starting = None, (), 0, False

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
        start_server()

    @property
    def is_starting(self) -> bool:
        return are_starting()

    def submit(self, item: _Item) -> Future[Any]:
        with quiet(), deaf():
            executor = start_processes(self._jobs)
            return executor.submit(  # type: ignore[no-any-return]
                _call, item.function, str(self.folder), self._shared, item.argument
            )

    def wait(self, futures: Sequence[Future[Any]]) -> Sequence[Future[Any]]:
        with quiet():
            return list(wait(futures, return_when=FIRST_COMPLETED).done)

    def result(self, future: Future[Any]) -> Any:
        return future.result()

    def close(self, *, working: bool) -> None:
        if working:
            end_processes()
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

    folder, n_ahead, is_starting = None, 1, False

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
