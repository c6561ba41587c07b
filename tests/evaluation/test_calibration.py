import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import expit
from sklearn import calibration as sklearn_calibration
from sklearn.calibration import _sigmoid_calibration
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import brier_score_loss, roc_auc_score

from medembed.core.errors import ModelError, TrainingDataError
from medembed.evaluation.calibration import (
    MIN_SLOPE,
    Calibration,
    fit_isotonic,
    fit_platt,
    fit_temperature,
)
from medembed.evaluation.scores import score


def sample(n=4000, seed=0):
    generator = np.random.default_rng(seed)
    logit = generator.normal(size=n) * 1.5
    y = (generator.uniform(size=n) < expit(logit)).astype(int)
    return logit, y


def test_platt_undoes_a_known_distortion():
    logit, y = sample(40_000)
    fitted = fit_platt(expit(2 * logit + 1), y)
    assert fitted.slope == pytest.approx(0.5, abs=0.02)
    assert fitted.intercept == pytest.approx(-0.5, abs=0.04)


def test_platt_equals_scikit_learns_on_the_same_log_odds():
    logit, y = sample()
    a, b = _sigmoid_calibration(logit, y)
    fitted = fit_platt(expit(logit), y)
    assert (fitted.slope, fitted.intercept) == pytest.approx((-a, -b), abs=1e-4)


def test_calibration_keeps_the_order_and_lowers_the_error():
    logit, y = sample()
    raw = expit(3 * logit - 2)
    calibrated = fit_platt(raw, y).apply(raw)
    assert roc_auc_score(y, calibrated) == roc_auc_score(y, raw)
    assert score(y, calibrated, 0.5)["ece"] < 0.03 < score(y, raw, 0.5)["ece"]
    assert score(y, calibrated, 0.5)["brier"] < score(y, raw, 0.5)["brier"]


def test_a_head_worse_than_chance_is_flattened_not_turned_round():
    logit, y = sample()
    fitted = fit_platt(expit(-logit), y)
    assert fitted.slope == MIN_SLOPE
    np.testing.assert_allclose(fitted.apply(expit(-logit)), y.mean(), atol=0.01)


@pytest.mark.parametrize("probability", [np.r_[np.zeros(5), np.ones(5)], np.full(10, 0.3)])
def test_separable_and_constant_predictions_stay_finite(probability):
    y = np.r_[np.zeros(5, int), np.ones(5, int)]
    calibrated = fit_platt(probability, y).apply(probability)
    # Platt's targets for five of each: 1 / 7 and 6 / 7
    expected = np.where(probability == 0.3, 0.5, np.where(y == 1, 6 / 7, 1 / 7))
    np.testing.assert_allclose(calibrated, expected, atol=1e-3)


@pytest.mark.parametrize(
    "calibration", [Calibration(0.7, -0.1), Calibration(0.7, 0.0, "temperature")]
)
def test_a_calibration_survives_json(calibration):
    document = json.loads(json.dumps(calibration.as_dict()))
    assert Calibration.from_dict(document) == calibration
    assert document["method"] == calibration.method
    np.testing.assert_allclose(Calibration().apply(np.array([0.2, 0.9])), [0.2, 0.9])


@pytest.mark.parametrize(
    "change",
    [
        {"method": "isotonic"},
        {"method": None},
        {"method": "temperature", "intercept": 0.1},
        {"slope": 0},
        {"slope": float("nan")},
        {"slope": 10**400},
        {"intercept": None},
    ],
)
def test_a_damaged_calibration_is_refused(change):
    with pytest.raises(ModelError, match="calibration"):
        Calibration.from_dict({"method": "platt", "slope": 1.0, "intercept": 0.0} | change)


def test_what_is_no_table_is_no_calibration():
    with pytest.raises(ModelError, match="calibration: must be a table"):
        Calibration.from_dict([])


def test_a_temperature_undoes_a_known_scale():
    logit, y = sample(40_000)
    fitted = fit_temperature(expit(2 * logit), y)
    assert fitted.slope == pytest.approx(0.5, abs=0.01)
    assert (fitted.intercept, fitted.method) == (0.0, "temperature")


@pytest.mark.skipif(
    not hasattr(sklearn_calibration, "_TemperatureScaling"),
    reason="scikit-learn scales temperatures from release 1.8 on",
)
def test_a_temperature_is_scikit_learns_but_for_the_two_rows_of_platts_targets():
    logit, y = sample()
    # scikit-learn's scale multiplies the log-odds twice: its two classes get -x and x
    beta = sklearn_calibration._TemperatureScaling().fit(3 * logit, y).beta_
    assert fit_temperature(expit(3 * logit), y).slope == pytest.approx(2 * beta, rel=5e-3)


