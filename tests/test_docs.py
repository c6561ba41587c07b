"""Every block of README, tutorials and how-to guides runs as printed, in one reader's home.

The data are synthetic: MURA's layout, a folder per class, another clinic's table, DICOM files. The
hub is on loopback, with random towers under the names that the pages use, and so is S3. Launchers
that this machine lacks are stand-ins that start what they are given. Pages run in the order in
which a reader would take them and share caches and runs; a command that stands on several pages
runs once, and the environment asks for fewer configurations than the defaults. All of this takes
minutes, so `make docs` runs it and `make test` does not.

A comment above a block says what the block itself cannot: `<!-- file: space.toml -->` is a file,
`<!-- not run -->` cannot run here.
"""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3_server
from cli_commands import COMMANDS
from doc_pages import DOCS, PAGES, README, ROOT
from hub_server import Hub, serving
from made_dicom import dicom
from made_gemma import make_gemma

from medembed.demo.cohort import DemoView, draw_cohort, write_view
from tools.cli_pages import COMMON, render_pages
from tools.schema_page import render_page

RUN = [
    README,
    *(DOCS / "tutorials" / f"{name}.md" for name in ("own-folder", "mura", "dicom")),
    *(DOCS / "how-to" / f"{name}.md" for name in ("medgemma", "recipe", "clusters", "buckets")),
    *(
        DOCS / "how-to" / f"{name}.md"
        for name in ("cache", "sweep", "fine-tune", "compare", "similar", "label", "shortcuts")
    ),
    DOCS / "tutorials" / "another-hospital.md",
    *(DOCS / "how-to" / f"{name}.md" for name in ("apply-a-model", "python", "extend")),
]
"""Pages in the order in which they run: what one makes, those after it may use."""

N_PATIENTS = 90
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
FEWER = {
    "MEDEMBED_DEMO_PATIENTS": "40",
    "MEDEMBED_SWEEP_CONFIGS": "2",
    "MEDEMBED_FINETUNE_EPOCHS": "2",
    "MEDEMBED_AUTOENCODER_EPOCHS": "2",
}

slow = pytest.mark.skipif(
    not os.environ.get("MEDEMBED_DOCS"), reason="takes minutes; `make docs` runs it"
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, its line, and what the comment above it says."""

    language: str
    text: str
    line: int
    mark: str = ""
    value: str = ""


def read_blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(
        r"(?:^<!-- ([\w ]+?)(?:: (.+?))? -->\n)?^```(\w+)\n(.*?)^```$", text, re.M | re.S
    )
    return [
        Block(m[3], m[4], text[: m.start(3)].count("\n") + 2, m[1] or "", m[2] or "") for m in found
    ]


def commands_of(block: Block) -> list[str]:
    """Join continued lines and drop comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


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
    """Write a folder per class; the names of files begin with the patient."""
    counts: Counter[str] = Counter()
    for view in views:
        patient = "p" + view.patient[-3:]
        counts[patient] += 1
        folder = root / ("fracture" if view.label else "normal")
        folder.mkdir(parents=True, exist_ok=True)
        write_view(view, folder / f"{patient}_{counts[patient]}.png", size=96)


def write_clinic(root: Path, views: list[DemoView]) -> None:
    """Write images and a table as another program writes it: semicolons, commas, Windows-1252."""
    (root / "images").mkdir(parents=True)
    with (root / "labels.csv").open("w", newline="", encoding="cp1252") as file:
        table = csv.writer(file, delimiter=";")
        table.writerow(["Datei", "Patient", "Aufnahme", "Alter", "Körperteil", "Befund"])
        for number, view in enumerate(views):
            name = f"bild {number}.png"
            write_view(view, root / "images" / name, size=96)
            finding = "auffällig" if view.label else "unauffällig"
            age = f"{20 + number % 60},5"
            table.writerow([name, view.patient, view.study, age, view.region, finding])


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


def write_shards(root: Path, views: list[DemoView]) -> None:
    """Write tar files with a table of values beside each image."""
    root.mkdir()
    with tarfile.open(root / "shard-0.tar", "w") as tar:
        for number, view in enumerate(views):
            write_view(view, root / "view.png", size=96)
            own = {"patient": view.patient, "study": view.study, "region": view.region}
            split = "test" if int(view.patient[-1]) % 4 == 0 else "train"
            own |= {"label": view.label, "split": split}
            (root / "view.json").write_text(json.dumps(own))
            for suffix in (".png", ".json"):
                tar.add(root / f"view{suffix}", f"{number:04d}{suffix}")
    for path in root.glob("view.*"):
        path.unlink()


def make_dataset(place: Path, views: list[DemoView]) -> dict[str, bytes]:
    """Return a dataset of the hub: a Parquet file of images with their patients and classes."""
    rows = []
    for view in views:
        image = {"bytes": write_view(view, place / "view.png", size=96), "path": None}
        about = {"patient_id": view.patient, "region": view.region}
        rows.append({"image": image, "label": ("normal", "abnormal")[view.label], **about})
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return {"data/train-00000-of-00001.parquet": file.getvalue()}


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
    hub.put("datasets/clinic/films", make_dataset(place, draw_cohort(40, seed=4)))
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
        "aws": f"""
            exec {sys.executable} -c '
            import sys
            from pathlib import Path
            from medembed.core.locations import parse_location
            from medembed.core.object_store import put_object
            root, place = Path(sys.argv[3]), parse_location(sys.argv[4])
            for path in root.rglob("*.png"):
                put_object(place / path.relative_to(root).as_posix(), path.read_bytes())
            ' "$@"
        """,
    }
    for name, text in scripts.items():
        (place / name).write_text("#!/bin/bash\nset -e" + dedent(text))
        (place / name).chmod(0o755)


