"""Cache joined with manifest: X, y and groups in the manifest's order."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from medembed.cache.embeddings import load_embeddings
from medembed.cache.failures import Failure
from medembed.cache.spec import CacheSpec, keys_from_hex
from medembed.cache.store import Cache, create_cache
from medembed.core.errors import (
    CacheError,
    ManifestError,
    MissingRowsError,
    ShardError,
    TrainingDataError,
)
from medembed.dataset.manifest import Manifest, write_manifest

N = 12
POOLINGS = {"mean": (3,), "grid4": (2, 3), "max": (2,)}


def a_manifest(n: int = N) -> Manifest:
    numbers = np.arange(n)
    rows = pd.DataFrame(
        {
            "image": [f"elbow/{i:03d}.png" for i in numbers],
            "sha256": [f"{(i * 7919) % 251:02x}" * 31 + "00" for i in numbers],
            "patient": [f"p{i // 2}" for i in numbers],
            "study": [f"s{i // 2}" for i in numbers],
            "region": "elbow",
            "label": pd.array([[0, 1, None][(i // 2) % 3] for i in numbers], dtype="Int8"),
            "split": ["train" if i < 8 else "test" for i in numbers],
            "age": "40",
        }
    )
    return Manifest(rows.astype(dict.fromkeys(rows.columns.drop("label"), str)), "study")


def expected(manifest: Manifest) -> dict[str, np.ndarray]:
    first = keys_from_hex(manifest.rows["sha256"].tolist())[:, :1].astype(np.float32)
    return {
        "mean": first + np.array([0.25, 0.5, 0.75], np.float32),
        "max": first * np.array([1, 2], np.float32),
        "grid4": np.repeat(first[:, :, None], 6, axis=2).reshape(-1, 2, 3),
    }


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """Hold the manifest's rows in two shards, in another order."""
    spec = CacheSpec("ab" * 32, {"fit": "pad"}, POOLINGS, "float16")
    made = create_cache(tmp_path / "cache", spec, {"source": "demo", "revision": None})
    manifest = a_manifest()
    keys, values = keys_from_hex(manifest.rows["sha256"].tolist()), expected(manifest)
    for part in np.array_split(np.random.default_rng(0).permutation(N), 2):
        made.commit(keys[part], {name: values[name][part] for name in POOLINGS})
    return made


def test_poolings_stand_side_by_side_in_the_order_of_the_spec(cache: Cache) -> None:
    manifest = a_manifest()
    loaded = load_embeddings(cache, manifest)
    values = expected(manifest)
    assert (loaded.pooling, loaded.X.dtype, loaded.X.shape) == ("mean+max", np.float32, (N, 5))
    np.testing.assert_array_equal(loaded.X, np.hstack([values["mean"], values["max"]]))
    assert loaded.blocks == {"mean": slice(0, 3), "max": slice(3, 5)}
    assert loaded.X.flags.c_contiguous


@pytest.mark.parametrize("pool", ["mean", "max", "max+mean", "mean+max"])
def test_poolings_can_be_chosen(cache: Cache, pool: str) -> None:
    loaded = load_embeddings(cache, a_manifest(), pool=pool)
    values = expected(a_manifest())
    np.testing.assert_array_equal(loaded.X, np.hstack([values[name] for name in pool.split("+")]))
    for name, block in loaded.blocks.items():
        np.testing.assert_array_equal(loaded.X[:, block], values[name])


def test_labels_and_groups_follow_the_manifest(cache: Cache, tmp_path: Path) -> None:
    manifest = a_manifest()
    write_manifest(manifest, tmp_path / "m.csv")
    loaded = load_embeddings(cache.path, tmp_path / "m.csv")
    assert loaded.y.tolist() == [0, 0, 1, 1, -1, -1] * 2
    assert loaded.y.dtype == np.int8
    assert loaded.patients.tolist() == manifest.rows["patient"].tolist()
    assert loaded.studies.tolist() == manifest.rows["study"].tolist()
    assert loaded.regions.tolist() == ["elbow"] * N
    assert loaded.rows["age"].tolist() == ["40"] * N
    assert (loaded.label_level, len(loaded)) == ("study", N)
    assert loaded.failed.empty


