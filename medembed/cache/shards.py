"""One shard: an immutable HDF5 file named by the SHA-256 of its bytes.

`/sha256` is (n, 32) uint8; `/embeddings/<pooling>` is (n, d) or (n, g, d) float16 or float32 in
chunks of up to 1024 rows. The first 512 bytes, which HDF5 leaves to the user (its *user block*),
hold one JSON object: format, version, digest of the spec, number of rows, offset and SHA-256 of
the keys. The keys of a large cache can thus be read and verified without hashing every embedding,
and without passing unchecked bytes to HDF5, which a single flipped bit can hang.
"""

import hashlib
import io
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import h5py
import numpy as np

from medembed.cache import local_copies
from medembed.cache.local_copies import FirstBytes, Proven, damaged_shard
from medembed.cache.spec import KEY_BYTES, CacheSpec, sortable
from medembed.cache.widening import put_rows
from medembed.core import object_store
from medembed.core.errors import CacheError, ShardError, StorageError
from medembed.core.files import (
    json_bytes,
    naming_full_disk,
    open_plain,
    sync_directory,
    write_atomically,
)
from medembed.core.locations import BucketPath, Location

__all__ = [
    "CHUNK_ROWS",
    "MAX_SHARD_BYTES",
    "MAX_SHARD_ROWS",
    "REPLACES",
    "as_stored",
    "check_bytes",
    "chunk_offset",
    "copy_rows",
    "describe_loss",
    "is_shard_name",
    "max_rows",
    "read_header",
    "read_keys",
    "read_shard",
    "write_shard",
]

Read = TypeVar("Read")


def describe_loss(values: np.ndarray, stored: np.ndarray) -> str | None:
    """Return what finite values lose in a narrower dtype: their range, or a whole row.

    Parameters
    ----------
    values, stored : (n, ...) float
        Values before and after the conversion.

    Returns
    -------
    str or None
        "reaches 1e+06, more than float16 can hold (65504)"; or that the values of a non-zero row
        are all below the dtype's smallest normal number, so that little or nothing of it is left.
        None if nothing is lost.
    """
    limits = np.finfo(stored.dtype)
    if not np.isfinite(stored).all():
        return (
            f"reaches {np.abs(values).max():g}, more than {limits.dtype} can hold ({limits.max:g})"
        )
    if values.dtype.itemsize <= stored.dtype.itemsize or not values.size:
        return None
    rows = values.reshape(len(values), -1)
    largest = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    vanishing = (largest > 0) & (largest < limits.tiny)
    if not vanishing.any():
        return None
    return (
        f"has {int(vanishing.sum())} of {len(rows)} rows that are not zero and vanish in "
        f"{limits.dtype}: nothing in them is above {largest[vanishing].max():g}, and the smallest "
        f"number that {limits.dtype} holds in full is {limits.tiny:g}"
    )


FORMAT = "medembed-shard"
VERSION = 1
HEADER_BYTES = 512  # the smallest user block that HDF5 allows
NAME_DIGITS = 32  # of the SHA-256 of a shard's bytes
CHUNK_ROWS = 1024
MAX_SHARD_ROWS = 8192
MAX_SHARD_BYTES = 64 * 2**20  # readers hold one whole shard per thread
LIBVER = ("v110", "v110")  # fixed, so that equal rows give equal bytes
REPLACES = ".replaces"  # file beside a shard, with the names of the shards that it replaced
SHARD_NAME = re.compile(r"[0-9a-f]{32}\.h5")


def is_shard_name(name: str) -> bool:
    """Return whether a file name is that of a committed shard."""
    return SHARD_NAME.fullmatch(name) is not None


