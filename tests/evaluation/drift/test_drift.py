"""Drift: chance is called chance about as often as it should be, and other images are noticed."""

import json

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.stats import binom

from medembed.core.errors import ModelError, TrainingDataError
from medembed.evaluation.drift.embedding_space import Space, frechet, learn_space
from medembed.evaluation.drift.reference import VERDICTS, fit_reference, measure_drift

WIDTH = 12


def make_patients(n, generator, *, most_views=3, mixing=None, regions=None):
    """Rows of patients whose views are alike: embeddings, whose they are, and of what."""
    patients = np.repeat(np.arange(n), generator.integers(1, most_views + 1, n))
    of_region = generator.choice(len(regions), n, p=regions) if regions else np.zeros(n, int)
    centres = 3 * np.eye(4, WIDTH)[of_region]
    own = generator.normal(size=(n, WIDTH)) + centres
    X = own[patients] + 0.5 * generator.normal(size=(len(patients), WIDTH))
    X = X if mixing is None else X @ mixing
    return X.astype(np.float32), patients, np.array(["abcd"[k] for k in of_region[patients]])


@pytest.fixture(scope="module")
def mixing():
    generator = np.random.default_rng(3)
    return generator.normal(size=(WIDTH, WIDTH)) * np.linspace(2, 0.1, WIDTH)


@pytest.fixture(scope="module")
def training(mixing):
    generator = np.random.default_rng(0)
    return make_patients(240, generator, mixing=mixing, regions=[0.4, 0.3, 0.2, 0.1])


@pytest.fixture(scope="module")
def reference(training):
    X, patients, regions = training
    return fit_reference(X, 0, patients=patients, regions=regions)


def measure(reference, rows):
    X, patients, regions = rows
    return measure_drift(reference, X, 0, patients=patients, regions=regions)


@pytest.mark.parametrize(("n_training", "n_new", "n"), [(36, 20, 120), (90, 90, 50)])
def test_two_halves_of_one_distribution_are_called_so_as_often_as_they_should(
    n_training, n_new, n, mixing
):
    alarms, tests = 0, {"distance": 0, "shift": 0, "outside": 0}
    for seed in range(n):
        generator = np.random.default_rng([seed, n_training])
        known = make_patients(n_training, generator, mixing=mixing)[:2]
        new = make_patients(n_new, generator, mixing=mixing)[:2]
        found = measure_drift(
            fit_reference(known[0], 0, patients=known[1]), new[0], 0, patients=new[1]
        )
        alarms += found["verdict"] != "none"
        for name in tests:
            tests[name] += found[name]["p"] <= 0.05
    # nor so shy that nothing would ever be said
    assert alarms <= binom.ppf(0.995, n, 0.05)
    assert all(count <= binom.ppf(0.999, n, 0.05) for count in tests.values()), tests
    assert sum(tests.values()) >= binom.ppf(0.01, n, 0.05), tests


def test_views_of_one_patient_are_not_taken_for_many_patients(mixing):
    """Rows as if each were a patient's raise false alarms; patients do not."""
    alarms = {"patients": 0, "rows": 0}
    for seed in range(10):
        generator = np.random.default_rng([seed, 77])
        X, patients, _ = make_patients(60, generator, most_views=8, mixing=mixing)
        Y, others, _ = make_patients(20, generator, most_views=8, mixing=mixing)
        reference = fit_reference(X, 0, patients=patients)
        alarms["patients"] += measure_drift(reference, Y, 0, patients=others)["verdict"] != "none"
        alarms["rows"] += measure_drift(fit_reference(X, 0), Y, 0)["verdict"] != "none"
    assert alarms["patients"] <= binom.ppf(0.999, 10, 0.05)
    assert alarms["rows"] > 6


def test_moved_rows_are_noticed_and_the_verdict_grows(training, reference, mixing):
    rows = make_patients(80, np.random.default_rng(5), mixing=mixing, regions=[0.4, 0.3, 0.2, 0.1])
    moved = np.ones(WIDTH, np.float32) * training[0].std(axis=0)
    found = [measure(reference, (rows[0] + by * moved, *rows[1:])) for by in (0, 0.3, 0.6, 3)]
    verdicts = [VERDICTS.index(own["verdict"]) for own in found]
    assert verdicts[0] == 0
    assert verdicts == sorted(verdicts)
    assert verdicts[-1] == 3
    assert found[-1]["outside"]["share"] > 0.9
    assert found[-1]["sentence"].startswith("Strong drift")
    assert found[0]["sentence"].startswith("No drift seen")


