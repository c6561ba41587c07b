"""A file that grows piece by piece, over several runs if need be."""

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medembed.core.files import open_plain, read_plain, sync_directory

__all__ = ["PartialFile"]

# Bytes of a piece between two notes in the journal: what a killed run fetches twice, at most, per
# connection. Each note costs an fsync.
_NOTED_EVERY = 16 << 20


class PartialFile:
    """`path` while it is incomplete, and beside it a journal of what of it is there.

    The journal's first line says what file this will be; each other line says how many bytes of
    a piece are on the disk, written after they were synced, so that a crash of the machine
    leaves no hole that passes for data.

    Parameters
    ----------
    path : Path
        `<name>.incomplete`; the journal is `<name>.incomplete.journal`.
    head : bytes
        What stands before the pieces.
    pieces : list of (position, length)
        Where in the file they belong, in bytes.
    identity : mapping
        What the file is made of; JSON. Of another identity, nothing is resumed.
    """

    def __init__(
        self, path: Path, head: bytes, pieces: list[tuple[int, int]], identity: Mapping[str, Any]
    ) -> None:
        self.path = path
        self.journal = _journal_of(path)
        self.pieces = pieces
        self.done = [0] * len(pieces)
        self._noted = [0] * len(pieces)
        self._lock = threading.Lock()
        first = (json.dumps(identity, sort_keys=True) + "\n").encode()
        size = sum(length for _, length in pieces) + len(head)
        if not self._resume(first, size):
            self._begin(first, head, size)
        self._file = os.open(path, os.O_WRONLY)
        self._notes = os.open(self.journal, os.O_WRONLY | os.O_APPEND)

    @staticmethod
    def identity_of(path: Path) -> dict[str, Any]:
        """Read what an earlier run was making at `path`; empty if there was none."""
        try:
            with open_plain(_journal_of(path)) as file:
                found = json.loads(file.readline())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @staticmethod
    def discard(path: Path) -> None:
        """Delete what an earlier run left at `path`."""
        _journal_of(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    def write(self, piece: int, data: bytes) -> None:
        """Append to a piece; one thread at a time per piece.

        Raises
        ------
        OSError
            The disk is full.
        """
        position, length = self.pieces[piece]
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file, view, position + self.done[piece])
            self.done[piece] += written
            view = view[written:]
        if self.done[piece] == length or self.done[piece] - self._noted[piece] >= _NOTED_EVERY:
            self._note(piece)

    def close(self) -> None:
        """Note what came last, for the next run to go on from, and close the files."""
        try:
            for piece, done in enumerate(self.done):
                if done > self._noted[piece]:
                    self._note(piece)
        except OSError:  # a full disk, which is being reported already
            pass
        finally:
            os.close(self._file)
            os.close(self._notes)

    def _note(self, piece: int) -> None:
        done = self.done[piece]
        os.fsync(self._file)
        with self._lock:
            os.write(self._notes, f"{piece} {done}\n".encode())
        self._noted[piece] = done

    def _begin(self, first: bytes, head: bytes, size: int) -> None:
        self.discard(self.path)
        with self.path.open("wb") as file:
            file.write(head)
            file.truncate(size)
            file.flush()
            os.fsync(file.fileno())
        with self.journal.open("wb") as file:
            file.write(first)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(self.path.parent)

    def _resume(self, first: bytes, size: int) -> bool:
        try:
            lines = read_plain(self.journal).splitlines(keepends=True)
            if not lines or lines[0] != first or self.path.stat().st_size != size:
                return False
        except OSError:
            return False
        for line in lines[1:]:
            words = line.split()
            if len(words) == 2 and all(word.isdigit() for word in words):
                self._believe(int(words[0]), int(words[1]))
        if not lines[-1].endswith(b"\n"):  # a kill cut the last note
            with self.journal.open("ab") as file:
                file.write(b"\n")
        return True

    def _believe(self, piece: int, done: int) -> None:
        """Take a note; one that a kill cut says less than is there, or nothing."""
        if piece < len(self.pieces) and done <= self.pieces[piece][1]:
            self.done[piece] = self._noted[piece] = max(done, self.done[piece])


def _journal_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.journal")
