"""Decoder processes that run ahead of the encoder by a fixed number of images, in order."""

import json
import math
import os
import queue
import shutil
import signal
import subprocess  # nosec B404 # starts our own decoders, without a shell
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext, suppress
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import medembed
from medembed.core.errors import MedembedError
from medembed.core.locations import BucketPath, Location
from medembed.core.system import reserve
from medembed.dataset.manifest import image_path
from medembed.encoders.preprocessing import Preprocessing
from medembed.extraction.decode_worker import PATIENCE, READY, TIMES_UP, describe, open_slots
from medembed.extraction.image_fetcher import Fetched, ImageFetcher, StreamReader
from medembed.images.intensity import DEFAULT_INTENSITY, Intensity
from medembed.images.load import DEFAULT_LIMITS, Content, Limits, Reading
from medembed.images.streams import StreamRoot, is_stream

__all__ = ["DECODER_BYTES", "Decoders"]

DECODER_BYTES = 1 << 28
"""Memory that one decoder takes: its libraries, and a film of 20 million pixels in progress."""

SHARED_MEMORY = Path("/dev/shm")  # nosec B108 # only files without a name are made there
ENOUGH_SHARED_BYTES = 2**29  # a container has 64 MB by default; a file on disk is used then
# Memory of one image is reused for the next instead of being returned to the system, whose fresh
# pages cost a sixth of the decoding time. Settings of glibc and Pillow, ignored by others.
QUICK_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**28),
    "MALLOC_TRIM_THRESHOLD_": str(2**28),
    "PILLOW_BLOCKS_MAX": "64",
}
PATIENCE_SECONDS = 0.1  # between two signs that the next image is not ready yet
MAX_DEATHS = 8  # in a row, after which the decoder is blamed instead of the images
# Signals of a crashing codec. Other signals come from outside, such as a system out of memory.
CRASHES = {"SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV"}


