"""Gated attention over the views of a study, trained by torch and applied by numpy."""

import math
from typing import Any, ClassVar, Self

import numpy as np
import torch
from scipy.special import expit
from sklearn.metrics import roc_auc_score
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch.nn.functional import binary_cross_entropy_with_logits, linear

from medembed.core.errors import TrainingDataError
from medembed.heads.bags import (
    Batch,
    LabelledStudies,
    Studies,
    cell_width,
    learn_projections,
    study_codes,
)
from medembed.heads.base import ClassWeight, Head, arrays_of, is_count
from medembed.heads.scaling import SCALINGS, Projection

__all__ = ["AttentionHead"]

_Weights = dict[str, torch.Tensor]


class AttentionHead(Head):
    """One logit on a study's attention-weighted mean vector, trained with AdamW.

    Early stopping uses only the validation rows that `fit` is given.

    The gated attention of Ilse, Tomczak and Welling (ICML 2018): a vector h of the study has the
    weight exp(w · (tanh(V h + b) * sigmoid(U h + c))), divided by the sum of these over all vectors
    of the study, which are its views or the cells of a grid on each view.

    Parameters
    ----------
    hidden : int
        Rows of V and of U.
    n_cells : int
        Vectors per image. A row of X is [cell 1 | cell 2 | … | covariates], cells of equal width.
    n_covariates : int
        The last columns of X: standardised, averaged over the study's views, and appended to the
        weighted mean before the last layer.
    pca, scaling, whiten
        Passed to `Projector.learn`; one projection is learnt from all cells together.
    dropout : float in [0, 1)
        Share of the last layer's inputs dropped in training.
    lr, weight_decay : float
        Parameters of AdamW (Loshchilov and Hutter, ICLR 2019).
    epochs : int
        Maximum number of epochs; exact if `fit` gets no validation rows or `patience` is None.
    batch_size : int or None
        Studies per step. None: a twentieth of the studies, between 32 and 256.
    patience : int or None
        Stop after this many epochs without improvement; None ignores validation rows.
    stopping : "auroc" or "loss"
        The validation score that decides which epoch is better; the loss breaks ties of AUROC.
    class_weight : "balanced", dict or None
        scikit-learn's `class_weight`, counted by study; it weights the loss.
    random_state : int, RandomState or None
        Determines the initial weights, the order of studies and the dropout. torch's and (unless
        None) numpy's global generators are left alone. Results are reproducible only with an equal
        number of threads.

    Attributes
    ----------
    projection_ : Projection
        Maps a cell's columns to the k entries of h.
    covariates_ : Projection
        Standardises the covariates.
    weights_ : dict of float32 arrays
        `gate.V.weight` and `gate.U.weight` (hidden, k), `gate.V.bias`, `gate.U.bias` and `gate.w`
        (hidden,), `classifier.weight` (k + n_covariates,), `classifier.bias` (1,).
    best_epoch_ : int
        The epoch whose weights are kept, counted from 1.
    history_ : list of dict
        Per epoch `train_loss` and, with validation rows, `loss` and `auroc`, all per study.
    """

    study_level: ClassVar[bool] = True
    is_differentiable: ClassVar[bool] = True

    def __init__(
        self,
        hidden: int = 128,
        *,
        n_cells: int = 1,
        n_covariates: int = 0,
        pca: int = 0,
        scaling: str = "standard",
        whiten: bool = False,
        dropout: float = 0.25,
        lr: float = 3e-3,  # 1e-3 lost 0.01 to 0.04 AUROC on synthetic sets of about 300 rows
        weight_decay: float = 1e-2,
        epochs: int = 60,
        batch_size: int | None = None,
        patience: int | None = 8,
        stopping: str = "auroc",
        class_weight: ClassWeight = "balanced",
        random_state: Any = 0,
    ) -> None:
        self.hidden = hidden
        self.n_cells = n_cells
        self.n_covariates = n_covariates
        self.pca = pca
        self.scaling = scaling
        self.whiten = whiten
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

    def fit(
        self,
        X: Any,
        y: Any,
        *,
        X_val: Any = None,
        y_val: Any = None,
        studies: Any = None,
        studies_val: Any = None,
    ) -> Self:
        """Fit on X of shape (n, d), finite, a row per image, and y of two classes.

        The result depends neither on the names and order of studies nor, up to rounding, on the
        order of their rows.

        Parameters
        ----------
        X, y
            Training rows; scaling, components and class weights come from these alone. A study's
            label is the largest of its rows' labels.
        X_val, y_val : optional
            Rows of other patients that decide when to stop; the best epoch's weights are kept.
        studies, studies_val : int or str arrays of shape (n,), optional
            The study of each row; by default each row is a study of its own.

        Raises
        ------
        TrainingDataError
            The studies of y, or of y_val if given, are not of two classes; `studies` does not match
            the rows, or n_cells and n_covariates do not match the columns; a parameter is out of
            range; or the loss stops being a finite number.
        """
        X, codes = self._check_training(X, y)
        validation = self._check_validation(X_val, y_val)
        self.check_parameters()
        self.projection_, self.covariates_ = learn_projections(
            X, self.n_cells, self.n_covariates, self.scaling, self.pca, whiten=self.whiten
        )
        training = self._label(X, codes, studies, "training")
        held = None if validation is None else self._label(*validation, studies_val, "validation")
        generator = torch.Generator()
        generator.manual_seed(int(check_random_state(self.random_state).randint(2**31 - 1)))
        with torch.enable_grad():
            weights = self._train(training, held if self.patience else None, generator)
        self.weights_ = {name: tensor.detach().numpy() for name, tensor in weights.items()}
        return self

    def predict_proba(self, X: Any, studies: Any = None) -> np.ndarray:
        """Return the probability of each of `classes_` for each study, float64 of shape (m, 2).

        Studies are in the order of `np.unique(studies)`; without `studies` each row is a study of
        its own, in the order of the rows.

        Raises
        ------
        TrainingDataError
            `studies` does not match the rows.
        """
        positive = self._probability(X, studies)
        return np.column_stack([1 - positive, positive])

    def predict(self, X: Any, studies: Any = None) -> np.ndarray:
        """Return the likelier class of each study, in the order of `predict_proba`.

        At a probability of one half that is the second class.
        """
        abnormal = self.predict_proba(X, studies)[:, 1] >= 0.5
        return np.take(self.classes_, abnormal.astype(int))

    def attention(self, X: Any, studies: Any = None) -> np.ndarray:
        """Return the weight of each row's cells in its study, float64 of shape (n, n_cells).

        The weights of a study are above zero and sum to 1.

        Raises
        ------
        TrainingDataError
            `studies` does not match the rows.
        """
        rows, attention, _ = self._apply(X, studies)
        return attention[np.argsort(rows)]

    def check_parameters(self) -> None:
        """Raise TrainingDataError if a parameter is out of range."""
        self._refuse_out_of_range(
            {
                "hidden": is_count(self.hidden, 1),
                "n_cells": is_count(self.n_cells, 1),
                "n_covariates": is_count(self.n_covariates, 0),
                "pca": is_count(self.pca, 0),
                "scaling": self.scaling in SCALINGS,
                "dropout": 0 <= self.dropout < 1,
                "lr": self.lr > 0,
                "weight_decay": self.weight_decay >= 0,
                "epochs": is_count(self.epochs, 1),
                "batch_size": self.batch_size is None or is_count(self.batch_size, 1),
                "patience": self.patience is None or is_count(self.patience, 1),
                "stopping": self.stopping in ("auroc", "loss"),
            }
        )

    def _studies(self, X: np.ndarray, codes: np.ndarray) -> Studies:
        return Studies.of(X, codes, self.projection_, self.covariates_, self.n_cells)

    def _label(self, X: np.ndarray, codes: np.ndarray, names: Any, kind: str) -> LabelledStudies:
        studies = self._studies(X, study_codes(names, len(X), by_name=False))
        return LabelledStudies.of(studies, codes, self.classes_, self.class_weight, kind)

    def _train(
        self, studies: LabelledStudies, held: LabelledStudies | None, generator: torch.Generator
    ) -> _Weights:
        """Train and return the weights of the best epoch; set `best_epoch_` and `history_`."""
        k = self.projection_.n_columns
        weights = _start(_shapes(self.hidden, k, self.n_covariates), generator)
        step = torch.optim.AdamW(
            list(weights.values()), lr=self.lr, weight_decay=self.weight_decay, fused=True
        )
        self.history_: list[dict[str, float]] = []
        self.best_epoch_, best_key, best = self.epochs, None, weights
        for epoch in range(1, self.epochs + 1):
            self.history_.append(self._train_epoch(studies, weights, step, generator))
            if held is None:
                continue
            seen = _judge(held, weights)
            self.history_[-1].update(seen)
            key = (seen["auroc"] if self.stopping == "auroc" else 0.0, -seen["loss"])
            if best_key is None or key > best_key:
                best_key, self.best_epoch_ = key, epoch
                best = {name: tensor.detach().clone() for name, tensor in weights.items()}
            elif epoch - self.best_epoch_ >= (self.patience or self.epochs):
                break
        return best

    def _train_epoch(
        self,
        studies: LabelledStudies,
        weights: _Weights,
        step: torch.optim.Optimizer,
        generator: torch.Generator,
    ) -> dict[str, float]:
        order = torch.randperm(len(studies.targets), generator=generator).numpy()
        size = self.batch_size or min(256, max(32, len(order) // 20))
        total = 0.0
        for start in range(0, len(order), size):
            batch = studies.take(order[start : start + size])
            logits = _forward(batch, weights, self.dropout, generator)
            loss = _loss(logits, batch)
            step.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            step.step()
            total += float(loss.detach()) * len(logits)
        if not math.isfinite(total):
            text = f"the loss of AttentionHead with lr={self.lr} is no longer a finite number"
            raise TrainingDataError(f"{text}; lower lr")
        return {"train_loss": total / len(order)}

    def _probability(self, X: Any, studies: Any = None) -> np.ndarray:
        return np.asarray(expit(self._apply(X, studies)[2]))

    def _apply(self, X: Any, names: Any) -> list[np.ndarray]:
        """Return all rows (n,), study by study, their attention (n, n_cells), and logits (m,)."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=[np.float32, np.float64])
        weights = {name: array.astype(np.float64) for name, array in self.weights_.items()}
        studies, parts = self._studies(X, study_codes(names, len(X))), []
        for chosen in studies.blocks():
            views = studies.take(chosen, np.float64)
            gate = np.tanh(views.cells @ weights["gate.V.weight"].T + weights["gate.V.bias"])
            gate *= expit(views.cells @ weights["gate.U.weight"].T + weights["gate.U.bias"])
            attention, pooled = views.attend(gate @ weights["gate.w"])
            inputs = np.hstack([pooled, views.covariates])
            logits = inputs @ weights["classifier.weight"] + weights["classifier.bias"]
            parts.append((views.rows, attention.reshape(-1, self.n_cells), logits))
        return [np.concatenate(part) for part in zip(*parts, strict=True)]

    def _payload(self) -> dict[str, np.ndarray]:
        of_covariates = {
            f"covariates.{name}": array for name, array in self.covariates_.as_arrays().items()
        }
        return {**self.projection_.as_arrays(), **of_covariates, **self.weights_}

    def _restore(self, payload: dict[str, np.ndarray] | str, n_features: int) -> None:
        self.check_parameters()
        width = cell_width(n_features, self.n_cells, self.n_covariates)
        expected = Projection.expected_arrays(payload, width, self.pca, 0)
        k = expected["components"][1][1] if self.pca else width
        shapes = _shapes(self.hidden, k, self.n_covariates)
        expected |= {name: ("float32", shape) for name, shape in shapes.items()}
        columns = ("float64", (self.n_covariates,))
        expected |= {"covariates.mean": columns, "covariates.scale": columns}
        arrays = arrays_of(payload, expected)
        self.projection_ = Projection.from_arrays(arrays, 0)
        self.covariates_ = Projection(arrays["covariates.mean"], arrays["covariates.scale"])
        self.weights_ = {name: arrays[name] for name in shapes}


def _shapes(hidden: int, k: int, n_covariates: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight."""
    return {
        "gate.V.weight": (hidden, k),
        "gate.V.bias": (hidden,),
        "gate.U.weight": (hidden, k),
        "gate.U.bias": (hidden,),
        "gate.w": (hidden,),
        "classifier.weight": (k + n_covariates,),
        "classifier.bias": (1,),
    }


def _start(shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> _Weights:
    """Return untrained weights, uniform within 1 / sqrt(columns in), like torch.nn.Linear's."""
    weights = {}
    for name, shape in shapes.items():
        bound = 1 / math.sqrt(shapes[name.replace("bias", "weight")][-1])
        weight = torch.empty(shape, dtype=torch.float32, device="cpu")
        weights[name] = weight.uniform_(-bound, bound, generator=generator).requires_grad_()
    return weights


def _forward(
    batch: Batch, weights: _Weights, dropout: float = 0.0, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Return a logit per study, dropping inputs of the last layer if `dropout` is above 0."""
    cells, owners, n = batch.cells, batch.owners, len(batch.covariates)
    gate = torch.tanh(linear(cells, weights["gate.V.weight"], weights["gate.V.bias"]))
    gate = gate * torch.sigmoid(linear(cells, weights["gate.U.weight"], weights["gate.U.bias"]))
    scores = gate @ weights["gate.w"]
    with torch.no_grad():
        top = scores.new_full((n,), -math.inf).scatter_reduce(0, owners, scores, "amax")
    # index_select, not [...]: with several threads the gradient of [...] is summed in any order
    shares = torch.exp(scores - top.index_select(0, owners))
    total = shares.new_zeros(n).index_add(0, owners, shares)
    pooled = cells.new_zeros((n, cells.shape[1])).index_add(0, owners, shares[:, None] * cells)
    values = torch.cat([pooled / total[:, None], batch.covariates], dim=1)
    if dropout > 0:
        kept = torch.empty_like(values).bernoulli_(1 - dropout, generator=generator)
        values = values * kept / (1 - dropout)
    return values @ weights["classifier.weight"] + weights["classifier.bias"]


def _loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    return binary_cross_entropy_with_logits(logits, batch.targets, batch.weights)


def _judge(held: LabelledStudies, weights: _Weights) -> dict[str, float]:
    """Return the mean loss and the AUROC of validation studies."""
    logits, loss = [], 0.0
    with torch.no_grad():
        for chosen in held.studies.blocks():
            batch = held.take(chosen)
            logits.append(_forward(batch, weights))
            loss += float(_loss(logits[-1], batch)) * len(chosen)
    if not math.isfinite(loss):
        raise TrainingDataError("the validation loss of AttentionHead is not a finite number")
    auroc = float(roc_auc_score(held.targets, torch.cat(logits).numpy()))
    return {"loss": loss / len(held.targets), "auroc": auroc}
