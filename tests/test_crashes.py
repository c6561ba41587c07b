"""The cache under kills and failing disks, at every system call that touches it.

`MEDEMBED_SOAK=1` (`make soak`) makes many more random kills.
"""

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_extraction import HalvesEncoder, write_images

from medembed.cache.store import open_cache
from medembed.dataset.manifest import Manifest, hash_files, write_manifest
from medembed.extraction import extract

HERE = Path(__file__).parent
SOAK = bool(os.environ.get("MEDEMBED_SOAK"))
N_RANDOM = 1000 if SOAK else 100
EVERY = 1 if SOAK else 3  # of the operations at which a disk begins to fail
COMPILER = shutil.which("cc")

pytestmark = pytest.mark.skipif(not COMPILER, reason="no C compiler (cc) for the shim that kills")

State = dict[str, tuple[bytes, ...]]


class Harness:
    """Extractions that die or fail at a chosen operation, and what must be true afterwards."""

    def __init__(self, root: Path, process: subprocess.Popen[str], manifest: Manifest) -> None:
        self.root, self.process, self.manifest = root, process, manifest
        self.cache = root / "cache"

    def ask(self, at: int, how: str, cache: str = "cache", **more: Any) -> dict[str, Any]:
        request = {"root": str(self.root), "cache": cache, "at": at, "how": how, **more}
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(request | {"log": str(self.root / "log")}) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def operations(self) -> list[str]:
        return (self.root / "log").read_text().split()

    def finish(self) -> State:
        """Check that the cache is whole, finish it, and give what it holds."""
        if (self.cache / "cache.json").exists():
            assert open_cache(self.cache).verify() == []
        extract(self.manifest, self.root / "images", HalvesEncoder(), self.cache, decoders=1)
        return self.state()

    def state(self, name: str = "cache") -> State:
        cache = open_cache(self.root / name)
        assert cache.verify() == []
        keys = cache.keys()
        rows = cache.read(keys, ["mean", "max"])
        failures = sorted(repr(failure) for failure in cache.failures().values())
        return {
            "rows": (keys.tobytes(), rows["mean"].tobytes(), rows["max"].tobytes()),
            "failures": tuple(failure.encode() for failure in failures),
        }

    def clear(self) -> None:
        shutil.rmtree(self.cache, ignore_errors=True)


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    root = tmp_path_factory.mktemp("crashes").resolve()
    shim = root / "shim.so"
    source = HERE / "crash_shim.c"
    command = [str(COMPILER), "-shared", "-fPIC", "-O1", "-o", str(shim), str(source), "-ldl"]
    subprocess.run(command, check=True)
    manifest = write_images(root / "images", 6)
    broken = root / "images" / "004.png"
    broken.write_bytes(broken.read_bytes()[:40])
    paths = [root / "images" / image for image in manifest.rows["image"]]
    rows = manifest.rows.assign(sha256=np.array(hash_files(paths), object)).astype(
        {"sha256": "str"}
    )
    manifest = Manifest(rows, manifest.label_level)
    write_manifest(manifest, root / "manifest.csv")
    process = subprocess.Popen(
        [sys.executable, str(HERE / "crashing.py")],
        env={**os.environ, "LD_PRELOAD": str(shim), "OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Harness(root, process, manifest)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def whole(harness: Harness) -> tuple[State, list[str]]:
    """Give what an uninterrupted cache holds, and the operations that made it."""
    harness.clear()
    assert harness.ask(0, "before") == {"killed": False, "said": ""}
    operations, state = harness.operations(), harness.state()
    assert len(state["failures"]) == 1
    assert len(list(harness.cache.glob("shards/*.h5"))) >= 2
    return state, operations


def test_the_harness_sees_every_step_of_a_commit(whole: tuple[State, list[str]]) -> None:
    steps = " ".join(whole[1])
    assert "mkdir" in steps
    assert "link" in steps
    # Of a shard: written, synced, closed, compared, renamed, its directory synced.
    assert "open write fsync close open read read close rename open fsync close" in steps


def test_a_kill_at_every_operation_loses_nothing_that_was_committed(
    harness: Harness, whole: tuple[State, list[str]]
) -> None:
    state, operations = whole
    points = [(number, "before") for number in range(1, len(operations) + 1)]
    points += [(n, "middle") for n, name in enumerate(operations, 1) if name == "write"]
    points += [(len(operations), "after")]
    for at, how in points:
        harness.clear()
        answer = harness.ask(at, how)
        assert answer["killed"], (at, how, operations[at - 1], answer)
        assert harness.finish() == state, (at, how, operations[at - 1])


def test_a_kill_at_random_moments_loses_nothing_that_was_committed(
    harness: Harness, whole: tuple[State, list[str]]
) -> None:
    state, _ = whole
    chance = random.Random(0)
    for _ in range(N_RANDOM):
        harness.clear()
        for _ in range(chance.choice([1, 1, 2, 3])):  # killed, begun again, killed again
            harness.ask(0, "before", seconds=chance.uniform(0.0, 0.7))
        assert harness.finish() == state


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EIO", "EROFS"])
def test_a_disk_that_fails_ends_the_run_with_one_message(
    name: str, harness: Harness, whole: tuple[State, list[str]]
) -> None:
    state, operations = whole
    number = getattr(errno, name)
    first = 1 + list(errno.errorcode).index(number) % EVERY
    for at in range(first, len(operations) + 1, EVERY):
        harness.clear()
        answer = harness.ask(at, "fail", errno=number)
        assert not answer["killed"]
        # Past the last change nothing fails any more.
        assert answer["said"].startswith("MedembedError: cannot ") or answer["said"] == "", answer
        assert os.strerror(number) in answer["said"] or answer["said"] == ""
        assert harness.finish() == state, (name, at)


def test_a_limit_on_the_size_of_files_ends_the_run_with_one_message(
    harness: Harness, tmp_path: Path
) -> None:
    shutil.copytree(harness.root / "images", tmp_path / "images")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from crashing import *\n"
        "from medembed.errors import CacheError\n"
        "m = read_manifest(sys.argv[2])\n"
        "try: extract(m, 'images', HalvesEncoder(), 'cache', decoders=1, batch_size=3)\n"
        "except CacheError as error: sys.exit(f'said: {error}')\n"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    ended = subprocess.run(
        [sys.executable, "-c", script, str(HERE), str(harness.root / "manifest.csv")],
        cwd=tmp_path,
        preexec_fn=limit,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert "said: cannot write a shard" in ended.stderr or "said: cannot make" in ended.stderr
    assert "File too large" in ended.stderr
    with contextlib.suppress(FileNotFoundError):
        assert list((tmp_path / "cache" / "shards").iterdir()) == []
