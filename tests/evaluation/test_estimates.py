"""Limits in closed form against oracles, at the boundary, and what makes a score lack them."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score, f1_score
from statsmodels.stats.proportion import proportion_confint

from medembed.core.errors import TrainingDataError
from medembed.evaluation import bounds
from medembed.evaluation.delong import auroc_covariance
from medembed.evaluation.estimates import (
    PREDICTIVE,
    estimate_scores,
    estimate_share,
    influences,
    mean_estimate,
    measure_spread,
)
from medembed.evaluation.scores import SCORES, Scorer
from medembed.evaluation.unpaired import sample_drop

SMOOTH = [name for name in SCORES if name != "ece"]
NAMES = [*SMOOTH, *PREDICTIVE]
LABELLED = st.lists(
    st.tuples(
        st.integers(0, 1), st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]), st.integers(0, 12)
    ),
    min_size=1,
    max_size=60,
)


def columns(rows):
    y, probability, patients = (np.array(column) for column in zip(*rows, strict=True))
    return y, probability, patients


def made(n=120, seed=0):
    generator = np.random.default_rng(seed)
    y = (generator.random(n) < 0.4).astype(int)
    probability = 1 / (1 + np.exp(-(2 * y - 1 + generator.normal(size=n))))
    return y, np.round(probability, 2)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("n", [5, 17, 400])
def test_wilson_and_clopper_pearson_are_statsmodels(share, n):
    k = round(share * n)
    for found, method in (
        (bounds.wilson(k / n, n, bounds.quantile(0.95)), "wilson"),
        (bounds.clopper_pearson(k / n, n, 0.95), "beta"),
    ):
        assert found == pytest.approx(proportion_confint(k, n, 0.05, method), abs=1e-12)


def test_ten_of_ten_found_have_the_lower_end_of_clopper_and_pearson():
    found = estimate_share(np.ones(10, bool), np.ones(10, bool), np.arange(10)).interval()
    assert (found.value, found.high, found.k, found.n) == (1.0, 1.0, 10, 10)
    assert found.low == pytest.approx(0.6915, abs=1e-4)
    assert found.method == "clopper-pearson"


def test_the_design_effect_is_that_of_clusters():
    """Rows of one patient all alike count once; rows that have nothing in common, each."""
    generator = np.random.default_rng(1)
    alike = np.repeat(generator.random(200) < 0.3, 4)
    apart = generator.random(800) < 0.3
    codes, everyone = np.repeat(np.arange(200), 4), np.ones(800, bool)
    own = estimate_share(alike, everyone, codes).interval()
    expected = proportion_confint(alike.sum() / 4, 200, method="wilson")
    assert (own.low, own.high) == pytest.approx(expected, abs=2e-3)
    own = estimate_share(apart, everyone, codes).interval()
    expected = proportion_confint(apart.sum(), 800, method="wilson")
    assert (own.low, own.high) == pytest.approx(expected, abs=8e-3)


def test_newcombes_limits_solve_his_equation():
    reach = 1.959964
    for auroc, ratio in ((0.5, 1.0), (0.85, 1.4), (0.97, 0.7), (1.0, 1.0)):
        for end in bounds.bound_auroc(auroc, 7, 30, ratio, reach):
            gap = (auroc - end) ** 2
            spread = ratio * bounds.auroc_variance(end, 7, 30)
            assert gap == pytest.approx(reach**2 * spread, abs=1e-12) or end == auroc == 1
    # Hanley and McNeil's, by hand: of .8 with 10 and 10, symmetric, Q1 + Q2 = .8 / 1.2 + 1.28 / 1.8
    expected = (0.16 + 9 * (0.8 / 1.2 - 0.64) + 9 * (1.28 / 1.8 - 0.64)) / 100
    assert bounds.auroc_variance(0.8, 10, 10) == pytest.approx(expected)


@settings(deadline=None, max_examples=60)
@given(LABELLED)
def test_what_a_row_adds_is_the_slope_of_the_score_in_its_weight(rows):
    y, probability, _ = columns(rows)
    n, step = len(y), 1e-5
    weights = np.ones((2 * n, n))
    weights[np.arange(n), np.arange(n)] += step
    weights[n + np.arange(n), np.arange(n)] -= step
    found = influences(y, probability, 0.4, SMOOTH)
    scores = Scorer(y, probability, 0.4, SMOOTH)(weights)
    for name in SMOOTH:
        slopes = (scores[name][:n] - scores[name][n:]) / (2 * step)
        np.testing.assert_allclose(found[name], slopes, atol=1e-7)


def test_the_standard_error_of_auroc_is_delongs_with_clusters():
    y, probability = made()
    patients = np.arange(len(y)) // 3
    added = influences(y, probability, 0.5, ["auroc"])["auroc"]
    _, covariance = auroc_covariance(y, {"": probability}, patients)
    spread = measure_spread(y, added, patients)
    assert spread.error == pytest.approx(math.sqrt(covariance[0, 0]))


@settings(deadline=None, max_examples=150)
@given(LABELLED)
def test_every_interval_has_a_width_holds_its_value_and_says_how_or_why_not(rows):
    y, probability, patients = columns(rows)
    codes = np.unique(patients, return_inverse=True)[1]
    for name, estimate in estimate_scores(y, probability, 0.5, codes, NAMES).items():
        own = estimate.interval()
        lowest = -1.0 if name == "kappa" else 0.0
        if math.isnan(own.low):
            assert math.isnan(own.high)
            assert own.method is None
            assert own.reason
        else:
            assert lowest - 1e-9 <= own.low <= own.value <= own.high <= 1 + 1e-9
            assert own.low < own.high
            assert own.method
            assert own.reason is None
            wider = estimate.interval(0.99)
            assert wider.low <= own.low < own.high <= wider.high


def test_what_is_perfect_has_limits_from_its_parts():
    """20 of 20 and 20 of 20: each of sensitivity and specificity may be as low as .832."""
    y, codes = np.repeat([0, 1], 20), np.arange(40)
    found = estimate_scores(y, np.where(y == 1, 0.9, 0.1), 0.5, codes, NAMES)
    assert found["sensitivity"].interval().low == pytest.approx(0.025**0.05)
    low = 0.025**0.05
    kappa = 1 - math.hypot(1 - low, 1 - low)  # of prevalence one half it is se + sp - 1
    own = found["kappa"].interval()
    assert (own.value, own.high) == (1.0, 1.0)
    assert own.low == pytest.approx(kappa, abs=0.01)
    for name in ("auroc", "macro_f1"):
        own = found[name].interval()
        assert (own.value, own.high) == (1.0, pytest.approx(1.0))
        assert 0.7 < own.low < 0.97
    # average precision and Brier score have no spread here, and nothing to take it from
    assert found["average_precision"].interval().reason


def test_a_constant_has_values_and_no_interval():
    y = np.tile([0, 1, 0], 20)
    for name, estimate in estimate_scores(y, np.full(60, 0.3), 0.5, np.arange(60), NAMES).items():
        own = estimate.interval()
        assert math.isnan(own.low), name
        assert own.reason
    assert estimate.value == 0.6666666666666666


def test_four_patients_of_a_class_are_too_few_and_five_are_enough():
    for n, is_shown in ((4, False), (5, True)):
        y = np.r_[np.ones(n, int), np.zeros(30, int)]
        probability = np.linspace(0.9, 0.1, len(y))
        probability[[0, 20]] = probability[[20, 0]]
        found = estimate_scores(y, probability, 0.5, np.arange(len(y)), NAMES)
        for name in ("auroc", "average_precision", "macro_f1", "kappa", "sensitivity", "brier"):
            own = found[name].interval()
            assert math.isnan(own.low) != is_shown, name
        assert not math.isnan(found["specificity"].interval().low)
    reason = estimate_scores(y[1:], probability[1:], 0.5, np.arange(34))["auroc"].reason
    assert reason == "4 patients with abnormal rows; an interval needs 5"


def test_macro_f1_and_kappa_of_their_parts_are_scikit_learns():
    from medembed.evaluation.estimates import _kappa, _macro_f1

    y, probability = made()
    called = probability >= 0.5
    parts = (called[y == 1].mean(), (~called[y == 0]).mean(), y.mean())
    assert _macro_f1(*parts) == pytest.approx(f1_score(y, called, average="macro"))
    assert _kappa(*parts) == pytest.approx(cohen_kappa_score(y, called))


def test_the_mean_of_independent_groups_is_narrower_by_the_root_of_their_number():
    y, probability = made(400)
    codes = np.arange(400)
    one = estimate_scores(y, probability, 0.5, codes, ["auroc"], 1600)["auroc"]
    four = [
        estimate_scores(y, probability, 0.5, codes + 400 * k, ["auroc"], 1600)["auroc"]
        for k in range(4)
    ]
    mean, own = mean_estimate(four, "abcd").interval(), one.interval()
    assert mean.value == pytest.approx(own.value)
    assert mean.value - mean.low == pytest.approx((own.value - own.low) / 2)
    # the same patients in all four: nothing is gained
    same = mean_estimate([one] * 4, "abcd").interval()
    assert (same.low, same.high) == pytest.approx((own.low, own.high))


def test_a_group_without_an_interval_leaves_the_mean_without_one():
    y, probability = made(60)
    many = estimate_scores(y, probability, 0.5, np.arange(60), ["auroc"], 64)["auroc"]
    few = estimate_scores(y[:4], probability[:4], 0.5, np.arange(60, 64), ["auroc"], 64)["auroc"]
    own = mean_estimate([many, few], ["hand", "foot"])
    assert "foot" in own.reason
    assert math.isnan(own.interval().low)


def test_patients_of_other_rows_are_refused():
    with pytest.raises(TrainingDataError, match="3 labels, but 2 patients"):
        estimate_scores(np.array([0, 1, 1]), np.array([0.1, 0.2, 0.3]), 0.5, np.arange(2))


def test_a_drop_from_a_perfect_score_has_an_interval():
    y = np.repeat([0, 1], 20)
    inside = pd.DataFrame({"label": y, "probability": y * 0.8 + 0.1, "patient": np.arange(40)})
    outside = inside.assign(probability=np.linspace(0.05, 0.95, 40)[::-1], patient=range(100, 140))
    drops = sample_drop(inside, outside, 0.5)
    for name in ("auroc", "sensitivity", "kappa"):
        assert drops[name].low <= drops[name].difference < drops[name].high < 0
        assert drops[name].p < 0.001
