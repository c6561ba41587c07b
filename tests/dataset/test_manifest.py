"""The manifest: same rows, same bytes; whatever breaks its rules is refused with its rows."""

import hashlib
import os
import re
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medembed.core.errors import ManifestError, PathNotFoundError
from medembed.dataset.manifest import (
    Manifest,
    check_images,
    count,
    find_problems,
    hash_files,
    image_path,
    make_manifest,
    read_contents,
    read_manifest,
    review_manifest,
    write_manifest,
)


def table(**changes: list[str]) -> pd.DataFrame:
    """Four images of two patients, two views a study, sound unless changed."""
    columns = {
        "image": ["b/1.png", "a/1.png", "a/2.png", "b/2.png"],
        "sha256": [f"{i:064x}" for i in range(4)],
        "patient": ["q", "p", "p", "q"],
        "study": ["q/1", "p/1", "p/1", "q/1"],
        "region": ["hand"] * 4,
        "label": ["1", "0", "0", "1"],
        "split": ["test", "train", "train", "test"],
        "age": ["12.50", "007", "", "NA"],
    }
    return pd.DataFrame({**columns, **changes}, dtype=str)


def problems_of(level: str = "study", **changes: list[str]) -> str:
    with pytest.raises(ManifestError) as caught:
        make_manifest(table(**changes), level)
    return "\n".join(caught.value.problems)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_manifest_read_back_has_the_same_rows_and_bytes(tmp_path: Path, suffix: str) -> None:
    manifest = make_manifest(table(label=["", "0", "0", ""]), "study")
    path = tmp_path / f"m{suffix}"
    write_manifest(manifest, path)
    again = read_manifest(path)
    pd.testing.assert_frame_equal(again.rows, manifest.rows)
    assert again.label_level == "study"
    assert again.digest() == manifest.digest()
    first = path.read_bytes()
    write_manifest(again, path)
    assert path.read_bytes() == first
    assert os.listdir(tmp_path) == [path.name]


def test_rows_are_sorted_and_the_csv_is_as_designed(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    manifest = make_manifest(table(), "study")
    write_manifest(manifest, path)
    lines = path.read_bytes().decode().split("\n")
    assert lines[0] == "image,sha256,patient,study,region,label,split,age,label_level"
    assert lines[1] == f"a/1.png,{1:064x},p,p/1,hand,0,train,007,study"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == manifest.digest()
    shuffled = table().sample(frac=1, random_state=1)
    assert make_manifest(shuffled, "study").digest() == manifest.digest()
    assert str(manifest.rows["label"].dtype) == "Int8"


text = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('",\r\n;\ufeff'))


@settings(deadline=None, max_examples=12)  # each writes and syncs two files
@given(names=st.lists(text, min_size=4, max_size=4), covariates=st.tuples(text, text, text, text))
def test_any_text_survives_csv_and_parquet(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], covariates: tuple[str, ...]
) -> None:
    images = [f"{i}_" + re.sub(r"[/\\\x00]", "", name) for i, name in enumerate(names)]
    rows = table(image=images, patient=["q" + names[0], "p", "p", "q" + names[0]])
    manifest = make_manifest(rows.assign(age=list(covariates)), "study")
    folder = tmp_path_factory.mktemp("text")
    for suffix in (".csv", ".parquet"):
        write_manifest(manifest, folder / f"m{suffix}")
        again = read_manifest(folder / f"m{suffix}")
        pd.testing.assert_frame_equal(again.rows, manifest.rows)
        assert again.digest() == manifest.digest()


