import numpy as np
import pytest
from sklearn.decomposition import PCA

from medembed.core.errors import MissingLibraryError, TrainingDataError
from medembed.evaluation import projection
from medembed.evaluation.projection import project


def sample(n=300, d=20, seed=0):
    generator = np.random.default_rng(seed)
    return (generator.normal(size=(n, d)) * np.arange(d, 0, -1) + 30).astype(np.float32)


@pytest.mark.parametrize(("n", "d"), [(300, 20), (10, 40), (5000, 3), (50, 2)])
def test_principal_components_are_those_of_scikit_learn(n, d):
    X = sample(n, d)
    found = project(X)
    oracle = PCA(2, svd_solver="full").fit(X.astype(float))
    points = oracle.transform(X.astype(float))
    signs = np.sign((points * found.points).sum(axis=0))
    np.testing.assert_allclose(found.points * signs, points, atol=2e-3)
    np.testing.assert_allclose(found.explained, oracle.explained_variance_ratio_, atol=1e-5)


def test_the_sign_is_that_of_the_largest_entry():
    X = sample()
    components = PCA(2, svd_solver="full").fit(X.astype(float)).components_
    largest = np.abs(components).argmax(axis=1)
    signs = np.sign(components[np.arange(2), largest])
    expected = (X - X.mean(axis=0)) @ components.T * signs
    np.testing.assert_allclose(project(X).points, expected, atol=2e-3)


def test_one_column_and_equal_rows_are_no_error():
    assert (project(sample(10, 1)).points[:, 1] == 0).all()
    for method in projection.METHODS:
        assert not project(np.ones((10, 4), np.float32), method).points.any()


def test_t_sne_keeps_clusters_apart_and_repeats_itself():
    X = sample(60, 8, seed=1)
    X[:30] += 200
    first = project(X, "tsne", seed=3).points
    assert first.tobytes() == project(X, "tsne", seed=3).points.tobytes()
    centres = first[:30].mean(axis=0), first[30:].mean(axis=0)
    apart = np.linalg.norm(centres[0] - centres[1])
    assert apart > 2 * max(first[:30].std(), first[30:].std())


def test_what_makes_no_map_is_refused(monkeypatch):
    with pytest.raises(TrainingDataError, match="one of pca, tsne"):
        project(sample(), "umap")
    with pytest.raises(TrainingDataError, match="embed at least 3"):
        project(sample(2))
    broken = sample()
    broken[4, 4] = np.nan
    with pytest.raises(TrainingDataError, match="not a finite number"):
        project(broken)
    monkeypatch.setattr("medembed.core.system.find_spec", lambda name: None)
    with pytest.raises(MissingLibraryError, match=r"medembed\[map\]"):
        project(sample(), "tsne")
