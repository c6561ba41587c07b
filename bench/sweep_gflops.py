"""The rate of a sweep's MLPs in training over that of their matrix products alone."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch

from measuring import progress
from medembed.heads.batched_mlp import JUDGED_ROWS, BatchedMLP, Rows
from medembed.heads.mlp import MLPHead, gather, resolve_precision
from medembed.heads.scaling import Projector
from medembed.sweeps.search_space import default_spaces
from sweep_peers import load_table

__all__ = ["measure_cohort", "measure_gflops"]

N_MEMBERS, COHORT_EPOCHS = 16, 5
SCRIPT = Path(__file__).with_name("sweep.py")


def measure_gflops(place: Path, n_runs: int, _without: list[str]) -> dict[str, Any]:
    """Compare a cohort's training with its products, in one process and in one per core."""
    found: dict[str, Any] = {}
    for precision in dict.fromkeys([resolve_precision("auto"), "fp32"]):
        for side_by_side in dict.fromkeys([1, joblib.cpu_count()]):
            measured = [
                m for _ in range(n_runs) for m in run_cohorts(place, precision, side_by_side)
            ]
            products = sum(sum(m["products_seconds"]) for m in measured)
            training = sum(sum(m["training_seconds"]) for m in measured)
            gflop = sum(m["gflop"] for m in measured)
            found[name := f"{precision}_{side_by_side}_at_once"] = {
                "gflops_share": round(products / training, 4),
                "gflops_training": round(gflop / training, 1),
                "gflops_products": round(gflop / products, 1),
                "processes": measured,
            }
            progress(f"{name}: {found[name]['gflops_share']}")
    shares = {name: own["gflops_share"] for name, own in found.items()}
    first = next(iter(shares.values()))
    return {"gflops_share": first, "gflops_shares": shares, "gflops": found}


def run_cohorts(place: Path, precision: str, n: int) -> list[dict[str, Any]]:
    """Return the results of processes that run each phase at the same time."""
    command = [sys.executable, str(SCRIPT), "--child", precision, str(place)]
    pipe = subprocess.PIPE
    running = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(n)]
    outputs: list[dict[str, Any]] = []
    while not outputs:
        lines = [process.stdout.readline() for process in running if process.stdout]
        if all(line == "ready\n" for line in lines):
            for process in running:
                assert process.stdin
                process.stdin.write("go\n")
                process.stdin.flush()
        else:
            outputs = [json.loads(line) for line in lines]
    for process in running:
        process.communicate()
        assert process.returncode == 0
    return outputs


def measure_cohort(precision: str, place: Path) -> dict[str, Any]:
    """Train a cohort epoch by epoch, and after each epoch run only its products; one thread."""
    torch.set_num_threads(1)
    table = load_table(place)
    rows, held = np.flatnonzero(table.folds != 0), np.flatnonzero(table.folds == 0)
    space = default_spaces()["mlp"]
    heads = [
        MLPHead().set_params(**{**params, "precision": precision})
        for params in space.draw(N_MEMBERS, seed=0)
    ]
    cohort = gather(
        heads,
        Rows(table.X, rows, table.y[rows]),
        Rows(table.X, held, table.y[held]),
        Projector(table.X, rows),
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    products = Products(cohort, dtype, cohort._order(1).shape, len(held))
    cohort.train(1)
    products.run()
    training, alone, flop = [], [], cohort.flop
    for epoch in range(2, COHORT_EPOCHS + 2):
        training.append(_timed(lambda epoch=epoch: cohort.train(epoch)))
        alone.append(_timed(products.run))
    trained = cohort.flop - flop
    assert all(net.failure is None for net in cohort.nets)
    assert math.isclose(trained, COHORT_EPOCHS * products.flop, rel_tol=1e-9), "not the same work"
    return {"training_seconds": training, "products_seconds": alone, "gflop": trained / 1e9}


def _timed(job: Callable[[], object]) -> float:
    print("ready", flush=True)  # and wait for those side by side
    sys.stdin.readline()
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


class Products:
    """Only the matrix products of one epoch of a cohort, with equal shapes, dtypes and layouts.

    The factors are random, since their values do not matter.
    """

    def __init__(
        self, cohort: BatchedMLP, dtype: torch.dtype, order: tuple[int, ...], n_held: int
    ) -> None:
        (n_steps, self._size), self._dtype = order, dtype
        firsts = [net.params[0] for net in cohort.nets]
        self._first = self._random(sum(map(len, firsts)), firsts[0].shape[1])
        # (weight, as it is for the backward pass) of every further layer of every member
        self._further = [
            (weight, weight.t().contiguous())
            for net in cohort.nets
            for weight in (self._random(*own.shape) for own in net.params[1::2])
        ]
        self._rows, self._held = (
            self._random(n, len(self._first[0])) for n in (n_steps * self._size, n_held)
        )
        self._gradient = torch.empty_like(self._first)
        sizes = {self._size, *map(len, self._held.split(JUDGED_ROWS))}
        self._outputs = torch.empty(len(self._first) * max(sizes), dtype=dtype)
        self._activations = {
            (width, m): self._random(width, m)
            for width in {width for weight, _ in self._further for width in weight.shape}
            for m in sizes
        }
        self.flop = 0.0

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(self._dtype)

    def run(self) -> None:
        """Multiply, and count."""
        self.flop = 0.0
        with torch.inference_mode():
            for X in self._rows.split(self._size):
                Z = self._first_layers(X)
                for weight, turned in self._further:
                    a, dz = (self._activations[width, len(X)] for width in weight.shape[::-1])
                    torch.mm(weight, a)
                    torch.mm(dz, a.t())
                    torch.mm(turned, dz)
                    self.flop += 6 * weight.numel() * len(X)
                torch.mm(Z, X, out=self._gradient)
                self.flop += 2 * self._first.numel() * len(X)
            for X in self._held.split(JUDGED_ROWS):
                self._first_layers(X)
                for weight, _ in self._further:
                    torch.mm(weight, self._activations[weight.shape[1], len(X)])
                    self.flop += 2 * weight.numel() * len(X)

    def _first_layers(self, X: torch.Tensor) -> torch.Tensor:
        Z = self._outputs[: len(self._first) * len(X)].view(len(self._first), len(X))
        self.flop += 2 * self._first.numel() * len(X)
        return torch.mm(self._first, X.t(), out=Z)
