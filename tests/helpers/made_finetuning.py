"""Small cohorts of images whose abnormal ones have a bright square, and towers to train on them."""

import contextlib
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from made_gemma import make_gemma
from PIL import Image

from medembed.dataset.manifest import Manifest, make_manifest, write_manifest
from medembed.encoders.loading import load_encoder
from medembed.finetuning import Hyperparameters, finetune, training
from medembed.finetuning.hyperparameters import Depth
from medembed.finetuning.network import Network, blank_start
from medembed.finetuning.training import write_state
from medembed.results.runs import open_run

QUICK = Hyperparameters(epochs=2, batch_size=16, augment=False, lr=3e-3)


def make_cohort(home: Path, *, n_patients: int = 40, side: int = 32, seed: int = 0) -> Manifest:
    """Write `images/` and `manifest.csv`: one to two views per patient, a quarter for testing."""
    generator = np.random.default_rng(seed)
    rows = []
    for patient in range(n_patients):
        label = int(generator.random() < 0.5)
        for view in range(1 + patient % 2):
            pixels = generator.integers(40, 110, (side, side), dtype=np.uint8)
            if label:
                top, left = generator.integers(2, side - 10, 2)
                pixels[top : top + 8, left : left + 8] = 180
            name = f"patient{patient:03d}/view{view}.png"
            path = home / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            split = "test" if patient % 4 == 3 else "train"
            region = ("hand", "wrist")[patient // 2 % 2]
            rows.append((name, digest, f"p{patient:03d}", f"study{patient}", region))
            rows[-1] += (str(label), split)
    columns = ["image", "sha256", "patient", "study", "region", "label", "split"]
    manifest = make_manifest(pd.DataFrame(rows, columns=columns), "study")
    write_manifest(manifest, home / "manifest.csv")
    return manifest


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Train on one thread: two test processes that share two cores would wait for each other."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def make_tower(directory: Path, n_layers: int = 3) -> Path:
    """Save a random MedGemma-like checkpoint."""
    make_gemma(directory, num_hidden_layers=n_layers)
    return directory


def tune(home: Path, encoder: Path | str, out: Path, **options: Any) -> dict[str, Any]:
    """Fine-tune on a cohort of `make_cohort`, on the CPU."""
    known: dict[str, Any] = {"config": QUICK, "device": "cpu", "precision": "fp32"}
    with contextlib.redirect_stderr(io.StringIO()), one_thread():
        return finetune(
            home / "manifest.csv", home / "images", encoder, out, **{**known, **options}
        ).as_dict()


def state_of(reference: Path | str) -> dict[str, torch.Tensor]:
    """Load an encoder's tensors, by the names that its model has for them."""
    encoder: Any = load_encoder(reference, device="cpu", precision="fp32")
    return dict(encoder.model.state_dict())


def different(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Name the tensors that differ in a bit."""
    assert set(before) == set(after)
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def saved_bytes(encoder: Any, depth: Depth, recipe: Hyperparameters = QUICK) -> int:
    """Count what a step keeps for its backward pass, but the parameters."""
    width = 2 * encoder.dimensions["mean"][0]
    network = Network(encoder, depth, recipe, ("mean", "max"), blank_start(width))
    network.set_training(True)
    own = {parameter.data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    size = encoder.preprocessing
    pixels = torch.zeros(4, size.height, size.width, dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = network(pixels).sum()
    loss.backward()
    return sum(kept.values())


class Stop(KeyboardInterrupt):
    pass


def require_equal(out: Path, whole: Path) -> None:
    """Compare a finished run with the uninterrupted one: every file but for times."""

    def names(run: Path) -> list[str]:
        paths = [path.relative_to(run) for path in run.rglob("*") if path.is_file()]
        return sorted(str(p) for p in paths if not any(part.startswith(".") for part in p.parts))

    assert names(out) == names(whole)
    for name in names(whole):
        ours, theirs = (run / name for run in (out, whole))
        if name.endswith((".parquet", ".safetensors")):
            assert ours.read_bytes() == theirs.read_bytes(), name
    boards = [open_run(run).as_dict()["leaderboard"] for run in (out, whole)]
    for entry in (*boards[0], *boards[1]):
        entry["seconds"] = None
    assert boards[0] == boards[1]
    histories = [[r.history for r in open_run(run).trial_records()] for run in (out, whole)]
    assert histories[0] == histories[1]


def stop_after(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """Interrupt once n epochs are written."""
    count = 0

    def counted(*arguments: Any) -> None:
        nonlocal count
        write_state(*arguments)
        count += 1
        if count == n:
            raise Stop

    monkeypatch.setattr(training, "write_state", counted)
