"""The table of poolings: how a tower's tokens become a vector, or a few cells, for each image.

`mean`, `max` and `cls` also exist after each block of a tower: `mean@K` is the mean over the output
of block K, before the final norm.

All that the package knows of a pooling stands in its entry: extraction computes by it, heads take
the poolings that it has them read, explanations and fine-tuning ask it whether they may. To add a
pooling is to add an entry to `POOLINGS`. Both halves of the package read this table, so nothing
here imports torch before a pooling is computed.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from medembed.core.errors import EncoderError

if TYPE_CHECKING:
    import torch

__all__ = [
    "DEFAULT_POOLINGS",
    "IMAGE_STATISTICS",
    "POOLINGS",
    "CellSummary",
    "Pooling",
    "at_block",
    "block_of",
    "expand_blocks",
    "find_pooling",
    "list_blocks",
    "list_names",
    "list_of_tower",
    "refuse_unknown",
]

_GRID = 4
IMAGE_STATISTICS = "imagestats"
"""The pooling of `images.statistics`, which no tower computes."""
_N_STATISTICS = 7
_AT_BLOCK = re.compile(r"([a-z0-9]+)@([1-9][0-9]{0,3})")
_ALL_BLOCKS = re.compile(r"([a-z0-9]+)@all")
_LISTED = 8  # blocks that a message lists one by one


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


def _statistics(width: int) -> tuple[int, ...]:
    return (_N_STATISTICS,)


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
    is_per_block : bool
        Whether `NAME@K` exists too: the same of block K's output.
    is_of_file : bool
        Whether it is measured on the decoded film instead of what a tower makes of it.
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
    is_per_block: bool = False
    is_of_file: bool = False

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
    Pooling("mean", _pool_mean, is_stored=True, summary=CellSummary("mean", 1), is_per_block=True),
    Pooling("max", _pool_max, is_stored=True, summary=CellSummary("max", 1), is_per_block=True),
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
    Pooling("cls", is_explained=False, is_per_block=True),
    Pooling("projector", is_trained_through=False, needs_language_model=True),
    Pooling(
        IMAGE_STATISTICS,
        None,
        _statistics,
        is_read=False,
        is_explained=False,
        is_trained_through=False,
        is_of_file=True,
    ),
)

#: By name, in the order in which they are listed to users.
POOLINGS = {pooling.name: pooling for pooling in _TABLE}

#: What extraction stores where it is not told.
DEFAULT_POOLINGS = tuple(name for name, pooling in POOLINGS.items() if pooling.is_stored)


def at_block(name: str, block: int) -> str:
    """Return the name of a pooling of one block's output: ``at_block("mean", 6)`` is ``mean@6``."""
    return f"{name}@{block}"


def block_of(name: str) -> tuple[str, int] | None:
    """Return the pooling and the block that a name such as `mean@6` stands for, or None.

    Examples
    --------
    >>> block_of("mean@6"), block_of("mean"), block_of("grid4@6")
    (('mean', 6), None, None)
    """
    found = _AT_BLOCK.fullmatch(name)
    if found is None or not (base := POOLINGS.get(found[1])) or not base.is_per_block:
        return None
    return base.name, int(found[2])


def list_blocks(n_blocks: int) -> list[str]:
    """Return every pooling of a block's output that a tower of `n_blocks` may offer."""
    names = [name for name, entry in POOLINGS.items() if entry.is_per_block]
    return [at_block(name, block) for name in names for block in range(1, n_blocks + 1)]


def find_pooling(name: str) -> Pooling:
    """Return the entry of a pooling; of a name without one, that of an encoder's own vector.

    What a block's output is pooled to is stored and read only where `--pool` or `--layers` names
    it, and cannot be computed again from the final tokens.
    """
    if (at := block_of(name)) is not None:
        base = POOLINGS[at[0]]
        return Pooling(
            name, None, base.shape, is_read=False, is_explained=False, is_trained_through=False
        )
    return POOLINGS.get(name) or Pooling(name)


def list_of_tower(names: Iterable[str]) -> list[str]:
    """Return the poolings that a tower computes, which is all but those of the film itself."""
    return [name for name in names if not find_pooling(name).is_of_file]


def expand_blocks(names: Iterable[str], offered: Iterable[str]) -> tuple[str, ...]:
    """Return poolings with each `NAME@all` replaced by `NAME@K` of every block on offer, once each.

    Where no block is on offer the name stays, to be refused like any other that is not there.

    Examples
    --------
    >>> expand_blocks(["mean", "mean@all"], ["mean", "max", "mean@2", "max@1", "mean@1"])
    ('mean', 'mean@1', 'mean@2')
    """
    known = [(at, name) for name in offered if (at := block_of(name)) is not None]
    expanded: list[str] = []
    for name in names:
        wanted = _ALL_BLOCKS.fullmatch(name)
        own = [(at[1], each) for at, each in known if wanted and at[0] == wanted[1]]
        expanded += [each for _, each in sorted(own)] or [name]
    return tuple(dict.fromkeys(expanded))


def list_names(names: Iterable[str]) -> str:
    """Return poolings as a message lists them, of many blocks only the first and the last.

    Examples
    --------
    >>> list_names(["mean", *(f"mean@{k}" for k in range(1, 28))])
    'mean, mean@1 … mean@27'
    """
    listed: dict[str, list[str]] = {}
    for name in names:
        at = block_of(name)
        listed.setdefault(name if at is None else f"{at[0]}@", []).append(name)
    return ", ".join(
        f"{own[0]} … {own[-1]}" if len(own) > _LISTED else ", ".join(own) for own in listed.values()
    )


def refuse_unknown(poolings: Sequence[str]) -> None:
    """Refuse poolings that no encoder offers, before anything is fetched.

    Raises
    ------
    EncoderError
        Names those there are.
    """
    unknown = [name for name in poolings if not _is_known(name)]
    if unknown:
        per_block = [f"{name}@K" for name, entry in POOLINGS.items() if entry.is_per_block]
        raise EncoderError(
            f"pooling {', '.join(unknown)} is unknown. Choose from: {', '.join(POOLINGS)}; after "
            f"block K of the encoder, counted from 1: {', '.join(per_block)}, or with `all` for K."
        )


def _is_known(name: str) -> bool:
    wanted = _ALL_BLOCKS.fullmatch(name)
    if wanted is not None:
        return wanted[1] in POOLINGS and POOLINGS[wanted[1]].is_per_block
    return name in POOLINGS or block_of(name) is not None
