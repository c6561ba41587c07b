"""Measure time and memory of inspecting a simulated cache and manifest with many rows.

    .venv/bin/python bench/large.py --rows 10000000 --out bench/results/large.json
    .venv/bin/python bench/large.py --rows 200000 --values 1152 --out bench/results/verify.json

The commands are timed as whole processes: `medembed cache info CACHE`, with and without a manifest
of equally many rows, 1 % of them missing, and `medembed cache verify CACHE`, compared with
`sha256sum` of the shards. Everything is synthetic: rows of zeros under random keys. The files are
in the page cache.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from measuring import alternate, time_command, write_results
from medembed.cache.shards import MAX_SHARD_ROWS
from medembed.cache.spec import CacheSpec, hex_from_keys
from medembed.cache.store import create_cache

MISSING = 0.01


def make(directory: Path, n_rows: int, n_values: int) -> None:
    """Write a cache, and a manifest in which each row's patient has one study of four images."""
    spec = CacheSpec("ab" * 32, {"width": 8}, {"mean": (n_values,)}, "float16")
    cache = create_cache(directory / "cache", spec, {"source": "made up"})
    generator = np.random.default_rng(0)
    writer = None
    with mock.patch("os.fsync"):  # the disk is not what is measured
        for start in range(0, n_rows, MAX_SHARD_ROWS):
            n = min(MAX_SHARD_ROWS, n_rows - start)
            keys = generator.integers(0, 256, (n, 32), dtype=np.uint8)
            kept = keys[: n - int(MISSING * n)]
            cache.commit(kept, {"mean": np.zeros((len(kept), n_values), np.float32)})
            rows = manifest_rows(keys, np.arange(start, start + n))
            writer = writer or pq.ParquetWriter(directory / "manifest.parquet", rows.schema)
            writer.write_table(rows)
    assert writer
    writer.close()


def manifest_rows(keys: np.ndarray, numbers: np.ndarray) -> pa.Table:
    patients = [f"patient{number // 4:08d}" for number in numbers.tolist()]
    return pa.table(
        {
            "image": [
                f"{patient}/study1/image{number % 4}.png"
                for patient, number in zip(patients, numbers.tolist(), strict=True)
            ],
            "sha256": hex_from_keys(keys),
            "patient": patients,
            "study": [f"{patient}/study1" for patient in patients],
            "region": ["elbow"] * len(numbers),
            "label": numbers // 4 % 2,
            "split": ["test" if number % 40 < 4 else "train" for number in numbers // 4 * 4],
            "label_level": ["study"] * len(numbers),
        }
    )


def watch(command: list[str]) -> dict[str, float]:
    """Run a command; return its seconds and its peak of resident memory in GB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, command
    seconds = time.perf_counter() - start
    return {"seconds": round(seconds, 2), "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--values", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        make(place, given.rows, given.values)
        cache = str(place / "cache")
        medembed = [sys.executable, "-m", "medembed", "cache"]
        info = [*medembed, "info", cache, "--json"]
        manifest = [*info, "--manifest", str(place / "manifest.parquet")]
        coverage = json.loads(subprocess.check_output(manifest))["coverage"]
        assert coverage["rows"] == given.rows
        looks = {
            "info": [watch(info) for _ in range(given.runs)],
            "info_with_manifest": [watch(manifest)],
        }
        hashing = f"find {cache}/shards -name '*.h5' | xargs -P {os.cpu_count()} -n 64 sha256sum"
        seconds = alternate(
            {
                "cache verify": lambda: time_command([*medembed, "verify", cache]),
                "xargs -P sha256sum": lambda: time_command(["sh", "-c", hashing]),
            },
            given.runs,
        )
    medians = {job: statistics.median(values) for job, values in seconds.items()}
    results = {
        "rows": given.rows,
        "values": given.values,
        "coverage": coverage,
        "looks": looks,
        "seconds": seconds,
        "ratios": {
            "verify_vs_sha256sum": medians["cache verify"] / medians["xargs -P sha256sum"],
        },
    }
    print(json.dumps(looks, indent=2))
    if given.out:
        write_results(given.out, results)


if __name__ == "__main__":
    main()
