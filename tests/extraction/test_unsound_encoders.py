"""An encoder that gives no sound rows is named before there is a cache, and nothing is left."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_extraction import HalvesEncoder, write_images

from medembed.cache.shards import describe_loss
from medembed.cache.spec import CacheSpec, keys_from_hex
from medembed.cache.store import create_cache, open_cache
from medembed.core.errors import CacheError, EncoderError
from medembed.extraction import extract

Rows = dict[str, np.ndarray]


class Unsound(HalvesEncoder):
    """Change what the encoder gives, once it has been called `sound_for` times."""

    change: Callable[[Rows], Any]
    sound_for = 0

    def encode(self, pixels: np.ndarray, poolings: Sequence[str]) -> Any:
        found = super().encode(pixels, poolings)
        return found if len(self.shapes) <= self.sound_for else type(self).change(found)


def put(value: float) -> Callable[[Rows], Rows]:
    def change(rows: Rows) -> Rows:
        rows["max"][-1, -1] = value
        return rows

    return change


CHANGES: dict[str, tuple[Callable[[Rows], Any], str]] = {
    "NaN": (put(float("nan")), "max embeddings are not finite in fp32"),
    "infinity": (put(float("-inf")), "max embeddings are not finite in fp32"),
    "too few rows": (
        lambda rows: {name: values[:-1] for name, values in rows.items()},
        r"halves gave pooling mean in shape \(0, 2\) for 1 images; it must be \(1, 2\)",
    ),
    "too many rows": (
        lambda rows: {name: np.repeat(values, 2, axis=0) for name, values in rows.items()},
        r"in shape \(2, 2\) for 1 images",
    ),
    "too narrow": (lambda rows: {**rows, "max": rows["max"][:, :1]}, r"max in shape \(1, 1\)"),
    "one number": (lambda rows: {**rows, "max": np.float32(1.5)}, "gave no array for pooling max"),
    "objects": (
        lambda rows: {**rows, "max": rows["max"].astype(object)},
        "gave an array of object for pooling max",
    ),
    "text": (lambda rows: {**rows, "max": rows["max"].astype(str)}, "gave an array of <U"),
    "complex": (lambda rows: {**rows, "max": rows["max"] + 1j}, "gave an array of complex"),
    "a list": (lambda rows: {**rows, "max": rows["max"].tolist()}, "gave no array for pooling max"),
    "a pooling less": (lambda rows: {"mean": rows["mean"]}, "gave no array for pooling max"),
    "nothing": (lambda rows: None, "gave no array for pooling mean"),
}


def unsound(change: Callable[[Rows], Any], sound_for: int = 0) -> Unsound:
    return type("Changed", (Unsound,), {"change": staticmethod(change), "sound_for": sound_for})()


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_no_row_is_named_before_there_is_a_cache(what: str, tmp_path: Path) -> None:
    change, message = CHANGES[what]
    manifest = write_images(tmp_path / "images", 3)
    with pytest.raises(EncoderError, match=message):
        extract(manifest, tmp_path / "images", unsound(change), tmp_path / "c", decoders=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


@pytest.mark.parametrize("what", CHANGES)
def test_an_encoder_that_turns_unsound_adds_nothing(what: str, tmp_path: Path) -> None:
    """It is sound while the canary is laid and checked, which takes five calls."""
    change, _ = CHANGES[what]
    manifest = write_images(tmp_path / "images", 3)
    report = extract(
        manifest, tmp_path / "images", unsound(change, 5), tmp_path / "c", decoders=1, batch_size=4
    )
    rows = len(open_cache(tmp_path / "c").keys())
    assert rows == report.embedded
    # of a batch of four, filled up with black, the last row is no image's
    expected = (3, 0) if what in ("NaN", "infinity") else (0, 3)
    assert (report.embedded, report.failed) == expected


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (1e30, r"pooling mean reaches 1\.\d+e\+32, more than float16 can hold \(65504\)"),
        (1e-9, "pooling mean has 4 of 4 rows that are not zero and vanish in float16"),
        (1e-30, r"nothing in them is above .*e-28, and the smallest number that float16 holds"),
        (2e-7, r"vanish in float16.*is 6\.10352e-05\. Choose a new --cache with --dtype float32"),
    ],
)
def test_what_float16_does_not_hold_is_said_before_there_is_a_cache(
    scale: float, message: str, tmp_path: Path
) -> None:
    manifest = write_images(tmp_path / "images", 3)
    encoder = HalvesEncoder(scale=scale)
    with pytest.raises(CacheError, match=message):
        extract(manifest, tmp_path / "images", encoder, tmp_path / "c", decoders=1)
    assert not (tmp_path / "c").exists()
    if scale > 1e-20:
        options: dict[str, Any] = {"dtype": "float32", "decoders": 1}
        report = extract(manifest, tmp_path / "images", encoder, tmp_path / "c", **options)
        assert report.embedded == 3


def test_rows_that_vanish_are_refused_and_zero_rows_are_not(tmp_path: Path) -> None:
    spec = CacheSpec("ab" * 32, {}, {"mean": (3,)}, "float16")
    cache = create_cache(tmp_path / "c", spec, {"source": "x"})
    keys = keys_from_hex([f"{k:064x}" for k in range(3)])
    rows = np.array([[0, 0, 0], [0, 1e-6, 1.0], [0, -7e-5, 1e-9]], np.float32)
    cache.commit(keys, {"mean": rows})
    for small in (6e-5, -6e-5, 1e-7, 1e-12, 1e-45):
        rows[1] = [0, small, small / 2]
        with pytest.raises(CacheError, match="has 1 of 3 rows that are not zero and vanish"):
            cache.commit(keys, {"mean": rows})
    assert len(list((tmp_path / "c" / "shards").iterdir())) == 1
    assert cache.verify() == []
    document = json.loads((tmp_path / "c" / "cache.json").read_text())
    assert document["spec"]["dtype"] == "float16"


def test_what_is_in_a_cache_already_is_not_refused_again() -> None:
    rows = np.array([[6e-8, 0.0]], np.float16)
    assert describe_loss(rows, rows) is None
    assert describe_loss(rows.astype(np.float32), rows) is not None
    assert describe_loss(np.empty((0, 2), np.float32), np.empty((0, 2), np.float16)) is None
    tiny = np.array([[1e-60, 0.0]])
    assert describe_loss(tiny, tiny.astype(np.float32)) is not None
