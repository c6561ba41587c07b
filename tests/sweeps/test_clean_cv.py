"""Cross-validated scores: no decision sees the fold that is scored, and noise scores like noise."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_sweeps import SMALL, make_cache, make_table

from medembed.core.errors import TrainingDataError
from medembed.dataset.manifest import make_manifest
from medembed.dataset.splits import draw_folds, draw_inner
from medembed.results.comparison import compare_runs
from medembed.results.predictions import prior_rows
from medembed.results.run_schema import CV_METHOD
from medembed.results.runs import Run, open_run
from medembed.sweeps import sweep
from medembed.sweeps.finalize import Refit, refit
from medembed.sweeps.training import Training, Unit, configure, study_score, train_unit

HEADS = ("logistic", "mlp", "lightgbm", "attention")
N_FOLDS = 3


def draw_rows(n_patients, seed, *, views=2):
    """Draw rows of a manifest: two studies of some patients, a quarter of a rarer region."""
    generator = np.random.default_rng(seed)
    rows = []
    for patient in range(n_patients):
        for study in range(1 + patient % 2):
            label = int(generator.integers(2)) if patient > 3 else patient % 2
            region = "hip" if patient % 4 == 0 else "hand"
            rows += [(f"p{patient}", f"p{patient}/{study}", region, label)] * views
    return pd.DataFrame(rows, columns=["patient", "study", "region", "label"])


def make_training(n_patients=60, seed=0, width=6):
    """Return rows of pure noise as a sweep's processes have them."""
    rows = draw_rows(n_patients, seed)
    folds = draw_folds(rows, n_folds=N_FOLDS, seed=seed)
    X = np.random.default_rng([seed, 1]).normal(size=(len(rows), width)).astype(np.float32)
    return Training(
        X=X,
        y=rows["label"].to_numpy(np.int8),
        folds=folds,
        studies=pd.factorize(rows["study"], sort=True)[0],
        inner=draw_inner(rows, folds, seed=seed),
        n_cells=1,
        n_covariates=0,
        metric="auroc",
        seed=seed,
    )


# The division


@settings(max_examples=40, deadline=None)
@given(st.integers(16, 60), st.integers(2, 5), st.integers(0, 9))
def test_each_fold_has_other_patients_that_decide(n_patients, n_folds, seed):
    rows = draw_rows(n_patients, seed)
    folds = draw_folds(rows, n_folds=n_folds, seed=seed)
    inner = draw_inner(rows, folds, seed=seed)
    assert inner.shape == (n_folds, len(rows))
    for fold, judging in enumerate(inner):
        scored, learnt = folds == fold, (folds != fold) & ~judging
        parts = [set(rows["patient"][flags]) for flags in (scored, judging, learnt)]
        assert sum(map(len, parts)) == rows["patient"].nunique()
        for flags in (judging, learnt):
            assert rows["label"][flags].nunique() == 2
        # as large as a fold of the others is
        n_studies = rows["study"][~scored].nunique()
        assert rows["study"][judging].nunique() == pytest.approx(n_studies / n_folds, abs=3)


def test_the_order_of_the_rows_decides_nothing_and_the_seed_does():
    rows = draw_rows(40, 0)
    folds = draw_folds(rows, n_folds=4, seed=0)
    inner = draw_inner(rows, folds, seed=0)
    order = np.random.default_rng(1).permutation(len(rows))
    shuffled = draw_inner(rows.iloc[order].reset_index(drop=True), folds[order], seed=0)
    assert np.array_equal(shuffled, inner[:, order])
    assert not np.array_equal(draw_inner(rows, folds, seed=1), inner)
    assert len({flags.tobytes() for flags in inner}) == 4


