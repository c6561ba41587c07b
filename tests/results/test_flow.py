"""The flow of images: what a build found, what a run left out and used, and that it adds up."""

import csv
import hashlib
import io
import json
import shutil
from pathlib import Path

import made_runs
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from made_runs import make_images
from made_sweeps import make_pooled_cache
from PIL import Image

from medembed.cache.failures import Failure
from medembed.cache.store import open_cache
from medembed.cli import main
from medembed.core.schema import find_problems
from medembed.dataset.build_file import KeptBuild, build_path, read_build
from medembed.dataset.manifest import read_manifest
from medembed.prediction.external_validation import evaluate
from medembed.report.figures import plot_flow
from medembed.results.comparison import compare_runs
from medembed.results.flow import describe_flow
from medembed.results.runs import open_run
from medembed.sweeps.job import sweep

RECIPE = """
name = "made"
licence = "none"
citation = ""
url = ""
layout = "table"
label_level = "image"
[table]
file = "labels.csv"
image = "file"
patient = "patient"
study = ["patient", "exam"]
[region]
constant = "hand"
[label]
column = "finding"
normal = ["no"]
abnormal = ["yes"]
empty = "unknown"
[split]
column = "set"
[exclude]
"p3-0.png" = "an implant hides the joint"
"p4-0.png" = "an implant hides the joint"
"""
N_PATIENTS = 40
#: What is planted: 2 excluded by the recipe, 1 missing, 3 files that no row has, 2 that cannot be
#: embedded, 4 without a label.
EXCLUDED, MISSING, UNLISTED, FAILED, UNLABELLED = 2, 1, 3, 2, 4


