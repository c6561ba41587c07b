"""Actors on Ray: processes that load the encoder once, keep their GPU for life, and may die.

Ray gives the processes of plain tasks another GPU at every task, which CUDA does not notice once it
has started. An actor's GPU is its own. Its death costs what it had not committed: the work goes to
another one, and a new one takes its place where there is room for it.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from medembed.core.errors import ManifestError, MedembedError
from medembed.dataset.manifest import Manifest
from medembed.encoders.loading import LOCAL_RANKS
from medembed.encoders.protocol import Encoder
from medembed.extraction.job import COMMIT_SECONDS, ExtractionReport, extract, prepare_cache
from medembed.images.intensity import DEFAULT_INTENSITY, Intensity
from medembed.images.load import DEFAULT_LIMITS, Limits

__all__ = ["Actors", "Job", "Work", "Worker"]

MAX_RETRIES = 5  # of work whose actor died
PATIENCE_SECONDS = 60.0  # in which actors that are stopped commit what they have
COUNT_SECONDS = 10.0  # after which the cluster is asked again how many actors it has room for


@dataclass(frozen=True)
class Job:
    """Say what every actor is to do; the arguments are those of `extract`.

    Parameters
    ----------
    load : callable
        Returns the encoder; called once by each actor.
    image_root, cache_path : Path
        Reached under the same path from every node.
    """

    load: Callable[[], Encoder]
    image_root: Path
    cache_path: Path
    poolings: tuple[str, ...] = ("mean", "max")
    dtype: str = "float16"
    intensity: Intensity = DEFAULT_INTENSITY
    batch_size: int | None = None
    decoders: int | None = None
    retry_failed: bool = False
    commit_seconds: float = COMMIT_SECONDS
    limits: Limits = DEFAULT_LIMITS


class Worker:
    """What an actor runs. It is given one thing to do at a time, and `stop` beside it."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._encoder: Encoder | None = None
        self._stopped = Event()

    def ready(self) -> None:
        """Return once the actor is there."""

    def stop(self) -> None:
        """Let `embed` commit what it has, and end."""
        self._stopped.set()

    def prepare(self, dry_run: bool) -> None:
        """Load the encoder; open the cache, or make it with its canary."""
        job = self._job
        prepare_cache(
            job.image_root,
            self._load(),
            job.cache_path,
            poolings=job.poolings,
            dtype=job.dtype,
            intensity=job.intensity,
            dry_run=dry_run,
        )

    def embed(self, part: Manifest, known: Collection[str]) -> ExtractionReport:
        """Embed a partition. Begun anew after a death, it does what is missing."""
        job = self._job
        return extract(
            part,
            job.image_root,
            self._load(),
            job.cache_path,
            poolings=job.poolings,
            dtype=job.dtype,
            intensity=job.intensity,
            batch_size=job.batch_size,
            decoders=job.decoders,
            retry_failed=job.retry_failed,
            commit_seconds=job.commit_seconds,
            limits=job.limits,
            known_shards=known,
            progress=self._go_on,
        )

    def _load(self) -> Encoder:
        if self._encoder is None:
            for variable in LOCAL_RANKS:  # Ray has given the actor its GPU
                os.environ.pop(variable, None)
            self._encoder = self._job.load()
        return self._encoder

    def _go_on(self, n_done: int, n_contents: int) -> None:
        if self._stopped.is_set():
            raise MedembedError("stopped")  # which commits, as any exception does


@dataclass(eq=False)
class Work:
    """A call of one of a `Worker`'s methods.

    Attributes
    ----------
    n_contents : int
        What it adds to the progress.
    n_losses : int
        How many actors died over it.
    """

    method: str
    arguments: tuple[Any, ...]
    n_contents: int = 0
    n_losses: int = 0


class _LostError(Exception):
    """An actor is gone."""


