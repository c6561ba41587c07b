"""What this machine has to offer."""

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path

__all__ = ["count_cores", "free_bytes", "library_versions", "reserve"]


def count_cores() -> int:
    """Count the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def free_bytes(path: Path) -> int:
    """Give the free bytes of the disk on which `path` is, or would be made."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def library_versions(names: Iterable[str]) -> dict[str, str]:
    """Give the installed release of each distribution; those that are not installed are left out.

    medembed itself is not where it runs from a checkout.
    """
    found = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def reserve(handle: int, n_bytes: int) -> None:
    """Bring an open file to a size, all of it on the disk: a lack later would be a bus error.

    Raises
    ------
    OSError
        There is no room.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, n_bytes)
    os.ftruncate(handle, n_bytes)