class Decoders:
    """Processes that turn files into prepared pixels, a fixed number of images ahead.

    They start when the `with` block is entered, so that they are ready when the encoder is.
    Processes are used because Pillow holds the interpreter's lock between its steps, and because a
    codec that crashes then costs one file instead of the run.

    Parameters
    ----------
    n_processes : int
        How many run at once.
    preprocessing : Preprocessing
        How each image is prepared.
    intensity : Intensity
        Which window of a DICOM to use.
    limits : Limits
        Limits on size and time. An image that takes longer fails, and its process is restarted.
    measures : bool
        Whether readings have `Reading.statistics`.
    """

    def __init__(
        self,
        n_processes: int,
        preprocessing: Preprocessing,
        intensity: Intensity = DEFAULT_INTENSITY,
        limits: Limits = DEFAULT_LIMITS,
        *,
        measures: bool = False,
    ) -> None:
        self.n_processes = n_processes
        self._preprocessing = preprocessing
        self._intensity, self._limits, self._measures = intensity, limits, measures
        self._idle: queue.SimpleQueue[_Decoder] = queue.SimpleQueue()
        self._deaths = 0

    def __enter__(self) -> "Decoders":
        self._shared = _make_shared_file()
        handle = self._shared.fileno()
        self._messages = tempfile.TemporaryFile()
        arguments = describe(
            handle, self._preprocessing, self._intensity, self._limits, measures=self._measures
        )
        self._all = [_Decoder(arguments, handle, self._messages) for _ in range(self.n_processes)]
        for decoder in self._all:
            self._idle.put(decoder)
        self._pool = ThreadPoolExecutor(self.n_processes, "decoder")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for decoder in self._all:
            decoder.stop()
        self._pool.shutdown()
        for decoder in self._all:
            decoder.close()
        self._messages.close()
        self._shared.close()

    def read(
        self, contents: Sequence[Content], image_root: Location | StreamRoot, n_slots: int
    ) -> Iterator[tuple[Content, Reading] | None]:
        """Yield every content with its reading, in order; pixels are valid until the next one.

        While the next content takes long, None is yielded at intervals, so that the caller can do
        other work. Call it only once.

        Parameters
        ----------
        image_root : Path, BucketPath, TarRoot or HubRoot
            What the images' paths are relative to. Those of a bucket are fetched ahead. Those of
            a stream come in the order in which they are stored there.
        n_slots : int
            How many images may be in progress or waiting; this bounds memory.

        Raises
        ------
        ManifestError
            An image's path leads out of the root.
        MedembedError
            The decoder processes die on every image, or there is no room for the slots.
        StorageError
            The bucket refuses, or keeps failing.
        """
        shape = (
            max(n_slots, self.n_processes),
            self._preprocessing.height,
            self._preprocessing.width,
        )
        self._share(shape)
        with self._fetching(image_root) as fetcher:
            if fetcher is None:
                assert isinstance(image_root, Path)
                files = (_find(image_root, content) for content in contents)
                requests: Iterator[_Request] = zip(contents, files, strict=True)
            else:
                requests = fetcher.stream(contents)
            yield from self._read_all(requests, shape[0], fetcher)

    def _fetching(self, image_root: Location | StreamRoot) -> Any:
        if is_stream(image_root):
            return StreamReader(image_root, _memory_directory(), self._limits)
        if isinstance(image_root, BucketPath):
            return ImageFetcher(image_root, _memory_directory(), self._limits)
        return nullcontext()

    def _read_all(
        self,
        requests: Iterator["_Request"],
        n_slots: int,
        fetcher: ImageFetcher | StreamReader | None,
    ) -> Iterator[tuple[Content, Reading] | None]:
        waiting: deque[tuple[Content, Future[Reading]]] = deque()
        remaining = iter(enumerate(requests))
        ended: MedembedError | None = None
        while True:
            try:
                for number, (content, files) in islice(remaining, n_slots - len(waiting)):
                    args = (number % n_slots, content.sha256, files, fetcher)
                    waiting.append((content, self._pool.submit(self._read_files, *args)))
            except MedembedError as error:  # such as a tar file that ends early
                ended = error  # once what came before it is decoded
            if not waiting:
                if ended:
                    raise ended
                return
            content, future = waiting[0]
            while not wait([future], timeout=PATIENCE_SECONDS).done:
                yield None
            yield content, future.result()
            waiting.popleft()  # only now may its slot be filled anew

    def _read_files(
        self, slot: int, sha256: str, files: "_Files", fetcher: ImageFetcher | StreamReader | None
    ) -> Reading:
        if not isinstance(files, Future):
            return self._read(slot, sha256, files)
        assert fetcher
        fetched = files.result()
        try:
            if not fetched.paths:
                return Reading(stage="read", reason=fetched.reason)
            return self._read(slot, sha256, list(fetched.paths))
        finally:
            fetcher.release(fetched)

    def _share(self, shape: tuple[int, int, int]) -> None:
        _make_room(self._shared, math.prod(shape))
        self._slots = open_slots(self._shared.fileno(), shape)
        for decoder in self._all:
            decoder.shape = shape

    def _read(self, slot: int, sha256: str, paths: list[str]) -> Reading:
        decoder = self._idle.get()
        try:
            answer = decoder.ask([slot, sha256, paths])
            if answer is None and decoder.was_killed:
                answer = decoder.ask([slot, sha256, paths])
            if answer is None:
                return self._too_slow(decoder) or self._blame(decoder)
        finally:
            self._idle.put(decoder)
        self._deaths = 0
        pixels = self._slots[slot] if answer.pop("pixels") else None
        several = {name: tuple(answer[name]) for name in ("times", "notes", "statistics")}
        return Reading(**{**answer, **several, "pixels": pixels})

    def _too_slow(self, decoder: "_Decoder") -> Reading | None:
        stage = decoder.times_up
        if stage is None:
            return None
        most = self._limits.max_seconds * (PATIENCE if stage == "read" else 1)
        what = "of computing " if stage == "decode" else ""
        reason = f"it takes more than {most:g} seconds {what}to {stage} (--max-seconds)"
        return Reading(stage=stage, reason=reason)

    def _blame(self, decoder: "_Decoder") -> Reading:
        self._deaths += 1
        if self._deaths >= MAX_DEATHS or not decoder.was_ready:
            raise MedembedError(
                f"decoder processes end on every image ({decoder.end}), so it is not the images. "
                f"{self._last_message()}Rows before these are committed."
            )
        # The next run retries images that failed at stage "read".
        stage = "read" if decoder.was_killed else "decode"
        return Reading(stage=stage, reason=f"the decoder process died on it ({decoder.end})")

    def _last_message(self) -> str:
        self._messages.seek(0)
        lines = self._messages.read().decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        return f"The last one said: {last[:300]}. " if last else ""


