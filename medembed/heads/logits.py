"""A fitted head's logit, before any probability: what explanations are parts of.

Those of linear heads, perceptrons and attention can be had with gradients, from torch in float64;
they are the heads' own functions, held to them by tests. Trees have no gradient.
"""

from collections.abc import Callable
from functools import singledispatch
from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted

from medembed.core.errors import ModelError
from medembed.heads.attention import AttentionHead
from medembed.heads.base import Head
from medembed.heads.linear import LogisticHead
from medembed.heads.mlp import MLPHead
from medembed.heads.scaling import Projection

__all__ = ["differentiable_logit", "logit"]

Logit = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
}


def logit(head: Head, X: np.ndarray, studies: np.ndarray | None = None) -> np.ndarray:
    """Return the logit of the second class: of each row, or of each study where a head reads those.

    Parameters
    ----------
    head : Head
        Fitted.
    X : float array of shape (n, d)
    studies : int array of shape (n,), optional
        For heads that judge studies: each row's study, all numbers from 0 on in use. None makes a
        study of every row.

    Returns
    -------
    float64 array of shape (n,), or (number of studies,)
        ln(p / (1 - p)) of the head's probability p, without that one's rounding near 0 and 1.

    Raises
    ------
    ModelError
        The head is of a kind whose logit is not known.
    """
    check_is_fitted(head)
    if not head.is_differentiable:
        return head.predict_logit(X)
    codes = np.arange(len(X)) if studies is None or not head.study_level else np.asarray(studies)
    with torch.no_grad():
        found = differentiable_logit(head)(
            torch.from_numpy(np.asarray(X, np.float64)), torch.from_numpy(codes)
        )
    return found.numpy()


@singledispatch
def differentiable_logit(head: Head) -> Logit:
    """Return logit(X, studies): float64 (n, d) and int64 (n,) on the CPU to float64 logits.

    Logits are those of `logit`; those of heads without studies pass over `studies`.

    Raises
    ------
    ModelError
        The head has no gradient, as trees have none.
    """
    raise ModelError(f"a head of {type(head).__name__} has no gradient. Explain it by occlusion.")


@differentiable_logit.register
def _of_logistic(head: LogisticHead) -> Logit:
    project = _projected(head.projection_)
    weight, bias = torch.from_numpy(head.coef_[0]), float(head.intercept_[0])
    return lambda X, _studies: project(X) @ weight + bias


@differentiable_logit.register
def _of_mlp(head: MLPHead) -> Logit:
    project, act = _projected(head.projection_), _ACTIVATIONS[head.activation]
    layers = [(_tensor(w), _tensor(b)) for w, b in zip(head.weights_, head.biases_, strict=True)]

    def apply(X: torch.Tensor, _studies: torch.Tensor) -> torch.Tensor:
        values = project(X)
        for weight, bias in layers[:-1]:
            values = act(values @ weight + bias)
        return (values @ layers[-1][0] + layers[-1][1])[:, 0]

    return apply


@differentiable_logit.register
def _of_attention(head: AttentionHead) -> Logit:
    project, standardise = _projected(head.projection_), _projected(head.covariates_)
    weights = {name: _tensor(array) for name, array in head.weights_.items()}
    n_embedded = len(head.projection_.mean) * head.n_cells

    def judge(X: torch.Tensor) -> torch.Tensor:
        cells = project(X[:, :n_embedded].reshape(len(X) * head.n_cells, -1))
        gate = torch.tanh(cells @ weights["gate.V.weight"].T + weights["gate.V.bias"])
        gate = gate * torch.sigmoid(cells @ weights["gate.U.weight"].T + weights["gate.U.bias"])
        pooled = torch.softmax(gate @ weights["gate.w"], dim=0) @ cells
        inputs = torch.cat([pooled, standardise(X[:, n_embedded:]).mean(dim=0)])
        return inputs @ weights["classifier.weight"] + weights["classifier.bias"][0]

    def apply(X: torch.Tensor, studies: torch.Tensor) -> torch.Tensor:
        return torch.stack([judge(X[studies == code]) for code in range(int(studies.max()) + 1)])

    return apply


def _projected(projection: Projection) -> Callable[[torch.Tensor], torch.Tensor]:
    mean, scale = _tensor(projection.mean), _tensor(projection.scale)
    if projection.components is None:
        return lambda X: (X - mean) / scale
    components = _tensor(projection.components)

    def apply(X: torch.Tensor) -> torch.Tensor:
        scaled = (X - mean) / scale
        embedded = scaled[:, : len(components)] @ components
        return torch.cat([embedded, scaled[:, len(components) :]], dim=1)

    return apply


def _tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array, np.float64))
