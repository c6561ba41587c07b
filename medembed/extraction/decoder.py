"""The process that reads, hashes, decodes and resizes: `python -m medembed.extraction.decoder`.

It is told the size of what it shares with the process that started it in the first line on stdin,
then handed one image per line, all as JSON. It writes the pixels into a slot of the shared file and
answers one line per image on stdout. It ends when stdin does, so also when the other process is
killed. A codec that crashes takes only this process along, and with it the name of the one image
that it was working on.
"""

import json
import math
import mmap
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from medembed.dataset.intensity import DEFAULT_INTENSITY, Intensity
from medembed.dataset.reading import Reading, read_content
from medembed.encoders.preprocessing import Preprocessing, prepare

__all__ = ["READY", "describe", "main", "open_slots"]

READY = "ready"


def open_slots(handle: int, shape: Sequence[int]) -> np.ndarray:
    """Map the shared file: uint8 (slots, height, width)."""
    return np.frombuffer(mmap.mmap(handle, math.prod(shape)), np.uint8).reshape(shape)


def main(arguments: str) -> None:
    """Answer requests until there are no more.

    Parameters
    ----------
    arguments : str
        JSON: `handle` of the shared file, `preprocessing` and `intensity` as mappings.
    """
    # Schedulers signal every process of a job. The one that commits ends this one, by its stdin;
    # dying first would look as if the image at hand were to blame.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    given = json.loads(arguments)
    preprocessing = Preprocessing(**given["preprocessing"])
    intensity = Intensity(**given["intensity"])
    with _answers() as answers:
        _send(answers, READY)
        shape = sys.stdin.readline()
        if not shape:
            return
        slots = open_slots(given["handle"], json.loads(shape))
        for line in sys.stdin:
            slot, sha256, paths = json.loads(line)
            transform = partial(prepare, preprocessing=preprocessing)
            reading = read_content([Path(path) for path in paths], sha256, transform, intensity)
            if reading.pixels is not None:
                slots[slot] = reading.pixels
            _send(answers, _without_pixels(reading))


def _answers() -> IO[str]:
    """Take stdout for the answers alone: what a codec prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    return answers


def _without_pixels(reading: Reading) -> dict[str, Any]:
    # Not asdict of the whole: it would copy the pixels.
    has_pixels = reading.pixels is not None
    fields = {name: getattr(reading, name) for name in Reading.__dataclass_fields__}
    return {**fields, "pixels": has_pixels}


def _send(answers: IO[str], answer: Any) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def describe(
    handle: int, preprocessing: Preprocessing, intensity: Intensity = DEFAULT_INTENSITY
) -> str:
    """Write what `main` is to be given."""
    settings = {"preprocessing": asdict(preprocessing), "intensity": asdict(intensity)}
    return json.dumps({"handle": handle, **settings})


if __name__ == "__main__":
    main(sys.argv[1])
