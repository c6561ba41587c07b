"""LightGBM on the columns that tell the labels apart best: `k_best`."""

import numpy as np
import pytest
from scipy import stats

from medembed.core.errors import TrainingDataError
from medembed.heads.lightgbm import BinnedRows, LightGBMHead, rank_columns
from medembed.heads.scaling import Projector

STRONG = [3, 11, 17, 25]


def table(n: int = 400, d: int = 30, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return a table in which the columns `STRONG` decide: by their sign, and by their size."""
    random = np.random.default_rng(seed)
    X = random.standard_normal((n, d)).astype(np.float32)
    signal = 2 * X[:, STRONG[:2]].sum(axis=1) + 3 * np.abs(X[:, STRONG[2:]]).sum(axis=1)
    y = (signal + random.standard_normal(n) > np.median(signal)).astype(np.int64)
    return X, y


def test_the_rank_is_the_f_statistic_of_the_octiles() -> None:
    X, y = table()
    scores = rank_columns(X, y)
    total = ((y - y.mean()) ** 2).sum()
    for column, score in zip(X.T, scores, strict=True):
        cuts = np.sort(column)[len(column) * np.arange(1, 8) // 8]
        parts = [y[np.searchsorted(cuts, column) == part] for part in range(8)]
        f = stats.f_oneway(*parts).statistic
        assert score / (total - score) * (len(y) - 8) / 7 == pytest.approx(f)


def test_columns_that_decide_by_sign_or_by_size_rank_first() -> None:
    assert sorted(np.argsort(-rank_columns(*table()))[:4]) == STRONG


@pytest.mark.parametrize("n", [400, 12_000])
def test_equal_values_are_in_one_part(n: int) -> None:
    y = (np.arange(n) < n // 2).astype(np.int64)  # sorted rows: their order would tell the label
    X = np.stack([np.full(n, 2.0), np.arange(n) % 2, y.astype(float)], axis=1)
    scores = rank_columns(X, y)
    assert scores[0] == 0
    assert scores[1] < 1
    assert scores[2] > 0.2 * min(n, 5000)


def test_many_columns_rank_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = table()
    whole = rank_columns(X, y)
    monkeypatch.setattr("medembed.heads.lightgbm._RANKED_COLUMNS", 7)
    np.testing.assert_allclose(rank_columns(X, y), whole, rtol=1e-12)


@pytest.mark.parametrize("shared", [False, True])
def test_trees_are_those_of_the_best_columns_alone(shared: bool) -> None:
    X, y = table()
    X_new = table(seed=1)[0]
    kept = X.copy()
    if shared:  # as in a sweep: the table is read-only, and after a head with all columns
        X.flags.writeable = False
        binned = BinnedRows((X, None, y), None, Projector(X))
        binned.fit(LightGBMHead(n_trees=5))
        best = LightGBMHead(n_trees=20, k_best=4)
        binned.fit(best)
        best.classes_ = np.array([0, 1])
        best.n_features_in_ = X.shape[1]
    else:
        best = LightGBMHead(n_trees=20, k_best=4).fit(X, y)
    alone = LightGBMHead(n_trees=20).fit(X[:, STRONG], y)
    assert best.predict_proba(X_new).tobytes() == alone.predict_proba(X_new[:, STRONG]).tobytes()
    assert np.flatnonzero(best.booster_.feature_importance()).tolist() == STRONG
    assert X.tobytes() == kept.tobytes()


def test_covariates_are_kept_beside_the_best() -> None:
    X, y = table()
    covariates = np.random.default_rng(5).standard_normal((len(X), 2)).astype(np.float32)
    covariates[:, 0] += 0.3 * y
    head = LightGBMHead(n_trees=60, k_best=2, n_covariates=2, min_data_in_leaf=5)
    head.fit(np.hstack([X, covariates]), y)
    used = np.flatnonzero(head.booster_.feature_importance())
    assert {30, 31} <= set(used)
    assert len(used) == 4


def test_validation_rows_are_blanked_too() -> None:
    X, y = table()
    X_val, y_val = table(seed=2)
    best = LightGBMHead(k_best=4).fit(X, y, X_val=X_val, y_val=y_val)
    alone = LightGBMHead().fit(X[:, STRONG], y, X_val=X_val[:, STRONG], y_val=y_val)
    assert best.best_epoch_ == alone.best_epoch_
    assert best.predict_proba(X_val).tobytes() == alone.predict_proba(X_val[:, STRONG]).tobytes()


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "32"])
def test_a_number_of_columns_below_one_is_refused(value: object) -> None:
    with pytest.raises(TrainingDataError, match="k_best"):
        LightGBMHead(k_best=value).fit(*table())  # type: ignore[arg-type]


def test_more_than_there_are_is_all() -> None:
    X, y = table()
    most = LightGBMHead(n_trees=10, k_best=99, feature_fraction=1.0).fit(X, y)
    whole = LightGBMHead(n_trees=10, feature_fraction=1.0).fit(X, y)
    assert most.predict_proba(X).tobytes() == whole.predict_proba(X).tobytes()
