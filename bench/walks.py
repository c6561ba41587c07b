"""Count the modules that a walk through the package enters, before and after its rebuilding.

    .venv/bin/python bench/walks.py --out bench/results/walks.json

Each walk runs in a process of its own, on a few synthetic images; a profiler there, and in every
process that it starts, writes down each module of the package that a call enters, and each pair of
modules between which a call passes. What runs while a module is imported does not count. `--before`
names the commit that HEAD is compared with; both packages are taken from git. The script drives
the command line, whose names are a contract, so that it measures both trees alike.

Two more walks are of a person, who adds a head or a pooling: the files that have to change. They
were counted by hand before; `tests/test_contributing.py` holds what they are now.
"""

import argparse
import csv
import datetime as dt
import importlib
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

from measuring import write_results

ROOT = Path(__file__).resolve().parents[1]
BEFORE = "e033235"  # the last commit before the modules moved to the floors and names of the field
BY_HAND = {
    "before": {"new_head": 9, "new_pooling": 6},
    "after": {
        "new_head": ["heads/NEW.py", "heads/registry.py"],
        "new_pooling": ["core/poolings.py"],
    },
}
RECIPE = """
name = "walks"
licence = "synthetic"
citation = "none"
url = "https://example.org"
layout = "table"
label_level = "study"
[table]
file = "labels.csv"
image = "file"
patient = "patient"
study = ["patient"]
[region]
column = "region"
[label]
column = "finding"
normal = ["no"]
abnormal = ["yes"]
[split]
column = "split"
"""
# Python runs a `sitecustomize` in every process that finds one on its path.
PROFILER = '''
import os, sys, threading

sys.path.insert(0, os.environ["WALKS_PACKAGE"])  # before what site-packages link to
ROOT = os.path.join(os.environ["WALKS_PACKAGE"], "medembed") + os.sep
seen = set()


def name_of(frame):
    """Return the module of a frame of ours, else None."""
    path = frame.f_code.co_filename
    is_ours = path.startswith(ROOT) and path.endswith(".py")  # templates have code, too
    return path[len(ROOT):] if is_ours else None


def is_importing(frame):
    while frame is not None:
        is_module = frame.f_code.co_name == "<module>" and name_of(frame)
        if is_module and frame.f_globals.get("__name__") != "__main__":
            return True
        frame = frame.f_back
    return False


def note(frame, event, argument):
    if event != "call":
        return
    entered = name_of(frame)
    if entered is None:
        return
    caller = frame.f_back
    while caller is not None and name_of(caller) is None:
        caller = caller.f_back
    pair = (name_of(caller) if caller is not None else "", entered)
    if pair in seen or pair[0] == entered and entered in seen or is_importing(frame):
        return
    seen.update((pair, entered))
    os.write(LOG, "{}\\t{}\\n".format(*pair).encode())


if "WALKS_LOG" in os.environ:
    LOG = os.open(os.environ["WALKS_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    threading.setprofile(note)
    sys.setprofile(note)
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", default=BEFORE, help="the commit to compare with")
    parser.add_argument("--out", type=Path, default=Path("bench/results/walks.json"))
    parser.add_argument("--figure", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.figure:
        draw(*given.figure)
        return
    commits = {"before": given.before, "after": "HEAD"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        walks = {
            when: walk(unpack(commit, folder / when), folder / f"walks-{when}")
            for when, commit in commits.items()
        }
    found = {when: {**describe(commits[when]), **walks[when]} for when in walks}
    by_hand = {name: len(files) for name, files in BY_HAND["after"].items()}
    counts = {
        when: {**{walk: own["n_modules"] for walk, own in walks[when].items()}, **hand}
        for when, hand in (("before", BY_HAND["before"]), ("after", by_hand))
    }
    ratios = {name: counts["after"][name] / n for name, n in counts["before"].items()}
    results = {"ratios": ratios, "modules": counts, "by_hand": BY_HAND, **found}
    write_results(given.out, {**results, "measured": dt.datetime.now(dt.UTC).date().isoformat()})


def unpack(commit: str, folder: Path) -> Path:
    """Write the package as it was at a commit."""
    parts = ["git", "-C", str(ROOT), "archive", commit, "medembed", "data_manifests"]
    packed = subprocess.run(parts, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def describe(commit: str) -> dict[str, str]:
    """Return a commit's number and date."""
    asked = ["git", "-C", str(ROOT), "show", "-s", "--format=%h %cs", commit]
    number, date = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split()
    return {"commit": number, "date": date}


def walk(tree: Path, folder: Path) -> dict[str, Any]:
    """Walk through one tree; return per walk the modules, their number, and that of the pairs."""
    images = write_images(folder)
    one, caches, hook = folder / "one.csv", folder / "caches", folder / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(PROFILER)

    def run(*words: Any, log: Path | None = None, command: tuple[str, ...] = ()) -> None:
        environment = {**os.environ, "PYTHONPATH": str(hook), "WALKS_PACKAGE": str(tree)}
        environment |= {} if log is None else {"WALKS_LOG": str(log)}
        full = [sys.executable, *(command or ("-m", "medembed")), *map(str, words)]
        done = subprocess.run(full, env=environment, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(full)}: {done.stderr}")

    run("manifest", "build", folder / "recipe.toml", "--image-root", images, "-o", "all.csv")
    keep_first(folder / "all.csv", one)
    encoder = ("--image-root", images, "--encoder", "demo", "--device", "cpu")
    run("extract", "all.csv", *encoder, "--cache", caches / "all", "--decoders", 1)
    sweep = ("--heads", "logistic", "--configs", 1, "--folds", 2, "--jobs", 1)
    run("sweep", caches / "all", "all.csv", "--out", "run", *sweep)

    logs = {name: folder / f"{name}.log" for name in WALKS}
    to_shard, to_predictions, to_figure, to_page = logs.values()
    new = ("--cache", caches / "new", "--decoders", 1)
    run("extract", one, *encoder, *new, log=to_shard)
    model = folder / "run/models/logistic"
    run("predict", model, "--manifest", one, "--cache", caches / "all", log=to_predictions)
    run(folder / "run", "roc.svg", command=(__file__, "--figure"), log=to_figure)
    run("report", "run", "-o", "page", log=to_page)
    return {name: read_log(log) for name, log in logs.items()}


WALKS = (
    "image_to_shard",
    "sha256_to_predictions",
    "probability_to_roc_figure",
    "probability_to_page",
)


def draw(run: Path, out: Path) -> None:
    """Draw a run's ROC curves by the functions that the page calls; only their homes have moved."""
    from medembed.results.alignment import align_runs
    from medembed.results.comparison import compare_aligned, open_runs

    home = "report" if importlib.util.find_spec("medembed.report") else "results"
    figures = importlib.import_module(f"medembed.{home}.figures")
    runs = open_runs([run])
    test_set = align_runs(runs, "study", ())
    plot = figures.plot_roc(compare_aligned(runs, test_set), test_set)
    out.write_bytes(plot.light_svg)


def write_images(folder: Path) -> Path:
    """Write 40 patients with an image each, grey noise that is brighter where it is abnormal."""
    import numpy as np
    from PIL import Image

    images = folder / "images"
    images.mkdir(parents=True)
    (folder / "recipe.toml").write_text(RECIPE)
    generator = np.random.default_rng(0)
    lines = [["file", "patient", "region", "finding", "split"]]
    for k in range(40):
        finding, split = ("yes", "no")[k % 2], ("train", "train", "test", "test")[k % 4]
        pixels = generator.normal(90 + 25 * (k % 2), 40, (64, 64)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(images / f"{k}.png")
        lines.append([f"{k}.png", f"p{k}", ("hand", "wrist")[k // 4 % 2], finding, split])
    with (images / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    return images


def keep_first(manifest: Path, out: Path) -> None:
    """Write a manifest of the first test row alone."""
    lines = manifest.read_text().splitlines()
    head = next(k for k, line in enumerate(lines) if not line.startswith("#"))
    columns = lines[head].split(",")
    row = next(r for r in lines[head + 1 :] if r.split(",")[columns.index("split")] == "test")
    out.write_text("\n".join([*lines[: head + 1], row, ""]))


def read_log(path: Path) -> dict[str, Any]:
    """Return what a walk's processes have written down."""
    pairs = {tuple(line.split("\t")) for line in path.read_text().splitlines()}
    modules = sorted({entered for _, entered in pairs})
    crossings = sum(caller not in ("", entered) for caller, entered in pairs)
    return {"n_modules": len(modules), "n_crossings": crossings, "modules": modules}


if __name__ == "__main__":
    main()
