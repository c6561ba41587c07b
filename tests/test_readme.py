"""Every block of the README runs as printed, in a home where its data and its hub are at hand.

The data are synthetic, laid out as MURA is; the hub is on loopback, with random towers under the
names that the README uses. Launchers that this machine lacks are stand-ins: what they start is
started. It takes minutes, so `make docs` runs it, not `make test`.
"""

import csv
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
from hub_server import Hub, serving
from made_dicom import dicom
from made_gemma import make_gemma

from medembed.demo.cohort import DemoView, draw_cohort, write_view

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
N_PATIENTS = 90
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}

pytestmark = pytest.mark.skipif(
    not os.environ.get("MEDEMBED_DOCS"), reason="takes minutes; `make docs` runs it"
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line that it begins at."""

    language: str
    text: str
    line: int


def read_blocks(text: str) -> list[Block]:
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(m[1], m[2], text[: m.start()].count("\n") + 2) for m in found]


def commands_of(block: Block) -> list[str]:
    """Join continued lines; `make demo` and `make test` are what runs this."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith(("make ", "#"))]


def write_mura(root: Path, views: list[DemoView]) -> None:
    """Lay synthetic studies out as MURA v1.1: every fourth patient in `valid`."""
    images: dict[str, list[str]] = {"train": [], "valid": []}
    studies: dict[str, dict[str, int]] = {"train": {}, "valid": {}}
    for view in views:
        number = int(view.patient.removeprefix("patient"))
        split = "valid" if number % 4 == 0 else "train"
        word = "positive" if view.label else "negative"
        study = f"{split}/XR_{view.region.upper()}/patient{number:05d}"
        study += f"/study{view.study.rsplit('study', 1)[1]}_{word}"
        path = root / study / f"image{view.projection + 1}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_view(view, path, size=96)
        images[split].append(f"MURA-v1.1/{study}/{path.name}")
        studies[split][f"MURA-v1.1/{study}/"] = view.label
    for split in images:
        (root / f"{split}_image_paths.csv").write_text("\n".join([*images[split], ""]))
        lines = [f"{study},{label}" for study, label in studies[split].items()]
        (root / f"{split}_labeled_studies.csv").write_text("\n".join([*lines, ""]))


def write_films(root: Path, views: list[DemoView]) -> None:
    """Write the images and the table that the README's own recipe reads."""
    root.mkdir()
    with (root / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "patient", "exam", "part", "finding"])
        for number, view in enumerate(views):
            write_view(view, root / f"film {number}.png", size=96)
            finding = "yes" if view.label else "no"
            table.writerow([f"film {number}.png", view.patient, view.study, view.region, finding])


def write_pacs(root: Path) -> None:
    """Write a few DICOM files, without any label."""
    generator = np.random.default_rng(0)
    for number in range(6):
        path = root / f"ward {number % 2}" / f"{number:08X}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 4096, (40, 32), dtype=np.uint16)
        own = {"PatientID": f"P{number // 2}", "StudyInstanceUID": f"1.2.3.{number // 2}"}
        own |= {"SOPInstanceUID": f"1.2.3.4.{number}", "BodyPartExamined": "WRIST"}
        path.write_bytes(dicom(pixels, **own))


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def make_hub(place: Path) -> Hub:
    """Hold random towers of exactly the layouts, under the names that the README uses."""
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    hub = Hub()
    make_gemma(place / "gemma", num_hidden_layers=5)
    hub.put("google/medgemma-4b-pt", files_of(place / "gemma"))
    model = ResNetForImageClassification(ResNetConfig(**RESNET))
    model.save_pretrained(place / "resnet")
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(place / "resnet")
    hub.put("microsoft/resnet-50", files_of(place / "resnet"))
    return hub


