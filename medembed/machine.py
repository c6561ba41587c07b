"""What this machine has to offer."""

import os
import shutil
from pathlib import Path

__all__ = ["count_cores", "free_bytes"]


def count_cores() -> int:
    """Count the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def free_bytes(path: Path) -> int:
    """Give the free bytes of the disk on which `path` is, or would be made."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free
