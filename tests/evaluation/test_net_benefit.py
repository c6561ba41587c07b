"""Predictive values at a prevalence, decision curves, calibration curves, against oracles."""

import json
import math

import dcurves
import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from scipy.stats import norm
from sklearn.metrics import confusion_matrix, precision_score, recall_score, roc_curve

from medembed.core.errors import TrainingDataError
from medembed.evaluation.bootstrap import patient_codes
from medembed.evaluation.bounds import bound_ratio
from medembed.evaluation.calibration import calibration_curve
from medembed.evaluation.clinical_utility import THRESHOLDS, net_benefit, predictive_values
from medembed.evaluation.estimates import estimate_scores
from medembed.evaluation.scores import by_study
from medembed.results.comparison import compare
from medembed.results.runs import open_run
from medembed.sweeps import sweep

CUTS = np.array([0.05, 0.2, 0.5])


def clustered(generator, n_patients, prevalence, distance):
    """Patients with one to three rows; scores of a patient are alike."""
    patients = np.repeat(np.arange(n_patients), generator.integers(1, 4, n_patients))
    y = (generator.random(len(patients)) < prevalence).astype(int)
    z = generator.normal(0, math.sqrt(0.5), n_patients)[patients] + distance * y
    return y, z + generator.normal(0, math.sqrt(0.5), len(y)), patients


def shares_of(y, probability, patients, threshold=0.5):
    names = ("sensitivity", "specificity")
    found = estimate_scores(y, probability, threshold, patient_codes(patients), names)
    return found["sensitivity"], found["specificity"]


# predictive values


def test_predictive_values_are_bayes_rule():
    generator = np.random.default_rng(0)
    y, z, patients = clustered(generator, 80, 0.4, 1.5)
    sensitivity, specificity = shares_of(y, expit(z - 0.7), patients)
    for prevalence in (0.001, 0.1, 0.5, 0.99):
        found = predictive_values(sensitivity, specificity, prevalence)
        hit, missed = prevalence * sensitivity.value, prevalence * (1 - sensitivity.value)
        alarm = (1 - prevalence) * (1 - specificity.value)
        passed = (1 - prevalence) * specificity.value
        assert found["ppv"].value == pytest.approx(hit / (hit + alarm))
        assert found["npv"].value == pytest.approx(passed / (passed + missed))
        for own in found.values():
            interval = own.interval()
            assert 0 <= interval.low < interval.value < interval.high <= 1
            assert interval.method == "mover-ratio"


def test_at_the_prevalence_of_the_rows_they_are_those_of_the_rows():
    y, z, patients = clustered(np.random.default_rng(1), 120, 0.3, 1.2)
    called = z > 0.6
    found = predictive_values(*shares_of(y, called.astype(float), patients), float(y.mean()))
    assert found["ppv"].value == pytest.approx(precision_score(y, called))
    assert found["npv"].value == pytest.approx(precision_score(1 - y, ~called))


def test_perfect_decisions_leave_a_width():
    y = np.arange(40) % 2
    found = predictive_values(*shares_of(y, y.astype(float), np.arange(40)), 0.1)
    for own in found.values():
        interval = own.interval()
        assert interval.value == interval.high == 1
        assert interval.low < 1
    # by hand: 20 of 20 by Clopper and Pearson; the least ratio of Donner and Zou's formula
    low = 0.025 ** (1 / 20)
    ratio = math.sqrt(low * (2 - low)) / (1 - low)
    assert found["ppv"].interval().low == pytest.approx(ratio / 9 / (1 + ratio / 9))


def test_useless_decisions_leave_a_width_too():
    y = np.arange(40) % 2
    found = predictive_values(*shares_of(y, 1 - y.astype(float), np.arange(40)), 0.1)
    for own in found.values():
        interval = own.interval()
        assert interval.value == interval.low == 0
        assert interval.high > 0


def test_nothing_called_abnormal_has_no_ppv():
    y = np.arange(40) % 2
    probability = np.where(np.arange(40) < 20, 0.1, 0.2)
    found = predictive_values(*shares_of(y, probability, np.arange(40)), 0.1)
    assert math.isnan(found["ppv"].value)
    assert "leave no row" in found["ppv"].reason
    assert found["npv"].value == pytest.approx(0.9)


