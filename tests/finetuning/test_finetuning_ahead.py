"""What training reads is read ahead, on its own GPU, and what does not fit is halved."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from made_finetuning import make_cohort, make_tower, one_thread, tune

from medembed.core.errors import DeviceMemoryError
from medembed.dataset.manifest import Manifest, read_manifest
from medembed.encoders.devices import Lanes
from medembed.encoders.loading import load_encoder
from medembed.encoders.protocol import PipelinedEncoder
from medembed.finetuning import batches as images_module
from medembed.finetuning import frozen_features
from medembed.finetuning.batches import compute_rows, take_ahead
from medembed.finetuning.frozen_features import (
    PipelinedTrunk,
    TrunkEncoder,
    fill_trunk_cache,
    make_trunk,
)
from medembed.finetuning.network import Network
from medembed.results.runs import open_run

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
BUG = RuntimeError("a bug")
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")


class Numbers:
    """Row i is (i, i²); each part read is noted."""

    def __init__(self) -> None:
        self.begun: list[list[int]] = []
        self.came = threading.Condition()

    def take(self, rows: np.ndarray, device: str) -> torch.Tensor:
        with self.came:
            self.begun.append(rows.tolist())
            self.came.notify_all()
        return torch.from_numpy(np.stack([rows, rows**2], axis=1).astype(np.float32)).to(device)

    def wait_for(self, n_parts: int) -> bool:
        with self.came:
            return self.came.wait_for(lambda: len(self.begun) >= n_parts, timeout=30)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("reading")]


# Reading ahead


def test_the_next_part_is_read_while_one_computes_and_no_more() -> None:
    numbers, parts = Numbers(), [np.arange(3), np.arange(3, 5), np.array([9, 1])]
    for place, taken in enumerate(take_ahead(numbers, parts, "cpu")):
        assert numbers.wait_for(min(place + 2, 3))
        assert len(numbers.begun) == min(place + 2, 3)
        assert taken[:, 0].tolist() == parts[place].tolist()
    assert list(take_ahead(numbers, [], "cpu")) == []


def test_an_error_comes_with_its_part_and_leaves_no_thread() -> None:
    class Torn(Numbers):
        def take(self, rows: np.ndarray, device: str) -> torch.Tensor:
            if 7 in rows:
                raise OSError("a torn page")
            return super().take(rows, device)

    taking = take_ahead(Torn(), [np.arange(3), np.array([7]), np.arange(2)], "cpu")
    assert len(next(taking)) == 3
    with pytest.raises(OSError, match="torn page"):
        next(taking)
    early = take_ahead(Numbers(), [np.arange(3)] * 3, "cpu")
    next(early)
    early.close()
    assert readers() == []


def test_on_cuda_parts_are_read_into_pinned_memory_by_the_processs_own_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, bool]] = []
    chosen = threading.local()

    @contextmanager
    def on_gpu(number: int) -> Iterator[None]:
        chosen.number = number
        yield

    def pinned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        seen.append((chosen.number, threading.current_thread().name.startswith("reading")))
        return torch.empty(shape, dtype=dtype)

    monkeypatch.setattr(images_module, "current_gpu", lambda device: 3)
    monkeypatch.setattr(images_module, "on_gpu", on_gpu)
    monkeypatch.setattr(images_module, "pinned", pinned)
    taken = list(take_ahead(Numbers(), [np.arange(2), np.arange(4)], "cpu"))
    assert [part[:, 1].tolist() for part in taken] == [[0, 1], [0, 1, 4, 9]]
    assert seen == [(3, True), (3, True)]


# What does not fit


def fitting(most: int, error: BaseException, sizes: list[int]) -> Callable[..., torch.Tensor]:
    def compute(taken: torch.Tensor) -> torch.Tensor:
        sizes.append(len(taken))
        if len(taken) > most:
            raise error
        return taken.sum(dim=1)

    return compute


@pytest.mark.parametrize("error", [FULL, CUBLAS, MemoryError()])
@pytest.mark.parametrize(
    ("most", "n_rows", "size", "sizes"),
    [
        (8, 10, 4, [4, 4, 2]),
        (3, 10, 8, [8, 4, 2, 2, 2, 2, 2]),
        (2, 3, 16, [3, 1, 1, 1]),  # half of what there is, not of what was asked for
        (1, 2, 2, [2, 1, 1]),
    ],
)
def test_batches_are_halved_until_they_fit_and_no_row_is_lost(
    error: BaseException, most: int, n_rows: int, size: int, sizes: list[int]
) -> None:
    seen: list[int] = []
    rows = np.random.default_rng(0).permutation(n_rows)
    found = compute_rows(fitting(most, error, seen), Numbers(), rows, "cpu", size)
    assert np.concatenate(list(found)).tolist() == (rows + rows**2).tolist()
    assert seen == sizes


def test_rows_that_were_done_before_memory_ran_out_are_not_done_again() -> None:
    sizes: list[int] = []

    def compute(taken: torch.Tensor) -> torch.Tensor:
        sizes.append(len(taken))
        if len(sizes) in (3, 6):  # others use the device too
            raise torch.OutOfMemoryError("CUDA out of memory")
        return taken.sum(dim=1)

    rows = np.arange(20)[::-1].copy()
    found = np.concatenate(list(compute_rows(compute, Numbers(), rows, "cpu", 4)))
    assert found.tolist() == (rows + rows**2).tolist()
    assert sizes == [4, 4, 4, 2, 2, 2, *[1] * 8]


def test_one_row_that_does_not_fit_and_other_errors_are_raised() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        list(compute_rows(fitting(0, FULL, []), Numbers(), np.arange(4), "cpu", 4))
    sizes: list[int] = []
    with pytest.raises(RuntimeError, match="a bug"):
        list(compute_rows(fitting(0, BUG, sizes), Numbers(), np.arange(4), "cpu", 4))
    assert sizes == [4]
    assert readers() == []


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("ahead")
    make_cohort(home)
    make_tower(home / "tower")
    return home


def test_evaluation_that_does_not_fit_changes_no_result(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(home, home / "tower", tmp_path / "plain", unfreeze="1")
    forward, n_failed = Network.forward, [0]

    def capped(network: Network, images: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() and len(images) > 5:
            n_failed[0] += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(network, images)

    monkeypatch.setattr(Network, "forward", capped)
    tune(home, home / "tower", tmp_path / "capped", unfreeze="1")
    assert n_failed[0] > 0
    plain, found = (open_run(tmp_path / r).predictions() for r in ("plain", "capped"))
    assert np.abs(plain["probability"] - found["probability"]).max() < 1e-5


# The trunk


class Runner(Lanes):
    """A device that takes some images at most, and notes its batches and who hands them over."""

    def __init__(self, fits: int = 99) -> None:
        super().__init__(1)
        self.fits, self.sizes, self.threads = fits, list[int](), set[str]()

    def submit(self, work: Any, pixels: np.ndarray) -> Any:
        self.sizes.append(len(pixels))
        self.threads.add(threading.current_thread().name)
        if len(pixels) > self.fits:
            raise DeviceMemoryError("full")
        return super().submit(work, pixels)

    def choose_batch(self, run: Callable[[int], object], n_pixels: int, n_images: int) -> int:
        run(2)
        return 16


def on_cuda(home: Path, runner: Runner) -> Any:
    """Load the tower as one on CUDA, whose device is pretended."""
    encoder: Any = load_encoder(home / "tower", device="cpu", precision="fp32")
    encoder.device, encoder.runner = "cuda", runner
    return encoder


def manifest_of(home: Path) -> Manifest:
    return read_manifest(home / "manifest.csv")


@pytest.mark.parametrize(("fits", "expected"), [(99, {16}), (5, {16, 8, 4})])
def test_the_trunk_goes_through_the_devices_own_queue(
    home: Path, tmp_path: Path, fits: int, expected: set[int]
) -> None:
    manifest, runner = manifest_of(home), Runner(fits)
    encoder = on_cuda(home, runner)
    made = make_trunk(encoder, 2, "fp32")
    assert isinstance(made, PipelinedEncoder)
    assert made.reference() is made
    runner.sizes.clear()
    cache = fill_trunk_cache(tmp_path / "cuda", made, manifest, home / "images")
    assert set(runner.sizes) == {2, *expected}
    assert runner.threads == {threading.current_thread().name}  # a new one begins on another GPU
    plain = load_encoder(home / "tower", device="cpu", precision="fp32")
    own = make_trunk(plain, 2, "fp32")  # type: ignore[arg-type]
    assert type(own) is TrunkEncoder
    with one_thread():
        other = fill_trunk_cache(tmp_path / "cpu", own, manifest, home / "images")
    keys = manifest.rows["sha256"]
    tokens = [
        frozen_features.TokenImages(c, pd.DataFrame({"sha256": keys})) for c in (cache, other)
    ]
    found = [images.take(np.arange(len(keys)), "cpu") for images in tokens]
    assert (found[0] - found[1]).abs().max() < 1e-5


def test_a_trunks_batch_is_bounded_by_the_hosts_memory(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Any = make_trunk(on_cuda(home, Runner()), 1, "fp32")
    assert made.warm_up(["tokens"], n_images=99) == 16
    row = 4 * 16 * 32  # bytes of an image's tokens
    monkeypatch.setattr(frozen_features, "_HOST_BYTES", 5 * row)
    assert made.warm_up(["tokens"], n_images=99) == 5
    monkeypatch.setattr(frozen_features, "_HOST_BYTES", 1)
    assert made.warm_up(["tokens"], n_images=99) == 1
    assert made.warm_up(["tokens"], n_images=99, batch_size=7) == 7


def test_a_trunk_on_the_cpu_is_halved_too(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, sizes = TrunkEncoder._compute, []

    def capped(own: TrunkEncoder, images: torch.Tensor) -> Any:
        sizes.append(len(images))
        if len(images) > 3:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return compute(own, images)

    monkeypatch.setattr(TrunkEncoder, "_compute", capped)
    encoder: Any = load_encoder(home / "tower", device="cpu", precision="fp32")
    cache = fill_trunk_cache(
        tmp_path / "cache", make_trunk(encoder, 1, "fp32"), manifest_of(home), home / "images"
    )
    assert len(cache.keys()) == manifest_of(home).rows["sha256"].nunique()
    assert {1, 2, 4, 8} <= set(sizes)  # a batch that was read ahead may fail at its own size too
    assert max(sizes) == 8


@pytest.mark.parametrize("error", [FULL, CUBLAS])
def test_a_trunk_that_does_not_fit_beside_its_encoder_says_so(
    home: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    encoder = on_cuda(home, Runner())

    def fail() -> None:
        raise error

    monkeypatch.setattr(encoder, "copy", fail)
    with pytest.raises(DeviceMemoryError, match=r"the trunk of tower does not fit .* --device"):
        make_trunk(encoder, 1, "fp32")
    assert issubclass(PipelinedTrunk, TrunkEncoder)
