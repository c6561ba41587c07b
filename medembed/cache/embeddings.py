"""Join a cache with a manifest into the X, y and groups that heads learn from.

`map_rows` provides random access to mapped files, for poolings too large for memory.
"""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import h5py
import numpy as np
import pandas as pd

from medembed.cache.failures import Failure
from medembed.cache.index import MAX_TRIES, SortedKeys, committed_shards, keys_from_column
from medembed.cache.local_copies import fetch_all, forget, open_copy
from medembed.cache.metadata import options_of
from medembed.cache.shards import check_bytes, chunk_offset, read_keys
from medembed.cache.spec import KEY_BYTES, CacheSpec
from medembed.cache.store import Cache, begin_to_open
from medembed.core import object_store
from medembed.core.errors import (
    ArgumentError,
    CacheError,
    MissingRowsError,
    ShardError,
    TrainingDataError,
)
from medembed.core.files import describe_error, open_plain
from medembed.core.locations import BucketPath, Location
from medembed.core.poolings import IMAGE_STATISTICS, find_pooling
from medembed.core.system import count_cores
from medembed.core.text import Summarised, Summary, count_values, counted
from medembed.dataset.identities import name_persons
from medembed.dataset.manifest import (
    Manifest,
    existing_images,
    image_path,
    read_manifest,
    require_hashes,
)
from medembed.dataset.splits import draw_folds
from medembed.images.intensity import Intensity
from medembed.images.statistics import measure_files

__all__ = [
    "Embeddings",
    "MappedRows",
    "choose_poolings",
    "find_rows",
    "load_embeddings",
    "load_statistics",
    "map_rows",
    "patient_folds",
]


