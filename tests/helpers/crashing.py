"""Extractions that die or fail at a chosen operation, and what must be true of the cache after."""

import dataclasses
import functools
import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from made_extraction import HalvesEncoder, list_images, write_images

from medembed.cache.failures import read_failures
from medembed.cache.spec import hex_from_keys
from medembed.cache.store import open_cache
from medembed.cli import main
from medembed.dataset.manifest import Manifest, write_manifest
from medembed.extraction import ExtractionReport, canary, extract, job
from medembed.extraction.decode_pool import Decoders
from medembed.images.load import Content, Reading

__all__ = [
    "SOAK",
    "Answer",
    "Harness",
    "Operation",
    "State",
    "crash_harness",
    "find_problems",
    "promises_in",
    "read_log",
]

HERE = Path(__file__).parent
SOAK = bool(os.environ.get("MEDEMBED_SOAK"))
BATCH_SIZE = 2  # so that there are several shards
UNDECODABLE = "002.png"
PATIENCE_SECONDS = 120  # for one extraction of a few images
# No threads in the process that forks: neither numpy's nor those of the allocator in pyarrow.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Answer:
    """Say how an extraction ended: killed, or with what message (none if all went well)."""

    killed: bool
    said: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Operation:
    """Hold one line of the shim's log; see `crash_shim.c`."""

    number: int
    classes: int
    name: str
    result: int
    error: int
    handle: int
    offset: int
    flags: int
    path: str
    path2: str
    data: bytes


def read_log(path: Path) -> list[Operation]:
    return [_parse(line) for line in path.read_text().splitlines()]


def _parse(line: str) -> Operation:
    number, classes, name, result, error, handle, offset, flags, path, path2, data = line.split(
        "\t"
    )
    return Operation(
        name=name,
        path=path,
        path2=path2,
        data=bytes.fromhex(data),
        number=int(number),
        classes=int(classes),
        result=int(result),
        error=int(error),
        handle=int(handle),
        offset=int(offset),
        flags=int(flags),
    )


class KeptDecoders(Decoders):
    """Decoder processes that are started once for all the extractions that finish a cache."""

    _kept: "KeptDecoders | None" = None

    def __enter__(self) -> "KeptDecoders":
        if KeptDecoders._kept is None:
            super().__enter__()
            KeptDecoders._kept = self
        return KeptDecoders._kept

    def __exit__(self, *_: object) -> None:
        """Stay."""

    def read(
        self, contents: Any, image_root: Path, n_slots: int
    ) -> Iterator[tuple[Content, Reading] | None]:
        assert n_slots == 2 * BATCH_SIZE + 1  # what they share cannot change its size
        yield from super().read(contents, image_root, n_slots)

    @classmethod
    def end(cls) -> None:
        if cls._kept:
            super().__exit__(cls._kept, None, None, None)
        cls._kept = None


class Server:
    """One process that extracts under the shim; the other side of `crash_server`.

    Attributes
    ----------
    log : Path
        What the shim wrote in the last extraction.
    """

    def __init__(self, log: Path, shim: Path) -> None:
        self.log = log
        self._messages = log.with_suffix(".messages").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "crash_server.py")],
            env={**os.environ, **ONE_THREAD, "LD_PRELOAD": str(shim)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            text=True,
        )

    def begin(self, request: dict[str, Any]) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"log": str(self.log)} | request) + "\n")
        self._process.stdin.flush()

    def wait(self) -> Answer:
        assert self._process.stdout
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE_SECONDS)
        assert ready, "the extraction hangs"
        line = self._process.stdout.readline()
        assert line, self._said()
        return Answer(**json.loads(line))

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._messages.close()

    def _said(self) -> str:
        self._messages.seek(0)
        return self._messages.read()


