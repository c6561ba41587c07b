"""Copies of shards on this machine: shared, bounded, damaged, in odd places; and pulled caches."""

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_buckets import RECORDED, SPEC, check, commit, new_place, rows_of, some_keys
from s3_server import S3, Answer, Asked

from medembed.cache import embeddings, local_copies, transfer
from medembed.cache.compaction import LOCK, compact
from medembed.cache.embeddings import map_rows
from medembed.cache.store import Cache, begin_to_open, create_cache, open_cache
from medembed.cache.transfer import copy_cache, keep_copies
from medembed.core import object_store
from medembed.core.errors import CacheError, ShardError
from medembed.core.files import hold_lock
from medembed.core.locations import BucketPath

KEYS = some_keys(60)


@pytest.fixture
def place(s3: S3) -> BucketPath:
    return new_place()


@pytest.fixture
def cache(place: BucketPath) -> Cache:
    """Make a cache of three shards."""
    made = create_cache(place, SPEC, RECORDED)
    for part in np.array_split(KEYS, 3):
        commit(made, part)
    return made


def read(place: BucketPath, **options: Any) -> None:
    """Check what the rows of a cache are that is opened anew."""
    rows = open_cache(place).read(KEYS, ["mean", "max"], **options)
    assert np.array_equal(rows["max"], rows_of(KEYS)["max"])


def fetched(s3: S3) -> int:
    """Count what has been asked of shards."""
    return sum(asked.method == "GET" and asked.key.endswith(".h5") for asked in s3.asked)


def copies() -> list[Path]:
    return sorted(local_copies.copies_directory().glob("*.h5"))


