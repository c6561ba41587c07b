"""Shards: complete or absent, the same bytes for the same rows, never believed unproved."""

import errno
import hashlib
import io
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from medembed.cache import shards
from medembed.cache.shards import copy_rows, is_shard_name, read_keys, read_shard, write_shard
from medembed.cache.spec import CacheSpec, hex_from_keys, keys_from_hex, sortable
from medembed.core.errors import CacheError, ShardError

SPEC = CacheSpec("ab" * 32, {"fit": "stretch"}, {"mean": (3,), "grid4": (2, 3)}, "float16")


def some_rows(n: int, spec: CacheSpec = SPEC, seed: int = 0) -> tuple[np.ndarray, dict[str, Any]]:
    generator = np.random.default_rng(seed)
    keys = generator.integers(0, 256, (n, 32), dtype=np.uint8)
    shapes = spec.poolings.items()
    return keys, {name: generator.standard_normal((n, *shape)) for name, shape in shapes}


def test_rows_come_back_as_they_were_stored(tmp_path: Path) -> None:
    keys, embeddings = some_rows(2500)  # three chunks, the last one not full
    read, values = read_shard(write_shard(tmp_path, keys, embeddings, SPEC), spec=SPEC)
    np.testing.assert_array_equal(read, keys)
    for name in SPEC.poolings:
        assert values[name].dtype == np.float16
        np.testing.assert_array_equal(values[name], embeddings[name].astype(np.float16))


def test_the_layout_is_the_one_that_is_documented(tmp_path: Path) -> None:
    keys, embeddings = some_rows(1500)
    path = write_shard(tmp_path, keys, embeddings, SPEC)
    with h5py.File(path) as file:
        assert set(file) == {"sha256", "embeddings"}
        assert file["sha256"].shape == (1500, 32)
        assert file["sha256"].dtype == np.uint8
        assert file["embeddings/grid4"].shape == (1500, 2, 3)
        assert file["embeddings/grid4"].chunks == (1024, 2, 3)
        assert file["embeddings/mean"].dtype == np.float16
        assert file["embeddings/mean"].compression is None
    header = json.loads(path.read_bytes()[:512])
    assert (header["format"], header["version"], header["rows"]) == ("medembed-shard", 1, 1500)


def test_the_name_is_the_hash_and_the_same_rows_give_the_same_file(tmp_path: Path) -> None:
    keys, embeddings = some_rows(50)
    (tmp_path / "again").mkdir()
    path = write_shard(tmp_path, keys, embeddings, SPEC)
    time.sleep(1.1)  # HDF5 would keep times in whole seconds
    again = write_shard(tmp_path / "again", keys, dict(reversed(embeddings.items())), SPEC)
    assert path.name == hashlib.sha256(path.read_bytes()).hexdigest()[:32] + ".h5"
    assert is_shard_name(path.name)
    if h5py.version.hdf5_version_tuple >= (2,):  # before, it kept the second that a group was made
        assert path.read_bytes() == again.read_bytes()
        assert write_shard(tmp_path, keys, embeddings, SPEC) == path
    assert [entry.name for entry in tmp_path.glob("*.*")] == [path.name]


@settings(deadline=None, max_examples=25)
@given(
    arrays(np.uint8, st.tuples(st.integers(1, 40), st.just(32)), elements=st.integers(0, 1)),
    st.data(),
)
def test_any_rows_can_be_copied_to_any_places(
    tmp_path_factory: pytest.TempPathFactory, keys: np.ndarray, data: st.DataObject
) -> None:
    keys = np.unique(keys, axis=0)
    spec = CacheSpec("ab" * 32, {}, {"mean": (2,)}, "float32")
    values = np.arange(2 * len(keys), dtype=np.float32).reshape(-1, 2)
    path = write_shard(tmp_path_factory.mktemp("shard"), keys, {"mean": values}, spec)
    rows = np.array(data.draw(st.lists(st.integers(0, len(keys) - 1), min_size=1)))
    places = np.array(data.draw(st.permutations(range(len(rows)))))
    output = np.full((len(rows), 2), np.nan)
    copy_rows(path, rows, places, {"mean": output})
    np.testing.assert_array_equal(output[places], values[rows])


def test_rows_of_all_chunks_are_copied_and_widened(tmp_path: Path) -> None:
    keys, embeddings = some_rows(3000)
    path = write_shard(tmp_path, keys, embeddings, SPEC)
    rows = np.random.default_rng(1).permutation(3000)[:1000]
    output = np.zeros((1000, 3), np.float32)
    copy_rows(path, rows, np.arange(1000), {"mean": output})
    np.testing.assert_array_equal(output, embeddings["mean"].astype(np.float16)[rows])


@settings(deadline=None, max_examples=50)
@given(arrays(np.uint8, st.tuples(st.integers(0, 20), st.just(32)), elements=st.integers(0, 2)))
def test_keys_sort_and_compare_as_bytes_do_even_when_they_end_in_zeros(keys: np.ndarray) -> None:
    plain = [bytes(key) for key in keys]
    ordered = np.sort(sortable(keys)).view(np.uint8).reshape(-1, 32)
    assert [bytes(key) for key in ordered] == sorted(plain)
    equal = sortable(keys)[:, None] == sortable(keys)[None, :]
    assert equal.tolist() == [[a == b for b in plain] for a in plain]
    np.testing.assert_array_equal(keys_from_hex(hex_from_keys(keys)), keys)


@pytest.mark.parametrize("digest", ["", "ab" * 31, "zz" * 32, "ab" * 33])
def test_what_is_no_sha256_is_refused_as_a_key(digest: str) -> None:
    with pytest.raises(CacheError, match="SHA-256"):
        keys_from_hex(["ab" * 32, digest])


