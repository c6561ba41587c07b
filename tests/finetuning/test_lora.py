"""LoRA: which weights it changes, that merging changes nothing else, and how it stands in a run."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from made_backbones import save
from made_finetuning import (
    QUICK,
    Stop,
    different,
    make_cohort,
    make_tower,
    one_thread,
    require_equal,
    saved_bytes,
    state_of,
    stop_after,
    tune,
)
from scipy.special import logit
from torch.utils.flop_counter import FlopCounterMode

from medembed.cache.embeddings import load_embeddings
from medembed.cli import main
from medembed.core.errors import EncoderError, MedembedError, TrainingDataError
from medembed.dataset.manifest import read_manifest
from medembed.encoders.base_ref import CHANGED_FILE
from medembed.encoders.loading import load_encoder
from medembed.extraction import extract
from medembed.finetuning.adapters import add_adapters, alpha_of, find_projections
from medembed.finetuning.blocks import LORA_SHARE, cut_trunk, parameter_groups
from medembed.finetuning.export import adapt
from medembed.finetuning.hyperparameters import Depth
from medembed.finetuning.network import Network, blank_start
from medembed.heads.packaging import load_model
from medembed.report.figures import plot_depths
from medembed.results.comparison import compare
from medembed.results.runs import open_run

LORA = replace(QUICK, lora=2)
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
ADAPTED = {*(f"self_attn.{name}" for name in ATTENTION), "mlp.fc1", "mlp.fc2"}


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a cohort, a tower of three blocks, and a run of adapters and one of unfreezing."""
    home = tmp_path_factory.mktemp("lora")
    make_cohort(home)
    make_tower(home / "tower")
    tune(home, home / "tower", home / "run", config=LORA, unfreeze="0,1,all")
    tune(home, home / "tower", home / "usual", config=replace(QUICK, epochs=1), unfreeze="0,1")
    return home


def load(directory: Path) -> Any:
    return load_encoder(directory, device="cpu", precision="fp32")


def logits(run: Path) -> pd.Series:
    own = open_run(run).predictions().query("head.str.startswith('lora')")
    return logit(own.set_index(["head", "sha256"])["probability"].sort_index())


def make_network(encoder: Any, depth: int, *, seed: int = 0, **changes: Any) -> Network:
    """Build a network whose head tells one column from another."""
    width = 2 * encoder.dimensions["mean"][0]
    recipe = replace(LORA, **changes)
    network = Network(encoder, Depth(depth), recipe, ("mean", "max"), blank_start(width), seed=seed)
    torch.nn.init.ones_(network.head.layers[0].weight)
    return network


def draw_pixels(encoder: Any, n: int = 3) -> torch.Tensor:
    size = encoder.preprocessing
    drawn = np.random.default_rng(0).integers(0, 256, (n, size.height, size.width), np.uint8)
    return torch.from_numpy(drawn)


# Which weights


def test_exactly_the_projections_of_the_last_blocks_change(home: Path) -> None:
    before = state_of(home / "tower")
    assert not (home / "run" / "encoders" / "lora2-0").exists()
    for depth, blocks in ((1, (2,)), (3, (0, 1, 2))):
        adapted = home / "run" / "encoders" / f"lora2-{depth}"
        should = {f"encoder.layers.{i}.{name}.weight" for i in blocks for name in ADAPTED}
        assert different(before, state_of(adapted)) == should
        stored = {file.name for file in adapted.iterdir()}
        assert CHANGED_FILE in stored
        assert "model.safetensors" not in stored
    assert different(before, state_of(home / "tower")) == set()


def test_what_changes_has_the_rank(home: Path) -> None:
    before, after = (state_of(home / p) for p in ("tower", "run/encoders/lora2-3"))
    for name in different(before, after):
        values = torch.linalg.svdvals((after[name] - before[name]).double())
        assert values[1] > 1e-6
        assert values[2] < 1e-3 * values[1]


@pytest.mark.parametrize("family", ["DINOv3ViT", "Dinov2", "Swin", "Swinv2", "ViT"])
def test_other_transformers_are_adapted_and_merged_too(tmp_path: Path, family: str) -> None:
    save(tmp_path, family)
    encoder = load(tmp_path)
    blocks = {"Swin": ("encoder.layers.2.",), "Swinv2": ("encoder.layers.2.",)}
    network = make_network(encoder, 1)
    names = find_projections(encoder, Depth(1), 2)
    assert len(names) == 6
    assert all("position" not in name for name in names)
    assert all(name.startswith(blocks.get(family, ("",))) for name in names)
    wanted = {f"{name}.lora_{ab}.default.weight" for name in names for ab in "AB"}
    assert set(network.trained_names) == wanted
    take_a_step(network, encoder)
    check_merged(network, encoder, {f"{name}.weight" for name in names})


