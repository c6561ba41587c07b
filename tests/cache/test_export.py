"""`cache export` writes what the cache holds, block by block, complete or not at all."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from medembed.cache import export as exporting
from medembed.cache.embeddings import load_embeddings
from medembed.cache.export import export
from medembed.cache.store import open_cache
from medembed.cli import main
from medembed.core.errors import CacheError, MissingRowsError, ShardError
from medembed.dataset.manifest import Manifest, read_manifest, write_manifest

ASSETS = Path(__file__).parents[1] / "assets" / "format-1"
POOLINGS = ("mean", "max", "grid4")


@pytest.fixture(params=["one block", "many blocks"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy a cache of 47 rows and a failure, and its manifest."""
    if request.param == "many blocks":
        monkeypatch.setattr(exporting, "BLOCK_BYTES", 1000)
    return Path(shutil.copytree(ASSETS, tmp_path / "place"))


def run(place: Path, out: str, *more: str) -> Result:
    arguments = ["cache", "export", str(place / "cache"), str(place / "manifest.csv")]
    return CliRunner().invoke(main, [*arguments, "-o", str(place / out), *more])


def read_npz(place: Path) -> dict[str, np.ndarray]:
    with np.load(place / "x.npz", allow_pickle=False) as file:
        return dict(file)


def truth(place: Path) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    data = load_embeddings(place / "cache", place / "manifest.csv", pool="mean")
    keys = np.array([list(bytes.fromhex(digest)) for digest in data.rows["sha256"]], np.uint8)
    return data.rows, open_cache(place / "cache").read(keys, POOLINGS)


def test_npz_is_what_the_cache_holds(place: Path) -> None:
    rows, expected = truth(place)
    assert run(place, "x.npz").exit_code == 0
    found = read_npz(place)
    assert set(found) == {*rows.columns, *POOLINGS}
    for name in POOLINGS:
        assert found[name].dtype == np.float16
        assert np.array_equal(found[name], expected[name])
    for name in rows:
        assert found[name].tolist() == rows[name].tolist()


def test_parquet_is_what_the_cache_holds(place: Path) -> None:
    rows, expected = truth(place)
    assert run(place, "x.parquet").exit_code == 0
    found = pd.read_parquet(place / "x.parquet")
    for name in POOLINGS:
        flat = expected[name].reshape(len(rows), -1)
        assert np.array_equal(np.stack(found[name]), flat.astype(np.float32))
    assert found[list(rows.columns)].to_dict("list") == rows.to_dict("list")
    assert pq.read_schema(place / "x.parquet").field("grid4").metadata == {b"shape": b"16,3"}


@pytest.mark.parametrize("options", [("x.csv",), ("x.parquet", "--wide")])
def test_a_wide_file_has_a_column_per_number(place: Path, options: tuple[str, ...]) -> None:
    rows, expected = truth(place)
    ran = run(place, *options)
    assert ran.exit_code == 0, ran.output
    read = pd.read_csv if options[0].endswith("csv") else pd.read_parquet
    found = read(place / options[0])
    names = [f"{name}_{k}" for name in POOLINGS for k in range(expected[name][0].size)]
    assert list(found.columns) == [*rows.columns, *names]
    values = np.hstack([expected[name].reshape(len(rows), -1) for name in POOLINGS])
    assert np.array_equal(found[names].to_numpy(np.float32), values.astype(np.float32))
    assert found["image"].tolist() == rows["image"].tolist()
    refused = run(place, "x.npz", "--wide")
    assert refused.exit_code == 2


def test_covariates_have_their_own_type_and_identifiers_stay_text(place: Path) -> None:
    manifest = read_manifest(place / "manifest.csv")
    n = len(manifest.rows)
    ages = ["", *(f"{k}.5" for k in range(n - 1))]
    rows = manifest.rows.assign(age=ages, ward=[f"{k:03}" for k in range(n)], note="=1+1")
    write_manifest(Manifest(rows, "study"), place / "manifest.csv")
    for options in (("x.parquet",), ("y.parquet", "--wide"), ("x.csv",)):
        ran = run(place, *options)
        assert ran.exit_code == 0, ran.output
    for name in ("x.parquet", "y.parquet"):
        found = pd.read_parquet(place / name)
        assert found["age"].dtype == "float64"
        own = rows.set_index("image").loc[found["image"], "age"]
        assert found["age"].fillna(-1).tolist() == [float(a) if a else -1.0 for a in own]
        assert set(found["ward"]) <= set(rows["ward"])
        assert set(found["note"]) == {"=1+1"}
    assert set(pd.read_csv(place / "x.csv")["note"]) == {"'=1+1"}


