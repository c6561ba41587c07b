"""A sweep's perceptrons as one would write them in torch: one by one, or batched by `torch.func`.

`train_one` trains one configuration by autograd and `torch.optim.AdamW`. `train_together` trains
configurations of equal widths as one module: `torch.func.stack_module_state` and `vmap`, every
member with its own activation, dropout, loss and AdamW. Both take parameters of `MLPHead`, batches
of a sixteenth of the rows, and stop like it: after `patience` epochs without a better AUROC on the
validation rows.
Without validation rows they train `epochs` epochs. Products are float32.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.nn import functional

__all__ = [
    "OutOfTimeError",
    "Perceptron",
    "Rows",
    "Trained",
    "auroc",
    "train_one",
    "train_together",
    "warm_up",
]

EPOCHS, PATIENCE = 60, 8


class OutOfTimeError(Exception):
    """The budget of time has passed."""


@dataclass(frozen=True)
class Rows:
    """Scaled rows for training and, if any, for validation."""

    X: torch.Tensor
    y: torch.Tensor
    X_val: torch.Tensor | None
    y_val: np.ndarray | None

    @classmethod
    def of(
        cls, X: np.ndarray, y: np.ndarray, train: np.ndarray, held: np.ndarray | None = None
    ) -> "Rows":
        """Take the rows `train` of X (n, d) and y, scaled to deviation 1, and `held` likewise."""
        scaled = cls.scale(X, train, X[train])
        labels = torch.from_numpy(y[train].astype(np.float32))
        if held is None:
            return cls(scaled, labels, None, None)
        return cls(scaled, labels, cls.scale(X, train, X[held]), y[held])

    @staticmethod
    def scale(X: np.ndarray, train: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        """Return other rows, scaled as the rows `train` of X are to deviation 1."""
        mean, scale = X[train].mean(axis=0), X[train].std(axis=0)
        scale[scale == 0] = 1
        return torch.from_numpy((rows - mean) / scale)

    def batches(self, generator: torch.Generator) -> Sequence[torch.Tensor]:
        """Return shuffled rows in equal batches of at most a sixteenth, from 32 to 2,048."""
        size = min(2048, max(32, -(-len(self.y) // 16)))
        return torch.randperm(len(self.y), generator=generator).chunk(-(-len(self.y) // size))


@dataclass
class Trained:
    """A perceptron's best epoch, counted from 1, and its AUROC on the validation rows there.

    `model` has the weights of the last epoch; None for members of a batch.
    """

    best_epoch: int
    auroc: float
    model: torch.nn.Module | None = None


class Perceptron(torch.nn.Sequential):
    """Hidden layers with an activation and dropout, and `n_outputs` logits."""

    def __init__(
        self, n_columns: int, params: Mapping[str, Any], activation: Any = None, n_outputs: int = 1
    ) -> None:
        layers: list[torch.nn.Module] = []
        for before, after in pairwise([n_columns, *params["hidden"]]):
            act = activation or ACTIVATIONS[params["activation"]]
            layers += [torch.nn.Linear(before, after), act(), torch.nn.Dropout(params["dropout"])]
        last = [n_columns, *params["hidden"]][-1]
        super().__init__(*layers, torch.nn.Linear(last, n_outputs))


ACTIVATIONS = {
    "relu": torch.nn.ReLU,
    "gelu": torch.nn.GELU,
    "silu": torch.nn.SiLU,
    "tanh": torch.nn.Tanh,
}


def auroc(y: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the AUROC of scores (…, n) for labels y (n,), 0 or 1; ties count one half."""
    ranks, n_abnormal = rankdata(scores, axis=-1), int((y == 1).sum())
    wins = ranks[..., y == 1].sum(axis=-1) - n_abnormal * (n_abnormal + 1) / 2
    return np.asarray(wins / (n_abnormal * (len(y) - n_abnormal)))


