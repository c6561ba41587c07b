"""What all towers share, shown on one of a few lines; CUDA's part on a stand-in device."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from medembed.core.errors import DeviceMemoryError, EncoderError
from medembed.encoders import devices, loading
from medembed.encoders.devices import Cuda, InTurn, Lanes, device_of, set_precision
from medembed.encoders.features import Features, token_poolings
from medembed.encoders.loading import load_encoder
from medembed.encoders.preprocessing import Preprocessing
from medembed.encoders.protocol import Encoder, PipelinedEncoder
from medembed.encoders.torch_encoder import TorchEncoder, Tuning
from medembed.finetuning.training import explaining_memory

SIDE = 16
HALF = (0.5, 0.5, 0.5)
GREY = Preprocessing(SIDE, SIDE, "stretch", "bilinear", HALF, HALF, 1 / 255)
UNEVEN = Preprocessing(SIDE, SIDE, "stretch", "bilinear", (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), 1 / 255)


class Patches(torch.nn.Module):
    """A tower that gives each patch of 4 × 4 pixels its 48 values."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.unfold(pixel_values * self.scale, 4, stride=4).transpose(1, 2)


class PatchEncoder(TorchEncoder):
    """All that a new encoder takes."""

    @property
    def dimensions(self) -> Mapping[str, tuple[int, ...]]:
        return token_poolings(48, (SIDE // 4, SIDE // 4))

    def features(self, pixel_values: torch.Tensor) -> Features:
        return Features(self.tower(pixel_values), (SIDE // 4, SIDE // 4))


def make(preprocessing: Preprocessing = GREY, precision: str = "fp32", **known: Any) -> Any:
    model = known.pop("model", None) or Patches()
    known = {"fingerprint": "0" * 64, "source": "patches", "precision": precision, **known}
    return PatchEncoder(model, preprocessing, **known)


def batch(n: int = 5) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (n, SIDE, SIDE), dtype=np.uint8)


def expected(pixels: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Tokens in float64: per patch, channel by channel, its 16 pixels row by row."""
    mean, std = (np.array(v)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
    values = (pixels[:, None] / 255 - mean) / std
    patches = values.reshape(len(pixels), 3, 4, 4, 4, 4).transpose(0, 2, 4, 1, 3, 5)
    return np.asarray(patches.reshape(len(pixels), 16, 48))


@pytest.mark.parametrize("preprocessing", [GREY, UNEVEN])
def test_a_new_encoder_is_one_small_class(preprocessing: Preprocessing) -> None:
    encoder = make(preprocessing)
    assert isinstance(encoder, PipelinedEncoder)
    pixels = batch()
    rows = encoder.encode(pixels, ["max", "grid4", "mean"])
    tokens = expected(pixels, preprocessing)
    assert list(rows) == ["max", "grid4", "mean"]
    assert np.abs(rows["mean"] - tokens.mean(axis=1)).max() < 1e-5
    assert np.abs(rows["max"] - tokens.max(axis=1)).max() < 1e-5
    assert np.abs(rows["grid4"] - tokens).max() < 1e-5  # 4 × 4 tokens are their own grid
    assert all(row.dtype == np.float32 for row in rows.values())


def test_the_abstract_part_cannot_be_left_out() -> None:
    class Half(TorchEncoder):
        def features(self, pixel_values: torch.Tensor) -> Features:
            return Features(pixel_values.flatten(2), (1, 1))

    with pytest.raises(TypeError, match="dimensions"):
        Half(Patches(), GREY, fingerprint="", source="half")  # type: ignore[abstract]


def test_batches_are_collected_in_any_order_and_copied_before_submit_returns() -> None:
    encoder = make()
    batches = [batch(n) for n in (1, 4, 2, 3)]
    wanted = [encoder.encode(pixels, ["mean"])["mean"] for pixels in batches]
    handed = [pixels.copy() for pixels in batches]
    collects = []
    for pixels in handed:
        collects.append(encoder.submit(pixels, ["mean"]))
        pixels[...] = 0
    for place in (2, 0, 3, 1):
        assert np.array_equal(collects[place]()["mean"], wanted[place])


def test_a_read_only_batch_is_taken_without_a_word() -> None:
    pixels = batch()
    pixels.flags.writeable = False
    assert make().encode(pixels, ["mean"])["mean"].shape == (5, 48)


def test_no_images_give_no_rows_of_every_shape() -> None:
    rows = make().encode(np.zeros((0, SIDE, SIDE), np.uint8), ["mean", "grid4"])
    assert (rows["mean"].shape, rows["grid4"].shape) == ((0, 48), (0, 16, 48))


@pytest.mark.parametrize(
    ("pixels", "poolings", "said"),
    [
        (batch().astype(np.float32), ["mean"], r"reads uint8 \(n, 16, 16\); this is float32"),
        (batch()[0], ["mean"], "prepare"),
        (batch(), ["pooler"], r"pooler is not offered by patches\. Choose from: mean, max, grid4"),
        (batch(), [], r"\(none\)"),
    ],
)
def test_submit_refuses_at_once(pixels: np.ndarray, poolings: list[str], said: str) -> None:
    with pytest.raises(EncoderError, match=said):
        make().submit(pixels, poolings)


@pytest.mark.parametrize("pooling", ["mean", "grid4"])
def test_a_row_that_is_not_finite_is_named(pooling: str) -> None:
    model = Patches()
    model.scale.data.fill_(1e37)
    steep = Preprocessing(SIDE, SIDE, "stretch", "bilinear", HALF, (0.01, 0.01, 0.01), 1 / 255)
    pixels = np.full((5, SIDE, SIDE), 255, np.uint8)  # (1 - 0.5) / 0.01 * 1e37 is beyond 3.4e38
    pixels[2] = 128
    with pytest.raises(EncoderError, match=f"4 of 5 {pooling} embeddings are not finite in fp32"):
        make(steep, model=model).encode(pixels, [pooling])


def test_bf16_multiplies_in_bf16_and_keeps_all_else_in_fp32() -> None:
    seen = []

    class Watched(Patches):
        def __init__(self) -> None:
            super().__init__()
            self.same = torch.nn.Linear(48, 48, bias=False)
            self.same.weight.data = torch.eye(48)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            tokens = super().forward(pixel_values)
            product = self.same(tokens)
            seen.append((tokens.dtype, product.dtype))
            return product

    model = Watched()
    set_precision(model, "bf16")
    assert {name: t.dtype for name, t in model.state_dict().items()} == {
        "scale": torch.float32,
        "same.weight": torch.bfloat16,
    }
    rows = make(precision="bf16", model=model).encode(batch(), ["mean"])["mean"]
    assert seen == [(torch.float32, torch.bfloat16)]
    assert rows.dtype == np.float32
    assert 0 < np.abs(rows - expected(batch(), GREY).mean(axis=1)).max() < 0.01


def test_the_reference_is_loaded_again_or_said_to_be_out_of_reach() -> None:
    exact = make()
    assert exact.reference() is exact
    assert make(precision="bf16", reload=lambda: exact).reference() is exact
    with pytest.raises(EncoderError, match=r"patches runs in bf16 .* --precision fp32"):
        make(precision="bf16").reference()


# The CPU.


@pytest.fixture
def three_threads() -> Iterator[None]:
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(usual)


class Counting(Patches):
    """Notes the thread and torch's number of threads of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []
        self.together = threading.Barrier(3, timeout=20)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        self.together.wait()  # until three lanes are at it
        (pixel_values.repeat(64, 1, 1, 1) + 1).sum()  # large enough to be shared among threads
        self.seen.append((threading.current_thread().name, torch.get_num_threads()))
        return super().forward(pixel_values)


def test_lanes_have_one_thread_each_and_leave_the_callers_alone(three_threads: None) -> None:
    model = Counting()
    encoder = make(model=model)
    assert encoder.in_flight == 4
    collects = [encoder.submit(batch(), ["mean"]) for _ in range(6)]
    for collect in collects:
        collect()
    assert len({thread for thread, _ in model.seen}) == 3
    assert [n for _, n in model.seen] == [1] * 6
    assert torch.get_num_threads() == 3
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [3]  # what one lane set must not become every new thread's


def test_a_rows_bits_do_not_depend_on_the_number_of_cores(three_threads: None) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 128, 128), dtype=np.uint8)
    many = load_encoder("demo", device="cpu", precision="fp32")
    torch.set_num_threads(1)
    one = load_encoder("demo", device="cpu", precision="fp32")
    assert (many.in_flight, one.in_flight) == (4, 2)  # type: ignore[attr-defined]
    for pooling, rows in one.encode(pixels, ["mean", "max", "grid4"]).items():
        assert np.array_equal(many.encode(pixels, [pooling])[pooling], rows)


@pytest.mark.parametrize(
    ("side", "size"), [(896, 1), (448, 4), (224, 8), (128, 8), (32, 8), (1000, 1)]
)
def test_a_cpus_batch_is_small_and_the_same_for_any_number_of_images(side: int, size: int) -> None:
    """A resumed run must make the batches that an uninterrupted one makes."""
    assert {Lanes(1).choose_batch(never, side * side, n) for n in (1, 40, 40_000)} == {size}
    assert InTurn("mps").choose_batch(never, side * side, 9) == min(
        8, max(1, 8 * 896**2 // side**2)
    )


def test_warming_up_a_cpu_computes_nothing() -> None:
    encoder = make(model=torch.nn.Identity())  # would fail
    assert encoder.warm_up(["mean"], n_images=100, on_status=never) == 8
    assert encoder.warm_up(["mean"], n_images=100, batch_size=7) == 7
    with pytest.raises(EncoderError, match="median"):
        encoder.warm_up(["median"], n_images=1)


def test_a_device_without_streams_runs_in_turn() -> None:
    runner = InTurn("cpu")
    assert runner.in_flight == 1
    rows = runner.submit(lambda pixels: {"sum": pixels.float().sum(dim=(1, 2))}, batch())()
    assert np.array_equal(rows["sum"], batch().sum(axis=(1, 2)))
    assert isinstance(device_of("mps"), InTurn)


# Memory.

CPU_WORDS = "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory"


@pytest.mark.parametrize(
    ("error", "expected_error"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), DeviceMemoryError),
        (RuntimeError(CPU_WORDS), DeviceMemoryError),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), DeviceMemoryError),
        (MemoryError("Unable to allocate 3 GiB"), DeviceMemoryError),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError),
        (ValueError("out of memory lane"), ValueError),
    ],
)
@pytest.mark.parametrize("runner", [Lanes(1), InTurn("cpu")])
def test_only_an_allocators_error_is_one_of_memory(
    runner: Any, error: Exception, expected_error: type[Exception]
) -> None:
    def fail(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        raise error

    with pytest.raises(expected_error) as raised:
        runner.submit(fail, batch())()
    assert type(raised.value) is expected_error
    if expected_error is DeviceMemoryError:
        assert "a batch of 5 does not fit" in str(raised.value)


def test_a_batch_beyond_the_real_allocator_is_an_error_of_memory() -> None:
    class Greedy(Patches):
        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return torch.empty(1 << 60, dtype=torch.uint8)

    encoder = make(model=Greedy())
    with pytest.raises(DeviceMemoryError, match=r"a batch of 5 .* smaller"):
        encoder.encode(batch(), ["mean"])


def test_what_a_failed_batch_held_is_freed_before_the_error_is_raised() -> None:
    freed: list[bool] = []

    class Held:
        def __del__(self) -> None:
            freed.append(True)

    def fail(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        held = Held()
        raise MemoryError(f"no room beside {id(held)}")

    collect = Lanes(1).submit(fail, batch())
    with pytest.raises(DeviceMemoryError) as raised:
        collect()
    assert freed == [True]
    assert raised.value.__context__ is None


# CUDA, with a stand-in for the device.


class Stand:
    """What `devices.Cuda` asks of torch.cuda, noting the order of calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: int = 1 << 20) -> None:
        self.calls: list[str] = []
        self.total, self.in_use, self.peak = total, 1000, 0
        self.ready = threading.Event()
        patches: dict[str, object] = {
            "Stream": lambda: SimpleNamespace(name="copies"),
            "Event": self.event,
            "current_stream": lambda: SimpleNamespace(
                wait_stream=lambda other: self.calls.append(f"wait for {other.name}")
            ),
            "stream": self.stream,
            "mem_get_info": lambda: (self.total - self.in_use, self.total),
            "memory_allocated": lambda: self.in_use,
            "memory_reserved": lambda: self.in_use,
            "reset_peak_memory_stats": lambda: setattr(self, "peak", 0),
            "max_memory_allocated": lambda: self.in_use + self.peak,
        }
        for name, fake in patches.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch.Tensor, "record_stream", self.record_stream)
        monkeypatch.setattr(devices, "pinned", lambda shape, dtype: torch.empty(shape, dtype=dtype))

    def event(self, blocking: bool) -> Any:
        assert blocking
        return SimpleNamespace(
            record=lambda stream: self.calls.append("record"),
            synchronize=lambda: self.calls.append("synchronize"),
        )

    def record_stream(self, stream: object) -> None:
        self.calls.append("keep for the stream")

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.calls.append(f"on {stream.name}")
        yield
        self.calls.append("off")


def test_cuda_queues_a_batch_and_waits_only_when_it_is_collected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand = Stand(monkeypatch)
    runner = Cuda("cpu")
    flags = []

    def work(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        stand.calls.append("work")
        flags.append(tf32())
        return {"sum": pixels.float().sum(dim=(1, 2))}

    before = tf32()
    pixels = batch()
    collect = runner.submit(work, pixels)
    queued = ["on copies", "off", "wait for copies", "keep for the stream", "work", "record"]
    assert stand.calls == queued
    pixels[...] = 0
    assert np.array_equal(collect()["sum"], batch().sum(axis=(1, 2)))
    assert stand.calls == [*queued, "synchronize"]
    assert flags == [("ieee", "ieee")]  # fp32 is fp32
    assert before == tf32()
    assert runner.in_flight == 2


def test_cudas_flags_are_put_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    Stand(monkeypatch)
    before = tf32()

    def fail(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(DeviceMemoryError):
        Cuda("cpu").submit(fail, batch())
    assert tf32() == before


@pytest.mark.parametrize(
    ("each", "fixed", "free", "side", "n_images", "size"),
    [
        (1000, 0, 100_000, 896, 10_000, 64),  # 80 would fit, and 64 MPixel are the most
        (1000, 0, 70_000, 896, 10_000, 32),  # 56 fit into 0.8 of it
        (1000, 30_000, 60_000, 896, 10_000, 16),  # 18 beside what every batch takes
        (1, 0, 100_000, 64, 10_000, 512),
        (1000, 0, 100_000, 448, 5, 8),  # no more than there are
        (1000, 0, 100_000, 448, 1, 1),
        (1000, 0, 500, 448, 100, 1),
        (0, 0, 100_000, 448, 10_000, 256),  # an allocator that shows no difference
    ],
)
def test_cudas_batch_is_the_largest_power_of_two_that_fits(
    monkeypatch: pytest.MonkeyPatch,
    each: int,
    fixed: int,
    free: int,
    side: int,
    n_images: int,
    size: int,
) -> None:
    stand = Stand(monkeypatch, total=free + 1000)

    def run(n: int) -> None:
        stand.peak = fixed + n * each

    assert Cuda("cpu").choose_batch(run, side * side, n_images) == size


def test_a_device_too_full_for_the_probe_gets_single_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Stand(monkeypatch)

    def run(n: int) -> None:
        if n > 1:
            raise DeviceMemoryError("full")

    assert Cuda("cpu").choose_batch(run, 448 * 448, 100) == 1


def tf32() -> tuple[str, str]:
    """What torch's own interface says about products and convolutions."""
    backends: Any = torch.backends
    return backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision


def test_an_older_torch_is_told_by_its_own_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    old: Any = SimpleNamespace(
        cuda=SimpleNamespace(matmul=SimpleNamespace(allow_tf32=True)),
        cudnn=SimpleNamespace(allow_tf32=True),
    )
    monkeypatch.setattr(torch, "backends", old)
    with devices._full_precision():
        assert not old.cuda.matmul.allow_tf32
        assert not old.cudnn.allow_tf32
    assert old.cuda.matmul.allow_tf32
    assert old.cudnn.allow_tf32


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling cublasCreate"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        MemoryError(),
    ],
)
def test_memory_that_is_not_enough_is_one_error_whoever_says_so(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    with pytest.raises(DeviceMemoryError, match="a batch of 5 does not fit"):
        InTurn("cpu").submit(fail, batch())  # type: ignore[arg-type]
    with pytest.raises(DeviceMemoryError, match="tower of patches in fp32, which"):
        make(precision="bf16", reload=fail).reference()
    monkeypatch.setattr(loading, "_load", fail)
    with pytest.raises(DeviceMemoryError, match=r"demo in bf16 does not fit.*--device"):
        load_encoder("demo", device="cpu", precision="bf16")
    with pytest.raises(DeviceMemoryError, match="larger --accumulate"), explaining(8):
        fail()


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="a bug"), explaining(8):
        raise RuntimeError("a bug")


