"""`medembed manifest init`, `build` without a recipe, and `recipes`, as a person meets them."""

import hashlib
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from medembed.cli import main
from medembed.dataset import build_file
from medembed.dataset.recipes.build import find_recipes


def run(*words: object, answers: str | None = None) -> Result:
    return CliRunner().invoke(main, ["manifest", *map(str, words)], input=answers)


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """Forty films of twenty patients in a folder per class, with a table that lists them."""
    lines = ["file,patient,finding,part,age"]
    for i in range(40):
        name = f"{('normal', 'broken')[i % 2]}/{i}.png"
        path = tmp_path / "films" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(path)
        part = ("hand", "foot")[i % 4 // 2]
        lines.append(f"{name},{i // 4 * 2 + i % 2},{('no', 'yes')[i % 2]},{part},{i % 7 + 20}")
    (tmp_path / "films/labels.csv").write_text("\n".join([*lines, ""]))
    return tmp_path / "films"


def test_a_folder_per_class_is_a_manifest_that_its_recipe_builds_again(films: Path) -> None:
    out = films.parent / "m.csv"
    done = run("build", "--from-folders", films, "-o", out)
    assert done.exit_code == 0, done.output
    lines = done.stderr.splitlines()
    begins = [
        *("split region images", "Warning: nothing identifies the patients", f"{out}: 40 images"),
        *(f"{films.parent / 'm.recipe.toml'}: the recipe of", f"Next: medembed extract {out}"),
    ]
    at = [next(i for i, line in enumerate(lines) if line.startswith(own)) for own in begins]
    assert at == sorted(at)
    assert done.stdout == ""
    recipe = films.parent / "m.recipe.toml"
    kept = json.loads((films.parent / "m.build.json").read_text())
    assert kept["recipe"]["sha256"] == hashlib.sha256(recipe.read_bytes()).hexdigest()
    assert "each image counts as a patient" in kept["warnings"][0]
    again = films.parent / "again.csv"
    assert run("build", recipe, "--image-root", films, "-o", again).exit_code == 0
    assert again.read_bytes() == out.read_bytes()
    assert not (films.parent / "again.recipe.toml").exists()


def test_images_of_equal_bytes_are_counted(films: Path) -> None:
    out, said = films.parent / "m.csv", "have the same bytes as another"
    assert said not in run("build", "--from-folders", films, "-o", out).stderr
    (films / "broken/1.png").write_bytes((films / "broken/3.png").read_bytes())
    done = run("build", "--from-folders", films, "-o", out)
    assert f"2 images {said}; such copies are embedded once and count as one patient" in done.stderr
    assert "40 images, 40 studies, 39 patients" in done.stderr


def test_a_table_needs_no_recipe_and_no_column_is_guessed_but_image_and_label(films: Path) -> None:
    out = films.parent / "m.csv"
    table = ("--from-table", films / "labels.csv", "-o", out, "--json")
    done = run("build", *table)
    assert done.exit_code == 0, done.output
    assert "Column 'patient' looks like it does: add --patient 'patient'" in done.stderr
    assert "Next:" not in done.output
    document = json.loads(done.stdout)
    assert (document["images"], document["patients"]) == (40, 40)
    assert document["recipe"] == str(films.parent / "m.recipe.toml")
    assert {own["region"] for own in document["splits"]} == {"all"}
    document = json.loads(
        run("build", *table, "--patient", "patient", "--region", "part", "--covariate", "age",
            "--normal", "no", "--abnormal", "yes", "--label", "finding", "--image", "file",
            "--test-fraction", "0.5", "--seed", "3").stdout
    )  # fmt: skip
    assert (document["patients"], document["abnormal"]) == (20, 20)
    assert {own["region"] for own in document["splits"]} == {"hand", "foot"}
    recipe = tomllib.loads((films.parent / "m.recipe.toml").read_text())
    assert recipe["split"] == {"fraction": 0.5, "seed": 3}
    assert recipe["table"]["covariates"] == ["age"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-o", "m.csv"), "Name one of RECIPE, --from-folders, --from-table and"),
        (("mura", "--from-folders", ".", "-o", "m.csv"), "Name one of RECIPE"),
        (("mura", "-o", "m.csv"), "Missing option '--image-root'"),
        (("mura", "--image-root", ".", "-o", "m.csv", "--covariate", "x"), "--covariate is for"),
        (("mura", "--image-root", ".", "-o", "m.csv", "--seed", "1"), "--seed is for builds"),
        (("--from-table", "t.csv", "-o", "m.csv", "--pattern", "*"), "--pattern is for"),
        (("--from-table", "t.csv", "-o", "m.csv", "--delimiter", ";;"), "one character"),
    ],
)
def test_a_mixture_of_ways_is_wrong_usage(words: tuple[str, ...], said: str) -> None:
    done = run("build", *words)
    assert (done.exit_code, said in done.output) == (2, True), done.output


