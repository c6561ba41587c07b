"""Collect rows and commit them as shards before too many, or too old ones, could be lost."""

import time
from collections.abc import Mapping, Sequence
from types import TracebackType

import numpy as np

from medembed.cache.failures import Failure
from medembed.cache.shards import as_stored, max_rows
from medembed.cache.spec import keys_from_hex
from medembed.cache.store import Cache
from medembed.core.errors import CacheError, ShardError

__all__ = ["RowWriter"]


class RowWriter:
    """Append rows and failures to a cache; leaving the `with` block commits what was added.

    Also when an exception leaves it: every row added is whole.

    Parameters
    ----------
    cache : Cache
        Where to.
    commit_seconds : float
        How old an uncommitted row may be when the next one is added.

    Attributes
    ----------
    n_committed : int
        Rows added here that are in the cache for good.
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
        """Commit all that was added.

        Interrupted by Ctrl-C, it can be called again: the same rows give the same shard.

        Raises
        ------
        CacheError
            The cache cannot be written. The rows are given up.
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
        """Tell which rows somebody else, such as the same command run twice, has committed."""
        try:
            return self._cache.is_done(keys)
        except ShardError:  # another shard is damaged: that must not cost these rows
            return np.zeros(len(keys), bool)

    def _forget(self) -> None:
        self._digests, self._parts, self._failures = [], [], []

    def _start_clock(self) -> None:
        if not self._digests and not self._failures:
            self._oldest = time.monotonic()
