"""Export manifest columns and embeddings as one Parquet, CSV or `.npz` file."""

import io
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from medembed.cache.embeddings import find_rows
from medembed.cache.store import Cache
from medembed.core.errors import CacheError
from medembed.core.files import writing_atomically
from medembed.core.text import to_csv_cell
from medembed.dataset.identities import IDS
from medembed.dataset.manifest import REQUIRED, Manifest, require_hashes

__all__ = ["SUFFIXES", "Export", "ExportTable", "describe_failure", "export"]

_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)  # not 007, an identifier
BLOCK_BYTES = 128 * 2**20  # of embeddings in memory at once
SUFFIXES = (".csv", ".npz", ".parquet")


@dataclass(frozen=True)
class Export:
    """The result of an export.

    Parameters
    ----------
    file : Path
        The file written.
    rows, failed : int
        Rows of the manifest in the file, and rows left out as known failures.
    poolings : dict of str to tuple of int
        Shape per row of each pooling in the file.
    bytes : int
        Size of the file.
    """

    file: Path
    rows: int
    failed: int
    poolings: dict[str, tuple[int, ...]]
    bytes: int


def export(
    cache: Cache,
    manifest: Manifest,
    path: str | os.PathLike[str],
    *,
    poolings: Sequence[str] | None = None,
    wide: bool = False,
    name: str = "MANIFEST",
    progress: Callable[[int, int], None] | None = None,
) -> Export:
    """Write a manifest's rows and their embeddings, block by block; complete or not at all.

    A `.parquet` file holds the manifest's columns, and per pooling one column of lists of float32
    (a grid's cells in order; its shape is in the column's metadata, `shape`), or with `wide` one
    column per number: ``mean_0``, ``mean_1`` and so on. Covariates whose values are all numbers
    are float64, empty ones null. A `.csv` file is always wide, and text that a spreadsheet would
    compute gets a leading apostrophe. A `.npz` file holds
    one array per column, strings as fixed-width unicode and an unknown label as -1, and per pooling
    one (n, ...) array in the cache's dtype; `numpy.load` reads it without pickle. If a column has
    the name of a pooling, the pooling's name becomes `embedding_<pooling>`.

    Parameters
    ----------
    cache, manifest : Cache, Manifest
        The cache and the manifest to join.
    path : path
        The file to write, whose suffix determines the format; an existing file is replaced.
    poolings : sequence of str, optional
        Poolings to write, by default all.
    wide : bool
        One column per number in Parquet.
    name : str
        The manifest's name in the command that a message shows.
    progress : callable, optional
        Called as progress(done, total) with rows.

    Raises
    ------
    MissingRowsError
        Rows are neither embedded nor known to have failed.
    CacheError
        The suffix is neither, a pooling is not in the cache, or a shard is damaged
        (`ShardError`); the file cannot be written.
    ManifestError
        The manifest has no SHA-256s.
    """
    path = Path(path)
    parquet = _write_wide_parquet if wide else _write_parquet
    write = {".csv": _write_csv, ".npz": _write_npz, ".parquet": parquet}.get(path.suffix)
    if write is None:
        raise CacheError(f"{path} ends in none of {', '.join(SUFFIXES)}: name the file so")
    require_hashes(manifest)
    names = tuple(cache.spec.poolings) if poolings is None else tuple(poolings)
    cache.check_poolings(names)
    rows, keys, failed = find_rows(cache, manifest.rows, name)
    table = ExportTable(cache, rows.reset_index(drop=True), keys, names, progress)
    try:
        with writing_atomically(path) as file:
            write(table, file)
    except OSError as error:
        if isinstance(error, CacheError):
            raise
        raise describe_failure(path, error) from error
    shapes = {pooling: cache.spec.poolings[pooling] for pooling in names}
    return Export(path, len(rows), len(failed), shapes, path.stat().st_size)


def describe_failure(path: Path, error: OSError) -> CacheError:
    """Return the error for an export that cannot be written."""
    return CacheError(
        f"cannot write {path}: {error.strerror or error}. Nothing was left half-written; make "
        "room, or choose another -o PATH."
    )