def flip(copy: Path, place: int) -> None:
    data = bytearray(copy.read_bytes())
    data[place] ^= 1
    copy.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "header": lambda copy: flip(copy, 3),
    "keys": lambda copy: flip(copy, copy.read_bytes().index(KEYS[:20].tobytes()[:32]) + 7),
    "rows": lambda copy: flip(copy, -9),
    "half": lambda copy: os.truncate(copy, copy.stat().st_size // 2),
    "empty": lambda copy: os.truncate(copy, 0),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_copy_is_noticed_and_replaced(
    damage: str, s3: S3, place: BucketPath, cache: Cache
) -> None:
    def spoil() -> None:
        for copy in copies():
            if damage != "keys" or KEYS[0].tobytes() in copy.read_bytes():
                DAMAGE[damage](copy)

    read(place)
    good = [copy.read_bytes() for copy in copies()]
    spoil()
    read(place)
    assert [copy.read_bytes() for copy in copies()] == good
    spoil()
    rows = map_rows(open_cache(place), KEYS, "max", verify=True)
    assert np.array_equal(rows.take(np.arange(60)), rows_of(KEYS)["max"])
    assert [copy.read_bytes() for copy in copies()] == good
    if damage in ("half", "empty"):  # what shows without a hash
        spoil()
        read(place, verify=False)


def test_copies_that_cannot_be_touched_are_read(
    s3: S3, place: BucketPath, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of another user, or on a disk that is only read."""

    def refuse(*given: Any, **options: Any) -> None:
        raise PermissionError(1, "not yours")

    read(place)
    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    s3.asked.clear()
    read(place)
    assert fetched(s3) == 0
    flip(copies()[0], -9)
    read(place)
    assert fetched(s3) == 1
    assert len(map_rows(cache, KEYS, "mean")) == 60


def test_a_directory_of_copies_that_is_a_file_costs_only_time(
    s3: S3, place: BucketPath, cache: Cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEDEMBED_SHARDS", str(tmp_path / "file"))
    read(place)
    with pytest.raises(CacheError, match=r"nothing can be written in .*file for a copy of s3://"):
        map_rows(cache, KEYS, "mean")
    with pytest.raises(CacheError, match="nothing can be written in"):
        keep_copies(place)


def test_of_several_that_want_one_shard_one_fetches_it(s3: S3, cache: Cache) -> None:
    path = cache._index.refresh().paths[0]
    assert isinstance(path, BucketPath)
    s3.asked.clear()
    s3.seconds = 0.1
    with ThreadPoolExecutor(8) as pool:
        data = list(pool.map(local_copies.fetch, [path] * 8))
    assert fetched(s3) == 1
    assert len(set(data)) == 1
    assert set(os.listdir(local_copies.copies_directory())) == {path.name, ".lock"}


def test_the_shard_of_a_killed_process_is_fetched_by_the_next(s3: S3, cache: Cache) -> None:
    path = cache._index.refresh().paths[0]
    assert isinstance(path, BucketPath)
    asked, wait = threading.Event(), threading.Event()

    def hold(question: Asked) -> None:
        if question.key == path.key and question.n == 1:
            asked.set()
            wait.wait(20)

    s3.counts.clear()
    s3.fault = hold
    code = (
        "from medembed.core.locations import BucketPath\n"
        "from medembed.cache.local_copies import fetch\n"
        f"fetch({path!r})\n"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as child, ThreadPoolExecutor() as pool:
        assert asked.wait(20)
        second = pool.submit(local_copies.fetch, path)
        assert not second.done()
        child.kill()
        assert second.result(timeout=20) == object_store.read_object(path)
        wait.set()
    assert {copy.name for copy in copies()} == {path.name}
    assert not list(local_copies.copies_directory().glob(".*.partial"))


def test_nobody_waits_for_ever(s3: S3, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cache._index.refresh().paths[0]
    assert isinstance(path, BucketPath)
    monkeypatch.setattr(local_copies, "MAX_WAIT", 0.1)
    directory = local_copies.copies_directory()
    directory.mkdir()
    with open(directory / f".{path.name}.partial", "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert local_copies.fetch(path) == object_store.read_object(path)
        assert copies() == []
    local_copies.fetch(path)
    assert [copy.name for copy in copies()] == [path.name]


def test_a_disk_that_fills_up_costs_a_copy_and_no_row(
    s3: S3, place: BucketPath, cache: Cache
) -> None:
    code = (
        "import resource, sys, numpy as np\n"
        "from medembed.cache.store import open_cache\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"cache = open_cache({str(place)!r})\n"
        "keys = cache.keys()\n"
        "mean = cache.read(keys, ['mean'])['mean']\n"
        "assert np.array_equal(mean, keys[:, :4].astype(np.float32))\n"
        "assert len(keys) == 60\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(os.listdir(local_copies.copies_directory())) == {".lock"}


def test_rows_are_mapped_though_a_compaction_removes_their_shards(
    s3: S3, place: BucketPath, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, begun = embeddings.fetch_all, []

    def merge(paths: Any) -> None:
        """Between the listing and the first shard."""
        if not begun:
            begun.append(paths)
            compact(place, SPEC, grace_seconds=0)
            for copy in copies():
                copy.unlink()
        real(paths)

    monkeypatch.setattr(embeddings, "fetch_all", merge)
    rows = map_rows(cache, KEYS, "max")
    assert np.array_equal(rows.take(np.arange(60)), rows_of(KEYS)["max"])


def test_copies_without_room_beside_each_other_are_refused_first(
    s3: S3, place: BucketPath, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = cache.card()["bytes"]
    monkeypatch.setenv("MEDEMBED_SHARDS_MAX_BYTES", str(size - 1))
    s3.asked.clear()
    with pytest.raises(CacheError, match=r"no room in .* for copies of .*name a DIR"):
        keep_copies(place)
    assert fetched(s3) == 0
    monkeypatch.setenv("MEDEMBED_SHARDS_MAX_BYTES", str(size))
    assert keep_copies(place).shards == 3
    assert keep_copies(place).already == 3


def test_a_shard_larger_than_all_room_displaces_nothing(
    s3: S3, place: BucketPath, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(place)
    large = commit(cache, some_keys(3000, seed=1))
    monkeypatch.setenv("MEDEMBED_SHARDS_MAX_BYTES", str(copies()[0].stat().st_size * 3))
    local_copies.fetch(large)
    assert len(copies()) == 3


def test_a_load_asks_for_description_and_shards_at_once(
    s3: S3, place: BucketPath, cache: Cache
) -> None:
    both = threading.Barrier(2, timeout=20)

    def wait(asked: Asked) -> None:
        if asked.is_listing or asked.key.endswith("cache.json"):
            both.wait()

    s3.fault = wait
    opened = begin_to_open(str(place))()
    s3.fault = lambda asked: None
    s3.asked.clear()
    assert opened.is_done(KEYS).all()
    assert not any(asked.is_listing for asked in s3.asked)
    more = some_keys(5, seed=2)
    commit(cache, more)
    assert opened.is_done(more).all()  # later calls list again


def test_what_lies_on_the_way_is_pulled_again(
    s3: S3, place: BucketPath, cache: Cache, tmp_path: Path
) -> None:
    lies = [2]

    def lie(asked: Asked, answer: Answer) -> Answer:
        if asked.key.endswith(".h5") and asked.method == "GET" and lies[0]:
            lies[0] -= 1
            answer.body = answer.body[:-3] + b"???"
        return answer

    s3.tamper = lie
    assert copy_cache(place, tmp_path / "pulled").shards == 3
    assert lies[0] == 0
    check(open_cache(tmp_path / "pulled"), KEYS)


def test_a_pull_survives_a_compaction_and_uses_copies(
    s3: S3, place: BucketPath, cache: Cache, tmp_path: Path
) -> None:
    begun = []

    def merge(asked: Asked) -> None:
        if asked.method == "GET" and asked.key.endswith(".h5") and not begun:
            begun.append(asked.key)
            compact(place, SPEC, grace_seconds=0)

    s3.fault = merge
    copy_cache(place, tmp_path / "pulled")
    s3.fault = lambda asked: None
    assert begun
    check(open_cache(tmp_path / "pulled"), KEYS)
    read(place)
    s3.asked.clear()
    assert copy_cache(place, tmp_path / "again").shards == 1
    assert fetched(s3) == 0
    check(open_cache(tmp_path / "again"), KEYS)


def test_copies_are_kept_though_a_compaction_removes_shards(
    s3: S3, place: BucketPath, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removed after they were listed."""
    listings = iter([transfer.committed_shards(place / "shards")])
    compact(place, SPEC, grace_seconds=0)
    for copy in copies():  # of the compaction
        copy.unlink()
    real = transfer.committed_shards
    monkeypatch.setattr(transfer, "committed_shards", lambda own: next(listings, None) or real(own))
    said: list[tuple[int, int]] = []
    done = keep_copies(place, lambda *what: said.append(what))
    assert [n for n, _ in said] == [3]
    assert (done.shards, done.already) == (1, 0)
    s3.asked.clear()
    read(place)
    assert fetched(s3) == 0


def test_what_is_pulled_after_a_compaction_is_there_once(
    s3: S3, place: BucketPath, cache: Cache, tmp_path: Path
) -> None:
    copy_cache(place, tmp_path / "pulled")
    compact(place, SPEC, grace_seconds=0)
    done = copy_cache(place, tmp_path / "pulled")
    assert (done.shards, done.already, done.superseded) == (1, 0, 3)
    check(open_cache(tmp_path / "pulled"), KEYS)  # with no row twice
    far, near = open_cache(place).card(), open_cache(tmp_path / "pulled").card()
    assert all(near[name] == far[name] for name in ("rows", "shards", "bytes"))
    s3.asked.clear()
    assert copy_cache(place, tmp_path / "pulled").superseded == 0
    assert fetched(s3) == 0


@pytest.mark.parametrize("is_merged", [False, True])
def test_a_pull_loses_no_row_that_the_bucket_does_not_have(
    is_merged: bool, s3: S3, place: BucketPath, cache: Cache, tmp_path: Path
) -> None:
    own = some_keys(7, seed=5)
    target = tmp_path / "pulled"
    copy_cache(place, target)
    mine = open_cache(target)
    mine.commit(own, rows_of(own))
    if is_merged:  # then its rows and the bucket's are in one shard
        compact(target, SPEC)
    compact(place, SPEC, grace_seconds=0)
    assert copy_cache(place, target).superseded == (1 if is_merged else 3)
    check(open_cache(target), np.concatenate([KEYS, own]))
    assert len(list((target / "shards").iterdir())) == 2
    check(mine, np.concatenate([KEYS, own]))  # opened before


def test_a_pull_removes_nothing_for_a_shard_that_is_damaged(
    s3: S3, place: BucketPath, cache: Cache, tmp_path: Path
) -> None:
    target = tmp_path / "pulled"
    copy_cache(place, target)
    old = sorted((target / "shards").glob("*.h5"))
    compact(place, SPEC, grace_seconds=0)
    (merged,) = open_cache(place)._index.refresh().paths
    (target / "shards" / merged.name).write_bytes(object_store.read_object(merged))
    flip(target / "shards" / merged.name, -9)
    with pytest.raises(ShardError, match=f"{merged.name} is damaged"):
        copy_cache(place, target)
    assert all(path.exists() for path in old)
    (target / "shards" / merged.name).unlink()
    flip(old[0], -9)  # which does not matter any more
    assert copy_cache(place, target).superseded == 3
    check(open_cache(target), KEYS)


def test_a_pull_and_a_compaction_do_not_remove_at_once(
    s3: S3, place: BucketPath, cache: Cache, tmp_path: Path
) -> None:
    """Else each might remove the other's copy of a row."""
    copy_cache(place, tmp_path / "pulled")
    compact(place, SPEC, grace_seconds=0)
    refusal = CacheError("held")
    with (
        hold_lock(tmp_path / "pulled" / LOCK, refusal),
        pytest.raises(CacheError, match=r"another compaction of .*pulled is running"),
    ):
        copy_cache(place, tmp_path / "pulled")
    assert len(list((tmp_path / "pulled" / "shards").glob("*.h5"))) == 4
    assert copy_cache(place, tmp_path / "pulled").superseded == 3


@pytest.mark.parametrize("step", ["write", "delete"])
def test_a_pull_killed_while_it_removes_loses_nothing(
    step: str, s3: S3, place: BucketPath, cache: Cache, tmp_path: Path
) -> None:
    target, own = tmp_path / "pulled", some_keys(7, seed=5)
    copy_cache(place, target)
    open_cache(target).commit(own, rows_of(own))
    compact(target, SPEC)
    compact(place, SPEC, grace_seconds=0)
    name = {"write": "shards.write_shard", "delete": "delete_files"}[step]
    code = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from medembed.cache import compaction, transfer\n"
        "from medembed.core.locations import parse_location\n"
        f"real = compaction.{name}\n"
        "def die(*given, **options):\n"
        f"    if {step == 'write'}:\n"
        "        real(*given, **options)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"compaction.{name} = die\n"
        f"transfer.copy_cache(parse_location({str(place)!r}), Path({str(target)!r}))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    check(open_cache(target), np.concatenate([KEYS, own]))
    copy_cache(place, target)
    check(open_cache(target), np.concatenate([KEYS, own]))
    assert len(list((target / "shards").iterdir())) == 2


def test_a_pull_that_was_killed_goes_on(
    s3: S3, place: BucketPath, cache: Cache, tmp_path: Path
) -> None:
    """Killed while it writes a shard, with one that is complete."""
    target = tmp_path / "pulled"
    code = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from medembed.cache import storage, transfer\n"
        "from medembed.core.locations import parse_location\n"
        "name = storage._name\n"
        "def die(partial, path):\n"
        "    if len(list(path.parent.glob('*.h5'))) == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return name(partial, path)\n"
        "storage._name, transfer.READERS = die, 1\n"
        f"transfer.copy_cache(parse_location({str(place)!r}), Path({str(target)!r}))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert len(list((target / "shards").glob("*.h5"))) == 1
    assert len(list((target / "shards").glob(".*.partial"))) == 1
    s3.asked.clear()
    assert copy_cache(place, target).shards == 2
    assert fetched(s3) == 2
    check(open_cache(target), KEYS)
    assert not list((target / "shards").glob(".*.partial"))


def test_rows_are_read_though_copies_are_removed_at_once(
    s3: S3, place: BucketPath, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process makes room at once."""
    real = local_copies._fetch

    def lose(path: BucketPath) -> Any:
        found = real(path)
        local_copies.forget(path)
        return found

    monkeypatch.setattr(local_copies, "_fetch", lose)
    read(place)
    with pytest.raises(CacheError, match="no room in"):
        map_rows(cache, KEYS, "mean")
    monkeypatch.setattr(local_copies, "_fetch", real)
    rows = map_rows(cache, KEYS, "mean")
    for copy in copies():
        copy.unlink()
    assert np.array_equal(rows.take(np.arange(60)), rows_of(KEYS)["mean"])


def test_a_copy_that_another_process_made_late_is_used(
    s3: S3, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cache._index.refresh().paths[0]
    assert isinstance(path, BucketPath)
    monkeypatch.setattr(local_copies, "MAX_WAIT", 0.05)
    directory = local_copies.copies_directory()
    directory.mkdir()
    read_proven, partial = local_copies._read_proven, directory / f".{path.name}.partial"

    def end(path: BucketPath) -> bytes:
        data = read_proven(path)
        (directory / path.name).write_bytes(data)
        return data

    with open(partial, "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(CacheError, match=r"another process has been fetching .* 0\.05 seconds"):
            local_copies.open_copy(path)
        monkeypatch.setattr(local_copies, "_read_proven", end)
        with local_copies.open_copy(path) as file:
            assert file.read() == object_store.read_object(path)
