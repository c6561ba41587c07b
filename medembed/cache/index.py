"""An index of a cache's rows, without one Python object per row.

A key is the SHA-256 of an image's bytes, a row of an (n, 32) uint8 array. Its first 8 bytes, read
as one big-endian number, order almost all keys; if several share them, whole keys are compared.
`committed_shards` lists the valid files of `shards/`, without those that a compaction has replaced.
"""

import json
import os
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from medembed.cache import shards
from medembed.cache.spec import KEY_BYTES, CacheSpec, keys_from_hex, sortable
from medembed.cache.storage import read_file
from medembed.core import object_store
from medembed.core.errors import CacheError, ShardError, StorageError
from medembed.core.files import describe_error
from medembed.core.locations import BucketPath, Location
from medembed.core.system import count_cores

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "MAX_TRIES",
    "Index",
    "SortedKeys",
    "committed_shards",
    "equal_keys",
    "keys_from_column",
    "list_files",
    "prefixes_of",
    "read_replaced",
    "replaced_shards",
]

BLOCK = 2**19  # keys processed in one step, which bounds memory
NIBBLES = np.full(256, 255, np.uint8)
NIBBLES[list(b"0123456789abcdef")] = np.arange(16)


def prefixes_of(keys: np.ndarray) -> np.ndarray:
    """Return the first 8 bytes of each key, (n, 32) uint8, as a number: (n,) uint64."""
    whole = np.ascontiguousarray(keys, np.uint8).reshape(-1, KEY_BYTES)
    return whole.view(">u8")[:, 0].astype(np.uint64)


