"""Scores within strata, and tests of what a column tells, against scikit-learn and simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from medembed.evaluation.estimates import influences
from medembed.evaluation.shortcuts import (
    _RidgeReader,
    join_strata,
    permutation_p,
    score_encoded,
    score_gap,
    score_loss,
    score_pairs,
    shuffle_groups,
    subtract_group_means,
)


def test_in_one_stratum_the_score_is_the_auroc_with_its_influences() -> None:
    generator = np.random.default_rng(0)
    y, values = generator.integers(0, 2, 80), generator.normal(size=80).round(1)
    found = score_pairs(y, values, np.zeros(80, int))
    assert found.value == pytest.approx(roc_auc_score(y, values))
    np.testing.assert_allclose(found.added, influences(y, values, 0.5, ["auroc"])["auroc"])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), n_strata=st.integers(1, 5))
def test_the_score_is_the_share_of_pairs_within_strata_in_order(seed: int, n_strata: int) -> None:
    generator = np.random.default_rng(seed)
    y, values = generator.integers(0, 2, 40), generator.integers(0, 6, 40).astype(float)
    strata = generator.integers(0, n_strata, 40)
    pairs = [
        (values[i] > values[j]) + (values[i] == values[j]) / 2
        for i in np.flatnonzero(y == 1)
        for j in np.flatnonzero((y == 0) & (strata == strata[i]))
    ]
    found = score_pairs(y, values, strata)
    if pairs:
        assert found.value == pytest.approx(np.mean(pairs))
        assert found.added.sum() == pytest.approx(0, abs=1e-12)
    else:
        assert np.isnan(found.value)


def test_contributions_are_derivatives_in_the_weight_of_a_row() -> None:
    generator = np.random.default_rng(1)
    y, values = generator.integers(0, 2, 30), generator.normal(size=30)
    strata = generator.integers(0, 3, 30)
    found, n = score_pairs(y, values, strata), 500
    for row in range(30):  # one row more among n copies of each
        grown = np.append(np.repeat(np.arange(30), n), row)
        change = score_pairs(y[grown], values[grown], strata[grown]).value - found.value
        assert change * n == pytest.approx(found.added[row], rel=0.02, abs=1e-5)


def test_subtracted_means_are_the_residuals_of_scikit_learns_regression_on_the_groups() -> None:
    generator = np.random.default_rng(2)
    X, groups = generator.normal(size=(60, 4)), generator.integers(0, 3, 60)
    train = np.arange(40)
    dummies = np.eye(3)[groups]
    fitted = LinearRegression().fit(dummies[train], X[train]).predict(dummies)
    np.testing.assert_allclose(subtract_group_means(X, groups, train), X - fitted, atol=1e-12)
    alone = np.where(np.arange(60) == 59, 3, groups)  # a group that no training row has
    expected = X[59] - X[train].mean(axis=0)
    np.testing.assert_allclose(subtract_group_means(X, alone, train)[59], expected)


def test_shuffled_groups_keep_their_sizes_and_stay_together_in_patients() -> None:
    generator = np.random.default_rng(3)
    codes = np.repeat(np.arange(50), generator.integers(1, 4, 50))
    codes = generator.permutation(codes)
    of_patient = generator.integers(0, 3, 50)
    groups = of_patient[codes]
    shuffled = shuffle_groups(groups, codes, generator)
    np.testing.assert_array_equal(np.bincount(groups), np.bincount(shuffled))
    assert all(len(np.unique(shuffled[codes == code])) == 1 for code in np.unique(codes))
    assert (groups != shuffled).mean() > 0.3


def test_a_column_that_explains_the_score_is_lost_by_matching_and_one_of_chance_is_not() -> None:
    generator = np.random.default_rng(4)
    y = generator.integers(0, 2, 400)
    marker = np.where(generator.random(400) < 0.85, y, 1 - y)
    coin, folds, codes = generator.integers(0, 2, 400), np.arange(400) % 5, np.arange(400)
    values = marker + 0.01 * generator.normal(size=400)
    full = score_pairs(y, values, folds)
    lost = score_loss(y, full, score_pairs(y, values, join_strata(folds, marker)), codes)
    assert lost.left.value == pytest.approx(0.5, abs=0.08)
    assert lost.p < 1e-9
    kept = score_loss(y, full, score_pairs(y, values, join_strata(folds, coin)), codes)
    assert kept.lost.low < 0 < kept.lost.high


def test_where_nothing_is_lost_the_test_says_so_at_its_level() -> None:
    """Two equally good scores; whether one is called worse than the other, by chance."""
    generator, hits = np.random.default_rng(5), 0
    codes, folds = np.repeat(np.arange(60), 2), np.repeat(np.arange(60) % 5, 2)
    for _ in range(600):
        y = generator.integers(0, 2, 60)[codes]
        first, second = y + generator.normal(size=(2, 60))[:, codes]
        first, second = (v + generator.normal(size=120) for v in (first, second))
        pair = [score_pairs(y, values, folds) for values in (first, second)]
        hits += score_loss(y, *pair, codes).p < 0.05
    assert 0.03 < hits / 600 < 0.07


@pytest.mark.parametrize("width", [3, 40])
def test_where_nothing_can_be_read_the_test_says_so_at_its_level(width: int) -> None:
    """Few columns or many: out-of-fold scores of chance vary otherwise than independent values."""
    generator, hits = np.random.default_rng(width), 0
    codes = np.repeat(np.arange(60), 1 + np.arange(60) % 3)
    for _ in range(200):
        groups = generator.integers(0, 2, 60)[codes]
        X = generator.normal(size=(60, width))[codes] + generator.normal(size=(120, width))
        hits += permutation_p(X, groups, codes % 5, codes, generator, n_draws=99) <= 0.05
    assert 0.03 <= hits / 200 <= 0.07


def test_what_can_be_read_has_the_smallest_p_and_three_groups_are_read_too() -> None:
    generator = np.random.default_rng(9)
    codes = np.repeat(np.arange(60), 2)
    groups = generator.integers(0, 3, 60)[codes]
    X = generator.normal(size=(120, 5))
    X[:, 2] += 3 * (groups == 2)
    assert permutation_p(X, groups, codes % 5, codes, generator, n_draws=199) == 1 / 200
    assert np.isnan(permutation_p(X, 0 * groups, codes % 5, codes, generator))


@pytest.mark.parametrize("width", [6, 200])
def test_the_permuted_statistic_is_the_auroc_of_scikit_learns_ridge(width: int) -> None:
    """With more columns than rows too, where rows are rotated first."""
    generator = np.random.default_rng(width)
    X = generator.normal(size=(90, width)) * generator.uniform(1, 9, width) + 20
    folds, groups = np.arange(90) % 3, generator.integers(0, 2, 90)
    Z = StandardScaler().fit_transform(X)
    values = np.empty(90)
    for k in range(3):
        rest = folds != k
        model = Ridge(alpha=400, fit_intercept=False).fit(Z[rest], groups[rest] - groups.mean())
        values[~rest] = model.predict(Z[~rest])
    expected = score_pairs(groups, values, folds).value
    assert _RidgeReader(X, folds).score(groups[:, None]) == pytest.approx(expected, abs=1e-6)


def test_gaps_compare_groups_by_the_labels_score_within_each() -> None:
    generator = np.random.default_rng(6)
    y, groups = generator.integers(0, 2, 600), np.arange(600) % 2
    values = generator.normal(size=600) + 3 * y * (groups == 0)
    folds, codes = np.arange(600) // 2 % 5, np.arange(600)
    inside, [gap] = score_gap(y, values, groups, ["a", "b"], folds, codes, "others")
    one = folds == 0
    folded = [roc_auc_score(y[one & (groups == k)], values[one & (groups == k)]) for k in (0, 1)]
    assert inside["a"].value == pytest.approx(folded[0], abs=0.05)
    assert inside["b"].value == pytest.approx(folded[1], abs=0.15)
    assert gap.found.difference == pytest.approx(inside["a"].value - inside["b"].value)
    assert gap.p_holm < 1e-6


def test_several_groups_have_the_mean_of_their_scores_against_the_others() -> None:
    generator = np.random.default_rng(7)
    groups, codes = generator.integers(0, 3, 300), np.arange(300)
    values = np.eye(3)[groups] + generator.normal(size=(300, 3))
    found = score_encoded(groups, values, np.zeros(300, int), codes)
    each = [roc_auc_score(groups == k, values[:, k]) for k in range(3)]
    assert found.value == pytest.approx(np.mean(each))
