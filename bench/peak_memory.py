"""Measure the peak memory of a command with all its processes, counting shared pages once."""

import contextlib
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

INTERVAL = 0.2
SHARE = 0.05
"""Of the time, at most spent on watching: the sum of a process's pages stops it meanwhile."""


class Watched(NamedTuple):
    """The result of a command; `sampling_seconds` is the processor time spent on watching it."""

    seconds: float
    peak_gb: float
    sampling_seconds: float
    output: str


def watch(command: list[str]) -> Watched:
    """Run a command in a new session, and sum its processes' PSS every 0.2 s or more (Linux).

    PSS is a process's memory with every shared page divided by the number of processes that map it,
    so that the sum over the processes counts each page once.
    """
    peak, sampling = 0, 0.0
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, start_new_session=True)
        try:
            while process.poll() is None:
                before = time.process_time()
                peak = max(peak, session_pss(process.pid))
                spent = time.process_time() - before
                sampling += spent
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(INTERVAL, spent / SHARE))
            seconds = time.perf_counter() - start
        finally:
            process.kill()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        output.seek(0)
        return Watched(round(seconds, 2), round(peak / 1e9, 3), round(sampling, 2), output.read())


def session_pss(session: int) -> int:
    """Return the bytes that the processes of a session currently hold."""
    total = 0
    for place in Path("/proc").glob("[0-9]*"):
        # a process may end between any two of these lines
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            # state, parent, group and session follow the name, which may hold anything but ")"
            fields = (place / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                rollup = (place / "smaps_rollup").read_text()
                total += 1024 * int(rollup.partition("\nPss:")[2].split()[0])
    return total
