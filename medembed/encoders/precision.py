"""How a tower computes: all in fp32, or products in bfloat16 and the rest in fp32.

With `bf16` only linear layers, convolutions and attention multiply in bfloat16. The residual
stream, the layer norms and the final norm stay in fp32, since rounding them at every block is what
moves an embedding: a tower of 27 blocks of 1152 is then some 2.6 to 3 times farther from fp32
(`bench/arithmetic.py`). Training uses the same arithmetic.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

__all__ = ["DTYPES", "arithmetic", "set_precision", "stored_dtypes"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What the factors of a product are rounded to."""
_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def arithmetic(device: str, precision: str) -> AbstractContextManager[Any]:
    """Return the context in which a tower computes on this thread.

    Parameters
    ----------
    device : str
        `cpu`, `cuda` or `mps`.
    precision : {"fp32", "bf16"}
    """
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device, dtype=DTYPES[precision])


def stored_dtypes(module: nn.Module, precision: str) -> dict[str, torch.dtype]:
    """Return the dtype that each tensor of a module's state is kept in.

    The weights of products are kept as they are multiplied, so that nothing is cast per batch;
    norms, position embeddings and scales are kept in fp32. Whole numbers are left out.
    """
    dtypes = {
        name: torch.float32 for name, t in module.state_dict().items() if t.is_floating_point()
    }
    for prefix, part in module.named_modules():
        if isinstance(part, _PRODUCTS):
            for name, _ in part.named_parameters(prefix, recurse=False):
                dtypes[name] = DTYPES[precision]
    return dtypes


def set_precision(module: nn.Module, precision: str) -> None:
    """Bring the weights of a module in fp32 to the dtypes of `stored_dtypes`."""
    for part in module.modules():
        if isinstance(part, _PRODUCTS):
            part.to(DTYPES[precision])
