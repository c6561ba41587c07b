"""A table's rows find their images however these are spelt; several rows of one become one."""

import csv
import unicodedata
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_recipes import STUDIES, TABLE, build, image, write_mura

from medembed.core.errors import RecipeError
from medembed.dataset.recipes.build import build_manifest, load_recipe
from medembed.dataset.recipes.image_index import compare_names, find_shortened

HEADER = ("file", "person", "exam", "part", "finding", "set", "age")
FILES = ("one/a.png", "two/b.png", "deep/c.png")
ROWS = [
    *(("one/a.png", "p1", "1", "hand", "none", "train", "31"),),
    *(("two/b.png", "p1", "1", "hand", "fracture", "train", "31"),),
    *(("deep/c.png", "p2", "1", "wrist", "none", "test", "40"),),
]
ANY = TABLE.replace('file = "labels.csv"', 'file = "labels.csv"\nrows = "any"')


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def write(root: Path, rows: list[tuple[str, ...]], files: tuple[str, ...] = FILES) -> None:
    for i, name in enumerate(files):
        image(root / name, i)
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows])


def with_images(*names: str) -> list[tuple[str, ...]]:
    return [(name, *row[1:]) for name, row in zip(names, ROWS, strict=True)]


# Spelling


@pytest.mark.parametrize(
    "names",
    [
        ("one\\a.png", ".\\two\\b.png", "deep//c.png"),
        ("./one/a.png", " two/b.png ", "deep/c.png\u00a0"),
        ("one/ a.png", "b\u200b", "\ufeffc.png"),
        ("/{root}/one/a.png", "x/../two/b.png", "deep/./c"),
    ],
)
def test_a_path_is_found_however_it_is_spelt(
    tmp_path: Path, root: Path, names: tuple[str, ...]
) -> None:
    root.mkdir()
    (root / "x").mkdir()
    if "deep/./c" in names:
        names = (f"{root.resolve()}/one/a.png", names[1], "c")
    write(root, with_images(*names))
    rows = build(tmp_path, root).manifest.rows
    assert rows["image"].tolist() == sorted(FILES)
    assert rows["label"].tolist() == [0, 0, 1]


@pytest.mark.parametrize(("on_disk", "in_table"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_the_files_own_spelling_goes_into_the_manifest(
    tmp_path: Path, root: Path, on_disk: Any, in_table: Any
) -> None:
    name = "Schlüsselbein/é 1 .png"
    own, said = unicodedata.normalize(on_disk, name), unicodedata.normalize(in_table, name)
    write(root, with_images(said, "b", "c"), (own, *FILES[1:]))
    exclude = f'[exclude]\n"{said}" = "named as in the table"\n'
    assert own in build(tmp_path, root).manifest.rows["image"].tolist()
    assert build(tmp_path, root, TABLE + exclude).excluded == [(own, "named as in the table")]
    write(root, with_images(Path(said).stem, "b", "c"), (own, *FILES[1:]))
    assert own in build(tmp_path, root).manifest.rows["image"].tolist()


def test_two_files_that_differ_in_spelling_alone_are_told_apart(tmp_path: Path, root: Path) -> None:
    nfc, nfd = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    write(root, with_images(nfc, nfd, "c"), (nfc, nfd, FILES[2]))
    assert len(build(tmp_path, root).manifest.rows) == 3
    write(root, with_images(f" {nfd}", "b", "c"), (nfc, nfd, *FILES[1:]))
    with pytest.raises(RecipeError, match="several files have the name of one row"):
        build(tmp_path, root)


def test_muras_tables_may_have_paths_of_windows(tmp_path: Path) -> None:
    mura = tmp_path / "MURA-v1.1"
    mura.mkdir()
    write_mura(mura, STUDIES)
    rows = build_manifest(load_recipe("mura"), mura).manifest.rows
    for path in mura.glob("*.csv"):
        path.write_text(path.read_text().replace("/", "\\"))
    assert build_manifest(load_recipe("mura"), mura).manifest.rows.equals(rows)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("ONE/A.PNG", "TWO/B.PNG", "Deep/C.png"), "'ONE/A.PNG' .* 'one/a.png' differ in upper"),
        (("one/a.jpg", "b.JPEG", "c.tif"), "'one/a.jpg' .* 'one/a.png' differ in the suffix"),
        (("one/a", "two/b", "deep/c"), "'one/a' .* 'one/a.png' differ in the suffix"),
        (("x/one/a.png", "x/two/b.png", "x/deep/c.png"), "folders. Take 'x/' off the paths"),
        (
            ("root/one/a.png", "root/two/b.png", "q"),
            r"folders. Give --image-root \S+[^/]{5} instead. Use",
        ),
        (("elsewhere/a.png", "w/b.png", "w/c.png"), "'elsewhere/a.png' .* lay the files out"),
        (("C:\\films\\one\\a.png", "q", "r"), "Take 'C:/films/' off the paths"),
        (("q.png", "r.png", "s.png"), "first in the tables is 'q.png', the first of 3 files"),
    ],
)
def test_where_no_row_has_its_image_the_message_says_how_they_differ(
    tmp_path: Path, root: Path, names: tuple[str, ...], said: str
) -> None:
    write(root, with_images(*names))
    with pytest.raises(RecipeError, match=f"none of the 3 images .*{said}") as caught:
        build(tmp_path, root)
    is_roots_fault = "Give --image-root" in said or "first in the tables" in said
    assert ("--image-root" in str(caught.value)) == is_roots_fault


