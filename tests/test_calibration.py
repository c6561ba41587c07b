import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.calibration import _sigmoid_calibration
from sklearn.metrics import roc_auc_score, roc_curve

from medembed.errors import ModelError, TrainingDataError
from medembed.evaluation.calibration import MIN_SLOPE, Calibration, fit_platt, youden_threshold
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


def test_a_calibration_survives_json():
    fitted = Calibration(0.7, -0.1)
    assert Calibration.from_dict(fitted.as_dict()) == fitted
    np.testing.assert_allclose(Calibration().apply(np.array([0.2, 0.9])), [0.2, 0.9])


@pytest.mark.parametrize(
    "change",
    [{"method": "isotonic"}, {"slope": 0}, {"slope": float("nan")}, {"intercept": None}],
)
def test_a_damaged_calibration_is_refused(change):
    with pytest.raises(ModelError, match="calibration"):
        Calibration.from_dict({"method": "platt", "slope": 1.0, "intercept": 0.0} | change)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6)), min_size=2, max_size=40))
def test_the_youden_index_is_the_best_on_scikit_learns_curve(pairs):
    y, level = (np.array(column) for column in zip(*pairs, strict=True))
    if len(set(y)) < 2:
        return
    probability = level / 6
    threshold = youden_threshold(y, probability)
    false, true, _ = roc_curve(y, probability)
    found = score(y, probability, threshold)
    assert found["sensitivity"] + found["specificity"] - 1 == pytest.approx(max(true - false))


def test_the_threshold_lies_in_the_middle_of_its_gap():
    assert youden_threshold(np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.6, 0.9])) == 0.4


def test_of_equal_cuts_the_more_sensitive_one_is_taken():
    y = np.array([0, 1, 0, 1])
    assert youden_threshold(y, np.array([0.1, 0.2, 0.3, 0.4])) == pytest.approx(0.15)


def test_a_constant_calls_everything_abnormal():
    assert youden_threshold(np.array([0, 1]), np.array([0.3, 0.3])) == 0.3


def test_neighbouring_floats_are_still_separated():
    low = 0.5
    high = np.nextafter(low, 1)
    threshold = youden_threshold(np.array([0, 1]), np.array([low, high]))
    assert low < threshold <= high


@pytest.mark.parametrize(
    "function", [lambda p, y: fit_platt(p, y), lambda p, y: youden_threshold(y, p)]
)
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
def test_what_cannot_be_fitted_is_said(function, y, probability, text):
    with pytest.raises(TrainingDataError, match=text):
        function(np.array(probability), np.array(y))
