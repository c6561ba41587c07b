"""The cache directory: one spec, exactly-once rows, failures, and what is refused."""

import json
import multiprocessing
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medembed.cache.failures import Failure
from medembed.cache.metadata import is_free
from medembed.cache.shards import write_shard
from medembed.cache.spec import CacheSpec, hex_from_keys
from medembed.cache.storage import file_size
from medembed.cache.store import Cache, create_cache, open_cache
from medembed.core.errors import (
    CacheError,
    MissingRowsError,
    PathNotFoundError,
    ShardError,
    SpecMismatchError,
)
from medembed.extraction.writer import RowWriter

RECORDED = {
    "source": "google/medgemma-4b-pt",
    "revision": "a1b2",
    "precision": "fp32",
    "device": "cpu",
    "versions": {},
}
PREPROCESSING = {"size": [896, 896], "fit": "stretch", "mean": (0.5, 0.5, 0.5), "window": None}


def make_spec(**changes: Any) -> CacheSpec:
    spec: dict[str, Any] = {
        "encoder": "ab" * 32,
        "preprocessing": PREPROCESSING,
        "poolings": {"mean": (4,), "max": (4,)},
        "dtype": "float32",
    }
    return CacheSpec(**(spec | changes))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return create_cache(tmp_path / "cache", make_spec(), RECORDED)


@pytest.fixture
def any_cache(any_place: str) -> Cache:
    return create_cache(any_place, make_spec(), RECORDED)


def some_keys(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 32), dtype=np.uint8)


def rows_of(keys: np.ndarray) -> dict[str, np.ndarray]:
    """Make each row a function of its key, so that any read can be checked."""
    mean = keys[:, :4].astype(np.float32)
    return {"mean": mean, "max": mean + 0.5}


def test_rows_of_several_shards_come_back_in_the_asked_order(any_cache: Cache) -> None:
    keys = some_keys(300)
    for part in np.array_split(keys, 7):
        any_cache.commit(part, rows_of(part))
    asked = keys[np.random.default_rng(1).integers(0, 300, 500)]
    for verify in (True, False):
        read = open_cache(any_cache.path).read(asked, ["max", "mean"], verify=verify)
        for name, values in rows_of(asked).items():
            np.testing.assert_array_equal(read[name], values)
            assert read[name].dtype == np.float32


def test_a_row_is_done_when_it_is_in_a_committed_shard(any_cache: Cache) -> None:
    keys = some_keys(20)
    other = open_cache(any_cache.path)
    assert not other.is_done(keys).any()
    any_cache.commit(keys[:12], rows_of(keys[:12]))
    assert other.is_done(keys).tolist() == [True] * 12 + [False] * 8
    np.testing.assert_array_equal(other.keys(), np.unique(keys[:12], axis=0))
    assert other.is_done(keys[:0]).tolist() == []


def test_leftover_partial_files_mean_nothing(cache: Cache) -> None:
    keys = some_keys(5)
    path = cache.commit(keys, rows_of(keys))
    shutil.copy(path, path.with_suffix(".partial"))
    (path.parent / "torn.partial").write_bytes(path.read_bytes()[:300])
    path.unlink()
    assert not cache.is_done(keys).any()
    assert cache.verify() == []
    assert cache.card()["rows"] == 0


def test_keys_that_end_in_zeros_are_not_confused(any_cache: Cache) -> None:
    keys = np.zeros((3, 32), np.uint8)
    keys[1, 0] = keys[2, 31] = 1
    any_cache.commit(keys[:2], rows_of(keys[:2]))
    assert any_cache.is_done(keys).tolist() == [True, True, False]


def test_a_row_in_two_shards_is_read_once_and_reported(any_cache: Cache) -> None:
    keys = some_keys(6)
    any_cache.commit(keys[:4], rows_of(keys[:4]))
    any_cache.commit(keys[3:], rows_of(keys[3:]))
    assert len(any_cache.keys()) == any_cache.card()["rows"] == 6
    np.testing.assert_array_equal(any_cache.read(keys, ["mean"])["mean"], rows_of(keys)["mean"])
    (problem,) = any_cache.verify()
    assert "1 row(s) of shard" in problem


def test_the_first_shard_by_name_wins(any_cache: Cache) -> None:
    keys = some_keys(3)
    a, b = ({name: values + add for name, values in rows_of(keys).items()} for add in (0, 1))
    paths = {any_cache.commit(keys, a): a, any_cache.commit(keys, b): b}
    first = paths[min(paths)]
    np.testing.assert_array_equal(any_cache.read(keys, ["mean"])["mean"], first["mean"])


