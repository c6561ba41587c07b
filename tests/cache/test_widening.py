"""float16 becomes float32 as numpy does it, to the bit, only faster."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medembed.cache import widening
from medembed.cache.widening import put_rows

EVERY = np.arange(2**16, dtype=np.uint16).view(np.float16)
FINITE = EVERY[np.isfinite(EVERY)]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("values", [EVERY, FINITE], ids=["every", "finite"])
def test_every_float16_is_widened_as_numpy_does_it(values: np.ndarray) -> None:
    rows = np.resize(values, (len(values) // 1024 + 1, 1024))
    output = np.full(rows.shape, 7, np.float32)
    put_rows(output, slice(0, len(rows)), rows)
    assert same_bits(output, rows.astype(np.float32))


def test_the_fast_way_is_taken_and_wrong_numbers_in_it_are_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, output = FINITE[:1024].reshape(1, -1), np.zeros((1, 1024), np.float32)
    monkeypatch.setattr(widening, "SCALE", np.float32(2.0))
    put_rows(output, slice(0, 1), rows)
    assert not same_bits(output, rows.astype(np.float32))


@given(
    n_rows=st.integers(1, 300),
    shape=st.sampled_from([(3,), (1152,), (16, 5), (1,)]),
    dtypes=st.sampled_from([("f2", "f4"), ("f4", "f4"), ("f2", "f8"), ("f4", "f2")]),
    consecutive=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rows_come_to_their_places(
    n_rows: int, shape: tuple[int, ...], dtypes: tuple[str, str], consecutive: bool, seed: int
) -> None:
    chance = np.random.default_rng(seed)
    rows = chance.standard_normal((n_rows, *shape)).astype(dtypes[0])
    output = np.zeros((n_rows + 50, *shape, 2), dtypes[1])[..., 0]  # not contiguous
    expected = output.copy()
    places: slice | np.ndarray = chance.permutation(len(output))[:n_rows]
    if consecutive:
        places = slice(20, 20 + n_rows)
    put_rows(output, places, rows)
    expected[places] = rows
    assert np.array_equal(output, expected)


def test_where_subnormals_are_flushed_the_slow_way_keeps_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(widening, "SUBNORMAL", np.float32(0))  # as a flushing processor sees it
    monkeypatch.setattr(widening, "SCALE", np.float32(0))
    rows, output = FINITE.reshape(-1, 1024), np.zeros((62, 1024), np.float32)
    put_rows(output, slice(0, 62), rows)
    assert same_bits(output, rows.astype(np.float32))
