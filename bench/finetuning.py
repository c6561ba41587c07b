"""Measure what fine-tuning costs: the trunk cache, the depth of a frozen encoder, LoRA.

    .venv/bin/python bench/finetuning.py --out bench/results/finetuning.json
    .venv/bin/python bench/finetuning.py --images 40 --runs 1            # does it all work?

Everything is synthetic: images of noise, and SigLIP towers of random weights (112 pixels, patch 14,
hidden size 192, 3 heads, MLP of 768), on one thread of a CPU, in fp32, without augmentation.

- `trunk`: seconds of an epoch, which consists of its steps and the held-out patients' score; with
  and without the trunk cache, for the last 1 and the last 2 of 6 blocks, unfrozen and by LoRA of
  rank 8. All variants alternate in one process. `seconds` are wall time, `processor_seconds` the
  processor time of the process, which other work on the machine affects less. `ratios` are those of
  the medians. `counted` is the corresponding ratio of multiplications: a trained block costs three
  forward passes (forward, and two products of that size backward), a frozen one a single pass,
  held-out images one forward pass. Only the tower is counted: head, AdamW and reading are added in
  both.
- `memory`: memory that steps need in addition to that before the first step (the weights, the
  images, the libraries), by depth of the encoder. `kept` is what one step of 32 images keeps for
  its backward pass, except parameters, counted tensor by tensor through
  `torch.autograd.graph.saved_tensors_hooks`; `gradients` and AdamW's `moments` are counted after
  it. `grown` is measured: a separate process takes three steps, after its peak of resident memory
  was reset (Linux, /proc/self/clear_refs), and reports that peak less the memory resident before.
  Head alone, and everything for comparison. A forward pass without a graph needs the activations
  of one block at a time, which are included in `grown`; results differ between runs by up to 10 MB.
- `parameters`: how many numbers train, counted; for MedGemma's tower from its config alone.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from measuring import alternate, write_results
from medembed.dataset.manifest import Manifest
from medembed.encoders.hub import resolve_checkpoint
from medembed.encoders.loading import load_encoder
from medembed.encoders.preprocessing import PROCESSOR_FILES
from medembed.finetuning import Hyperparameters
from medembed.finetuning.batches import Images, read_images
from medembed.finetuning.data_split import TrainRows, choose_rows
from medembed.finetuning.frozen_features import TokenImages, TrunkEncoder, fill_trunk_cache
from medembed.finetuning.head_init import init_random
from medembed.finetuning.hyperparameters import Depth
from medembed.finetuning.network import Network
from medembed.finetuning.training import Trainer
from standin import write_images

SIDE, PATCH = 112, 14
TOWER = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3}
N_BLOCKS = 6
DEPTHS = (1, 2)
RANK = 8
BATCH = 32
RECIPE = Hyperparameters(epochs=1, batch_size=BATCH, augment=False)
MEMORY_BLOCKS = (6, 12, 24)
MEDGEMMA = {"hidden_size": 1152, "intermediate_size": 4304, "side": 896, "blocks": 27}
POOLINGS = ("mean", "max")

Shape = dict[str, int]


def make_tower(directory: Path, n_blocks: int) -> Path:
    """Save a MedGemma-like checkpoint that holds only a SigLIP tower with random weights."""
    demo = resolve_checkpoint("demo").path
    directory.mkdir(parents=True)
    config = json.loads((demo / "config.json").read_text())
    config["vision_config"] |= {**TOWER, "num_hidden_layers": n_blocks}
    config["vision_config"] |= {"image_size": SIDE, "patch_size": PATCH}
    (directory / "config.json").write_text(json.dumps(config))
    for name in PROCESSOR_FILES:
        if (demo / name).is_file():
            processor = json.loads((demo / name).read_text())
            processor["size"] = {"height": SIDE, "width": SIDE}
            (directory / name).write_text(json.dumps(processor))
    torch.manual_seed(0)
    own = transformers.SiglipVisionConfig(**config["vision_config"])
    state = transformers.SiglipVisionModel(own).state_dict()
    named = {f"vision_tower.{name.removeprefix('vision_model.')}": t for name, t in state.items()}
    save_file(named, directory / "model.safetensors", {"format": "pt"})
    return directory


def make_rows(home: Path, n_images: int) -> tuple[Manifest, TrainRows]:
    """Write one image per patient; a tenth is for testing, a fifth of the rest held out."""
    manifest = write_images(home / "images", n_images, SIDE, SIDE)
    number = np.arange(n_images)
    rows = manifest.rows.assign(split=np.where(number % 10 == 9, "test", "train"))
    rows["label"] = rows["label"].where(number % 2 == 0, 1)
    manifest = replace(manifest, rows=rows)
    return manifest, choose_rows(manifest, 5, 0)


def make_network(
    encoder: Any, depth: int, recipe: Hyperparameters, n_cut: int | None = None
) -> Network:
    """Return a network with a new head that does not scale its columns."""
    width = sum(encoder.dimensions[name][0] for name in POOLINGS)
    columns = np.random.default_rng(0).normal(size=(64, width)).astype(np.float32)
    start = init_random(columns, np.arange(64), 0)
    return Network(encoder, Depth(depth), recipe, POOLINGS, start, n_cut)


# The trunk cache, and LoRA


def measure_epochs(home: Path, n_images: int, n_runs: int) -> dict[str, Any]:
    tower = make_tower(home / "tower", N_BLOCKS)
    encoder: Any = load_encoder(tower, device="cpu", precision="fp32")
    manifest, rows = make_rows(home, n_images)
    held = len(rows.held) / (len(rows.held) + len(rows.fitted))
    pixels, _ = read_images(rows.rows, home / "images", encoder.preprocessing, home)
    jobs: dict[str, Callable[[], float]] = {}
    processor: dict[str, list[float]] = {}
    parameters: dict[str, int] = {}
    sizes: dict[str, float] = {}
    for depth in DEPTHS:
        n_cut = N_BLOCKS - depth
        trunk = TrunkEncoder(encoder, n_cut, "fp32")
        cache = fill_trunk_cache(home / "trunk", trunk, manifest, home / "images")
        sizes[str(depth)] = round(cache.spec.row_bytes() * len(rows) / 1e6, 2)
        for name, lora in (("unfreeze", None), (f"lora{RANK}", RANK)):
            recipe = replace(RECIPE, lora=lora)
            network = make_network(encoder, depth, recipe)
            parameters[f"{name}-{depth}"] = network.n_trainable - count(network.head)
            for how, images, cut in (
                ("plain", pixels, None),
                ("cached", TokenImages(cache, rows.rows), n_cut),
            ):
                own = processor.setdefault(f"{name}-{depth}, {how}", [])
                job = time_epoch(encoder, depth, recipe, cut, images, rows, home, own)
                jobs[f"{name}-{depth}, {how}"] = job
    seconds = alternate(jobs, n_runs)
    processor = {name: own[1:] for name, own in processor.items()}  # the first warmed up
    return {
        "images": {"trained": len(rows.fitted), "held_out": len(rows.held)},
        "blocks": N_BLOCKS,
        "seconds": seconds,
        "processor_seconds": processor,
        "ratios": {name: of_medians(seconds, name, ", plain", ", cached") for name in parameters},
        "processor_ratios": {
            name: of_medians(processor, name, ", plain", ", cached") for name in parameters
        },
        "counted": {
            str(depth): round(count_ratio({**TOWER, "side": SIDE}, N_BLOCKS, depth, held, PATCH), 2)
            for depth in DEPTHS
        },
        "lora_vs_unfreezing": {
            f"{depth}, {how}": of_medians(
                processor, "", f"lora{RANK}-{depth}, {how}", f"unfreeze-{depth}, {how}"
            )
            for depth in DEPTHS
            for how in ("plain", "cached")
        },
        "cache_mb": sizes,
        "parameters": parameters,
    }


def of_medians(seconds: dict[str, list[float]], start: str, above: str, below: str) -> float:
    upper, lower = (statistics.median(seconds[start + end]) for end in (above, below))
    return round(upper / lower, 2)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def time_epoch(
    encoder: Any,
    depth: int,
    recipe: Hyperparameters,
    n_cut: int | None,
    images: Images,
    rows: TrainRows,
    home: Path,
    processor: list[float],
) -> Callable[[], float]:
    """Return a job that trains one epoch from the start and records its processor seconds."""

    def job() -> float:
        network = make_network(encoder, depth, recipe, n_cut)
        trainer = Trainer(network, rows, images, seed=0, name="x", state_path=home / "x", key="x")
        wall, own = time.perf_counter(), time.process_time()
        trainer._judge(trainer._train_epoch(1, None))
        processor.append(round(time.process_time() - own, 4))
        return time.perf_counter() - wall

    return job


def block_products(shape: Shape, n_tokens: int) -> int:
    """Return the multiplications of a block's forward pass for one image."""
    d, m = shape["hidden_size"], shape["intermediate_size"]
    return n_tokens * (4 * d * d + 2 * d * m) + 2 * n_tokens * n_tokens * d


