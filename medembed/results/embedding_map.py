"""`map.parquet` of a run: where each image lies in two dimensions, for each pooling."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from medembed.core.errors import RunError
from medembed.core.files import describe_error, open_plain, write_atomically
from medembed.core.schema import ClosedRecord, parse
from medembed.results.runs import Run

__all__ = ["COLUMNS", "FILE", "EmbeddingMap", "MapInfo", "first_map", "read_map", "write_map"]

FILE = "map.parquet"
COLUMNS = {
    "sha256": pa.string(),
    "region": pa.string(),
    "label": pa.int8(),
    "split": pa.string(),
    "pooling": pa.string(),
    "x": pa.float32(),
    "y": pa.float32(),
}
_KEY = b"medembed"
_WAY_OUT = "Make it again with `medembed map`."


class MapInfo(ClosedRecord):
    """How a map was made: the value of `medembed` in the metadata of `map.parquet`."""

    format: Literal["medembed-map"] = "medembed-map"
    version: Literal[1] = 1
    method: Literal["pca", "tsne"]
    seed: int
    manifest: str
    """Digest of the manifest."""
    explained: dict[str, list[float]]
    """Share of the variance on either axis, by pooling; empty lists for t-SNE."""
    versions: dict[str, str]


@dataclass(frozen=True, eq=False)
class EmbeddingMap:
    """A map of the images of a run.

    Attributes
    ----------
    rows : DataFrame
        The columns `COLUMNS`, by pooling and SHA-256; labels are nullable Int8.
    info : MapInfo
        How it was made.
    """

    rows: pd.DataFrame
    info: MapInfo


def write_map(run: Run, found: EmbeddingMap) -> None:
    """Write the map of a run, whole; equal maps give equal bytes, and an older one is replaced."""
    schema = pa.schema(list(COLUMNS.items()))
    table = pa.Table.from_pandas(found.rows[list(COLUMNS)], schema=schema, preserve_index=False)
    kept = json.dumps(found.info.model_dump(), sort_keys=True).encode()
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({_KEY: kept}), buffer, compression="zstd")
    write_atomically(run.path / FILE, buffer.getvalue())


def read_map(run: Run) -> EmbeddingMap | None:
    """Return the map of a run, or None if it has none.

    Raises
    ------
    RunError
        The map is damaged, or holds what no run writes.
    """
    path = run.path / FILE
    try:
        with open_plain(path) as file:
            table = pq.read_table(file)
        document = json.loads((table.schema.metadata or {}).get(_KEY, b"null"))
        table = table.select(list(COLUMNS)).cast(pa.schema(list(COLUMNS.items())))
        _check(table)
    except FileNotFoundError:
        return None
    except (KeyError, OSError, ValueError, RecursionError, pa.ArrowException) as error:
        raise RunError(f"{path} cannot be read: {describe_error(error)}. {_WAY_OUT}") from None
    info = parse(MapInfo, document, RunError, path, _WAY_OUT)
    return EmbeddingMap(table.to_pandas().astype({"label": "Int8"}), info)


def first_map(runs: Sequence[Run], names: Sequence[str]) -> tuple[str, EmbeddingMap] | None:
    """Return the name of the first run that has a map, and its map; None without."""
    for run, name in zip(runs, names, strict=True):
        found = read_map(run)
        if found is not None:
            return name, found
    return None


def _check(table: pa.Table) -> None:
    is_right = {
        "sha256": pc.match_substring_regex(table["sha256"], "^[0-9a-f]{64}$"),
        "split": pc.is_in(table["split"], pa.array(["train", "test"])),
        "label": pc.is_in(table["label"], pa.array([0, 1, None], pa.int8())),
        **{name: pc.is_finite(table[name]) for name in ("x", "y")},
        **{name: pc.is_valid(table[name]) for name in ("region", "pooling")},
    }
    for name, flags in is_right.items():
        if n_wrong := len(table) - (pc.sum(flags).as_py() or 0):
            raise ValueError(f"{n_wrong} of {len(table)} rows have a {name} that no run writes")
