"""Download only one part of a model's tensors from a repository, by range, into the hub's cache.

A published MedGemma has 8.6 GB, its vision tower 0.83 GB. The result is a safetensors file of that
part alone, beside the other files of its snapshot and stored in the hub's own layout:
`snapshots/<commit>/medembed-vision-tower.safetensors`, a link to `blobs/<SHA-256>`.

`PartialFile` grows piece by piece, over several runs if need be.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medembed.core.errors import EncoderError
from medembed.core.files import open_plain, read_plain, sync_directory
from medembed.core.hub_http import (
    RemoteFile,
    copy_range,
    explain_changed,
    explain_no_space,
    is_no_space,
    open_file,
    read_range,
)
from medembed.core.system import free_bytes
from medembed.encoders.checkpoint_files import (
    FETCHED_FILES,
    INDEX_FILE,
    PART_NAMES,
    PART_WORDS,
    Part,
    holds_file,
    match_tensors,
    part_shards,
    single_file,
)
from medembed.encoders.stored_tensors import (
    FLOAT_BYTES,
    LENGTH_BYTES,
    StoredTensor,
    compose_header,
    find_non_finite,
    header_length,
    parse_header,
    read_header,
)

__all__ = ["PartialFile", "fetch_part", "remote_tensors"]

# Bytes of a piece between two notes in the journal: the most that a kill makes download twice, per
# connection. Each note costs an fsync.
_NOTED_EVERY = 16 << 20


class PartialFile:
    """An incomplete file, and a journal of the parts that are already present.

    The journal's first line identifies the file; each further line records how many bytes of a
    piece are on the disk, and is written after they were synced, so that a crash of the machine
    never leaves a hole that is mistaken for data.

    Parameters
    ----------
    path : Path
        `<name>.incomplete`; the journal is `<name>.incomplete.journal`.
    head : bytes
        The bytes before the pieces.
    pieces : list of (position, length)
        The pieces' places in the file, in bytes.
    identity : mapping
        JSON description of the file's sources. A file with another identity is not resumed.
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
        """Return the identity of an earlier run's file at `path`, or an empty mapping."""
        try:
            with open_plain(_journal_of(path)) as file:
                found = json.loads(file.readline())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @staticmethod
    def discard(path: Path) -> None:
        """Delete an earlier run's file at `path`."""
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
        """Record the latest progress, from which the next run resumes, and close the files."""
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
        """Apply a note; a truncated one claims fewer bytes than are present, or none."""
        if piece < len(self.pieces) and done <= self.pieces[piece][1]:
            self.done[piece] = self._noted[piece] = max(done, self.done[piece])


def _journal_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.journal")


_CONNECTIONS = 4
_MOST_PIECE_BYTES = 64 << 20
_LEAST_PIECE_BYTES = 256 << 10
_TOLD_EVERY_SECONDS = 0.1

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Span:
    """Bytes `start` to `stop` of a remote file, which belong at `at` in the result."""

    file: RemoteFile
    start: int
    stop: int
    at: int


@dataclass(frozen=True)
class _Plan:
    """The file to build: its header, its tensors, and the sources of its bytes."""

    header: bytes
    tensors: list[StoredTensor]
    files: list[RemoteFile]
    spans: list[_Span]


def remote_tensors(
    repo: str, commit: str, weight_map: Mapping[str, str] | None, part: Part
) -> list[tuple[RemoteFile, StoredTensor]]:
    """Return the places of a part's tensors in a repository, with two small requests per file.

    Parameters
    ----------
    weight_map : mapping of tensor name to file name, or None
        The repository's index; None if all tensors are in one file.

    Raises
    ------
    EncoderError
        A file is missing, unreachable or not a safetensors file; the index and a file disagree; or
        no tensor belongs to this part.
    """
    belongs = PART_NAMES[part]
    found: list[tuple[RemoteFile, StoredTensor]] = []
    shards = [single_file(part)] if weight_map is None else part_shards(weight_map, part)
    for shard in shards:
        file, first = open_file(repo, commit, shard, LENGTH_BYTES)
        what = f"{shard} of {repo}"
        end = LENGTH_BYTES + header_length(first, file.size, what)
        text = read_range(file, LENGTH_BYTES, end)
        held = [t for t in parse_header(text, file.size, what) if belongs(t.name)]
        if weight_map is not None:
            named = {name for name, where in weight_map.items() if where == shard}
            differing = {n for n in named if belongs(n)} ^ {tensor.name for tensor in held}
            if differing:
                raise EncoderError(
                    f"{INDEX_FILE} and {shard} of {repo} disagree on where {min(differing)} is: "
                    "the repository is damaged. Give another revision of it."
                )
        found += [(file, tensor) for tensor in held]
    match_tensors(((Path(file.name), tensor.name) for file, tensor in found), repo, part)
    return found


