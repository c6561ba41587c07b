"""The resources of this machine: cores, memory, disks and libraries."""

import os
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from medembed.core.errors import MissingLibraryError

__all__ = [
    "DECIDING",
    "available_memory",
    "choose_processes",
    "count_cores",
    "default_decoders",
    "end_with_parent",
    "free_bytes",
    "library_versions",
    "missing_library",
    "processor_flags",
    "require_libraries",
    "reserve",
    "total_memory",
]

#: Distributions whose releases decide a result, by the job that records them with it.
DECIDING = {
    "extraction": ("medembed", "numpy", "pillow", "torch", "transformers"),
    "autoencoder": ("medembed", "numpy", "pillow", "safetensors", "torch"),
    "sweep": ("medembed", "numpy", "scikit-learn", "torch", "lightgbm"),
    "finetune": ("medembed", "numpy", "scikit-learn", "torch", "transformers"),
    "map": ("medembed", "numpy", "scipy", "openTSNE"),
    "evaluation": ("medembed", "numpy", "scikit-learn", "torch", "lightgbm"),
}
PER_CORE = 4
"""Most processes per core: those that read from a network file system mostly wait."""
CGROUPS = Path("/sys/fs/cgroup")
PARENT_SECONDS = 0.5
"""Seconds between two checks of whether the parent process is still running."""
MAX_DECODERS = 32
"""Default limit of decoder processes. By calculation a GPU takes some 100 large images a second: 32
processes keep up if each takes less than 0.3 s per image, and further ones only take memory."""


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def default_decoders(environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of decoder processes for this process: its share of the cores, up to 32.

    A launcher that starts several processes on a machine sets their number: torchrun in
    `LOCAL_WORLD_SIZE`, SLURM in `SLURM_STEP_TASKS_PER_NODE` and, equal for all nodes, in
    `SLURM_NTASKS_PER_NODE`. Cores that SLURM has bound to this process alone are not shared.
    """
    cores = count_cores()
    n_processes = _count_processes(environ)
    given = environ.get("SLURM_CPUS_ON_NODE", "")
    bound = "LOCAL_WORLD_SIZE" not in environ and given.isdecimal() and cores < int(given)
    return max(1, min(MAX_DECODERS, cores if bound else cores // n_processes))


def _count_processes(environ: Mapping[str, str]) -> int:
    """Return how many processes the launcher has started on this machine, 1 without a launcher."""
    text = environ.get("LOCAL_WORLD_SIZE", "")
    if not text and environ.get("SLURM_STEP_ID", "").isdecimal():  # not in a batch script itself
        text = _own_tasks(environ) or environ.get("SLURM_NTASKS_PER_NODE", "")
    return max(1, int(text)) if text.isdecimal() else 1


def _own_tasks(environ: Mapping[str, str]) -> str:
    """Return this node's number in a list for all nodes, such as "4(x2),3"."""
    counts: list[str] = []
    for number, times in re.findall(
        r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    ):
        counts += [number] * int(times or 1)
    node = environ.get("SLURM_NODEID", "0")
    place = int(node) if node.isdecimal() else 0
    return counts[place] if place < len(counts) else ""


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk on which `path` is or would be created."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def processor_flags() -> set[str]:
    """Return the processor's flags, such as "avx2", as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def total_memory() -> int:
    """Return the bytes of memory that this process may use: the machine's, or its container's."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _memory_limits():
        with suppress(OSError, ValueError):  # "max" is not a number
            found.append(int(path.read_text()))
    return min(found)


def available_memory() -> int:
    """Return the bytes of memory that are free for this process, here and in its container.

    What the system only keeps to read files faster counts as free.
    """
    found = [total_memory()]
    with suppress(OSError, KeyError):
        known = _read_counts(Path("/proc/meminfo"))  # in kB
        found.append(1024 * (known["MemAvailable"] + known.get("SwapFree", 0)))
    for limit in _memory_limits():
        is_first = limit.name == "memory.limit_in_bytes"
        usage = limit.with_name("memory.usage_in_bytes" if is_first else "memory.current")
        with suppress(OSError, ValueError):
            free = int(limit.read_text()) - int(usage.read_text())
            kept = _read_counts(limit.with_name("memory.stat"))
            name = "total_inactive_file" if is_first else "inactive_file"
            found.append(max(0, free + kept.get(name, 0)))
    return min(found)


def _read_counts(path: Path) -> dict[str, int]:
    """Return the numbers of a file of lines such as "MemAvailable:  1234 kB" or "anon 1234"."""
    words = [line.split() for line in path.read_text().splitlines()]
    return {own[0].rstrip(":"): int(own[1]) for own in words if len(own) > 1}


def _memory_limits() -> Iterator[Path]:
    """Yield the files of Linux's control groups that may hold a limit, versions 2 and 1."""
    yield CGROUPS / "memory" / "memory.limit_in_bytes"
    groups = []
    with suppress(OSError):
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    for line in groups:
        number, kinds, name = line.split(":", 2)
        own = CGROUPS / ("memory" if kinds == "memory" else "") / name.lstrip("/")
        if number == "0" or kinds == "memory":
            for place in (own, *own.parents):
                if place.is_relative_to(CGROUPS):
                    yield place / ("memory.limit_in_bytes" if kinds else "memory.max")


def choose_processes(
    asked: int | None,
    option: str,
    bytes_each: int,
    error: type[Exception],
    *,
    default: int | None = None,
) -> int:
    """Return the number of processes to start, within the limits of cores and memory.

    Parameters
    ----------
    asked : int, optional
        The requested number; `default` if None.
    option : str
        The option that sets the number, such as "--jobs", for the message.
    bytes_each : int
        Memory that one process takes.
    error : type
        The type of exception to raise.
    default : int, optional
        The default number; one per core if None.

    Raises
    ------
    Exception
        Of type `error`: more than `PER_CORE` per core are requested, or than fit into memory.
    """
    cores, memory = count_cores(), total_memory()
    fitting = max(1, memory // bytes_each)
    if asked is None:
        return min(default or cores, fitting)
    most = min(PER_CORE * cores, fitting)
    if asked > most:
        raise error(
            f"{option} {asked} is more than this machine bears: with {cores} cores and "
            f"{memory / 1e9:,.1f} GB of memory at most {most}. Give no more, or leave it out."
        )
    return asked


def end_with_parent() -> None:
    """Make this process end soon after its parent, however that ends."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def library_versions(job: str, *more: str) -> dict[str, str]:
    """Return the installed releases of the distributions that decide what a job results in.

    What is not installed is left out; so is medembed itself where it runs from a checkout.

    Parameters
    ----------
    job : str
        One of `DECIDING`.
    *more : str
        Distributions that decide it this time, such as `peft` where adapters are trained.
    """
    found = {}
    for name in (*DECIDING[job], *more):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def require_libraries(who: str, names: Iterable[str], extra: str) -> None:
    """Refuse where a library is not installed, without importing any.

    Parameters
    ----------
    who : str
        What needs them, as the beginning of a sentence.
    names : iterable of str
        The libraries, as they are imported.
    extra : str
        The extra of medembed that brings them.

    Raises
    ------
    MissingLibraryError
        One of them is not installed.
    """
    for name in names:
        if find_spec(name) is None:
            raise missing_library(who, name, extra)


def missing_library(who: str, name: str, extra: str, instead: str = "") -> MissingLibraryError:
    """Return the error for a library that is not installed, with the extra that brings it.

    Parameters
    ----------
    who, name, extra
        As in `require_libraries`.
    instead : str
        What else the user can do.
    """
    or_else = f", or {instead}" if instead else ""
    return MissingLibraryError(
        f"{who} needs {name}, which is not installed: pip install 'medembed[{extra}]'{or_else}."
    )


def reserve(handle: int, n_bytes: int) -> None:
    """Allocate an open file's full size on the disk: running out later would be a bus error.

    Raises
    ------
    OSError
        The disk is full.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, n_bytes)
    os.ftruncate(handle, n_bytes)
