import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_curve

from medembed.core.errors import TrainingDataError
from medembed.evaluation.scores import score
from medembed.evaluation.thresholds import sensitivity_threshold, youden_threshold

ROWS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6)), min_size=2, max_size=40)


def two_classes(pairs):
    """Labels and probabilities of what hypothesis drew, with a row of each class added."""
    y, level = (np.array(column) for column in zip(*pairs, (0, 2), (1, 3), strict=True))
    return y, level / 6


@settings(deadline=None, max_examples=100)
@given(ROWS)
def test_the_youden_index_is_the_best_on_scikit_learns_curve(pairs):
    y, probability = two_classes(pairs)
    threshold = youden_threshold(y, probability)
    false, true, _ = roc_curve(y, probability)
    found = score(y, probability, threshold)
    assert found["sensitivity"] + found["specificity"] - 1 == pytest.approx(max(true - false))


@settings(deadline=None, max_examples=100)
@given(ROWS, st.sampled_from([0.01, 0.25, 1 / 3, 0.5, 0.7, 0.9, 1.0]))
def test_no_higher_cut_on_scikit_learns_curve_is_as_sensitive(pairs, target):
    y, probability = two_classes(pairs)
    threshold = sensitivity_threshold(y, probability, target)
    assert score(y, probability, threshold)["sensitivity"] >= target
    # from the highest threshold downwards; the first, infinite, calls nothing abnormal
    _, true, cuts = roc_curve(y, probability, drop_intermediate=False)
    highest = cuts[np.argmax(true >= target)]
    below = probability[probability < highest]
    assert threshold == pytest.approx((below.max() + highest) / 2 if len(below) else highest)


@settings(deadline=None, max_examples=50)
@given(ROWS, st.randoms())
def test_the_order_of_rows_does_not_move_a_threshold(pairs, random):
    y, probability = two_classes(pairs)
    order = random.sample(range(len(y)), len(y))
    for choose in (youden_threshold, sensitivity_threshold):
        assert choose(y[order], probability[order]) == choose(y, probability)


def test_a_sensitivity_of_nine_in_ten_is_reached_by_nine_of_ten():
    y = np.r_[0, np.ones(10, int)]
    probability = np.r_[0.12, np.arange(1, 11) / 11]
    threshold = sensitivity_threshold(y, probability, 0.9)
    assert threshold == pytest.approx((0.12 + 2 / 11) / 2)
    assert score(y, probability, threshold)["sensitivity"] == 0.9


@pytest.mark.parametrize("n", [7, 10, 100])
def test_a_share_that_k_rows_of_n_have_takes_k_of_them(n):
    y, probability = np.r_[0, np.ones(n, int)], np.r_[0, np.arange(1, n + 1) / n]
    for k in range(1, n + 1):
        threshold = sensitivity_threshold(y, probability, k / n)
        assert (probability >= threshold).sum() == k


def test_nine_tenths_is_what_is_asked_for_where_nothing_is_said():
    y, probability = np.r_[0, np.ones(10, int)], np.arange(11) / 10
    assert sensitivity_threshold(y, probability) == sensitivity_threshold(y, probability, 0.9)
    assert sensitivity_threshold(y, probability) == pytest.approx(0.15)


def test_all_abnormal_rows_are_found_where_all_are_asked_for():
    y, probability = np.array([0, 0, 1, 0, 1]), np.array([0.1, 0.2, 0.3, 0.6, 0.9])
    assert sensitivity_threshold(y, probability, 1.0) == pytest.approx(0.25)
    assert sensitivity_threshold(y, probability[::-1], 1.0) == 0.1  # the lowest: all are called


@pytest.mark.parametrize("target", [0, -0.1, 1.01, float("nan")])
def test_an_impossible_sensitivity_is_refused(target):
    with pytest.raises(TrainingDataError, match=r"sensitivity .* is not above 0 and at most 1"):
        sensitivity_threshold(np.array([0, 1]), np.array([0.1, 0.2]), target)


@pytest.mark.parametrize("choose", [youden_threshold, sensitivity_threshold])
def test_the_threshold_lies_in_the_middle_of_its_gap(choose):
    assert choose(np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.6, 0.9])) == 0.4


def test_of_equal_cuts_the_more_sensitive_one_is_taken():
    y = np.array([0, 1, 0, 1])
    assert youden_threshold(y, np.array([0.1, 0.2, 0.3, 0.4])) == pytest.approx(0.15)


@pytest.mark.parametrize("choose", [youden_threshold, sensitivity_threshold])
def test_a_constant_calls_everything_abnormal(choose):
    assert choose(np.array([0, 1]), np.array([0.3, 0.3])) == 0.3


@pytest.mark.parametrize("choose", [youden_threshold, sensitivity_threshold])
def test_neighbouring_floats_are_still_separated(choose):
    low = 0.5
    high = np.nextafter(low, 1)
    assert low < choose(np.array([0, 1]), np.array([low, high])) <= high


@pytest.mark.parametrize("choose", [youden_threshold, sensitivity_threshold])
@pytest.mark.parametrize(
    ("y", "probability", "text"),
    [
        ([1, 1], [0.1, 0.2], "a threshold needs normal and abnormal rows, but all 2 are abnormal"),
        ([], [], "all 0"),
        ([0, -1], [0.1, 0.2], "unlabelled"),
        ([0, 1], [0.1, np.nan], "NaN"),
        ([0, 1], [0.1], "one probability per label"),
    ],
)
def test_what_gives_no_threshold_is_said(choose, y, probability, text):
    with pytest.raises(TrainingDataError, match=text):
        choose(np.array(y), np.array(probability))
