import hashlib
import json
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from medembed.core.errors import ModelError, TrainingDataError
from medembed.heads.attention import AttentionHead, _forward, _loss, _shapes
from medembed.heads.bags import Batch, study_codes
from medembed.heads.packaging import load_model, save_model
from medembed.heads.registry import make_head
from medembed.heads.scaling import Projector

FAST = AttentionHead(hidden=16, epochs=25, lr=1e-2, batch_size=32, dropout=0.0)
#: Every part in use: cells, components, covariates.
FULL = AttentionHead(hidden=5, n_cells=3, n_covariates=2, pca=4, epochs=3, batch_size=16)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads wait for each other longer than they work on tensors as small as these."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@parametrize_with_checks([FAST])
def test_attention_is_a_scikit_learn_estimator(estimator, check):
    check(estimator)


def sample(n_studies=300, n_cells=1, n_covariates=0, width=10, seed=0, signal=3.5):
    """Studies of 4 to 7 views: one vector of an abnormal study is moved, all else is noise.

    Returns X, y, studies, and the (row, cell) of each abnormal study's moved vector.
    """
    generator = np.random.default_rng(seed)
    studies = np.repeat(np.arange(n_studies), generator.integers(4, 8, n_studies))
    cells = generator.normal(size=(len(studies), n_cells, width))
    labels = np.arange(n_studies) % 2
    moved = [
        (generator.choice(np.flatnonzero(studies == study)), generator.integers(n_cells))
        for study in np.flatnonzero(labels)
    ]
    for row, cell in moved:
        cells[row, cell, 0] += signal
    covariates = generator.normal(size=(len(studies), n_covariates))
    X = np.hstack([cells.reshape(len(studies), -1), covariates]).astype(np.float32)
    return X, labels[studies], studies, moved


def means(X, studies):
    return np.stack([X[studies == study].mean(axis=0) for study in np.unique(studies)])


@pytest.fixture(scope="module")
def full():
    X, y, studies, _ = sample(60, n_cells=3, n_covariates=2, width=6)
    return clone(FULL).fit(X, y, studies=studies), X, studies


def oracle(head, X, studies):
    """The formula, study by study: probabilities, and the weight of each row's cells."""
    weights = {name: array.astype(float) for name, array in head.weights_.items()}
    projection, n_cells = head.projection_, head.n_cells
    embedded = X.shape[1] - head.n_covariates
    probabilities, attention = [], np.zeros((len(X), n_cells))
    for study in np.unique(studies):
        rows = np.flatnonzero(studies == study)
        h = X[rows, :embedded].reshape(len(rows) * n_cells, -1).astype(float)
        h = (h - projection.mean) / projection.scale
        if projection.components is not None:
            h = h @ projection.components.astype(float)
        value = np.tanh(h @ weights["gate.V.weight"].T + weights["gate.V.bias"])
        gate = 1 / (1 + np.exp(-(h @ weights["gate.U.weight"].T + weights["gate.U.bias"])))
        a = np.exp((value * gate) @ weights["gate.w"])
        a /= a.sum()
        attention[rows] = a.reshape(len(rows), n_cells)
        covariates = (X[rows, embedded:] - head.covariates_.mean) / head.covariates_.scale
        z = np.concatenate([a @ h, covariates.mean(axis=0)])
        logit = z @ weights["classifier.weight"] + weights["classifier.bias"][0]
        probabilities.append(1 / (1 + np.exp(-logit)))
    return np.array(probabilities), attention


def test_prediction_and_attention_are_the_formula_study_by_study(full):
    head, X, studies = full
    shuffled = np.random.default_rng(1).permutation(len(X))
    X, studies = X[shuffled], studies[shuffled]
    probabilities, attention = oracle(head, X, studies)
    np.testing.assert_allclose(head.predict_proba(X, studies)[:, 1], probabilities, atol=1e-12)
    np.testing.assert_allclose(head.attention(X, studies), attention, atol=1e-12)


def test_attention_sums_to_one_in_each_study(full):
    head, X, studies = full
    attention = head.attention(X, studies)
    assert attention.shape == (len(X), 3)
    assert attention.dtype == np.float64
    assert (attention > 0).all()
    np.testing.assert_allclose(np.bincount(studies, attention.sum(axis=1)), 1, atol=1e-12)


