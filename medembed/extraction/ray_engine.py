"""Stage 1 on Ray: extraction by many workers, one per GPU, any of which may die.

The driver plans; each worker, an actor, embeds partitions of the missing rows directly into the
shared cache and returns only counts and failures. Ray is an extra: `pip install 'medembed[ray]'`.

Ray assigns the process of a plain task a different GPU for every task, which CUDA ignores once it
is initialised. An actor loads the encoder once and keeps its GPU for life. If it dies, only its
uncommitted rows are lost: another actor takes over the work, and a new actor replaces it if the
cluster has room.
"""

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from threading import Event
from typing import Any

from medembed.cache.failures import name_failures
from medembed.cache.index import committed_shards
from medembed.cache.metadata import is_free
from medembed.cache.pending import Plan, make_plan
from medembed.cache.shards import max_rows
from medembed.cache.store import Cache, open_cache
from medembed.core.errors import ManifestError, MedembedError
from medembed.core.locations import Location
from medembed.core.poolings import DEFAULT_POOLINGS
from medembed.core.ray_cluster import connected_to_ray
from medembed.dataset.manifest import Manifest, require_hashes
from medembed.encoders.loading import LOCAL_RANKS
from medembed.encoders.protocol import Encoder
from medembed.extraction.job import (
    COMMIT_SECONDS,
    ExtractionReport,
    check_plan,
    extract,
    prepare_cache,
    refuse_outdated,
)
from medembed.extraction.writer import STAGES
from medembed.images.intensity import DEFAULT_INTENSITY, Intensity
from medembed.images.load import DEFAULT_LIMITS, Limits

__all__ = ["Actors", "Job", "Work", "Worker", "extract_on_ray"]

MAX_RETRIES = 5  # of work whose actor died
PATIENCE_SECONDS = 60.0  # for stopped actors to commit their rows
COUNT_SECONDS = 10.0  # between two queries of how many actors the cluster has room for


@dataclass(frozen=True)
class Job:
    """The job of every actor; further arguments are those of `extract`.

    Parameters
    ----------
    load : callable
        Returns the encoder; called once by each actor.
    image_root, cache_path : Path or BucketPath
        Must be reachable by the same path from every node, as a bucket is.
    """

    load: Callable[[], Encoder]
    image_root: Location
    cache_path: Location
    poolings: tuple[str, ...] = DEFAULT_POOLINGS
    dtype: str = "float16"
    intensity: Intensity = DEFAULT_INTENSITY
    batch_size: int | None = None
    decoders: int | None = None
    retry_failed: bool = False
    commit_seconds: float = COMMIT_SECONDS
    limits: Limits = DEFAULT_LIMITS


