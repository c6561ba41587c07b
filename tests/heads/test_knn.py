import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medembed.core.errors import ModelError, TrainingDataError
from medembed.heads import knn
from medembed.heads.knn import KNNHead
from medembed.heads.packaging import load_model, save_model
from medembed.heads.registry import make_head


def sample(n=300, d=12, seed=0):
    generator = np.random.default_rng(seed)
    X = generator.normal(size=(n, d)).astype(np.float32)
    return X, (X[:, 0] + generator.normal(size=n) > 0).astype(int)


def expected_share(head, X, y, queries):
    """Return scikit-learn's share of abnormal neighbours."""
    steps = [StandardScaler()]
    if head.whiten:
        steps.append(PCA(head.whiten, whiten=True, svd_solver="full"))
    oracle = make_pipeline(
        *steps,
        KNeighborsClassifier(
            head.n_neighbors, metric=head.metric, weights=head.weights, algorithm="brute"
        ),
    )
    return oracle.fit(X.astype(float), y).predict_proba(queries.astype(float))[:, 1]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("weights", ["distance", "uniform"])
@pytest.mark.parametrize("whiten", [0, 5])
def test_shares_are_those_of_scikit_learn(metric, weights, whiten):
    X, y = sample()
    queries, _ = sample(100, seed=1)
    head = KNNHead(7, metric=metric, weights=weights, whiten=whiten).fit(X, y)
    share = expected_share(head, X, y, queries)
    found = head.predict_proba(queries)[:, 1]
    np.testing.assert_allclose(found, (7 * share + 0.5) / 8, atol=1e-6)
    assert 0 < found.min() < found.max() < 1


def test_the_order_of_training_rows_changes_no_byte():
    X, y = sample()
    X[200:] = X[:100]  # of equal vectors some have another label
    order = np.random.default_rng(3).permutation(len(X))
    a, b = KNNHead(5).fit(X, y), KNNHead(5).fit(X[order], y[order])
    # (sums over rows in another order change the last digits of the projection)
    b.projection_ = a.projection_
    b.vectors_ = b._map(X)[(order := knn._order(b._map(X), y.astype(np.uint8)))]
    b.labels_ = y[order].astype(np.uint8)
    assert a.predict_proba(X).tobytes() == b.predict_proba(X).tobytes()
    assert a.vectors_.tobytes() == b.vectors_.tobytes()


def test_an_equal_image_outvotes_all_others_by_distance():
    X, y = sample()
    head = KNNHead(50, weights="distance").fit(X, y)
    assert np.array_equal(head.predict(X), y)
    assert not np.array_equal(KNNHead(50, weights="uniform").fit(X, y).predict(X), y)


def test_more_neighbours_than_rows_are_all_rows():
    X, y = sample(10)
    few = KNNHead(1000, weights="uniform", whiten=2).fit(X, y).predict_proba(X)[:, 1]
    np.testing.assert_allclose(few, (y.sum() + 0.5) / 11)


def test_covariates_are_kept_beside_the_components():
    X, y = sample()
    head = KNNHead(5, whiten=3, n_covariates=2).fit(X, y)
    assert head.vectors_.shape == (300, 5)
    np.testing.assert_allclose(head.vectors_.std(axis=0), 1, atol=0.01)


@pytest.mark.parametrize(
    "params",
    [{"n_neighbors": 0}, {"metric": "manhattan"}, {"weights": "rank"}, {"whiten": -1}],
)
def test_parameters_out_of_range_are_refused(params):
    [(name, value)] = params.items()
    with pytest.raises(TrainingDataError, match=f"{name}={value!r}"):
        make_head("knn", params).fit(*sample())


def test_more_vectors_than_a_model_may_hold_are_refused_before_they_are_kept(monkeypatch):
    monkeypatch.setattr(knn, "MAX_TENSOR_BYTES", 300 * 12 * 4)
    with pytest.raises(TrainingDataError, match="set whiten"):
        KNNHead(whiten=0).fit(*sample())
    KNNHead(whiten=8).fit(*sample())


@pytest.mark.parametrize("change", ["label of 2", "one label less", "no vectors", "NaN"])
def test_a_forged_model_is_refused(change):
    head = KNNHead(5).fit(*sample())
    payload = {name: array.copy() for name, array in head._payload().items()}
    if change == "label of 2":
        payload["labels"][3] = 2
    elif change == "one label less":
        payload["labels"] = payload["labels"][1:]
    elif change == "no vectors":
        payload |= {"labels": payload["labels"][:0], "vectors": payload["vectors"][:0]}
    else:
        payload["vectors"][0, 0] = np.nan
    with pytest.raises(ModelError, match="tensor"):
        KNNHead(5)._restore(payload, 12)


@pytest.mark.parametrize("whiten", [0, 5])
def test_a_loaded_head_predicts_the_same_bytes(whiten, tmp_path):
    X, y = sample()
    head = KNNHead(9, whiten=whiten).fit(X, y)
    save_model(tmp_path / "model", head, {})
    loaded = load_model(tmp_path / "model").head
    for rows in (X, X[:1], X.astype(np.float64)):
        assert loaded.predict_proba(rows).tobytes() == head.predict_proba(rows).tobytes()
