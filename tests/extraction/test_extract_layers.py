"""`extract --layers`: what is stored, what is refused, and that other caches stay as they were."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from made_backbones import save
from made_extraction import write_images
from made_gemma import quiet
from transformers import ViTModel

from medembed.cache.embeddings import load_embeddings
from medembed.cache.metadata import options_of
from medembed.cache.store import open_cache
from medembed.cli import main
from medembed.core.errors import CacheError
from medembed.dataset.manifest import write_manifest
from medembed.encoders.loading import load_encoder
from medembed.extraction import extract


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("layers")
    write_manifest(write_images(home / "images", 5), home / "manifest.csv")
    save(home / "vit", "ViT")
    return home


def run(data: Path, cache: Path, *options: str, encoder: str = "vit") -> Any:
    arguments = ["extract", data / "manifest.csv", "--image-root", data / "images"]
    arguments += ["--encoder", data / encoder, "--cache", cache, "--decoders", "1", *options]
    return CliRunner().invoke(main, [str(word) for word in arguments])


def test_layers_are_stored_beside_the_usual_poolings(data: Path, tmp_path: Path) -> None:
    ran = run(data, tmp_path / "cache", "--layers", "2,1", "--dtype", "float32")
    assert ran.exit_code == 0, ran.output
    cache = open_cache(tmp_path / "cache")
    assert list(cache.spec.poolings) == ["mean", "max", "mean@2", "mean@1"]
    assert cache.recorded["blocks"] == 2
    assert cache.canary is not None
    assert set(cache.canary["embeddings"]) == set(cache.spec.poolings)
    plain = run(data, tmp_path / "plain", "--dtype", "float32")
    assert plain.exit_code == 0
    alone = load_embeddings(tmp_path / "plain", data / "manifest.csv")
    together = load_embeddings(cache, data / "manifest.csv")
    assert together.pooling == "mean+max"
    assert np.array_equal(alone.X, together.X)
    encoder = load_encoder(data / "vit", device="cpu")
    rows = load_embeddings(cache, data / "manifest.csv", pool="mean@1")
    assert rows.X.shape == (5, encoder.dimensions["mean@1"][0])


def test_all_is_every_block_and_a_second_run_has_nothing_to_do(data: Path, tmp_path: Path) -> None:
    asked = ("--pool", "mean,cls@2", "--layers", "all", "--json")
    first = run(data, tmp_path / "cache", *asked)
    assert first.exit_code == 0, first.output
    assert list(open_cache(tmp_path / "cache").spec.poolings) == [
        "mean",
        "cls@2",
        "mean@1",
        "mean@2",
    ]
    again = run(data, tmp_path / "cache", *asked)
    assert json.loads(again.stdout)["already"] == 5
    spelled = run(data, tmp_path / "cache", "--pool", "cls@2,mean", "--layers", "1,2", "--json")
    assert json.loads(spelled.stdout)["already"] == 5


def test_options_that_repeat_a_cache_are_options_of_the_command(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "cache", "--layers", "1")
    options = options_of(open_cache(tmp_path / "cache").spec)
    assert options == " --pool mean,max,mean@1"
    again = run(data, tmp_path / "cache", *options.split(), "--json")
    assert json.loads(again.stdout)["already"] == 5


def test_another_choice_of_layers_needs_another_cache(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "cache", "--layers", "1")
    ran = run(data, tmp_path / "cache", "--layers", "2")
    assert ran.exit_code == 1
    assert "Choose another --cache, or give --pool mean,max,mean@1" in ran.stderr


def test_without_layers_a_cache_says_nothing_of_blocks(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "cache")
    document = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert set(document["recorded"]) == {"source", "revision", "precision", "device", "versions"}


@pytest.mark.parametrize(
    ("layers", "said", "code"),
    [
        ("0", "'0' is no block", 2),
        ("1,,2", "'' is no block", 2),
        ("-1", "'-1' is no block", 2),
        ("1,all", "'all' is no block", 2),
        ("three", "numbers from 1, such as 6,12,18,24, or all", 2),
        ("3", "mean@3 is not offered by vit. Choose from: mean, max,", 1),
    ],
)
def test_blocks_that_are_not_there_are_refused(
    data: Path, tmp_path: Path, layers: str, said: str, code: int
) -> None:
    ran = run(data, tmp_path / "cache", "--layers", layers)
    assert ran.exit_code == code
    assert said in " ".join(ran.stderr.split())
    assert not (tmp_path / "cache").exists()


def test_an_overflowing_residual_stream_is_refused_with_the_way_out(
    data: Path, tmp_path: Path
) -> None:
    """The last norm hides what float16 cannot hold."""
    model = ViTModel.from_pretrained(data / "vit")
    with torch.no_grad():
        model.layers[0].mlp.fc2.bias.fill_(1e5)
    with quiet():
        model.save_pretrained(tmp_path / "steep")
    for path in (data / "vit").glob("preprocessor*.json"):
        (tmp_path / "steep" / path.name).write_bytes(path.read_bytes())
    assert run(data, tmp_path / "usual", encoder=str(tmp_path / "steep")).exit_code == 0
    ran = run(data, tmp_path / "half", "--layers", "1", encoder=str(tmp_path / "steep"))
    assert ran.exit_code == 1
    said = " ".join(ran.stderr.split())
    assert "pooling mean@1 reaches" in said
    assert "Choose a new --cache with --dtype float32" in said
    assert not (tmp_path / "half" / "cache.json").exists()
    options = ("--layers", "1", "--dtype", "float32")
    whole = run(data, tmp_path / "whole", *options, encoder=str(tmp_path / "steep"))
    assert whole.exit_code == 0, whole.output


def test_from_python_all_is_expanded_too(data: Path, tmp_path: Path) -> None:
    encoder = load_encoder(data / "vit", device="cpu")
    manifest = data / "manifest.csv"
    extract(manifest, data / "images", encoder, tmp_path / "cache", poolings="max@all", decoders=1)
    assert list(open_cache(tmp_path / "cache").spec.poolings) == ["max@1", "max@2"]
    with pytest.raises(CacheError, match="has no pooling 'mean'; it has max@1, max@2"):
        load_embeddings(tmp_path / "cache", manifest, pool="mean")
