"""Read the tables that come with a data set, whatever program wrote them.

How a file is written is detected from its bytes: CSV with any of four delimiters, in UTF-8, UTF-16
or Windows-1252, Excel, Parquet; and numbers with decimal commas. `notes` says what was detected
beyond a comma and UTF-8, and a recipe's `[format]` overrides it. Every value is text.
"""

import csv
import datetime
import io
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from medembed.core.errors import MedembedError
from medembed.core.files import open_plain, read_plain
from medembed.core.text import normalise
from medembed.dataset.tables import check_names, normalise_columns, read_parquet_table

__all__ = [
    "EXCEL",
    "PLAIN",
    "TABLE_SUFFIXES",
    "ForeignTable",
    "TableFormat",
    "read_foreign_table",
]

EXCEL = (".xlsx", ".xlsm")
TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".tab", *EXCEL, ".parquet")
"""Of files that may be tables."""
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
SNIFFED = 1 << 20  # characters that the delimiter is detected from
MAX_UNPACKED = 1 << 30  # bytes of a workbook's parts: the largest spreadsheet has fewer
MAX_CELLS = 50_000_000
_MARKS = (  # UTF-32's mark begins as UTF-16's does
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_ZIP = b"PK\x03\x04"
_UNREAD = (".ods", ".xlsb", ".numbers")
_WESTERN = "cp1252"
_SEPARATOR_LINE = re.compile(r"sep=(.)\r?\n", re.IGNORECASE)  # Excel's own hint to itself
_WITH_COMMA = r"[+-]?\d+(?:,\d+)?"
_THOUSANDS = r"[+-]?\d{1,3}(?:,\d{3})+"


@dataclass(frozen=True)
class TableFormat:
    """How a table's file is written; fields that are "" are detected.

    Parameters
    ----------
    encoding : str
        Python's name of the encoding.
    delimiter : str
        One character.
    decimal : {"", ".", ","}
    sheet : str
        The sheet of a workbook.
    """

    encoding: str = ""
    delimiter: str = ""
    decimal: str = ""
    sheet: str = ""


PLAIN = TableFormat()


@dataclass(frozen=True)
class ForeignTable:
    """A table as normalised text.

    Attributes
    ----------
    rows : pandas.DataFrame
        Strings only, on a RangeIndex; a blank field is "".
    format : TableFormat
        How the file is written, as far as this applies to its kind.
    notes : list of str
        What was detected, a sentence each; none for commas and UTF-8.
    """

    rows: pd.DataFrame
    format: TableFormat = PLAIN
    notes: list[str] = field(default_factory=list)


def read_foreign_table(
    path: Path,
    error: type[MedembedError],
    *,
    columns: Sequence[str] = (),
    as_written: Sequence[str] = (),
    numbers: Sequence[str] = (),
    known: TableFormat = PLAIN,
) -> ForeignTable:
    """Read a table that comes with a data set.

    Parameters
    ----------
    path : pathlib.Path
        The file; its first bytes decide whether it is Excel, Parquet, or text with delimiters.
    error : type
        The error to raise.
    columns : sequence of str
        Names of the columns of a table without a header; otherwise the first row names them.
    as_written : sequence of str
        Columns that name files: they keep the table's own spelling.
    numbers : sequence of str
        Columns whose decimal commas become points, if all their values are such numbers.
    known : TableFormat
        What is known of the format and need not be detected.

    Raises
    ------
    MedembedError
        An instance of `error`: the file cannot be read, two columns have one name (apart from
        blanks), there are more than 10,000 columns, or rows are too short or long.
    """
    kind = _find_kind(path, error)
    if kind == "parquet":
        table, found = read_parquet_table(path, error), known
        notes: list[str] = []
    else:
        read = _read_workbook if kind == "workbook" else _read_text
        lines, found, notes = read(path, error, known)
        table = _make_table(lines, columns, path, error)
    names = [normalise(name) for name in table.columns]
    check_names(names, path, error)
    table = normalise_columns(table.set_axis(names, axis=1), as_written)
    table, commas = _read_decimal_commas(table, numbers, known.decimal, found.delimiter)
    if commas:
        found = replace(found, decimal=",")
        notes = [*notes, _describe_commas(path, table, commas)]
    return ForeignTable(table, found, notes)


def _find_kind(path: Path, error: type[MedembedError]) -> str:
    """Return a file's kind by its first bytes: a CSV may be called .xlsx, and the reverse."""
    try:
        with open_plain(path) as file:
            start = file.read(4)
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror or cause}.") from cause
    if start == b"\xd0\xcf\x11\xe0" or (start == _ZIP and path.suffix.lower() in _UNREAD):
        raise error(
            f"{path} is a workbook of a kind that is not supported. Save it as .xlsx, or as CSV."
        )
    return {_ZIP: "workbook", b"PAR1": "parquet"}.get(start, "text")


