"""What a disk may hold after the power went: every state that POSIX allows, from the shim's log.

A file that was written and not synced since may hold its old bytes, none, some, or rubbish. A name
that was made, renamed or removed in a directory not synced since may or may not be so, each for
itself. Only fsync, of the file or of the directory, makes sure. No real file system is as bad as
this all at once; a cache that survives it survives them all.
"""

import itertools
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from crashing import Operation

__all__ = ["Disk", "Tree", "lay"]

MAX_SUBSETS = 16  # of the names that may or may not be there, at one moment
RUBBISH = random.Random(0).randbytes(1 << 16)

Tree = dict[str, bytes | None]  # path -> bytes, None for a directory


@dataclass(eq=False)
class File:
    """Keep what is surely on the disk, and what was last written."""

    synced: bytes = b""
    now: bytes = b""

    def write(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        self.now = self.now[:offset].ljust(offset, b"\0") + data + self.now[end:]

    def versions(self) -> list[bytes]:
        """Give what the file may hold: what was synced first, what was written last."""
        if self.synced == self.now:
            return [self.now]
        pairs = zip(self.synced, self.now, strict=False)
        n_kept = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        kept, rest = self.now[:n_kept], self.now[n_kept:]
        found = [self.synced, b"", kept + rest[: len(rest) // 2], kept + bytes(len(rest))]
        return list(dict.fromkeys([*found, kept + RUBBISH[: len(rest)], self.now]))


Change = dict[str, "File | Directory | None"]  # what becomes of names, all or nothing


@dataclass(eq=False)
class Directory:
    """Keep the names that are surely on the disk, and the changes to them since, in order."""

    synced: "dict[str, File | Directory]" = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)

    def entries(self, changes: Iterable[Change] | None = None) -> "dict[str, File | Directory]":
        """Give the names with all changes made, or with these only."""
        names: dict[str, File | Directory | None] = dict(self.synced)
        for change in self.changes if changes is None else changes:
            names |= change
        return {name: node for name, node in names.items() if node is not None}


class Disk:
    """Follow a log, and tell what may be on the disk if the power goes now.

    Parameters
    ----------
    place : Path
        The directory that the log is of; itself it is on the disk for good, and empty at first.
    """

    def __init__(self, place: Path) -> None:
        self.place, self.root = place, Directory()
        self._handles: dict[int, File | Directory] = {}

    def follow(self, operation: Operation) -> None:
        """Do what the log says was done."""
        if operation.result < 0 or operation.name in ("read", "note"):
            return
        if operation.name in ("open", "create"):
            self._open(operation)
        elif operation.name == "close":
            self._handles.pop(operation.handle)
        elif operation.name in ("write", "truncate"):
            self._write(operation)
        elif operation.name == "fsync":
            self._sync(self._handles[operation.handle])
        else:
            self._rename(operation)

    def now(self) -> Tree:
        """Give what a process sees."""
        return {path: _latest(node) for path, node in self._walk("", self.root, None)}

    def after_power_loss(self) -> Iterator[Tree]:
        """Yield what may be on the disk: the worst first, then a choice of all there is."""
        seen = set()
        for changes in self._subsets():
            nodes = list(self._walk("", self.root, changes))
            versions = [_versions(node) for _, node in nodes]
            for number in range(max(map(len, versions), default=1)):
                chosen = [some[min(number, len(some) - 1)] for some in versions]
                tree = {path: data for (path, _), data in zip(nodes, chosen, strict=True)}
                mark = tuple(sorted((path, data or b"") for path, data in tree.items()))
                if mark not in seen:
                    seen.add(mark)
                    yield tree

    def _open(self, operation: Operation) -> None:
        directory, name = self._find(operation.path)
        if operation.name == "create":
            directory.changes.append({name: File()})
        node = directory.entries()[name] if name else directory
        if isinstance(node, File) and operation.flags & os.O_TRUNC:
            node.now = b""
        self._handles[operation.handle] = node

    def _write(self, operation: Operation) -> None:
        file = self._handles[operation.handle]
        assert isinstance(file, File)
        if operation.name == "write":
            file.write(operation.offset, operation.data)
        else:
            file.now = file.now[: operation.offset].ljust(operation.offset, b"\0")

    def _sync(self, node: "File | Directory") -> None:
        if isinstance(node, File):
            node.synced = node.now
        else:
            node.synced, node.changes = node.entries(), []

    def _rename(self, operation: Operation) -> None:
        directory, name = self._find(operation.path)
        if operation.name == "mkdir":
            directory.changes.append({name: Directory()})
        elif operation.name in ("unlink", "rmdir"):
            directory.changes.append({name: None})
        elif operation.name in ("rename", "link"):
            target, new_name = self._find(operation.path2)
            assert target is directory, "nothing is known of renaming between directories"
            change: Change = {new_name: directory.entries()[name]}
            directory.changes.append(change | ({name: None} if operation.name == "rename" else {}))
        else:
            raise AssertionError(f"nothing is known of {operation.name}")

    def _find(self, path: str) -> tuple[Directory, str]:
        """Give the directory that a path is in, and its name there, empty for the root's own."""
        parts = Path(path).relative_to(self.place).parts
        directory = self.root
        for part in parts[:-1]:
            inner = directory.entries()[part]
            assert isinstance(inner, Directory)
            directory = inner
        return directory, parts[-1] if parts else ""

    def _subsets(self) -> Iterator[set[int]]:
        """Yield which changes reached the disk: none, all, and others, by their identity."""
        changes = [id(change) for d in self._directories(self.root) for change in d.changes]
        subsets = list(itertools.islice(_all_subsets(changes), 4 * MAX_SUBSETS))
        chance = random.Random(len(changes))
        rest = subsets[2:]
        chance.shuffle(rest)
        yield from (set(subset) for subset in [*subsets[:2], *rest[:MAX_SUBSETS]])

    def _directories(self, directory: Directory) -> Iterator[Directory]:
        yield directory
        nodes = [node for change in directory.changes for node in change.values()]
        for node in {id(n): n for n in [*directory.synced.values(), *nodes]}.values():
            if isinstance(node, Directory):
                yield from self._directories(node)

    def _walk(
        self, prefix: str, directory: Directory, chosen: set[int] | None
    ) -> Iterator[tuple[str, "File | Directory"]]:
        """Yield all paths and what they are, with all changes made or the chosen ones."""
        changes = [c for c in directory.changes if chosen is None or id(c) in chosen]
        for name, node in directory.entries(changes).items():
            yield prefix + name, node
            if isinstance(node, Directory):
                yield from self._walk(f"{prefix}{name}/", node, chosen)


def lay(tree: Tree, place: Path) -> None:
    """Make the directory hold exactly this."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for path, data in sorted(tree.items()):  # a directory before what is in it
        if data is None:
            (place / path).mkdir()
        else:
            (place / path).write_bytes(data)


def _all_subsets(items: list[int]) -> Iterator[tuple[int, ...]]:
    """Yield none and all, then those that miss or have few."""
    sizes = sorted(range(len(items) + 1), key=lambda size: min(size, len(items) - size))
    for size in sizes:
        yield from itertools.combinations(items, size)


def _versions(node: File | Directory) -> list[bytes | None]:
    return [None] if isinstance(node, Directory) else list(node.versions())


def _latest(node: File | Directory) -> bytes | None:
    return None if isinstance(node, Directory) else node.now
