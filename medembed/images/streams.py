"""Image roots that are read from front to back: tar files, and datasets of the Hugging Face hub.

Images of a stream are known by the SHA-256 of their bytes; nothing is looked up by name.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

from typing_extensions import TypeIs

from medembed.core.errors import ImageError
from medembed.images.hub_dataset import HubRoot, list_data_files, parse_hub_root, pin_commit
from medembed.images.parquet_stream import ImageColumns, read_columns, read_rows
from medembed.images.stream_files import StreamFile
from medembed.images.tar_stream import TarRoot, list_tars, parse_tar_root, read_members

__all__ = [
    "StreamRoot",
    "explain_stream",
    "is_stream",
    "parse_stream_root",
    "read_files",
    "read_images",
    "refuse_without_images",
    "settle_stream",
]

StreamRoot: TypeAlias = TarRoot | HubRoot
"""A place whose images come in their own order."""
AHEAD = 16  # image files of a dataset that are fetched or wait


def is_stream(root: object) -> TypeIs[StreamRoot]:
    """Return whether an image root is read from front to back."""
    return isinstance(root, TarRoot | HubRoot)


def explain_stream(root: StreamRoot) -> str:
    """Return why a stream cannot serve where images are looked up, and the way out."""
    unpack = "unpack them" if isinstance(root, TarRoot) else "save its images as files"
    return (
        f"{root} is read from front to back, and images are looked up by name here. Extract from "
        f"it and name the --cache, or {unpack} and name the directory."
    )


def parse_stream_root(text: str) -> StreamRoot | None:
    """Read `tar://PLACE` or `hf://datasets/…`; None for anything else.

    Raises
    ------
    ArgumentError
        It has one of the two schemes, and names nothing.
    """
    return parse_tar_root(text) or parse_hub_root(text)


def settle_stream(root: StreamRoot) -> StreamRoot:
    """Return a root that exists, a dataset of the hub at its commit of now.

    Raises
    ------
    PathNotFoundError
        There is no tar file, or the dataset holds no images.
    StorageError
        The hub or the bucket refuses, or cannot be reached.
    """
    if isinstance(root, TarRoot):
        list_tars(root)
        return root
    pinned = pin_commit(root)
    list_data_files(pinned)
    return pinned


def read_images(root: StreamRoot, max_bytes: int) -> Iterator[tuple[str, bytes | None]]:
    """Yield the files of a stream, in order, each read once; not all of them are images.

    Yields
    ------
    str
        The name that a manifest built from the stream has for it.
    bytes or None
        The content; None if it has more than `max_bytes` bytes, or is missing.

    Raises
    ------
    ImageError
        A file is damaged or ends early.
    StorageError
        The hub or the bucket refuses, or keeps failing.
    """
    if isinstance(root, TarRoot):
        yield from read_members(list_tars(root), max_bytes)
        return
    found = list_data_files(root)
    if found.layout == "tar":
        yield from read_members(found.files, max_bytes)
    elif found.layout == "images":
        yield from read_files(found.files, max_bytes)
    else:
        for file in found.files:
            columns = read_columns(file)
            refuse_without_images(file, columns)
            for row in read_rows(file, columns.images, (), max_bytes):
                yield from ((cell.name, cell.data) for cell in row.cells)


def refuse_without_images(file: StreamFile, columns: ImageColumns) -> None:
    """Raise ImageError if a Parquet file has no column of images."""
    if not columns.images:
        listed = ", ".join(map(repr, (*columns.values, *columns.others)))
        raise ImageError(
            f"Parquet file {file.place} has no column with the bytes of images; its columns are "
            f"{listed}. Where one holds only addresses or paths, download the images first and "
            "build the manifest with --from-table."
        )


def read_files(files: Sequence[StreamFile], max_bytes: int) -> Iterator[tuple[str, bytes | None]]:
    """Yield files whole, in order, a bounded number of them ahead; see `read_images`."""

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
