"""Files become grey arrays in threads, ahead of whoever consumes them, each proved by its hash."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from medembed.dataset.images import decode_image
from medembed.dataset.manifest import image_path
from medembed.errors import ImageError

__all__ = ["Content", "Reading", "read_ahead", "read_content"]


@dataclass(frozen=True)
class Content:
    """Name one file's bytes, and the images of a manifest that have them.

    Parameters
    ----------
    sha256 : str
        Of the bytes, hex.
    images : tuple of str
        Paths relative to the image root, at least one.
    """

    sha256: str
    images: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Reading:
    """Hold what reading made of a content: pixels, or why there are none.

    Parameters
    ----------
    content : Content
        What was to be read.
    pixels : ndarray or None
        uint8, as `transform` returned it.
    colour : bool
        Whether colour was reduced to luminance.
    stage : {"read", "decode"} or None
        Where it failed.
    reason : str
        Why; names no path.
    other_sha256 : str or None
        Hash of the bytes found, where they are not the manifest's.
    """

    content: Content
    pixels: np.ndarray | None = None
    colour: bool = False
    stage: str | None = None
    reason: str = ""
    other_sha256: str | None = None


def read_content(
    content: Content, image_root: Path, transform: Callable[[np.ndarray], np.ndarray]
) -> Reading:
    """Read the first of a content's files whose bytes are the content's, and decode these bytes.

    Parameters
    ----------
    transform : callable
        Applied to the decoded image, uint8 (H, W).

    Raises
    ------
    ManifestError
        An image leads out of the root.
    """
    reason, other = "", None
    for image in content.images:
        try:
            data = image_path(image_root, image).read_bytes()
        except OSError as error:
            reason = error.strerror or type(error).__name__  # `str(error)` would name the path
            continue
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 == content.sha256:
            return _decode(content, data, transform)
        other = sha256
    if other:
        return Reading(content, other_sha256=other)
    return Reading(content, stage="read", reason=reason)


def read_ahead(
    pool: ThreadPoolExecutor,
    contents: Sequence[Content],
    image_root: Path,
    transform: Callable[[np.ndarray], np.ndarray],
    n_ahead: int,
) -> Iterator[Future[Reading]]:
    """Yield a future per content, in order, while `pool` works on the next ones.

    Parameters
    ----------
    n_ahead : int
        How many contents may be begun and not yet taken: it bounds memory.
    """
    waiting: deque[Future[Reading]] = deque()
    remaining = iter(contents)
    try:
        while True:
            for content in islice(remaining, n_ahead - len(waiting)):
                waiting.append(pool.submit(read_content, content, image_root, transform))
            if not waiting:
                return
            yield waiting.popleft()
    finally:  # the consumer gave up
        for future in waiting:
            future.cancel()


def _decode(
    content: Content, data: bytes, transform: Callable[[np.ndarray], np.ndarray]
) -> Reading:
    try:
        radiograph = decode_image(data)
    except ImageError as error:
        return Reading(content, stage="decode", reason=str(error))
    return Reading(content, pixels=transform(radiograph.pixels), colour=radiograph.colour)