class ExportTable:
    """The rows to be written; embeddings are read only when they are written."""

    def __init__(
        self,
        cache: Cache,
        rows: pd.DataFrame,
        keys: np.ndarray,
        poolings: Sequence[str],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.rows, self.poolings, self._cache, self._keys = rows, poolings, cache, keys
        self._progress = progress

    def __len__(self) -> int:
        return len(self._keys)

    def shape(self, pooling: str) -> tuple[int, ...]:
        """Return the shape of a row of a pooling."""
        return self._cache.spec.poolings[pooling]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored dtype."""
        return np.dtype(self._cache.spec.dtype)

    def column(self, pooling: str) -> str:
        """Return the name of a pooling's column, which no column of the manifest has."""
        return f"embedding_{pooling}" if pooling in self.rows.columns else pooling

    def wide_names(self) -> list[str]:
        """Return the name of every number of a row: the pooling's and its place."""
        return [
            f"{self.column(pooling)}_{place}"
            for pooling in self.poolings
            for place in range(int(np.prod(self.shape(pooling))))
        ]

    def blocks(
        self, poolings: Sequence[str], dtype: Any = None
    ) -> Iterator[tuple[int, int, dict[str, np.ndarray]]]:
        """Yield first row, end, and embeddings, in the manifest's order."""
        dtype = np.dtype(dtype or self.dtype)
        row_bytes = sum(int(np.prod(self.shape(name))) for name in poolings) * dtype.itemsize
        step = max(1, BLOCK_BYTES // max(1, row_bytes))
        for start in range(0, len(self), step):
            keys = self._keys[start : start + step]
            read = {name: np.empty((len(keys), *self.shape(name)), dtype) for name in poolings}
            self._cache.read_into(keys, read)
            yield start, start + len(keys), read
            if self._progress:
                self._progress(start + len(keys), len(self))


def _write_parquet(table: ExportTable, file: BinaryIO) -> None:
    fields = [_list_field(table, pooling) for pooling in table.poolings]
    _write_columns(
        table, file, fields, lambda read: [_lists(read[name]) for name in table.poolings]
    )


def _write_wide_parquet(table: ExportTable, file: BinaryIO) -> None:
    fields = [pa.field(name, pa.float32()) for name in table.wide_names()]
    _write_columns(
        table,
        file,
        fields,
        lambda read: [
            pa.array(column)
            for name in table.poolings
            for column in read[name].reshape(len(read[name]), -1).T
        ],
    )


def _write_columns(
    table: ExportTable,
    file: BinaryIO,
    fields: Sequence[pa.Field],
    columns_of: Callable[[dict[str, np.ndarray]], list[pa.Array]],
) -> None:
    rows = _typed(table.rows)
    frame = pa.Schema.from_pandas(rows, preserve_index=False).remove_metadata()
    schema = pa.schema([*frame, *fields])
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for start, end, read in table.blocks(table.poolings, np.float32):
            about = pa.Table.from_pandas(rows[start:end], frame, preserve_index=False).columns
            writer.write_table(pa.table([*about, *columns_of(read)], schema=schema))


def _typed(rows: pd.DataFrame) -> pd.DataFrame:
    """Return rows whose covariates are numbers where every value is one; "" becomes null."""
    typed = rows.copy()
    for name in rows.columns.difference([*REQUIRED, IDS]):
        text = rows[name].astype(str)
        known = text[text != ""]
        if len(known) and known.map(_NUMBER.fullmatch).notna().all():
            typed[name] = pd.to_numeric(text.where(text != ""), errors="coerce").astype("Float64")
    return typed


def _write_csv(table: ExportTable, file: BinaryIO) -> None:
    rows = table.rows.map(to_csv_cell)
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    try:
        rows[:0].reindex(columns=[*rows.columns, *table.wide_names()]).to_csv(text, index=False)
        for start, end, read in table.blocks(table.poolings, np.float32):
            values = np.hstack([read[name].reshape(end - start, -1) for name in table.poolings])
            numbers = pd.DataFrame(values, index=rows.index[start:end])
            pd.concat([rows[start:end], numbers], axis=1).to_csv(text, index=False, header=False)
    finally:
        text.detach()  # the file is closed by whoever opened it


def _list_field(table: ExportTable, pooling: str) -> pa.Field:
    shape = table.shape(pooling)
    kind = pa.list_(pa.float32(), int(np.prod(shape)))
    return pa.field(table.column(pooling), kind, metadata={"shape": ",".join(map(str, shape))})


def _lists(values: np.ndarray) -> pa.Array:
    width = int(np.prod(values.shape[1:]))
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)


def _write_npz(table: ExportTable, file: BinaryIO) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name in table.rows.columns:
            with _npy(archive, name) as entry:
                np.lib.format.write_array(entry, _as_array(table.rows[name]), allow_pickle=False)
        for pooling in table.poolings:
            shape = (len(table), *table.shape(pooling))
            header = {"descr": table.dtype.str, "fortran_order": False, "shape": shape}
            with _npy(archive, table.column(pooling)) as entry:
                np.lib.format.write_array_header_1_0(entry, header)
                for _, _, read in table.blocks([pooling]):
                    entry.write(read[pooling].tobytes())


def _npy(archive: zipfile.ZipFile, name: str) -> Any:
    # A ZipInfo without a time: equal rows give equal bytes.
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)


def _as_array(column: "pd.Series[Any]") -> np.ndarray:
    if pd.api.types.is_numeric_dtype(column):
        return column.fillna(-1).to_numpy(np.int8)
    return column.to_numpy(str)