def take_a_step(network: Network, encoder: Any) -> None:
    """Move the adapters as training would."""
    optimizer = torch.optim.AdamW(parameter_groups(network.encoder, network.head, network.recipe))
    for _ in range(2):
        network.set_training(True)
        network(draw_pixels(encoder)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    network.set_training(False)


def check_merged(network: Network, encoder: Any, should: set[str]) -> None:
    """Compare the adapted tower with the merged one, and that with the one before."""
    pixels = draw_pixels(encoder)
    adapted = adapt(encoder, network)
    assert different(encoder.model.state_dict(), adapted.model.state_dict()) == should
    with torch.no_grad():
        ours = network.encoder.features(encoder.normalise(pixels)).tokens
        merged = adapted.features(encoder.normalise(pixels)).tokens
        frozen = encoder.features(encoder.normalise(pixels)).tokens
    assert (ours - merged).abs().max() < 2e-5
    assert (ours - frozen).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["ConvNext", "ResNet"])
def test_convolutions_are_refused_with_the_reason(home: Path, tmp_path: Path, family: str) -> None:
    save(tmp_path / "tower", family)
    with pytest.raises(EncoderError, match=r"--lora adapts the projections .* have convolutions"):
        tune(home, tmp_path / "tower", tmp_path / "run", unfreeze="1", config=LORA)
    assert not (tmp_path / "run").exists()


def test_a_tower_with_new_adapters_is_what_it_was(home: Path) -> None:
    encoder = load(home / "tower")
    pixels = encoder.normalise(draw_pixels(encoder))
    torch.manual_seed(5)
    kept = torch.get_rng_state()
    towers = [encoder.copy() for _ in range(3)]
    for tower, seed in zip(towers, (0, 0, 1), strict=True):
        add_adapters(tower, Depth(2), 2, seed)
    assert torch.equal(torch.get_rng_state(), kept)
    with torch.no_grad():
        ours = towers[0].features(pixels).tokens
        assert torch.equal(ours, encoder.features(pixels).tokens)
    first, again, other = (tower.model.state_dict() for tower in towers)
    assert different(first, again) == set()
    drawn = {name for name in first if ".lora_A." in name}
    assert len(drawn) == 12
    assert different(first, other) == drawn


def test_the_oracle_is_lora_written_by_hand(home: Path) -> None:
    """W + (alpha / rank) · B A, with alpha twice the rank."""
    encoder = load(home / "tower")
    network = make_network(encoder, 1)
    take_a_step(network, encoder)
    state = network.trained_state()
    for name, merged in network.changed_tensors().items():
        start = f"tower.{name.removesuffix('.weight')}.lora"
        a, b = (state[f"{start}_{ab}.default.weight"] for ab in "AB")
        assert a.shape[0] == b.shape[1] == 2
        wanted = encoder.model.state_dict()[name] + 2 * b @ a
        assert torch.allclose(merged, wanted, atol=1e-6)
    assert alpha_of(8) == 16


def test_rates_are_ten_times_those_of_the_blocks(home: Path) -> None:
    network = make_network(load(home / "tower"), 2, lr=1.0, encoder_share=0.05, decay=0.5)
    rates = {}
    for group in parameter_groups(network.encoder, network.head, network.recipe):
        rates |= dict.fromkeys(group["names"], group["lr"])
    assert LORA_SHARE == 10
    for layer, rate in ((2, 0.5), (1, 0.25)):
        own = {r for n, r in rates.items() if n.startswith(f"tower.encoder.layers.{layer}.")}
        assert sorted(own) == pytest.approx([rate])
    assert rates["head.layers.0.weight"] == 1.0


def test_checkpointing_gives_the_same_gradients(home: Path) -> None:
    encoder = load(home / "tower")
    gradients = []
    for checkpointing in (False, True):
        network = make_network(encoder, 2, checkpointing=checkpointing)
        network.set_training(True)
        network(draw_pixels(encoder)).sum().backward()
        gradients.append({n: p.grad for n, p in network.tower.named_parameters()})
    own = [name for name, gradient in gradients[0].items() if gradient is not None]
    assert own == [name for name in gradients[0] if "lora_" in name]
    for name in own:
        assert torch.equal(gradients[0][name], gradients[1][name]), name


# In a run