def explaining(batch_size: int) -> Any:
    recipe: Any = SimpleNamespace(batch_size=batch_size, accumulate=1)
    return explaining_memory("unfreeze-1", recipe)


class StandRunner:
    """A device that takes `fits` images at most and a set time for a batch."""

    in_flight = 2

    def __init__(self, clock: list[float], fits: int = 64, seconds: float = 1.0) -> None:
        self.clock, self.fits, self.seconds = clock, fits, seconds

    def submit(self, work: Callable[..., Any], pixels: np.ndarray) -> Callable[[], Any]:
        if len(pixels) > self.fits:
            raise DeviceMemoryError("full")
        self.clock[0] += self.seconds
        results = work(torch.from_numpy(pixels))
        return lambda: {name: values.numpy() for name, values in results.items()}

    def choose_batch(self, run: Callable[[int], object], n_pixels: int, n_images: int) -> int:
        return 64


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[float]]:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    encoder = make()
    encoder.device = "cuda"
    encoder.runner = StandRunner(clock)
    return encoder, clock


def never(*_: object) -> None:
    raise AssertionError("not to be called")


@pytest.mark.parametrize(
    ("n_images", "seconds", "told"),
    [
        (64 * 461, 0.8, ["Warming up"]),  # 0.13 × 461 s = 59.9 s
        (64 * 462, 0.8, ["Warming up", "Compiling"]),  # 60.1 s
        (64 * 462, 1.1, ["Warming up", "Compiling", "Not compiled: it was not faster"]),
    ],
)
def test_the_tower_is_compiled_where_that_saves_more_than_it_takes(
    on_cuda: tuple[Any, list[float]],
    monkeypatch: pytest.MonkeyPatch,
    n_images: int,
    seconds: float,
    told: list[str],
) -> None:
    encoder, _ = on_cuda
    sizes: list[int] = []

    def compile_(model: Callable[..., Any], *, dynamic: bool) -> Callable[..., Any]:
        assert not dynamic

        def compiled(pixel_values: torch.Tensor) -> Any:
            sizes.append(len(pixel_values))
            encoder.runner.seconds = seconds
            return model(pixel_values=pixel_values)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    words: list[str] = []
    assert encoder.warm_up(["mean"], n_images=n_images, on_status=words.append) == 64
    assert words == told
    tried, compiled = "Compiling" in told, told[-1] == "Compiling"
    assert sizes == [64, 64] * tried  # once to compile, then timed
    assert encoder.describe()["compiled"] == compiled
    sizes.clear()
    wanted = make().encode(batch(64), ["mean"])["mean"]
    assert np.array_equal(encoder.encode(batch(64), ["mean"])["mean"], wanted)
    encoder.encode(batch(5), ["mean"])  # of another size: would be compiled anew
    assert sizes == [64] * compiled