def test_a_temperature_has_the_least_cross_entropy_to_platts_targets():
    logit, y = sample(200)
    targets = np.where(y == 1, (y.sum() + 1) / (y.sum() + 2), 1 / ((1 - y).sum() + 2))

    def loss(slope):
        p = expit(slope * 3 * logit)
        return -np.mean(targets * np.log(p) + (1 - targets) * np.log(1 - p))

    expected = minimize_scalar(loss, bounds=(0.01, 2), method="bounded", options={"xatol": 1e-9})
    assert fit_temperature(expit(3 * logit), y).slope == pytest.approx(expected.x, abs=1e-6)


def test_a_temperature_leaves_one_half_where_it_is_and_stays_positive():
    logit, y = sample()
    assert fit_temperature(expit(logit - 1), y).apply(np.array([0.5])) == 0.5
    assert fit_temperature(expit(-logit), y).slope == MIN_SLOPE
    separable = fit_temperature(np.repeat([0.4, 0.6], 5), np.repeat([0, 1], 5))
    # Platt's targets for five of each: 1 / 7 and 6 / 7
    np.testing.assert_allclose(separable.apply(np.array([0.4, 0.6])), [1 / 7, 6 / 7], atol=1e-6)


@pytest.mark.parametrize("n_levels", [5, 10**6])
def test_isotonic_equals_scikit_learns_at_knots_between_and_beyond(n_levels):
    generator = np.random.default_rng(n_levels)
    probability = 0.1 + 0.8 * generator.integers(0, n_levels + 1, 500) / n_levels
    y = (generator.uniform(size=500) < probability**2).astype(int)
    expected = IsotonicRegression(out_of_bounds="clip").fit(probability, y)
    grid = np.linspace(0, 1, 1001)
    fitted = fit_isotonic(probability, y)
    np.testing.assert_allclose(fitted.apply(grid), expected.predict(grid), atol=1e-12)
    assert (np.diff(fitted.x) > 0).all()
    assert (np.diff(fitted.y) >= 0).all()
    assert fitted.apply(grid.reshape(7, 143)).shape == (7, 143)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6)), min_size=2, max_size=30))
def test_isotonic_is_the_max_min_of_means(pairs):
    y, level = (np.array(column) for column in zip(*pairs, strict=True))
    if len(set(y)) < 2:
        return
    levels = np.unique(level)

    def mean(low, high):
        return y[(level >= low) & (level <= high)].mean()

    # Robertson, Wright and Dykstra, Order Restricted Statistical Inference, 1988, 1.4
    expected = [
        max(min(mean(a, b) for b in levels[levels >= k]) for a in levels[levels <= k])
        for k in levels
    ]
    fitted = fit_isotonic(level / 6, y)
    np.testing.assert_allclose(fitted.apply(levels / 6), expected, atol=1e-12)


def test_isotonic_undoes_what_no_line_can():
    logit, y = sample(40_000)
    raw = expit(logit**3)
    calibrated = fit_isotonic(raw, y).apply(raw)
    assert score(y, calibrated, 0.5)["ece"] < 0.005
    assert brier_score_loss(y, calibrated) < brier_score_loss(y, fit_platt(raw, y).apply(raw))
    np.testing.assert_allclose(fit_isotonic(raw, y).apply(np.array([0.5])), 0.5, atol=0.05)


def test_isotonic_of_a_constant_is_the_share_abnormal():
    fitted = fit_isotonic(np.full(4, 0.3), np.array([0, 0, 0, 1]))
    np.testing.assert_allclose(fitted.apply(np.array([0, 0.3, 1])), 0.25)


@pytest.mark.parametrize("fit", [fit_platt, fit_temperature, fit_isotonic])
@pytest.mark.parametrize(
    ("y", "probability", "text"),
    [
        ([1, 1], [0.1, 0.2], "all 2 are abnormal"),
        ([0, 0], [0.1, 0.2], "all 2 are normal"),
        ([], [], "all 0"),
        ([0, -1], [0.1, 0.2], "unlabelled"),
        ([0, 1], [0.1, np.nan], "NaN"),
        ([0, 1], [0.1], "one probability per label"),
    ],
)
def test_what_cannot_be_fitted_is_said(fit, y, probability, text):
    with pytest.raises(TrainingDataError, match=text):
        fit(np.array(probability), np.array(y))
