"""Stage 1, the whole job: plan, prepare, check the canary, embed the missing images, report.

New rows may join a cache of an older `images_version` if `Radiograph.since` shows that the older
version produced equal pixels.
Existing rows are checked against their files if these are available: most by their first bytes
alone, since the decoding of 8-bit grey PNGs and JPEGs has not changed; the rest are decoded again.
"""

import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from medembed.cache.failures import name_failures
from medembed.cache.metadata import is_free
from medembed.cache.pending import Plan, Worker, make_plan
from medembed.cache.spec import CacheSpec
from medembed.cache.store import Cache, create_cache, open_cache
from medembed.core.errors import (
    CacheError,
    DeviceMemoryError,
    EncoderError,
    MedembedError,
    SpecMismatchError,
    StorageError,
)
from medembed.core.files import open_plain
from medembed.core.locations import BucketPath, Location, as_location
from medembed.core.object_store import AHEAD, read_range
from medembed.core.poolings import (
    DEFAULT_POOLINGS,
    IMAGE_STATISTICS,
    block_of,
    expand_blocks,
    find_pooling,
    list_names,
    list_of_tower,
)
from medembed.core.system import (
    choose_processes,
    default_decoders,
    free_bytes,
    library_versions,
    total_memory,
)
from medembed.dataset.build_record import follow_build
from medembed.dataset.manifest import (
    Manifest,
    existing_source,
    image_path,
    read_manifest,
    require_hashes,
)
from medembed.encoders.preprocessing import Preprocessing
from medembed.encoders.protocol import Encoder, PipelinedEncoder
from medembed.extraction.canary import check_canary, compute_canary
from medembed.extraction.decode_pool import DECODER_BYTES, Decoders
from medembed.extraction.image_encoder import EncoderLike, find_tower
from medembed.extraction.image_store import refuse_empty_root
from medembed.extraction.pipeline import Pipeline, memory_error
from medembed.extraction.report import ExtractionReport, describe_execution, execution_of
from medembed.extraction.writer import STAGES, Timeline, WriterThread
from medembed.images.intensity import DEFAULT_INTENSITY, Intensity
from medembed.images.load import DEFAULT_LIMITS, Content, Limits, Reading
from medembed.images.streams import StreamRoot, is_stream, settle_stream
from medembed.images.versions import IMAGES_VERSION, may_have_changed, why_changed

__all__ = [
    "COMMIT_SECONDS",
    "ROOM",
    "ExtractionReport",
    "check_plan",
    "extract",
    "make_report",
    "prepare_cache",
    "refuse_outdated",
    "spec_of",
]

HEAD = 2048  # bytes: the header of nearly every PNG and JPEG
N_NAMED = 20
# As small as possible: the images are decoded only to learn whether decoding has changed.
_SMALL = Preprocessing(8, 8, "stretch", "nearest", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 1 / 255)


def _joining(
    pairs: Iterator[tuple[Content, Reading] | None], cache: Cache
) -> Iterator[tuple[Content, Reading] | None]:
    """Yield readings; those whose pixels cannot join the rows of this cache become failures."""
    for pair in pairs:
        if pair is None:
            yield None
        else:
            content, reading = pair
            yield content, reading.joining(cache.spec.images_version, "this cache", _WAY_OUT)


_WAY_OUT = "Extract into a new --cache"


def refuse_outdated(
    plan: Plan,
    cache: Cache | None,
    image_root: Location | StreamRoot,
    intensity: Intensity,
    n_decoders: int | None,
    on_status: Callable[[str], None],
) -> None:
    """Refuse a cache with rows whose files the current `images_version` decodes differently.

    Files that are missing or whose bytes have changed are skipped.

    Raises
    ------
    SpecMismatchError
        The cache holds such rows; the message lists them.
    """
    if cache is None or cache.spec.images_version == IMAGES_VERSION:
        return
    found = []
    for content, reading in _decoded_again(plan, image_root, intensity, n_decoders, on_status):
        reason = why_changed(reading.since, cache.spec.images_version, "its row")
        if reason and reading.stage:
            reason = f"is refused since images_version {reading.since} ({reading.reason})"
        if reason:
            found.append(f"{content.images[0]}: {reason}")
    if found:
        more = [f"and {len(found) - N_NAMED} more"] if len(found) > N_NAMED else []
        named = "".join(f"\n  - {line}" for line in [*found[:N_NAMED], *more])
        raise SpecMismatchError(
            f"{len(found)} row(s) of the cache at {cache.path} are not what their images are now; "
            "all others are, and those that were missing have been embedded. Extract into a new "
            f"--cache, or leave these images out of the manifest:{named}"
        )