def fetch_part(
    snapshot: Path,
    repo: str,
    weight_map: Mapping[str, str] | None,
    part: Part,
    progress: Progress | None = None,
) -> Path:
    """Return a part of a model, downloaded into `snapshot` by this or another process.

    Parameters
    ----------
    snapshot : Path
        `<hub cache>/models--<owner>--<name>/snapshots/<commit>`.
    weight_map : mapping or None
        The repository's index, see `remote_tensors`.
    progress : callable(bytes done, bytes in all), optional
        Called at intervals, on the caller's thread.

    Returns
    -------
    Path
        The file in `snapshot`.

    Raises
    ------
    EncoderError
        The files are invalid (see `remote_tensors`), the disk is full, the connection broke, the
        file at the hub changed, or a value is not finite. After a broken connection or a full disk
        the next call resumes.
    """
    from huggingface_hub import constants

    # Documented, but exported in a way that type checkers do not see.
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    storage = snapshot.parent.parent
    pointer = snapshot / FETCHED_FILES[part]
    name = f"{pointer.stem}-{snapshot.name}"
    locks = Path(constants.HF_HUB_CACHE) / ".locks" / storage.name
    try:
        locks.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(locks / f"{name}.lock"):
            if not holds_file(pointer):
                blobs = storage / "blobs"
                blobs.mkdir(exist_ok=True)
                plan = _plan(repo, snapshot.name, weight_map, part)
                partial = blobs / f"{name}.incomplete"
                _fill(plan, partial, PART_WORDS[part], progress)
                _verify(plan, partial, repo)
                _publish(partial, pointer)
    except OSError as error:
        if is_no_space(error):
            raise explain_no_space(PART_WORDS[part], repo) from error
        raise EncoderError(
            f"{PART_WORDS[part]} of {repo} could not be written into {storage}: "
            f"{error.strerror or error}. Set HF_HOME to a directory that is yours."
        ) from error
    return pointer


def _plan(repo: str, commit: str, weight_map: Mapping[str, str] | None, part: Part) -> _Plan:
    found = remote_tensors(repo, commit, weight_map, part)
    for file, tensor in found:
        if tensor.dtype not in FLOAT_BYTES:
            raise EncoderError(
                f"{repo}: {tensor.name} of {file.name} is stored as {tensor.dtype}; quantised "
                "towers are not read."
            )
    # The widest dtypes first, so that each tensor is aligned to its own width; then in file order,
    # so that neighbours stay adjacent and are fetched in one request.
    found.sort(key=lambda pair: (-FLOAT_BYTES[pair[1].dtype], pair[0].name, pair[1].start))
    files = sorted({file for file, _ in found}, key=lambda file: file.name)
    header = compose_header(
        ((t.name, t.dtype, t.shape, t.stop - t.start) for _, t in found),
        {
            "format": "pt",
            "source": repo,
            "commit": commit,
            **{f"etag {file.name}": file.etag for file in files},
        },
    )
    tensors: list[StoredTensor] = []
    spans: list[_Span] = []
    at = len(header)
    for file, tensor in found:
        length = tensor.stop - tensor.start
        tensors.append(StoredTensor(tensor.name, tensor.dtype, tensor.shape, at, at + length))
        last = spans[-1] if spans else None
        if last and last.file == file and last.stop == tensor.start:
            spans[-1] = _Span(file, last.start, tensor.stop, last.at)
        else:
            spans.append(_Span(file, tensor.start, tensor.stop, at))
        at += length
    return _Plan(header, tensors, files, _cut(spans, at - len(header)))


