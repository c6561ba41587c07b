"""A process that extracts under `crash_shim.c`, again and again, and dies where it is told to.

Or it compacts what was extracted. It imports everything once; each extraction is a fork of it. Run
as `python crash_server.py` with the shim preloaded, it takes one JSON request per line on stdin and
answers one line each; the other side is `crashing`.
"""

import contextlib
import ctypes
import errno
import functools
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from made_extraction import HalvesEncoder

from medembed.cache import shards, storage
from medembed.cache.compaction import compact
from medembed.cache.failures import Failure
from medembed.cache.store import Cache, open_cache
from medembed.core.errors import CacheError, MedembedError
from medembed.core.system import DECIDING
from medembed.dataset.manifest import read_manifest
from medembed.extraction import canary, decode_pool, decode_worker, extract, job

# As in crash_shim.c.
HOW = {"nothing": 0, "before": 1, "middle": 2, "after": 3, "once": 4, "from": 5, "short": 6}
READS, NEEDS_ROOM, CHANGES, CLOSES, NAMES = 1, 2, 4, 8, 16
VICTIMS = {
    errno.ENOSPC: NEEDS_ROOM,
    errno.EDQUOT: NEEDS_ROOM,
    errno.EROFS: CHANGES,
    errno.EIO: READS | NEEDS_ROOM | CHANGES | CLOSES,
    errno.EACCES: NAMES,
}
BATCH_SIZE = 2
CAPABILITIES_3 = 0x20080522  # linux/capability.h: the version of what capset takes


class ForkedDecoder:
    """Stand in for `subprocess.Popen` of a decoder: as real a process, without its start-up."""

    stdin: IO[str]
    stdout: IO[str]

    def __init__(self, arguments: str) -> None:
        theirs, ours = zip(os.pipe(), os.pipe()[::-1], strict=True)
        self.pid, self._code = os.fork(), None
        if self.pid == 0:
            try:
                self._be(arguments, *theirs)
            finally:
                os._exit(1)
        for handle in theirs:
            os.close(handle)
        self.stdin, self.stdout = os.fdopen(ours[0], "w"), os.fdopen(ours[1])

    def _be(self, arguments: str, stdin: int, stdout: int) -> None:
        os.setsid()
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        shared = json.loads(arguments)["handle"]
        os.closerange(3, shared)
        os.closerange(shared + 1, os.sysconf("SC_OPEN_MAX"))
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        decode_worker.main(arguments)
        os._exit(0)

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, timeout: float = 60.0) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("decoder", timeout)
            time.sleep(0.0005)
        assert self._code is not None
        return self._code

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def quicken() -> None:
    """Do what every extraction does, and what touches no cache, once and before the forks."""
    canary.canary_pixels = functools.cache(canary.canary_pixels)
    canary.canary_pixels(HalvesEncoder().preprocessing)
    metadata.version = functools.cache(metadata.version)
    for library in DECIDING["extraction"]:
        with contextlib.suppress(metadata.PackageNotFoundError):
            metadata.version(library)


def note_promises(note: Callable[[str], None]) -> None:
    """Have the log say what the cache has just called durable."""
    commit, record, create = Cache.commit, Cache.record_failures, job.create_cache

    def commit_and_note(
        self: Cache, keys: np.ndarray, embeddings: Mapping[str, np.ndarray]
    ) -> Path:
        path = commit(self, keys, embeddings)
        note(f"shard {path.name}")
        return path

    def record_and_note(self: Cache, new: Iterable[Failure]) -> None:
        failures = list(new)
        record(self, failures)
        for failure in failures:
            note(f"failure {failure.sha256}")

    def create_and_note(*arguments: Any, **options: Any) -> Cache:
        cache = create(*arguments, **options)
        note("cache cache.json")
        return cache

    Cache.commit, Cache.record_failures = commit_and_note, record_and_note
    job.create_cache = create_and_note


def rename_first() -> None:
    """Break a commit: the shard has its name before it has its bytes."""

    def place(partial: Path, data: bytes, *_: Any) -> Path:
        path = partial.with_name(shards._name_of(data))
        partial.touch()
        os.replace(partial, path)
        path.write_bytes(data)
        return path

    shards._place = place


