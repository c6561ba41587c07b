"""A sweep of targets: one load, the same folds, a plain run for each; resumed after any kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from made_sweeps import make_data, make_pooled_cache, make_table, predictions_of
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.multiclass import OneVsRestClassifier

import medembed as me
import medembed.sweeps.data as sweep_data
import medembed.sweeps.runner as runner
from medembed.cache.embeddings import load_embeddings, patient_folds
from medembed.cli import main
from medembed.core.errors import ManifestError, RunError, TrainingDataError
from medembed.dataset.manifest import make_manifest, read_manifest, write_manifest
from medembed.dataset.splits import draw_target_folds, draw_train_folds
from medembed.dataset.targets import select_target
from medembed.prediction.external_validation import evaluate
from medembed.report.external import render_external
from medembed.results.runs import open_run
from medembed.results.targets import open_targets
from medembed.sweeps import sweep
from medembed.sweeps.targets import sweep_targets

SMALL = {"heads": ("logistic", "mlp"), "n_configs": 2, "n_folds": 3, "jobs": 1}
TARGETS = ("label", "metal", "rare")


def table_with_targets(n_patients=90):
    """Metal follows the label, is wrong for some studies and unknown for others."""
    table = make_table(n_patients)
    studies = table["study"].unique()
    generator = np.random.default_rng(5)
    flipped = dict(zip(studies, generator.random(len(studies)) < 0.2, strict=True))
    unknown = dict(zip(studies, generator.random(len(studies)) < 0.2, strict=True))
    other = table["label"].map({"0": "1", "1": "0"}).where(table["study"].map(flipped))
    table["target_metal"] = other.fillna(table["label"])
    table.loc[table["study"].map(unknown), "target_metal"] = ""
    table["target_rare"] = np.where(table["patient"] == "patient002", "1", "0")
    return table


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    signals = {"mean": 1.0, "max": 0.5}
    return make_data(tmp_path_factory.mktemp("data"), signals, table=table_with_targets())


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    return sweep_targets(*data, tmp_path_factory.mktemp("runs") / "all", TARGETS, **SMALL)


def folds_of(run, head="logistic"):
    rows = run.predictions().query("head == @head and fold.notna()")
    return dict(zip(rows["sha256"], rows["fold"], strict=True))


def test_each_target_has_a_plain_run_and_the_directory_is_none(runs, data):
    assert runs.names == ["label", "metal"]
    assert list(runs.not_estimable) == ["rare"]
    assert "has no positive image" in runs.not_estimable["rare"]
    assert {path.name for path in runs.path.iterdir()} == {"targets.json", "label", "metal"}
    for run in runs.runs().values():
        assert run.is_complete
        assert {path.name for path in run.path.iterdir()} >= {"run.json", "scores.json", "models"}
        assert run.info.asked.manifest == read_manifest(data[1]).digest()
    with pytest.raises(RunError, match=r"holds one for each target, label, metal. Name one"):
        open_run(runs.path)
    with pytest.raises(RunError, match="rare is not estimable"):
        runs.run("rare")


def test_folds_are_those_of_a_plain_sweep_for_every_target(runs, data, tmp_path):
    plain = sweep(*data, tmp_path / "plain", **SMALL)
    folds = folds_of(plain)
    assert folds_of(runs.run("label")) == folds
    metal = folds_of(runs.run("metal"))
    assert 0 < len(metal) < len(folds)
    assert metal.items() <= folds.items()
    for name in ("logistic", "mlp"):
        pd.testing.assert_frame_equal(
            predictions_of(plain.path, name), predictions_of(runs.path / "label", name)
        )


def test_a_target_is_trained_where_it_is_known(runs, data):
    rows = select_target(read_manifest(data[1]).rows, "metal")
    found = runs.run("metal").predictions().query("head == 'logistic'")
    label = dict(zip(rows["sha256"], rows["label"], strict=True))
    expected = pd.array([label[key] for key in found["sha256"]], dtype="Int8")
    assert found["label"].array.equals(expected)
    assert found["fold"][found["label"].isna()].isna().all()
    assert len(found) == len(rows)  # rows without an answer are predicted


def test_rows_are_loaded_and_scaled_once_for_all_targets(data, tmp_path, monkeypatch):
    loaded, learnt = [], []

    def load(*args, **options):
        loaded.append(options["pool"])
        return load_embeddings(*args, **options)

    def learn(training, item, original=runner.learn_basis):
        learnt.append(item[0])
        return original(training, item)

    monkeypatch.setattr(sweep_data, "load_embeddings", load)
    monkeypatch.setattr(runner, "learn_basis", learn)
    sweep_targets(*data, tmp_path / "out", ("label", "metal"), **SMALL)
    assert loaded == ["mean+max"]
    assert learnt == [0, 1, 2]


def test_a_targets_result_does_not_depend_on_the_others(runs, data, tmp_path):
    alone = sweep_targets(*data, tmp_path / "alone", "metal", **SMALL)
    assert {path.name for path in alone.path.iterdir()} == {"targets.json", "metal"}
    pd.testing.assert_frame_equal(
        predictions_of(alone.path / "metal", "mlp"), predictions_of(runs.path / "metal", "mlp")
    )


def test_scores_are_those_of_scikit_learn_on_the_same_rows_and_folds(tmp_path):
    """OneVsRestClassifier on two targets at once, standardised as the head does."""
    table = table_with_targets()
    table["target_metal"] = table["target_metal"].replace("", "0")
    cache, manifest = make_data(tmp_path / "d", {"mean": 1.0}, table=table)
    space = tmp_path / "space.toml"
    space.write_text("[logistic]\nconfigs = 1\nC = 1.0\n")
    options = {"heads": "logistic", "space": space, "n_folds": 3, "jobs": 1}
    runs = sweep_targets(cache, manifest, tmp_path / "runs", ("label", "metal"), **options)
    embeddings = load_embeddings(cache, manifest)
    y = np.stack(
        [select_target(embeddings.rows, name)["label"] for name in ("label", "metal")], axis=1
    ).astype(int)
    for learnt, held in patient_folds(embeddings, 3):
        X = embeddings.X.astype(np.float64)
        X = (X - X[learnt].mean(axis=0)) / X[learnt].std(axis=0)
        model = OneVsRestClassifier(
            LogisticRegression(C=1.0, class_weight="balanced", tol=1e-8, max_iter=5000)
        )
        probability = model.fit(X[learnt], y[learnt]).predict_proba(X[held])
        keys = embeddings.rows["sha256"].to_numpy()[held]
        for k, name in enumerate(("label", "metal")):
            rows = predictions_of(runs.path / name, "logistic").set_index("sha256")
            ours = rows.loc[keys, "probability"].to_numpy()
            assert np.abs(ours - probability[:, k]).max() < 2e-3
            assert roc_auc_score(y[held, k], ours) == pytest.approx(
                roc_auc_score(y[held, k], probability[:, k]), abs=5e-3
            )


# Folds


def test_folds_depend_on_manifest_and_seed_alone_and_keep_patients_together():
    table = table_with_targets()
    table.loc[table["patient"] < "patient030", "label"] = ""
    rows = make_manifest(table, "study").rows
    drawn = draw_target_folds(rows, n_folds=3)
    plain = draw_train_folds(rows, n_folds=3)
    assert drawn.fold[plain.fold.index].equals(plain.fold)
    assert drawn.inner.loc[plain.inner.index].equals(plain.inner)
    train = rows[rows["split"] == "train"].set_index("image")
    assert set(drawn.fold.index) == set(train.index)
    by_patient = drawn.fold.groupby(train["patient"].reindex(drawn.fold.index)).nunique()
    assert by_patient.eq(1).all()
    assert drawn.fold.value_counts().min() > len(train) / 5
    for fold in range(3):
        judged = drawn.inner[fold]
        assert not judged[drawn.fold == fold].any()
        patients = train["patient"].reindex(drawn.fold.index)
        others = (drawn.fold != fold) & ~judged
        assert not set(patients[judged]) & set(patients[others])
    shuffled = draw_target_folds(rows.sample(frac=1, random_state=1), n_folds=3)
    assert shuffled.fold.sort_index().equals(drawn.fold.sort_index())


def test_smaller_fractions_are_subsets_and_a_useless_label_does_not_stop_targets():
    table = table_with_targets().assign(label="")
    rows = make_manifest(table, "study").rows
    sizes = []
    for fraction in (1.0, 0.5, 0.2):
        drawn = draw_target_folds(rows, n_folds=3, fraction=fraction)
        sizes.append(set(drawn.fold.index))
    assert sizes[0] > sizes[1] > sizes[2]


def test_targets_can_be_swept_without_any_label(tmp_path):
    table = table_with_targets()
    data = make_data(tmp_path / "d", {"mean": 1.0}, table=table)
    write_manifest(make_manifest(table.assign(label=""), "study"), data[1])
    runs = sweep_targets(*data, tmp_path / "runs", "label,metal", **{**SMALL, "heads": "logistic"})
    assert runs.names == ["metal"]
    assert runs.not_estimable == {"label": "no embedded test image has an answer."}


# Refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", "mettal"], "Did you mean 'metal'"),
        (["--target", "rare"], "no target can be estimated. rare: "),
        (["--target", "metal", "--covariates", "target_rare"], "is a target, not a covariate"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_written(data, tmp_path, options, words):
    ran = CliRunner().invoke(
        main, ["sweep", *map(str, data), "-o", str(tmp_path / "r"), "--folds", "3", *options]
    )
    assert ran.exit_code == 1
    assert words in ran.stderr
    assert not (tmp_path / "r").exists()


def test_another_question_a_run_and_a_foreign_directory_are_refused(runs, data, tmp_path):
    with pytest.raises(RunError, match="answer another question: seed was 0 there and is 1"):
        sweep_targets(*data, runs.path, TARGETS, **SMALL, seed=1)
    with pytest.raises(RunError, match="answer another question: targets was"):
        sweep_targets(*data, runs.path, "label", **SMALL)
    with pytest.raises(RunError, match="is a run, and a sweep of targets"):
        sweep_targets(*data, runs.path / "metal", "metal", **SMALL)
    with pytest.raises(RunError, match=r"holds a run for each target: label, metal\. Choose"):
        sweep(*data, runs.path, **SMALL)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        sweep_targets(*data, tmp_path, "metal", **SMALL)
    with pytest.raises(ManifestError, match="no target ''"):
        sweep_targets(*data, tmp_path / "r", "", **SMALL)
    with pytest.raises(TrainingDataError, match="no target was given"):
        sweep_targets(*data, tmp_path / "r", (), **SMALL)


@pytest.mark.parametrize("text", ["", "[]", '{"format": "medembed-targets"}', None])
def test_a_damaged_targets_file_is_named(tmp_path, text):
    hostile = {
        "format": "medembed-targets", "version": 1, "command": "", "asked": {},
        "targets": [{"name": "../x", "positive": 1, "negative": 1, "unknown": 0, "reason": None}],
    }  # fmt: skip
    (tmp_path / "targets.json").write_text(json.dumps(hostile) if text is None else text)
    with pytest.raises(RunError, match=r"targets\.json"):
        open_targets(tmp_path)


# Resuming


def test_a_sweep_killed_in_the_second_target_goes_on(data, tmp_path):
    out = tmp_path / "out"
    words = [sys.executable, "-m", "medembed", "sweep", *map(str, data), "-o", str(out)]
    words += ["--target", "label,metal", "--heads", "logistic,mlp", "--configs", "2"]
    words += ["--folds", "3", "--jobs", "1"]
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    ledger = out / "metal" / "trials.jsonl"
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until and not ledger.exists():
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = (out / "label" / "scores.json").stat().st_mtime_ns
    runs = sweep_targets(*data, out, ("label", "metal"), **SMALL)
    assert (out / "label" / "scores.json").stat().st_mtime_ns == first
    assert all(run.is_complete for run in runs.runs().values())
    keys = [record.key for record in runs.run("metal").trial_records()]
    assert len(keys) == len(set(keys))


# Models


def test_a_targets_model_is_evaluated_on_that_target(runs, data, tmp_path):
    model = runs.run("metal").model_path("logistic")
    card = json.loads((model / "model.json").read_text())["card"]
    assert card["target"] == "metal"
    assert "the target metal of its manifest is positive" in (model / "README.md").read_text()
    table = table_with_targets().assign(
        split="test",
        target_metal=lambda t: t["target_metal"].replace("", "0"),
    )
    for name in ("image", "patient", "study"):
        table[name] = "new" + table[name]
    table["sha256"] = [f"{i:064x}" for i in range(len(table))]
    cache = make_pooled_cache(tmp_path / "cache", table, {"mean": 1.0, "max": 0.5})
    write_manifest(make_manifest(table, "study"), tmp_path / "new.csv")
    run = evaluate(model, cache, tmp_path / "new.csv", tmp_path / "evaluation")
    found = run.predictions().query("head == 'logistic'")
    answers = dict(zip(table["sha256"], table["target_metal"].astype(int), strict=True))
    assert found["label"].tolist() == [answers[key] for key in found["sha256"]]
    text = render_external({"run": "evaluation", **run.scores()}, target="metal")
    assert "Called metal:" in text
    assert "Share metal" in text
    assert " metal)" in text
    assert not re.search(r"\b(ab)?normal\b(?! clouds)", text)
    write_manifest(make_manifest(table.drop(columns="target_metal"), "study"), tmp_path / "old.csv")
    with pytest.raises(ManifestError, match="no target 'metal'"):
        evaluate(model, cache, tmp_path / "old.csv", tmp_path / "other")


def test_a_targets_model_answers_in_the_targets_words(runs, data):
    cache, manifest = data
    model = runs.path / "metal" / "models" / "logistic"
    found = list(me.Predictor(model, cache=cache).predict_manifest(manifest))
    assert {row["decision"] for row in found} == {"metal", "no metal"}
    assert {word for row in found for word in row["set"] or ()} <= {"metal", "no metal"}
    ran = CliRunner().invoke(
        main, ["predict", str(model), "--manifest", str(manifest), "--cache", str(cache)]
    )
    assert ran.exit_code == 0, ran.output
    heading, _, first, *_ = ran.stdout.splitlines()
    assert heading.split() == [
        *["image", "or", "=", "study", "metal", "decision", "90", "%", "set"]
    ]
    assert "metal" in first
    assert "abnormal" not in ran.stdout
    of_label = runs.path / "label" / "models" / "logistic"
    rows = me.Predictor(of_label, cache=cache).predict_manifest(manifest)
    assert {row["decision"] for row in rows} == {"normal", "abnormal"}
