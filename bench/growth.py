"""Measure how time and memory grow with images, configurations, rows, columns and patients.

    .venv/bin/python bench/growth.py --out bench/results/growth.json
    .venv/bin/python bench/growth.py --only rows --out bench/results/growth.json   # others stay
    .venv/bin/python bench/growth.py --divide 50                  # does it all work?

Everything is synthetic:

- `images`: `extract` of small PNGs into a stand-in device that takes no time, so that only reading,
  hashing, decoding, queues and shards are timed.
- `configurations`: `medembed sweep` of MLPs, one pooling, three folds, as a whole process.
- `rows`: `load_embeddings` with every hash verified, and `medembed sweep` of one logistic head and
  of one LightGBM in two folds, as whole processes, 64 columns.
- `columns`: the same of 1,500 rows, of which the widest has 27 layers of 1,152 columns.
- `patients`: `medembed sweep` of one logistic head on as many rows, by ever more patients.
- `classes`: the same rows with half, a tenth and a hundredth of them abnormal; the size is one over
  that share.

The exponent b of seconds = a · n^b is fitted by least squares to the logarithms; `last` is the
exponent between the two largest sizes, which start-up distorts least. A b of 1 is linear. Ratios
are the cost of one image, configuration, row, … at the largest size over that at the smallest.

`memory` is the peak of all processes of a sweep, each page counted once. `beyond` is what of it is
neither the table itself, rows × columns × 4 bytes, nor there with the smallest one. `copies` is
that in tables, at the largest size: 0 where memory is flat beyond the data. `estimate` is the upper
bound that the sweep compares with the machine's memory, over the peak.
`machines` has the processor of each part.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np

from made_table import make_table, write_table
from measuring import machine, progress, write_results
from medembed.cache.embeddings import load_embeddings
from medembed.dataset.manifest import Manifest
from medembed.extraction import extract
from medembed.extraction.writer import Timeline
from medembed.sweeps.memory import MemoryNeed
from peak_memory import watch
from standin import SleepingEncoder, write_images

IMAGES = (1_000, 10_000, 100_000)
CONFIGURATIONS = (8, 64, 512)
ROWS = (1_000, 10_000, 100_000, 1_000_000)
COLUMNS = (256, 1_152, 5_184, 31_104)
PATIENTS = (100, 1_000, 10_000)
SHARES = (0.5, 0.1, 0.01)
SWEEP_ROWS, SWEEP_COLUMNS = 4_000, 128
ROWS_COLUMNS, COLUMNS_ROWS, PATIENTS_ROWS = 64, 1_500, 20_000
FLOOR = "[logistic]\nconfigs = 1\n"
MLPS = (
    "\n[mlp]\nconfigs = {n}\nhidden = [[64], [128], [128, 64]]\n"
    "lr = {{ low = 3e-4, high = 5e-3, log = true }}\n"
)

Point = dict[int, float]


class Growth:
    """Seconds of everything by size, and memory of sweeps by size."""

    def __init__(self) -> None:
        self.seconds: dict[str, Point] = {}
        self.memory: dict[str, dict[int, dict[str, float]]] = {}

    def time(self, what: str, size: int, function: Callable[[], Any]) -> None:
        """Keep a call's wall time in seconds."""
        start = time.perf_counter()
        function()
        self.seconds.setdefault(what, {})[size] = round(time.perf_counter() - start, 3)
        progress(f"{what} {size:,}: {self.seconds[what][size]} s")

    def sweep(self, what: str, size: int, place: Path, head: str, space: str, folds: int) -> None:
        """Keep seconds and memory of a whole `medembed sweep` of one head with a given space."""
        run = place / f"{what}-{size}"
        run.with_suffix(".toml").write_text(space)
        command = [sys.executable, "-m", "medembed", "sweep", str(place / "cache")]
        command += [str(place / "manifest.parquet"), "--out", str(run), "--heads", head]
        command += ["--space", str(run.with_suffix(".toml")), "--folds", str(folds), "--json"]
        done = watch(command)
        need = MemoryNeed(*_shape(place), n_folds=folds)
        self.seconds.setdefault(what, {})[size] = done.seconds
        self.memory.setdefault(what, {})[size] = {
            "peak_gb": done.peak_gb,
            "table_gb": round(_shape(place)[0] * _shape(place)[2] * 4 / 1e9, 4),
            "estimate_gb": round(need.bytes_with(joblib.cpu_count()) / 1e9, 3),
        }
        progress(f"{what} {size:,}: {done.seconds} s, {done.peak_gb} GB")


