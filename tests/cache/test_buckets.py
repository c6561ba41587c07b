"""Caches in buckets: races, faults of a store, credentials, copies on this machine, transfers.

What a directory and a bucket have in common is tested beside each module, over both of them.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from email.utils import format_datetime, parsedate_to_datetime
from pathlib import Path
from typing import Any, ClassVar

import boto3
import numpy as np
import pytest
from click.testing import CliRunner
from made_buckets import OTHER, RECORDED, SPEC, check, commit, new_place, rows_of, some_keys
from s3_server import S3, SECRET, Answer, Asked

from medembed.cache import compaction, local_copies, shards, verification
from medembed.cache.compaction import LOCK, compact
from medembed.cache.embeddings import map_rows
from medembed.cache.failures import Failure
from medembed.cache.index import committed_shards
from medembed.cache.metadata import is_free
from medembed.cache.spec import hex_from_keys
from medembed.cache.storage import store_at
from medembed.cache.store import Cache, create_cache, open_cache
from medembed.cache.transfer import copy_cache
from medembed.cli import main
from medembed.core import object_store
from medembed.core.errors import (
    ArgumentError,
    CacheError,
    PathNotFoundError,
    ShardError,
    SpecMismatchError,
    StorageError,
)
from medembed.core.files import as_path
from medembed.core.locations import BucketPath, as_location, parse_location


@pytest.fixture
def place(s3: S3) -> BucketPath:
    return new_place()


@pytest.fixture
def cache(place: BucketPath) -> Cache:
    return create_cache(place, SPEC, RECORDED)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://b", "s3://b"),
        ("s3://b/", "s3://b"),
        ("gs://b/x//y/", "gs://b/x/y"),
        (Path("s3://b/x"), "s3://b/x"),  # its slash is gone: s3:/b/x
        ("az://container/x", "az://container/x"),
        ("S3://b/a b/50%25 #1?/ü", "s3://b/a b/50%25 #1?/ü"),
    ],
)
def test_a_url_is_a_prefix_of_a_bucket(text: str | Path, shown: str) -> None:
    location = as_location(text, "a cache")
    assert isinstance(location, BucketPath)
    assert str(location) == shown


@pytest.mark.parametrize("text", ["cache", "./s3:x", "/a/b.c", "C:cache"])
def test_what_has_no_scheme_is_a_local_path(text: str) -> None:
    assert parse_location(text) == Path(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ftp://host/x", "ftp:// is no place that medembed reads"),
        ("s3://", "names no place in a bucket"),
        ("s3://b/../c", "names no place in a bucket"),
        ("s3:///mura", "names no place in a bucket"),  # s3://$BUCKET/mura
        ("s3://a bucket/x", "names no place in a bucket"),
        ("s3://b/x\n/y", "names no place in a bucket"),
        ("s3://key:geheim@b/x", "holds no credentials"),
        ("s3://key:geh/geheim@b/x", "holds no credentials"),  # a secret key may have slashes
    ],
)
def test_a_url_that_names_no_place_is_refused(text: str, words: str) -> None:
    with pytest.raises(ArgumentError, match=words) as caught:
        parse_location(text)
    assert "geheim" not in str(caught.value)


def test_a_refused_url_shows_no_credentials() -> None:
    with pytest.raises(ArgumentError, match=r"a run is a local path .*s3://…@b/run") as caught:
        as_path("s3://key:geh/geheim@b/run", "a run")
    done = CliRunner().invoke(main, ["report", "s3://key:geh/geheim@b/run", "-o", "x"])
    assert "s3://…@b/run is not on this machine" in done.output
    assert "geheim" not in f"{caught.value} {done.output}"


@pytest.mark.parametrize("name", ["a b", "50%25", "a+b", "#1", "a?b=c&d", "ü", "a~*'()[]\\"])
def test_names_reach_the_store_as_they_are(s3: S3, place: BucketPath, name: str) -> None:
    boto3.client("s3").put_object(Bucket="bucket", Key=f"{place.key}/{name}", Body=b"here")
    assert object_store.read_object(place / name) == b"here"
    assert [found.path for found in object_store.list_objects(place)] == [place / name]
    assert not object_store.create_object(place / name, b"other")
    object_store.copy_object(place / name, place / "aside" / name)
    object_store.delete_objects([place / name])
    assert [found.path for found in object_store.list_objects(place)] == [place / "aside" / name]


def test_a_name_that_no_object_can_have_blames_no_store(s3: S3, place: BucketPath) -> None:
    with pytest.raises(OSError, match="no object can have this name") as caught:
        object_store.read_object(place / "a\nb")
    assert not isinstance(caught.value, StorageError)  # which would end a run


def test_a_write_that_races_another_is_tried_again(s3: S3, place: BucketPath) -> None:
    s3.fault = lambda asked: (409, "ConditionalRequestConflict") if asked.n == 1 else None
    assert object_store.create_object(place, b"mine")
    assert not object_store.create_object(place, b"other")
    assert object_store.read_object(place) == b"mine"


def test_of_16_that_create_an_object_one_wins(place: BucketPath) -> None:
    for number in range(5):
        with ThreadPoolExecutor(16) as pool:
            created = pool.map(
                lambda k, path=place / str(number): object_store.create_object(path, b"%d" % k),
                range(16),
            )
            won = [k for k, is_winner in enumerate(created) if is_winner]
        assert len(won) == 1
        assert object_store.read_object(place / str(number)) == b"%d" % won[0]


def test_of_16_creators_one_wins_and_the_others_read_its_description(place: BucketPath) -> None:
    barrier = threading.Barrier(16)

    def create(number: int) -> str:
        barrier.wait()
        try:
            recorded = {"source": f"worker {number}"}
            return create_cache(place, [SPEC, OTHER][number % 2], recorded).source
        except SpecMismatchError:
            return "refused"

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(create, range(16)))
    winner = open_cache(place)
    assert sorted(answers) == sorted([winner.source] * 8 + ["refused"] * 8)
    assert set(store_at(place).list()) == {"cache.json"}  # and no probe is left


def test_a_prefix_that_holds_something_else_is_no_cache(place: BucketPath) -> None:
    with pytest.raises(PathNotFoundError, match=r"no cache at s3://bucket/.*medembed extract"):
        open_cache(place)
    assert is_free(place)
    object_store.put_object(place / "notes.txt", b"mine")
    assert not is_free(place)
    with pytest.raises(CacheError, match="is not a cache and not empty"):
        create_cache(place, SPEC, RECORDED)
    with pytest.raises(CacheError, match=r"has no cache\.json"):
        open_cache(place)


def test_what_a_killed_creator_leaves_does_not_bar_the_way(place: BucketPath) -> None:
    object_store.put_object(place / f"{object_store.PROBE}0", b"first")
    object_store.put_object(place / "shards" / "x.partial", b"")
    assert create_cache(place, SPEC, RECORDED).spec == SPEC


def forget_conditions(asked: Asked) -> None:
    for name in [n for n in asked.headers if n.lower() == "if-none-match"]:
        del asked.headers[name]


def test_a_store_without_conditions_is_refused_at_the_start(s3: S3, place: BucketPath) -> None:
    s3.fault = forget_conditions
    with pytest.raises(StorageError, match=r"does not honour conditional writes.*local --cache"):
        create_cache(place, SPEC, RECORDED)
    assert object_store.list_objects(place) == []
    s3.fault = lambda asked: (501, "NotImplemented") if "if-none-match" in asked.headers else None
    with pytest.raises(StorageError, match="501 \\(NotImplemented\\)"):
        create_cache(place, SPEC, RECORDED)


KINDS = ["cut", "half", "twice", 500, 503, (429, "TooManyRequests"), (400, "RequestTimeout")]


@pytest.mark.parametrize("kind", [*KINDS, "lose"])
def test_faults_in_passing_lose_and_double_nothing(kind: Any, s3: S3, place: BucketPath) -> None:
    s3.fault = lambda asked: kind if asked.n % 3 == 1 else None  # of each name, the first
    cache = create_cache(place, SPEC, RECORDED)
    keys = some_keys(120)
    for part in np.array_split(keys, 5):
        commit(cache, part)
    cache.record_failures([Failure("ab" * 32, "decode", "truncated")])
    check(cache, keys)
    assert set(open_cache(place).failures()) == {"ab" * 32}
    assert compact(place, SPEC).shards_after == 1
    check(cache, keys)
    assert len(committed_shards(place / "shards")) == 1


def test_a_worker_killed_between_put_and_answer_leaves_its_rows_once(
    s3: S3, place: BucketPath, cache: Cache
) -> None:
    """The store has the shard, and the worker never hears of it."""
    keys = some_keys(20)
    child: list[subprocess.Popen[bytes]] = []
    code = (
        "import numpy as np\nfrom medembed.cache.store import open_cache\n"
        f"cache = open_cache({str(place)!r})\n"
        f"keys = np.random.default_rng(0).integers(0, 256, (20, 32), dtype=np.uint8)\n"
        "mean = keys[:, :4].astype(np.float32)\n"
        "print('here', flush=True)\nimport sys; sys.stdin.readline()\n"
        "cache.commit(keys, {'mean': mean, 'max': mean + 0.5})\n"
    )

    def kill(asked: Asked, answer: Answer) -> Answer:
        if asked.method == "PUT" and asked.key.endswith(".h5"):
            child[0].kill()
            child[0].wait()
        return answer

    s3.tamper = kill
    child.append(
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
    )
    with child[0] as process:
        assert process.stdout
        assert process.stdin
        assert process.stdout.readline() == b"here\n"
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.wait(timeout=60)
    assert child[0].returncode == -9
    assert cache.is_done(keys).all()
    commit(cache, keys)  # what a worker would do that had not looked
    check(cache, keys)
    assert len(committed_shards(place / "shards")) == 1


def test_a_listing_that_lags_hides_no_row_of_this_process(
    s3: S3, place: BucketPath, cache: Cache
) -> None:
    keys = some_keys(30)
    hidden = {commit(cache, keys[:10]).name}
    s3.tamper = lambda asked, answer: without(hidden, asked, answer)
    assert not open_cache(place).is_done(keys[:10]).any()  # as a process sees it that begins now
    hidden.add(commit(cache, keys[10:]).name)
    assert cache.is_done(keys).all()
    assert np.array_equal(cache.read(keys, ["mean"])["mean"], rows_of(keys)["mean"])
    hidden.clear()
    check(cache, keys)


def without(hidden: set[str], asked: Asked, answer: Answer) -> Answer:
    """Drop objects from a listing."""
    if asked.is_listing:
        objects = re.findall(rb"<Contents>.*?</Contents>", answer.body, re.DOTALL)
        for entry in objects:
            if any(name.encode() in entry for name in hidden):
                answer.body = answer.body.replace(entry, b"")
    return answer


def test_readers_of_a_listing_before_a_compaction_look_again(
    s3: S3, place: BucketPath, cache: Cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = some_keys(40)
    for part in np.array_split(keys, 4):
        commit(cache, part)
    reader = open_cache(place)
    assert reader.is_done(keys).all()
    listings: list[bytes] = []
    s3.tamper = lambda asked, answer: (listings.append(answer.body), answer)[1]
    committed_shards(place / "shards")
    s3.tamper = lambda asked, answer: answer
    compact(place, SPEC)
    stale: list[bytes] = []

    def lag(asked: Asked, answer: Answer) -> Answer:
        if asked.is_listing and len(stale) < 3:
            stale.append(answer.body)
            answer.body = listings[-1]
        return answer

    s3.tamper = lag
    monkeypatch.setenv("MEDEMBED_SHARDS", str(tmp_path / "copies of another machine"))
    assert np.array_equal(reader.read(keys, ["max"])["max"], rows_of(keys)["max"])
    assert len(stale) == 3


def test_shards_merged_in_a_bucket_stay_for_a_while(
    s3: S3, place: BucketPath, cache: Cache
) -> None:
    keys = some_keys(40)
    for part in np.array_split(keys, 4):
        commit(cache, part)
    done: list[int] = []
    real = object_store.delete_objects

    def look(paths: Any) -> None:
        paths = list(paths)
        if any(path.name.endswith(".h5") for path in paths):
            names = store_at(place / "shards").list()
            done.append(sum(name.endswith(".h5") for name in names))
            check(open_cache(place), keys)  # the old ones are there and count no more
        real(paths)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(object_store, "delete_objects", look)
        compact(place, SPEC)
    assert done == [5]
    assert set(store_at(place).list()) == {"cache.json"}


def test_a_lock_is_as_old_as_the_store_says(s3: S3, place: BucketPath, cache: Cache) -> None:
    """A machine whose clock is wrong breaks no lock of another."""

    def an_hour_behind(asked: Asked, answer: Answer) -> Answer:
        for name, value in answer.headers.items():
            if name.lower() == "last-modified":
                written = parsedate_to_datetime(value) - object_store.timedelta(hours=1)
                answer.headers[name] = format_datetime(written, usegmt=True)
        return answer

    commit(cache, some_keys(5))
    s3.tamper = an_hour_behind
    object_store.put_object(place / LOCK, b"of one that is alive")
    with pytest.raises(CacheError, match="another compaction"):
        compact(place, SPEC)
    assert object_store.read_object(place / LOCK) == b"of one that is alive"
    assert not any(object_store.is_probe(o.path) for o in object_store.list_objects(place))


def test_a_lock_is_renewed_while_merged_shards_stay(
    s3: S3, place: BucketPath, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in np.array_split(some_keys(20), 2):
        commit(cache, part)
    monkeypatch.setattr(compaction, "RENEWAL_SECONDS", 0.05)
    s3.asked.clear()
    compact(place, SPEC, grace_seconds=0.25)
    assert sum(a.method == "PUT" and a.key.endswith(LOCK) for a in s3.asked) > 4


def test_what_consoles_and_people_leave_in_a_prefix_is_no_shard(s3: S3, place: BucketPath) -> None:
    client = boto3.client("s3")
    for name in ("", "shards/"):  # as a console makes a "folder"
        client.put_object(Bucket="bucket", Key=f"{place.key}/{name}", Body=b"")
    cache = create_cache(place, SPEC, RECORDED)
    keys = some_keys(10)
    path = commit(cache, keys)
    other = create_cache(f"{place}-other", OTHER, RECORDED)
    foreign = object_store.read_object(commit(other, keys))
    object_store.put_object(place / "shards" / "old" / path.name, foreign)
    object_store.put_object(place / "shards" / "old" / f"{'0' * 32}.h5", foreign)
    check(cache, keys)
    assert compact(place, SPEC).shards_after == 1


def test_a_compaction_that_died_is_completed_and_its_lock_expires(
    s3: S3, place: BucketPath, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = some_keys(40)
    for part in np.array_split(keys, 4):
        commit(cache, part)

    def die(self: Any) -> None:
        if self._waiting:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compaction._Removal, "finish", die)
        with pytest.raises(KeyboardInterrupt):
            compact(place, SPEC)
    check(cache, keys)
    object_store.put_object(place / LOCK, b"of one that was killed")
    with pytest.raises(CacheError, match="another compaction"):
        compact(place, SPEC, grace_seconds=0)
    monkeypatch.setattr(compaction, "STALE", object_store.timedelta(0))
    assert compact(place, SPEC, grace_seconds=0).shards_after == 1
    assert set(store_at(place / "shards").list()) == {
        path.name for path in committed_shards(place / "shards")
    }
    check(cache, keys)


def test_expired_credentials_are_asked_for_again(
    s3: S3, place: BucketPath, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    connections: list[str] = []
    connect = object_store._connect
    monkeypatch.setattr(
        object_store, "_connect", lambda *name: (connections.append("new"), connect(*name))[1]
    )
    left = [2]

    def expire(asked: Asked) -> Any:
        left[0] -= 1
        return (400, "ExpiredToken") if left[0] >= 0 else None

    s3.fault = expire
    keys = some_keys(5)
    commit(cache, keys)
    assert len(connections) == 2
    check(cache, keys)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda asked: (403, "AccessDenied"), "403 \\(AccessDenied\\).*credentials"),
        (lambda asked: (400, "ExpiredToken"), "ExpiredToken"),
        (lambda asked: (301, "PermanentRedirect"), r"status 301\. The bucket is .*AWS_REGION"),
        (lambda asked: "cut", "8 times"),
        (lambda asked: 503, "503 \\(SlowDown\\), 8 times"),
    ],
)
def test_a_store_that_refuses_is_one_error_without_secrets(
    fault: Callable[[Asked], Any], words: str, s3: S3, place: BucketPath, cache: Cache
) -> None:
    s3.fault = fault
    with pytest.raises(CacheError, match=f"(?s)cannot write a shard.*{words}") as caught:
        commit(cache, some_keys(3))
    with pytest.raises(StorageError, match=words):
        open_cache(place)
    with pytest.raises(StorageError):  # says nothing about the shards
        verification.verify(place, SPEC)
    shown = str(caught.value)
    assert SECRET not in shown
    assert "Signature" not in shown
    assert s3.address not in shown
    assert "\n" not in shown


class ExpiredLogin:
    """A provider of credentials, as boto3's, whose login has ended."""

    config: ClassVar[dict[str, str]] = {}

    def __call__(self) -> Any:
        raise RuntimeError(f"Token has expired: https://host/login?token={SECRET}")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("AWS_ENDPOINT_URL", "nowhere in particular", "AWS_ENDPOINT_URL is not an address such as"),
        ("AWS_PROFILE", "nobody", r"no credentials for S3.*profile \(nobody\)"),
        ("AWS_SECRET_ACCESS_KEY", None, "Missing SecretAccessKey"),
        ("provider", None, r"could not get credentials \(RuntimeError\), 8 times"),
    ],
)
def test_settings_that_cannot_work_are_one_error(
    name: str,
    value: str | None,
    words: str,
    s3: S3,
    place: BucketPath,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    object_store._buckets.clear()
    if value:
        monkeypatch.setenv(name, value)
    elif name == "provider":
        monkeypatch.setattr(object_store, "_aws_credentials", ExpiredLogin)
    else:
        monkeypatch.delenv(name)
    if name == "AWS_PROFILE":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StorageError, match=words) as caught:
        open_cache(place)
    object_store._buckets.clear()
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_object_that_another_has_put_in_a_shards_place_is_named(
    s3: S3, place: BucketPath, cache: Cache
) -> None:
    keys = some_keys(20)
    path = commit(cache, keys)
    object_store.put_object(path, bytes(len(object_store.read_object(path))))
    with pytest.raises(ShardError, match="an object of this name holds something else"):
        commit(cache, keys)
    object_store.put_object(path, b"")
    with pytest.raises(ShardError, match="is damaged: its header cannot be read"):
        open_cache(place).keys()
    assert len(verification.repair(place, verification.verify(place, SPEC))) == 1
    commit(cache, keys)
    check(cache, keys)


