"""Multi-layer perceptrons that train together: the members of a cohort share every batch.

The first layers of all members are one matrix, so that each batch takes two large products, forward
and back; what follows is done member by member. The backward pass is written out: autograd would
keep and touch what is not needed. Members are otherwise strangers: each comes out as if it had been
trained alone, to the rounding of sums.

Activations are laid out unit by unit, (width, batch). Weights and AdamW's moments are float32; in
bfloat16 products, activations and gradients are rounded to it, as mixed precision has it.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch.nn import functional
from torch.optim.adamw import adamw

from medembed.heads.projection import Projection

__all__ = ["ACTIVATIONS", "PRECISIONS", "Cohort", "Member", "Net", "Rows", "resolve_precision"]

PRECISIONS = ("fp32", "bf16", "auto")

#: AMX and AVX-512 take the first layer's columns 32 at a time.
_COLUMNS = 32

#: Training rows of one kind that are kept mapped; of larger tables each batch is mapped anew.
_KEPT_BYTES = 1 << 30

#: Dropout is decided by random bytes, so that its share is a multiple of 1 / 256.
_BYTE = 256


def resolve_precision(precision: str) -> str:
    """Return "bf16" or "fp32"; "auto" is bf16 where the processor multiplies in it."""
    if precision != "auto":
        return precision
    ask = getattr(torch.cpu, "get_capabilities", dict)  # not in older releases
    found: Mapping[str, Any] = ask()
    return "bf16" if found.get("avx512_bf16") or found.get("amx_bf16") else "fp32"


#: Name to (forward, backward). Forward may write into its argument. Backward is handed the gradient
#: of the output, what was the input, and the output; it writes the input's gradient over the input.
ACTIVATIONS: dict[str, tuple[Any, Any]] = {
    "relu": (
        torch.relu_,
        lambda da, z, a: torch.ops.aten.threshold_backward.grad_input(da, a, 0.0, grad_input=z),
    ),
    "gelu": (
        functional.gelu,
        lambda da, z, a: torch.ops.aten.gelu_backward.grad_input(da, z, grad_input=z),
    ),
    "silu": (
        functional.silu,
        lambda da, z, a: torch.ops.aten.silu_backward.grad_input(da, z, grad_input=z),
    ),
    "tanh": (
        torch.tanh_,
        lambda da, z, a: torch.ops.aten.tanh_backward.grad_input(da, a, grad_input=z),
    ),
}


@dataclass(frozen=True)
class Member:
    """What one perceptron of a cohort has of its own; the ranges are `MLPHead`'s.

    Parameters
    ----------
    kind : hashable
        Which of the cohort's projections its columns go through.
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


@dataclass(frozen=True)
class Rows:
    """Rows of a table: X (all, d), the indices of n of them (None: all), their y (n,), 0 or 1."""

    X: np.ndarray
    index: np.ndarray | None
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.y)


