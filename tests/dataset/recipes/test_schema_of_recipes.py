"""All that is wrong with a recipe stands in one error; tables of several files, and of none."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medembed.core.errors import RecipeError
from medembed.dataset.recipes.build import build_manifest, load_recipe
from medembed.dataset.recipes.schema import make_recipe

PLACE = Path("mine.toml")


def test_all_that_a_recipe_lacks_is_in_one_error() -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe('layout = "table"\n[table]\npatent = "p"\n[split]\n[label]\n', PLACE)
    assert str(caught.value).splitlines() == [
        "mine.toml: the recipe cannot be used; correct it:",
        "  - name, label_level, table.file, table.image, label.abnormal are missing.",
        "  - [table] has an unknown key 'patent'; did you mean 'patient'?",
        "  - layout 'table' needs a section [region].",
        '  - give either patient columns in [table] or [groups], not both (rule = "image" in '
        "[groups]: each image counts as a patient of its own).",
        "  - [label]: name the table's column.",
        "  - [split]: give either column or fraction.",
    ]


def test_licence_citation_and_url_may_be_left_out() -> None:
    recipe = make_recipe('name = "a"\nlayout = "mura"\nlabel_level = "study"\n', PLACE)
    assert (recipe.licence, recipe.citation, recipe.url, recipe.path) == ("", "", "", PLACE)


@pytest.mark.parametrize("text", ["", "[", "table = 3", "layout = 3", "split = []\nname = 1"])
def test_anything_else_is_one_error(text: str) -> None:
    with pytest.raises(RecipeError, match=r"^mine\.toml"):
        make_recipe(text, PLACE)


def put(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(path)


def test_the_recipe_of_vindr_spinexr_joins_its_tables_and_boxes(tmp_path: Path) -> None:
    for split in ("train", "test"):
        lines = ["image_id,study_id,lesion_type"]
        for i in range(4):
            put(tmp_path / f"{split}_images/{split}{i}.png", i + 4 * (split == "test"))
            found = ("Fracture", "Osteophytes") if i % 2 else ("No finding",)
            lines += [f"{split}{i},{split}{i // 2},{own}" for own in found]
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"annotations/{split}.csv").write_text("\n".join([*lines, ""]))
    report = build_manifest("vindr-spinexr", tmp_path)
    rows = report.manifest.rows
    assert rows["label"].tolist() == [0, 1, 0, 1] * 2
    assert rows["split"].tolist() == ["test"] * 4 + ["train"] * 4
    assert "5000 studies expected, 4 found" in report.warnings[0]
    first = load_recipe("vindr-spinexr")
    assert first.tried == "not on the data"
    (tmp_path / "annotations/test.csv").write_text("image_id,study_id\na,b\n")
    with pytest.raises(RecipeError, match=r"test\.csv has no column 'lesion_type'"):
        build_manifest("vindr-spinexr", tmp_path)


def test_the_recipe_of_lera_gives_a_folders_films_its_row(tmp_path: Path) -> None:
    lines = []
    for i in range(12):
        for k in range(2):
            put(tmp_path / f"{1000 + i}/ST-1/IM{k}.png", 2 * i + k)
        lines.append(f"{1000 + i},XR {('FOOT', 'KNEE')[i % 2]},{i % 3 % 2}")
    (tmp_path / "labels.csv").write_text("\n".join([*lines, ""]))
    rows = build_manifest("lera", tmp_path).manifest.rows
    assert (len(rows), rows["patient"].nunique(), rows["study"].nunique()) == (24, 12, 12)
    assert set(rows["region"]) == {"XR FOOT", "XR KNEE"}
    assert rows.groupby("study")["label"].nunique().eq(1).all()


def test_a_column_of_files_names_must_be_new(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("file,label,p\na,0,1\n")
    text = (
        'name = "a"\nlayout = "table"\nlabel_level = "image"\n[table]\nfile = "t.csv"\n'
        'file_column = "label"\nimage = "file"\npatient = "p"\n[region]\nconstant = "x"\n'
        '[label]\ncolumn = "label"\nabnormal = "1"\n[split]\nfraction = 0.5\n'
    )
    with pytest.raises(RecipeError, match="has a column 'label' of its own"):
        build_manifest(make_recipe(text, tmp_path / "r.toml"), tmp_path)
