"""Read a file, verify its hash, and decode it into a grey array."""

import errno
import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from medembed.core import object_store
from medembed.core.errors import ImageError, StorageError
from medembed.core.files import read_plain
from medembed.core.locations import BucketPath, Location
from medembed.core.system import count_cores
from medembed.images.decode import decode_image
from medembed.images.intensity import DEFAULT_INTENSITY, Intensity
from medembed.images.versions import FIRST_VERSION, why_changed

__all__ = [
    "DEFAULT_LIMITS",
    "MAX_SECONDS",
    "Content",
    "Limits",
    "Reading",
    "read_content",
    "read_contents",
]

MAX_SECONDS = 1_000_000.0
"""The longest time limit that the system's timers can represent."""


@dataclass(frozen=True)
class Limits:
    """Limits on a file's size and processing time, beyond which it counts as failed.

    Parameters
    ----------
    max_bytes : int
        Size of the file. Radiographs have up to 0.2 GB.
    max_seconds : float
        Computing time to read and decode the file; waiting for a disk may take ten times as long.

    Raises
    ------
    ValueError
        A limit is not above 0, or exceeds what the system can enforce.
    """

    max_bytes: int = 1 << 30
    max_seconds: float = 120.0

    def __post_init__(self) -> None:
        """Refuse limits that are out of range."""
        for name, most in (("max_bytes", 2**63 - 1), ("max_seconds", MAX_SECONDS)):
            if not 0 < getattr(self, name) <= most:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be above 0 and at most {most:,}"
                )


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Content:
    """A file content, and the images of a manifest that have it.

    Parameters
    ----------
    sha256 : str
        SHA-256 of the bytes, in hex.
    images : tuple of str
        Paths relative to the image root, at least one.
    """

    sha256: str
    images: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Reading:
    """The outcome of reading a content: its pixels, or the reason for their absence.

    Parameters
    ----------
    pixels : ndarray or None
        uint8, the result of `transform`.
    colour : bool
        Whether colour was reduced to luminance.
    notes : tuple of str
        `Radiograph.notes`.
    since : int
        `Radiograph.since`, or `ImageError.since` if the image cannot be decoded.
    stage : {"read", "decode"} or None
        The stage that failed.
    reason : str
        Why the stage failed; names no path.
    other_sha256 : str or None
        Hash of the bytes found, if they differ from the manifest's.
    statistics : tuple of float
        The result of `measure`, if that was asked for.
    times : tuple of float
        `time.monotonic()` at the start, once the bytes were read and hashed, and at the end.
    """

    pixels: np.ndarray | None = None
    colour: bool = False
    notes: tuple[str, ...] = ()
    since: int = FIRST_VERSION
    stage: str | None = None
    reason: str = ""
    other_sha256: str | None = None
    statistics: tuple[float, ...] = ()
    times: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def joining(self, version: Any, what: str, way_out: str) -> "Reading":
        """Return this reading, failed if its pixels cannot join rows of an older `images_version`.

        Parameters
        ----------
        version, what
            The rows' `images_version`, and the subject of the sentence that explains the failure;
            see `versions.why_changed`.
        way_out : str
            What to do about it, a sentence without its full stop.
        """
        reason = why_changed(self.since, version, what) if self.pixels is not None else ""
        if not reason:
            return self
        words = f"the image {reason}. {way_out}"
        return replace(self, pixels=None, stage="decode", reason=words)


def read_content(
    paths: Sequence[Location],
    sha256: str,
    transform: Callable[[np.ndarray], np.ndarray],
    intensity: Intensity = DEFAULT_INTENSITY,
    limits: Limits = DEFAULT_LIMITS,
    measure: Callable[[np.ndarray], np.ndarray] | None = None,
    turn: AbstractContextManager[object] | None = None,
) -> Reading:
    """Read the first of `paths` whose bytes have this SHA-256, and decode exactly those bytes.

    Parameters
    ----------
    transform : callable
        Applied to the decoded image, uint8 (H, W).
    intensity : Intensity
        Which window of a DICOM to use.
    limits : Limits
        Only `max_bytes` is enforced here; `extraction.decode_worker` enforces the time limit.
    measure : callable, optional
        Also applied to the decoded image; returns a few numbers.
    turn : context manager, optional
        Entered for the decoding, such as a semaphore that bounds how many decode at once.

    Raises
    ------
    StorageError
        A bucket refuses, or keeps failing, which is no fault of the image.
    """
    start = time.monotonic()
    reason, other = "", None
    for path in paths:
        try:
            data = _read(path, limits.max_bytes)
        except StorageError:
            raise
        except OSError as error:
            reason = error.strerror or type(error).__name__  # `str(error)` would name the path
            if error.errno == errno.EFBIG:
                reason += "; raise --max-bytes if it is what it should be"
            continue
        found = hashlib.sha256(data).hexdigest()
        if found == sha256:
            with turn or nullcontext():
                return _decode(data, transform, intensity, start, measure)
        other = found
    now = time.monotonic()
    if other:
        return Reading(other_sha256=other, times=(start, now, now))
    return Reading(stage="read", reason=reason, times=(start, now, now))


def read_contents(
    paths: Sequence[Location],
    sha256: Sequence[str],
    transform: Callable[[np.ndarray], np.ndarray],
    intensity: Intensity = DEFAULT_INTENSITY,
) -> Iterator[Reading]:
    """Yield the reading of each path, in order, as `read_content` returns it.

    Several are decoded at once, one per core; those of a bucket are fetched ahead of that, with at
    most `object_store.AHEAD` requests in flight or fetched and not decoded yet.

    Raises
    ------
    StorageError
        A bucket refuses, or keeps failing.
    """
    is_far = any(isinstance(path, BucketPath) for path in paths)
    turn = threading.Semaphore(count_cores())  # decoded pixels are larger than what was fetched

    def read(path: Location, digest: str) -> Reading:
        return read_content([path], digest, transform, intensity, turn=turn)

    # Decoders release the interpreter's lock.
    with ThreadPoolExecutor(object_store.AHEAD if is_far else count_cores(), "reader") as pool:
        yield from pool.map(read, paths, sha256)


def _read(path: Location, max_bytes: int) -> bytes:
    if isinstance(path, BucketPath):
        return object_store.read_object(path, max_bytes=max_bytes)
    return read_plain(path, max_bytes=max_bytes)


def _decode(
    data: bytes,
    transform: Callable[[np.ndarray], np.ndarray],
    intensity: Intensity,
    start: float,
    measure: Callable[[np.ndarray], np.ndarray] | None,
) -> Reading:
    middle = time.monotonic()
    try:
        radiograph = decode_image(data, intensity)
    except ImageError as error:
        reason, times = str(error), (start, middle, time.monotonic())
        return Reading(stage="decode", reason=reason, since=error.since, times=times)
    pixels = transform(radiograph.pixels)
    statistics = () if measure is None else tuple(measure(radiograph.pixels).tolist())
    times = (start, middle, time.monotonic())
    return Reading(
        pixels=pixels,
        colour=radiograph.colour,
        notes=radiograph.notes,
        since=radiograph.since,
        statistics=statistics,
        times=times,
    )
