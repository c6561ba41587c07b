"""Embed files, in order and as soon as each is ready, with an encoder or from a cache.

Encoder and cache must match the spec that the model was trained on.
"""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from medembed.cache.failures import Failure
from medembed.cache.shards import describe_loss
from medembed.cache.spec import CacheSpec, keys_from_hex
from medembed.cache.store import Cache, open_cache
from medembed.core.errors import EncoderError, ImageError, MedembedError, ModelError
from medembed.core.locations import BucketPath, Location
from medembed.core.poolings import IMAGE_STATISTICS, find_pooling, list_of_tower
from medembed.core.system import choose_processes, default_decoders
from medembed.core.text import counted
from medembed.encoders.hub import DEMO
from medembed.encoders.preprocessing import prepare
from medembed.encoders.protocol import Encoder, check_rows
from medembed.extraction.decode_pool import DECODER_BYTES, Decoders
from medembed.images.intensity import Intensity
from medembed.images.load import DEFAULT_LIMITS, Content, Limits, Reading, read_content
from medembed.images.statistics import measure_image
from medembed.prediction.decisions import check_spec, spec_of_card
from medembed.results.model_card import Card

__all__ = [
    "FEW",
    "CachedRows",
    "Embedder",
    "Encoded",
    "File",
    "JoinedRows",
    "encode_files",
    "find_encoder",
    "open_caches",
    "read_intensity",
]


