"""Prediction sets: their coverage, MAPIE as an oracle, and what their document must be."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapie.classification import SplitConformalClassifier
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin

from medembed.errors import ModelError, TrainingDataError
from medembed.evaluation.conformal import MIN_GROUP, Conformal, fit_conformal
from medembed.heads.linear import LogisticHead

HARDNESS = {"wrist": 0.5, "hand": 1.0, "elbow": 2.0, "toe": 1.0}


def draw_patients(n, generator):
    """Draw studies of n patients, one to three each, regions of unequal difficulty, few toes."""
    n_studies = generator.integers(1, 4, n)
    patient = np.repeat(np.arange(n), n_studies)
    names = np.array(list(HARDNESS))
    region = names[generator.choice(4, len(patient), p=[0.4, 0.35, 0.245, 0.005])]
    trait = generator.normal(size=n)[patient]
    y = (trait + generator.normal(size=len(patient)) > 0.4).astype(int)
    noise = np.vectorize(HARDNESS.get)(region)
    X = generator.normal(size=(len(patient), 6)) * noise[:, None]
    X[:, 0] += y + 0.3 * trait
    return X.astype(np.float32), y, patient, region


def cross_fit(X, y, patient):
    folds, scores = patient % 5, np.empty(len(y))
    for fold in range(5):
        head = LogisticHead().fit(X[folds != fold], y[folds != fold])
        scores[folds == fold] = head.predict_proba(X[folds == fold])[:, 1]
    return scores


@pytest.fixture(scope="module")
def simulated():
    """Conformal scores of 5,000 simulated patients, and 5,000 others that they are tried on."""
    X, y, patient, region = draw_patients(5_000, np.random.default_rng(1))
    conformal = fit_conformal(cross_fit(X, y, patient), y, region)
    head = LogisticHead().fit(X, y)
    X, y, _, region = draw_patients(5_000, np.random.default_rng(2))
    return conformal, head.predict_proba(X)[:, 1], y, region


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2])
def test_coverage_is_within_two_points_of_nominal_in_each_class(simulated, alpha):
    conformal, scores, y, region = simulated
    sets = conformal.sets(scores, region, alpha)
    for label in (0, 1):
        covered = sets[y == label, label].mean()
        assert covered == pytest.approx(1 - alpha, abs=0.02)


def test_coverage_holds_in_every_region_with_scores_enough(simulated):
    conformal, scores, y, region = simulated
    sets = conformal.sets(scores, region, 0.1)
    for name in ("wrist", "hand", "elbow"):
        for label in (0, 1):
            own = (region == name) & (y == label)
            # three standard errors of these studies and of the kept scores
            assert sets[own, label].mean() == pytest.approx(0.9, abs=0.04), (name, label)
    # a threshold for all regions together would not do that
    alone = Conformal({"": tuple(conformal._pooled(c) for c in (0, 1))})
    sets = alone.sets(scores, np.full(len(y), ""), 0.1)
    own = (region == "elbow") & (y == 1)
    assert sets[own, 1].mean() < 0.86


def test_a_small_or_unknown_region_is_held_against_all_together(simulated):
    conformal, scores = simulated[:2]
    assert 0 < len(conformal.scores["toe"][1]) < MIN_GROUP
    few = scores[:50]
    pooled = conformal.p_values(few, np.full(50, ""))
    np.testing.assert_array_equal(conformal.p_values(few, np.full(50, "toe")), pooled)
    np.testing.assert_array_equal(conformal.p_values(few, np.full(50, "ankle")), pooled)
    assert not np.array_equal(conformal.p_values(few, np.full(50, "elbow")), pooled)


class Given(ClassifierMixin, BaseEstimator):
    """Give the probabilities that stand in the first column."""

    classes_ = np.array([0, 1])

    def fit(self, X, y):
        return self

    def predict_proba(self, X):
        return np.c_[1 - X[:, 0], X[:, 0]]


@pytest.mark.filterwarnings("ignore:.*conformalization dataset has less labels")
@pytest.mark.parametrize("label", [0, 1])
def test_membership_of_a_class_is_mapies_on_the_rows_of_that_class(label):
    generator = np.random.default_rng(3)
    # five decimals, as they are kept
    scores = np.round(expit(generator.normal(size=400)), 5)
    y = (generator.random(400) < scores).astype(int)
    conformal = fit_conformal(scores, y, np.full(400, "hand"))
    new = np.round(expit(generator.normal(size=300)), 5) + 1e-6  # no ties
    own = scores[y == label][:, None]
    mapie = SplitConformalClassifier(Given(), confidence_level=0.9, prefit=True)
    mapie.conformalize(own, np.full(len(own), label))
    _, sets = mapie.predict_set(new[:, None])
    ours = conformal.sets(new, np.full(300, "hand"), 0.1)
    np.testing.assert_array_equal(ours[:, label], sets[:, label, 0])


probabilities = st.lists(st.floats(0, 1), min_size=2, max_size=40)


@settings(max_examples=60, deadline=None)
@given(probabilities, probabilities, st.integers(1, 5), probabilities)
def test_p_values_lie_in_the_unit_interval_and_follow_the_score(normal, abnormal, least, new):
    y = np.r_[np.zeros(len(normal)), np.ones(len(abnormal))]
    region = np.array(["a", "b"])[np.arange(len(y)) % 2]
    conformal = fit_conformal(np.r_[normal, abnormal], y, region, min_group=least)
    new = np.sort(new)
    for name in ("a", "c"):
        p = conformal.p_values(new, np.full(len(new), name))
        assert (p > 0).all()
        assert (p <= 1).all()
        assert (np.diff(p[:, 0]) <= 0).all()
        assert (np.diff(p[:, 1]) >= 0).all()
        again = Conformal.from_dict(json.loads(json.dumps(conformal.as_dict())))
        np.testing.assert_array_equal(again.p_values(new, np.full(len(new), name)), p)


def test_rounding_only_makes_sets_larger():
    scores = np.array([0.123454, 0.123456, 0.5, 0.7])
    conformal = fit_conformal(scores, [0, 1, 0, 1], np.full(4, "x"), min_group=1)
    p = conformal.p_values(scores, np.full(4, "x"))
    assert p[0, 0] == pytest.approx(3 / 3)  # 0.123454 and 0.5 are at least as high
    assert p[1, 1] == pytest.approx(2 / 3)  # 0.123456 itself is at least as low


@settings(max_examples=60, deadline=None)
@given(probabilities, probabilities)
def test_kept_scores_are_conservative(normal, abnormal):
    y = np.r_[np.zeros(len(normal)), np.ones(len(abnormal))]
    scores, region = np.r_[normal, abnormal], np.full(len(y), "x")
    p = fit_conformal(scores, y, region, min_group=1).p_values(scores, region)
    for own, value in zip(p, scores, strict=True):
        # what the scores as they were would give
        assert own[0] >= (1 + sum(s >= value for s in normal)) / (1 + len(normal))
        assert own[1] >= (1 + sum(s <= value for s in abnormal)) / (1 + len(abnormal))


def test_a_score_just_above_a_kept_decimal_is_rounded_away_from_it():
    above = np.nextafter(0.35, 1)
    assert above * 1e5 == 35_000  # so that rounding up alone would keep 0.35
    conformal = fit_conformal([above, 0.9], [0, 1], ["x", "x"], min_group=1)
    assert conformal.scores["x"][0][0] >= above


def test_equal_scores_leave_everything_open():
    conformal = fit_conformal(np.full(40, 0.5), np.arange(40) % 2, np.full(40, "x"))
    assert (conformal.p_values([0.5], ["x"]) == 1).all()
    assert conformal.sets([0.5], ["x"], 0.99).all()
    # one step away, and no score of the class is as strange
    np.testing.assert_allclose(conformal.p_values([0.6], ["x"]), [[1 / 21, 1]])


def test_a_document_of_muras_studies_is_small():
    generator = np.random.default_rng(4)
    y, scores = generator.integers(0, 2, 13_457), generator.random(13_457)
    region = np.array(["a", "b", "c"])[generator.integers(0, 3, len(y))]
    assert len(json.dumps(fit_conformal(scores, y, region).as_dict())) < 200_000


@pytest.mark.parametrize(
    "change",
    [
        {"method": "other"},
        {"min_group": 0},
        {"min_group": True},
        {"scores": {}},
        {"scores": []},
        {"scores": {"a": {"normal": [0.1]}}},
        {"scores": {"a": {"normal": [0.1], "abnormal": []}}},
        {"scores": {"a": {"normal": [0.2, 0.1], "abnormal": [0.5]}}},
        {"scores": {"a": {"normal": [1.5], "abnormal": [0.5]}}},
        {"scores": {"a": {"normal": [float("nan")], "abnormal": [0.5]}}},
        {"scores": {"a": {"normal": ["0.1"], "abnormal": [0.5]}}},
        {"scores": {"a": {"normal": "0.1", "abnormal": [0.5]}}},
        {"scores": {"a": {"normal": [True], "abnormal": [0.5]}}},
        {"scores": {"a": {"normal": [10**400], "abnormal": [0.5]}}},
    ],
)
def test_a_damaged_document_is_refused(change):
    whole = {
        "method": "mondrian",
        "min_group": 1,
        "scores": {"a": {"normal": [0], "abnormal": [1]}},
    }
    Conformal.from_dict(whole)
    with pytest.raises(ModelError):
        Conformal.from_dict({**whole, **change})


def test_what_is_no_table_is_refused():
    with pytest.raises(ModelError, match="not a table"):
        Conformal.from_dict([])


def test_what_has_no_set_is_refused(simulated):
    for values in ([float("nan")], [1.5], [-0.1]):
        with pytest.raises(ModelError, match="no prediction set"):
            simulated[0].p_values(values, ["hand"])
    with pytest.raises(ModelError, match="1 probabilities, but 2 regions"):
        simulated[0].p_values([0.5], ["hand", "hand"])


def test_one_class_or_lengths_that_differ_are_refused():
    with pytest.raises(TrainingDataError, match="needs normal and abnormal"):
        fit_conformal([0.1, 0.2], [0, 0], ["a", "a"])
    with pytest.raises(TrainingDataError, match="2 labels, but 1 regions"):
        fit_conformal([0.1, 0.2], [0, 1], ["a"])


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1.0, float("nan")])
def test_an_alpha_out_of_bounds_is_refused(simulated, alpha):
    with pytest.raises(ModelError, match="alpha"):
        simulated[0].sets([0.5], ["hand"], alpha)