def equal_keys(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return whether keys are equal, row by row: (n,) bool."""
    same: np.ndarray = np.logical_and.reduce(_numbers(a) == _numbers(b), axis=1)
    return same


def _numbers(keys: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(keys, np.uint8).reshape(-1, KEY_BYTES).view(np.uint64)


def keys_from_column(column: Any) -> np.ndarray:
    """Return the keys, (n, 32) uint8, of a pandas or Arrow column of SHA-256 hex digests.

    10 million take a second, and no memory beyond the keys; without pyarrow more of both.

    Raises
    ------
    CacheError
        A digest is not 64 lower-case hex digits.
    """
    try:
        import pyarrow as pa
    except ImportError:
        return _keys_from_list(list(column))
    array = pa.array(column)
    chunks = array.chunks if isinstance(array, pa.ChunkedArray) else [array]
    keys, start = np.empty((len(column), KEY_BYTES), np.uint8), 0
    for chunk in chunks:
        for begin in range(0, len(chunk), BLOCK):
            part = chunk.slice(begin, BLOCK)
            keys[start : start + len(part)] = _keys_from_arrow(part)
            start += len(part)
    return keys


def _keys_from_list(digests: list[str]) -> np.ndarray:
    keys = keys_from_hex(digests)
    if any(digest != digest.lower() for digest in digests):
        raise CacheError("a SHA-256 holds something else than lower-case hex digits")
    return keys


def _keys_from_arrow(part: "pa.Array") -> np.ndarray:
    import pyarrow as pa

    part = part.cast(pa.large_string())
    _, places, data = part.buffers()
    edges = np.frombuffer(places, np.int64)[part.offset : part.offset + len(part) + 1]
    if not len(part):
        return np.empty((0, KEY_BYTES), np.uint8)
    if part.null_count or (np.diff(edges) != 2 * KEY_BYTES).any():
        return keys_from_hex(part.to_pylist())
    digits = np.frombuffer(data, np.uint8)[edges[0] : edges[-1]]
    nibbles = NIBBLES[digits]
    if nibbles.max() > 15:
        raise CacheError("a SHA-256 holds something else than lower-case hex digits")
    keys: np.ndarray = (nibbles[0::2] << 4 | nibbles[1::2]).reshape(-1, KEY_BYTES)
    return keys


class SortedKeys:
    """Finds keys among many.

    Parameters
    ----------
    keys : (n, 32) uint8
        Keys in any order, possibly with duplicates. Kept, not copied.

    Attributes
    ----------
    keys : (n, 32) uint8
        The given keys.
    firsts : (m,) int
        First position of each distinct key, sorted by key.
    repeats, originals : (n - m,) int
        Position of each duplicate, and the first position of its key; sorted by the latter, then
        the former.
    """

    def __init__(self, keys: np.ndarray) -> None:
        self.keys = np.ascontiguousarray(keys, np.uint8).reshape(-1, KEY_BYTES)
        prefixes = prefixes_of(self.keys)
        places = np.argsort(prefixes).astype(_integer_for(len(prefixes)))
        prefixes = prefixes[places]
        tied = np.zeros(len(prefixes), bool)
        np.equal(prefixes[1:], prefixes[:-1], out=tied[1:])
        tied[:-1] |= tied[1:]
        runs = np.flatnonzero(tied)
        again = np.zeros(len(prefixes), bool)
        if len(runs):
            order = np.lexsort((places[runs], sortable(self.keys[places[runs]])))
            places[runs] = places[runs][order]
            whole = sortable(self.keys[places[runs]])
            again[runs[1:]] = whole[1:] == whole[:-1]
        self.repeats, self.originals = _pair(places, again)
        has_repeats = len(self.repeats) > 0
        self.firsts = places[~again] if has_repeats else places
        self._prefixes = prefixes[~again] if has_repeats else prefixes

    def __len__(self) -> int:
        return len(self.firsts)

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """Return the first position of each of `wanted`, (k, 32) uint8, or -1: (k,) int64."""
        wanted = np.ascontiguousarray(wanted, np.uint8).reshape(-1, KEY_BYTES)
        found = np.full(len(wanted), -1, np.int64)
        if len(self.firsts):
            for start in range(0, len(wanted), BLOCK):
                self._find(wanted[start : start + BLOCK], found[start : start + BLOCK])
        return found

    def _find(self, wanted: np.ndarray, found: np.ndarray) -> None:
        prefixes = prefixes_of(wanted)
        order = np.argsort(prefixes)  # sorted queries walk through memory once: 9 times faster
        asked = prefixes[order]
        places = np.searchsorted(self._prefixes, asked)
        while len(order):  # twice only if different keys share a prefix
            inside = places < len(self._prefixes)
            order, asked, places = order[inside], asked[inside], places[inside]
            alike = self._prefixes[places] == asked
            order, asked, places = order[alike], asked[alike], places[alike]
            positions = self.firsts[places]
            equal = equal_keys(self.keys[positions], wanted[order])
            found[order[equal]] = positions[equal]
            order, asked, places = order[~equal], asked[~equal], places[~equal] + 1


def _pair(places: np.ndarray, again: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each repeated position with the first position of its run."""
    owners = np.flatnonzero(~again)
    runs = np.flatnonzero(again)
    originals = places[owners[np.searchsorted(owners, runs) - 1]]
    order = np.lexsort((places[runs], originals))
    return places[runs][order], originals[order]


def _integer_for(n: int) -> type[np.signedinteger[Any]]:
    return np.int32 if n < 2**31 else np.int64


def committed_shards(directory: Location) -> list[Location]:
    """Return the committed shards of `shards/`, sorted by name."""
    return _committed(list_files(directory))


def _committed(files: Mapping[str, Location]) -> list[Location]:
    replaced = replaced_shards(files)
    there = (name for name in files if shards.is_shard_name(name) and name not in replaced)
    return [files[name] for name in sorted(there)]


def list_files(directory: Location) -> dict[str, Location]:
    """Return the files of `shards/` by name, in any order; empty if it does not exist.

    Raises
    ------
    CacheError
        The directory cannot be read.
    StorageError
        The store of a bucket refuses, or keeps failing.
    """
    try:
        if isinstance(directory, BucketPath):
            return {path.name: path for path in object_store.list_objects_in(directory)}
        return {name: directory / name for name in os.listdir(directory)}
    except FileNotFoundError:
        return {}
    except StorageError:
        raise
    except OSError as error:
        raise _unreadable(directory, error) from error


def replaced_shards(files: Mapping[str, Location]) -> set[str]:
    """Return those shards among `files` that others among them have replaced."""
    replaced: set[str] = set()
    for path in files.values():
        if path.suffix == shards.REPLACES and path.with_suffix(".h5").name in files:
            replaced.update(read_replaced(path))
    return replaced & files.keys()


def read_replaced(path: Location) -> list[str]:
    """Return the names in the file beside a shard, except its own; empty if missing or foreign.

    In that case at worst a row is duplicated.

    Raises
    ------
    CacheError
        The file cannot be read.
    """
    try:
        names = json.loads(read_file(path))
    except (FileNotFoundError, ValueError, RecursionError):
        return []
    except StorageError:
        raise
    except OSError as error:
        raise _unreadable(path, error) from error
    if not isinstance(names, list):
        return []
    others = (name for name in names if isinstance(name, str) and shards.is_shard_name(name))
    return [name for name in others if name != path.with_suffix(".h5").name]


def _unreadable(path: Location, error: OSError) -> CacheError:
    return CacheError(
        f"cannot read {path}: {describe_error(error)}. Make it readable, and run the command again."
    )


MAX_TRIES = 20  # of listing the shards, while a compaction removes them
RECENT_SHARE = 4  # new shards are kept separate until they hold 1/4 of the others' rows


class Index:
    """Locates keys in the shards of a directory.

    About 44 bytes of memory per row. When shards are added, only their keys are read.

    Parameters
    ----------
    directory : Path or BucketPath
        The cache's `shards/`.
    spec : CacheSpec
        The required spec of every shard.
    known : collection of str
        Names of shards to ignore.
    listing : Future, optional
        What `list_files` returns, begun ahead; it stands for the first listing.

    Attributes
    ----------
    paths : list of Path or BucketPath
        The committed shards at the last refresh, sorted by name.
    """

    def __init__(
        self,
        directory: Location,
        spec: CacheSpec,
        known: Collection[str] = (),
        listing: Future[dict[str, Location]] | None = None,
    ) -> None:
        self.paths: list[Location] = []
        self._directory, self._spec, self._known = directory, spec, frozenset(known)
        self._segments: list[_Segment] = []
        self._unlisted: dict[str, Location] = {}
        self._listing = listing

    def add(self, path: Location) -> None:
        """Note a shard that this process has put into a bucket, whose listing may lag behind."""
        if isinstance(path, BucketPath):
            self._unlisted[path.name] = path

    def refresh(self) -> "Index":
        """Return this index after listing the shards again and reading the keys of new ones.

        Raises
        ------
        ShardError
            The keys of a shard are damaged.
        """
        for n_tries in range(1, MAX_TRIES + 1):
            paths = [p for p in self._list() if p.name not in self._known]
            if paths == self.paths:
                break
            try:
                self._take(paths)
                break
            except ShardError as error:
                gone = isinstance(error.__cause__, FileNotFoundError)
                if not gone or n_tries == MAX_TRIES:
                    raise
                self.wait(n_tries)
        return self

    def wait(self, n_tries: int) -> None:
        """Wait before shards that have vanished are looked for again, if a listing may lag."""
        if isinstance(self._directory, BucketPath):
            self._unlisted.clear()
            object_store.pause(n_tries)

    def _list(self) -> list[Location]:
        listing, self._listing = self._listing, None
        files = listing.result() if listing else list_files(self._directory)
        for name in self._unlisted.keys() & files.keys():
            del self._unlisted[name]
        return _committed({**files, **self._unlisted})

    @property
    def n_rows(self) -> int:
        """Number of distinct keys."""
        if not self._segments:
            return 0
        first, *others = self._segments
        n_rows = len(first.sorted)
        for segment in others:
            distinct = segment.sorted.keys[segment.sorted.firsts]
            n_rows += int((first.sorted.find(distinct) < 0).sum())
        return n_rows

    def keys(self) -> np.ndarray:
        """Return all keys, sorted and unique: (n, 32) uint8."""
        parts = [segment.sorted.keys[segment.sorted.firsts] for segment in self._segments]
        if len(parts) == 1:
            return parts[0]
        every = np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *parts])
        return np.unique(sortable(every)).view(np.uint8).reshape(-1, KEY_BYTES)

    def locate(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return where keys, (n, 32) uint8, are stored.

        Returns
        -------
        found : (n,) bool
        owners : (n,) int
            Position in `paths` of the first shard by name that has the key; meaningless if not
            found.
        rows : (n,) int
            Row in that shard; meaningless if not found.
        """
        owners = np.full(len(keys), len(self.paths), np.int32)
        rows = np.zeros(len(keys), np.int32)
        for segment in self._segments:
            there, owner, row = segment.locate(keys)
            better = owner < owners[there]
            owners[there[better]], rows[there[better]] = owner[better], row[better]
        found = owners < len(self.paths)
        owners[~found] = 0
        return found, owners, rows

    def _take(self, paths: list[Location]) -> None:
        """Hold the keys of exactly these shards."""
        held = {path: keys for segment in self._segments for path, keys in segment.parts()}
        first = self._segments[0].paths if self._segments else []
        recent = sorted(set(paths).difference(first))
        if not self._segments or not set(paths).issuperset(first):
            self._segments = [self._segment(paths, held)] if paths else []
        else:
            segment = self._segment(recent, held)
            if RECENT_SHARE * len(segment.sorted.keys) > len(self._segments[0].sorted.keys):
                held |= dict(segment.parts())
                self._segments = [self._segment(paths, held)]
            else:
                self._segments = [self._segments[0], segment]
        for segment in self._segments:
            segment.number(paths)
        self.paths = paths

    def _segment(self, paths: list[Location], held: dict[Location, np.ndarray]) -> "_Segment":
        held = {**held, **self._read_ahead([path for path in paths if path not in held])}

        def count(path: Location) -> int:
            if path in held:
                return len(held[path])
            return int(shards.read_header(path, spec=self._spec)["rows"])

        def fill(path: Location, start: int, stop: int) -> None:
            part = held[path] if path in held else shards.read_keys(path, spec=self._spec)
            keys[start:stop] = part

        with ThreadPoolExecutor(count_cores()) as pool:
            edges = np.cumsum([0, *pool.map(count, paths)])
            keys = np.empty((edges[-1], KEY_BYTES), np.uint8)
            list(pool.map(fill, paths, edges[:-1].tolist(), edges[1:].tolist()))
        return _Segment(paths, edges, SortedKeys(keys))

    def _read_ahead(self, paths: list[Location]) -> dict[Location, np.ndarray]:
        """Return the keys of shards in a bucket: one request each, and many at once."""
        far = [path for path in paths if isinstance(path, BucketPath)]
        if not far:
            return {}
        with ThreadPoolExecutor(object_store.AHEAD) as pool:
            keys = pool.map(lambda path: shards.read_keys(path, spec=self._spec), far)
            return dict(zip(far, keys, strict=True))


class _Segment:
    """The keys of some shards, concatenated in one array, and their order."""

    def __init__(self, paths: list[Location], edges: np.ndarray, sorted_keys: SortedKeys) -> None:
        self.paths, self.sorted = paths, sorted_keys
        self._edges = edges
        self._numbers = np.empty(0, np.int32)

    def parts(self) -> list[tuple[Location, np.ndarray]]:
        """Return each shard's keys."""
        edges = zip(self._edges[:-1].tolist(), self._edges[1:].tolist(), strict=True)
        keys = self.sorted.keys
        return [(p, keys[a:b]) for p, (a, b) in zip(self.paths, edges, strict=True)]

    def number(self, paths: list[Location]) -> None:
        """Set the shards' positions among all paths."""
        place = {path: number for number, path in enumerate(paths)}
        self._numbers = np.array([place[path] for path in self.paths], np.int32)

    def locate(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return which of `keys` are here, the position of their shard, and their row in it."""
        places = self.sorted.find(keys)
        there = np.flatnonzero(places >= 0)
        places = places[there]
        local = np.searchsorted(self._edges, places, side="right") - 1
        return there, self._numbers[local], (places - self._edges[local]).astype(np.int32)
