"""Targets of recipes: the values of further columns become `target_NAME`."""

from pathlib import Path

import pandas as pd
import pytest
from made_dicom_tree import LABEL, put
from made_dicom_tree import build as build_dicom
from made_recipes import FOLDERS, TABLE, build, folder_tree, image, recipe_of

from medembed.core.errors import RecipeError
from medembed.dataset.recipes.build import build_manifest, find_recipes, load_recipe
from medembed.dataset.recipes.schema import make_recipe


def build_answers(folder: Path, answers: list[str], target: str) -> "pd.DataFrame":
    """Build with a table whose column `answer` holds these fields, one per image."""
    root = folder / "root"
    rows = ["file,person,exam,part,finding,set,age,answer"]
    for i, answer in enumerate(answers):
        image(root / f"{i}.png", i)
        rows.append(f'{i}.png,p{i},1,hand,none,train,31,"{answer}"')
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return build(folder, root, f'{TABLE}\n[targets.metal]\ncolumn = "answer"\n{target}')


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ('positive = ["1"]\nnegative = ["0"]\nothers = "unknown"', ["1", "0", "", ""]),
        ('abnormal = ["1"]\nnormal = ["0", "-1"]\nempty = "normal"', ["1", "0", "0", "0"]),
        ('positive = ["1"]\nothers = "negative"\nempty = "positive"', ["1", "0", "0", "1"]),
        *(
            (
                'positive = ["1"]\nnegative = ["0"]\nuncertain_values = ["-1"]\n'
                f'uncertain = "{policy}"',
                ["1", "0", answer, ""],
            )
            for policy, answer in {"ignore": "", "positive": "1", "negative": "0"}.items()
        ),
    ],
)
def test_values_become_answers(tmp_path: Path, target: str, expected: list[str]) -> None:
    report = build_answers(tmp_path, ["1", "0", "-1", ""], target)
    assert report.manifest.rows["target_metal"].tolist() == expected
    found = report.as_dict()["targets"]["metal"]
    assert found["positive"] == expected.count("1")
    assert any(notice.startswith("target metal: ") for notice in report.notices)


def test_a_field_of_several_values_is_positive_if_any_is(tmp_path: Path) -> None:
    fields = ["['plate', ' screw']", "[' wire']", "['exclude','wire']", "['exclude', 'plate']", ""]
    target = (
        'separator = ","\npositive = ["plate"]\nothers = "negative"\nuncertain_values = ["exclude"]'
    )
    rows = build_answers(tmp_path, fields, target).manifest.rows
    assert rows["target_metal"].tolist() == ["1", "0", "", "1", ""]


def test_each_value_against_the_rest(tmp_path: Path) -> None:
    rows = build_answers(tmp_path, ["Plate 3", "wire", "", "wire"], "each_value = true")
    rows = rows.manifest.rows
    assert rows["target_metal_plate_3"].tolist() == ["1", "0", "", "0"]
    assert rows["target_metal_wire"].tolist() == ["0", "1", "", "1"]
    assert "target_metal" not in rows


