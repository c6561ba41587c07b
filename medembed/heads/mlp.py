"""A multi-layer perceptron, trained by torch as a cohort of one and applied by numpy."""

from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from scipy.special import erf, expit
from sklearn.utils import check_random_state

from medembed.core.errors import TrainingDataError
from medembed.core.system import processor_flags
from medembed.heads.base import ClassWeight, Head, arrays_of, is_count, row_weights
from medembed.heads.scaling import SCALINGS, Projection, Projector

if TYPE_CHECKING:  # torch, which these import, takes a second: only training needs it
    from medembed.heads.batched_mlp import BatchedMLP, Rows
    from medembed.heads.mlp_network import Member, Net

__all__ = ["PRECISIONS", "MLPHead", "gather", "resolve_precision"]

PRECISIONS = ("fp32", "bf16", "auto")

_APPLIED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda z: np.maximum(z, 0.0),
    "gelu": lambda z: z * 0.5 * (1.0 + erf(z / np.sqrt(2.0))),
    "silu": lambda z: z * expit(z),
    "tanh": np.tanh,
}


def resolve_precision(precision: str) -> str:
    """Return "bf16" or "fp32"; "auto" is bf16 if the processor multiplies in bf16."""
    if precision != "auto":
        return precision
    return "bf16" if processor_flags() & {"avx512_bf16", "amx_bf16"} else "fp32"


