"""`make reproduce` on a few of the demo's images: the whole paper, small, in one directory."""

import csv
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_backbones import save
from preloaded import commands

from medembed.core.errors import RunError
from medembed.demo.cohort import draw_cohort, write_view
from medembed.demo.pipeline import RECIPE
from medembed.report.comparison import write_tables

ROOT = Path(__file__).parents[1]
REGIONS = {"shoulder", "wrist"}
RUNS = ["sweep", "depths", "cnn", "cnn-frozen", "autoencoder"]
SMALL = {
    "ENCODER": "demo",
    "DEPTHS": "0,1,2",
    "DEVICE": "cpu",
    "EXTRACT_ARGS": "--decoders 1",
    "SWEEP_ARGS": "--folds 2 --configs 1 --heads mlp --jobs 1",
    "DEPTHS_ARGS": "--folds 3 --epochs 2 --batch-size 16",
    "CNN_ARGS": "--folds 3 --epochs 1 --batch-size 16 --no-augment",
    "AUTOENCODER_ARGS": "--size 16 --widths 8 --latent-channels 4 --epochs 1",
}


def draw_images(directory: Path) -> None:
    """Draw part of a demo's cohort, small, with the table that the demo's recipe reads."""
    lines = ["image,patient,study,region,finding,kind,synthetic"]
    for view in draw_cohort(120):
        if view.region not in REGIONS:
            continue
        name = f"{view.study}/view{view.projection + 1}.png"
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        write_view(view, directory / name, size=128)
        finding = "abnormal" if view.label else "normal"
        lines.append(f"{name},{view.patient},{view.study},{view.region},{finding},{view.kind},1")
    (directory / "labels.csv").write_text("\n".join([*lines, ""]))


def reproduce(home: Path, bin_path: Path, **changes: str) -> "subprocess.CompletedProcess[str]":
    """Run `make reproduce` in `home`; `bin_path` has `medembed`."""
    given = {**SMALL, "RECIPE": "recipe.toml", "IMAGE_ROOT": "the reader's images"}
    given |= {"REPRODUCE": "the paper", "CNN": "cnn", "BIN": str(bin_path)}
    outside = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    set_up = ("-o", ".venv/.ready")  # is done: this Python has medembed
    return subprocess.run(
        [
            *("make", "-f", str(ROOT / "Makefile"), *set_up, "reproduce"),
            *(f"{name}={value}" for name, value in {**given, **changes}.items()),
        ],
        cwd=home,
        env=outside,
        capture_output=True,
        text=True,
        check=False,
    )


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def files_below(directory: Path) -> dict[Path, tuple[int, bytes]]:
    """Return every file's time of change and bytes."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


@pytest.fixture(scope="module")
def bin_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a directory with a `medembed` that need not import its libraries anew; offline."""
    directory = tmp_path_factory.mktemp("bin")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(directory / "hub"), "OMP_NUM_THREADS": "1"}
    with commands(directory, {**os.environ, **offline}):
        yield directory


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory, bin_path: Path) -> tuple[Path, str]:
    """Reproduce the paper once; give its directory and what was printed."""
    home = tmp_path_factory.mktemp("reproduce")
    draw_images(home / "the reader's images")
    (home / "recipe.toml").write_text(RECIPE)
    save(home / "cnn", "ResNet")
    done = reproduce(home, bin_path)
    assert done.returncode == 0, done.stdout + done.stderr
    return home / "the paper", done.stdout


def test_the_page_has_the_figures_of_the_paper(paper: tuple[Path, str]) -> None:
    home, printed = paper
    page = (home / "report/index.html").read_text()
    for name in ("regions", "depths"):
        assert f"figures/{name}.svg" in page
        assert (home / f"report/figures/{name}.png").stat().st_size > 5_000
    assert "Page: the paper/report/index.html" in printed
    assert "unfreeze-2" in page
    assert "synthetic" in page.lower()


def test_figure_2_has_every_region_with_intervals(paper: tuple[Path, str]) -> None:
    rows = read_csv(paper[0] / "report/figures/regions.csv")
    assert {row["region"] for row in rows if row["auroc"]} >= REGIONS
    known = [row for row in rows if row["auroc_low"]]  # a region of few patients has none
    for row in known:
        assert float(row["auroc_low"]) <= float(row["auroc"]) <= float(row["auroc_high"])


def test_figure_3_has_auroc_and_f1_of_every_depth_with_intervals(paper: tuple[Path, str]) -> None:
    points = read_csv(paper[0] / "report/figures/depths.csv")
    assert [point["depth"] for point in points] == ["0", "1", "2"]
    for point in points:
        for score in ("auroc", "macro_f1"):
            low, value, high = (float(point[f"{score}{end}"]) for end in ("_low", "", "_high"))
            assert 0 <= low < value < high <= 1


def test_all_baselines_stand_in_one_comparison(paper: tuple[Path, str]) -> None:
    home, printed = paper
    rows = read_csv(home / "tables/heads.csv")
    assert {row["run"] for row in rows if row["run"]} >= set(RUNS)
    heads = {(row["run"], row["head"]) for row in rows}
    assert heads >= {(run, "logistic") for run in ("sweep", "cnn-frozen", "autoencoder")}
    assert heads >= {("depths", f"unfreeze-{depth}") for depth in (0, 1, 2)} | {
        ("cnn", "unfreeze-2")
    }
    assert all(0 <= float(row["auroc"]) <= 1 for row in rows)
    assert r"\begin{tabular}" in (home / "tables/heads.tex").read_text()
    assert "shoulder" in (home / "tables/regions.tex").read_text().lower()
    assert {row["region"] for row in read_csv(home / "tables/regions.csv")} >= REGIONS
    assert "cnn-frozen" in printed


def test_every_step_is_what_the_paper_asks(paper: tuple[Path, str]) -> None:
    home, _ = paper
    runs = {run: json.loads((home / "runs" / run / "run.json").read_text()) for run in RUNS}
    sources = ["demo", "demo", "cnn", "cnn", "autoencoder"]
    assert [runs[run]["encoder"]["source"] for run in RUNS] == sources
    depths = runs["depths"]
    board = runs["sweep"]["leaderboard"]
    best = next(entry["head"] for entry in board if entry["head"] in ("mlp", "logistic"))
    assert depths["asked"]["start"]["head"] == best
    assert depths["asked"]["trunk"] == "float16"
    assert runs["cnn"]["asked"]["depths"] == ["all"]
    assert all(not run["left_out"] for run in runs.values())


def test_a_second_run_does_nothing_again(paper: tuple[Path, str], bin_path: Path) -> None:
    home, _ = paper
    before = files_below(home)
    done = reproduce(home.parent, bin_path)
    assert done.returncode == 0, done.stderr
    assert files_below(home) == before
    assert "Page: the paper/report/index.html" in done.stdout


def test_it_stops_at_the_first_failure_with_what_the_command_says(
    paper: tuple[Path, str], bin_path: Path
) -> None:
    home, _ = paper
    before = files_below(home)
    done = reproduce(home.parent, bin_path, CNN="microsoft/resnet-50")
    assert done.returncode == 2
    assert "microsoft/resnet-50 was not fetched before, and HF_HUB_OFFLINE is set" in (
        " ".join((done.stdout + done.stderr).split())
    )
    assert "extract" not in done.stdout
    assert files_below(home) == before


def test_tables_are_not_written_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "tables").write_text("mine")
    with pytest.raises(RunError, match=r"tables is a file\. Choose a directory"):
        write_tables({}, tmp_path / "tables")