def test_blocks_hold_whole_studies(full, monkeypatch):
    head, X, studies = full
    whole, attention = head.predict_proba(X, studies), head.attention(X, studies)
    for n_vectors in (1, 7, 40):
        monkeypatch.setattr("medembed.heads.bags._BLOCK_VECTORS", n_vectors)
        np.testing.assert_allclose(head.predict_proba(X, studies), whole, atol=1e-12)
        np.testing.assert_allclose(head.attention(X, studies), attention, atol=1e-12)


def test_a_study_is_predicted_alike_in_any_company(full):
    head, X, studies = full
    together = head.predict_proba(X, studies)
    for study in (0, 17, 59):
        alone = head.predict_proba(X[studies == study], studies[studies == study])
        np.testing.assert_allclose(alone, together[[study]], atol=1e-12)


def test_the_logits_in_training_are_those_of_prediction(full):
    head, X, studies = full
    batch, weights = batch_of(head, X, studies)
    probabilities = torch.sigmoid(_forward(batch, weights)).detach().numpy()
    np.testing.assert_allclose(probabilities, head.predict_proba(X, studies)[:, 1], atol=1e-12)


def test_the_gradient_of_the_loss_is_that_of_finite_differences(full):
    head, X, studies = full
    kept = studies < 6
    X, studies = X[kept], studies[kept]
    batch, weights = batch_of(head, X, studies)
    _loss(_forward(batch, weights), batch).backward()
    y, step = batch.targets.numpy(), 1e-6
    by_hand = clone(head)
    by_hand.projection_, by_hand.covariates_ = head.projection_, head.covariates_
    for name, tensor in weights.items():
        numeric = np.zeros(tensor.shape)
        for place in np.ndindex(numeric.shape):
            losses = []
            for sign in (1, -1):
                by_hand.weights_ = {
                    key: array.astype(float) for key, array in head.weights_.items()
                }
                by_hand.weights_[name][place] += sign * step
                losses.append(log_loss(y, oracle(by_hand, X, studies)[0]))
            numeric[place] = (losses[0] - losses[1]) / (2 * step)
        np.testing.assert_allclose(tensor.grad.numpy(), numeric, atol=1e-7, err_msg=name)


def batch_of(head, X, studies):
    """Return all studies as one float64 batch of weight 1, and the head's weights."""
    embedded = X.shape[1] - head.n_covariates
    cells = X[:, :embedded].reshape(len(X) * head.n_cells, -1)
    covariates = means(head.covariates_.apply(X[:, embedded:], np.float64), studies)
    arrays = (
        head.projection_.apply(cells, np.float64),
        np.repeat(np.unique(studies, return_inverse=True)[1], head.n_cells),
        covariates,
        np.arange(len(covariates)) % 2.0,
        np.ones(len(covariates)),
    )
    weights = {
        name: torch.from_numpy(array.astype(float)).requires_grad_()
        for name, array in head.weights_.items()
    }
    return Batch(*(torch.from_numpy(array) for array in arrays)), weights


def test_scores_of_any_size_give_finite_weights():
    shapes = _shapes(3, 2, 0)
    weights = {name: torch.full(shape, 900.0) for name, shape in shapes.items()}
    cells, owners = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [2.0, 0.0]]), torch.tensor([0, 0, 1])
    batch = Batch(cells, owners, torch.zeros(2, 0), torch.zeros(2), torch.ones(2))
    assert torch.equal(_forward(batch, weights), torch.tensor([2700.0, 2700.0]))


def test_a_single_view_has_all_attention():
    X, y, studies, _ = sample(60)
    head = clone(FAST).fit(X, y, studies=studies)
    assert (head.attention(X) == 1).all()
    assert head.predict_proba(X).shape == (len(X), 2)


def test_without_studies_every_row_is_one():
    X, y, *_ = sample(60)
    head, named = clone(FAST).fit(X, y), clone(FAST).fit(X, y, studies=np.arange(len(X)))
    assert np.array_equal(head.predict_proba(X), named.predict_proba(X, np.arange(len(X))))


