"""Which labels scores contradict, held to cleanlab; how many are wrong, held to planted errors."""

from dataclasses import astuple

import numpy as np
import pytest
from cleanlab.count import num_label_issues
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from scipy.optimize import approx_fprime
from scipy.special import expit

from medembed.core.errors import TrainingDataError
from medembed.evaluation import label_errors
from medembed.evaluation.calibration import fit_platt, log_odds
from medembed.evaluation.label_errors import (
    NoiseModel,
    Thresholds,
    _loss,
    bound_errors,
    find_thresholds,
    fit_noise,
)

N_HEADS = 3


def plant(seed, rate, *, n=1500, share=0.4):
    """Labels of which a share is flipped, which ones, and calibrated scores of several heads."""
    generator = np.random.default_rng(seed)
    right = (generator.random(n) < share).astype(int)
    seen = generator.normal(size=n) + 2.5 * (right - 0.5)
    flipped = generator.random(n) < rate
    y = np.where(flipped, 1 - right, right)
    noise = generator.normal(0, 0.7, (N_HEADS, n))
    heads = [fit_platt(p, y).apply(p) for p in expit(1.5 * (seen + noise))]
    return y, flipped, heads


def combine(y, heads):
    mean = np.mean(heads, axis=0)
    return fit_platt(mean, y).apply(mean)


def most_contradicted(y, probability, k):
    return np.argsort(np.where(y == 1, probability, 1 - probability), kind="stable")[:k]


@pytest.mark.parametrize("rate", [0.01, 0.03, 0.05, 0.1])
def test_planted_errors_are_found_at_least_as_well_as_by_cleanlab(rate):
    """At the true count precision and recall are one number; mean over 20 draws."""
    ours, theirs, of_one_head, sizes = [], [], [], []
    for seed in range(20):
        y, flipped, heads = plant(seed, rate)
        k, p = int(flipped.sum()), combine(y, heads)
        ours.append(flipped[most_contradicted(y, p, k)].mean())
        for scores, found in ((p, theirs), (heads[0], of_one_head)):
            quality = get_label_quality_scores(y, np.column_stack([1 - scores, scores]))
            found.append(flipped[np.argsort(quality, kind="stable")[:k]].mean())
        model = fit_noise(y, p)
        sizes.append((k, model.error_probability(y, p).sum()))
    assert np.mean(ours) >= np.mean(theirs)
    assert np.mean(ours) > np.mean(of_one_head) > 0.2
    planted, estimated = np.mean(sizes, axis=0)
    assert estimated == pytest.approx(planted, rel=0.15, abs=8)


@pytest.mark.parametrize(("rate", "share"), [(0.0, 0.4), (0.05, 0.4), (0.1, 0.15)])
def test_suspects_are_those_of_confident_learning(rate, share):
    for seed in range(5):
        y, _, heads = plant(seed, rate, share=share)
        p = combine(y, heads)
        both = np.column_stack([1 - p, p])
        ours = find_thresholds(y, p).contradicts(y, p)
        np.testing.assert_array_equal(
            ours, find_label_issues(y, both, filter_by="confident_learning", n_jobs=1)
        )
        assert ours.sum() == num_label_issues(y, both, estimation_method="off_diagonal")


@pytest.mark.parametrize("rate", [0.0, 0.03, 0.1])
def test_expected_suspects_are_the_suspects_with_a_right_label(rate):
    pairs = []
    for seed in range(20):
        y, flipped, heads = plant(seed, rate)
        p = combine(y, heads)
        thresholds = find_thresholds(y, p)
        n_right = (thresholds.contradicts(y, p) & ~flipped).sum()
        pairs.append((n_right, fit_noise(y, p).chance(p, thresholds).sum()))
    by_chance, expected = np.mean(pairs, axis=0)
    assert expected == pytest.approx(by_chance, rel=0.2)


def test_an_error_of_one_class_is_told_from_an_error_of_the_other():
    shares = []
    for seed in range(10):
        generator = np.random.default_rng(seed)
        right = (generator.random(3000) < 0.5).astype(int)
        p = expit(2 * (generator.normal(size=3000) + 2.5 * (right - 0.5)))
        y = np.where(generator.random(3000) < 0.1, 0, right)  # normal whatever it is
        model = fit_noise(y, p)
        shares.append((model.missed, model.invented))
    missed, invented = np.mean(shares, axis=0)
    assert missed == pytest.approx(0.1, abs=0.02)
    assert invented < 0.02