@dataclass(frozen=True, eq=False)
class MappedRows:
    """Rows of one pooling, mapped in place in their shards' files.

    Attributes
    ----------
    blocks : list of ndarray
        Contiguous rows, (rows, ...), mapped, read-only.
    owners, places : (n,) int
        The block of each row, and its index in the block.
    """

    blocks: list[np.ndarray]
    owners: np.ndarray
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.owners)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return a copy of some of the rows, (k, ...), in the stored dtype."""
        first = self.blocks[0]
        taken = np.empty((len(rows), *first.shape[1:]), first.dtype)
        for i, row in enumerate(rows.tolist()):
            taken[i] = self.blocks[self.owners[row]][self.places[row]]
        return taken


def map_rows(cache: Cache, keys: np.ndarray, pooling: str, *, verify: bool = False) -> MappedRows:
    """Return the mapped rows of `keys`, (n, 32) uint8, without reading them.

    With `verify` the bytes of every shard that holds one of the rows are first compared with its
    name, in parallel; otherwise that is left to `Cache.verify`.

    Raises
    ------
    MissingRowsError
        A key is not in the cache.
    CacheError
        The pooling is not in the cache, or a shard is damaged (`ShardError`).
    """
    cache.check_poolings([pooling])
    for n_tries in range(1, MAX_TRIES + 1):
        try:
            return _map_rows(cache, keys, pooling, verify)
        except (FileNotFoundError, ShardError) as error:  # a compaction may have removed a shard
            gone = error if isinstance(error, FileNotFoundError) else error.__cause__
            if not isinstance(gone, FileNotFoundError) or n_tries == MAX_TRIES:
                raise
            if isinstance(cache.path, BucketPath):
                object_store.pause(n_tries)
    raise AssertionError("unreachable")


def _map_rows(cache: Cache, keys: np.ndarray, pooling: str, verify: bool) -> MappedRows:
    paths = committed_shards(cache.path / "shards")
    fetch_all([path for path in paths if isinstance(path, BucketPath)])
    parts = [read_keys(path, spec=cache.spec) for path in paths]
    held = SortedKeys(np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *parts]))
    found = held.find(keys)
    if (found < 0).any():
        raise MissingRowsError(
            f"{int((found < 0).sum())} of {len(keys)} rows are not in the cache at {cache.path}"
        )
    if verify:
        ends = np.cumsum([len(part) for part in parts])
        used = np.unique(np.searchsorted(ends, found, side="right")).tolist()
        with ThreadPoolExecutor(count_cores()) as pool:
            list(pool.map(check_bytes, [paths[k] for k in used]))
    blocks: list[np.ndarray] = []
    for path, part in zip(paths, parts, strict=True):
        blocks += _map(path, pooling, len(part))
    edges = np.cumsum([0, *map(len, blocks)])
    owners = np.searchsorted(edges, found, side="right") - 1
    return MappedRows(blocks, owners, found - edges[owners])


def _map(path: Location, pooling: str, n_rows: int) -> list[np.ndarray]:
    """Return the mapped chunks of a shard, in row order."""
    try:
        return _map_chunks(path, pooling, n_rows)
    except ShardError:
        if not (isinstance(path, BucketPath) and forget(path)):  # the copy may be damaged
            raise
        return _map_chunks(path, pooling, n_rows)


def _map_chunks(path: Location, pooling: str, n_rows: int) -> list[np.ndarray]:
    try:
        with open_copy(path) if isinstance(path, BucketPath) else open_plain(path) as opened:
            with h5py.File(opened, "r") as file:
                dataset: Any = file["embeddings"][pooling]
                size, dtype, shape = dataset.chunks[0], dataset.dtype, dataset.shape[1:]
                offsets = [chunk_offset(dataset, first) for first in range(0, n_rows, size)]
            return [
                np.memmap(opened, dtype, "r", offset, (min(size, n_rows - i * size), *shape))
                for i, offset in enumerate(offsets)
            ]
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ShardError(f"shard {path} cannot be mapped: {describe_error(error)}") from error


@dataclass(frozen=True, eq=False, repr=False)
class Embeddings(Summarised):
    """One row per embedded image of a manifest, in the manifest's order.

    Parameters
    ----------
    X : (n, d) float32
        Poolings joined, or the cells of one pooling, cell by cell.
    rows : DataFrame
        The manifest's rows of these images; index 0 to n - 1.
    pooling : str
        The poolings in X, joined by `+`.
    failed : DataFrame
        `image`, `sha256`, `stage`, `reason` of the rows that were left out.
    label_level : {"study", "image"}
        The manifest's label level.
    spec : CacheSpec
        The cache's spec.
    manifest : Manifest or None
        The complete manifest, including rows of failed images and of other splits.
    """

    X: np.ndarray
    rows: pd.DataFrame
    pooling: str
    failed: pd.DataFrame
    label_level: str
    spec: CacheSpec
    manifest: Manifest | None = None

    def __len__(self) -> int:
        return len(self.X)

    @property
    def y(self) -> np.ndarray:
        """Labels, (n,) int8: 0 normal, 1 abnormal, -1 unknown."""
        return self.rows["label"].fillna(-1).to_numpy(np.int8)

    @property
    def patients(self) -> np.ndarray:
        """Patients, (n,) object, with spellings unified, see `identities.name_persons`."""
        return name_persons(self.rows).to_numpy(object)

    @property
    def studies(self) -> np.ndarray:
        """Studies, (n,) object."""
        return self.rows["study"].to_numpy(object)

    @property
    def regions(self) -> np.ndarray:
        """Regions, (n,) object."""
        return self.rows["region"].to_numpy(object)

    @property
    def n_cells(self) -> int:
        """Vectors per image in X, 1 except for a pooling of cells."""
        shape = self.spec.poolings[self.pooling.split("+")[0]]
        return shape[0] if len(shape) > 1 else 1

    @property
    def blocks(self) -> dict[str, slice]:
        """Columns of X of each pooling, in order."""
        return _blocks(self.pooling.split("+"), self.spec)

    def to_frame(self) -> pd.DataFrame:
        """Return the manifest's rows with their embeddings, one column per value.

        Columns of X are named by their pooling and their index in it, ``mean[0]``; float32.
        """
        names = [f"{name}[{i}]" for name, own in self.blocks.items() for i in range(_width(own))]
        return pd.concat([self.rows, pd.DataFrame(self.X, columns=names)], axis=1)

    def summarise(self) -> Summary:
        """Return the shape, and counts of rows by split, region and label."""
        rows, y = self.rows, self.y
        studies, patients = rows["study"].nunique(), name_persons(rows).nunique()
        return Summary(
            f"Embeddings: {counted(len(self), 'image')}, {counted(studies, 'study')}, "
            f"{counted(patients, 'patient')}",
            {
                "X": f"{len(self):,} × {self.X.shape[1]:,} {self.X.dtype}, {self.pooling}",
                "splits": count_values(rows["split"].value_counts().sort_index().to_dict()),
                "regions": count_values(rows["region"].value_counts().to_dict()),
                "labels": f"abnormal {(y == 1).sum():,}, normal {(y == 0).sum():,}, "
                f"unknown {(y < 0).sum():,}",
                "failed": f"{counted(len(self.failed), 'image')} left out",
            },
        )


def load_embeddings(
    cache: Cache | str | os.PathLike[str],
    manifest: Manifest | str | os.PathLike[str],
    *,
    pool: str | None = None,
    split: str | None = None,
    cells: bool = False,
    verify: bool = True,
) -> Embeddings:
    """Return a cache's embeddings joined with a manifest by the images' SHA-256.

    Parameters
    ----------
    cache, manifest : Cache, Manifest or path
        The cache and the manifest to join.
    pool : str, optional
        Poolings joined by `+`, such as `mean+max`; by default all of the cache's poolings with one
        vector per image, in the order of its spec.
    split : {"train", "test"}, optional
        Keep only the rows of this split.
    cells : bool
        Allow `pool` to be one pooling with several vectors per image, such as `grid4`.
    verify : bool
        Verify each shard's bytes against its name before reading it.

    Returns
    -------
    Embeddings
        Rows of images that are known to have failed are left out and listed in `failed`.

    Raises
    ------
    MissingRowsError
        Rows are neither embedded nor failed; names the command that makes them.
    ManifestError
        The manifest has no SHA-256s (`--structure-only`).
    CacheError
        A pooling is not in the cache, or a shard is damaged (`ShardError`).
    TrainingDataError
        A pooling is not one vector per image (without `cells`), or the split has no rows.
    """
    get_cache = begin_to_open(cache)
    name = "MANIFEST" if isinstance(manifest, Manifest) else str(manifest)
    manifest = read_manifest(manifest)
    cache = get_cache()
    poolings = choose_poolings(cache, pool, cells=cells)
    rows = _choose_rows(manifest, split)
    rows, keys, failed = find_rows(cache, rows, name)
    return Embeddings(
        X=_read(cache, keys, poolings, verify=verify),
        rows=rows.reset_index(drop=True),
        pooling="+".join(poolings),
        failed=failed,
        label_level=manifest.label_level,
        spec=cache.spec,
        manifest=manifest,
    )


def load_statistics(
    cache: Cache,
    manifest: Manifest,
    image_root: str | os.PathLike[str] | None = None,
    *,
    verify: bool = True,
) -> Embeddings:
    """Return the statistics of the films of a manifest, see `images.statistics`.

    The cache's own are read where it holds them; others are measured on the files, decoded as the
    cache's were, and rounded to the cache's dtype.

    Parameters
    ----------
    image_root : path
        The directory, or the bucket's prefix, that the manifest's paths are relative to; not
        needed if the cache holds the statistics.

    Raises
    ------
    CacheError
        The cache does not hold them, and there is no image root; see also `load_embeddings`.
    ImageError
        A file is missing, holds other bytes or is no complete image.
    PathNotFoundError
        There is no such directory, or nothing below the prefix.
    ArgumentError
        It is a stream, such as tar files, in which no image can be looked up.
    StorageError
        The bucket refuses, or keeps failing.
    MissingRowsError, ManifestError
        See `load_embeddings`.
    """
    if IMAGE_STATISTICS in cache.spec.poolings or image_root is None:
        return load_embeddings(cache, manifest, pool=IMAGE_STATISTICS, verify=verify)
    require_hashes(manifest)
    rows, _, failed = find_rows(cache, manifest.rows, "MANIFEST")
    root = existing_images(image_root)
    with _announcing(root, len(rows)) as progress:
        X = measure_files(
            [image_path(root, image) for image in rows["image"]],
            rows["sha256"].tolist(),
            Intensity.from_spec(cache.spec.preprocessing.get("window")),
            progress,
        )
    held = {IMAGE_STATISTICS: X.shape[1:]}
    return Embeddings(
        X=X.astype(cache.spec.dtype).astype(np.float32),
        rows=rows.reset_index(drop=True),
        pooling=IMAGE_STATISTICS,
        failed=failed,
        label_level=manifest.label_level,
        spec=replace(cache.spec, poolings={**cache.spec.poolings, **held}),
        manifest=manifest,
    )


def _announcing(
    root: Location, n_images: int
) -> AbstractContextManager[Callable[[int, int], None] | None]:
    """Return what says that images of a bucket are fetched, and shows how far it is."""
    if not isinstance(root, BucketPath):
        return nullcontext()
    words = f"Fetching {counted(n_images, 'image')} from {root} to measure them"
    return object_store.announcing(words, "images")


def patient_folds(
    embeddings: Embeddings, n_folds: int = 5, seed: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the folds that a sweep draws, in the form of scikit-learn's `cv` argument.

    The folds are patient-disjoint, and stratified by label and region over the labelled train rows
    of the whole manifest, so that they depend only on the manifest and the seed. Rows of `test` and
    rows without a label are in no fold.

    Parameters
    ----------
    embeddings : Embeddings
        The result of `load_embeddings`.
    n_folds : int
        Number of folds, at least 2.
    seed : int
        The sweep's seed.

    Returns
    -------
    list of (train_index, test_index)
        int64 arrays of ascending row indices of X: all other folds, and the fold itself.

    Raises
    ------
    TrainingDataError
        There are fewer patients than the folds need, or only one class; see `splits.draw_folds`.
    """
    if not isinstance(embeddings, Embeddings):
        raise ArgumentError(
            "patient_folds takes what load_embeddings returns; this is of type "
            f"{type(embeddings).__name__}."
        )
    rows = embeddings.rows if embeddings.manifest is None else embeddings.manifest.rows
    is_trained = (rows["split"] == "train") & rows["label"].notna()
    trained = rows[is_trained].reset_index(drop=True)
    folds = pd.Series(draw_folds(trained, n_folds=n_folds, seed=seed), index=trained["image"])
    fold = folds.reindex(embeddings.rows["image"]).fillna(-1).to_numpy(np.int64)
    return [
        (np.flatnonzero((fold >= 0) & (fold != k)), np.flatnonzero(fold == k))
        for k in range(n_folds)
    ]