@pytest.mark.parametrize(
    ("answers", "target", "words"),
    [
        (["1", "7"], 'positive = ["1"]\nnegative = ["0"]', r"\[targets.metal\] does not know"),
        (["1"], 'positive = ["1"]\nnegative = ["1"]', "two meanings"),
        (["a b", "A-b"], "each_value = true", "metal_a_b: 'A-b', 'a b'"),
        ([str(i) for i in range(65)], "each_value = true", "65 values in column 'answer'"),
        (["1"], 'positive = ["1"]', "lists no negative value"),
        (["1"], 'negative = ["1"]', "lists no positive value"),
        (["1"], 'positive = ["1"]\neach_value = true', "has each_value"),
        (["1"], 'positiv = ["1"]', "did you mean 'positive'"),
        (
            ["1"],
            'each_value = true\n[targets.Metal]\ncolumn = "a"\neach_value = true',
            "'Metal' names no target",
        ),
        (
            ["1"],
            'each_value = true\n[targets.label]\ncolumn = "a"\neach_value = true',
            "manifest's own label",
        ),
        (
            ["1"],
            'each_value = true\n[targets.cast]\ncolumn = "a"\neach_value = true',
            "has no column 'a'",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, answers: list[str], target: str, words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        build_answers(tmp_path, answers, target)


def test_a_word_that_only_others_explains_is_a_warning(tmp_path: Path) -> None:
    report = build_answers(
        tmp_path, ["yes", "Yes", "no"], 'positive = ["yes"]\nothers = "negative"'
    )
    [warning] = [own for own in report.warnings if "targets.metal" in own]
    assert "'Yes' in 1 rows looks like 'yes'" in warning


def test_rows_of_one_image_combine_to_any(tmp_path: Path) -> None:
    image(tmp_path / "root/a.png", 1)
    image(tmp_path / "root/b.png", 2)
    (tmp_path / "root/labels.csv").write_text(
        "file,person,exam,part,finding,set,age,answer\n"
        "a.png,p,1,hand,none,train,3,0\na.png,p,1,hand,none,train,3,1\nb.png,q,1,hand,none,test,3,0\n"
    )
    target = '[targets.metal]\ncolumn = "answer"\npositive = ["1"]\nnegative = ["0"]\n'
    with pytest.raises(RecipeError, match="differ in target_metal"):
        build(tmp_path, tmp_path / "root", f"{TABLE}\n{target}")
    text = TABLE.replace("[region]", 'rows = "any"\n[region]')
    report = build(tmp_path, tmp_path / "root", f"{text}\n{target}")
    assert report.manifest.rows["target_metal"].tolist() == ["1", "0"]


def test_fields_of_paths_become_targets(tmp_path: Path) -> None:
    target = '[targets.second]\ncolumn = "view"\npositive = ["2"]\nnegative = ["1"]\n'
    level = FOLDERS.replace('label_level = "study"', 'label_level = "image"')
    rows = build(tmp_path, folder_tree(tmp_path / "root"), f"{level}\n{target}").manifest.rows
    assert rows["target_second"].tolist() == ["0", "0", "1"]
    assert rows["view"].tolist() == ["1", "1", "2"]
    named = FOLDERS.replace("{view}", "{target_view}")
    with pytest.raises(RecipeError, match=r"\{target_view\} is not a name for a field"):
        build(tmp_path, tmp_path / "root", named)


def test_a_table_beside_dicom_files_gives_targets(tmp_path: Path) -> None:
    for i in range(6):
        put(tmp_path / f"root/{i}.dcm", i, PatientID=f"p{i}", StudyInstanceUID=f"1.2.{i}")
    rows = [f"{i},{('none', 'fracture')[i % 2]},{i % 3}" for i in range(5)]
    (tmp_path / "labels.csv").write_text("\n".join(["key,finding,metal", *rows, ""]))
    dicom = 'identifiers = "keep"\ntable = "labels.csv"\ncolumn = "key"'
    target = '[targets.metal]\ncolumn = "metal"\npositive = ["2"]\nothers = "negative"\n'
    found = build_dicom(tmp_path, tmp_path / "root", dicom, LABEL + target).manifest.rows
    assert found["target_metal"].tolist() == ["0", "0", "1", "0", "0", ""]
    with pytest.raises(RecipeError, match=r"\[targets\]: a column needs a table"):
        build_dicom(tmp_path, tmp_path / "root", "", target)


def test_patients_are_read_from_the_paths_in_a_table(tmp_path: Path) -> None:
    for i, name in enumerate(["x/p1/s1/v1.png", "x/p2/s1/v1.png"]):
        image(tmp_path / "root" / name, i)
    table = "file,part,finding,set\nx/p1/s1/v1.png,hand,none,train\nx/p2/s1/v1.png,hand,none,test\n"
    (tmp_path / "root/labels.csv").write_text(table)
    text = TABLE.replace('covariates = ["age"]', 'fields = "**/{person}/{exam}/{view}.png"')
    rows = build(tmp_path, tmp_path / "root", text).manifest.rows
    assert rows["patient"].tolist() == ["p1", "p2"]
    assert rows["study"].tolist() == ["p1/s1", "p2/s1"]
    with pytest.raises(RecipeError, match=r"row 2: x/p1/s1/v1.png"):
        build(tmp_path, tmp_path / "root", text.replace("**/", "y/"))
    with pytest.raises(RecipeError, match="would replace"):
        build(tmp_path, tmp_path / "root", text.replace("{view}", "{set}"))


def test_a_covariate_named_like_a_target_is_refused(tmp_path: Path) -> None:
    text = TABLE.replace('covariates = ["age"]', 'covariates = ["target_age"]')
    with pytest.raises(RecipeError, match=r"Make it one with \[targets.age\]"):
        recipe_of(tmp_path, text)


def test_labels_may_be_listed_as_unknown(tmp_path: Path) -> None:
    text = TABLE.replace('normal = ["none"]', 'normal = ["none"]\nunknown = ["blurred"]')
    for i in range(2):
        image(tmp_path / f"root/{i}.png", i)
    rows = "0.png,p,1,hand,blurred,train,3\n1.png,q,1,hand,fracture,test,3\n"
    (tmp_path / "root/labels.csv").write_text(f"file,person,exam,part,finding,set,age\n{rows}")
    assert build(tmp_path, tmp_path / "root", text).manifest.rows["label"].tolist() == [pd.NA, 1]
    with pytest.raises(RecipeError, match="two meanings"):
        build(tmp_path, tmp_path / "root", text.replace('"blurred"', '"none"'))


# Recipes that come along


def test_the_whole_table_of_grazpedwri_has_five_targets(shared_data: Path) -> None:
    report = build_manifest("grazpedwri", shared_data / "grazpedwri", structure_only=True)
    table = pd.read_csv(shared_data / "grazpedwri/dataset.csv", dtype=str).fillna("0")
    columns = {"fracture": "fracture_visible"} | {
        name: name for name in ("metal", "cast", "osteopenia", "diagnosis_uncertain")
    }
    counts = report.as_dict()["targets"]
    assert list(counts) == list(columns)
    for name, column in columns.items():
        positive = int((table[column] == "1").sum())
        assert counts[name] == {
            "positive": positive, "negative": len(table) - positive, "unknown": 0,
        }  # fmt: skip


def test_fracatlas_has_hardware(shared_data: Path) -> None:
    text = (find_recipes()["fracatlas"]).read_text().replace("dataset.csv", "dataset_full.csv")
    recipe = make_recipe(text, Path("fracatlas.toml"))
    report = build_manifest(recipe, shared_data / "fracatlas", structure_only=True)
    table = pd.read_csv(shared_data / "fracatlas/dataset_full.csv")
    assert report.as_dict()["targets"]["hardware"]["positive"] == int(table["hardware"].sum())


CHEXPERT = """Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Edema
CheXpert-v1.0-small/{0}/patient0000{1}/study1/view1_frontal.jpg,Male,61,Frontal,AP,1.0,
CheXpert-v1.0-small/{0}/patient0000{1}/study2/view1_frontal.jpg,Male,61,Frontal,AP,,-1.0
CheXpert-v1.0-small/{0}/patient0000{2}/study1/view1_frontal.jpg,Male,61,Frontal,AP,,1.0
CheXpert-v1.0-small/{0}/patient0000{2}/study1/view2_lateral.jpg,Male,61,Lateral,,,0.0
"""


@pytest.mark.parametrize(("policy", "answer"), [("ignore", ""), ("positive", "1")])
def test_a_table_like_chexperts(tmp_path: Path, policy: str, answer: str) -> None:
    text = load_recipe("chexpert").path.read_text()
    _, *others = text.split("[targets.")
    findings = [own.split('column = "')[1].split('"')[0] for own in others]
    lines = CHEXPERT.replace(",Edema\n", "," + ",".join(findings) + "\n").splitlines()
    place = findings.index("Edema")
    for i, (split, a, b) in enumerate((("train", 1, 2), ("valid", 3, 4))):
        rows = [lines[0]]
        for line in lines[1:]:
            *cells, edema = line.format(split, a, b).split(",")
            own = [""] * len(findings)
            own[place] = edema
            rows.append(",".join([*cells, *own]))
            image(tmp_path / cells[0], 10 * i + len(rows))
        (tmp_path / f"CheXpert-v1.0-small/{split}.csv").write_text("\n".join(rows) + "\n")
    recipe = make_recipe(text.replace('"ignore"\n', f'"{policy}"\n'), tmp_path / "chexpert.toml")
    report = build_manifest(recipe, tmp_path)
    rows = report.manifest.rows
    assert rows["patient"].tolist()[::4] == ["patient00001", "patient00003"]
    assert rows["label"].tolist() == [0, 1, 1, 1] * 2
    assert rows["target_edema"].tolist() == ["0", answer, "1", "0"] * 2
    assert rows["split"].tolist() == ["train"] * 4 + ["test"] * 4
    assert len([name for name in rows if name.startswith("target_")]) == 13


def test_a_table_like_padchests(tmp_path: Path) -> None:
    file = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
    labels = ["['normal']", "['cardiomegaly', 'pleural effusion']", "['exclude']", "['nodule']"]
    rows = ["ImageID,PatientID,StudyID,PatientSex_DICOM,Projection,MethodLabel,Labels"]
    for i, own in enumerate(labels):
        image(tmp_path / f"{i}.png", i)
        rows.append(f'{i}.png,p{i},s{i},F,PA,Physician,"{own}"')
    (tmp_path / file).write_text("\n".join(rows) + "\n")
    rows = build_manifest("padchest", tmp_path).manifest.rows
    assert rows["label"].tolist() == [0, 1, pd.NA, 1]
    assert rows["target_pleural_effusion"].tolist() == ["0", "1", "", "0"]
    assert rows["target_nodule"].tolist() == ["0", "0", "", "1"]
