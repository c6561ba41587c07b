"""How far rows lie from training: exact ranks, calibrated on patients, and what is refused."""

import numpy as np
import pytest

from medembed.errors import ModelError, TrainingDataError
from medembed.evaluation.drift import fit_reference
from medembed.evaluation.remoteness import FAR, measure_remoteness
from medembed.evaluation.spaces import Space

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
    """The oracle knows all distances: those of the very rows that the reference keeps."""
    X, _ = draw(450, 1, n_views=1)
    reference = fit_reference(X, 0)
    space, (limit, _, n) = Space.from_arrays(reference), reference["range"]
    distances = np.linalg.norm(space.project(X), axis=1)
    # the kept two thirds are those whose quantiles are the reference's
    generator = np.random.default_rng(0)
    order = generator.permutation(generator.permutation(len(X)))
    order = generator.permutation(len(X)) if len(order) != len(X) else order
    kept = distances[order[len(X) // 3 :]]
    assert len(kept) == n
    new, _ = draw(200, 2, n_views=1, between=3.0)
    found = measure_remoteness(reference, new)
    own = np.linalg.norm(space.project(new), axis=1)
    assert found.distance == pytest.approx(own / limit)
    if np.allclose(np.quantile(kept, np.linspace(0, 1, 101)), reference["quantiles"]):
        exact = (1 + (kept[None] >= own[:, None]).sum(axis=1)) / (1 + n)
        assert (found.p >= exact - 1e-12).all()
        assert (found.p <= exact + 0.011).all()


@pytest.mark.parametrize("n_patients", [20, 75, 300])
def test_one_row_of_new_patients_of_the_same_kind_is_rarely_far(n_patients):
    """P-values of new patients are uniform or larger, though their views resemble each other."""
    p, far = [], []
    for seed in range(60):
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
    for seed in range(40):
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
    # along columns that training has no variance in, too: only the rest sees that
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
        {"quantiles": np.zeros(100)},
        {"quantiles": np.linspace(1, 0, 101)},
        {"quantiles": -np.ones(101)},
        {"quantiles": np.zeros((101, 1))},
        {"range": np.array([0.0, 5, 9])},
        {"range": np.array([1.0, 5])},
        {"range": np.array([1.0, 1, 1])},
        {"space_scale": np.ones(3)},
    ],
)
def test_damaged_references_are_refused(reference, change):
    with pytest.raises(ModelError, match="reference"):
        measure_remoteness({**reference, **change}, draw(4, 0)[0])


def test_a_reference_without_quantiles_is_refused(reference):
    with pytest.raises(ModelError, match="quantiles"):
        measure_remoteness({k: v for k, v in reference.items() if k != "quantiles"}, draw(4, 0)[0])


def test_rows_of_another_width_or_no_numbers_are_refused(reference):
    X, _ = draw(4, 0)
    with pytest.raises(ModelError, match="12 columns, these embeddings have 11"):
        measure_remoteness(reference, X[:, :11])
    X[1, 1] = np.inf
    with pytest.raises(TrainingDataError, match="not finite"):
        measure_remoteness(reference, X)
