"""The whole path through the commands, on real radiographs and on synthetic ones."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from medembed.cache.embeddings import load_embeddings
from medembed.cli import main
from medembed.dataset.manifest import Manifest, read_manifest, write_manifest

ROOT = Path(__file__).parents[1]
WHERE = "import medembed; print(medembed.__file__)"
TRUNCATED = {"IMG0004143.jpg", "IMG0004134.jpg"}


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(main, [*(str(argument) for argument in arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def fracatlas(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Take the 66 real radiographs from recipe to page; keep every command's JSON."""
    home = tmp_path_factory.mktemp("fracatlas")
    root, table, cache = shared_data / "fracatlas", home / "manifest.csv", home / "cache"
    recipe = ROOT / "data_manifests" / "fracatlas.toml"
    taken: dict[str, Any] = {"home": home}
    taken["build"] = run("manifest", "build", recipe, "--image-root", root, "-o", table)
    extract = ("extract", table, "--image-root", root, "--encoder", "demo", "--cache", cache)
    taken["extract"] = run(*extract)
    taken["again"] = run(*extract)
    sweep = ("sweep", cache, table, "--out", home / "run", "--configs", 2, "--folds", 3)
    taken["sweep"] = run(*sweep, "--jobs", 1)
    taken["compare"] = run("compare", home / "run")
    taken["report"] = run("report", home / "run", "-o", home / "report")
    return taken


def test_truncated_radiographs_are_listed_with_their_reason_and_left_out(
    fracatlas: dict[str, Any],
) -> None:
    report = fracatlas["extract"]
    assert {Path(failure["image"]).name for failure in report["failures"]} == TRUNCATED
    assert all(failure["stage"] == "decode" and failure["reason"] for failure in report["failures"])
    assert (report["requested"], report["failed"], report["duplicates"]) == (66, 2, 1)
    assert fracatlas["compare"]["runs"][0]["left_out"] == 2


def test_the_duplicate_pair_is_embedded_once_and_lies_in_one_split(
    fracatlas: dict[str, Any],
) -> None:
    assert fracatlas["extract"]["embedded"] == 63
    rows = read_manifest(fracatlas["home"] / "manifest.csv").rows
    twins = rows[rows.image.str.contains("IMG0004314|IMG0004341")]
    assert (len(twins), twins.sha256.nunique(), twins.split.nunique()) == (2, 1, 1)
    assert load_embeddings(fracatlas["home"] / "cache", fracatlas["home"] / "manifest.csv").X.shape[
        0
    ] == (64)


def test_the_second_extraction_embeds_nothing(fracatlas: dict[str, Any]) -> None:
    again = fracatlas["again"]
    assert (again["already"], again["embedded"], again["failed"]) == (63, 0, 2)


def test_regions_with_one_class_are_not_estimable(fracatlas: dict[str, Any]) -> None:
    rows = read_manifest(fracatlas["home"] / "manifest.csv").rows
    test = rows[rows.split == "test"]
    one_class = {r for r, group in test.groupby("region") if group.label.nunique() == 1}
    assert one_class, "the sample no longer has a region of one class"
    for row in fracatlas["compare"]["rows"]:
        for region in one_class & set(row["regions"]):
            assert row["regions"][region]["auroc"]["value"] is None
    shown = (
        CliRunner()
        .invoke(main, ["compare", str(fracatlas["home"] / "run"), "--by", "region"])
        .output
    )
    assert "not estimable" in shown


def test_the_page_is_there_and_reaches_for_nothing(fracatlas: dict[str, Any]) -> None:
    page = Path(fracatlas["report"]["page"]).read_text()
    assert "not a medical device" in page.lower()
    assert 'src="http' not in page
    assert str(fracatlas["home"]) not in page


def test_nothing_of_the_machine_is_in_cache_or_run(fracatlas: dict[str, Any]) -> None:
    for folder in ("cache", "run"):
        for path in (fracatlas["home"] / folder).rglob("*"):
            if path.is_file():
                assert str(fracatlas["home"]).encode() not in path.read_bytes(), path


def test_16_bit_wrists_are_embedded_not_saturated(shared_data: Path, tmp_path: Path) -> None:
    recipe = ROOT / "data_manifests" / "grazpedwri.toml"
    root, table = shared_data / "grazpedwri", tmp_path / "m.csv"
    run("manifest", "build", recipe, "--image-root", root, "-o", table)
    cache = tmp_path / "cache"
    report = run("extract", table, "--image-root", root, "--encoder", "demo", "--cache", cache)
    assert (report["embedded"], report["failed"]) == (3, 0)
    X = load_embeddings(cache, table).X
    assert np.linalg.norm(X[0] - X[1]) > 1e-3


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_brings_the_encoder_the_recipes_and_the_type_marker(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "medembed/py.typed",
        "medembed/encoders/assets/demo/model.safetensors",
        "medembed/data_manifests/mura.toml",
        "medembed/data_manifests/fracatlas.toml",
        "medembed/data_manifests/grazpedwri.toml",
    } <= names
    assert not [name for name in names if name.startswith(("tests", "bench"))]


