"""Perceptrons that train together: the members of a cohort share every batch of a fold.

Members are otherwise independent: up to the rounding of sums, the result for each is that of
training it alone. `mlp_network` describes how one batch is trained.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy.stats import rankdata
from torch.nn import functional

from medembed.heads.mlp_network import JointStep, Masks, Member, Net, row_weights_of
from medembed.heads.scaling import Projection

__all__ = ["BatchedMLP", "Rows"]

#: AMX and AVX-512 take the first layer's columns 32 at a time.
_COLUMNS = 32

#: Rows of an epoch at most, but one batch. Training is judged, and stops, by epochs: if each were a
#: pass over a large table, most of the time would go into steps past the best one.
EPOCH_ROWS = 8192

#: Validation rows that are judged at once.
JUDGED_ROWS = 1024

#: Training rows of one kind that are kept mapped; larger tables are mapped again for each batch.
_KEPT_BYTES = 1 << 30


@dataclass(frozen=True)
class Rows:
    """Rows of a table: X (all, d), the indices of n of them (None: all), their y (n,), 0 or 1."""

    X: np.ndarray
    index: np.ndarray | None
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.y)


class BatchedMLP:
    """Train members on the same rows, in the same order, batch by batch.

    Parameters
    ----------
    members : sequence of Member
    rows : Rows
        Training rows.
    projections : mapping of kind to Projection
        The projection of every member's kind.
    held : Rows, optional
        Validation rows, of other patients: they decide each member's best epoch, and when a member
        with a patience stops.
    seed : int
        Determines the initial weights, the order of rows and the dropout. Members of equal shape
        start with equal weights and drop equal units, so that only their parameters differ.
    batch_size : int
        Rows per step, or all if there are fewer.
    bf16 : bool
    nets : sequence of Net, optional
        The state that an earlier cohort of these members reached.
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
        self._seed = seed
        # all batches are of one size: a smaller one would take a step as long and noisier, and an
        # odd number of rows is multiplied at two thirds of the speed
        self._batch_size = min(batch_size, len(rows))
        self._n_steps = max(1, min(-(-len(rows) // batch_size), EPOCH_ROWS // batch_size))
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
            groups: list[JointStep] = []
            while going := self._going(until):
                if sorted(i for group in groups for i in group.members) != going:
                    groups = self._group(going)
                epoch = self.nets[going[0]].epoch + 1
                for i, loss in self._train_epoch(groups, epoch).items():
                    self._close_epoch(i, epoch, loss)
                for group in groups:
                    self._judge(group)

    def _going(self, until: int) -> list[int]:
        """Return the members that are furthest behind: those at the lowest epoch."""
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

        torch.nn.Linear is initialised so too. The column of ones makes the first layer's bias.
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
        averages = [tensor.clone() for tensor in params]
        return Net(params, means, squares, averages, [torch.zeros(()) for _ in params])

    def _group(self, going: Sequence[int]) -> list["JointStep"]:
        by_kind: dict[Hashable, dict[int, tuple[Member, Net]]] = {}
        for i in going:
            by_kind.setdefault(self._members[i].kind, {})[i] = (self._members[i], self.nets[i])
        return [JointStep(kind, those, self._dtype) for kind, those in by_kind.items()]

    def _train_epoch(self, groups: Sequence["JointStep"], epoch: int) -> dict[int, float]:
        order = self._order(epoch)
        for step, rows in enumerate(order):
            batch = torch.from_numpy(rows)
            masks = Masks((self._seed, _DROPOUT, epoch, step), len(batch), self._dtype)
            y = self._y[batch]
            for group in groups:
                self.flop += group.step(self._columns[group.kind].take(batch), y, masks)
        return {i: loss / order.size for group in groups for i, loss in group.take_losses()}

    def _order(self, epoch: int) -> np.ndarray:
        """Return the rows of an epoch's batches (steps, rows): the next of pass after pass."""
        n = len(self._y)
        start = (epoch - 1) * self._n_steps * self._batch_size
        end = start + self._n_steps * self._batch_size
        passes = [
            np.random.default_rng([self._seed, _EPOCHS, number + 1]).permutation(n)
            for number in range(start // n, -(-end // n))
        ]
        first = start // n * n
        return np.concatenate(passes)[start - first : end - first].reshape(self._n_steps, -1)

    def _close_epoch(self, i: int, epoch: int, loss: float) -> None:
        net = self.nets[i]
        net.epoch = epoch
        net.history.append({"train_loss": loss})
        if not math.isfinite(loss):
            net.failure = (
                f"the loss of MLPHead with lr={self._members[i].lr} is no longer a finite number; "
                "lower lr"
            )

    def _judge(self, group: "JointStep") -> None:
        """Compare each member's current epoch with its best so far on the held-out rows."""
        if self._held_y is None:
            return
        held = self._held[group.kind]
        starts = range(0, len(self._held_y), JUDGED_ROWS)
        logits = group.logits(held.slice(start, start + JUDGED_ROWS) for start in starts)
        self.flop += group.flop_forward * len(self._held_y)
        aurocs = _aurocs(self._held_y.numpy(), logits.numpy())
        for (i, (member, _)), own, auroc in zip(group.members.items(), logits, aurocs, strict=True):
            weights = row_weights_of(self._held_y, member.class_weights)
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
            net.best = [tensor.clone() for tensor in net.averages]
            net.best_logits = logits.copy()


#: The purposes of random streams; layer k is initialised from stream k.
_EPOCHS, _DROPOUT = 1 << 20, 1 << 21


def _has_stopped(member: Member, net: Net) -> bool:
    if member.patience is None or net.best_key is None:
        return False
    return net.epoch - net.best_epoch >= member.patience


def _padded(n_columns: int) -> int:
    """Return the columns of the first layer: the data's, a column of ones, and padding."""
    return -(-(n_columns + 1) // _COLUMNS) * _COLUMNS


class _Columns:
    """Rows as input of the first layers: (m, columns), then a column of ones, then zeros."""

    def __init__(self, rows: Rows, projection: Projection, dtype: torch.dtype) -> None:
        self._rows, self._projection, self._dtype = rows, projection, dtype
        width = _padded(projection.n_columns)
        self._kept: torch.Tensor | None = None
        self._taken: torch.Tensor | None = None
        if len(rows) * width * dtype.itemsize <= _KEPT_BYTES:
            self._kept = torch.zeros(len(rows), width, dtype=dtype)
            start = 0
            for block in projection.blocks(rows.X, np.float32, rows.index):
                self._fill(self._kept[start : start + len(block)], block)
                start += len(block)

    def slice(self, start: int, end: int) -> torch.Tensor:
        end = min(end, len(self._rows))
        return self.take(torch.arange(start, end)) if self._kept is None else self._kept[start:end]

    def take(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the rows of a batch, in memory that the next call reuses."""
        if self._kept is not None:
            if self._taken is None or len(self._taken) < len(batch):
                self._taken = torch.empty(len(batch), self._kept.shape[1], dtype=self._dtype)
            return torch.index_select(self._kept, 0, batch, out=self._taken[: len(batch)])
        index = batch.numpy() if self._rows.index is None else self._rows.index[batch.numpy()]
        mapped = self._projection.apply(self._rows.X, np.float32, index)
        taken = torch.zeros(len(batch), _padded(mapped.shape[1]), dtype=self._dtype)
        self._fill(taken, mapped)
        return taken

    @staticmethod
    def _fill(target: torch.Tensor, block: np.ndarray) -> None:
        target[:, : block.shape[1]] = torch.from_numpy(block)
        target[:, block.shape[1]] = 1


def _aurocs(y: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the AUROC of each row of scores (k, n) for labels y (n,), ties at one half."""
    ranks = rankdata(scores, axis=1)
    n_abnormal = int(y.sum())
    wins = ranks[:, y == 1].sum(axis=1) - n_abnormal * (n_abnormal + 1) / 2
    return np.asarray(wins / (n_abnormal * (len(y) - n_abnormal)))
