import hashlib
import json

import lightgbm
import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medembed.core.errors import ModelError, TrainingDataError
from medembed.heads import scaling as projection_module
from medembed.heads.base import arrays_of
from medembed.heads.lightgbm import BinnedRows, LightGBMHead
from medembed.heads.linear import LogisticHead, fit_path
from medembed.heads.mlp import MLPHead
from medembed.heads.packaging import load_model, save_model
from medembed.heads.scaling import SCALINGS, Basis, Projection, Projector


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def table(n=300, d=8, seed=0, dtype=np.float32, offset=3.0):
    """Return correlated columns whose principal components have distinct variances."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(d, d)) * 0.6 ** np.arange(d)[:, None]
    return (generator.normal(size=(n, d)) @ mixing + offset).astype(dtype)


def labels(X, seed=0, noise=1.0):
    signal = X[:, :3].sum(axis=1)
    signal = (signal - np.median(signal)) / signal.std()
    return (signal + noise * np.random.default_rng(seed).normal(size=len(X)) > 0).astype(int)


def up_to_sign(found, expected):
    return found * np.sign((found * expected).sum(axis=0))


# Against scikit-learn


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("pca", [1, 3, 8])
@pytest.mark.parametrize("whiten", [False, True])
def test_components_are_scikit_learns_on_standardised_columns(dtype, pca, whiten):
    X = table(dtype=dtype)
    learnt = Projector(X).learn("standard", pca, whiten=whiten)
    scaler = StandardScaler().fit(X.astype(float))
    oracle = PCA(pca, svd_solver="full").fit(scaler.transform(X.astype(float)))
    np.testing.assert_allclose(learnt.mean, scaler.mean_, rtol=1e-6)
    np.testing.assert_allclose(learnt.scale, scaler.scale_, rtol=1e-6)
    variances = oracle.explained_variance_
    by = np.sqrt(variances if whiten else variances.mean())
    expected = oracle.components_.T / by
    found = up_to_sign(learnt.components, expected)
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())
    oracle.whiten = whiten
    columns = oracle.transform(scaler.transform(X.astype(float))) / (1 if whiten else by)
    np.testing.assert_allclose(up_to_sign(learnt.apply(X, np.float64), columns), columns, atol=2e-3)


def test_a_basis_is_orthonormal_and_its_variances_are_scikit_learns():
    X = table()
    projector = Projector(X)
    projector.learn("standard", 8)
    basis = projector.known["standard"]
    oracle = PCA(svd_solver="full").fit(StandardScaler().fit_transform(X.astype(float)))
    np.testing.assert_allclose(basis.variances, oracle.explained_variance_, rtol=1e-3)
    np.testing.assert_allclose(basis.vectors.T @ basis.vectors, np.eye(8), atol=1e-5)
    largest = basis.vectors[np.abs(basis.vectors).argmax(axis=0), np.arange(8)]
    assert (largest > 0).all()


@pytest.mark.parametrize("offset", [0.0, 3.0, 100.0, 1000.0])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_components_do_not_depend_on_the_columns_means(scaling, offset):
    X = table(offset=0.0, dtype=np.float64) + offset
    learnt = Projector(X).learn(scaling, 3, whiten=True)
    scaled = (X - X.mean(axis=0)) / learnt.scale
    oracle = PCA(3, svd_solver="full").fit(scaled)
    expected = oracle.components_.T / np.sqrt(oracle.explained_variance_)
    np.testing.assert_allclose(
        up_to_sign(learnt.components, expected), expected, atol=0.01 * np.abs(expected).max()
    )


@pytest.mark.parametrize("scaling", SCALINGS)
def test_whitened_components_have_variance_one_and_do_not_correlate(scaling):
    X = table()
    columns = Projector(X).learn(scaling, 6, whiten=True).apply(X, np.float64)
    np.testing.assert_allclose(np.cov(columns, rowvar=False), np.eye(6), atol=5e-3)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_unwhitened_components_keep_their_proportions_at_mean_variance_one(scaling):
    X = table()
    projector = Projector(X)
    variances = projector.learn(scaling, 6).apply(X, np.float64).var(axis=0, ddof=1)
    assert variances.mean() == pytest.approx(1, abs=1e-4)
    scaled = projector.learn(scaling).apply(X, np.float64)
    expected = PCA(6, svd_solver="full").fit(scaled).explained_variance_
    np.testing.assert_allclose(variances / variances[0], expected / expected[0], rtol=1e-3)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("n_covariates", [0, 3])
def test_a_span_loses_nothing_of_rows_fewer_than_columns(scaling, n_covariates):
    X = table(20, 60)
    projector = Projector(X, np.arange(15), n_covariates=n_covariates)
    plain, span = projector.learn(scaling), projector.span(scaling)
    scaled, turned = (own.apply(X[:15], np.float64) for own in (plain, span))
    n_columns = 60 - n_covariates
    assert span.n_columns == 15 + n_covariates
    np.testing.assert_array_equal(turned[:, 15:], scaled[:, n_columns:])
    scaled, turned = scaled[:, :n_columns], turned[:, :15] * np.sqrt(n_columns / 15)
    np.testing.assert_allclose(turned @ turned.T, scaled @ scaled.T, rtol=1e-4, atol=1e-3)


def test_columns_of_a_span_have_similar_variances_about_one():
    X = table(200, 500) * np.geomspace(1, 1e-3, 500, dtype=np.float32)  # components differ greatly
    for scaling in ("standard", "global"):
        variances = Projector(X).span(scaling).apply(X).var(axis=0)
        assert variances.mean() == pytest.approx(1, rel=1e-3)
        assert variances.max() < 20 * np.median(variances)  # of components: a thousand times


def test_rows_no_fewer_than_columns_have_no_span():
    X = table(60, 60)
    assert Projector(X).span("standard").components is None
    assert Projector(X, np.arange(59)).span("standard").components is not None


def test_a_span_is_learnt_once_and_handed_on():
    X = table(20, 60)
    first = Projector(X)
    first.span("standard")
    again = Projector(X, known=first.known)
    assert again.span("standard").components is first.span("standard").components


@pytest.mark.parametrize("n_covariates", [0, 2])
def test_a_weight_on_a_span_folds_into_one_on_all_columns(n_covariates):
    X = table(20, 60)
    span = Projector(X, n_covariates=n_covariates).span("standard")
    weight = np.random.default_rng(0).standard_normal((span.n_columns, 4))
    plain, folded = span.fold_into(weight)
    assert (plain.components, folded.shape) == (None, (60, 4))
    found = plain.apply(X, np.float64) @ folded
    np.testing.assert_allclose(found, span.apply(X, np.float64) @ weight, atol=1e-9)
    assert plain.fold_into(folded) == (plain, folded)


def test_standard_global_and_none_are_what_they_say():
    X = table(5000)
    projector = Projector(X)
    standard, globally, none = (
        projector.learn(scaling).apply(X, np.float64) for scaling in SCALINGS
    )
    expected = StandardScaler().fit_transform(X.astype(float))
    np.testing.assert_allclose(standard, expected, atol=1e-5)
    np.testing.assert_allclose(globally.mean(axis=0), 0, atol=1e-5)
    assert globally.var(axis=0).mean() == pytest.approx(1, rel=1e-5)
    proportions = globally.var(axis=0) / X.astype(float).var(axis=0)
    np.testing.assert_allclose(proportions, proportions[0], rtol=1e-5)
    assert np.array_equal(none, X)


def test_an_unknown_scaling_is_refused_with_those_there_are():
    with pytest.raises(TrainingDataError, match="'minmax' is out of range; it is one of standard"):
        Projector(table()).learn("minmax")


# Covariates


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("whiten", [False, True])
def test_covariates_pass_by_the_components(scaling, whiten):
    X = table()
    learnt = Projector(X, n_covariates=3).learn(scaling, 2, whiten=whiten)
    columns = learnt.apply(X, np.float64)
    assert learnt.n_columns == columns.shape[1] == 5
    scaled = Projector(X).learn(scaling).apply(X, np.float64)
    assert np.array_equal(columns[:, 2:], scaled[:, 5:])
    embedding = Projector(scaled[:, :5]).learn("none", 2, whiten=whiten)
    np.testing.assert_allclose(learnt.components, embedding.components, atol=1e-4)


def test_without_components_covariates_are_columns_like_others():
    X = table()
    one, other = (Projector(X, n_covariates=n).learn("standard") for n in (0, 3))
    assert other.n_columns == 8
    assert one.apply(X).tobytes() == other.apply(X).tobytes()


@pytest.mark.parametrize("n_covariates", [-1, 8, 9])
def test_covariates_out_of_range_are_refused(n_covariates):
    X, y = table(), labels(table())
    with pytest.raises(TrainingDataError, match=f"n_covariates={n_covariates} is out of range"):
        Projector(X, n_covariates=n_covariates)
    for head in (MLPHead(pca=2, epochs=1), LogisticHead(pca=2), LightGBMHead(n_trees=2, pca=2)):
        with pytest.raises(TrainingDataError, match="n_covariates"):
            clone(head).set_params(n_covariates=n_covariates).fit(X, y)


# Rows and blocks


@pytest.mark.parametrize("pca", [0, 3])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_rows_give_the_bytes_of_a_copy_of_those_rows(scaling, pca, monkeypatch):
    monkeypatch.setattr(projection_module, "_BLOCK_ROWS", 64)
    X = table()
    rows = np.random.default_rng(1).permutation(300)[:170]
    chosen = Projector(X, rows, n_covariates=2).learn(scaling, pca)
    copied = Projector(X[rows], n_covariates=2).learn(scaling, pca)
    for name, array in copied.as_arrays().items():
        assert array.tobytes() == chosen.as_arrays()[name].tobytes(), name
    assert chosen.apply(X, rows=rows).tobytes() == copied.apply(X[rows]).tobytes()
    elsewhere = X.copy()
    elsewhere[np.setdiff1d(np.arange(300), rows)] = 1e6
    unmoved = Projector(elsewhere, rows, n_covariates=2).learn(scaling, pca)
    assert unmoved.mean.tobytes() == chosen.mean.tobytes()


@pytest.mark.parametrize("block_rows", [1, 7, 299, 300, 301])
def test_blocks_of_any_size_learn_and_map_alike(block_rows, monkeypatch):
    X = table()
    whole = Projector(X).learn("standard", 4)
    expected = whole.apply(X, np.float64)
    monkeypatch.setattr(projection_module, "_BLOCK_ROWS", block_rows)
    learnt = Projector(X).learn("standard", 4)
    np.testing.assert_allclose(learnt.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(learnt.components, whole.components, atol=1e-5)
    blocks = list(whole.blocks(X))
    assert [len(block) for block in blocks[:-1]] == [block_rows] * (len(blocks) - 1)
    np.testing.assert_allclose(np.concatenate(blocks), expected, atol=1e-12)
    np.testing.assert_allclose(whole.apply(X, np.float64), expected, atol=1e-12)


def test_no_rows_map_to_no_rows():
    learnt = Projector(table()).learn("standard", 4)
    assert learnt.apply(table()[:0]).shape == (0, 4)
    assert learnt.apply(table(), rows=np.array([], int)).shape == (0, 4)


@pytest.mark.parametrize("given_dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0.0, 3.0, 3e4])
@pytest.mark.parametrize("pca", [0, 3])
def test_float32_and_float64_maps_agree(pca, offset, given_dtype):
    # deviations are around 1: at an offset of 3e4 float32 resolves 0.002 of one
    X = table(offset=offset, dtype=given_dtype)
    learnt = Projector(X, n_covariates=2).learn("standard", pca)
    coarse, fine = (learnt.apply(X, dtype) for dtype in (np.float32, np.float64))
    assert (coarse.dtype, fine.dtype) == (np.float32, np.float64)
    np.testing.assert_allclose(coarse, fine, atol=1e-4 if offset < 10 else 5e-3)
    for dtype, whole in ((np.float32, coarse), (np.float64, fine)):
        blocks = list(learnt.blocks(X, dtype))
        assert {block.dtype for block in blocks} == {np.dtype(dtype)}
        assert np.concatenate(blocks).tobytes() == whole.tobytes()


def test_float64_columns_are_centred_before_they_are_rounded():
    # seconds since 1970 over some minutes: float32 resolves 128 of them, float64 all
    X = table(dtype=np.float64) * 100 + 1.7e9
    learnt = Projector(X).learn("standard")
    np.testing.assert_allclose(learnt.apply(X, np.float32), learnt.apply(X, np.float64), atol=1e-3)


def test_the_table_is_left_as_it_was():
    X = table()
    kept = X.copy()
    X.flags.writeable = False
    for dtype in (np.float32, np.float64):
        Projector(X, np.arange(0, 300, 2)).learn("none", 3).apply(X, dtype)
        next(iter(Projector(X).learn("none").blocks(X, dtype)))[:] = 0
    assert np.array_equal(X, kept)


# What leaves little to learn


@pytest.mark.parametrize("value", [0.0, 0.1, -1e4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_constant_column_carries_nothing(value, dtype):
    X = table(dtype=dtype)
    X[:, 1] = value
    for scaling in SCALINGS:
        learnt = Projector(X).learn(scaling)
        assert (learnt.scale > 0).all()
        assert learnt.scale[1] == 1 or scaling == "global"
        columns = learnt.apply(X, np.float64)
        expected = value if scaling == "none" else 0
        np.testing.assert_allclose(columns[:, 1], expected, atol=1e-6 * max(1, abs(value)))
    for whiten in (False, True):
        components = Projector(X).learn("standard", 5, whiten=whiten).components
        np.testing.assert_allclose(components[1], 0, atol=1e-5)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_columns_that_are_all_constant_map_to_nothing(dtype, whiten):
    X = np.full((40, 5), 0.1, dtype)
    X[:, 2] = 7
    for scaling in ("standard", "global"):
        for pca in (0, 3):
            learnt = Projector(X).learn(scaling, pca, whiten=whiten)
            np.testing.assert_allclose(learnt.apply(X, np.float64), 0, atol=1e-5)


@pytest.mark.parametrize("whiten", [False, True])
def test_fewer_rows_than_components_give_what_there_is(whiten):
    X = table(6, 8)
    learnt = Projector(X).learn("standard", 7, whiten=whiten)
    assert learnt.components.shape == (8, 5)
    variances = learnt.apply(X, np.float64).var(axis=0, ddof=1)
    assert variances.mean() == pytest.approx(1, rel=1e-3)
    if whiten:
        np.testing.assert_allclose(variances, 1, rtol=1e-2)
    by_rows = Projector(table(300, 8), np.arange(6)).learn("standard", 7, whiten=whiten)
    assert by_rows.components.shape == (8, 5)


def test_more_components_than_columns_give_all_of_them():
    X = table()
    projector = Projector(X, n_covariates=2)
    assert projector.learn("standard", 100).components.shape == (6, 6)
    all_of_them = Projector(X, n_covariates=2).learn("standard", 6)
    assert projector.learn("standard", 100).components.tobytes() == all_of_them.components.tobytes()


@pytest.mark.parametrize("whiten", [False, True])
def test_a_component_without_variance_is_not_blown_up(whiten):
    generator = np.random.default_rng(0)
    low = generator.normal(size=(200, 2)) @ generator.normal(size=(2, 7))
    X = low.astype(np.float32)
    learnt = Projector(X).learn("standard", 6, whiten=whiten)
    columns = learnt.apply(X, np.float64)
    spread = columns.std(axis=0, ddof=1)
    assert np.isfinite(columns).all()
    assert (spread[2:] < 0.05).all()
    if whiten:
        np.testing.assert_allclose(spread[:2], 1, atol=1e-3)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    n=st.integers(2, 30),
    d=st.integers(1, 8),
    n_covariates=st.integers(0, 7),
    pca=st.integers(0, 12),
    scaling=st.sampled_from(SCALINGS),
    whiten=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 3),
)
def test_any_shape_is_learnt_mapped_and_taken_back(
    n, d, n_covariates, pca, scaling, whiten, dtype, seed
):
    n_covariates = min(n_covariates, d - 1)
    X = np.random.default_rng(seed).normal(2, 3, size=(n, d)).astype(dtype)
    learnt = Projector(X, n_covariates=n_covariates).learn(scaling, pca, whiten=whiten)
    n_components = min(pca, n - 1, d - n_covariates)
    n_columns = n_components + n_covariates if pca else d
    columns = learnt.apply(X)
    assert columns.shape == (n, n_columns)
    assert columns.shape[1] == learnt.n_columns
    assert columns.dtype == np.float32
    assert np.isfinite(columns).all()
    if n_components:
        variances = columns[:, :n_components].var(axis=0, ddof=1)
        assert variances.mean() == pytest.approx(1, abs=1e-2)
    arrays = learnt.as_arrays()
    expected = Projection.expected_arrays(arrays, d, pca, n_covariates)
    back = Projection.from_arrays(arrays_of(arrays, expected), n_covariates)
    assert back.apply(X).tobytes() == columns.tobytes()
    assert back.n_columns == learnt.n_columns


# What is known already


def test_a_known_basis_is_not_learnt_again(monkeypatch):
    X = table()
    first = Projector(X, n_covariates=1)
    expected = {
        (pca, whiten): first.learn("standard", pca, whiten=whiten)
        for pca, whiten in ((5, False), (5, True), (2, True), (0, False))
    }
    kept = dict(first.known)
    monkeypatch.setattr(Projector, "_fit", lambda *args: pytest.fail("was learnt again"))
    second = Projector(X, n_covariates=1, known=kept)
    for (pca, whiten), projection in expected.items():
        again = second.learn("standard", pca, whiten=whiten)
        for name, array in projection.as_arrays().items():
            assert array.tobytes() == again.as_arrays()[name].tobytes()
    assert kept["standard"].vectors.shape == (7, 5)


def test_too_small_a_basis_is_learnt_again_and_the_given_mapping_is_left_alone():
    X = table()
    first = Projector(X)
    first.learn("standard", 2)
    known = dict(first.known)
    second = Projector(X, known=known)
    wanted = second.learn("standard", 5)
    assert wanted.components.shape == (8, 5)
    assert len(known["standard"].variances) == 2
    assert len(second.known["standard"].variances) == 5
    np.testing.assert_allclose(wanted.components, Projector(X).learn("standard", 5).components)


def test_each_scaling_has_a_basis_of_its_own():
    projector = Projector(table())
    for scaling in SCALINGS:
        projector.learn(scaling, 2)
    assert set(projector.known) == set(SCALINGS)
    assert all(isinstance(basis, Basis) for basis in projector.known.values())
    one, other = (projector.known[scaling].vectors for scaling in ("standard", "none"))
    assert not np.allclose(one, other, atol=1e-3)


def test_fewer_components_are_the_first_of_more():
    X = table()
    projector = Projector(X)
    more, fewer = (projector.learn("standard", pca, whiten=True) for pca in (6, 2))
    assert np.array_equal(more.components[:, :2], fewer.components)
    alone = Projector(X).learn("standard", 2, whiten=True)
    np.testing.assert_allclose(alone.components, fewer.components, atol=1e-5)


# Packaged


@pytest.mark.parametrize("pca", [0, 4])
def test_arrays_are_taken_back(pca):
    X = table()
    learnt = Projector(X, n_covariates=2).learn("standard", pca)
    arrays = learnt.as_arrays()
    assert set(arrays) == {"mean", "scale"} | ({"components"} if pca else set())
    expected = Projection.expected_arrays(arrays, 8, pca, 2)
    back = Projection.from_arrays(arrays_of(arrays, expected), 2)
    assert back.apply(X).tobytes() == learnt.apply(X).tobytes()
    assert back.n_columns == learnt.n_columns


def damage(arrays, kind):
    """Return a copy of the arrays in which one thing of the components is wrong."""
    found = dict(arrays)
    components = found["components"].copy()
    if kind == "nan":
        components[0, 0] = np.nan
    elif kind == "infinite":
        components[0, 0] = -np.inf
    found["components"] = {
        "too many": np.hstack([components, components[:, :1]]),
        "none": components[:, :0],
        "row missing": components[:-1],
        "row more": np.vstack([components, components[:1]]),
        "flat": components.ravel(),
        "float64": components.astype(np.float64),
    }.get(kind, components)
    if kind == "missing":
        del found["components"]
    if kind == "scale":
        found["scale"] = np.zeros_like(found["scale"])
    return found


DAMAGES = [
    "nan",
    "infinite",
    "too many",
    "none",
    "row missing",
    "row more",
    "flat",
    "float64",
    "missing",
    "scale",
]


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_arrays_are_refused(kind):
    arrays = Projector(table(), n_covariates=2).learn("standard", 4).as_arrays()
    damaged = damage(arrays, kind)
    with pytest.raises(ModelError, match=r"tensor (components|scale)|the model holds"):
        arrays_of(damaged, Projection.expected_arrays(damaged, 8, 4, 2))


def test_components_that_nobody_asked_for_are_refused():
    arrays = Projector(table(), n_covariates=2).learn("standard", 4).as_arrays()
    with pytest.raises(ModelError, match="the model holds components, mean, scale"):
        arrays_of(arrays, Projection.expected_arrays(arrays, 8, 0, 2))
    with pytest.raises(ModelError, match="the model holds text"):
        arrays_of("tree", Projection.expected_arrays("tree", 8, 4, 2))


PACKAGED = {
    "mlp": MLPHead((6,), epochs=2, pca=4, n_covariates=2, whiten=True, scaling="global"),
    "logistic": LogisticHead(pca=4, n_covariates=2),
    "lightgbm": LightGBMHead(n_trees=8, pca=4, n_covariates=2),
}


@pytest.fixture(scope="module")
def packaged():
    X = table()
    return {name: clone(head).fit(X, labels(X)) for name, head in PACKAGED.items()}


@pytest.mark.parametrize("name", sorted(PACKAGED))
@pytest.mark.parametrize(
    ("n", "d", "pca", "n_covariates"),
    [(300, 8, 4, 2), (300, 8, 0, 2), (90, 70, 33, 0), (200, 9, 50, 8), (12, 20, 16, 1)],
)
def test_a_loaded_head_predicts_the_same_bytes(name, n, d, pca, n_covariates, tmp_path):
    X = table(n, d)
    head = clone(PACKAGED[name]).set_params(pca=pca, n_covariates=n_covariates)
    head.fit(X, labels(X))
    save_model(tmp_path / "model", head, {})
    loaded = load_model(tmp_path / "model").head
    for rows in (X, X[:1], X.astype(np.float64), np.asfortranarray(X)):
        assert loaded.predict_proba(rows).tobytes() == head.predict_proba(rows).tobytes()
    if pca and name != "lightgbm":
        assert loaded.projection_.n_columns == min(pca, n - 1, d - n_covariates) + n_covariates
    save_model(tmp_path / "again", loaded, {})
    for path in (tmp_path / "model").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def forge(directory, change, **params):
    """Change a model's tensors and parameters and record their hash, as a stranger would."""
    path = directory / "head.safetensors"
    arrays = {name: array.copy() for name, array in safetensors.numpy.load_file(path).items()}
    arrays = {name: np.ascontiguousarray(array) for name, array in change(arrays).items()}
    data = safetensors.numpy.save(arrays)
    path.write_bytes(data)
    document = json.loads((directory / "model.json").read_text())
    document["payload"] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    document["params"] |= params
    (directory / "model.json").write_text(json.dumps(document))


