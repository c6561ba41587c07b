"""Devices that run a tower: CPUs in single-threaded lanes, CUDA in streams, others in turn.

With `bf16` only linear layers, convolutions and attention multiply in bfloat16. The residual
stream, the layer norms and the final norm stay in fp32, since rounding them at every block shifts
an embedding most: a tower of 27 blocks of width 1152 would be 2.6 to 3 times farther from fp32
(`bench/arithmetic.py`). Training uses the same arithmetic.
"""

import gc
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Thread
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import nn

from medembed.core.errors import DeviceMemoryError
from medembed.core.text import one_line

__all__ = [
    "DTYPES",
    "Cuda",
    "Device",
    "InTurn",
    "Lanes",
    "Rows",
    "arithmetic",
    "current_gpu",
    "device_of",
    "free_memory",
    "guard_memory",
    "is_memory_error",
    "on_gpu",
    "pinned",
    "set_precision",
    "stored_dtypes",
    "why_no_gpu",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""The dtype to which the factors of a product are rounded."""
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
    """Return the dtype in which each tensor of a module's state is stored.

    Weights of products are stored in the dtype of the multiplication, which avoids casts per batch;
    norms, position embeddings and scales are stored in fp32. Integers are left out.
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
    """Convert the weights of an fp32 module to the dtypes of `stored_dtypes`."""
    for part in module.modules():
        if isinstance(part, _PRODUCTS):
            part.to(DTYPES[precision])


Rows = dict[str, np.ndarray]
Work = Callable[[torch.Tensor], dict[str, torch.Tensor]]
T = TypeVar("T")

MEGA = 896 * 896  # pixels of the largest tower's input
MAX_PIXELS = {"cpu": MEGA, "other": 8 * MEGA, "cuda": 64 * MEGA}
MAX_BATCH = {"cpu": 8, "other": 8, "cuda": 512}
MEMORY_SHARE = 0.8  # of the free memory; the rest is for fragmentation and other processes
# torch raises MemoryError or RuntimeError depending on the allocator, with these words. A library
# without room for its handle or workspace uses its own words.
_NO_MEMORY = (
    *("out of memory", "not enough memory", "can't allocate memory", "cannot allocate"),
    *("cublas_status_alloc_failed", "cublas_status_not_initialized"),
    *("cudnn_status_alloc_failed", "cusolver_status_alloc_failed", "cudaerrormemoryallocation"),
)


class Device(Protocol):
    """Runs `work`, which turns uint8 pixels on the device into fp32 rows there.

    Attributes
    ----------
    in_flight : int
        Batches that may be submitted and not yet collected.
    """

    in_flight: int

    def submit(self, work: Work, pixels: np.ndarray) -> Callable[[], Rows]:
        """Start `work` on a copy of `pixels`; return a function that waits for its rows.

        Raises
        ------
        DeviceMemoryError
            The batch does not fit; the returned function may raise this too.
        """
        ...

    def choose_batch(self, run: Callable[[int], object], n_pixels: int, n_images: int) -> int:
        """Return a batch size for images of `n_pixels`; `run(n)` embeds n of them."""
        ...


def device_of(name: str) -> Device:
    """Return the device for a torch name: `cpu`, `cuda`, `mps`."""
    if name == "cpu":
        return Lanes()
    return Cuda() if name == "cuda" else InTurn(name)


class Lanes:
    """A CPU: batches run in parallel, each on one thread.

    A row's bits therefore do not depend on the number of cores, and the threads of a small product
    never wait for each other. There are as many lanes as torch has threads when the encoder is
    created: one per core, unless OMP_NUM_THREADS or `torch.set_num_threads` changes it.
    """

    def __init__(self, n_lanes: int | None = None) -> None:
        self.n_lanes = n_lanes or torch.get_num_threads()
        self.in_flight = self.n_lanes + 1
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, work: Work, pixels: np.ndarray) -> Callable[[], Rows]:
        """Queue a batch for the next free lane; see `Device.submit`."""
        if self._pool is None:
            usual = (torch.get_num_threads(),)
            self._pool = ThreadPoolExecutor(self.n_lanes, "lane", _enter_lane, usual)
        # Guarded in the lane: a future would keep an error and, through it, the batch's tensors.
        return self._pool.submit(_run_guarded, work, torch.from_numpy(np.array(pixels))).result

    def choose_batch(self, run: Callable[[int], object], n_pixels: int, n_images: int) -> int:
        """Return 1 for images of 896 × 896, or up to 8 for smaller images of that total size.

        A crash loses one batch per lane. The number of images has no influence: a resumed run must
        use equal batch sizes to produce equal bits.
        """
        return max(1, min(MAX_BATCH["cpu"], MAX_PIXELS["cpu"] // n_pixels))


class InTurn:
    """A device without streams that torch can overlap: one batch after the other."""

    in_flight = 1

    def __init__(self, name: str) -> None:
        self._name = name

    def submit(self, work: Work, pixels: np.ndarray) -> Callable[[], Rows]:
        """Run a batch to its end; see `Device.submit`."""
        copied = torch.from_numpy(np.array(pixels))
        rows = _guard(lambda: _rows_of(work(copied.to(self._name))), len(pixels))
        return lambda: rows

    def choose_batch(self, run: Callable[[int], object], n_pixels: int, n_images: int) -> int:
        """Return 8, or less for images of more than 896 × 896 pixels."""
        return max(1, min(MAX_BATCH["other"], MAX_PIXELS["other"] // n_pixels))


class Cuda:
    """A CUDA device: the next batch is transferred while the previous one is computed.

    Only the function that `submit` returns waits for the device. Pinned blocks come from torch's
    caching allocator, which reuses a block only after the copies that use it are done.
    """

    in_flight = 2

    def __init__(self, name: str = "cuda") -> None:
        self._name = name
        self._gpu = current_gpu(name)
        self._copies = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def submit(self, work: Work, pixels: np.ndarray) -> Callable[[], Rows]:
        """Queue a batch on the device; see `Device.submit`."""
        with on_gpu(self._gpu):  # the caller's thread may be on another
            collect = _guard(lambda: self._queue(work, pixels), len(pixels))
        return lambda: _guard(collect, len(pixels))

    def _queue(self, work: Work, pixels: np.ndarray) -> Callable[[], Rows]:
        host = pinned(pixels.shape, torch.uint8)
        host.numpy()[...] = pixels
        with torch.cuda.stream(self._copies):
            arriving = host.to(self._name, non_blocking=True)
        stream = torch.cuda.current_stream()
        stream.wait_stream(self._copies)
        arriving.record_stream(stream)  # allocated on the other stream, used on this one
        rows = {}
        with _full_precision():
            for name, values in work(arriving).items():
                rows[name] = pinned(values.shape, values.dtype)
                rows[name].copy_(values, non_blocking=True)
        # A blocking wait sleeps; a spinning one would take a decoder's core.
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(stream)

        def collect() -> Rows:
            done.synchronize()
            return {name: values.numpy().copy() for name, values in rows.items()}

        return collect

    def choose_batch(self, run: Callable[[int], object], n_pixels: int, n_images: int) -> int:
        """Return the largest power of two for which 0.8 of the free memory suffices.

        The memory per image is the difference between the peaks of small batches. The limits are 64
        images of 896 × 896, or an equal number of pixels, 512 images, and the number of images.
        """
        most = min(MAX_BATCH["cuda"], max(1, MAX_PIXELS["cuda"] // n_pixels))
        try:
            run(1)  # loads kernels and workspaces, which stay
            few, more = _peak_bytes(run, 2), _peak_bytes(run, 4)
        except DeviceMemoryError:
            return 1
        each = max(1, (more - few) // 2)
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        budget = MEMORY_SHARE * (torch.cuda.mem_get_info()[0] + cached) - max(0, few - 2 * each)
        fitting = max(1, min(most, int(budget // each)))
        enough = 1 << max(0, n_images - 1).bit_length()
        return int(min(1 << (fitting.bit_length() - 1), enough))


def _enter_lane(usual: int) -> None:
    torch.get_num_threads()  # settles this thread's number, which the first kernel would undo
    torch.set_num_threads(1)
    # The call also set the default of future threads; a separate thread restores it.
    restoring = Thread(target=torch.set_num_threads, args=(usual,))
    restoring.start()
    restoring.join()


def _run_guarded(work: Work, pixels: torch.Tensor) -> Rows:
    return _guard(lambda: _rows_of(work(pixels)), len(pixels))


def _rows_of(results: dict[str, torch.Tensor]) -> Rows:
    return {name: values.cpu().numpy() for name, values in results.items()}


def current_gpu(device: str) -> int | None:
    """Return the number of the GPU that this thread computes on, or None if not on CUDA."""
    return torch.cuda.current_device() if device == "cuda" else None


def on_gpu(number: int | None) -> AbstractContextManager[Any]:
    """Return the context in which this thread computes on that GPU.

    The current GPU is a property of each thread: a new thread starts on the first.
    """
    return nullcontext() if number is None else torch.cuda.device(number)


def why_no_gpu() -> tuple[str, str] | None:
    """Return why torch sees no GPU on a machine with an NVIDIA driver, and what to do about it.

    Returns None if torch sees a GPU or the machine has no driver.
    """
    if torch.cuda.is_available() or not _has_driver():
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU", "Unset it."
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a build without CUDA",
            "Install a build of torch for CUDA, such as `make setup TORCH=torch==2.13.0`.",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:  # torch raises several kinds, by what is amiss
        reason = one_line(error).split(". ")[0]
        if "too old" in reason:
            return (
                f"the NVIDIA driver is too old for torch {torch.__version__}: {reason}",
                f"Update the driver, or install a torch for an older CUDA than {torch.version.cuda}"
                " with `make setup TORCH=…`.",
            )
        return reason, "Run nvidia-smi, and see that it lists the GPU."
    return "torch finds no GPU", "Run nvidia-smi, and see that it lists the GPU."


def _has_driver() -> bool:
    return shutil.which("nvidia-smi") is not None or os.path.exists("/dev/nvidiactl")


def guard_memory(call: Callable[[], T], what: str) -> T:
    """Return the result of `call`; if memory runs out, free the device's and raise.

    Parameters
    ----------
    what : str
        The message: what does not fit and what to do about it, "the tower does not fit; …".

    Raises
    ------
    DeviceMemoryError
        `call` ran out of memory, in any library.
    """
    try:
        return call()
    except DeviceMemoryError:
        raise
    except Exception as error:
        if not is_memory_error(error):
            raise
        reason = one_line(error)
    # Not inside the handler: the error's frames hold the tensors that are to be freed.
    free_memory()
    raise DeviceMemoryError(f"{what} torch said: {reason[:200]}")


def free_memory() -> None:
    """Release the device's unused memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def is_memory_error(error: BaseException) -> bool:
    """Return whether an error means that the device or the host is out of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in words for phrase in _NO_MEMORY)


def _guard(call: Callable[[], T], n_images: int) -> T:
    what = f"a batch of {n_images} does not fit the device's memory; a smaller one may."
    return guard_memory(call, what)


def _peak_bytes(run: Callable[[int], object], n_images: int) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(n_images)
    return int(torch.cuda.max_memory_allocated() - before)


def pinned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return an empty tensor in pinned memory, which a GPU copies asynchronously."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Keep fp32 products and convolutions in fp32: cudnn would use TF32, of 10 bits, by default."""
    switches = _tf32_switches()
    before = [getattr(place, name) for place, name, _ in switches]
    try:
        for place, name, off in switches:
            setattr(place, name, off)
        yield
    finally:
        for (place, name, _), value in zip(switches, before, strict=True):
            setattr(place, name, value)


def _tf32_switches() -> list[tuple[Any, str, Any]]:
    """Return the settings that control TF32, each with the value that turns it off.

    torch 2.9 introduced new settings, in whose presence the old ones raise.
    """
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):
        return [(matmul, "fp32_precision", "ieee"), (cudnn.conv, "fp32_precision", "ieee")]
    return [(matmul, "allow_tf32", False), (cudnn, "allow_tf32", False)]
