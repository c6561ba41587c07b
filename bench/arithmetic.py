"""Measure on a CPU the effects of the GPU's path: bfloat16, block compilation, the patch product.

    .venv/bin/python bench/arithmetic.py --out bench/results/arithmetic.json

Distances are those of the canary: from the tower's own fp32, as a share of the distance between
different canary images; a cache accepts up to 0.02. The tower has MedGemma's 27 blocks of width
1152, random weights and 224 px instead of 896, so that a CPU needs only a minute. Compilation is
timed on 27 narrow blocks: its time depends on the number of operations, not on their size.
"""

import argparse
import copy
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # of earlier runs; read when torch loads

import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from measuring import write_results
from medembed.encoders.devices import set_precision
from medembed.encoders.preprocessing import Preprocessing
from medembed.encoders.siglip import SiglipEncoder, fuse
from medembed.extraction.canary import TOLERANCE, check_canary, compute_canary

WIDE = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16}
NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
POOLINGS = ("mean", "max", "grid4")
N_BLOCKS = 27
HALF = (0.5, 0.5, 0.5)


class AllRounded(SiglipEncoder):
    """A tower entirely in bfloat16, including residual stream and norms."""

    def see(self, pixels: torch.Tensor) -> Any:  # noqa: D102 - TorchEncoder's
        return self.features(self.normalise(pixels).to(torch.bfloat16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=N_BLOCKS)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--narrow", action="store_true", help="for a test of this script")
    parser.add_argument("--out", type=Path, default=Path("bench/results/arithmetic.json"))
    given = parser.parse_args()
    shape = NARROW if given.narrow else WIDE
    distances = measure_distances(make_tower(shape, given.blocks, given.side), given.side)
    compiling = time_compiling(given.blocks)
    ratios = {
        f"rounded_vs_ours_{name}": round(distances["all_rounded"][name] / own, 3)
        for name, own in distances["ours"].items()
    }
    ratios["compiling_whole_vs_block"] = round(compiling["whole"] / compiling["block"], 2)
    write_results(
        given.out,
        {
            "ratios": ratios,
            "distances": distances,
            "limit": TOLERANCE,
            "compiling_seconds": compiling,
            "patch_product_error": patch_error(given.side),
        },
    )


def make_tower(shape: dict[str, int], n_blocks: int, side: int) -> Any:
    """Return a random tower with bfloat16 weights, the precision of stored checkpoints."""
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        **shape, num_hidden_layers=n_blocks, image_size=side, patch_size=14, vision_use_head=False
    )
    return SiglipVisionModel(config).to(torch.bfloat16).float().eval()


def measure_distances(model: Any, side: int) -> dict[str, dict[str, float]]:
    """Return every pooling's distance from fp32, in bfloat16 throughout and as in extraction."""
    known = {
        "preprocessing": Preprocessing(side, side, "stretch", "bilinear", HALF, HALF, 1 / 255),
        "fingerprint": "0" * 64,
        "source": "made",
    }
    document = compute_canary(SiglipEncoder(copy.deepcopy(model), **known), list(POOLINGS))
    rounded = AllRounded(copy.deepcopy(model).to(torch.bfloat16), precision="bf16", **known)
    far = {name: distance(document, rounded, name) for name in POOLINGS}
    del rounded
    set_precision(model, "bf16")
    ours = SiglipEncoder(model, precision="bf16", **known)
    return {
        "all_rounded": far,
        "ours": {name: distance(document, ours, name) for name in POOLINGS},
    }


def distance(document: Any, encoder: SiglipEncoder, pooling: str) -> float:
    known: dict[str, Any] = {"there": {}, "here": {}, "cache_path": Path("cache")}
    return round(check_canary(document, encoder, [pooling], batch_size=4, **known), 5)


def time_compiling(n_blocks: int) -> dict[str, float]:
    """Return the seconds of a narrow tower's first batch, compiled as a whole and by block."""
    tower = make_tower(NARROW, n_blocks, 56)
    pixels = torch.zeros(1, 3, 56, 56)

    def whole() -> Callable[..., Any]:
        return torch.compile(tower, dynamic=False)

    def by_block() -> Callable[..., Any]:
        for block in tower.encoder.layers:
            block.compile(dynamic=False)
        return tower

    torch.compile(torch.nn.GELU())(pixels)  # loads the compiler
    found = {}
    for name, begin in (("whole", whole), ("block", by_block)):
        torch.compiler.reset()
        start = time.perf_counter()
        with torch.inference_mode():
            begin()(pixel_values=pixels)
        found[name] = round(time.perf_counter() - start, 2)
    return found


def patch_error(side: int) -> float:
    """Return the patch product's largest error in fp32, as a share of the convolution's largest."""
    tower = make_tower({**WIDE, "intermediate_size": 64}, 1, side)
    grey = torch.rand(2, 1, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = grey.expand(-1, 3, -1, -1)
    with torch.inference_mode():
        exact = tower.embeddings.patch_embedding(images)
        fuse(tower, "cpu", channels_alike=True)
        found = tower.embeddings.patch_embedding(images)
    return float((found - exact).abs().max() / exact.abs().max())


if __name__ == "__main__":
    main()