def count_ratio(shape: Shape, n_blocks: int, depth: int, held: float, patch: int = 14) -> float:
    """Return the multiplications of an epoch without the trunk cache over those with it.

    Parameters
    ----------
    held : float
        Share of the images that are held out and processed once.
    """
    n_tokens = (shape["side"] // patch) ** 2
    block = block_products(shape, n_tokens)
    embedding = n_tokens * shape["hidden_size"] * 3 * patch * patch
    below = embedding + (n_blocks - depth) * block
    top = depth * block * (3 * (1 - held) + held)
    return (below + top) / top


# Memory


def measure_memory() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for what in ("head alone", "everything"):
        for n_blocks in MEMORY_BLOCKS:
            with tempfile.TemporaryDirectory() as name:
                tower = make_tower(Path(name) / "tower", n_blocks)
                command = [sys.executable, __file__, "--child", str(tower), what]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
            found.setdefault(what, {})[str(n_blocks)] = json.loads(done.stdout)
    return found


def measure_steps(tower: Path, what: str) -> dict[str, float]:
    """Return the memory that steps in this process needed, in MB."""
    encoder: Any = load_encoder(tower, device="cpu", precision="fp32")
    n_blocks = len(encoder.model.encoder.layers)
    network = make_network(encoder, n_blocks if what == "everything" else 0, RECIPE)
    del encoder
    drawn = np.random.default_rng(0).integers(0, 256, (BATCH, SIDE, SIDE), np.uint8)
    pixels, y = torch.from_numpy(drawn), torch.arange(BATCH) % 2
    own = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(own)
    network.set_training(True)
    Path("/proc/self/clear_refs").write_text("5")
    before, _ = resident()
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(network(pixels), y.float())
        loss.backward()
        optimizer.step()
    _, peak = resident()
    moments = [t for state in optimizer.state.values() for t in state.values()]
    return {
        "weights": megabytes(sum(p.nbytes for p in network.tower.parameters())),
        "kept": megabytes(kept_bytes(network, pixels)),
        "gradients": megabytes(sum(p.grad.nbytes for p in own if p.grad is not None)),
        "moments": megabytes(sum(t.nbytes for t in moments)),
        "grown": megabytes(peak - before),
    }


def resident() -> tuple[int, int]:
    """Return the resident bytes of this process, and their peak."""
    status = Path("/proc/self/status").read_text()
    now, peak = (
        1024 * int(status.partition(f"{name}:")[2].split()[0]) for name in ("VmRSS", "VmHWM")
    )
    return now, peak


def kept_bytes(network: Network, pixels: torch.Tensor) -> int:
    """Return the bytes kept for a step's backward pass, each once, without parameters."""
    own = {parameter.data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(pixels).sum()
    return sum(kept.values())


def megabytes(n_bytes: float) -> float:
    return round(n_bytes / 1e6, 2)


# Parameters


def count_medgemma(depth: int) -> dict[str, int]:
    """Return the trainable numbers of MedGemma's tower: blocks and the next norm, or adapters."""
    d, m = MEDGEMMA["hidden_size"], MEDGEMMA["intermediate_size"]
    block = 4 * (d * d + d) + (d * m + m) + (m * d + d) + 4 * d
    adapters = RANK * (4 * (d + d) + 2 * (d + m))
    return {f"unfreeze-{depth}": depth * block + 2 * d, f"lora{RANK}-{depth}": depth * adapters}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.child:
        print(json.dumps(measure_steps(Path(given.child[0]), given.child[1])))
        return
    start = time.perf_counter()
    memory = measure_memory()
    print(json.dumps(memory), flush=True)
    home = Path(tempfile.mkdtemp())
    try:
        epochs = measure_epochs(home, given.images, given.runs)
    finally:
        shutil.rmtree(home)
    counted = {str(depth): round(count_ratio(MEDGEMMA, 27, depth, 0.0), 2) for depth in DEPTHS}
    head = memory["head alone"]
    results = {
        "ratios": {
            "trunk_cache_last_1_of_6": epochs["ratios"]["unfreeze-1"],
            "trunk_cache_last_1_of_6_processor": epochs["processor_ratios"]["unfreeze-1"],
            "trunk_cache_last_1_of_6_counted": epochs["counted"]["1"],
            "trunk_cache_last_2_of_27_counted": counted["2"],
            "head_alone_kept_24_vs_6_blocks": round(head["24"]["kept"] / head["6"]["kept"], 2),
            "lora_vs_unfreezing_last_2_processor": epochs["lora_vs_unfreezing"]["2, cached"],
        },
        "synthetic": True,
        "tower": {**TOWER, "side": SIDE, "patch": PATCH},
        "trunk": epochs,
        "medgemma": {
            "counted": counted,
            "parameters": {k: v for depth in DEPTHS for k, v in count_medgemma(depth).items()},
        },
        "memory_mb": memory,
        "seconds": round(time.perf_counter() - start, 1),
    }
    if given.out:
        write_results(given.out, results)
    else:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
