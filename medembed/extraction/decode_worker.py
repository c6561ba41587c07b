"""The decoder process, `python -m medembed.extraction.decode_worker`: read, hash, decode, resize.

The first line on stdin gives the shape of the file that it shares with its parent process; each
further line is one image; all are JSON. The process writes pixels into a slot of the shared file
and answers one line per image on stdout. It ends when stdin is closed, and therefore also when its
parent is killed. A codec that crashes ends only this process, and the parent knows which image was
being decoded.
"""

import json
import math
import mmap
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from medembed.core.system import end_with_parent
from medembed.encoders.preprocessing import Preprocessing, prepare
from medembed.images.intensity import DEFAULT_INTENSITY, Intensity
from medembed.images.load import DEFAULT_LIMITS, Limits, Reading, read_content
from medembed.images.statistics import measure_image

__all__ = ["PATIENCE", "READY", "TIMES_UP", "describe", "main", "open_slots"]

READY = "ready"
PATIENCE = 10
"""How many times longer reading may take than computing: network file systems stall at times."""
TIMES_UP = {signal.SIGPROF: "decode", signal.SIGALRM: "read"}
"""The signals that end a decoder whose image takes too long, and the stage to blame."""


def open_slots(handle: int, shape: Sequence[int]) -> np.ndarray:
    """Return the mapped shared file: uint8 (slots, height, width)."""
    return np.frombuffer(mmap.mmap(handle, math.prod(shape)), np.uint8).reshape(shape)


def main(arguments: str) -> None:
    """Answer requests until there are no more.

    Parameters
    ----------
    arguments : str
        JSON: `handle` of the shared file, `preprocessing`, `intensity` and `limits` as mappings,
        `measures`: whether films are measured.
    """
    # Schedulers signal every process of a job. The committing process ends this one through its
    # stdin; dying earlier would put the blame on the current image.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for number in TIMES_UP:
        signal.signal(number, signal.SIG_DFL)
    end_with_parent()
    given = json.loads(arguments)
    preprocessing = Preprocessing(**given["preprocessing"])
    intensity, limits = Intensity(**given["intensity"]), Limits(**given["limits"])
    measure = measure_image if given["measures"] else None
    with _answers() as answers:
        _send(answers, READY)
        shape = sys.stdin.readline()
        if not shape:
            return
        slots = open_slots(given["handle"], json.loads(shape))
        for line in sys.stdin:
            slot, sha256, paths = json.loads(line)
            transform = partial(prepare, preprocessing=preprocessing)
            with _timed(limits.max_seconds):
                reading = read_content(
                    [Path(path) for path in paths], sha256, transform, intensity, limits, measure
                )
            if reading.pixels is not None:
                slots[slot] = reading.pixels
            _send(answers, _without_pixels(reading))


@contextmanager
def _timed(seconds: float) -> Iterator[None]:
    """End this process if the block takes too long; a codec cannot be stopped in any other way.

    The limit is CPU time, which does not depend on the machine's load or on suspension; for a disk
    that does not respond, `PATIENCE` times as much wall time.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _answers() -> IO[str]:
    """Return stdout, reserved for the answers: a codec's own output is redirected to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    return answers


def _without_pixels(reading: Reading) -> dict[str, Any]:
    # asdict of the whole reading would copy the pixels.
    has_pixels = reading.pixels is not None
    fields = {name: getattr(reading, name) for name in Reading.__dataclass_fields__}
    return {**fields, "pixels": has_pixels}


def _send(answers: IO[str], answer: Any) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def describe(
    handle: int,
    preprocessing: Preprocessing,
    intensity: Intensity = DEFAULT_INTENSITY,
    limits: Limits = DEFAULT_LIMITS,
    *,
    measures: bool = False,
) -> str:
    """Return the arguments of `main` as JSON."""
    settings = {"preprocessing": asdict(preprocessing), "intensity": asdict(intensity)}
    settings |= {"limits": asdict(limits)}
    return json.dumps({"handle": handle, "measures": measures, **settings})


if __name__ == "__main__":
    main(sys.argv[1])