def make_dataset(root: Path) -> Path:
    """Write drawn images, their table and a recipe; return the recipe's path."""
    root.mkdir()
    generator = np.random.default_rng(0)
    lines = ["file,patient,exam,finding,set"]
    for patient in range(N_PATIENTS):
        for view in range(1 + patient % 2):
            name = f"p{patient}-{view}.png"
            finding = "" if patient < UNLABELLED and view == 0 else ("yes", "no")[patient // 2 % 2]
            split = "test" if patient % 4 == 1 else "train"
            lines.append(f"{name},Doe-{patient},1,{finding},{split}")
            if patient != 7 or view:
                pixels = generator.integers(0, 255, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(root / name)
    for number in range(UNLISTED):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(root / f"Roe extra {number}.png")
    (root / "labels.csv").write_text("\n".join([*lines, ""]))
    recipe = root.parent / "made.toml"
    recipe.write_text(RECIPE)
    return recipe


def build(recipe: Path, root: Path, out: Path, *options: str) -> dict:
    words = ["manifest", "build", str(recipe), "--image-root", str(root), "-o", str(out), "--json"]
    ran = CliRunner().invoke(main, [*words, *options])
    assert ran.exit_code == 0, ran.output
    return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Build a manifest with exclusions, and sweep a cache that lacks two of its images."""
    home = tmp_path_factory.mktemp("flow")
    recipe = make_dataset(home / "films")
    build(recipe, home / "films", home / "made.csv")
    manifest = read_manifest(home / "made.csv")
    table = manifest.rows.assign(label=manifest.rows["label"].astype("string").fillna(""))
    lost = table["image"].isin(["p10-0.png", "p13-0.png"])
    assert lost.sum() == FAILED
    make_pooled_cache(home / "cache", table[~lost], {"mean": 1.5})
    failures = [Failure(own, "decode", "truncated") for own in table["sha256"][lost]]
    open_cache(home / "cache").record_failures(failures)
    sweep(home / "cache", home / "made.csv", home / "run", heads=["logistic"], n_configs=1, jobs=1)
    return home


def test_the_build_file_counts_and_names_nobody(place):
    text = (place / "made.build.json").read_text()
    document = json.loads(text)
    counts, rows = document["counts"], read_manifest(place / "made.csv").rows
    assert counts["excluded"] == [
        {"reason": "an implant hides the joint", "images": EXCLUDED},
        {"reason": "not below the image root", "images": MISSING},
    ]
    assert counts["not_listed"] == UNLISTED
    assert counts["images"] == len(rows) == 60 - EXCLUDED - MISSING
    assert counts["found"] == 60 + UNLISTED
    assert counts["unlabelled"] == int(rows["label"].isna().sum()) == UNLABELLED - 1
    assert counts["splits"]["test"]["patients"] == 10
    assert document["recipe"]["sha256"] == hashlib.sha256(RECIPE.encode()).hexdigest()
    assert document["manifest"] == read_manifest(place / "made.csv").digest()
    assert document["warnings"]
    for name in ("Doe", "Roe", ".png", str(place), "labels.csv/"):
        assert name not in text, name


def test_a_build_is_deterministic_and_replaced(place, tmp_path):
    first = (place / "made.build.json").read_bytes()
    build(place / "made.toml", place / "films", tmp_path / "made.csv")
    assert build_path(tmp_path / "made.csv").read_bytes() == first
    (tmp_path / "other.toml").write_text(RECIPE + '"p5-0.png" = "another reason"\n')
    build(tmp_path / "other.toml", place / "films", tmp_path / "made.csv")
    assert "another reason" in build_path(tmp_path / "made.csv").read_text()
    build(place / "made.toml", place / "films", tmp_path / "made.parquet", "--structure-only")
    document = json.loads(build_path(tmp_path / "made.parquet").read_text())
    assert document["structure_only"]
    assert document["counts"]["not_listed"] == 0


def test_a_build_that_fails_leaves_nothing(place, tmp_path):
    words = ["manifest", "build", str(place / "made.toml"), "--image-root", str(place / "films")]
    refused = CliRunner().invoke(main, [*words, "-o", str(tmp_path / "m.csv"), "--strict"])
    assert refused.exit_code == 1
    assert not list(tmp_path.iterdir())
    (tmp_path / "m.build.json").mkdir()
    refused = CliRunner().invoke(main, [*words, "-o", str(tmp_path / "m.csv")])
    assert refused.exit_code == 1
    assert "is a directory" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["m.build.json"]


def test_a_build_of_another_manifest_is_not_copied(place, tmp_path):
    manifest = read_manifest(place / "made.csv")
    assert read_build(place / "made.csv", manifest).counts.not_listed == UNLISTED
    assert read_build(manifest, manifest) is None
    shutil.copy(place / "made.csv", tmp_path / "made.csv")
    assert read_build(tmp_path / "made.csv", manifest) is None
    document = json.loads((place / "made.build.json").read_text())
    counts = document["counts"]
    for wrong in (
        "",
        "[]",
        "{",
        "[" * 10_000,
        json.dumps(document | {"manifest": "ab" * 32}),
        json.dumps(document | {"version": 2}),
        json.dumps(document | {"counts": counts | {"found": counts["found"] + 1}}),
        json.dumps(document | {"counts": counts | {"excluded": None}}),
        json.dumps(document | {"counts": counts | {"not_listed": True}}),
        " " * (1 << 20) + json.dumps(document),
    ):
        (tmp_path / "made.build.json").write_text(wrong)
        assert read_build(tmp_path / "made.csv", manifest) is None


def check_sums(own):
    """Hold every sum of a flow, as a reader with a pencil would."""
    lost = [own[name] for name in ("not_asked", "failed", "unlabelled", "not_given")]
    assert own["manifest"]["images"] == sum(lost) + own["used"]["images"]
    assert own["failed"] == sum(entry["images"] for entry in own["failures"])
    if own["found"] is not None:
        excluded = sum(entry["images"] for entry in own["excluded"])
        assert own["found"] == own["not_listed"] + excluded + own["manifest"]["images"]
    for unit in ("images", "studies"):
        assert own["used"][unit] == sum(part["used"][unit] for part in own["splits"])
    for part in own["splits"]:
        classes = part["classes"].values()
        lost = [part[name] for name in ("failed", "unlabelled", "not_given")]
        assert part["images"] == sum(lost) + part["used"]["images"]
        for unit in ("images", "studies"):
            assert part["used"][unit] == sum(counts[unit] for counts in classes)
        patients = [counts["patients"] for counts in classes]
        assert max(patients) <= part["used"]["patients"] <= sum(patients)


def test_the_flow_of_a_sweep_adds_up_and_is_that_of_its_manifest(place):
    run = open_run(place / "run")
    [own] = describe_flow([run], ["run"])
    check_sums(own)
    rows = read_manifest(place / "made.csv").rows
    lost = rows["image"].isin(["p10-0.png", "p13-0.png"])
    used = rows[~lost & rows["label"].notna()]
    assert (own["found"], own["not_listed"]) == (60 + UNLISTED, UNLISTED)
    assert own["failures"] == [{"reason": "truncated", "images": FAILED}]
    assert own["unlabelled"] == int(rows["label"].isna().sum())
    assert own["used"]["images"] == len(used)
    assert own["used"]["studies"] == used["study"].nunique()
    assert own["used"]["patients"] == used["patient"].nunique()
    for part in own["splits"]:
        mine = used[used["split"] == part["split"]]
        for label, name in enumerate(("normal", "abnormal")):
            assert part["classes"][name]["images"] == int((mine["label"] == label).sum())
            assert (
                part["classes"][name]["studies"] == mine[mine["label"] == label]["study"].nunique()
            )


def test_an_evaluation_copies_the_build_and_says_what_it_left_aside(place, tmp_path):
    # the model's own test rows: it may score them, since it was not trained on them
    model = place / "run" / "models" / "logistic"
    evaluate(model, place / "cache", place / "made.csv", tmp_path / "run", split="test")
    [own] = describe_flow([open_run(tmp_path / "run")], ["run"])
    check_sums(own)
    rows = read_manifest(place / "made.csv").rows
    assert own["not_asked"] == int((rows["split"] == "train").sum())
    assert [part["split"] for part in own["splits"]] == ["test"]


def test_a_share_of_the_patients_leaves_the_others_aside(place, tmp_path):
    options = {"heads": ["logistic"], "n_configs": 1, "jobs": 1, "n_folds": 2}
    sweep(place / "cache", place / "made.csv", tmp_path / "run", train_fraction=0.5, **options)
    [own] = describe_flow([open_run(tmp_path / "run")], ["run"])
    check_sums(own)
    assert own["not_given"] > 0


def test_where_nothing_was_recorded_the_first_box_says_so(tmp_path):
    run = made_runs.make_run(tmp_path / "run", make_images(), {"mlp": 1.0}, complete=False)
    result = compare_runs([run], n_resamples=50)
    [own] = result["flow"]
    assert own["found"] is own["excluded"] is None
    assert own["used"]["images"] == len(make_images())
    plot = plot_flow(result)
    assert "Found: not recorded" in plot.alt
    assert "Not recorded: the build of the manifest was not beside it" in plot.caption


def test_the_old_run_has_a_flow(tmp_path):
    old = Path(__file__).parents[1] / "assets" / "format-1" / "run"
    [own] = describe_flow([open_run(old)], ["run"])
    check_sums(own)
    assert own["found"] is None
    assert own["failed"] == 1


def test_the_figure_shows_every_number_and_one_flow_once(place):
    runs = [open_run(place / "run")]
    shutil.copytree(place / "run", place / "again", dirs_exist_ok=True)
    result = compare_runs([*runs, open_run(place / "again")], n_resamples=50)
    plot = plot_flow(result)
    assert plot.alt.count("Manifest") == 1
    assert "run, again: Found: 63 images; Excluded: 6 images; 2: an implant hides" in plot.alt
    assert "3: not listed" in plot.alt
    rows = list(csv.DictReader(io.StringIO(plot.csv)))
    own = [row for row in rows if row["run"] == "run"]
    assert {row["reason"] for row in own if row["step"] == "excluded"} == {
        "an implant hides the joint",
        "not below the image root",
    }
    [used] = [row for row in own if row["step"] == "used" and not row["split"]]
    assert used["images"] == str(result["flow"][0]["used"]["images"])
    assert plot_flow({**result, "flow": []}) is None


def test_hostile_reasons_are_text(tmp_path):
    hostile = "=cmd()\x1b[31m‮<b>$x_1$" + "w" * 300
    n = len(make_images())
    counts = {"found": n + 5, "not_listed": 3, "images": n}
    counts["excluded"] = [{"reason": hostile, "images": 2}]
    data = {"images": counts["images"], "left_out": 0}
    data["build"] = {"counts": counts, "recipe": {"name": hostile}, "medembed": "0"}
    run = made_runs.make_run(
        tmp_path / "run", make_images(), {"mlp": 1.0}, complete=False, info={"data": data}
    )
    plot = plot_flow(compare_runs([run], n_resamples=50))
    assert "\x1b" not in plot.csv
    assert "'=cmd()" in plot.csv


@given(st.lists(st.integers(0, 5), max_size=4), st.integers(0, 5), st.integers(0, 5))
def test_counts_are_taken_only_where_they_add_up(excluded, unlisted, images):
    entries = [{"reason": "x", "images": n} for n in excluded]
    counts = {"not_listed": unlisted, "images": images, "excluded": entries}
    total = sum(excluded) + unlisted + images
    kept = {"counts": counts | {"found": total}, "recipe": {}, "medembed": "0"}
    assert not find_problems(KeptBuild, kept)
    assert find_problems(KeptBuild, kept | {"counts": counts | {"found": total + 1}})
