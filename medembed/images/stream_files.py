"""Files of images: their suffixes, and those that are read in order wherever they lie."""

import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

__all__ = ["IMAGE_SUFFIXES", "StreamFile", "read_files"]

AHEAD = 16  # files that are fetched or wait

IMAGE_SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".dcm", ".dicom"),
}
"""Of files that are taken for images."""


@dataclass(frozen=True)
class StreamFile:
    """A file that holds images, read in order: on a disk, in a bucket, or at a hub.

    Attributes
    ----------
    name : str
        What the names of its images begin with.
    place : str
        Where it is, for messages.
    open : callable
        Returns the file, opened for reading.
    size : int
        Bytes; -1 if they are not known.
    split : str
        The data set's own name of the split that the file belongs to; "" if it has none.
    """

    name: str
    place: str
    open: Callable[[], io.BufferedIOBase]
    size: int = -1
    split: str = ""


def read_files(files: Sequence[StreamFile], max_bytes: int) -> Iterator[tuple[str, bytes | None]]:
    """Yield files whole, in order, a bounded number of them ahead.

    Yields
    ------
    str
        `StreamFile.name`.
    bytes or None
        The content; None if it has more than `max_bytes` bytes.
    """

    def read(file: StreamFile) -> bytes | None:
        if file.size > max_bytes:
            return None
        with file.open() as handle:
            return handle.read()

    waiting: deque[tuple[str, Future[bytes | None]]] = deque()
    pool = ThreadPoolExecutor(AHEAD // 2, "reader")
    try:
        for file in files:
            waiting.append((file.name, pool.submit(read, file)))
            if len(waiting) > AHEAD:
                name, future = waiting.popleft()
                yield name, future.result()
        for name, future in waiting:
            yield name, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
