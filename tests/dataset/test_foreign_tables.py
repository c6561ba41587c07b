"""Tables as programs write them: delimiters, encodings, Excel, decimal commas, and what is said."""

import datetime
import zipfile
from pathlib import Path
from typing import Any

import openpyxl
import pandas as pd
import pytest

from medembed.core.errors import RecipeError
from medembed.dataset.foreign_tables import ForeignTable, TableFormat, read_foreign_table

GERMAN = "Bild;Körperteil;Größe\na.png;Hüfte;1,5\nb.png;Fuß;2\n"
ROWS = [["a.png", "Hüfte", "1,5"], ["b.png", "Fuß", "2"]]


def read(path: Path, data: bytes | str = b"", **options: Any) -> ForeignTable:
    if data:
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_foreign_table(path, RecipeError, **options)


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("utf-8", "divided by semicolons"),
        ("utf-8-sig", "divided by semicolons"),
        ("cp1252", "semicolons in cp1252. It is not UTF-8.*as in 'Körperteil'.*`encoding`"),
        ("utf-16", "semicolons in UTF-16"),
        ("utf-16-le", "semicolons in UTF-16"),
        ("utf-16-be", "semicolons in UTF-16"),
        ("utf-32", "semicolons in utf-32"),
    ],
)
def test_a_table_of_german_excel_is_read_in_every_encoding(
    tmp_path: Path, encoding: str, said: str
) -> None:
    found = read(tmp_path / "t.csv", GERMAN.replace("\n", "\r\n").encode(encoding))
    assert found.rows.columns.tolist() == ["Bild", "Körperteil", "Größe"]
    assert found.rows.to_numpy().tolist() == ROWS
    assert pd.Series(found.notes).str.contains(said).tolist() == [True]


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("file,finding,n\na.png,hernia;mass,1\nb.png,mass;x;y,2\n", ["file", "finding", "n"]),
        ("Bild;Alter, Jahre;x\na.png;1,5;y\n", ["Bild", "Alter, Jahre", "x"]),
        ("path,label\nimages/a;b/c.png,1\nimages/d;e/f.png,0\n", ["path", "label"]),
        ("file\tlabel\na b.png\t1\n", ["file", "label"]),
        ("file|label\na.png|1\n", ["file", "label"]),
        ("file\na.png\nb.png\n", ["file"]),
        ("sep=;\nfile;label\na;1\n", ["file", "label"]),
        ("'file';'label'\n'a;b.png';'1'\n", ["file", "label"]),
        ('"file";"no; te"\n"a ""x"".png";"1\n2"\n', ["file", "no; te"]),
        ("file;label;;\na;1;;\n;;;\n\n", ["file", "label"]),
        ("file;label\na;1;\nb;2;\n", ["file", "label"]),
    ],
)
def test_the_delimiter_is_the_one_that_divides_all_rows_alike(
    tmp_path: Path, text: str, columns: list[str]
) -> None:
    assert read(tmp_path / "t.csv", text).rows.columns.tolist() == columns


