"""Common parts of the benchmarks: alternated runs, whole-process times, results as JSON."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any


def alternate(jobs: dict[str, Callable[[], float]], n_runs: int) -> dict[str, list[float]]:
    """Run the jobs A B A B …, after one warm-up each; return every job's seconds in order."""
    for job in jobs.values():
        job()
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(n_runs):
        for name, job in jobs.items():
            seconds[name].append(round(job(), 4))
    return seconds


def time_command(command: list[str]) -> float:
    """Return the wall time of a whole process in seconds; its output is discarded."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def machine() -> dict[str, Any]:
    """Return a description of the machine, without host name and paths."""
    packages = ("medembed", "numpy", "torch", "click")
    return {
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write the results with the machine beside them, and print the ratios."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**results, "machine": machine()}, indent=2) + "\n")
    print(json.dumps(results["ratios"], indent=2))