@pytest.fixture(scope="module")
def demo(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Run the demo from the wheel alone: no checkout, no network, a home of its own."""
    work = tmp_path_factory.mktemp("demo")
    site = work / "site"
    zipfile.ZipFile(wheel).extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site), "HOME": str(work), "HF_HUB_OFFLINE": "1"}
    said = []
    for arguments in (["-c", WHERE], ["-m", "medembed", "demo", "out", "--json"]):
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0].startswith(str(site))
    return work / "out", json.loads(said[1])


def test_the_demo_says_everywhere_that_it_is_synthetic(demo: tuple[Path, Any]) -> None:
    home, result = demo
    assert result["synthetic"] is True
    assert json.loads((home / "runs/sweep/run.json").read_text())["data"]["synthetic"] is True
    assert "synthetic" in (home.parent / result["page"]).read_text().lower()
    table = CliRunner().invoke(main, ["compare", str(home / "runs" / "sweep")]).output
    assert "synthetic" in table.lower()


def test_the_best_head_of_the_demo_is_neither_perfect_nor_poor(demo: tuple[Path, Any]) -> None:
    rows = run("compare", demo[0] / "runs" / "sweep")["rows"]
    assert 0.85 <= max(row["scores"]["auroc"]["value"] for row in rows) <= 0.97


def test_the_demo_writes_what_the_readme_says(demo: tuple[Path, Any]) -> None:
    home, result = demo
    for name in ("manifest.csv", "images", "cache", "runs/sweep", "report/index.html"):
        assert (home / name).exists(), name
    assert {"logistic", "mlp", "lightgbm"} <= {row["head"] for row in result["leaderboard"]}


def test_shuffled_labels_land_at_chance(demo: tuple[Path, Any], tmp_path: Path) -> None:
    home, _ = demo
    manifest = pd.read_csv(home / "manifest.csv", dtype=str, keep_default_na=False)
    studies = manifest.drop_duplicates("study").set_index("study").label
    mixed = np.random.default_rng(7).permutation(studies.to_numpy())
    manifest["label"] = manifest.study.map(dict(zip(studies.index, mixed, strict=True)))
    manifest.to_csv(tmp_path / "shuffled.csv", index=False, lineterminator="\n")
    out = tmp_path / "run"
    run("sweep", home / "cache", tmp_path / "shuffled.csv", "--out", out, "--heads", "logistic")
    (row,) = [r for r in run("compare", out)["rows"] if r["head"] == "logistic"]
    assert row["scores"]["auroc"]["low"] < 0.5 < row["scores"]["auroc"]["high"]


def test_a_killed_extraction_resumes_to_the_same_cache(
    demo: tuple[Path, Any], tmp_path: Path
) -> None:
    home, _ = demo
    cache, part = tmp_path / "cache", tmp_path / "part.csv"
    whole = read_manifest(home / "manifest.csv")
    rows = whole.rows.iloc[::4].reset_index(drop=True)  # enough to be killed in their midst
    write_manifest(Manifest(rows, whole.label_level), part)
    arguments = ["extract", str(part), "--image-root", "images", "--encoder", "demo"]
    command = [sys.executable, "-m", "medembed", *arguments, "--cache", str(cache), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (cache / "cache.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, check=True)
    assert json.loads(done.stdout)["failed"] == 0
    resumed, unbroken = (load_embeddings(path, part) for path in (cache, home / "cache"))
    assert len(resumed.X) == len(rows) > 50
    np.testing.assert_array_equal(resumed.X, unbroken.X)
    assert not run("cache", "verify", cache)["problems"]


def test_a_cache_of_another_encoder_is_refused(demo: tuple[Path, Any], tmp_path: Path) -> None:
    home, _ = demo
    cache = shutil.copytree(home / "cache", tmp_path / "cache")
    before = sorted(path.name for path in cache.rglob("*"))
    result = CliRunner().invoke(
        main,
        [
            *("extract", str(home / "manifest.csv"), "--image-root", str(home / "images")),
            *("--encoder", "demo", "--cache", str(cache), "--fit", "pad"),
        ],
    )
    assert result.exit_code == 1
    assert "fit" in result.output
    assert "pad" in result.output
    assert sorted(path.name for path in cache.rglob("*")) == before
