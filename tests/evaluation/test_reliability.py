import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from statsmodels.stats.proportion import proportion_confint

from medembed.core.errors import TrainingDataError
from medembed.evaluation.calibration import reliability
from medembed.evaluation.scores import N_ECE_BINS, score

COLUMNS = ["low", "high", "n", "k", "mean_probability"]
COLUMNS += ["share_abnormal", "share_low", "share_high", "method"]


def rows(n=600, n_patients=200, seed=0):
    """Calibrated probabilities of studies, some of one patient."""
    generator = np.random.default_rng(seed)
    probability = generator.beta(0.7, 0.7, n)
    y = (generator.uniform(size=n) < probability).astype(int)
    return y, probability, generator.integers(0, n_patients, n)


def test_the_bins_are_those_of_scikit_learns_calibration_curve():
    y, probability, patients = rows()
    table = reliability(y, probability, patients)
    share, mean = calibration_curve(y, probability, n_bins=N_ECE_BINS)
    assert list(table) == COLUMNS
    np.testing.assert_allclose(table["share_abnormal"], share)
    np.testing.assert_allclose(table["mean_probability"], mean)
    np.testing.assert_allclose(table["low"], np.arange(10) / 10)
    np.testing.assert_allclose(table["high"], np.arange(1, 11) / 10)
    counts, _ = np.histogram(probability, np.arange(11) / 10)
    assert table["n"].tolist() == counts.tolist()


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.sampled_from([0, 0.1, 0.3, 0.6, 0.7, 0.95, 1])), min_size=1
    )
)
def test_the_bins_add_up_to_the_expected_calibration_error(pairs):
    y, probability = (np.array(column) for column in zip(*pairs, strict=True))
    table = reliability(y, probability, np.arange(len(y)))
    gap = (table["share_abnormal"] - table["mean_probability"]).abs()
    assert table["n"].sum() == len(y)
    assert (gap * table["n"]).sum() / len(y) == pytest.approx(score(y, probability, 0.5)["ece"])


def test_the_interval_is_statsmodels_where_each_row_is_a_patients():
    y, probability, _ = rows(600)
    table = reliability(y, probability, np.arange(600))
    for own in table.itertuples():
        method = {"wilson": "wilson", "clopper-pearson": "beta"}[own.method]
        ends = proportion_confint(own.k, own.n, method=method)
        assert [own.share_low, own.share_high] == pytest.approx(list(ends), abs=0.01)


def test_the_intervals_of_a_calibrated_head_hold_the_truth():
    found = pd.concat(reliability(*rows(seed=seed)) for seed in range(30))
    # given the bin, the expected share is the mean probability, near enough
    covered = found["mean_probability"].between(found["share_low"], found["share_high"])
    assert 0.9 <= covered.mean() <= 0.98


def test_copies_of_a_patients_rows_do_not_narrow_the_interval():
    y, probability, _ = rows(200)
    single = reliability(y, probability, np.arange(200))
    ninefold = [np.repeat(part, 9) for part in (y, probability, np.arange(200))]
    pd.testing.assert_frame_equal(
        reliability(*ninefold).drop(columns=["n", "k"]), single.drop(columns=["n", "k"])
    )


def test_the_order_of_rows_does_not_change_a_number():
    y, probability, patients = rows()
    forwards = reliability(y, probability, patients)
    backwards = reliability(y[::-1], probability[::-1], patients[::-1])
    pd.testing.assert_frame_equal(forwards, backwards)


def test_an_empty_bin_has_ends_and_no_numbers():
    y = np.tile([0, 1], 20)
    table = reliability(y, np.where(y == 1, 0.95, 0.05), np.arange(40))
    assert table["n"].tolist() == [20, *[0] * 8, 20]
    assert table.loc[1:8, COLUMNS[4:]].isna().all(axis=None)
    assert table.loc[[0, 9], "share_abnormal"].tolist() == [0, 1]
    # 20 of 20: Clopper and Pearson's lower end is the root of p ** 20 = .025
    assert table.loc[9, ["share_low", "share_high"]].tolist() == pytest.approx([0.025**0.05, 1])


def test_no_rows_and_one_patient_have_no_interval():
    nothing = reliability(np.array([], int), np.array([]), np.array([], int))
    assert nothing["n"].tolist() == [0] * 10
    alone = reliability(np.array([0, 1]), np.array([0.5, 0.5]), np.array(["p", "p"]))
    assert alone.loc[5, "share_abnormal"] == 0.5
    assert alone[["share_low", "share_high"]].isna().all(axis=None)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(TrainingDataError, match="it cannot be scored"):
        reliability(np.array([0, 1]), np.array([0.1, np.nan]), np.arange(2))
