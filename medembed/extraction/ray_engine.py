"""Stage 1 on Ray: the same extraction as many small tasks, retried when a worker or node dies.

The driver plans; each task embeds one partition of the missing rows straight into the shared cache.
Nothing but counts and failures comes back. Ray is an extra: `pip install 'medembed[ray]'`.
"""

import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from medembed.cache.failures import name_failures
from medembed.cache.listing import committed_shards
from medembed.cache.plan import Plan, make_plan
from medembed.cache.shards import max_rows
from medembed.cache.store import Cache, open_cache
from medembed.clusters import connected_to_ray
from medembed.dataset.intensity import DEFAULT_INTENSITY, Intensity
from medembed.dataset.manifest import Manifest, require_hashes
from medembed.dataset.reading import DEFAULT_LIMITS, Limits
from medembed.encoders.loading import LOCAL_RANKS
from medembed.encoders.protocol import Encoder
from medembed.errors import ManifestError, MedembedError
from medembed.extraction.job import (
    COMMIT_SECONDS,
    ExtractionReport,
    check_plan,
    extract,
    prepare_cache,
)
from medembed.extraction.outdated import refuse_outdated
from medembed.extraction.timeline import STAGES

__all__ = ["MAX_RETRIES", "Job", "extract_on_ray"]

MAX_RETRIES = 5  # of a partition whose worker or node died
PARTS_PER_WORKER = 4  # so that the last ones to finish are small
MIN_PART = 64  # rows: below, starting costs more than embedding
MAX_CORES = 4  # of a task without a GPU; of one with a GPU, its share of the cluster's
PATIENCE_SECONDS = 60.0  # in which tasks that are cancelled commit what they have

_encoders: dict[str, Encoder] = {}  # of this worker process: loaded once, not once per partition


