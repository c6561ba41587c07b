import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from medembed.core.errors import TrainingDataError
from medembed.evaluation.delong import (
    auroc_covariance,
    auroc_difference,
    auroc_differences,
    auroc_interval,
)
from medembed.evaluation.intervals import bootstrap_scores, paired_difference

#: Label, patient, and the levels of two heads: few, so that there are ties.
ROWS = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 5), st.integers(0, 4), st.integers(0, 4)),
    min_size=1,
    max_size=30,
)


def clustered(n, n_patients, seed, n_heads=2, shared=1.0):
    """Labels that a patient's rows share in part, heads of equal AUROC, patients."""
    generator = np.random.default_rng(seed)
    patients = generator.integers(0, n_patients, n)
    y = (generator.uniform(size=n) < generator.beta(1, 1, n_patients)[patients]).astype(int)
    common = 1.2 * y + 0.7 * generator.normal(size=n)
    heads = {}
    for name in "abcdef"[:n_heads]:
        of_patient = shared * generator.normal(size=n_patients)[patients]
        logit = common + of_patient + 0.7 * generator.normal(size=n)
        heads[name] = 1 / (1 + np.exp(-logit))
    return y, heads, patients


def drawn(tuples):
    y, patients, a, b = (np.array(column) for column in zip(*tuples, strict=True))
    return y, {"a": a / 4, "b": b / 4}, patients


def wins(y, probability):
    """psi of every abnormal row against every normal one, (m, n): 1, 1/2 or 0."""
    higher = probability[y == 1][:, None] - probability[y == 0][None, :]
    return np.where(higher > 0, 1.0, np.where(higher == 0, 0.5, 0.0))


def delong_by_pairs(y, heads):
    """DeLong, DeLong and Clarke-Pearson 1988, equations 4 to 6, in O(m n)."""
    psi = np.array([wins(y, probability) for probability in heads.values()])
    of_abnormal, of_normal = np.cov(psi.mean(axis=2)), np.cov(psi.mean(axis=1))
    return psi.mean(axis=(1, 2)), of_abnormal / psi.shape[1] + of_normal / psi.shape[2]


def obuchowski_by_sums(y, heads, patients):
    """Obuchowski 1997, S10, S01 and S11, patient by patient."""
    m, n, names = (y == 1).sum(), (y == 0).sum(), np.unique(patients)
    psi = [wins(y, probability) for probability in heads.values()]
    x, z = np.zeros((2, len(psi), len(names)))
    for r, matrix in enumerate(psi):
        for i, name in enumerate(names):
            of_patient = matrix[patients[y == 1] == name].mean(axis=1) - matrix.mean()
            x[r, i] = of_patient.sum()
            of_patient = matrix[:, patients[y == 0] == name].mean(axis=0) - matrix.mean()
            z[r, i] = of_patient.sum()
    i10, i01, i = (len(np.unique(p)) for p in (patients[y == 1], patients[y == 0], patients))
    covariance = np.empty((len(psi), len(psi)))
    for r in range(len(psi)):
        for s in range(len(psi)):
            s10 = i10 / ((i10 - 1) * m) * sum(x[r] * x[s])
            s01 = i01 / ((i01 - 1) * n) * sum(z[r] * z[s])
            s11 = i / (i - 1) * (sum(x[r] * z[s]) + sum(x[s] * z[r]))
            covariance[r, s] = s10 / m + s01 / n + s11 / (m * n)
    return covariance


def is_estimable(y, patients):
    return all(len(np.unique(patients[y == label])) > 1 for label in (0, 1))


def test_the_ct_ratings_of_hanley_and_mcneil_have_the_published_standard_error():
    # Radiology 143, 1982, table I; standard error by DeLong and interval: Stata, [R] roctab
    normal, abnormal = [33, 6, 6, 11, 2], [3, 2, 2, 11, 33]
    y = np.repeat([0, 1], [58, 51])
    rating = np.r_[np.repeat(np.arange(1, 6), normal), np.repeat(np.arange(1, 6), abnormal)]
    auroc, covariance = auroc_covariance(y, {"ct": rating / 5}, np.arange(109))
    assert auroc[0] == pytest.approx(0.8932, abs=5e-5)
    assert math.sqrt(covariance[0, 0]) == pytest.approx(0.0307, abs=5e-5)
    found = auroc_interval(y, rating / 5, np.arange(109))
    assert (found.low, found.high) == pytest.approx((0.83295, 0.95339), abs=5e-6)