@pytest.mark.parametrize("prevalence", [0, 1, -0.1, 1.5, math.nan])
def test_a_prevalence_is_a_share(prevalence):
    y = np.arange(40) % 2
    with pytest.raises(TrainingDataError, match=r"not above 0 and below 1; give the share"):
        predictive_values(*shares_of(y, y.astype(float), np.arange(40)), prevalence)


SHARE = st.floats(0, 1)


@settings(deadline=None, max_examples=200)
@given(SHARE, SHARE, SHARE, SHARE, SHARE, SHARE)
def test_limits_of_a_ratio_hold_it(above, below, a, b, c, d):
    ends_above = above * a, above + (1 - above) * b
    ends_below = below * c, below + (1 - below) * d
    low, high = bound_ratio(above, below, ends_above, ends_below)
    assert 0 <= low <= high
    if below > 1e-6:
        assert low <= above / below * (1 + 1e-9) + 1e-12
        assert high >= above / below * (1 - 1e-9) - 1e-12


@settings(deadline=None, max_examples=200)
@given(*[st.floats(0.05, 0.95)] * 6)
def test_limits_of_a_ratio_are_donner_and_zous(above, below, a, b, c, d):
    """The formula as it is printed, where it loses no digits."""
    (low, high), (least, most) = (above * a, above + b * 0.5), (below * c, below + d * 0.5)
    found = bound_ratio(above, below, (low, high), (least, most))
    p = above * below
    root = math.sqrt(p * p - low * most * (2 * above - low) * (2 * below - most))
    if abs(2 * below - most) > 0.01:
        assert found[0] == pytest.approx((p - root) / (most * (2 * below - most)), rel=1e-6)
    root = math.sqrt(p * p - high * least * (2 * above - high) * (2 * below - least))
    assert found[1] == pytest.approx((p + root) / (least * (2 * below - least)), rel=1e-9)


@pytest.mark.parametrize(("n_patients", "prevalence", "at"), [(60, 0.4, 0.05), (150, 0.15, 0.3)])
def test_predictive_values_cover(n_patients, prevalence, at):
    generator = np.random.default_rng(5)
    cut, distance = 1.3, 1.8
    se, sp = norm.sf(cut - distance), norm.cdf(cut)
    truth = {"ppv": se * at / (se * at + (1 - sp) * (1 - at))}
    truth["npv"] = sp * (1 - at) / (sp * (1 - at) + (1 - se) * at)
    covered, n = dict.fromkeys(truth, 0), 200
    for _ in range(n):
        y, z, patients = clustered(generator, n_patients, prevalence, distance)
        found = predictive_values(*shares_of(y, norm.cdf(z - cut), patients), at)
        for name, value in truth.items():
            interval = found[name].interval()
            covered[name] += interval.low <= value <= interval.high
    # 0.92 is two standard errors of 200 data sets below 0.95
    assert all(count / n >= 0.92 for count in covered.values()), covered


# decision curves


def test_net_benefit_of_a_worked_example():
    """Four of ten abnormal; at 0.2 three are found at two false alarms: 0.3 - 0.2 / 4."""
    y = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    probability = np.array([0.9, 0.6, 0.3, 0.1, 0.7, 0.2, 0.1, 0.1, 0.05, 0.0])
    found = net_benefit(y, probability, np.arange(10), np.array([0.2, 0.5]))
    assert found["value"].tolist() == pytest.approx([0.3 - 0.2 * 0.25, 0.2 - 0.1])
    assert found["treat_all"].tolist() == pytest.approx([0.4 - 0.6 * 0.25, 0.4 - 0.6])
    assert found["low"].isna().all()  # of four abnormal patients


def test_net_benefit_is_that_of_dcurves():
    generator = np.random.default_rng(2)
    y, z, patients = clustered(generator, 150, 0.3, 1.5)
    probability = expit(1.5 * z - 2)
    found = net_benefit(y, probability, patients)
    frame = pd.DataFrame({"y": y, "model": probability})
    told = dcurves.dca(data=frame, outcome="y", modelnames=["model"], thresholds=THRESHOLDS)
    for name, column in (("model", "value"), ("all", "treat_all")):
        own = told[told["model"] == name].sort_values("threshold")
        assert own["threshold"].to_numpy() == pytest.approx(found["threshold"].to_numpy())
        assert own["net_benefit"].to_numpy() == pytest.approx(found[column].to_numpy(), abs=1e-12)


