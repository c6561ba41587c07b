import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.neighbors import NearestNeighbors

from medembed.core import nearest
from medembed.core.errors import ArgumentError
from medembed.core.nearest import find_neighbours, measure


def by_brute_force(queries, rows, k, metric, own, groups, rank):
    """Sort every row by its exact distance, then by rank."""
    found = []
    for query, group in zip(queries, own, strict=True):
        distance = measure(query, rows, metric)
        allowed = np.flatnonzero(groups != group)
        order = allowed[np.lexsort((rank[allowed], distance[allowed]))][:k]
        found.append([*order, *[-1] * (k - len(order))])
    return np.array(found).reshape(len(queries), k)


@st.composite
def searches(draw):
    """Few distinct values, so that ties, equal rows and rows of zeros abound."""
    d = draw(st.integers(1, 4))
    n, m = draw(st.integers(1, 30)), draw(st.integers(1, 5))
    scale = draw(st.sampled_from([1.0, 1e-20, 1e-3, 1e25]))
    dtype = np.float32 if scale != 1.0 else draw(st.sampled_from([np.float16, np.float64]))
    values = st.sampled_from([-1.0, 0.0, 0.0, 1.0, 2.0, 2.001])
    rows = draw(arrays(np.float64, (n, d), elements=values)) * scale
    queries = draw(arrays(np.float64, (m, d), elements=values)) * scale
    return {
        "queries": queries.astype(dtype),
        "rows": rows.astype(dtype),
        "k": draw(st.integers(1, 35)),
        "metric": draw(st.sampled_from(nearest.METRICS)),
        "own": draw(arrays(np.int64, m, elements=st.integers(0, 3))),
        "groups": draw(arrays(np.int64, n, elements=st.integers(0, 3))),
        "rank": np.array(draw(st.permutations(range(n)))),
    }


@given(searches(), st.integers(1, 12), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_neighbours_are_those_of_brute_force(search, block_rows, spare):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest, "BLOCK_ROWS", block_rows)
        patch.setattr(nearest, "QUERY_ROWS", 2)
        patch.setattr(nearest, "_SPARE", spare)
        found = find_neighbours(**search)
    assert np.array_equal(found.rows, by_brute_force(**search))
    is_there = found.rows >= 0
    assert np.isinf(found.distance[~is_there]).all()
    assert (np.diff(np.where(is_there, found.distance, 9e99)) >= 0).all()


@pytest.mark.parametrize("metric", nearest.METRICS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_distances_are_those_of_scikit_learn(metric, dtype):
    generator = np.random.default_rng(0)
    rows, queries = (generator.normal(3, 1, (n, 40)).astype(dtype) for n in (9000, 30))
    found = find_neighbours(queries, rows, 15, metric=metric)
    oracle = NearestNeighbors(n_neighbors=15, metric=metric, algorithm="brute")
    distance, places = oracle.fit(rows.astype(float)).kneighbors(queries.astype(float))
    assert np.array_equal(found.rows, places)
    np.testing.assert_allclose(found.distance, distance, atol=1e-12)


@pytest.mark.parametrize("metric", nearest.METRICS)
def test_company_and_blocks_change_no_byte(metric, monkeypatch):
    generator = np.random.default_rng(0)
    rows = generator.normal(3, 0.01, (3000, 33)).astype(np.float16)  # all nearly equally near
    together = find_neighbours(rows[:300], rows, 10, metric=metric)
    monkeypatch.setattr(nearest, "BLOCK_ROWS", 77)
    for query in (0, 137, 299):
        alone = find_neighbours(rows[query : query + 1], rows, 10, metric=metric)
        assert np.array_equal(alone.rows[0], together.rows[query])
        assert alone.distance.tobytes() == together.distance[query : query + 1].tobytes()


def test_a_vector_of_zeros_resembles_none():
    rows = np.array([[0, 0], [1, 0], [-1, 0]], np.float32)
    found = find_neighbours(rows, rows, 3)
    assert found.distance.tolist() == [[1, 1, 1], [0, 1, 2], [0, 1, 2]]
    assert found.rows.tolist() == [[0, 1, 2], [1, 0, 2], [2, 0, 1]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_refused_with_its_row(value):
    rows = np.ones((20, 3), np.float32)
    broken = rows.copy()
    broken[13, 1] = value
    with pytest.raises(ArgumentError, match="row 13 holds a value that is not a finite number"):
        find_neighbours(rows, broken, 2)
    with pytest.raises(ArgumentError, match="query 13 holds"):
        find_neighbours(broken, rows, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "at least 1"),
        ({"metric": "manhattan"}, "one of cosine, euclidean"),
        ({"queries": np.ones((2, 5))}, "do not fit rows of 3 columns"),
        ({"queries": np.ones(3)}, "do not fit rows of 3 columns"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(ArgumentError, match=message):
        find_neighbours(**{"queries": np.ones((2, 3)), "rows": np.ones((4, 3)), "k": 2, **change})


def test_no_rows_and_no_queries_are_no_neighbours():
    assert find_neighbours(np.ones((2, 3)), np.empty((0, 3)), 4).rows.tolist() == [[-1] * 4] * 2
    assert find_neighbours(np.empty((0, 3)), np.ones((2, 3)), 4).rows.shape == (0, 4)