def test_one_split_can_be_loaded(cache: Cache) -> None:
    loaded = load_embeddings(cache, a_manifest(), split="test")
    assert loaded.rows["image"].tolist() == [f"elbow/{i:03d}.png" for i in range(8, 12)]
    assert loaded.rows.index.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(loaded.X[:, :3], expected(a_manifest())["mean"][8:])
    with pytest.raises(TrainingDataError, match="no rows of split 'valid'; it has test, train"):
        load_embeddings(cache, a_manifest(), split="valid")


def test_failed_images_are_left_out_and_counted(cache: Cache) -> None:
    manifest = a_manifest(N + 2)
    shas = manifest.rows["sha256"].tolist()
    cache.record_failures([Failure(sha, "decode", "truncated") for sha in [*shas[N:], shas[0]]])
    loaded = load_embeddings(cache, manifest)
    assert len(loaded) == N  # the first is embedded after all
    assert loaded.failed["image"].tolist() == ["elbow/012.png", "elbow/013.png"]
    assert loaded.failed["reason"].tolist() == ["truncated"] * 2
    assert list(loaded.failed) == ["image", "sha256", "stage", "reason"]


def test_missing_rows_are_counted_and_the_command_that_makes_them_is_named(
    cache: Cache, tmp_path: Path
) -> None:
    manifest = a_manifest(N + 3)
    cache.record_failures([Failure(manifest.rows["sha256"][N], "decode", "truncated")])
    write_manifest(manifest, tmp_path / "m.csv")
    with pytest.raises(MissingRowsError) as caught:
        load_embeddings(cache, tmp_path / "m.csv")
    assert str(caught.value) == (
        "2 of 15 manifest rows are neither embedded nor listed as failed in the cache at "
        f"{cache.path}. This makes them:\n"
        f"  medembed extract {tmp_path / 'm.csv'} --image-root DIR --encoder demo "
        f"--cache {cache.path} --fit pad --pool mean,grid4,max"
    )


def test_images_with_the_same_bytes_share_a_row(cache: Cache) -> None:
    rows = a_manifest().rows
    twin = rows.iloc[[3]].assign(image="elbow/twin.png")
    manifest = Manifest(pd.concat([rows, twin], ignore_index=True), "study")
    loaded = load_embeddings(cache, manifest)
    assert len(loaded) == N + 1
    np.testing.assert_array_equal(loaded.X[-1], loaded.X[3])


def test_a_manifest_without_hashes_is_refused(cache: Cache) -> None:
    manifest = Manifest(a_manifest().rows.assign(sha256=""), "study")
    with pytest.raises(ManifestError, match=r"have no sha256.*--structure-only"):
        load_embeddings(cache, manifest)


def test_poolings_that_are_unknown_repeated_or_no_vectors_are_refused(cache: Cache) -> None:
    with pytest.raises(CacheError, match="no pooling 'pooler'; it has mean, grid4, max"):
        load_embeddings(cache, a_manifest(), pool="pooler")
    with pytest.raises(TrainingDataError, match=r"grid4 holds 2 × 3 values.*mean, max"):
        load_embeddings(cache, a_manifest(), pool="grid4")
    with pytest.raises(CacheError, match="twice"):
        load_embeddings(cache, a_manifest(), pool="mean+mean")


def test_a_damaged_shard_is_not_read(cache: Cache) -> None:
    path = next((cache.path / "shards").iterdir())
    data = bytearray(path.read_bytes())
    place = data.find(expected(a_manifest())["mean"].astype(np.float16)[0].tobytes())
    if place < 0:  # row 0 is in the other shard
        place = data.find(expected(a_manifest())["mean"].astype(np.float16)[1].tobytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=path.name):
        load_embeddings(cache, a_manifest())
    assert len(load_embeddings(cache, a_manifest(), verify=False)) == N
