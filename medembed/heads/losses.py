"""Cross-entropy of the members of a cohort, each with its class weights and label smoothing."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

__all__ = ["LossRates", "Losses", "row_weights_of"]


def row_weights_of(y: torch.Tensor, class_weights: Sequence[float | torch.Tensor]) -> torch.Tensor:
    """Return the weights in the loss of rows with labels y (m,), float32 0 or 1.

    Weights (members, 1) in place of numbers give (members, m).
    """
    normal, abnormal = class_weights
    return y * (abnormal - normal) + normal


class LossRates(NamedTuple):
    """What the members' losses are made with; each float32 of shape (members, 1)."""

    smoothing: torch.Tensor
    normal: torch.Tensor
    abnormal: torch.Tensor

    @classmethod
    def of(cls, rates: Sequence[tuple[float, float, float]]) -> "LossRates":
        """Take the three of each member, in that order."""
        return cls(*torch.tensor(rates, dtype=torch.float32).t()[:, :, None].unbind())


class Losses:
    """The losses of all members on a batch with labels y (m,), float32 0 or 1."""

    def __init__(self, rates: LossRates, y: torch.Tensor) -> None:
        self._targets = y * (1 - rates.smoothing) + rates.smoothing / 2
        self._weights = row_weights_of(y, (rates.normal, rates.abnormal))
        self._logits = torch.empty_like(self._targets)

    def gradient(self, k: int, logits: torch.Tensor) -> torch.Tensor:
        """Take member k's logits (m,); return its mean loss's gradient by them, float32."""
        own = self._logits[k].copy_(logits)
        return (torch.sigmoid(own) - self._targets[k]) * self._weights[k] / len(own)

    def sums(self) -> np.ndarray:
        """Return each member's sum over the batch, float64 of shape (members,)."""
        losses = functional.binary_cross_entropy_with_logits(
            self._logits, self._targets, self._weights, reduction="none"
        )
        return losses.sum(1, dtype=torch.float64).numpy()
