"""The cache after the power went: what was called durable is there, whatever the disk forgot."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from crashing import SOAK, Harness, Operation, State, crash_harness, promises_in
from power_loss import Disk, Tree, lay

from medembed.cache.compaction import compact
from medembed.cache.store import open_cache
from medembed.core.errors import CacheError


@dataclass(frozen=True)
class Moment:
    """What may be on the disk at one moment, and what was called durable before it."""

    promises: list[tuple[str, str]]
    tree: Tree

    def lost(self, kind: str) -> list[str]:
        """List what was promised and is not there."""
        return [name for k, name in self.promises if k == kind and not self._holds(kind, name)]

    def _holds(self, kind: str, name: str) -> bool:
        if kind == "failure":
            return name.encode() in (self.tree.get("cache/failures.jsonl") or b"")
        return f"cache/{'shards/' if kind == 'shard' else ''}{name}" in self.tree


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    with crash_harness(tmp_path_factory.mktemp("power").resolve()) as started:
        yield started


@pytest.fixture(scope="module")
def whole(harness: Harness) -> tuple[State, list[Operation], Tree]:
    """Give what an uninterrupted cache holds, the log of its making, and its files."""
    log = log_of(harness)
    return harness.state(), log, read_tree(harness.place)


def log_of(harness: Harness, broken: str = "") -> list[Operation]:
    harness.clear()
    assert harness.ask(broken=broken).said == ""
    return harness.log()


def read_tree(place: Path) -> Tree:
    paths = place.rglob("*")
    return {str(p.relative_to(place)): None if p.is_dir() else p.read_bytes() for p in paths}


def moments(
    place: Path, log: Sequence[Operation], before: Sequence[Operation] = ()
) -> Iterator[Moment]:
    """Yield all that may be on the disk after each operation of a log, each only once."""
    disk, seen, promises = Disk(place), set(), promises_in(before)
    for operation in before:
        disk.follow(operation)
    for operation in log:
        disk.follow(operation)
        promises = promises + promises_in([operation])
        for tree in disk.after_power_loss():
            mark = (len(promises), *sorted((path, data or b"") for path, data in tree.items()))
            if mark not in seen:
                seen.add(mark)
                yield Moment(promises, tree)


def check(harness: Harness, moment: Moment, state: State) -> None:
    """Check that what is on the disk is whole, and that the rest can be embedded."""
    lay(moment.tree, harness.place)
    harness.check()
    assert harness.finish() == state


def check_all(harness: Harness, found: Iterable[Moment], state: State) -> None:
    for moment in found:
        check(harness, moment, state)


def test_a_log_followed_to_its_end_gives_the_very_files(
    harness: Harness, whole: tuple[State, list[Operation], Tree]
) -> None:
    disk = Disk(harness.place)
    for operation in whole[1]:
        disk.follow(operation)
    assert disk.now() == whole[2]


def test_what_a_power_loss_leaves_is_whole_and_can_be_finished(
    harness: Harness, whole: tuple[State, list[Operation], Tree]
) -> None:
    found = list(moments(harness.place, whole[1]))
    assert len(found) > 20
    check_all(harness, found, whole[0])


@pytest.mark.parametrize("kind", ["cache", "shard", "failure"])
def test_what_was_committed_outlives_a_power_loss(
    kind: str, harness: Harness, whole: tuple[State, list[Operation], Tree]
) -> None:
    assert kind in {kind for kind, _ in promises_in(whole[1])}
    for moment in moments(harness.place, whole[1]):
        assert moment.lost(kind) == []


def test_a_power_loss_after_a_kill_loses_nothing_that_was_committed(
    harness: Harness, whole: tuple[State, list[Operation], Tree]
) -> None:
    operations = [operation for operation in whole[1] if operation.name != "note"]
    names = {} if SOAK else {operation.name: operation for operation in reversed(operations)}
    for operation in operations if SOAK else [names[n] for n in ("link", "mkdir", "rename")]:
        harness.clear()
        assert harness.ask(operation.number, "after").killed
        before = harness.log()
        assert harness.ask().said == ""
        for moment in moments(harness.place, harness.log(), before):
            check(harness, moment, whole[0])
            assert [moment.lost(kind) for kind in ("cache", "shard", "failure")] == [[], [], []]


def test_a_power_loss_in_a_compaction_loses_no_row(
    harness: Harness, whole: tuple[State, list[Operation], Tree]
) -> None:
    before = log_of(harness)
    assert harness.ask(compact=True).said == ""
    found = list(moments(harness.place, harness.log(), before))
    assert len(found) > 20
    for moment in found:
        lay(moment.tree, harness.place)
        assert harness.state() == whole[0]
        assert moment.lost("failure") == []
        compact(harness.cache, open_cache(harness.cache).spec)
        assert harness.state() == whole[0]
        assert len(list(harness.cache.glob("shards/*.h5"))) == 1


def test_the_harness_sees_bytes_that_are_not_synced(
    harness: Harness, whole: tuple[State, list[Operation], Tree]
) -> None:
    log = log_of(harness, broken="sync_no_files")
    found = list(moments(harness.place, log))
    with pytest.raises((AssertionError, CacheError)):
        check_all(harness, found, whole[0])


def test_the_harness_sees_shards_whose_names_are_not_synced(
    harness: Harness, whole: tuple[State, list[Operation], Tree]
) -> None:
    def lose(log: Sequence[Operation]) -> bool:
        """Tell whether shards are lost though their directory is there."""
        there = (m for m in moments(harness.place, log) if "cache/shards" in m.tree)
        return any(moment.lost("shard") for moment in there)

    assert not lose(whole[1])
    assert lose(log_of(harness, broken="sync_no_directories"))
