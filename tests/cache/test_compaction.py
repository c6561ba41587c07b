"""`cache compact` merges small shards while others read, and a crash in it loses nothing."""

import errno
import fcntl
import json
import os
import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from crash_server import VICTIMS
from crashing import SOAK, Harness, State, crash_harness

from medembed.cache import shards
from medembed.cache.compaction import LOCK, compact
from medembed.cache.spec import CacheSpec
from medembed.cache.storage import store_at
from medembed.cache.store import Cache, create_cache, open_cache
from medembed.cli import main
from medembed.core.errors import CacheError, ShardError
from medembed.core.locations import Location

SPEC = CacheSpec("ab" * 32, {"width": 8}, {"mean": (3,), "max": (2,)}, "float16")
FULL = 40
EVERY = 1 if SOAK else 2
N_RANDOM = 300 if SOAK else 15


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_SHARD_ROWS", FULL)


def some_keys(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 32), dtype=np.uint8)


def rows_of(keys: np.ndarray) -> dict[str, np.ndarray]:
    values = keys.astype(np.float32)
    return {"mean": values[:, :3], "max": values[:, 3:5]}


def commit(cache: Cache, keys: np.ndarray) -> Location:
    return cache.commit(keys, rows_of(keys))


def files_of(cache: Cache) -> set[str]:
    return set(store_at(cache.path / "shards").list())


def check(cache: Cache, keys: np.ndarray) -> None:
    """Check that a cache is whole and holds exactly these rows."""
    fresh = open_cache(cache.path)
    assert fresh.verify() == []
    assert np.array_equal(fresh.keys(), np.unique(keys, axis=0))
    read = fresh.read(keys, list(SPEC.poolings))
    for name, values in rows_of(keys).items():
        assert np.array_equal(read[name], values.astype(np.float16))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return create_cache(tmp_path / "cache", SPEC, {"source": "made up"})


@pytest.fixture
def any_cache(any_place: str) -> Cache:
    return create_cache(any_place, SPEC, {"source": "made up"})


def test_small_shards_become_few_and_full_ones_stay(any_cache: Cache) -> None:
    full = commit(any_cache, some_keys(FULL, 99))
    keys = [some_keys(n, n) for n in range(1, 20)]
    for part in keys:
        commit(any_cache, part)
    done = compact(any_cache.path, SPEC)
    n_rows = FULL + sum(range(1, 20))
    assert done.shards_before == 20
    assert done.repeats == 0
    assert done.bytes_after < done.bytes_before
    assert n_rows / FULL <= done.shards_after <= 2 * n_rows / FULL
    assert len(files_of(any_cache)) == done.shards_after
    assert full.name in files_of(any_cache)
    check(any_cache, np.concatenate([some_keys(FULL, 99), *keys]))
    again = compact(any_cache.path, SPEC)
    assert again.shards_before == again.shards_after == done.shards_after


def test_rows_that_stand_twice_stand_once_after(any_cache: Cache) -> None:
    keys = some_keys(FULL + 30)
    commit(any_cache, keys[:FULL])
    commit(any_cache, keys[:FULL][::-1])  # another file, all of whose rows stand elsewhere
    commit(any_cache, keys[FULL - 10 : FULL + 20])
    commit(any_cache, keys[FULL + 20 :])
    assert len(any_cache.verify()) == 2
    done = compact(any_cache.path, SPEC)
    assert done.repeats == FULL + 10
    assert done.shards_after == 2
    check(any_cache, keys)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_shards_no_row_is_lost(seed: int, cache: Cache) -> None:
    chance = np.random.default_rng(seed)
    keys = some_keys(100, seed)
    for _ in range(chance.integers(1, 12)):
        rows = chance.choice(len(keys), chance.integers(1, FULL + 1), replace=False)
        commit(cache, keys[rows])
    held = cache.keys()
    done = compact(cache.path, SPEC)
    assert len(files_of(cache)) == done.shards_after
    check(cache, held)
    small = [n for n in map(rows_in, (cache.path / "shards").iterdir()) if 2 * n < FULL]
    assert len(small) <= 1


def rows_in(path: Path) -> int:
    return int(shards.read_header(path)["rows"])


def test_an_empty_cache_and_one_shard_are_left_as_they_are(any_cache: Cache) -> None:
    assert compact(any_cache.path, SPEC).shards_after == 0
    path = commit(any_cache, some_keys(3))
    assert compact(any_cache.path, SPEC).shards_after == 1
    assert files_of(any_cache) == {path.name}


