"""SHA-256 of many files, in parallel."""

import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from medembed.core import object_store
from medembed.core.errors import ManifestError, PathNotFoundError, StorageError
from medembed.core.files import open_plain
from medembed.core.locations import BucketPath, Location
from medembed.core.system import count_cores

__all__ = ["hash_files", "hash_or_explain"]

N_FILES_PER_TASK = 64  # one task per file spends more on the queue than on the file
WHOLE_FILE_LIMIT = 32 * 1024 * 1024  # bytes; larger files are read in pieces


def hash_files(
    paths: Sequence[str | Path],
    progress: Callable[[int, int], None] | None = None,
    jobs: int | None = None,
) -> list[str]:
    """Return the SHA-256 of each file's bytes as 64 lower-case hex digits, in the order of `paths`.

    Parameters
    ----------
    paths : sequence of path
    progress : callable, optional
        Called as `progress(done, total)` while the work goes on.
    jobs : int, optional
        Number of threads; hashing and reading release the interpreter's lock. Default: the CPUs
        that this process may use.

    Raises
    ------
    PathNotFoundError
        A file is missing; the first is named.
    ManifestError
        A file cannot be read; the first is named with the reason.
    """
    digests: list[str] = []
    for path, outcome in zip(paths, hash_or_explain(paths, progress, jobs), strict=True):
        if isinstance(outcome, FileNotFoundError):
            raise PathNotFoundError(f"no file at {path}. Restore it, or correct the image root.")
        if isinstance(outcome, OSError):
            raise ManifestError(
                f"{path} cannot be read: {outcome.strerror}. "
                "Make it readable, or leave it out with [exclude] in the recipe."
            )
        digests.append(outcome)
    return digests


def hash_or_explain(
    paths: Sequence[str | Location],
    progress: Callable[[int, int], None] | None = None,
    jobs: int | None = None,
) -> list[str | OSError]:
    """Return what `hash_files` does, but with the error in place of an unreadable file's hash.

    Paths may be objects of a bucket, of which a bounded number is fetched at once.

    Raises
    ------
    StorageError
        The bucket refuses, or keeps failing, which says nothing about an object.
    """
    is_far = any(isinstance(path, BucketPath) for path in paths)
    size, n_threads = (1, object_store.AHEAD) if is_far else (N_FILES_PER_TASK, count_cores())
    batches = [paths[i : i + size] for i in range(0, len(paths), size)]
    outcomes: list[str | OSError] = []
    with ThreadPoolExecutor(jobs or n_threads) as executor:
        try:
            for batch in executor.map(_hash_batch, batches):
                outcomes.extend(batch)
                if progress is not None:
                    progress(len(outcomes), len(paths))
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise
    return outcomes


def _hash_batch(paths: Sequence[str | Location]) -> list[str | OSError]:
    return [_hash_one(path) for path in paths]


def _hash_one(path: str | Location) -> str | OSError:
    try:
        if isinstance(path, BucketPath):
            return _hash_object(path)
        with open_plain(path, buffering=0) as file:
            if os.fstat(file.fileno()).st_size > WHOLE_FILE_LIMIT:
                return hashlib.file_digest(file, "sha256").hexdigest()
            return hashlib.sha256(file.read()).hexdigest()
    except StorageError:
        raise
    except OSError as error:
        return error


def _hash_object(path: BucketPath) -> str:
    """Return the SHA-256 of an object, of which a piece at a time is held."""
    part = object_store.read_part(path, 0, WHOLE_FILE_LIMIT)
    digest, place = hashlib.sha256(part.data), len(part.data)
    while place < part.size:
        stop = place + WHOLE_FILE_LIMIT
        part = object_store.read_part(path, place, stop, etag=part.etag)
        if not part.data:
            raise OSError(errno.EIO, "it became shorter while it was read", str(path))
        digest.update(part.data)
        place += len(part.data)
    return digest.hexdigest()
