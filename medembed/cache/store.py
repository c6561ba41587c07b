"""The cache, in a directory or a bucket: one spec, many immutable shards, a list of failures."""

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np

from medembed.cache import failures, shards, verification
from medembed.cache.failures import Failure, FailureObject
from medembed.cache.index import MAX_TRIES, Index, list_files
from medembed.cache.local_copies import Download
from medembed.cache.metadata import (
    FORMAT,
    VERSION,
    create_description,
    mismatch,
    read_description,
    source_of,
)
from medembed.cache.spec import CacheSpec, keys_from_hex
from medembed.cache.storage import READERS, file_size
from medembed.core.errors import CacheError, MissingRowsError, ShardError
from medembed.core.locations import BucketPath, Location, as_location
from medembed.core.poolings import list_names
from medembed.core.system import count_cores
from medembed.core.text import Summarised, Summary, counted

__all__ = ["Cache", "begin_to_open", "create_cache", "open_cache"]


class Cache(Summarised):
    """Embeddings in a directory or a bucket, keyed by the SHA-256 of each image's bytes.

    Open a cache with `open_cache` or `create_cache`. Any number of processes may read and append
    concurrently: shards are immutable and appear complete.

    Attributes
    ----------
    path : Path or BucketPath
        The directory, or the prefix of a bucket.
    spec : CacheSpec
        The spec of all rows.
    recorded : dict
        `source`, `revision`, `precision`, `device`, `versions` of the run that created the
        cache; informative, never compared.
    canary : dict or None
        Embeddings of known images by the run that created the cache (`extraction.canary`).
    """

    def __init__(
        self,
        path: Location,
        spec: CacheSpec,
        recorded: Mapping[str, object],
        canary: Mapping[str, object] | None = None,
        known: Collection[str] = (),
        listing: Future[dict[str, Location]] | None = None,
    ) -> None:
        self.path, self.spec, self.recorded, self.canary = path, spec, recorded, canary
        self._index = Index(path / "shards", spec, known, listing)
        self._failure_object: FailureObject | None = None

    def summarise(self) -> Summary:
        """Return poolings, dtype, encoder, and the number of rows, if it can be read."""
        shapes = {n: " × ".join(map(str, shape)) for n, shape in self.spec.poolings.items()}
        try:
            n_rows = counted(self._index.refresh().n_rows, "row")
        except (CacheError, OSError):
            n_rows = "rows that cannot be read"
        path = self.path if isinstance(self.path, BucketPath) else self.path.resolve()
        return Summary(
            f"Cache {path.name}: {n_rows}",
            {
                "poolings": ", ".join(f"{name} ({shape})" for name, shape in shapes.items()),
                "stored as": self.spec.dtype,
                "encoder": self.source,
            },
        )

    @property
    def source(self) -> str:
        """The user's reference of the encoder: `source` or `source@revision`."""
        return source_of(self.recorded)

    def require_spec(self, spec: CacheSpec, recorded: Mapping[str, object]) -> None:
        """Raise SpecMismatchError, naming the first difference, unless rows of `spec` fit here.

        `recorded` is the origin of `spec`, see `create_cache`.
        """
        error = mismatch(self.path, (self.spec, self.recorded), (spec, recorded))
        if error:
            raise error

    def keys(self) -> np.ndarray:
        """Return the keys of all committed rows, sorted and unique: (n, 32) uint8.

        Raises
        ------
        ShardError
            The keys of a shard are damaged.
        """
        return self._index.refresh().keys()

    def is_done(self, keys: np.ndarray) -> np.ndarray:
        """Return for each key, (n, 32) uint8, whether its row is in a committed shard: (n,) bool.

        This is the only place that decides. All current shards count, including those that other
        processes have added since the last call.
        """
        found, _, _ = self._index.refresh().locate(keys)
        return found

    def commit(self, keys: np.ndarray, embeddings: Mapping[str, np.ndarray]) -> Location:
        """Add rows as one shard and return its path; on any error nothing is added.

        Parameters
        ----------
        keys : (n, 32) uint8
            SHA-256 of each image's bytes, unique.
        embeddings : mapping of str to (n, ...) array
            One finite array per pooling of the spec, converted to the spec's dtype.

        Raises
        ------
        CacheError
            The rows do not fit the spec, or the directory cannot be written.
        """
        path = shards.write_shard(self.path / "shards", keys, embeddings, self.spec)
        self._index.add(path)
        return path

    def read(
        self, keys: np.ndarray, poolings: Sequence[str], *, verify: bool = True
    ) -> dict[str, np.ndarray]:
        """Return rows in the order of `keys`, (n, ...) per pooling in the stored dtype.

        Raises
        ------
        MissingRowsError
            A key is not in the cache.
        CacheError
            A pooling is not in the cache, or a shard is damaged (`ShardError`).
        """
        self.check_poolings(poolings)
        outputs = {
            name: np.empty((len(keys), *self.spec.poolings[name]), self.spec.dtype)
            for name in poolings
        }
        self.read_into(keys, outputs, verify=verify)
        return outputs

    def read_into(
        self, keys: np.ndarray, outputs: Mapping[str, np.ndarray], *, verify: bool = True
    ) -> None:
        """Read rows into arrays of any float dtype, one (n, ...) array per pooling.

        Shards are read in parallel threads; those of a bucket are copied to this machine on the
        way, see `local_copies`. A row that is in two shards is read from the first of
        them by name. Raises like `read`.
        """
        self.check_poolings(list(outputs))
        waiting = np.arange(len(keys))
        for n_tries in range(1, MAX_TRIES + 1):
            found, owners, rows = self._locate(keys[waiting], again=n_tries > 1)
            if not found.all():
                raise MissingRowsError(
                    f"{int((~found).sum())} of {len(keys)} rows are not in the cache at {self.path}"
                )
            order = np.argsort(owners, kind="stable")
            ends = np.flatnonzero(np.diff(owners[order])) + 1
            parts = np.split(order, ends) if len(order) else []
            left = self._copy_all(parts, waiting, owners, rows, outputs, verify)
            waiting = np.concatenate([waiting[:0], *left])
            if not len(waiting):
                return
            self._index.wait(n_tries)
        raise CacheError(
            f"shards of {self.path} vanish faster than they are read: {len(waiting)} of "
            f"{len(keys)} rows are missing. Read again when whatever removes them has ended."
        )

    def _locate(
        self, keys: np.ndarray, *, again: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what `Index.locate` returns; a bucket is listed again only if that is needed."""
        if isinstance(self.path, BucketPath) and not again:
            places = self._index.locate(keys)
            if places[0].all():
                return places
        return self._index.refresh().locate(keys)

    def _copy_all(
        self,
        parts: Sequence[np.ndarray],
        places: np.ndarray,
        owners: np.ndarray,
        rows: np.ndarray,
        outputs: Mapping[str, np.ndarray],
        verify: bool,
    ) -> list[np.ndarray]:
        """Copy the rows of several shards, in parallel; return what `_copy` returns of each."""
        paths = [self._index.paths[owners[part[0]]] for part in parts]
        far = [path for path in paths if isinstance(path, BucketPath)]
        with Download(far) if far else nullcontext() as download:
            # Copies that are there keep cores busy, not the line.
            n_threads = max(count_cores(), READERS if download and download.is_needed else 1)

            def copy(part: np.ndarray) -> np.ndarray:
                left = self._copy(places, owners, rows, outputs, verify, part)
                if download:
                    download.done(self._index.paths[owners[part[0]]])
                return left

            with ThreadPoolExecutor(n_threads) as pool:
                return list(pool.map(copy, parts))

    def _copy(
        self,
        places: np.ndarray,
        owners: np.ndarray,
        rows: np.ndarray,
        outputs: Mapping[str, np.ndarray],
        verify: bool,
        mine: np.ndarray,
    ) -> np.ndarray:
        """Copy one shard's rows; return the remaining places, all if a compaction removed it."""
        path = self._index.paths[owners[mine[0]]]
        to: np.ndarray = places[mine]
        try:
            shards.copy_rows(path, rows[mine], to, outputs, verify=verify, spec=self.spec)
        except ShardError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return to
            raise
        return np.empty(0, np.int64)

    def check_poolings(self, poolings: Sequence[str]) -> None:
        """Raise CacheError, listing the cache's poolings, unless every pooling is in it."""
        for name in poolings:
            if name not in self.spec.poolings:
                raise CacheError(
                    f"cache at {self.path} has no pooling {name!r}; it has "
                    f"{list_names(self.spec.poolings)}. Choose among these with --pool, or "
                    "extract again into another --cache."
                )

    def failures(self) -> dict[str, Failure]:
        """Return the known failures by sha256: the newest of each, without rows done since.

        Raises
        ------
        CacheError
            `failures.jsonl` cannot be read.
        """
        known = failures.read_failures(self._failures_path)
        if not known:
            return {}
        done = self.is_done(keys_from_hex(list(known)))
        return {f.sha256: f for f, is_done in zip(known.values(), done, strict=True) if not is_done}

    def record_failures(self, new: Iterable[Failure]) -> None:
        """Append failures to `failures.jsonl` durably, except those already recorded.

        Raises
        ------
        CacheError
            The file cannot be written.
        """
        new, path = list(new), self._failures_path
        known = failures.read_failures(path) if new else {}
        unknown = [failure for failure in new if known.get(failure.sha256) != failure]
        if isinstance(path, BucketPath):
            self._failure_object = self._failure_object or FailureObject(path)
            self._failure_object.append(unknown)
        else:
            failures.append_failures(path, unknown)

    def card(self) -> dict[str, Any]:
        """Return a JSON-able description: spec, provenance, rows, bytes, failures."""
        n_rows = self._index.refresh().n_rows
        failed = self.failures().values()
        return {
            "path": str(self.path),
            "format": FORMAT,
            "version": VERSION,
            "rows": n_rows,
            "shards": len(self._index.paths),
            "bytes": sum(map(file_size, self._index.paths)),
            "spec": self.spec.as_dict(),
            "recorded": self.recorded,
            "canary": self.canary is not None,
            "failures": {
                stage: sum(failure.stage == stage for failure in failed)
                for stage in failures.STAGES
            },
        }

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Check every shard's bytes, spec and rows; return one line per problem.

        `verification.verify` returns more details. `progress(done, total)` counts bytes.
        """
        return [problem.what for problem in verification.verify(self.path, self.spec, progress)]

    @property
    def _failures_path(self) -> Location:
        return self.path / "failures.jsonl"


def create_cache(
    path: str | os.PathLike[str],
    spec: CacheSpec,
    recorded: Mapping[str, object],
    canary: Mapping[str, object] | None = None,
    *,
    known: Collection[str] = (),
) -> Cache:
    """Return the cache at `path` for rows of `spec`, created if it does not exist.

    Several processes may call this concurrently: one creates the cache, all then compare specs with
    the one on disk. `recorded` and `canary` are the creator's. For `known` see `open_cache`.

    Raises
    ------
    SpecMismatchError
        The existing cache has another spec; the message names the first difference.
    CacheError
        The directory is not a cache, has an unknown version, or cannot be written.
    """
    path = as_location(path, "a cache")
    create_description(path, spec, recorded, canary)
    cache = open_cache(path, known=known)
    cache.require_spec(spec, recorded)
    return cache


def open_cache(path: Cache | str | os.PathLike[str], *, known: Collection[str] = ()) -> Cache:
    """Return an existing cache; an open one is returned unchanged.

    `path` is a directory, or a bucket such as `s3://bucket/mura`.

    Shards whose names are in `known` are ignored, for a task that knows that they hold none of the
    rows it needs.

    Raises
    ------
    PathNotFoundError
        The directory does not exist.
    StorageError
        The bucket cannot be reached.
    CacheError
        The directory is not a cache, is damaged, or has an unknown version.
    """
    if isinstance(path, Cache):
        return path
    path = as_location(path, "a cache", "a Cache")
    return Cache(path, *read_description(path), known)


def begin_to_open(path: Cache | str | os.PathLike[str]) -> Callable[[], Cache]:
    """Return a function that returns what `open_cache` does, for a caller that reads at once.

    A bucket is asked for `cache.json` and for its shards from now on, so that these requests take
    no longer than one, and none of the time of what is done before the function is called.
    """
    location = None if isinstance(path, Cache) else as_location(path, "a cache", "a Cache")
    if not isinstance(location, BucketPath):
        opened = open_cache(path)
        return lambda: opened
    pool = ThreadPoolExecutor(2)
    description = pool.submit(read_description, location)
    listing = pool.submit(list_files, location / "shards")
    pool.shutdown(wait=False)
    return lambda: Cache(location, *description.result(), listing=listing)