def sync_no_files() -> None:
    """Break durability: names are synced, bytes are not."""
    sync = os.fsync

    def sync_directories(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            sync(handle)

    os.fsync = sync_directories


def sync_no_directories() -> None:
    """Break durability: bytes are synced, the shards' names are not."""
    shards.sync_directory = lambda _path: None


def write_in_place() -> None:
    """Break the making of a cache: cache.json is there before it is whole."""
    storage._name = lambda partial, path: path.write_bytes(partial.read_bytes())


def hide_errors() -> None:
    """Break a commit: what could not be written is said to be."""
    commit = Cache.commit

    def commit_somehow(self: Cache, *rows: Any) -> Path:
        with contextlib.suppress(CacheError):
            return commit(self, *rows)
        return self.path

    Cache.commit = commit_somehow


BROKEN = {
    function.__name__: function
    for function in (rename_first, sync_no_files, sync_no_directories, write_in_place, hide_errors)
}


def drop_capabilities() -> None:
    """Be bound by permissions, even as root."""
    header = (ctypes.c_uint32 * 2)(CAPABILITIES_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, nothing):
        raise OSError(ctypes.get_errno(), "capset")


the_manifest = functools.cache(read_manifest)


def work(request: dict[str, Any], started: int) -> str:
    """Extract under the shim, in a process of its own; say what it raised, if anything."""
    place = Path(request["place"])
    manifest = the_manifest(Path(request["manifest"]))
    note = arm(request, place)
    if request.get("broken"):
        BROKEN[request["broken"]]()
    note_promises(note)
    if not request.get("real_decoders"):
        decode_pool._Decoder._start = lambda self: ForkedDecoder(self._arguments)
        decode_pool.PATIENCE_SECONDS = (
            60.0  # always the same operations, however busy the machine is
        )
    if "limit" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
    if request.get("powerless"):
        drop_capabilities()
    try:
        if request.get("compact"):
            os.write(started, b".")
            compact(place / "cache", open_cache(place / "cache").spec)
            return ""
        extract(
            manifest,
            Path(request["images"]),
            HalvesEncoder(),
            place / "cache",
            batch_size=BATCH_SIZE,
            decoders=1,
            commit_seconds=0.0,
            on_status=lambda words: words == "Canary" and os.write(started, b"."),
        )
    except MedembedError as error:
        return f"MedembedError: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


def arm(request: dict[str, Any], place: Path) -> Callable[[str], None]:
    """Let the shim count; return what writes a note into its log."""
    log = -1
    if request["log"]:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    number = request.get("errno", 0)
    shim = ctypes.CDLL(None)
    shim.shim_arm(
        *(str(place).encode(), request["at"], HOW[request["how"]]),
        *(number, VICTIMS.get(number, 0), request.get("part", 1), log),
    )
    return lambda text: shim.shim_note(text.encode())


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Fork an extraction; tell how it ended and how long it was at it."""
    hearing, telling = os.pipe()
    starting, started = os.pipe()
    the_manifest(Path(request["manifest"]))
    child = os.fork()
    if child == 0:
        os.close(hearing)
        os.close(starting)
        try:
            said = work(request, started)
            os.write(telling, said.encode())
        finally:
            os._exit(0)
    os.close(telling)
    os.close(started)
    os.read(starting, 1)  # it begins to touch the cache
    begin = time.monotonic()
    if "seconds" in request:
        time.sleep(request["seconds"])
        os.kill(child, signal.SIGKILL)  # not waited for yet, so it is still this child
    with os.fdopen(hearing, "rb") as file:
        said = file.read().decode()
    _, status = os.waitpid(child, 0)
    os.close(starting)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return {"killed": killed, "said": said, "seconds": time.monotonic() - begin}


def serve() -> None:
    """Answer requests until there are no more."""
    assert len(os.listdir("/proc/self/task")) == 1, "it must fork without threads"
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    os.environ.pop("LD_PRELOAD", None)  # the decoders go without
    quicken()
    serve()