def find_rows(
    cache: Cache, rows: pd.DataFrame, manifest: str
) -> tuple[pd.DataFrame, np.ndarray, pd.DataFrame]:
    """Return a manifest's rows in the cache, their keys (n, 32), and the failed rows.

    Raises
    ------
    MissingRowsError
        Rows are neither; names the command that makes them from `manifest`.
    """
    keys = keys_from_column(rows["sha256"])
    done = cache.is_done(keys)
    if done.all():
        return rows, keys, _failed_rows(rows[:0], {})
    failed = _failed_rows(rows[~done], cache.failures())
    n_missing = int((~done).sum()) - len(failed)
    if n_missing:
        raise _missing(n_missing, len(rows), cache, manifest)
    return rows[done], keys[done], failed


def choose_poolings(cache: Cache, pool: str | None, *, cells: bool = False) -> list[str]:
    """Return the poolings that `pool` names, see `load_embeddings`.

    Raises
    ------
    CacheError
        A pooling is not in the cache, or is named twice.
    TrainingDataError
        A pooling has several vectors per image, and is not alone or `cells` is not set.
    """
    shapes = cache.spec.poolings
    vectors = [name for name, shape in shapes.items() if len(shape) == 1]
    usual = [name for name in vectors if find_pooling(name).is_read] or vectors
    chosen = usual if pool is None else pool.split("+")
    cache.check_poolings(chosen)
    grids = [name for name in chosen if name not in vectors]
    if cells and len(chosen) == 1:
        return chosen
    if grids or not chosen:
        shape = " × ".join(map(str, shapes[(grids or list(shapes))[0]]))
        raise TrainingDataError(
            f"pooling {(grids or list(shapes))[0]} holds {shape} values per image, not one "
            f"vector; single-vector poolings in {cache.path}: {', '.join(vectors) or 'none'}"
        )
    if len(set(chosen)) < len(chosen):
        raise CacheError(f"--pool {pool} names a pooling twice; name each once")
    return chosen