def test_the_interval_covers_the_planted_number():
    n_inside, seeds = 0, range(4)
    for seed in seeds:
        y, flipped, heads = plant(seed, 0.05, n=500)
        p = combine(y, heads)
        low, high = bound_errors(y, p, np.arange(500) // 2, fit_noise(y, p), (y, p))
        n_inside += low <= flipped.sum() <= high
    assert n_inside >= 3


def test_groups_of_equal_scores_give_the_interval_of_single_rows(monkeypatch):
    y, _, heads = plant(1, 0.05, n=3000)
    p, patients = combine(y, heads), np.arange(3000) // 2
    single = bound_errors(y, p, patients, fit_noise(y, p), (y, p))
    monkeypatch.setattr(label_errors, "_MOST", 1000)
    monkeypatch.setattr(label_errors, "_N_GROUPS", 400)
    grouped = bound_errors(y, p, patients, fit_noise(y, p), (y, p))
    assert grouped == pytest.approx(single, rel=0.05)


def test_no_other_noise_model_is_likelier():
    y, _, heads = plant(0, 0.05, n=300)
    p = combine(y, heads)
    given = (y == 1, log_odds(p), np.full(300, 1 / 300))
    fitted = np.array(astuple(fit_noise(y, p)))
    generator = np.random.default_rng(1)
    for size in (0.01, 0.1, 1.0):
        others = fitted + generator.normal(0, size, (100, 4))
        others[:, 2:] = np.clip(others[:, 2:], 0, 0.3)
        for other in others:
            assert _loss(other, *given)[0] >= _loss(fitted, *given)[0] - 1e-9


def test_the_gradient_is_that_of_differences():
    y, _, heads = plant(0, 0.05, n=300)
    given = (y == 1, log_odds(combine(y, heads)), np.full(300, 1 / 300))
    for at in ([0.2, 1.3, 0.05, 0.02], [-1.0, 0.4, 0.2, 0.1]):
        by_difference = approx_fprime(np.array(at), lambda v: _loss(v, *given)[0], 1e-7)
        np.testing.assert_allclose(_loss(np.array(at), *given)[1], by_difference, atol=1e-5)


def test_weights_are_repetitions():
    y, _, heads = plant(3, 0.05, n=400)
    p = combine(y, heads)
    weights = np.random.default_rng(0).integers(0, 4, 400)
    repeated = fit_noise(np.repeat(y, weights), np.repeat(p, weights))
    weighted = fit_noise(y, p, weights)
    np.testing.assert_allclose(astuple(weighted), astuple(repeated), atol=2e-3)


def test_chances_by_hand():
    """Confident from 0.8 and 0.7 on; q is p, and 10 % of abnormal studies are called normal."""
    model, thresholds = NoiseModel(0.0, 1.0, 0.1, 0.0), Thresholds(0.8, 0.7)
    p = np.array([0.1, 0.3, 0.6, 0.75])
    assert thresholds.confident_class(p).tolist() == [0, -1, -1, 1]
    assert thresholds.contradicts(np.array([1, 0, 0, 0]), p).tolist() == [True, False, False, True]
    np.testing.assert_allclose(model.chance(p, thresholds), [0.1, 0, 0, 0.25])
    wrong = [0.0, 0.03 / (0.03 + 0.7), 0.06 / (0.06 + 0.4), 0.075 / (0.075 + 0.25)]
    np.testing.assert_allclose(model.error_probability(np.array([1, 0, 0, 0]), p), wrong)


def test_a_certain_model_of_right_labels_finds_no_error():
    model = NoiseModel(0.0, 100.0, 0.0, 0.0)
    assert model.error_probability(np.array([1, 0]), np.array([0.0, 1.0])).tolist() == [0, 0]


def test_one_class_is_refused():
    with pytest.raises(TrainingDataError, match="audit of labels"):
        find_thresholds(np.zeros(4, int), np.full(4, 0.3))
