"""The check that is run on a GPU: every step, on a CPU with a tiny tower."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import gpu_check  # noqa: E402


def test_every_step_runs_on_a_cpu_and_leaves_its_result(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "bench" / "gpu_check.py"), "--device", "cpu", "--tiny"]
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=tmp_path, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(out.read_text())
    assert next(iter(document)) == "ratios"
    steps = document["steps"]
    assert list(steps) == list(gpu_check.STEPS)
    assert [name for name, found in steps.items() if "skipped" in found] == ["memory"]
    assert steps["workers"]["rows"] == gpu_check.TINY["images"]
    assert max(steps["canary"]["distances"].values()) < steps["canary"]["limit"]
    assert document["ratios"]["compiled_vs_eager"] == "not measured"


def test_a_step_that_fails_or_lacks_a_library_does_not_cost_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(check: gpu_check.Check) -> dict[str, str]:
        raise ModuleNotFoundError("No module named 'h5py'")

    def broken(check: gpu_check.Check) -> dict[str, str]:
        raise ValueError("of no use")

    def last(check: gpu_check.Check) -> dict[str, str]:
        before = json.loads(out.read_text())["steps"]
        assert list(before) == ["lacking", "broken"]  # written before this step began
        return {"well": "done"}

    out = tmp_path / "results" / "gpu.json"
    monkeypatch.setattr(
        gpu_check, "STEPS", {step.__name__: step for step in (lacking, broken, last)}
    )
    check = gpu_check.Check("cpu", gpu_check.TINY, tmp_path)
    assert gpu_check.run(check, ["lacking", "broken", "last"], out) == 1
    steps = json.loads(out.read_text())["steps"]
    assert "h5py" in steps["lacking"]["skipped"]
    assert steps["broken"]["failed"] == "ValueError: of no use"
    assert steps["last"]["well"] == "done"


def test_a_tiny_run_never_replaces_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OUT", raising=False)
    assert gpu_check.default_out(tiny=True) is None
    assert gpu_check.default_out(tiny=False) == gpu_check.RESULTS
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu_check.default_out(tiny=True) == tmp_path / "gpu.json"


def test_the_towers_arithmetic_is_what_was_counted_by_hand() -> None:
    """A block of 202 GFLOP, of which projections 43.5, attention 77.3 and MLP 81.2."""
    assert gpu_check.tflop(gpu_check.FULL["tower"]) == pytest.approx(5.46, abs=0.01)
