"""The tower and the head as one network on grey images, a trunk's tokens or pooled vectors."""

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
    "gelu": nn.GELU,  # the exact form, as in `heads.mlp`
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


@dataclass(frozen=True, eq=False)
class Start:
    """The initial head of a training.

    Attributes
    ----------
    mean, scale : float64 arrays of shape (d,)
        Subtracted from and dividing each column of the pooled vectors.
    weights, biases : tuple of float32 arrays
        Parameters of each layer (columns in, columns out) and (columns out,); the last has one
        logit.
    params : dict
        Parameters of an `MLPHead` of this shape: `hidden`, `activation`, `dropout`,
        `label_smoothing`, ….
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
        The initial head, which is copied.
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
        """Return the logits, (n,), of pooled vectors, (n, d)."""
        values = (vectors - self.get_buffer("mean")) / self.get_buffer("scale")
        for layer in self.layers[:-1]:
            values = self.dropout(self.activation(layer(values)))
        logits: torch.Tensor = self.layers[-1](values)[:, 0]
        return logits


class Network(nn.Module):
    """A partly trained tower and its head.

    Parameters
    ----------
    encoder : TorchEncoder
        The encoder in fp32, which is copied and not modified.
    depth : Depth
        Which part of the tower trains.
    recipe : Hyperparameters
        Supplies `precision`, `checkpointing` and `lora`.
    poolings : sequence of str
        Single-vector poolings, joined.
    start : Start
        The initial head.
    n_cut : int or None
        Number of first blocks to remove with the layers before them: images are then the tokens
        that a tower cut by `blocks.cut_trunk` returns.
    seed : int
        Random seed of the adapters, if any.
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
        """Switch between training and evaluation mode; frozen parts always stay in evaluation."""
        set_modes(self.encoder, self.depth, training=training)
        self.head.train(training)

    def vectors(self, images: torch.Tensor) -> torch.Tensor:
        """Return pooled vectors, float32 (n, d).

        No graph is kept for frozen parts: neither their parameters nor the images take gradients.

        Parameters
        ----------
        images : Tensor
            uint8 (n, height, width), or a trunk's tokens, (n, …), on the device.
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
        """Return logits, float32 (n,), of images in the form of `vectors`, or of pooled vectors."""
        is_pooled = images.ndim == 2
        logits: torch.Tensor = self.head(images if is_pooled else self.vectors(images))
        return logits

    def trained_state(self) -> dict[str, torch.Tensor]:
        """Return all that training changes, by name: parameters and batch-norm statistics."""
        parameters = dict(self.tower.named_parameters())
        buffers = dict(self.tower.named_buffers())
        state = {f"head.{name}": tensor for name, tensor in self.head.named_parameters()}
        state |= {f"tower.{name}": parameters[name] for name in self.trained_names}
        state |= {f"tower.{name}": buffers[name] for name in self._buffers_learnt}
        return {name: tensor.detach() for name, tensor in state.items()}

    @torch.no_grad()
    def load_trained(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the result of `trained_state`."""
        for name, tensor in self.trained_state().items():
            tensor.copy_(state[name])

    def changed_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tower's changed tensors, by its own names, with adapters merged."""
        if self.recipe.lora is not None and self.trained_names:
            return merge_adapters(self.tower)
        state = self.trained_state().items()
        return {n.removeprefix("tower."): tensor for n, tensor in state if n.startswith("tower.")}

    @property
    def n_trainable(self) -> int:
        """Return the number of values that training changes, including the head's."""
        return sum(own.numel() for own in self.parameters() if own.requires_grad)

    def _learnt_buffers(self) -> list[str]:
        self.set_training(True)
        learning = {name for name, module in self.tower.named_modules() if module.training}
        stored = self.tower.state_dict()
        names = [name for name, _ in self.tower.named_buffers() if name in stored]
        return [name for name in names if name.rpartition(".")[0] in learning]


def blank_start(width: int) -> Start:
    """Return a placeholder head for `width` columns, for use of the tower alone."""
    params = {"activation": "relu", "dropout": 0.0}
    weights, biases = np.zeros((width, 1), np.float32), np.zeros(1, np.float32)
    return Start(np.zeros(width), np.ones(width), (weights,), (biases,), params)
