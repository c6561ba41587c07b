"""Attribute a model's logit to the places of an image.

Attributions cover the pooling and the head, from the tower's last tokens to the head's logit. A
transformer's token has seen the whole image, so a place on the map is where the tower *stores* what
it found; that this is also where the finding *is* was measured only on synthetic images.

Logits of linear heads, perceptrons and attention are computed by torch in float64, with gradients;
tests hold them equal to the heads' own functions. Trees have no gradient. Tokens are pooled again
as in the tower.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted

from medembed.core.errors import EncoderError, ModelError
from medembed.core.poolings import POOLINGS, find_pooling
from medembed.encoders.devices import arithmetic
from medembed.encoders.features import Features, pool
from medembed.encoders.protocol import Encoder
from medembed.encoders.torch_encoder import TorchEncoder
from medembed.heads.attention import AttentionHead
from medembed.heads.base import Head
from medembed.heads.linear import LogisticHead
from medembed.heads.mlp import MLPHead
from medembed.heads.scaling import Projection
from medembed.prediction.occlusion import occlude, spread, window_sides

__all__ = [
    "METHODS",
    "Explainer",
    "Explanation",
    "differentiable_logit",
    "logit",
    "repool",
]

Logit = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
}


def logit(head: Head, X: np.ndarray, studies: np.ndarray | None = None) -> np.ndarray:
    """Return the logit of the second class per row, or per study if the head reads studies.

    Parameters
    ----------
    head : Head
        A fitted head.
    X : float array of shape (n, d)
    studies : int array of shape (n,), optional
        For heads that judge studies: each row's study, numbered from 0 without gaps. With None
        every row is a study.

    Returns
    -------
    float64 array of shape (n,), or (number of studies,)
        ln(p / (1 - p)) of the head's probability p, without p's rounding near 0 and 1.

    Raises
    ------
    ModelError
        The head's type is not supported.
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
    """Return a function logit(X, studies) of float64 (n, d) and int64 (n,) on the CPU.

    Its float64 logits equal those of `logit`; heads that do not judge studies ignore `studies`.

    Raises
    ------
    ModelError
        The head has no gradient, like trees.
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


def repool(
    encoder: TorchEncoder, tokens: torch.Tensor, grid: tuple[int, int], poolings: Sequence[str]
) -> torch.Tensor:
    """Return tokens pooled by the encoder's own poolings, with gradients.

    Parameters
    ----------
    tokens : Tensor
        float32 (n, rows * columns, d), on the encoder's device: `Features.tokens` of an image, or
        any other values.
    grid : tuple of int
        Rows and columns.
    poolings : sequence of str
        Poolings that `_refuse_unpoolable` accepts.

    Returns
    -------
    Tensor
        float32 (n, columns of all poolings): poolings joined, cells in order.
    """
    with arithmetic(encoder.device, encoder.precision):
        vectors = {
            name: encoder.repool(name, tokens, grid)
            for name in poolings
            if find_pooling(name).compute is None
        }
    pooled = pool(Features(tokens, grid, vectors), poolings)
    return torch.cat([pooled[name].flatten(1) for name in poolings], dim=1)


def _refuse_unpoolable(encoder: TorchEncoder, poolings: Sequence[str]) -> None:
    """Refuse poolings that are not a function of the patch tokens.

    A class token gathers its content in the blocks below: it does not read the last patch tokens,
    so the contribution of each patch can only be guessed.

    Raises
    ------
    EncoderError
        The pooling cannot be explained, or does not exist; the message then lists the poolings.
    """
    encoder.check_poolings(poolings)
    for name in poolings:
        if not encoder.can_repool(name):
            raise EncoderError(
                f"pooling {name} of {encoder.source} is its class token, which combines all "
                "patches in the blocks below, so no part of it belongs to a single patch. "
                f"Explain a model on {_explained()}."
            )


def _explained() -> str:
    *most, last = (name for name, entry in POOLINGS.items() if entry.compute and entry.is_explained)
    return f"{', '.join(most)} or {last}"


METHODS = ("integrated", "gradient", "occlusion")
N_STEPS = 32
BATCH_SIZE = 8


@dataclass(frozen=True, eq=False)
class Explanation:
    """Heat maps, and the logits that they decompose.

    Attributes
    ----------
    heat : float32 array of shape (n, rows, columns)
        For each image, from its top left: the contribution of a cell of the tower's grid to the
        logit. Values above zero indicate abnormal, below zero normal.
    logit : float64 array of shape (n,), or (number of studies,)
        The head's logit, not calibrated; per study if the head judges studies.
    baseline : float64 array, shaped like `logit`
        The logit if every token were the mean token of its image. With the method "integrated" the
        maps of an image (or study) sum to `logit - baseline`.
    method : str
        One of `METHODS`.
    """

    heat: np.ndarray
    logit: np.ndarray
    baseline: np.ndarray
    method: str


class Explainer:
    """Explains a head's logits for an encoder's images.

    Parameters
    ----------
    encoder : Encoder
        A loaded `TorchEncoder`; other encoders have no tokens.
    head : Head
        Fitted on the encoder's embeddings.
    pooling : str
        The pooling of the head's columns, such as `mean+max`.
    method : str, optional
        One of `METHODS`; by default "integrated", or "occlusion" for heads without a gradient.

        "integrated": integrated gradients (Sundararajan, Taly and Yan, ICML 2017) of the logit over
        the tokens, on the straight path from the image's mean token everywhere, in 32 steps.
        "gradient": the gradient at the image itself times its difference from the mean token; equal
        to "integrated" for a logistic head.
        "occlusion": the drop of the logit, per cell, when a window of tokens is replaced by the
        mean token; a cell gets the mean over the windows that cover it. A window is 3/16 of the
        grid high and wide.

    Raises
    ------
    EncoderError
        The encoder is not a `TorchEncoder`, or a pooling is not a function of the patch tokens:
        `cls`, and a `pooler` computed from it, cannot be explained.
    ModelError
        The method is unknown or unsuitable for this head, or the columns do not match the head.

    Notes
    -----
    `mean` and `grid4` distribute contributions evenly over tokens; `max` assigns a column's
    contribution to the token with the maximum; SigLIP's `pooler` is traced through its attention
    over the tokens, `projector` through Gemma's, a CNN's `pooler` through the mean over the last
    feature map, whose cells form the heat map. Scaling and components are the head's; covariates
    keep their values. Tokens are not rounded to the dtype that the model's rows were stored in.

    On 435 abnormal images of the demo, with heads trained on 405 others, the peak touched the
    finding in 77 % (logistic), 66 % (perceptron), 62 % (trees) and 73 % (attention) with
    `mean+max`; of the cells with bone or finding 9 % touch it, of all cells 3 %. The plain gradient
    of a perceptron hits as often (69 %), but does not sum to the logit that it explains.
    Trees on `mean` alone are explained badly (17 %): a window shifts a mean by less than the
    distance between their thresholds.

    All methods need a single pass of the encoder. Occlusion calls the head once per window, 196
    times on 16 x 16 tokens and 2,809 times on 64 x 64; with `pooler` and `projector` it also pools
    again for each window.
    """

    def __init__(
        self, encoder: Encoder, head: Head, pooling: str, *, method: str | None = None
    ) -> None:
        if not isinstance(encoder, TorchEncoder):
            raise EncoderError(
                f"{encoder.source} returns no patch tokens, so there is no grid to explain on."
            )
        self.encoder, self.head = encoder, head
        self.poolings = pooling.split("+")
        self.method = method or ("integrated" if head.is_differentiable else "occlusion")
        self._check()

    def heat_maps(
        self,
        pixels: np.ndarray,
        covariates: np.ndarray | None = None,
        studies: Sequence[int] | np.ndarray | None = None,
    ) -> np.ndarray:
        """Return only the heat maps, float32 (n, rows, columns); see `explain`."""
        return self.explain(pixels, covariates, studies).heat

    def explain(
        self,
        pixels: np.ndarray,
        covariates: np.ndarray | None = None,
        studies: Sequence[int] | np.ndarray | None = None,
    ) -> Explanation:
        """Return explanations of prepared images.

        Parameters
        ----------
        pixels : uint8 array of shape (n, height, width)
            At least one image.
        covariates : float array of shape (n, number of covariates), optional
            The last columns that the head reads, if it reads covariates.
        studies : int array of shape (n,), optional
            For heads that judge studies: each image's study, numbered from 0 without gaps. Other
            heads ignore it; with None every image is a study.

        Raises
        ------
        EncoderError
            The pixels do not have the encoder's format, or its tokens are not finite.
        ModelError
            The number of covariates is not what the head reads, or there are no images.
        """
        self._check_pixels(pixels)
        known = self._check_covariates(len(pixels), covariates)
        codes = np.arange(len(pixels))
        if studies is not None and self.head.study_level:
            codes = np.unique(np.asarray(studies), return_inverse=True)[1]
        n_judged = int(codes.max()) + 1
        heat: list[np.ndarray | None] = [None] * len(pixels)
        logits, baselines = np.empty(n_judged), np.empty(n_judged)
        # A study's views stay together, even if they exceed a batch.
        for first in range(0, n_judged, BATCH_SIZE):
            judged = slice(first, first + BATCH_SIZE)
            rows = np.flatnonzero((codes >= judged.start) & (codes < judged.stop))
            tokens, grid = self._tokens(pixels[rows])
            own = torch.from_numpy(codes[rows] - first)
            part = _Part(self, tokens, grid, torch.from_numpy(known[rows]), own)
            logits[judged], baselines[judged] = part.logit(), part.baseline()
            for row, values in zip(rows, part.attribute(self.method), strict=True):
                heat[row] = values
        return Explanation(
            np.stack([h for h in heat if h is not None]), logits, baselines, self.method
        )

    def _tokens(self, pixels: np.ndarray) -> tuple[torch.Tensor, tuple[int, int]]:
        on_device = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.encoder.device)
        with torch.no_grad():
            seen = self.encoder.see(on_device)
            tokens = seen.tokens.float()
        if not bool(torch.isfinite(tokens).all()):
            raise EncoderError(
                f"tokens of {self.encoder.source} are not finite in {self.encoder.precision}. Try "
                "--precision fp32."
            )
        return tokens, seen.grid

    def _check(self) -> None:
        if self.head.is_baseline:
            raise ModelError(
                f"{type(self.head).__name__} reads nothing that an encoder saw: there is no place "
                "to show. Explain another head."
            )
        _refuse_unpoolable(self.encoder, self.poolings)
        if self.method not in METHODS:
            raise ModelError(f"unknown method {self.method!r}; choose among {', '.join(METHODS)}")
        if self.method == "occlusion" and self.head.study_level:
            raise ModelError(
                f"{type(self.head).__name__} judges studies: explain it by integrated gradients"
            )
        if self.method != "occlusion":
            differentiable_logit(self.head)
        if self._n_covariates < 0:
            raise ModelError(
                f"the head reads {self.head.n_features_in_} columns; {'+'.join(self.poolings)} of "
                f"{self.encoder.source} are {self.head.n_features_in_ - self._n_covariates}"
            )

    @property
    def _n_covariates(self) -> int:
        shapes = (self.encoder.dimensions[name] for name in self.poolings)
        return self.head.n_features_in_ - sum(int(np.prod(shape)) for shape in shapes)

    def _check_pixels(self, pixels: np.ndarray) -> None:
        size = self.encoder.preprocessing
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (size.height, size.width):
            raise EncoderError(
                f"the encoder reads uint8 (n, {size.height}, {size.width}); this is "
                f"{pixels.dtype} {pixels.shape}. Bring images to its size with `prepare`."
            )
        if not len(pixels):
            raise ModelError("there are no images to explain")

    def _check_covariates(self, n: int, covariates: np.ndarray | None) -> np.ndarray:
        found = np.empty((n, 0)) if covariates is None else np.asarray(covariates, np.float64)
        if found.shape != (n, self._n_covariates):
            raise ModelError(
                f"the head reads {self._n_covariates} covariates of each of {n} images; these have "
                f"the shape {found.shape}"
            )
        return found


@dataclass(frozen=True, eq=False)
class _Part:
    """Some images with all views of their studies: tokens (n, rows * columns, d), and the rest."""

    explainer: Explainer
    tokens: torch.Tensor
    grid: tuple[int, int]
    covariates: torch.Tensor
    studies: torch.Tensor

    def attribute(self, method: str) -> np.ndarray:
        """Return heat maps, float32 (n, rows, columns)."""
        if method == "occlusion":
            whole = self.logit()
            return np.stack([self._occlude(k, float(whole[k])) for k in range(len(whole))])
        steps = (np.arange(N_STEPS) + 0.5) / N_STEPS if method == "integrated" else [1.0]
        difference = self.tokens - self._mean()
        total = torch.zeros_like(self.tokens)
        for step in steps:
            total += self._gradient(self._mean() + float(step) * difference)
        heat = (total / len(steps) * difference).sum(dim=2, dtype=torch.float64)
        return heat.cpu().numpy().reshape(-1, *self.grid).astype(np.float32)

    def logit(self) -> np.ndarray:
        return self._logit_of(self.tokens)

    def baseline(self) -> np.ndarray:
        return self._logit_of(self._mean().expand_as(self.tokens))

    def _mean(self) -> torch.Tensor:
        return self.tokens.mean(dim=1, keepdim=True)

    def _rows(self, tokens: torch.Tensor) -> torch.Tensor:
        pooled = repool(self.explainer.encoder, tokens, self.grid, self.explainer.poolings)
        return torch.cat([pooled.cpu().double(), self.covariates], dim=1)

    def _logit_of(self, tokens: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            rows = self._rows(tokens).numpy()
        return logit(self.explainer.head, rows, self.studies.numpy())

    def _gradient(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            tokens = tokens.detach().requires_grad_()
            judged = differentiable_logit(self.explainer.head)(self._rows(tokens), self.studies)
            (gradient,) = torch.autograd.grad(judged.sum(), tokens)
        return gradient

    def _occlude(self, number: int, whole: float) -> np.ndarray:
        encoder, poolings = self.explainer.encoder, self.explainer.poolings
        tokens = self.tokens[number].cpu().numpy().reshape(*self.grid, -1)
        sides = window_sides(self.grid)

        def pool(changed: torch.Tensor) -> torch.Tensor:
            return repool(encoder, changed.to(encoder.device), self.grid, poolings)

        known = self.covariates[number].numpy()
        drops = [
            whole - logit(self.explainer.head, np.hstack([rows, np.tile(known, (len(rows), 1))]))
            for rows in occlude(tokens, sides, poolings, pool)
        ]
        return spread(np.stack(drops), sides).astype(np.float32)
