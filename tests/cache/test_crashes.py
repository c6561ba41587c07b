"""The cache under kills and failing disks, at every system call that touches it.

`MEDEMBED_SOAK=1` (`make soak`) makes many more of them; `test_power_loss` is about the rest.
"""

import errno
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from crash_server import VICTIMS
from crashing import SOAK, Harness, Operation, State, crash_harness, find_problems

N_RANDOM = 2000 if SOAK else 100
N_PAIRS = 500 if SOAK else 10
EVERY = 1 if SOAK else 2  # of the operations at which a disk begins to fail
ERRORS = ["ENOSPC", "EDQUOT", "EROFS", "EIO", "EACCES"]
PARTS = 3  # of a write that is killed half-way: its first byte, half of it, all but the last

Whole = tuple[State, list[Operation], float]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    with crash_harness(tmp_path_factory.mktemp("crashes").resolve()) as started:
        yield started


@pytest.fixture(scope="module")
def whole(harness: Harness) -> Whole:
    """Give what an uninterrupted cache holds, the operations that made it, and how long it took."""
    harness.clear()
    answer = harness.ask()
    assert (answer.killed, answer.said) == (False, "")
    state, operations = harness.state(), harness.operations()
    assert len(state["failures"]) == 1
    assert len(list(harness.cache.glob("shards/*.h5"))) == 3
    return state, operations, answer.seconds


def check_kill(
    harness: Harness, whole: Whole, at: int, how: str, part: int = 1, broken: str = ""
) -> None:
    """Kill an extraction at an operation; what was promised is there, and the rest can be done."""
    harness.clear()
    answer = harness.ask(at, how, part=part, broken=broken)
    assert answer.killed
    harness.check(harness.promises())
    assert harness.finish() == whole[0]


def check_failing(
    harness: Harness, whole: Whole, at: int, how: str, name: str, broken: str = ""
) -> None:
    """Have an operation, or all from it on, fail; one message, nothing lost, and it goes on."""
    harness.clear()
    number = getattr(errno, name)
    answer = harness.ask(at, how, errno=number, broken=broken)
    assert not answer.killed
    harness.check(harness.promises())
    if answer.said:
        assert answer.said.startswith("MedembedError: cannot ")
        assert os.strerror(number) in answer.said
        assert "\n" not in answer.said
    else:  # whoever says nothing has done it all
        assert harness.state() == whole[0]
    if VICTIMS[number] == VICTIMS[errno.ENOSPC]:  # of the others, nothing can be removed
        assert harness.leftovers() == []
    assert harness.finish() == whole[0]


def points(operations: Sequence[Operation], name: str) -> list[Operation]:
    """List the operations that an error happens to."""
    return [o for o in operations if o.classes & VICTIMS[getattr(errno, name)]]


def test_the_harness_sees_every_step_of_a_commit(whole: Whole) -> None:
    steps = " ".join(operation.name for operation in whole[1])
    assert steps.startswith("mkdir create write fsync close link unlink mkdir open fsync close")
    # Of a shard: written, synced, closed, compared, renamed, its directory synced.
    commit = "create write fsync close open read read close rename open fsync close"
    assert steps.count(commit) == 3
    (failure,) = [o for o in whole[1] if o.name == "write" and "failures" in o.path]
    assert whole[1][failure.number].name == "fsync"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["before", "middle", "after"])
def test_a_kill_at_any_operation_loses_nothing_that_was_committed(
    how: str, harness: Harness, whole: Whole
) -> None:
    for operation in whole[1]:
        if how == "middle" and operation.name != "write":
            continue
        for part in range(PARTS if how == "middle" else 1):
            check_kill(harness, whole, operation.number, how, part)


@pytest.mark.slow
def test_a_kill_at_random_moments_loses_nothing_that_was_committed(
    harness: Harness, whole: Whole
) -> None:
    state, _, seconds = whole
    chance = random.Random(0)
    n_killed = n_within = 0
    while n_killed < N_RANDOM:
        harness.clear()
        for _ in range(chance.choice([1, 1, 2, 3])):  # killed, begun again, killed again
            real = chance.random() < 0.25  # mostly decoders that start at once: less waiting
            answer = harness.ask(seconds=chance.uniform(0, 1.2 * seconds), real_decoders=real)
            harness.check(harness.promises())
            n_killed += answer.killed
            n_within += answer.killed and 0 < len(harness.keys()) < len(state["keys"])
        assert harness.finish() == state
    assert n_within > 0, "the kills fell outside the work"


def test_a_run_that_goes_on_after_a_kill_can_be_killed_too(harness: Harness, whole: Whole) -> None:
    chance = random.Random(1)
    for _ in range(N_PAIRS):
        harness.clear()
        killed = True
        while killed:  # until one run comes to its end
            at = chance.randint(1, len(whole[1]))
            killed = harness.ask(at, chance.choice(["before", "middle", "after"])).killed
            harness.check(harness.promises())
        assert harness.finish() == whole[0]