def test_spellings_of_one_patient_are_on_one_side_of_every_part():
    """Whoever is spelled twice must not decide in one spelling and be learnt from in the other."""
    rows = draw_rows(40, 0)
    odd = np.arange(len(rows)) % 2 == 1
    spelled = rows.assign(patient=rows["patient"].mask(odd, rows["patient"].str.upper()))
    folds = draw_folds(spelled, n_folds=4, seed=0)
    for fold, judging in enumerate(draw_inner(spelled, folds, seed=0)):
        assert not judging[folds == fold].any()
        learnt = (folds != fold) & ~judging
        parts = [set(rows["patient"][flags]) for flags in (folds == fold, judging, learnt)]
        assert sum(map(len, parts)) == rows["patient"].nunique()


def test_parts_that_deciders_need_are_asked_for():
    rows = draw_rows(12, 0).assign(label=0)
    rows.loc[rows["patient"].isin(["p1", "p2"]), "label"] = 1
    folds = draw_folds(rows, n_folds=2, seed=0)
    with pytest.raises(TrainingDataError, match=r"without fold 0, too few patients .* --folds"):
        draw_inner(rows, folds, seed=0)


# What trials see


@pytest.mark.parametrize("head", HEADS)
def test_a_trial_does_not_look_at_its_fold(head):
    """Whatever is in the fold that is left out, a trial learns, stops and scores alike."""
    training = make_training(seed=2)
    unit = Unit(head, ({"epochs": 6, "precision": "fp32"} if head == "mlp" else {},), 1)
    [outcome] = train_unit(training, unit)
    assert outcome.error is None
    X, y, held = training.X.copy(), training.y.copy(), training.held(1)
    X[held], y[held] = np.nan, 1 - y[held]
    [other] = train_unit(replace(training, X=X, y=y), unit)
    assert (other.score, other.best_epoch) == (outcome.score, outcome.best_epoch)
    # while the patients that judge it do decide
    judging = training.judging(1)
    assert judging.size
    y = training.y.copy()
    y[judging] = 1 - y[judging]
    [third] = train_unit(replace(training, y=y), unit)
    assert third.score != outcome.score


@pytest.mark.parametrize("head", HEADS)
def test_a_refit_learns_from_all_other_folds_and_not_from_its_own(head):
    training, budget = make_training(), None if head == "logistic" else 3
    item = Refit(head, {"precision": "fp32"} if head == "mlp" else {}, budget, fold=1)
    first, held, others = refit(training, item), training.held(1), training.others(1)
    y = training.y.copy()
    y[held] = 1 - y[held]
    assert np.array_equal(refit(replace(training, y=y), item), first)
    for rows in (training.judging(1), training.learnt(1)):
        assert set(rows) < set(others)
        X = training.X.copy()
        X[rows] += 3
        assert not np.array_equal(refit(replace(training, X=X), item), first)


def test_a_prior_knows_neither_the_fold_that_it_is_scored_on_nor_test():
    """Labels of other rows than the training's change no prediction, and each is theirs alone."""
    rows = draw_rows(60, 0).assign(sha256="ab" * 32, split="train")
    folds = draw_folds(rows, n_folds=N_FOLDS, seed=0)
    is_test, held = folds == 2, folds == 1
    rows.loc[is_test, "split"] = "test"
    folds = np.where(is_test, -1, folds)
    before = {own["head"].iloc[0]: own["probability"] for own in prior_rows(rows, folds)}
    others = rows["label"].where(~held & ~is_test)
    assert before["class-prior"][held].to_numpy() == pytest.approx(others.mean())
    assert before["class-prior"][is_test].to_numpy() == pytest.approx(
        rows["label"][~is_test].mean()
    )
    changed = rows.assign(label=rows["label"].where(~held & ~is_test, 1 - rows["label"]))
    for own in prior_rows(changed, folds):
        assert np.array_equal(own["probability"][held], before[own["head"].iloc[0]][held])
    tested = rows.assign(label=rows["label"].where(~is_test, 1 - rows["label"]))
    for own in prior_rows(tested, folds):
        assert np.array_equal(own["probability"], before[own["head"].iloc[0]])