def class_weights(params: Mapping[str, Any], y: torch.Tensor) -> tuple[float, float]:
    """Return the weights of a normal and an abnormal row in the loss."""
    if params["class_weight"] is None:
        return 1.0, 1.0
    share = float(y.mean())
    return 0.5 / (1 - share), 0.5 / share


def train_one(
    params: Mapping[str, Any],
    rows: Rows,
    *,
    epochs: int = EPOCHS,
    patience: int = PATIENCE,
    seed: int = 0,
    until: float = np.inf,
) -> Trained:
    """Train one configuration; raise OutOfTimeError where `time.perf_counter()` exceeds `until`."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Perceptron(rows.X.shape[1], params)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=params["lr"], weight_decay=params["weight_decay"], fused=True
    )
    normal, abnormal = class_weights(params, rows.y)
    smoothing, best = params["label_smoothing"], Trained(0, -np.inf)
    for epoch in range(1, epochs + 1):
        model.train()
        for batch in rows.batches(generator):
            y = rows.y[batch]
            loss = functional.binary_cross_entropy_with_logits(
                model(rows.X[batch])[:, 0],
                y * (1 - smoothing) + smoothing / 2,
                y * (abnormal - normal) + normal,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if time.perf_counter() > until:
            raise OutOfTimeError
        if rows.X_val is not None and rows.y_val is not None:
            value = float(auroc(rows.y_val, predict(model, rows.X_val)))
            if value > best.auroc:
                best = Trained(epoch, value)
            elif epoch - best.best_epoch >= patience:
                break
    if rows.X_val is None:
        best = Trained(epochs, np.nan)
    best.model = model
    return best


@torch.inference_mode()
def predict(model: torch.nn.Module, X: torch.Tensor) -> np.ndarray:
    """Return the logits of rows, (n,)."""
    return np.asarray(model.eval()(X)[:, 0])


def warm_up(params: Mapping[str, Any]) -> None:
    """Train both ways on a few made-up rows: what torch imports at the first call is not timed."""
    rows = Rows.of(np.eye(64, 4, dtype=np.float32), np.arange(64) % 2, np.arange(64))
    train_one(params, rows, epochs=1)
    train_together([params, params], rows, epochs=1)


class _Member(torch.nn.Module):
    """A perceptron whose activation and dropout are arguments, so that members may differ."""

    def __init__(self, n_columns: int, hidden: Sequence[int]) -> None:
        super().__init__()
        widths = [n_columns, *hidden, 1]
        self.layers = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(
        self, X: torch.Tensor, is_silu: torch.Tensor, keep: torch.Tensor, drops: bool
    ) -> torch.Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            z = layer(X)
            X = torch.where(is_silu, functional.silu(z), functional.relu(z))
            if drops:
                X = X * (torch.rand_like(X) < keep) / keep
        return last(X)[:, 0]  # type: ignore[no-any-return]


def train_together(
    members: Sequence[Mapping[str, Any]],
    rows: Rows,
    *,
    epochs: int = EPOCHS,
    patience: int = PATIENCE,
    seed: int = 0,
    until: float = np.inf,
) -> list[Trained]:
    """Train configurations of equal widths, activations "relu" or "silu", as one module.

    Members that have stopped leave the batch. OutOfTimeError as in `train_one`.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    batch_of = _Batch(members, rows)
    best = [Trained(epochs if rows.X_val is None else 0, -np.inf) for _ in members]
    for epoch in range(1, epochs + 1):
        for batch in rows.batches(generator):
            batch_of.step(rows.X[batch], rows.y[batch])
        if time.perf_counter() > until:
            raise OutOfTimeError
        if rows.X_val is None or rows.y_val is None:
            continue
        values = auroc(rows.y_val, batch_of.logits(rows.X_val))
        for i, value in zip(batch_of.going, values.tolist(), strict=True):
            if value > best[i].auroc:
                best[i] = Trained(epoch, value)
        going = batch_of.going
        batch_of.keep([k for k, i in enumerate(going) if epoch - best[i].best_epoch < patience])
        if not batch_of.going:
            break
    return best


