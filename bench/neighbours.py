"""Measure time and memory of questions to a cache of very many rows: neighbours, maps, audits.

    .venv/bin/python bench/neighbours.py --rows 1000000 --out bench/results/neighbours.json

Each job is a process of its own: `medembed similar` as a whole, with the verification of every
shard; the head `knn`, fitted on all rows and asked for 1,000; the ranking of all rows for 64
queries; the principal components of a pooling; `audit labels` of a made run of two heads; a
worklist of 200 studies, where nine in ten have no label; and `audit shortcuts` of one column.
`--keep DIR` makes the data there, or takes what is there, and results are added to those of --out.
Embeddings are synthetic: random numbers, in float16, in shards that are in the page cache. Memory
is that of the process without mapped files (RssAnon), sampled every 0.05 s.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from large import manifest_rows
from scipy.special import expit

from measuring import write_results
from medembed.cache.shards import MAX_SHARD_ROWS
from medembed.cache.spec import CacheSpec
from medembed.cache.store import create_cache
from medembed.dataset.manifest import read_manifest
from medembed.results.run_schema import CV_METHOD
from medembed.results.runs import create_run

INTERVAL = 0.05
LOAD = """
import json, sys, time
import numpy as np
from medembed.cache.embeddings import load_embeddings
e = load_embeddings("{cache}", "{manifest}", verify=False)
start = time.perf_counter()
"""
JOBS = {
    "knn": LOAD
    + """
from medembed.heads.knn import KNNHead
head = KNNHead().fit(e.X, e.y)
fitted = time.perf_counter() - start
head.predict_proba(e.X[:1000])
print(json.dumps({{"fit": fitted, "predict_1000": time.perf_counter() - start - fitted}}))
""",
    "retrieval": LOAD
    + """
from medembed.evaluation.retrieval import Films, score_retrieval
names = e.rows["sha256"].to_numpy(str)
patients = e.rows["patient"].to_numpy(object)
films = Films(e.X, e.y, e.regions, patients, names)
rows = np.arange(64)
start = time.perf_counter()
score_retrieval(films.take(rows), films)
print(json.dumps({{"rank_64": time.perf_counter() - start}}))
""",
    "map": LOAD
    + """
from medembed.evaluation.projection import project
project(e.X)
print(json.dumps({{"pca": time.perf_counter() - start}}))
""",
    "labels": """
import json, time
import medembed as me
start = time.perf_counter()
found = me.audit_labels("{cache}/../run", "{manifest}")
print(json.dumps({{"audit": time.perf_counter() - start, "suspects": len(found.suspects)}}))
""",
    "worklist": """
