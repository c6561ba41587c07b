"""Stage 1 on Ray: the same extraction by many workers, one per GPU, any of which may die.

The driver plans; each worker, an actor, embeds partitions of the missing rows straight into the
shared cache. Nothing but counts and failures comes back. Ray is an extra:
`pip install 'medembed[ray]'`.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import ceil
from typing import Any

from medembed.cache.failures import name_failures
from medembed.cache.listing import committed_shards
from medembed.cache.pending import Plan, make_plan
from medembed.cache.shards import max_rows
from medembed.cache.store import Cache, open_cache
from medembed.core.errors import ManifestError, MedembedError
from medembed.core.ray_cluster import connected_to_ray
from medembed.dataset.manifest import Manifest, require_hashes
from medembed.extraction.job import ExtractionReport, check_plan
from medembed.extraction.outdated import refuse_outdated
from medembed.extraction.profiling import STAGES
from medembed.extraction.ray_actors import Actors, Job, Work

__all__ = ["Job", "extract_on_ray"]

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
    tell: Callable[[str], None] | None = None,
) -> ExtractionReport:
    """Embed the images of a manifest that the cache does not hold yet, by workers on Ray.

    Uses the Ray that this process is connected to, else the cluster at `RAY_ADDRESS`, else starts
    one on this machine and ends it afterwards.

    Parameters
    ----------
    manifest : Manifest
        Names the images and their SHA-256.
    job : Job
        What to do with them.
    device : {"auto", "cpu", "cuda", "mps"}
        A worker takes one GPU where this is cuda, or auto and Ray has GPUs; else cores, as many as
        `job.decoders`, or up to 4.
    partition_rows : int, optional
        Contents in a partition; by default a quarter of a worker's share, at most a full shard.
    dry_run : bool
        Only say what there is to do.
    progress, tell : callable, optional
        As for `extract`; contents count when their partition is done.

    Returns
    -------
    ExtractionReport
        Times in `stages` are summed over all workers.

    Raises
    ------
    MedembedError
        Ray is not installed or not to be reached, a partition's workers died again and again, or
        whatever `extract` raises. What was committed stays.
    """
    start = time.monotonic()
    require_hashes(manifest)
    say = tell or (lambda words: None)
    with connected_to_ray("--engine ray", tell) as ray:
        needs = _needs(ray, device, job.decoders)
        job = replace(job, decoders=job.decoders or needs["num_cpus"])
        actors = Actors(ray, job, needs, partial(_count_workers, ray, needs))
        with actors:
            say("Encoder")
            list(actors.run(iter([Work("prepare", (dry_run,))]), 1))
            cache = None if dry_run and not job.cache_path.exists() else open_cache(job.cache_path)
            plan = make_plan(manifest.rows, cache, retry_failed=job.retry_failed)
            reports: list[ExtractionReport] = []
            if plan.pending and not dry_run and cache is not None:
                check_plan(plan, cache.spec, job.image_root, job.cache_path)
                size = partition_rows or _part_rows(
                    len(plan.pending), _count_workers(ray, needs), max_rows(cache.spec)
                )
                say("Embedding")
                reports = _embed(actors, ray, cache, manifest, plan, size, progress)
        if not dry_run:
            refuse_outdated(plan, cache, job.image_root, job.intensity, job.decoders, say)
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
    """Embed what is missing; images with other bytes are an error, but only at the very end."""
    # What the plan has looked through need not be read again for every partition.
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
    """Cut what is missing into manifests of `size` contents, under all their names."""
    for start in range(0, len(plan.pending), size):
        rows = manifest.rows.iloc[plan.pending[start : start + size].rows()]
        yield Manifest(rows.reset_index(drop=True), manifest.label_level)


def _needs(ray: Any, device: str, decoders: int | None) -> dict[str, int]:
    """Say what a worker takes of a node."""
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
