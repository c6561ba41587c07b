"""Stage 1: the images of a manifest become rows of a cache, each content once.

Threads read, hash, decode and resize ahead of the encoder, never more than a fixed number of
images, so memory stays flat. The encoder sees batches of one fixed shape, so on a CPU in fp32 a
row does not depend on its neighbours, and a resumed cache equals an uninterrupted one.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from medembed.cache.description import is_free
from medembed.cache.failures import Failure
from medembed.cache.plan import Plan, make_plan
from medembed.cache.spec import CacheSpec
from medembed.cache.store import Cache, create_cache, open_cache
from medembed.cache.writer import RowWriter
from medembed.dataset.images import IMAGES_VERSION
from medembed.dataset.manifest import Manifest, image_path
from medembed.dataset.reading import Content, Reading, read_ahead
from medembed.encoders.preprocessing import prepare
from medembed.encoders.protocol import Encoder
from medembed.errors import EncoderError, ManifestError, PathNotFoundError

__all__ = ["COMMIT_SECONDS", "ExtractionReport", "extract", "spec_of"]

COMMIT_SECONDS = 60.0  # what a crash may lose
MAX_SUSPECTS = 8  # encoder failures in a row, before the encoder is to blame and not the images
LIBRARIES = ("medembed", "numpy", "pillow", "torch", "transformers")
# Pixels in a batch: on a GPU 32 images of 896 × 896; on a CPU 2, because there each takes up to
# half a minute and no commit can fall inside a batch.
BATCH_PIXELS = {"cpu": 2 * 896 * 896, "other": 32 * 896 * 896}
MAX_BATCH = {"cpu": 32, "other": 256}


@dataclass(frozen=True)
class ExtractionReport:
    """Count what became of a manifest's rows.

    Always requested = already + embedded + failed + duplicates.

    Parameters
    ----------
    requested : int
        Rows of the manifest.
    already, embedded, failed : int
        Distinct contents that were in the cache before, were added (in a dry run: would be
        tried), could not become a row.
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
    _check_request(manifest, Path(image_root), encoder, poolings)
    spec, recorded = spec_of(encoder, poolings, dtype), _record(encoder)
    plan = make_plan(
        manifest, _open_if_there(cache_path, spec, recorded), retry_failed=retry_failed
    )
    embedder = _Embedder(encoder, poolings, batch_size, len(plan.pending), progress)
    if plan.pending and not dry_run:
        _refuse_empty_root(plan, Path(image_root))
        cache = create_cache(cache_path, spec, recorded)
        n_decoders = decoders or _count_cores()
        # The pool outside: Ctrl-C commits first and waits for the decoders afterwards.
        with (
            ThreadPoolExecutor(n_decoders, "decode") as pool,
            RowWriter(cache, commit_seconds) as writer,
        ):
            transform = partial(prepare, preprocessing=encoder.preprocessing)
            n_ahead = 2 * embedder.batch_size + n_decoders
            readings = read_ahead(pool, plan.pending, Path(image_root), transform, n_ahead)
            embedder.embed_all(readings, writer)
        _refuse_other_bytes(embedder.other_bytes, embedder.failed)
    n_embedded = len(plan.pending) if dry_run else embedder.n_embedded
    return _report(plan, embedder, n_embedded, time.monotonic() - start)


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


