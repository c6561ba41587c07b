"""Verify and measure on a GPU what a CPU cannot show, in one command of less than 8 minutes.

    python bench/gpu_check.py                        # on the GPU, full size
    python bench/gpu_check.py --device cpu --tiny    # every step, on any machine, in seconds

The script runs from a checkout, needs no network, and requires the libraries in `NEEDED`; a step
that lacks a library reports this, and the others continue. The tower has random weights, on which
neither speed nor arithmetic depends. Results are written after every step, so that an interrupted
run keeps them: to --out, else to $OUT/gpu.json, else to bench/results/gpu.json (never with --tiny).
Missing results are reported as "not measured". Ratios against the measured peak come first.
"""

import argparse
import importlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
PATHS = [str(ROOT), os.environ.get("PYTHONPATH", "")]
RESULTS = ROOT / "bench" / "results" / "gpu.json"
NOT_MEASURED = "not measured"
NEEDED = (
    *("torch", "transformers", "numpy", "safetensors", "huggingface_hub", "pillow", "packaging"),
    "peft",  # of the LoRA step alone
)
# Libraries that such a machine may still lack, with their dependencies: 61 MiB for Python 3.12 on
# x86_64. pyarrow, pydicom, lightgbm and the package's other requirements are not imported.
WHEELS = (
    *("click", "h5py", "pandas", "python-dateutil"),
    *("rich", "markdown-it-py", "mdurl", "pygments"),
    *("scipy", "scikit-learn", "joblib", "threadpoolctl"),  # only for the training step
)
MODULES = {
    "pillow": "PIL",
    "scikit-learn": "sklearn",
    "python-dateutil": "dateutil",
    "markdown-it-py": "markdown_it",
}
SECONDS = 460.0  # after which no further step begins

FULL = {
    "tower": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
    },
    "product": 8192,
    "tokens": 4096,
    "heads": (72, 80, 96, 128),
    "batches": (8, 16, 32, 64),
    "images": 512,
    "side": (1024, 832),
}
TINY = {
    "tower": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    },
    "product": 64,
    "tokens": 16,
    "heads": (8,),
    "batches": (2, 4),
    "images": 12,
    "side": (40, 36),
}


@dataclass
class Check:
    """The state shared by the steps.

    Attributes
    ----------
    device : str
        `cuda` or `cpu`.
    sizes : dict
        `FULL` or `TINY`.
    place : Path
        A temporary directory: the checkpoint, the images, caches.
    found : dict
        The results of each step so far.
    """

    device: str
    sizes: dict[str, Any]
    place: Path
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path:
        """Return the directory of the random tower, created on first use."""
        made = self.place / "tower"
        if not made.exists():
            write_checkpoint(made, self.sizes["tower"])
        return made

    def encoder(self, precision: str, device: str | None = None) -> Any:
        """Return the tower, loaded by the real loading code."""
        from medembed.encoders.loading import load_encoder

        return load_encoder(self.checkpoint, device=device or self.device, precision=precision)

    def pixels(self, n_images: int) -> Any:
        """Return random grey images of the tower's size, uint8 (n, side, side)."""
        import numpy as np

        side = self.sizes["tower"]["image_size"]
        return np.random.default_rng(0).integers(0, 256, (n_images, side, side), dtype=np.uint8)

    def synchronise(self) -> None:
        """Wait for the device."""
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds_of(self, work: Callable[[], Any], n_runs: int = 5) -> float:
        """Return the median seconds of `work`, after one run that is not counted."""
        work()
        times = []
        for _ in range(n_runs):
            self.synchronise()
            start = time.perf_counter()
            work()
            self.synchronise()
            times.append(time.perf_counter() - start)
        return statistics.median(times)