def test_its_band_is_that_of_a_mean_where_rows_are_patients():
    """Against statsmodels: with one row each, the variance is the cluster sandwich of a mean."""
    y, z, _ = clustered(np.random.default_rng(3), 200, 0.5, 1.0)
    probability, patients = expit(z - 0.5), np.arange(len(y))
    found = net_benefit(y, probability, patients, np.array([0.3])).iloc[0]
    gained = (probability >= 0.3) * np.where(y == 1, 1, -0.3 / 0.7)
    own = sm.OLS(gained, np.ones(len(y))).fit(cov_type="HC1")
    assert found["value"] == pytest.approx(own.params[0])
    assert found["high"] - found["low"] == pytest.approx(2 * 1.97 * own.bse[0], rel=0.03)


def test_twins_widen_its_band():
    y, z, patients = clustered(np.random.default_rng(4), 60, 0.4, 1.0)
    once = net_benefit(y, expit(z), patients, CUTS)
    thrice = net_benefit(*(np.tile(own, 3) for own in (y, expit(z), patients)), CUTS)
    free = net_benefit(*(np.tile(own, 3) for own in (y, expit(z))), np.arange(3 * len(y)), CUTS)
    pd.testing.assert_frame_equal(once, thrice)
    assert (free["high"] - free["low"] < thrice["high"] - thrice["low"]).all()


def test_a_band_covers():
    generator = np.random.default_rng(6)
    prevalence, distance, n = 0.25, 1.5, 200

    def draw(n_patients):
        y, z, patients = clustered(generator, n_patients, prevalence, distance)
        return y, expit(logit(prevalence) + distance * z - distance**2 / 2), patients

    truth = net_benefit(*draw(100_000), CUTS)["value"]
    covered = np.zeros(len(CUTS))
    for _ in range(n):
        found = net_benefit(*draw(80), CUTS)
        covered += ((found["low"] <= truth) & (truth <= found["high"])).to_numpy()
    assert (covered / n >= 0.92).all(), covered


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4)), min_size=1, max_size=30))
def test_no_band_has_zero_width_and_none_beats_the_share_abnormal(pairs):
    y, level = (np.array(column) for column in zip(*pairs, strict=True))
    found = net_benefit(y, level / 4, np.arange(len(y)) // 2)
    shown = found.dropna(subset="low")
    assert (shown["low"] < shown["high"]).all()
    assert (found["value"] <= y.mean() + 1e-12).all()


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.1, math.nan])
def test_a_threshold_without_a_price_is_refused(threshold):
    with pytest.raises(TrainingDataError, match="above 0 and below 1"):
        net_benefit(np.array([0, 1]), np.array([0.1, 0.9]), np.arange(2), np.array([threshold]))


def test_no_row_has_no_net_benefit():
    found = net_benefit(np.array([], int), np.array([]), np.array([], int), CUTS)
    assert found[["value", "low", "high", "treat_all"]].isna().all(axis=None)


# calibration curves


def test_a_calibration_curve_is_statsmodels_with_clusters():
    y, z, patients = clustered(np.random.default_rng(7), 150, 0.4, 1.2)
    probability = expit(1.5 * z - 1)
    found = calibration_curve(y, probability, patients)
    design = sm.add_constant(logit(probability))
    fit = sm.GLM(y, design, family=sm.families.Binomial()).fit(
        cov_type="cluster", cov_kwds={"groups": patients}
    )
    assert found["probability"].iloc[[0, -1]].tolist() == [probability.min(), probability.max()]
    points = np.column_stack([np.ones(len(found)), logit(found["probability"])])
    assert found["share"].to_numpy() == pytest.approx(expit(points @ fit.params), abs=1e-6)
    error = np.sqrt(np.einsum("ij,jk,ik->i", points, fit.cov_params(), points))
    width = logit(found["high"]) - logit(found["low"])
    # Student's t in place of the normal, and patients of either class counted apart
    assert (width / (2 * 1.96 * error)).between(0.98, 1.12).all()


def test_no_line_has_no_curve_and_few_patients_no_band():
    y = np.array([0, 0, 1, 1])
    assert calibration_curve(y, np.array([0.1, 0.2, 0.8, 0.9]), np.arange(4)).empty
    assert calibration_curve(np.zeros(4, int), np.full(4, 0.3), np.arange(4)).empty
    found = calibration_curve(np.array([0, 1, 0, 1]), np.array([0.1, 0.2, 0.8, 0.9]), np.arange(4))
    assert found["share"].notna().all()
    assert found[["low", "high"]].isna().all(axis=None)


# real radiographs


