"""What lies in examples/ is run, or checked by the library that reads it."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import click
import jsonschema
import nbclient
import nbformat
import pytest
import yaml
from made_sweeps import make_data

from medembed.cli import main
from medembed.core.locations import BucketPath

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "scikit_learn_on_a_cache.ipynb"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the notebook's own libraries
def test_the_notebook_runs_and_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, manifest = make_data(tmp_path / "data", {"mean": 2.0, "max": 1.0})
    monkeypatch.setenv("CACHE", str(cache))
    monkeypatch.setenv("MANIFEST", str(manifest))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:  # the made table has fewer columns than the demo's cache
        cell.source = cell.source.replace("PCA(16,", "PCA(4,")
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=tmp_path)
    printed = "".join(output.text for cell in notebook.cells for output in cell.get("outputs", []))
    auroc = float(re.search(r"AUROC by study: ([\d.]+)", printed).group(1))
    assert 0.75 < auroc <= 1
    low, high = re.search(r"patients: ([\d.]+) to ([\d.]+)", printed).groups()
    assert float(low) <= auroc <= float(high)


def test_the_notebook_is_committed_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


def slurm(place: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script with a `medembed` that prints what it was given, a line each."""
    stub = place / "stub"
    stub.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    stub.chmod(0o755)
    command = ["bash", str(EXAMPLES / "extract.slurm"), *arguments]
    env = {"PATH": os.environ["PATH"], "MEDEMBED": str(stub), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_the_slurm_script_asks_for_its_own_share(tmp_path: Path) -> None:
    own = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_CPUS_PER_TASK": "6"}
    done = slurm(tmp_path, "a manifest.csv", "/images", "demo", "/cache", **own)
    assert done.returncode == 0, done.stderr
    # what it would have run is a command that medembed takes
    name, *options = done.stdout.splitlines()
    command = main.get_command(click.Context(main), name)
    assert command is not None
    given = command.make_context(name, options).params
    assert (given["worker"].index, given["worker"].count, given["decoders"]) == (3, 8, 6)
    assert str(given["manifest_path"]) == "a manifest.csv"


def check_extraction(words: list[str], worker: tuple[int, int]) -> None:
    """Check that medembed takes a command line, in buckets and for this worker."""
    command = main.get_command(click.Context(main), words[0])
    assert command is not None
    given = command.make_context(words[0], list(words[1:])).params
    assert (given["worker"].index, given["worker"].count) == worker
    assert isinstance(given["image_root"], BucketPath)
    assert isinstance(given["cache_path"], BucketPath)


def test_the_slurm_script_takes_buckets(tmp_path: Path) -> None:
    own = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "4"}
    done = slurm(tmp_path, "m.csv", "s3://bucket/images", "demo", "s3://bucket/cache", **own)
    check_extraction(done.stdout.splitlines(), (1, 4))


def test_the_job_of_skypilot_asks_for_its_nodes_share(tmp_path: Path) -> None:
    job: dict[str, Any] = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())
    stub = tmp_path / "stub"
    stub.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    stub.chmod(0o755)
    nodes = {"SKYPILOT_NODE_RANK": "2", "SKYPILOT_NUM_NODES": str(job["num_nodes"])}
    env = {"PATH": os.environ["PATH"], "MEDEMBED": str(stub), **job["envs"], **nodes}
    command = ["bash", "-euc", job["run"]]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    check_extraction(done.stdout.splitlines(), (2, 4))
    assert job["resources"]["use_spot"]
    extras = re.search(r"'\.\[(.+?)\]'", job["setup"]).group(1).split(",")
    declared = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", declared, re.MULTILINE) for extra in extras)


def test_the_job_of_modal_starts_every_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modal itself is not installed: a stand-in calls what it is given."""

    class Function:
        def __init__(self, function: Any) -> None:
            self.function = function

        def starmap(self, shares: list[tuple[Any, ...]]) -> list[None]:
            return [self.function(*share) for share in shares]

    modal = MagicMock()
    modal.App.return_value.function.return_value = Function
    modal.App.return_value.local_entrypoint.return_value = lambda function: function
    monkeypatch.setitem(sys.modules, "modal", modal)
    script = runpy.run_path(str(EXAMPLES / "modal_extract.py"))
    ran: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda words, check: ran.append(words))
    (tmp_path / "m.csv").write_text("image")
    script["main"](str(tmp_path / "m.csv"), "s3://bucket/images", "s3://bucket/cache", workers=3)
    for number, words in enumerate(ran):
        check_extraction(words[1:], (number, 3))
    assert len(ran) == 3


def test_the_slurm_script_says_its_usage(tmp_path: Path) -> None:
    done = slurm(tmp_path, "mura.csv")
    assert done.returncode == 2
    assert "MANIFEST IMAGE_ROOT ENCODER CACHE" in done.stderr


@pytest.mark.parametrize("name", ["ray-cluster.yaml", "ray-spot.yaml"])
def test_the_cluster_file_is_one_that_ray_takes(name: str) -> None:
    config: dict[str, Any] = yaml.safe_load((EXAMPLES / name).read_text())
    schema = json.loads(files("ray.autoscaler").joinpath("ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    assert "--address=$RAY_HEAD_IP" in " ".join(config["worker_start_ray_commands"])


@pytest.mark.skipif(
    not os.environ.get("MEDEMBED_SOAK"), reason="an image is built with MEDEMBED_SOAK=1 only"
)
def test_the_image_builds() -> None:
    builders = [b for b in ("docker", "podman") if shutil.which(b)]
    working = [
        b for b in builders if subprocess.run([b, "info"], capture_output=True).returncode == 0
    ]
    if not working:
        pytest.skip("no builder of images answers here")
    command = [working[0], "build", "-f", str(EXAMPLES / "Dockerfile"), str(ROOT)]
    subprocess.run(command, check=True)


def test_the_dockerfile_reads_well() -> None:
    file = EXAMPLES / "Dockerfile"
    text = file.read_text().replace("\\\n", " ")
    steps = [line.split(None, 1) for line in text.splitlines() if line and line[0] != "#"]
    for _, names in (step for step in steps if step[0] == "COPY"):
        *sources, _target = names.split()
        assert all((ROOT / source).exists() for source in sources), names
    words = [step[0] for step in steps]
    assert words[0] == "FROM"
    assert ":" in steps[0][1], "a base without a tag changes under one's feet"
    assert words.index("USER") < words.index("ENTRYPOINT"), "it would run as root"
    torch = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    assert torch in text, "another torch than the Makefile's"
    extras = re.search(r"'\.\[(.+?)\]'", text).group(1).split(",")
    declared = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", declared, re.MULTILINE) for extra in extras)
