"""Calibration elsewhere: the fit of probabilities, what a few labels mend, and drops of scores."""

import json
import re
import warnings
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy.special import expit, logit
from scipy.stats import f as fisher

from medembed.core.errors import TrainingDataError
from medembed.evaluation.calibration import Calibration, calibration_line, check_line, fit_platt
from medembed.evaluation.intervals import Interval, bootstrap_scores, plain
from medembed.evaluation.recalibration import draw_patients, recalibrate
from medembed.evaluation.scores import SCORES
from medembed.evaluation.thresholds import youden_threshold
from medembed.evaluation.unpaired import mover_drop, sample_drop


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
    line = calibration_line(y, probability, patients)
    ones, x = np.ones(len(y)), logit(probability)
    assert line["slope"].value == pytest.approx(logistic(y, x, ones, free_slope=True)[1])
    assert line["intercept"].value == pytest.approx(logistic(y, x, ones, free_slope=False)[0])
    assert line["mean_probability"].value == pytest.approx(probability.mean())
    assert line["share_abnormal"].value == pytest.approx(y.mean())
    assert line["observed_expected"].value == pytest.approx(y.mean() / probability.mean())


@pytest.mark.parametrize("n_copies", [1, 4])  # of a patient's studies, which then are all alike
@pytest.mark.parametrize("free_slope", [False, True])
def test_the_intervals_are_those_of_statsmodels_clustered_covariance(free_slope, n_copies):
    y, probability, patients = (np.repeat(own, n_copies) for own in arrays(make_studies(600)))
    x = logit(probability)
    design = sm.add_constant(x) if free_slope else np.ones((len(y), 1))
    model = sm.GLM(y, design, sm.families.Binomial(), offset=None if free_slope else x)
    fit = model.fit(
        cov_type="cluster", cov_kwds={"groups": patients, "use_correction": False}, tol=1e-12
    )
    own = calibration_line(y, probability, patients)["slope" if free_slope else "intercept"]
    # of 300 patients t and the correction for their number differ from 1.96 by a few thousandths
    assert (own.high - own.low) / 2 == pytest.approx(1.96 * fit.bse[-1], rel=0.02)
    assert (own.high + own.low) / 2 == pytest.approx(fit.params[-1])


def test_the_joint_test_of_slope_and_intercept_is_walds():
    y, probability, patients = arrays(make_studies(600, slope=0.85, shift=-0.1))
    x = sm.add_constant(logit(probability))
    fit = sm.GLM(y, x, sm.families.Binomial()).fit(
        cov_type="cluster", cov_kwds={"groups": patients, "use_correction": False}
    )
    off = fit.params - [0.0, 1.0]
    ratio = off @ np.linalg.inv(fit.cov_params()) @ off / 2
    assert check_line(y, probability, patients) == pytest.approx(fisher.sf(ratio, 2, 250), abs=0.01)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    n, covered = 60, 0
    for seed in range(n):
        studies = make_studies(200, slope=0.6, shift=0.0, seed=seed)
        slope = calibration_line(*arrays(studies))["slope"]
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
        line = calibration_line(np.array(y), np.array(probability), np.arange(4))
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


def test_a_calibrated_model_is_left_alone():
    """A slope of 20 patients made Brier worse in 9 of 10 draws of a calibrated model."""
    left, changes = 0, []
    for seed in range(40):
        studies = make_studies(300, slope=1, shift=0, seed=seed)
        found = recalibrate(studies, Calibration(), 0.5, 20, n_resamples=5, seed=seed)
        left += found["action"] == "none"
        changes.append(found["change"]["brier"]["value"])
        assert found["action"] != "slope_and_intercept"
    assert left >= 34
    assert sum(change > 0 for change in changes) <= 6


def test_of_few_patients_the_intercept_alone_is_fitted_and_decisions_stay():
    studies = make_studies(400, slope=1, shift=-2.5)
    found = recalibrate(studies, Calibration(1.1, 0.2), 0.6, 40, n_resamples=5)
    assert (found["action"], found["calibration"]["slope"]) == ("intercept", 1.1)
    assert found["p"] < 0.05
    for name in ("accuracy", "sensitivity", "specificity", "kappa"):
        assert found["change"][name]["value"] == 0
        assert found["change"][name]["low"] is None
    assert found["change"]["brier"]["high"] < 0
    drawn = studies[draw_patients(studies["patient"].to_numpy(), 40)]
    y, raw, _ = arrays(drawn)
    shifted = Calibration(**{k: found["calibration"][k] for k in ("slope", "intercept")}).apply(raw)
    assert shifted.mean() == pytest.approx(y.mean())  # what the likelihood of an intercept wants


def test_a_handful_of_a_class_is_refused_with_the_number_needed():
    label = pd.Series(np.repeat(np.arange(60) % 6 == 0, 2).astype(np.int8))
    studies = make_studies(120).assign(label=label)
    found = recalibrate(studies, Calibration(), 0.5, 3, n_resamples=5)
    assert "after" not in found
    needed = int(re.search(r"Draw (\d+) patients", found["note"])[1])
    enough = recalibrate(studies, Calibration(), 0.5, needed, n_resamples=5)
    assert enough["note"] is None
    assert "recalibration needs 5" in recalibrate(studies, Calibration(), 0.5, needed - 1)["note"]
    few = studies.assign(label=(studies["patient"] < 3).astype(np.int8))
    assert "Label more patients" in recalibrate(few, Calibration(), 0.5, 30)["note"]


def test_a_drop_is_the_difference_and_its_interval_that_of_both_samples():
    inside = make_studies(300, slope=2, shift=0, seed=1)
    outside = make_studies(200, slope=0.4, shift=0, seed=2, first=1000)
    drops = sample_drop(inside, outside, 0.5)
    scores = [bootstrap_scores(*arrays(rows), 0.5, n_resamples=5) for rows in (inside, outside)]
    mover = mover_drop(*scores)
    assert list(drops) == list(SCORES)
    for name, drop in drops.items():
        assert drop.difference == pytest.approx(scores[1][name].value - scores[0][name].value)
        assert [drop.low, drop.high] == pytest.approx(
            [mover[name].low, mover[name].high], nan_ok=True
        )
        if name != "ece":
            assert drop.low < drop.difference < drop.high
            assert (drop.p < 0.05) == (not drop.low <= 0 <= drop.high)
    assert drops["auroc"].high < -0.05
    assert drops["auroc"].p < 0.01


def test_the_noise_of_ece_is_no_drop():
    """Two samples of one calibrated population: p was below .05 in 6 of 10."""
    drop = sample_drop(make_studies(300, seed=1), make_studies(40, seed=2, first=900), 0.5)["ece"]
    found = plain(drop)
    assert found["difference"] is not None
    assert found["low"] is found["high"] is found["p"] is None


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
    drops = sample_drop(inside, outside, 0.5)
    assert plain(drops["auroc"]) == dict.fromkeys(("difference", "low", "high", "p", "method"))
    assert drops["accuracy"].low < drops["accuracy"].high


def test_no_drop_is_found_where_there_is_none():
    n, alarms = 60, 0
    for seed in range(n):
        inside = make_studies(160, slope=1, shift=0, seed=seed)
        outside = make_studies(80, slope=1, shift=0, seed=seed + 1000, first=1000)
        drop = sample_drop(inside, outside, 0.5)["auroc"]
        alarms += not drop.low <= 0 <= drop.high
    assert alarms <= 8  # 5 % of 60 are 3; more than 8 come once in 250 times
