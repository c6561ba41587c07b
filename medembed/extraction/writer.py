"""Write shards in a separate thread, so that hashing or a slow disk never stalls the encoder.

`RowWriter` commits before too many rows, or too old ones, could be lost; `Timeline` records how an
extraction spends its time.
"""

import queue
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np

from medembed.cache.failures import Failure
from medembed.cache.shards import as_stored, max_rows
from medembed.cache.spec import keys_from_hex
from medembed.cache.store import Cache
from medembed.core.errors import CacheError, ShardError

__all__ = ["STAGES", "RowWriter", "Span", "Timeline", "WriterThread"]

STAGES = ("prepare", "read", "decode", "starve", "encode", "write")


@dataclass(frozen=True)
class Span:
    """One busy period of a stage: `time.monotonic()` at its start and end."""

    stage: str
    start: float
    end: float


@dataclass
class Timeline:
    """Sums how long each stage was busy; keeps every span only if a trace is requested.

    Parameters
    ----------
    keep_spans : bool
        Keep every span; memory then grows with the number of images.

    Attributes
    ----------
    seconds : dict of str to float
        Keyed by `STAGES`: `prepare`, before the first image; `read` and `decode`, summed over the
        decoder processes; `starve`, waiting for images; `encode`, waiting for the encoder;
        `write`, in which the writer's thread was busy.
    """

    keep_spans: bool = False
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    spans: list[Span] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, stage: str, start: float, end: float) -> None:
        """Add a span; safe to call from several threads."""
        with self._lock:
            self.seconds[stage] += end - start
            if self.keep_spans:
                self.spans.append(Span(stage, start, end))


class RowWriter:
    """Appends rows and failures to a cache; leaving the `with` block commits them.

    An exception commits them too, since every added row is complete.

    Parameters
    ----------
    cache : Cache
        The cache to append to.
    commit_seconds : float
        How old an uncommitted row may be when the next one is added.

    Attributes
    ----------
    n_committed : int
        Rows added here that are committed.
    """

    def __init__(self, cache: Cache, commit_seconds: float) -> None:
        self._cache, self._commit_seconds = cache, commit_seconds
        self._max_rows = max_rows(cache.spec)
        self._digests: list[str] = []
        self._parts: list[dict[str, np.ndarray]] = []
        self._failures: list[Failure] = []
        self._oldest = 0.0
        self.n_committed = 0

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.commit()

    def add(self, digests: Sequence[str], embeddings: Mapping[str, np.ndarray]) -> None:
        """Add rows: SHA-256s in hex and, per pooling, an (n, ...) array.

        Raises
        ------
        CacheError
            A value does not fit the cache's dtype, or a commit that was due failed.
        """
        stored = as_stored(embeddings, self._cache.spec, len(digests))
        self._start_clock()
        self._parts.append(stored)
        self._digests += digests
        if len(self._digests) >= self._max_rows:
            self.commit()
        self.commit_if_due()

    def add_failure(self, failure: Failure) -> None:
        """Add a failure, committed together with the rows."""
        self._start_clock()
        self._failures.append(failure)
        self.commit_if_due()

    def commit_if_due(self) -> None:
        """Commit if the oldest addition has waited long enough."""
        waiting = bool(self._digests or self._failures)
        if waiting and time.monotonic() - self._oldest >= self._commit_seconds:
            self.commit()

    def commit(self) -> None:
        """Commit all added rows and failures.

        After an interruption by Ctrl-C it can be called again: equal rows give an identical shard.

        Raises
        ------
        CacheError
            The cache cannot be written. The rows are discarded.
        """
        try:
            self._commit_rows()
            self._cache.record_failures(self._failures)
        except CacheError:
            self._forget()
            raise
        self._forget()

    def _commit_rows(self) -> None:
        if not self._digests:
            return
        keys = keys_from_hex(self._digests)
        names = self._cache.spec.poolings
        rows = {name: np.concatenate([part[name] for part in self._parts]) for name in names}
        done = self._find_done(keys)
        if done.any():
            keys, rows = keys[~done], {name: values[~done] for name, values in rows.items()}
        for start in range(0, len(keys), self._max_rows):
            end = start + self._max_rows
            self._cache.commit(keys[start:end], {name: rows[name][start:end] for name in names})
        self.n_committed += len(done)

    def _find_done(self, keys: np.ndarray) -> np.ndarray:
        """Return which rows another process has committed, such as a second run of the command."""
        try:
            return self._cache.is_done(keys)
        except ShardError:  # another shard's damage must not cost these rows
            return np.zeros(len(keys), bool)

    def _forget(self) -> None:
        self._digests, self._parts, self._failures = [], [], []

    def _start_clock(self) -> None:
        if not self._digests and not self._failures:
            self._oldest = time.monotonic()


MAX_WAITING = 8  # batches; a disk that stays slower than the encoder must eventually hold it up
TICK_SECONDS = 0.5  # how late a due commit may begin while no rows are added

Rows = tuple[Sequence[str], Mapping[str, np.ndarray]]


class WriterThread:
    """A `RowWriter` in a separate thread; leaving the `with` block commits all additions.

    Parameters
    ----------
    cache : Cache
        The cache to append to.
    commit_seconds : float
        How old an uncommitted row may become.
    timeline : Timeline
        Records the duration of each addition and commit, as `write`.

    Raises
    ------
    CacheError
        Raised by the next call, or on exit, if the thread's writer failed. Earlier additions are
        committed as far as the directory allows.
    """

    def __init__(self, cache: Cache, commit_seconds: float, timeline: Timeline) -> None:
        self._cache, self._commit_seconds, self._timeline = cache, commit_seconds, timeline
        self._waiting: queue.Queue[Rows | Failure | None] = queue.Queue(MAX_WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="writer")
        self._n_committed = 0

    def __enter__(self) -> "WriterThread":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._put(None)
        self._thread.join()
        if error is None and self._error:
            raise self._error
        if isinstance(error, KeyboardInterrupt):
            error.add_note(self._describe())

    def add(self, digests: Sequence[str], embeddings: Mapping[str, np.ndarray]) -> None:
        """Hand over rows: SHA-256s in hex and, per pooling, an (n, ...) array."""
        self._put((digests, embeddings))
        self._raise()

    def add_failure(self, failure: Failure) -> None:
        """Hand over a failure, committed together with the rows."""
        self._put(failure)
        self._raise()

    def _describe(self) -> str:
        if self._error:
            return f"The last rows are lost: {self._error}"
        return f"{self._n_committed:,} images of this run are in the cache."

    def _raise(self) -> None:
        if self._error:
            raise self._error

    def _put(self, item: Rows | Failure | None) -> None:
        while self._thread.is_alive():
            try:
                self._waiting.put(item, timeout=TICK_SECONDS)
            except queue.Full:
                continue
            return

    def _run(self) -> None:
        try:
            with RowWriter(self._cache, self._commit_seconds) as writer:
                while self._step(writer):
                    pass
                start = time.monotonic()
            self._n_committed = writer.n_committed
            self._timeline.add("write", start, time.monotonic())
        except BaseException as error:  # raised again where it can be seen
            self._error = error

    def _step(self, writer: RowWriter) -> bool:
        try:
            item = self._waiting.get(timeout=TICK_SECONDS)
        except queue.Empty:
            writer.commit_if_due()
            return True
        if item is None:
            return False
        start = time.monotonic()
        if isinstance(item, Failure):
            writer.add_failure(item)
        else:
            writer.add(*item)
        self._timeline.add("write", start, time.monotonic())
        return True