class Actors:
    """Actors, and what each of them is doing.

    Parameters
    ----------
    ray : module
        Connected.
    job : Job
        What they do.
    needs : dict
        What an actor takes of a node: `num_cpus`, `num_gpus`.
    count : callable
        Returns how many of them the cluster has room for now.
    """

    def __init__(self, ray: Any, job: Job, needs: dict[str, int], count: Callable[[], int]) -> None:
        self._ray, self._count = ray, count
        # Two threads: the work's, and one that `stop` finds free.
        self._make = ray.remote(Worker).options(max_concurrency=2, max_restarts=0, **needs)
        self._job = ray.put(job)
        self._starting: dict[Any, tuple[Any, bool]] = {}  # `ready`'s answer: actor, is it new
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, Work]] = {}
        self._lost: deque[Work] = deque()
        self._n_failed_starts, self._counted = 0, float("-inf")

    def run(self, works: Iterator[Work], n_wanted: int) -> Iterator[tuple[Work, Any]]:
        """Have everything done, and give each piece with what came of it, in the order they end.

        Parameters
        ----------
        works : iterator of Work
            Taken from only when an actor is free, so that memory stays flat.
        n_wanted : int
            How many actors are of use.

        Yields
        ------
        Work, object
            What the method returned; a ManifestError that it raised is given too.

        Raises
        ------
        MedembedError
            What a method raised, or that actors died over one piece again and again.
        """
        more, self._counted = True, float("-inf")
        while True:
            while self._idle and (self._lost or more):
                work = self._lost.popleft() if self._lost else next(works, None)
                if work is None:
                    more = False
                else:
                    self._give(work)
            if not (more or self._lost or self._busy):
                return
            self._start_missing(n_wanted if more else len(self._busy) + len(self._lost))
            yield from self._wait()

    def __enter__(self) -> "Actors":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """End all actors; after an exception, Ctrl-C too, they first commit what they have."""
        try:
            if kind is not None and self._busy:
                for actor, _ in self._busy.values():
                    actor.stop.remote()
                tasks = list(self._busy)
                self._ray.wait(tasks, num_returns=len(tasks), timeout=PATIENCE_SECONDS)
        finally:
            starting = [actor for actor, _ in self._starting.values()]
            busy = [actor for actor, _ in self._busy.values()]
            for actor in (*starting, *busy, *self._idle):
                self._ray.kill(actor)

    def _give(self, work: Work) -> None:
        actor = self._idle.pop()
        self._busy[getattr(actor, work.method).remote(*work.arguments)] = (actor, work)

    def _start_missing(self, n_useful: int) -> None:
        """Start actors up to what is of use and has room; at least one is always waited for."""
        n_actors = len(self._starting) + len(self._idle) + len(self._busy)
        if n_actors >= n_useful or time.monotonic() - self._counted < COUNT_SECONDS:
            return
        self._counted = time.monotonic()
        for _ in range(min(n_useful, max(1, self._count())) - n_actors):
            self._greet(self._make.remote(self._job), is_new=True)

    def _greet(self, actor: Any, *, is_new: bool) -> None:
        self._starting[actor.ready.remote()] = (actor, is_new)

    def _wait(self) -> Iterator[tuple[Work, Any]]:
        done, _ = self._ray.wait([*self._starting, *self._busy], timeout=1.0)
        for answer in done:
            if answer in self._starting:
                self._welcome(answer, *self._starting.pop(answer))
                continue
            actor, work = self._busy.pop(answer)
            try:
                result = self._result(answer)
            except _LostError as lost:
                self._lose(actor, work, lost)
                continue
            except ManifestError as error:
                result = error
            self._idle.append(actor)
            yield work, result

    def _welcome(self, answer: Any, actor: Any, is_new: bool) -> None:
        try:
            self._result(answer)
        except _LostError as lost:
            self._n_failed_starts += is_new
            self._dismiss(actor)
            if self._n_failed_starts > MAX_RETRIES and not (self._starting or self._busy):
                raise self._died(self._n_failed_starts, lost) from lost
        else:
            self._n_failed_starts = 0
            self._idle.append(actor)

    def _lose(self, actor: Any, work: Work, lost: _LostError) -> None:
        work.n_losses += 1
        self._dismiss(actor)
        if work.n_losses > MAX_RETRIES:
            raise self._died(work.n_losses, lost) from lost
        self._lost.append(work)
        # A node may have died, and with it those that have nothing to do: work waits for an answer.
        idle, self._idle = self._idle, []
        for other in idle:
            self._greet(other, is_new=False)

    def _dismiss(self, actor: Any) -> None:
        self._ray.kill(actor)  # one that is only out of reach must not go on beside its successor
        self._counted = float("-inf")

    @staticmethod
    def _died(n_times: int, lost: _LostError) -> MedembedError:
        return MedembedError(
            f"a task on Ray was lost {n_times} times ({lost}): its workers died, out of memory "
            "perhaps. Rows committed so far are kept; run the command again."
        )

    def _result(self, answer: Any) -> Any:
        """Return what a method returned, or raise what it raised."""
        ray = self._ray
        try:
            return ray.get(answer)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MedembedError):
                raise error.cause from None
            raise MedembedError(f"a task on Ray failed: {error.cause!r}") from error
        except ray.exceptions.RayError as error:
            raise _LostError(type(error).__name__) from error
