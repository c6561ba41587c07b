import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as oracle

from medembed.core.errors import TrainingDataError
from medembed.evaluation.paired import McNemar, mcnemar, paired_difference

DECISIONS = st.lists(st.tuples(st.integers(0, 1), st.booleans(), st.booleans()), min_size=1)


def columns(triples):
    return [np.array(column) for column in zip(*triples, strict=True)]


def test_rows_of_one_patient_show_no_difference():
    """All resamples are alike, which is no evidence: p was 0.001."""
    y, a, b = np.array([0, 1, 0, 1]), np.array([0.1, 0.9, 0.2, 0.8]), np.array([0.9, 0.1, 0.2, 0.8])
    found = paired_difference(y, a, b, np.array(["p"] * 4))
    nothing = dict.fromkeys(("low", "high", "p", "method"))
    assert found.as_dict() == {"difference": 0.75, **nothing}


def test_a_few_abnormal_patients_are_the_degrees_of_freedom():
    """One row per patient, so the oracle is DeLong's variance of two independent classes."""
    rng = np.random.default_rng(4)
    y = np.repeat([1, 0], [6, 80])
    a, b = (rng.random(len(y)) * 0.6 + 0.3 * y for _ in range(2))
    placed = [(x[:6, None] > x[None, 6:]).astype(float) for x in (a, b)]
    gap = placed[0] - placed[1]
    error = np.sqrt(gap.mean(1).var(ddof=1) / 6 + gap.mean(0).var(ddof=1) / 80)
    found = paired_difference(y, a, b, np.arange(len(y)))
    assert found.difference == pytest.approx(gap.mean())
    assert found.p == pytest.approx(2 * stats.t.sf(abs(gap.mean()) / error, 5))
    assert found.high - found.difference == pytest.approx(stats.t.ppf(0.975, 5) * error)


@pytest.mark.parametrize("score", ["auroc", "average_precision", "sensitivity", "kappa", "brier"])
def test_copies_of_a_patients_rows_are_no_further_evidence(score):
    generator, n = np.random.default_rng(0), 60
    y = np.arange(n) % 2
    a, b = (np.clip(0.3 * y + generator.uniform(0, 0.7, n), 0, 1) for _ in range(2))
    once, fivefold = (
        paired_difference(*(np.repeat(part, k) for part in (y, a, b, np.arange(n))), score=score)
        for k in (1, 5)
    )
    for name in ("difference", "low", "high", "p"):
        assert getattr(fivefold, name) == pytest.approx(getattr(once, name), abs=1e-12)
    assert once.low < once.difference < once.high


def test_the_difference_in_brier_scores_is_scipys_paired_t_test():
    generator, n = np.random.default_rng(1), 500
    y = np.arange(n) % 2
    a = np.clip(0.2 * y + generator.uniform(0, 0.8, n), 0, 1)
    b = np.clip(a + generator.normal(0, 0.1, n), 0, 1)
    found = paired_difference(y, a, b, np.arange(n), score="brier")
    expected = stats.ttest_rel((a - y) ** 2, (b - y) ** 2)
    # its degrees of freedom are fewer, as parts are unequal
    assert found.p == pytest.approx(expected.pvalue, rel=0.05)
    assert (found.low, found.high) == pytest.approx(expected.confidence_interval(), rel=0.02)


def test_p_is_below_5_in_100_where_the_interval_leaves_0_out():
    generator, n, n_below = np.random.default_rng(2), 40, 0
    y = np.arange(n) % 2
    for _ in range(200):
        a, b = (np.clip(0.3 * y + generator.uniform(0, 0.7, n), 0, 1) for _ in range(2))
        found = paired_difference(y, a, np.where(y == 1, 0.8 * b, b), np.arange(n) // 2)
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)
        n_below += found.p < 0.05
    assert 20 < n_below < 180


@settings(deadline=None, max_examples=100)
@given(DECISIONS)
def test_mcnemar_equals_statsmodels_exact_test(triples):
    y, a, b = columns(triples)
    found = mcnemar(y, a, b)
    table = np.zeros((2, 2))
    np.add.at(table, ((a == y).astype(int), (b == y).astype(int)), 1)
    assert (found.only_a, found.only_b) == (table[1, 0], table[0, 1])
    assert found.p == pytest.approx(float(oracle(table, exact=True).pvalue))


@settings(deadline=None, max_examples=50)
@given(DECISIONS, st.randoms())
def test_mcnemar_knows_no_order_of_rows_or_heads(triples, random):
    y, a, b = columns(triples)
    found = mcnemar(y, a, b)
    assert mcnemar(y, b, a) == McNemar(found.only_b, found.only_a, found.p)
    assert mcnemar(*columns(random.sample(triples, len(triples)))) == found


def test_mcnemar_as_computed_by_hand():
    # a alone is right on one row, b alone on five: p = 2 (1 + 6) / 2 ** 6
    y = np.array([1, 0, 0, 1, 1, 0, 1, 0])
    a = np.array([1, 1, 1, 0, 0, 1, 1, 1], dtype=bool)
    b = np.array([0, 0, 0, 1, 1, 0, 1, 1], dtype=bool)
    found = mcnemar(y, a, b)
    assert (found.only_a, found.only_b) == (1, 5)
    assert found.p == pytest.approx(14 / 64)


def test_heads_right_on_the_same_rows_have_p_1():
    y, a = np.array([0, 1, 1]), np.array([False, True, False])
    assert mcnemar(y, a, a) == McNemar(0, 0, 1.0)
    nothing = np.array([], dtype=bool)
    assert mcnemar(nothing, nothing, nothing) == McNemar(0, 0, 1.0)


def test_as_many_rows_to_either_have_p_1_not_more():
    assert mcnemar(np.array([1, 1]), np.array([1, 0]), np.array([0, 1])) == McNemar(1, 1, 1.0)


@pytest.mark.parametrize(
    ("y", "a", "b", "text"),
    [
        ([0, 1], [True, False], [True], "not three columns of one length"),
        ([0, -1], [True, False], [True, False], "label is not 0 or 1"),
        ([0, 1], [0.2, 0.7], [True, False], "decision is not 0 or 1"),
    ],
)
def test_what_is_no_decision_is_refused(y, a, b, text):
    with pytest.raises(TrainingDataError, match=text):
        mcnemar(np.array(y), np.array(a), np.array(b))