class Embedder:
    """The encoder of a model, loaded once, on first use.

    Parameters
    ----------
    model_path : Path
        The model's directory, to which the card's path of an adapted encoder is relative.
    card : Card
        The model's card.
    reference : Encoder, str or path, optional
        The encoder itself, or a reference to use instead of the card's.
    device, precision : str
        Where and in which precision to encode, see `load_encoder`. `fit` and the window are the
        model's.
    limits : Limits
        Limits on size and time beyond which an image counts as failed.
    progress : callable, optional
        Called as progress(done, total) with bytes, while weights are downloaded.
    """

    def __init__(
        self,
        model_path: Path,
        card: Card,
        *,
        reference: Encoder | str | os.PathLike[str] | None = None,
        device: str = "auto",
        precision: str = "auto",
        limits: Limits = DEFAULT_LIMITS,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.limits = limits
        self.model_path, self.card, self.reference = model_path, card, reference
        self.device, self.precision, self.progress = device, precision, progress
        self.poolings = card.pooling.split("+")

    @cached_property
    def intensity(self) -> Intensity:
        """How the grey levels of DICOM images were chosen in the model's training."""
        return read_intensity(spec_of_card(self.card))

    @cached_property
    def images_version(self) -> Any:
        """The version of decoding that the model was trained on; see `images.versions`."""
        return spec_of_card(self.card).images_version

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder, loaded and checked against the spec.

        Raises
        ------
        EncoderError
            The encoder cannot be loaded, or the card does not name its location.
        ModelError
            The encoder is not the one that the model was trained on.
        """
        from medembed.encoders.loading import load_encoder
        from medembed.extraction.image_encoder import find_tower

        reference = self.reference
        if reference is None:
            reference = find_encoder(self.card, self.model_path)
        if not isinstance(reference, str | os.PathLike):
            tower = find_tower(reference)
            self._check(tower)
            return tower
        encoder = load_encoder(
            reference,
            device=self.device,
            precision=self.precision,
            fit=str(spec_of_card(self.card).preprocessing.get("fit", "stretch")),
            # The fingerprint depends on these; the others are compared after it, below.
            poolings=[name for name in self.poolings if find_pooling(name).needs_language_model],
            progress=self.progress,
        )
        self._check(encoder)
        return encoder

    @property
    def measures(self) -> bool:
        """Whether the model reads the statistics of films besides what the encoder gives."""
        return IMAGE_STATISTICS in self.poolings

    def encode(self, pixels: np.ndarray, statistics: np.ndarray | None = None) -> np.ndarray:
        """Embed prepared images, as a cache would hold them.

        Parameters
        ----------
        pixels : uint8 (n, height, width)
        statistics : float32 (n, 7), optional
            Of the films, see `images.statistics`; needed where `measures`.

        Returns
        -------
        float32 (n, d)
            Poolings joined, cells in order; rounded to the dtype that the model's training rows
            were stored in.

        Raises
        ------
        EncoderError
            The encoder does not return its poolings, or values are not finite, or too large or too
            small for that dtype.
        """
        of_tower = list_of_tower(self.poolings)
        rows = {}
        if of_tower:
            found = self.encoder.encode(pixels, of_tower)
            rows = check_rows(self.encoder, found, of_tower, len(pixels), len(pixels))
        if statistics is not None:
            rows[IMAGE_STATISTICS] = statistics
        dtype = spec_of_card(self.card).dtype
        stored = []
        for name in self.poolings:
            values = rows[name]
            with np.errstate(over="ignore"):
                narrow = values.astype(dtype)
            loss = describe_loss(values, narrow)
            if loss:
                raise EncoderError(f"the embedding does not fit {dtype}: pooling {name} {loss}")
            stored.append(narrow.reshape(len(pixels), -1))
        return np.hstack(stored).astype(np.float32)

    def _check(self, encoder: Encoder) -> None:
        from medembed.extraction import spec_of

        has = {IMAGE_STATISTICS, *encoder.dimensions}
        offered = [name for name in self.poolings if name in has]
        spec = spec_of(encoder, offered or list(encoder.dimensions)[:1], "float32", self.intensity)
        check_spec(self.card, spec, f"the encoder {encoder.source}")


class CachedRows:
    """The rows of a cache that a model can read.

    Raises
    ------
    PathNotFoundError, CacheError
        The cache is missing or damaged.
    ModelError
        The cache's spec differs from that of the model's training.
    """

    def __init__(self, cache: Cache | str | os.PathLike[str], card: Card) -> None:
        self.cache = open_cache(cache)
        check_spec(card, self.cache.spec, f"those in the cache at {self.cache.path}")
        self.poolings = card.pooling.split("+")

    def has(self, digests: Sequence[str]) -> np.ndarray:
        """Return whether each SHA-256 has a row: (n,) bool; False for ""."""
        known = np.array([digest != "" for digest in digests], bool)
        found = np.zeros(len(digests), bool)
        found[known] = self.cache.is_done(keys_from_hex([d for d in digests if d]))
        return found

    def failures(self) -> dict[str, Failure]:
        """Return failures that would recur, by sha256; unreadable files may be readable by now."""
        return {s: f for s, f in self.cache.failures().items() if f.stage != "read"}

    def read(self, digests: Sequence[str]) -> np.ndarray:
        """Return the existing rows of these SHA-256, float32 (n, d), like `Embedder.encode`."""
        keys = keys_from_hex(list(digests))
        rows = self.cache.read(keys, self.poolings)
        flat = [rows[name].reshape(len(keys), -1) for name in self.poolings]
        return np.hstack(flat).astype(np.float32)


class JoinedRows:
    """The rows of an ensemble's caches, side by side in the order of the columns that it reads.

    It is used like `CachedRows`; an image counts as cached where every cache has it.
    """

    def __init__(self, parts: Sequence[CachedRows]) -> None:
        self.parts = parts

    def has(self, digests: Sequence[str]) -> np.ndarray:
        """Return whether each SHA-256 has a row in every cache: (n,) bool."""
        return np.asarray(np.all([part.has(digests) for part in self.parts], axis=0), bool)

    def failures(self) -> dict[str, Failure]:
        """Return the failures of all caches, by sha256."""
        return {name: own for part in self.parts for name, own in part.failures().items()}

    def read(self, digests: Sequence[str]) -> np.ndarray:
        """Return the rows of these SHA-256, float32 (n, d), like `CachedRows.read`."""
        return np.hstack([part.read(digests) for part in self.parts])


_CacheLike = Cache | str | os.PathLike[str]


def open_caches(caches: _CacheLike | Sequence[_CacheLike], card: Card) -> CachedRows | JoinedRows:
    """Return the rows of caches that a model can read; an ensemble may need several.

    Raises
    ------
    PathNotFoundError, CacheError
        A cache is missing or damaged.
    ModelError
        No cache holds what the model reads of an encoder, or a cache is of no use to it.
    """
    given = [caches] if isinstance(caches, Cache | str | os.PathLike) else list(caches)
    opened = [open_cache(cache) for cache in given]
    cards = card.by_encoder()
    if len(cards) == len(opened) == 1:
        return CachedRows(opened[0], cards[0])
    found = [
        (_find_cache(opened, replace(own, pooling=name)), own, name)
        for own in cards
        for name in own.pooling.split("+")
    ]
    unused = [cache for cache in opened if all(cache is not used for used, _, _ in found)]
    if unused:
        raise ModelError(
            f"the cache at {unused[0].path} holds nothing that the model still needs. Leave it out."
        )
    parts = []
    for _, run in groupby(found, key=lambda place: (id(place[0]), id(place[1]))):
        own = list(run)
        pooling = "+".join(name for _, _, name in own)
        parts.append(CachedRows(own[0][0], replace(own[0][1], pooling=pooling)))
    return JoinedRows(parts)


def _find_cache(caches: Sequence[Cache], card: Card) -> Cache:
    """Return the first cache with the one pooling that a card names."""
    refusals = []
    for cache in caches:
        try:
            check_spec(card, cache.spec, f"those in the cache at {cache.path}")
        except ModelError as error:
            refusals.append(error)
        else:
            return cache
    source = card.encoder.source
    raise ModelError(
        f"none of the {counted(len(caches), 'cache')} given holds {card.pooling} of {source}: "
        f"{refusals[0]} An ensemble needs a cache for each of its encoders."
    )


def find_encoder(card: Card, model_path: Path) -> str | Path:
    """Return the reference of the encoder that a card names.

    Raises
    ------
    EncoderError
        The card names no encoder, a missing directory, or a directory without its location.
    """
    way_out = "Name the encoder with --encoder."
    source, revision = card.encoder.source, card.encoder.revision
    place = card.encoder.path
    if place:
        directory = Path(os.path.normpath(model_path.resolve() / place))
        if directory.is_dir():
            return directory
        raise EncoderError(
            f"the model at {model_path} reads embeddings of an adapted encoder, which its card "
            f"places at {place} from there, but it does not exist. {way_out}"
        )
    if not source:
        raise EncoderError(
            f"the model at {model_path} does not name the encoder of its embeddings. {way_out}"
        )
    if source == DEMO:
        return DEMO
    if "/" not in source:
        raise EncoderError(
            f"the model at {model_path} reads embeddings of {source}, a directory whose location "
            f"its card does not record. {way_out}"
        )
    return f"{source}@{revision}" if revision else str(source)


def read_intensity(spec: CacheSpec) -> Intensity:
    """Return the intensity that `Intensity.as_spec` wrote into a spec.

    Raises
    ------
    ModelError
        The spec's entry is invalid.
    """
    text = spec.preprocessing.get("window")
    try:
        return Intensity.from_spec(text)
    except ImageError as error:
        raise ModelError(f"the model's window {text!r} is none: {error}") from error


FEW = 8
"""Up to this many images are decoded in this process: starting others would take longer."""

LITTLE_BYTES = 1 << 26
"""Largest file decoded in this process: a larger film may take longer than `Limits` allows."""

BATCH_ON_GPU = 16


@dataclass(frozen=True)
class File:
    """An image to be embedded: its number among the requests, its path, its SHA-256."""

    number: int
    path: Location
    sha256: str


@dataclass(frozen=True, eq=False)
class Encoded:
    """The outcome of embedding a file.

    Attributes
    ----------
    number : int
    x : float32 (d,) or None
        The embedding.
    pixels : uint8 (height, width) or None
        The prepared image.
    error : str or None
        Why both are None.
    """

    number: int
    x: np.ndarray | None = None
    pixels: np.ndarray | None = None
    error: str | None = None


def encode_files(files: Sequence[File], embedders: Sequence[Embedder]) -> Generator[list[Encoded]]:
    """Yield the outcomes of the files, in order, a batch at a time.

    With several encoders, of an ensemble, each decodes and embeds every file; their embeddings
    stand side by side, and a file that fails with one of them has failed.

    On a CPU a batch is one image, so that each answer comes as early as possible, and a row does
    not depend on the other requests. A GPU receives up to `BATCH_ON_GPU` images at a time, fewer
    if the next one has not been read yet.

    Raises
    ------
    EncoderError
        The encoder cannot be loaded.
    MedembedError
        The decoder processes end on every image.
    """
    if len(embedders) > 1:
        yield from _encode_with_each(files, embedders)
        return
    [embedder] = embedders
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


def _encode_with_each(
    files: Sequence[File], embedders: Sequence[Embedder]
) -> Generator[list[Encoded]]:
    with contextlib.ExitStack() as stack:
        streams = [
            stack.enter_context(contextlib.closing(encode_files(files, [embedder])))
            for embedder in embedders
        ]
        outcomes = [(own for batch in stream for own in batch) for stream in streams]
        for every in zip(*outcomes, strict=True):
            yield [_join(every)]


def _join(every: Sequence[Encoded]) -> Encoded:
    errors = [own.error for own in every if own.x is None]
    if errors:
        return Encoded(every[0].number, error=errors[0])
    x = np.concatenate([own.x for own in every if own.x is not None])
    return Encoded(every[0].number, x, every[0].pixels)


_Pairs = Generator[tuple[File, Reading] | None]


def _read_here(files: Sequence[File], embedder: Embedder, size: int) -> _Pairs:
    transform = _transform(embedder)
    for file in files:
        assert isinstance(file.path, Path)
        reading = read_content(
            [file.path],
            file.sha256,
            transform,
            embedder.intensity,
            embedder.limits,
            measure_image if embedder.measures else None,
        )
        yield file, _joining(reading, embedder)


def _read_ahead(files: Sequence[File], embedder: Embedder, size: int) -> _Pairs:
    n_decoders = choose_processes(
        None, "--decoders", DECODER_BYTES, MedembedError, default=default_decoders()
    )
    n_decoders = min(n_decoders, len(files))
    # Relative to the file system's root: loose files may be anywhere, a manifest's are resolved.
    # In a bucket relative to that, whose prefixes the manifest's are below.
    contents = [Content(file.sha256, (_place(file.path),)) for file in files]
    waiting = deque(files)
    with Decoders(
        n_decoders,
        embedder.encoder.preprocessing,
        embedder.intensity,
        embedder.limits,
        measures=embedder.measures,
    ) as decoders:
        for pair in decoders.read(contents, _anchor(files[0].path), 2 * size + n_decoders):
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
                    statistics=reading.statistics,
                ),
            )


def _place(path: Location) -> str:
    return path.key if isinstance(path, BucketPath) else str(path)


def _anchor(path: Location) -> Location:
    if isinstance(path, BucketPath):
        return BucketPath(path.scheme, path.bucket)
    return Path(path.anchor)


def _joining(reading: Reading, embedder: Embedder) -> Reading:
    return reading.joining(embedder.images_version, "the model", "Train it again on a new cache")


def _are_little(files: Sequence[File]) -> bool:
    """Return whether decoding is quick; slow files are left to a process that can be ended."""
    n_bytes = 0
    for file in files:
        if isinstance(file.path, BucketPath):
            return False
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
        measured = np.array([batch[place][1].statistics for place in whole], np.float32)
        found = dict(zip(whole, _embed(pixels, measured, embedder), strict=True))
    encoded = []
    for place, (file, reading) in enumerate(batch):
        outcome = found.get(place, _reason(reading))
        if isinstance(outcome, str):
            encoded.append(Encoded(file.number, error=outcome))
        else:
            encoded.append(Encoded(file.number, outcome, reading.pixels))
    return encoded


def _embed(
    pixels: np.ndarray, measured: np.ndarray, embedder: Embedder
) -> Sequence[np.ndarray | str]:
    """Return embeddings computed together, or one by one if that fails, to isolate a bad image."""
    try:
        return list(embedder.encode(pixels, measured if embedder.measures else None))
    except EncoderError as error:
        if len(pixels) == 1:
            return [f"cannot be encoded: {error}"]
    return [
        row
        for i in range(len(pixels))
        for row in _embed(pixels[i : i + 1], measured[i : i + 1], embedder)
    ]


def _pixels(reading: Reading) -> np.ndarray:
    assert reading.pixels is not None
    return reading.pixels


def _reason(reading: Reading) -> str:
    if reading.other_sha256 is not None:
        return (
            f"holds other bytes than expected: its sha256 begins {reading.other_sha256[:12]}. "
            "Restore the file, or build the manifest again."
        )
    verb = "read" if reading.stage == "read" else "decoded"
    return f"cannot be {verb}: {reading.reason}"
