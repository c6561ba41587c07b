"""Overexposed, noisier radiographs, unlike those the demo's encoder learnt from, and its blocks.

Exposure and recipe were chosen so that a small cohort shows the gain within a minute: it is a test
that unfreezing works, not a measurement. That is bench/depths.py, on a detector fixed beforehand.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from made_finetuning import different, one_thread, state_of
from PIL import Image

from medembed.cli import main
from medembed.dataset.manifest import make_manifest, write_manifest
from medembed.demo.anatomy import REGIONS
from medembed.demo.synthetic import DEMO_SEEDS, KINDS, render
from medembed.results.comparison import compare
from medembed.results.runs import open_run

N_PATIENTS = 600
FIRST_SEED = DEMO_SEEDS[5_000_000]
NOISE = 0.008  # of white, at 128 pixels; the demo's films have half of that or less


def make_film(number: int) -> tuple[np.ndarray, int]:
    """Draw one patient's only view, with an exposure and a noise that the demo does not have."""
    generator = np.random.default_rng([7, number])
    label = int(generator.random() < 0.5)
    kind = KINDS[number // 2 % len(KINDS)] if label else None
    region = REGIONS[number % len(REGIONS)]
    severity = float(generator.uniform(0.6, 1))
    drawn = render(FIRST_SEED + number, region, kind, severity, size=128)
    grey = np.minimum(1, 0.08 + 0.9 * (drawn.pixels / 255) ** 0.55)
    grey = grey + generator.normal(0, NOISE, grey.shape)
    return np.clip(grey * 255 + 0.5, 0, 255).astype(np.uint8), label


def run(*arguments: object) -> Any:
    with one_thread():
        result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("overexposed")
    rows = []
    (home / "images").mkdir()
    for number in range(N_PATIENTS):
        pixels, label = make_film(number)
        path = home / "images" / f"{number:04}.png"
        Image.fromarray(pixels).save(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        split = "test" if number % 3 == 2 else "train"
        region = REGIONS[number % len(REGIONS)]
        rows.append((path.name, digest, f"p{number}", f"s{number}", region, str(label), split))
    columns = ["image", "sha256", "patient", "study", "region", "label", "split"]
    table = pd.DataFrame(rows, columns=columns).assign(synthetic="1")
    write_manifest(make_manifest(table, "study"), home / "manifest.csv")
    return home


@pytest.fixture(scope="module")
def depths(home: Path) -> dict[str, Any]:
    return dict(
        run(
            *("finetune", home / "manifest.csv", "--image-root", home / "images"),
            *("--encoder", "demo", "--unfreeze", "0,1,2", "--out", home / "depths"),
            *("--epochs", 6, "--batch-size", 16, "--no-augment", "--device", "cpu"),
            *("--trunk-cache", home / "trunk", "--lr", 0.002, "--encoder-share", 0.3, "--decay", 1),
        )
    )


@pytest.mark.slow
def test_unfreezing_lowers_the_training_loss(home: Path, depths: dict[str, Any]) -> None:
    records = {record.depth: record for record in open_run(home / "depths").trial_records()}
    losses = [records[depth].history[-1]["train_loss"] for depth in (0, 1, 2)]
    assert losses[2] < losses[1] < losses[0]
    assert [entry["depth"] for entry in depths["leaderboard"]][-1] == 0


@pytest.mark.slow
def test_unfreezing_changes_the_last_blocks(home: Path, depths: dict[str, Any]) -> None:
    before = state_of("demo")
    for depth, begins in (
        (1, ("encoder.layers.3.", "post_layernorm.")),
        (2, ("encoder.layers.2.", "encoder.layers.3.", "post_layernorm.")),
    ):
        changed = different(before, state_of(home / "depths" / "encoders" / f"unfreeze-{depth}"))
        should = {name for name in before if name.startswith(begins)}
        assert changed <= should
        assert {name for name in should if before[name].ndim > 1} <= changed


@pytest.mark.slow
def test_unfreezing_raises_the_auroc_over_the_head_alone(
    home: Path, depths: dict[str, Any]
) -> None:
    result = compare([home / "depths"], n_resamples=200)
    values = {row["head"]: row["scores"]["auroc"]["value"] for row in result["rows"]}
    assert values["unfreeze-2"] > values["unfreeze-0"]
    [pair] = [
        pair
        for pair in result["paired"]
        if {pair["a"], pair["b"]} == {"unfreeze-0", "unfreeze-2"} and pair["score"] == "auroc"
    ]
    sign = 1 if pair["a"] == "unfreeze-2" else -1
    low, high = sorted((sign * pair["low"], sign * pair["high"]))
    assert 0 < low < sign * pair["difference"] < high
    assert [point["depth"] for point in result["depths"][0]["points"]] == [0, 1, 2]


@pytest.mark.slow
def test_an_adapted_encoder_feeds_the_two_stages(home: Path, depths: dict[str, Any]) -> None:
    adapted = home / "depths" / "encoders" / "unfreeze-2"
    table, images = home / "manifest.csv", home / "images"
    for name, encoder in (("demo", "demo"), ("adapted", adapted)):
        cache = home / f"cache-{name}"
        extract = ("extract", table, "--image-root", images, "--encoder", encoder, "--cache", cache)
        assert run(*extract)["embedded"] == N_PATIENTS
        sweep = ("sweep", cache, table, "--out", home / name, "--heads", "logistic", "--jobs", 1)
        run(*sweep, "--configs", 3, "--folds", 2)
    result = compare([home / "depths", home / "demo", home / "adapted"], n_resamples=200)
    values = {(row["run"], row["head"]): row["scores"]["auroc"]["value"] for row in result["rows"]}
    assert values["adapted", "logistic"] > values["demo", "logistic"]
