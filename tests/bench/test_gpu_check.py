"""The check that is run on a GPU: every step, on a CPU with a tiny tower."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import gpu_check  # noqa: E402

LATER = ("lightgbm", "pydicom", "pyarrow", "pydantic")  # which no step needs
UNUSED = ("sklearn", "joblib", "scipy", "matplotlib", "peft", "ray", "pylibjpeg")


def without(place: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Give the environment of a process, and of its own, that lacks some libraries."""
    place.mkdir()
    (place / "sitecustomize.py").write_text(f"""
from importlib.machinery import PathFinder

find = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {names} else find(name, path, target)

PathFinder.find_spec = staticmethod(find_spec)
""")
    return {**os.environ, "PYTHONPATH": str(place)}


@pytest.mark.slow
def test_every_step_runs_on_a_cpu_and_leaves_its_result(tmp_path: Path) -> None:
    """On a machine that lacks what only other parts of the package need."""
    out = tmp_path / "gpu.json"
    lacking = without(tmp_path / "lacking", LATER)
    command = [sys.executable, str(ROOT / "bench" / "gpu_check.py"), "--device", "cpu", "--tiny"]
    done = subprocess.run(
        [*command, "--out", str(out)],
        cwd=tmp_path,
        env=lacking,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(out.read_text())
    assert next(iter(document)) == "ratios"
    steps = document["steps"]
    assert list(steps) == list(gpu_check.STEPS)
    assert [name for name, found in steps.items() if "skipped" in found] == ["memory"]
    assert steps["workers"]["rows"] == gpu_check.TINY["images"]
    assert steps["training"]["block"]["losses"] == steps["training"]["trunk_cache"]["losses"]
    assert "skipped" not in steps["training"]["lora"]
    missing = {name for name, text in steps["versions"].items() if "missing" in str(text)}
    assert missing <= {"triton", "torchvision"}
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


def test_extraction_needs_no_library_of_the_later_stages(tmp_path: Path) -> None:
    """Of PNGs that a manifest in CSV names, from a checkout that is not installed."""
    from medembed.cache.embeddings import load_embeddings
    from medembed.dataset.manifest import write_manifest
    from standin import write_images

    manifest = write_images(tmp_path / "images", 3, 40, 36)
    write_manifest(manifest, tmp_path / "manifest.csv")
    lacking = without(tmp_path / "lacking", (*LATER, *UNUSED))
    lacking["PYTHONPATH"] += os.pathsep + str(ROOT)
    command = [sys.executable, "-m", "medembed", "extract", "manifest.csv", "--encoder", "demo"]
    command += ["--image-root", "images", "--cache", "cache", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, env=lacking, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(load_embeddings(tmp_path / "cache", manifest, pool="mean").X) == 3


def test_the_wheels_are_all_that_the_check_imports() -> None:
    """What is neither there nor carried along would end a step."""
    lists = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu_check.py"), "--wheels"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert lists.stdout.split() == list(gpu_check.WHEELS)
    assert not {*LATER, "matplotlib", "ray"} & {*gpu_check.WHEELS, *gpu_check.NEEDED}