@pytest.mark.parametrize("suffix", ["npz", "parquet", "csv"])
def test_the_same_rows_give_the_same_file(suffix: str, place: Path) -> None:
    files = []
    for _ in range(2):
        assert run(place, f"x.{suffix}").exit_code == 0  # the second replaces the first
        files.append((place / f"x.{suffix}").read_bytes())
    assert files[0] == files[1]


def test_poolings_can_be_chosen_and_the_document_says_what_was_written(place: Path) -> None:
    ran = run(place, "x.npz", "--pool", "max", "--json")
    assert ran.exit_code == 0, ran.output
    document = json.loads(ran.stdout)
    assert document["file"] == str(place / "x.npz")
    assert document["poolings"] == {"max": [3]}
    assert (document["rows"], document["failed"]) == (47, 1)
    assert document["bytes"] == (place / "x.npz").stat().st_size
    assert "mean" not in read_npz(place)


def test_an_unknown_label_and_a_column_named_like_a_pooling(place: Path) -> None:
    manifest = read_manifest(place / "manifest.csv")
    manifest.rows.loc[0, "label"] = pd.NA
    rows = manifest.rows.assign(mean="é, \nè", age="")
    write_manifest(Manifest(rows, "study"), place / "manifest.csv")
    assert run(place, "x.npz").exit_code == 0
    assert run(place, "x.parquet").exit_code == 0
    found, table = read_npz(place), pd.read_parquet(place / "x.parquet")
    assert found["label"][0] == -1
    assert pd.isna(table["label"][0])
    assert found["mean"].tolist() == table["mean"].tolist() == ["é, \nè"] * 47
    assert np.array_equal(found["embedding_mean"], np.stack(table["embedding_mean"]))


@pytest.mark.parametrize("name", ["x.tsv", "x", "x.npz.gz", ".npz"])
def test_another_suffix_is_wrong_usage(name: str, place: Path) -> None:
    assert run(place, name).exit_code == 2


def test_a_pooling_that_is_not_there_is_named(place: Path) -> None:
    ran = run(place, "x.npz", "--pool", "pooler")
    assert ran.exit_code == 1
    assert "no pooling 'pooler'; it has mean, max, grid4" in ran.output


def test_missing_rows_are_refused_with_the_command_that_makes_them(place: Path) -> None:
    min((place / "cache" / "shards").iterdir()).unlink()
    manifest = read_manifest(place / "manifest.csv")
    with pytest.raises(MissingRowsError, match="medembed extract MANIFEST"):
        export(open_cache(place / "cache"), manifest, place / "x.npz")


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_a_damaged_shard_leaves_the_old_file_and_nothing_half_written(
    suffix: str, place: Path
) -> None:
    (place / f"x.{suffix}").write_text("old")
    shard = max((place / "cache" / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    before = set(place.iterdir())
    with pytest.raises(ShardError, match="is damaged"):
        export(
            open_cache(place / "cache"),
            read_manifest(place / "manifest.csv"),
            place / f"x.{suffix}",
        )
    assert set(place.iterdir()) == before
    assert (place / f"x.{suffix}").read_text() == "old"


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_a_place_that_cannot_be_written_is_one_clear_error(suffix: str, place: Path) -> None:
    ran = run(place, f"no/x.{suffix}")
    assert ran.exit_code == 1
    assert "cannot write" in ran.output
    assert "Nothing was left half-written" in ran.output


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_a_full_disk_is_one_clear_error(
    suffix: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medembed.core.files.os.fsync", fail)
    cache, manifest = open_cache(place / "cache"), read_manifest(place / "manifest.csv")
    before = set(place.iterdir())
    with pytest.raises(CacheError, match="No space left on device"):
        export(cache, manifest, place / f"x.{suffix}")
    assert set(place.iterdir()) == before
