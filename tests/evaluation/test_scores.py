import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from medembed.core.errors import TrainingDataError
from medembed.evaluation.scores import N_ECE_BINS, SCORES, Scorer, by_study, score


def oracle(y, probability, threshold, weights):
    """The same scores from scikit-learn, which takes one set of weights at a time."""
    called = (probability >= threshold).astype(int)
    kept = {"sample_weight": weights}
    f1 = metrics.f1_score(y, called, average="macro", zero_division=0, **kept)
    return {
        "auroc": metrics.roc_auc_score(y, probability, **kept),
        "average_precision": metrics.average_precision_score(y, probability, **kept),
        "accuracy": metrics.accuracy_score(y, called, **kept),
        "macro_f1": f1,
        "kappa": metrics.cohen_kappa_score(y, called, **kept),
        "sensitivity": metrics.recall_score(y, called, zero_division=0, **kept),
        "specificity": metrics.recall_score(y, called, pos_label=0, zero_division=0, **kept),
        "brier": metrics.brier_score_loss(y, probability, **kept),
        "ece": ece_by_hand(y, probability, weights),
    }


def ece_by_hand(y, probability, weights):
    total = 0.0
    for k in range(N_ECE_BINS):
        upper = probability <= 1 if k == N_ECE_BINS - 1 else probability < (k + 1) / N_ECE_BINS
        inside = (probability >= k / N_ECE_BINS) & upper
        share = weights[inside].sum() / weights.sum()
        if share > 0:
            abnormal = np.average(y[inside], weights=weights[inside])
            total += share * abs(
                abnormal - np.average(probability[inside], weights=weights[inside])
            )
    return total


@pytest.mark.parametrize("n_levels", [4, 1000])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 1.1])
def test_scores_equal_scikit_learns_under_every_set_of_weights(n_levels, threshold):
    generator = np.random.default_rng(n_levels)
    y = generator.integers(0, 2, 120)
    probability = generator.integers(0, n_levels, 120) / n_levels
    weights = generator.multinomial(120, np.full(120, 1 / 120), size=6).astype(float)
    found = score(y, probability, threshold, weights=weights)
    assert tuple(found) == SCORES
    for k in range(6):
        expected = oracle(y, probability, threshold, weights[k])
        assert {name: found[name][k] for name in SCORES} == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0, 0.1, 0.3, 0.7, 1])), min_size=1),
    st.integers(0, 2**32 - 1),
)
def test_a_weight_is_worth_as_many_copies_of_its_row(pairs, seed):
    y, probability = (np.array(column) for column in zip(*pairs, strict=True))
    weights = np.random.default_rng(seed).integers(0, 4, len(y))
    weighted = score(y, probability, 0.3, weights=weights[None, :])
    copied = score(np.repeat(y, weights), np.repeat(probability, weights), 0.3)
    assert {k: v[0] for k, v in weighted.items()} == pytest.approx(copied, nan_ok=True, abs=1e-12)


def test_one_class_leaves_only_what_it_can_estimate():
    normal = score(np.zeros(4, int), np.array([0.1, 0.2, 0.3, 0.9]), 0.5)
    assert {name for name, value in normal.items() if np.isnan(value)} == {
        "auroc",
        "average_precision",
        "macro_f1",
        "kappa",
        "sensitivity",
    }
    assert normal["specificity"] == 0.75
    abnormal = score(np.ones(4, int), np.array([0.1, 0.2, 0.3, 0.9]), 0.5)
    assert abnormal["sensitivity"] == 0.25
    assert np.isnan(abnormal["average_precision"])


def test_no_rows_are_not_estimable():
    assert all(np.isnan(value) for value in score(np.array([]), np.array([]), 0.5).values())


def test_a_study_is_decided_at_the_threshold_itself():
    assert score(np.array([0, 1]), np.array([0.2, 0.5]), 0.5)["sensitivity"] == 1


@pytest.mark.parametrize(
    ("y", "probability", "text"),
    [
        ([0, -1], [0.1, 0.2], "label -1 is not 0 or 1; leave unlabelled rows out"),
        ([0, 1], [0.1, np.nan], "NaN or outside"),
        ([0, 1], [0.1, 1.2], "outside"),
        ([0, 1, 1], [0.1, 0.2], "not two columns of one length"),
    ],
)
def test_bad_input_is_named(y, probability, text):
    with pytest.raises(TrainingDataError, match=text):
        score(np.array(y), np.array(probability), 0.5)


def test_an_unknown_score_is_named_with_those_there_are():
    with pytest.raises(TrainingDataError, match="'auc'; known are auroc"):
        Scorer(np.array([0, 1]), np.array([0.1, 0.2]), 0.5, ["auc"])


def views(**changes):
    table = {
        "patient": ["p2", "p1", "p1", "p1", "p2"],
        "study": ["s2", "s1", "s1", "s3", "s2"],
        "region": ["hand", "elbow", "elbow", "hand", "hand"],
        "split": ["train"] * 5,
        "fold": [1, 0, 0, 0, 1],
        "label": pd.array([0, 1, 0, None, None], dtype="Int8"),
        "probability": np.array([0.2, 0.5, 0.25, 0.75, 0.4], dtype=np.float32),
    }
    return pd.DataFrame(table | changes)


def test_a_study_takes_its_largest_known_label_and_its_mean_probability():
    studies = by_study(views())
    assert studies["study"].tolist() == ["s1", "s2", "s3"]
    assert studies["patient"].tolist() == ["p1", "p2", "p1"]
    assert studies["region"].tolist() == ["elbow", "hand", "hand"]
    assert studies["fold"].tolist() == [0, 1, 0]
    assert studies["label"].tolist() == [1, 0, pd.NA]
    assert studies["n_views"].tolist() == [2, 2, 1]
    np.testing.assert_allclose(studies["probability"], [0.375, 0.3, 0.75], rtol=1e-6)


def test_minus_one_reads_as_no_label():
    coded = by_study(views(label=np.array([0, 1, 0, -1, -1], dtype=np.int8)))
    pd.testing.assert_frame_equal(coded, by_study(views()))


def test_studies_do_not_depend_on_the_order_of_their_views():
    pd.testing.assert_frame_equal(by_study(views()), by_study(views().iloc[::-1]))


def test_a_study_of_two_patients_is_refused():
    with pytest.raises(TrainingDataError, match="study s1 lies in 2 values of patient"):
        by_study(views(patient=["p2", "p1", "p3", "p1", "p2"]))


def test_views_without_a_probability_are_counted():
    with pytest.raises(TrainingDataError, match="1 views have no probability"):
        by_study(views(probability=[0.2, 0.5, np.nan, 0.7, 0.4]))
