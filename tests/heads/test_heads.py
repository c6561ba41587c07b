import threading

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from medembed.core.errors import TrainingDataError
from medembed.heads.baselines import ClassPrior, RegionPrior
from medembed.heads.knn import KNNHead
from medembed.heads.lightgbm import LightGBMHead
from medembed.heads.linear import LogisticHead
from medembed.heads.mlp import MLPHead
from medembed.heads.registry import HEADS, head_class, make_head
from medembed.heads.scaling import column_scaling

FAST = {
    "logistic": LogisticHead(C=1.0),
    "mlp": MLPHead(hidden=(32,), epochs=25, lr=1e-2, batch_size=32, dropout=0.0),
    "lightgbm": LightGBMHead(n_trees=30, learning_rate=0.2),
    "knn": KNNHead(40, whiten=0),
}


@parametrize_with_checks(list(FAST.values()))
def test_heads_are_scikit_learn_estimators(estimator, check):
    check(estimator)


def sample(n=400, d=20, seed=0, noise=1.0):
    generator = np.random.default_rng(seed)
    X = generator.normal(size=(n, d)).astype(np.float32)
    y = (X[:, :4].sum(axis=1) + noise * generator.normal(size=n) > 0).astype(int)
    return X, y


@pytest.fixture(params=sorted(FAST))
def head(request):
    return clone(FAST[request.param])


@pytest.fixture(params=["lightgbm", "mlp"])
def budgeted(request):
    return clone(FAST[request.param])


def with_dropout(head):
    if isinstance(head, MLPHead):
        head.set_params(dropout=0.3)


def test_heads_learn_what_is_there(head):
    X, y = sample(600)
    X_val, y_val = sample(300, seed=1)
    head.fit(X, y, X_val=X_val, y_val=y_val)
    assert roc_auc_score(y_val, head.predict_proba(X_val)[:, 1]) > 0.85


def test_300_rows_at_the_defaults_make_no_constant_predictor():
    X, y = sample(300, d=256)
    X_val, y_val = sample(300, d=256, seed=1)
    # k-nearest neighbours drown in 252 columns of noise
    for name in (own for own in HEADS if own != "knn" and not head_class(own).reads_words):
        fitted = make_head(name, {}).fit(X, y, X_val=X_val, y_val=y_val)
        assert roc_auc_score(y_val, fitted.predict_proba(X_val)[:, 1]) > 0.7, name


def test_the_same_seed_gives_the_same_bytes(head):
    X, y = sample()
    with_dropout(head)
    first, second = (clone(head).fit(X, y).predict_proba(X) for _ in "ab")
    assert first.tobytes() == second.tobytes()


def test_another_seed_gives_another_head(budgeted):
    X, y = sample(d=100)
    first, second = (
        clone(budgeted).set_params(random_state=seed).fit(X, y).predict_proba(X) for seed in (0, 1)
    )
    assert not np.array_equal(first, second)


def test_no_global_generator_or_thread_count_is_touched(head):
    X, y = sample()
    with_dropout(head)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), torch.get_num_threads()
    head.fit(X, y, X_val=X, y_val=y)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.get_num_threads() == before[2]


def test_a_head_trains_where_gradients_are_switched_off():
    X, y = sample()
    with torch.no_grad():
        quiet = clone(FAST["mlp"]).fit(X, y).predict_proba(X)
    assert np.array_equal(quiet, clone(FAST["mlp"]).fit(X, y).predict_proba(X))


def test_a_row_is_predicted_alike_in_any_company(head):
    X, y = sample(5000)
    head.fit(X[:300], y[:300])
    together = head.predict_proba(X)
    np.testing.assert_allclose(head.predict_proba(X[4990:]), together[4990:], atol=1e-12)


def test_training_rows_are_left_as_they_were(head):
    X, y = sample()
    kept = X.copy()
    X.flags.writeable = False
    head.fit(X, y, X_val=X, y_val=y).predict_proba(X)
    assert np.array_equal(X, kept)


def test_early_stopping_keeps_the_best_epoch_and_a_budget_of_it_repeats_it(budgeted):
    X, y = sample(noise=4.0)
    X_val, y_val = sample(seed=1, noise=4.0)
    budgeted.set_params(patience=4)
    stopped = clone(budgeted).fit(X, y, X_val=X_val, y_val=y_val)
    limit = budgeted.epochs if isinstance(budgeted, MLPHead) else budgeted.n_trees
    assert 1 <= stopped.best_epoch_ < limit
    again = budgeted.with_budget(stopped.best_epoch_).fit(X, y)
    assert again.best_epoch_ == stopped.best_epoch_
    assert np.array_equal(again.predict_proba(X_val), stopped.predict_proba(X_val))