def _make_table(
    lines: list[list[str]], columns: Sequence[str], path: Path, error: type[MedembedError]
) -> pd.DataFrame:
    """Return a table of fields, without the empty rows and columns that spreadsheets leave."""
    while lines and not any(map(str.strip, lines[-1])):
        lines.pop()
    if not lines and not columns:
        raise error(f"{path} is empty.")
    header = list(columns) or list(map(normalise, lines.pop(0)))
    n_fields = len(header)
    while header and not header[-1] and not any("".join(row[len(header) - 1 :]) for row in lines):
        header.pop()
    lines = [row[: len(header)] if not any(row[len(header) :]) else row for row in lines]
    if header.count("") > 1:
        raise error(
            f"{path}: {header.count('')} of {n_fields} columns have no name. The first row must "
            "hold the columns' names: delete the rows above them."
        )
    check_names(header, path, error)
    torn = [i for i, row in enumerate(lines) if len(row) != len(header)]
    if torn:
        first = torn[0] + (1 if columns else 2)
        raise error(
            f"{path} has {len(torn)} rows with more or fewer fields than the {len(header)} "
            f"columns; the first is row {first}, with {len(lines[torn[0]])}. Download or build "
            "the file again, or name the delimiter of its fields with `delimiter` in [format]."
        )
    return pd.DataFrame(lines, columns=pd.Index(header), dtype=str)


def _read_text(
    path: Path, error: type[MedembedError], known: TableFormat
) -> tuple[list[list[str]], TableFormat, list[str]]:
    try:
        data = read_plain(path)
        encoding = known.encoding or _find_encoding(data)
        text = data.decode(encoding).removeprefix("\ufeff")
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror or cause}.") from cause
    except LookupError as cause:
        raise error(
            f"{path}: [format] names the encoding {known.encoding!r}, which Python does not know. "
            'Write "utf-8", "cp1252", "utf-16" or another of its names.'
        ) from cause
    except ValueError as cause:
        raise error(
            f"{path} cannot be read as {known.encoding or 'UTF-8 or Windows-1252'}: {cause}. Save "
            "it as CSV in UTF-8, or name its encoding with `encoding` in [format] of the recipe."
        ) from cause
    hint = _SEPARATOR_LINE.match(text)
    text = text[hint.end() :] if hint else text
    quote = _find_quote(text)
    delimiter = known.delimiter or (hint[1] if hint else _find_delimiter(text, quote))
    try:
        lines = list(filter(None, _split_fields(text, delimiter, quote)))
    except (ValueError, TypeError, csv.Error) as cause:
        raise error(f"{path} cannot be read as CSV in {encoding}: {cause}") from cause
    found = TableFormat(encoding=encoding, delimiter=delimiter)
    return lines, found, _describe_text(path, text, found, known)


def _split_fields(text: str, delimiter: str, quote: str) -> Iterator[list[str]]:
    rows = io.StringIO(text, newline="")
    return csv.reader(rows, delimiter=delimiter, quotechar=quote, strict=True)


def _find_quote(text: str) -> str:
    """Return the quote of fields: the apostrophe if it encloses each name of the header."""
    header = text.partition("\n")[0].strip()
    names = re.split("[" + re.escape("".join(DELIMITERS)) + "]", header)
    is_quoted = all(len(name) > 1 and name[0] == name[-1] == "'" for name in names)
    return "'" if is_quoted else '"'


def _find_encoding(data: bytes) -> str:
    """Return the encoding of a table.

    Detectors of 8-bit encodings were tried: in tables as short as these they took French for Baltic
    and German for Central European. So text that is not Unicode is read as Windows-1252, which
    Excel writes in western Europe, and a note says so.
    """
    for mark, name in _MARKS:
        if data.startswith(mark):
            return name
    start = data[:4096]
    if start.count(0) * 3 > len(start):  # UTF-16 of mostly Latin letters, without its mark
        return "utf-16-be" if start[:1] == b"\0" else "utf-16-le"
    try:
        data.decode()
    except UnicodeDecodeError:
        return _WESTERN
    return "utf-8"


def _find_delimiter(text: str, quote: str) -> str:
    """Return the delimiter that gives all rows equally many fields, and most of them."""
    sample = text if len(text) <= SNIFFED else text[: text.rfind("\n", 0, SNIFFED) + 1] or text
    best, most = "", 1
    for delimiter in DELIMITERS:
        try:
            widths = {len(row) for row in _split_fields(sample, delimiter, quote) if row}
        except csv.Error:
            continue
        if len(widths) == 1 and max(widths) > most:
            best, most = delimiter, max(widths)
    # Torn rows are an error: of the table that the header looks like.
    return best or max(DELIMITERS, key=text.partition("\n")[0].count)


