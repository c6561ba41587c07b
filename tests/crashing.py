"""A process that extracts under `crash_shim.c`, again and again, and dies where it is told to.

It imports everything once; each extraction is a fork of it. Run as `python crashing.py`, it takes
one JSON request per line on stdin and answers one line each.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from test_extraction import HalvesEncoder

from medembed.dataset.manifest import read_manifest
from medembed.errors import MedembedError
from medembed.extraction import extract

HOW = {"before": 0, "middle": 1, "after": 2, "fail": 3}


def work(request: dict[str, Any], answers: int) -> None:
    """Extract under the shim, in a process of its own; write what it raised, if anything."""
    root = Path(request["root"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    manifest, encoder = read_manifest(root / "manifest.csv"), HalvesEncoder()
    cache = root / request["cache"]
    manner = HOW[request["how"]]
    ctypes.CDLL(None).shim_arm(
        str(cache).encode(), request["at"], manner, request.get("errno", 0), log
    )
    said = ""
    try:
        extract(
            manifest, root / "images", encoder, cache, batch_size=3, decoders=1, commit_seconds=0.0
        )
    except MedembedError as error:
        said = f"MedembedError: {error}"
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    os.write(answers, said.encode())


def serve() -> None:
    """Fork an extraction per request; answer with its signal, or what it raised."""
    for line in sys.stdin:
        request = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            try:
                work(request, writing)
            finally:
                os._exit(0)
        os.close(writing)
        if "seconds" in request:
            time.sleep(request["seconds"])
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        with os.fdopen(reading, "rb") as file:
            said = file.read().decode()
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        print(json.dumps({"killed": killed, "said": said}), flush=True)


if __name__ == "__main__":
    os.environ.pop("LD_PRELOAD", None)  # the decoders go without
    serve()