def _decoded_again(
    plan: Plan,
    image_root: Location | StreamRoot,
    intensity: Intensity,
    n_decoders: int | None,
    on_status: Callable[[str], None],
) -> Iterator[tuple[Content, Reading]]:
    suspects = _find_suspects(plan.done, image_root)
    if not suspects:
        return
    on_status(f"Decoding {len(suspects):,} images of an older version again")
    n_processes = min(n_decoders or default_decoders(), len(suspects))
    with Decoders(n_processes, _SMALL, intensity) as readers:
        for pair in readers.read(suspects, image_root, 8 * n_processes):
            if pair is not None:
                yield pair


def _find_suspects(done: Sequence[Content], image_root: Location | StreamRoot) -> list[Content]:
    if is_stream(image_root):
        return []  # as files that are missing
    if not isinstance(image_root, BucketPath):
        return [content for content in done if _is_suspect(content, image_root)]
    with ThreadPoolExecutor(AHEAD) as pool:
        found = pool.map(lambda content: _is_suspect(content, image_root), done)
        return [content for content, is_suspect in zip(done, found, strict=True) if is_suspect]


def _is_suspect(content: Content, image_root: Location) -> bool:
    for image in content.images:
        try:
            head, size = _read_head(image_root, image)
        except StorageError:
            raise
        except OSError:
            continue
        return may_have_changed(head, size)
    return False


def _read_head(image_root: Location, image: str) -> tuple[bytes, int]:
    """Return an image's first bytes and its size."""
    if isinstance(image_root, BucketPath):
        return read_range(image_path(image_root, image), 0, HEAD)
    with open_plain(image_path(image_root, image)) as file:
        return file.read(HEAD), file.seek(0, 2)


COMMIT_SECONDS = 60.0  # of work that a crash may lose
PLAIN_BATCH = 32  # for an encoder that does not report what its device holds
ROOM = 1.1  # times the rows' bytes, for chunks, headers and other uses of the disk


