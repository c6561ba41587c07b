"""Prediction sets: their coverage, MAPIE as an oracle, and what their document must be."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapie.classification import SplitConformalClassifier
from scipy.special import expit
from scipy.stats import norm
from sklearn.base import BaseEstimator, ClassifierMixin

from medembed.core.errors import ModelError, TrainingDataError
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


def test_a_region_needs_patients_and_not_studies():
    """A hundred studies of 40 patients are no hundred patients."""
    patients = np.tile(np.arange(40), 5)
    y = np.arange(200) % 2
    patients = patients * 2 + y  # each patient's studies have one label
    scores, region = np.random.default_rng(0).random(200), np.full(200, "hip")
    region[:20], few = "knee", {"min_group": 60}
    by_study = fit_conformal(scores, y, region, **few)
    by_patient = fit_conformal(scores, y, region, patients=patients, **few)
    assert not by_study.is_marginal(["hip"])[0]
    assert by_patient.is_marginal(["hip", "knee", "", "foot"]).all()
    assert by_patient.count("hip") == tuple(
        len(set(patients[(region == "hip") & (y == k)])) for k in (0, 1)
    )
    new, names = np.linspace(0, 1, 50), np.full(50, "hip")
    pooled = by_study.p_values(new, np.full(50, ""))
    np.testing.assert_array_equal(by_patient.p_values(new, names), pooled)
    assert not np.array_equal(by_study.p_values(new, names), pooled)
    again = Conformal.from_dict(json.loads(json.dumps(by_patient.as_dict())))
    assert again.is_marginal(["hip"])[0]
    assert again.as_dict() == by_patient.as_dict()
    assert Conformal.from_dict(by_study.as_dict()).patients is None  # as models of before
    for n_normal in (500, 0, True, "1", None):
        wrong = {"hip": {"normal": n_normal, "abnormal": 1}, "knee": {"normal": 1, "abnormal": 1}}
        with pytest.raises(ModelError, match="patients"):
            Conformal.from_dict({**by_patient.as_dict(), "patients": wrong})
    for wrong in ({}, [], {"hip": []}):
        with pytest.raises(ModelError, match="patients"):
            Conformal.from_dict({**by_patient.as_dict(), "patients": wrong})
    with pytest.raises(TrainingDataError, match="200 labels, but 3 patients"):
        fit_conformal(scores, y, region, patients=[1, 2, 3])


def test_a_hard_region_of_few_patients_gets_less_and_says_so():
    """Below the patients it needs the promise is of all regions: simulated, the hard one misses."""
    covered, generator = {"easy": [], "hard": []}, np.random.default_rng(7)

    def draw(n_easy, n_hard):
        region = np.repeat(["easy", "hard"], [n_easy, n_hard])
        y = generator.integers(0, 2, len(region))
        signal = np.where(region == "easy", 3.0, 0.0)
        return expit(signal * (y - 0.5) + generator.normal(size=len(y))), y, region

    for _ in range(30):
        conformal = fit_conformal(*draw(400, 42), patients=np.arange(442))
        scores, y, region = draw(500, 500)
        sets = conformal.sets(scores, region)[np.arange(1000), y]
        for name, own in covered.items():
            own.append(sets[region == name].mean())
        assert conformal.is_marginal(["easy", "hard"]).tolist() == [False, True]
    assert np.mean(covered["easy"]) == pytest.approx(0.9, abs=0.02)
    assert np.mean(covered["hard"]) < 0.82


@pytest.mark.parametrize(
    ("auroc", "n_patients", "warned"),
    [(0.5, 400, True), (0.65, 200, True), (0.65, 2000, False), (0.9, 100, False), (0.9, 98, True)],
)
def test_a_weak_signal_and_few_patients_are_warned_of(auroc, n_patients, warned):
    generator = np.random.default_rng(3)
    y = np.arange(n_patients) % 2
    normal = norm.ppf((np.arange(n_patients // 2) + 0.5) / (n_patients // 2))
    logits = np.empty(n_patients)
    logits[y == 0] = normal
    logits[y == 1] = normal[: (y == 1).sum()] + np.sqrt(2) * norm.ppf(auroc)
    order = generator.permutation(n_patients)
    conformal = fit_conformal(expit(logits)[order], y[order], np.full(n_patients, "hip"))
    assert (conformal.warning() is not None) == warned
    # studies that are copies of each other are no more patients
    five = [np.tile(own, 5) for own in (expit(logits), y, np.full(n_patients, "hip"))]
    again = fit_conformal(*five, patients=np.tile(np.arange(n_patients), 5))
    assert (again.warning() is not None) == warned


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
    with pytest.raises(ModelError, match="must be a table"):
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
