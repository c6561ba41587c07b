"""The wheel works alone: no checkout, no network."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


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


def test_the_demo_runs_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site), "HOME": str(work), "HF_HUB_OFFLINE": "1"}
    where = "import medembed; print(medembed.__file__)"
    for arguments in (["-c", where], ["-m", "medembed", "demo", "out", "--patients", "60"]):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        if arguments[0] == "-c":
            assert done.stdout.startswith(str(site))
    assert (work / "out" / "report" / "index.html").is_file()
    assert "synthetic" in done.stdout.lower()