def main() -> int:
    """Run the steps, and return the exit status, 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny tower, for a test of the steps")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--only", help="names of steps, with commas between")
    parser.add_argument("--wheels", action="store_true", help="list the wheels to bring, and end")
    given = parser.parse_args()
    if given.wheels:
        print("\n".join(WHEELS))
        return 0
    out = given.out or default_out(given.tiny)
    names = given.only.split(",") if given.only else list(STEPS)
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        parser.error(f"no step {', '.join(unknown)}; there are {', '.join(STEPS)}")
    with tempfile.TemporaryDirectory() as place:
        check = Check(given.device, TINY if given.tiny else FULL, Path(place))
        return run(check, names, out)


def default_out(tiny: bool) -> Path | None:
    """Return where results go without --out."""
    folder = os.environ.get("OUT")
    if folder:
        return Path(folder) / "gpu.json"
    return None if tiny else RESULTS


def run(check: Check, names: list[str], out: Path | None) -> int:
    """Run steps one after the other and write all results after each."""
    began = time.monotonic()
    for name in names:
        if time.monotonic() - began > SECONDS:
            check.found[name] = {"skipped": f"the {SECONDS:.0f} s of the check had passed"}
            continue
        start = time.monotonic()
        check.found[name] = attempt(STEPS[name], check)
        check.found[name]["step_seconds"] = round(time.monotonic() - start, 1)
        if out is not None:
            write(out, check)
        print(f"{name}: {json.dumps(check.found[name])}", flush=True)
    failed = [name for name, found in check.found.items() if "failed" in found]
    print(f"{len(check.found)} steps, {len(failed)} failed{': ' if failed else ''}", *failed)
    return 1 if failed else 0


def attempt(step: Callable[[Check], dict[str, Any]], check: Check) -> dict[str, Any]:
    """Return the result of a step; a missing library or an error is also a result."""
    try:
        return step(check)
    except ImportError as error:
        return {"skipped": f"this machine lacks a library: {error}"}
    except Exception as error:  # one step must not prevent the others
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        return {"failed": reason, "where": traceback.format_exc(limit=-3).splitlines()[-4:]}


def write(out: Path, check: Check) -> None:
    """Write all results, the ratios first, to a file that is complete or absent."""
    out.parent.mkdir(parents=True, exist_ok=True)
    document = {"ratios": ratios(check.found), "device": check.device, "steps": check.found}
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(json.dumps(document, indent=2) + "\n")
    partial.replace(out)


def ratios(found: dict[str, Any]) -> dict[str, Any]:
    """Return results relative to the device's peak, and to a handwritten loop."""
    peak = found.get("peak", {}).get("tflops")
    rates = found.get("rates", {})
    flops = found.get("tower", {}).get("tflop_per_image")
    best = max((r["images_per_second"] for r in rates.get("runs", [])), default=None)
    whole = found.get("extraction", {})
    share = best * flops / peak if best and flops and peak else NOT_MEASURED
    return {
        "forward_vs_peak": share,
        "extraction_vs_forward": whole.get("vs_forward", NOT_MEASURED),
        "extraction_vs_transformers_loop": whole.get("vs_loop", NOT_MEASURED),
        "compiled_vs_eager": rates.get("compiled_vs_eager", NOT_MEASURED),
        "best_images_per_second": best or NOT_MEASURED,
    }


# The steps.


def versions(check: Check) -> dict[str, Any]:
    """Return the libraries, the card and the compiler."""
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "compiler": next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None),
        "cores": os.cpu_count(),
    }
    for name in (*NEEDED, *WHEELS, "triton", "torchvision"):
        module = MODULES.get(name, name.replace("-", "_"))
        try:
            importlib.import_module(module)
            found[name] = metadata.version(name)
        except Exception as error:  # a library may fail at its import in any way
            found[name] = f"missing: {type(error).__name__}"
    if check.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found |= {"card": card.name, "gb": round(card.total_memory / 1e9, 1)}
        found |= {"cudnn": torch.backends.cudnn.version(), "driver": driver()}
    return found


def driver() -> str | None:
    """Return the driver's version from nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def peak(check: Check) -> dict[str, Any]:
    """Measure bf16 products, large and of the tower's shapes, and copies on the device."""
    import torch

    n, width = check.sizes["product"], check.sizes["tower"]
    hidden, mlp, tokens = width["hidden_size"], width["intermediate_size"], check.sizes["tokens"]
    shapes = {
        "square": (n, n, n),
        "projection": (16 * tokens, hidden, hidden),
        "mlp": (16 * tokens, hidden, mlp),
    }
    found: dict[str, Any] = {}
    for name, (rows, inner, columns) in shapes.items():
        a = torch.randn(rows, inner, device=check.device, dtype=torch.bfloat16)
        b = torch.randn(inner, columns, device=check.device, dtype=torch.bfloat16)
        seconds = check.seconds_of(lambda a=a, b=b: a @ b)
        found[f"{name}_tflops"] = round(2 * rows * inner * columns / seconds / 1e12, 6)
    block = torch.empty(n * n * 4, dtype=torch.uint8, device=check.device)
    seconds = check.seconds_of(block.clone)
    found["copy_gb_per_second"] = round(2 * block.numel() / seconds / 1e9, 1)
    return {"tflops": found["square_tflops"], **found}