def test_missing_rows_and_unknown_poolings_are_refused(any_cache: Cache) -> None:
    keys = some_keys(3)
    any_cache.commit(keys[:1], rows_of(keys[:1]))
    with pytest.raises(MissingRowsError, match="2 of 3 rows"):
        any_cache.read(keys, ["mean"])
    with pytest.raises(CacheError, match="no pooling 'grid4'; it has mean, max"):
        any_cache.read(keys, ["grid4"])


def test_a_damaged_shard_stops_the_reader_and_is_named_by_verify(cache: Cache) -> None:
    keys = some_keys(40)
    good = cache.commit(keys[:20], rows_of(keys[:20]))
    path = cache.commit(keys[20:], rows_of(keys[20:]))
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"is damaged.*Move it out.*medembed extract"):
        cache.read(keys, ["mean"])
    calls: list[tuple[int, int]] = []
    (problem,) = cache.verify(lambda done, total: calls.append((done, total)))
    assert path.name in problem
    assert good.name not in problem
    n_bytes = good.stat().st_size + path.stat().st_size
    assert len(calls) == 2
    assert calls[-1] == (n_bytes, n_bytes)
    path.unlink()
    assert cache.is_done(keys).sum() == 20


def test_foreign_shards_are_noticed(cache: Cache, tmp_path: Path) -> None:
    keys = some_keys(4)
    write_shard(cache.path / "shards", keys, rows_of(keys), make_spec(encoder="cd" * 32))
    (cache.path / "shards" / "mine.h5").write_bytes(b"?")
    foreign, misnamed = sorted(cache.verify(), key=lambda problem: "mine.h5" in problem)
    assert "another spec" in foreign
    assert "not a shard" in misnamed
    with pytest.raises(ShardError, match="another spec"):
        cache.is_done(keys)


def test_the_spec_survives_the_disk(cache: Cache) -> None:
    again = open_cache(cache.path)
    assert again.spec == cache.spec == make_spec()
    assert list(again.spec.poolings) == ["mean", "max"]
    assert again.recorded == RECORDED
    document = json.loads((cache.path / "cache.json").read_bytes())
    assert (document["format"], document["version"]) == ("medembed-cache", 1)
    assert set(document) == {"format", "version", "spec", "recorded"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"preprocessing": PREPROCESSING | {"fit": "pad"}},
            "with fit=stretch; this run asks for fit=pad. Choose another --cache, or drop --fit.",
        ),
        (
            {"poolings": {"mean": (4,)}},
            "with poolings=mean,max; this run asks for poolings=mean. Choose another --cache, or "
            "drop --pool.",
        ),
        (
            {"dtype": "float16"},
            "with dtype=float32; this run asks for dtype=float16. Choose another --cache, or give "
            "--dtype float32.",
        ),
        (
            {"encoder": "cd" * 32},
            f"with encoder={'ab' * 32}; this run asks for encoder={'cd' * 32} (demo). Choose "
            "another --cache, or give --encoder google/medgemma-4b-pt@a1b2.",
        ),
        (
            {"preprocessing": PREPROCESSING | {"images_version": 2}},
            "with images_version=None; this run asks for images_version=2. Choose another --cache.",
        ),
    ],
)
def test_the_first_difference_of_specs_is_named(
    cache: Cache, change: dict[str, Any], text: str
) -> None:
    with pytest.raises(SpecMismatchError) as caught:
        create_cache(cache.path, make_spec(**change), {"source": "demo"})
    start = f"cache at {cache.path} was made by google/medgemma-4b-pt@a1b2 "
    assert str(caught.value) == start + text