class Harness:
    """One job of a few images, one of them no image, and two processes that run it under the shim.

    Attributes
    ----------
    place : Path
        The directory whose operations are counted; it holds nothing but the cache.
    """

    def __init__(self, root: Path, servers: list[Server], n_images: int) -> None:
        self.root, self.place, self.cache = root, root / "place", root / "place" / "cache"
        self.place.mkdir()
        self.servers = servers
        write_images(root / "images", n_images)
        (root / "images" / UNDECODABLE).write_bytes(b"not an image")
        self.manifest: Manifest = list_images(root / "images")
        write_manifest(self.manifest, root / "manifest.csv")

    def begin(self, at: int = 0, how: str = "nothing", server: int = 0, **more: Any) -> None:
        """Start an extraction that meets its fate at operation `at`; see `crash_server.work`."""
        names = {name: str(self.root / name) for name in ("place", "images")}
        names["manifest"] = str(self.root / "manifest.csv")
        self.servers[server].begin({**names, "at": at, "how": how, **more})

    def ask(self, at: int = 0, how: str = "nothing", server: int = 0, **more: Any) -> Answer:
        """Extract, to the end or whatever comes at operation `at`."""
        self.begin(at, how, server, **more)
        return self.servers[server].wait()

    def log(self, server: int = 0) -> list[Operation]:
        return read_log(self.servers[server].log)

    def operations(self) -> list[Operation]:
        """List what the last extraction did, without its notes."""
        return [line for line in self.log() if line.name != "note"]

    def clear(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()

    def promises(self, server: int = 0) -> list[tuple[str, str]]:
        """Give what the last extraction was told to be durable: ("shard", name) and the like."""
        return promises_in(self.log(server))

    def check(self, promises: Iterable[tuple[str, str]] = ()) -> None:
        """Check that the cache is whole, if there is one, and that what was promised is there."""
        promises = list(promises)
        if not (self.cache / "cache.json").exists():
            assert not promises, f"cache.json is not there, and yet {promises}"
            return
        verify(self.cache)
        there = {path.name for path in (self.cache / "shards").glob("*.h5")}
        failed = set(read_failures(self.cache / "failures.jsonl"))
        for kind, name in promises:
            assert {"shard": name in there, "failure": name in failed}.get(kind, True), (kind, name)

    def finish(self) -> State:
        """Embed what is missing, and no more, in this process; give what the cache holds."""
        n_before = len(self.keys())
        report = self.extract()
        state = self.state()
        assert (report.already, report.embedded) == (n_before, len(state["keys"]) - n_before)
        return state

    def keys(self) -> list[str]:
        """List the rows that are in the cache, if there is one."""
        if not (self.cache / "cache.json").exists():
            return []
        return hex_from_keys(open_cache(self.cache).keys())

    def extract(self) -> ExtractionReport:
        return extract(
            self.manifest,
            self.root / "images",
            HalvesEncoder(),
            self.cache,
            batch_size=BATCH_SIZE,
            decoders=1,
        )

    def state(self) -> State:
        """Give all rows and failures of a whole cache."""
        verify(self.cache)
        return self.rows()

    def rows(self) -> State:
        cache = open_cache(self.cache)
        keys, names = cache.keys(), list(cache.spec.poolings)
        rows = cache.read(keys, names)
        return {
            "keys": hex_from_keys(keys),
            **{name: rows[name].tobytes() for name in names},
            "failures": sorted(map(repr, cache.failures().values())),
        }

    def leftovers(self) -> list[str]:
        """List what is in the place and no part of a cache."""
        parts = ("cache.json", "failures.jsonl")
        files = [path for path in self.place.rglob("*") if path.is_file()]
        return [str(p) for p in files if p.name not in parts and p.suffix != ".h5"]


def promises_in(log: Iterable[Operation]) -> list[tuple[str, str]]:
    """Give the notes of a log: what was called durable, of which kind."""
    notes = [line.path.partition(" ") for line in log if line.name == "note"]
    return [(kind, name) for kind, _, name in notes]


def find_problems(cache: Path) -> list[str]:
    """Run `medembed cache verify`."""
    ran = CliRunner().invoke(main, ["cache", "verify", str(cache), "--json"])
    assert ran.exit_code in (0, 1), ran.output
    assert ran.stdout, ran.output
    problems: list[str] = json.loads(ran.stdout)["problems"]
    assert bool(problems) == bool(ran.exit_code), ran.output
    return problems


def verify(cache: Path) -> None:
    """Have `medembed cache verify` find nothing."""
    assert find_problems(cache) == []


def why_not() -> str | None:
    """Say why there can be no shim here."""
    if not sys.platform.startswith("linux"):
        return f"the shim that kills stands before Linux's C library; this is {sys.platform}"
    if not shutil.which("cc"):
        return "no C compiler (cc) for the shim that kills"
    return None


@contextmanager
def crash_harness(root: Path, n_images: int = 7) -> Iterator[Harness]:
    """Compile the shim and start the process; skip the test, with the reason, if it cannot be."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    shim, source = root / "shim.so", HERE / "crash_shim.c"
    flags = ["-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-O1"]
    subprocess.run(["cc", *flags, "-o", shim, source, "-ldl", "-lpthread"], check=True)
    servers = [Server(root / f"log{number}", shim) for number in range(2)]
    harness = Harness(root, servers, n_images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "Decoders", KeptDecoders)
        patch.setattr(canary, "canary_pixels", functools.cache(canary.canary_pixels))
        try:
            yield harness
        finally:
            KeptDecoders.end()
            for server in servers:
                server.close()