def test_what_cannot_be_told_is_one_error_with_the_option_that_settles_it(films: Path) -> None:
    (films / "broken").rename(films / "B")
    (films / "normal").rename(films / "A")
    out = films.parent / "m.csv"
    done = run("build", "--from-folders", films, "-o", out)
    assert done.exit_code == 1
    assert "holds 'A' (20), 'B' (20)" in done.output
    assert "--abnormal" in done.output
    assert not list(films.parent.glob("m.*"))
    done = run("build", "--from-folders", films, "--abnormal", "B", "-o", out, "--strict")
    assert (done.exit_code, "--strict refuses" in done.output) == (1, True)
    assert run("build", "--from-folders", films, "--abnormal", "B", "-o", out).exit_code == 0


def test_a_manifest_that_cannot_be_written_leaves_no_recipe(
    films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build_file, "write_manifest", fail)
    done = run("build", "--from-folders", films, "-o", films.parent / "m.csv")
    assert done.exit_code == 1
    assert not list(films.parent.glob("m.*"))


def test_init_writes_a_recipe_without_a_question_where_there_is_no_terminal(films: Path) -> None:
    out = films.parent / "r.toml"
    done = run("init", films, "-o", out)
    assert done.exit_code == 0, done.output
    assert f"Next: medembed manifest build {out} --image-root {films}" in done.stderr
    text = out.read_text()
    assert "# Identifies the patient (20 patients)" in text
    recipe = tomllib.loads(text)
    assert recipe["table"]["patient"] == "patient"
    assert recipe["region"] == {"column": "part"}
    done = run("build", out, "--image-root", films, "-o", films.parent / "m.csv", "--json")
    assert json.loads(done.stdout)["patients"] == 20
    done = run("init", films, "-o", out)
    assert (done.exit_code, "already exists" in done.output) == (1, True)
    done = run("init", films, "-o", out, "--force", "--json", "--patient", "", "--name", "mine")
    document = json.loads(done.stdout)
    assert (document["name"], document["settled"]["patient"]) == ("mine", "each image")
    assert document["recipe"] == out.read_text()
    assert run("init", films, "-o", films / "no/r.toml").exit_code == 1


def test_init_asks_on_a_terminal_and_takes_corrections(
    films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medembed.cli.manifest.is_interactive", lambda: True)
    table = films / "labels.csv"
    table.write_text(table.read_text().replace("yes", "KL3").replace("no,", "KL0,"))
    out = films.parent / "r.toml"
    answers = ["7", "finding", "9", "2", "patient", "-", "region", "nowhere", "flavour", "region",
               "-", "test-fraction", "2", "0.3", ""]  # fmt: skip
    done = run("init", table, "--image", "file", "-o", out, answers="\n".join([*answers, ""]))
    assert done.exit_code == 0, done.output
    assert "Answer with a number or a name from the list" in done.output
    assert "That does not work: labels.csv has no column 'nowhere'" in done.output
    assert "'flavour' is not one of these" in done.output
    recipe = tomllib.loads(out.read_text())
    assert recipe["label"] == {"column": "finding", "normal": ["KL0"], "abnormal": ["KL3"]}
    assert recipe["groups"] == {"rule": "image"}
    assert recipe["region"] == {"constant": "all"}
    assert recipe["split"]["fraction"] == 0.3
    done = run("init", table, "--image", "file", "-o", out, "--force", "--yes")
    assert (done.exit_code, "--label" in done.output) == (1, True)


def test_recipes_are_listed_and_printed(tmp_path: Path) -> None:
    done = run("recipes")
    assert done.exit_code == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    for name in find_recipes():
        assert f"\n{name} " in f"\n{done.stdout}"
    assert "tried: not on the data" in done.stdout
    listed = json.loads(run("recipes", "--json").stdout)
    assert [own["name"] for own in listed] == sorted(find_recipes())
    assert all(own["about"] and own["licence"] and own["patient_ids"] for own in listed)
    (tmp_path / "my.toml").write_text(run("recipes", "dicom").stdout)
    assert (tmp_path / "my.toml").read_bytes() == find_recipes()["dicom"].read_bytes()
    assert "recipe" in json.loads(run("recipes", "dicom", "--json").stdout)
    done = run("recipes", "lara")
    assert (done.exit_code, "lera" in done.output) == (1, True)