def test_a_root_that_is_too_high_or_empty_is_blamed(tmp_path: Path, root: Path) -> None:
    write(root / "v1", with_images(*FILES))
    (root / "v1/labels.csv").rename(root / "labels.csv")
    with pytest.raises(RecipeError, match=r"--image-root \S*root/v1 "):
        build(tmp_path, root)
    for path in root.rglob("*.png"):
        path.unlink()
    with pytest.raises(RecipeError, match=r"There is no image at all.* Correct --image-root"):
        build(tmp_path, root)


def test_a_number_without_its_zeros_is_named(tmp_path: Path, root: Path) -> None:
    write(root, with_images("12", "3", "100"), ("0012.png", "0003.png", "0100.png"))
    with pytest.raises(RecipeError, match=r"'12' in the table is the file '0012\.png'.* zeros"):
        build(tmp_path, root)


def test_where_some_rows_have_no_image_the_likeness_is_said(tmp_path: Path, root: Path) -> None:
    write(root, with_images("one/a.png", "two/B.png", "c.png"))
    report = build(tmp_path, root)
    assert report.warnings[1].startswith("1 of 3 images of the tables are not below")
    assert "'two/B.png' in the table and the file 'two/b.png' differ in upper" in report.warnings[1]


# Numbers


@pytest.mark.parametrize(
    ("key", "own", "said"),
    [
        ("3", "0000003", "leading zeros"),
        ("0", "000", "leading zeros"),
        ("03", "0003", "leading zeros"),
        ("12.0", "12", ".0 after"),
        ("1.3E+20", "123456789012345678901", None),
        ("1.0E+3", "999", "rounded"),
        ("1E+999", "9" * 5000, None),
        ("1.2E+20", "120000000000000000001", "rounded"),
        ("1.23457E+11", "123456789012", "rounded"),
        ("1,23457E+11", "123456789012", "rounded"),
        ("1e5", "100000", "rounded"),
        ("123456789012345000", "123456789012345678", "15 digits"),
        ("12345678901234500", "123456789012345678", None),
        ("1.2.840.1", "1.2.840.10", None),
        ("", "0", None),
        ("7", "8", None),
    ],
)
def test_what_a_spreadsheet_does_to_numbers_is_told(key: str, own: str, said: str | None) -> None:
    found = find_shortened(["", "nothing", key], ["", "other", own])
    assert (found is None) == (said is None)
    if found and said:
        assert found[:2] == (key, own)
        assert said in found[2]


@settings(deadline=None)
@given(number=st.integers(10**11, 10**25), digits=st.integers(0, 14))
def test_every_number_that_is_written_shorter_is_known_again(number: int, digits: int) -> None:
    shown = f"{number:.{digits}E}"
    found = find_shortened([shown], ["1", str(number)])
    assert found
    assert found[:2] == (shown, str(number))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=8), max_size=5), st.lists(st.text(max_size=8), max_size=5))
def test_any_names_can_be_compared(values: list[str], files: list[str]) -> None:
    assert isinstance(compare_names(values, files, Path("/data/root")), str)


# Several rows of one image


def test_rows_that_say_the_same_count_once(tmp_path: Path, root: Path) -> None:
    again = [("a", *ROWS[0][1:]), ("b.png", *ROWS[1][1:]), ("b", *ROWS[1][1:])]
    write(root, [*ROWS, *again])
    report = build(tmp_path, root)
    assert len(report.manifest.rows) == 3
    assert report.notices[0] == (
        "3 rows of labels.csv only repeat another of the same image, and count once: "
        "one/a.png, two/b.png"
    )
    assert report.manifest.rows.equals(build(tmp_path, root, ANY).manifest.rows)
    assert len(build(tmp_path, root, structure_only=True).manifest.rows) == 6 - 3


def test_without_a_study_an_image_is_its_own_however_it_is_spelt(
    tmp_path: Path, root: Path
) -> None:
    write(root, [*ROWS, ("a", *ROWS[0][1:])])
    text = TABLE.replace('study = ["person", "exam"]', "")
    assert build(tmp_path, root, text).manifest.rows["study"].tolist() == sorted(FILES)


