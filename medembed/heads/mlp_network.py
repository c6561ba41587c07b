"""Multi-layer perceptrons side by side, and the one step that trains them together.

The first layers of all members form one matrix, so that each batch takes two large products,
forward and backward; further layers are computed member by member. The backward pass is written
out: autograd would keep and touch what is not needed. Activations are laid out unit by unit,
(width, batch). Weights and AdamW's moments are float32; products in bfloat16 round activations and
gradients to bfloat16, as usual in mixed precision.

What is judged and kept are averages of the weights over the steps, in which later steps weigh more:
"polynomial-decay averaging" (Shamir and Zhang, ICML 2013), which has the effect of a learning rate
that decays, at every epoch. AdamW goes on from the weights themselves.

`Losses` is the members' cross-entropy, each with its class weights and label smoothing.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

__all__ = [
    "ACTIVATIONS",
    "TENSORS",
    "Activation",
    "JointStep",
    "LossRates",
    "Losses",
    "Masks",
    "Member",
    "Net",
    "row_weights_of",
]


def row_weights_of(y: torch.Tensor, class_weights: Sequence[float | torch.Tensor]) -> torch.Tensor:
    """Return the weights in the loss of rows with labels y (m,), float32 0 or 1.

    With arrays of weights (members, 1) in place of numbers, the result is (members, m).
    """
    normal, abnormal = class_weights
    return y * (abnormal - normal) + normal


class LossRates(NamedTuple):
    """The parameters of the members' losses, each float32 of shape (members, 1)."""

    smoothing: torch.Tensor
    normal: torch.Tensor
    abnormal: torch.Tensor

    @classmethod
    def of(cls, rates: Sequence[tuple[float, float, float]]) -> "LossRates":
        """Build from the three rates of each member, in that order."""
        return cls(*torch.tensor(rates, dtype=torch.float32).t()[:, :, None].unbind())


class Losses:
    """The losses of all members on a batch with labels y (m,), float32 0 or 1."""

    def __init__(self, rates: LossRates, y: torch.Tensor) -> None:
        self._targets = y * (1 - rates.smoothing) + rates.smoothing / 2
        self._weights = row_weights_of(y, (rates.normal, rates.abnormal))
        self._logits = torch.empty_like(self._targets)

    def gradient(self, k: int, logits: torch.Tensor) -> torch.Tensor:
        """Return the gradient, float32, of member k's mean loss by its logits (m,)."""
        own = self._logits[k].copy_(logits)
        return (torch.sigmoid(own) - self._targets[k]) * self._weights[k] / len(own)

    def sums(self) -> np.ndarray:
        """Return each member's summed loss over the batch, float64 of shape (members,)."""
        losses = functional.binary_cross_entropy_with_logits(
            self._logits, self._targets, self._weights, reduction="none"
        )
        return losses.sum(1, dtype=torch.float64).numpy()


#: How fast earlier steps fade from the averages: of n steps, step t weighs about (t / n) ** _DECAY.
_DECAY = 8

#: Dropout is decided by random bytes, so that its share is a multiple of 1 / 256.
_BYTE = 256


@dataclass(frozen=True)
class Activation:
    """An activation, forward and backward, into allocated memory.

    Attributes
    ----------
    forward : callable (z, out) -> out
    backward : callable (da, z, a) -> z
        Takes the gradient of the output, the input, and the output; writes the input's gradient
        over the input.
    in_place : bool
        Whether `out` may be z, because backward does not read the input.
    """

    forward: Any
    backward: Any
    in_place: bool


_aten = torch.ops.aten

ACTIVATIONS = {
    "relu": Activation(
        lambda z, out: torch.clamp_min(z, 0.0, out=out),
        lambda da, z, a: _aten.threshold_backward.grad_input(da, a, 0.0, grad_input=z),
        in_place=True,
    ),
    "gelu": Activation(
        lambda z, out: _aten.gelu.out(z, out=out),
        lambda da, z, a: _aten.gelu_backward.grad_input(da, z, grad_input=z),
        in_place=False,
    ),
    "silu": Activation(
        lambda z, out: _aten.silu.out(z, out=out),
        lambda da, z, a: _aten.silu_backward.grad_input(da, z, grad_input=z),
        in_place=False,
    ),
    "tanh": Activation(
        lambda z, out: torch.tanh(z, out=out),
        lambda da, z, a: _aten.tanh_backward.grad_input(da, a, grad_input=z),
        in_place=True,
    ),
}


