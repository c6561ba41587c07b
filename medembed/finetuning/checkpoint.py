"""Where training has got to after an epoch, in one file that is complete or absent.

Parameters, AdamW's moments and the best epoch's parameters are safetensors; counters stand in the
file's metadata as JSON. Random numbers follow from seed, epoch and step, so none are kept.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from medembed.core.files import require_plain, write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Counters", "State", "read_state", "write_state"]

Tensors = dict[str, torch.Tensor]


@dataclass
class Counters:
    """What is counted while a depth trains.

    Attributes
    ----------
    epoch : int
        Epochs that are over.
    best_epoch : int
        The best of them, from 1; 0 before the first.
    best_key : list of float
        AUROC of its held-out studies, and less its loss: what makes an epoch better.
    seconds : float
        Spent so far.
    history : list of dict
        Per epoch `train_loss`, `loss` and `auroc`.
    """

    epoch: int = 0
    best_epoch: int = 0
    best_key: list[float] = field(default_factory=list)
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass
class State:
    """Counters, and tensors by name: of now, of the best epoch, of AdamW."""

    counters: Counters
    now: Tensors
    best: Tensors
    moments: dict[str, Tensors]


def write_state(path: Path, key: str, state: State) -> None:
    """Write the state of one training, named by `key`, in the place of the last one."""
    parts = {"now": state.now, "best": state.best}
    parts |= {f"adam.{moment}": tensors for moment, tensors in state.moments.items()}
    flat = {
        f"{part}/{name}": tensor.cpu().contiguous()
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }
    metadata = {"key": key, "counters": json.dumps(asdict(state.counters), allow_nan=False)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(flat, metadata))


def read_state(path: Path, key: str) -> State | None:
    """Read the state of the training named by `key`; None where there is none, or it is damaged."""
    try:
        require_plain(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            if metadata.get("key") != key:
                return None
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        counters = Counters(**json.loads(metadata["counters"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    parts: dict[str, Any] = {}
    for full, tensor in flat.items():
        part, _, name = full.partition("/")
        parts.setdefault(part, {})[name] = tensor
    moments = {p.removeprefix("adam."): t for p, t in parts.items() if p.startswith("adam.")}
    return State(counters, parts.get("now", {}), parts.get("best", {}), moments)