class _Embedder:
    """Turn readings into rows of a writer, and count."""

    def __init__(
        self,
        encoder: Encoder,
        poolings: Sequence[str],
        batch_size: int | None,
        n_total: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._encoder, self._poolings = encoder, tuple(poolings)
        self._n_total, self._progress = n_total, progress
        self._suspects: list[tuple[Content, EncoderError]] = []
        self.batch_size = batch_size or _default_batch_size(encoder)
        self.n_embedded = self.n_colour = 0
        self.failed: list[tuple[Content, Failure]] = []
        self.other_bytes: list[Reading] = []

    def embed_all(self, readings: Iterator[Future[Reading]], writer: RowWriter) -> None:
        batch: list[Reading] = []
        for future in readings:
            while not future.done():  # slow storage must not hold back a commit
                wait([future], timeout=1.0)
                writer.commit_if_due()
            reading = future.result()
            if reading.pixels is not None:
                batch.append(reading)
            else:
                self._set_aside(reading, writer)
            if len(batch) == self.batch_size:
                self._embed_batch(batch, writer)
                batch = []
        if batch:
            self._embed_batch(batch, writer)
        self._blame_suspects(writer)

    def _set_aside(self, reading: Reading, writer: RowWriter) -> None:
        if reading.stage is None:
            self.other_bytes.append(reading)
        else:
            self._fail(reading.content, reading.stage, reading.reason, writer)
        self._tell()

    def _embed_batch(self, batch: list[Reading], writer: RowWriter) -> None:
        try:
            self._embed(batch, writer)
        except EncoderError as error:
            if len(batch) == 1:
                self._suspect(batch[0].content, error)
                return
            for reading in batch:  # find the image on which the encoder fails
                self._embed_batch([reading], writer)

    def _embed(self, batch: list[Reading], writer: RowWriter) -> None:
        embeddings = self._encode(batch)
        writer.add([reading.content.sha256 for reading in batch], embeddings)
        self.n_embedded += len(batch)
        self.n_colour += sum(reading.colour for reading in batch)
        self._blame_suspects(writer)
        self._tell()

    def _encode(self, batch: list[Reading]) -> dict[str, np.ndarray]:
        size = self._encoder.preprocessing
        # Always full, so that every image goes through the same arithmetic.
        pixels = np.zeros((self.batch_size, size.height, size.width), np.uint8)
        for place, reading in enumerate(batch):
            pixels[place] = np.asarray(reading.pixels)
        embeddings = self._encoder.encode(pixels, self._poolings)
        rows = {name: embeddings[name][: len(batch)] for name in self._poolings}
        for name, values in rows.items():
            if not np.isfinite(values).all():
                raise EncoderError(f"pooling {name} holds NaN or infinite values")
        return rows

    def _suspect(self, content: Content, error: EncoderError) -> None:
        self._suspects.append((content, error))
        if len(self._suspects) == MAX_SUSPECTS:
            raise EncoderError(
                f"encoder {self._encoder.source} failed on {MAX_SUSPECTS} images in a row, so it "
                f"is not the images. Rows before these are committed. It said: {error}"
            ) from error

    def _blame_suspects(self, writer: RowWriter) -> None:
        """Record images that failed alone: the encoder has worked since, or the run is over."""
        for content, error in self._suspects:
            self._fail(content, "encode", str(error), writer)
        self._suspects = []
        self._tell()

    def _fail(self, content: Content, stage: str, reason: str, writer: RowWriter) -> None:
        failure = Failure(content.sha256, stage, reason)
        writer.add_failure(failure)
        self.failed.append((content, failure))

    def _tell(self) -> None:
        if self._progress:
            n_done = self.n_embedded + len(self.failed) + len(self.other_bytes)
            self._progress(n_done, self._n_total)


def _check_request(
    manifest: Manifest, root: Path, encoder: Encoder, poolings: Sequence[str]
) -> None:
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


def _open_if_there(
    path: str | os.PathLike[str], spec: CacheSpec, recorded: dict[str, Any]
) -> Cache | None:
    if is_free(Path(path)):
        return None
    cache = open_cache(path)
    cache.require_spec(spec, recorded)
    return cache


def _refuse_empty_root(plan: Plan, root: Path) -> None:
    images = [image for content in plan.pending for image in content.images]
    if not any(image_path(root, image).is_file() for image in images):
        raise PathNotFoundError(
            f"none of the {len(images)} images to embed is below {root}, such as {images[0]}: "
            "is it the --image-root that the manifest was built from?"
        )


def _refuse_other_bytes(others: list[Reading], failed: Sequence[tuple[Content, Failure]]) -> None:
    if not others:
        return
    problems = [
        f"{reading.content.images[0]}: sha256 {reading.other_sha256}, "
        f"the manifest says {reading.content.sha256}"
        for reading in others
    ]
    also = [f"{content.images[0]}: {f.stage} failed: {f.reason}" for content, f in failed]
    raise ManifestError(
        f"{len(others)} image(s) hold other bytes than the manifest says, and were not embedded"
        f"{f', nor were {len(also)} that failed' if also else ''}; all others were, and are kept. "
        "Restore these files, or build the manifest again:",
        problems + also,
    )


def _report(plan: Plan, embedder: _Embedder, n_embedded: int, seconds: float) -> ExtractionReport:
    failed = plan.known + embedder.failed
    return ExtractionReport(
        requested=plan.n_rows,
        already=plan.n_already,
        embedded=n_embedded,
        failed=len(failed),
        duplicates=plan.n_rows - plan.n_contents,
        colour=embedder.n_colour,
        failures=[{"image": content.images[0], **asdict(f)} for content, f in failed],
        seconds=seconds,
        images_per_second=embedder.n_embedded / seconds if seconds > 0 else 0.0,
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