@pytest.mark.parametrize("name", sorted(PACKAGED))
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_head_with_damaged_components_is_refused(name, kind, packaged, tmp_path):
    save_model(tmp_path / "model", packaged[name], {})
    forge(tmp_path / "model", lambda arrays: arrays)
    assert load_model(tmp_path / "model").head.projection_.n_columns == 6
    forge(tmp_path / "model", lambda arrays: damage(arrays, kind))
    with pytest.raises(ModelError, match="cannot be used"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("name", sorted(PACKAGED))
@pytest.mark.parametrize("params", [{"pca": 0}, {"pca": 3}, {"n_covariates": 1}, {"pca": -1}])
def test_a_head_whose_parameters_are_not_its_components_is_refused(
    name, params, packaged, tmp_path
):
    save_model(tmp_path / "model", packaged[name], {})
    forge(tmp_path / "model", lambda arrays: arrays, **params)
    with pytest.raises(ModelError, match="cannot be used"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("name", ["mlp", "logistic"])
def test_covariates_out_of_range_are_refused_before_a_forged_head_predicts(
    name, packaged, tmp_path
):
    save_model(tmp_path / "model", packaged[name], {})

    def one_column_more(arrays):
        # tensors that fit n_covariates = -1: nine rows of components for eight columns
        components = arrays["components"]
        arrays["components"] = np.vstack([components, components[:3]])
        for key in ("layers.0.weight", "coef"):
            if key in arrays:
                arrays[key] = arrays[key][:3] if key != "coef" else arrays[key][:, :3]
        return arrays

    forge(tmp_path / "model", one_column_more, n_covariates=-1)
    with pytest.raises(ModelError, match="cannot be used"):
        load_model(tmp_path / "model")


def test_trees_beside_components_are_checked_as_text(packaged, tmp_path):
    save_model(tmp_path / "model", packaged["lightgbm"], {})
    for text in (b"tree\n", b"\xff\xfe", b""):
        forge(
            tmp_path / "model",
            lambda arrays, text=text: arrays | {"booster": np.frombuffer(text, np.uint8)},
        )
        with pytest.raises(ModelError, match="cannot be used"):
            load_model(tmp_path / "model")


def test_heads_see_covariates_that_components_leave_out():
    X = np.random.default_rng(0).normal(size=(400, 12)).astype(np.float32)
    y = (X[:, 11] > 0).astype(int)
    for head in (
        MLPHead((8,), epochs=60, pca=2),
        LogisticHead(C=1.0, pca=2),
        LightGBMHead(30, pca=2),
    ):
        blind, seeing = (clone(head).set_params(n_covariates=n) for n in (0, 1))
        assert (seeing.fit(X, y).predict(X) == y).mean() > 0.9
        assert (blind.fit(X, y).predict(X) == y).mean() < 0.9


# One path of penalties


def as_fitted(head, X):
    """Give a head what `fit` sets beside what was learnt, where a sweep fitted it."""
    head.classes_, head.n_features_in_ = np.array([0, 1]), X.shape[1]
    return head


def scikit_learns(C, X, y, **others):
    model = LogisticRegression(C=C, max_iter=5000, tol=1e-7, **others)
    return make_pipeline(StandardScaler(), model).fit(X.astype(float), y)


@pytest.mark.parametrize(
    ("dtype", "tol", "atol"),
    [(np.float32, 1e-4, 1e-2), (np.float64, 1e-4, 1e-2), (np.float64, 1e-6, 2e-3)],
)
@pytest.mark.parametrize("class_weight", ["balanced", None, {0: 1.0, 1: 4.0}])
def test_a_path_gives_each_penalty_what_it_gives_alone(class_weight, dtype, tol, atol):
    X = table(dtype=dtype)
    y = labels(X)
    heads = [
        LogisticHead(C, class_weight=class_weight, max_iter=2000, tol=tol)
        for C in (1.0, 1e-4, 0.01, 30.0, 0.1, 1e-3)
    ]
    fit_path(heads, X, y, Projector(X))
    for head in heads:
        alone = scikit_learns(head.C, X, y, class_weight=class_weight).predict_proba(X)
        np.testing.assert_allclose(as_fitted(head, X).predict_proba(X), alone, atol=atol)
        assert head.converged_
    assert len({head.coef_.tobytes() for head in heads}) == len(heads)


def test_small_steps_along_a_path_do_not_leave_it_behind():
    X = table(d=40)
    y = labels(X, noise=0.5)
    heads = [LogisticHead(C=C, max_iter=1000) for C in np.geomspace(1e-4, 1, 60)]
    fit_path(heads, X, y, Projector(X))
    for head in (*heads[::12], heads[-1]):
        alone = scikit_learns(head.C, X, y, class_weight="balanced").predict_proba(X)
        np.testing.assert_allclose(as_fitted(head, X).predict_proba(X), alone, atol=5e-3)


def test_heads_of_different_components_do_not_share_coefficients():
    X = table()
    y = labels(X)
    heads = [LogisticHead(C=C, pca=pca) for pca in (0, 3, 8) for C in (0.1, 0.01)]
    heads += [LogisticHead(C=0.1, standardize=False), LogisticHead(C=0.1, class_weight=None)]
    fit_path(heads, X, y, Projector(X))
    assert [head.coef_.shape[1] for head in heads] == [8, 8, 3, 3, 8, 8, 8, 8]
    for head in heads:
        alone = clone(head).fit(X, y).predict_proba(X)
        np.testing.assert_allclose(as_fitted(head, X).predict_proba(X), alone, atol=2e-3)


def test_a_path_goes_from_the_strongest_penalty_whatever_the_order_given():
    X = table()
    y = labels(X)
    rising, falling = ([LogisticHead(C) for C in (1e-3, 0.1, 10.0)] for _ in "ab")
    fit_path(rising, X, y, Projector(X))
    fit_path(falling[::-1], X, y, Projector(X))
    for one, other in zip(rising, falling, strict=True):
        assert one.coef_.tobytes() == other.coef_.tobytes()


def test_a_path_on_rows_is_that_on_a_copy_of_them():
    X = table()
    y, rows = labels(X), np.random.default_rng(0).permutation(300)[:120]
    by_rows, copied = ([LogisticHead(C=C, pca=p) for C in (0.1, 1) for p in (0, 3)] for _ in "ab")
    fit_path(by_rows, X, y[rows], Projector(X, rows), rows)
    fit_path(copied, X[rows], y[rows], Projector(X[rows]))
    for one, other in zip(by_rows, copied, strict=True):
        assert one.coef_.tobytes() == other.coef_.tobytes()


def test_a_later_fit_leaves_earlier_heads_of_the_path_alone():
    X = table()
    heads = [LogisticHead(C=C) for C in (0.001, 10.0)]
    fit_path(heads, X, labels(X), Projector(X))
    assert np.abs(heads[0].coef_).max() < 0.5 * np.abs(heads[1].coef_).max()
    assert heads[0].intercept_ is not heads[1].intercept_


# Rows binned once


def binned_rows(X, y, X_val=None, y_val=None, rows=None):
    held = None if X_val is None else (X_val, None, y_val)
    codes = y if rows is None else y[rows]
    return BinnedRows((X, rows, codes), held, Projector(X, rows))


@pytest.fixture
def constructed(monkeypatch):
    """List the data sets that LightGBM bins: "training" or "held"."""
    made = []
    construct = lightgbm.Dataset.construct

    def listed(self):
        if self._handle is None:
            made.append("training" if self.reference is None else "held")
        return construct(self)

    monkeypatch.setattr(lightgbm.Dataset, "construct", listed)
    return made


TREES = [
    {},
    {"learning_rate": 0.3, "num_leaves": 4},
    {"lambda_l2": 30.0, "min_data_in_leaf": 2},
    {"feature_fraction": 0.5, "n_trees": 3},
    {"class_weight": {0: 1.0, 1: 9.0}},
    {"stopping": "loss", "patience": 2},
    {"patience": None},
    {"class_weight": None},
]
BEST = [{"k_best": 3}, {"k_best": 3, "num_leaves": 4}, {}]


def assert_one_binning_is_as_many(heads, X, y, X_val, y_val, rows=None):
    binned = binned_rows(X, y, X_val, y_val, rows)
    chosen = slice(None) if rows is None else rows
    for head in heads:
        alone = clone(head).fit(X[chosen], y[chosen], X_val=X_val, y_val=y_val)
        binned.fit(head)
        assert head.booster_.model_to_string() == alone.booster_.model_to_string(), head
        probabilities = as_fitted(head, X).predict_proba(X_val)
        assert probabilities.tobytes() == alone.predict_proba(X_val).tobytes(), head
        assert head.best_epoch_ == alone.best_epoch_


def tree_heads(parameters, **others):
    return [LightGBMHead(**({"n_trees": 12} | others | own)) for own in parameters]


@pytest.mark.parametrize("pca", [0, 4])
@pytest.mark.parametrize("is_chosen", [False, True])
def test_heads_on_rows_binned_once_are_as_fitted_alone(pca, is_chosen):
    X, X_val = table(), table(seed=1)
    rows = np.random.default_rng(0).permutation(300)[:200] if is_chosen else None
    y, y_val = labels(X), labels(X_val)
    heads = tree_heads([*TREES[:-1], *BEST], pca=pca)
    assert_one_binning_is_as_many(heads, X, y, X_val, y_val, rows)


@pytest.mark.parametrize("class_weight", [None, {0: 1.0, 1: 6.0}])
@pytest.mark.parametrize("stopping", ["auroc", "loss"])
def test_trees_are_those_that_lightgbm_trains_on_weighted_rows(stopping, class_weight):
    X, X_val = table(), table(seed=1)
    y, y_val = labels(X), labels(X_val)
    head = LightGBMHead(
        200, learning_rate=0.2, patience=5, stopping=stopping, class_weight=class_weight
    )
    weights, weights_val = (
        np.where(codes == 1, (class_weight or {1: 1.0})[1], 1.0) for codes in (y, y_val)
    )
    data = lightgbm.Dataset(X, y, weight=weights)
    held = data.create_valid(X_val, y_val, weight=weights_val)
    stop = lightgbm.early_stopping(5, verbose=False)
    oracle = lightgbm.train(
        head.parameters(*X.shape), data, 200, valid_sets=[held], callbacks=[stop]
    )
    head.fit(X, y, X_val=X_val, y_val=y_val)
    assert head.best_epoch_ == oracle.best_iteration < 200
    assert np.array_equal(head.predict_proba(X_val)[:, 1], oracle.predict(X_val))


@pytest.mark.parametrize("order", [1, -1])
def test_weights_of_one_head_do_not_stay_for_the_next(order):
    X, X_val = table(), table(seed=1)
    y, y_val = labels(X - 1), labels(X_val)
    y[::3] = 0  # uneven classes: balanced is not one
    heads = tree_heads([{}, {"class_weight": None}, {"class_weight": {1: 9.0}}][::order])
    assert_one_binning_is_as_many(heads, X, y, X_val, y_val)
    # the held rows' weights count where the loss stops the training
    heads = tree_heads([{}, {"class_weight": None}][::order], stopping="loss", patience=3)
    assert_one_binning_is_as_many(heads, X, y, X_val, y_val)


def test_other_bins_components_and_seeds_are_kept_apart():
    X, X_val = table(), table(seed=1)
    parameters = [
        {},
        {"max_bin": 7},
        {"pca": 4},
        {"pca": 2},
        {"pca": 4, "max_bin": 7},
        {"random_state": 3, "feature_fraction": 0.3},
        {},
    ]
    assert_one_binning_is_as_many(tree_heads(parameters), X, labels(X), X_val, labels(X_val))


def test_heads_that_bin_alike_share_one_data_set(constructed):
    X, X_val = table(), table(seed=1)
    y, y_val = labels(X), labels(X_val)
    binned = binned_rows(X, y, X_val, y_val)
    for head in tree_heads(TREES):
        binned.fit(head)
    assert constructed == ["training", "held"]
    for head in tree_heads(TREES[:3], max_bin=15):
        binned.fit(head)
    for head in tree_heads(TREES[:3], pca=3):
        binned.fit(head)
    assert constructed == ["training", "held"] * 3


def test_heads_with_all_and_with_the_best_columns_take_turns_without_binning_again(constructed):
    X, X_val = table(), table(seed=1)
    binned = binned_rows(X, labels(X), X_val, labels(X_val))
    for head in tree_heads([*TREES[:2], *BEST, *BEST]):
        binned.fit(head)
    assert constructed == ["training", "held"] * 2


def test_refused_trees_leave_the_rows_fit_for_the_next():
    X = table()
    y = labels(X)
    binned = binned_rows(X, y)
    good, bad = tree_heads([{}, {"feature_fraction": 7.0}])
    with pytest.raises(TrainingDataError, match="LightGBM refused"):
        binned.fit(bad)
    binned.fit(good)
    expected = clone(good).fit(X, y)._payload()
    assert good._payload() == expected
    with pytest.raises(TrainingDataError, match="LightGBM refused"):
        binned.fit(clone(bad))
    again = clone(good)
    binned.fit(again)
    assert again._payload() == expected
