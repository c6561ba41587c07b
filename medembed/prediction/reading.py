"""Files become prepared images and these embeddings, in order, as soon as they are ready."""

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from medembed.core.errors import EncoderError, MedembedError
from medembed.core.system import choose_processes, default_decoders
from medembed.encoders.preprocessing import prepare
from medembed.extraction.decode_pool import DECODER_BYTES, Decoders
from medembed.images.load import Content, Reading, read_content
from medembed.prediction.encode import Embedder

__all__ = ["FEW", "Encoded", "File", "encode_files"]

FEW = 8
"""So many images are decoded in this process: others would take longer to start than they save."""

LITTLE_BYTES = 1 << 26
"""The most bytes decoded in that process: a larger film may take longer than `Limits` allows."""

BATCH_ON_GPU = 16


@dataclass(frozen=True)
class File:
    """An image to be embedded: its number among what was asked, its place, its SHA-256."""

    number: int
    path: Path
    sha256: str


@dataclass(frozen=True, eq=False)
class Encoded:
    """What became of a file.

    Attributes
    ----------
    number : int
    x : float32 (d,) or None
        The embedding.
    pixels : uint8 (height, width) or None
        The prepared image.
    error : str or None
        Why there is neither.
    """

    number: int
    x: np.ndarray | None = None
    pixels: np.ndarray | None = None
    error: str | None = None


def encode_files(files: Sequence[File], embedder: Embedder) -> Generator[list[Encoded]]:
    """Yield what becomes of the files, in order, a batch at a time.

    On a CPU a batch is one image, so that each is answered as soon as it can be, and gets the same
    row whatever else is asked with it. A GPU is handed up to `BATCH_ON_GPU` at a time, fewer where
    the next is not read yet.

    Raises
    ------
    EncoderError
        The encoder cannot be loaded.
    MedembedError
        The decoder processes end on every image.
    """
    on_gpu = embedder.encoder.device == "cuda" and len(files) > FEW
    size = BATCH_ON_GPU if on_gpu else 1
    batch: list[tuple[File, Reading]] = []
    readings = _read_here if len(files) <= FEW and _are_little(files) else _read_ahead
    with contextlib.closing(readings(files, embedder, size)) as pairs:
        for pair in pairs:
            if pair is not None:
                batch.append(pair)
            if batch and (pair is None or len(batch) >= size):
                yield _encode(batch, embedder)
                batch = []
    if batch:
        yield _encode(batch, embedder)


_Pairs = Generator[tuple[File, Reading] | None]


def _read_here(files: Sequence[File], embedder: Embedder, size: int) -> _Pairs:
    transform = _transform(embedder)
    for file in files:
        reading = read_content(
            [file.path], file.sha256, transform, embedder.intensity, embedder.limits
        )
        yield file, _joining(reading, embedder)


def _read_ahead(files: Sequence[File], embedder: Embedder, size: int) -> _Pairs:
    n_decoders = choose_processes(
        None, "--decoders", DECODER_BYTES, MedembedError, default=default_decoders()
    )
    n_decoders = min(n_decoders, len(files))
    # Paths from the root of all: loose files lie anywhere, and a manifest's are resolved already.
    contents = [Content(file.sha256, (str(file.path),)) for file in files]
    waiting = deque(files)
    with Decoders(
        n_decoders, embedder.encoder.preprocessing, embedder.intensity, embedder.limits
    ) as decoders:
        for pair in decoders.read(contents, Path(files[0].path.anchor), 2 * size + n_decoders):
            if pair is None:
                yield None
                continue
            reading = _joining(pair[1], embedder)
            pixels = None if reading.pixels is None else reading.pixels.copy()
            yield (
                waiting.popleft(),
                Reading(
                    pixels=pixels,
                    stage=reading.stage,
                    reason=reading.reason,
                    other_sha256=reading.other_sha256,
                ),
            )


def _joining(reading: Reading, embedder: Embedder) -> Reading:
    return reading.joining(embedder.images_version, "the model", "Train it again on a new cache")


def _are_little(files: Sequence[File]) -> bool:
    """Whether decoding takes no time to speak of; what may is left to a process that can end."""
    n_bytes = 0
    for file in files:
        with contextlib.suppress(OSError):
            n_bytes += file.path.stat().st_size
    return n_bytes <= LITTLE_BYTES


def _transform(embedder: Embedder) -> Callable[[np.ndarray], np.ndarray]:
    return partial(prepare, preprocessing=embedder.encoder.preprocessing)


def _encode(batch: Sequence[tuple[File, Reading]], embedder: Embedder) -> list[Encoded]:
    whole = [place for place, (_, reading) in enumerate(batch) if reading.pixels is not None]
    found: dict[int, np.ndarray | str] = {}
    if whole:
        pixels = np.stack([_pixels(batch[place][1]) for place in whole])
        found = dict(zip(whole, _embed(pixels, embedder), strict=True))
    encoded = []
    for place, (file, reading) in enumerate(batch):
        outcome = found.get(place, _reason(reading))
        if isinstance(outcome, str):
            encoded.append(Encoded(file.number, error=outcome))
        else:
            encoded.append(Encoded(file.number, outcome, reading.pixels))
    return encoded


def _embed(pixels: np.ndarray, embedder: Embedder) -> Sequence[np.ndarray | str]:
    """Embed images together, or one by one where that fails: an image may be to blame for it."""
    try:
        return list(embedder.encode(pixels))
    except EncoderError as error:
        if len(pixels) == 1:
            return [f"cannot be encoded: {error}"]
    return [row for image in pixels for row in _embed(image[None], embedder)]


def _pixels(reading: Reading) -> np.ndarray:
    assert reading.pixels is not None
    return reading.pixels


def _reason(reading: Reading) -> str:
    if reading.other_sha256 is not None:
        return (
            f"holds other bytes than was said: its sha256 begins {reading.other_sha256[:12]}. "
            "Restore the file, or build the manifest again."
        )
    verb = "read" if reading.stage == "read" else "decoded"
    return f"cannot be {verb}: {reading.reason}"