def test_four_rows_as_computed_by_hand():
    # placements of .4 and .8: 1/2 and 1; of .1 and .6: 1 and 1/2. S10 = S01 = 1/8
    y, probability = np.array([1, 1, 0, 0]), np.array([0.4, 0.8, 0.1, 0.6])
    auroc, covariance = auroc_covariance(y, {"": probability}, np.arange(4))
    assert (auroc[0], covariance[0, 0]) == (0.75, 0.125)
    # of patients (.4, .1) and (.8, .6): a = (-1/8, 1/8) and b = (1/8, -1/8), which cancel
    _, covariance = auroc_covariance(y, {"": probability}, np.array([0, 1, 0, 1]))
    assert covariance[0, 0] == pytest.approx(0, abs=1e-15)
    # of patients (.4, .6) and (.8, .1): a = b = (-1/8, 1/8), 2 (1/32 + 1/32 + 2/32)
    _, covariance = auroc_covariance(y, {"": probability}, np.array([0, 1, 1, 0]))
    assert covariance[0, 0] == pytest.approx(0.25)


@settings(deadline=None, max_examples=100)
@given(ROWS)
def test_with_one_row_per_patient_it_is_delongs_sum_over_pairs(tuples):
    y, heads, _ = drawn(tuples)
    if min((y == 1).sum(), (y == 0).sum()) < 2:
        return
    auroc, covariance = auroc_covariance(y, heads, np.arange(len(y)))
    expected, of_pairs = delong_by_pairs(y, heads)
    np.testing.assert_allclose(auroc, expected, atol=1e-12)
    np.testing.assert_allclose(auroc, [roc_auc_score(y, p) for p in heads.values()], atol=1e-12)
    np.testing.assert_allclose(covariance, of_pairs, atol=1e-12)


@settings(deadline=None, max_examples=100)
@given(ROWS)
def test_with_patients_it_is_obuchowskis_sum_over_patients(tuples):
    y, heads, patients = drawn(tuples)
    if not is_estimable(y, patients):
        return
    _, covariance = auroc_covariance(y, heads, patients)
    np.testing.assert_allclose(covariance, obuchowski_by_sums(y, heads, patients), atol=1e-12)
    assert (np.linalg.eigvalsh(covariance) > -1e-12).all()


@settings(deadline=None, max_examples=50)
@given(ROWS, st.randoms())
def test_neither_the_order_of_rows_nor_a_rising_map_changes_a_number(tuples, random):
    y, heads, patients = drawn(tuples)
    auroc, covariance = auroc_covariance(y, heads, patients)
    order = random.sample(range(len(y)), len(y))
    mapped = {name: probability[order] ** 2 / 2 for name, probability in heads.items()}
    found = auroc_covariance(y[order], mapped, patients[order])
    np.testing.assert_allclose(found[0], auroc, atol=1e-12)
    np.testing.assert_allclose(found[1], covariance, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(ROWS)
def test_turning_a_pair_round_turns_its_sign_and_turning_labels_too(tuples):
    y, heads, patients = drawn(tuples)
    found = auroc_difference(y, heads["a"], heads["b"], patients)
    for turned in (
        auroc_difference(y, heads["b"], heads["a"], patients),
        auroc_difference(1 - y, heads["a"], heads["b"], patients),
    ):
        expected = (-found.difference, -found.high, -found.low, found.p)
        own = (turned.difference, turned.low, turned.high, turned.p)
        assert own == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_the_variance_is_near_the_jackknifes_over_patients():
    y, heads, patients = clustered(400, 120, seed=0)
    names = np.unique(patients)
    left_out = np.array(
        [
            [roc_auc_score(y[patients != name], p[patients != name]) for p in heads.values()]
            for name in names
        ]
    )
    jackknife = np.cov(left_out.T) * (len(names) - 1) ** 2 / len(names)
    _, covariance = auroc_covariance(y, heads, patients)
    np.testing.assert_allclose(covariance, jackknife, atol=0.05 * jackknife[0, 0])


def test_the_variance_is_that_of_new_patients_and_rows_taken_as_independent_miss_it():
    runs = [clustered(200, 40, seed=seed) for seed in range(400)]
    found = [auroc_covariance(*run) for run in runs]
    true = np.cov(np.array([auroc for auroc, _ in found]).T)
    np.testing.assert_allclose(np.mean([c for _, c in found], axis=0), true, rtol=0.2)
    by_row = [auroc_covariance(y, heads, np.arange(200))[1] for y, heads, _ in runs]
    assert np.mean(by_row, axis=0)[0, 0] < 0.8 * true[0, 0]


def test_95_intervals_in_100_hold_the_truth():
    y, heads, _ = clustered(400_000, 80_000, seed=99, n_heads=1)
    truth = roc_auc_score(y, heads["a"])
    n_runs, covered = 500, 0
    for seed in range(n_runs):
        y, heads, patients = clustered(300, 60, seed=seed, n_heads=1)
        found = auroc_interval(y, heads["a"], patients)
        covered += found.low <= truth <= found.high
    # three standard errors of a share of .95 over 500 runs are .029
    assert 0.92 <= covered / n_runs <= 0.98


def test_equal_heads_are_called_different_about_5_times_in_100():
    n_runs, n_called, n_called_by_row = 500, 0, 0
    for seed in range(n_runs):
        y, heads, patients = clustered(300, 60, seed=seed)
        n_called += auroc_difference(y, heads["a"], heads["b"], patients).p < 0.05
        n_called_by_row += auroc_difference(y, heads["a"], heads["b"], np.arange(300)).p < 0.05
    # three standard errors of .05 over 500 runs are .029
    assert 0.02 <= n_called / n_runs <= 0.08
    assert n_called_by_row / n_runs > 0.08


def test_it_agrees_with_the_bootstrap_over_patients():
    y, heads, patients = clustered(600, 250, seed=1)
    interval = auroc_interval(y, heads["a"], patients)
    resampled = bootstrap_scores(y, heads["a"], patients, 0.5)["auroc"]
    assert (interval.low, interval.high) == pytest.approx((resampled.low, resampled.high), abs=5e-3)
    difference = auroc_difference(y, heads["a"], heads["b"], patients)
    resampled = paired_difference(y, heads["a"], heads["b"], patients)
    assert difference.difference == pytest.approx(resampled.difference)
    assert (difference.low, difference.high) == pytest.approx(
        (resampled.low, resampled.high), abs=5e-3
    )
    assert difference.p == pytest.approx(resampled.p, abs=0.05)


def test_every_pair_of_heads_follows_from_the_covariance():
    y, heads, patients = clustered(300, 100, seed=2, n_heads=3)
    auroc, covariance = auroc_covariance(y, heads, patients)
    found = auroc_differences(y, heads, patients)
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "c")]
    error = math.sqrt(covariance[0, 0] + covariance[2, 2] - 2 * covariance[0, 2])
    value = auroc[0] - auroc[2]
    assert found["a", "c"].difference == pytest.approx(value)
    assert found["a", "c"].high - value == pytest.approx(1.959964 * error, rel=1e-6)
    assert found["a", "c"].p == pytest.approx(math.erfc(abs(value) / error / math.sqrt(2)))
    assert found["a", "c"] == auroc_difference(y, heads["a"], heads["c"], patients)