@dataclass(frozen=True)
class Member:
    """The parameters of one perceptron of a cohort, in the ranges of `MLPHead`.

    Parameters
    ----------
    kind : hashable
        Selects which of the cohort's projections is applied to the columns.
    class_weights : (float, float)
        Weights in the loss of a normal and of an abnormal row.
    """

    hidden: tuple[int, ...]
    activation: str
    dropout: float
    lr: float
    weight_decay: float
    label_smoothing: float
    class_weights: tuple[float, float]
    epochs: int
    patience: int | None
    stopping: str
    kind: Hashable


@dataclass
class Net:
    """One member in training.

    Attributes
    ----------
    params, means, squares, averages : lists of float32 tensors
        The first layer (width, columns), whose column after the data's is its bias and whose last
        columns are padding; then weight (width, width before) and bias (width,) of each further
        layer. AdamW's two moments and the averages of the parameters have the same shapes.
    steps : list of float32 scalars
        AdamW's step counts, one per tensor.
    epoch, best_epoch, best_key, best, best_logits
        Epochs done; the best epoch, the score that makes it best, its averages, and its logits on
        the validation rows.
    history : list of dict
        Per epoch `train_loss` and, with validation rows, `loss` and `auroc`.
    failure : str or None
        Why training stopped with an error.
    """

    params: list[torch.Tensor]
    means: list[torch.Tensor]
    squares: list[torch.Tensor]
    averages: list[torch.Tensor]
    steps: list[torch.Tensor]
    epoch: int = 0
    best_epoch: int = 0
    best_key: tuple[float, ...] | None = None
    best: list[torch.Tensor] | None = None
    best_logits: np.ndarray | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    failure: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return a state with arrays copied from tensors: a view would be stored with its base."""
        state = dict(self.__dict__)
        if self.best is not None and self.best_epoch == self.epoch:
            state["best"] = None  # those are `averages`
        for name in TENSORS:
            if state[name] is not None:
                state[name] = [np.array(tensor.numpy()) for tensor in state[name]]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore tensors from copies of the arrays, which other processes may share."""
        for name in TENSORS:
            if state[name] is not None:
                state[name] = [torch.from_numpy(array.copy()) for array in state[name]]
        self.__dict__.update(state)
        if self.best is None and self.best_key is not None:
            self.best = [tensor.clone() for tensor in self.averages]

    def layers(self, n_columns: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return weights (before, after) and biases (after,) of the best epoch, else the last."""
        first, *rest = self.best or self.averages
        pairs = [(first[:, :n_columns], first[:, n_columns])]
        pairs += list(zip(rest[::2], rest[1::2], strict=True))
        return [
            (np.ascontiguousarray(weight.numpy().T), bias.numpy().copy()) for weight, bias in pairs
        ]


TENSORS = ("params", "means", "squares", "averages", "steps", "best")
"""Attributes of a `Net` that are lists of tensors."""


class Masks:
    """Which hidden units stay in one step: equal for all members that drop an equal share.

    Unit j of layer k has the same random bytes in every member, whatever the widths and the other
    members.
    """

    def __init__(self, stream: tuple[int, ...], n_rows: int, dtype: torch.dtype) -> None:
        self._stream, self._n_rows = stream, n_rows
        self._integer = torch.int16 if dtype == torch.bfloat16 else torch.int32
        self._bytes: dict[int, torch.Tensor] = {}
        self._masks: dict[tuple[int, int], torch.Tensor] = {}
        self._done: dict[tuple[int, int], int] = {}

    def reserve(self, widths: Mapping[int, int]) -> None:
        """Draw for layers of these widths."""
        for layer, width in widths.items():
            n = width * self._n_rows
            seeds = np.random.SeedSequence((*self._stream, layer))
            raw = np.random.SFC64(seeds).random_raw(-(-n // 8))
            drawn = raw.view(np.uint8)[:n].reshape(width, self._n_rows)
            self._bytes[layer] = torch.from_numpy(drawn)
        self._masks.clear()
        self._done.clear()

    def of(self, layer: int, width: int, dropped: int) -> torch.Tensor:
        """Return (width, rows): all bits 1 for a kept unit, all bits 0 for a dropped one."""
        key, drawn = (layer, dropped), self._bytes[layer]
        if key not in self._masks:
            self._masks[key] = torch.empty(drawn.shape, dtype=self._integer)
        mask, done = self._masks[key], self._done.get(key, 0)
        if done < width:
            part = mask[done:width].copy_(drawn[done:width])
            torch.sub(torch.tensor(dropped - 1, dtype=part.dtype), part, out=part)
            part.bitwise_right_shift_(8 * part.itemsize - 1)  # the sign in every bit
            self._done[key] = width
        return mask[:width]


class JointStep:
    """Members whose columns are of one kind; their first layers form one matrix."""

    def __init__(
        self, kind: Hashable, members: Mapping[int, tuple[Member, Net]], dtype: torch.dtype
    ) -> None:
        self.kind, self.members, self._dtype = kind, dict(members), dtype
        nets = [net for _, net in members.values()]
        self._rates = LossRates.of(
            [(member.label_smoothing, *member.class_weights) for member, _ in members.values()]
        )
        self._losses = np.zeros(len(nets))
        widths = [len(net.params[0]) for net in nets]
        edges = np.cumsum([0, *widths]).tolist()
        self._parts = [slice(a, b) for a, b in pairwise(edges)]
        self._first = _join([net.params for net in nets], self._parts)
        _join([net.means for net in nets], self._parts)
        _join([net.squares for net in nets], self._parts)
        self._average = _join([net.averages for net in nets], self._parts)
        self._low = self._first.to(dtype)  # itself, in float32
        self._low_gradient = torch.empty_like(self._low)
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._own = list(members.values())
        self._dropped = [_dropped(member) for member, _ in self._own]
        self._widths: dict[int, int] = {}
        for (member, _), dropped in zip(self._own, self._dropped, strict=True):
            for layer, width in enumerate(member.hidden if dropped else ()):
                self._widths[layer] = max(width, self._widths.get(layer, 0))
        further = sum(
            tensor.numel() for net in nets for tensor in net.params[1:] if tensor.ndim == 2
        )
        self.flop_forward = 2.0 * (self._first.numel() + further)
        self._flop_step = 2 * self.flop_forward + 2.0 * further

    def take_losses(self) -> list[tuple[int, float]]:
        """Return each member's summed loss since the last call."""
        taken = list(zip(self.members, self._losses.tolist(), strict=True))
        self._losses = np.zeros(len(taken))
        return taken

    def step(self, X: torch.Tensor, y: torch.Tensor, masks: Masks) -> float:
        """Train one batch, X (m, columns) and y (m,); return its floating-point operations."""
        masks.reserve(self._widths)
        Z, losses = self._first_layers(self._low, X), Losses(self._rates, y)
        gradients = [
            self._backward(k, Z[part], losses, masks) for k, part in enumerate(self._parts)
        ]
        self._losses += losses.sums()
        torch.mm(Z, X, out=self._low_gradient)
        self._update(gradients)
        return self._flop_step * len(y)

    def _update(self, further: Sequence[list[torch.Tensor]]) -> None:
        """Take AdamW's step member by member, while what was just copied is still in the cache."""
        for (member, net), part, own in zip(
            self.members.values(), self._parts, further, strict=True
        ):
            first = self._low_gradient[part]
            if self._dtype != torch.float32:
                wide = self._buffer("gradient", first.shape, torch.float32)
                first = wide.copy_(first)
            _take_step(member, net, [first, *own])
            if self._dtype != torch.float32:  # where it is the same memory
                self._low[part].copy_(net.params[0])
            share = (_DECAY + 1) / (net.steps[0].item() + _DECAY)  # 1 at the first step
            torch._foreach_lerp_(net.averages, net.params, share)

    def logits(self, batches: Iterable[torch.Tensor]) -> torch.Tensor:
        """Return the logits of each member's average without dropout, float32 (members, rows)."""
        first = self._average.to(self._dtype)
        return torch.cat([self._logits(first, X) for X in batches], dim=1)

    def _logits(self, first: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        Z = self._first_layers(first, X)
        rows = []
        for (member, net), part in zip(self.members.values(), self._parts, strict=True):
            z = Z[part]
            for layer, (weight, bias) in enumerate(_further(net.averages)):
                a = self._activate(member, layer, z)
                if len(weight) == 1:  # the logit alone: its digits decide ranks
                    exact = self._buffer("exact", a.shape, torch.float32).copy_(a)
                    z = torch.addmm(bias[:, None], weight, exact)
                else:
                    z = self._apply(layer, weight.to(a.dtype), bias, a)
            rows.append(z[0].float())
        return torch.stack(rows)

    def _first_layers(self, weights: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        return torch.mm(weights, X.t(), out=self._buffer("Z", (len(weights), len(X))))

    def _buffer(
        self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Return memory of this shape, reused by name: fresh memory costs more than a pass."""
        key, n = (name, dtype or self._dtype), math.prod(shape)
        if key not in self._buffers or self._buffers[key].numel() < n:
            self._buffers[key] = torch.empty(n, dtype=key[1])
        return self._buffers[key][:n].view(*shape)

    def _activate(self, member: Member, layer: int, z: torch.Tensor) -> torch.Tensor:
        activation = ACTIVATIONS[member.activation]
        out = z if activation.in_place else self._buffer(f"a{layer}", z.shape)
        return activation.forward(z, out)  # type: ignore[no-any-return]

    def _apply(
        self, layer: int, weight: torch.Tensor, bias: torch.Tensor, a: torch.Tensor
    ) -> torch.Tensor:
        out = self._buffer(f"z{layer}", (len(weight), a.shape[1]))
        return torch.addmm(bias.to(a.dtype)[:, None], weight, a, out=out)

    def _backward(
        self, k: int, z: torch.Tensor, losses: Losses, masks: Masks
    ) -> list[torch.Tensor]:
        """Overwrite z (width, m) with member k's gradient by z; return the further layers'."""
        member, net = self._own[k]
        dropped, further = self._dropped[k], _further(net.params)
        keep = 1 - dropped / _BYTE
        first, passed = z, []
        for layer, (weight, bias) in enumerate(further):
            a = self._activate(member, layer, z)
            if dropped:
                mask = masks.of(layer, len(a), dropped)
                a.view(mask.dtype).bitwise_and_(mask)
            scaled = (weight / keep).to(a.dtype)  # kept units make up for dropped ones
            passed.append((z, a, scaled))
            z = self._apply(layer, scaled, bias, a)
        dz = losses.gradient(k, z[0])[None]
        if not further:
            first.copy_(dz)
            return []
        dz = dz.to(first.dtype)
        gradients: list[torch.Tensor] = []
        for layer in reversed(range(len(further))):
            z, a, scaled = passed[layer]
            gradients[:0] = [
                torch.mm(dz, a.t()).float().div_(keep),
                dz.sum(1).float(),  # (a wider dtype for the sum would copy all of dz first)
            ]
            out = self._buffer(f"da{layer}", a.shape)
            da = torch.mm(scaled.t().contiguous(), dz, out=out)
            if dropped and member.activation != "relu":  # whose zeros pass nothing back anyway
                mask = masks.of(layer, len(a), dropped)
                da.view(mask.dtype).bitwise_and_(mask)
            dz = ACTIVATIONS[member.activation].backward(da, z, a)
        return gradients


def _take_step(member: Member, net: Net, gradients: list[torch.Tensor]) -> None:
    """Take AdamW's step as `torch.optim.AdamW(fused=True)` does, without its checks.

    These take longer than the step of a small perceptron.
    """
    torch._foreach_add_(net.steps, 1)
    torch._fused_adamw_(
        net.params,
        gradients,
        net.means,
        net.squares,
        [],
        net.steps,
        amsgrad=False,
        lr=member.lr,
        beta1=0.9,
        beta2=0.999,
        weight_decay=member.weight_decay,
        eps=1e-8,
        maximize=False,
    )


def _join(tensors: Sequence[list[torch.Tensor]], parts: Sequence[slice]) -> torch.Tensor:
    """Stack the first tensors of all lists; each list's first becomes a view of the stack."""
    joint = torch.cat([own[0] for own in tensors])
    for own, part in zip(tensors, parts, strict=True):
        own[0] = joint[part]
    return joint


def _dropped(member: Member) -> int:
    """Return how many of the 256 values of a random byte drop a unit; never all."""
    return min(round(member.dropout * _BYTE), _BYTE - 1)


def _further(params: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return weight (width, width before) and bias (width,) of the layers after the first."""
    return list(zip(params[1::2], params[2::2], strict=True))
