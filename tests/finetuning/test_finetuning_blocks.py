"""Which blocks an encoder has, which of its tensors training changes, and what memory it keeps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_backbones import CONFIGS, SIZE, save
from made_finetuning import different, make_cohort, make_tower, saved_bytes, state_of, tune

from medembed.core.errors import EncoderError, TrainingDataError
from medembed.encoders.loading import load_encoder
from medembed.finetuning.blocks import (
    count_blocks,
    cut_trunk,
    draw_weights,
    keep_top,
    parameter_groups,
    recompute,
    set_modes,
    unfreeze,
)
from medembed.finetuning.hyperparameters import Depth, Hyperparameters, read_depths
from medembed.finetuning.network import HeadNet, Network, blank_start

N_BLOCKS = {"ConvNext": 2, "ConvNextV2": 2, "ResNet": 2, "Swin": 3, "Swinv2": 3}


def load(directory: Path) -> Any:
    return load_encoder(directory, device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("cohort")
    make_cohort(home)
    return home


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tower(tmp_path_factory.mktemp("towers") / "gemma")


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("backbones")
    for family in CONFIGS:
        save(home / family, family)
    return {family: home / family for family in CONFIGS}


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_family_has_its_blocks(towers: dict[str, Path], family: str) -> None:
    assert count_blocks(load(towers[family])) == N_BLOCKS.get(family, 2)


def test_an_encoder_without_blocks_says_so(gemma: Path) -> None:
    encoder = load(gemma)
    encoder.model = torch.nn.Linear(2, 2)
    with pytest.raises(EncoderError, match=r"gemma has no blocks that can be unfrozen"):
        count_blocks(encoder)


@pytest.mark.parametrize(
    ("depth", "begins"),
    [
        (Depth(0), ()),
        (Depth(1), ("encoder.layers.2.", "post_layernorm.")),
        (Depth(2), ("encoder.layers.1.", "encoder.layers.2.", "post_layernorm.")),
        (Depth(3, everything=True), ("embeddings.", "encoder.layers.", "post_layernorm.")),
    ],
)
def test_a_depth_is_its_last_blocks_and_the_norm_after_them(
    gemma: Path, depth: Depth, begins: tuple[str, ...]
) -> None:
    encoder = load(gemma)
    wanted = {n for n, _ in encoder.model.named_parameters() if begins and n.startswith(begins)}
    assert set(unfreeze(encoder, depth)) == wanted
    trained = {n for n, p in encoder.model.named_parameters() if p.requires_grad}
    assert trained == wanted
    set_modes(encoder, depth, training=True)
    learning = {name for name, module in encoder.model.named_modules() if module.training}
    assert all(depth.everything or f"{name}.".startswith(begins) for name in learning)
    assert bool(learning) == bool(begins)
    set_modes(encoder, depth, training=False)
    assert not any(module.training for module in encoder.model.modules())


def test_exactly_the_trained_tensors_of_siglip_change(
    cohort: Path, gemma: Path, tmp_path: Path
) -> None:
    before = state_of(gemma)
    tune(cohort, gemma, tmp_path / "run", unfreeze="0,1,2,all")
    assert different(before, state_of(gemma)) == set()
    allowed = {
        1: ("encoder.layers.2.", "post_layernorm."),
        2: ("encoder.layers.1.", "encoder.layers.2.", "post_layernorm."),
        3: ("embeddings.", "encoder.", "post_layernorm."),
    }
    assert not (tmp_path / "run" / "encoders" / "unfreeze-0").exists()
    for depth, begins in allowed.items():
        after = state_of(tmp_path / "run" / "encoders" / f"unfreeze-{depth}")
        changed = different(before, after)
        should = {name for name in before if name.startswith(begins)}
        assert changed <= should
        # a bias may have no gradient at all: the keys' cancels in the softmax
        assert {n for n in should if before[n].ndim > 1} <= changed
        assert {f"post_layernorm.{kind}" for kind in ("weight", "bias")} <= changed


@pytest.mark.parametrize(("family", "path"), [("ResNet", "encoder.stages"), ("ViT", "layers")])
def test_exactly_the_trained_tensors_of_a_backbone_change(
    tmp_path: Path, towers: dict[str, Path], family: str, path: str
) -> None:
    home = tmp_path / "cohort"
    make_cohort(home, n_patients=28, side=SIZE)
    before = state_of(towers[family])
    tune(home, towers[family], tmp_path / "run", unfreeze="1,all")
    after = state_of(tmp_path / "run" / "encoders" / "unfreeze-1")
    changed = different(before, after)
    should = {name for name in before if name.startswith((f"{path}.1.", "layernorm."))}
    assert changed <= should
    assert {name for name in should if before[name].ndim > 1} <= changed
    if family == "ResNet":
        statistics = {name for name in should if "running_" in name or "num_batches" in name}
        assert statistics
        assert statistics <= changed
    everything = different(before, state_of(tmp_path / "run" / "encoders" / "unfreeze-2"))
    matrices = {n for n, t in before.items() if t.ndim > 1 and not n.startswith("pooler.")}
    assert matrices - {"embeddings.mask_token"} <= everything


def test_head_only_training_keeps_no_activations_however_deep_the_encoder(tmp_path: Path) -> None:
    kept = {}
    for n_layers in (1, 2, 8):
        encoder = load(make_tower(tmp_path / str(n_layers), n_layers))
        kept[n_layers] = [saved_bytes(encoder, Depth(0)), saved_bytes(encoder, Depth(1))]
    assert len({tuple(both) for both in kept.values()}) == 1
    assert kept[8][0] < kept[8][1] / 10


def test_checkpointing_keeps_less_and_gives_the_same_gradients(gemma: Path) -> None:
    encoder = load(gemma)
    width = 2 * encoder.dimensions["mean"][0]
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 32, 32), np.uint8))
    gradients = []
    for checkpointing in (False, True):
        recipe = Hyperparameters(checkpointing=checkpointing)
        network = Network(encoder, Depth(2), recipe, ("mean", "max"), blank_start(width))
        torch.nn.init.ones_(network.head.layers[0].weight)
        network.set_training(True)
        network(pixels).sum().backward()
        gradients.append({n: p.grad for n, p in network.tower.named_parameters()})
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert (gradient is None) == (other is None), name
        if gradient is not None:
            assert torch.equal(gradient, other), name


def test_checkpointing_is_refused_where_batch_norms_would_count_twice(
    towers: dict[str, Path],
) -> None:
    with pytest.raises(TrainingDataError, match="batch norms of ResNet"):
        recompute(load(towers["ResNet"]), Depth(1))


@pytest.mark.parametrize("family", ["ConvNext", "DINOv3ViT", "Dinov2", "ResNet", "ViT", "gemma"])
def test_trunk_and_top_make_the_whole(gemma: Path, towers: dict[str, Path], family: str) -> None:
    encoder = load(towers.get(family, gemma))
    size = encoder.preprocessing
    pixels = np.random.default_rng(0).integers(0, 256, (3, size.height, size.width), np.uint8)
    images = encoder.normalise(torch.from_numpy(pixels))
    trunk, top = encoder.copy(), encoder.copy()
    cut_trunk(trunk, 1)
    keep_top(top, 1)
    with torch.no_grad():
        tokens = trunk.model(pixel_values=images).last_hidden_state
        whole, rest = encoder.features(images), top.features(tokens)
    assert torch.equal(whole.tokens, rest.tokens)
    left = {n.split(".")[2] for n, _ in top.model.named_parameters() if n.startswith("encoder.lay")}
    assert "0" not in left


def test_a_trunk_is_not_cut_from_swin(towers: dict[str, Path]) -> None:
    with pytest.raises(EncoderError, match="--trunk-cache is not supported for Swin"):
        cut_trunk(load(towers["Swin"]), 1)


def test_rates_fall_with_depth_and_vectors_do_not_decay(gemma: Path) -> None:
    encoder = load(gemma)
    unfreeze(encoder, Depth(3, everything=True))
    head = HeadNet(blank_start(4))
    recipe = Hyperparameters(lr=1.0, encoder_share=0.1, decay=0.5, weight_decay=0.3)
    rates, decays = {}, {}
    for group in parameter_groups(encoder, head, recipe):
        for name in group["names"]:
            rates[name], decays[name] = group["lr"], group["weight_decay"]
    assert rates["head.layers.0.weight"] == 1.0
    assert rates["tower.post_layernorm.weight"] == pytest.approx(0.1)
    for layer, rate in ((2, 0.1), (1, 0.05), (0, 0.025)):
        own = {r for n, r in rates.items() if n.startswith(f"tower.encoder.layers.{layer}.")}
        assert sorted(own) == pytest.approx([rate])
    assert rates["tower.embeddings.patch_embedding.weight"] == pytest.approx(0.0125)
    named = dict(encoder.model.named_parameters())
    for name, decay in decays.items():
        if name.startswith("tower."):
            assert decay == (0.3 if named[name.removeprefix("tower.")].ndim > 1 else 0.0)


def test_random_weights_follow_from_the_seed_and_leave_torch_alone(towers: dict[str, Path]) -> None:
    drawn = []
    for seed in (1, 1, 2):
        encoder = load(towers["ResNet"])
        torch.manual_seed(5)
        draw_weights(encoder, seed)
        assert torch.initial_seed() == 5
        drawn.append(encoder.model.state_dict())
    assert different(drawn[0], drawn[1]) == set()
    assert "embedder.embedder.convolution.weight" in different(drawn[0], drawn[2])
    trained = load(towers["ResNet"]).model.state_dict()
    assert "embedder.embedder.convolution.weight" in different(drawn[0], trained)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["4"], r"--unfreeze 4 is deeper than tower, which has 3 blocks\. Give at most 3, or all"),
        (["-1"], r"--unfreeze '-1' is not a depth"),
        (["two"], r"--unfreeze 'two' is not a depth"),
        (["3", "all"], "both would be recorded as that depth"),
        ([], "no depth was given"),
    ],
)
def test_depths_that_are_none_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(TrainingDataError, match=said):
        read_depths(words, 3, "tower")


def test_depths_come_once_and_shallowest_first() -> None:
    assert read_depths(["2", "0", 2, "all"], 3, "tower") == [Depth(0), Depth(2), Depth(3, True)]
