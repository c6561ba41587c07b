"""Make a tower fast on its device: the fastest attention kernel, and compiled blocks where it pays.

Everything here is timed on the device itself, with the batches that are going to be run.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from medembed.core.errors import DeviceMemoryError

__all__ = ["ATTENTION_KERNELS", "Tuning"]

ATTENTION_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_HAS_PRIORITY = "set_priority" in inspect.signature(sdpa_kernel).parameters
# A compiled tower is 15 to 25 % faster at this shape (timm's tables), so 0.13 of the time goes away
# at the least. One compiled block serves them all: 15 s for 27 on a CPU, 86 s whole.
_COMPILING_SAVES = 0.13
_COMPILING_SECONDS = 15.0
_WHOLE_SECONDS = 60.0

Timer = Callable[[], float]
"""Runs a batch, and again to time it; raises DeviceMemoryError where it does not fit."""


@dataclass
class Tuning:
    """How a tower is run on its device.

    Attributes
    ----------
    blocks : sequence of Module
        The tower's blocks, of which each can be compiled; empty where it has none.
    model : Module
        The tower, compiled whole where it has no blocks.
    attention : str or None
        Key of `ATTENTION_KERNELS` that is preferred; None leaves the choice to torch.
    compiled_for : int or None
        Images in a batch that the tower is compiled for; others run as they are.
    why_not : str
        Why a compilation was given up, where it was.
    """

    model: nn.Module
    blocks: Sequence[nn.Module] = ()
    attention: str | None = None
    compiled_for: int | None = None
    why_not: str = ""
    _whole: Any = field(default=None, repr=False)

    @contextmanager
    def active(self, n_images: int) -> Iterator[Callable[..., Any]]:
        """Enter the way in which a batch of `n_images` is run; yield what to call as the model."""
        compiled = self.compiled_for == n_images
        model = self._whole if compiled and self._whole is not None else self.model
        with _prefer(self.attention), _eager(not compiled and self.compiled_for is not None):
            yield model

    def choose_attention(self, time: Timer) -> float:
        """Prefer the kernel with the fastest batch; return its seconds.

        A kernel that the device, the precision or the head size rules out is passed over.
        """
        best = time()
        for name, kernel in ATTENTION_KERNELS.items():
            try:
                with sdpa_kernel(kernel):  # alone, so that nothing else stands in for it
                    seconds = time()
            except DeviceMemoryError:
                continue
            except RuntimeError:  # torch: no available kernel
                continue
            if seconds < best:
                best, self.attention = seconds, name
        return best

    def compile(
        self,
        time: Timer,
        *,
        n_images: int,
        batch_size: int,
        seconds: float,
        tell: Callable[[str], None],
    ) -> None:
        """Compile for batches of `batch_size`, if that pays for `n_images`, and keep it if it does.

        Parameters
        ----------
        seconds : float
            Of a batch as it is.
        """
        cost = _COMPILING_SECONDS if self.blocks else _WHOLE_SECONDS
        if _COMPILING_SAVES * seconds * n_images / batch_size <= cost:
            return
        tell("Compiling")
        self._begin(batch_size)
        try:
            self.why_not = "" if time() < seconds else "it was not faster"
        except Exception as error:  # the compiler's errors are of many kinds
            self.why_not = " ".join(str(error).split())[:200] or type(error).__name__
        if self.why_not:
            self._end()
            tell(f"Not compiled: {self.why_not}")

    def _begin(self, batch_size: int) -> None:
        self.compiled_for = batch_size
        if not self.blocks:
            self._whole = torch.compile(self.model, dynamic=False)
        for block in self.blocks:
            block.compile(dynamic=False)

    def _end(self) -> None:
        self.compiled_for = self._whole = None
        for block in self.blocks:
            block._compiled_call_impl = None
        torch.compiler.reset()


@contextmanager
def _prefer(attention: str | None) -> Iterator[None]:
    """Prefer a kernel; where it cannot do a product, the others may."""
    if attention is None:
        yield
        return
    first = ATTENTION_KERNELS[attention]
    others = [kernel for kernel in ATTENTION_KERNELS.values() if kernel is not first]
    order = [first, *others, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True) if _HAS_PRIORITY else sdpa_kernel(order):
        yield


@contextmanager
def _eager(wanted: bool) -> Iterator[None]:
    """Run compiled blocks as they are: a batch of another size would be compiled anew."""
    if not wanted:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
