"""A named pipe in the place of any file that a command opens is one error, at once.

A real data set, cache, run and model; each file in turn is replaced, and the real command runs in a
process of its own, which a pipe that is opened would block for ever.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from made_dicom import dataset, write
from made_finetuning import make_cohort
from preloaded import commands

from medembed.autoencoder.checkpoint import CheckpointDir
from medembed.cache.embeddings import map_rows
from medembed.cache.store import open_cache
from medembed.core.errors import ShardError
from medembed.core.files import write_atomically
from medembed.dataset.manifest import read_manifest, write_manifest
from medembed.finetuning.training import read_state
from medembed.results.runs import open_run

SECONDS = 60  # until a command counts as hanging; it takes about one
RECIPE = """
name = "mine"
licence = "none"
citation = "none"
url = "https://example.org"
layout = "table"
label_level = "image"
[table]
file = "labels.csv"
image = "image"
patient = ["patient"]
[region]
column = "region"
[label]
column = "label"
normal = ["0"]
abnormal = ["1"]
[split]
fraction = 0.3
"""
DICOM = """
name = "mine"
licence = "none"
citation = "none"
url = "https://example.org"
layout = "dicom"
label_level = "study"
[split]
fraction = 0.3
"""
SWEEP = "sweep cache manifest.csv --out run --heads logistic --configs 1 --folds 2 --jobs 1"


@dataclass(frozen=True)
class Case:
    """A file, with a star where its name is a hash, and the command that opens it."""

    path: str
    command: str
    status: int = 1


BUILD = "manifest build recipe.toml --image-root images -o out.csv"
TREE = "manifest build dicom.toml --image-root dicoms -o out.csv --key-file key"
CASES = (
    Case("images/patient002/view0.png", "extract manifest.csv --image-root images --encoder demo "
         "--device cpu --cache new", 0),
    Case("images/patient002/view0.png", BUILD, status=0),  # left out, and said
    Case("images/patient002/view0.png", "manifest check manifest.csv --image-root images"),
    Case("images/patient002/view0.png", "predict run/models/logistic --manifest manifest.csv "
         "--image-root images --device cpu"),
    Case("recipe.toml", BUILD),
    Case("images/labels.csv", BUILD),
    Case("dicoms/1", TREE, 0),
    Case("key", TREE),
    Case("manifest.csv", "manifest check manifest.csv"),
    Case("manifest.parquet", "manifest check manifest.parquet"),
    Case("manifest.parquet", "cache info cache --manifest manifest.parquet"),
    Case("cache/cache.json", "cache info cache"),
    Case("cache/failures.jsonl", "cache info cache"),
    Case("cache/shards/*.h5", "cache verify cache"),
    Case("cache/shards/*.h5", "cache export cache manifest.csv -o out.npz"),
    Case("space.toml", f"{SWEEP} --space space.toml"),
    Case("unfinished/run.json", SWEEP.replace("run", "unfinished")),
    Case("unfinished/trials.jsonl", SWEEP.replace("run", "unfinished")),
    Case("unfinished/.lock", SWEEP.replace("run", "unfinished")),
    Case("run/run.json", "compare run"),
    Case("run/predictions.parquet", "compare run"),
    Case("run/predictions.parquet", "report run -o page"),
    Case("run/models/logistic/model.json", "predict run/models/logistic nothing.png"),
    Case("run/models/logistic/head.safetensors", "evaluate run/models/logistic cache manifest.csv "
         "--out other"),
    Case("demo/demo.json", "demo demo --patients 40"),
)  # fmt: skip


@pytest.fixture(scope="module")
def run_command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with commands(tmp_path_factory.mktemp("commands"), {**os.environ}) as directory:
        yield directory / "medembed"


@pytest.fixture(scope="module")
def sound(run_command: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make all files that there are."""
    home = tmp_path_factory.mktemp("sound")
    manifest = make_cohort(home)
    write_manifest(manifest, home / "manifest.parquet")
    table = manifest.rows[["image", "patient", "region", "label"]]
    table.to_csv(home / "images" / "labels.csv", index=False)
    (home / "recipe.toml").write_text(RECIPE)
    (home / "dicom.toml").write_text(DICOM)
    (home / "space.toml").write_text("[logistic]\nC = 1.0\n")
    (home / "key").write_text("0123456789abcdef\n")
    (home / "dicoms").mkdir()
    for number in range(4):
        made = dataset(np.full((8, 8), 100 + number, np.uint16), PatientID=f"{number}")
        made.Modality, made.StudyInstanceUID = "CR", f"1.2.{number}"
        (home / "dicoms" / str(number)).write_bytes(write(made))
    (home / "demo").mkdir()
    (home / "demo" / "demo.json").write_text(json.dumps({"patients": 40, "seed": 0}))
    extract = "extract manifest.csv --image-root images --encoder demo --device cpu --cache cache"
    for command in (extract, SWEEP):
        done = subprocess.run([run_command, *command.split()], cwd=home, capture_output=True)
        assert done.returncode == 0, done.stderr
    (home / "cache" / "failures.jsonl").touch()
    shutil.copytree(home / "run", home / "unfinished")
    (home / "unfinished" / "scores.json").unlink()
    return home


def in_place(sound: Path, home: Path, pattern: str) -> Path:
    """Copy all files, and put a pipe in the place of one."""
    shutil.copytree(sound, home, dirs_exist_ok=True)
    [path] = home.glob(pattern)
    path.unlink()
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.path}-{case.command.split()[0]}")
def test_a_pipe_in_a_files_place_is_one_error_at_once(
    case: Case, run_command: Path, sound: Path, tmp_path: Path
) -> None:
    path = in_place(sound, tmp_path, case.path)
    done = subprocess.run(
        [run_command, *case.command.split()],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    said = done.stderr + done.stdout
    assert done.returncode == case.status, said
    assert "Traceback" not in said
    assert path.is_fifo()
    reasons = ("named pipe", "not a plain file", "is not a file", "neither a file nor a")
    assert any(reason in said for reason in reasons), said
    # A tree of DICOM is summed up by reasons.
    assert path.name in said or case.path.startswith("dicoms"), said


def test_files_that_libraries_open_are_refused_too(sound: Path, tmp_path: Path) -> None:
    path = in_place(sound, tmp_path, "cache/shards/*.h5")
    path.unlink()
    cache, rows = open_cache(sound / "cache"), read_manifest(sound / "manifest.csv").rows
    keys = cache.keys()[: len(rows)]
    mapped = map_rows(cache, keys, "mean")
    assert np.array_equal(mapped.take(np.arange(len(keys))), cache.read(keys, ["mean"])["mean"])
    os.mkfifo(path)
    with pytest.raises(ShardError, match="named pipe"):
        map_rows(open_cache(tmp_path / "cache"), keys, "mean")
    os.mkfifo(tmp_path / "state")
    assert read_state(tmp_path / "state", "key") is None
    work = CheckpointDir(tmp_path / "encoder", {})
    work.path.mkdir()
    for name in ("state.safetensors", *(p.name for p in work.path.iterdir())):
        os.mkfifo(work.path / name)
    assert work.load() is None
    (tmp_path / "run" / "folds").mkdir()
    os.mkfifo(tmp_path / "run" / "folds" / "key.npy")
    assert open_run(tmp_path / "run").kept_fold("key") is None


@pytest.mark.parametrize("name", ["/dev/null", "pipe"])
def test_nothing_special_is_replaced_by_what_is_written(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"it is a (device|named pipe), not a file"):
        write_atomically(tmp_path / name, b"film")
    assert Path("/dev/null").is_char_device()
    assert (tmp_path / "pipe").is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