@pytest.fixture(scope="module")
def chest(shared_data, tmp_path_factory):
    """A sweep of a logistic head on real chest films, and its comparison."""
    home = shared_data / "nih"
    if not (home / "cache").is_dir():
        pytest.skip("shared/data/nih is not beside this checkout")
    out = tmp_path_factory.mktemp("nih") / "run"
    sweep(
        home / "cache",
        home / "manifest.csv",
        out,
        heads=["logistic"],
        n_configs=1,
        n_folds=3,
        jobs=1,
        operating_points=["specificity=0.8"],
    )
    return out, compare([out], operating_points=["specificity=0.8"], prevalence=0.05)


def test_real_radiographs_agree_with_scikit_learn_and_dcurves(chest):
    """Thresholds, matrices, predictive values and net benefit, from `predictions.parquet` alone."""
    out, result = chest
    row = result["rows"][0]
    own = open_run(out).predictions().query("head == 'logistic'")
    train, test = (by_study(own[own["split"] == split]) for split in ("train", "test"))
    fit = sm.GLM(  # Platt's targets are soft, as a binomial's may be
        _soften(train["label"].to_numpy(int)),
        sm.add_constant(logit(train["probability"].to_numpy())),
        family=sm.families.Binomial(),
    ).fit(tol=1e-12)
    fitted, scored = (
        expit(fit.params[0] + fit.params[1] * logit(part["probability"].to_numpy()))
        for part in (train, test)
    )
    y, labels = train["label"].to_numpy(int), test["label"].to_numpy(int)
    false, true, cuts = roc_curve(y, fitted, drop_intermediate=False)
    expected = {
        "youden": cuts[np.argmax(true - false)],
        "sensitivity=0.95": cuts[np.argmax(true >= 0.95)],
        "specificity=0.9": cuts[np.flatnonzero(1 - false >= 0.9)[-1]],
        "specificity=0.8": cuts[np.flatnonzero(1 - false >= 0.8)[-1]],
        "threshold=0.5": 0.5,
    }
    assert {point["name"] for point in row["operating_points"]} == set(expected)
    for point in row["operating_points"]:
        name, threshold = point["name"], point["threshold"]
        assert ((fitted >= threshold) == (fitted >= expected[name] - 1e-6)).all(), name
        called = scored >= threshold
        tn, fp, fn, tp = confusion_matrix(labels, called).ravel().tolist()
        assert point["confusion"] == {"tn": tn, "fp": fp, "fn": fn, "tp": tp}
        scores = point["scores"]
        se, sp = recall_score(labels, called), recall_score(1 - labels, ~called)
        assert scores["sensitivity"]["value"] == pytest.approx(se)
        assert scores["specificity"]["value"] == pytest.approx(sp)
        assert scores["ppv"]["value"] == pytest.approx(precision_score(labels, called))
        assert scores["npv"]["value"] == pytest.approx(precision_score(1 - labels, ~called))
        at = point["at_prevalence"]
        assert at["ppv"]["value"] == pytest.approx(se * 0.05 / (se * 0.05 + (1 - sp) * 0.95))
    frame = pd.DataFrame({"y": labels, "model": scored})
    told = dcurves.dca(data=frame, outcome="y", modelnames=["model"], thresholds=THRESHOLDS)
    told = told[told["model"] == "model"].sort_values("threshold")["net_benefit"].to_numpy()
    assert row["net_benefit"]["value"] == pytest.approx(told, abs=1e-9)


def test_its_model_packages_what_was_fitted(chest):
    out, result = chest
    card = json.loads((out / "models" / "logistic" / "model.json").read_text())["card"]
    told = {own["name"]: own["threshold"] for own in result["rows"][0]["operating_points"]}
    names = ["youden", "sensitivity=0.95", "specificity=0.9", "specificity=0.8"]
    assert [point["name"] for point in card["operating_points"]] == names
    for point in card["operating_points"]:
        assert point["threshold"] == pytest.approx(told[point["name"]], abs=1e-12)
    assert "--operating-point specificity=0.8" in open_run(out).info.command
    assert "| specificity=0.8 |" in (out / "models" / "logistic" / "README.md").read_text()


def _soften(y):
    """Return Platt's targets: each class drawn towards the other by one row."""
    n_abnormal, n_normal = y.sum(), (1 - y).sum()
    return np.where(y == 1, (n_abnormal + 1) / (n_abnormal + 2), 1 / (n_normal + 2))