def test_a_parquet_file_of_other_writers_is_read(tmp_path: Path) -> None:
    other = table().assign(label=[1.0, 0.0, None, 1.0], patient=[2, 1, 1, 2], label_level="image")
    other["age"] = [12.5, None, 3.0, 4.0]
    other.to_parquet(tmp_path / "m.parquet")
    rows = read_manifest(tmp_path / "m.parquet").rows
    assert rows["label"].tolist() == [0, pd.NA, 1, 1]
    assert rows["patient"].tolist() == ["1", "1", "2", "2"]
    assert rows["age"].tolist() == ["", "3.0", "12.5", "4.0"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_contents_are_the_two_columns_that_say_what_is_cached(tmp_path: Path, suffix: str) -> None:
    manifest = make_manifest(table(), "study")
    path = tmp_path / f"m{suffix}"
    write_manifest(manifest, path)
    pd.testing.assert_frame_equal(read_contents(path), manifest.rows[["image", "sha256"]])


@pytest.mark.parametrize(
    ("column", "values", "complaint"),
    [
        ("sha256", ["x", *[f"{n:064x}" for n in range(3)]], "is not 64 lower-case hex digits"),
        ("image", ["a/../b.png", "c.png", "d.png", "e.png"], "may leave the image root"),
        ("image", ["c.png", "d.png", "e.png", "c.png"], "is listed twice"),
        (None, [], "missing columns: sha256"),
    ],
)
def test_contents_that_break_the_rules_are_refused(
    tmp_path: Path, column: str | None, values: list[str], complaint: str
) -> None:
    rows = table().assign(**{column: values}) if column else table().drop(columns="sha256")
    rows.to_parquet(tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match=r"m\.parquet") as caught:
        read_contents(tmp_path / "m.parquet")
    assert complaint in str(caught.value)


def test_a_patient_in_two_splits_is_refused_with_rows() -> None:
    found = problems_of(split=["test", "train", "test", "test"])
    assert found == (
        "patient 'p' is in more than one split: test (a/2.png, row 4), train (a/1.png, row 3)"
    )


def test_a_study_with_two_labels_is_refused_only_at_study_level() -> None:
    mixed = ["1", "0", "1", "1"]
    assert "study 'p/1' has more than one label: 0 (a/1.png, row 3)" in problems_of(label=mixed)
    assert count(make_manifest(table(label=mixed), "image"))["abnormal_studies"] == 2


def test_the_same_bytes_in_two_splits_or_with_two_labels_are_refused() -> None:
    same = ["a" * 64, "a" * 64, "b" * 64, "c" * 64]
    found = problems_of(sha256=same)
    assert "the same bytes are in more than one split: test (b/1.png, row 2), train" in found
    assert "the same bytes have more than one label: 0 (a/1.png, row 3), 1 (b/1.png" in found


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../a.png", "a/../../b.png", "C:/a.png", "c:a.png", "a\\b.png", "a/.."],
)
def test_a_path_that_may_leave_the_root_is_refused(name: str) -> None:
    found = problems_of(image=[name, "a", "b", "c"])
    assert f"row 2: image {name!r} may leave the image root" in found


@pytest.mark.parametrize("name", ["", "./a.png", "a//b.png", "a/", "a/./b.png", "a\x00b"])
def test_a_path_that_is_not_plain_is_refused(name: str) -> None:
    assert f"row 2: image {name!r} is not a plain path" in problems_of(image=[name, "x", "y", "z"])


@pytest.mark.parametrize("name", ["a..b.png", "...png", ".hidden/a.png", "ab:c.png", "ü é/1.png"])
def test_odd_but_safe_paths_are_accepted(name: str) -> None:
    assert len(make_manifest(table(image=[name, "a", "b", "c"]), "study").rows) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": ["2", "0", "0", "2"]}, "label '2' is neither 0, 1 nor empty (rows 2, 5)"),
        ({"split": ["valid", "train", "train", "valid"]}, "split 'valid' is neither train nor"),
        ({"image": ["a", "a", "b", "c"]}, "image 'a' is listed twice (rows 2, 3)"),
        ({"sha256": ["A" * 64, "b" * 64, "c" * 64, "d" * 64]}, "is not 64 lower-case hex digits"),
        ({"sha256": ["", "b" * 64, "c" * 64, "d" * 64]}, "row 2: sha256 '' is not 64"),
        ({"patient": ["q", "", "", "q"]}, "patient is empty (rows 3, 4)"),
        ({"study": ["", "p/1", "p/1", ""]}, "study is empty (rows 2, 5)"),
        ({"study": ["s"] * 4}, "study 's' belongs to several patients: p (a/1.png, rows 3, 4)"),
        ({"region": ["hand", "hand", "wrist", "hand"]}, "study 'p/1' shows several regions"),
    ],
)
def test_each_broken_rule_is_named(changes: dict[str, list[str]], message: str) -> None:
    assert message in problems_of(**changes)