@dataclass(frozen=True)
class Job:
    """Say what every task is to do; the arguments are those of `extract`.

    Parameters
    ----------
    load : callable
        Returns the encoder; called in each worker process, once.
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
    name: str = ""

    def encoder(self) -> Encoder:
        """Return the encoder, loaded if this process has not done so for this job."""
        if self.name not in _encoders:
            for variable in LOCAL_RANKS:  # Ray has given the task its GPU
                os.environ.pop(variable, None)
            _encoders.clear()
            _encoders[self.name] = self.load()
        return _encoders[self.name]


def extract_on_ray(
    manifest: Manifest,
    job: Job,
    *,
    device: str = "auto",
    partition_rows: int | None = None,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> ExtractionReport:
    """Embed the images of a manifest that the cache does not hold yet, as tasks on Ray.

    Uses the Ray that this process is connected to, else the cluster at `RAY_ADDRESS`, else starts
    one on this machine and ends it afterwards.

    Parameters
    ----------
    manifest : Manifest
        Names the images and their SHA-256.
    job : Job
        What to do with them.
    device : {"auto", "cpu", "cuda", "mps"}
        A task takes one GPU where this is cuda, or auto and Ray has GPUs; else cores, as many as
        `job.decoders`, or up to 4.
    partition_rows : int, optional
        Contents in a task; by default a quarter of a worker's share, at most a full shard.
    dry_run : bool
        Only say what there is to do.
    progress, tell : callable, optional
        As for `extract`; contents count when their partition is done.

    Returns
    -------
    ExtractionReport
        Times in `stages` are summed over all tasks.

    Raises
    ------
    MedembedError
        Ray is not installed or not to be reached, a partition's workers died again and again, or
        whatever `extract` raises. What was committed stays.
    """
    start = time.monotonic()
    require_hashes(manifest)
    with connected_to_ray("--engine ray", tell) as ray:
        needs = _needs(ray, device, job.decoders)
        job = replace(job, name=secrets.token_hex(8), decoders=job.decoders or needs["num_cpus"])
        say = tell or (lambda words: None)
        say("Encoder")
        _get(ray, _remote(ray, _prepare, needs).remote(job, dry_run))
        cache = None if dry_run and not job.cache_path.exists() else open_cache(job.cache_path)
        plan = make_plan(manifest.rows, cache, retry_failed=job.retry_failed)
        if dry_run or not plan.pending or cache is None:
            if not dry_run:
                refuse_outdated(plan, cache, job.image_root, job.intensity, job.decoders, say)
            return _report(plan, [], 0, start)
        check_plan(plan, cache.spec, job.image_root, job.cache_path)
        n_workers = _count_workers(ray, needs)
        size = partition_rows or _part_rows(len(plan.pending), n_workers, max_rows(cache.spec))
        say("Embedding")
        tasks = _Tasks(ray, _remote(ray, _embed, needs), job, cache, progress)
        reports = tasks.run(_partitions(manifest, plan, size), len(plan.pending), n_workers)
        refuse_outdated(plan, cache, job.image_root, job.intensity, job.decoders, say)
        return _report(plan, reports, needs["num_cpus"], start)


def _prepare(job: Job, dry_run: bool) -> None:
    """Run as a task: load the encoder; open the cache, or make it with its canary."""
    prepare_cache(
        job.image_root,
        job.encoder(),
        job.cache_path,
        poolings=job.poolings,
        dtype=job.dtype,
        intensity=job.intensity,
        dry_run=dry_run,
    )


def _embed(part: Manifest, job: Job, known: Collection[str]) -> ExtractionReport:
    """Run as a task: embed a partition. Begun anew after a death, it does what is missing."""
    return extract(
        part,
        job.image_root,
        job.encoder(),
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
    )


class _Tasks:
    """The partitions under way: never more than twice the workers, so that memory stays flat."""

    def __init__(
        self,
        ray: Any,
        embed: Any,
        job: Job,
        cache: Cache,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._ray, self._embed, self._progress = ray, embed, progress
        # What the plan has looked through need not be read again by every task.
        known = frozenset(path.name for path in committed_shards(cache.path / "shards"))
        self._job, self._known = ray.put(job), ray.put(known)
        self._running: dict[Any, int] = {}
        self._others: list[ManifestError] = []

    def run(
        self, partitions: Iterator[Manifest], n_contents: int, n_workers: int
    ) -> list[ExtractionReport]:
        reports, n_done, more = [], 0, True
        try:
            while more or self._running:
                while more and len(self._running) < 2 * n_workers:
                    more = self._begin(partitions)
                report, n = self._finish()
                reports += [report] if report else []
                n_done += n
                if self._progress and n:
                    self._progress(n_done, n_contents)
        except BaseException:
            self._cancel()
            raise
        if self._others:
            raise ManifestError(
                "images that hold other bytes than the manifest says were not embedded; all others "
                "were, and are kept. Restore these files, or build the manifest again:",
                [problem for error in self._others for problem in error.problems],
            )
        return reports

    def _begin(self, partitions: Iterator[Manifest]) -> bool:
        part = next(partitions, None)
        if part is None:
            return False
        self._running[self._embed.remote(part, self._job, self._known)] = part.rows[
            "sha256"
        ].nunique()
        return True

    def _finish(self) -> tuple[ExtractionReport | None, int]:
        """Wait for one task; images with other bytes are an error, but only at the very end."""
        done, _ = self._ray.wait(list(self._running), timeout=1.0)
        if not done:
            return None, 0
        n = self._running.pop(done[0])
        try:
            report: ExtractionReport = _get(self._ray, done[0])
        except ManifestError as error:
            self._others.append(error)
            return None, n
        return report, n

    def _cancel(self) -> None:
        """Let the tasks commit what they have, as Ctrl-C does."""
        for task in self._running:
            self._ray.cancel(task)
        tasks = list(self._running)
        self._ray.wait(tasks, num_returns=len(tasks), timeout=PATIENCE_SECONDS)


def _partitions(manifest: Manifest, plan: Plan, size: int) -> Iterator[Manifest]:
    """Cut what is missing into manifests of `size` contents, under all their names."""
    for start in range(0, len(plan.pending), size):
        rows = manifest.rows.iloc[plan.pending[start : start + size].rows()]
        yield Manifest(rows.reset_index(drop=True), manifest.label_level)


def _needs(ray: Any, device: str, decoders: int | None) -> dict[str, int]:
    """Say what a task takes of a node."""
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


def _remote(ray: Any, function: Callable[..., Any], needs: dict[str, int]) -> Any:
    return ray.remote(function).options(max_retries=MAX_RETRIES, **needs)


def _get(ray: Any, task: Any) -> Any:
    """Return what a task returned, or raise what it raised."""
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MedembedError):
            raise error.cause from None
        raise MedembedError(f"a task on Ray failed: {error.cause!r}") from error
    except ray.exceptions.RayError as error:
        raise MedembedError(
            f"a task on Ray was lost {MAX_RETRIES + 1} times ({type(error).__name__}): its workers "
            "died, out of memory perhaps. Rows committed so far are kept; run the command again."
        ) from error


def _report(
    plan: Plan, reports: Sequence[ExtractionReport], n_decoders: int, start: float
) -> ExtractionReport:
    seconds = time.monotonic() - start
    failures = [failure for report in reports for failure in report.failures]
    known = [named for content, f in plan.known for named in name_failures(content.images, f)]
    n_failed = sum(report.failed for report in reports)
    # A partition that was begun twice has found some of its rows there: they are new all the same.
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
