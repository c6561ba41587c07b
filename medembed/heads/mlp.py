"""A multi-layer perceptron, trained by torch and applied by numpy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from scipy.special import expit
from sklearn.metrics import roc_auc_score
from sklearn.utils import check_random_state
from torch.nn import functional

from medembed.errors import TrainingDataError
from medembed.heads.base import (
    ClassWeight,
    Head,
    arrays_of,
    column_scaling,
    row_weights,
    standardised_blocks,
)

__all__ = ["MLPHead"]

_Layers = list[tuple[torch.Tensor, torch.Tensor]]


class MLPHead(Head):
    """ReLU layers and one logit on standardised columns; AdamW; early stopping on handed rows.

    Parameters
    ----------
    hidden : sequence of int
        Widths of the hidden layers; empty for none.
    dropout : float in [0, 1)
        Share of hidden units dropped in training.
    lr, weight_decay : float
        AdamW's (Loshchilov and Hutter, ICLR 2019).
    epochs : int
        Epochs at most; exactly, where no validation rows are handed over.
    batch_size : int or None
        Rows per step; every epoch has its own order. None: a twentieth of the rows, between 32 and
        256, so that a few hundred rows still make enough steps.
    patience : int or None
        Stop after this many epochs without a better one. With None validation rows are ignored and
        all epochs are trained.
    stopping : "auroc" or "loss"
        What makes an epoch better on the validation rows; equal AUROC is decided by the loss.
    class_weight : "balanced", dict or None
        As scikit-learn's; weighs the loss.
    random_state : int, RandomState or None
        Decides the start, the order of rows and the dropout. torch's and (unless None) numpy's
        global generators are left alone. Equal results want an equal number of threads too.

    Attributes
    ----------
    weights_ : list of float32 arrays (columns in, columns out)
    biases_ : list of float32 arrays (columns out,)
    mean_, scale_ : float64 arrays of shape (d,)
    best_epoch_ : int
        Epochs behind the weights kept, from 1.
    history_ : list of dict
        Per epoch `train_loss` and, with validation rows, `loss` and `auroc`.
    """

    def __init__(
        self,
        hidden: Sequence[int] = (256,),
        *,
        dropout: float = 0.3,
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        epochs: int = 60,
        batch_size: int | None = None,
        patience: int | None = 8,
        stopping: str = "auroc",
        class_weight: ClassWeight = "balanced",
        random_state: Any = 0,
    ) -> None:
        self.hidden = hidden
        self.dropout = dropout
        self.lr = lr
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.batch_size = batch_size
        self.patience = patience
        self.stopping = stopping
        self.class_weight = class_weight
        self.random_state = random_state

    def with_budget(self, n: int) -> Self:
        """Return an unfitted copy that trains exactly `n` epochs."""
        return super().with_budget(n).set_params(epochs=n, patience=None)  # type: ignore[no-any-return]

    def fit(self, X: Any, y: Any, *, X_val: Any = None, y_val: Any = None) -> Self:
        """Fit on X of shape (n, d), finite, and y of two classes.

        Parameters
        ----------
        X, y
            Training rows; scaling and class weights come from these alone.
        X_val, y_val : optional
            Rows of other patients that decide when to stop; the best epoch's weights are kept.

        Raises
        ------
        TrainingDataError
            y, or y_val where given, does not hold both of two classes, a parameter is out of
            range, or the loss stops being a finite number.
        """
        X, codes = self._check_training(X, y)
        validation = self._check_validation(X_val, y_val)
        self._check_parameters()
        self.mean_, self.scale_ = column_scaling(X)
        weights = row_weights(codes, self.classes_, self.class_weight).astype(np.float32)
        rows = _Rows(X, codes.astype(np.float32), weights, self.mean_, self.scale_)
        judge = None
        if validation is not None and self.patience is not None:
            judge = self._judge(*validation)
        generator = torch.Generator()
        generator.manual_seed(int(check_random_state(self.random_state).randint(2**31 - 1)))
        with torch.enable_grad():
            layers = self._train(rows, judge, generator)
        self.weights_ = [weight.detach().numpy() for weight, _ in layers]
        self.biases_ = [bias.detach().numpy() for _, bias in layers]
        return self

    def _check_parameters(self) -> None:
        ranges = {
            "hidden": all(width >= 1 for width in self.hidden),
            "dropout": 0 <= self.dropout < 1,
            "lr": self.lr > 0,
            "weight_decay": self.weight_decay >= 0,
            "epochs": self.epochs >= 1,
            "batch_size": self.batch_size is None or self.batch_size >= 1,
            "patience": self.patience is None or self.patience >= 1,
            "stopping": self.stopping in ("auroc", "loss"),
        }
        for name, is_right in ranges.items():
            if not is_right:
                raise TrainingDataError(f"MLPHead: {name}={getattr(self, name)!r} is out of range")

    def _judge(self, X: np.ndarray, codes: np.ndarray) -> "_Judge":
        weights = row_weights(codes, self.classes_, self.class_weight).astype(np.float32)
        rows = _Rows(X, codes.astype(np.float32), weights, self.mean_, self.scale_)
        return _Judge(*rows.take(np.arange(len(X))), by_auroc=self.stopping == "auroc")

    def _train(self, rows: "_Rows", judge: "_Judge | None", generator: torch.Generator) -> _Layers:
        """Train and return the layers of the best epoch; set `best_epoch_` and `history_`."""
        layers = _start([rows.X.shape[1], *self.hidden, 1], generator)
        parameters = [tensor for layer in layers for tensor in layer]
        step = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay, fused=True)
        self.history_: list[dict[str, float]] = []
        self.best_epoch_, best_key, best = self.epochs, None, layers
        for epoch in range(1, self.epochs + 1):
            self.history_.append({"train_loss": self._train_epoch(rows, layers, step, generator)})
            if judge is None:
                continue
            key, seen = judge(layers)
            self.history_[-1].update(seen)
            if best_key is None or key > best_key:
                best_key, self.best_epoch_ = key, epoch
                best = [(weight.detach().clone(), bias.detach().clone()) for weight, bias in layers]
            elif epoch - self.best_epoch_ >= (self.patience or self.epochs):
                break
        return best

    def _train_epoch(
        self,
        rows: "_Rows",
        layers: _Layers,
        step: torch.optim.Optimizer,
        generator: torch.Generator,
    ) -> float:
        order = torch.randperm(len(rows.X), generator=generator).numpy()
        size = self.batch_size or min(256, max(32, len(order) // 20))
        total = 0.0
        for start in range(0, len(order), size):
            X, targets, weights = rows.take(order[start : start + size])
            logits = _forward(X, layers, self.dropout, generator)
            loss = functional.binary_cross_entropy_with_logits(logits, targets, weights)
            step.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            step.step()
            total += float(loss.detach()) * len(targets)
        if not math.isfinite(total):
            raise TrainingDataError(
                f"the loss of MLPHead with lr={self.lr} is no longer a finite number; lower lr"
            )
        return total / len(order)

    def _probability(self, X: np.ndarray) -> np.ndarray:
        layers = [
            (weight.astype(np.float64), bias.astype(np.float64))
            for weight, bias in zip(self.weights_, self.biases_, strict=True)
        ]
        logits = []
        for values in standardised_blocks(X, self.mean_, self.scale_):
            for weight, bias in layers[:-1]:
                values = np.maximum(values @ weight + bias, 0.0)
            logits.append(values @ layers[-1][0][:, 0] + layers[-1][1][0])
        return np.asarray(expit(np.concatenate(logits)))

    def _payload(self) -> dict[str, np.ndarray]:
        arrays = {"mean": self.mean_, "scale": self.scale_}
        for k, (weight, bias) in enumerate(zip(self.weights_, self.biases_, strict=True)):
            arrays |= {f"layers.{k}.weight": weight, f"layers.{k}.bias": bias}
        return arrays

    def _restore(self, payload: dict[str, np.ndarray] | str, n_features: int) -> None:
        self._check_parameters()
        widths = [n_features, *self.hidden, 1]
        columns = ("float64", (n_features,))
        expected: dict[str, tuple[str, tuple[int, ...]]] = {"mean": columns, "scale": columns}
        for k, (before, after) in enumerate(pairwise(widths)):
            expected[f"layers.{k}.weight"] = ("float32", (before, after))
            expected[f"layers.{k}.bias"] = ("float32", (after,))
        arrays = arrays_of(payload, expected)
        self.mean_, self.scale_ = arrays["mean"], arrays["scale"]
        self.weights_ = [arrays[f"layers.{k}.weight"] for k in range(len(widths) - 1)]
        self.biases_ = [arrays[f"layers.{k}.bias"] for k in range(len(widths) - 1)]


@dataclass(frozen=True)
class _Rows:
    """Rows that are scaled as they are taken, so that the table is never copied."""

    X: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    mean: np.ndarray
    scale: np.ndarray

    def take(self, index: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        taken = self.X[index]
        taken -= self.mean.astype(taken.dtype)
        taken /= self.scale.astype(taken.dtype)
        arrays = (taken.astype(np.float32, copy=False), self.targets[index], self.weights[index])
        X, targets, weights = (torch.from_numpy(array) for array in arrays)
        return X, targets, weights


@dataclass(frozen=True)
class _Judge:
    """Validation rows, and what makes one epoch better than another on them."""

    X: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    by_auroc: bool

    def __call__(self, layers: _Layers) -> tuple[tuple[float, ...], dict[str, float]]:
        """Return a key, larger is better, and the numbers behind it."""
        with torch.no_grad():
            logits = _forward(self.X, layers, 0.0, None)
            loss = float(
                functional.binary_cross_entropy_with_logits(logits, self.targets, self.weights)
            )
        if not math.isfinite(loss):
            raise TrainingDataError("the validation loss of MLPHead is not a finite number")
        auroc = float(roc_auc_score(self.targets.numpy(), logits.numpy()))
        return (auroc, -loss) if self.by_auroc else (-loss,), {"loss": loss, "auroc": auroc}


def _start(widths: Sequence[int], generator: torch.Generator) -> _Layers:
    """Return untrained layers, each weight and bias uniform within 1 / sqrt(columns in).

    That is how torch.nn.Linear starts.
    """
    layers = []
    for before, after in pairwise(widths):
        bound = 1 / math.sqrt(before)
        weight, bias = (
            torch.empty(shape, dtype=torch.float32, device="cpu")
            .uniform_(-bound, bound, generator=generator)
            .requires_grad_()
            for shape in ((before, after), (after,))
        )
        layers.append((weight, bias))
    return layers


def _forward(
    X: torch.Tensor, layers: _Layers, dropout: float, generator: torch.Generator | None
) -> torch.Tensor:
    """Return logits of shape (n,); hidden units are dropped where `dropout` is above 0."""
    values = X
    for weight, bias in layers[:-1]:
        values = torch.relu(torch.addmm(bias, values, weight))
        if dropout > 0:
            kept = torch.empty_like(values).bernoulli_(1 - dropout, generator=generator)
            values = values * kept / (1 - dropout)
    weight, bias = layers[-1]
    return torch.addmm(bias, values, weight)[:, 0]