def test_every_flipped_bit_is_noticed_before_hdf5_sees_it(tmp_path: Path) -> None:
    whole = write_shard(tmp_path, *some_rows(20), SPEC)
    data = bytearray(whole.read_bytes())
    generator = np.random.default_rng(0)
    for bit in generator.choice(8 * len(data), 300, replace=False).tolist():
        data[bit // 8] ^= 1 << bit % 8
        whole.write_bytes(data)
        with pytest.raises(ShardError, match=f"{whole.name} is damaged"):
            read_shard(whole)
        data[bit // 8] ^= 1 << bit % 8
    whole.write_bytes(data)
    read_shard(whole)


def test_keys_alone_are_proved_too(tmp_path: Path) -> None:
    keys, embeddings = some_rows(20)
    path = write_shard(tmp_path, keys, embeddings, SPEC)
    np.testing.assert_array_equal(read_keys(path, spec=SPEC), keys)
    data = bytearray(path.read_bytes())
    data[data.find(keys.tobytes()) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match="its keys do not hash"):
        read_keys(path)
    path.write_bytes(b"not a shard")
    with pytest.raises(ShardError, match="header cannot be read"):
        read_keys(path)


@pytest.mark.parametrize("keep", [0, 100, 512, 0.5, -1])
def test_a_truncated_shard_is_refused(tmp_path: Path, keep: float) -> None:
    path = write_shard(tmp_path, *some_rows(20), SPEC)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep == 0.5 else int(keep)])
    for verify in (True, False):
        with pytest.raises(ShardError, match=str(path)):
            read_shard(path, verify=verify)


def test_a_shard_of_another_spec_is_refused(tmp_path: Path) -> None:
    path = write_shard(tmp_path, *some_rows(20), SPEC)
    other = CacheSpec("cd" * 32, SPEC.preprocessing, SPEC.poolings, SPEC.dtype)
    for read in (read_keys, read_shard):
        with pytest.raises(ShardError, match="another spec"):
            read(path, spec=other)


def test_a_shard_under_another_name_is_refused(tmp_path: Path) -> None:
    path = write_shard(tmp_path, *some_rows(20), SPEC)
    other = path.with_name("0" * 32 + ".h5")
    shutil.copy(path, other)
    with pytest.raises(ShardError, match="bytes hash to"):
        read_shard(other)
    read_shard(other, verify=False)


def test_an_unknown_version_is_refused_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "VERSION", 7)
    path = write_shard(tmp_path, *some_rows(3), SPEC)
    monkeypatch.undo()
    with pytest.raises(ShardError, match=r"format version 7.*reads version 1"):
        read_keys(path)


def test_values_that_are_not_finite_or_fit_no_float16_are_refused(tmp_path: Path) -> None:
    keys, embeddings = some_rows(4)
    embeddings["mean"][2, 1] = 70000.0
    with pytest.raises(CacheError, match=r"reaches 70000, more than float16.*--dtype float32"):
        write_shard(tmp_path, keys, embeddings, SPEC)
    embeddings["mean"][2, 1] = np.nan
    with pytest.raises(CacheError, match="NaN"):
        write_shard(tmp_path, keys, embeddings, SPEC)
    assert not list(tmp_path.iterdir())


def test_wrong_shapes_poolings_and_repeated_keys_are_refused(tmp_path: Path) -> None:
    keys, embeddings = some_rows(4)
    with pytest.raises(CacheError, match="shape"):
        write_shard(tmp_path, keys, embeddings | {"mean": np.zeros((4, 2))}, SPEC)
    with pytest.raises(CacheError, match="poolings mean, grid4; these hold mean"):
        write_shard(tmp_path, keys, {"mean": embeddings["mean"]}, SPEC)
    with pytest.raises(CacheError, match="each key once"):
        write_shard(tmp_path, keys[[0, 1, 2, 0]], embeddings, SPEC)
    with pytest.raises(CacheError, match="at least one row"):
        write_shard(tmp_path, *some_rows(0), SPEC)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(CacheError, match="No space left on device"):
        write_shard(tmp_path, *some_rows(20), SPEC)
    assert not list(tmp_path.iterdir())


def test_a_read_only_file_system_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(CacheError, match="Read-only file system"):
        write_shard(tmp_path, *some_rows(2), SPEC)


def test_a_missing_directory_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="cannot write a shard"):
        write_shard(tmp_path / "gone", *some_rows(2), SPEC)


def test_what_the_disk_gives_back_otherwise_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_bytes

    def misread(path: Path) -> bytes:
        data = bytearray(read(path))
        data[-1] ^= 1
        return bytes(data)

    monkeypatch.setattr(Path, "read_bytes", misread)
    with pytest.raises(ShardError, match="does not read back as written"):
        write_shard(tmp_path, *some_rows(20), SPEC)
    assert not list(tmp_path.iterdir())


def test_what_hdf5_stored_otherwise_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = shards._encode

    def miswrite(keys: np.ndarray, stored: dict[str, np.ndarray], spec: CacheSpec) -> bytes:
        buffer = io.BytesIO(encode(keys, stored, spec))
        with h5py.File(buffer, "r+") as file:
            file["embeddings/mean"][0] = 0
        return buffer.getvalue()

    monkeypatch.setattr(shards, "_encode", miswrite)
    with pytest.raises(ShardError, match="does not read back as written"):
        write_shard(tmp_path, *some_rows(20), SPEC)
    assert not list(tmp_path.iterdir())
