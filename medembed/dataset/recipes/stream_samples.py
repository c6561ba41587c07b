"""What a stream says of its images: each sample's images, and the values beside them.

In tar files these are the members of one name (`0007.png`, `0007.json`, `0007.cls`), in Parquet
files the cells of a row, and among image files a row of `metadata.csv` or the folder's name.
"""

import csv
import io
import json
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from medembed.core.errors import RecipeError
from medembed.core.text import one_line
from medembed.dataset.recipes.guesses import find_split_word
from medembed.dataset.tables import EXACT_FLOAT
from medembed.images.hub_dataset import DatasetFiles
from medembed.images.parquet_stream import ImageColumns, read_columns, read_rows
from medembed.images.stream_files import IMAGE_SUFFIXES, StreamFile, read_files
from medembed.images.streams import StreamRoot, list_stream, refuse_without_images
from medembed.images.tar_stream import read_members

__all__ = ["Sample", "preview_samples", "read_samples"]

TOO_LARGE = "it is larger than --max-bytes"
MAX_TABLE_BYTES = 256 * 2**20
N_NAMED = 20


@dataclass(frozen=True)
class Sample:
    """Images that belong together, and what is known of them.

    Parameters
    ----------
    place : str
        The sample's name, for messages.
    images : dict of str to (bytes or str)
        The bytes of each image by its name; or, as text, why there are none.
    values : dict of str to str
        What is said of it, by column.
    split : str
        The data set's own name of its split; "" if it has none.
    problem : str
        What is wrong with the values; "" if nothing is.
    """

    place: str
    images: dict[str, bytes | str]
    values: dict[str, str] = field(default_factory=dict)
    split: str = ""
    problem: str = ""


def read_samples(root: StreamRoot, max_bytes: int, image: str | None = None) -> Iterator[Sample]:
    """Yield the samples of a stream in order; those without an image are left out.

    Parameters
    ----------
    root : TarRoot or HubRoot
        A dataset of the hub at a commit, as `settle_stream` returns it.
    max_bytes : int
        A larger image is named without its bytes.
    image : str, optional
        The column of a Parquet file that holds the images, where there are several.

    Raises
    ------
    RecipeError
        Several columns hold images, or none is called `image`.
    ImageError, PathNotFoundError, StorageError
        As `read_images` raises them.
    """
    found = list_stream(root)
    if found.layout == "tar":
        yield from _read_tars(found.files, max_bytes)
    elif found.layout == "images":
        yield from _describe_folders(found, read_files(found.files, max_bytes))
    else:
        yield from _read_parquet(found, max_bytes, image)


def preview_samples(root: StreamRoot, image: str | None = None) -> Iterator[Sample] | None:
    """Return the samples of a stream with empty images, or None if only reading them tells.

    What is wrong with a column shows before the images are fetched. Raises as `read_samples`.
    """
    found = list_stream(root)
    if found.layout == "tar":
        return None
    if found.layout == "images":
        return _describe_folders(found, ((f.name, b"") for f in found.files))
    return _read_parquet(found, 0, image, is_preview=True)


def _split_of(file: StreamFile, *, is_image: bool = False) -> str:
    """Return the split that a card gives a file, or the last word for one in its path.

    An image's own name says nothing: `test/normal/train_0001.png` is in test.
    """
    path = posixpath.dirname(file.name) if is_image else file.name
    words = (find_split_word(part) for part in reversed(path.split("/")))
    return file.split or next(filter(None, words), "")


def _read_tars(tars: Iterable[StreamFile], max_bytes: int) -> Iterator[Sample]:
    for tar in tars:
        members, split = read_members([tar], max_bytes), _split_of(tar)
        for key, run in groupby(members, key=lambda member: _key(member[0])):
            own = dict(run)
            images = {
                name: TOO_LARGE if data is None else data
                for name, data in own.items()
                if _suffix(name) in IMAGE_SUFFIXES and not _is_hidden(name)
            }
            if images:
                values, problem = _read_about(key, own)
                yield Sample(key, images, values, split, problem)


def _key(name: str) -> str:
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _is_hidden(name: str) -> bool:
    """Tell what is no image though it is called one, as what macOS leaves beside 0007.png."""
    return name.rpartition("/")[2].startswith(".")


def _suffix(name: str) -> str:
    last = name.rpartition("/")[2]
    return f".{last.rpartition('.')[2].lower()}" if "." in last else ""


def _read_about(key: str, members: dict[str, bytes | None]) -> tuple[dict[str, str], str]:
    """Return the values of a sample in a tar file, and what is wrong with them."""
    try:
        found = json.loads(members.get(f"{key}.json") or b"{}")
    except (ValueError, RecursionError):
        return {}, f"{key}.json is not JSON"
    if not isinstance(found, dict):
        return {}, f"{key}.json is not a table of values"
    values = _as_texts(found)
    if (label := members.get(f"{key}.cls")) is not None:
        values.setdefault("label", label.decode(errors="replace").strip())
    return values, ""