def test_plain_tables_have_no_notes_and_a_recipe_has_the_last_word(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    assert read(path, "a,b\n1,2\n").notes == []
    known = TableFormat(encoding="cp1250", delimiter=";")
    found = read(path, "a;b\nzłoty;1\n".encode("cp1250"), known=known)
    assert (found.rows["a"].tolist(), found.notes) == (["złoty"], [])


def test_decimal_commas_become_points_where_nothing_else_is_meant(tmp_path: Path) -> None:
    text = 'age;list;id;label\n1,5;"1,2,3";7,0;a\n12;2,3;8,0;b\n;;;\n'
    found = read(tmp_path / "t.csv", text, numbers=("age", "list"))
    assert found.rows["age"].tolist() == ["1.5", "12"]
    assert found.rows["list"].tolist() == ["1,2,3", "2,3"]
    assert found.rows["id"].tolist() == ["7,0", "8,0"]  # identifiers are nobody's numbers
    assert "1,5 is 1.5" in found.notes[1]
    known = TableFormat(decimal=".")
    assert read(tmp_path / "t.csv", numbers=("age",), known=known).rows["age"][0] == "1,5"
    thousands = 'n,x\n"1,234",a\n'
    assert read(tmp_path / "t.csv", thousands, numbers=("n",)).rows["n"].tolist() == ["1,234"]


def workbook(path: Path, *rows: list[Any], more: tuple[str, ...] = ()) -> Path:
    book = openpyxl.Workbook()
    book.active.title = "Befunde"
    for row in rows:
        book.active.append(row)
    for name in more:
        book.create_sheet(name).append(["x"])
    book.save(path)
    return path


def test_a_workbook_is_read_as_it_shows(tmp_path: Path) -> None:
    day = datetime.datetime(2020, 1, 2)
    noon = datetime.datetime(2020, 1, 2, 12, 30)
    path = workbook(
        tmp_path / "t.xlsx",
        [],
        ["Bild", "Patient", "Größe", "Tag", "ja", None],
        ["a.png", "007", 1.5, day, True],
        ["b.png", 8, 2.0, noon, False],
        [None],
        more=("Legende",),
    )
    found = read(path)
    assert found.rows.columns.tolist() == ["Bild", "Patient", "Größe", "Tag", "ja"]
    assert found.rows.to_numpy().tolist() == [
        ["a.png", "007", "1.5", "2020-01-02", "TRUE"],
        ["b.png", "8", "2", "2020-01-02 12:30:00", "FALSE"],
    ]
    assert "sheet 'Befunde' was read, and not 'Legende'" in found.notes[0]
    assert read(path, known=TableFormat(sheet="Legende")).rows.columns.tolist() == ["x"]
    with pytest.raises(RecipeError, match="no sheet 'Blatt'; its sheets are 'Befunde', 'Legende'"):
        read(path, known=TableFormat(sheet="Blatt"))
    path.rename(tmp_path / "t.csv")
    assert len(read(tmp_path / "t.csv").rows) == 2  # it is what its bytes are


def test_a_cell_far_away_is_one_error_and_not_the_end_of_the_memory(tmp_path: Path) -> None:
    path = workbook(tmp_path / "t.xlsx", ["file"], ["a.png"])
    book = openpyxl.load_workbook(path)
    book.active.cell(row=9, column=16_384).value = "stray"
    book.save(path)
    with pytest.raises(RecipeError, match="of 16384 columns have no name"):
        read(path)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("t.xlsx", b"PK\x03\x04" + b"junk" * 50, "as an Excel workbook"),
        ("t.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" * 9, "of a kind that is not supported"),
        ("t.ods", b"PK\x03\x04" + b"junk" * 50, "of a kind that is not supported"),
        ("t.parquet", b"PAR1junkPAR1", "as Parquet"),
        ("t.csv", b"a,b\n\x81,1\n", "UTF-8 or Windows-1252"),
        ("t.csv", b"a,b\n1\n2,3,4\n", "2 rows with more or fewer fields"),
        ("t.csv", b"Titel,,\nfile,label,x\na,1,2\n", "2 of 3 columns have no name"),
        ("t.csv", b"\n\n", "is empty"),
        ("t.csv", b'a,b\n"1,2\n', "as CSV"),
        ("t.csv", b"a ,a\n1,2\n", "two columns of one name"),
    ],
)
def test_what_is_no_table_is_one_error(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        read(tmp_path / name, data)


def test_an_encoding_that_python_does_not_know_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="encoding 'latin-99'"):
        read(tmp_path / "t.csv", "a\n1\n", known=TableFormat(encoding="latin-99"))


def test_what_a_workbook_has_beside_its_cells_draws_no_warning(tmp_path: Path) -> None:
    path = workbook(tmp_path / "t.xlsx", ["file"], ["a.png"])
    parts = tmp_path / "parts.xlsx"
    extension = b'<extLst><ext uri="{CCE6A557-97BC-4b89-ADB6-D9C93CAAB3DF}"/></extLst></worksheet>'
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(parts, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            is_sheet = name.startswith("xl/worksheets/")
            new.writestr(name, data.replace(b"</worksheet>", extension) if is_sheet else data)
    assert read(parts).rows["file"].tolist() == ["a.png"]
