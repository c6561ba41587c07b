"""Common parts of all torch towers: grey levels in, finite fp32 rows out, batches ahead of time.

`Tuning` chooses the fastest attention kernel, and compiles blocks if that pays off. Everything is
timed on the device itself, with the actual batches.
"""

import copy
import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from medembed.core.errors import DeviceMemoryError, EncoderError
from medembed.core.poolings import find_pooling, list_names
from medembed.core.text import one_line
from medembed.encoders.block_outputs import find_block_list, pool_blocks
from medembed.encoders.checkpoint_files import Part
from medembed.encoders.devices import Rows, arithmetic, device_of, guard_memory
from medembed.encoders.features import Features, pool
from medembed.encoders.preprocessing import Preprocessing, channel_levels
from medembed.encoders.protocol import Encoder, EncoderExecution, refuse_non_finite

if TYPE_CHECKING:
    from medembed.encoders.base_ref import Origin

__all__ = ["ATTENTION_KERNELS", "ArrangedEncoder", "TorchEncoder", "Tuning"]

ATTENTION_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_HAS_PRIORITY = "set_priority" in inspect.signature(sdpa_kernel).parameters
# A compiled tower is 15 to 25 % faster at this shape (timm's tables), which saves at least 0.13 of
# the time. One compiled block serves all: 15 s for 27 blocks on a CPU, 86 s for the whole tower.
_COMPILING_SAVES = 0.13
_COMPILING_SECONDS = 15.0
_WHOLE_SECONDS = 60.0

Timer = Callable[[], float]
"""Runs a batch, and again to time it; raises DeviceMemoryError if it does not fit."""


@dataclass
class Tuning:
    """How a tower is run on its device.

    Attributes
    ----------
    blocks : sequence of Module
        The tower's blocks, each of which can be compiled; empty if it has none.
    model : Module
        The tower, compiled as a whole if it has no blocks.
    attention : str or None
        Key of `ATTENTION_KERNELS` that is preferred; None leaves the choice to torch.
    compiled_for : int or None
        Batch size that the tower is compiled for; other batches run uncompiled.
    why_not : str
        Why compilation was given up, if it was.
    """

    model: nn.Module
    blocks: Sequence[nn.Module] = ()
    attention: str | None = None
    compiled_for: int | None = None
    why_not: str = ""
    _whole: Any = field(default=None, repr=False)

    @contextmanager
    def active(self, n_images: int) -> Iterator[Callable[..., Any]]:
        """Enter the mode for a batch of `n_images`, and yield the callable model."""
        compiled = self.compiled_for == n_images
        model = self._whole if compiled and self._whole is not None else self.model
        with _prefer(self.attention), _eager(not compiled and self.compiled_for is not None):
            yield model

    def choose_attention(self, time: Timer) -> float:
        """Choose the kernel with the fastest batch, and return its seconds.

        A kernel that does not support the device, the precision or the head size is skipped.
        """
        best = time()
        for name, kernel in ATTENTION_KERNELS.items():
            try:
                with sdpa_kernel(kernel):  # alone, so that no other kernel replaces it
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
        on_status: Callable[[str], None],
    ) -> None:
        """Compile for batches of `batch_size` if that pays off for `n_images` and proves faster.

        Parameters
        ----------
        seconds : float
            Duration of an uncompiled batch.
        """
        cost = _COMPILING_SECONDS if self.blocks else _WHOLE_SECONDS
        if _COMPILING_SAVES * seconds * n_images / batch_size <= cost:
            return
        on_status("Compiling")
        self._begin(batch_size)
        try:
            self.why_not = "" if time() < seconds else "it was not faster"
        except Exception as error:  # the compiler's errors are of many kinds
            self.why_not = one_line(error, 200) or type(error).__name__
        if self.why_not:
            self._end()
            on_status(f"Not compiled: {self.why_not}")

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
    """Prefer a kernel; the others are used for products that it does not support."""
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
    """Run compiled blocks eagerly: a batch of another size would trigger a new compilation."""
    if not wanted:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