def test_a_silent_store_is_asked_again(
    s3: S3, place: BucketPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "MAX_SILENCE", 0.2)
    object_store._buckets.clear()
    object_store.put_object(place, b"here")
    s3.fault = lambda asked: time.sleep(1.0) if asked.n == 2 else None
    s3.counts.clear()
    assert object_store.read_object(place) == b"here"
    assert object_store.read_object(place) == b"here"
    assert s3.counts["GET", place.key] == 3
    object_store._buckets.clear()


def test_a_bucket_that_does_not_exist_is_named(s3: S3) -> None:
    with pytest.raises(StorageError, match="s3://no-such-bucket cannot be reached"):
        create_cache("s3://no-such-bucket/x", SPEC, RECORDED)


def test_bytes_that_lie_on_the_way_are_fetched_again(
    s3: S3, place: BucketPath, cache: Cache
) -> None:
    keys = some_keys(20)
    path = commit(cache, keys)
    lies = [2]

    def lie(asked: Asked, answer: Answer) -> Answer:
        if asked.method == "GET" and asked.key == path.key and "range" not in asked.headers:
            lies[0] -= 1
            if lies[0] >= 0:
                answer.body = answer.body[:-3] + b"???"
        return answer

    s3.tamper = lie
    assert np.array_equal(cache.read(keys, ["mean"])["mean"], rows_of(keys)["mean"])
    assert lies[0] < 0


