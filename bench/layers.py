"""Measure the memory of a sweep over many layers, and what it said of it before it loaded rows.

    .venv/bin/python bench/layers.py --out bench/results/layers.json

`medembed sweep --pool mean@all` of the logistic head, as a whole with its processes, over a
synthetic cache of 27 layers of 36,808 rows (MURA's) and 1,152 columns (MedGemma's): random numbers
in float16, of which a layer's first column knows the label, the later the better. Each page of
memory is counted once.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
from large import manifest_rows

from measuring import write_results
from medembed.cache.shards import MAX_SHARD_ROWS
from medembed.cache.spec import CacheSpec
from medembed.cache.store import create_cache
from peak_memory import watch

SAID = re.compile(r"up to ([0-9.,]+) GB of memory")


def make(home: Path, n_rows: int, n_layers: int, n_values: int) -> None:
    """Write the cache, and a manifest with a patient for every four images."""
    names = [f"mean@{k}" for k in range(1, n_layers + 1)]
    spec = CacheSpec("ab" * 32, {"width": 8}, dict.fromkeys(names, (n_values,)), "float16")
    cache = create_cache(home / "cache", spec, {"source": "made up", "blocks": n_layers})
    generator, writer = np.random.default_rng(0), None
    size = min(MAX_SHARD_ROWS, 4096)
    with mock.patch("os.fsync"):  # the disk is not what is measured
        for start in range(0, n_rows, size):
            numbers = np.arange(start, min(start + size, n_rows))
            keys = generator.integers(0, 256, (len(numbers), 32), dtype=np.uint8)
            rows = manifest_rows(keys, numbers)
            label = np.asarray(rows["label"])
            layers = {}
            for k, name in enumerate(names):
                X = generator.standard_normal((len(numbers), n_values), np.float32)
                X[:, 0] += 2 * k / n_layers * label
                layers[name] = X
            cache.commit(keys, layers)
            writer = writer or pq.ParquetWriter(home / "manifest.parquet", rows.schema)
            writer.write_table(rows)
    assert writer
    writer.close()


def main() -> None:
    """Make the data, sweep once, and write what was said and what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=36_808)
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--values", type=int, default=1152)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        home = Path(made)
        make(home, asked.rows, asked.layers, asked.values)
        words = [sys.executable, "-m", "medembed", "sweep", str(home / "cache")]
        words += [str(home / "manifest.parquet"), "-o", str(home / "run"), "--pool", "mean@all"]
        words += ["--heads", "logistic", "--configs", "1"]
        log = home / "log"
        watched = watch(["sh", "-c", f'exec "$@" 2> {log}', "sh", *words])
        said = SAID.search(log.read_text())
        stored = subprocess.run(
            ["du", "-sb", str(home / "cache")], capture_output=True, text=True, check=True
        )
    upper = float(said[1].replace(",", "")) if said else None
    assert upper is not None, "the sweep did not say its memory"
    about = {
        "rows": asked.rows,
        "layers": asked.layers,
        "values": asked.values,
        "cache_gb": round(int(stored.stdout.split()[0]) / 1e9, 2),
        "said_gb": upper,
        "peak_gb": watched.peak_gb,
        "seconds": watched.seconds,
        "ratios": {"peak memory over what was said": round(watched.peak_gb / upper, 3)},
    }
    write_results(asked.out, about)


if __name__ == "__main__":
    main()
