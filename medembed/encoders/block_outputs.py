"""Poolings of each block's output, computed while the tower runs, without keeping hidden states.

A tower's own loop calls its blocks; `ObservedBlocks` stands in for the list that it goes through,
and hands every output to whoever listens, between two blocks. What is compiled stays compiled,
since blocks are compiled one by one, and hooks of torch would become part of the compiled code.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from medembed.core.errors import EncoderError
from medembed.core.poolings import POOLINGS, at_block, block_of

__all__ = [
    "BlockTokens",
    "ObservedBlocks",
    "block_poolings",
    "find_block_list",
    "observe_blocks",
    "observe_list",
    "pool_blocks",
    "watch_blocks",
]

# Where releases of transformers keep a tower's blocks.
_BLOCKS = (
    *("encoder.layers", "encoder.layer", "encoder.stages"),
    *("model.layer", "layers", "layer", "stages"),
)
Listener = Callable[[int, torch.Tensor], None]
BlockTokens = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
"""Takes a block's output to its patch tokens, (n, tokens, d), and its class token, (n, d)."""

# Batches run on several threads at once, each with its own listener.
_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


class ObservedBlocks(nn.ModuleList):
    """A tower's blocks; while somebody listens, each output is handed over as soon as it exists."""

    def __iter__(self) -> Iterator[Any]:
        """Yield the blocks, or what calls them and hands over their outputs."""
        blocks = iter(self._modules.values())
        if torch.compiler.is_compiling() or (listener := _LISTENER.get()) is None:
            return blocks
        return (_Observed(block, number, listener) for number, block in enumerate(blocks, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the blocks one after another, where they stand in for a `Sequential`."""
        for block in self:
            x = block(x)
        return x


class _Observed:
    """A block whose outputs are handed over; everything else is the block's own."""

    def __init__(self, block: nn.Module, number: int, listener: Listener) -> None:
        self._block, self._number, self._listener = block, number, listener

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        output = self._block(*inputs, **options)
        self._listener(self._number, output[0] if isinstance(output, tuple) else output)
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


def find_block_list(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Return the name and the list of a tower's blocks, in order, or None if unknown."""
    for name in _BLOCKS:
        try:
            found = model.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList) and len(found):
            return name, found
    return None


def observe_blocks(model: nn.Module) -> None:
    """Make the outputs of a tower's blocks observable; its tensors and their names stay."""
    found = find_block_list(model)
    if found is not None and not isinstance(found[1], ObservedBlocks):
        observe_list(model, *found)


def observe_list(
    model: nn.Module, name: str, blocks: nn.ModuleList | nn.Sequential
) -> ObservedBlocks:
    """Make the outputs of the blocks that `model` has by this name observable."""
    parent, _, own = name.rpartition(".")
    observed = ObservedBlocks(blocks)
    setattr(model.get_submodule(parent), own, observed)
    return observed


@contextmanager
def watch_blocks(listener: Listener) -> Iterator[None]:
    """Call ``listener(number, output)``, from 1, for each block that runs within, on this thread.

    The output is the tower's own, in its precision; whoever keeps it keeps its memory.
    """
    before = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(before)


def block_poolings(widths: Sequence[int], *, has_class_token: bool) -> dict[str, tuple[int, ...]]:
    """Return the poolings of each block's output, with the shape of one image's vector.

    Parameters
    ----------
    widths : sequence of int
        Length of a token after each block.
    has_class_token : bool
        Whether `cls` is one of them.
    """
    return {
        at_block(name, number): entry.shape(width)
        for name, entry in POOLINGS.items()
        if entry.is_per_block and (entry.compute is not None or has_class_token)
        for number, width in enumerate(widths, 1)
    }


@contextmanager
def pool_blocks(
    names: Sequence[str], tokens_of: BlockTokens, source: str
) -> Iterator[dict[str, torch.Tensor]]:
    """Pool the outputs of the blocks that run within, on this thread.

    Parameters
    ----------
    names : sequence of str
        Poolings; those that are not of a block's output are left out.
    tokens_of : callable
        See `BlockTokens`.
    source : str
        The encoder, for messages.

    Yields
    ------
    dict of str to Tensor
        float32 (n, d) by name, complete when the context ends.

    Raises
    ------
    EncoderError
        A block that was asked for did not run.
    """
    wanted: dict[int, list[tuple[str, str]]] = {}
    for name in names:
        if (at := block_of(name)) is not None:
            wanted.setdefault(at[1], []).append((name, at[0]))
    pooled: dict[str, torch.Tensor] = {}
    if not wanted:
        yield pooled
        return

    def listen(number: int, output: torch.Tensor) -> None:
        if number not in wanted:
            return
        tokens, class_token = tokens_of(output)
        tokens = tokens.float()
        for name, base in wanted[number]:
            compute = POOLINGS[base].compute
            vector = class_token if compute is None else compute(tokens, (1, tokens.shape[1]))
            assert vector is not None
            pooled[name] = vector.float().clone() if compute is None else vector

    with watch_blocks(listen):
        yield pooled
    missing = [name for own in wanted.values() for name, _ in own if name not in pooled]
    if missing:
        raise EncoderError(
            f"{source} gave no output for {missing[0]}: its library has changed how it runs the "
            "blocks. Use another release of it, or leave the pooling out."
        )