def test_a_damaged_object_is_named_and_set_aside(s3: S3, place: BucketPath, cache: Cache) -> None:
    keys = some_keys(40)
    good, bad = commit(cache, keys[:20]), commit(cache, keys[20:])
    cache.read(keys, ["mean"])  # and this machine has whole copies
    data = object_store.read_object(bad)
    object_store.put_object(bad, data[:-3] + b"???")
    problems = verification.verify(place, SPEC)
    assert [problem.path.name for problem in problems] == [bad.name]
    assert "is damaged" in problems[0].what
    assert np.array_equal(cache.read(keys, ["mean"])["mean"], rows_of(keys)["mean"])
    local_copies.forget(bad)
    with pytest.raises(ShardError, match=f"shard {bad} is damaged"):
        open_cache(place).read(keys, ["mean"])
    (aside,) = verification.repair(place, problems)
    assert str(aside) == str(place / "set-aside" / bad.name)
    assert committed_shards(place / "shards") == [good]
    again = commit(cache, keys[20:])
    assert again == bad
    object_store.put_object(bad, b"worse")
    (second,) = verification.repair(place, verification.verify(place, SPEC))
    assert second.name == f"{bad.name}.2"


def test_a_second_read_asks_for_no_shard_and_a_damaged_copy_is_replaced(
    s3: S3, place: BucketPath, cache: Cache
) -> None:
    keys = some_keys(60)
    paths = [commit(cache, part) for part in np.array_split(keys, 3)]
    asked = [object_store.read_object(path) for path in paths]
    del asked

    def read() -> int:
        s3.asked.clear()
        read = open_cache(place).read(keys, ["mean", "max"])
        assert np.array_equal(read["max"], rows_of(keys)["max"])
        return sum(a.method == "GET" and a.key.endswith(".h5") for a in s3.asked)

    assert read() == 2 * 3  # keys, then the shard
    assert read() == 0
    copy = local_copies.copies_directory() / paths[0].name
    copy.write_bytes(copy.read_bytes()[:-3] + b"???")
    assert read() == 1
    assert read() == 0


