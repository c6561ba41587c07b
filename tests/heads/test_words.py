"""Heads that read words: the prompts' ranking, the path between it and logistic regression."""

import numpy as np
import pytest
from made_words import make_prompts
from scipy.stats import spearmanr
from sklearn.base import clone
from sklearn.metrics import roc_auc_score

from medembed.core.errors import ModelError, TrainingDataError
from medembed.core.prompts import PromptEntry, Prompts, read_prompts, write_prompts
from medembed.heads.linear import LogisticHead
from medembed.heads.packaging import load_model, save_model
from medembed.heads.words import TextLogisticHead, ZeroShotHead

WIDTH = 24


def draw(n=200, seed=0, *, cosine=0.7):
    """Images on both sides of a direction, labels, and prompts that point roughly along it."""
    generator = np.random.default_rng(seed)
    true, error = generator.normal(size=(2, WIDTH))
    true /= np.linalg.norm(true)
    error -= error @ true * true
    error /= np.linalg.norm(error)
    y = generator.permutation(np.arange(n) % 2)
    X = generator.normal(size=(n, WIDTH)) + np.outer(2 * y - 1, true)
    words = make_prompts(cosine * true + np.sqrt(1 - cosine**2) * error)
    return X.astype(np.float32), y, words


def auroc(head, X, y):
    return roc_auc_score(y, head.predict_proba(X)[:, 1])


def test_zero_shot_is_the_softmax_of_the_classes_logits():
    X, y, words = draw()
    head = ZeroShotHead(words=words).fit(X, y)
    classes = np.stack([words.text[:2].mean(axis=0), words.text[2:4].mean(axis=0)])
    units = classes / np.linalg.norm(classes, axis=1, keepdims=True)
    logits = 10 * (X / np.linalg.norm(X, axis=1, keepdims=True)) @ units.T
    expected = np.exp(logits[:, 1]) / np.exp(logits).sum(axis=1)
    assert np.allclose(head.predict_proba(X)[:, 1], expected, atol=1e-6)


def test_zero_shot_looks_at_no_label():
    X, y, words = draw()
    one, other = (ZeroShotHead(words=words).fit(X, own) for own in (y, 1 - y))
    assert np.array_equal(one.predict_proba(X), other.predict_proba(X))


def test_the_path_ends_in_zero_shot():
    X, y, words = draw()
    zero = ZeroShotHead(words=words).fit(X, y).predict_logit(X)
    for C in (0.0, 1e-12):
        head = TextLogisticHead(C, words=words).fit(X, y)
        assert spearmanr(head.predict_logit(X), zero).statistic == pytest.approx(1)


def test_without_strength_it_is_logistic_regression():
    X, y, words = draw()
    plain = LogisticHead(C=0.01, tol=1e-8, max_iter=1000).fit(X, y)
    head = TextLogisticHead(0.01, strength=1e-9, words=words, max_iter=1000).fit(X, y)
    assert np.allclose(head.predict_proba(X), plain.predict_proba(X), atol=1e-3)


def test_the_mode_of_the_posterior_is_reached():
    """The loss of the docstring, with the fitted values moved in any direction, is no lower."""
    X, y, words = draw(80)
    head = TextLogisticHead(0.05, strength=0.5, words=words, class_weight=None).fit(X, y)
    z = (X - head.mean_) / head.scale_
    centre, spread, strength, b = head.margin_
    prior = strength * (head.margins(X) - centre) / spread

    def loss(b, w):
        logit = b + prior + z @ w
        return (np.logaddexp(0, logit) - y * logit).sum() + w @ w / (2 * 0.05)

    generator, best = np.random.default_rng(0), loss(b, head.coef_)
    for _ in range(50):
        step = 1e-2 * generator.normal(size=WIDTH + 1)
        assert loss(b + step[0], head.coef_ + step[1:]) > best


@pytest.mark.parametrize("n", [10, 20, 100])
def test_with_few_labels_a_prior_of_words_is_no_worse(n):
    """At the defaults, over 20 draws: `bench/words.py` has the choice of a sweep as well."""
    against = {"zero-shot": [], "logistic": []}
    for seed in range(20):
        X, y, words = draw(n + 500, seed)
        train, test = slice(n), slice(n, None)
        own = auroc(TextLogisticHead(words=words).fit(X[train], y[train]), X[test], y[test])
        zero = ZeroShotHead(words=words).fit(X[train], y[train])
        plain = LogisticHead().fit(X[train], y[train])
        against["zero-shot"].append(own - auroc(zero, X[test], y[test]))
        against["logistic"].append(own - auroc(plain, X[test], y[test]))
    for name, differences in against.items():
        half = 2.09 * np.std(differences, ddof=1) / np.sqrt(20)
        assert np.mean(differences) + half >= 0, name
    assert np.mean(against["zero-shot"]) > 0
    assert n == 100 or np.mean(against["logistic"]) > 0.02


