"""The files of a cache, in a directory or in a bucket, by name.

Shards of a directory are written by `shards`, which syncs, compares and renames. In a bucket a put
that fails where the name is taken stands in for the rename.
"""

import os
import secrets
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from medembed.core import object_store
from medembed.core.files import open_plain, read_plain, sync_directory
from medembed.core.locations import BucketPath, Location

__all__ = [
    "READERS",
    "Bucket",
    "Directory",
    "Store",
    "delete_files",
    "file_size",
    "publish",
    "read_file",
    "store_at",
]

READERS = 8
"""Whole shards of a bucket read at once: each may hold 64 MB in memory."""


class Store(Protocol):
    """The files of one directory of a cache, or the objects of one prefix."""

    def list(self) -> dict[str, int]:
        """Return the files' names and bytes, in any order; empty if there is nothing."""
        ...

    def get(self, name: str) -> bytes:
        """Return a file's content.

        Raises
        ------
        OSError
            FileNotFoundError if there is none; else it cannot be read.
        """
        ...

    def get_range(self, name: str, start: int, stop: int) -> bytes:
        """Return some bytes of a file, fewer where it ends."""
        ...

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write a file, complete or not at all, unless its name is taken; return whether it was."""
        ...

    def delete(self, names: Collection[str]) -> None:
        """Delete files durably, those that exist."""
        ...


@dataclass(frozen=True)
class Directory:
    """A `Store` that is a local directory.

    Parameters
    ----------
    path : Path
        It need not exist.
    """

    path: Path

    def list(self) -> dict[str, int]:  # noqa: D102
        found = {}
        with suppress(FileNotFoundError), os.scandir(self.path) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # removed meanwhile
                    if entry.is_file():
                        found[entry.name] = entry.stat().st_size
        return found

    def get(self, name: str) -> bytes:  # noqa: D102
        return read_plain(self.path / name)

    def get_range(self, name: str, start: int, stop: int) -> bytes:  # noqa: D102
        with open_plain(self.path / name) as file:
            file.seek(start)
            return file.read(stop - start)

    def put_if_absent(self, name: str, data: bytes) -> bool:  # noqa: D102
        return publish(self.path / name, data)

    def delete(self, names: Collection[str]) -> None:  # noqa: D102
        for name in names:
            (self.path / name).unlink(missing_ok=True)
        sync_directory(self.path)


@dataclass(frozen=True)
class Bucket:
    """A `Store` that is a prefix of a bucket.

    Parameters
    ----------
    path : BucketPath
        The prefix.
    """

    path: BucketPath

    def list(self) -> dict[str, int]:  # noqa: D102
        return {path.name: path.size or 0 for path in object_store.list_objects_in(self.path)}

    def get(self, name: str) -> bytes:  # noqa: D102
        return object_store.read_object(self.path / name)

    def get_range(self, name: str, start: int, stop: int) -> bytes:  # noqa: D102
        return object_store.read_range(self.path / name, start, stop)[0]

    def put_if_absent(self, name: str, data: bytes) -> bool:  # noqa: D102
        return object_store.create_object(self.path / name, data)

    def delete(self, names: Collection[str]) -> None:  # noqa: D102
        object_store.delete_objects([self.path / name for name in names])


def store_at(location: Location) -> Store:
    """Return the store of a directory or prefix."""
    return Bucket(location) if isinstance(location, BucketPath) else Directory(location)


def read_file(path: Location) -> bytes:
    """Return a file's content; raises like `Store.get`."""
    if isinstance(path, BucketPath):
        return object_store.read_object(path)
    return read_plain(path)


def file_size(path: Location) -> int:
    """Return the bytes of a file, 0 if it cannot be asked for; of an object as it was listed."""
    if isinstance(path, BucketPath):
        return path.size or 0
    try:
        return path.stat().st_size
    except OSError:
        return 0


def delete_files(folder: Location, paths: Sequence[Location]) -> None:
    """Delete files of a folder durably, in this order where it is a directory."""
    store_at(folder).delete([path.name for path in paths])


def publish(path: Path, data: bytes) -> bool:
    """Write a local file, complete or not at all, unless its name is taken; return whether it was.

    Raises
    ------
    OSError
        The directory cannot be written.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return _name(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _name(partial: Path, path: Path) -> bool:
    try:
        os.link(partial, path)  # unlike a rename, fails where the name is taken
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if path.exists():
            return False
        os.replace(partial, path)
    return True