def extract(
    manifest: Manifest | str | os.PathLike[str],
    image_root: str | os.PathLike[str],
    encoder: EncoderLike,
    cache: Cache | str | os.PathLike[str],
    *,
    poolings: str | Sequence[str] = DEFAULT_POOLINGS,
    dtype: str = "float16",
    intensity: Intensity = DEFAULT_INTENSITY,
    batch_size: int | None = None,
    decoders: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
    retry_failed: bool = False,
    worker: Worker | None = None,
    known_shards: Collection[str] = (),
    dry_run: bool = False,
    commit_seconds: float = COMMIT_SECONDS,
    progress: Callable[[int, int], None] | None = None,
    on_status: Callable[[str], None] | None = None,
    announce: Callable[[str], None] | None = None,
    timeline: Timeline | None = None,
) -> ExtractionReport:
    """Embed the images of a manifest that the cache does not hold yet.

    Processes read, hash, decode and resize a bounded number of images ahead of the encoder, so
    memory use stays constant.

    Parameters
    ----------
    manifest : Manifest or path
        Names the images and their SHA-256.
    image_root : path
        Directory that the manifest's image paths are relative to, a bucket's prefix such as
        `s3://bucket/images`, or a stream: tar files such as `tar://shards`, or a dataset of the
        hub, `hf://datasets/owner/name`, at the commit that the manifest was built from. Streams
        are read once in their order; images are then found by their hash.
    encoder : Encoder, str or path
        The encoder, or a reference that `load_encoder` accepts.
    cache : Cache or path
        A directory or a bucket's prefix; created if it does not exist.
    poolings : str or sequence of str
        Which of the encoder's poolings to store; `mean@all` stands for `mean@K` of every block,
        and `imagestats` for the numbers of `images.statistics`, which no encoder computes.
    dtype : {"float16", "float32"}
        Dtype of the stored embeddings.
    intensity : Intensity
        Which window of a DICOM to use; part of the cache's spec unless it is the default.
    batch_size : int, optional
        Images per call of the encoder; by default as many as its device holds.
    decoders : int, optional
        Processes that read and decode; by default one per core of this process's share, but no
        more than a device can consume; see `core.system.default_decoders`.
    limits : Limits
        Limits on size and time beyond which an image counts as failed.
    retry_failed : bool
        Retry images that are known not to decode or embed. Images that could not be read are
        always retried.
    worker : Worker, optional
        Process only this worker's share of the contents; any number of workers may add to one
        cache at once. Counts refer to the share.
    known_shards : collection of str
        Names of shards that are known to hold no image of the manifest and need not be read.
    dry_run : bool
        Only report what would be done; write nothing.
    commit_seconds : float
        Longest time that a row waits for its commit, apart from the running batch.
    progress : callable, optional
        Called as progress(done, total) with distinct contents of this run.
    on_status : callable, optional
        Called with a word or two when a step other than embedding takes a while.
    announce : callable, optional
        Called once, before the first image, with a sentence that names the encoder, device, card,
        precision, batch size, attention kernel, and whether the tower is compiled.
    timeline : Timeline, optional
        Records where the time goes.

    Returns
    -------
    ExtractionReport

    Raises
    ------
    PathNotFoundError
        The image root, or every image below it, is missing.
    ManifestError
        The manifest holds no SHA-256s; or, after all other images were embedded and committed,
        files whose bytes differ from the manifest's.
    EncoderError
        The encoder lacks a pooling, or fails on a whole batch.
    CacheError
        The cache has another spec, this run embeds the canary images differently, or, after all
        other images were embedded, the cache holds rows of an older `images_version` whose files
        are now decoded differently (`SpecMismatchError`); the cache cannot be written, or a value
        does not fit its dtype.

    Notes
    -----
    On any exception, including Ctrl-C, rows embedded so far are committed before it propagates.
    """
    timeline = timeline or Timeline()
    on_status = on_status or (lambda words: None)
    poolings = poolings.split(",") if isinstance(poolings, str) else poolings
    root, path = existing_source(image_root, pinned=False), manifest
    manifest = read_manifest(manifest)
    root = follow_build(root, path, manifest, on_status)
    root = settle_stream(root) if is_stream(root) else root
    encoder = find_tower(encoder, poolings=poolings)
    poolings = expand_blocks(poolings, encoder.dimensions)
    start = time.monotonic()
    cache_path = (
        cache.path if isinstance(cache, Cache) else as_location(cache, "a cache", "a Cache")
    )
    n_decoders = _check_request(encoder, poolings, batch_size, decoders)
    require_hashes(manifest)
    spec, recorded = spec_of(encoder, poolings, dtype, intensity), _record(encoder, poolings)
    there = _open_if_there(cache_path, spec, recorded, known_shards)
    plan = make_plan(manifest.rows, there, retry_failed=retry_failed, worker=worker)
    if dry_run:
        return make_report(plan, None, 0, None, start, timeline)
    if not plan.pending:
        refuse_outdated(plan, there, root, intensity, decoders, on_status)
        return make_report(plan, None, 0, None, start, timeline)
    check_plan(plan, spec, root, cache_path)
    n_decoders = min(n_decoders, len(plan.pending))
    # The decoders are the outermost context: Ctrl-C commits first and ends them afterwards.
    measures = IMAGE_STATISTICS in poolings
    with Decoders(
        n_decoders, encoder.preprocessing, intensity, limits, measures=measures
    ) as readers:
        size = _warm_up(encoder, poolings, len(plan.pending), batch_size, on_status)
        on_status("Canary")
        opened = _open_or_make(encoder, spec, recorded, cache_path, known_shards)
        size, distance = _prove(opened, encoder, recorded, size)
        execution = execution_of(encoder)
        if announce is not None:
            announce(describe_execution(encoder.source, execution, size))
        on_status("Embedding")
        timeline.add("prepare", start, time.monotonic())
        pipeline = Pipeline(encoder, poolings, size, len(plan.pending), timeline, progress)
        with WriterThread(opened, commit_seconds, timeline) as writer:
            pairs = readers.read(plan.pending, root, 2 * size + n_decoders)
            pipeline.run(_joining(pairs, opened), writer)
    pipeline.refuse_other_bytes()
    refuse_outdated(plan, opened, root, intensity, decoders, on_status)
    report = make_report(plan, pipeline, n_decoders, distance, start, timeline)
    return replace(report, execution=execution)