def test_copies_are_bounded_and_the_least_recently_used_go(
    s3: S3, place: BucketPath, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = some_keys(100)
    paths = [commit(cache, part) for part in np.array_split(keys, 10)]
    size = len(object_store.read_object(paths[0]))
    monkeypatch.setenv("MEDEMBED_SHARDS_MAX_BYTES", str(3 * size))
    directory = local_copies.copies_directory()
    for number, path in enumerate(paths[:4]):
        local_copies.fetch(path)
        for held in directory.glob("*.h5"):  # time stands still between two calls
            os.utime(held, ns=(held.stat().st_atime_ns, held.stat().st_mtime_ns - 10**9))
        if number == 2:
            local_copies.open_object(paths[0]).close()  # used again
    held = {path.name for path in directory.glob("*.h5")}
    assert held == {paths[0].name, paths[2].name, paths[3].name}
    assert np.array_equal(cache.read(keys, ["mean"])["mean"], rows_of(keys)["mean"])
    assert sum(path.stat().st_size for path in directory.glob("*.h5")) <= 3 * size


def test_without_room_for_copies_rows_are_read_all_the_same(
    s3: S3, place: BucketPath, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = some_keys(10)
    commit(cache, keys)
    monkeypatch.setenv("MEDEMBED_SHARDS_MAX_BYTES", "10")
    assert np.array_equal(cache.read(keys, ["mean"])["mean"], rows_of(keys)["mean"])
    with pytest.raises(CacheError, match=r"no room in .* for a copy of s3://.*MEDEMBED_SHARDS"):
        map_rows(cache, keys, "mean")


def test_a_bound_that_is_no_number_is_named(
    s3: S3, place: BucketPath, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = some_keys(10)
    commit(cache, keys)
    monkeypatch.setenv("MEDEMBED_SHARDS_MAX_BYTES", "plenty")
    with pytest.raises(CacheError, match="MEDEMBED_SHARDS_MAX_BYTES=plenty is not a number"):
        cache.read(keys, ["mean"])
    monkeypatch.delenv("MEDEMBED_SHARDS")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert local_copies.copies_directory().name == f"medembed-shards-{os.getuid()}"


def test_rows_of_a_bucket_can_be_mapped(s3: S3, place: BucketPath, cache: Cache) -> None:
    keys = some_keys(30)
    for part in np.array_split(keys, 3):
        commit(cache, part)
    rows = map_rows(cache, keys, "max", verify=True)
    assert np.array_equal(rows.take(np.arange(30)), rows_of(keys)["max"])


def test_what_a_download_moves_is_said_first(s3: S3, place: BucketPath, cache: Cache) -> None:
    from contextlib import contextmanager

    keys = some_keys(40)
    sizes = [len(object_store.read_object(commit(cache, p))) for p in np.array_split(keys, 4)]
    said: list[Any] = []

    @contextmanager
    def announce(words: str, unit: str) -> Any:
        assert unit == "bytes"
        said.append(words)
        yield lambda done, total: said.append((done, total))

    object_store.set_announcer(announce)
    try:
        open_cache(place).read(keys, ["mean"])
        open_cache(place).read(keys, ["mean"])
    finally:
        object_store._announcer.clear()
    assert said[0] == f"Fetching 4 shards, {sum(sizes) / 1e6:,.1f} MB, from {place}"
    assert said[-1] == (sum(sizes), sum(sizes))
    assert len(said) == 5


def test_failures_of_several_processes_are_merged(s3: S3, place: BucketPath, cache: Cache) -> None:
    a, b, c = hex_from_keys(some_keys(3))
    cache.record_failures([Failure(a, "read", "gone")])
    other = open_cache(place)
    other.record_failures([Failure(b, "decode", "truncated")])
    cache.record_failures([Failure(c, "encode", "NaN")])
    assert len(store_at(place / "failures").list()) == 2
    assert set(open_cache(place).failures()) == {a, b, c}
    object_store.put_object(place / "failures" / "torn.jsonl", b'{"sha256": "12')
    assert set(open_cache(place).failures()) == {a, b, c}


def test_a_cache_goes_to_a_bucket_and_back_byte_by_byte(
    s3: S3, place: BucketPath, tmp_path: Path
) -> None:
    first = create_cache(tmp_path / "first", SPEC, RECORDED, {"version": 1})
    keys = some_keys(90)
    for part in np.array_split(keys, 3):
        first.commit(part, rows_of(part))
    first.record_failures([Failure("ab" * 32, "decode", "truncated")])
    assert isinstance(first.path, Path)
    said: list[tuple[int, int]] = []
    done = copy_cache(first.path, place, announce=lambda *what: said.append(what))
    assert (done.shards, done.already) == (3, 0)
    assert said == [(3, done.bytes)]
    assert copy_cache(first.path, place).shards == 0
    check(open_cache(place), keys)
    s3.fault = lambda asked: (403, "AccessDenied") if asked.n > 10**6 else None
    back = tmp_path / "back"
    assert copy_cache(place, back).shards == 3
    s3.fault = lambda asked: "cut"  # without a network
    check(open_cache(back), keys)
    for path in sorted(first.path.rglob("*")):
        if path.is_file():
            assert (back / path.relative_to(first.path)).read_bytes() == path.read_bytes()
    assert not list(back.rglob("*.partial"))
    s3.fault = lambda asked: None
    create_cache(tmp_path / "other", OTHER, RECORDED)
    with pytest.raises(SpecMismatchError):
        copy_cache(tmp_path / "other", place)


def test_an_object_that_vanishes_behind_its_end_is_missing_and_not_empty(
    s3: S3, place: BucketPath
) -> None:
    object_store.put_object(place / "x", b"abc")
    assert object_store.read_range(place / "x", 10, 20) == (b"", 3)
    s3.fault = lambda asked: (404, "NoSuchKey") if asked.method == "HEAD" else None
    with pytest.raises(FileNotFoundError):
        object_store.read_range(place / "x", 10, 20)


def test_parts_of_two_contents_are_not_joined(s3: S3, place: BucketPath) -> None:
    object_store.put_object(place / "x", b"abcdef")
    first = object_store.read_part(place / "x", 0, 3)
    assert object_store.read_part(place / "x", 3, 6, etag=first.etag).data == b"def"
    object_store.put_object(place / "x", b"ABC")
    for start in (2, 3):  # within what is there now, and behind it
        with pytest.raises(OSError, match="was replaced while it was read"):
            object_store.read_part(place / "x", start, 6, etag=first.etag)


def test_what_was_never_tried_is_said_wherever_it_is_promised() -> None:
    root = Path(__file__).parents[2]
    pages = [root / "README.md", root / "CHANGELOG.md", *(root / "docs").rglob("*.md")]
    told = [page.name for page in pages if "gs://" in page.read_text()]
    assert {"CHANGELOG.md", "buckets.md", "robustness.md"} <= {*told}
    for page in pages:
        for paragraph in page.read_text().split("\n\n"):
            if "gs://" in paragraph:
                assert "tried" in paragraph, page
    with pytest.raises(ArgumentError, match=r"s3://, gs:// \(never tried\), az://"):
        parse_location("ftp://host/x")


def test_memory_is_a_bucket_too() -> None:
    place = f"memory://{os.getpid()}/cache"
    cache = create_cache(place, SPEC, RECORDED)
    keys = some_keys(20)
    commit(cache, keys[:12])
    commit(cache, keys[12:])
    check(cache, keys)
    assert compact(cache.path, SPEC, grace_seconds=0).shards_after == 1
    check(cache, keys)


def test_local_caches_import_no_library_of_buckets(tmp_path: Path) -> None:
    create_cache(tmp_path / "cache", SPEC, RECORDED).commit(some_keys(3), rows_of(some_keys(3)))
    code = (
        "import sys, medembed as me\n"
        "from medembed.cache.store import open_cache\n"
        f"assert len(open_cache({str(tmp_path / 'cache')!r}).keys()) == 3\n"
        "me.load_embeddings\n"
        "print([m for m in ('obstore', 'fsspec', 'boto3', 'botocore') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_extra_is_named_where_it_is_missing(
    place: BucketPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ImportError, match=r"s3://bucket/.* needs obstore.*medembed\[cloud\]"):
        open_cache(place)


def test_credentials_are_in_no_file_of_a_cache(s3: S3, place: BucketPath, cache: Cache) -> None:
    commit(cache, some_keys(5))
    found = [object_store.read_object(o.path) for o in object_store.list_objects(place)]
    assert len(found) == 2
    assert not any(SECRET.encode() in data for data in found)
    assert json.loads(object_store.read_object(place / "cache.json"))["recorded"] == RECORDED


def test_keys_behind_the_first_bytes_are_asked_for(
    s3: S3, place: BucketPath, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = some_keys(200)
    path = commit(cache, keys)
    monkeypatch.setattr(local_copies, "FIRST_BYTES", 600)
    assert np.array_equal(shards.read_keys(path), keys)
