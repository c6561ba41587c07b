"""What a split lacks, or has too little of, is said where the manifest is built."""

import json
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from made_recipes import HEAD, image, recipe_of

from medembed.cli import main
from medembed.core.errors import RecipeError
from medembed.dataset.recipes.build import BuildReport, build_manifest
from medembed.dataset.split_counts import count_splits, describe_splits, find_gaps, find_small_parts

RECIPE = (
    HEAD
    + """
layout = "folders"
label_level = "image"
[folders]
pattern = "{split}/{region}/{patient}_{label}.png"
[label]
normal = ["ok"]
abnormal = ["bad"]
others = "unknown"
"""
)


def rows_of(*cells: tuple[str, str, int | None, str]) -> pd.DataFrame:
    """Make rows of (split, region, label, patient), each a study of its own."""
    table = pd.DataFrame(cells, columns=["split", "region", "label", "patient"])
    table["label"] = table["label"].astype("Int8")
    return table.assign(image=[f"{i}.png" for i in table.index], study=table.index.astype(str))


def build(folder: Path, *names: str) -> BuildReport:
    for i, name in enumerate(names):
        image(folder / "root" / f"{name}.png", i)
    return build_manifest(recipe_of(folder, RECIPE), folder / "root")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("train/hand/a_ok", "train/hand/b_bad"), "test has no patients, so nothing can be scored"),
        (("test/hand/a_ok", "test/hand/b_bad"), "train has no patients, so nothing can be trained"),
        (
            ("train/hand/a_ok", "train/hand/b_bad", "test/hand/c_ok", "test/knee/d_ok"),
            "test has no abnormal images among 2 labelled ones",
        ),
        (
            ("train/hand/a_bad", "test/hand/c_ok", "test/knee/d_bad"),
            "train has no normal images among 1 labelled ones",
        ),
        (
            ("train/hand/a_ok", "train/hand/b_bad", "test/hand/c_odd"),
            "test has no labelled images, so nothing can be scored on it",
        ),
    ],
)
def test_a_split_without_patients_or_a_class_is_a_warning(
    tmp_path: Path, names: tuple[str, ...], said: str
) -> None:
    (warning,) = build(tmp_path, *names).warnings
    assert warning.startswith(said)
    recipe = recipe_of(tmp_path, RECIPE)
    with pytest.raises(RecipeError, match=said):
        build_manifest(recipe, tmp_path / "root", strict=True)


def test_a_dataset_without_labels_lacks_no_class() -> None:
    rows = rows_of(("train", "hand", None, "a"), ("test", "hand", None, "b"))
    assert find_gaps(rows, is_labelled=False) == []
    assert find_small_parts(rows, is_labelled=False) == []
    assert len(find_gaps(rows, is_labelled=True)) == 2
    assert len(find_gaps(rows[:1], is_labelled=False)) == 1


@pytest.mark.parametrize(
    ("normal", "abnormal", "is_small"), [(10, 10, False), (9, 11, True), (11, 9, True)]
)
def test_a_small_test_set_is_a_notice_that_strict_lets_pass(
    normal: int, abnormal: int, is_small: bool
) -> None:
    train = [("train", "hand", 0, "x"), ("train", "hand", 1, "y")]
    test = [("test", "hand", 0, f"n{i}") for i in range(normal)]
    test += [("test", "hand", 1, f"a{i}") for i in range(abnormal)]
    rows = rows_of(*train, *test)
    notices = find_small_parts(rows, is_labelled=True)
    assert bool(notices) == is_small
    if is_small:
        said = f"20 patients, {normal} with normal images and {abnormal} with abnormal ones"
        assert said in notices[0]
        assert "intervals will be wide or missing" in notices[0]
    assert find_gaps(rows, is_labelled=True) == []
    both = rows_of(*train, *[("test", "hand", i % 2, f"p{i // 2}") for i in range(38)])
    assert (
        "19 patients, 19 with normal images and 19" in find_small_parts(both, is_labelled=True)[0]
    )


def test_strict_builds_a_small_dataset(tmp_path: Path) -> None:
    names = ("train/hand/a_ok", "train/hand/b_bad", "test/hand/c_ok", "test/hand/d_bad")
    report = build(tmp_path, *names)
    assert report.warnings == []
    assert "test is small: 2 patients" in report.notices[0]
    strict = build_manifest(recipe_of(tmp_path, RECIPE), tmp_path / "root", strict=True)
    assert strict.notices == report.notices


def test_the_command_says_warnings_notices_and_the_table(tmp_path: Path) -> None:
    build(tmp_path, "train/hand/a_ok", "train/wrist/a_bad", "train/hand/b_odd", "test/hand/c_ok")
    options = ["--image-root", str(tmp_path / "root"), "-o", str(tmp_path / "m.csv"), "--json"]
    command = ["manifest", "build", str(tmp_path / "recipe.toml"), *options]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    zero = {"images": 0, "studies": 0, "patients": 0}
    one = {"images": 1, "studies": 1, "patients": 1}
    assert document["splits"] == [
        {"split": "train", "region": "hand", "label": 0, **one},
        {"split": "train", "region": "hand", "label": 1, **zero},
        {"split": "train", "region": "hand", "label": None, **one},
        {"split": "train", "region": "wrist", "label": 0, **zero},
        {"split": "train", "region": "wrist", "label": 1, **one},
        {"split": "test", "region": "hand", "label": 0, **one},
        {"split": "test", "region": "hand", "label": 1, **zero},
        {"split": "test", "region": "wrist", "label": 0, **zero},
        {"split": "test", "region": "wrist", "label": 1, **zero},
    ]
    assert document["notices"] == []
    lines = done.stderr.splitlines()
    assert f"Warning: {document['warnings'][0]}" in lines
    start = next(i for i, line in enumerate(lines) if line.startswith("split region"))
    assert [line.split() for line in lines[start - 1 : start + 8]] == [
        ["normal", "abnormal"],
        ["split", "region", *["images", "studies", "patients"] * 2],
        ["train", "all", *"111111"],
        ["hand", *"111000"],
        ["wrist", *"000111"],
        ["test", "all", *"111000"],
        ["hand", *"111000"],
        ["wrist", *"000000"],
        ["train:", *["also", "1", "image", "without", "a", "label,", "of", "1", "patient"]],
    ]


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["train", "test"]),
            st.sampled_from(["hand", "images", "all", "é" * 90, *map(str, range(20))]),
            st.sampled_from([0, 1, None]),
            st.sampled_from("abcdefgh"),
        ),
        min_size=1,
        max_size=24,
    )
)
def test_counts_add_up_and_lines_fit_a_terminal(cells: list[tuple[str, str, int, str]]) -> None:
    rows = rows_of(*cells)
    counts = count_splits(rows)
    assert sum(count.images for count in counts) == len(rows)
    for count in counts:
        own = rows[(rows["split"] == count.split) & (rows["region"] == count.region)]
        own = own[own["label"].isna() if count.label is None else own["label"].eq(count.label)]
        found = (len(own), own["study"].nunique(), own["patient"].nunique())
        assert found == (count.images, count.studies, count.patients)
    lines = describe_splits(rows)
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 2 + 2 * 13 + 3


def test_large_counts_fit_a_terminal() -> None:
    rows = rows_of(("train", "lower leg", 0, "a"), ("test", "lower leg", 1, "b"),
                   ("test", "upper arm", 1, "c"))  # fmt: skip
    many = rows.loc[[0] * 1_234_567 + [1, 2]]
    lines = describe_splits(many)
    assert "1,234,567" in lines[2]
    assert max(map(len, lines)) <= 80
