"""The whole workflow in one call: draw radiographs, then run the jobs that users run on theirs."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from medembed import extraction, sweeps
from medembed.core.errors import RunError
from medembed.core.files import json_bytes, read_plain, write_atomically
from medembed.core.system import count_cores, end_with_parent
from medembed.dataset.build_file import write_build
from medembed.dataset.manifest import Manifest
from medembed.dataset.recipes.build import build_manifest, load_recipe
from medembed.demo.cohort import DemoView, draw_cohort, view_name, write_views
from medembed.encoders.loading import load_encoder
from medembed.report.cases import CaseSources
from medembed.report.gallery import make_thumbnails
from medembed.report.page import write_report

__all__ = ["RECIPE", "ShowProgress", "run_demo"]

ShowProgress = Callable[[str, str], AbstractContextManager[Callable[[int, int], None]]]

REPORT = (
    "medembed report runs/sweep -o report --level study --manifest manifest.csv "
    "--image-root images --cache cache --seed 0"
)
"""The command that makes the demo's page again, in its directory."""
RECIPE = """\
# What images/labels.csv means. A recipe for a table of your own looks like this one.
name = "medembed demo"
licence = "Apache-2.0"
citation = "Synthetic radiographs drawn by medembed; nobody is in them"
url = ""
layout = "table"
label_level = "study"

[table]
file = "labels.csv"
image = "image"
patient = "patient"
study = "study"
covariates = "synthetic"

[region]
column = "region"

[label]
column = "finding"
abnormal = "abnormal"
normal = "normal"

# Further questions about each study, for `medembed sweep --target fracture,implant,lesion`.
[targets.fracture]
column = "kind"
positive = ["line", "displaced"]
empty = "negative"
others = "negative"

[targets.implant]
column = "kind"
positive = ["implant"]
empty = "negative"
others = "negative"

[targets.lesion]
column = "kind"
positive = ["lesion"]
empty = "negative"
others = "negative"

[split]
fraction = 0.3
seed = 0
"""
_CHUNK = 16  # images drawn by one task


def run_demo(
    directory: str | Path,
    *,
    n_patients: int = 400,
    seed: int = 0,
    show_progress: ShowProgress | None = None,
) -> dict[str, object]:
    """Draw a cohort and process it from recipe to page.

    Writes `directory/{recipe.toml, images/, manifest.csv, cache/, runs/sweep/, report/}`. A second
    call with the same arguments does only what is missing.

    Returns
    -------
    dict
        `leaderboard` of `medembed.sweeps.sweep`, `page` (its path), and `synthetic`, True.

    Raises
    ------
    RunError
        `directory` holds something else, or a demo with other arguments.
    """
    show = show_progress or _show_nothing
    home = Path(directory)
    _claim(home, {"demo": 1, "patients": n_patients, "seed": seed})
    manifest = _build(home, n_patients, seed, show)
    with show("Embedding", "images") as progress:
        extraction.extract(
            manifest, home / "images", load_encoder("demo"), home / "cache", progress=progress
        )
    place = home / "runs" / "sweep"
    place.parent.mkdir(exist_ok=True)
    with show("Training", "fits") as progress:
        run = sweeps.sweep(
            home / "cache", home / "manifest.csv", place, seed=seed, progress=progress
        )
    report = write_report(
        [run],
        home / "report",
        find_thumbnails=lambda wanted: make_thumbnails(manifest, home / "images", wanted),
        manifest=manifest,
        command=REPORT,
        cases=CaseSources(cache=home / "cache"),
    )
    return {"leaderboard": run.as_dict()["leaderboard"], "page": report["page"], "synthetic": True}


@contextmanager
def _show_nothing(_label: str, _unit: str) -> Iterator[Callable[[int, int], None]]:
    yield lambda _done, _total: None


def _claim(home: Path, asked: dict[str, int]) -> None:
    """Mark `home` as this demo's directory; refuse one that holds something else."""
    note = home / "demo.json"
    if note.exists():
        held = _read_note(note)
        if held != asked:
            raise RunError(
                f"{home} holds a demo of {held.get('patients')} patients and seed "
                f"{held.get('seed')}; this one asks for {asked['patients']} and {asked['seed']}. "
                "Name another directory."
            )
        return
    # A crash between the directory and its note leaves at most a hidden partial file.
    if home.exists() and (not home.is_dir() or any(p.name[0] != "." for p in home.iterdir())):
        raise RunError(f"{home} is not empty and holds no demo. Name a directory of its own.")
    home.mkdir(parents=True, exist_ok=True)
    write_atomically(note, json_bytes(asked))


def _read_note(note: Path) -> dict[str, Any]:
    try:
        held = json.loads(read_plain(note))
    except (ValueError, RecursionError):
        held = None
    if not isinstance(held, dict):
        raise RunError(f"{note} was damaged and does not describe a demo. Name another directory.")
    return held


def _build(home: Path, n_patients: int, seed: int, show: ShowProgress) -> Manifest:
    views = draw_cohort(n_patients, seed)
    images = home / "images"
    with show("Drawing", "images") as progress:
        _draw(views, images, progress)
    write_atomically(images / "labels.csv", _table(views))
    write_atomically(home / "recipe.toml", RECIPE.encode())
    with show("Hashing", "images") as progress:
        recipe = load_recipe(home / "recipe.toml")
        report = build_manifest(recipe, images, strict=True, progress=progress)
    write_build(report, recipe, home / "manifest.csv")
    return report.manifest


def _table(views: Sequence[DemoView]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "patient", "study", "region", "finding", "kind", "synthetic"])
    for view in views:
        finding = "abnormal" if view.label else "normal"
        names = [view_name(view), view.patient, view.study, view.region]
        writer.writerow([*names, finding, view.kind, 1])
    return text.getvalue().encode()


def _draw(views: Sequence[DemoView], images: Path, progress: Callable[[int, int], None]) -> None:
    """Draw the missing views, on all cores."""
    missing = [view for view in views if not (images / view_name(view)).is_file()]
    chunks = [missing[start : start + _CHUNK] for start in range(0, len(missing), _CHUNK)]
    done = len(views) - len(missing)
    progress(done, len(views))
    if not chunks:
        return
    with ProcessPoolExecutor(
        count_cores(), mp_context=get_context("spawn"), initializer=end_with_parent
    ) as pool:
        for n_drawn in pool.map(write_views, chunks, [images] * len(chunks)):
            done += n_drawn
            progress(done, len(views))
