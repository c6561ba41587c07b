"""Folders, tables and DICOM trees as people have them, each to a recipe that builds."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pandas as pd
import pytest
from made_dicom import dicom
from PIL import Image

import medembed as me
from medembed.core.errors import PathNotFoundError, RecipeError
from medembed.dataset.recipes.choices import Choices, Proposal, UndecidedError
from medembed.dataset.recipes.proposals import build_proposal, propose_recipe
from medembed.dataset.recipes.schema import parse_recipe
from medembed.dataset.recipes.table_proposals import choose_fraction

COLUMNS = ("Bild", "Patienten-Nr", "Körperteil", "Größe", "Befund", "Nachname")


def put(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((4, 4), value % 256, np.uint8)
    pixels[0, 0] = value // 256
    Image.fromarray(pixels).save(path)


def fill(root: Path, folders: dict[str, int], name: str = "{i}.png") -> Path:
    """Make images by folder, each other than all others."""
    i = 0
    for folder, n in folders.items():
        for _ in range(n):
            put(root / folder / name.format(i=i, half=i // 2, odd=i % 2), i)
            i += 1
    return root


def build(proposal: Proposal, **options: Any) -> pd.DataFrame:
    return build_proposal(proposal, **options).manifest.rows


@pytest.fixture
def german(tmp_path: Path) -> list[tuple[str, ...]]:
    """Rows of a table of 40 films of 20 patients, and the films."""
    rows = []
    for i in range(40):
        put(tmp_path / f"films/Röntgen {i:02d}.png", i)
        finding = ("unauffällig", "auffällig")[i // 2 % 2]
        size = f"{150 + i / 2:.1f}".replace(".", ",")
        rows.append((f"Röntgen {i:02d}.png", f"{i // 2:03d}", ("Hüfte", "Knie")[i % 2], size,
                     finding, "Meier"))  # fmt: skip
    return rows


# --- folders ---


@pytest.mark.parametrize(
    ("folders", "pattern", "abnormal"),
    [
        ({"Fractured": 9, "Non_fractured": 9}, "{label}/*", ["Fractured"]),
        ({"images/normal": 9, "images/abnormal": 9}, "images/{label}/*", ["abnormal"]),
        (
            {"train/NORMAL": 9, "train/PNEUMONIA": 9, "val/NORMAL": 2, "val/PNEUMONIA": 2},
            "{split}/{label}/*",
            ["PNEUMONIA"],
        ),
        ({"a b{1}/no": 5, "a b{1}/yes": 5}, "*/{label}/*", ["yes"]),
        ({"hand/ok/no": 3, "knee/x/yes": 3, "hand/z/yes": 3}, "{region}/*/{label}/*", ["yes"]),
        ({"no/2020": 5, "yes/2020/may": 5}, "{label}/2020/**/*", ["yes"]),
        (
            {f"{k}/patient{i}/study1": 2 for i in range(9) for k in ("neg", "pos")},
            "{label}/{patient}/{study}/*",
            ["pos"],
        ),
    ],
)
def test_levels_of_folders_are_told_apart(
    tmp_path: Path, folders: dict[str, int], pattern: str, abnormal: list[str]
) -> None:
    proposal = propose_recipe(fill(tmp_path / "films", folders))
    assert proposal.recipe.folders is not None
    assert proposal.recipe.folders.pattern == pattern
    rows = build(proposal)
    assert len(rows) == sum(folders.values())
    assert rows["label"].sum() == sum(
        n for f, n in folders.items() if set(abnormal) & {*f.split("/")}
    )
    assert set(rows["split"]) == {"train", "test"}


def test_folders_whose_names_say_nothing_are_asked_about_by_name(tmp_path: Path) -> None:
    root = fill(tmp_path / "films", {"KL0": 6, "KL3": 6, "KL4": 6})
    with pytest.raises(
        UndecidedError, match=r"films holds 'KL0' \(6\), 'KL3' .* --abnormal"
    ) as caught:
        propose_recipe(root, kind="folders")
    assert (caught.value.choice, caught.value.answers) == ("abnormal", ("KL0", "KL3", "KL4"))
    rows = build(propose_recipe(root, abnormal=["KL3", "KL4"]))
    assert rows["label"].sum() == 12
    with pytest.raises(RecipeError, match=r"'KL9' does not occur: .*|no folder 'KL9'"):
        propose_recipe(root, abnormal="KL9")
    with pytest.raises(RecipeError, match=r"'KL4' is neither --normal nor --abnormal"):
        propose_recipe(root, normal="KL0", abnormal="KL3")


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        ({}, "no image below"),
        ({".": 4}, "holds 4 images, such as '0.png', and no folder for each class"),
        ({"images": 4}, r"are not classes of images: 'images' \(4\).*--pattern"),
    ],
)
def test_folders_that_are_no_classes_say_so(
    tmp_path: Path, folders: dict[str, int], said: str
) -> None:
    (tmp_path / "films").mkdir()
    with pytest.raises(RecipeError, match=said):
        propose_recipe(fill(tmp_path / "films", folders))


def test_patients_in_names_of_files_are_pointed_at_and_taken(tmp_path: Path) -> None:
    root = fill(tmp_path / "films", {"no": 20, "yes": 20}, "p{half:03d}_{odd}.png")
    proposal = propose_recipe(root)
    (warning,) = proposal.warnings
    assert "each image counts as a patient" in warning
    assert "add --pattern '{label}/{patient}_*'" in warning
    with pytest.raises(RecipeError, match=r"--strict refuses(.|\n)*each image counts as a patient"):
        build_proposal(proposal, strict=True)
    assert build_proposal(proposal).warnings == [warning]
    taken = propose_recipe(root, pattern="{label}/{patient}_*")
    assert taken.warnings == []
    assert build(taken)["patient"].nunique() == 20
    with pytest.raises(RecipeError, match="fits the pattern"):
        propose_recipe(root, pattern="{label}/{patient}-{view}/*")


# --- tables ---


def write_table(path: Path, rows: list[tuple[str, ...]]) -> None:
    if path.suffix == ".xlsx":
        book = openpyxl.Workbook()
        for row in (COLUMNS, *rows):
            book.active.append(row)
        book.save(path)
    elif path.suffix == ".parquet":
        pd.DataFrame(rows, columns=pd.Index(COLUMNS)).to_parquet(path)
    else:
        text = "\r\n".join(";".join(row) for row in (COLUMNS, *rows)) + "\r\n"
        path.write_bytes(text.encode("utf-16" if path.stem == "u" else "cp1252"))


@pytest.mark.parametrize("name", ["t.csv", "u.csv", "t.tsv", "t.xlsx", "t.parquet"])
def test_a_german_table_becomes_a_recipe_in_every_form(
    tmp_path: Path, german: list[tuple[str, ...]], name: str
) -> None:
    write_table(tmp_path / name, german)
    proposal = propose_recipe(tmp_path / name)
    recipe = proposal.recipe
    assert recipe.table is not None
    assert (recipe.table.image, recipe.table.patient) == ("Bild", ("Patienten-Nr",))
    assert recipe.table.covariates == ("Größe",)  # and nobody's name
    rows = build(proposal)
    assert set(rows["region"]) == {"Hüfte", "Knie"}
    assert (len(rows), rows["patient"].nunique(), rows["label"].sum()) == (40, 20, 20)
    assert rows["Größe"].tolist()[:2] == ["150.0", "150.5"]
    path = tmp_path / "recipe.toml"
    path.write_text(proposal.text, encoding="utf-8")
    assert parse_recipe(path).model_dump() == recipe.model_dump()
    again = me.build_manifest(path, tmp_path).manifest
    assert again.rows.equals(rows)


def test_a_folder_with_a_table_beside_the_films_is_known_by_its_table(
    tmp_path: Path, german: list[tuple[str, ...]]
) -> None:
    write_table(tmp_path / "befunde.csv", german)
    (tmp_path / "notes.txt").write_text("nothing,here\n1,2\n")
    proposal = propose_recipe(tmp_path)
    assert proposal.recipe.table is not None
    assert proposal.recipe.table.file == ("befunde.csv",)
    assert proposal.recipe.name == tmp_path.name


def csv(path: Path, *lines: str) -> Path:
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return path


def test_a_label_that_is_not_clear_is_asked_for(tmp_path: Path) -> None:
    fill(tmp_path, {"films": 8})
    table = csv(tmp_path / "t.csv", "file,left,right,grade", *(f"{i}.png,{i % 2},{i // 4},{i % 3}"
                                                                for i in range(8)))  # fmt: skip
    with pytest.raises(
        UndecidedError, match=r"which column .*--label(.|\n)*'left': '0' \(4\)"
    ) as e:
        propose_recipe(table)
    assert (e.value.choice, e.value.answers) == ("label", ("left", "right"))
    with pytest.raises(UndecidedError, match=r"column 'grade' .* '2' \(2\).*--abnormal"):
        propose_recipe(table, label="grade")
    proposal = propose_recipe(table, label="grade", normal="0")
    assert proposal.recipe.label is not None
    assert set(proposal.recipe.label.abnormal) == {"1", "2"}
    with pytest.raises(RecipeError, match="no column 'grad'; its columns are 'file', 'left'"):
        propose_recipe(table, label="grad")


def test_a_table_that_names_no_film_says_which_there_are(tmp_path: Path) -> None:
    table = csv(tmp_path / "t.csv", "file,label", "a.jpg,0", "b.jpg,1")
    with pytest.raises(RecipeError, match=r"no image below .*--image-root"):
        propose_recipe(table)
    fill(tmp_path, {"films": 2}, "x{i}.png")
    with pytest.raises(UndecidedError, match=r"names images below .* the first is 'films/x0.png'"):
        propose_recipe(table)
    with pytest.raises(RecipeError, match=r"None of the tables there names the images: t.csv"):
        propose_recipe(tmp_path)


def test_a_table_of_paths_elsewhere_says_what_differs(tmp_path: Path) -> None:
    root = fill(tmp_path / "films", {f"p{k}": 2 for k in range(4)}, "im{odd}.png")
    for prefix, said in (
        (
            "films/",
            rf"'films/p0/im0\.png' .* file 'p0/im0\.png' .* --image-root {tmp_path} instead",
        ),
        (r"C:\data/", r"'p0/im0\.png' differ in their folders. Take 'C:/data/' off the paths"),
    ):
        lines = (f"{prefix}p{i // 2}/im{i % 2}.png,{i % 2}" for i in range(8))
        with pytest.raises(UndecidedError, match=said):
            propose_recipe(csv(tmp_path / "t.csv", "file,label", *lines), root)
    lines = (f"p{i // 2}/im{i % 2}.png,{i}" for i in range(8))
    with pytest.raises(
        UndecidedError, match=r"looks like a label, .* 'file', 'age'\. Name the label"
    ):
        propose_recipe(csv(tmp_path / "t.csv", "file,age", *lines), root, test_fraction=0.5)


def test_tables_by_split_studies_and_rows_of_boxes(tmp_path: Path) -> None:
    fill(tmp_path, {"films": 24}, "f{i}.png")
    for split, first in (("train", 0), ("test", 16)):
        n = 16 if split == "train" else 8
        lines = [f"f{i},s{i // 2},{('No finding', 'Osteophytes')[i // 2 % 2]}"
                 for i in range(first, first + n)]  # fmt: skip
        csv(tmp_path / f"{split}.csv", "image_id,study_id,lesion_type", *lines, lines[2])
    proposal = propose_recipe(tmp_path)
    table = proposal.recipe.table
    assert table is not None
    assert (table.file, table.file_column) == (("test.csv", "train.csv"), "table")
    assert (table.rows, table.study, table.patient) == ("any", ("study_id",), ("study_id",))
    assert "each study counts as a patient" in proposal.warnings[0]
    assert proposal.recipe.label_level == "study"
    rows = build(proposal)
    assert rows["split"].value_counts().to_dict() == {"train": 16, "test": 8}
    assert rows["study"].nunique() == 12


def test_rows_that_name_folders_speak_of_all_films_in_them(tmp_path: Path) -> None:
    fill(tmp_path, {f"p{k}/ST-1": 2 for k in range(12)})
    table = csv(tmp_path / "t.csv", "patient,label", *(f"p{k},{k % 2}" for k in range(12)))
    rows = build(propose_recipe(table))
    assert len(rows) == 24
    assert rows.groupby("patient")["label"].nunique().eq(1).all()
    assert rows["patient"].nunique() == 12


def test_grades_that_are_also_names_of_files_are_not_the_image(tmp_path: Path) -> None:
    fill(tmp_path, {"films": 8})
    lines = (f"{i % 4},{i}.png,{('no', 'yes')[i % 2]}" for i in range(8))
    proposal = propose_recipe(csv(tmp_path / "t.csv", "grade,film,broken", *lines))
    assert proposal.settled["image"] == "film"


def test_a_column_of_ones_and_blanks_is_a_finding(tmp_path: Path) -> None:
    fill(tmp_path, {"films": 12})
    lines = (f"{i}.png,{'1' if i % 2 else ''},{i // 2}" for i in range(12))
    proposal = propose_recipe(csv(tmp_path / "t.csv", "file,fracture,patient", *lines))
    assert "an empty field was taken for normal" in proposal.text
    assert build(proposal)["label"].tolist().count(0) == 6


def test_what_tells_the_label_by_itself_is_no_covariate(tmp_path: Path) -> None:
    fill(tmp_path, {"films": 12})
    lines = (f"{i}.png,{i % 2},{i % 2 * 3},{i % 3}" for i in range(12))
    proposal = propose_recipe(csv(tmp_path / "t.csv", "file,fracture,n_lines,device", *lines))
    assert proposal.recipe.table is not None
    assert proposal.recipe.table.covariates == ("device",)
    assert "'n_lines' reveals the label and was left out" in proposal.notices[0]


def test_columns_that_answer_by_yes_or_no_become_targets(tmp_path: Path) -> None:
    fill(tmp_path, {"": 24})
    lines = [
        f"{i}.png,p{i},{('fracture', 'normal')[i % 2]},{i % 3 // 2},{'ja' if i % 4 > 1 else ''},"
        f"{('1.0', '0.0', '-1.0', '')[i // 2 % 4]},{'MF'[i // 3 % 2]},{i}"
        for i in range(24)
    ]
    path = csv(tmp_path / "films.csv", "film,patient,finding,Cast,Größe-OP,edema,sex,age", *lines)
    proposal = propose_recipe(path)
    assert proposal.settled["targets"] == "cast, grosse_op, edema"
    assert any("taken to mean no in grosse_op" in notice for notice in proposal.notices)
    rows = build(proposal)
    assert rows["target_cast"].tolist() == rows["Cast"].tolist()
    assert set(rows["target_grosse_op"]) == {"0", "1"}
    assert rows["target_edema"].value_counts().to_dict() == {"": 12, "1": 6, "0": 6}
    assert not build(propose_recipe(path, covariates=())).columns.str.startswith("target_").any()


def test_hostile_names_come_back_from_the_recipe(tmp_path: Path) -> None:
    column = 'fi"le\\ #[x]\u202e = 1'
    root = fill(tmp_path / 'fi"lms\n[split]\x1b[31m', {"no": 4, "yes": 4})
    files = (f"{k}/{i + 4 * (k == 'yes')}.png" for k in ("no", "yes") for i in range(4))
    lines = [f"{f},{f[0]}" for f in files]
    table = root / "t.csv"
    quoted = column.replace('"', '""')
    table.write_text("\n".join([f'"{quoted}",label', *lines, ""]), encoding="utf-8")
    proposal = propose_recipe(table, label="label")
    assert proposal.recipe.table is not None
    assert proposal.recipe.table.image == column
    assert proposal.recipe.split is not None
    assert proposal.recipe.split.fraction == 0.4
    assert len(build(proposal)) == 8
    assert "\x1b" not in proposal.text
    (tmp_path / "bad").mkdir()
    with pytest.raises(RecipeError, match="Unicode"):
        propose_recipe(fill(tmp_path / "bad", {"no": 1, "yes\udcff": 1}))


def test_enough_patients_are_drawn_for_test_where_there_are() -> None:
    assert choose_fraction(1000, 300) == 0.2
    assert choose_fraction(66, 33) == 0.4
    assert choose_fraction(80, 40) == 0.3
    assert choose_fraction(60, 55) == choose_fraction(60, 0) == 0.4
    assert choose_fraction(10, 5) == 0.4  # too few whatever is drawn


# --- DICOM, and others ---


def dicom_tree(root: Path, n: int = 12) -> None:
    generator = np.random.default_rng(0)
    for i in range(n):
        path = root / f"ward{i % 2}" / f"{i:08X}"
        path.parent.mkdir(parents=True, exist_ok=True)
        own = {"PatientID": f"P{i // 2}", "StudyInstanceUID": f"1.2.3.{i // 2}",
               "SOPInstanceUID": f"1.2.3.4.{i}", "BodyPartExamined": "WRIST"}  # fmt: skip
        path.write_bytes(dicom(generator.integers(0, 4096, (8, 8), dtype=np.uint16), **own))


def test_dicom_files_are_joined_with_the_table_of_their_studies(tmp_path: Path) -> None:
    dicom_tree(tmp_path / "pacs")
    proposal = propose_recipe(tmp_path / "pacs")
    assert proposal.recipe.layout == "dicom"
    assert "nothing can be trained" in proposal.warnings[0]
    assert build(proposal)["label"].isna().all()
    csv(tmp_path / "pacs/t.csv", "Study UID;Befund", *(f"1.2.3.{k};{'ja' if k % 2 else 'nein'}"
                                                       for k in range(6)))  # fmt: skip
    proposal = propose_recipe(tmp_path / "pacs/t.csv")
    spec = proposal.recipe.dicom
    assert spec is not None
    assert (spec.column, spec.match, proposal.recipe.label_level) == ("Study UID", "study", "study")
    assert build(proposal)["label"].sum() == 6


def test_what_is_not_there_or_of_the_wrong_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(PathNotFoundError, match="films does not exist"):
        propose_recipe(tmp_path / "films")
    with pytest.raises(RecipeError, match="is a folder"):
        propose_recipe(tmp_path, kind="table")
    with pytest.raises(RecipeError, match="is a file"):
        propose_recipe(csv(tmp_path / "t.csv", "a"), kind="folders")


def test_without_guesses_no_column_has_a_role_that_was_not_given() -> None:
    open_ones = Choices(label="x", patient=("p",)).without_guesses()
    assert (open_ones.patient, open_ones.study, open_ones.region) == (("p",), (), "")
    assert (open_ones.image, open_ones.covariates) == (None, ())


# --- real films ---


def test_real_films_become_manifests_without_a_question(shared_data: Path, tmp_path: Path) -> None:
    films = propose_recipe(shared_data / "fracatlas")
    assert films.recipe.region is not None
    assert films.recipe.region.one_hot == ("hand", "leg", "hip", "shoulder", "mixed")
    assert films.recipe.label is not None
    assert films.recipe.label.column == "fractured"
    assert any("a recipe for that: fracatlas" in notice for notice in films.notices)
    assert build(films)["label"].sum() == 33
    folders = propose_recipe(shared_data / "fracatlas", kind="folders")
    assert build(folders)["label"].sum() == 33
    chest = build(propose_recipe(shared_data / "nih"))
    assert (len(chest), chest["patient"].nunique()) == (736, 508)
    wrists = propose_recipe(shared_data / "grazpedwri")
    assert wrists.recipe.table is not None
    assert wrists.recipe.table.study == ("patient_id", "study_number")
    shutil.copytree(shared_data / "dicom", tmp_path / "dicom")
    assert propose_recipe(tmp_path / "dicom").recipe.layout == "dicom"


@pytest.mark.parametrize("value", ["0", "normal", "benign", "no fracture"])
def test_a_column_of_normal_and_blanks_is_no_finding(value: str, tmp_path: Path) -> None:
    fill(tmp_path, {"films": 12})
    lines = (f"{i}.png,{value if i % 2 else ''},{i // 2}" for i in range(12))
    table = csv(tmp_path / "t.csv", "file,fracture,patient", *lines)
    with pytest.raises(UndecidedError, match=f"no value means abnormal.*--normal '{value}'"):
        propose_recipe(table, label="fracture")


def test_a_column_of_unknown_and_blanks_is_no_finding(tmp_path: Path) -> None:
    fill(tmp_path, {"films": 12})
    lines = (f"{i}.png,{'unclear' if i % 2 else ''},{i // 2}" for i in range(12))
    table = csv(tmp_path / "t.csv", "file,fracture,patient", *lines)
    with pytest.raises(UndecidedError, match="what is abnormal cannot be told"):
        propose_recipe(table, label="fracture")