class TorchEncoder(ABC):
    """A tower in torch, described by `protocol.PipelinedEncoder`.

    A new encoder is a subclass that defines `features` and `dimensions` for a module.

    Parameters
    ----------
    model : torch.nn.Module
        The tower on its device, with weights in the dtypes of `devices.stored_dtypes`, called by
        `tower` as model(pixel_values=…).
    preprocessing : Preprocessing
        The preprocessing of its images.
    fingerprint, source, revision, device, precision
        See `protocol.Encoder`.
    reload : callable, optional
        Returns the tower in fp32 on its device; without it, a tower that is not in fp32 has no
        `reference`.

    Attributes
    ----------
    part : {"tower", "whole"}
        The part of its checkpoint's tensors that it uses.
    libraries : tuple of str
        Distributions that decide its embeddings besides torch and transformers, such as `timm`.
    origin : Origin or None
        The checkpoint it was loaded from; set by `loading.load_encoder`.
    runner : devices.Device
        The device that runs it.
    """

    part: ClassVar[Part] = "whole"
    libraries: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: Any,
        preprocessing: Preprocessing,
        *,
        fingerprint: str,
        source: str,
        revision: str | None = None,
        device: str = "cpu",
        precision: str = "fp32",
        reload: Callable[[], Encoder] | None = None,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.preprocessing = preprocessing
        self.fingerprint = fingerprint
        self.source = source
        self.revision = revision
        self.device = device
        self.precision = precision
        self._reload = reload
        self.origin: Origin | None = None
        self.runner = device_of(device)
        self.tuning = Tuning(model)
        levels = channel_levels(preprocessing)
        # Determined here, since querying the device would block the host at every batch.
        self._alike = bool((levels == levels[0]).all())
        self._levels = torch.from_numpy(levels).to(device)

    @property
    @abstractmethod
    def dimensions(self) -> Mapping[str, tuple[int, ...]]:
        """Every available pooling, with the shape of one image's vector."""

    @abstractmethod
    def features(self, pixel_values: torch.Tensor) -> Features:
        """Run the tower.

        Parameters
        ----------
        pixel_values : Tensor
            (n, 3, height, width), normalised, on the device. Called in the tower's
            `devices.arithmetic`.
        """

    def block_tokens(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the patch tokens, (n, tokens, d), and class token, (n, d), of a block's output.

        A tower whose `dimensions` offer poolings of its blocks (`mean@6`) has made them observable
        (`block_outputs.observe_blocks`), and overrides this if their output is not patch tokens.
        """
        return output, None

    def can_repool(self, name: str) -> bool:
        """Whether a pooling on offer is a function of the patch tokens, which `repool` computes."""
        return find_pooling(name).is_explained

    def repool(self, name: str, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Return a vector of the tower's own, as `features` has it, of other patch tokens.

        Gradients flow to the tokens.

        Parameters
        ----------
        name : str
            One that `can_repool` allows, and that is no pooling over tokens of `core.poolings`.
        tokens : Tensor
            float32 (n, rows * columns, d), on the device.
        grid : tuple of int
            Rows and columns.

        Returns
        -------
        Tensor
            (n, d') or, where a mean over tokens is still to be taken, (n, tokens, d').
        """
        raise EncoderError(f"pooling {name} of {self.source} is not computed anew from tokens.")

    def find_blocks(self) -> tuple[str, torch.nn.ModuleList] | None:
        """Return the name and the list of the tower's blocks, in order, or None if unknown.

        Blocks are the layers of SigLIP, ViT, DeiT and DINO, and the stages of ResNet, ConvNeXt and
        Swin.
        """
        return find_block_list(self.model)

    def draw_model(self) -> nn.Module:
        """Return a tower like this one with random weights, as its library draws them."""
        drawn: nn.Module = type(self.model)(self.model.config)
        return drawn

    def copy(self) -> "TorchEncoder":
        """Return an uncompiled copy of the encoder and its weights."""
        copied = copy.copy(self)
        copied.model = copy.deepcopy(self.model)
        copied.tuning = Tuning(copied.model)
        return copied

    def describe(self) -> EncoderExecution:
        """Return how the tower is run."""
        return {
            "device": self.device,
            "card": torch.cuda.get_device_name() if self.device == "cuda" else None,
            "precision": self.precision,
            "attention": self.tuning.attention,
            "compiled": self.tuning.compiled_for is not None,
        }

    @property
    def in_flight(self) -> int:
        """Number of batches that may be submitted and not yet collected."""
        return self.runner.in_flight

    def tower(self, pixel_values: torch.Tensor) -> Any:
        """Call the model in the mode tuned for batches of this size."""
        with self.tuning.active(len(pixel_values)) as model:
            return model(pixel_values=pixel_values)

    def encode(self, pixels: np.ndarray, poolings: Sequence[str]) -> Rows:
        """Return the embeddings of prepared images; see `protocol.Encoder.encode`.

        In fp32 on a CPU, for constant n, a row depends neither on its position nor on its
        neighbours nor on the number of cores, bit for bit. A test verifies this, since it depends
        on the kernels of the products.
        """
        return self.submit(pixels, poolings)()

    def submit(self, pixels: np.ndarray, poolings: Sequence[str]) -> Callable[[], Rows]:
        """Start to embed prepared images; see `protocol.PipelinedEncoder.submit`."""
        self._check(pixels)
        self.check_poolings(poolings)
        if not len(pixels):
            shapes = {name: (0, *self.dimensions[name]) for name in poolings}
            return lambda: {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
        collect = self.runner.submit(partial(self._compute, poolings=tuple(poolings)), pixels)

        def finish() -> Rows:
            rows = collect()
            refuse_non_finite(rows, f"in {self.precision}. Try --precision fp32")
            return rows

        return finish

    def warm_up(
        self,
        poolings: Sequence[str],
        *,
        n_images: int,
        batch_size: int | None = None,
        on_status: Callable[[str], None] | None = None,
    ) -> int:
        """Prepare the device, and return the batch size; see `protocol.PipelinedEncoder.warm_up`.

        A CPU needs no preparation. On CUDA the fastest attention kernel is chosen, and the tower's
        blocks are compiled if that pays off for `n_images`.

        Raises
        ------
        DeviceMemoryError
            Not even one image fits.
        """
        self.check_poolings(poolings)
        on_status = on_status or (lambda word: None)
        run = partial(self._run_black, poolings)
        if self.device == "cuda":
            on_status("Warming up")
        size = self.preprocessing
        chosen = batch_size or self.runner.choose_batch(run, size.height * size.width, n_images)
        if self.device != "cuda":
            return chosen
        chosen = _halve_until_it_fits(run, chosen)
        found = self.find_blocks()
        self.tuning = Tuning(self.model, list(found[1]) if found else ())
        timer = partial(_seconds_of, run, chosen)
        seconds = self.tuning.choose_attention(timer)
        self.tuning.compile(
            timer, n_images=n_images, batch_size=chosen, seconds=seconds, on_status=on_status
        )
        return chosen

    def reference(self) -> Encoder:
        """Return this tower in fp32 on its device, or the encoder itself if it is in fp32.

        Raises
        ------
        DeviceMemoryError
            The fp32 tower does not fit beside this one.
        EncoderError
            The tower cannot be loaded again.
        """
        if self.precision == "fp32":
            return self
        if self._reload is None:
            raise EncoderError(
                f"{self.source} runs in {self.precision} and cannot be loaded again in fp32. "
                "Load it with --precision fp32."
            )
        return guard_memory(
            self._reload,
            f"the tower of {self.source} in fp32, which the cache's canary is checked with, does "
            f"not fit the memory of {self.device} beside the one in {self.precision}. Close what "
            "else uses it, or make the cache on a larger device: later runs need no such tower.",
        )

    def check_poolings(self, poolings: Sequence[str]) -> None:
        """Refuse poolings that the encoder lacks.

        Raises
        ------
        EncoderError
            A pooling is not available; the message lists the available ones.
        """
        unknown = [name for name in poolings if name not in self.dimensions]
        if unknown or not poolings:
            raise EncoderError(
                f"pooling {', '.join(unknown) or '(none)'} is not offered by {self.source}. "
                f"Choose from: {list_names(self.dimensions)}."
            )

    @torch.inference_mode()
    def _compute(self, pixels: torch.Tensor, poolings: Sequence[str]) -> dict[str, torch.Tensor]:
        with pool_blocks(poolings, self.block_tokens, self.source) as pooled:
            features = self.see(pixels)
        return pool(features.joined(pooled), poolings)

    def see(self, pixels: torch.Tensor) -> Features:
        """Return the tower's features of grey levels, in its precision; the caller sets gradients.

        Parameters
        ----------
        pixels : Tensor
            uint8 (n, height, width), prepared, on the device.
        """
        with arithmetic(self.device, self.precision):
            return self.features(self.normalise(pixels))

    def canonical_name(self, stored: str) -> str | None:
        """Return a checkpoint tensor's name in the fingerprint, or None if it is not used."""
        return stored

    def stored_tensors(self) -> dict[str, torch.Tensor]:
        """Return the model's tensors on the CPU, under their names in the checkpoint."""
        return {name: t.detach().cpu() for name, t in self.model.state_dict().items()}

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return normalised grey levels, looked up on the device: one uint8 channel is transferred.

        Parameters
        ----------
        pixels : Tensor
            uint8 (n, height, width), prepared, on the device.

        Returns
        -------
        Tensor
            (n, 3, height, width), float32.
        """
        index = pixels.int()
        if self._alike:
            return self._levels[0][index][:, None].expand(-1, 3, -1, -1)
        return torch.stack([level[index] for level in self._levels], dim=1)

    def _run_black(self, poolings: Sequence[str], n_images: int) -> None:
        size = self.preprocessing
        black = np.zeros((n_images, size.height, size.width), np.uint8)
        # Not encode: non-finite rows are reported for real images only, not for black ones.
        self.runner.submit(partial(self._compute, poolings=tuple(poolings)), black)()

    def _check(self, pixels: np.ndarray) -> None:
        size = (self.preprocessing.height, self.preprocessing.width)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[1:] != size:
            raise EncoderError(
                f"the encoder reads uint8 (n, {size[0]}, {size[1]}); this is {pixels.dtype} "
                f"{pixels.shape}. Bring images to its size with `prepare`."
            )


class ArrangedEncoder(TorchEncoder):
    """A tower whose tokens and poolings were determined when it was loaded.

    Parameters
    ----------
    grid : tuple of int
        Rows and columns of the patch tokens, or of the feature map.
    n_before : int
        Class and register tokens before the patch tokens.
    dimensions : mapping of str to tuple of int
        Shape of one image's vector under each pooling.
    """

    def __init__(
        self,
        model: Any,
        preprocessing: Preprocessing,
        *,
        grid: tuple[int, int],
        n_before: int,
        dimensions: Mapping[str, tuple[int, ...]],
        **known: Any,
    ) -> None:
        super().__init__(model, preprocessing, **known)
        self._grid, self._n_before, self._dimensions = grid, n_before, dict(dimensions)

    @property
    def dimensions(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of one image's vector under each pooling."""
        return dict(self._dimensions)


def _halve_until_it_fits(run: Callable[[int], None], batch_size: int) -> int:
    """Return the first of batch_size, its half, … that fits."""
    while True:
        try:
            run(batch_size)
            return batch_size
        except DeviceMemoryError:
            if batch_size == 1:
                raise
            batch_size //= 2


def _seconds_of(run: Callable[[int], None], batch_size: int) -> float:
    """Return the seconds of a batch, after one that loads kernels and workspaces."""
    run(batch_size)
    start = time.monotonic()
    run(batch_size)
    return time.monotonic() - start