class _Batch:
    """The members that are still in training, stacked."""

    def __init__(self, members: Sequence[Mapping[str, Any]], rows: Rows) -> None:
        self.going = list(range(len(members)))
        n_columns, hidden = rows.X.shape[1], members[0]["hidden"]
        assert all(list(own["hidden"]) == list(hidden) for own in members), members
        assert all(own["activation"] in ("relu", "silu") for own in members), members
        models = [_Member(n_columns, hidden) for _ in members]
        stacked, _ = stack_module_state(models)  # type: ignore[arg-type]
        self._params = {name: tensor.detach() for name, tensor in stacked.items()}
        weights = [class_weights(own, rows.y) for own in members]
        self._own = {
            "is_silu": torch.tensor([own["activation"] == "silu" for own in members]),
            "keep": torch.tensor([1 - own["dropout"] for own in members]),
            "smoothing": torch.tensor([own["label_smoothing"] for own in members]),
            "normal": torch.tensor([normal for normal, _ in weights]),
            "abnormal": torch.tensor([abnormal for _, abnormal in weights]),
        }
        self._rates = [(own["lr"], own["weight_decay"]) for own in members]
        self._optimizer = self._optimize()
        self._drops = bool(hidden) and any(own["dropout"] for own in members)
        base = _Member(n_columns, hidden).to("meta")

        def loss_of(
            params: Any, own: Mapping[str, torch.Tensor], X: torch.Tensor, y: torch.Tensor
        ) -> torch.Tensor:
            inputs = (X, own["is_silu"], own["keep"], self._drops)
            targets = y * (1 - own["smoothing"]) + own["smoothing"] / 2
            row_weights = y * (own["abnormal"] - own["normal"]) + own["normal"]
            logits = functional_call(base, params, inputs)
            return functional.binary_cross_entropy_with_logits(logits, targets, row_weights)

        def logits_of(
            params: Any, own: Mapping[str, torch.Tensor], X: torch.Tensor
        ) -> torch.Tensor:
            inputs = (X, own["is_silu"], own["keep"], False)
            return functional_call(base, params, inputs)  # type: ignore[no-any-return]

        self._gradient = vmap(
            grad_and_value(loss_of), in_dims=(0, 0, None, None), randomness="different"
        )
        self._forward = vmap(logits_of, in_dims=(0, 0, None))

    def step(self, X: torch.Tensor, y: torch.Tensor) -> None:
        """Take AdamW's step of all members on one batch."""
        gradients, _ = self._gradient(self._params, self._own, X, y)
        for k, group in enumerate(self._optimizer.param_groups):
            for view, name in zip(group["params"], self._params, strict=True):
                view.grad = gradients[name][k]
        self._optimizer.step()

    @torch.inference_mode()
    def logits(self, X: torch.Tensor) -> np.ndarray:
        """Return the members' logits, (members, n)."""
        return np.asarray(self._forward(self._params, self._own, X))

    def keep(self, places: Sequence[int]) -> None:
        """Drop all members but those at `places`."""
        if len(places) == len(self.going):
            return
        if not places:
            self.going = []
            return
        self.going = [self.going[k] for k in places]
        index = torch.tensor(places, dtype=torch.int64)
        for stacked in (self._params, self._own):
            for name in stacked:
                stacked[name] = stacked[name][index].clone()
        before = self._optimizer
        self._optimizer = self._optimize()
        for k, group in zip(places, self._optimizer.param_groups, strict=True):
            old = before.param_groups[k]["params"]
            for view, known in zip(group["params"], old, strict=True):
                self._optimizer.state[view] = before.state[known]

    def _optimize(self) -> torch.optim.AdamW:
        """Return an AdamW that works on views of the stacked weights, a group per member."""
        groups = [
            {
                "params": [tensor[k] for tensor in self._params.values()],
                "lr": self._rates[i][0],
                "weight_decay": self._rates[i][1],
            }
            for k, i in enumerate(self.going)
        ]
        return torch.optim.AdamW(groups, fused=True)