def _cut(spans: list[_Span], total: int) -> list[_Span]:
    """Return spans split into pieces that keep all connections busy to the end."""
    most = min(max(total // (2 * _CONNECTIONS), _LEAST_PIECE_BYTES), _MOST_PIECE_BYTES)
    return [
        _Span(span.file, start, min(start + most, span.stop), span.at + start - span.start)
        for span in spans
        for start in range(span.start, span.stop, most)
    ]


def _fill(plan: _Plan, path: Path, words: str, progress: Progress | None) -> None:
    """Fetch the parts of the plan that are missing at `path`."""
    repo, commit = plan.files[0].repo, plan.files[0].commit
    tags = {file.name: f"{file.size} {file.etag}" for file in plan.files}
    before = PartialFile.identity_of(path).get("tags", tags)
    for file in plan.files:
        if before.get(file.name, tags[file.name]) != tags[file.name]:
            PartialFile.discard(path)
            raise explain_changed(repo, commit, file.name)
    pieces = [(span.at, span.stop - span.start) for span in plan.spans]
    digest = hashlib.sha256(plan.header + repr(plan.spans).encode()).hexdigest()
    identity = {"tags": tags, "plan": digest}
    needed = len(plan.header) + sum(length for _, length in pieces) - _allocated(path)
    free = free_bytes(path)
    if needed > free:
        raise explain_no_space(words, repo, needed=needed, free=free)
    partial = PartialFile(path, plan.header, pieces, identity)
    answers: set[RemoteFile] = set()
    try:
        _copy_pieces(plan, partial, answers, progress)
    except EncoderError:
        if not answers <= set(plan.files):  # changed under the commit
            PartialFile.discard(path)
        raise
    finally:
        partial.close()


def _allocated(path: Path) -> int:
    """Return the bytes of disk that a sparse file already occupies, or 0 if it does not exist."""
    try:
        return int(getattr(path.stat(), "st_blocks", 0)) * 512  # POSIX: in units of 512 bytes
    except FileNotFoundError:
        return 0


def _copy_pieces(
    plan: _Plan, partial: PartialFile, answers: set[RemoteFile], progress: Progress | None
) -> None:
    halted = threading.Event()
    total = sum(length for _, length in partial.pieces)

    def copy(piece: int) -> None:
        span = plan.spans[piece]
        copy_range(
            span.file,
            span.start + partial.done[piece],
            span.stop,
            lambda _, data: partial.write(piece, data),
            halted=halted,
            note=answers.add,
        )

    left = [i for i, (_, length) in enumerate(partial.pieces) if partial.done[i] < length]
    if progress:
        progress(sum(partial.done), total)
    pool = ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="fetch")
    try:
        waiting = {pool.submit(copy, piece) for piece in left}
        while waiting:
            finished, waiting = wait(waiting, _TOLD_EVERY_SECONDS, FIRST_EXCEPTION)
            for future in finished:
                future.result()
            if progress:
                progress(sum(partial.done), total)
    finally:
        halted.set()
        pool.shutdown(cancel_futures=True)


def _verify(plan: _Plan, path: Path, repo: str) -> None:
    if read_header(path) != sorted(plan.tensors, key=lambda tensor: (tensor.start, tensor.stop)):
        PartialFile.discard(path)
        raise EncoderError(
            f"{path.name} is not what was written into it: check the disk under {path.parent}, "
            "and run again."
        )
    name = find_non_finite(path, plan.tensors)
    if name is not None:
        PartialFile.discard(path)
        raise EncoderError(
            f"{repo}: {name} holds values that are not finite. Nothing of it is kept; give "
            "another revision."
        )


def _publish(partial: Path, pointer: Path) -> None:
    """Move a complete file to where readers look, linked in the hub's own way.

    The link is created first and dangles until the file is renamed: the file thus appears in one
    step, and after a kill at any point the next run can complete it.
    """
    from huggingface_hub import constants

    with partial.open("rb+") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    blob = partial.with_name(digest)
    pointer.unlink(missing_ok=True)
    target = pointer
    if not getattr(constants, "HF_HUB_DISABLE_SYMLINKS", False):
        try:
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
            target = blob
        except OSError:  # a file system without links: a plain file, as in the hub's cache
            pointer.unlink(missing_ok=True)
    partial.replace(target)
    sync_directory(target.parent)
    sync_directory(pointer.parent)
    PartialFile.discard(partial)