def test_noise_scores_like_noise():
    """Trees that stop early, the best of six: what chose them is too good, what scores them not."""
    cv, chosen_by = [], []
    params = [{"n_trees": 40, "num_leaves": n, "pca": 0} for n in (3, 4, 5, 7, 9, 15)]
    for seed in range(24):
        training = make_training(seed=seed)
        outcomes = [
            train_unit(training, Unit("lightgbm", tuple(params), fold)) for fold in range(N_FOLDS)
        ]
        means = np.mean([[own.score for own in fold] for fold in outcomes], axis=0)
        best = int(np.argmax(means))
        chosen_by.append(means[best])
        scores = []
        for fold in range(N_FOLDS):
            item = Refit("lightgbm", params[best], outcomes[fold][best].best_epoch, fold)
            held = training.held(fold)
            scores.append(study_score(training, held, refit(training, item)))
        cv.append(np.mean(scores))
    error = np.std(cv, ddof=1) / np.sqrt(len(cv))
    assert abs(np.mean(cv) - 0.5) < 3 * error
    assert np.mean(chosen_by) > 0.5 + 3 * error


def test_the_score_of_studies_is_that_of_their_table():
    training = make_training()
    rows = training.held(0)
    probability = np.random.default_rng(0).random(len(rows))
    views = pd.DataFrame({"s": training.studies[rows], "y": training.y[rows], "p": probability})
    studies = views.groupby("s").agg({"y": "max", "p": "mean"})
    both = studies["p"][studies["y"] == 1], studies["p"][studies["y"] == 0]
    wins = np.mean([a > b for a in both[0] for b in both[1]])
    assert study_score(training, rows, probability) == pytest.approx(wins)
    alone = study_score(training, rows, studies["p"].to_numpy(), per_study=True)
    assert alone == pytest.approx(wins)
    with pytest.raises(TrainingDataError, match="not finite numbers"):
        study_score(training, rows, np.full(len(rows), np.nan))


# What is said of it


def test_runs_of_before_are_marked_and_mixing_them_warns(tmp_path):
    table = make_table()
    cache, manifest = make_cache(tmp_path / "cache", table), make_manifest(table, "study")
    options = SMALL | {"heads": ("logistic",)}
    sweep(cache, manifest, tmp_path / "new", **options)
    sweep(cache, manifest, tmp_path / "old", **options | {"seed": 1})
    old, new = (open_run(tmp_path / name) for name in ("old", "new"))
    assert new.info.cv_method == new.info.asked.cv_method == CV_METHOD
    document = json.loads((old.path / "run.json").read_text())
    del document["cv_method"]
    old = Run(old.path, document)
    found = {
        names: compare_runs(runs, n_resamples=20)
        for names, runs in {"new": [new], "old": [old], "both": [old, new]}.items()
    }
    notes = {names: " ".join(result["notes"]) for names, result in found.items()}
    assert "of up to 2 configurations a head" in notes["new"]
    assert "too good" not in notes["new"]
    assert "cv† is too good" in notes["old"]
    assert "old: cv† is too good" in notes["both"]
    assert [name for name, text in notes.items() if "not comparable" in text] == ["both"]
    rows = {row["run"]: row for row in found["both"]["rows"] if not row["baseline"]}
    assert (rows["new"]["cv_method"], rows["new"]["n_tried"]) == (CV_METHOD, 2)
    assert rows["old"]["cv_method"] is None


@pytest.mark.parametrize("name", ["mlp", "attention", "lightgbm"])
def test_each_fold_has_random_weights_of_its_own(name):
    """With common ones a choice by all folds' judges is one by the patients that are scored."""
    training = make_training()
    states = [configure(training, name, {}, fold).random_state for fold in (None, 0, 1, 2)]
    assert len(set(states)) == len(states)
    assert states == [configure(training, name, {}, k).random_state for k in (None, 0, 1, 2)]
    assert states[0] == training.seed
