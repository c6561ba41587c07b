"""Images of a bucket or of a stream, ahead of the decoders, in files that a decoding outlives.

The files lie in memory where there is room; a bounded number of them is waiting at any time.
"""

import hashlib
import os
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from medembed.cache.index import SortedKeys
from medembed.cache.pending import Contents
from medembed.core import object_store
from medembed.core.errors import MedembedError, StorageError
from medembed.core.files import describe_error
from medembed.core.locations import BucketPath
from medembed.dataset.manifest import image_path
from medembed.images.load import Content, Limits
from medembed.images.streams import StreamRoot, read_images
from medembed.images.tar_stream import TarRoot

__all__ = ["Fetched", "ImageFetcher", "StreamReader"]

AHEAD = 64  # contents whose images are fetched or wait, beyond those with a slot
MAX_WAITING_BYTES = 2**30  # of fetched images; the next fetch waits until some are decoded


@dataclass(frozen=True)
class Fetched:
    """What was fetched of a content: a file for each image, or why there is none.

    Parameters
    ----------
    paths : tuple of str
        Files; empty if none of the images could be read.
    reason : str
        Why the last one could not; names no path.
    """

    paths: tuple[str, ...]
    reason: str = ""


class _Files:
    """Temporary files: in a directory, best in memory, and on the disk where that one is full."""

    def __init__(self, directory: Path | None) -> None:
        parents = (None,) if directory is None else (directory, None)
        self._made = [tempfile.TemporaryDirectory(prefix="medembed-", dir=own) for own in parents]
        self.directories = [Path(own.name) for own in self._made]

    def close(self) -> None:
        """Remove them."""
        for made in self._made:
            made.cleanup()

    def write(self, name: str, data: bytes) -> str:
        """Write a file and return its path.

        Raises
        ------
        MedembedError
            There is no room anywhere.
        """
        for directory in self.directories:
            path = directory / name
            try:
                path.write_bytes(data)
                return str(path)
            except OSError as error:
                reason = describe_error(error)
                with suppress(OSError):
                    path.unlink()
        raise MedembedError(
            f"no room for {len(data) / 1e6:,.1f} MB of a fetched image in {directory.parent}: "
            f"{reason}. Make room, or set TMPDIR to a larger disk, and run the command again."
        )


class ImageFetcher:
    """Fetches images with several requests in flight, in order, a bounded number ahead.

    Parameters
    ----------
    image_root : BucketPath
        The prefix that the images' paths are relative to.
    directory : Path or None
        Where the files are written, best in memory; by default that of temporary files.
    limits : Limits
        `max_bytes` bounds the size of an image.
    """

    def __init__(self, image_root: BucketPath, directory: Path | None, limits: Limits) -> None:
        self._root, self._limits = image_root, limits
        self._parent = directory
        self._room = threading.Condition()
        self._n_bytes, self._n_released, self._is_stopped = 0, 0, False

    def __enter__(self) -> "ImageFetcher":
        self._files = _Files(self._parent)
        self._pool = ThreadPoolExecutor(object_store.AHEAD, "fetcher")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._room:
            self._is_stopped = True
            self._room.notify_all()
        self._pool.shutdown(cancel_futures=True)
        self._files.close()

    def stream(self, contents: Sequence[Content]) -> Iterator[tuple[Content, Future[Fetched]]]:
        """Yield each content with its files as they will be, in order."""
        ahead: deque[tuple[Content, Future[Fetched]]] = deque()
        for number, content in enumerate(contents):
            ahead.append((content, self._pool.submit(self._fetch, number, content)))
            if len(ahead) > AHEAD:
                yield ahead.popleft()
        yield from ahead

    def release(self, fetched: Fetched) -> None:
        """Remove the files of a content that has been decoded."""
        freed = 0
        for path in fetched.paths:
            with suppress(OSError):
                freed += os.path.getsize(path)
                os.unlink(path)
        with self._room:
            self._n_bytes -= freed
            self._n_released += 1
            self._room.notify_all()

    def _fetch(self, number: int, content: Content) -> Fetched:
        self._wait_for_room(number)
        reason = ""
        paths: list[str] = []
        for image in content.images:
            if self._is_stopped:
                break
            try:
                path = image_path(self._root, image)
                data = object_store.read_object(path, max_bytes=self._limits.max_bytes)
            except StorageError:  # the bucket, not the image, is at fault
                raise
            except OSError as error:
                reason = error.strerror or type(error).__name__
                continue
            with self._room:
                self._n_bytes += len(data)
            paths.append(self._files.write(f"{number}-{len(paths)}", data))
            # Another name of the same content is needed only where this one holds other bytes.
            if len(content.images) == 1 or _is_content(data, content.sha256):
                break
        return Fetched(tuple(paths), reason)

    def _wait_for_room(self, number: int) -> None:
        def may_begin() -> bool:
            is_next = number <= self._n_released  # what is decoded next waits for nothing
            return self._is_stopped or is_next or self._n_bytes < MAX_WAITING_BYTES

        with self._room:
            self._room.wait_for(may_begin)


class StreamReader:
    """Reads a stream once, and hands on the images whose bytes are wanted, in their order.

    Parameters
    ----------
    root : TarRoot or HubRoot
        Tar files, or a dataset of the hub at a commit.
    directory, limits
        As `ImageFetcher` takes them.
    """

    def __init__(self, root: StreamRoot, directory: Path | None, limits: Limits) -> None:
        self._root, self._parent, self._limits = root, directory, limits

    def __enter__(self) -> "StreamReader":
        self._files = _Files(self._parent)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._files.close()

    def stream(self, contents: Contents) -> Iterator[tuple[Content, Future[Fetched]]]:
        """Yield each content once, with its file or the reason why there is none."""
        wanted = SortedKeys(contents.keys)
        is_found = np.zeros(len(contents), bool)
        for number, (_, data) in enumerate(read_images(self._root, self._limits.max_bytes)):
            if is_found.all():
                break
            if data is None:
                continue
            key = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
            place = int(wanted.find(key)[0])
            if place < 0 or is_found[place]:
                continue
            is_found[place] = True
            path = self._files.write(str(number), data)
            yield contents[place], _settled(Fetched((path,)))
        kind = "the tar files" if isinstance(self._root, TarRoot) else "the dataset"
        reason = f"no file in {kind} has its bytes, of at most {self._limits.max_bytes:,}"
        for place in np.flatnonzero(~is_found).tolist():
            yield contents[place], _settled(Fetched((), reason))

    def release(self, fetched: Fetched) -> None:
        """Remove the file of a content that has been decoded."""
        for path in fetched.paths:
            with suppress(OSError):
                os.unlink(path)


def _settled(fetched: Fetched) -> Future[Fetched]:
    future: Future[Fetched] = Future()
    future.set_result(fetched)
    return future


def _is_content(data: bytes, sha256: str) -> bool:
    return hashlib.sha256(data).hexdigest() == sha256