def with_regions(words):
    entries = [
        PromptEntry(set="right", label=e.label, region=("hand", "wrist")[i % 2], text=e.text)
        for i, e in enumerate(words.document.prompts[:4])
    ]
    return Prompts(words.document.model_copy(update={"prompts": entries}), words.text[:4])


def test_a_row_has_the_prompts_of_its_region():
    X, y, words = draw(30)
    words = with_regions(words)
    words.text[1::2] *= -1  # the wrist's point the other way
    encoded = np.zeros((30, 3), np.float32)
    encoded[np.arange(30), np.arange(30) % 3] = 1  # age is missing, wrist, hand
    wide = np.hstack([X, encoded])
    head = ZeroShotHead(words=words, n_covariates=3, region_columns={"wrist": 1, "hand": 2})
    margins = head.fit(wide, y).margins(wide)
    units = X / np.linalg.norm(X, axis=1, keepdims=True)
    directions, names = words.directions()
    assert names == ("hand", "wrist")
    for row in range(30):
        own = (0, 2, 1)[row % 3]
        assert margins[row] == pytest.approx(units[row] @ directions[own])


@pytest.mark.parametrize("head", [ZeroShotHead(), TextLogisticHead(0.01)])
@pytest.mark.parametrize("projected", [False, True])
def test_a_packaged_head_predicts_without_the_prompts(head, projected, tmp_path):
    X, y, words = draw(60)
    if projected:
        projection = np.random.default_rng(1).normal(size=(WIDTH, 7)).astype(np.float32)
        words, X = Prompts(words.document, words.text, projection), X[:, :7]
    fitted = clone(head).set_params(words=words).fit(X, y)
    save_model(tmp_path / "model", fitted, {})
    loaded = load_model(tmp_path / "model").head
    assert loaded.words is None
    assert np.array_equal(loaded.predict_proba(X), fitted.predict_proba(X))


def test_prompts_of_other_vectors_and_no_prompts_are_refused():
    X, y, words = draw(60)
    with pytest.raises(TrainingDataError, match="knows no prompts"):
        ZeroShotHead().fit(X, y)
    with pytest.raises(TrainingDataError, match="24 columns, and these have 23"):
        ZeroShotHead(words=words).fit(X[:, 1:], y)
    with pytest.raises(ModelError, match="no set of prompts 'wrong'; there are right, astray"):
        ZeroShotHead("wrong", words=words).fit(X, y)
    with pytest.raises(TrainingDataError, match=r"strength=0 is out of range"):
        TextLogisticHead(strength=0, words=words).fit(X, y)


# The file


def test_a_file_of_prompts_comes_back_and_has_equal_bytes(tmp_path):
    _, _, words = draw()
    write_prompts(tmp_path / "a.safetensors", words)
    write_prompts(tmp_path / "b.safetensors", words)
    again = read_prompts(tmp_path / "a.safetensors")
    assert again.document == words.document
    assert np.array_equal(again.text, words.text)
    assert again.digest == words.digest
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_damaged_file_of_prompts_is_one_error(tmp_path):
    _, _, words = draw()
    path = tmp_path / "prompts.safetensors"
    write_prompts(path, words)
    data = path.read_bytes()
    torn = [b"", b"torn", data[:50], data[:-1], data.replace(b"abnormal", b"subnormal")]
    torn += [data.replace(b"medembed-prompts", b"medembed-promptz")]
    for content in torn:
        path.write_bytes(content)
        with pytest.raises(ModelError):
            read_prompts(path)
    wrong = words.text.copy()
    wrong[0, 0] = np.nan
    write_prompts(path, Prompts(words.document, wrong))
    with pytest.raises(ModelError, match="not finite"):
        read_prompts(path)
    write_prompts(path, Prompts(words.document, words.text[:-1]))
    with pytest.raises(ModelError, match="a vector for each of its prompts"):
        read_prompts(path)
