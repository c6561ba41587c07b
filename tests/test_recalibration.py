"""Calibration elsewhere: the fit of probabilities, what a few labels mend, and drops of scores."""

import json
import warnings
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy.special import expit, logit

from medembed.errors import TrainingDataError
from medembed.evaluation.calibration import Calibration, fit_platt
from medembed.evaluation.drops import bootstrap_drop, mover_drop
from medembed.evaluation.intervals import Interval, bootstrap_scores, plain
from medembed.evaluation.recalibration import calibration_line, draw_patients, recalibrate
from medembed.evaluation.scores import SCORES
from medembed.evaluation.thresholds import youden_threshold


def make_studies(n=300, *, slope=0.5, shift=-0.7, seed=0, first=0):
    """Studies of two per patient whose log-odds are `slope` of what is said, plus `shift`."""
    generator = np.random.default_rng(seed)
    x = generator.normal(0, 2, n)
    label = (generator.random(n) < expit(slope * x + shift)).astype(np.int8)
    return pd.DataFrame(
        {"patient": first + np.arange(n) // 2, "label": label, "probability": expit(x)}
    )


def arrays(studies):
    return (studies[name].to_numpy() for name in ("label", "probability", "patient"))


def logistic(y, x, weights, *, free_slope):
    """statsmodels' intercept and slope; with a slope of 1 held where it is not free."""
    options = {"family": sm.families.Binomial(), "freq_weights": weights}
    if free_slope:
        return sm.GLM(y, sm.add_constant(x), **options).fit(tol=1e-12).params
    return [*sm.GLM(y, np.ones(len(y)), offset=x, **options).fit(tol=1e-12).params, 1.0]


def test_slope_and_intercept_are_those_of_statsmodels():
    y, probability, patients = arrays(make_studies())
    line = calibration_line(y, probability, patients, n_resamples=50)
    ones, x = np.ones(len(y)), logit(probability)
    assert line["slope"].value == pytest.approx(logistic(y, x, ones, free_slope=True)[1])
    assert line["intercept"].value == pytest.approx(logistic(y, x, ones, free_slope=False)[0])
    assert line["mean_probability"].value == pytest.approx(probability.mean())
    assert line["share_abnormal"].value == pytest.approx(y.mean())
    assert line["observed_expected"].value == pytest.approx(y.mean() / probability.mean())


def test_the_interval_is_that_of_refits_on_resampled_patients():
    y, probability, patients = arrays(make_studies(160))
    line = calibration_line(y, probability, patients, n_resamples=60, seed=4)
    x, generator = logit(probability), np.random.default_rng(4)
    slopes = []
    for drawn in generator.integers(0, 80, size=(60, 80)):
        weights = np.bincount(drawn, minlength=80)[patients]
        slopes.append(logistic(y, x, weights, free_slope=True)[1])
    expected = np.quantile(slopes, [0.025, 0.975])
    assert [line["slope"].low, line["slope"].high] == pytest.approx(expected, rel=1e-5)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    n, covered = 60, 0
    for seed in range(n):
        studies = make_studies(200, slope=0.6, shift=0.0, seed=seed)
        slope = calibration_line(*arrays(studies), n_resamples=200)["slope"]
        covered += slope.low <= 0.6 <= slope.high
    assert covered >= 51  # 95 % of 60 are 57; fewer than 51 come once in 300 times


@pytest.mark.parametrize(
    ("y", "probability"),
    [
        ([1, 1, 1, 1], [0.2, 0.4, 0.6, 0.9]),
        ([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9]),
        ([1, 1, 0, 0], [0.1, 0.2, 0.8, 0.9]),
        ([0, 1, 0, 1], [0.5, 0.5, 0.5, 0.5]),
        ([0, 1, 0, 1], [0.0, 1.0, 1.0, 0.0]),
    ],
)
def test_what_has_no_slope_is_not_estimable_and_no_crash(y, probability):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        line = calibration_line(np.array(y), np.array(probability), np.arange(4), n_resamples=99)
    separable = probability != [0.0, 1.0, 1.0, 0.0]
    assert np.isnan(line["slope"].value) == separable
    assert np.isnan(line["slope"].low)
    assert plain(line)["mean_probability"]["value"] == pytest.approx(np.mean(probability))


def test_patients_are_drawn_whole_and_nested():
    patients = np.array(["a", "b", "b", "c", "d", "d", "e"])
    chosen = [draw_patients(patients, n, seed=1) for n in (1, 2, 4)]
    for few, more in pairwise(chosen):
        assert (few <= more).all()
    for is_drawn, n in zip(chosen, (1, 2, 4), strict=True):
        assert len(set(patients[is_drawn])) == n
        assert not set(patients[is_drawn]) & set(patients[~is_drawn])
    order = np.random.default_rng(0).permutation(7)
    assert (draw_patients(patients[order], 2, seed=1) == chosen[1][order]).all()
    assert any((draw_patients(patients, 2, seed=s) != chosen[1]).any() for s in range(9))
    for n in (0, 5):
        with pytest.raises(TrainingDataError, match="Ask for 1 to 4"):
            draw_patients(patients, n)


def test_recalibration_mends_what_is_wrong_and_is_scored_on_others():
    studies = make_studies(600, slope=0.4, shift=-1.5)
    model, threshold = Calibration(), 0.5
    found = recalibrate(studies, model, threshold, 100, n_resamples=100)
    is_drawn = draw_patients(studies["patient"].to_numpy(), 100)
    drawn, others = studies[is_drawn], studies[~is_drawn]
    y, raw, _ = arrays(drawn)
    fitted = fit_platt(raw, y)
    assert found["calibration"] == fitted.as_dict()
    assert found["threshold"] == youden_threshold(y, fitted.apply(raw))
    assert found["scored"] == {
        "n": 400,
        "n_abnormal": int(others["label"].sum()),
        "n_patients": 200,
    }
    for side, calibration, cut in (("before", model, 0.5), ("after", fitted, found["threshold"])):
        scores = bootstrap_scores(
            others["label"].to_numpy(),
            calibration.apply(others["probability"]),
            others["patient"].to_numpy(),
            cut,
            n_resamples=100,
        )
        for name, own in found[side]["scores"].items():
            assert own == scores[name].as_dict()
    before, after = found["before"], found["after"]
    assert before["line"]["slope"]["high"] < 1
    assert before["line"]["intercept"]["high"] < 0
    assert after["line"]["slope"]["low"] < 1 < after["line"]["slope"]["high"]
    assert found["change"]["brier"]["high"] < 0
    assert found["change"]["brier"]["value"] == pytest.approx(
        after["scores"]["brier"]["value"] - before["scores"]["brier"]["value"]
    )
    json.dumps(found, allow_nan=False)


def test_a_drawn_sample_of_one_class_is_said():
    studies = make_studies(40).assign(label=lambda rows: (rows["patient"] == 3).astype(np.int8))
    found = recalibrate(studies, Calibration(), 0.5, 2, n_resamples=20)
    assert "one class only" in found["note"]
    assert "after" not in found


def test_a_drop_is_the_difference_and_its_interval_that_of_both_samples():
    inside = make_studies(300, slope=2, shift=0, seed=1)
    outside = make_studies(200, slope=0.4, shift=0, seed=2, first=1000)
    drops = bootstrap_drop(inside, outside, 0.5, n_resamples=400)
    scores = [bootstrap_scores(*arrays(rows), 0.5, n_resamples=400) for rows in (inside, outside)]
    assert set(drops) == set(SCORES)
    for name, drop in drops.items():
        assert drop.difference == pytest.approx(scores[1][name].value - scores[0][name].value)
        assert drop.low < drop.difference < drop.high
    auroc, mover = drops["auroc"], mover_drop(*scores)["auroc"]
    assert auroc.high < -0.05
    assert auroc.p < 0.01
    # two roads to one interval
    assert [mover.low, mover.high] == pytest.approx([auroc.low, auroc.high], abs=0.02)
    assert bootstrap_drop(inside, outside, 0.5, n_resamples=400) == drops


def test_mover_is_the_formula_of_zou_and_donner():
    """Their way from single to joint limits, by hand: 0.8 [0.7, 0.86] less 0.9 [0.84, 0.94]."""
    inside, outside = {"auroc": Interval(0.9, 0.84, 0.94)}, {"auroc": Interval(0.8, 0.7, 0.86)}
    found = mover_drop(inside | {"brier": Interval(0.1, 0.1, 0.1)}, outside)
    assert set(found) == {"auroc"}
    assert found["auroc"].low == pytest.approx(-0.1 - np.hypot(0.1, 0.04))
    assert found["auroc"].high == pytest.approx(-0.1 + np.hypot(0.06, 0.06))
    assert np.isnan(mover_drop(inside, {"auroc": Interval(0.8, np.nan, np.nan)})["auroc"].low)


def test_a_drop_to_one_class_is_not_estimable_and_no_crash():
    inside, outside = make_studies(60), make_studies(60, first=1000).assign(label=np.int8(1))
    drops = bootstrap_drop(inside, outside, 0.5, n_resamples=50)
    assert plain(drops["auroc"]) == dict.fromkeys(("difference", "low", "high", "p"))
    assert drops["brier"].low < drops["brier"].high


def test_no_drop_is_found_where_there_is_none():
    n, alarms = 60, 0
    for seed in range(n):
        inside = make_studies(160, slope=1, shift=0, seed=seed)
        outside = make_studies(80, slope=1, shift=0, seed=seed + 1000, first=1000)
        drop = bootstrap_drop(inside, outside, 0.5, n_resamples=200, seed=seed)["auroc"]
        alarms += not drop.low <= 0 <= drop.high
    assert alarms <= 8  # 5 % of 60 are 3; more than 8 come once in 250 times