def test_inverted_and_flatter_rows_are_noticed(reference, mixing):
    X, *others = make_patients(
        80, np.random.default_rng(6), mixing=mixing, regions=[0.4, 0.3, 0.2, 0.1]
    )
    assert measure(reference, (-X, *others))["verdict"] != "none"
    # the mean stays: only the distance that knows of covariances can tell
    flat = measure(reference, ((X - X.mean(0)) * 0.4 + X.mean(0), *others))
    assert flat["verdict"] != "none"
    assert flat["shift"]["p"] > 0.05 >= flat["distance"]["p"]


def test_rows_off_the_directions_are_noticed():
    """Four directions are looked along; only their noise, across all of them, is another."""
    generator = np.random.default_rng(8)
    plane = generator.normal(size=(4, 40))

    def draw(n, noise):
        points = generator.normal(size=(n, 4)) @ plane
        return (points + noise * generator.normal(size=points.shape)).astype(np.float32)

    reference = fit_reference(draw(48, 0.1), 0)
    assert len(reference["space_directions"]) == 4
    assert measure_drift(reference, draw(40, 0.1), 0)["verdict"] == "none"
    assert measure_drift(reference, draw(40, 0.6), 0)["outside"]["share"] > 0.9


def test_one_absurd_row_is_one_patient_outside_and_no_drift(reference, mixing):
    generator = np.random.default_rng(5)
    X, *others = make_patients(
        60, generator, most_views=1, mixing=mixing, regions=[0.4, 0.3, 0.2, 0.1]
    )
    before = measure(reference, (X, *others))
    X[np.argmin(np.abs(X).sum(axis=1))] = 1e6
    found = measure(reference, (X, *others))
    assert found["outside"]["n"] == before["outside"]["n"] + 1
    assert (before["verdict"], found["verdict"]) == ("none", "none")


def test_the_chance_of_so_many_outside_is_that_of_shuffled_patients(training, reference, mixing):
    """Of N + n exchangeable distances, how often are so many of n beyond the rank-th of N?"""
    mix = [0.4, 0.3, 0.2, 0.1]
    rows = make_patients(40, np.random.default_rng(2), mixing=1.1 * mixing, regions=mix)
    outside = measure(reference, rows)["outside"]
    _, rank, n_known = reference["range"].astype(int)
    draws = np.random.default_rng(0).random((40_000, n_known + 40))
    limits = np.partition(draws[:, :n_known], rank - 1, axis=1)[:, [rank - 1]]
    counts = (draws[:, n_known:] > limits).sum(axis=1)
    assert outside["of"] == 40
    assert 0.001 < outside["p"] < 0.9
    assert outside["p"] == pytest.approx((counts >= outside["n"]).mean(), rel=0.1)
    assert outside["expected"] == pytest.approx(counts.mean() / 40, rel=0.03)
    assert outside["chance_high"] == pytest.approx(np.quantile(counts, 0.95) / 40, abs=0.026)


def test_another_mix_of_regions_is_noticed_and_named(reference, mixing):
    rows = make_patients(80, np.random.default_rng(5), mixing=mixing, regions=[0, 0.1, 0, 0.9])
    found = measure(reference, rows)
    assert found["verdict"] != "none"
    assert "The mix of regions differs, most in d" in found["sentence"]
    by_name = {entry["region"]: entry for entry in found["regions"]}
    assert by_name["a"]["n_patients"] == 0
    assert by_name["a"]["shift"] is None
    assert by_name["d"]["share"] > 0.8 > 0.2 > by_name["d"]["training_share"]
    assert found["within_regions"] < 0.5 < found["shift"]["value"]


def test_a_new_region_has_no_shift(reference, mixing):
    X, patients, regions = make_patients(30, np.random.default_rng(5), mixing=mixing)
    found = measure(reference, (X, patients, np.full(len(regions), "skull")))
    [skull] = [entry for entry in found["regions"] if entry["n_patients"]]
    assert (skull["region"], skull["training_share"], skull["shift"]) == ("skull", 0, None)
    assert found["within_regions"] is None


def test_the_columns_that_moved_are_named(training, reference, mixing):
    X, *others = make_patients(
        80, np.random.default_rng(6), mixing=mixing, regions=[0.4, 0.3, 0.2, 0.1]
    )
    X[:, 7] += 4 * training[0][:, 7].std()
    most = measure(reference, (X, *others))["columns"][0]
    assert most["column"] == 7
    assert most["shift"] == pytest.approx(4, abs=1)


def test_the_same_rows_give_the_same_answer_fit_for_json(training, reference):
    X, patients, regions = training
    again = fit_reference(X, 0, patients=patients, regions=regions)
    assert {name: array.tobytes() for name, array in again.items()} == {
        name: array.tobytes() for name, array in reference.items()
    }
    assert all(np.isfinite(array).all() for array in reference.values())
    found = measure(reference, training)
    assert json.loads(json.dumps(found, allow_nan=False)) == found == measure(again, training)