def test_a_tower_that_cannot_be_compiled_runs_as_it_is(
    on_cuda: tuple[Any, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, _ = on_cuda

    def fail(pixel_values: torch.Tensor) -> None:
        raise RuntimeError("no compiler for this device")

    monkeypatch.setattr(torch, "compile", lambda model, dynamic: fail)
    words: list[str] = []
    assert encoder.warm_up(["mean"], n_images=10**6, on_status=words.append) == 64
    assert words == ["Warming up", "Compiling", "Not compiled: no compiler for this device"]
    rows = encoder.encode(batch(64), ["mean"])["mean"]
    assert np.array_equal(rows, make().encode(batch(64), ["mean"])["mean"])


@pytest.mark.parametrize(("fits", "size"), [(64, 64), (20, 16), (1, 1)])
def test_warming_up_halves_the_batch_until_it_fits(
    on_cuda: tuple[Any, list[float]], fits: int, size: int
) -> None:
    encoder, clock = on_cuda
    encoder.runner = StandRunner(clock, fits)
    assert encoder.warm_up(["mean"], n_images=1) == size
    encoder.runner = StandRunner(clock, 0)
    with pytest.raises(DeviceMemoryError, match="full"):
        encoder.warm_up(["mean"], n_images=1, batch_size=4)


def test_towers_are_traced_whole_by_the_compiler() -> None:
    """`fullgraph` fails at anything that would fall back to Python in the middle."""
    encoder: Any = load_encoder("demo", device="cpu", precision="fp32")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 128, 128), dtype=np.uint8)
    wanted = encoder.encode(pixels, ["mean"])["mean"]
    traced = torch.compile(encoder.model, dynamic=False, fullgraph=True, backend="eager")
    encoder.tuning = Tuning(encoder.model, compiled_for=2, _whole=traced)
    assert np.abs(encoder.encode(pixels, ["mean"])["mean"] - wanted).max() <= 1e-5


