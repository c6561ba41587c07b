"""How far rows lie from training: exact ranks, calibrated on patients, and what is refused."""

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf_shrinkage

from medembed.core.errors import ModelError, TrainingDataError
from medembed.evaluation.drift.embedding_space import (
    FAR,
    Space,
    fit_remoteness,
    learn_space,
    measure_remoteness,
)
from medembed.evaluation.drift.reference import fit_reference

WIDTH = 12


def draw(n_patients, seed, n_views=3, between=1.0):
    """Draw views of patients that resemble each other."""
    generator = np.random.default_rng(seed)
    patients = np.repeat(np.arange(n_patients), n_views)
    X = between * generator.normal(size=(n_patients, WIDTH))[patients]
    return (X + generator.normal(size=X.shape)).astype(np.float32), patients


@pytest.fixture(scope="module")
def reference():
    X, patients = draw(300, 0)
    return fit_reference(X, 0, patients=patients)


def test_p_is_the_rank_among_the_training_patients_and_never_too_small():
    """The oracle has all distances, by a covariance matrix and its inverse."""
    (X, _), (others, _), (new, _) = (draw(n, n, n_views=1) for n in (150, 290, 200))
    new = 1.5 * new
    space = learn_space(X, others, np.random.default_rng(0))
    arrays = fit_remoteness(space, X, others)
    reference = {**space.as_arrays(), **arrays, "range": np.array([1.0, 2, len(others)])}
    X, others, rows = ((own - space.centre) / space.scale for own in (X, others, new))
    covariance = X.T @ X / len(X)
    alpha = ledoit_wolf_shrinkage(X, assume_centered=True)
    shrunken = (1 - alpha) * covariance + alpha * np.trace(covariance) / WIDTH * np.eye(WIDTH)
    inverse = np.linalg.inv(shrunken)
    known, own = (np.sqrt(np.einsum("ni,ij,nj->n", part, inverse, part)) for part in (others, rows))
    found = measure_remoteness(reference, new)
    assert found.distance == pytest.approx(own / np.quantile(known, 0.95), rel=1e-4)
    exact = (1 + (known[None] >= own[:, None]).sum(axis=1)) / (1 + len(known))
    assert (found.p >= exact - 1e-9).all()
    assert (found.p <= exact + 0.011).all()
    assert 0.02 < found.far.mean() < 0.98


def test_references_of_before_are_read_and_see_less(reference):
    """They hold the distances in the space of drift."""
    older = {name: array for name, array in reference.items() if not name.startswith("remote_")}
    X, _ = draw(50, 5)
    found = measure_remoteness(older, X)
    assert 0.1 < np.median(found.p) < 0.9
    edge = older["quantiles"][95]
    own = np.linalg.norm(Space.from_arrays(older).project(X), axis=1)
    assert found.distance == pytest.approx(own / edge)
    moved = X.copy()
    moved[:, 3] += 30
    assert measure_remoteness(older, moved).far.all()


@pytest.mark.parametrize("n_patients", [20, 75, 300])
def test_one_row_of_new_patients_of_the_same_kind_is_rarely_far(n_patients):
    """P-values of new patients are uniform or larger, though their views resemble each other."""
    p, far = [], []
    for seed in range(30):
        X, patients = draw(n_patients, [seed, 0])
        new, of = draw(40, [seed, 1])
        found = measure_remoteness(fit_reference(X, seed, patients=patients), new[::3])
        assert len(set(of[::3])) == 40
        p += found.p.tolist()
        far += found.far.tolist()
    for level in (0.05, 0.1, 0.3):
        assert np.mean(np.array(p) <= level) <= level + 0.02
    n_kept = n_patients - n_patients // 3
    assert np.mean(far) <= max(FAR, 1 / (n_kept + 1)) + 0.015
    assert max(far) or n_patients > 100


def test_rows_taken_for_patients_would_be_another_measure():
    """Views of few patients: by rows the range looks known better than it is."""
    alarms = {"patients": [], "rows": []}
    for seed in range(20):
        X, patients = draw(24, [seed, 0], n_views=12, between=3.0)
        new = draw(60, [seed, 1], n_views=1, between=3.0)[0]
        by_patient = fit_reference(X, seed, patients=patients)
        alarms["patients"].append((measure_remoteness(by_patient, new).p <= 0.1).mean())
        alarms["rows"].append((measure_remoteness(fit_reference(X, seed), new).p <= 0.1).mean())
    assert np.mean(alarms["patients"]) <= 0.12
    assert np.mean(alarms["rows"]) > 0.15


def test_other_images_are_far_in_any_direction(reference):
    X, _ = draw(50, 5)
    moved = X.copy()
    moved[:, 3] += 30
    found = measure_remoteness(reference, moved)
    assert found.far.all()
    assert found.p.max() == pytest.approx(1 / (1 + found.n_training))
    assert (found.distance > 2).all()
    # along columns in which training hardly varies, too
    wide = np.hstack([X, np.zeros((len(X), 40), np.float32)])
    known = np.hstack([draw(300, 0)[0], np.zeros((900, 40), np.float32)])
    known[:, WIDTH:] = 0.01 * np.random.default_rng(0).normal(size=(900, 40))
    other = wide.copy()
    other[:, -1] = 5
    assert measure_remoteness(fit_reference(known, 0), other).far.all()


def test_small_and_missing_references_measure_nothing(reference):
    X, _ = draw(4, 0)
    assert measure_remoteness(fit_reference(X[:11], 0), X) is None
    assert measure_remoteness({}, X) is None
    empty = measure_remoteness(reference, X[:0])
    assert empty.p.shape == empty.far.shape == (0,)


@pytest.mark.parametrize(
    "change",
    [
        {"remote_quantiles": np.zeros(100)},
        {"remote_quantiles": np.linspace(1, 0, 101)},
        {"remote_quantiles": -np.ones(101)},
        {"remote_quantiles": np.zeros((101, 1))},
        {"remote_directions": np.zeros((3, WIDTH))},
        {"remote_directions": np.zeros(WIDTH)},
        {"remote_variances": np.zeros(WIDTH)},
        {"remote_variances": np.ones(3)},
        {"range": np.array([1.0, 5])},
        {"range": np.array([1.0, 1, 1])},
        {"space_scale": np.ones(3)},
    ],
)
def test_damaged_references_are_refused(reference, change):
    with pytest.raises(ModelError, match="reference"):
        measure_remoteness({**reference, **change}, draw(4, 0)[0])


def test_a_reference_without_quantiles_is_refused(reference):
    X, _ = draw(4, 0)
    for name in ("remote_quantiles", "remote_variances"):
        with pytest.raises(ModelError, match=name):
            measure_remoteness({k: v for k, v in reference.items() if k != name}, X)
    older = {k: v for k, v in reference.items() if not k.startswith("remote_")}
    with pytest.raises(ModelError, match="quantiles"):
        measure_remoteness({k: v for k, v in older.items() if k != "quantiles"}, X)


def test_rows_of_another_width_or_no_numbers_are_refused(reference):
    X, _ = draw(4, 0)
    with pytest.raises(ModelError, match="12 columns, these embeddings have 11"):
        measure_remoteness(reference, X[:, :11])
    X[1, 1] = np.inf
    with pytest.raises(TrainingDataError, match="not finite"):
        measure_remoteness(reference, X)