def test_a_budget_is_spent_even_where_validation_rows_are_handed_over(budgeted):
    X, y = sample(noise=4.0)
    longer = budgeted.with_budget(20).fit(X, y, X_val=X[::-1], y_val=1 - y[::-1])
    assert longer.best_epoch_ == 20
    assert np.array_equal(
        longer.predict_proba(X), budgeted.with_budget(20).fit(X, y).predict_proba(X)
    )


def test_mlp_keeps_the_epoch_with_the_best_validation_score():
    X, y = sample(noise=4.0)
    X_val, y_val = sample(seed=1, noise=4.0)
    for stopping, sign in (("auroc", 1), ("loss", -1)):
        fitted = clone(FAST["mlp"]).set_params(stopping=stopping, patience=100, epochs=15)
        fitted.fit(X, y, X_val=X_val, y_val=y_val)
        seen = [sign * epoch[stopping] for epoch in fitted.history_]
        assert fitted.best_epoch_ == int(np.argmax(seen)) + 1
        assert len(seen) == 15
        auroc = roc_auc_score(y_val, fitted.predict_proba(X_val)[:, 1])
        assert auroc == pytest.approx(fitted.history_[fitted.best_epoch_ - 1]["auroc"], abs=1e-4)


def test_mlp_predicts_as_its_layers_in_torch():
    X, y = sample()
    fitted = MLPHead(hidden=(8, 5), epochs=2).fit(X, y)
    values = torch.from_numpy(fitted.projection_.apply(X))
    for weight, bias in zip(fitted.weights_[:-1], fitted.biases_[:-1], strict=True):
        values = torch.relu(values @ torch.from_numpy(weight) + torch.from_numpy(bias))
    logits = values @ torch.from_numpy(fitted.weights_[-1]) + torch.from_numpy(fitted.biases_[-1])
    expected = torch.sigmoid(logits)[:, 0].numpy()
    np.testing.assert_allclose(fitted.predict_proba(X)[:, 1], expected, atol=1e-6)


def test_mlp_without_hidden_layers_is_logistic_regression():
    X, y = sample(noise=3.0)
    linear = MLPHead(hidden=(), epochs=200, lr=0.02, batch_size=400, weight_decay=0).fit(X, y)
    oracle = LogisticHead(C=1e4).fit(X, y)
    np.testing.assert_allclose(linear.predict_proba(X), oracle.predict_proba(X), atol=0.02)


def test_dropout_is_a_matter_of_training_alone():
    X, y = sample()
    fitted = MLPHead(hidden=(16,), epochs=3, dropout=0.5).fit(X, y)
    assert np.array_equal(fitted.predict_proba(X), fitted.predict_proba(X))
    without = MLPHead(hidden=(16,), epochs=3, dropout=0.0).fit(X, y)
    assert not np.array_equal(fitted.predict_proba(X), without.predict_proba(X))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_logistic_equals_scikit_learns_pipeline(dtype):
    X, y = sample()
    X = (X * 3 + 5).astype(dtype)
    model = LogisticRegression(C=0.1, class_weight="balanced")
    oracle = make_pipeline(StandardScaler(), model).fit(X.astype(float), y)
    fitted = LogisticHead(C=0.1).fit(X, y)
    np.testing.assert_allclose(fitted.predict_proba(X), oracle.predict_proba(X), atol=1e-3)
    assert fitted.converged_
    assert not LogisticHead(C=0.1, max_iter=1).fit(X, y).converged_


def test_scaling_equals_scikit_learns_and_leaves_constant_columns_alone():
    X = np.random.default_rng(0).normal(3, 2, size=(5000, 4)).astype(np.float32)
    X[:, 1] = 0.1
    mean, scale = column_scaling(X)
    oracle = StandardScaler().fit(X.astype(float))
    np.testing.assert_allclose(mean, oracle.mean_, rtol=1e-6)
    np.testing.assert_allclose(scale, oracle.scale_, rtol=1e-6)
    assert scale[1] == 1


def test_class_weights_lift_the_rare_class(head):
    if isinstance(head, KNNHead):
        assert "class_weight" not in head.get_params()
        return
    brief = {"logistic": {}, "mlp": {"epochs": 3}, "lightgbm": {"learning_rate": 0.02}}
    head.set_params(**next(brief[name] for name in FAST if type(head) is type(FAST[name])))
    X, y = sample(600, noise=3.0)
    kept = np.flatnonzero((y == 0) | (np.arange(600) % 10 == 0))
    X, y = X[kept], y[kept]
    plain = clone(head).set_params(class_weight=None).fit(X, y).predict_proba(X)[:, 1]
    balanced = clone(head).set_params(class_weight="balanced").fit(X, y).predict_proba(X)[:, 1]
    assert plain.mean() == pytest.approx(y.mean(), abs=0.08)
    assert balanced.mean() > plain.mean() + 0.1


def test_lightgbm_gives_the_same_on_any_number_of_threads():
    X, y = sample(d=64)
    one, two = (LightGBMHead(n_trees=3, n_jobs=n).fit(X, y) for n in (1, 2))
    assert np.array_equal(one.predict_proba(X), two.predict_proba(X))