def prepare_cache(
    image_root: Location | StreamRoot,
    encoder: Encoder,
    cache_path: Location,
    *,
    poolings: Sequence[str] = DEFAULT_POOLINGS,
    dtype: str = "float16",
    intensity: Intensity = DEFAULT_INTENSITY,
    dry_run: bool = False,
) -> None:
    """Check the request and open or create the cache, as `extract` does before planning.

    Arguments and exceptions are those of `extract`. A dry run creates nothing.
    """
    poolings = expand_blocks(poolings, encoder.dimensions)
    existing_source(image_root)
    _check_request(encoder, poolings, None, None)
    spec, recorded = spec_of(encoder, poolings, dtype, intensity), _record(encoder, poolings)
    if _open_if_there(cache_path, spec, recorded) is None and not dry_run:
        _open_or_make(encoder, spec, recorded, cache_path)


def check_plan(
    plan: Plan, spec: CacheSpec, image_root: Location | StreamRoot, cache_path: Location
) -> None:
    """Check, before any work, that at least one image exists and that the disk can hold the rows.

    Raises
    ------
    PathNotFoundError
        Every image below the root is missing.
    CacheError
        The disk is too full.
    """
    images = (image for content in plan.pending for image in content.images)
    if not is_stream(image_root):
        refuse_empty_root(image_root, images, len(plan.pending), "to embed")
    if not isinstance(cache_path, BucketPath):
        _refuse_full_disk(plan, spec, cache_path)


def spec_of(
    encoder: Encoder,
    poolings: Sequence[str],
    dtype: str = "float16",
    intensity: Intensity = DEFAULT_INTENSITY,
) -> CacheSpec:
    """Return the spec of a cache of this encoder's rows."""
    return CacheSpec(
        encoder=encoder.fingerprint,
        preprocessing={
            **encoder.preprocessing.as_dict(),
            "images_version": IMAGES_VERSION,
            "window": intensity.as_spec(),
        },
        poolings={name: _shape_of(name, encoder) for name in poolings},
        dtype=dtype,
    )


def _shape_of(pooling: str, encoder: Encoder) -> tuple[int, ...]:
    entry = find_pooling(pooling)
    return entry.shape(0) if entry.is_of_file else tuple(encoder.dimensions[pooling])


def _warm_up(
    encoder: Encoder,
    poolings: Sequence[str],
    n_images: int,
    batch_size: int | None,
    on_status: Callable[[str], None] | None,
) -> int:
    if isinstance(encoder, PipelinedEncoder):
        return encoder.warm_up(
            list_of_tower(poolings), n_images=n_images, batch_size=batch_size, on_status=on_status
        )
    return batch_size or PLAIN_BATCH


def _open_or_make(
    encoder: Encoder,
    spec: CacheSpec,
    recorded: dict[str, Any],
    cache_path: Location,
    known_shards: Collection[str] = (),
) -> Cache:
    """Open the cache, or create it with the canary that every later run is checked against."""
    laid = None
    if is_free(cache_path):
        reference = encoder.reference() if isinstance(encoder, PipelinedEncoder) else encoder
        laid = compute_canary(reference, list_of_tower(spec.poolings), spec)
    return create_cache(cache_path, spec, recorded, laid, known=known_shards)


def _prove(
    cache: Cache, encoder: Encoder, recorded: dict[str, Any], batch_size: int
) -> tuple[int, float | None]:
    """Check this run's canaries; return the batch size that fits the device, and their distance."""
    if cache.canary is None:
        return batch_size, None
    while True:
        try:
            return batch_size, check_canary(
                cache.canary,
                encoder,
                list_of_tower(cache.spec.poolings),
                batch_size=batch_size,
                there=cache.recorded,
                here=recorded,
                cache_path=cache.path,
            )
        except DeviceMemoryError as error:
            if batch_size == 1:
                raise memory_error(encoder, error) from error
            batch_size //= 2


