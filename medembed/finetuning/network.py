"""The tower and the head as one network, from grey images, a trunk's tokens or pooled vectors."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from medembed.encoders.devices import arithmetic
from medembed.encoders.features import pool
from medembed.encoders.torch_encoder import TorchEncoder
from medembed.finetuning.adapters import add_adapters, merge_adapters
from medembed.finetuning.blocks import keep_top, recompute, set_modes, unfreeze
from medembed.finetuning.hyperparameters import Depth, Hyperparameters

__all__ = ["HeadNet", "Network", "Start", "blank_start"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,  # the exact one, as `heads.mlp` has it
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


@dataclass(frozen=True, eq=False)
class Start:
    """The head that training begins with.

    Attributes
    ----------
    mean, scale : float64 arrays of shape (d,)
        Subtracted from and dividing each column of the pooled vectors.
    weights, biases : tuple of float32 arrays
        Of each layer (columns in, columns out) and (columns out,); one logit in the end.
    params : dict
        Of an `MLPHead` of this shape: `hidden`, `activation`, `dropout`, `label_smoothing`, ….
    """

    mean: np.ndarray
    scale: np.ndarray
    weights: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]
    params: dict[str, Any]


class HeadNet(nn.Module):
    """Scaling, hidden layers with dropout, one logit.

    Parameters
    ----------
    start : Start
        Copied.
    """

    def __init__(self, start: Start) -> None:
        super().__init__()
        self.register_buffer("mean", torch.from_numpy(start.mean.astype(np.float32)))
        self.register_buffer("scale", torch.from_numpy(start.scale.astype(np.float32)))
        widths = [len(start.mean), *(len(bias) for bias in start.biases)]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.activation = _ACTIVATIONS[start.params["activation"]]()
        self.dropout = nn.Dropout(start.params["dropout"])
        with torch.no_grad():
            for layer, weight, bias in zip(self.layers, start.weights, start.biases, strict=True):
                layer.get_parameter("weight").copy_(torch.from_numpy(weight.T.copy()))
                layer.get_parameter("bias").copy_(torch.from_numpy(bias.copy()))

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Give the logits, (n,), of pooled vectors, (n, d)."""
        values = (vectors - self.get_buffer("mean")) / self.get_buffer("scale")
        for layer in self.layers[:-1]:
            values = self.dropout(self.activation(layer(values)))
        logits: torch.Tensor = self.layers[-1](values)[:, 0]
        return logits


class Network(nn.Module):
    """A tower of which some trains, and its head.

    Parameters
    ----------
    encoder : TorchEncoder
        In fp32; copied, so that it stays what it is.
    depth : Depth
        What of it trains.
    recipe : Hyperparameters
        Its `precision`, `checkpointing` and `lora`.
    poolings : sequence of str
        Single-vector poolings, side by side.
    start : Start
        The head.
    n_cut : int or None
        Blocks that are taken away with what comes before them: images come as the tokens that
        `blocks.cut_trunk` gives.
    seed : int
        Of the adapters, where there are some.
    """

    def __init__(
        self,
        encoder: TorchEncoder,
        depth: Depth,
        recipe: Hyperparameters,
        poolings: Sequence[str],
        start: Start,
        n_cut: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.encoder, self.depth, self.recipe = encoder.copy(), depth, recipe
        self.poolings, self._from_tokens = tuple(poolings), n_cut is not None
        if n_cut is not None:
            keep_top(self.encoder, n_cut)
        if recipe.lora is None:
            self.trained_names = unfreeze(self.encoder, depth)
        else:
            self.trained_names = add_adapters(self.encoder, depth, recipe.lora, seed)
        if recipe.checkpointing:
            recompute(self.encoder, depth)
        self.tower = self.encoder.model
        self.head = HeadNet(start).to(encoder.device)
        self._buffers_learnt = self._learnt_buffers()
        self.set_training(False)

    def set_training(self, training: bool) -> None:
        """Choose between training and evaluation; what is frozen always evaluates."""
        set_modes(self.encoder, self.depth, training=training)
        self.head.train(training)

    def vectors(self, images: torch.Tensor) -> torch.Tensor:
        """Give pooled vectors, float32 (n, d).

        No graph is kept of what is frozen: neither its parameters nor the images take gradients.

        Parameters
        ----------
        images : Tensor
            On the device: uint8 (n, height, width), or a trunk's tokens, (n, …).
        """
        is_frozen = not self.trained_names
        with (
            torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen),
            arithmetic(self.encoder.device, self.recipe.precision),
        ):
            pixels = images.float() if self._from_tokens else self.encoder.normalise(images)
            pooled = pool(self.encoder.features(pixels), self.poolings)
        return torch.cat([pooled[name] for name in self.poolings], dim=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Give logits, float32 (n,), of images as `vectors` takes them, or of pooled vectors."""
        is_pooled = images.ndim == 2
        logits: torch.Tensor = self.head(images if is_pooled else self.vectors(images))
        return logits

    def trained_state(self) -> dict[str, torch.Tensor]:
        """Give what training changes, by name: parameters, and statistics of batch norms."""
        parameters = dict(self.tower.named_parameters())
        buffers = dict(self.tower.named_buffers())
        state = {f"head.{name}": tensor for name, tensor in self.head.named_parameters()}
        state |= {f"tower.{name}": parameters[name] for name in self.trained_names}
        state |= {f"tower.{name}": buffers[name] for name in self._buffers_learnt}
        return {name: tensor.detach() for name, tensor in state.items()}

    @torch.no_grad()
    def load_trained(self, state: dict[str, torch.Tensor]) -> None:
        """Take back what `trained_state` gave."""
        for name, tensor in self.trained_state().items():
            tensor.copy_(state[name])

    def changed_tensors(self) -> dict[str, torch.Tensor]:
        """Give what has changed of the tower, by its own names: adapters are merged."""
        if self.recipe.lora is not None and self.trained_names:
            return merge_adapters(self.tower)
        state = self.trained_state().items()
        return {n.removeprefix("tower."): tensor for n, tensor in state if n.startswith("tower.")}

    @property
    def n_trainable(self) -> int:
        """Count the numbers that training changes, the head's among them."""
        return sum(own.numel() for own in self.parameters() if own.requires_grad)

    def _learnt_buffers(self) -> list[str]:
        self.set_training(True)
        learning = {name for name, module in self.tower.named_modules() if module.training}
        stored = self.tower.state_dict()
        names = [name for name, _ in self.tower.named_buffers() if name in stored]
        return [name for name in names if name.rpartition(".")[0] in learning]


def blank_start(width: int) -> Start:
    """Return a head that says nothing of so many columns, where only the tower is of use."""
    params = {"activation": "relu", "dropout": 0.0}
    weights, biases = np.zeros((width, 1), np.float32), np.zeros(1, np.float32)
    return Start(np.zeros(width), np.ones(width), (weights,), (biases,), params)
