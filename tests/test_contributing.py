"""CONTRIBUTING.md is true: its map is the tree, and what it says of new heads and poolings runs."""

import ast
import hashlib
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from made_towers import save
from PIL import Image

import medembed
import medembed as me
from medembed.core import poolings
from medembed.dataset.manifest import Manifest, make_manifest
from medembed.heads import registry
from medembed.heads.packaging import load_model

PACKAGE = Path(medembed.__file__).parent
TEXT = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^```python\n# (medembed/[^\n]*)\n(.*?)^```", TEXT, re.M | re.S))
SMALL = {"n_folds": 2, "n_configs": 1, "jobs": 1}


def read_map() -> dict[str, str]:
    """Return what the map says of each module, by its path below the package."""
    found = {}
    for folder, line in re.findall(r"^- \*\*`([\w/]+)/`\*\* (.*)$", TEXT, re.M):
        for names, words in re.findall(r"((?:`\w+`(?:, )?)+): ([^;]+)", line):
            for name in re.findall(r"`(\w+)`", names):
                found[f"{folder}/{name}".removeprefix("medembed/")] = words
    return found


def test_the_map_names_every_module_and_no_other() -> None:
    tree = {
        path.relative_to(PACKAGE).with_suffix("").as_posix()
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }
    assert set(read_map()) == tree


def test_the_floors_name_every_folder() -> None:
    floors = TEXT.partition("## How the package is laid out")[2].split("```")[1]
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(re.findall(r"(\w+)/", floors)) == folders


def test_the_map_is_short() -> None:
    assert {name: words for name, words in read_map().items() if len(words.split()) > 8} == {}


def make_data(folder: Path) -> Manifest:
    """Write images of 24 patients, noise that is louder where it is abnormal."""
    generator = np.random.default_rng(0)
    rows = []
    for k in range(24):
        pixels = generator.normal(128, 10 + 40 * (k % 2), (16, 16)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
        sha256 = hashlib.sha256((folder / f"{k}.png").read_bytes()).hexdigest()
        row = {"image": f"{k}.png", "sha256": sha256, "region": "hand"}
        row |= {"patient": f"p{k}", "study": f"p{k}", "label": str(k % 2)}
        rows.append({**row, "split": "test" if k % 4 > 1 else "train"})
    return make_manifest(pd.DataFrame(rows), "study")


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tower"))


def test_a_new_head_is_swept_packaged_and_asked(
    tmp_path: Path, tower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("medembed.heads.lda")
    exec(BLOCKS["medembed/heads/lda.py"], module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    entry = ast.literal_eval("{" + BLOCKS["medembed/heads/registry.py, in HEADS"] + "}")
    monkeypatch.setattr(registry, "HEADS", {**registry.HEADS, **entry})
    registry.known_heads.cache_clear()
    try:
        manifest = make_data(tmp_path)
        encoder = me.load_encoder(tower, device="cpu")
        me.extract(manifest, tmp_path, encoder, tmp_path / "cache", decoders=1)
        run = me.sweep(tmp_path / "cache", manifest, tmp_path / "run", heads="lda", **SMALL)
        assert "lda" in run.leaderboard["head"].tolist()
        head = load_model(run.model("lda")).head
        assert type(head) is module.DiagonalLDAHead
        answers = me.Predictor(run.model("lda"), encoder=encoder).predict([tmp_path / "0.png"])
        assert answers["probability"].between(0, 1).all()
    finally:
        registry.known_heads.cache_clear()


def test_a_new_pooling_is_extracted_swept_and_asked(
    tmp_path: Path, tower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scope = {**vars(poolings)}
    exec(BLOCKS["medembed/core/poolings.py"], scope)
    (entry,) = eval(f"({BLOCKS['medembed/core/poolings.py, in _TABLE']})", scope)
    monkeypatch.setitem(poolings.POOLINGS, entry.name, entry)
    manifest = make_data(tmp_path)
    encoder = me.load_encoder(tower, device="cpu")
    me.extract(
        manifest, tmp_path, encoder, tmp_path / "cache", poolings=("mean", "std"), decoders=1
    )
    cache = me.open_cache(tmp_path / "cache")
    assert cache.spec.poolings == {"mean": (16,), "std": (16,)}
    assert me.load_embeddings(cache, manifest).pooling == "mean+std"
    run = me.sweep(cache, manifest, tmp_path / "run", heads="logistic", pool="std", **SMALL)
    assert run.leaderboard["pooling"].tolist()[0] == "std"
    answers = me.Predictor(run.model("logistic"), encoder=encoder).predict([tmp_path / "0.png"])
    assert answers["probability"].between(0, 1).all()