@dataclass
class Net:
    """One member in training.

    Attributes
    ----------
    params, means, squares : lists of float32 tensors
        The first layer (width, columns), whose column after the data's is its bias and whose last
        columns are padding; then weight (width, width before) and bias (width,) of each further
        layer. AdamW's two moments have the same shapes.
    steps : list of float32 scalars
        AdamW's, one per tensor.
    epoch, best_epoch, best_key, best, best_logits
        Epochs done; the best of them, why, its parameters, and its logits on the validation rows.
    history : list of dict
        Per epoch `train_loss` and, with validation rows, `loss` and `auroc`.
    failure : str or None
        Why it does not go on.
    """

    params: list[torch.Tensor]
    means: list[torch.Tensor]
    squares: list[torch.Tensor]
    steps: list[torch.Tensor]
    epoch: int = 0
    best_epoch: int = 0
    best_key: tuple[float, ...] | None = None
    best: list[torch.Tensor] | None = None
    best_logits: np.ndarray | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    failure: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Give arrays of their own in place of tensors: views would take their whole base along."""
        state = dict(self.__dict__)
        if self.best is not None and self.best_epoch == self.epoch:
            state["best"] = None  # those are `params`
        for name in _TENSORS:
            if state[name] is not None:
                state[name] = [np.array(tensor.numpy()) for tensor in state[name]]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the arrays back, as copies: other processes may share them."""
        for name in _TENSORS:
            if state[name] is not None:
                state[name] = [torch.from_numpy(array.copy()) for array in state[name]]
        self.__dict__.update(state)
        if self.best is None and self.best_key is not None:
            self.best = [tensor.clone() for tensor in self.params]

    def layers(self, n_columns: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the best epoch's (or the last) weights (before, after) and biases (after,)."""
        first, *rest = self.best or self.params
        pairs = [(first[:, :n_columns], first[:, n_columns])]
        pairs += list(zip(rest[::2], rest[1::2], strict=True))
        return [
            (np.ascontiguousarray(weight.numpy().T), bias.numpy().copy()) for weight, bias in pairs
        ]


_TENSORS = ("params", "means", "squares", "steps", "best")


class Cohort:
    """Train members on the same rows, in the same order, batch by batch.

    Parameters
    ----------
    members : sequence of Member
    rows : Rows
        Training rows.
    projections : mapping of kind to Projection
        Of every member's kind.
    held : Rows, optional
        Validation rows, of other patients: they decide each member's best epoch, and when a member
        that has a patience stops.
    seed : int
        Decides the start, the order of rows and the dropout. Members of equal shape start alike and
        drop alike: what differs between them is then their parameters alone.
    batch_size : int
    bf16 : bool
    nets : sequence of Net, optional
        Where an earlier cohort of these members got to.
    """

    def __init__(
        self,
        members: Sequence[Member],
        rows: Rows,
        projections: Mapping[Hashable, Projection],
        *,
        held: Rows | None = None,
        seed: int,
        batch_size: int,
        bf16: bool,
        nets: Sequence[Net] | None = None,
    ) -> None:
        self._dtype = torch.bfloat16 if bf16 else torch.float32
        self._seed, self._batch_size = seed, batch_size
        self._y = torch.from_numpy(rows.y.astype(np.float32))
        self._held_y = None if held is None else torch.from_numpy(held.y.astype(np.float32))
        self._members = list(members)
        self.projections = [projections[member.kind] for member in members]
        self.nets = list(nets) if nets else [self._start(i) for i in range(len(members))]
        kinds = dict.fromkeys(member.kind for member in members)
        self._columns = {k: _Columns(rows, projections[k], self._dtype) for k in kinds}
        self._held = {
            k: _Columns(held, projections[k], self._dtype) for k in kinds if held is not None
        }
        self.flop = 0.0
        """Floating-point operations in matrix products so far."""

    def train(self, until: int) -> None:
        """Train every member that has not stopped up to epoch `until` of its own epochs."""
        with torch.inference_mode():
            groups: list[_Group] = []
            while going := self._going(until):
                if sorted(i for group in groups for i in group.members) != going:
                    groups = self._group(going)
                epoch = self.nets[going[0]].epoch + 1
                for i, loss in self._train_epoch(groups, epoch).items():
                    self._close_epoch(i, epoch, loss)
                for group in groups:
                    self._judge(group)

    def _going(self, until: int) -> list[int]:
        """List the members of the epoch that is furthest behind."""
        going = [
            i
            for i, (member, net) in enumerate(zip(self._members, self.nets, strict=True))
            if net.failure is None and net.epoch < min(until, member.epochs)
            if not _has_stopped(member, net)
        ]
        behind = min((self.nets[i].epoch for i in going), default=0)
        return [i for i in going if self.nets[i].epoch == behind]

    def _start(self, i: int) -> Net:
        """Return an untrained net, each weight and bias uniform within 1 / sqrt(columns in).

        That is how torch.nn.Linear starts. The column of ones makes the first layer's bias.
        """
        n_columns = self.projections[i].n_columns
        params: list[torch.Tensor] = []
        for k, (before, after) in enumerate(pairwise([n_columns, *self._members[i].hidden, 1])):
            generator = np.random.default_rng([self._seed, k])
            uniform = 2 * generator.random((after, before + 1), np.float32) - 1
            drawn = torch.from_numpy(uniform / np.float32(math.sqrt(before)))
            if k == 0:
                params.append(functional.pad(drawn, (0, _padded(n_columns) - before - 1)))
            else:
                params += [drawn[:, :before].contiguous(), drawn[:, before].contiguous()]
        means, squares = ([torch.zeros_like(tensor) for tensor in params] for _ in "ms")
        return Net(params, means, squares, [torch.zeros(()) for _ in params])

    def _group(self, going: Sequence[int]) -> list["_Group"]:
        by_kind: dict[Hashable, dict[int, tuple[Member, Net]]] = {}
        for i in going:
            by_kind.setdefault(self._members[i].kind, {})[i] = (self._members[i], self.nets[i])
        return [_Group(kind, those, self._dtype) for kind, those in by_kind.items()]

    def _train_epoch(self, groups: Sequence["_Group"], epoch: int) -> dict[int, float]:
        order = np.random.default_rng([self._seed, _EPOCHS, epoch]).permutation(len(self._y))
        for step, start in enumerate(range(0, len(order), self._batch_size)):
            batch = torch.from_numpy(order[start : start + self._batch_size])
            masks = _Masks((self._seed, _DROPOUT, epoch, step), len(batch), self._dtype)
            y = self._y[batch]
            for group in groups:
                self.flop += group.step(self._columns[group.kind].take(batch), y, masks)
        return {i: loss / len(order) for group in groups for i, loss in group.take_losses()}

    def _close_epoch(self, i: int, epoch: int, loss: float) -> None:
        net = self.nets[i]
        net.epoch = epoch
        net.history.append({"train_loss": loss})
        if not math.isfinite(loss):
            net.failure = (
                f"the loss of MLPHead with lr={self._members[i].lr} is no longer a finite number; "
                "lower lr"
            )

    def _judge(self, group: "_Group") -> None:
        """Compare this epoch of each member with its best one on the held-out rows."""
        if self._held_y is None:
            return
        held = self._held[group.kind]
        parts = []
        for start in range(0, len(self._held_y), self._batch_size):
            batch = torch.arange(start, min(start + self._batch_size, len(self._held_y)))
            parts.append(group.logits(held.take(batch)))
        self.flop += group.flop_forward * len(self._held_y)
        logits = torch.cat(parts, dim=1)
        aurocs = _aurocs(self._held_y.numpy(), logits.numpy())
        for (i, (member, _)), own, auroc in zip(group.members.items(), logits, aurocs, strict=True):
            weights = _row_weights(self._held_y, member)
            loss = float(functional.binary_cross_entropy_with_logits(own, self._held_y, weights))
            self._keep_best(i, loss, float(auroc), own.numpy())

    def _keep_best(self, i: int, loss: float, auroc: float, logits: np.ndarray) -> None:
        net = self.nets[i]
        if net.failure is not None:
            return
        if not math.isfinite(loss):
            net.failure = "the validation loss of MLPHead is not a finite number; lower lr"
            return
        net.history[-1] |= {"loss": loss, "auroc": auroc}
        member = self._members[i]
        if member.patience is None:  # the last epoch counts, whatever the validation rows say
            net.best_logits = logits.copy()
            return
        key = (auroc, -loss) if member.stopping == "auroc" else (-loss,)
        if net.best_key is None or key > net.best_key:
            net.best_key, net.best_epoch = key, net.epoch
            net.best = [tensor.clone() for tensor in net.params]
            net.best_logits = logits.copy()


#: What random streams are for; the start of layer k has the stream of k.
_EPOCHS, _DROPOUT = 1 << 20, 1 << 21


def _has_stopped(member: Member, net: Net) -> bool:
    if member.patience is None or net.best_key is None:
        return False
    return net.epoch - net.best_epoch >= member.patience


def _padded(n_columns: int) -> int:
    """Columns of the first layer: the data's, a column of ones, and padding."""
    return -(-(n_columns + 1) // _COLUMNS) * _COLUMNS


class _Columns:
    """Rows as the first layers take them: (m, columns) with a column of ones, zeros after it."""

    def __init__(self, rows: Rows, projection: Projection, dtype: torch.dtype) -> None:
        self._rows, self._projection, self._dtype = rows, projection, dtype
        width = _padded(projection.n_columns)
        self._kept: torch.Tensor | None = None
        if len(rows) * width * dtype.itemsize <= _KEPT_BYTES:
            self._kept = torch.zeros(len(rows), width, dtype=dtype)
            start = 0
            for block in projection.blocks(rows.X, np.float32, rows.index):
                self._fill(self._kept[start : start + len(block)], block)
                start += len(block)

    def take(self, batch: torch.Tensor) -> torch.Tensor:
        if self._kept is not None:
            return self._kept.index_select(0, batch)
        index = batch.numpy() if self._rows.index is None else self._rows.index[batch.numpy()]
        mapped = self._projection.apply(self._rows.X, np.float32, index)
        taken = torch.zeros(len(batch), _padded(mapped.shape[1]), dtype=self._dtype)
        self._fill(taken, mapped)
        return taken

    @staticmethod
    def _fill(target: torch.Tensor, block: np.ndarray) -> None:
        target[:, : block.shape[1]] = torch.from_numpy(block)
        target[:, block.shape[1]] = 1


class _Masks:
    """Which hidden units stay in one step: the same for all members that drop an equal share.

    Unit j of layer k has the same random bytes in every member, whatever its width and company.
    """

    def __init__(self, stream: tuple[int, ...], n_rows: int, dtype: torch.dtype) -> None:
        self._stream, self._n_rows = stream, n_rows
        self._integer = np.int16 if dtype == torch.bfloat16 else np.int32
        self._bytes: dict[int, np.ndarray] = {}
        self._masks: dict[tuple[int, int], torch.Tensor] = {}

    def reserve(self, widths: Mapping[int, int]) -> None:
        """Draw for layers of these widths."""
        for layer, width in widths.items():
            n = width * self._n_rows
            seeds = np.random.SeedSequence((*self._stream, layer))
            raw = np.random.SFC64(seeds).random_raw(-(-n // 8))
            self._bytes[layer] = raw.view(np.uint8)[:n].reshape(width, self._n_rows)
        self._masks.clear()

    def of(self, layer: int, width: int, dropped: int) -> torch.Tensor:
        """Return all ones in a kept unit's bits, all zeros in a dropped one's, (width, rows)."""
        if (layer, dropped) not in self._masks:
            kept = (self._bytes[layer] >= dropped).view(np.int8)
            mask = np.negative(kept).astype(self._integer)
            self._masks[layer, dropped] = torch.from_numpy(mask)
        return self._masks[layer, dropped][:width]


class _Group:
    """Members of one kind of columns for one epoch; their first layers are one matrix."""

    def __init__(
        self, kind: Hashable, members: Mapping[int, tuple[Member, Net]], dtype: torch.dtype
    ) -> None:
        self.kind, self.members, self._dtype = kind, dict(members), dtype
        nets = [net for _, net in members.values()]
        self._losses = dict.fromkeys(members, 0.0)
        widths = [len(net.params[0]) for net in nets]
        edges = np.cumsum([0, *widths]).tolist()
        self._parts = [slice(a, b) for a, b in pairwise(edges)]
        self._first = _join([net.params for net in nets], self._parts)
        _join([net.means for net in nets], self._parts)
        _join([net.squares for net in nets], self._parts)
        self._low = torch.empty_like(self._first, dtype=dtype)
        self._gradient = torch.empty_like(self._first)
        self._low_gradient = torch.empty_like(self._low)
        self._outputs = torch.empty(0, dtype=dtype)
        self._dirty = True
        self._dropped = {i: round(member.dropout * _BYTE) for i, (member, _) in members.items()}
        self._widths: dict[int, int] = {}
        for i, (member, _) in members.items():
            for layer, width in enumerate(member.hidden if self._dropped[i] else ()):
                self._widths[layer] = max(width, self._widths.get(layer, 0))
        further = sum(
            tensor.numel() for net in nets for tensor in net.params[1:] if tensor.ndim == 2
        )
        self.flop_forward = 2.0 * (self._first.numel() + further)
        self._flop_step = 2 * self.flop_forward + 2.0 * further

    def take_losses(self) -> list[tuple[int, float]]:
        """Return each member's sum of losses since the last call."""
        taken = list(self._losses.items())
        self._losses = dict.fromkeys(self._losses, 0.0)
        return taken

    def step(self, X: torch.Tensor, y: torch.Tensor, masks: _Masks) -> float:
        """Train one batch, X (m, columns) and y (m,); return its floating-point operations."""
        masks.reserve(self._widths)
        Z = self._first_layers(X)
        gradients = [
            self._backward(i, Z[part], y, masks)
            for i, part in zip(self.members, self._parts, strict=True)
        ]
        self._gradient.copy_(torch.mm(Z, X, out=self._low_gradient))
        for (member, net), part, own in zip(
            self.members.values(), self._parts, gradients, strict=True
        ):
            adamw(
                net.params,
                [self._gradient[part], *own],
                net.means,
                net.squares,
                [],
                net.steps,
                fused=True,
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=member.lr,
                weight_decay=member.weight_decay,
                eps=1e-8,
                maximize=False,
            )
        self._dirty = True
        return self._flop_step * len(y)

    def logits(self, X: torch.Tensor) -> torch.Tensor:
        """Return each member's logits without dropout, float32 of shape (members, m)."""
        Z = self._first_layers(X)
        rows = []
        for (member, net), part in zip(self.members.values(), self._parts, strict=True):
            z = Z[part]
            for weight, bias in _further(net):
                a = ACTIVATIONS[member.activation][0](z)
                if len(weight) == 1:  # the logit alone: its digits decide ranks
                    z = torch.addmm(bias[:, None], weight, a.float())
                else:
                    z = torch.addmm(bias.to(a.dtype)[:, None], weight.to(a.dtype), a)
            rows.append(z[0].float())
        return torch.stack(rows)

    def _first_layers(self, X: torch.Tensor) -> torch.Tensor:
        if self._dirty:
            self._low.copy_(self._first)
            self._dirty = False
        if self._outputs.numel() < len(self._low) * len(X):
            self._outputs = torch.empty(len(self._low) * len(X), dtype=self._dtype)
        # fresh memory for every batch would cost more than a pass over it
        Z = self._outputs[: len(self._low) * len(X)].view(len(self._low), len(X))
        return torch.mm(self._low, X.t(), out=Z)

    def _backward(
        self, i: int, z: torch.Tensor, y: torch.Tensor, masks: _Masks
    ) -> list[torch.Tensor]:
        """Write the loss's gradient by z (width, m) over z; return those of the further layers."""
        member, net = self.members[i]
        dropped, further = self._dropped[i], _further(net)
        keep = 1 - dropped / _BYTE
        forward, backward = ACTIVATIONS[member.activation]
        first, passed = z, []
        for layer, (weight, bias) in enumerate(further):
            a = forward(z)
            if dropped:
                mask = masks.of(layer, len(a), dropped)
                a.view(mask.dtype).bitwise_and_(mask)
            scaled = (weight / keep).to(a.dtype)  # what is kept counts for what is dropped
            passed.append((z, a, scaled))
            z = torch.addmm(bias.to(a.dtype)[:, None], scaled, a)
        dz = self._loss_gradient(i, z[0].float(), y)[None]
        if not further:
            first.copy_(dz)
            return []
        dz = dz.to(first.dtype)
        gradients: list[torch.Tensor] = []
        for layer in reversed(range(len(further))):
            z, a, scaled = passed[layer]
            gradients[:0] = [
                torch.mm(dz, a.t()).float().div_(keep),
                dz.sum(1, dtype=torch.float32),
            ]
            da = torch.mm(scaled.t().contiguous(), dz)
            if dropped:
                mask = masks.of(layer, len(a), dropped)
                da.view(mask.dtype).bitwise_and_(mask)
            dz = backward(da, z, a)
        return gradients

    def _loss_gradient(self, i: int, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Add to the loss; return its mean's gradient by the logits, float32 of shape (m,)."""
        member, _ = self.members[i]
        smoothing = member.label_smoothing
        targets = y * (1 - smoothing) + smoothing / 2
        weights = _row_weights(y, member)
        loss = functional.binary_cross_entropy_with_logits(
            logits, targets, weights, reduction="sum"
        )
        self._losses[i] += float(loss)
        return (torch.sigmoid(logits) - targets) * weights / len(y)


def _join(tensors: Sequence[list[torch.Tensor]], parts: Sequence[slice]) -> torch.Tensor:
    """Put the first tensor of each list under one another; each list's becomes a view of that."""
    joint = torch.cat([own[0] for own in tensors])
    for own, part in zip(tensors, parts, strict=True):
        own[0] = joint[part]
    return joint


def _further(net: Net) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return weight (width, width before) and bias (width,) of the layers after the first."""
    return list(zip(net.params[1::2], net.params[2::2], strict=True))


def _row_weights(y: torch.Tensor, member: Member) -> torch.Tensor:
    normal, abnormal = member.class_weights
    return y * (abnormal - normal) + normal


def _aurocs(y: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the AUROC of each row of scores (k, n) for labels y (n,), ties at one half."""
    ranks = rankdata(scores, axis=1)
    n_abnormal = y.sum()
    wins = ranks[:, y == 1].sum(axis=1) - n_abnormal * (n_abnormal + 1) / 2
    return np.asarray(wins / (n_abnormal * (len(y) - n_abnormal)))
