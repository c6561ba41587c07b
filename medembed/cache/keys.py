"""Many keys at once: sorted by number, found by number, no Python object per key.

A key is the SHA-256 of an image's bytes, a row of an (n, 32) uint8 array. Its first 8 bytes, read
as one big-endian number, order almost all keys; where several share them, whole keys are compared.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from medembed.cache.spec import KEY_BYTES, keys_from_hex, sortable
from medembed.core.errors import CacheError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["SortedKeys", "equal_keys", "keys_from_column", "prefixes_of"]

BLOCK = 2**19  # keys looked at in one step: it bounds memory
NIBBLES = np.full(256, 255, np.uint8)
NIBBLES[list(b"0123456789abcdef")] = np.arange(16)


def prefixes_of(keys: np.ndarray) -> np.ndarray:
    """Read the first 8 bytes of each key, (n, 32) uint8, as a number: (n,) uint64."""
    whole = np.ascontiguousarray(keys, np.uint8).reshape(-1, KEY_BYTES)
    return whole.view(">u8")[:, 0].astype(np.uint64)


def equal_keys(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compare keys row by row: (n,) bool."""
    same: np.ndarray = np.logical_and.reduce(_numbers(a) == _numbers(b), axis=1)
    return same


def _numbers(keys: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(keys, np.uint8).reshape(-1, KEY_BYTES).view(np.uint64)


def keys_from_column(column: Any) -> np.ndarray:
    """Turn a column of SHA-256 hex digests, as pandas or Arrow hold it, into keys: (n, 32) uint8.

    10 million take a second, and no memory beyond the keys; without pyarrow, more of both.

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
    """Find keys among many.

    Parameters
    ----------
    keys : (n, 32) uint8
        In any order; some may stand several times. Kept, not copied.

    Attributes
    ----------
    keys : (n, 32) uint8
        As given.
    firsts : (m,) int
        Position of each distinct key where it stands first, in the order of the keys.
    repeats, originals : (n - m,) int
        Position of each key that stands earlier too, and where; sorted by the latter, then the
        former.
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
        """Return where each of `wanted`, (k, 32) uint8, stands first, or -1: (k,) int64."""
        wanted = np.ascontiguousarray(wanted, np.uint8).reshape(-1, KEY_BYTES)
        found = np.full(len(wanted), -1, np.int64)
        if len(self.firsts):
            for start in range(0, len(wanted), BLOCK):
                self._find(wanted[start : start + BLOCK], found[start : start + BLOCK])
        return found

    def _find(self, wanted: np.ndarray, found: np.ndarray) -> None:
        prefixes = prefixes_of(wanted)
        order = np.argsort(prefixes)  # sorted questions walk through memory once: 9 times faster
        asked = prefixes[order]
        places = np.searchsorted(self._prefixes, asked)
        while len(order):  # twice only where different keys share a prefix
            inside = places < len(self._prefixes)
            order, asked, places = order[inside], asked[inside], places[inside]
            alike = self._prefixes[places] == asked
            order, asked, places = order[alike], asked[alike], places[alike]
            positions = self.firsts[places]
            equal = equal_keys(self.keys[positions], wanted[order])
            found[order[equal]] = positions[equal]
            order, asked, places = order[~equal], asked[~equal], places[~equal] + 1


def _pair(places: np.ndarray, again: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pair each repeated place with the first of its run."""
    owners = np.flatnonzero(~again)
    runs = np.flatnonzero(again)
    originals = places[owners[np.searchsorted(owners, runs) - 1]]
    order = np.lexsort((places[runs], originals))
    return places[runs][order], originals[order]


def _integer_for(n: int) -> type[np.signedinteger[Any]]:
    return np.int32 if n < 2**31 else np.int64