@pytest.mark.parametrize("place", [700, -3])
def test_a_damaged_shard_stops_it_and_stays(cache: Cache, place: int) -> None:
    paths = [commit(cache, some_keys(5, seed)) for seed in range(3)]
    data = bytearray(paths[1].read_bytes())
    data[place] ^= 1
    paths[1].write_bytes(data)
    with pytest.raises(ShardError, match=rf"{paths[1].name} is damaged.*--repair"):
        compact(cache.path, SPEC)
    assert files_of(cache) == {path.name for path in paths}
    assert paths[1].read_bytes() == data


def test_the_only_whole_copy_of_a_row_is_never_dropped(cache: Cache) -> None:
    keys = some_keys(FULL)
    first, second = sorted([commit(cache, keys), commit(cache, keys[::-1])])
    data = bytearray(first.read_bytes())
    data[-3] ^= 1
    first.write_bytes(data)
    with pytest.raises(ShardError, match=first.name):
        compact(cache.path, SPEC)
    assert second.exists()


def test_one_compaction_at_a_time(cache: Cache) -> None:
    commit(cache, some_keys(3))
    with (cache.path / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CacheError, match=r"another compaction of .* is running"):
            compact(cache.path, SPEC)
    compact(cache.path, SPEC)


@pytest.mark.parametrize("text", ["", "{", "null", "[1, null]", '["../../x.h5", "x.h5"]', "[[]]"])
def test_rubbish_beside_a_shard_hides_nothing(text: str, cache: Cache) -> None:
    keys = some_keys(FULL)
    path = commit(cache, keys)
    path.with_suffix(".replaces").write_text(text)
    (cache.path / "shards" / f"{'0' * 32}.replaces").write_text(json.dumps([path.name]))
    check(cache, keys)
    compact(cache.path, SPEC)
    check(cache, keys)
    assert files_of(cache) == {path.name}


def test_a_shard_that_names_itself_as_replaced_stays(cache: Cache) -> None:
    path = commit(cache, some_keys(FULL))
    path.with_suffix(".replaces").write_text(json.dumps([path.name]))
    check(cache, some_keys(FULL))
    compact(cache.path, SPEC)
    check(cache, some_keys(FULL))


def test_replaced_shards_count_again_when_what_replaced_them_is_set_aside(cache: Cache) -> None:
    keys = some_keys(8)
    olds = [commit(cache, keys[:4]), commit(cache, keys[4:])]
    names = [path.name for path in olds]
    merged = shards.write_shard(cache.path / "shards", keys, rows_of(keys), SPEC, replaces=names)
    assert cache.card()["shards"] == 1
    check(cache, keys)
    data = bytearray(merged.read_bytes())
    data[-1] ^= 1
    merged.write_bytes(data)
    with pytest.raises(ShardError, match=merged.name):  # what it replaces is not removed
        compact(cache.path, SPEC)
    ran = CliRunner().invoke(main, ["cache", "verify", str(cache.path), "--repair"])
    assert ran.exit_code == 1
    assert cache.card()["shards"] == 2
    check(cache, keys)


def test_rows_are_read_and_written_while_shards_are_merged(cache: Cache) -> None:
    """Readers whose index is old, and a writer, at every moment of many compactions."""
    keys = some_keys(300)
    n_written, errors, stop = [100], [], threading.Event()
    for start in range(0, 100, 5):
        commit(cache, keys[start : start + 5])

    def read() -> None:
        reader = open_cache(cache.path)
        chance = np.random.default_rng()
        while not stop.is_set():
            rows = chance.permutation(n_written[0])[:80]
            try:
                got = reader.read(keys[rows], ["mean"])["mean"]
                assert np.array_equal(got, rows_of(keys[rows])["mean"])
                assert reader.is_done(keys[rows]).all()
            except BaseException as error:
                errors.append(error)
                return

    readers = [threading.Thread(target=read) for _ in range(3)]
    for thread in readers:
        thread.start()
    for start in range(100, 300, 5):
        commit(cache, keys[start : start + 5])
        n_written[0] = start + 5
        if start % 15 == 0:
            compact(cache.path, SPEC)
    stop.set()
    for thread in readers:
        thread.join()
    assert errors == []
    check(cache, keys)