def _describe_text(path: Path, text: str, found: TableFormat, known: TableFormat) -> list[str]:
    said = []
    if found.delimiter != "," and not known.delimiter:
        said.append(f"fields divided by {DELIMITERS.get(found.delimiter, repr(found.delimiter))}")
    if found.encoding != "utf-8" and not known.encoding:
        said.append("UTF-16" if found.encoding.startswith("utf-16") else found.encoding)
    if not said:
        return []
    example = ""
    if found.encoding == _WESTERN and not known.encoding:
        word = re.search(r"\w*[^\W\x00-\x7f]\w*|[^\x00-\x7f]", text)
        shown = f", as in {word[0]!r}" if word else ""
        example = (
            f". It is not UTF-8, so it was read as Windows-1252 (cp1252{shown}): if that is "
            "wrong, name the right one with `encoding` in [format] of the recipe, or --encoding"
        )
    return [f"{path.name} was read with {' in '.join(said)}{example}"]


def _read_workbook(
    path: Path, error: type[MedembedError], known: TableFormat
) -> tuple[list[list[str]], TableFormat, list[str]]:
    """Read a sheet of an Excel file, row by row: a stray cell far away costs no memory."""
    import openpyxl  # for these files alone

    sheet = known.sheet
    try:
        with open_plain(path) as opened, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of drop-down lists and styles that it passes over
            _check_unpacked(opened, path, error)
            book = openpyxl.load_workbook(opened, read_only=True, data_only=True)
            names = [own.title for own in book.worksheets]
            if sheet and sheet not in names:
                raise error(
                    f"{path} has no sheet {sheet!r}; its sheets are "
                    f"{', '.join(map(repr, names))}. Correct `sheet` in [format]."
                )
            filled = {
                name: lines for name in names if (lines := _take_cells(book[name], path, error))
            }
    except error:
        raise
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror or cause}.") from cause
    # openpyxl raises nearly every builtin error on damage, and those of zipfile and expat
    except Exception as cause:
        raise error(
            f"{path} cannot be read as an Excel workbook ({type(cause).__name__}). Save it again "
            "as .xlsx, or as CSV."
        ) from cause
    chosen = sheet or next(iter(filled), "")
    others = [name for name in filled if name != chosen]
    notes = []
    if others and not sheet:
        listed = ", ".join(map(repr, others))
        notes = [
            f"{path.name}: sheet {chosen!r} was read, and not {listed}; `sheet` in [format] names "
            "another"
        ]
    return filled.get(chosen, []), TableFormat(sheet=chosen), notes


def _check_unpacked(opened: Any, path: Path, error: type[MedembedError]) -> None:
    with zipfile.ZipFile(opened) as parts:
        n_bytes = sum(part.file_size for part in parts.infolist())
    opened.seek(0)
    if n_bytes > MAX_UNPACKED:
        raise error(
            f"{path} unpacks to {n_bytes:,} bytes; at most {MAX_UNPACKED:,} are read. Save the "
            "sheet as CSV."
        )


def _take_cells(sheet: Any, path: Path, error: type[MedembedError]) -> list[list[str]]:
    """Return a sheet's cells as text, from the first row that is not empty."""
    lines: list[list[str]] = []
    n_cells = 0
    for cells in sheet.iter_rows(values_only=True):
        n_cells += len(cells)
        if n_cells > MAX_CELLS:
            raise error(
                f"{path}: sheet {sheet.title!r} spans more than {MAX_CELLS:,} cells, most of them "
                "perhaps empty. Copy the table into a new sheet, or save it as CSV."
            )
        line = list(map(_as_text, cells))
        while line and not line[-1]:
            line.pop()
        if line or lines:
            lines.append(line)
    width = max(map(len, lines), default=0)
    return [[*line, *[""] * (width - len(line))] for line in lines]


def _as_text(value: object) -> str:
    """Return a cell's text in the sheet's default form; whole numbers have no point."""
    match value:
        case None:
            return ""
        case bool():
            return "TRUE" if value else "FALSE"
        case float() if value.is_integer():
            return str(int(value))
        case datetime.datetime() if value.time() == datetime.time():
            return value.date().isoformat()
        case datetime.datetime():
            return value.isoformat(" ")
    return str(value)


def _read_decimal_commas(
    table: pd.DataFrame, numbers: Sequence[str], decimal: str, delimiter: str
) -> tuple[pd.DataFrame, list[str]]:
    """Replace decimal commas by points, in columns that hold only such numbers."""
    found = {}
    for name in numbers:
        column = table.get(name, pd.Series(dtype=str))
        values = column[column != ""]
        if decimal == "." or not values.str.contains(",", regex=False).any():
            continue
        is_number = values.str.fullmatch(_WITH_COMMA)
        # Between commas "1,234" is more likely a thousand: [format] must ask for a change.
        is_thousand = decimal != "," and delimiter == "," and values.str.fullmatch(_THOUSANDS).all()
        if is_number.all() and not is_thousand:
            found[name] = column.str.replace(",", ".", regex=False)
    return (table.assign(**found) if found else table), list(found)


def _describe_commas(path: Path, table: pd.DataFrame, names: list[str]) -> str:
    values = table[names[0]]
    example = values[values.str.contains(".", regex=False)].iloc[0]
    listed = ", ".join(map(repr, names))
    return (
        f"{path.name}: decimal commas in {listed} became points, {example.replace('.', ',')} is "
        f'{example}; with decimal = "." in [format] they stay'
    )