def test_heads_fit_in_threads_beside_each_other(head):
    X, y = sample()
    alone = clone(head).fit(X, y).predict_proba(X)
    fitted = [clone(head) for _ in range(3)]
    threads = [threading.Thread(target=one.fit, args=(X, y)) for one in fitted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(one.predict_proba(X), alone) for one in fitted)


def test_one_class_is_named(head):
    X, _ = sample(30)
    with pytest.raises(TrainingDataError, match="the 30 training rows hold one class, 1"):
        head.fit(X, np.ones(30, int))
    with pytest.raises(TrainingDataError, match=r"validation rows hold the classes \[0\]"):
        head.fit(X, np.arange(30) % 2, X_val=X, y_val=np.zeros(30, int))


def test_unlabelled_rows_are_refused_with_the_way_out(head):
    X, y = sample(30)
    y[3] = -1
    with pytest.raises(TrainingDataError, match="label -1"):
        head.fit(X, y)


def test_half_a_validation_set_is_refused(head):
    X, y = sample(30)
    with pytest.raises(TrainingDataError, match="together"):
        head.fit(X, y, X_val=X)


def test_parameters_out_of_range_are_named():
    X, y = sample(30)
    with pytest.raises(TrainingDataError, match=r"MLPHead: dropout=1.5 is out of range"):
        MLPHead(dropout=1.5).fit(X, y)
    with pytest.raises(TrainingDataError, match="stopping='accuracy'"):
        LightGBMHead(stopping="accuracy").fit(X, y)
    with pytest.raises(TrainingDataError, match="LightGBM refused"):
        LightGBMHead(feature_fraction=7.0).fit(X, y)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (MLPHead(batch_size=32.5), "batch_size"),
        (MLPHead(epochs=2.5), "epochs"),
        (MLPHead(hidden=(8.5,)), "hidden"),
        (LightGBMHead(patience=2.5), "patience"),
        (LogisticHead(pca=2.5), "pca"),
    ],
)
def test_counts_that_are_no_whole_numbers_are_named(head, name):
    with pytest.raises(TrainingDataError, match=f"{name}=.* is out of range"):
        head.fit(*sample(30))


def test_a_diverging_head_is_an_error_not_nan():
    X, y = sample(60)
    with pytest.raises(TrainingDataError, match="lower lr"):
        MLPHead(lr=1e30, hidden=(4, 4), epochs=20).fit(X, y)


def test_an_unknown_head_or_parameter_names_the_nearest():
    with pytest.raises(TrainingDataError, match=r"'lightgmb'; did you mean lightgbm\?"):
        make_head("lightgmb", {})
    with pytest.raises(TrainingDataError, match=r"no parameter 'droput'; did you mean dropout\?"):
        make_head("mlp", {"droput": 0.1})


def test_a_seed_and_threads_reach_the_heads_that_have_them():
    assert make_head("mlp", {}, seed=7).random_state == 7
    trees = make_head("lightgbm", {"n_trees": 3}, seed=7, n_jobs=2)
    assert (trees.random_state, trees.n_jobs, trees.n_trees) == (7, 2, 3)
    assert make_head("logistic", {}, seed=7).C == LogisticHead().C


def test_priors_are_shares_of_the_training_rows():
    regions, y = ["hand", "hand", "hand", "elbow"], [1, 0, 0, 1]
    assert ClassPrior().fit(regions, y).predict_proba(["foot"])[0, 1] == 0.5
    found = RegionPrior(strength=2).fit(regions, y).predict_proba(["hand", "elbow", "foot"])
    # (1 + 2 x 0.5) / (3 + 2), (1 + 1) / (1 + 2), and the overall prior for what was not seen
    np.testing.assert_allclose(found[:, 1], [0.4, 2 / 3, 0.5])
    np.testing.assert_allclose(found.sum(axis=1), 1)
    with pytest.raises(TrainingDataError, match="unlabelled"):
        RegionPrior().fit(["hand"], [-1])


@pytest.mark.parametrize("kind", [ClassPrior, RegionPrior])
def test_a_prior_of_counts_is_that_of_as_many_rows(kind):
    regions, y, n = ["hand", "hand", "elbow"], [1, 0, 0], [5, 2, 10**12]
    asked = ["hand", "elbow", "foot"]
    few = [5, 2, 3]
    rows = kind().fit(np.repeat(regions, few), np.repeat(y, few))
    counts = kind().fit(regions, y, sample_weight=few)
    assert np.array_equal(counts.predict_proba(asked), rows.predict_proba(asked))
    assert kind().fit(regions, y, n).predict_proba(["foot"])[0, 1] == pytest.approx(5e-12)
    with pytest.raises(TrainingDataError, match="one of each per row"):
        kind().fit(regions, y, few[:2])
