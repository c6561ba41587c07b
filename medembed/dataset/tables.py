"""Read and write tables as text, without guessing."""

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medembed.core.errors import MedembedError
from medembed.core.files import open_plain
from medembed.core.text import normalise

__all__ = [
    "EXACT_FLOAT",
    "check_names",
    "csv_bytes",
    "normalise_column",
    "normalise_columns",
    "read_parquet_table",
    "read_text_table",
]

PARQUET_ROWS = 65536  # rows that are read at once
MAX_COLUMNS = 10_000  # a file with more is no table of images, and checks of names would take hours
PANDAS_INDEX = re.compile(r"__index_level_\d+__")  # what pandas calls an index without a name
EXACT_FLOAT = 2.0**53  # floats beyond this are not exact whole numbers
# What `normalise` may change: text that begins or ends in a blank, or is not all ASCII.
NOT_PLAIN = r"^[\x00-\x20]|[\x00-\x20]$|[^\x00-\x7f]"


def csv_bytes(table: pd.DataFrame) -> bytes:
    """Return a table of strings as CSV in UTF-8 with a header and lines that end in a line feed.

    Fields are quoted only if they hold a comma, a quote or a line break (RFC 4180). Some versions
    of Python's csv writer leave a carriage return unquoted; the bytes must not depend on that.
    """
    columns = [_quoted(table[name]) for name in table.columns]
    header = _quoted(pd.Series(table.columns, dtype=str))
    lines = [",".join(header), *map(",".join, zip(*columns, strict=True)), ""]
    return "\n".join(lines).encode()


def _quoted(column: "pd.Series[str]") -> list[str]:
    text = column.astype(str)
    special = text.str.contains('[",\r\n]', regex=True)
    if special.any():
        text = text.mask(special, '"' + text.str.replace('"', '""') + '"')
    return text.tolist()


def read_text_table(path: Path, error: type[MedembedError]) -> pd.DataFrame:
    """Return a comma-separated file in UTF-8, with or without a byte-order mark, as strings.

    Parameters
    ----------
    path : pathlib.Path
    error : type
        The error to raise.

    Returns
    -------
    pandas.DataFrame
        Strings only; an empty field is "".

    Raises
    ------
    MedembedError
        An instance of `error`: the file cannot be read, two columns have one name, there are more
        than 10,000 columns, or rows are too short or long.
    """
    try:
        with open_plain(path) as opened:
            file = io.TextIOWrapper(opened, "utf-8-sig", newline="")
            lines = [line for line in csv.reader(file, strict=True) if line]
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror or cause}.") from cause
    except (ValueError, csv.Error) as cause:
        raise error(f"{path} cannot be read as CSV in UTF-8: {cause}") from cause
    if not lines:
        raise error(f"{path} is empty.")
    header = lines.pop(0)
    check_names(header, path, error)
    torn = [i for i, line in enumerate(lines) if len(line) != len(header)]
    if torn:
        raise error(
            f"{path} has {len(torn)} rows with more or fewer fields than the {len(header)} "
            f"columns; the first is row {torn[0] + 2}, with {len(lines[torn[0]])}. "
            "Download or build the file again."
        )
    return pd.DataFrame(lines, columns=pd.Index(header), dtype=str)


def normalise_columns(table: pd.DataFrame, as_written: Sequence[str]) -> pd.DataFrame:
    """Return a table of strings with each column but those of `as_written` normalised."""
    columns = {name: table[name] for name in table.columns if name not in as_written}
    evened = {name: normalise_column(column) for name, column in columns.items()}
    changed = {name: column for name, column in evened.items() if column is not columns[name]}
    return table.assign(**changed) if changed else table


def normalise_column(column: "pd.Series[str]") -> "pd.Series[str]":
    """Return a column of strings normalised by `text.normalise`, or itself if nothing changes.

    Each distinct text that is not plain ASCII is normalised once: a million rows of few values take
    no longer than looking at them.
    """
    if column.dtype != "str":
        column = column.astype(str)
    is_odd = column.str.contains(NOT_PLAIN, regex=True, na=False).to_numpy(bool)
    if not is_odd.any():
        return column
    codes, texts = pd.factorize(column[is_odd])
    spelt = np.array([normalise(text) for text in texts], dtype=object)
    if (spelt == np.asarray(texts, dtype=object)).all():
        return column
    values = column.to_numpy(object, copy=True)
    values[is_odd] = spelt[codes]
    return pd.Series(values, index=column.index, name=column.name, dtype=str)


def read_parquet_table(
    path: Path, error: type[MedembedError], names: tuple[str, ...] = ()
) -> pd.DataFrame:
    """Return a Parquet file as strings; whole numbers stored as floats lose their ".0".

    Parameters
    ----------
    path : pathlib.Path
    error : type
        The error to raise.
    names : tuple of str
        Columns to read, if the file has them; by default all.

    Returns
    -------
    pandas.DataFrame
        Strings only, with a RangeIndex; a missing value is "".

    Raises
    ------
    MedembedError
        An instance of `error`: the file cannot be read, two columns have one name, or there are
        more than 10,000 columns.
    """
    try:
        table = _read_blocks(path, names, error)
        for name in table.columns:
            table[name] = _as_strings(table[name])
    except error:
        raise
    except OSError as cause:
        raise error(f"{path} cannot be read as Parquet: {cause.strerror or cause}.") from cause
    # pyarrow's errors are nearly every builtin one; a damaged file can ask for any memory
    except (ValueError, LookupError, TypeError, RuntimeError, MemoryError) as cause:
        raise error(f"{path} cannot be read as Parquet: {cause}.") from cause
    return table.reset_index(drop=True)


def check_names(header: Sequence[str], path: Path, error: type[MedembedError]) -> None:
    """Refuse a header with too many columns, or with two columns of one name."""
    if len(header) > MAX_COLUMNS:
        raise error(f"{path} has {len(header)} columns; more than {MAX_COLUMNS} are not read.")
    twice = sorted(repr(name) for name, n in Counter(header).items() if n > 1)
    if twice:
        raise error(f"{path} has two columns of one name: {', '.join(twice[:5])}. Rename one.")


def _as_strings(column: "pd.Series[Any]") -> "pd.Series[str]":
    if pd.api.types.is_float_dtype(column):
        known = column.dropna()
        if (known.mod(1).eq(0) & known.abs().le(EXACT_FLOAT)).all():
            column = column.astype("Int64")  # other writers keep 0, 1, unknown as floats
    if column.dtype != "str" or column.hasnans:
        column = column.astype("string").fillna("").astype(str)
    return column


def _read_blocks(path: Path, names: tuple[str, ...], error: type[MedembedError]) -> pd.DataFrame:
    """Read block by block: a whole file at once takes twice the memory."""
    import pyarrow as pa  # not earlier: CSV needs none of its 140 MB
    import pyarrow.parquet as pq

    # Opened here: Arrow cannot open a name that is not UTF-8.
    with open_plain(path) as opened, pq.ParquetFile(opened) as file:
        check_names(file.schema_arrow.names, path, error)
        every = (field for field in file.schema_arrow if not names or field.name in names)
        fields = [field for field in every if not PANDAS_INDEX.fullmatch(field.name)]
        columns = [field.name for field in fields]
        batches = file.iter_batches(PARQUET_ROWS, columns=columns, use_threads=False)
        table = pa.Table.from_batches(batches, pa.schema(fields))
    table.validate(full=True)  # text of other bytes than UTF-8 would be found at its first use
    # pandas' own metadata is not trusted either: it can name any columns and types.
    frame: pd.DataFrame = table.to_pandas(ignore_metadata=True)
    return frame
