"""A thread that commits rows, so that neither hashing nor a slow disk holds up the encoder."""

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

import numpy as np

from medembed.cache.failures import Failure
from medembed.cache.store import Cache
from medembed.cache.writer import RowWriter
from medembed.extraction.profiling import Timeline

__all__ = ["WriterThread"]

MAX_WAITING = 8  # batches; a disk that stays slower than the encoder must hold it up in the end
TICK_SECONDS = 0.5  # how late a commit that is due may begin while nothing is added

Rows = tuple[Sequence[str], Mapping[str, np.ndarray]]


class WriterThread:
    """A `RowWriter` in a thread of its own; leaving the `with` block commits all that was added.

    Parameters
    ----------
    cache : Cache
        Where to.
    commit_seconds : float
        How old an uncommitted row may become.
    timeline : Timeline
        Told how long each addition and commit took, as `write`.

    Raises
    ------
    CacheError
        From the next call, or on leaving, if the thread's writer raised it. What was added
        before is committed as far as the directory allows.
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
