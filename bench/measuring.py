"""Common parts of the benchmarks: alternated runs, whole-process times, results as JSON."""

import json
import os
import platform
import subprocess
import sys
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


def progress(text: str) -> None:
    """Print a line with the time of day to stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


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
        "processor": processor(),
        "instructions": instructions(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def processor() -> str | None:
    """Return the processor's name, such as "AMD EPYC", or None where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else None


INSTRUCTIONS = {"AMX": "amx_bf16", "AVX-512": "avx512f", "AVX2": "avx2"}
"""What a processor may multiply in, widest first, and its flag in /proc/cpuinfo."""


def instructions() -> str | None:
    """Return the widest of `INSTRUCTIONS` that may be used, or None where the system does not tell.

    `ATEN_CPU_CAPABILITY=avx2` with `ONEDNN_MAX_CPU_ISA=AVX2` limits PyTorch to AVX2.
    """
    limit = os.environ.get("ATEN_CPU_CAPABILITY"), os.environ.get("ONEDNN_MAX_CPU_ISA")
    from medembed.core.system import processor_flags  # `walks.py` runs trees without this module

    flags = processor_flags()
    known = [name for name, flag in INSTRUCTIONS.items() if flag in flags]
    if limit == ("avx2", "AVX2"):
        known = [name for name in known if name == "AVX2"]
    return known[0] if known else None


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write the results with the machine beside them, and print the ratios."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**results, "machine": machine()}, indent=2) + "\n")
    print(json.dumps(results["ratios"], indent=2))
