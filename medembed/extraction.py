"""Stage 1: the images of a manifest become rows of a cache, each content once.

Threads read, hash, decode and resize ahead of the encoder, never more than a fixed number of
images, so memory stays flat. The encoder sees batches of one fixed shape, so on a CPU in fp32 a
row does not depend on its neighbours, and a resumed cache equals an uninterrupted one.
"""

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from medembed.cache.failures import Failure
from medembed.cache.spec import CacheSpec, keys_from_hex
from medembed.cache.store import Cache, create_cache
from medembed.cache.writer import RowWriter
from medembed.dataset.images import IMAGES_VERSION, decode_image
from medembed.dataset.manifest import Manifest, image_path
from medembed.encoders.preprocessing import Preprocessing, prepare
from medembed.encoders.protocol import Encoder
from medembed.errors import EncoderError, ImageError, ManifestError, PathNotFoundError

__all__ = ["COMMIT_SECONDS", "ExtractionReport", "extract", "spec_of"]

COMMIT_SECONDS = 60.0  # what a crash may lose
LIBRARIES = ("medembed", "numpy", "pillow", "torch", "transformers")
# Pixels in a batch: on a GPU 32 images of 896 × 896; on a CPU 2, because there each takes up to
# half a minute and no commit can fall inside a batch.
BATCH_PIXELS = {"cpu": 2 * 896 * 896, "other": 32 * 896 * 896}
MAX_BATCH = {"cpu": 32, "other": 256}


@dataclass(frozen=True)
class ExtractionReport:
    """Count what became of a manifest's rows.

    Always requested = already + embedded + failed + pending + duplicates.

    Parameters
    ----------
    requested : int
        Rows of the manifest.
    already, embedded, failed : int
        Distinct contents that were in the cache before, were added, could not become a row.
    pending : int
        Distinct contents that a dry run would embed; otherwise 0.
    duplicates : int
        Rows whose content another row has too.
    colour : int
        Embedded images whose colour was reduced to luminance.
    failures : list of dict
        `image`, `sha256`, `stage`, `reason` of each failed content, by its first image.
    seconds : float
        From start to end, without loading the encoder.
    images_per_second : float
        `embedded` by `seconds`.
    """

    requested: int
    already: int
    embedded: int
    failed: int
    pending: int
    duplicates: int
    colour: int
    failures: list[dict[str, str]]
    seconds: float
    images_per_second: float

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as JSON-able values."""
        return asdict(self)


def extract(
    manifest: Manifest,
    image_root: str | os.PathLike[str],
    encoder: Encoder,
    cache_path: str | os.PathLike[str],
    *,
    poolings: Sequence[str] = ("mean", "max"),
    dtype: str = "float16",
    batch_size: int | None = None,
    decoders: int | None = None,
    retry_failed: bool = False,
    dry_run: bool = False,
    commit_seconds: float = COMMIT_SECONDS,
    progress: Callable[[int, int], None] | None = None,
) -> ExtractionReport:
    """Embed the images of a manifest that the cache does not hold yet.

    Parameters
    ----------
    manifest : Manifest
        Names the images and their SHA-256.
    image_root : path
        Directory that the manifest's image paths are relative to.
    encoder : Encoder
        What embeds them.
    cache_path : path
        Made if it is not there.
    poolings : sequence of str
        Which of the encoder's poolings to store.
    dtype : {"float16", "float32"}
        How to store them.
    batch_size : int, optional
        Images per call of the encoder; by default from its input size and device.
    decoders : int, optional
        Threads that read and decode; by default one per core.
    retry_failed : bool
        Try images again that are known not to decode or embed. Those that could not be read
        are always tried again.
    dry_run : bool
        Only say what there is to do; touches nothing.
    commit_seconds : float
        The oldest row waits no longer than this, or the running batch, for its commit.
    progress : callable, optional
        Called as progress(done, total) with distinct contents of this run.

    Returns
    -------
    ExtractionReport

    Raises
    ------
    PathNotFoundError
        The image root, or every image below it, is missing.
    ManifestError
        The manifest holds no SHA-256s; or, after all other images were embedded and committed,
        files whose bytes are not the manifest's.
    EncoderError
        A pooling is not on offer, or the encoder fails on a whole batch.
    CacheError
        The cache is of another spec (`SpecMismatchError`), cannot be written, or a value does
        not fit its dtype.

    Notes
    -----
    On any exception, Ctrl-C included, rows embedded so far are committed before it goes on.
    """
    start = time.monotonic()
    root = _check_request(manifest, Path(image_root), encoder, poolings)
    spec = spec_of(encoder, poolings, dtype)
    if dry_run and not Path(cache_path).exists():
        cache = None
    else:
        cache = create_cache(cache_path, spec, _record(encoder))
    plan = _make_plan(manifest, cache, retry_failed=retry_failed)
    tally = _Tally(total=len(plan.pending), progress=progress)
    if cache is not None and plan.pending and not dry_run:
        _refuse_empty_root(plan, root)
        size = batch_size or _default_batch_size(encoder)
        n_decoders = decoders or _count_cores()
        with ThreadPoolExecutor(n_decoders, "decode") as pool:
            # Inside the pool: Ctrl-C commits first and waits for the decoders afterwards.
            with RowWriter(cache, commit_seconds) as writer:
                ahead = _read_ahead(pool, plan.pending, root, encoder, 2 * size + n_decoders)
                _embed_all(ahead, encoder, tuple(poolings), size, writer, tally)
        _refuse_other_bytes(tally.other_bytes)
    return _report(plan, tally, time.monotonic() - start, dry_run=dry_run)


def spec_of(encoder: Encoder, poolings: Sequence[str], dtype: str = "float16") -> CacheSpec:
    """Say what rows of this encoder share: the spec of their cache."""
    return CacheSpec(
        encoder=encoder.fingerprint,
        preprocessing={
            **encoder.preprocessing.as_dict(),
            "images_version": IMAGES_VERSION,
            "window": None,
        },
        poolings={name: tuple(encoder.dimensions[name]) for name in poolings},
        dtype=dtype,
    )


@dataclass(frozen=True)
class _Content:
    """One file's bytes, and the images of the manifest that have them."""

    sha256: str
    images: tuple[str, ...]