def test_single_views_make_it_logistic_regression():
    X, y, *_ = sample(100)
    head = AttentionHead(epochs=300, lr=0.02, batch_size=1000, weight_decay=0, dropout=0).fit(X, y)
    model = LogisticRegression(C=1e4, class_weight="balanced").fit(X, y)
    np.testing.assert_allclose(head.predict_proba(X), model.predict_proba(X), atol=0.02)


@pytest.mark.parametrize("n_cells", [1, 3])
def test_a_sign_on_one_view_or_cell_is_found_better_than_by_mean_pooling(n_cells):
    X, y, studies, _ = sample(400, n_cells)
    X_test, y_test, studies_test, moved = sample(400, n_cells, seed=1)
    head = clone(FAST).set_params(n_cells=n_cells).fit(X, y, studies=studies)
    pooled = LogisticRegression(C=0.1).fit(means(X, studies), means(y, studies))
    truth = means(y_test, studies_test)
    found = roc_auc_score(truth, head.predict_proba(X_test, studies_test)[:, 1])
    by_mean = roc_auc_score(truth, pooled.predict_proba(means(X_test, studies_test))[:, 1])
    assert found > 0.85
    assert found > by_mean + 0.08
    attention = head.attention(X_test, studies_test)
    on_sign = np.mean([attention[place] for place in moved])
    assert on_sign > 2 * attention[y_test == 1].mean()


def test_a_study_is_as_abnormal_as_its_worst_row():
    X, y, studies, moved = sample(200)
    by_view = np.zeros_like(y)
    by_view[[row for row, _ in moved]] = 1
    first = clone(FAST).fit(X, y, studies=studies)
    second = clone(FAST).fit(X, by_view, studies=studies)
    assert np.array_equal(first.predict_proba(X, studies), second.predict_proba(X, studies))


def test_covariates_are_learnt_from():
    X, y, studies, _ = sample(200, n_covariates=1, signal=0)
    X[:, -1] += 3 * y
    head = clone(FAST).set_params(n_covariates=1).fit(X, y, studies=studies)
    X, y, studies, _ = sample(200, n_covariates=1, signal=0, seed=1)
    X[:, -1] += 3 * y
    found = head.predict_proba(X, studies)[:, 1]
    assert roc_auc_score(means(y, studies), found) > 0.85


def test_the_order_of_rows_in_a_study_does_not_matter(full):
    head, X, studies = full
    order = np.lexsort([np.random.default_rng(0).random(len(X)), studies])
    assert not np.array_equal(order, np.arange(len(X)))
    expected = head.predict_proba(X, studies)
    np.testing.assert_allclose(head.predict_proba(X[order], studies), expected, atol=1e-9)
    np.testing.assert_allclose(
        head.attention(X[order], studies), head.attention(X, studies)[order], atol=1e-9
    )
    # and the first views of all studies, then the second ones, and so on
    interleaved = np.lexsort([studies, np.arange(len(X)) - np.searchsorted(studies, studies)])
    for rows in (order, interleaved):
        again = clone(FULL).fit(X[rows], studies[rows] % 2, studies=studies[rows])
        np.testing.assert_allclose(again.predict_proba(X, studies), expected, atol=1e-4)


def test_the_names_of_studies_do_not_matter(full):
    head, X, studies = full
    names = np.random.default_rng(0).permutation(60)
    renamed = np.array([f"study {name}" for name in names])[studies]
    place = {name: k for k, name in enumerate(np.unique(renamed))}
    as_before = [place[f"study {name}"] for name in names]
    expected = head.predict_proba(X, studies)
    for given in (renamed, renamed.astype(object), renamed.tolist()):
        np.testing.assert_allclose(head.predict_proba(X, given)[as_before], expected, atol=1e-9)
    assert np.array_equal(head.predict(X, renamed)[as_before], head.predict(X, studies))
    again = clone(FULL).fit(X, studies % 2, studies=renamed)
    assert again.predict_proba(X, studies).tobytes() == expected.tobytes()


