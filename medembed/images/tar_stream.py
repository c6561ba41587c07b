"""Images in tar files, as WebDataset lays them out: read from front to back, never sought in.

`tar://PLACE` names one tar file, or a directory or bucket's prefix with several. A sample is a run
of members whose names are equal up to the first dot of their last part: `0007.png`, `0007.json`.
An image of a manifest is named by its tar file and member, `shard-000.tar/0007.png`.
"""

import io
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from medembed.core import object_store
from medembed.core.errors import ArgumentError, ImageError, PathNotFoundError, StorageError
from medembed.core.files import describe_error, open_plain
from medembed.core.locations import BucketPath, Location, parse_location
from medembed.images.stream_files import StreamFile

__all__ = ["TarRoot", "list_tars", "parse_tar_root", "read_members"]

SCHEME = "tar://"
BLOCK = 8 * 2**20  # bytes of an object asked for at once


@dataclass(frozen=True)
class TarRoot:
    """Tar files that serve as an image root.

    Parameters
    ----------
    place : Path or BucketPath
        A tar file, or what contains tar files.
    """

    place: Location

    def __str__(self) -> str:
        return f"{SCHEME}{self.place}"

    def __fspath__(self) -> str:
        return str(self)


def parse_tar_root(text: str) -> TarRoot | None:
    """Read `tar://PLACE`, where PLACE is a local path or a bucket's URL; None for anything else.

    Raises
    ------
    ArgumentError
        PLACE is empty, or a URL that `parse_location` refuses.
    """
    if not text.startswith(SCHEME):
        return None
    place = text.removeprefix(SCHEME)
    if not place:
        raise ArgumentError(
            "tar:// names no tar file. Write tar://DIR or tar://s3://BUCKET/PREFIX."
        )
    return TarRoot(parse_location(place))


def list_tars(root: TarRoot) -> list[StreamFile]:
    """Return the tar files of a root, sorted by name.

    Raises
    ------
    PathNotFoundError
        There is none.
    """
    place = root.place
    found: dict[str, Location]  # by the name that is unique below the root
    if isinstance(place, BucketPath):
        found = _find_objects(place)
    elif place.suffix == ".tar":
        found = {place.name: place} if place.is_file() else {}
    else:
        found = {path.name: path for path in place.glob("*.tar")}
    if not found:
        raise PathNotFoundError(
            f"no tar file at {place} to find images in. Name a file that ends in .tar, or the "
            "directory or prefix that holds such files."
        )
    named = sorted(found.items())
    return [StreamFile(name, str(path), partial(_open, path)) for name, path in named]


def _find_objects(place: BucketPath) -> dict[str, Location]:
    if place.suffix == ".tar" and object_store.object_exists(place):
        return {place.name: place}
    below = [own.path for own in object_store.list_objects(place) if own.path.suffix == ".tar"]
    skipped = len(place.key) + 1 if place.key else 0
    return {path.key[skipped:]: path for path in below}


def read_members(tars: Iterable[StreamFile], max_bytes: int) -> Iterator[tuple[str, bytes | None]]:
    """Yield the files in tar files, in order, each once and read to its end.

    Yields
    ------
    str
        The tar file's name and the member's, joined by a slash.
    bytes or None
        The content; None if it has more than `max_bytes` bytes.

    Raises
    ------
    ImageError
        A tar file is damaged or ends early.
    StorageError
        A bucket or hub refuses, or keeps failing.
    """
    for own in tars:
        try:
            with (
                own.open() as file,
                tarfile.open(fileobj=file, mode="r|*", tarinfo=_Member) as tar,
            ):
                for member in tar:
                    if not member.isfile():
                        continue
                    content = tar.extractfile(member) if member.size <= max_bytes else None
                    yield f"{own.name}/{member.name}", content.read() if content else None
        except StorageError:
            raise
        except (tarfile.TarError, EOFError, OSError, ValueError, ArithmeticError) as error:
            # (the last two: numbers of a header that are none)
            raise ImageError(
                f"tar file {own.place} cannot be read to its end: {describe_error(error)}. Restore "
                "it from a copy."
            ) from error


class _Member(tarfile.TarInfo):
    """A header of a tar file; only the mark of its end may end it, which tarfile does without."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                raise
            raise tarfile.ReadError(str(error)) from error


def _open(path: Location) -> io.BufferedIOBase:
    if isinstance(path, BucketPath):
        return io.BufferedReader(_ObjectFile(path), BLOCK)
    file = open_plain(Path(path))
    assert isinstance(file, io.BufferedIOBase)
    return file


class _ObjectFile(io.RawIOBase):
    """An object of a bucket, read in order; a request that fails is tried again from its start."""

    def __init__(self, path: BucketPath) -> None:
        self._path, self._place = path, 0
        self._read: object_store.Part | None = None  # the part before

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview | bytearray") -> int:  # type: ignore[override]
        before = self._read
        if before and self._place >= before.size:
            return 0
        stop, etag = self._place + len(buffer), before.etag if before else None
        self._read = object_store.read_part(self._path, self._place, stop, etag=etag)
        data = self._read.data
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)