def test_no_row_is_kept(training, reference):
    kept = sum(array.size for array in reference.values())
    assert kept < training[0].size
    for array in reference.values():
        if array.ndim == 2 and array.shape[1] == WIDTH:
            assert not (array[:, None] == training[0][None]).all(axis=2).any()


def test_too_few_patients_are_said(training, reference):
    few = {name: rows[:4] for name, rows in zip("Xpr", training, strict=True)}
    found = measure_drift(reference, few["X"], 0, patients=few["p"], regions=few["r"])
    assert found["verdict"] is None
    assert "at least 5 are needed" in found["sentence"]
    small = fit_reference(training[0][:11], 0)
    assert measure_drift(small, training[0], 0)["verdict"] is None


def test_other_columns_and_damaged_references_are_refused(reference, training):
    X, _, regions = training
    with pytest.raises(ModelError, match="12 columns, these embeddings have 11"):
        measure_drift(reference, X[:, :11], 0)
    with pytest.raises(ModelError, match="lacks covariance"):
        measure_drift({k: v for k, v in reference.items() if k != "covariance"}, X, 0)
    with pytest.raises(ModelError, match="scale of shape"):
        measure_drift(reference | {"space_scale": np.ones(3)}, X, 0)
    with pytest.raises(ModelError, match="regions is damaged"):
        measure_drift(reference | {"region_counts": np.ones(9)}, X, 0, regions=regions)


def test_rows_that_do_not_fit_or_are_not_finite_are_refused(reference, training):
    X, patients, _ = training
    broken = X.copy()
    broken[3, 2] = np.nan
    for measure_rows in (fit_reference, lambda *args, **kw: measure_drift(reference, *args, **kw)):
        with pytest.raises(TrainingDataError, match="but 9 patients"):
            measure_rows(X, patients=patients[:9])
        with pytest.raises(TrainingDataError, match="not finite"):
            measure_rows(broken, patients=patients)


@pytest.mark.parametrize("kind", ["empty", "scalar", "zeros", "twice", "below zero"])
def test_a_damaged_reference_is_one_error_or_measured(kind, reference, training):
    X, patients, regions = training
    changes = {
        "empty": lambda array: array[:0],
        "scalar": lambda array: np.array(1.0),
        "zeros": np.zeros_like,
        "twice": lambda array: np.concatenate([array, array]),
        "below zero": lambda array: -np.abs(array.astype(float)) - 1,
    }
    harmless = {"quantiles", "mean", "covariance", "column_mean"}
    harmless |= {name for name in reference if name.startswith("remote_")}  # see test_remoteness
    harmless |= {"space_centre", "space_directions", "region_means", "region_spreads"}
    assert not reference["space_rest"].size  # the directions span all twelve columns
    harmless |= {"space_rest", "parts"} if kind == "zeros" else {"space_rest"}
    for name in reference:
        damaged = reference | {name: changes[kind](reference[name])}
        try:
            found = measure_drift(damaged, X, 0, patients=patients, regions=regions)
        except ModelError:
            continue
        assert name in harmless, name
        json.dumps(found, allow_nan=False)


def test_the_distance_is_frechets():
    generator = np.random.default_rng(0)
    A, B = (np.cov(generator.normal(size=(9, 4)), rowvar=False) for _ in range(2))
    a, b = generator.normal(size=(2, 4))
    expected = ((a - b) ** 2).sum() + np.trace(A + B - 2 * sqrtm(A @ B).real)
    assert frechet(a, A, b, B) == pytest.approx(expected)
    assert frechet(a, A, a, A) == pytest.approx(0, abs=1e-12)
    both = frechet(np.stack([a, b]), np.stack([A, B]), np.stack([b, b]), np.stack([B, B]))
    assert both == pytest.approx([expected, 0], abs=1e-12)


def test_the_directions_are_the_principal_ones():
    generator = np.random.default_rng(0)
    X = (
        generator.normal(size=(400, 30))
        @ np.diag([9, 6, 4, *[0.5] * 27])
        @ np.linalg.qr(generator.normal(size=(30, 30)))[0]
    ).astype(np.float32)
    space = learn_space(X, X, generator, k=3)
    Z = (X - space.centre) / space.scale
    principal = np.linalg.svd(Z - Z.mean(axis=0), full_matrices=False)[2][:3]
    assert np.abs(np.linalg.det(principal @ space.directions.T)) == pytest.approx(1, abs=1e-4)
    points = Space.from_arrays(space.as_arrays()).project(X)
    assert points.shape == (400, 4)
    assert points.std(axis=0) == pytest.approx(np.ones(4), rel=0.01)