def test_it_stands_beside_unfreezing(home: Path) -> None:
    board = {entry["head"]: entry for entry in open_run(home / "run").as_dict()["leaderboard"]}
    assert {(e["depth"], e["lora"]) for e in board.values()} == {(0, None), (1, 2), (3, 2)}
    usual = {e["head"]: e for e in open_run(home / "usual").as_dict()["leaderboard"]}
    n_head = usual["unfreeze-0"]["trainable"]
    assert board["lora2-0"]["trainable"] == n_head == 64 * 256 + 256 + 256 + 1
    widths = [(32, 32)] * 4 + [(32, 48), (48, 32)]
    per_block = sum(2 * (a + b) for a, b in widths)
    assert board["lora2-3"]["trainable"] == n_head + 3 * per_block
    assert board["lora2-1"]["params"]["lora_alpha"] == 4
    assert "lora" not in board["lora2-0"]["params"]
    before = state_of(home / "tower")
    last = [t.numel() for n, t in before.items() if n.startswith(("encoder.layers.2.", "post_lay"))]
    assert usual["unfreeze-1"]["trainable"] == n_head + sum(last)
    assert usual["unfreeze-1"]["lora"] is None
    assert "peft" in open_run(home / "run").info.versions
    assert "peft" not in open_run(home / "usual").info.versions
    records = {r.head: r for r in open_run(home / "run").trial_records()}
    assert records["lora2-3"].lora == 2
    assert records["lora2-3"].trainable == board["lora2-3"]["trainable"]


def test_both_are_series_of_the_figure_of_depths(home: Path) -> None:
    result = compare([home / "usual", home / "run"], n_resamples=20)
    depths = {own["head"]: [p["depth"] for p in own["points"]] for own in result["depths"]}
    assert depths == {"unfreeze": [0, 1], "lora2": [0, 1, 3]}
    heads = {row["head"] for row in result["rows"]}
    assert {"unfreeze-1", "lora2-1"} <= heads
    plot = plot_depths(result)
    assert plot is not None
    assert "lora2: adapters of that rank train in those blocks" in plot.caption


def test_what_was_asked_without_lora_is_the_same_question_as_before(home: Path) -> None:
    assert "lora" not in open_run(home / "usual").info.asked.recipe
    # `all` is all blocks, since there are adapters in blocks alone
    assert open_run(home / "run").info.asked.depths == [0, 1, 3]
    assert open_run(home / "run").info.asked.recipe["lora"] == 2


def test_several_seeds_draw_adapters_of_their_own(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def watched(encoder: Any, depth: Depth, rank: int, seed: int) -> list[str]:
        drawn.append((depth.blocks, seed))
        return add_adapters(encoder, depth, rank, seed)

    monkeypatch.setattr("medembed.finetuning.network.add_adapters", watched)
    recipe = replace(LORA, epochs=1)
    tune(home, home / "tower", tmp_path / "run", unfreeze="1", n_seeds=2, config=recipe)
    first, second = (state_of(tmp_path / "run" / "encoders" / f"lora2-1-s{s}") for s in (0, 1))
    assert different(first, second)
    assert [own for own in drawn if own[0]] == [(1, 0), (1, 1)]


def test_the_trunk_cache_gives_the_same_logits(home: Path, tmp_path: Path) -> None:
    options = {"unfreeze": "1", "config": LORA, "trunk_cache": tmp_path / "cache"}
    tune(home, home / "tower", tmp_path / "run", **options)
    plain, cached = (logits(path / "run").loc["lora2-1"] for path in (home, tmp_path))
    assert plain.index.equals(cached.index)
    assert np.abs(plain - cached).max() < 1e-4
    changed = different(state_of(home / "tower"), state_of(tmp_path / "run/encoders/lora2-1"))
    assert changed == {f"encoder.layers.2.{name}.weight" for name in ADAPTED}


def test_an_interrupted_run_ends_with_the_same_bytes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"unfreeze": "0,1,all", "config": LORA}
    stop_after(monkeypatch, 3)  # in the middle of the second depth
    with pytest.raises(Stop):
        tune(home, home / "tower", tmp_path / "run", **options)
    monkeypatch.undo()
    assert (tmp_path / "run" / "training" / "lora2-1.safetensors").is_file()
    tune(home, home / "tower", tmp_path / "run", **options)
    require_equal(tmp_path / "run", home / "run")