@dataclass(frozen=True)
class _Prepared:
    """What reading made of a content: pixels, or why there are none."""

    content: _Content
    pixels: np.ndarray | None = None
    colour: bool = False
    failure: Failure | None = None
    other_sha256: str | None = None


@dataclass(frozen=True)
class _Plan:
    n_rows: int
    n_contents: int
    n_already: int
    pending: list[_Content]
    known: list[tuple[_Content, Failure]]


@dataclass
class _Tally:
    total: int
    progress: Callable[[int, int], None] | None
    embedded: int = 0
    colour: int = 0
    failed: list[tuple[_Content, Failure]] = field(default_factory=list)
    other_bytes: list[_Prepared] = field(default_factory=list)

    def tell(self) -> None:
        if self.progress:
            done = self.embedded + len(self.failed) + len(self.other_bytes)
            self.progress(done, self.total)


def _check_request(
    manifest: Manifest, root: Path, encoder: Encoder, poolings: Sequence[str]
) -> Path:
    if not root.is_dir():
        raise PathNotFoundError(f"image root {root} is not a directory: give --image-root DIR")
    n_empty = int((manifest.rows["sha256"] == "").sum())
    if n_empty:
        raise ManifestError(
            f"{n_empty} manifest rows have no sha256, so their images cannot be told from others. "
            "Build the manifest again without --structure-only."
        )
    for name in poolings:
        if name not in encoder.dimensions:
            offered = ", ".join(encoder.dimensions)
            raise EncoderError(
                f"encoder {encoder.source} has no pooling {name!r}; choose among {offered}"
            )
    return root


def _make_plan(manifest: Manifest, cache: Cache | None, *, retry_failed: bool) -> _Plan:
    images: dict[str, list[str]] = {}
    for image, sha256 in zip(manifest.rows["image"], manifest.rows["sha256"], strict=True):
        images.setdefault(sha256, []).append(image)
    done = cache.is_done(keys_from_hex(list(images))) if cache else np.zeros(len(images), bool)
    failures = cache.failures() if cache else {}
    pending, known = [], []
    for sha256, is_done in zip(images, done.tolist(), strict=True):
        content, failure = _Content(sha256, tuple(images[sha256])), failures.get(sha256)
        if failure and failure.stage != "read" and not retry_failed:
            known.append((content, failure))
        elif not is_done:
            pending.append(content)
    return _Plan(len(manifest.rows), len(images), int(done.sum()), pending, known)


def _refuse_empty_root(plan: _Plan, root: Path) -> None:
    images = [image for content in plan.pending for image in content.images]
    if not any(image_path(root, image).is_file() for image in images):
        raise PathNotFoundError(
            f"none of the {len(images)} images to embed is below {root}, such as {images[0]}: "
            "is it the --image-root that the manifest was built from?"
        )


def _read_ahead(
    pool: ThreadPoolExecutor,
    contents: Sequence[_Content],
    root: Path,
    encoder: Encoder,
    n_ahead: int,
) -> Iterator[Future[_Prepared]]:
    """Yield one future per content, in order, with at most `n_ahead` begun and not taken."""
    waiting: deque[Future[_Prepared]] = deque()
    remaining = iter(contents)
    try:
        while True:
            for content in islice(remaining, n_ahead - len(waiting)):
                waiting.append(pool.submit(_prepare, content, root, encoder.preprocessing))
            if not waiting:
                return
            yield waiting.popleft()
    finally:
        for future in waiting:
            future.cancel()


def _prepare(content: _Content, root: Path, preprocessing: Preprocessing) -> _Prepared:
    reason, other = "", None
    for image in content.images:
        try:
            data = image_path(root, image).read_bytes()
        except OSError as error:  # its strerror names no path
            reason = error.strerror or type(error).__name__
            continue
        # The very bytes that are decoded below.
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 == content.sha256:
            return _decode(content, data, preprocessing)
        other = sha256
    if other:
        return _Prepared(content, other_sha256=other)
    return _Prepared(content, failure=Failure(content.sha256, "read", reason))