def test_heads_that_order_the_rows_alike_differ_by_nothing():
    y, heads, patients = clustered(60, 25, seed=1)
    found = auroc_difference(y, heads["a"], heads["a"] ** 3, patients)
    nothing = dict.fromkeys(("low", "high", "method"))
    assert found.as_dict() == {"difference": 0.0, "p": 1.0, **nothing}


def test_a_difference_without_variance_has_no_p():
    y = np.array([0, 0, 1, 1])
    found = auroc_difference(y, y / 1, np.full(4, 0.5), np.arange(4))
    nothing = dict.fromkeys(("low", "high", "p", "method"))
    assert found.as_dict() == {"difference": 0.5, **nothing}


def test_ends_are_cut_to_what_an_auroc_can_be():
    y, probability = np.array([1, 1, 0, 0]), np.array([0.4, 0.8, 0.1, 0.6])
    found = auroc_interval(y, probability, np.arange(4))
    assert (found.value, found.high) == (0.75, 1.0)
    assert found.low == pytest.approx(0.75 - 1.959964 * math.sqrt(0.125), abs=1e-6)
    turned = auroc_difference(y, probability, 1 - probability, np.arange(4))
    assert (turned.difference, turned.high) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("y", "patients", "auroc"),
    [
        ([1, 1, 1], [0, 1, 2], math.nan),
        ([0, 0], [0, 1], math.nan),
        ([], [], math.nan),
        ([0, 1, 1], [0, 0, 0], 1.0),
        ([0, 1, 1], [0, 1, 2], 1.0),
        ([0, 0, 1, 1], [0, 1, 2, 2], 1.0),
    ],
)
def test_one_class_has_no_auroc_and_one_patient_of_a_class_no_interval(y, patients, auroc):
    y, patients = np.array(y, dtype=int), np.array(patients, dtype=int)
    probability = np.linspace(0, 1, len(y))
    found = auroc_interval(y, probability, patients)
    assert found.value == pytest.approx(auroc, nan_ok=True)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    difference = auroc_difference(y, probability, probability, patients)
    assert difference.difference == pytest.approx(auroc - auroc, nan_ok=True)
    assert math.isnan(difference.p)


def test_100000_rows_need_no_matrix_of_pairs():
    y, heads, patients = clustered(100_000, 30_000, seed=0, n_heads=1)
    auroc, covariance = auroc_covariance(y, heads, patients)
    assert auroc[0] == pytest.approx(roc_auc_score(y, heads["a"]), abs=1e-12)
    assert 0 < covariance[0, 0] < 1e-4


def test_what_cannot_be_scored_is_refused():
    y = np.array([0, 1])
    with pytest.raises(TrainingDataError, match="it cannot be scored"):
        auroc_covariance(y, {"a": np.array([0.1, np.nan])}, np.arange(2))
    with pytest.raises(TrainingDataError, match="rows have no patient"):
        auroc_covariance(y, {"a": np.array([0.1, 0.2])}, np.array(["p", None]))
    with pytest.raises(TrainingDataError, match="2 labels, but 3 patients"):
        auroc_covariance(y, {"a": np.array([0.1, 0.2])}, np.arange(3))
