"""Time caches in a bucket: extraction at a latency, and loading against a plain download.

    .venv/bin/python bench/buckets.py --out bench/results/buckets.json

The store is moto's S3 server on loopback, in a process of its own, behind the tests' proxy, which
adds 20 ms to each request for the extraction and limits the line that all answers share for the
loading. Extraction goes into a device that sleeps: what is reported is its share of the time. The
loading of a cache of MURA's size is compared with boto3's `download_file` of the same objects in
the same run. Both download to a disk; medembed also proves every byte and makes a table of float32
of it. Later loadings alternate with those of the same cache in a directory, in both orders and with
nothing left to be written to the disk.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from cache import make

from measuring import progress, write_results
from standin import SleepingEncoder, write_images

PAIRS = 4  # of later loadings, in each run
HELPERS = Path(__file__).parents[1] / "tests" / "helpers"
SERVER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from s3_server import serving
with serving() as s3:
    s3.seconds, s3.bytes_per_second = float(sys.argv[2]), float(sys.argv[3])
    print(json.dumps(s3.environ), flush=True)
    sys.stdin.read()
"""


@contextmanager
def serving(seconds: float, bytes_per_second: float) -> Iterator[None]:
    """Serve S3 from another process, and put what reaches it into the environment."""
    import json

    command = [sys.executable, "-c", SERVER, HELPERS, str(seconds), str(bytes_per_second)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout
        assert server.stdin
        os.environ.update(json.loads(server.stdout.readline()))
        try:
            yield
        finally:
            server.stdin.close()


def measure_extraction(n_images: int, latency: float) -> float:
    """Return the share of the time in which the device is busy; images and cache in a bucket."""
    from medembed.core import object_store
    from medembed.core.locations import BucketPath
    from medembed.extraction import extract
    from medembed.extraction.writer import Timeline

    batch, forward = 8, 0.2
    place = BucketPath("s3", "bucket", "extraction")
    with tempfile.TemporaryDirectory() as home, serving(latency, 0):
        manifest = write_images(Path(home), n_images, 512, 420)
        for path in Path(home).glob("*.png"):
            object_store.put_object(place / "images" / path.name, path.read_bytes())
        timeline = Timeline()
        encoder = SleepingEncoder(896, forward, 0.01, timeline)
        report = extract(
            *(manifest, place / "images", encoder, place / "cache"),
            batch_size=batch,
            commit_seconds=1.0,
            timeline=timeline,
        )
    return encoder.n_forwards * forward / (report.seconds - report.stages["prepare"])


def measure_loading(n_rows: int, bytes_per_second: float, n_runs: int) -> dict[str, list[float]]:
    """Return the seconds of each way to load, run by run."""
    import boto3

    from medembed.cache.embeddings import load_embeddings
    from medembed.cache.index import committed_shards
    from medembed.cache.transfer import copy_cache
    from medembed.core.locations import BucketPath

    place = BucketPath("s3", "bucket", "cache")
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name, serving(0.0, bytes_per_second):
        home = Path(name)
        manifest = make(home, n_rows, 1152)
        copy_cache(home / "cache", place)
        os.environ["MEDEMBED_SHARDS"] = str(home / "copies")
        client = boto3.client("s3")

        def download() -> None:
            (home / "plain").mkdir(exist_ok=True)
            for path in committed_shards(place / "shards"):
                assert isinstance(path, BucketPath)
                client.download_file("bucket", path.key, str(home / "plain" / path.name))

        jobs: dict[str, Any] = {
            "boto3 download_file": download,
            "load_embeddings, first": lambda: load_embeddings(str(place), manifest),
        }
        later: dict[str, Any] = {
            "load_embeddings, second": lambda: load_embeddings(str(place), manifest),
            "load_embeddings, directory": lambda: load_embeddings(home / "cache", manifest),
        }
        expected = load_embeddings(home / "cache", manifest).X

        def measure(job: str, work: Any) -> None:
            start = time.perf_counter()
            found = work()
            seconds.setdefault(job, []).append(round(time.perf_counter() - start, 4))
            assert found is None or np.array_equal(found.X, expected)

        for run in range(n_runs):
            shutil.rmtree(home / "copies", ignore_errors=True)
            for job, work in jobs.items():
                measure(job, work)
            os.sync()
            for turn in range(PAIRS):
                for job in list(later)[:: 1 if turn % 2 else -1]:
                    measure(job, later[job])
            progress(f"run {run + 1}: {[values[-1] for values in seconds.values()]}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=36_808)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--latency", type=float, default=0.02, help="seconds of each request")
    parser.add_argument("--line", type=float, default=50e6, help="bytes a second of the line")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    busy = measure_extraction(given.images, given.latency)
    progress(f"busy {busy:.3f}")
    seconds = measure_loading(given.rows, given.line, given.runs)
    medians = {job: statistics.median(values) for job, values in seconds.items()}
    first, second = medians["load_embeddings, first"], medians["load_embeddings, second"]
    ratios = {
        "device_time_vs_end_to_end": round(busy, 3),
        "download_vs_first_load": round(medians["boto3 download_file"] / first, 3),
        "second_load_vs_directory": round(second / medians["load_embeddings, directory"], 3),
    }
    results = {"ratios": ratios, "seconds": seconds, "rows": given.rows, "line": given.line}
    if given.out:
        write_results(given.out, {**results, "latency": given.latency, "images": given.images})
    else:
        print(medians, ratios)


if __name__ == "__main__":
    main()