class Worker:
    """The code of an actor. It runs one call at a time; only `stop` may run concurrently."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._encoder: Encoder | None = None
        self._stopped = Event()

    def ready(self) -> None:
        """Return once the actor has started."""

    def stop(self) -> None:
        """Make `embed` commit its rows and end."""
        self._stopped.set()

    def prepare(self, dry_run: bool) -> None:
        """Load the encoder; open the cache, or create it with its canary."""
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
        """Embed a partition; restarted after an actor's death, embed only the missing rows."""
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
        Number of contents to add to the progress.
    n_losses : int
        How many actors died during this call.
    """

    method: str
    arguments: tuple[Any, ...]
    n_contents: int = 0
    n_losses: int = 0


class _LostError(Exception):
    """An actor died."""


class Actors:
    """The actors, and the work of each.

    Parameters
    ----------
    ray : module
        Connected.
    job : Job
        The actors' job.
    needs : dict
        The resources of one actor: `num_cpus`, `num_gpus`.
    count : callable
        Returns how many actors the cluster currently has room for.
    """

    def __init__(self, ray: Any, job: Job, needs: dict[str, int], count: Callable[[], int]) -> None:
        self._ray, self._count = ray, count
        # Two threads: one for the work, and one kept free for `stop`.
        self._make = ray.remote(Worker).options(max_concurrency=2, max_restarts=0, **needs)
        self._job = ray.put(job)
        self._starting: dict[Any, tuple[Any, bool]] = {}  # `ready`'s answer: actor, is it new
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, Work]] = {}
        self._lost: deque[Work] = deque()
        self._n_failed_starts, self._counted = 0, float("-inf")

    def run(self, works: Iterator[Work], n_wanted: int) -> Iterator[tuple[Work, Any]]:
        """Run all work and yield each piece with its result, in the order of completion.

        Parameters
        ----------
        works : iterator of Work
            Taken from only when an actor is free, so that memory stays flat.
        n_wanted : int
            How many actors are useful.

        Yields
        ------
        Work, object
            The method's return value; a ManifestError that it raised is also yielded.

        Raises
        ------
        MedembedError
            A method raised it, or actors died repeatedly on one piece.
        """
        more, self._counted = True, float("-inf")
        while True:
            while self._idle and (self._lost or more):
                work = self._lost.popleft() if self._lost else next(works, None)
                if work is None:
                    more = False
                else:
                    self._assign(work)
            if not (more or self._lost or self._busy):
                return
            self._start_missing(n_wanted if more else len(self._busy) + len(self._lost))
            yield from self._wait()

    def __enter__(self) -> "Actors":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """End all actors; after an exception, including Ctrl-C, they first commit their rows."""
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

    def _assign(self, work: Work) -> None:
        actor = self._idle.pop()
        self._busy[getattr(actor, work.method).remote(*work.arguments)] = (actor, work)

    def _start_missing(self, n_useful: int) -> None:
        """Start as many actors as are useful and fit; always wait for at least one."""
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
        # A node may have died together with its idle actors: work waits until an actor answers.
        idle, self._idle = self._idle, []
        for other in idle:
            self._greet(other, is_new=False)

    def _dismiss(self, actor: Any) -> None:
        self._ray.kill(actor)  # an unreachable actor must not keep running beside its successor
        self._counted = float("-inf")

    @staticmethod
    def _died(n_times: int, lost: _LostError) -> MedembedError:
        return MedembedError(
            f"a task on Ray was lost {n_times} times ({lost}): its workers died, out of memory "
            "perhaps. Rows committed so far are kept; run the command again."
        )

    def _result(self, answer: Any) -> Any:
        """Return a method's return value, or raise its exception."""
        ray = self._ray
        try:
            return ray.get(answer)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MedembedError):
                raise error.cause from None
            raise MedembedError(f"a task on Ray failed: {error.cause!r}") from error
        except ray.exceptions.RayError as error:
            raise _LostError(type(error).__name__) from error


PARTS_PER_WORKER = 4  # so that the last ones to finish are small
MIN_PART = 64  # rows: below, starting costs more than embedding
MAX_CORES = 4  # of a worker without a GPU; of one with a GPU, its share of the cluster's


def extract_on_ray(
    manifest: Manifest,
    job: Job,
    *,
    device: str = "auto",
    partition_rows: int | None = None,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
    on_status: Callable[[str], None] | None = None,
) -> ExtractionReport:
    """Embed the images of a manifest that the cache does not hold yet, by workers on Ray.

    Uses the Ray that this process is connected to, else the cluster at `RAY_ADDRESS`, else starts
    one on this machine and ends it afterwards.

    Parameters
    ----------
    manifest : Manifest
        Names the images and their SHA-256.
    job : Job
        How to embed them.
    device : {"auto", "cpu", "cuda", "mps"}
        A worker takes one GPU if this is "cuda", or "auto" and Ray has GPUs; otherwise cores,
        `job.decoders` of them, or up to 4.
    partition_rows : int, optional
        Contents in a partition; by default a quarter of a worker's share, at most a full shard.
    dry_run : bool
        Only report what would be done.
    progress, on_status : callable, optional
        See `extract`; contents are counted when their partition is done.

    Returns
    -------
    ExtractionReport
        Times in `stages` are summed over all workers.

    Raises
    ------
    MedembedError
        Ray is not installed or cannot be reached, a partition's workers died repeatedly, or
        anything that `extract` raises. Committed rows stay.
    """
    start = time.monotonic()
    require_hashes(manifest)
    on_status = on_status or (lambda words: None)
    with connected_to_ray("--engine ray", on_status) as ray:
        needs = _needs(ray, device, job.decoders)
        job = replace(job, decoders=job.decoders or needs["num_cpus"])
        actors = Actors(ray, job, needs, partial(_count_workers, ray, needs))
        with actors:
            on_status("Encoder")
            list(actors.run(iter([Work("prepare", (dry_run,))]), 1))
            cache = None if dry_run and is_free(job.cache_path) else open_cache(job.cache_path)
            plan = make_plan(manifest.rows, cache, retry_failed=job.retry_failed)
            reports: list[ExtractionReport] = []
            if plan.pending and not dry_run and cache is not None:
                check_plan(plan, cache.spec, job.image_root, job.cache_path)
                size = partition_rows or _part_rows(
                    len(plan.pending), _count_workers(ray, needs), max_rows(cache.spec)
                )
                on_status("Embedding")
                reports = _embed(actors, ray, cache, manifest, plan, size, progress)
        if not dry_run:
            refuse_outdated(plan, cache, job.image_root, job.intensity, job.decoders, on_status)
        return _report(plan, reports, needs["num_cpus"] if reports else 0, start)