def attention(check: Check) -> dict[str, Any]:
    """Time every attention kernel at the tower's shape, and compare it with float64."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from medembed.encoders.torch_encoder import ATTENTION_KERNELS

    tokens, n_images = check.sizes["tokens"], 16 if check.device == "cuda" else 1
    kernels = {**ATTENTION_KERNELS, "math": SDPBackend.MATH}
    found: dict[str, Any] = {}
    for width in check.sizes["heads"]:
        shape = (n_images, 16, tokens, width)
        q, k, v = (torch.randn(shape, device=check.device, dtype=torch.bfloat16) for _ in range(3))
        exact = scaled_dot_product_attention(*(t[:1, :1].double() for t in (q, k, v)))
        for name, kernel in kernels.items():
            if name == "math" and tokens > 1024:
                continue  # 16 x 16 x 4096 x 4096 scores would take 17 GB in fp32
            try:
                with sdpa_kernel(kernel):
                    out = scaled_dot_product_attention(q, k, v)
                    seconds = check.seconds_of(
                        lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v)
                    )
            except RuntimeError as error:
                found[f"{name}_{width}"] = f"not there: {' '.join(str(error).split())[:80]}"
                continue
            error = float((out[:1, :1].double() - exact).abs().max())
            found[f"{name}_{width}"] = {"ms": round(1e3 * seconds, 3), "max_error": error}
    return found


def tower(check: Check) -> dict[str, Any]:
    """Build the tower, load it by the real code, and compare the device's fp32 with the CPU's."""
    import numpy as np

    pixels = check.pixels(1)
    exact = check.encoder("fp32", "cpu").encode(pixels, ["mean", "max"])
    encoder = check.encoder("fp32")
    own = encoder.encode(pixels, ["mean", "max"])
    scale = {name: float(np.abs(rows).max()) for name, rows in exact.items()}
    far = {n: float(np.abs(own[n] - exact[n]).max()) / scale[n] for n in exact}
    if max(far.values()) > 1e-3:
        raise AssertionError(f"fp32 on {check.device} is {far} of the CPU's largest value away")
    return {"fp32_vs_cpu": far, "tflop_per_image": tflop(check.sizes["tower"])}


def tflop(config: dict[str, int]) -> float:
    """Return an image's operations: patches, then per block projections, attention and MLP."""
    side = config["image_size"] // config["patch_size"]
    tokens, width, mlp = side**2, config["hidden_size"], config["intermediate_size"]
    block = 8 * tokens * width**2 + 4 * tokens**2 * width + 4 * tokens * width * mlp
    patches = 2 * tokens * width * 3 * config["patch_size"] ** 2
    return (config["num_hidden_layers"] * block + patches) / 1e12


def canary(check: Check) -> dict[str, Any]:
    """Measure bf16 by the canary of a cache made in fp32, under every pooling."""
    from medembed.extraction.canary import TOLERANCE, check_canary, compute_canary

    poolings = ["mean", "max", "grid4"]
    document = compute_canary(check.encoder("fp32"), poolings)
    rounded = check.encoder("bf16")
    known: dict[str, Any] = {"there": {}, "here": {}, "cache_path": "cache", "batch_size": 4}
    far = {name: check_canary(document, rounded, [name], **known) for name in poolings}
    return {"distances": far, "limit": TOLERANCE}