def write_stand_ins(place: Path) -> None:
    """Write launchers that start what they are given once, as their first worker."""
    place.mkdir()
    scripts = {
        "torchrun": """
            while [ "$1" != medembed ]; do shift; done
            RANK=0 WORLD_SIZE=1 exec "$@"
        """,
        "sbatch": """
            shift
            SLURM_ARRAY_TASK_ID=0 SLURM_ARRAY_TASK_COUNT=8 exec bash "$@"
        """,
        "rsync": """
            test "$#" -eq 4
        """,
    }
    for name, text in scripts.items():
        (place / name).write_text("#!/bin/bash\nset -e" + dedent(text))
        (place / name).chmod(0o755)


@dataclass(frozen=True)
class Home:
    """A reader's home: where the blocks run, and with which environment."""

    path: Path
    environment: dict[str, str]

    def run(self, command: list[str]) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command,
            cwd=self.path,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    path = tmp_path_factory.mktemp("reader")
    views = draw_cohort(N_PATIENTS)
    write_mura(path / "MURA-v1.1", views)
    write_films(path / "films", draw_cohort(N_PATIENTS, seed=1))
    write_pacs(path / "pacs")
    shutil.copytree(ROOT / "examples", path / "examples")
    shutil.copy(ROOT / "data_manifests" / "dicom.toml", path / "dicom.toml")
    write_stand_ins(path / "bin")
    (path / "another's").mkdir()
    installed = Path(sys.executable).parent
    with serving(make_hub(tmp_path_factory.mktemp("hub"))) as hub:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = {
            **kept,
            "HOME": str(path),
            "PATH": f"{path / 'bin'}:{installed}:{os.environ['PATH']}",
            "PYTHONPATH": str(path / "lib"),
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(path / "hub"),
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        yield Home(path, environment)


def write_down(block: Block, home: Path) -> bool:
    """Put a block where the text says that it belongs; tell whether there was such a place."""
    lib = home / "lib"
    if "class NearestMeanHead" in block.text:
        lib.mkdir(exist_ok=True)
        (lib / "nearest_mean.py").write_text(block.text)
        return True
    if block.language != "toml":
        return False
    document = tomllib.loads(block.text)
    if "project" in document:  # what installing such a package leaves behind
        info = lib / "nearest_mean-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nearest-mean\nVersion: 1\n")
        groups = document["project"]["entry-points"]
        lines = [
            line for g, own in groups.items() for line in (f"[{g}]", *map(" = ".join, own.items()))
        ]
        (info / "entry_points.txt").write_text("\n".join([*lines, ""]))
    elif "layout" in document:
        (home / "mine.toml").write_text(block.text)
    else:
        (home / "space.toml").write_text(block.text)
    return True


def test_every_block_runs_as_printed(home: Home) -> None:
    n_run = 0
    for block in read_blocks(README):
        if write_down(block, home.path):
            continue
        if block.language == "python":
            commands = [[sys.executable, "-c", block.text]]
        else:
            assert block.language == "sh", f"line {block.line}: a block of {block.language}"
            commands = [["bash", "-c", line] for line in commands_of(block)]
        for command in commands:
            done = home.run(command)
            print(f"$ {command[-1]}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
            allowed = {0, 1} if "manifest check" in command[-1] else {0}
            assert done.returncode in allowed, (
                f"README line {block.line}: {command[-1]}\n{done.stdout}{done.stderr}"
            )
            n_run += 1
    assert n_run > 20
    assert (home.path / "report" / "index.html").is_file()


def test_what_the_readme_shows_or_names_is_there() -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)\s]+)\)", README):
        assert (ROOT / target).exists(), target
    headings = {
        re.sub(r"[^\w -]", "", h).lower().replace(" ", "-")
        for h in re.findall(r"^#+ (.+)$", README, re.M)
    }
    for anchor in re.findall(r"\]\(#([\w-]+)\)", README):
        assert anchor in headings, anchor
    for name in re.findall(r"`((?:examples|bench|data_manifests|tests|docs)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name


def test_heads_and_encoders_of_ones_own_are_short() -> None:
    for block in read_blocks(README):
        if block.language == "python":
            assert len(block.text.splitlines()) < 30, f"README line {block.line}"
