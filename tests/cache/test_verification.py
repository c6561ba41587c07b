"""`cache verify` finds every damage before HDF5 sees it; `--repair` sets bad shards aside."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from made_extraction import HalvesEncoder, write_images

from medembed.cache import shards
from medembed.cache.failures import Failure, read_failures
from medembed.cache.spec import CacheSpec
from medembed.cache.store import Cache, create_cache, open_cache
from medembed.cache.verification import SET_ASIDE
from medembed.cli import main
from medembed.dataset.manifest import Manifest, write_manifest
from medembed.extraction import extract

SPEC = CacheSpec("ab" * 32, {"width": 8}, {"mean": (3,), "grid4": (16, 3)}, "float16")
N_FLIPS = 2000


def some_keys(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 32), dtype=np.uint8)


def rows_of(keys: np.ndarray) -> dict[str, np.ndarray]:
    mean = keys[:, :3].astype(np.float32)
    return {"mean": mean, "grid4": np.repeat(mean[:, None], 16, axis=1)}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """Make a cache of two shards, of 20 and 30 rows."""
    made = create_cache(tmp_path / "cache", SPEC, {"source": "made up"})
    for seed, n_rows in ((0, 20), (1, 30)):
        made.commit(some_keys(n_rows, seed), rows_of(some_keys(n_rows, seed)))
    return made


def paths_of(cache: Cache) -> list[Path]:
    return sorted((cache.path / "shards").glob("*.h5"))


def test_every_flipped_bit_is_found_before_hdf5_sees_a_byte(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache.verify() == []
    path = paths_of(cache)[0]
    whole = path.read_bytes()
    opened: list[bytes] = []
    real = h5py.File

    def watched(file: object, *args: object, **kwargs: object) -> object:
        opened.append(file.getvalue())  # type: ignore[attr-defined]
        return real(file, *args, **kwargs)

    monkeypatch.setattr(shards.h5py, "File", watched)
    bits = np.random.default_rng(0).choice(8 * len(whole), N_FLIPS, replace=False)
    for bit in bits.tolist():
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        (problem,) = cache.verify()
        assert path.name in problem
    assert whole not in opened
    assert {len(data) for data in opened} == {paths_of(cache)[1].stat().st_size}
    path.write_bytes(whole)
    assert cache.verify() == []


def cut(path: Path, other: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def lengthen(path: Path, other: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def replace_by_directory(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_dangling_link(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.h5")


def replace_by_text(path: Path, other: Path) -> None:
    path.write_text("These are no rows.")


def replace_by_the_other(path: Path, other: Path) -> None:
    shutil.copy(other, path)


def replace_by_another_caches(path: Path, other: Path) -> None:
    spec = CacheSpec("cd" * 32, SPEC.preprocessing, SPEC.poolings, SPEC.dtype)
    keys = some_keys(5, 7)
    path.unlink()
    shards.write_shard(path.parent, keys, rows_of(keys), spec)


def replace_by_infinities(path: Path, other: Path) -> None:
    """Write a shard as other software might: well hashed, with values that are no numbers."""
    keys = some_keys(5, 7)
    stored = {name: values.astype(np.float16) for name, values in rows_of(keys).items()}
    stored["mean"][2, 1] = np.inf
    data = shards._encode(keys, stored, SPEC)
    path.unlink()
    path.with_name(shards._name_of(data)).write_bytes(data)


def replace_by_next_version(path: Path, other: Path) -> None:
    data = path.read_bytes().replace(b'"version": 1', b'"version": 2', 1)
    path.unlink()
    path.with_name(shards._name_of(data)).write_bytes(data)


def add_a_stranger(path: Path, other: Path) -> None:
    path.with_name("notes.txt").write_text("not a shard")


DAMAGES = [
    *((cut, "bytes hash to"), (empty, "bytes hash to"), (lengthen, "bytes hash to")),
    *((replace_by_text, "bytes hash to"), (replace_by_the_other, "bytes hash to")),
    *(
        (replace_by_directory, "cannot read"),
        (replace_by_dangling_link, "cannot read"),
        (replace_by_another_caches, "another spec"),
    ),
    *((replace_by_infinities, "NaN or infinite"), (replace_by_next_version, "version 2")),
    (add_a_stranger, "not a shard"),
]


@pytest.mark.parametrize(
    ("damage", "words"), DAMAGES, ids=lambda value: getattr(value, "__name__", "")
)
def test_damage_is_named_and_set_aside(damage: object, words: str, cache: Cache) -> None:
    path, other = paths_of(cache)
    damage(path, other)  # type: ignore[operator]
    result = CliRunner().invoke(main, ["cache", "verify", str(cache.path), "--json"])
    assert result.exit_code == 1
    (problem,) = json.loads(result.stdout)["problems"]
    assert words in problem
    result = CliRunner().invoke(main, ["cache", "verify", str(cache.path), "--repair", "--json"])
    assert result.exit_code == 1
    (aside,) = json.loads(result.stdout)["set_aside"]
    assert Path(aside).parent == cache.path / SET_ASIDE
    assert os.path.lexists(aside)
    result = CliRunner().invoke(main, ["cache", "verify", str(cache.path)])
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (0, f"{cache.path}: no problems")


def test_two_shards_that_changed_places_are_both_found(cache: Cache) -> None:
    first, second = paths_of(cache)
    first.rename(first.with_suffix(".tmp"))
    second.rename(first)
    first.with_suffix(".tmp").rename(second)
    assert [
        name in line for name, line in zip((first.name, second.name), cache.verify(), strict=True)
    ]


def test_rows_that_stand_twice_are_found_and_nothing_is_set_aside(cache: Cache) -> None:
    keys = np.concatenate([some_keys(20)[3:7], some_keys(9, seed=5)])
    cache.commit(keys, rows_of(keys))
    (problem,) = cache.verify()
    assert problem.startswith("4 row(s) of shard ")
    result = CliRunner().invoke(main, ["cache", "verify", str(cache.path), "--repair"])
    assert result.exit_code == 1
    assert not (cache.path / SET_ASIDE).exists()
    assert len(paths_of(cache)) == 3


def test_nothing_that_was_set_aside_is_overwritten(cache: Cache) -> None:
    path = paths_of(cache)[0]
    whole = path.read_bytes()
    for n_times in (1, 2, 3):
        path.write_bytes(whole[:-n_times])
        CliRunner().invoke(main, ["cache", "verify", str(cache.path), "--repair"])
    kept = {file.stat().st_size for file in (cache.path / SET_ASIDE).iterdir()}
    assert kept == {len(whole) - n_times for n_times in (1, 2, 3)}


def test_after_a_repair_just_the_lost_rows_are_embedded_again(tmp_path: Path) -> None:
    manifest = write_images(tmp_path / "images", 30)

    def embed(rows: Manifest) -> int:
        return extract(rows, tmp_path / "images", HalvesEncoder(), tmp_path / "cache").embedded

    assert embed(Manifest(manifest.rows.iloc[:12].reset_index(drop=True), "image")) == 12
    first = set((tmp_path / "cache" / "shards").iterdir())
    assert embed(manifest) == 18
    (second,) = set((tmp_path / "cache" / "shards").iterdir()) - first
    os.truncate(second, 600)
    CliRunner().invoke(main, ["cache", "verify", str(tmp_path / "cache"), "--repair"])
    assert embed(manifest) == 18
    assert second.exists()  # the same rows give the same shard
    assert open_cache(tmp_path / "cache").verify() == []


def test_a_failure_that_is_known_is_not_written_again(cache: Cache) -> None:
    failure = Failure("ab" * 32, "decode", "torn")
    for _ in range(3):
        cache.record_failures([failure])
    assert len((cache.path / "failures.jsonl").read_bytes().splitlines()) == 1
    cache.record_failures([Failure("ab" * 32, "decode", "torn otherwise")])
    assert read_failures(cache.path / "failures.jsonl")["ab" * 32].reason == "torn otherwise"


def test_info_says_what_of_a_manifest_is_there_and_what_failed(tmp_path: Path) -> None:
    manifest = write_images(tmp_path / "images", 6)
    torn = tmp_path / "images" / "004.png"
    torn.write_bytes(torn.read_bytes()[:40])
    digests = manifest.rows["sha256"].tolist()
    digests[4] = hashlib.sha256(torn.read_bytes()).hexdigest()
    digests[1] = digests[0]
    shutil.copy(tmp_path / "images" / "000.png", tmp_path / "images" / "001.png")
    manifest = Manifest(manifest.rows.assign(sha256=digests), "image")
    write_manifest(manifest, tmp_path / "manifest.csv")
    first = Manifest(manifest.rows.iloc[[0, 1, 2, 4]].reset_index(drop=True), "image")
    extract(first, tmp_path / "images", HalvesEncoder(), tmp_path / "cache")
    given = [str(tmp_path / "cache"), "--manifest", str(tmp_path / "manifest.csv"), "--failures"]
    result = CliRunner().invoke(main, ["cache", "info", *given, "--json"])
    card = json.loads(result.stdout)
    assert card["coverage"] == {"rows": 6, "contents": 5, "embedded": 2, "failed": 1, "missing": 2}
    (failed,) = card["failed"]
    assert (failed["image"], failed["sha256"], failed["stage"]) == ("004.png", digests[4], "decode")
    lines = CliRunner().invoke(main, ["cache", "info", *given]).stdout.splitlines()
    assert "  missing: 2" in lines
    assert any(line.startswith("failed (decode): 004.png: ") for line in lines)
