"""Time `load_embeddings` against `np.load` of an equal array and torch's widening.

    .venv/bin/python bench/cache.py --out bench/results/cache.json

The cache holds as many rows of synthetic numbers as MURA has training images, in shards like those
of `extract`; the peer reads these float16 values from one .npy and widens them to float32, without
any check. Each load opens the cache again. The files are in the page cache.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch

from measuring import alternate, write_results
from medembed.cache.embeddings import load_embeddings
from medembed.cache.shards import max_rows
from medembed.cache.spec import CacheSpec, hex_from_keys
from medembed.cache.store import create_cache
from medembed.dataset.manifest import Manifest, make_manifest, write_manifest


def make(place: Path, n_rows: int, n_values: int) -> Manifest:
    """Write a cache, its rows as one array, and their manifest."""
    spec = CacheSpec("ab" * 32, {"width": 896}, {"mean": (n_values,)}, "float16")
    cache = create_cache(place / "cache", spec, {"source": "made up"})
    generator = np.random.default_rng(0)
    keys = generator.integers(0, 256, (n_rows, 32), dtype=np.uint8)
    values = generator.standard_normal((n_rows, n_values), np.float32).astype(np.float16)
    with mock.patch("os.fsync"):  # the disk is not what is measured
        for start in range(0, n_rows, max_rows(spec)):
            rows = slice(start, start + max_rows(spec))
            cache.commit(keys[rows], {"mean": values[rows]})
    np.save(place / "rows.npy", values)
    patients = [f"patient{number // 4:06d}" for number in range(n_rows)]
    table = pd.DataFrame(
        {
            "image": [f"{p}/study1/{number:06d}.png" for number, p in enumerate(patients)],
            "sha256": hex_from_keys(keys),
            "patient": patients,
            "study": [f"{patient}/study1" for patient in patients],
            "region": "elbow",
            "label": [str(number // 4 % 2) for number in range(n_rows)],
            "split": "train",
        }
    )
    manifest = make_manifest(table, "study")
    write_manifest(manifest, place / "manifest.parquet")
    return manifest


def timed(load: Callable[[], object]) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        load()
        return time.perf_counter() - start

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=36_808)
    parser.add_argument("--values", type=int, default=1152)
    parser.add_argument("--runs", type=int, default=25)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        manifest = make(place, given.rows, given.values)
        cache, array = place / "cache", place / "rows.npy"
        jobs = {
            "np.load + torch float()": lambda: torch.from_numpy(np.load(array)).float(),
            "np.load + astype": lambda: np.load(array).astype(np.float32),
            "load_embeddings": lambda: load_embeddings(cache, manifest),
            "load_embeddings verify=False": lambda: load_embeddings(cache, manifest, verify=False),
            "load_embeddings manifest.parquet": lambda: load_embeddings(
                cache, place / "manifest.parquet"
            ),
        }
        assert np.array_equal(load_embeddings(cache, manifest).X, np.load(array))
        seconds = alternate({job: timed(load) for job, load in jobs.items()}, given.runs)
    medians = {job: statistics.median(values) for job, values in seconds.items()}
    peer = medians["np.load + torch float()"]
    ratios = {job: round(median / peer, 3) for job, median in medians.items()}
    results = {"rows": given.rows, "values": given.values, "seconds": seconds, "ratios": ratios}
    if given.out:
        write_results(given.out, results)
    else:
        print(medians, ratios)


if __name__ == "__main__":
    main()
