"""What several tests share: real radiographs, a place for files, an order that suits two cores."""

import fcntl
import gc
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from s3_server import S3

MEMORY = Path("/dev/shm")
ENOUGH_BYTES = 2 * 2**30  # a container has 64 MB by default; then the usual place has to do
NAME = "medembed-tests-"
FAILED = pytest.StashKey[bool]()
COLLECTED = pytest.StashKey[Counter[str]]()
# What takes longest begins first: begun last, one of them would leave the other core idle.
LONGEST = (
    *("test_crashes", "test_sweep_processes", "test_ray_engine", "test_end_to_end"),
    *("test_finetuning", "test_finetuning_demo", "test_sweeps", "test_sweep_resume"),
    *("test_sweep_ray", "test_autoencoder", "test_compaction", "test_reproduce"),
)


# What libraries and test modules make at their import stays: looking through it again and again
# for garbage takes a quarter of the collection's time.
gc.disable()


def pytest_collection_finish() -> None:
    """Leave what is there now out of all garbage collections to come."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_configure(config: pytest.Config) -> None:
    """Let tests write into memory, unless `--basetemp` names a place.

    Every commit syncs its files. A disk that does so takes much longer than the test itself.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # a job in the background ignores Ctrl-C, and so would what the tests interrupt
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # xdist's own order is by the number of tests
    if hasattr(config, "workerinput"):
        # Threads of small products wait busily, and so take the core of the tests beside them.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        return
    if config.option.basetemp:
        return
    _remove_left()
    with suppress(OSError):  # no such directory, as on a Mac
        if shutil.disk_usage(MEMORY).free > ENOUGH_BYTES:
            config.option.basetemp = str(MEMORY / f"{NAME}{os.getpid()}")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove what a run has written; of a failed one it is kept until the next."""
    place = MEMORY / f"{NAME}{os.getpid()}"
    if config.option.basetemp == str(place) and not config.stash.get(FAILED, True):
        shutil.rmtree(place, ignore_errors=True)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Remember for `pytest_unconfigure` how the run ended."""
    session.config.stash[FAILED] = exitstatus != pytest.ExitCode.OK


def _remove_left() -> None:
    """Remove what runs have left whose process is gone."""
    for place in MEMORY.glob(f"{NAME}*"):
        if not Path("/proc", place.name.removeprefix(NAME)).exists():
            shutil.rmtree(place, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort modules by how long they take, those that are not listed last, as they were.

    Before any are deselected, the cases of each file that was asked for as a whole are counted.
    """
    whole = not any("::" in argument for argument in config.args)
    config.stash[COLLECTED] = Counter(item.path.name for item in items if whole)
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.fixture(scope="module")
def lone_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Wait until no other worker's tests have a Ray: one would be taken for the other."""
    shared = tmp_path_factory.getbasetemp().parent
    with open(shared / "ray.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session", autouse=True)
def documents() -> Iterator[None]:
    """Hold what commands print with --json to their schemas, wherever a test runs one."""
    from json_documents import holding_documents

    with holding_documents():
        yield


@pytest.fixture(scope="session")
def collected(request: pytest.FixtureRequest) -> Counter[str]:
    """Count the cases of each test file that this run has collected as a whole, by its name."""
    return request.config.stash[COLLECTED]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real radiographs and label tables beside the checkout; see README, "Tests"."""
    for parent in Path(__file__).resolve().parents:
        candidate = parent / "shared" / "data"
        if candidate.is_dir():
            return candidate
    pytest.skip("shared/data is not beside this checkout: real radiographs are not tested")


@pytest.fixture(scope="session")
def served_s3() -> Iterator["S3"]:
    """Serve S3 on loopback as long as tests run; they take `s3`."""
    from s3_server import serving

    with serving() as server:
        yield server


@pytest.fixture
def s3(served_s3: "S3", monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> "S3":
    """Reach a server of S3 that does what it should, with an empty directory of copies."""
    from medembed.cache import compaction
    from medembed.core import object_store

    served_s3.reset()
    for name, value in served_s3.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MEDEMBED_SHARDS", str(tmp_path / "copies"))
    monkeypatch.setattr(object_store, "FIRST_PAUSE", 0.005)
    monkeypatch.setattr(object_store, "MAX_PAUSE", 0.1)
    monkeypatch.setattr(compaction, "GRACE_SECONDS", 0.0)
    return served_s3


NUMBERS = count()


@pytest.fixture(params=["local", "s3"])
def any_place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Name a place for a cache that does not exist, on the disk and in a bucket."""
    if request.param == "local":
        return str(tmp_path / "cache")
    request.getfixturevalue("s3")
    return f"s3://bucket/{os.getpid()}-{next(NUMBERS)}/cache"