def test_the_order_of_poolings_is_no_difference(any_cache: Cache) -> None:
    other = make_spec(poolings={"max": (4,), "mean": (4,)})
    assert create_cache(any_cache.path, other, RECORDED).spec.digest() == other.digest()


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PathNotFoundError, match="no cache at"):
        open_cache(tmp_path / "gone")
    (tmp_path / "thesis.tex").touch()
    for use in (open_cache, lambda path: create_cache(path, make_spec(), RECORDED)):
        with pytest.raises(CacheError, match="is not a cache"):
            use(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(CacheError, match=r"is not a cache|cannot make a cache"):
        create_cache(tmp_path / "thesis.tex", make_spec(), RECORDED)


def test_an_unknown_version_and_a_damaged_description_are_refused(cache: Cache) -> None:
    path = cache.path / "cache.json"
    document = json.loads(path.read_bytes())
    path.write_text(json.dumps(document | {"version": 9}))
    with pytest.raises(CacheError, match=r"format version 9.*reads version 1"):
        open_cache(cache.path)
    del document["spec"]["encoder"]
    path.write_text(json.dumps(document))
    with pytest.raises(CacheError, match=r"cache\.json is damaged"):
        open_cache(cache.path)
    path.write_bytes(b'{"format": "medem')
    with pytest.raises(CacheError, match=r"cache\.json is damaged: it is not JSON"):
        open_cache(cache.path)


def test_a_killed_creator_does_not_bar_the_way(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    (path / "shards").mkdir(parents=True)
    (path / ".cache.json.0123.partial").write_bytes(b'{"form')
    assert create_cache(path, make_spec(), RECORDED).keys().shape == (0, 32)


def _create_at(path: Path, barrier: Any, results: Any, encoder: str) -> None:
    barrier.wait()
    try:
        results.put(create_cache(path, make_spec(encoder=encoder), RECORDED).spec.encoder)
    except SpecMismatchError:
        results.put("refused")


def test_processes_that_create_a_cache_at_once_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(6), context.Queue()
    encoders = ["ab" * 32, "cd" * 32] * 3
    workers = [
        context.Process(target=_create_at, args=(tmp_path / "cache", barrier, results, encoder))
        for encoder in encoders
    ]
    for worker in workers:
        worker.start()
    answers = sorted(results.get(timeout=30) for _ in workers)
    for worker in workers:
        worker.join()
    winner = open_cache(tmp_path / "cache").spec.encoder
    assert answers == sorted([winner] * 3 + ["refused"] * 3)
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_the_loser_of_the_race_keeps_the_winners_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def be_overtaken(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        create_cache(tmp_path, make_spec(), RECORDED)
        link(source, target)

    monkeypatch.setattr(os, "link", be_overtaken)
    with pytest.raises(SpecMismatchError):
        create_cache(tmp_path, make_spec(dtype="float16"), RECORDED)
    assert open_cache(tmp_path).spec == make_spec()


def test_a_file_system_without_hard_links_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    assert create_cache(tmp_path / "cache", make_spec(), RECORDED).spec == make_spec()


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match=r"cannot make a cache at .*Choose another --cache"):
        create_cache(tmp_path / "file" / "cache", make_spec(), RECORDED)


def test_the_newest_failure_of_an_image_counts_until_it_is_done(any_cache: Cache) -> None:
    keys = some_keys(3)
    a, b, c = hex_from_keys(keys)
    any_cache.record_failures([Failure(a, "read", "gone"), Failure(b, "decode", "truncated")])
    any_cache.record_failures([Failure(a, "decode", "empty"), Failure(c, "encode", "NaN")])
    any_cache.commit(keys[2:], rows_of(keys[2:]))
    failures = open_cache(any_cache.path).failures()
    assert failures == {a: Failure(a, "decode", "empty"), b: Failure(b, "decode", "truncated")}
    assert any_cache.card()["failures"] == {"read": 0, "decode": 2, "encode": 0}


def test_a_torn_last_line_of_failures_is_passed_over(cache: Cache) -> None:
    a, b, c = hex_from_keys(some_keys(3))
    cache.record_failures([Failure(a, "decode", "truncated"), Failure(b, "decode", "empty")])
    path = cache.path / "failures.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert list(cache.failures()) == [a]
    cache.record_failures([Failure(c, "decode", "empty")])
    assert list(cache.failures()) == [a, c]


def test_a_line_of_failures_that_names_no_sha256_is_passed_over(cache: Cache) -> None:
    (a,) = hex_from_keys(some_keys(1))
    spaced = f"{a[:32]} {a[32:]}"
    lines = [{"sha256": sha256, "stage": "decode", "reason": ""} for sha256 in (spaced, a, 7)]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (cache.path / "failures.jsonl").write_text(text)
    assert list(cache.failures()) == [a]


def test_the_card_says_what_is_there(any_cache: Cache) -> None:
    keys = some_keys(9)
    paths = [any_cache.commit(part, rows_of(part)) for part in (keys[:5], keys[5:])]
    card = json.loads(json.dumps(any_cache.card(), allow_nan=False))
    assert (card["rows"], card["shards"]) == (9, 2)
    assert card["bytes"] == sum(map(file_size, paths))
    assert card["spec"] == make_spec().as_dict()
    assert card["recorded"]["source"] == "google/medgemma-4b-pt"
    assert card["canary"] is False


def test_a_cache_keeps_the_canary_of_the_run_that_made_it(tmp_path: Path) -> None:
    canary = {"version": 1, "embeddings": {"mean": [0.5]}}
    made = create_cache(tmp_path / "cache", make_spec(), RECORDED, canary)
    again = create_cache(made.path, make_spec(), RECORDED, {"version": 2})
    assert made.canary == again.canary == open_cache(made.path).canary == canary
    assert again.card()["canary"] is True


def test_a_cache_of_yesterday_has_no_canary_and_opens_as_before(cache: Cache) -> None:
    assert "canary" not in json.loads((cache.path / "cache.json").read_bytes())
    assert open_cache(cache.path).canary is None


@pytest.mark.parametrize("canary", [None, [], "?", 1])
def test_a_canary_that_is_no_document_is_damage(cache: Cache, canary: object) -> None:
    document = json.loads((cache.path / "cache.json").read_bytes())
    (cache.path / "cache.json").write_text(json.dumps(document | {"canary": canary}))
    with pytest.raises(CacheError, match=r"cache\.json is damaged: its canary cannot be read"):
        open_cache(cache.path)


def test_a_writer_commits_when_rows_are_old_or_many(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medembed.cache.shards.MAX_SHARD_ROWS", 10)
    clock = iter([0.0, 0.0, 5.0, 61.0]).__next__
    monkeypatch.setattr("medembed.extraction.writer.time.monotonic", clock)
    keys = some_keys(30)

    def n_shards() -> int:
        return len(list((cache.path / "shards").iterdir()))

    with RowWriter(cache, 60.0) as writer:
        writer.add(hex_from_keys(keys[:2]), rows_of(keys[:2]))
        writer.commit_if_due()
        assert n_shards() == 0
        writer.commit_if_due()
        assert n_shards() == 1
        monkeypatch.setattr("medembed.extraction.writer.time.monotonic", lambda: 100.0)
        writer.add(hex_from_keys(keys[2:29]), rows_of(keys[2:29]))
        assert n_shards() == 4  # of 10, 10 and 7 rows
        writer.add(hex_from_keys(keys[29:]), rows_of(keys[29:]))
    assert n_shards() == 5
    np.testing.assert_array_equal(cache.read(keys, ["max"])["max"], rows_of(keys)["max"])


def test_a_writer_that_is_interrupted_in_a_commit_commits_on_its_way_out(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, replace = some_keys(4), os.replace

    def interrupt(*_: object) -> None:
        monkeypatch.setattr(os, "replace", replace)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt), RowWriter(cache, 0.0) as writer:
        writer.add(hex_from_keys(keys), rows_of(keys))
    assert cache.is_done(keys).all()
    assert len(list((cache.path / "shards").iterdir())) == 1


def test_a_writer_tells_a_full_disk_once(cache: Cache) -> None:
    keys = some_keys(4)
    shutil.rmtree(cache.path / "shards")
    with (
        pytest.raises(CacheError, match="cannot write a shard") as caught,
        RowWriter(cache, 0.0) as writer,
    ):
        writer.add(hex_from_keys(keys), rows_of(keys))
    assert not isinstance(caught.value.__context__, CacheError)


def test_a_spec_of_unknown_dtype_or_without_poolings_is_refused() -> None:
    with pytest.raises(CacheError, match="float16 or float32"):
        make_spec(dtype="bfloat16")
    with pytest.raises(CacheError, match="at least one pooling"):
        make_spec(poolings={})


def test_a_directory_that_another_process_is_making_is_free(tmp_path: Path) -> None:
    """Two workers at once: there is no moment at which a new, empty directory is in the way."""
    path, stop = tmp_path / "cache", threading.Event()

    def make_and_remove() -> None:
        while not stop.is_set():
            path.mkdir()
            path.rmdir()

    thread = threading.Thread(target=make_and_remove)
    thread.start()
    try:
        assert all(is_free(path) for _ in range(20_000))
    finally:
        stop.set()
        thread.join()


def test_only_what_is_absent_or_a_crash_has_left_is_free(tmp_path: Path) -> None:
    assert is_free(tmp_path / "absent")
    (tmp_path / "file").touch()
    assert not is_free(tmp_path / "file")
    assert is_free(tmp_path / "file" / "below")
    (tmp_path / "cache" / "shards").mkdir(parents=True)
    (tmp_path / "cache" / ".cache.json.0.partial").touch()
    assert is_free(tmp_path / "cache")
    (tmp_path / "cache" / "cache.json").touch()
    assert not is_free(tmp_path / "cache")
