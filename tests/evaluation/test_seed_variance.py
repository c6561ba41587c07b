import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, roc_auc_score

from medembed.core.errors import TrainingDataError
from medembed.evaluation.bootstrap import standard_error
from medembed.evaluation.seed_variance import seed_spread


def heads(n_seeds, own, n=200, n_patients=120, seed=0):
    """Labels, one head's probabilities by seed, patients; `own` is what a seed adds by itself."""
    generator = np.random.default_rng(seed)
    y = generator.integers(0, 2, n)
    shared = 2 * y - 1 + generator.normal(size=n)
    logits = [shared + own * generator.normal(size=n) for _ in range(n_seeds)]
    return y, [1 / (1 + np.exp(-logit)) for logit in logits], generator.integers(0, n_patients, n)


def test_both_spreads_are_those_of_scores_computed_one_by_one():
    y, probabilities, patients = heads(4, own=0.5)
    found = seed_spread(y, probabilities, patients, [0.5] * 4, n_resamples=100, seed=3)
    values = [roc_auc_score(y, probability) for probability in probabilities]
    names, codes = np.unique(patients, return_inverse=True)
    drawn = np.random.default_rng(3).integers(0, len(names), size=(100, len(names)))
    rows = [np.concatenate([np.flatnonzero(codes == code) for code in row]) for row in drawn]
    resampled = [[roc_auc_score(y[r], p[r]) for r in rows] for p in probabilities]
    assert found.mean == pytest.approx(np.mean(values))
    assert found.seed_sd == pytest.approx(np.std(values, ddof=1))
    assert found.sampling_sd == pytest.approx(np.mean(np.std(resampled, axis=1, ddof=1)))
    assert found.n_seeds == 4


def test_every_seed_has_its_own_threshold():
    y, probabilities, patients = heads(2, own=0.5)
    found = seed_spread(y, probabilities, patients, [0.3, 0.7], score="accuracy", n_resamples=20)
    low, high = (probabilities[0] >= 0.3, probabilities[1] >= 0.7)
    values = [accuracy_score(y, low), accuracy_score(y, high)]
    assert found.mean == pytest.approx(np.mean(values))
    assert found.seed_sd == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))


def test_seeds_that_agree_spread_by_sampling_alone():
    y, (probability,), patients = heads(1, own=0)
    found = seed_spread(y, [probability] * 3, patients, [0.5] * 3, n_resamples=100)
    assert found.seed_sd == 0
    assert 0.01 < found.sampling_sd < 0.05
    noisy = seed_spread(*heads(3, own=2), [0.5] * 3, n_resamples=100)
    assert noisy.seed_sd > found.seed_sd


def test_the_sampling_spread_is_that_of_new_patients():
    runs = [heads(1, own=0, seed=seed) for seed in range(200)]
    values = [roc_auc_score(y, probability) for y, (probability,), _ in runs]
    found = seed_spread(*runs[0], [0.5], n_resamples=1000)
    assert found.sampling_sd == pytest.approx(np.std(values), rel=0.25)


def test_one_seed_has_no_spread_over_seeds():
    found = seed_spread(*heads(1, own=0), [0.5], n_resamples=20)
    assert math.isnan(found.seed_sd)
    assert found.sampling_sd > 0


def test_one_class_and_one_patient_are_not_estimable():
    y, probabilities, patients = heads(2, own=1)
    one_class = seed_spread(np.ones(200, int), probabilities, patients, [0.5, 0.5], n_resamples=20)
    assert math.isnan(one_class.mean)
    assert math.isnan(one_class.sampling_sd)
    alone = seed_spread(y, probabilities, np.zeros(200), [0.5, 0.5], n_resamples=20)
    assert alone.mean > 0.5
    assert math.isnan(alone.sampling_sd)


@pytest.mark.parametrize("thresholds", [[], [0.5, 0.5]])
def test_seeds_and_thresholds_are_counted(thresholds):
    y, probabilities, patients = heads(1, own=0)
    with pytest.raises(TrainingDataError, match="one threshold for each"):
        seed_spread(y, probabilities, patients, thresholds)
    with pytest.raises(TrainingDataError, match="at least one seed"):
        seed_spread(y, [], patients, [])


def test_a_standard_error_wants_nine_tenths_of_its_draws():
    draws = np.r_[np.arange(9.0), np.nan]
    assert standard_error(0.0, draws) == pytest.approx(np.std(np.arange(9), ddof=1))
    assert math.isnan(standard_error(0.0, np.r_[draws, np.nan]))
    assert math.isnan(standard_error(math.nan, np.arange(9.0)))