def _check_request(
    encoder: Encoder,
    poolings: Sequence[str],
    batch_size: int | None,
    decoders: int | None,
) -> int:
    """Refuse an impossible request; return the number of decoders."""
    for name, number in (("batch_size", batch_size), ("decoders", decoders)):
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1")
    n_decoders = choose_processes(
        decoders, "--decoders", DECODER_BYTES, MedembedError, default=default_decoders()
    )
    _check_batch_size(encoder, batch_size)
    of_tower = list_of_tower(poolings)
    if not of_tower:
        raise EncoderError(
            f"{IMAGE_STATISTICS} is measured on the film, without the encoder. Name one of its "
            f"poolings too: --pool mean,{IMAGE_STATISTICS}."
        )
    for name in of_tower:
        if name not in encoder.dimensions:
            offered = list_names(encoder.dimensions)
            raise EncoderError(
                f"encoder {encoder.source} has no pooling {name!r}; choose among {offered}"
            )
    return n_decoders


def _check_batch_size(encoder: Encoder, batch_size: int | None) -> None:
    """Refuse batches whose images alone, three channels in fp32, exceed the machine's memory."""
    size = encoder.preprocessing
    n_bytes, memory = size.height * size.width * 3 * 4, total_memory()
    most = max(1, memory // n_bytes)
    if batch_size is not None and batch_size > most:
        raise EncoderError(
            f"--batch-size {batch_size}: images of {size.height} x {size.width} pixels take "
            f"{n_bytes / 1e6:,.1f} MB each, so at most {most} fit into {memory / 1e9:,.1f} GB of "
            "memory. Give fewer, or leave it out."
        )


def _open_if_there(
    path: Location,
    spec: CacheSpec,
    recorded: dict[str, Any],
    known_shards: Collection[str] = (),
) -> Cache | None:
    if is_free(path):
        return None
    cache = open_cache(path, known=known_shards)
    cache.require_spec(spec, recorded)
    return cache


def _refuse_full_disk(plan: Plan, spec: CacheSpec, path: Path) -> None:
    needed = int(ROOM * spec.row_bytes() * len(plan.pending))
    free = free_bytes(path)
    if free < needed:
        raise CacheError(
            f"cache at {path} would grow by {needed / 1e6:,.1f} MB for {len(plan.pending):,} "
            f"images, and its disk has {free / 1e6:,.1f} MB free. Free some, choose another "
            "--cache, or store fewer poolings."
        )


def make_report(
    plan: Plan,
    pipeline: Pipeline | None,
    n_decoders: int,
    distance: float | None,
    start: float,
    timeline: Timeline,
) -> ExtractionReport:
    """Return the report of a plan, and of the pipeline that carried it out, if any did."""
    failed = plan.known + (pipeline.failed if pipeline else [])
    seconds = time.monotonic() - start
    n_done = pipeline.n_embedded if pipeline else 0
    return ExtractionReport(
        requested=plan.n_rows,
        already=plan.n_already,
        embedded=n_done if pipeline else len(plan.pending),
        failed=len(failed),
        duplicates=plan.n_rows - plan.n_contents,
        colour=pipeline.n_colour if pipeline else 0,
        notes=dict(sorted(pipeline.notes.items())) if pipeline else {},
        failures=[named for content, f in failed for named in name_failures(content.images, f)],
        seconds=seconds,
        images_per_second=n_done / seconds if seconds > 0 else 0.0,
        batch_size=pipeline.batch_size if pipeline else 0,
        decoders=n_decoders if pipeline else 0,
        stages={stage: round(timeline.seconds[stage], 6) for stage in STAGES},
        canary=distance,
    )


def _record(encoder: Encoder, poolings: Sequence[str]) -> dict[str, Any]:
    """Return what a cache notes of its first run; of blocks only where their output is stored."""
    blocks = [at[1] for name in encoder.dimensions if (at := block_of(name)) is not None]
    is_told = any(block_of(name) is not None for name in poolings)
    return {
        "source": encoder.source,
        "revision": encoder.revision,
        "precision": encoder.precision,
        "device": encoder.device,
        "versions": library_versions("extraction", *getattr(encoder, "libraries", ())),
        **({"blocks": max(blocks)} if is_told else {}),
    }
