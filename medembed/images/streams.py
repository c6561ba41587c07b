"""Image roots that are read from front to back: tar files, and datasets of the Hugging Face hub.

Images of a stream are known by the SHA-256 of their bytes; nothing is looked up by name.
"""

from collections.abc import Iterator
from typing import TypeAlias

from typing_extensions import TypeIs

from medembed.core.errors import ImageError
from medembed.images.hub_dataset import (
    DatasetFiles,
    HubRoot,
    list_data_files,
    parse_hub_root,
    pin_commit,
)
from medembed.images.parquet_stream import ImageColumns, read_columns, read_rows
from medembed.images.stream_files import StreamFile, read_files
from medembed.images.tar_stream import TarRoot, list_tars, parse_tar_root, read_members

__all__ = [
    "StreamRoot",
    "explain_stream",
    "is_stream",
    "list_stream",
    "parse_stream_root",
    "read_images",
    "refuse_without_images",
    "settle_stream",
]

StreamRoot: TypeAlias = TarRoot | HubRoot
"""A place whose images come in their own order."""


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
    pinned = pin_commit(root) if isinstance(root, HubRoot) else root
    list_stream(pinned)
    return pinned


def list_stream(root: StreamRoot) -> DatasetFiles:
    """Return the files of a stream, and what they are.

    Parameters
    ----------
    root : TarRoot or HubRoot
        A dataset of the hub at a commit, as `settle_stream` returns it.

    Raises
    ------
    PathNotFoundError, StorageError
        As `settle_stream` raises them.
    ImageError
        As `list_data_files` raises it.
    """
    if isinstance(root, HubRoot):
        return list_data_files(root)
    return DatasetFiles("tar", tuple(list_tars(root)), (), {})


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
    found = list_stream(root)
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
