"""Processes that train: on this machine, or on Ray. One that dies costs what it was doing."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import joblib

from medembed.clusters import connected_to_ray
from medembed.errors import TrainingDataError

__all__ = ["BACKENDS", "Died", "Pool"]

BACKENDS = ("loky", "ray")


@dataclass(frozen=True)
class Died:
    """What took the place of a result: the process that worked on it is gone."""

    reason: str


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

    def __enter__(self) -> "Pool":
        if self._backend == "ray":
            ray = self._stack.enter_context(connected_to_ray("--backend ray"))
            from ray.util.joblib import register_ray

            register_ray()
            self._jobs = self._jobs or int(ray.cluster_resources().get("CPU", 1))
            self._shared = _OnRay(ray.put(self._shared))
        self._jobs = self._jobs or joblib.cpu_count()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def jobs(self) -> int:
        """Processes at most."""
        return self._jobs or 1

    def run(
        self, function: Callable[[Any, Any], Any], items: Sequence[Any]
    ) -> Iterator[tuple[int, Any]]:
        """Yield (number of the item, result or `Died`) as they end, in no particular order."""
        if self.jobs == 1 and self._backend == "loky":
            for i, item in enumerate(items):
                yield i, function(self._shared, item)
            return
        waiting = dict(enumerate(items))
        if not waiting:
            return
        n_processes = max(2, min(self.jobs, len(items)))  # of one joblib would make none
        try:
            for i, result in self._in_processes(function, waiting, n_processes):
                del waiting[i]
                yield i, result
            return
        except Exception as error:  # the function's own errors are results: this is the pool's
            reason = str(error) or type(error).__name__
        # A fit took its process down, and all that ran beside it. Alone, only the guilty one falls.
        for i, item in waiting.items():
            try:
                yield from self._in_processes(function, {i: item}, 2)
            except Exception as error:
                reason = str(error) or type(error).__name__
                yield i, Died(f"the process died: {reason.splitlines()[0]}")

    def _in_processes(
        self, function: Callable[[Any, Any], Any], items: dict[int, Any], jobs: int
    ) -> Iterator[tuple[int, Any]]:
        call = joblib.delayed(_call)
        calls = [call(function, self._shared, i, item) for i, item in items.items()]
        if self._backend == "ray":  # which gives no result before all of a call are there
            with joblib.parallel_config(backend="ray"):
                for start in range(0, len(calls), 2 * jobs):
                    yield from joblib.Parallel(n_jobs=jobs)(calls[start : start + 2 * jobs])
            return
        with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
            parallel = joblib.Parallel(
                n_jobs=jobs, batch_size=1, return_as="generator_unordered", mmap_mode="r"
            )
            yield from parallel(calls)


@dataclass(frozen=True)
class _OnRay:
    reference: Any

    def get(self) -> Any:
        import ray

        return ray.get(self.reference)


def _call(function: Callable[[Any, Any], Any], shared: Any, i: int, item: Any) -> tuple[int, Any]:
    return i, function(shared.get() if isinstance(shared, _OnRay) else shared, item)