def _embed(
    actors: Actors,
    ray: Any,
    cache: Cache,
    manifest: Manifest,
    plan: Plan,
    size: int,
    progress: Callable[[int, int], None] | None,
) -> list[ExtractionReport]:
    """Embed the missing rows; images with other bytes raise an error only at the very end."""
    # Shards that the plan has searched need not be read again for every partition.
    known = ray.put(frozenset(path.name for path in committed_shards(cache.path / "shards")))
    works = (
        Work("embed", (part, known), part.rows["sha256"].nunique())
        for part in _partitions(manifest, plan, size)
    )
    reports: list[ExtractionReport] = []
    problems: list[str] = []
    n_done = 0
    for work, outcome in actors.run(works, ceil(len(plan.pending) / size)):
        if isinstance(outcome, ManifestError):
            problems += outcome.problems
        else:
            reports.append(outcome)
        n_done += work.n_contents
        if progress:
            progress(n_done, len(plan.pending))
    if problems:
        raise ManifestError(
            "images that hold other bytes than the manifest says were not embedded; all others "
            "were, and are kept. Restore these files, or build the manifest again:",
            problems,
        )
    return reports


def _partitions(manifest: Manifest, plan: Plan, size: int) -> Iterator[Manifest]:
    """Yield manifests of `size` missing contents each, with all their image names."""
    for start in range(0, len(plan.pending), size):
        rows = manifest.rows.iloc[plan.pending[start : start + size].rows()]
        yield Manifest(rows.reset_index(drop=True), manifest.label_level)


def _needs(ray: Any, device: str, decoders: int | None) -> dict[str, int]:
    """Return the resources of one worker."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = [int(node.get("CPU", 0)) for node in nodes]
    shares = [int(n.get("CPU", 0)) // int(n["GPU"]) for n in nodes if n.get("GPU", 0) >= 1]
    if device == "cuda" and not shares:
        raise MedembedError("--device cuda: this Ray has no GPU. Add a node with one, or drop it.")
    if shares and device in ("auto", "cuda"):  # never more than a node has: it would wait for ever
        return {"num_cpus": max(1, min(decoders or min(shares), max(shares))), "num_gpus": 1}
    return {"num_cpus": max(1, min(decoders or MAX_CORES, max(cores))), "num_gpus": 0}


def _count_workers(ray: Any, needs: dict[str, int]) -> int:
    total = ray.cluster_resources()
    by_cores = int(total.get("CPU", 1)) // needs["num_cpus"]
    return max(1, min(by_cores, int(total.get("GPU", 0))) if needs["num_gpus"] else by_cores)


def _part_rows(n_contents: int, n_workers: int, most: int) -> int:
    return min(most, max(MIN_PART, ceil(n_contents / (PARTS_PER_WORKER * n_workers))))


def _report(
    plan: Plan, reports: Sequence[ExtractionReport], n_decoders: int, start: float
) -> ExtractionReport:
    seconds = time.monotonic() - start
    failures = [failure for report in reports for failure in report.failures]
    known = [named for content, f in plan.known for named in name_failures(content.images, f)]
    n_failed = sum(report.failed for report in reports)
    # A restarted partition finds some of its rows in the cache; they are new in this run, too.
    n_done = len(plan.pending) - n_failed if reports else 0
    return ExtractionReport(
        requested=plan.n_rows,
        already=plan.n_already,
        embedded=n_done if reports else len(plan.pending),
        failed=len(plan.known) + n_failed,
        duplicates=plan.n_rows - plan.n_contents,
        colour=sum(report.colour for report in reports),
        notes=_summed_notes(reports),
        failures=[*known, *failures],
        seconds=seconds,
        images_per_second=n_done / seconds if seconds > 0 else 0.0,
        batch_size=max((report.batch_size for report in reports), default=0),
        decoders=n_decoders,
        stages=_summed(reports),
        canary=max((r.canary for r in reports if r.canary is not None), default=None),
    )


def _summed_notes(reports: Sequence[ExtractionReport]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for report in reports:
        total.update(report.notes)
    return dict(sorted(total.items()))


def _summed(reports: Sequence[ExtractionReport]) -> dict[str, float]:
    return {name: sum(report.stages[name] for report in reports) for name in STAGES}
