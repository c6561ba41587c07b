"""The benchmarks' own book-keeping: what is run, what counts as worse, what the page says."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import suite  # noqa: E402


def write(folder: Path, part: suite.Part, values: dict[str, Any]) -> None:
    """Write a part's results with these numbers at these dotted keys."""
    results: dict[str, Any] = {}
    for key, value in values.items():
        *groups, name = key.split(".")
        place = results
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    folder.mkdir(exist_ok=True)
    (folder / part.file).write_text(json.dumps(results))


def part_named(name: str) -> suite.Part:
    return next(part for part in suite.PARTS if part.name == name)


def test_every_part_names_a_script_and_figures_that_its_results_have() -> None:
    for part in suite.PARTS:
        assert (ROOT / "bench" / part.command.split()[0]).is_file(), part.name
        assert part.figures, part.name
        results = suite.read(suite.RESULTS / part.file)
        for figure in part.figures:
            assert figure.better in {"higher", "lower"}, figure.key
            # a misspelt key would stand on the page as "not measured" for ever
            group = figure.key.rpartition(".")[0]
            assert not results or not group or group.split(".")[0] in results, figure.key


def test_the_committed_page_is_what_the_committed_results_say() -> None:
    assert (ROOT / "bench" / "RESULTS.md").read_text() == suite.render(suite.RESULTS)


@pytest.mark.parametrize(
    ("name", "key", "before", "now", "is_worse"),
    [
        ("sweep", "ratios.mlp_vs_gridsearch", 10.0, 8.4, False),
        ("sweep", "ratios.mlp_vs_gridsearch", 10.0, 8.2, True),
        ("sweep", "ratios.mlp_vs_gridsearch", 10.0, 30.0, False),
        ("startup", "ratios.help_vs_import_click", 1.0, 1.19, False),
        ("startup", "ratios.help_vs_import_click", 1.0, 1.21, True),
        ("startup", "ratios.help_vs_import_click", 1.0, 0.1, False),
        ("sweep", "ratios.mlp_vs_gridsearch", 10.0, "not measured", True),
        ("sweep", "ratios.mlp_vs_gridsearch", "not measured", 1.0, False),
        ("sweep", "default_sweep.avx2.seconds", 100.0, 300.0, False),  # seconds are the machine's
    ],
)
def test_a_ratio_is_worse_beyond_a_fifth_in_its_own_direction(
    name: str, key: str, before: Any, now: Any, is_worse: bool, tmp_path: Path
) -> None:
    part = part_named(name)
    write(tmp_path / "before", part, {key: before})
    write(tmp_path / "now", part, {key: now})
    found = list(suite.regressions([part], tmp_path / "before", tmp_path / "now"))
    assert bool(found) is is_worse
    assert all(key in one.line for one in found)


def test_check_exits_1_and_names_what_got_worse(tmp_path: Path) -> None:
    part = part_named("startup")
    write(tmp_path / "before", part, {"ratios.help_vs_import_click": 1.0})
    write(tmp_path / "now", part, {"ratios.help_vs_import_click": 2.5})
    folders = ["--against", str(tmp_path / "before"), "--fresh", str(tmp_path / "now")]
    command = [sys.executable, str(ROOT / "bench" / "suite.py"), "--check", "--only", "startup"]
    done = subprocess.run([*command, *folders], capture_output=True, text=True)
    assert done.returncode == 1
    assert "was 1 and is 2.5" in done.stdout


@pytest.mark.parametrize(
    ("first", "second", "status", "n_runs"),
    [
        ((1.0, 1.0), None, 0, 1),
        ((2.0, 1.0), (1.0, 1.0), 0, 2),
        ((2.0, 1.0), (2.0, 1.0), 1, 2),
        ((2.0, 1.0), (1.0, 2.0), 0, 2),  # never twice the same
    ],
)
def test_a_ratio_fails_that_is_worse_twice(
    first: tuple[float, float],
    second: tuple[float, float] | None,
    status: int,
    n_runs: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parts = [part_named("startup"), part_named("cache")]
    keys = [figure.key for figure in parts[1].figures[:2]]
    write(tmp_path / "before", parts[0], {"ratios.help_vs_import_click": 1.0})
    write(tmp_path / "before", parts[1], dict.fromkeys(keys, 1.0))
    measured = iter([first, second])
    ran = []

    def run(chosen: list[suite.Part], folder: Path) -> None:
        ran.append([part.name for part in chosen])
        write(folder, parts[0], {"ratios.help_vs_import_click": 1.0})
        write(folder, parts[1], dict(zip(keys, next(measured) or (), strict=True)))

    monkeypatch.setattr(suite, "run", run)
    assert suite.check(parts, tmp_path / "before", None) == status
    assert ran == [["startup", "cache"], ["cache"]][:n_runs]
    assert (f"{keys[0]} was 1 and is 2\n" in capsys.readouterr().out) is bool(status)


def test_a_missed_limit_and_a_missing_number_are_said(tmp_path: Path) -> None:
    part = part_named("sweep")
    write(tmp_path, part, {"gflops_share": 0.5, "ratios.mlp_vs_gridsearch": 30.0})
    page = suite.render(tmp_path)
    assert "0.5 × (missed)" in page
    assert "| 30 × |" in page
    assert "not measured" in page


def test_words_in_a_numbers_place_are_shown_and_are_no_regression(tmp_path: Path) -> None:
    part, key = part_named("sweep"), "ratios.mlp_vs_gridsearch_early_stopping"
    write(tmp_path, part, {key: "not measured: not ended"})
    assert "| not measured: not ended |" in suite.render(tmp_path)
    assert not list(suite.regressions([part], tmp_path, tmp_path))


def test_the_gpus_table_says_what_was_measured_and_what_not(tmp_path: Path) -> None:
    assert suite.render(tmp_path).count("| not measured |\n") >= len(suite.GPU_FIGURES)
    found: dict[str, Any] = {
        "device": "cuda",
        "ratios": {"forward_vs_peak": 0.7, "compiled_vs_eager": "not measured"},
        "steps": {"versions": {"card": "H200"}, "canary": {"distances": {"max": 0.0036}}},
    }
    (tmp_path / suite.GPU_FILE).write_text(json.dumps(found))
    page = suite.render(tmp_path)
    assert "`bench/gpu_check.py`, on H200." in page
    assert "| bf16 peak, 8192³ | 0.7 × |" in page
    assert "| distance of `max` in bf16 | limit 0.02 | 0.0036 |" in page
    assert "| distance of `mean` in bf16 | limit 0.02 | not measured |" in page
    found["device"] = "cpu"  # a trial of the check is no measurement
    (tmp_path / suite.GPU_FILE).write_text(json.dumps(found))
    assert "on no GPU yet" in suite.render(tmp_path)
    assert "0.7 ×" not in suite.render(tmp_path)


def test_the_gpus_table_asks_for_what_the_check_writes() -> None:
    import gpu_check

    ratios = gpu_check.ratios({})
    for key, *_ in suite.GPU_FIGURES:
        group, name, *_ = key.split(".")
        assert name in (ratios if group == "ratios" else gpu_check.STEPS), key