def test_its_encoder_feeds_extract_and_its_head_predicts_without_peft(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    encoder = load(home / "run" / "encoders" / "lora2-1")
    manifest = read_manifest(home / "manifest.csv")
    extract(manifest, home / "images", encoder, tmp_path / "cache", dtype="float32")
    found = load_embeddings(tmp_path / "cache", home / "manifest.csv", pool="mean+max")
    board = {e["head"]: e["encoder"] for e in open_run(home / "run").as_dict()["leaderboard"]}
    assert found.spec.encoder == board["lora2-1"]
    assert len({*board.values(), load(home / "tower").fingerprint}) == 4
    model = load_model(home / "run" / "models" / "lora2-1")
    assert model.card["spec"]["encoder"] == found.spec.encoder
    said = pd.Series(model.head.predict_proba(found.X)[:, 1], index=found.rows["sha256"])
    ours = logits(home / "run").loc["lora2-1"]
    assert np.abs(logit(said.loc[ours.index]) - ours).max() < 1e-4


# What it costs


def count_operations(encoder: Any, lora: int | None, n_cut: int | None) -> int:
    """Count the floating-point operations of products in a step with the last block."""
    width = 2 * encoder.dimensions["mean"][0]
    recipe = replace(QUICK, lora=lora)
    poolings = ("mean", "max")
    network = Network(encoder, Depth(1), recipe, poolings, blank_start(width), n_cut)
    images = draw_pixels(encoder, 4)
    if n_cut is not None:
        trunk = encoder.copy()
        cut_trunk(trunk, n_cut)
        images = trunk.model(pixel_values=encoder.normalise(images)).last_hidden_state
    network.set_training(True)
    with FlopCounterMode(display=False) as counter:
        network(images).sum().backward()
    return int(counter.get_total_flops())


def test_the_trunk_cache_saves_what_is_counted_and_adapters_save_products(tmp_path: Path) -> None:
    """A trained block costs three forward passes of it, and one less where adapters train."""
    encoder = load(make_tower(tmp_path / "tower", 6))
    n_tokens, width, inner, patch = 16, 32, 48, 8
    block = n_tokens * (4 * width**2 + 2 * width * inner)
    below = n_tokens * width * 3 * patch**2 + 5 * block
    plain, cached = (count_operations(encoder, None, n_cut) for n_cut in (None, 5))
    assert plain / cached == pytest.approx((below + 3 * block) / (3 * block), rel=0.02)
    assert plain / cached > 2
    adapted, both = (count_operations(encoder, 1, n_cut) for n_cut in (None, 5))
    assert both < cached * 0.7
    assert plain - adapted == cached - both


def test_adapters_keep_no_activations_of_frozen_blocks(tmp_path: Path) -> None:
    kept = set()
    for n_layers in (1, 6):
        encoder = load(make_tower(tmp_path / str(n_layers), n_layers))
        kept.add(saved_bytes(encoder, Depth(1), LORA))
    assert len(kept) == 1


# What is refused


@pytest.mark.parametrize(
    ("unfreeze", "changes", "said"),
    [
        ("0", {}, r"--lora 2 puts adapters into the last blocks, and --unfreeze asks for none"),
        ("1", {"lora": 33}, r"--lora 33 is a higher rank than .*k_proj of tower .* 32 wide"),
        ("1", {"lora": 0}, r"lora must be at least 1, not 0"),
        ("1", {"from_scratch": True}, r"--lora adapts what a trained encoder knows"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    home: Path, tmp_path: Path, unfreeze: str, changes: dict[str, Any], said: str
) -> None:
    recipe = replace(LORA, **changes)
    with pytest.raises(TrainingDataError, match=said):
        tune(home, home / "tower", tmp_path / "run", unfreeze=unfreeze, config=recipe)
    assert not (tmp_path / "run").exists()


def test_without_peft_the_way_out_is_named(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MedembedError, match=r"pip install 'medembed\[lora\]'"):
        tune(home, home / "tower", tmp_path / "run", unfreeze="1", config=LORA)
    assert not (tmp_path / "run").exists()
    tune(home, home / "tower", tmp_path / "run", unfreeze="0", config=replace(QUICK, epochs=1))


def test_the_command_says_nothing_of_peft_and_asks_no_network(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr("socket.socket.connect", refuse)
    arguments = ["finetune", home / "manifest.csv", "--image-root", home / "images", "--encoder"]
    arguments += [home / "tower", "--unfreeze", "1", "--lora", 2, "--epochs", "1", "--no-augment"]
    arguments += ["--json", "--device", "cpu", "--out", tmp_path / "run"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    [entry] = json.loads(result.stdout)["leaderboard"]
    assert (entry["head"], entry["depth"], entry["lora"]) == ("lora2-1", 1, 2)
    assert "peft" not in result.output
    assert "warn" not in result.output.lower()
    assert " --lora 2 " in open_run(tmp_path / "run").info.command
