"""From a tower's tokens to one vector per image: all poolings of one pass, in fp32."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

__all__ = ["GRID_SIDE", "Features", "pool", "token_poolings"]

GRID_SIDE = 4


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


def token_poolings(width: int, grid: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Name the poolings that tokens allow, each with the shape of one image's vector.

    Parameters
    ----------
    width : int
        Length d of a token.
    grid : tuple of int
        Rows and columns of the tokens; `grid4` takes at least 4 of each.
    """
    shapes: dict[str, tuple[int, ...]] = {"mean": (width,), "max": (width,)}
    if min(grid) >= GRID_SIDE:
        shapes["grid4"] = (GRID_SIDE * GRID_SIDE, width)
    return shapes


def pool(features: Features, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Pool a batch, in fp32.

    `mean` and `max` are over all patch tokens, `grid4` is the mean over each cell of a 4 × 4
    grid (torch's adaptive average pooling, which lets cells share a row where 4 does not divide
    the side), row by row; any other name is the tower's own vector.

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
        if name in _OVER_TOKENS:
            pooled[name] = _OVER_TOKENS[name](tokens, features.grid)
        else:
            vector = features.vectors[name].float()
            pooled[name] = vector.mean(dim=1) if vector.ndim == 3 else vector
    return pooled


def _pool_mean(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    return tokens.mean(dim=1)


def _pool_max(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    return tokens.amax(dim=1)


def _pool_grid4(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    image = tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)
    cells = torch.nn.functional.adaptive_avg_pool2d(image, GRID_SIDE)
    return cells.flatten(2).transpose(1, 2).contiguous()


_OVER_TOKENS: dict[str, Callable[[torch.Tensor, tuple[int, int]], torch.Tensor]] = {
    "mean": _pool_mean,
    "max": _pool_max,
    "grid4": _pool_grid4,
}