def test_one_compiled_block_serves_them_all_and_only_its_size_of_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tower's four blocks differ in their weights alone."""
    encoder: Any = load_encoder("demo", device="cpu", precision="fp32")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 128, 128), dtype=np.uint8)
    wanted = encoder.encode(pixels, ["mean"])["mean"]
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    blocks = list(encoder.find_blocks()[1])
    tuning = Tuning(encoder.model, blocks)

    def timer() -> float:
        encoder.encode(pixels, ["mean"])
        return 1.0

    encoder.tuning = tuning
    tuning.compile(timer, n_images=10**6, batch_size=3, seconds=2.0, on_status=lambda words: None)
    assert len(blocks) == 4
    assert counter.frame_count == 1
    assert np.array_equal(encoder.encode(pixels, ["mean"])["mean"], wanted)
    encoder.encode(pixels[:2], ["mean"])  # of another size: as it is
    assert counter.frame_count == 1
    assert encoder.copy().describe()["compiled"] is False
    assert all(block._compiled_call_impl is None for block in encoder.copy().find_blocks()[1])


def test_the_attention_kernel_is_the_one_with_the_fastest_batch(
    on_cuda: tuple[Any, list[float]],
) -> None:
    encoder, clock = on_cuda
    seen = []

    class Watched(StandRunner):
        def submit(self, work: Callable[..., Any], pixels: np.ndarray) -> Callable[[], Any]:
            cuda = torch.backends.cuda
            kernels = {
                "flash": cuda.flash_sdp_enabled(),
                "efficient": cuda.mem_efficient_sdp_enabled(),
                "cudnn": cuda.cudnn_sdp_enabled(),
            }
            on = [name for name, enabled in kernels.items() if enabled]
            seen.append(on)
            if on == ["efficient"]:
                raise RuntimeError("No available kernel. Aborting execution.")
            self.seconds = 0.5 if on == ["flash"] else 0.7 if on == ["cudnn"] else 1.0
            return super().submit(work, pixels)

    encoder.runner = Watched(clock)
    assert encoder.warm_up(["mean"], n_images=64) == 64
    assert [on for on in seen if len(on) == 1][::2][:3] == [["cudnn"], ["flash"], ["efficient"]]
    assert encoder.describe()["attention"] == "flash"
    with encoder.tuning.active(64):
        assert torch.backends.cuda.math_sdp_enabled()  # for a product that no other kernel does


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: its path is not run")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_real_cuda_device_gives_what_the_cpu_gives(precision: str) -> None:
    exact = load_encoder("demo", device="cpu", precision="fp32")
    encoder: Encoder = load_encoder("demo", device="cuda", precision=precision)
    assert isinstance(encoder, PipelinedEncoder)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 128, 128), dtype=np.uint8)
    assert encoder.warm_up(["mean", "grid4"], n_images=96) == 128
    collects = [encoder.submit(part, ["mean", "grid4"]) for part in pixels]
    for part, collect in zip(pixels, collects, strict=True):
        collected = collect()
        for pooling, rows in exact.encode(part, ["mean", "grid4"]).items():
            tolerance = (1e-4 if precision == "fp32" else 0.05) * np.abs(rows).max()
            assert np.abs(collected[pooling] - rows).max() <= tolerance
    assert encoder.reference().precision == "fp32"
