"""Turn readings into rows: gather batches, submit them to the encoder ahead, collect the results.

All batches have one fixed shape, padded with black images, so on a CPU in fp32 a row does not
depend on its neighbours, and a resumed cache equals an uninterrupted one.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from medembed.cache.failures import Failure
from medembed.core.errors import DeviceMemoryError, EncoderError, ManifestError, NonFiniteError
from medembed.core.poolings import IMAGE_STATISTICS, list_of_tower
from medembed.encoders.protocol import Encoder, PipelinedEncoder, check_rows
from medembed.extraction.image_store import describe_other_bytes
from medembed.extraction.writer import Timeline, WriterThread
from medembed.images.load import Content, Reading

__all__ = ["MAX_SUSPECTS", "Pipeline", "memory_error"]

MAX_SUSPECTS = 8  # encoder failures in a row, after which the encoder is blamed, not the images

Rows = dict[str, np.ndarray]


@dataclass
class _Batch:
    """Images that go through the encoder together: pixels are uint8 (k, height, width)."""

    contents: list[Content] = field(default_factory=list)
    colours: list[bool] = field(default_factory=list)
    notes: list[tuple[str, ...]] = field(default_factory=list)
    pixels: list[np.ndarray] = field(default_factory=list)
    statistics: list[tuple[float, ...]] = field(default_factory=list)
    n_filled: int = 0  # number of images passed to the encoder, including black padding
    collect: Callable[[], Rows] | None = None

    def parts(self, size: int) -> Iterator["_Batch"]:
        for start in range(0, len(self.contents), size):
            part = slice(start, start + size)
            yield _Batch(
                self.contents[part],
                self.colours[part],
                self.notes[part],
                self.pixels[part],
                self.statistics[part],
            )


class Pipeline:
    """Turns readings into rows for a writer, and counts them.

    Parameters
    ----------
    encoder : Encoder
        A `PipelinedEncoder` receives batches ahead of time; any other encoder runs in a thread, so
        that images are gathered while it works.
    poolings : sequence of str
        Poolings to store.
    batch_size : int
        Images per batch; halved whenever the device's memory cannot hold a batch.
    n_total : int
        Number of contents, for the progress.
    timeline : Timeline
        Records where the time goes.
    progress : callable, optional
        Called as progress(done, total).

    Attributes
    ----------
    n_embedded, n_colour : int
        Rows handed to the writer; how many of them were colour images.
    notes : Counter of str
        What was ignored in the embedded images, and in how many; see `Radiograph.notes`.
    failed : list of (Content, Failure)
        Contents that could not become a row.
    other_bytes : list of (Content, str)
        Contents whose bytes differ from the manifest's, and the SHA-256 found.
    """

    def __init__(
        self,
        encoder: Encoder,
        poolings: Sequence[str],
        batch_size: int,
        n_total: int,
        timeline: Timeline,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._encoder, self._poolings = encoder, tuple(list_of_tower(poolings))
        self._measures = len(self._poolings) < len(poolings)
        self._n_total, self._timeline, self._progress = n_total, timeline, progress
        self._suspects: list[tuple[Content, EncoderError]] = []
        self._in_flight: deque[_Batch] = deque()
        self.batch_size = batch_size
        self.n_embedded = self.n_colour = 0
        self.notes: Counter[str] = Counter()
        self.failed: list[tuple[Content, Failure]] = []
        self.other_bytes: list[tuple[Content, str]] = []

    def run(self, pairs: Iterable[tuple[Content, Reading] | None], writer: WriterThread) -> None:
        """Embed all readings; None in `pairs` means that the next image is not ready yet.

        Raises
        ------
        EncoderError
            The encoder fails on several images in a row, or not even one fits its device.
        CacheError
            The writer failed.
        """
        with _Ahead(self._encoder) as self._device:
            batch = _Batch()
            for content, reading in self._waiting_for(pairs, writer):
                if reading.pixels is None:
                    self._set_aside(content, reading, writer)
                    continue
                batch.contents.append(content)
                batch.colours.append(reading.colour)
                batch.notes.append(reading.notes)
                batch.pixels.append(reading.pixels.copy())
                batch.statistics.append(reading.statistics)
                if len(batch.contents) >= self.batch_size:
                    self._send(batch, writer)
                    batch = _Batch()
            if batch.contents:
                self._send(batch, writer)
            while self._in_flight:
                self._finish(self._in_flight.popleft(), writer)
            self._blame_suspects(writer)

    def refuse_other_bytes(self) -> None:
        """Raise ManifestError if any image's bytes differ from the manifest's; list them all."""
        if not self.other_bytes:
            return
        problems = [describe_other_bytes(content, found) for content, found in self.other_bytes]
        also = [
            f"{image}: {f.stage} failed: {f.reason}"
            for content, f in self.failed
            for image in content.images
        ]
        raise ManifestError(
            f"{len(problems)} image(s) hold other bytes than the manifest says, and were not "
            f"embedded{f', nor were {len(self.failed)} that failed' if also else ''}; all others "
            "were, and are kept. Restore these files, or build the manifest again:",
            problems + also,
        )

    def _waiting_for(
        self, pairs: Iterable[tuple[Content, Reading] | None], writer: WriterThread
    ) -> Iterator[tuple[Content, Reading]]:
        start = time.monotonic()
        for pair in pairs:
            self._timeline.add("starve", start, time.monotonic())
            if pair is None:  # slow images must not hold back embedded rows
                if self._in_flight:
                    self._finish(self._in_flight.popleft(), writer)
                start = time.monotonic()
                continue
            content, reading = pair
            begun, read, done = reading.times
            self._timeline.add("read", begun, read)
            self._timeline.add("decode", read, done)
            yield content, reading
            start = time.monotonic()

    def _set_aside(self, content: Content, reading: Reading, writer: WriterThread) -> None:
        if reading.stage is None:
            self.other_bytes.append((content, str(reading.other_sha256)))
        else:
            self._fail(content, reading.stage, reading.reason, writer)
        self._report_progress()

    def _send(self, batch: _Batch, writer: WriterThread) -> None:
        while len(self._in_flight) >= self._device.in_flight:
            self._finish(self._in_flight.popleft(), writer)
        start = time.monotonic()
        try:
            batch.collect = self._submit(batch)
        except EncoderError as error:
            self._rescue(batch, error, writer)
        else:
            self._in_flight.append(batch)
        self._timeline.add("encode", start, time.monotonic())

    def _finish(self, batch: _Batch, writer: WriterThread) -> None:
        assert batch.collect
        start = time.monotonic()
        try:
            rows = self._checked(batch.collect(), batch)
        except EncoderError as error:
            self._rescue(batch, error, writer)
            return
        finally:
            self._timeline.add("encode", start, time.monotonic())
        self._keep(batch, rows, writer)

    def _rescue(self, batch: _Batch, error: EncoderError, writer: WriterThread) -> None:
        """Keep the valid rows of a failed batch; embed the rest in smaller batches."""
        if isinstance(error, NonFiniteError):
            self._keep_finite(batch, error, writer)
            return
        if isinstance(error, DeviceMemoryError):
            self._take_less(batch, error)
            size = self.batch_size
        elif len(batch.contents) == 1:
            self._suspect(batch.contents[0], error)
            return
        else:
            size = 1
        for part in batch.parts(size):
            try:
                rows = self._checked(self._submit(part)(), part)
            except EncoderError as again:
                self._rescue(part, again, writer)
            else:
                self._keep(part, rows, writer)

    def _keep_finite(self, batch: _Batch, error: NonFiniteError, writer: WriterThread) -> None:
        """Keep the finite rows; the other images failed, unless the encoder is at fault."""
        is_finite = np.asarray(error.is_finite[: len(batch.contents)], bool)
        reason = EncoderError(f"its embedding is not finite in {self._encoder.precision}")
        for place in np.flatnonzero(~is_finite).tolist():
            self._suspect(batch.contents[place], reason, alone=not is_finite.any())
        kept = np.flatnonzero(is_finite).tolist()
        if kept:
            rows = {name: error.rows[name][kept] for name in self._poolings}
            contents = [batch.contents[place] for place in kept]
            colours = [batch.colours[place] for place in kept]
            statistics = [batch.statistics[place] for place in kept]
            self._keep(_Batch(contents, colours, statistics=statistics), rows, writer)

    def _take_less(self, batch: _Batch, error: DeviceMemoryError) -> None:
        if batch.n_filled == 1:
            raise memory_error(self._encoder, error) from error
        # Batches sent before the size was halved also fail, and must not halve it again.
        self.batch_size = min(self.batch_size, batch.n_filled // 2)

    def _submit(self, batch: _Batch) -> Callable[[], Rows]:
        size = self._encoder.preprocessing
        # Always a full batch, so that every image undergoes identical arithmetic.
        batch.n_filled = max(self.batch_size, len(batch.pixels))
        pixels = np.zeros((batch.n_filled, size.height, size.width), np.uint8)
        for place, image in enumerate(batch.pixels):
            pixels[place] = image
        return self._device.submit(pixels, self._poolings)

    def _checked(self, found: Rows, batch: _Batch) -> Rows:
        n_used = len(batch.contents)
        return check_rows(self._encoder, found, self._poolings, batch.n_filled, n_used)

    def _keep(self, batch: _Batch, rows: Rows, writer: WriterThread) -> None:
        if self._measures:
            rows = {**rows, IMAGE_STATISTICS: np.array(batch.statistics, np.float32)}
        writer.add([content.sha256 for content in batch.contents], rows)
        self.n_embedded += len(batch.contents)
        self.n_colour += sum(batch.colours)
        self.notes.update(note for notes in batch.notes for note in notes)
        self._blame_suspects(writer)
        self._report_progress()

    def _suspect(self, content: Content, error: EncoderError, *, alone: bool = True) -> None:
        """Note an image that failed; `alone` if no image of its batch succeeded."""
        self._suspects.append((content, error))
        if alone and len(self._suspects) >= MAX_SUSPECTS:
            raise EncoderError(
                f"encoder {self._encoder.source} failed on {MAX_SUSPECTS} images in a row, so it "
                f"is not the images. Rows before these are committed. It said: {error}"
            ) from error

    def _blame_suspects(self, writer: WriterThread) -> None:
        """Record images that failed alone, once the encoder has worked again or the run is over."""
        for content, error in self._suspects:
            self._fail(content, "encode", str(error), writer)
        self._suspects = []
        self._report_progress()

    def _fail(self, content: Content, stage: str, reason: str, writer: WriterThread) -> None:
        failure = Failure(content.sha256, stage, reason)
        writer.add_failure(failure)
        self.failed.append((content, failure))

    def _report_progress(self) -> None:
        if self._progress:
            n_done = self.n_embedded + len(self.failed) + len(self.other_bytes)
            self._progress(n_done, self._n_total)


def memory_error(encoder: Encoder, error: DeviceMemoryError) -> EncoderError:
    """Return the error for a device that cannot hold a single image."""
    return EncoderError(
        f"not even one image fits the memory of {encoder.device}: {error} Rows committed before "
        "stay. Give --precision bf16 or another --device."
    )


class _Ahead:
    """Provides `submit` for any encoder, with a thread if the encoder is not pipelined."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._thread: ThreadPoolExecutor | None = None
        self.in_flight = encoder.in_flight if isinstance(encoder, PipelinedEncoder) else 2

    def __enter__(self) -> "_Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread:
            self._thread.shutdown(cancel_futures=True)

    def submit(self, pixels: np.ndarray, poolings: Sequence[str]) -> Callable[[], Rows]:
        if isinstance(self._encoder, PipelinedEncoder):
            return self._encoder.submit(pixels, poolings)
        self._thread = self._thread or ThreadPoolExecutor(1, "encoder")
        return self._thread.submit(self._encoder.encode, pixels, poolings).result