def test_shards_that_go_between_the_index_and_the_read_are_looked_for_again(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = some_keys(30)
    for start in range(0, 30, 5):
        commit(cache, keys[start : start + 5])
    real, calls = shards.copy_rows, []

    def compact_first(*arguments: object, **options: object) -> None:
        calls.append(arguments[0])
        if len(calls) == 1:
            compact(cache.path, SPEC)
        real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "copy_rows", compact_first)
    assert np.array_equal(cache.read(keys, ["mean"])["mean"], rows_of(keys)["mean"])
    assert len({*calls}) == 7


def test_the_command_says_what_it_did(cache: Cache) -> None:
    for seed in range(4):
        commit(cache, some_keys(5, seed))
    commit(cache, some_keys(5)[::-1])
    ran = CliRunner().invoke(main, ["cache", "compact", str(cache.path), "--json"])
    assert ran.exit_code == 0, ran.output
    card = json.loads(ran.stdout)
    assert (card["rows"], card["shards"]) == (20, 1)
    assert card["compacted"]["shards_before"] == 5
    assert card["compacted"]["shards_after"] == 1
    assert card["compacted"]["repeats"] == 5
    ran = CliRunner().invoke(main, ["cache", "compact", str(cache.path)])
    assert "1 shards before, 1 now" in ran.stdout
    missing = CliRunner().invoke(main, ["cache", "compact", str(cache.path / "no")])
    assert missing.exit_code != 0
    assert "no cache at" in missing.output


# Under the shim: kills and errors at every operation.


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    with crash_harness(tmp_path_factory.mktemp("compaction").resolve()) as started:
        yield started


@pytest.fixture(scope="module")
def whole(harness: Harness, tmp_path_factory: pytest.TempPathFactory) -> tuple[State, Path]:
    """Give what a cache of three small shards and a repeated row holds, and a copy of it."""
    harness.clear()
    harness.ask()
    state = harness.state()
    cache = open_cache(harness.cache)
    keys, names = cache.keys()[[1, 4]], list(cache.spec.poolings)
    cache.commit(keys, cache.read(keys, names))
    kept = tmp_path_factory.mktemp("kept") / "cache"
    shutil.copytree(harness.cache, kept)
    return state, kept


def lay(harness: Harness, whole: tuple[State, Path]) -> None:
    harness.clear()
    shutil.copytree(whole[1], harness.cache)


def check_after(harness: Harness, whole: tuple[State, Path]) -> None:
    """Check that all rows can be read at once, that extract has nothing to do, and go on."""
    assert harness.rows() == whole[0]
    assert harness.extract().embedded == 0
    compact(harness.cache, open_cache(harness.cache).spec)
    assert harness.state() == whole[0]
    assert len(list(harness.cache.glob("shards/*.h5"))) == 1
    assert list(harness.cache.glob("shards/*.replaces")) == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["before", "middle", "after"])
def test_a_kill_at_any_operation_loses_no_row(
    how: str, harness: Harness, whole: tuple[State, Path]
) -> None:
    lay(harness, whole)
    assert harness.ask(compact=True).said == ""
    operations = harness.operations()
    check_after(harness, whole)
    names = [operation.name for operation in operations]
    assert names.count("unlink") >= 5
    for operation in operations:
        if how == "middle" and operation.name != "write":
            continue
        lay(harness, whole)
        assert harness.ask(operation.number, how, compact=True).killed
        check_after(harness, whole)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["once", "from"])
@pytest.mark.parametrize("name", ["ENOSPC", "EROFS", "EIO"])
def test_a_disk_that_fails_loses_no_row(
    name: str, how: str, harness: Harness, whole: tuple[State, Path]
) -> None:
    lay(harness, whole)
    harness.ask(compact=True)
    number = getattr(errno, name)
    found = [o.number for o in harness.operations() if o.classes & VICTIMS[number]]
    for at in found[how == "from" :: EVERY]:
        lay(harness, whole)
        answer = harness.ask(at, how, errno=number, compact=True)
        assert not answer.killed
        if answer.said:
            assert answer.said.startswith("MedembedError: "), answer.said
            assert os.strerror(number) in answer.said
        check_after(harness, whole)


def test_kills_at_random_moments_one_after_the_other_lose_no_row(
    harness: Harness, whole: tuple[State, Path]
) -> None:
    chance = random.Random(0)
    lay(harness, whole)
    seconds = harness.ask(compact=True).seconds
    for _ in range(N_RANDOM):
        lay(harness, whole)
        for _ in range(chance.choice([1, 2, 3])):
            harness.ask(seconds=chance.uniform(0, 1.2 * seconds), compact=True)
            assert harness.rows() == whole[0]
        check_after(harness, whole)
