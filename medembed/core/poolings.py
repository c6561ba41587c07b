"""The table of poolings: how a tower's tokens become a vector, or a few cells, for each image.

All that the package knows of a pooling stands in its entry: extraction computes by it, heads take
the poolings that it has them read, explanations and fine-tuning ask it whether they may. To add a
pooling is to add an entry to `POOLINGS`. Both halves of the package read this table, so nothing
here imports torch before a pooling is computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from medembed.core.errors import EncoderError

if TYPE_CHECKING:
    import torch

__all__ = [
    "DEFAULT_POOLINGS",
    "POOLINGS",
    "CellSummary",
    "Pooling",
    "find_pooling",
    "refuse_unknown",
]

_GRID = 4


class CellSummary(NamedTuple):
    """A statistic of the tokens in each cell of a grid laid over the image.

    Attributes
    ----------
    statistic : {"mean", "max"}
    side : int
        Cells along each side; 1: one cell, the whole image.
    """

    statistic: Literal["mean", "max"]
    side: int


def _vector(width: int) -> tuple[int, ...]:
    return (width,)


def _cells(width: int) -> tuple[int, ...]:
    return (_GRID * _GRID, width)


@dataclass(frozen=True)
class Pooling:
    """What the package knows of a pooling.

    Attributes
    ----------
    name : str
        As in `--pool`, the cache and a model's card; without `,` and `+`, which join names.
    compute : callable or None
        ``compute(tokens, grid)`` pools patch tokens, float32 (n, rows * columns, d), row by row
        from the image's top left, to float32 ``(n, *shape(d))``; grid is (rows, columns). None
        where the tower computes the vector itself.
    shape : callable
        ``shape(d)`` is the shape of an image's pooled tokens: (k,) for one vector, (cells, k) for
        several. Without `compute`, the tower's own width stands for d.
    least_side : int
        Rows and columns of tokens that it needs at least.
    is_stored : bool
        Whether extraction stores the pooling where `--pool` is not given.
    is_read : bool
        Whether heads read it where `--pool` is not given; only single vectors can be.
    is_explained : bool
        Whether it can be computed again from changed patch tokens, with gradients. A tower may
        still say no (`TorchEncoder.can_repool`).
    is_trained_through : bool
        Whether fine-tuning trains a head on it together with the encoder; only single vectors.
    needs_language_model : bool
        Whether a part of a language model's checkpoint beyond the tower computes it.
    summary : CellSummary, optional
        What it is, where it is no more than this: occlusion then pools no window anew.
    """

    name: str
    compute: "Callable[[torch.Tensor, tuple[int, int]], torch.Tensor] | None" = None
    shape: Callable[[int], tuple[int, ...]] = _vector
    least_side: int = 1
    is_stored: bool = False
    is_read: bool = True
    is_explained: bool = True
    is_trained_through: bool = True
    needs_language_model: bool = False
    summary: CellSummary | None = None

    @property
    def label(self) -> str:
        """The name, with the number of cells where there are several."""
        shape = self.shape(1)
        return f"{self.name} ({shape[0]} cells)" if len(shape) > 1 else self.name


def _pool_mean(tokens: "torch.Tensor", grid: tuple[int, int]) -> "torch.Tensor":
    return tokens.mean(dim=1)


def _pool_max(tokens: "torch.Tensor", grid: tuple[int, int]) -> "torch.Tensor":
    return tokens.amax(dim=1)


def _pool_grid4(tokens: "torch.Tensor", grid: tuple[int, int]) -> "torch.Tensor":
    """Average each cell of a 4 × 4 grid, as torch's adaptive pooling has it, row by row.

    Cells share a row of tokens where 4 does not divide the side.
    """
    from torch.nn.functional import adaptive_avg_pool2d

    image = tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)
    return adaptive_avg_pool2d(image, _GRID).flatten(2).transpose(1, 2).contiguous()


_TABLE = (
    Pooling("mean", _pool_mean, is_stored=True, summary=CellSummary("mean", 1)),
    Pooling("max", _pool_max, is_stored=True, summary=CellSummary("max", 1)),
    Pooling(
        "grid4",
        _pool_grid4,
        _cells,
        least_side=_GRID,
        is_read=False,
        is_trained_through=False,
        summary=CellSummary("mean", _GRID),
    ),
    Pooling("pooler"),
    Pooling("cls", is_explained=False),
    Pooling("projector", is_trained_through=False, needs_language_model=True),
)

#: By name, in the order in which they are listed to users.
POOLINGS = {pooling.name: pooling for pooling in _TABLE}

#: What extraction stores where it is not told.
DEFAULT_POOLINGS = tuple(name for name, pooling in POOLINGS.items() if pooling.is_stored)


def find_pooling(name: str) -> Pooling:
    """Return the entry of a pooling; of a name without one, that of an encoder's own vector."""
    return POOLINGS.get(name) or Pooling(name)


def refuse_unknown(poolings: Sequence[str]) -> None:
    """Refuse poolings that no encoder offers, before anything is fetched.

    Raises
    ------
    EncoderError
        Names those there are.
    """
    unknown = [name for name in poolings if name not in POOLINGS]
    if unknown:
        raise EncoderError(
            f"pooling {', '.join(unknown)} is unknown. Choose from: {', '.join(POOLINGS)}."
        )