def test_two_runs_at_once_can_be_killed_and_the_rows_are_all_there(
    harness: Harness, whole: Whole
) -> None:
    chance = random.Random(2)
    for _ in range(N_PAIRS):
        harness.clear()
        for server in range(2):
            at = chance.randint(1, 2 * len(whole[1]))  # half of them live
            harness.begin(at, chance.choice(["before", "middle", "after"]), server=server)
        answers = [server.wait() for server in harness.servers]
        assert [answer.said for answer in answers] == ["", ""]
        harness.extract()
        # Without --worker both may have embedded the same image, and verify says so.
        assert all("are also in another shard" in line for line in find_problems(harness.cache))
        assert harness.rows() == whole[0]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["once", "from"])
@pytest.mark.parametrize("name", ERRORS)
def test_a_disk_that_fails_ends_the_run_with_one_message(
    name: str, how: str, harness: Harness, whole: Whole
) -> None:
    first = (ERRORS.index(name) + (how == "from")) % EVERY
    for operation in points(whole[1], name)[first::EVERY]:
        check_failing(harness, whole, operation.number, how, name)


@pytest.mark.parametrize("name", ["EIO", "EACCES"])
def test_a_cache_json_that_cannot_be_read_ends_the_run_with_one_message(
    name: str, harness: Harness, whole: Whole
) -> None:
    (first,) = [o for o in whole[1] if o.name == "open" and o.path.endswith("/cache.json")]
    check_failing(harness, whole, first.number, "once", name)


@pytest.mark.parametrize("file", ["cache.json", "shards", "failures.jsonl"])
def test_a_write_that_takes_a_part_of_the_bytes_is_gone_on_with(
    file: str, harness: Harness, whole: Whole
) -> None:
    for operation in whole[1]:
        if operation.name == "write" and f"/cache/{file}" in operation.path.replace("/.", "/"):
            harness.clear()
            assert harness.ask(operation.number, "short").said == ""
            assert harness.state() == whole[0]


@pytest.mark.parametrize(("n_before", "limit"), [(0, 400), (0, 1000), ("cache.json", 1000)])
def test_a_limit_on_the_size_of_files_ends_the_run_with_one_message(
    n_before: int | str, limit: int, harness: Harness, whole: Whole
) -> None:
    harness.clear()
    if n_before:
        lay_empty_cache(harness, whole)
    answer = harness.ask(limit=limit, log="")
    what = "cannot write a shard in" if n_before else "cannot make a cache at"
    assert answer.said.startswith(f"MedembedError: {what}")
    assert os.strerror(errno.EFBIG) in answer.said
    harness.check()
    assert harness.leftovers() == []
    assert harness.finish() == whole[0]


@pytest.mark.parametrize(
    ("closed", "words"),
    [
        (".", "cannot make a cache at"),
        ("cache", "cannot append to"),
        ("cache/shards", "cannot write a shard in"),
        ("cache/failures.jsonl", "cannot append to"),
    ],
)
def test_a_read_only_directory_ends_the_run_with_one_message(
    closed: str, words: str, harness: Harness, whole: Whole
) -> None:
    harness.clear()
    if closed != ".":
        lay_empty_cache(harness, whole)
    path = harness.place / closed
    if not path.exists():
        path.touch()
    mode = path.stat().st_mode
    path.chmod(0o555)
    try:
        answer = harness.ask(powerless=True)  # as root, too
        harness.check(harness.promises())
    finally:
        path.chmod(mode)
    assert answer.said.startswith(f"MedembedError: {words}")
    assert os.strerror(errno.EACCES) in answer.said
    assert harness.leftovers() == []
    assert harness.finish() == whole[0]


def lay_empty_cache(harness: Harness, whole: Whole) -> None:
    """Make a cache without rows: the run ends when it has been made."""
    first = next(o.number for o in whole[1] if "failures" in o.path or "/shards/" in o.path)
    assert harness.ask(first, "before").killed
    assert harness.keys() == []
    shutil.rmtree(harness.cache / "shards")
    (harness.cache / "shards").mkdir()


def find_writes(harness: Harness, broken: str, part: str) -> list[int]:
    """List the writes to files named so, of a run with a broken commit and no kill."""
    harness.clear()
    harness.ask(broken=broken)
    return [o.number for o in harness.operations() if o.name == "write" and part in o.path]


@pytest.mark.parametrize(
    ("broken", "part"), [("rename_first", ".h5"), ("write_in_place", "cache/cache.json")]
)
def test_the_harness_sees_a_name_that_is_given_before_the_bytes(
    broken: str, part: str, harness: Harness, whole: Whole
) -> None:
    number = find_writes(harness, broken, part)[0]
    for how in ("before", "middle"):
        with pytest.raises(AssertionError):
            check_kill(harness, whole, number, how, broken=broken)


def test_the_harness_sees_an_error_that_is_not_passed_on(harness: Harness, whole: Whole) -> None:
    number = find_writes(harness, "", "shards/")[0]
    check_failing(harness, whole, number, "from", "ENOSPC")
    with pytest.raises(AssertionError):
        check_failing(harness, whole, number, "from", "ENOSPC", broken="hide_errors")


def test_the_harness_sees_rows_that_vanish(harness: Harness, whole: Whole, tmp_path: Path) -> None:
    harness.clear()
    harness.ask()
    first = min(harness.cache.glob("shards/*.h5"))
    shutil.move(first, tmp_path)
    with pytest.raises(AssertionError, match=r"'shard'"):
        harness.check(harness.promises())
