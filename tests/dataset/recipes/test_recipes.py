"""Recipes: real tables and generated trees become manifests; what does not fit is named."""

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
from made_recipes import (
    FOLDERS,
    LABELS,
    STUDIES,
    TABLE,
    build,
    folder_tree,
    image,
    recipe_of,
    write_mura,
)

from medembed.core.errors import ManifestError, PathNotFoundError, RecipeError
from medembed.dataset.manifest import Manifest, count, read_manifest, write_manifest
from medembed.dataset.recipes.build import build_manifest, compare_counts, load_recipe
from medembed.dataset.splits import join_same_bytes, name_runs

UNSCORED = "test has no labelled images, so nothing can be scored on it"  # of LABELS


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three images with a table, in folders that the table does not name."""
    root = tmp_path / "root"
    for i, name in enumerate(["one/a.png", "two/b.png", "deep/c.png"]):
        image(root / name, i)
    (root / "labels.csv").write_text("\ufeff" + LABELS, encoding="utf-8")
    (root / "two/b.txt").write_text("an annotation")
    (root / "._a.png").write_bytes(b"junk of macOS")
    return root


def test_a_table_finds_images_by_name_stem_and_path(tmp_path: Path, root: Path) -> None:
    report = build(tmp_path, root)
    rows = report.manifest.rows
    assert rows["image"].tolist() == ["deep/c.png", "one/a.png", "two/b.png"]
    assert rows["label"].tolist() == [pd.NA, 0, 1]
    assert rows["study"].tolist() == ["p2/1", "p1/1", "p1/1"]
    assert rows["age"].tolist() == ["40", "31", "31"]
    assert rows["sha256"].str.len().eq(64).all()
    assert (report.warnings, report.excluded) == ([UNSCORED], [])


def test_building_twice_gives_the_same_bytes(tmp_path: Path, root: Path) -> None:
    for name in ("one.csv", "two.csv"):
        write_manifest(build(tmp_path, root).manifest, tmp_path / name)
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    assert len(read_manifest(tmp_path / "one.csv").rows) == 3


def test_a_name_that_two_files_have_is_refused(tmp_path: Path, root: Path) -> None:
    image(root / "copy/b.png", 9)
    with pytest.raises(RecipeError, match=r"row 3: b may be copy/b.png, two/b.png"):
        build(tmp_path, root)
    text = TABLE.replace("[region]", 'below = ["one", "two", "deep"]\n[region]')
    assert len(build(tmp_path, root, text).manifest.rows) == 3


def test_a_missing_image_is_left_out_with_a_warning_or_refused(tmp_path: Path, root: Path) -> None:
    (root / "one/a.png").unlink()
    report = build(tmp_path, root)
    assert report.excluded == [("a.png", "not below the image root")]
    assert report.warnings == [
        "1 of 3 images of the tables are not below the image root and were left out: a.png",
        "train has no normal images among 1 labelled ones, so nothing can be trained on it: that "
        "requires both classes",
        UNSCORED,
    ]
    with pytest.raises(RecipeError, match="1 of 3 images"):
        build(tmp_path, root, strict=True)


def test_a_root_without_any_of_the_images_is_an_error(tmp_path: Path, root: Path) -> None:
    for name in ("one", "two", "deep"):
        shutil.rmtree(root / name)
    with pytest.raises(RecipeError, match=r"none of the 3 images .* --structure-only"):
        build(tmp_path, root)
    rows = build(tmp_path, root, structure_only=True).manifest.rows
    assert rows["image"].tolist() == ["a.png", "b", "deep/c.png"]
    assert (rows["sha256"] == "").all()


def test_files_that_no_table_lists_are_a_warning(tmp_path: Path, root: Path) -> None:
    image(root / "one/extra.png", 7)
    warnings = build(tmp_path, root).warnings
    said = "1 image files are not in labels.csv, and left out: one/extra.png"
    assert warnings == [said, UNSCORED]


def test_exclusions_give_their_reason_and_unknown_ones_a_warning(
    tmp_path: Path, root: Path
) -> None:
    text = TABLE + '[exclude]\n"b.png" = "blurred"\n"deep" = "not ours"\n"z.png" = "gone"\n'
    report = build(tmp_path, root, text)
    assert report.excluded == [("deep/c.png", "not ours"), ("two/b.png", "blurred")]
    assert report.manifest.rows["image"].tolist() == ["one/a.png"]
    document = json.loads(json.dumps(report.as_dict()))
    assert document["excluded"][0] == {"image": "deep/c.png", "reason": "not ours"}
    assert (document["images"], document["studies"], document["abnormal"]) == (1, 1, 0)
    assert document["warnings"] == report.warnings
    assert report.warnings == [
        "[exclude] names 'z.png', which is not an image of the dataset",
        "train has no abnormal images among 1 labelled ones, so nothing can be trained on it: that "
        "requires both classes",
        "test has no patients, so nothing can be scored on it; the data set has 1 patient, and "
        "each patient is in a single split",
    ]


def test_counts_other_than_expected_are_named_with_both_numbers(tmp_path: Path, root: Path) -> None:
    text = TABLE + "[expected]\nimages = 4\nabnormal = 1\n[expected.train.region.hand]\nstudies = 2"
    expected = ["4 images expected, 3 found", "train, hand: 2 studies expected, 1 found"]
    assert build(tmp_path, root, text).warnings == [*expected, UNSCORED]
    with pytest.raises(RecipeError) as caught:
        build(tmp_path, root, text, strict=True)
    assert all(line in str(caught.value) for line in expected)


def test_a_label_that_the_recipe_does_not_know_is_refused(tmp_path: Path, root: Path) -> None:
    (root / "labels.csv").write_text(LABELS.replace("fracture", "odd"))
    with pytest.raises(RecipeError, match="'odd' in 1 rows"):
        build(tmp_path, root)
    text = TABLE.replace('column = "finding"', 'column = "finding"\nothers = "abnormal"')
    assert count(build(tmp_path, root, text).manifest)["abnormal"] == 1


def test_a_third_split_must_be_mapped(tmp_path: Path, root: Path) -> None:
    (root / "labels.csv").write_text(LABELS.replace("test", "valid"))
    with pytest.raises(RecipeError, match=r"'valid' \(1 images\).*split_names"):
        build(tmp_path, root)
    text = TABLE.replace("[table]", 'split_names = { valid = "test" }\n[table]', 1)
    assert set(build(tmp_path, root, text).manifest.rows["split"]) == {"train", "test"}


def test_leaks_in_the_dataset_are_refused(tmp_path: Path, root: Path) -> None:
    (root / "labels.csv").write_text(LABELS.replace("fracture,train", "fracture,test"))
    shutil.copy(root / "one/a.png", root / "deep/c.png")
    with pytest.raises(ManifestError) as caught:
        build(tmp_path, root)
    text = str(caught.value)
    assert "patient 'p1' is in more than one split" in text
    assert "the same bytes are in more than one split: test (deep/c.png" in text


def test_a_truncated_table_is_refused(tmp_path: Path, root: Path) -> None:
    (root / "labels.csv").write_text(LABELS[:-12])
    with pytest.raises(RecipeError, match=r"rows with more or fewer fields .* row 4, with 4"):
        build(tmp_path, root)


def test_a_column_that_is_not_there_is_named(tmp_path: Path, root: Path) -> None:
    with pytest.raises(RecipeError, match=r"no column 'gender'; its columns are 'file'"):
        build(tmp_path, root, TABLE.replace('"age"', '"gender"'))


def test_a_missing_root_or_table_is_named(tmp_path: Path, root: Path) -> None:
    with pytest.raises(PathNotFoundError, match=r"no directory at .*nowhere"):
        build(tmp_path, tmp_path / "nowhere")
    (root / "labels.csv").unlink()
    with pytest.raises(PathNotFoundError, match=r"no table labels\.csv in .*root"):
        build(tmp_path, root)


def test_a_file_name_that_is_not_unicode_is_refused(tmp_path: Path, root: Path) -> None:
    try:
        shutil.copy(root / "one/a.png", os.fsencode(root / "one") + b"/\xff.png")
    except OSError:
        pytest.skip("this file system takes only names in Unicode")
    with pytest.raises(RecipeError, match=r"not valid Unicode.*\n.*udcff\.png"):
        build(tmp_path, root)


def test_a_link_that_leaves_the_root_is_refused(tmp_path: Path, root: Path) -> None:
    image(tmp_path / "outside.png", 1)
    (root / "one/a.png").unlink()
    (root / "one/a.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(RecipeError, match=r"'one/a\.png' leads out of the image root"):
        build(tmp_path, root)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("licence", "license", r"unknown key 'license'; did you mean 'licence'\?"),
        ("covariates", "covariate", r"\[table\] has an unknown key 'covariate'; did you mean"),
        ("[split]", "[splits]", r"unknown key 'splits'; did you mean 'split'\?"),
        ('layout = "table"', 'layout = "tables"', "layout must be .* not 'tables'; did"),
        ('layout = "table"', 'layout = "dicom"', r"has no use for \[table\]"),
        ('label_level = "image"', 'label_level = "view"', "label_level must be .* not 'view'"),
        ('image = "file"', "image = 3", r"\[table\]: image must be text, not 3"),
        ('column = "set"', "fraction = true", r"\[split\]: fraction must be a number, not True"),
        ('column = "set"', 'column = "set"\nfraction = 0.2', "either column or fraction"),
        ('column = "part"', 'column = "part"\nconstant = "x"', "one of column, one_hot"),
        ('patient = "person"', "", r"patient columns in \[table\] or \[groups\]"),
        ('column = "finding"', "", r"\[label\]: name the table's column"),
        ('normal = ["none"]', 'normal = ["none"]\nempty = "nil"', "empty must be .* not 'nil'"),
        ('["age"]', '["age", "label"]', "covariates names 'label', and a manifest has a column"),
        ('["age"]', '["name"]', "covariates names 'name'"),
        ("[region]", 'below = ["../x"]\n[region]', r"below names '\.\./x', outside"),
        ("[region]", "[region", "cannot be read as TOML"),
        ('file = "labels.csv"', "", r"table\.file is missing"),
        ("[split]", '[exclude]\n"a" = 1\n[split]', r"\[exclude\]: a must be text, not 1"),
        ("[split]", "[expected]\nimage = 1\n[split]", "unknown key 'image'; did you mean 'images'"),
        ("[split]", '[expected]\nimages = "1"\n[split]', "images must be a whole number"),
        ("[split]", "[folders]\npattern = '*'\n[split]", r"has no use for \[folders\]"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in TABLE
    with pytest.raises(RecipeError, match=message):
        recipe_of(tmp_path, TABLE.replace(old, new, 1))


def test_recipes_are_found_by_name_and_unknown_names_listed() -> None:
    for name in ("fracatlas", "grazpedwri", "mura"):
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.licence
        assert recipe.url.startswith("https://")
    with pytest.raises(PathNotFoundError, match="fracatlas, grazpedwri, lera, mura"):
        load_recipe("muro")


# Folders


def test_folders_give_every_column_and_further_fields_as_covariates(tmp_path: Path) -> None:
    root = folder_tree(tmp_path / "root")
    image(root / "stray.png", 99)
    report = build(tmp_path, root, FOLDERS)
    rows = report.manifest.rows
    assert rows["study"].tolist() == ["wrist/p2/s1", "hand/p1/s1", "hand/p1/s1"]
    assert rows["label"].tolist() == [1, 0, 0]
    assert rows["view"].tolist() == ["1", "1", "2"]
    assert rows["split"].tolist() == ["test", "train", "train"]
    assert report.warnings[0] == "1 image files are not in the pattern, and left out: stray.png"
    assert [warning[:18] for warning in report.warnings[1:]] == [
        "train has no abnor",
        "test has no normal",
    ]


def test_folders_without_patients_or_splits_need_groups_and_a_fraction(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for i in range(10):
        image(root / ("bad" if i % 2 else "ok") / f"IMG{i * 10}.png", i)
    pattern = 'pattern = "**/{label}/*.png"'
    text = FOLDERS.replace('label_level = "study"', 'label_level = "image"')
    text = text.replace(text[text.index("pattern") : text.index("\n[label]")], pattern)
    with pytest.raises(RecipeError, match=r"\{patient\} in the pattern or \[groups\]"):
        build(tmp_path, root, text)
    text += '[groups]\nrule = "image"\n[region]\nconstant = "hand"\n[split]\nfraction = 0.2\n'
    rows = build(tmp_path, root, text).manifest.rows
    assert rows["patient"].nunique() == rows["study"].nunique() == 10
    assert (rows["split"] == "test").sum() == 2


def test_a_patient_can_be_part_of_a_file_name(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for i, name in enumerate(
        ["train/ok/anna_1_a.png", "train/bad/anna_2_b.png", "test/ok/bo_1_c.png"]
    ):
        image(root / name, i)
    text = FOLDERS[: FOLDERS.index("[folders]")].replace('"study"', '"image"') + (
        '[folders]\npattern = "{split}/{label}/{patient}_*.png"\n'
        + FOLDERS[FOLDERS.index("[label]") :]
        + '[region]\nconstant = "hand"\n'
    )
    rows = build(tmp_path, root, text).manifest.rows
    assert rows["patient"].tolist() == ["bo", "anna", "anna"]


def test_a_pattern_that_nothing_fits_names_the_first_file(tmp_path: Path) -> None:
    root = tmp_path / "root"
    image(root / "x/y.png", 0)
    with pytest.raises(RecipeError, match=r"fits the pattern .*the first of 1 is x/y\.png"):
        build(tmp_path, root, FOLDERS)


# MURA


@pytest.fixture
def mura(tmp_path: Path) -> Path:
    base = tmp_path / "MURA-v1.1"
    base.mkdir()
    write_mura(base, STUDIES)
    (base / "train/XR_HAND/patient00001/study1_positive/._image1.png").write_bytes(b"junk")
    return base


def test_mura_is_read_from_its_folder_or_the_one_above(mura: Path) -> None:
    rows = build_manifest(load_recipe("mura"), mura.parent).manifest.rows
    assert rows["image"][0] == "MURA-v1.1/train/XR_ELBOW/patient00001/study1_negative/image1.png"
    assert rows["study"].tolist() == [
        *["elbow/patient00001/study1"] * 2,
        "hand/patient00001/study1",
        *["hand/patient00001/study2"] * 3,
        "wrist/patient11185/study1",
    ]
    assert rows["label"].tolist() == [0, 0, 1, 0, 0, 0, 1]
    assert rows["split"].tolist() == ["train"] * 6 + ["test"]
    inside = build_manifest(load_recipe("mura"), mura).manifest
    assert inside.rows["image"][0] == "train/XR_ELBOW/patient00001/study1_negative/image1.png"
    assert inside.label_level == "study"
    columns = rows.columns.drop("image").tolist()
    pd.testing.assert_frame_equal(inside.rows[columns], rows[columns])


def test_muras_expected_counts_are_held_by_split_and_region(mura: Path) -> None:
    manifest = build_manifest(load_recipe("mura"), mura).manifest
    one_more = {"train": {"region": {"hand": {"images": 3}}}}
    expected = {**load_recipe("mura").expected, **one_more, "images": 6}
    assert compare_counts(expected, manifest)[0] == "6 images expected, 7 found"
    assert "train, hand: 3 images expected, 4 found" in compare_counts(expected, manifest)
    test = {"test": load_recipe("mura").expected["test"], "images": 6}
    warnings = compare_counts(test, manifest)
    assert "test: 1199 studies expected, 1 found" in warnings
    assert "test, wrist: 97 abnormal studies expected, 1 found" in warnings
    expected = load_recipe("mura").expected
    for split in ("train", "test"):
        for name in ("studies", "abnormal_studies"):
            by_region = [counts[name] for counts in expected[split]["region"].values()]
            assert sum(by_region) == expected[split][name]
            assert len(by_region) == 7
    for name in ("images", "studies", "patients", "abnormal_studies"):
        assert expected[name] == expected["train"][name] + expected["test"][name]


def test_muras_tables_have_one_spelling_and_its_files_their_own(mura: Path) -> None:
    study = "valid/XR_WRIST/e\u0301/study1_positive"
    write_mura(mura, {**STUDIES, study: [8]})
    table = mura / "valid_labeled_studies.csv"
    table.write_text(table.read_text().replace(",1\n", ", 1\u00a0\n"))
    rows = build_manifest(load_recipe("mura"), mura.parent).manifest.rows.set_index("image")
    assert rows.loc[f"MURA-v1.1/{study}/image1.png", ["patient", "label"]].tolist() == ["\u00e9", 1]


def test_muras_leaks_are_refused_all_at_once(mura: Path) -> None:
    write_mura(
        mura,
        {
            **STUDIES,
            "valid/XR_HAND/patient00001/study3_negative": [8],
            "valid/XR_HAND/patient11186/study1_negative": [7],
            "train/XR_HAND/patient00001/study1_negative": [9],
        },
    )
    with pytest.raises(ManifestError) as caught:
        build_manifest(load_recipe("mura"), mura)
    text = str(caught.value)
    assert "patient 'patient00001' is in more than one split" in text
    assert "the same bytes have more than one label: 0 (valid/XR_HAND/patient11186" in text
    assert "study 'hand/patient00001/study1' has more than one label" in text


def test_files_and_studies_that_only_one_side_has_are_warned_of(mura: Path) -> None:
    image(mura / "train/XR_HAND/patient00009/study1_negative/image1.png", 20)
    (mura / "valid/XR_WRIST/patient11185/study1_positive/image1.png").unlink()
    with (mura / "train_labeled_studies.csv").open("a") as file:
        file.write("MURA-v1.1/train/XR_HAND/patient00010/study1_negative/,0\n")
    report = build_manifest(load_recipe("mura"), mura)
    text = "\n".join(report.warnings)
    assert (
        "1 image files are not in MURA's tables, and left out: train/XR_HAND/patient00009" in text
    )
    assert "1 labelled studies have no images: MURA-v1.1/train/XR_HAND/patient00010" in text
    assert "1 of 7 images of the tables are not below the image root" in text
    with pytest.raises(RecipeError, match="1 labelled studies have no images"):
        build_manifest(load_recipe("mura"), mura, strict=True)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("train_labeled_studies", "study1_positive/,1", "study1_positive/,0", "not that of their"),
        ("train_labeled_studies", "study1_positive/,1", "study1_positive/,2", "neither 0 nor 1"),
        ("train_labeled_studies", "study2_negative", "study9_negative", "without label"),
        ("train_labeled_studies", "study2_negative/,0\n", "study2_negative/\n", "row 3, with 1"),
        ("train_image_paths", "XR_ELBOW", "ELBOW", "paths that are not MURA's"),
    ],
)
def test_mura_tables_that_contradict_themselves_are_refused(
    mura: Path, file: str, old: str, new: str, message: str
) -> None:
    path = mura / f"{file}.csv"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(RecipeError, match=message):
        build_manifest(load_recipe("mura"), mura)


def test_a_mura_without_tables_says_where_to_point(mura: Path) -> None:
    with pytest.raises(PathNotFoundError, match=r"the folder MURA-v1\.1 or the one that holds it"):
        build_manifest(load_recipe("mura"), mura / "train")
    (mura / "valid_labeled_studies.csv").unlink()
    with pytest.raises(PathNotFoundError, match=r"no table .*valid_labeled_studies\.csv"):
        build_manifest(load_recipe("mura"), mura)


# Groups


def test_runs_end_at_gaps_other_states_and_other_prefixes() -> None:
    names = pd.Series(["a7.png", "a1.png", "a4.png", "a8.png", "b9.png", "a12.png", "none.png"])
    states = pd.DataFrame({"region": ["h", "h", "h", "w", "w", "w", "w"]})
    assert name_runs(names, states, max_gap=3).tolist() == [
        "a1", "a1", "a1", "a8", "b9", "a12", "none",
    ]  # fmt: skip


def test_the_same_bytes_join_chains_of_groups() -> None:
    groups = pd.Series(["c", "b", "b", "a", "d", "e"])
    sha256 = pd.Series(["x", "x", "y", "y", "z", ""])
    assert join_same_bytes(groups, sha256).tolist() == ["a", "a", "a", "a", "d", "e"]


# Real data


def test_fracatlas_sample_is_grouped_as_its_pseudo_patients(shared_data: Path) -> None:
    report = build_manifest(load_recipe("fracatlas"), shared_data / "fracatlas")
    rows = report.manifest.rows
    assert count(report.manifest)["images"] == 66
    assert count(report.manifest)["abnormal"] == 33
    assert report.warnings == [
        "4083 images expected, 66 found: a part of the data set, with 33 of 717 abnormal, "
        "9 of 1281 images in hand, 48 of 2124 images in leg; 3 more counts are lower too"
    ]
    ours = pd.read_csv(shared_data / "fracatlas/files.csv", dtype=str).set_index("image_id")
    rows = rows.set_index(rows["image"].str.rpartition("/")[2])
    assert rows["sha256"].to_dict() == ours["sha256"].to_dict()
    pair = rows.loc[["IMG0004314.jpg", "IMG0004341.jpg"]]
    assert pair["patient"].nunique() == pair["split"].nunique() == pair["sha256"].nunique() == 1
    together = rows.assign(theirs=ours["pseudo_patient"]).groupby("patient")["theirs"].nunique()
    assert (together == 1).all()  # never coarser than the looser runs of files.csv
    with pytest.raises(RecipeError, match="4083 images expected, 66 found"):
        build_manifest(load_recipe("fracatlas"), shared_data / "fracatlas", strict=True)


def test_fracatlas_whole_table_has_no_large_group(shared_data: Path) -> None:
    recipe = load_recipe("fracatlas")
    assert recipe.table is not None
    whole = recipe.table.model_copy(update={"file": ("dataset_full.csv",)})
    report = build_manifest(
        recipe.model_copy(update={"table": whole}), shared_data / "fracatlas", structure_only=True
    )
    assert report.warnings == []  # all expected counts hold
    sizes = report.manifest.rows["patient"].value_counts()
    assert sizes.max() <= 0.01 * len(report.manifest.rows)
    assert len(sizes) < 0.5 * len(report.manifest.rows)
    assert balanced(report.manifest)


def test_grazpedwri_table_becomes_rows_with_its_known_counts(shared_data: Path) -> None:
    report = build_manifest(
        load_recipe("grazpedwri"), shared_data / "grazpedwri", structure_only=True, strict=True
    )
    counts = count(report.manifest)
    assert (counts["images"], counts["patients"], counts["abnormal"]) == (20327, 6091, 13550)
    rows = report.manifest.rows
    assert rows.groupby("patient")["split"].nunique().eq(1).all()
    mixed = rows.groupby("study")["label"].nunique()
    assert (mixed == 2).sum() == 677
    assert balanced(report.manifest)


def test_grazpedwri_sample_is_built_from_what_is_there(shared_data: Path) -> None:
    report = build_manifest(load_recipe("grazpedwri"), shared_data / "grazpedwri")
    assert len(report.manifest.rows) == 3
    assert report.manifest.rows["image"].str.startswith("images_part1/").all()
    assert len(report.excluded) == 20324
    assert report.warnings[0].startswith("20324 of 20327 images of the tables are not below")


def balanced(manifest: Manifest) -> bool:
    """Whether a fifth of the studies are in test, in each stratum of label and region."""
    rows = manifest.rows.groupby("study")[["label", "region", "split"]].max()
    shares = rows["split"].eq("test").groupby([rows["label"], rows["region"]]).agg(["sum", "size"])
    return bool(((shares["sum"] - 0.2 * shares["size"]).abs() <= 3).all())
