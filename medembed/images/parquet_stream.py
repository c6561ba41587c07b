"""Images in the cells of Parquet files, as Hugging Face writes them: read row group by row group.

An image is a struct of `bytes` and `path`, or plain bytes. Memory holds a batch of rows of a
bounded size, and the page that it comes from, as stored and as decompressed. A page has at most
2 GB; of what pyarrow writes it has up to 1,024 images, of what `datasets` writes usually 100.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from medembed.core.errors import ImageError, StorageError
from medembed.core.text import one_line
from medembed.images.stream_files import StreamFile

__all__ = ["Cell", "ImageColumns", "Row", "read_columns", "read_rows"]

BATCH_BYTES = 32 * 2**20  # of a batch of rows
MAX_BATCH = 256  # rows
BUFFER = 8 * 2**20  # bytes of a column asked for at once
WINDOW = 2**16  # bytes that are asked for where fewer are wanted
MAX_NAME = 200  # characters of a cell's own file name that become part of an image's


@dataclass(frozen=True)
class ImageColumns:
    """The columns of a Parquet file, by what they hold.

    Attributes
    ----------
    images : tuple of str
        Columns with the bytes of images.
    values : tuple of str
        Columns with one number, text, date or truth value per row.
    others : tuple of str
        All other columns, such as lists.
    class_names : dict of str to tuple of str
        The names of a column's classes, by number, as the file's own schema says.
    """

    images: tuple[str, ...]
    values: tuple[str, ...]
    others: tuple[str, ...]
    class_names: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Cell:
    """An image of a row.

    Attributes
    ----------
    name : str
        The Parquet file's name, the number of the row from 0, and the last part of the image's own
        path, joined by slashes.
    data : bytes or None
        The image's bytes.
    reason : str
        Why there are none.
    """

    name: str
    data: bytes | None
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a Parquet file.

    Attributes
    ----------
    number : int
        From 0.
    cells : tuple of Cell
        One for each image column.
    values : dict of str to object
        The other columns that were asked for; None for null.
    """

    number: int
    cells: tuple[Cell, ...]
    values: dict[str, Any]


def read_columns(file: StreamFile) -> ImageColumns:
    """Return the columns of a Parquet file, from its footer.

    Raises
    ------
    ImageError
        The file is damaged.
    StorageError
        Its place refuses, or keeps failing.
    """
    with _opened(file) as parquet:
        return _sort_columns(parquet.schema_arrow)


def read_rows(
    file: StreamFile, images: Sequence[str], values: Sequence[str], max_bytes: int
) -> Iterator[Row]:
    """Yield the rows of a Parquet file in order, with some of its columns.

    Parameters
    ----------
    file : StreamFile
    images, values : sequence of str
        Columns, as `read_columns` names them; other columns are not fetched.
    max_bytes : int
        A larger image has no `Cell.data`.

    Raises
    ------
    ImageError
        The file is damaged, or lacks one of the columns.
    StorageError
        Its place refuses, or keeps failing.
    """
    several = len(images) > 1
    with _opened(file) as parquet:
        known = parquet.schema_arrow.names
        missing = [name for name in (*images, *values) if name not in known]
        if missing:
            raise ImageError(
                f"Parquet file {file.place} has no column {missing[0]!r}, as others of the dataset "
                f"do; its columns are {', '.join(map(repr, known))}. Name the files that belong "
                "together, as a folder or configuration after the dataset's name."
            )
        number = 0
        if not (images or values):
            yield from (Row(n, (), {}) for n in range(parquet.metadata.num_rows))
            return
        for group in range(parquet.num_row_groups):
            size = _batch_size(parquet.metadata.row_group(group)) if images else MAX_BATCH
            for batch in parquet.iter_batches(
                size, row_groups=[group], columns=[*images, *values], use_threads=False
            ):
                for row in batch.to_pylist():
                    start = f"{file.name}/{number:06d}"
                    cells = tuple(
                        _read_cell(f"{start}/{name}" if several else start, row[name], max_bytes)
                        for name in images
                    )
                    yield Row(number, cells, {name: row[name] for name in values})
                    number += 1


@contextmanager
def _opened(file: StreamFile) -> Iterator[Any]:
    """Open a Parquet file; errors of the library while it is read become ours."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with file.open() as handle:
            # pyarrow asks for each column of a row group by itself: small ones come together.
            small = io.BufferedReader(getattr(handle, "raw", handle), WINDOW)
            yield pq.ParquetFile(
                small, buffer_size=BUFFER, pre_buffer=False, page_checksum_verification=True
            )
    except (ImageError, StorageError):
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        raise ImageError(
            f"Parquet file {file.place} cannot be read to its end: {one_line(error, 200)}. Have it "
            "repaired, or leave it out: name the files to read after the dataset's name."
        ) from error


def _batch_size(group: Any) -> int:
    mean = group.total_byte_size // max(group.num_rows, 1)
    return int(min(max(BATCH_BYTES // max(mean, 1), 1), MAX_BATCH))


def _sort_columns(schema: Any) -> ImageColumns:
    import pyarrow as pa

    structs, plain, values, others = [], [], [], []
    for field in schema:
        kind = field.type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if pa.types.is_struct(kind) and _is_bytes(kind):
            structs.append(field.name)
        elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            plain.append(field.name)
        elif pa.types.is_nested(kind) or pa.types.is_null(kind):
            others.append(field.name)
        else:
            values.append(field.name)
    images = structs or plain
    others += plain if structs else []
    return ImageColumns(tuple(images), tuple(values), tuple(others), _class_names(schema.metadata))


def _is_bytes(struct: Any) -> bool:
    import pyarrow as pa

    place = struct.get_field_index("bytes")
    kind = struct.field(place).type if place >= 0 else pa.null()
    known = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_null)
    return any(is_kind(kind) for is_kind in known)


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, tuple[str, ...]]:
    """Return the names of classes that `datasets` writes into a file's schema."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {
            str(column): tuple(map(str, feature["names"]))
            for column, feature in features.items()
            if isinstance(feature, dict) and isinstance(feature.get("names"), list)
        }
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def _read_cell(start: str, cell: Any, max_bytes: int) -> Cell:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    path = cell.get("path") if isinstance(cell, dict) else None
    last = path.replace("\\", "/").rpartition("/")[2] if isinstance(path, str) else ""
    is_plain = last.strip(". ") and last.isprintable() and len(last) <= MAX_NAME
    name = f"{start}/{last}" if is_plain and "://" not in str(path) else start
    if data and len(data) <= max_bytes:
        return Cell(name, data)
    if data:
        return Cell(name, None, "it is larger than --max-bytes")
    if path:
        kind = "a URL" if "://" in path else "a path"
        return Cell(name, None, f"its cell holds {kind} and no bytes")
    return Cell(name, None, "its cell holds no image")
