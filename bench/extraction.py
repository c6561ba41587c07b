"""Measure extraction: the forward pass alone, the whole pipeline, and a handwritten loop.

    .venv/bin/python bench/extraction.py                              # demo encoder, any machine
    .venv/bin/python bench/extraction.py --tower medgemma --device cuda --images 2048
    .venv/bin/python bench/extraction.py --only standin               # the pipeline, no device
    .venv/bin/python bench/extraction.py --only memory                # 1,000 against 10,000 images

Towers other than the demo's have random weights, on which speed does not depend. Missing results
are reported as "not measured". Results go to bench/results/extraction-*.json, ratios first.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from measuring import write_results
from medembed.dataset.manifest import Manifest
from medembed.encoders.devices import DTYPES, set_precision
from medembed.encoders.loading import choose_device, choose_precision, load_encoder
from medembed.encoders.preprocessing import Preprocessing
from medembed.encoders.siglip import SiglipEncoder
from medembed.extraction import extract
from medembed.extraction.writer import Timeline
from standin import SleepingEncoder, write_images

RESULTS = Path("bench/results")
POOLINGS = ("mean", "max")
HALF = (0.5, 0.5, 0.5)
NOT_MEASURED = "not measured"
# name -> image side, patch, hidden, MLP, layers, heads
TOWERS = {
    "medgemma": (896, 14, 1152, 4304, 27, 16),
    "medsiglip": (448, 14, 1152, 4304, 27, 16),
    "siglip-base": (224, 16, 768, 3072, 12, 12),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tower", choices=["demo", *TOWERS], default="demo")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--decoders", type=int)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", choices=["throughput", "standin", "memory"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one-memory-run", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one_memory_run:
        print(peak_megabytes(arguments.one_memory_run))
        return
    jobs = {
        "throughput": measure_throughput,
        "standin": measure_standin,
        "memory": measure_memory,
    }
    for name, job in jobs.items():
        if arguments.only in (None, name):
            print(f"{name} …", flush=True)
            job(arguments)


def build_encoder(tower: str, device: str, precision: str) -> SiglipEncoder:
    """Return the demo's tower, or one of full size with random weights."""
    if tower == "demo":
        demo = load_encoder("demo", device=device, precision=precision)
        assert isinstance(demo, SiglipEncoder)
        return demo
    side, patch, hidden, mlp, layers, heads = TOWERS[tower]
    config = SiglipVisionConfig(
        image_size=side,
        patch_size=patch,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vision_use_head=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = SiglipVisionModel(config)
    set_precision(model, precision)
    return SiglipEncoder(
        model,
        Preprocessing(side, side, "stretch", "bilinear", HALF, HALF, 1 / 255),
        fingerprint="0" * 64,
        source=f"{tower} of random weights",
        device=device,
        precision=precision,
        reload=lambda: build_encoder(tower, device, "fp32"),
    )


def flop_per_image(config: Any) -> float:
    """Return a SigLIP tower's operations in products, two per multiplication and addition."""
    n = (config.image_size // config.patch_size) ** 2
    d, mlp = config.hidden_size, config.intermediate_size
    layer = 2 * n * (4 * d * d + 2 * d * mlp) + 4 * n * n * d
    return float(config.num_hidden_layers * layer + 2 * n * 3 * config.patch_size**2 * d)


def measure_peak(device: str, precision: str) -> float:
    """Return the operations per second of a large product, the best of several runs."""
    side = 8192 if device == "cuda" else 3072
    a = torch.randn(side, side, device=device).to(DTYPES[precision])
    b = torch.randn(side, side, device=device).to(DTYPES[precision])
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def forward_only(encoder: SiglipEncoder, batch_size: int, n_images: int) -> float:
    """Return the seconds of embedding one batch repeatedly, as far ahead as the encoder allows."""
    size = encoder.preprocessing
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (batch_size, size.height, size.width), dtype=np.uint8)
    waiting = []
    start = time.perf_counter()
    for _ in range(-(-n_images // batch_size)):
        if len(waiting) == encoder.in_flight:
            waiting.pop(0)()
        waiting.append(encoder.submit(pixels, POOLINGS))
    for collect in waiting:
        collect()
    return time.perf_counter() - start


def end_to_end(
    encoder: SiglipEncoder, manifest: Manifest, root: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return an extraction's results; `seconds` excludes warm-up and canary, which run once."""
    with tempfile.TemporaryDirectory() as home:
        report = extract(
            manifest,
            root,
            encoder,
            Path(home) / "cache",
            poolings=POOLINGS,
            batch_size=arguments.batch_size,
            decoders=arguments.decoders,
        )
    assert report.embedded == len(manifest.rows)
    return {**report.as_dict(), "seconds": report.seconds - report.stages["prepare"]}


def plain_loop(encoder: SiglipEncoder, manifest: Manifest, root: Path, batch_size: int) -> float:
    """Return the rate of a handwritten loop: Pillow, transformers' processor and model."""
    size = {"height": encoder.preprocessing.height, "width": encoder.preprocessing.width}
    processor = SiglipImageProcessor(size=size, image_mean=HALF, image_std=HALF, resample=2)
    dtype, model, kept = DTYPES[encoder.precision], encoder.model, []
    start = time.perf_counter()
    names = list(manifest.rows["image"])
    for first in range(0, len(names), batch_size):
        images = [Image.open(root / n).convert("RGB") for n in names[first : first + batch_size]]
        inputs = processor(images, return_tensors="pt").to(encoder.device, dtype)
        with torch.no_grad():
            tokens = model(pixel_values=inputs["pixel_values"]).last_hidden_state.float()
        kept.append(torch.cat([tokens.mean(1), tokens.amax(1)], 1).cpu().numpy())
    rows = np.concatenate(kept).astype(np.float16)
    with tempfile.TemporaryFile() as file:
        np.save(file, rows)
    return time.perf_counter() - start


def measure_throughput(arguments: argparse.Namespace) -> None:
    device = choose_device(arguments.device)
    precision = choose_precision(arguments.precision, device)
    encoder = build_encoder(arguments.tower, device, precision)
    n_images = arguments.images
    size = arguments.batch_size or encoder.warm_up(POOLINGS, n_images=n_images)
    peak = measure_peak(device, precision)
    rates: dict[str, list[float]] = {"forward": [], "end_to_end": [], "plain_loop": []}
    with tempfile.TemporaryDirectory() as home:
        root = Path(home) / "images"
        manifest = write_images(root, n_images, 512, 420)
        stages: list[dict[str, float]] = []
        for run in range(arguments.runs + 1):  # the first warms up
            whole = end_to_end(encoder, manifest, root, arguments)
            seconds = {
                "forward": forward_only(encoder, size, n_images),
                "end_to_end": whole["seconds"],
                "plain_loop": plain_loop(encoder, manifest, root, size),
            }
            if run:
                stages.append(whole["stages"])
                for name, value in seconds.items():
                    rates[name].append(round(n_images / value, 3))
    median = {name: statistics.median(values) for name, values in rates.items()}
    used = median["forward"] * flop_per_image(encoder.model.config) / peak
    write_results(
        arguments.out / f"extraction-{arguments.tower}-{device}.json",
        {
            "ratios": {
                "end_to_end_vs_forward": _ratio(rates, "end_to_end", "forward"),
                "end_to_end_vs_plain_loop": _ratio(rates, "end_to_end", "plain_loop"),
                "forward_vs_measured_peak": round(used, 4),
            },
            "images_per_second": median,
            "runs": rates,
            "stages": stages,
            "peak_flops": peak,
            "flop_per_image": flop_per_image(encoder.model.config),
            "tower": arguments.tower,
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
            "precision": precision,
            "batch_size": size,
            "images": {"n": n_images, "format": "PNG", "height": 512, "width": 420},
            "gpu": "see device" if device == "cuda" else NOT_MEASURED,
        },
    )


def _ratio(rates: dict[str, list[float]], above: str, below: str) -> float:
    pairs = zip(rates[above], rates[below], strict=True)
    return round(statistics.median(a / b for a, b in pairs), 4)


def measure_standin(arguments: argparse.Namespace) -> None:
    """Run the pipeline into a device that sleeps, at the tower's full 896 × 896 pixels."""
    n_images, batch, forward, transfer = 800, 8, 0.2, 0.01
    fractions = []
    with tempfile.TemporaryDirectory() as home:
        root = Path(home) / "images"
        manifest = write_images(root, n_images, 512, 420)
        for run in range(arguments.runs):
            timeline = Timeline(keep_spans=True)
            encoder = SleepingEncoder(896, forward, transfer, timeline)
            report = extract(
                manifest,
                root,
                encoder,
                Path(home) / f"cache{run}",
                batch_size=batch,
                commit_seconds=1.0,
                timeline=timeline,
            )
            fractions.append(
                encoder.n_forwards * forward / (report.seconds - report.stages["prepare"])
            )
    from trace_figure import draw_trace

    draw_trace(timeline.spans, arguments.out / "extraction-trace")
    write_results(
        arguments.out / "extraction-standin.json",
        {
            "ratios": {"device_time_vs_end_to_end": round(statistics.median(fractions), 4)},
            "runs": [round(fraction, 4) for fraction in fractions],
            "forward_seconds": forward,
            "transfer_seconds": transfer,
            "batch_size": batch,
            "images": {"n": n_images, "prepared_side": 896},
            "note": "a stand-in that sleeps; no tower was run",
        },
    )


def measure_memory(arguments: argparse.Namespace) -> None:
    """Compare peak memory of whole processes, the demo encoder over few and many images."""
    script = [sys.executable, str(Path(__file__)), "--one-memory-run"]
    peaks = {}
    for n_images in (1_000, 10_000):
        done = subprocess.run([*script, str(n_images)], check=True, capture_output=True, text=True)
        peaks[n_images] = float(done.stdout)
    write_results(
        arguments.out / "extraction-memory.json",
        {
            "ratios": {"10000_vs_1000_images": round(peaks[10_000] / peaks[1_000], 4)},
            "peak_megabytes": peaks,
            "difference_megabytes": round(peaks[10_000] - peaks[1_000], 1),
        },
    )


def peak_megabytes(n_images: int) -> float:
    """Return the peak of resident memory of this process when extracting that many images."""
    with tempfile.TemporaryDirectory() as home:
        manifest = write_images(Path(home) / "images", n_images, 96, 80)
        extract(manifest, Path(home) / "images", load_encoder("demo"), Path(home) / "cache")
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


if __name__ == "__main__":
    main()
