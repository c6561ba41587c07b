"""The oracle is transformers' `output_hidden_states`, on small random checkpoints."""

import gc
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from made_backbones import CONFIGS, save
from made_gemma import SIZE, VISION, make_gemma, quiet

from medembed.core.errors import EncoderError
from medembed.encoders.block_outputs import find_block_list, watch_blocks
from medembed.encoders.loading import load_encoder
from medembed.encoders.torch_encoder import TorchEncoder, Tuning
from medembed.extraction.canary import compute_canary

N_BEFORE = {"DeiT": 2, "DINOv3ViT": 4, "Dinov2": 1, "Dinov2WithRegisters": 5, "ViT": 1}


def make_siglip(directory: Path) -> Any:
    """Save a random SigLIP with its pooling head, and return its tower."""
    torch.manual_seed(0)
    known = {**VISION, "vision_use_head": True}
    config = transformers.SiglipVisionConfig(**known, model_type="siglip_vision_model")
    model = transformers.SiglipVisionModel(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    size = {"height": SIZE, "width": SIZE}
    processor = transformers.SiglipImageProcessorPil(
        size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    with quiet():
        model.save_pretrained(directory)
        processor.save_pretrained(directory)
    return model


def make_tower(directory: Path, family: str) -> Any:
    if family == "MedGemma":
        return make_gemma(directory).model.vision_tower
    return make_siglip(directory) if family == "Siglip" else save(directory, family)


def load(directory: Path, **options: Any) -> TorchEncoder:
    encoder = load_encoder(directory, device="cpu", **options)
    assert isinstance(encoder, TorchEncoder)
    return encoder


def black_and_noise(encoder: TorchEncoder, n: int = 3) -> np.ndarray:
    size = encoder.preprocessing
    rng = np.random.default_rng(3)
    return rng.integers(0, 256, (n, size.height, size.width), dtype=np.uint8)


def of_blocks(encoder: TorchEncoder) -> list[str]:
    return [name for name in encoder.dimensions if "@" in name]


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Sums of products depend on how many threads share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("family", ["MedGemma", "Siglip", *sorted(CONFIGS)])
def test_poolings_of_blocks_equal_transformers_hidden_states_bit_for_bit(
    tmp_path: Path, family: str
) -> None:
    model = make_tower(tmp_path, family)
    encoder = load(tmp_path)
    pixels = black_and_noise(encoder, 1)
    rows = encoder.encode(pixels, list(encoder.dimensions))
    values = encoder.normalise(torch.from_numpy(pixels))
    with torch.inference_mode():
        seen = model(pixel_values=values, output_hidden_states=True)
    states = seen.hidden_states
    n_blocks = len(states) - 1
    classed = family in N_BEFORE
    bases = ("mean", "max", "cls") if classed else ("mean", "max")
    assert of_blocks(encoder) == [f"{b}@{k}" for b in bases for k in range(1, n_blocks + 1)]
    for k, state in enumerate(states[1:], 1):
        tokens = state.flatten(2).transpose(1, 2) if state.ndim == 4 else state
        tokens = tokens[:, N_BEFORE.get(family, 0) :]
        assert np.array_equal(rows[f"mean@{k}"], tokens.mean(dim=1).numpy())
        assert np.array_equal(rows[f"max@{k}"], tokens.amax(dim=1).numpy())
        if classed:
            assert np.array_equal(rows[f"cls@{k}"], state[:, 0].numpy())
        assert rows[f"mean@{k}"].shape[1:] == encoder.dimensions[f"mean@{k}"]


@pytest.mark.parametrize("family", ["MedGemma", "Dinov2", "ConvNext"])
def test_the_other_poolings_are_the_same_with_and_without_blocks(
    tmp_path: Path, family: str
) -> None:
    make_tower(tmp_path, family)
    encoder = load(tmp_path)
    pixels = black_and_noise(encoder)
    usual = [name for name in encoder.dimensions if "@" not in name]
    alone = encoder.encode(pixels, usual)
    together = encoder.encode(pixels, [*usual, *of_blocks(encoder)])
    assert all(np.array_equal(alone[name], together[name]) for name in usual)
    some = encoder.encode(pixels, ["mean@1"])
    assert list(some) == ["mean@1"]
    assert np.array_equal(some["mean@1"], together["mean@1"])


def test_no_hidden_state_outlives_the_next_block(tmp_path: Path) -> None:
    """Of twelve blocks' outputs never more than two are alive: memory does not grow with blocks."""
    save(tmp_path, "Dinov2", num_hidden_layers=12)
    encoder = load(tmp_path)
    states: list[weakref.ref[torch.Tensor]] = []
    most = 0
    blocks = find_block_list(encoder.model)
    assert blocks is not None

    def count(_module: Any, _inputs: Any, output: Any) -> None:
        nonlocal most
        states.append(weakref.ref(output[0] if isinstance(output, tuple) else output))
        gc.collect()
        most = max(most, sum(state() is not None for state in states))

    for block in blocks[1]:
        block.register_forward_hook(count)
    encoder.encode(black_and_noise(encoder), of_blocks(encoder))
    assert len(states) == 12
    assert most <= 2


def test_a_class_token_that_is_kept_does_not_keep_its_tokens(tmp_path: Path) -> None:
    save(tmp_path, "ViT")
    encoder = load(tmp_path)
    kept = encoder._compute(torch.from_numpy(black_and_noise(encoder)), ("cls@1", "cls@2"))
    for vectors in kept.values():
        assert vectors.untyped_storage().nbytes() == vectors.numel() * 4


def test_batches_on_several_threads_do_not_mix(tmp_path: Path) -> None:
    save(tmp_path, "ViT", num_hidden_layers=6)
    encoder = load(tmp_path)
    names = of_blocks(encoder)
    batches = [black_and_noise(encoder, 1)] + [
        np.full((1, *black_and_noise(encoder).shape[1:]), grey, np.uint8) for grey in (0, 99, 255)
    ]
    alone = [encoder.encode(pixels, names) for pixels in batches]
    for _ in range(3):
        waiting = [encoder.submit(pixels, names) for pixels in batches]
        for wait, expected in zip(waiting, alone, strict=True):
            rows = wait()
            assert all(np.array_equal(rows[name], expected[name]) for name in names)


def test_compiled_blocks_hand_over_the_same(tmp_path: Path, monkeypatch: Any) -> None:
    """As on CUDA: blocks are compiled first, for other poolings than are asked for later."""
    make_gemma(tmp_path)
    encoder = load(tmp_path)
    pixels, names = black_and_noise(encoder), [*of_blocks(encoder), "mean"]
    eager = encoder.encode(pixels, names)
    found = encoder.find_blocks()
    assert found is not None
    n_compiled = 0

    def backend(graph: Any, _inputs: Any) -> Any:
        nonlocal n_compiled
        n_compiled += 1
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    encoder.tuning = Tuning(encoder.model, list(found[1]))
    encoder.tuning._begin(len(pixels))
    encoder.encode(pixels, ["mean"])
    assert n_compiled
    before = n_compiled
    compiled = encoder.encode(pixels, names)
    assert all(np.allclose(compiled[name], eager[name], atol=1e-6) for name in names)
    assert n_compiled == before  # one and the same code, whoever listens
    other = encoder.encode(pixels[:2], names)  # of another size: eagerly
    assert np.allclose(other["mean@1"], eager["mean@1"][:2], atol=1e-6)
    encoder.tuning._end()


def test_blocks_that_did_not_run_are_not_passed_over(tmp_path: Path) -> None:
    save(tmp_path, "ViT")
    encoder = load(tmp_path)
    blocks = find_block_list(encoder.model)
    assert blocks is not None
    encoder.model.layers = torch.nn.ModuleList(blocks[1])  # nobody can watch these
    with pytest.raises(EncoderError, match="gave no output for mean@2"):
        encoder.encode(black_and_noise(encoder), ["mean@2"])


def test_nobody_listens_after_an_error(tmp_path: Path) -> None:
    save(tmp_path, "ViT")
    encoder = load(tmp_path)
    heard: list[int] = []

    def fail(number: int, _output: torch.Tensor) -> None:
        heard.append(number)
        raise ValueError("stop")

    values = encoder.normalise(torch.from_numpy(black_and_noise(encoder)))
    with pytest.raises(ValueError, match="stop"), watch_blocks(fail):
        encoder.model(pixel_values=values)
    encoder.model(pixel_values=values)
    assert heard == [1]


def test_names_of_tensors_and_the_fingerprint_stay(tmp_path: Path) -> None:
    model = save(tmp_path / "a", "Dinov2")
    encoder = load(tmp_path / "a")
    assert list(encoder.model.state_dict()) == list(model.state_dict())
    with quiet():
        encoder.model.save_pretrained(tmp_path / "b")
    for path in (tmp_path / "a").glob("preprocessor*.json"):
        (tmp_path / "b" / path.name).write_bytes(path.read_bytes())
    assert load(tmp_path / "b").fingerprint == encoder.fingerprint


def test_bf16_pools_blocks_in_fp32_near_the_reference(tmp_path: Path) -> None:
    make_gemma(tmp_path)
    exact, rounded = load(tmp_path), load(tmp_path, precision="bf16")
    names = of_blocks(exact)
    a, b = (each.encode(black_and_noise(each), names) for each in (exact, rounded))
    for name in names:
        assert b[name].dtype == np.float32
        assert 0 < np.abs(a[name] - b[name]).max() < 0.1


def test_the_canary_covers_every_pooling_of_a_block(tmp_path: Path) -> None:
    make_gemma(tmp_path)
    encoder = load(tmp_path)
    assert set(compute_canary(encoder, of_blocks(encoder))["embeddings"]) == set(of_blocks(encoder))


def test_unknown_blocks_are_refused_with_what_there_is(tmp_path: Path) -> None:
    make_gemma(tmp_path / "tower")
    with pytest.raises(EncoderError, match=r"mean@3 is not offered by tower.*mean@1, mean@2"):
        load(tmp_path / "tower", poolings=["mean@3"])
    for name in ("mean@0", "mean@07", "grid4@2", "mean@", "mean@x", "pooler@all"):
        with pytest.raises(EncoderError, match=r"is unknown.*after block K.*mean@K"):
            load(tmp_path / "tower", poolings=[name])
    load(tmp_path / "tower", poolings=["mean", "mean@all"])
    with pytest.raises(EncoderError, match="cls@all is not offered"):
        load(tmp_path / "tower", poolings=["cls@all"])