@pytest.mark.parametrize(
    ("findings", "label"),
    [
        (("none", "lesion"), 1),
        (("lesion", "none"), 1),
        (("none", "", "lesion"), 1),
        (("none", ""), None),
        (("none", "none"), 0),
        (("lesion", "fracture"), 1),
    ],
)
def test_rows_that_differ_in_label_combine_where_the_recipe_says_so(
    tmp_path: Path, root: Path, findings: tuple[str, ...], label: int | None
) -> None:
    rows = [(*ROWS[2][:4], finding, *ROWS[2][5:]) for finding in findings]
    write(root, [*ROWS[:2], *rows])
    combined = build(tmp_path, root, ANY)
    found = combined.manifest.rows["label"][0]
    assert found is pd.NA if label is None else found == label
    meanings = {"none": 0, "": None, "lesion": 1, "fracture": 1}
    if len({meanings[finding] for finding in findings}) == 1:
        assert len(build(tmp_path, root).manifest.rows) == 3
        return
    said = "1 image of labels.csv differ in label from row to row, abnormal if any row is"
    assert said in combined.notices[0]
    with pytest.raises(RecipeError, match=r'differ in label.* rows = "any" in \[table\]') as caught:
        build(tmp_path, root)
    words = {"none": "normal", "": "unknown", "lesion": "abnormal"}
    named = [f"{words[finding]} in row {4 + i}" for i, finding in enumerate(findings)]
    assert f"deep/c.png: {', '.join(named)}" in str(caught.value)
    assert "[exclude]" not in str(caught.value)


@pytest.mark.parametrize(
    ("column", "value", "named"),
    [
        ("person", "p9", "differ in patient"),
        ("set", "train", "differ in split"),
        ("part", "hand", "differ in region"),
        ("exam", "2", "differ in study"),
    ],
)
def test_rows_of_one_image_that_differ_otherwise_are_refused(
    tmp_path: Path, root: Path, column: str, value: str, named: str
) -> None:
    row = list(ROWS[2])
    row[HEADER.index(column)] = value
    write(root, [*ROWS, tuple(row)])
    for text in (TABLE, ANY):
        with pytest.raises(RecipeError, match=f"rows of one image {named}(.|\n)*deep/c.png: "):
            build(tmp_path, root, text)


def test_a_covariate_in_which_rows_differ_is_left_empty_or_refused(
    tmp_path: Path, root: Path
) -> None:
    write(root, [*ROWS, (*ROWS[2][:6], "41")])
    with pytest.raises(RecipeError, match=r"'40' in row 4, '41' in row 5") as caught:
        build(tmp_path, root)
    assert "Take age out of `covariates`" in str(caught.value)
    report = build(tmp_path, root, ANY)
    assert report.manifest.rows["age"].tolist() == ["", "31", "31"]
    assert "differ in age from row to row, now empty: deep/c.png" in report.notices[0]


def test_many_images_that_differ_are_twenty_lines_and_a_number(tmp_path: Path, root: Path) -> None:
    rows = [(f"{i // 2}.png", f"p{i // 2}", "1", "hand", ("none", "lesion")[i % 2], "train", "")
            for i in range(60)]  # fmt: skip
    root.mkdir()
    write(root, rows, ())
    with pytest.raises(RecipeError, match="… and 10 more of this kind") as caught:
        build(tmp_path, root, structure_only=True)
    assert str(caught.value).count("\n") == 21
    report = build(tmp_path, root, ANY, structure_only=True)
    assert report.manifest.rows["label"].tolist() == [1] * 30


def test_rows_without_an_image_are_not_one_image(tmp_path: Path, root: Path) -> None:
    write(root, [*ROWS, ("", "p7", "1", "hand", "none", "train", ""), ("", *ROWS[2][1:])])
    report = build(tmp_path, root)
    assert report.warnings[0].startswith("2 of 5 images of the tables are not below")
    assert len(report.manifest.rows) == 3


def test_a_path_that_muras_table_has_twice_counts_once(tmp_path: Path) -> None:
    base = tmp_path / "MURA-v1.1"
    base.mkdir()
    write_mura(base, {"train/XR_HAND/patient00001/study1_positive": [1, 2],
                      "valid/XR_HAND/patient00002/study1_negative": [3]})  # fmt: skip
    path = base / "train_image_paths.csv"
    path.write_text(path.read_text() * 2)
    report = build_manifest(load_recipe("mura"), base)
    assert len(report.manifest.rows) == 3
    assert "2 rows of MURA's tables only repeat" in report.notices[0]


def test_a_rule_that_is_none_is_refused(tmp_path: Path, root: Path) -> None:
    write(root, ROWS)
    with pytest.raises(RecipeError, match=r"\[table\]: rows must be 'equal' or 'any', not 'all'"):
        build(tmp_path, root, ANY.replace('"any"', '"all"'))