def _decode(content: _Content, data: bytes, preprocessing: Preprocessing) -> _Prepared:
    try:
        radiograph = decode_image(data)
    except ImageError as error:
        return _Prepared(content, failure=Failure(content.sha256, "decode", str(error)))
    pixels = prepare(radiograph.pixels, preprocessing)
    return _Prepared(content, pixels=pixels, colour=radiograph.colour)


def _embed_all(
    futures: Iterator[Future[_Prepared]],
    encoder: Encoder,
    poolings: tuple[str, ...],
    batch_size: int,
    writer: RowWriter,
    tally: _Tally,
) -> None:
    batch: list[_Prepared] = []
    for future in futures:
        while not future.done():  # slow storage must not hold back a commit
            wait([future], timeout=1.0)
            writer.commit_if_due()
        prepared = future.result()
        if prepared.pixels is not None:
            batch.append(prepared)
        elif prepared.failure:
            _note_failure(prepared, prepared.failure, writer, tally)
        else:
            tally.other_bytes.append(prepared)
        if len(batch) == batch_size:
            _embed(batch, encoder, poolings, batch_size, writer, tally)
            batch = []
    if batch:
        _embed(batch, encoder, poolings, batch_size, writer, tally)


def _embed(
    batch: list[_Prepared],
    encoder: Encoder,
    poolings: tuple[str, ...],
    batch_size: int,
    writer: RowWriter,
    tally: _Tally,
) -> None:
    try:
        embeddings = _encode(batch, encoder, poolings, batch_size)
    except EncoderError:
        if len(batch) > 1:
            _embed_one_by_one(batch, encoder, poolings, batch_size, writer, tally)
            return
        raise
    writer.add([prepared.content.sha256 for prepared in batch], embeddings)
    tally.embedded += len(batch)
    tally.colour += sum(prepared.colour for prepared in batch)
    tally.tell()


def _embed_one_by_one(
    batch: list[_Prepared],
    encoder: Encoder,
    poolings: tuple[str, ...],
    batch_size: int,
    writer: RowWriter,
    tally: _Tally,
) -> None:
    """Find the images on which the encoder fails; if it is all of them, it is not the images."""
    errors = []
    for prepared in batch:
        try:
            _embed([prepared], encoder, poolings, batch_size, writer, tally)
        except EncoderError as error:
            errors.append((prepared, error))
    if len(errors) == len(batch):
        raise errors[0][1]
    for prepared, error in errors:
        failure = Failure(prepared.content.sha256, "encode", str(error))
        _note_failure(prepared, failure, writer, tally)


def _encode(
    batch: list[_Prepared], encoder: Encoder, poolings: tuple[str, ...], batch_size: int
) -> dict[str, np.ndarray]:
    shape = (encoder.preprocessing.height, encoder.preprocessing.width)
    pixels = np.zeros((batch_size, *shape), np.uint8)  # always full: the same arithmetic for all
    for place, prepared in enumerate(batch):
        pixels[place] = prepared.pixels
    embeddings = encoder.encode(pixels, poolings)
    rows = {name: embeddings[name][: len(batch)] for name in poolings}
    for name, values in rows.items():
        if not np.isfinite(values).all():
            raise EncoderError(f"{encoder.source} gave NaN or infinite values in pooling {name}")
    return rows


def _note_failure(prepared: _Prepared, failure: Failure, writer: RowWriter, tally: _Tally) -> None:
    writer.add_failure(failure)
    tally.failed.append((prepared.content, failure))
    tally.tell()


def _refuse_other_bytes(others: list[_Prepared]) -> None:
    if not others:
        return
    problems = [
        f"{prepared.content.images[0]}: sha256 {prepared.other_sha256}, "
        f"the manifest says {prepared.content.sha256}"
        for prepared in others
    ]
    raise ManifestError(
        f"{len(others)} image(s) hold other bytes than the manifest says, and were not embedded; "
        "all others were. Restore these files, or build the manifest again:",
        problems,
    )


def _report(plan: _Plan, tally: _Tally, seconds: float, *, dry_run: bool) -> ExtractionReport:
    failed = plan.known + tally.failed
    return ExtractionReport(
        requested=plan.n_rows,
        already=plan.n_already,
        embedded=tally.embedded,
        failed=len(failed),
        pending=len(plan.pending) if dry_run else 0,
        duplicates=plan.n_rows - plan.n_contents,
        colour=tally.colour,
        failures=[{"image": content.images[0], **asdict(f)} for content, f in failed],
        seconds=seconds,
        images_per_second=tally.embedded / seconds if seconds > 0 else 0.0,
    )


def _record(encoder: Encoder) -> dict[str, Any]:
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return {
        "source": encoder.source,
        "revision": encoder.revision,
        "precision": encoder.precision,
        "device": encoder.device,
        "versions": versions,
    }


def _default_batch_size(encoder: Encoder) -> int:
    device = "cpu" if encoder.device == "cpu" else "other"
    pixels = encoder.preprocessing.height * encoder.preprocessing.width
    return max(1, min(MAX_BATCH[device], BATCH_PIXELS[device] // pixels))


def _count_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1
