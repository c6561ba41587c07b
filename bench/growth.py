"""Measure how cost grows with images, configurations and rows, over two factors of ten.

    .venv/bin/python bench/growth.py --out bench/results/growth.json
    .venv/bin/python bench/growth.py --divide 50                  # does it all work?

Everything is synthetic:

- `images`: `extract` of small PNGs into a stand-in device that takes no time, so that only reading,
  hashing, decoding, queues and shards are timed.
- `configurations`: `medembed sweep` of MLPs, one pooling, three folds, as a whole process.
- `rows`: `load_embeddings` with every hash verified, and `medembed sweep` of one logistic head and
  of one LightGBM in two folds, as whole processes.

The exponent b of seconds = a · n^b is fitted by least squares to the logarithms; `last` is the
exponent between the two largest sizes, which start-up distorts least. A b of 1 is linear. Ratios
are the cost of one image, configuration or row at the largest size over that at the smallest.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from made_table import make_table, write_table
from measuring import time_command, write_results
from medembed.cache.embeddings import load_embeddings
from medembed.dataset.manifest import Manifest
from medembed.extraction import extract
from medembed.extraction.writer import Timeline
from standin import SleepingEncoder, write_images

IMAGES = (1_000, 10_000, 100_000)
CONFIGURATIONS = (8, 64, 512)
ROWS = (10_000, 100_000, 1_000_000)
SWEEP_ROWS, SWEEP_COLUMNS = 4_000, 128
ROWS_COLUMNS = 64

Point = dict[int, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--divide", type=int, default=1, help="by which sizes are smaller")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    seconds: dict[str, Point] = {}
    for measure in (grow_images, grow_configurations, grow_rows):
        with tempfile.TemporaryDirectory() as name:
            for what, points in measure(Path(name), given.divide).items():
                seconds[what] = points
                print(what, points, file=sys.stderr, flush=True)
    results = {
        "ratios": {what: cost_ratio(points) for what, points in seconds.items()},
        "exponents": {what: exponents(points) for what, points in seconds.items()},
        "seconds": seconds,
        "sweep": {"rows": SWEEP_ROWS, "columns": SWEEP_COLUMNS, "columns_of_rows": ROWS_COLUMNS},
        "synthetic": True,
    }
    if given.out:
        write_results(given.out, results)
    else:
        print(json.dumps(results, indent=2))


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


def time_call(function: Callable[[], Any]) -> float:
    """Return a call's wall time in seconds."""
    start = time.perf_counter()
    function()
    return round(time.perf_counter() - start, 3)


def grow_images(place: Path, divide: int) -> dict[str, Point]:
    sizes = [n // divide for n in IMAGES]
    whole = write_images(place / "images", sizes[-1], 48, 40)
    points = {}
    for n in sizes:
        manifest = Manifest(whole.rows.iloc[:n].reset_index(drop=True), whole.label_level)
        encoder = SleepingEncoder(64, 0.0, 0.0, Timeline())
        cache = place / f"cache{n}"
        points[n] = time_call(
            lambda m=manifest, e=encoder, c=cache: extract(m, place / "images", e, c, batch_size=64)
        )
    return {"images": points}


def sweep(place: Path, run: str, head: str, space: str, folds: int) -> float:
    """Return the seconds of a whole `medembed sweep` of one head with a given space."""
    file = place / f"{run}.toml"
    file.write_text(space)
    command = [sys.executable, "-m", "medembed", "sweep", str(place / "cache")]
    command += [str(place / "manifest.parquet"), "--out", str(place / run), "--heads", head]
    command += ["--space", str(file), "--folds", str(folds), "--json"]
    return round(time_command(command), 3)


def grow_configurations(place: Path, divide: int) -> dict[str, Point]:
    write_table(make_table(SWEEP_ROWS, SWEEP_ROWS // 3, SWEEP_COLUMNS), place)
    points = {}
    for n in CONFIGURATIONS if divide == 1 else CONFIGURATIONS[:2]:
        space = (
            f"[logistic]\nconfigs = 1\n\n[mlp]\nconfigs = {n}\nhidden = [[64], [128], [128, 64]]\n"
            "lr = { low = 3e-4, high = 5e-3, log = true }\n"
        )
        points[n] = sweep(place, f"mlp{n}", "mlp", space, 3)
    return {"configurations": points}


def grow_rows(place: Path, divide: int) -> dict[str, Point]:
    points: dict[str, Point] = {"rows_loaded": {}, "rows_logistic": {}, "rows_lightgbm": {}}
    for n in (n // divide for n in ROWS):
        own = place / str(n)
        own.mkdir()
        write_table(make_table(n, n // 3, ROWS_COLUMNS), own)
        points["rows_loaded"][n] = time_call(
            lambda p=own: load_embeddings(p / "cache", p / "manifest.parquet")
        )
        floor = "[logistic]\nconfigs = 1\n"
        points["rows_logistic"][n] = sweep(own, "logistic", "logistic", floor, 2)
        trees = f"{floor}\n[lightgbm]\nconfigs = 1\n"
        points["rows_lightgbm"][n] = sweep(own, "lightgbm", "lightgbm", trees, 2)
    return points


if __name__ == "__main__":
    main()
