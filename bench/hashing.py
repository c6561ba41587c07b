"""Time `hash_files` against `sha256sum` under `xargs -P`, alternating, on generated files.

    .venv/bin/python bench/hashing.py --out bench/results/hashing.json

Writes both medians in seconds and `ratios.hash_files_vs_sha256sum`. The files are in the page
cache for both, so that neither waits for a disk.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from measuring import alternate, time_command, write_results
from medembed.dataset.manifest import hash_files


def make_files(directory: Path, n_files: int, n_bytes: int) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for index in range(n_files):
        folder = directory / f"{index // 1000:03d}"
        folder.mkdir(exist_ok=True)
        paths.append(folder / f"{index:06d}.png")
        paths[-1].write_bytes(rng.bytes(n_bytes))
    return paths


def time_hash_files(paths: list[Path]) -> float:
    start = time.perf_counter()
    hash_files(paths)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=40_000)
    parser.add_argument("--bytes", type=int, default=90_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("bench/results/hashing.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        paths = make_files(Path(directory), arguments.files, arguments.bytes)
        peer = f"find {directory} -type f -print0 | xargs -0 -n 1000 -P {os.cpu_count()} sha256sum"
        seconds = alternate(
            {
                "hash_files": lambda: time_hash_files(paths),
                "xargs -P sha256sum": lambda: time_command(["sh", "-c", peer]),
            },
            arguments.runs,
        )
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    write_results(
        arguments.out,
        {
            "files": arguments.files,
            "bytes_each": arguments.bytes,
            "seconds": seconds,
            "ratios": {"hash_files_vs_sha256sum": statistics.median(ratios)},
        },
    )


if __name__ == "__main__":
    main()