def max_rows(spec: CacheSpec) -> int:
    """Return how many rows of `spec` a full shard holds."""
    return max(1, min(MAX_SHARD_ROWS, MAX_SHARD_BYTES // spec.row_bytes()))


def as_stored(
    embeddings: Mapping[str, np.ndarray], spec: CacheSpec, n_rows: int
) -> dict[str, np.ndarray]:
    """Return embeddings in the spec's dtype, after checking poolings, shapes and finiteness.

    Raises
    ------
    CacheError
        A pooling is missing or unknown, a shape is wrong, or a value is not finite; values that are
        too large or too small for any dtype but float32 have a separate message.
    """
    if set(embeddings) != set(spec.poolings):
        asked, given = ", ".join(spec.poolings), ", ".join(embeddings)
        raise CacheError(f"rows of this cache hold the poolings {asked}; these hold {given}")
    return {
        name: _store_values(name, np.asarray(embeddings[name]), (n_rows, *shape), spec.dtype)
        for name, shape in spec.poolings.items()
    }


def write_shard(
    directory: Location,
    keys: np.ndarray,
    embeddings: Mapping[str, np.ndarray],
    spec: CacheSpec,
    *,
    replaces: Collection[str] = (),
) -> Location:
    """Write rows as one shard, complete or not at all; equal rows give an identical file.

    The file is written to a temporary name, closed, read again and compared with the arrays,
    hashed, synced and renamed to its hash. In a bucket it is compared before it is sent, the store
    checks it on arrival where it can (S3), and it gets its name unless that is taken, which then is
    by the same bytes.

    Parameters
    ----------
    directory : Path or BucketPath
        The cache's `shards/`.
    keys : (n, 32) uint8
        SHA-256 of each image's bytes; unique.
    embeddings : mapping of str to (n, ...) array
        One array per pooling of the spec.
    spec : CacheSpec
        The spec of the rows.
    replaces : collection of str
        Names of shards that are considered removed once this one exists. Their names are recorded
        durably before that.

    Raises
    ------
    CacheError
        The rows do not fit the spec, a key is a duplicate, or the file cannot be written.
    """
    keys = np.ascontiguousarray(keys, np.uint8).reshape(-1, KEY_BYTES)
    if len(keys) == 0 or len(np.unique(sortable(keys))) != len(keys):
        raise CacheError("a shard needs at least one row, and each key once")
    stored = as_stored(embeddings, spec, len(keys))
    data = _encode(keys, stored, spec)
    if isinstance(directory, BucketPath):
        return _upload(directory, data, keys, stored, replaces)
    partial = directory / f"{secrets.token_hex(16)}.partial"
    try:
        return _place(partial, data, keys, stored, replaces)
    except OSError as error:
        if isinstance(error, ShardError):
            raise
        raise CacheError(
            f"cannot write a shard in {directory}: {error.strerror or error}. Nothing was left "
            "half-written; make room or the directory writable, and run the command again."
        ) from error
    finally:
        with suppress(OSError):  # on a read-only file system there is nothing to remove
            partial.unlink(missing_ok=True)


def read_header(path: Location, *, spec: CacheSpec | None = None) -> dict[str, Any]:
    """Return the shard's header: spec digest, number of rows, location of the keys.

    Raises
    ------
    ShardError
        The bytes are not a shard's, of an unknown version, or of another spec.
    """

    def read(again: bool) -> dict[str, Any]:
        with _opened(path, again=again) as file:
            return _read_header(path, file, spec)

    return _unless_damaged(path, read)


def check_bytes(path: Location) -> None:
    """Compare a shard's bytes with its name, without holding them.

    Raises
    ------
    ShardError
        The bytes are not those that the name promises.
    """

    def check(again: bool) -> None:
        with _opened(path, whole=True, again=again) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()[:NAME_DIGITS]
        if found != path.stem:
            raise damaged_shard(path, f"its bytes hash to {found}")

    _unless_damaged(path, check)


def read_keys(path: Location, *, spec: CacheSpec | None = None, again: bool = False) -> np.ndarray:
    """Return only the keys, (n, 32) uint8, verified by their own SHA-256; `again` as `read_shard`.

    Raises
    ------
    ShardError
        The keys are damaged, or the shard was written under another spec.
    """

    def read(again: bool) -> np.ndarray:
        with _opened(path, again=again) as file:
            header = _read_header(path, file, spec)
            file.seek(header["keys_offset"])
            raw = file.read(header["rows"] * KEY_BYTES)
        if hashlib.sha256(raw).hexdigest() != header["keys_sha256"]:
            raise damaged_shard(path, "its keys do not hash to what its header says")
        return np.frombuffer(raw, np.uint8).reshape(-1, KEY_BYTES)

    return read(True) if again else _unless_damaged(path, read)


def read_shard(
    path: Location,
    *,
    poolings: Sequence[str] | None = None,
    verify: bool = True,
    spec: CacheSpec | None = None,
    again: bool = False,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return keys, (n, 32) uint8, and embeddings, one (n, ...) array per pooling.

    With `verify` the bytes passed to HDF5 are first hashed and compared with the file name; with
    `again` those of a bucket are read from there, even where this machine has a copy.

    Raises
    ------
    ShardError
        The bytes are not those the name promises, or the layout is not a shard's.
    """

    def read(again: bool) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        with _hdf5(path, verify=verify, spec=spec, again=again) as (file, _):
            names = list(file["embeddings"]) if poolings is None else poolings
            return file["sha256"][...], {name: file["embeddings"][name][...] for name in names}

    return read(True) if again else _unless_damaged(path, read)


def copy_rows(
    path: Location,
    rows: np.ndarray,
    places: np.ndarray,
    outputs: Mapping[str, np.ndarray],
    *,
    verify: bool = True,
    spec: CacheSpec | None = None,
) -> None:
    """Copy rows of a shard to places of the outputs, chunk by chunk, in the outputs' dtype.

    Parameters
    ----------
    path : Path or BucketPath
        The shard.
    rows, places : (k,) int
        Row `rows[i]` of the shard goes to `outputs[pooling][places[i]]`.
    outputs : mapping of str to (m, ...) array
        The arrays to write to.

    Raises
    ------
    ShardError
        The shard is damaged; see `read_shard`.
    """
    order = np.argsort(rows, kind="stable")
    rows, places = rows[order], places[order]

    def copy(again: bool) -> None:
        with _hdf5(path, verify=verify, spec=spec, again=again) as (file, data):
            _copy_rows(file, data, rows, places, outputs)

    _unless_damaged(path, copy)


def _copy_rows(
    file: Any,
    data: bytes,
    rows: np.ndarray,
    places: np.ndarray,
    outputs: Mapping[str, np.ndarray],
) -> None:
    for name, output in outputs.items():
        dataset = file["embeddings"][name]
        size = dataset.chunks[0] if dataset.chunks else len(dataset)
        edges = np.searchsorted(rows, np.arange(0, rows[-1] + 1 + size, size))
        for number, (start, stop) in enumerate(pairwise(edges)):
            if start == stop:
                continue
            block = _chunk(data, dataset, number * size)
            taken = block[_as_slice(rows[start:stop] - number * size)]
            put_rows(output, _as_slice(places[start:stop]), taken)


def _chunk(data: bytes, dataset: Any, first: int) -> np.ndarray:
    """Return a view of a chunk's rows in the file's bytes, if they are stored unfiltered."""
    shape, dtype, chunks = dataset.shape[1:], dataset.dtype, dataset.chunks
    if not chunks or chunks[1:] != shape or dataset.id.get_create_plist().get_nfilters():
        block: np.ndarray = dataset[first : first + (chunks[0] if chunks else len(dataset))]
        return block
    count = chunks[0] * math.prod(shape)
    values = np.frombuffer(data, dtype, count, chunk_offset(dataset, first))
    return values.reshape(-1, *shape)[: len(dataset) - first]


def chunk_offset(dataset: Any, first: int) -> int:
    """Return where in its file a chunk begins, uncompressed and of whole rows.

    Parameters
    ----------
    dataset : h5py.Dataset
    first : int
        The number of the chunk's first row.
    """
    start = (first, *(0 for _ in dataset.shape[1:]))
    return int(dataset.id.get_chunk_info_by_coord(start).byte_offset) + _omitted_bytes()


@cache
def _omitted_bytes() -> int:
    """Return what this HDF5 leaves out of a chunk's offset: old releases leave out the user block.

    1.14.2 does, which h5py 3.11 brings, and 1.14.4 does not; so it is asked.
    """
    content = np.frombuffer(b"medembed", np.uint8)
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=LIBVER, userblock_size=HEADER_BYTES) as file:
        dataset = file.create_dataset("x", data=content, chunks=content.shape)
        told = dataset.id.get_chunk_info(0).byte_offset
    return buffer.getvalue().index(content.tobytes()) - int(told)


def _store_values(name: str, values: np.ndarray, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if values.shape != shape:
        raise CacheError(f"pooling {name} has shape {values.shape}; this cache holds {shape}")
    if not np.isfinite(values).all():
        raise CacheError(f"pooling {name} holds NaN or infinite values; nothing was stored")
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(values, dtype)
    loss = describe_loss(values, stored)
    if loss:
        raise CacheError(f"pooling {name} {loss}. Choose a new --cache with --dtype float32.")
    return stored


def _encode(keys: np.ndarray, stored: Mapping[str, np.ndarray], spec: CacheSpec) -> bytes:
    # In memory (at most MAX_SHARD_BYTES), so that a full disk fails one plain write, never HDF5.
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=LIBVER, userblock_size=HEADER_BYTES) as file:
        # Contiguous keys, so that they can be read without HDF5.
        dataset = file.create_dataset("sha256", data=keys, track_times=False)
        group = file.create_group("embeddings", track_order=False)
        for name in sorted(stored):
            values = stored[name]
            chunks = (min(CHUNK_ROWS, len(values)), *values.shape[1:])
            group.create_dataset(name, data=values, chunks=chunks, track_times=False)
        offset = dataset.id.get_offset()
    buffer.seek(0)
    buffer.write(_header(keys, offset, spec))
    return buffer.getvalue()


def _header(keys: np.ndarray, offset: int, spec: CacheSpec) -> bytes:
    document = {
        "format": FORMAT,
        "version": VERSION,
        "spec": spec.digest(),
        "rows": len(keys),
        "keys_offset": offset,
        "keys_sha256": hashlib.sha256(keys.tobytes()).hexdigest(),
    }
    return json.dumps(document).encode().ljust(HEADER_BYTES - 1) + b"\n"


def _place(
    partial: Path,
    data: bytes,
    keys: np.ndarray,
    stored: Mapping[str, np.ndarray],
    replaces: Collection[str],
) -> Path:
    with naming_full_disk(partial, len(data)), partial.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    written = partial.read_bytes()
    if written != data or not _holds(written, keys, stored):
        raise ShardError(f"what was written to {partial} does not read back as written: bad disk?")
    path = partial.with_name(_name_of(written))
    if replaces:
        write_atomically(path.with_suffix(REPLACES), json_bytes(sorted(replaces)))
    os.replace(partial, path)
    sync_directory(path.parent)
    return path


def _holds(data: bytes, keys: np.ndarray, stored: Mapping[str, np.ndarray]) -> bool:
    """Return whether HDF5 reads exactly these rows from a shard's bytes."""
    with h5py.File(io.BytesIO(data), "r") as file:
        return np.array_equal(file["sha256"][...], keys) and all(
            np.array_equal(file["embeddings"][name][...], values) for name, values in stored.items()
        )


def _upload(
    directory: BucketPath,
    data: bytes,
    keys: np.ndarray,
    stored: Mapping[str, np.ndarray],
    replaces: Collection[str],
) -> BucketPath:
    """Create the object of a shard; one that is there already holds the same bytes."""
    if not _holds(data, keys, stored):
        raise ShardError(f"a shard for {directory} does not read back as written: bad memory?")
    path = directory / _name_of(data)
    try:
        if replaces:
            record = json_bytes(sorted(replaces))
            object_store.put_object(path.with_suffix(REPLACES), record)
        for attempt in range(1, object_store.MAX_TRIES + 1):
            if object_store.create_object(path, data):
                break
            # Another process's, or our own put whose answer was lost: whole, or about to vanish.
            try:
                begin, n_bytes = object_store.read_range(path, 0, HEADER_BYTES)
                if (begin, n_bytes) == (data[:HEADER_BYTES], len(data)):
                    break
                raise damaged_shard(path, "an object of this name holds something else")
            except FileNotFoundError:
                object_store.pause(attempt)
        else:
            raise CacheError(f"shard {path} can neither be created nor read. Try again later.")
    except OSError as error:
        if isinstance(error, ShardError):
            raise
        raise CacheError(
            f"cannot write a shard: {error} Nothing was left half-written, and the rows are "
            "embedded again by the next run."
        ) from None
    return BucketPath(path.scheme, path.bucket, path.key, len(data))


def _unless_damaged(path: Location, read: Callable[[bool], Read]) -> Read:
    """Return `read(False)`; if a copy or what came was damaged, what is read from the bucket."""
    if not isinstance(path, BucketPath):
        return read(False)
    try:
        return read(False)
    except ShardError as error:
        if isinstance(error.__cause__, StorageError | FileNotFoundError):
            raise
        local_copies.forget(path)
        return read(local_copies.has_copy(path))  # True for a copy that cannot be removed


@contextmanager
def _hdf5(
    path: Location, *, verify: bool, spec: CacheSpec | None, again: bool = False
) -> Iterator[tuple[Any, bytes]]:
    """Yield an open shard and its bytes, after checking it."""
    with _opened(path, whole=True, again=again) as file:
        data = file.read()
        is_proven = isinstance(file, Proven)
    if verify and not is_proven and _name_of(data) != path.name:
        raise damaged_shard(path, f"its bytes hash to {_name_of(data)[:32]}")
    _parse_header(path, data[:HEADER_BYTES], spec)
    try:
        with h5py.File(io.BytesIO(data), "r") as hdf5:
            yield hdf5, data
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise damaged_shard(path, f"HDF5 says: {error}") from error


@contextmanager
def _opened(path: Location, *, whole: bool = False, again: bool = False) -> Iterator[Any]:
    """Yield an open file of a shard; of one in a bucket see `local_copies.open_object`."""
    try:
        with (
            local_copies.open_object(path, whole=whole, again=again)
            if isinstance(path, BucketPath)
            else open_plain(path)
        ) as file:
            yield file
    except OSError as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"cannot read shard {path}: {error.strerror or error}") from error


def _size_of(file: Any) -> int:
    return file.size if isinstance(file, FirstBytes) else os.fstat(file.fileno()).st_size


def _read_header(path: Location, file: BinaryIO, spec: CacheSpec | None) -> dict[str, Any]:
    header = _parse_header(path, file.read(HEADER_BYTES), spec)
    end = header["keys_offset"] + header["rows"] * KEY_BYTES
    if end > _size_of(file):
        raise damaged_shard(path, "it ends before its keys do")
    return header


def _parse_header(path: Location, raw: bytes, spec: CacheSpec | None = None) -> dict[str, Any]:
    try:
        header: dict[str, Any] = json.loads(raw)
        format_, version = header["format"], header["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged_shard(path, "its header cannot be read") from error
    if format_ == FORMAT and version != VERSION:
        raise ShardError(
            f"shard {path} has format version {version!s:.40}; this medembed reads version "
            f"{VERSION}. Install the medembed that wrote it."
        )
    sizes, digests = ("rows", "keys_offset"), ("spec", "keys_sha256")
    if (
        format_ != FORMAT
        or not all(type(header.get(name)) is int and header[name] > 0 for name in sizes)
        or not all(isinstance(header.get(name), str) for name in digests)
    ):
        raise damaged_shard(path, "its header cannot be read")
    if spec is not None and header["spec"] != spec.digest():
        raise ShardError(
            f"shard {path} was written under another spec than this cache's. Move it back to the "
            "cache that it came from."
        )
    return header


def _name_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:NAME_DIGITS] + ".h5"


def _as_slice(indices: np.ndarray) -> slice | np.ndarray:
    """Return a slice if indices are consecutive, which copies once and without a gather."""
    first, last = int(indices[0]), int(indices[-1])
    if last - first + 1 == len(indices) and bool((np.diff(indices) == 1).all()):
        return slice(first, last + 1)
    return indices