def in_flight(check: Check) -> dict[str, Any]:
    """Compare 20 overlapping batches with each batch run alone, bit for bit."""
    import numpy as np

    encoder = check.encoder("bf16")
    size = check.sizes["batches"][0]
    batches = [np.roll(check.pixels(size), shift, axis=1) for shift in range(20)]
    alone = [encoder.encode(pixels, ["mean"])["mean"] for pixels in batches]
    waiting, together = [], []
    for pixels in batches:
        waiting.append(encoder.submit(pixels, ["mean"]))
        if len(waiting) == encoder.in_flight:
            together.append(waiting.pop(0)()["mean"])
    together += [collect()["mean"] for collect in waiting]
    n_equal = sum(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
    if n_equal != len(batches):
        raise AssertionError(f"only {n_equal} of {len(batches)} batches are equal")
    return {"equal": n_equal, "of": len(batches)}


def memory(check: Check) -> dict[str, Any]:
    """Cap the device's memory, and check that the batch is halved until it fits."""
    import torch

    if check.device != "cuda":
        return {"skipped": "a CPU's memory cannot be capped; the suite pretends one"}
    encoder = check.encoder("bf16")
    free = encoder.warm_up(["mean"], n_images=64)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    taken = torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction((taken + 4e9) / total)
    try:
        capped = encoder.warm_up(["mean"], n_images=64, batch_size=64)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    if not capped < 64:
        raise AssertionError("a batch of 64 fitted into 4 GB, or nothing was halved")
    return {"free": free, "within_4_gb": capped}


def rates(check: Check) -> dict[str, Any]:
    """Time batches of several sizes: with the default kernel, each chosen kernel, and compiled."""
    runs = []
    encoder = check.encoder("bf16")
    for size in check.sizes["batches"]:
        pixels = check.pixels(size)
        seconds = check.seconds_of(lambda p=pixels: encoder.encode(p, ["mean", "max"]), 3)
        runs.append({"how": "eager", "batch": size, "images_per_second": round(size / seconds, 2)})
    size = max(runs, key=lambda run: run["images_per_second"])["batch"]
    pixels, words = check.pixels(size), []
    n_images = 10**6 if check.device == "cuda" else 1
    start = time.monotonic()
    encoder.warm_up(["mean", "max"], n_images=n_images, batch_size=size, on_status=words.append)
    warm_up = time.monotonic() - start
    seconds = check.seconds_of(lambda: encoder.encode(pixels, ["mean", "max"]), 3)
    how = encoder.describe()
    name = "compiled" if how["compiled"] else "tuned"
    tuned = round(size / seconds, 2)
    runs.append({"how": name, "batch": size, "images_per_second": tuned})
    eager = next(run for run in runs if run["batch"] == size)["images_per_second"]
    ratio = tuned / eager if how["compiled"] else NOT_MEASURED
    return {
        "compiled_vs_eager": ratio,
        "runs": runs,
        "attention": how["attention"],
        "said": words,
        "warm_up_seconds": round(warm_up, 1),
    }


def extraction(check: Check) -> dict[str, Any]:
    """Time end-to-end extraction, compared with the forward pass and a handwritten loop."""
    from medembed.extraction import extract
    from standin import write_images

    images = check.place / "images"
    manifest = write_images(images, check.sizes["images"], *check.sizes["side"])
    encoder = check.encoder("bf16")
    report = extract(manifest, images, encoder, check.place / "cache")
    forward = check.found.get("rates", {}).get("runs")
    best = max((run["images_per_second"] for run in forward), default=None) if forward else None
    loop = plain_loop(check, images)
    rate = report.images_per_second
    return {
        "images_per_second": round(rate, 2),
        "vs_forward": rate / best if best else NOT_MEASURED,
        "vs_loop": rate / loop,
        "loop_images_per_second": round(loop, 2),
        "stages": report.stages,
        "execution": report.execution,
    }


def plain_loop(check: Check, images: Path) -> float:
    """Return the images per second of Pillow, the checkpoint's processor and transformers."""
    import torch
    from PIL import Image
    from transformers import AutoModel, SiglipImageProcessorPil

    processor = SiglipImageProcessorPil.from_pretrained(check.checkpoint)
    model = AutoModel.from_pretrained(check.checkpoint, dtype=torch.bfloat16)
    model = model.to(check.device).eval()
    paths = sorted(images.iterdir())[: max(8, len(list(images.iterdir())) // 4)]
    size = check.sizes["batches"][-1]
    start = time.perf_counter()
    with torch.inference_mode():
        for first in range(0, len(paths), size):
            films = [Image.open(path).convert("RGB") for path in paths[first : first + size]]
            values = processor(films, return_tensors="pt")["pixel_values"]
            seen = model(pixel_values=values.to(check.device, torch.bfloat16))
            seen.last_hidden_state.float().mean(dim=1).cpu()
    check.synchronise()
    return len(paths) / (time.perf_counter() - start)


def workers(check: Check) -> dict[str, Any]:
    """Run two workers on one cache, kill one, restart it, and verify the cache."""
    from medembed.cache.store import open_cache
    from medembed.dataset.manifest import write_manifest
    from standin import write_images

    images, cache = check.place / "shared", check.place / "shared-cache"
    manifest = write_images(images, check.sizes["images"], *check.sizes["side"])
    write_manifest(manifest, check.place / "shared.csv")
    command = [sys.executable, "-m", "medembed", "extract", "shared.csv"]
    command += ["--image-root", "shared", "--encoder", str(check.checkpoint)]
    command += ["--cache", "shared-cache", "--device", check.device, "--precision", "bf16"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, PATHS))}

    def start(worker: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*command, "--worker", worker],
            cwd=check.place,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    first, second = start("0/2"), start("1/2")
    deadline = time.monotonic() + 60
    while not list(cache.glob("shards/*.h5")) and time.monotonic() < deadline:
        if first.poll() is not None and second.poll() is not None:
            break
        time.sleep(0.05)
    second.send_signal(signal.SIGKILL)
    for process in (first, second, start("1/2")):
        said = process.communicate(timeout=150)[1].decode(errors="replace")
        if process is not second and process.returncode:
            raise AssertionError(f"a worker ended with {process.returncode}: {said[-300:]}")
    opened = open_cache(cache)
    problems, n_rows = opened.verify(), len(opened.keys())
    if problems or n_rows != len(manifest.rows):
        raise AssertionError(f"{n_rows} of {len(manifest.rows)} rows; {problems}")
    return {"rows": n_rows, "shards": len(list(cache.glob("shards/*.h5")))}


def training(check: Check) -> dict[str, Any]:
    """Train two epochs of an autoencoder, and of a last block in every available way."""
    from medembed.autoencoder import train_autoencoder

    images = check.place / "training"
    manifest = labelled(images, min(96, 8 * check.sizes["images"]), check.sizes["side"])
    found: dict[str, Any] = {}
    start = time.monotonic()
    train_autoencoder(
        *(manifest, images, check.place / "autoencoder"),
        size=32,
        widths=(8, 8),
        latent_channels=8,
        epochs=2,
        device=check.device,
    )
    found["autoencoder_seconds"] = round(time.monotonic() - start, 1)
    for name, options in {"block": {}, "trunk_cache": {"cut": True}, "lora": {"lora": 4}}.items():
        found[name] = attempt(lambda c, o=options: tune(c, manifest, images, **o), check)
    broken = {name: one for name, one in found.items() if "failed" in str(one)}
    if broken:
        raise AssertionError(json.dumps(broken))
    return found


def tune(
    check: Check, manifest: Any, images: Path, *, cut: bool = False, lora: int | None = None
) -> dict[str, Any]:
    """Fine-tune the last block, on the images or on the tokens of a trunk cache."""
    from medembed.finetuning.batches import read_images
    from medembed.finetuning.blocks import count_blocks
    from medembed.finetuning.data_split import choose_rows
    from medembed.finetuning.frozen_features import TokenImages, fill_trunk_cache, make_trunk
    from medembed.finetuning.hyperparameters import Depth, Hyperparameters
    from medembed.finetuning.network import Network, blank_start
    from medembed.finetuning.training import Trainer

    if lora is not None:
        import peft  # noqa: F401
    encoder = check.encoder("fp32")
    precision = "bf16" if check.device == "cuda" else "fp32"
    recipe = Hyperparameters(epochs=2, augment=False, precision=precision, lora=lora)
    rows, n_cut = choose_rows(manifest, 2, 0), count_blocks(encoder) - 1
    found: dict[str, Any] = {}
    start = time.monotonic()
    if cut:
        trunk = make_trunk(encoder, n_cut, precision)
        cache = fill_trunk_cache(check.place / "trunk", trunk, manifest, images)
        found["trunk_seconds"] = round(time.monotonic() - start, 1)
    own: Any = TokenImages(cache, rows.rows) if cut else None
    own = own or read_images(rows.rows, images, encoder.preprocessing, check.place)[0]
    start_with = blank_start(sum(encoder.dimensions[name][0] for name in ("mean", "max")))
    depth = (Depth(1), recipe, ("mean", "max"), start_with, n_cut if cut else None)
    network = Network(encoder, *depth)
    state = check.place / f"{cut}-{lora}.safetensors"
    trainer = Trainer(network, rows, own, seed=0, name="check", state_path=state, key="check")
    start = time.monotonic()
    losses = [epoch["train_loss"] for epoch in trainer.train().counters.history]
    return {**found, "seconds": round(time.monotonic() - start, 1), "losses": losses}


def labelled(images: Path, n_images: int, side: tuple[int, int]) -> Any:
    """Return a manifest of written images, with patients, labels and a split."""
    import pandas as pd

    from medembed.dataset.manifest import Manifest
    from standin import write_images

    rows = write_images(images, n_images, *side).rows
    number = pd.Series(range(n_images))
    rows["label"] = pd.array((number % 2).tolist(), dtype="Int8")
    rows["split"] = ["test" if i % 4 == 3 else "train" for i in number // 2]
    return Manifest(rows, "study")


def write_checkpoint(directory: Path, config: dict[str, int]) -> None:
    """Write a checkpoint of a random SigLIP tower in bfloat16, with its processor."""
    import torch
    from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    side = config["image_size"]
    model = SiglipVisionModel(SiglipVisionConfig(**config, vision_use_head=False))
    model.to(torch.bfloat16).save_pretrained(directory)
    SiglipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(directory)


STEPS: dict[str, Callable[[Check], dict[str, Any]]] = {
    step.__name__: step
    for step in (
        *(versions, peak, attention, tower, canary, in_flight, memory, rates),
        *(extraction, workers, training),
    )
}


if __name__ == "__main__":
    sys.exit(main())
