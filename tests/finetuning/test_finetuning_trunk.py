"""The trunk cache: the same results as without it, for the cost of the top."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_backbones import SIZE, save
from made_finetuning import QUICK, make_cohort, make_tower, tune
from scipy.special import logit

from medembed.cache.embeddings import map_rows
from medembed.cache.spec import CacheSpec, keys_from_hex
from medembed.cache.store import create_cache, open_cache
from medembed.core.errors import CacheError, MissingRowsError
from medembed.finetuning import frozen_features
from medembed.results.runs import open_run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("trunk")
    make_cohort(home)
    make_tower(home / "tower")
    tune(home, home / "tower", home / "plain", unfreeze="0,1,2")
    tune(home, home / "tower", home / "cached", unfreeze="0,1,2", trunk_cache=home / "cache")
    return home


def logits(run: Path) -> pd.Series:
    own = open_run(run).predictions().query("head not in ('class-prior', 'region-prior')")
    return logit(own.set_index(["head", "sha256"])["probability"].sort_index())


def test_cached_equals_uncached_in_logits(home: Path) -> None:
    plain, cached = logits(home / "plain"), logits(home / "cached")
    assert plain.index.equals(cached.index)
    assert np.abs(plain - cached).max() < 1e-4


@pytest.mark.parametrize("family", ["ConvNext", "DINOv3ViT", "ResNet", "ViT"])
def test_other_families_too(tmp_path: Path, family: str) -> None:
    make_cohort(tmp_path, n_patients=28, side=SIZE)
    save(tmp_path / "tower", family)
    for name, options in (("plain", {}), ("cached", {"trunk_cache": tmp_path / "cache"})):
        tune(tmp_path, tmp_path / "tower", tmp_path / name, unfreeze="0,1", **options)
    assert np.abs(logits(tmp_path / "plain") - logits(tmp_path / "cached")).max() < 1e-4


def test_its_adapted_encoders_are_the_same(home: Path) -> None:
    from made_finetuning import state_of

    for depth in (1, 2):
        plain, cached = (
            state_of(home / r / "encoders" / f"unfreeze-{depth}") for r in ("plain", "cached")
        )
        assert set(plain) == set(cached)
        for name, tensor in plain.items():
            assert (tensor - cached[name]).abs().max() < 1e-4, name


def test_it_is_one_cache_of_tokens_and_is_filled_once(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [path] = (home / "cache").iterdir()
    cache = open_cache(path)
    assert cache.spec.poolings == {"tokens": (16, 32)}
    assert cache.verify() == []
    encode, calls = frozen_features.TrunkEncoder.encode, []

    def counted(encoder: Any, pixels: np.ndarray, poolings: Any) -> Any:
        calls.append(len(pixels))
        return encode(encoder, pixels, poolings)

    monkeypatch.setattr(frozen_features.TrunkEncoder, "encode", counted)
    own = replace(QUICK, epochs=1)
    options = {"trunk_cache": home / "cache", "config": own}
    tune(home, home / "tower", tmp_path / "same", unfreeze="2", **options)
    assert calls == [1]  # to learn the shape of the tokens
    tune(home, home / "tower", tmp_path / "other", unfreeze="1", **options)
    assert len(calls) > 3
    assert len(list((home / "cache").iterdir())) == 2


def test_its_size_is_said_before_it_begins_and_a_full_disk_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("medembed.extraction.job.free_bytes", lambda _: 1000)
    with pytest.raises(CacheError, match=r"would grow by 0\.1 MB .* has 0\.0 MB free"):
        tune(home, home / "tower", tmp_path / "run", unfreeze="1",
             trunk_cache=tmp_path / "cache", on_status=said.append)  # fmt: skip
    assert said == ["Trunk cache, 60 × 16 × 32 float32, 0.1 MB"]
    assert not open_run(tmp_path / "run").trial_records()


def test_halves_are_stored_where_asked_for(home: Path, tmp_path: Path) -> None:
    options = {"trunk_cache": tmp_path / "cache", "trunk_dtype": "float16"}
    tune(home, home / "tower", tmp_path / "run", unfreeze="0,1,2", **options)
    [path] = (tmp_path / "cache").iterdir()
    assert open_cache(path).spec.dtype == "float16"
    assert "--trunk-dtype float16" in open_run(tmp_path / "run").info.command
    assert "--trunk-dtype" not in open_run(home / "cached").info.command
    assert 0 < np.abs(logits(tmp_path / "run") - logits(home / "plain")).max() < 0.1


def test_a_damaged_shard_is_refused(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "cache", tmp_path / "cache")
    for shard in (tmp_path / "cache").glob("*/shards/*.h5"):
        data = bytearray(shard.read_bytes())
        data[-100] ^= 1
        shard.write_bytes(data)
    with pytest.raises(CacheError, match="is damaged"):
        tune(home, home / "tower", tmp_path / "run", unfreeze="2", trunk_cache=tmp_path / "cache")


# Mapped rows


@pytest.mark.parametrize("n", [1, 1024, 2500])
def test_mapped_rows_are_those_that_were_committed(tmp_path: Path, n: int) -> None:
    generator = np.random.default_rng(n)
    spec = CacheSpec("ab" * 32, {}, {"tokens": (2, 3, 2), "other": (4,)}, "float32")
    cache = create_cache(tmp_path / "cache", spec, {"source": "made"})
    keys = generator.integers(0, 256, (n + 7, 32)).astype(np.uint8)
    values = generator.normal(size=(n + 7, 2, 3, 2)).astype(np.float32)
    others = np.zeros((n + 7, 4), np.float32)
    for part in (slice(0, n), slice(n, n + 7)):
        cache.commit(keys[part], {"tokens": values[part], "other": others[part]})
    order = generator.permutation(n + 7)
    mapped = map_rows(cache, keys[order], "tokens")
    assert len(mapped) == n + 7
    chosen = generator.integers(0, n + 7, 20)
    assert np.array_equal(mapped.take(chosen), values[order][chosen])
    with pytest.raises(MissingRowsError, match="1 of 1 rows are not in the cache"):
        map_rows(cache, keys_from_hex(["00" * 32]), "tokens")
    with pytest.raises(CacheError, match="has no pooling 'mean'"):
        map_rows(cache, keys, "mean")