import json, time
import numpy as np
import medembed as me
from medembed.dataset.manifest import Manifest
known = me.read_manifest("{manifest}")
rows = known.rows
few = rows["label"].where(np.random.default_rng(0).random(len(rows) // 4).repeat(4) < 0.1)
manifest = Manifest(rows.assign(label=few), known.label_level)
start = time.perf_counter()
me.make_worklist("{cache}", manifest, 200)
print(json.dumps({{"worklist": time.perf_counter() - start}}))
""",
    "shortcuts": """
import json, time
import medembed as me
start = time.perf_counter()
me.audit_shortcuts("{cache}", "{manifest}", ["cast"])
print(json.dumps({{"audit": time.perf_counter() - start}}))
""",
}


def make(directory: Path, n_rows: int, n_values: int) -> None:
    """Write a cache of random numbers, and a manifest with a patient for every four images."""
    spec = CacheSpec("ab" * 32, {"width": 8}, {"mean": (n_values,)}, "float16")
    cache = create_cache(directory / "cache", spec, {"source": "made up"})
    generator = np.random.default_rng(0)
    writer = None
    with mock.patch("os.fsync"):  # the disk is not what is measured
        for start in range(0, n_rows, MAX_SHARD_ROWS):
            n = min(MAX_SHARD_ROWS, n_rows - start)
            keys = generator.integers(0, 256, (n, 32), dtype=np.uint8)
            cache.commit(keys, {"mean": generator.standard_normal((n, n_values), np.float32)})
            numbers = np.arange(start, start + n)
            rows = manifest_rows(keys, numbers)
            cast = np.where(numbers // 4 * 7919 % 13 > 6, "yes", "no").tolist()
            rows = rows.add_column(7, "cast", [cast])
            writer = writer or pq.ParquetWriter(directory / "manifest.parquet", rows.schema)
            writer.write_table(rows)
    assert writer
    writer.close()
    make_run(directory)


def make_run(directory: Path) -> None:
    """Write a run of two heads whose scores know the label in part."""
    manifest = read_manifest(directory / "manifest.parquet")
    rows = manifest.rows
    generator = np.random.default_rng(1)
    patients = pd.factorize(rows["patient"])[0]
    images = rows[["sha256", "region", "label", "split"]].assign(patient=patients, study=patients)
    folds = pd.Series(patients % 5).where(rows["split"] == "train")
    signal = 2.0 * (2.0 * rows["label"].astype(float) - 1)
    parts = [
        images.assign(
            fold=folds,
            head=head,
            trial=0,
            probability=expit(signal + generator.normal(0, 2, patients.max() + 1)[patients]),
        )
        for head in ("logistic", "mlp")
    ]
    details = {"seed": 0, "cv_method": CV_METHOD, "data": {"images": len(rows)}}
    run = create_run(directory / "run", {"manifest": manifest.digest()}, details=details)
    run.write_predictions(pd.concat(parts, ignore_index=True))
    run.write_scores({})


def watch(command: list[str]) -> dict[str, Any]:
    """Run a command; return its seconds, processor seconds, peak memory in GB, and its output."""
    start, peak, used = time.perf_counter(), 0, 0.0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    status = Path(f"/proc/{process.pid}/status")
    times = Path(f"/proc/{process.pid}/stat")
    while process.poll() is None:
        with suppress(OSError, IndexError):
            peak = max(peak, int(status.read_text().partition("RssAnon:")[2].split()[0]))
            fields = times.read_text().rpartition(")")[2].split()
            used = (int(fields[11]) + int(fields[12])) / 100
        time.sleep(INTERVAL)
    assert process.returncode == 0, command
    assert process.stdout
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "processor_seconds": round(used, 2),
        "peak_gb": round(peak * 1024 / 1e9, 3),
        "output": process.stdout.read(),
    }


def main() -> None:
    """Make the data, run every job once, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--values", type=int, default=1152)
    parser.add_argument("--jobs", default=",".join(["similar", *JOBS]))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep", type=Path)
    asked = parser.parse_args()
    found: dict[str, Any] = {}
    if asked.keep and asked.out.exists():
        found = json.loads(asked.out.read_text())["jobs"]
    with tempfile.TemporaryDirectory() as made:
        home = asked.keep or Path(made)
        if not (home / "run" / "scores.json").exists():
            home.mkdir(exist_ok=True)
            make(home, asked.rows, asked.values)
        cache, manifest = home / "cache", home / "manifest.parquet"
        for name in filter(None, asked.jobs.split(",")):
            if name == "similar":
                words = ["-m", "medembed", "similar", str(cache), str(manifest), "--image", "1"]
                own = watch([sys.executable, *words, "--quiet"])
                assert own.pop("output").count("\n") == 11
            else:
                code = JOBS[name].format(cache=cache, manifest=manifest)
                own = watch([sys.executable, "-c", code])
                own |= {k: round(v, 2) for k, v in json.loads(own.pop("output")).items()}
            found[name] = own
            print(name, own, flush=True)
    stored = asked.rows * asked.values * 2 / 1e9
    ratios = {
        f"{name}: peak memory over stored embeddings": round(own["peak_gb"] / stored, 2)
        for name, own in found.items()
    }
    about = {"rows": asked.rows, "values": asked.values, "jobs": found, "ratios": ratios}
    write_results(asked.out, about)


if __name__ == "__main__":
    main()
