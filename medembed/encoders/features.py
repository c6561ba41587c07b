"""What a tower says of a batch, and all poolings of one pass over it, in fp32."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from medembed.core.poolings import POOLINGS, find_pooling

__all__ = ["Features", "pool", "token_poolings"]


@dataclass(frozen=True)
class Features:
    """What a tower says about a batch of n images, in the tower's own precision.

    Parameters
    ----------
    tokens : Tensor
        (n, rows * columns, d): patch tokens alone, row by row from the image's top left. Class
        and register tokens do not belong here.
    grid : tuple of int
        Rows and columns of the tokens.
    vectors : mapping of str to Tensor
        What the tower itself pools: `pooler`, `cls`, `projector`, each (n, d') or, where a mean
        over tokens is still to be taken, (n, tokens, d').
    """

    tokens: torch.Tensor
    grid: tuple[int, int]
    vectors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def joined(self, more: Mapping[str, torch.Tensor]) -> "Features":
        """Return these features with more vectors, such as the poolings of blocks' outputs."""
        return replace(self, vectors={**self.vectors, **more}) if more else self


def token_poolings(width: int, grid: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Return the poolings that tokens allow, each with the shape of one image's vector.

    Parameters
    ----------
    width : int
        Length d of a token.
    grid : tuple of int
        Rows and columns of the tokens; `grid4` takes at least 4 of each.
    """
    return {
        name: pooling.shape(width)
        for name, pooling in POOLINGS.items()
        if pooling.compute is not None and min(grid) >= pooling.least_side
    }


def pool(features: Features, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Pool a batch, in fp32.

    Poolings over patch tokens are computed as `core.poolings` has them; any other name is the
    tower's own vector.

    Returns
    -------
    dict of str to Tensor
        float32: mean, max (n, d); grid4 (n, 16, d); others (n, d').

    Raises
    ------
    KeyError
        The features hold no such vector.
    """
    tokens = features.tokens.float()
    pooled = {}
    for name in names:
        compute = find_pooling(name).compute
        if compute is not None:
            pooled[name] = compute(tokens, features.grid)
        else:
            vector = features.vectors[name].float()
            pooled[name] = vector.mean(dim=1) if vector.ndim == 3 else vector
    return pooled
