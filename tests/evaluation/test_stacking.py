"""Weights of an ensemble: scipy's constrained optimum of the same loss, and its certificate."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, minimize

from medembed.core.errors import TrainingDataError
from medembed.evaluation import stacking
from medembed.evaluation.stacking import pool_loss, pool_weights


def draw(n, k, seed, *, strength=1.0):
    """Calibrated members: each sees the label through noise of its own, some hardly at all."""
    generator = np.random.default_rng(seed)
    y = (generator.random(n) < 0.4).astype(int)
    y[:2] = 0, 1
    signal = strength * generator.uniform(0, 1, k)
    seen = (2 * y - 1)[:, None] * signal + generator.normal(size=(n, k))
    return 1 / (1 + np.exp(-2 * signal * seen)), y


def find_optimum(probability, y):
    """Minimise the same loss by another method of scipy, from several starts."""
    k = probability.shape[1]
    given = np.where(y[:, None] == 1, probability, 1 - probability)
    found = [
        minimize(
            lambda w: -np.log(given @ w).mean(),
            start,
            jac=lambda w: -(given / (given @ w)[:, None]).mean(axis=0),
            method="trust-constr",
            bounds=Bounds(np.zeros(k), np.ones(k), keep_feasible=True),
            constraints=LinearConstraint(np.ones(k), 1, 1),
            options={"gtol": 1e-12, "xtol": 1e-14, "maxiter": 5000, "barrier_tol": 1e-12},
        )
        for start in (np.full(k, 1 / k), np.eye(k)[0] * 0.9 + 0.1 / k)
    ]
    return min(own.fun for own in found)


@pytest.mark.filterwarnings("ignore:delta_grad == 0.0")
@pytest.mark.parametrize(("n", "k"), [(40, 2), (200, 3), (500, 5)])
def test_the_weights_are_the_constrained_optimum_of_scipy(n, k):
    probability, y = draw(n, k, seed=n + k)
    weights = pool_weights(probability, y)
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1)
    optimum = find_optimum(probability, y)  # stays inside by about 1e-5 where a weight is 0
    assert optimum - 5e-5 <= pool_loss(weights, probability, y) <= optimum + 1e-7


@given(st.integers(1, 8), st.integers(10, 80), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_no_convex_weights_are_better(k, n, seed):
    probability, y = draw(n, k, seed)
    weights = pool_weights(probability, y)
    others = np.vstack([np.eye(k), np.random.default_rng(seed).dirichlet(np.ones(k), 20)])
    best = min(pool_loss(own, probability, y) for own in others)
    assert pool_loss(weights, probability, y) <= best + 1e-6
    assert pool_weights(probability, y).tobytes() == weights.tobytes()


def test_a_member_that_the_others_contain_gets_nothing():
    probability, y = draw(2000, 2, seed=3)
    blurred = 0.5 * probability[:, :1] + 0.25
    assert pool_weights(np.hstack([probability, blurred]), y)[2] == pytest.approx(0, abs=1e-3)


def test_equal_members_and_certain_ones_have_weights():
    probability, y = draw(60, 1, seed=1)
    assert pool_weights(np.hstack([probability] * 3), y).sum() == pytest.approx(1)
    certain = np.column_stack([y.astype(float), 1 - y.astype(float)])
    assert pool_weights(certain, y).tolist() == [1, 0]


def test_weights_that_miss_the_optimum_are_refused(monkeypatch):
    probability, y = draw(100, 3, seed=2)
    monkeypatch.setattr(stacking, "_MAX_GAP", -1.0)
    with pytest.raises(TrainingDataError, match="miss the optimum"):
        pool_weights(probability, y)