def test_the_projection_is_learnt_from_cells_as_rows(full):
    head, X, _ = full
    cells = X[:, :18].reshape(-1, 6)
    expected = Projector(cells).learn("standard", 4)
    assert np.array_equal(head.projection_.mean, expected.mean)
    assert np.array_equal(head.projection_.components, expected.components)
    np.testing.assert_allclose(head.covariates_.mean, X[:, 18:].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(head.covariates_.scale, X[:, 18:].std(axis=0), rtol=1e-5)


def test_components_taken_once_train_as_components_taken_at_every_step(full, monkeypatch):
    head, X, studies = full
    monkeypatch.setattr("medembed.heads.bags._BLOCK_VECTORS", 50)
    once = clone(FULL).fit(X, studies % 2, studies=studies).predict_proba(X, studies)
    monkeypatch.setattr("medembed.heads.bags.Studies.mapped", lambda studies: studies)
    each = clone(FULL).fit(X, studies % 2, studies=studies).predict_proba(X, studies)
    np.testing.assert_allclose(once, each, atol=1e-5)
    np.testing.assert_allclose(once, head.predict_proba(X, studies), atol=1e-5)


@pytest.mark.parametrize(("n_covariates", "share"), [(0, 0.5), (1, 0.9)])
def test_no_float64_copy_of_all_rows_is_made(n_covariates, share):
    X, y, studies, _ = sample(500, n_cells=16, n_covariates=n_covariates, width=128)
    X = X.astype(np.float64)
    head = AttentionHead(4, n_cells=16, n_covariates=n_covariates, epochs=1)
    tracemalloc.start()
    head.fit(X, y, X_val=X, y_val=y, studies=studies, studies_val=studies)
    head.predict_proba(X, studies)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < share * X.nbytes


def fit_noisy(head, **changes):
    X, y, studies, _ = sample(signal=1.5)
    X_val, y_val, studies_val, _ = sample(seed=1, signal=1.5)
    handed = {"X_val": X_val, "y_val": y_val, "studies_val": studies_val} | changes
    return head.fit(X, y, studies=studies, **handed), X_val, y_val, studies_val


@pytest.mark.parametrize("params", [{}, {"pca": 6}])
def test_early_stopping_keeps_the_best_epoch_and_a_budget_of_it_repeats_it(params):
    head = clone(FAST).set_params(patience=4, dropout=0.25, **params)
    stopped, X_val, y_val, studies_val = fit_noisy(clone(head))
    assert 1 <= stopped.best_epoch_ < len(stopped.history_) < 25
    again = fit_noisy(head.with_budget(stopped.best_epoch_), X_val=None, y_val=None)[0]
    assert again.best_epoch_ == stopped.best_epoch_
    assert np.array_equal(
        again.predict_proba(X_val, studies_val), stopped.predict_proba(X_val, studies_val)
    )
    spent = fit_noisy(head.with_budget(stopped.best_epoch_), y_val=1 - y_val)[0]
    assert np.array_equal(
        again.predict_proba(X_val, studies_val), spent.predict_proba(X_val, studies_val)
    )


@pytest.mark.parametrize(("stopping", "sign"), [("auroc", 1), ("loss", -1)])
def test_the_epoch_with_the_best_validation_score_of_studies_is_kept(stopping, sign):
    head = clone(FAST).set_params(stopping=stopping, patience=100, epochs=12)
    fitted, X_val, y_val, studies_val = fit_noisy(head)
    seen = [sign * epoch[stopping] for epoch in fitted.history_]
    assert fitted.best_epoch_ == int(np.argmax(seen)) + 1
    assert len(seen) == 12
    kept, truth = fitted.history_[fitted.best_epoch_ - 1], means(y_val, studies_val)
    positive = fitted.predict_proba(X_val, studies_val)[:, 1]
    assert kept["auroc"] == pytest.approx(roc_auc_score(truth, positive), abs=1e-4)
    # the classes are even, so balanced weights are 1
    assert kept["loss"] == pytest.approx(log_loss(truth, positive), abs=1e-5)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not():
    X, y, studies, _ = sample(100)
    first, second, other = (
        clone(FAST)
        .set_params(dropout=0.25, random_state=seed)
        .fit(X, y, studies=studies)
        .predict_proba(X, studies)
        for seed in (0, 0, 1)
    )
    assert first.tobytes() == second.tobytes()
    assert not np.array_equal(first, other)


def test_no_global_generator_is_touched_and_gradients_may_be_off():
    X, y, studies, _ = sample(60)
    head = clone(FAST).set_params(dropout=0.25)
    expected = clone(head).fit(X, y, studies=studies).predict_proba(X, studies)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    with torch.no_grad():
        head.fit(X, y, X_val=X, y_val=y, studies=studies)
        quiet = clone(head).fit(X, y, studies=studies).predict_proba(X, studies)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert np.array_equal(quiet, expected)


@pytest.mark.parametrize(
    ("class_weight", "weights"),
    [("balanced", [200 / 350, 4.0]), ({0: 1.0, 1: 3.0}, [1.0, 3.0]), (None, [1.0, 1.0])],
)
def test_class_weights_count_studies(class_weight, weights):
    X, _, studies, _ = sample(200)
    labels = (np.arange(200) % 8 == 0).astype(int)
    # so small a step leaves the start as it is, and the loss of the epoch is that of the head
    head = clone(FAST).set_params(lr=1e-12, epochs=1, class_weight=class_weight)
    head.fit(X, labels[studies], studies=studies)
    positive = head.predict_proba(X, studies)[:, 1]
    losses = -np.log(np.where(labels == 1, positive, 1 - positive))
    expected = np.mean(np.take(weights, labels) * losses)
    assert head.history_[0]["train_loss"] == pytest.approx(expected, rel=1e-5)


def test_training_rows_are_left_as_they_were(full):
    _, X, studies = full
    kept, X = X, X.copy()
    X.flags.writeable = False
    y = studies % 2
    clone(FULL).fit(X, y, X_val=X, y_val=y, studies=studies, studies_val=studies)
    assert np.array_equal(X, kept)


def test_columns_in_any_layout_give_the_same_head(full):
    head, X, studies = full
    for laid_out in (np.asfortranarray(X), X.astype(np.float64)):
        again = clone(FULL).fit(laid_out, studies % 2, studies=studies)
        expected = head.predict_proba(X, studies)
        np.testing.assert_allclose(again.predict_proba(X, studies), expected, atol=1e-4)


@pytest.fixture
def saved(full, tmp_path):
    save_model(tmp_path / "model", full[0], {})
    return tmp_path / "model"


def test_a_loaded_head_predicts_the_same_bytes(full, saved):
    head, X, studies = full
    loaded = load_model(saved).head
    assert loaded.predict_proba(X, studies).tobytes() == head.predict_proba(X, studies).tobytes()
    assert loaded.attention(X, studies).tobytes() == head.attention(X, studies).tobytes()
    assert loaded.get_params() == head.get_params()
    assert isinstance(make_head("attention", {}), AttentionHead)


def test_a_head_of_single_vectors_survives_too(tmp_path):
    X, y, studies, _ = sample(60)
    head = clone(FAST).fit(X, y, studies=studies)
    save_model(tmp_path / "model", head, {})
    loaded = load_model(tmp_path / "model").head
    assert loaded.predict_proba(X, studies).tobytes() == head.predict_proba(X, studies).tobytes()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mean", lambda array: array[:-1]),
        ("scale", np.zeros_like),
        ("components", lambda array: array[:-1]),
        ("components", lambda array: np.hstack([array, array])),
        ("gate.V.weight", lambda array: array.T.copy()),
        ("gate.U.bias", lambda array: array * np.nan),
        ("gate.w", lambda array: array.astype(np.float64)),
        ("classifier.weight", lambda array: array[:-1]),
        ("covariates.scale", np.zeros_like),
        ("covariates.mean", lambda array: None),
    ],
)
def test_tensors_that_do_not_fit_are_refused_even_with_the_right_hash(saved, name, change):
    arrays = safetensors.numpy.load((saved / "head.safetensors").read_bytes())
    arrays[name] = change(arrays[name])
    data = safetensors.numpy.save({key: a for key, a in arrays.items() if a is not None})
    (saved / "head.safetensors").write_bytes(data)
    document = json.loads((saved / "model.json").read_text())
    document["payload"] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (saved / "model.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match=r"tensor \S+ (is|holds)|the model holds"):
        load_model(saved)


@pytest.mark.parametrize(
    "params", [{"hidden": 10**12}, {"hidden": "wide"}, {"n_cells": 4}, {"n_cells": 2.0}, {"pca": 3}]
)
def test_parameters_that_are_not_the_tensors_are_refused(saved, params):
    document = json.loads((saved / "model.json").read_text())
    document["params"] |= params
    (saved / "model.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match="cannot be used"):
        load_model(saved)


def test_one_class_is_named():
    X, y, studies, _ = sample(30)
    with pytest.raises(TrainingDataError, match="training rows hold one class, 1"):
        clone(FAST).fit(X, np.ones(len(X), int), studies=studies)
    mixed = np.arange(len(X)) % 2
    with pytest.raises(TrainingDataError, match="the 30 training studies hold one class, 1"):
        clone(FAST).fit(X, mixed, studies=studies)
    handed = {"X_val": X, "studies": studies, "studies_val": studies}
    with pytest.raises(TrainingDataError, match="the 30 validation studies hold one class, 1"):
        clone(FAST).fit(X, y, y_val=mixed, **handed)


def test_studies_are_numbered_by_name_or_by_first_row():
    names = ["c", "a", "c", "b", "a"]
    assert study_codes(names, 5).tolist() == [2, 0, 2, 1, 0]
    assert study_codes(names, 5, by_name=False).tolist() == [0, 1, 0, 2, 1]
    assert study_codes([30, -1, 30], 3, by_name=False).tolist() == [0, 1, 0]
    assert study_codes(None, 3).tolist() == [0, 1, 2]


def test_studies_that_do_not_fit_the_rows_are_refused():
    X, y, studies, _ = sample(30)
    n = len(X)
    with pytest.raises(TrainingDataError, match=rf"shape \({n - 1},\), X has {n} rows"):
        clone(FAST).fit(X, y, studies=studies[1:])
    with pytest.raises(TrainingDataError, match=rf"shape \({n - 1},\), X has {n} rows"):
        clone(FAST).fit(X, y, X_val=X, y_val=y, studies=studies, studies_val=studies[1:])
    fitted = clone(FAST).fit(X, y, studies=studies)
    for ask in (fitted.predict_proba, fitted.predict, fitted.attention):
        with pytest.raises(TrainingDataError, match=rf"shape \({n}, 1\), X has {n} rows"):
            ask(X, studies[:, None])


def test_a_row_without_a_study_is_refused():
    X, y, studies, _ = sample(30)
    some = np.array([None if study == 3 else f"s{study}" for study in studies])
    for missing in (some, np.where(studies == 3, np.nan, studies)):
        with pytest.raises(TrainingDataError, match="none missing"):
            clone(FAST).fit(X, y, studies=missing)


def test_cells_that_do_not_divide_the_columns_are_refused_with_the_numbers():
    X, y, *_ = sample(30)
    text = (
        "X has 10 columns, 9 of them beside n_covariates=1; those are not n_cells=4 cells of equal"
    )
    with pytest.raises(TrainingDataError, match=text):
        AttentionHead(n_cells=4, n_covariates=1).fit(X, y)
    with pytest.raises(TrainingDataError, match="0 of them beside n_covariates=10"):
        AttentionHead(n_covariates=10).fit(X, y)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden", 0),
        ("n_cells", 1.5),
        ("n_covariates", -1),
        ("pca", -1),
        ("scaling", "robust"),
        ("dropout", 1.0),
        ("lr", 0),
        ("batch_size", 0),
        ("patience", 0),
        ("stopping", "accuracy"),
    ],
)
def test_parameters_out_of_range_are_named(name, value):
    X, y, *_ = sample(30)
    with pytest.raises(TrainingDataError, match=f"AttentionHead: {name}={value!r} is out of range"):
        AttentionHead(**{name: value}).fit(X, y)


def test_a_diverging_head_is_an_error_not_nan():
    X, y, studies, _ = sample(60)
    with pytest.raises(TrainingDataError, match="lower lr"):
        clone(FAST).set_params(lr=1e30).fit(X, y, studies=studies)