def _read_parquet(
    found: DatasetFiles, max_bytes: int, image: str | None, *, is_preview: bool = False
) -> Iterator[Sample]:
    columns = read_columns(found.files[0])  # all others have to have the same
    refuse_without_images(found.files[0], columns)
    asked = [_choose_image(found.files[0], columns, image)]
    names = {**found.class_names, **columns.class_names}
    if is_preview:  # once for each file: what follows reads the same commit
        _check_class_names(found, names)
    for file in found.files:
        split = _split_of(file)
        for row in read_rows(file, [] if is_preview else asked, columns.values, max_bytes):
            place = f"{file.name}, row {row.number}"
            values = {
                name: _plain_value(value, names.get(name, ()), f"column {name!r} of {place}")
                for name, value in row.values.items()
            }
            images: dict[str, bytes | str] = {place: b""}
            if not is_preview:
                (cell,) = row.cells
                images = {cell.name: cell.reason if cell.data is None else cell.data}
            yield Sample(place, images, _as_texts(values), split)


def _check_class_names(found: DatasetFiles, names: dict[str, tuple[str, ...]]) -> None:
    """Refuse files that number their classes in another order than the first one."""
    for file in found.files[1:]:
        own = {**found.class_names, **read_columns(file).class_names}
        for column in sorted({*names, *own}):
            first, other = names.get(column, ()), own.get(column, ())
            if first != other:
                raise RecipeError(
                    f"the classes of column {column!r} are {', '.join(first) or 'not named'} in "
                    f"Parquet file {found.files[0].place}, and {', '.join(other) or 'not named'} "
                    f"in {file.place}. Name files that agree, as a folder or configuration after "
                    "the dataset's name."
                )


def _choose_image(file: StreamFile, columns: ImageColumns, asked: str | None) -> str:
    listed = ", ".join(map(repr, columns.images))
    if asked and asked not in columns.images:
        raise RecipeError(
            f"column {asked!r} of Parquet file {file.place} holds no images' bytes; these do: "
            f"{listed}. Correct --image."
        )
    if not asked and len(columns.images) > 1 and "image" not in columns.images:
        raise RecipeError(
            f"several columns of Parquet file {file.place} hold images: {listed}. Name one with "
            "--image."
        )
    return asked or ("image" if "image" in columns.images else columns.images[0])


def _plain_value(value: Any, names: tuple[str, ...], where: str) -> Any:
    """Return the name of a class for its number, which is -1 where it is not known.

    Whole numbers that are stored as floats become such, as in `read_parquet_table`. Raises
    RecipeError for a number that no class has.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT_FLOAT:
        value = int(value)
    if not names or type(value) is not int:
        return value
    if not -1 <= value < len(names):
        raise RecipeError(
            f"{where} holds {value}, and its classes are numbered from 0 to {len(names) - 1}: "
            f"{', '.join(names[:N_NAMED])}. Have the dataset corrected, or name other files after "
            "its name."
        )
    return names[value] if value >= 0 else None


def _describe_folders(
    found: DatasetFiles, contents: Iterable[tuple[str, bytes | None]]
) -> Iterator[Sample]:
    """Yield a sample for each image file, named by its folder unless a table names a label."""
    about: dict[str, dict[str, str]] = {}
    for table in found.metadata:
        for name, values in _read_metadata(table):
            if about.setdefault(name, values) != values:
                raise RecipeError(
                    f"{table.place} describes {name} a second time with other values. Have the "
                    "dataset corrected: each image may have one row."
                )
    folders = {posixpath.dirname(file.name) for file in found.files}
    by_folder = not any("label" in own for own in about.values()) and len(folders) > 1
    splits = {file.name: _split_of(file, is_image=True) for file in found.files}
    for name, data in contents:
        values = dict(about.get(name, {}))
        if by_folder:
            values.setdefault("label", posixpath.basename(posixpath.dirname(name)))
        is_lost = bool(about) and name not in about
        problem = f"{name} is in no row of {found.metadata[0].name}" if is_lost else ""
        yield Sample(
            name, {name: TOO_LARGE if data is None else data}, values, splits[name], problem
        )


def _read_metadata(table: StreamFile) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the path of each image that a `metadata.csv` or `.jsonl` names, and its values."""
    folder = posixpath.dirname(table.name)
    if table.size > MAX_TABLE_BYTES:
        raise RecipeError(
            f"{table.place} has {table.size:,} bytes, more than the {MAX_TABLE_BYTES:,} that "
            "are allowed. Name a folder of the dataset that has a smaller one."
        )
    with table.open() as file:
        text = file.read().decode("utf-8-sig", errors="replace")
    try:
        if table.name.endswith(".csv"):
            rows: list[Any] = _read_csv(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        for row in rows:
            name = str(row.pop("file_name"))
            yield posixpath.normpath(posixpath.join(folder, name)), _as_texts(row)
    except (csv.Error, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise RecipeError(
            f"{table.place} cannot be read as a table with a column file_name: "
            f"{one_line(error, 100)}. Have the dataset corrected, or download the images and build "
            "the manifest with --from-folders."
        ) from error


def _read_csv(text: str) -> list[dict[str, str]]:
    """Return the rows of a CSV file; raises ValueError for one that does not fit the header."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    columns = reader.fieldnames or ()
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise ValueError(f"it has two columns {twice[0]!r}")
    rows = []
    for row in reader:
        if None in row or None in row.values():
            kind = "more" if None in row else "fewer"
            raise ValueError(f"line {reader.line_num} has {kind} fields than the header")
        rows.append(row)
    return rows


def _as_texts(values: dict[str, Any]) -> dict[str, str]:
    texts = {str(name): _as_text(value) for name, value in values.items()}
    return {name: text for name, text in texts.items() if text is not None}


def _as_text(value: Any) -> str | None:
    """Return a value as a cell's text; None for what is no single value."""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, list | tuple | dict | set | bytes):
        return None
    return str(value)