def _choose_rows(manifest: Manifest, split: str | None) -> pd.DataFrame:
    require_hashes(manifest)
    rows = manifest.rows
    if split is None:
        return rows
    chosen = rows[rows["split"] == split]
    if chosen.empty:
        there = ", ".join(sorted(rows["split"].unique()))
        raise TrainingDataError(f"the manifest has no rows of split {split!r}; it has {there}")
    return chosen


def _failed_rows(rows: pd.DataFrame, failures: dict[str, Failure]) -> pd.DataFrame:
    records = [
        (image, sha256, failures[sha256].stage, failures[sha256].reason)
        for image, sha256 in zip(rows["image"], rows["sha256"], strict=True)
        if sha256 in failures
    ]
    return pd.DataFrame(records, columns=["image", "sha256", "stage", "reason"], dtype=object)


def _missing(n_missing: int, n_rows: int, cache: Cache, manifest: str) -> MissingRowsError:
    return MissingRowsError(
        f"{n_missing} of {n_rows} manifest rows are neither embedded nor listed as failed in the "
        f"cache at {cache.path}. This makes them:\n"
        f"  medembed extract {manifest} --image-root DIR --encoder {cache.source} "
        f"--cache {cache.path}{options_of(cache.spec)}"
    )


def _width(columns: slice) -> int:
    return int(columns.stop - columns.start)


def _blocks(poolings: Sequence[str], spec: CacheSpec) -> dict[str, slice]:
    edges = np.cumsum([0, *(math.prod(spec.poolings[name]) for name in poolings)]).tolist()
    return {name: slice(edges[i], edges[i + 1]) for i, name in enumerate(poolings)}


def _read(cache: Cache, keys: np.ndarray, poolings: Sequence[str], *, verify: bool) -> np.ndarray:
    blocks = _blocks(poolings, cache.spec)
    X = np.empty((len(keys), max(block.stop for block in blocks.values())), np.float32)
    # Written directly into their columns, without a second copy of all embeddings.
    outputs = {
        name: X[:, block].reshape(len(X), *cache.spec.poolings[name], copy=False)
        for name, block in blocks.items()
    }
    cache.read_into(keys, outputs, verify=verify)
    return X
