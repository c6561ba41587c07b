"""Train the demo's encoder on synthetic radiographs and write it in MedGemma's checkpoint layout.

`python -m tools.demo_encoder --out DIR` repeats the training of `encoders/assets/demo`: a SigLIP
tower of 0.7 M parameters that finds fracture lines, displaced fragments, implants and lesions in
the renderings of `medembed.demo.synthetic`, and has no medical knowledge.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import nn

from medembed.core.files import json_bytes, write_atomically
from medembed.demo.synthetic import KINDS, TRAINING_SEEDS, TRIAL_SEEDS
from tools.demo_encoder.card import describe, processor_config, tower_config
from tools.demo_encoder.teacher import Batches, Teacher
from tools.demo_encoder.training_set import TrainingSet, draw_training_set

__all__ = ["embed", "main", "measure", "train", "write_checkpoint"]

_BATCH = 64
_LEARNING_RATE = 2e-3
_WEIGHT_DECAY = 0.05
_WINDOWS_UNTIL = 0.8  # share of the schedule that uses windows


def train(
    data: TrainingSet,
    *,
    n_steps: int,
    batch_size: int = _BATCH,
    seconds: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int, float, Teacher], None] | None = None,
) -> Teacher:
    """Return a newly trained tower with its heads.

    Parameters
    ----------
    data
        The training images.
    n_steps, batch_size
        Length of the schedule (linear warm-up over a twentieth, then cosine to zero).
    seconds
        Shorten the schedule so that it ends after about this time.
    seed
        Determines initial weights, order and flips.
    progress
        Called as progress(done, total, loss, teacher) after each step.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        teacher = Teacher().train()
    optimizer = torch.optim.AdamW(
        teacher.parameters(), _LEARNING_RATE, betas=(0.9, 0.98), weight_decay=_WEIGHT_DECAY
    )
    batches = Batches(data, torch.Generator().manual_seed(seed))
    teacher.whiten(batches.images[:500], batches.generator)
    order = batches.order(n_steps * batch_size).reshape(n_steps, batch_size)
    fast = _has_bf16()
    started = time.monotonic()
    for step in range(n_steps):
        share = step / n_steps
        if seconds is not None:
            share = max(share, (time.monotonic() - started) / seconds)
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * _schedule(share)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            loss = teacher.loss(batches.take(order[step], windows=share < _WINDOWS_UNTIL))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        if progress is not None:
            progress(step + 1, n_steps, float(loss.detach()), teacher)
    return teacher.eval()


def _has_bf16() -> bool:
    """Return whether torch reports that this CPU multiplies bfloat16 faster than float32."""
    mkldnn = torch.backends.mkldnn
    if not mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _schedule(share: float) -> float:
    warm_up = 0.05
    if share < warm_up:
        return (share + 1e-3) / warm_up
    return 0.5 * (1 + float(np.cos(np.pi * (share - warm_up) / (1 - warm_up))))


@torch.inference_mode()
def embed(teacher: Teacher, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    """Return the `mean` and the `max` of the patch tokens, float32 (n, 128) each."""
    teacher.eval()
    pooled: dict[str, list[NDArray[np.float32]]] = {"mean": [], "max": []}
    for i in range(0, len(images), _BATCH):
        tokens = teacher.tokens(torch.from_numpy(images[i : i + _BATCH]))
        pooled["mean"].append(tokens.mean(1).numpy())
        pooled["max"].append(tokens.amax(1).numpy())
    return {name: np.concatenate(parts) for name, parts in pooled.items()}


def measure(teacher: Teacher, *, n: int = 4000, jobs: int | None = None) -> dict[str, float]:
    """Return scores of a logistic head on frozen embeddings of new images.

    Returns
    -------
    dict
        AUROC of abnormal against normal by pooling (`mean`, `mean+max`), and of each kind against
        normal with `mean+max`. Trained on the first half of `n` images, scored on the second.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    data = draw_training_set(TRIAL_SEEDS[:n], jobs=jobs)
    pooled = embed(teacher, data.images)
    y, half = data.kinds > 0, n // 2
    scores = {}
    for name, X in (
        ("mean", pooled["mean"]),
        ("mean+max", np.concatenate([pooled["mean"], pooled["max"]], 1)),
    ):
        head = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        probability = head.fit(X[:half], y[:half]).predict_proba(X[half:])[:, 1]
        scores[name] = float(roc_auc_score(y[half:], probability))
    for kind, name in enumerate(KINDS, 1):
        rows = np.isin(data.kinds[half:], (0, kind))
        if len(np.unique(y[half:][rows])) == 2:  # a small trial may lack a kind
            scores[name] = float(roc_auc_score(y[half:][rows], probability[rows]))
    return scores


def write_checkpoint(teacher: Teacher, directory: Path, card: str) -> None:
    """Write the tower alone as a MedGemma 4B checkpoint directory, in float16.

    Tensor names are those of transformers 4.x, which the hub holds.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"vision_tower.vision_model.{name}": tensor.detach().to(torch.float16).contiguous()
        for name, tensor in teacher.tower.state_dict().items()
    }
    write_atomically(directory / "model.safetensors", save(tensors, {"format": "pt"}))
    write_atomically(directory / "config.json", json_bytes(tower_config()))
    write_atomically(directory / "preprocessor_config.json", json_bytes(processor_config()))
    write_atomically(directory / "README.md", card.encode())


def main(arguments: list[str] | None = None) -> None:
    """Train, measure and write the demo's encoder."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo_encoder", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory to write")
    parser.add_argument("--images", type=int, default=16000, help="synthetic images to render")
    parser.add_argument("--steps", type=int, default=3000, help=f"batches of {_BATCH} images")
    parser.add_argument("--seconds", type=float, help="end the schedule after about this long")
    parser.add_argument("--trial-images", type=int, default=4000, help="fresh images to score on")
    parser.add_argument("--save-every", type=int, default=0, help="also write every N steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, help="processes that render (default: all cores)")
    asked = parser.parse_args(arguments)

    started = time.monotonic()
    data = draw_training_set(TRAINING_SEEDS[: asked.images], jobs=asked.jobs)
    _print(f"rendered {asked.images} images in {time.monotonic() - started:.0f} s")

    def report(done: int, total: int, loss: float, teacher: Teacher) -> None:
        if done % 50 == 0 or done == total:
            _print(f"step {done}/{total}, loss {loss:.3f}, {time.monotonic() - started:.0f} s")
        if asked.save_every and done % asked.save_every == 0:
            write_checkpoint(teacher, asked.out, describe({}, n_images=asked.images, n_steps=done))

    teacher = train(
        data, n_steps=asked.steps, seconds=asked.seconds, seed=asked.seed, progress=report
    )
    teacher.tower.half().float()  # measure what is stored
    scores = measure(teacher, n=asked.trial_images, jobs=asked.jobs)
    _print(", ".join(f"{name} {score:.3f}" for name, score in scores.items()))
    card = describe(scores, n_images=asked.images, n_steps=asked.steps, n_trial=asked.trial_images)
    write_checkpoint(teacher, asked.out, card)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