def _shape(place: Path) -> tuple[int, int, int]:
    n_rows, n_trained, n_columns = json.loads((place / "shape.json").read_text())
    return n_rows, n_trained, n_columns


def write(place: Path, n_rows: int, n_patients: int, width: int, share: float = 0.4) -> Path:
    """Write a made table, and its shape beside it."""
    place.mkdir(exist_ok=True)
    table = make_table(n_rows, n_patients, width, share=share)
    write_table(table, place)
    shape = (len(table.X), int((~table.is_test).sum()), width)
    (place / "shape.json").write_text(json.dumps(shape))
    return place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--divide", type=int, default=1, help="by which sizes are smaller")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--largest", type=int, help="leave out larger sizes of rows")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    chosen = given.only.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"--only {unknown[0]}: choose among {', '.join(PARTS)}")
    results: dict[str, Any] = {"seconds": {}, "memory": {}}
    if given.out and given.out.exists():  # of the other parts
        results |= json.loads(given.out.read_text())
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            found = Growth()
            PARTS[name](found, Path(folder), given.divide, given.largest)
        for key in ("seconds", "memory"):
            results.setdefault(key, {}).update(getattr(found, key))
        machines = {**results.get("machines", {}), name: machine()}
        results = {**summarise(results), "machines": machines}
        if given.out:
            write_results(given.out, results)
    if not given.out:
        print(json.dumps(results, indent=2))


def summarise(results: dict[str, Any]) -> dict[str, Any]:
    """Return the results with ratios, exponents and memory beyond the data."""
    seconds = {what: as_point(points) for what, points in results["seconds"].items()}
    memory = {what: add_beyond(points) for what, points in results["memory"].items()}
    return {
        "ratios": {what: cost_ratio(points) for what, points in seconds.items()},
        "exponents": {what: exponents(points) for what, points in seconds.items()},
        "largest_exponent": max(exponents(points)["fitted"] for points in seconds.values()),
        "copies": {what: copies(points) for what, points in memory.items()},
        "estimate": estimate_range(memory),
        "seconds": seconds,
        "memory": memory,
        "sweep": {
            "rows": SWEEP_ROWS,
            "columns": SWEEP_COLUMNS,
            "columns_of_rows": ROWS_COLUMNS,
            "rows_of_columns": COLUMNS_ROWS,
            "rows_of_patients": PATIENTS_ROWS,
        },
        "synthetic": True,
    }


def as_point(points: dict[Any, float]) -> Point:
    return {int(size): value for size, value in points.items()}


def add_beyond(points: dict[Any, dict[str, float]]) -> dict[int, dict[str, float]]:
    first = next(iter(points.values()))
    base = first["peak_gb"] - first["table_gb"]
    return {
        int(size): {**own, "beyond_gb": round(own["peak_gb"] - own["table_gb"] - base, 3)}
        for size, own in points.items()
    }


def copies(points: dict[int, dict[str, float]]) -> float:
    """Return the memory beyond table and smallest sweep, in tables, at the largest size."""
    last = list(points.values())[-1]
    return round(last["beyond_gb"] / last["table_gb"], 2)


def estimate_range(memory: dict[str, dict[int, dict[str, float]]]) -> dict[str, float]:
    """Return the least and the most that the estimate is of the peak."""
    shares = [
        own["estimate_gb"] / own["peak_gb"] for points in memory.values() for own in points.values()
    ]
    return {"least": round(min(shares), 2), "most": round(max(shares), 2)} if shares else {}