def test_all_problems_are_listed_at_once_and_capped() -> None:
    n = 50
    rows = pd.DataFrame(
        {
            "image": [f"../{i:02d}" for i in range(n)],
            "sha256": ["x"] * n,
            "patient": ["p"] * n,
            "study": ["s"] * n,
            "region": ["hand"] * n,
            "label": ["0"] * (n - 1) + ["7"],
            "split": ["train", "test"] * (n // 2),
        }
    )
    with pytest.raises(ManifestError) as caught:
        make_manifest(rows, "neither", source="m.csv")
    problems = caught.value.problems
    assert sum("may leave" in line for line in problems) == 20
    assert problems.count("… and 30 more of this kind") == 2
    assert any(line.startswith("label '7'") for line in problems)
    assert any("'neither'" in line for line in problems)
    assert any("patient 'p' is in more than one split" in line for line in problems)
    assert str(caught.value).startswith("m.csv breaks the rules of a manifest")


def test_find_problems_sees_what_was_changed_after_building() -> None:
    manifest = make_manifest(table(), "study")
    assert find_problems(manifest) == []
    manifest.rows.loc[0, "split"] = "test"
    assert len(find_problems(manifest)) == 1


def test_an_unsound_manifest_is_not_written(tmp_path: Path) -> None:
    manifest = make_manifest(table(), "study")
    broken = Manifest(manifest.rows.assign(split="valid"), "study")
    with pytest.raises(ManifestError):
        write_manifest(broken, tmp_path / "m.csv")
    assert list(tmp_path.iterdir()) == []


def test_missing_columns_are_named_together(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    table().drop(columns=["patient", "split"]).to_csv(path, index=False)
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    text = str(caught.value)
    assert "missing column: label_level" in text
    assert "missing columns: patient, split; the columns are 'image'" in text


def test_a_label_level_that_changes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    table().assign(label_level=["study", "image", "study", "study"]).to_csv(path, index=False)
    with pytest.raises(ManifestError, match="label_level must hold one value, not image, study"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "m.csv is empty"),
        (b"\xff\xfe\x00", "cannot be read as CSV"),
        (b"image,image\na,b\n", "two columns of one name: 'image'"),
        (
            b"image,split\na,train\nb\n",
            "1 rows with more or fewer fields than the 2 columns; .* row 3, with 1",
        ),
        (b"image,split\na,train,x\n", "row 2, with 3"),
        (b'image,split\n"a,train\n', "cannot be read as CSV"),
        (b"image,split\n", "missing columns"),
    ],
)
def test_a_file_that_is_no_manifest_is_one_error(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(content)
    with pytest.raises(ManifestError, match=message):
        read_manifest(path)
    parquet = tmp_path / "m.parquet"
    parquet.write_bytes(content)
    with pytest.raises(ManifestError, match="cannot be read as Parquet"):
        read_manifest(parquet)


def test_a_csv_saved_by_a_spreadsheet_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    manifest = make_manifest(table(), "study")
    write_manifest(manifest, path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_manifest(path).digest() == manifest.digest()


def test_a_missing_manifest_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(PathNotFoundError, match=r"no manifest at .*medembed manifest build"):
        read_manifest(tmp_path / "none.csv")


def test_counts_tell_images_from_studies_and_unlabelled() -> None:
    manifest = make_manifest(table(label=["1", "", "0", "1"]), "image")
    assert count(manifest) == {
        "images": 4,
        "studies": 2,
        "patients": 2,
        "abnormal": 2,
        "abnormal_studies": 1,
        "unlabelled": 1,
    }


def test_hashes_are_those_of_hashlib_in_order_and_reported(tmp_path: Path) -> None:
    paths = []
    for i in range(150):
        path = tmp_path / f"{i}.bin"
        path.write_bytes(bytes([i]) * (i * 31))
        paths.append(path)
    seen: list[tuple[int, int]] = []
    found = hash_files(paths, lambda done, total: seen.append((done, total)), jobs=3)
    assert found == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert seen == [(64, 150), (128, 150), (150, 150)]


def test_large_files_are_hashed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medembed.images.hashing.WHOLE_FILE_LIMIT", 10)
    path = tmp_path / "large"
    path.write_bytes(b"x" * 1000)
    assert hash_files([path]) == [hashlib.sha256(b"x" * 1000).hexdigest()]


def test_a_file_that_cannot_be_hashed_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    with pytest.raises(PathNotFoundError, match=r"no file at .*gone"):
        hash_files([tmp_path / "a", tmp_path / "gone"])
    with pytest.raises(ManifestError, match=r"cannot be read: it is a directory"):
        hash_files([tmp_path])


def images_below(root: Path) -> Manifest:
    hashes = []
    for name in table()["image"]:
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode())
        hashes.append(hashlib.sha256(name.encode()).hexdigest())
    return make_manifest(table(sha256=hashes), "study")


def test_check_images_names_missing_changed_and_outside_files(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    manifest = images_below(root)
    assert check_images(manifest, root) == []
    (root / "a/1.png").unlink()
    (root / "b/1.png").write_bytes(b"other")
    (root / "b/2.png").unlink()
    (tmp_path / "outside.png").write_bytes(b"")
    (root / "b/2.png").symlink_to(tmp_path / "outside.png")
    found = check_images(manifest, root)
    assert len(found) == 3
    assert any(line == "a/1.png is missing" for line in found)
    assert any(
        line.startswith("b/1.png is not the manifest's: its sha256 begins") for line in found
    )
    assert any(line.startswith("image 'b/2.png' leads out of the image root") for line in found)


def test_a_review_lists_problems_of_rows_or_else_of_images(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    write_manifest(images_below(tmp_path), path)
    assert review_manifest(path).problems == review_manifest(path, tmp_path).problems == []
    (tmp_path / "a/1.png").unlink()
    assert review_manifest(path).problems == []
    assert review_manifest(path, tmp_path).problems == ["a/1.png is missing"]
    path.write_text(path.read_text().replace("train", "valid"))
    assert len(review_manifest(path, tmp_path).problems) == 1
    path.write_bytes(b"")
    with pytest.raises(ManifestError, match="is empty"):
        review_manifest(path)


def test_without_hashes_only_presence_is_checked(tmp_path: Path) -> None:
    manifest = images_below(tmp_path)
    bare = Manifest(manifest.rows.assign(sha256=""), "study")
    assert not bare.has_hashes
    assert check_images(bare, tmp_path) == []
    (tmp_path / "a/1.png").unlink()
    assert check_images(bare, tmp_path) == ["a/1.png is missing"]


def test_a_missing_image_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(PathNotFoundError, match=r"no directory at .*nowhere.*--image-root"):
        check_images(make_manifest(table(), "study"), tmp_path / "nowhere")


def test_image_path_stays_below_the_root(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert image_path(tmp_path, "a/b.png") == tmp_path.resolve() / "a/b.png"
    for name in ("../x", "/etc/passwd", "", "a/../.."):
        with pytest.raises(ManifestError, match="leads out of the image root"):
            image_path(tmp_path, name)