_Files = list[str] | Future[Fetched]
_Request = tuple[Content, _Files]


def _find(image_root: Path, content: Content) -> list[str]:
    return [str(image_path(image_root, image)) for image in content.images]


class _Decoder:
    """One process, started at once and restarted by the first request after its death."""

    def __init__(self, arguments: str, shared: int, messages: IO[bytes]) -> None:
        self._arguments, self._shared, self._messages = arguments, shared, messages
        self._process = self._start()
        self.was_ready, self._stopped = False, False
        self.shape: tuple[int, int, int] | None = None  # of what is shared, once it is known
        self.end = ""

    def ask(self, request: Any) -> dict[str, Any] | None:
        """Return the answer to a request, or None if the process died before answering."""
        if self._process.poll() is not None and not self._stopped:
            self.close()
            self._process, self.was_ready = self._start(), False
        try:
            if not self.was_ready:
                self.was_ready = self._receive() == READY
                self._send(self.shape)
            self._send(request)
            answer: dict[str, Any] = self._receive()
            return answer
        except (OSError, ValueError):  # a broken pipe; a partial or missing line of a dead process
            self.end = _describe_end(self._process)
            return None

    @property
    def was_killed(self) -> bool:
        """Return whether the last process was ended by an outside signal, not by its own crash."""
        is_ours = self.end in CRASHES or self.times_up is not None
        return self.end.startswith("SIG") and not is_ours

    @property
    def times_up(self) -> str | None:
        """Return the stage at which the last process ended itself because of a slow image."""
        return {number.name: stage for number, stage in TIMES_UP.items()}.get(self.end)

    def stop(self) -> None:
        """End the process by closing its stdin, or by force if it is busy."""
        self._stopped = True
        self._close_stdin()
        try:
            self._process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """Release the resources of a process that has ended, once no thread waits for it."""
        self._close_stdin()
        assert self._process.stdout
        self._process.stdout.close()

    def _send(self, message: Any) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _receive(self) -> Any:
        assert self._process.stdout
        return json.loads(self._process.stdout.readline())

    def _close_stdin(self) -> None:
        assert self._process.stdin
        with suppress(OSError):  # a request that was written but not read
            self._process.stdin.close()

    def _start(self) -> "subprocess.Popen[str]":
        # -P: nothing is imported from the working directory, unless the package itself is in it.
        path = [str(Path(medembed.__file__).parents[1]), *filter(None, sys.path)]
        environment = {**QUICK_MEMORY, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(  # nosec B603 # our own module, no text from outside but options
            [sys.executable, "-P", "-m", "medembed.extraction.decode_worker", self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            pass_fds=(self._shared,),
            env={**os.environ, **environment},
            encoding="ascii",
            start_new_session=True,  # Ctrl-C must reach only the process that commits
        )


def _describe_end(process: "subprocess.Popen[str]") -> str:
    try:
        code = process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        return "it gave an unreadable answer"
    if code >= 0:
        return f"exit status {code}"
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def _make_shared_file() -> IO[bytes]:
    """Return an unnamed file, which vanishes with its processes; in memory if possible."""
    return tempfile.TemporaryFile(dir=_memory_directory())


def _memory_directory() -> Path | None:
    """Return a directory in memory with some room, or None for that of temporary files."""
    with suppress(OSError):
        if shutil.disk_usage(SHARED_MEMORY).free > ENOUGH_SHARED_BYTES:
            return SHARED_MEMORY
    return None


def _make_room(file: IO[bytes], n_bytes: int) -> None:
    """Allocate the shared file's full size."""
    try:
        reserve(file.fileno(), n_bytes)
    except OSError as error:
        raise MedembedError(
            f"no room for {n_bytes / 1e6:,.0f} MB of decoded images in shared memory: "
            f"{error.strerror or error}. Give a smaller --batch-size, or set "
            "TMPDIR to a larger disk."
        ) from error