def exponents(points: Point) -> dict[str, float]:
    """Return the exponent fitted over all sizes, and that between the last two."""
    x, y = np.log(list(points)), np.log(list(points.values()))
    slope = np.polyfit(x, y, 1)[0]
    last = (y[-1] - y[-2]) / (x[-1] - x[-2])
    return {"fitted": round(float(slope), 3), "last": round(float(last), 3)}


def cost_ratio(points: Point) -> float:
    """Return the unit cost at the largest size divided by that at the smallest."""
    sizes = list(points)
    return round(points[sizes[-1]] / sizes[-1] / (points[sizes[0]] / sizes[0]), 4)


def grow_images(found: Growth, place: Path, divide: int, _largest: int | None) -> None:
    sizes = [n // divide for n in IMAGES]
    whole = write_images(place / "images", sizes[-1], 48, 40)
    for n in sizes:
        manifest = Manifest(whole.rows.iloc[:n].reset_index(drop=True), whole.label_level)
        encoder = SleepingEncoder(64, 0.0, 0.0, Timeline())
        cache = place / f"cache{n}"
        found.time(
            "images",
            n,
            lambda m=manifest, e=encoder, c=cache: extract(
                m, place / "images", e, c, batch_size=64
            ),
        )


def grow_configurations(found: Growth, place: Path, divide: int, _largest: int | None) -> None:
    write(place, SWEEP_ROWS, SWEEP_ROWS // 3, SWEEP_COLUMNS)
    for n in CONFIGURATIONS if divide == 1 else CONFIGURATIONS[:2]:
        found.sweep("configurations", n, place, "mlp", FLOOR + MLPS.format(n=n), 3)


def grow_rows(found: Growth, place: Path, divide: int, largest: int | None) -> None:
    for n in (n // divide for n in ROWS if largest is None or n <= largest):
        own = write(place / str(n), n, n // 3, ROWS_COLUMNS)
        found.time(
            "rows_loaded", n, lambda p=own: load_embeddings(p / "cache", p / "manifest.parquet")
        )
        found.sweep("rows_logistic", n, own, "logistic", FLOOR, 2)
        trees = f"{FLOOR}\n[lightgbm]\nconfigs = 1\n"
        found.sweep("rows_lightgbm", n, own, "lightgbm", trees, 2)


def grow_columns(found: Growth, place: Path, divide: int, _largest: int | None) -> None:
    for width in (n // min(divide, 16) for n in COLUMNS):
        own = write(place / str(width), COLUMNS_ROWS, COLUMNS_ROWS // 3, width)
        found.sweep("columns_logistic", width, own, "logistic", FLOOR, 2)
        found.sweep("columns_mlp", width, own, "mlp", FLOOR + MLPS.format(n=8), 2)


def grow_patients(found: Growth, place: Path, divide: int, _largest: int | None) -> None:
    n_rows = PATIENTS_ROWS // min(divide, 10)
    for n in (n // min(divide, 5) for n in PATIENTS):
        own = write(place / str(n), n_rows, min(n, n_rows), ROWS_COLUMNS)
        found.sweep("patients", n, own, "logistic", FLOOR, 2)


def grow_classes(found: Growth, place: Path, divide: int, _largest: int | None) -> None:
    n_rows = PATIENTS_ROWS // min(divide, 5)
    for share in SHARES:
        own = write(place / str(share), n_rows, n_rows // 3, ROWS_COLUMNS, share)
        found.sweep("classes", round(1 / share), own, "logistic", FLOOR, 2)


PARTS: dict[str, Callable[[Growth, Path, int, int | None], None]] = {
    "images": grow_images,
    "configurations": grow_configurations,
    "rows": grow_rows,
    "columns": grow_columns,
    "patients": grow_patients,
    "classes": grow_classes,
}


if __name__ == "__main__":
    main()