@dataclass
class Home:
    """A reader's home: where the blocks run, with which environment, and what ran already."""

    path: Path
    environment: dict[str, str]
    ran: set[str] = field(default_factory=set)

    def run(self, command: list[str]) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command,
            cwd=self.path,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def keep(self, name: str, text: str) -> None:
        """Write the file that a block is; of a package, what its installation leaves behind."""
        if name != "pyproject.toml":
            path = self.path / ("lib" if name.endswith(".py") else "") / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        info = self.path / "lib" / "nearest_mean-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nearest-mean\nVersion: 1\n")
        groups = tomllib.loads(text)["project"]["entry-points"]
        lines = [
            line for g, own in groups.items() for line in (f"[{g}]", *map(" = ".join, own.items()))
        ]
        (info / "entry_points.txt").write_text("\n".join([*lines, ""]))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    path = tmp_path_factory.mktemp("reader")
    write_mura(path / "MURA-v1.1", draw_cohort(N_PATIENTS))
    write_films(path / "films", draw_cohort(N_PATIENTS, seed=1))
    write_clinic(path / "clinic", draw_cohort(60, seed=2))
    write_pacs(path / "pacs")
    write_shards(path / "shards", draw_cohort(20, seed=3))
    shutil.copytree(ROOT / "examples", path / "examples")
    write_stand_ins(path / "bin")
    installed = Path(sys.executable).parent
    made = make_hub(tmp_path_factory.mktemp("hub"))
    with serving(made) as hub, s3_server.serving() as s3:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = {
            **kept,
            **FEWER,
            **s3.environ,
            "HOME": str(path),
            "COLUMNS": "80",
            "PATH": f"{path / 'bin'}:{installed}:{os.environ['PATH']}",
            "PYTHONPATH": str(path / "lib"),
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(path / "hub"),
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        yield Home(path, environment)


def shape(line: str) -> str:
    """Return a line of output without what differs from one run to the next: numbers, widths."""
    return " ".join(re.sub(r"[-+]?\d[\d.,]*|[─-]{2,}", " ", line).split())


def run_block(block: Block, home: Home, where: str) -> str | None:
    """Run a block; return what it printed, or None where all of it ran before."""
    if block.language == "python":
        commands = [[sys.executable, "-c", block.text]]
    else:
        assert block.language == "sh", f"{where}: a block of {block.language}"
        commands = [["bash", "-c", line] for line in commands_of(block)]
    printed = None
    for command in commands:
        text = " ".join(command[-1].partition("   #")[0].split())
        if text in home.ran:
            continue
        home.ran.add(text)
        began = time.perf_counter()
        done = home.run(command)
        printed = (printed or "") + done.stdout + done.stderr
        print(f"{time.perf_counter() - began:.1f} s $ {command[-1]}")
        print(f"{done.stdout[-2000:]}{done.stderr[-2000:]}")
        allowed = {0, 1} if "manifest check" in command[-1] else {0}
        assert done.returncode in allowed, f"{where}: {command[-1]}\n{done.stdout}{done.stderr}"
    return printed


@slow
@pytest.mark.parametrize("page", RUN, ids=lambda path: path.stem)
def test_every_block_runs_as_printed(page: Path, home: Home) -> None:
    printed: str | None = None
    for block in read_blocks(page):
        where = f"{page.relative_to(ROOT)} line {block.line}"
        if block.mark == "file":
            home.keep(block.value, block.text)
        elif block.language == "text":  # what the block before printed
            known = [shape(line) for line in (printed or "").splitlines()]
            for line in block.text.splitlines() if printed else ():
                start, cut, _ = shape(line).partition("…")
                found = any(k.startswith(start) if cut else k == start for k in known)
                assert found, f"{where}: {line}\n{printed}"
        elif block.mark == "not run":
            printed = None
        else:
            printed = run_block(block, home, where)


def test_every_tutorial_and_guide_is_run() -> None:
    written = {p for kind in ("tutorials", "how-to") for p in (DOCS / kind).glob("*.md")}
    assert {p for p in written if p.stem != "index"} == set(RUN) - {README}


def test_few_blocks_do_not_run() -> None:
    blocks = [block for page in RUN for block in read_blocks(page) if block.mark == "not run"]
    assert {block.text.split()[1] for block in blocks} == {
        "setup",
        "reproduce",
        "--logdir",
        "extract",
        "manifest",  # texts, of a checkpoint with words
    }


def test_the_readme_can_be_read_at_one_sitting() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_links_to_or_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        path = (page.parent / target).resolve() if target else page
        if path.parent == DOCS / "reference" / "cli":  # made by `make docs`
            assert path.name in render_pages(), target
            continue
        if path == DOCS / "reference" / "schemas.md":
            continue
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
            known = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
            assert anchor in known, f"{target}#{anchor}"
    for name in re.findall(
        r"`((?:examples|bench|data_manifests|tests|docs)/(?!build/)[\w./-]+)`", text
    ):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("name", COMMANDS)
def test_the_reference_shows_every_option_and_example(name: str) -> None:
    page = render_pages()[f"{name.split()[1]}.md"]
    section = page.partition(f":::{{program}} {name}\n")[2].partition("\n:::{program}")[0]
    command = COMMANDS[name]
    for option in (o for o in command.params if isinstance(o, click.Option)):
        long = max(option.opts, key=len)
        assert option.hidden or long in section or any(long in known for known in COMMON), long
    for example in command.examples:
        assert " ".join(example.split()) in " ".join(section.replace("\\\n", "").split())


def test_the_schemas_page_has_each_file_and_its_keys(tmp_path: Path) -> None:
    schema = {"title": "A file", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    (tmp_path / "one.json").write_text(json.dumps(schema))
    page = render_page(tmp_path)
    assert "A file: {download}`one.json" in page
    assert "- `n` (integer, required)" in page


def test_heads_and_encoders_of_ones_own_are_short() -> None:
    for block in read_blocks(DOCS / "how-to" / "extend.md"):
        if block.language == "python":
            assert len(block.text.splitlines()) < 30, f"line {block.line}"