class MLPHead(Head):
    """Hidden layers and one logit, trained with AdamW; what is kept are averages over its steps.

    The averages are those of `mlp_network`. Early stopping uses only the validation rows that `fit`
    is given.

    Parameters
    ----------
    hidden : sequence of int
        Widths of the hidden layers; empty for none.
    activation : "relu", "gelu", "silu" or "tanh"
        GELU is the exact one (Hendrycks and Gimpel, 2016).
    dropout : float in [0, 1)
        Share of hidden units dropped in training, to the nearest 1/256.
    lr, weight_decay : float
        Parameters of AdamW (Loshchilov and Hutter, ICLR 2019).
    label_smoothing : float in [0, 1)
        The training targets are half of this and 1 minus half of this.
    scaling : "standard", "global" or "none"
        How columns are scaled, see `scaling.SCALINGS`.
    pca : int
        Number of principal components that enter the first layer; 0: all columns.
    whiten : bool
        Scale each component to variance 1.
    n_covariates : int
        The last columns of X, which `pca` leaves out.
    epochs : int
        Maximum number of epochs; exact if `fit` gets no validation rows. An epoch is a pass over
        the rows, to whole batches, or the next 8,192 rows of one.
    batch_size : int or None
        Rows per step, or all if there are fewer; every pass shuffles them. None: a sixteenth of
        the rows, to a multiple of 16 between 32 and 256, so that a few hundred rows still make
        enough steps.
    patience : int or None
        Stop after this many epochs without improvement. None ignores validation rows and trains
        all epochs.
    stopping : "auroc" or "loss"
        The validation score that decides which epoch is better; the loss breaks ties of AUROC.
    class_weight : "balanced", dict or None
        scikit-learn's `class_weight`; it weights the loss.
    precision : "fp32", "bf16" or "auto"
        Precision of the products in training; "auto" is bf16 if the processor multiplies in bf16.
    random_state : int, RandomState or None
        Determines the initial weights, the order of rows and the dropout. torch's and (unless None)
        numpy's global generators are left alone. Results are reproducible only with an equal number
        of threads.

    Attributes
    ----------
    weights_ : list of float32 arrays (columns in, columns out)
    biases_ : list of float32 arrays (columns out,)
    projection_ : Projection
    best_epoch_ : int
        The epoch whose averages are kept, counted from 1.
    history_ : list of dict
        Per epoch `train_loss` and, with validation rows, `loss` and `auroc`.
    """

    shares: ClassVar[str | None] = "cohort"
    n_together: ClassVar[int | None] = 16
    """Enough to fill the matrix unit, few enough that a crash loses little."""
    has_rungs: ClassVar[bool] = True
    shared_params: ClassVar[tuple[str, ...]] = ("batch_size", "precision")
    uses_span: ClassVar[bool] = True
    is_differentiable: ClassVar[bool] = True
    trains_with_encoder: ClassVar[bool] = True

    def __init__(
        self,
        hidden: Sequence[int] = (256,),
        *,
        activation: str = "relu",
        dropout: float = 0.3,
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        label_smoothing: float = 0.0,
        scaling: str = "standard",
        pca: int = 0,
        whiten: bool = False,
        n_covariates: int = 0,
        epochs: int = 60,
        batch_size: int | None = None,
        patience: int | None = 8,
        stopping: str = "auroc",
        class_weight: ClassWeight = "balanced",
        precision: str = "fp32",
        random_state: Any = 0,
    ) -> None:
        self.hidden = hidden
        self.activation = activation
        self.dropout = dropout
        self.lr = lr
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing
        self.scaling = scaling
        self.pca = pca
        self.whiten = whiten
        self.n_covariates = n_covariates
        self.epochs = epochs
        self.batch_size = batch_size
        self.patience = patience
        self.stopping = stopping
        self.class_weight = class_weight
        self.precision = precision
        self.random_state = random_state

    def import_libraries(self) -> None:
        """Import torch."""
        import medembed.heads.batched_mlp  # noqa: F401

    def find_bases(self) -> list[tuple[str, int]]:
        """Return the scaling with the number of components that enter the first layer."""
        return [(self.scaling, self.pca)]

    def as_layers(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return the weights and biases of the hidden layers and the last."""
        return list(self.weights_), list(self.biases_)

    def with_budget(self, n: int) -> Self:
        """Return an unfitted copy that trains exactly `n` epochs."""
        return super().with_budget(n).set_params(epochs=n, patience=None)  # type: ignore[no-any-return]

    def fit(self, X: Any, y: Any, *, X_val: Any = None, y_val: Any = None) -> Self:
        """Fit on X of shape (n, d), finite, and y of two classes.

        Parameters
        ----------
        X, y
            Training rows; scaling, components and class weights come from these alone.
        X_val, y_val : optional
            Rows of other patients that decide when to stop; the best epoch's weights are kept.

        Raises
        ------
        TrainingDataError
            y, or y_val if given, does not hold both of two classes, a parameter is out of range,
            or the loss stops being a finite number.
        """
        X, codes = self._check_training(X, y)
        validation = self._check_validation(X_val, y_val)
        self.check_parameters()
        from medembed.heads.batched_mlp import Rows

        held = None if validation is None else Rows(validation[0], None, validation[1])
        rows = Rows(X, None, codes)
        cohort = gather([self], rows, held, Projector(X, n_covariates=self.n_covariates))
        cohort.train(self.epochs)
        self.take(cohort.nets[0], cohort.projections[0])
        return self

    def check_parameters(self) -> None:
        """Raise TrainingDataError if a parameter is out of range."""
        self._refuse_out_of_range(
            {
                "hidden": all(is_count(width, 1) for width in self.hidden),
                "activation": self.activation in _APPLIED,
                "dropout": 0 <= self.dropout < 1,
                "lr": self.lr > 0,
                "weight_decay": self.weight_decay >= 0,
                "label_smoothing": 0 <= self.label_smoothing < 1,
                "scaling": self.scaling in SCALINGS,
                "pca": is_count(self.pca, 0),
                "epochs": is_count(self.epochs, 1),
                "batch_size": self.batch_size is None or is_count(self.batch_size, 1),
                "patience": self.patience is None or is_count(self.patience, 1),
                "stopping": self.stopping in ("auroc", "loss"),
                "precision": self.precision in PRECISIONS,
            }
        )

    def as_member(self, codes: np.ndarray) -> "Member":
        """Return this head as a member of a cohort, for rows with labels `codes`, 0 or 1."""
        from medembed.heads.mlp_network import Member

        classes = getattr(self, "classes_", np.array([0, 1]))
        normal, abnormal = row_weights(
            np.array([0, 1]), classes, self.class_weight, labels=classes[codes]
        )
        return Member(
            hidden=tuple(self.hidden),
            activation=self.activation,
            dropout=self.dropout,
            lr=self.lr,
            weight_decay=self.weight_decay,
            label_smoothing=self.label_smoothing,
            class_weights=(float(normal), float(abnormal)),
            epochs=self.epochs,
            patience=self.patience,
            stopping=self.stopping,
            kind=(self.scaling, self.pca, self.whiten),
        )

    def take(self, net: "Net", projection: Projection) -> None:
        """Become fitted with the layers of a trained net and the projection before them.

        Raises
        ------
        TrainingDataError
            The net's loss stopped being a finite number.
        """
        if net.failure is not None:
            raise TrainingDataError(net.failure)
        layers = net.layers(projection.n_columns)
        self.weights_ = [weight for weight, _ in layers]
        self.biases_ = [bias for _, bias in layers]
        if not self.pca:  # a basis of the rows, see `Projector.span`
            projection, self.weights_[0] = projection.fold_into(self.weights_[0])
        self.projection_ = projection
        self.best_epoch_ = net.best_epoch or net.epoch
        self.history_ = net.history

    def _probability(self, X: np.ndarray) -> np.ndarray:
        layers = [
            (weight.astype(np.float64), bias.astype(np.float64))
            for weight, bias in zip(self.weights_, self.biases_, strict=True)
        ]
        logits = []
        for values in self.projection_.blocks(X):
            for weight, bias in layers[:-1]:
                values = _APPLIED[self.activation](values @ weight + bias)
            logits.append(values @ layers[-1][0][:, 0] + layers[-1][1][0])
        return np.asarray(expit(np.concatenate(logits)))

    def _payload(self) -> dict[str, np.ndarray]:
        arrays = self.projection_.as_arrays()
        for k, (weight, bias) in enumerate(zip(self.weights_, self.biases_, strict=True)):
            arrays |= {f"layers.{k}.weight": weight, f"layers.{k}.bias": bias}
        return arrays

    def _restore(self, payload: dict[str, np.ndarray] | str, n_features: int) -> None:
        self.check_parameters()
        expected = Projection.expected_arrays(payload, n_features, self.pca, self.n_covariates)
        n_components = expected["components"][1][1] + self.n_covariates if self.pca else n_features
        for k, (before, after) in enumerate(pairwise([n_components, *self.hidden, 1])):
            expected[f"layers.{k}.weight"] = ("float32", (before, after))
            expected[f"layers.{k}.bias"] = ("float32", (after,))
        arrays = arrays_of(payload, expected)
        self.projection_ = Projection.from_arrays(arrays, self.n_covariates)
        layers = range(len(self.hidden) + 1)
        self.weights_ = [arrays[f"layers.{k}.weight"] for k in layers]
        self.biases_ = [arrays[f"layers.{k}.bias"] for k in layers]


def _batch_size(n_rows: int) -> int:
    return min(256, max(32, 16 * round(n_rows / 256)))


def gather(
    heads: Sequence[MLPHead],
    rows: "Rows",
    held: "Rows | None",
    projector: Projector,
    nets: "Sequence[Net] | None" = None,
) -> "BatchedMLP":
    """Return a cohort that trains these heads on `rows`, with `held` for early stopping.

    All heads must share `random_state`, `batch_size` and `precision`; TrainingDataError if they
    differ. `projector` is of the same rows; `nets` is the state that an earlier cohort reached.
    """
    from medembed.heads.batched_mlp import BatchedMLP

    for name in ("random_state", "batch_size", "precision"):
        values = list(dict.fromkeys(str(getattr(head, name)) for head in heads))
        if len(values) > 1:
            raise TrainingDataError(
                f"MLPHead: {name} is {' and '.join(values[:2])} in one cohort, whose members share "
                "it. Give it one value."
            )
    first = heads[0]
    projections: dict[Hashable, Projection] = {
        (head.scaling, head.pca, head.whiten): (
            projector.learn(head.scaling, head.pca, whiten=head.whiten)
            if head.pca
            else projector.span(head.scaling)
        )
        for head in heads
    }
    return BatchedMLP(
        [head.as_member(rows.y) for head in heads],
        rows,
        projections,
        held=held,
        seed=int(check_random_state(first.random_state).randint(2**31 - 1)),
        batch_size=first.batch_size or _batch_size(len(rows)),
        bf16=resolve_precision(first.precision) == "bf16",
        nets=nets,
    )
