"""Keys in bulk, the index of a cache and the plan, against plain Python sets and dictionaries."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medembed.cache import index as index_module
from medembed.cache.failures import Failure
from medembed.cache.index import Index, SortedKeys, equal_keys, keys_from_column, prefixes_of
from medembed.cache.pending import Worker, make_plan
from medembed.cache.spec import CacheSpec, hex_from_keys
from medembed.cache.store import create_cache
from medembed.core.errors import CacheError, ShardError
from medembed.dataset.manifest import Manifest

SPEC = CacheSpec("ab" * 32, {"width": 8}, {"mean": (1,)}, "float32")

# Few values, so that keys repeat, share their first 8 bytes, and end in zero bytes.
some_bytes = st.sampled_from([0, 1, 255])
some_keys = st.builds(
    lambda head, tail: bytes([head]) * 8 + bytes(23) + bytes([tail]), some_bytes, some_bytes
) | st.binary(min_size=32, max_size=32)


def as_array(keys: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)


@given(st.lists(some_keys, max_size=40), st.lists(some_keys, max_size=20))
def test_sorted_keys_find_what_a_dictionary_finds(keys: list[bytes], asked: list[bytes]) -> None:
    found = SortedKeys(as_array(keys)).find(as_array(asked + keys))
    first = {key: place for place, key in reversed(list(enumerate(keys)))}
    assert found.tolist() == [first.get(key, -1) for key in asked + keys]


@given(st.lists(some_keys, max_size=40))
def test_repeated_keys_are_told_with_where_they_stand_first(keys: list[bytes]) -> None:
    sorted_keys = SortedKeys(as_array(keys))
    first = {key: place for place, key in reversed(list(enumerate(keys)))}
    again = [(first[key], place) for place, key in enumerate(keys) if first[key] != place]
    pairs = zip(sorted_keys.originals.tolist(), sorted_keys.repeats.tolist(), strict=True)
    assert list(pairs) == sorted(again)
    assert [keys[place] for place in sorted_keys.firsts] == sorted(set(keys))


def test_blocks_of_questions_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medembed.cache.index.BLOCK", 7)
    keys = np.random.default_rng(0).integers(0, 256, (100, 32), dtype=np.uint8)
    order = np.random.default_rng(1).permutation(100)
    assert (SortedKeys(keys).find(keys[order]) == order).all()
    digests = hex_from_keys(keys)
    assert (keys_from_column(pd.Series(digests)) == keys).all()
    assert (keys_from_column(pa.chunked_array([digests[:3], digests[3:]])) == keys).all()
    assert equal_keys(keys, keys[order]).sum() == (order == np.arange(100)).sum()


def test_keys_of_a_column_need_no_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = np.random.default_rng(0).integers(0, 256, (100, 32), dtype=np.uint8)
    digests = pd.Series(hex_from_keys(keys))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert (keys_from_column(digests) == keys).all()
    assert keys_from_column(digests[:0]).shape == (0, 32)
    for digest in ("ab" * 31, "AB" * 32, "xy" * 32):
        with pytest.raises(CacheError):
            keys_from_column(pd.Series([digest, "ab" * 32]))


@pytest.mark.parametrize("digest", ["ab" * 31, "AB" * 32, "xy" * 32, "é" * 32, None])
def test_a_digest_that_is_none_is_refused(digest: str | None) -> None:
    with pytest.raises((CacheError, TypeError)):
        keys_from_column(pa.array([digest, "ab" * 32], pa.string()))


def put(directory: Path, keys: list[bytes]) -> Path:
    values = np.arange(len(keys), dtype=np.float32)[:, None]
    cache = create_cache(directory, SPEC, {})
    return cache.commit(as_array(keys), {"mean": values})


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.sets(some_keys, min_size=1, max_size=6), st.booleans()), max_size=6),
    st.integers(1, 5),
)
def test_an_index_follows_shards_that_come_and_go(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[set[bytes], bool]], share: int
) -> None:
    directory = tmp_path_factory.mktemp("cache")
    index = Index(create_cache(directory, SPEC, {}).path / "shards", SPEC)
    held: dict[Path, list[bytes]] = {}
    asked = [bytes(32), *(key for keys, _ in steps for key in keys)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "RECENT_SHARE", share)
        for keys, removes in steps:
            if removes and held:
                gone = min(held)
                gone.unlink()
                del held[gone]
            else:
                held[put(directory, sorted(keys))] = sorted(keys)
            found, owners, rows = index.refresh().locate(as_array(asked))
            for number, key in enumerate(asked):
                owner = min((path for path in held if key in held[path]), default=None)
                assert found[number] == (owner is not None)
                if owner:
                    assert index.paths[owners[number]] == owner
                    assert rows[number] == held[owner].index(key)
            every = sorted({key for keys in held.values() for key in keys})
            assert index.n_rows == len(every)
            assert index.keys().tobytes() == b"".join(every)


def test_shards_that_are_known_are_passed_over(tmp_path: Path) -> None:
    old, new = bytes(31) + b"a", bytes(31) + b"b"
    first = put(tmp_path / "cache", [old])
    index = Index(tmp_path / "cache" / "shards", SPEC, known=[first.name])
    put(tmp_path / "cache", [new])
    assert index.refresh().locate(as_array([old, new]))[0].tolist() == [False, True]


def test_only_new_shards_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = put(tmp_path / "cache", [bytes([n]) * 32 for n in range(9)])
    index = Index(tmp_path / "cache" / "shards", SPEC).refresh()
    second = put(tmp_path / "cache", [b"z" * 32])
    first.write_bytes(b"no shard any more")
    assert index.refresh().n_rows == 10
    second.write_bytes(b"neither")
    with pytest.raises(ShardError, match="its header"):
        Index(tmp_path / "cache" / "shards", SPEC).refresh()


def test_a_header_that_promises_too_many_rows_is_damage(tmp_path: Path) -> None:
    path = put(tmp_path / "cache", [bytes(32)])
    data = path.read_bytes()
    path.write_bytes(
        data.replace(b'"rows": 1,', b'"rows": 9999999999999,').replace(b" " * 12, b"", 1)
    )
    with pytest.raises(ShardError, match="ends before its keys do"):
        Index(tmp_path / "cache" / "shards", SPEC).refresh()


def manifest_of(keys: list[bytes]) -> Manifest:
    rows = pd.DataFrame({"image": [f"{number:03}.png" for number in range(len(keys))]})
    rows["sha256"] = pd.Series(hex_from_keys(as_array(keys)), dtype="str")
    return Manifest(rows, "image")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(some_keys, min_size=1, max_size=25),
    st.sets(some_keys, max_size=5),
    st.sets(some_keys, max_size=5),
    st.booleans(),
    st.integers(0, 3),
)
def test_a_plan_is_what_sets_make_of_it(
    tmp_path_factory: pytest.TempPathFactory,
    keys: list[bytes],
    done: set[bytes],
    failed: set[bytes],
    retry: bool,
    count: int,
) -> None:
    directory = tmp_path_factory.mktemp("cache")
    cache = create_cache(directory, SPEC, {})
    if done:
        put(directory, sorted(done))
    stages = {key: ("read", "decode")[number % 2] for number, key in enumerate(sorted(failed))}
    cache.record_failures(Failure(key.hex(), stage, "why") for key, stage in stages.items())
    images: dict[bytes, list[str]] = {}
    for number, key in enumerate(keys):
        images.setdefault(key, []).append(f"{number:03}.png")
    total = 0
    for worker in [Worker(i, count) for i in range(count)] or [None]:
        mine = {
            key: names
            for key, names in images.items()
            if worker is None or int.from_bytes(key[:8]) % worker.count == worker.index
        }
        plan = make_plan(manifest_of(keys).rows, cache, retry_failed=retry, worker=worker)
        known = [k for k in mine if stages.get(k) == "decode" and k not in done and not retry]
        pending = [k for k in mine if k not in done and k not in known]
        assert [(c.sha256, list(c.images)) for c in plan.pending] == [
            (key.hex(), mine[key]) for key in pending
        ]
        assert plan.pending.keys.tobytes() == b"".join(pending)
        assert [c for c, _ in plan.known] == [plan.known[i][0] for i in range(len(known))]
        assert [c.sha256 for c, _ in plan.known] == [key.hex() for key in known]
        assert plan.n_already == sum(key in done for key in mine)
        assert plan.n_contents == len(mine)
        total += plan.n_rows
    assert total == len(keys)


def test_contents_are_a_sequence() -> None:
    keys = [bytes([n]) * 32 for n in (5, 3, 5, 9, 3)]
    pending = make_plan(manifest_of(keys).rows, None).pending
    assert [c.images for c in pending] == [
        ("000.png", "002.png"),
        ("001.png", "004.png"),
        ("003.png",),
    ]
    assert pending[-1] == list(pending)[2]
    assert list(pending[1:]) == list(pending)[1:]
    with pytest.raises(IndexError):
        pending[3]


@pytest.mark.parametrize(("index", "count"), [(-1, 2), (2, 2), (0, 0)])
def test_a_worker_counts_from_nought(index: int, count: int) -> None:
    with pytest.raises(ValueError, match="count from 0"):
        Worker(index, count)


def test_prefixes_order_as_keys_do() -> None:
    keys = np.random.default_rng(0).integers(0, 256, (500, 32), dtype=np.uint8)
    order = sorted(range(500), key=lambda n: keys[n].tobytes())
    assert (np.argsort(prefixes_of(keys)) == order).all()
