"""Measure what it costs a pass to pool every block's output besides the last.

    .venv/bin/python bench/layer_pass.py --out bench/results/layer_pass.json

The same batches go through a SigLIP-Base tower of random weights (12 blocks, 224 pixels, fp32, on
the CPU), once for `mean,max` and once for `mean@K` and `max@K` of all blocks too, in turns; the
ratio is the median over pairs of neighbouring turns. Peak memory is that of a process of its own
each.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from prediction import make_tower

from measuring import write_results
from medembed.encoders.loading import load_encoder

USUAL = ("mean", "max")
BATCH = 16


def choose(encoder: object, with_layers: bool) -> list[str]:
    """Return the poolings of a pass."""
    names = list(encoder.dimensions)  # type: ignore[attr-defined]
    more = [name for name in names if name.startswith(("mean@", "max@"))]
    return [*USUAL, *(more if with_layers else [])]


def peak(tower: Path, with_layers: bool, n_batches: int) -> None:
    """Print the peak of resident memory of a process that runs some passes, in GB."""
    encoder = load_encoder(tower, device="cpu", precision="fp32")
    side = encoder.preprocessing.height
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH, side, side), dtype=np.uint8)
    for _ in range(n_batches):
        encoder.encode(pixels, choose(encoder, with_layers))
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9))


def main() -> None:
    """Measure times in turns, and peaks in processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--layers", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peak:
        peak(asked.peak, asked.layers, 3)
        return
    with tempfile.TemporaryDirectory() as made:
        tower = make_tower(Path(made) / "tower")
        encoder = load_encoder(tower, device="cpu", precision="fp32")
        side = encoder.preprocessing.height
        pixels = np.random.default_rng(0).integers(0, 256, (BATCH, side, side), dtype=np.uint8)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(asked.turns + 1):
            for with_layers in (turn % 2 == 1, turn % 2 == 0):
                names, start = choose(encoder, with_layers), time.perf_counter()
                encoder.encode(pixels, names)
                if turn:  # the first warms up
                    seconds[with_layers].append(time.perf_counter() - start)
        command = [sys.executable, __file__, "--peak", str(tower)]
        peaks = {
            with_layers: float(
                subprocess.check_output([*command, *(["--layers"] if with_layers else [])])
            )
            for with_layers in (False, True)
        }
    pairs = [b / a for a, b in zip(seconds[False], seconds[True], strict=True)]
    results = {
        "blocks": sum(name.startswith("mean@") for name in encoder.dimensions),
        "batch": BATCH,
        "seconds": {"usual": seconds[False], "with layers": seconds[True]},
        "peak_gb": {"usual": round(peaks[False], 3), "with layers": round(peaks[True], 3)},
        "ratios": {
            "time with layers over without": round(statistics.median(pairs), 4),
            "peak memory with layers over without": round(peaks[True] / peaks[False], 4),
        },
    }
    if asked.out:
        write_results(asked.out, results)


if __name__ == "__main__":
    main()
