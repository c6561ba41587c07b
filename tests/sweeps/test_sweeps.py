"""Sweeps on small made-up caches: honest, repeatable, and unbreakable."""

import hashlib
import json
import os
import signal
import time

import numpy as np
import pandas as pd
import pytest
from forked import fork
from made_sweeps import SMALL, broken_table, make_cache, make_table

from medembed.cache.spec import CacheSpec, keys_from_hex
from medembed.cache.store import create_cache, open_cache
from medembed.core.errors import MissingRowsError, RunError, TrainingDataError
from medembed.dataset.manifest import make_manifest, read_manifest, write_manifest
from medembed.evaluation.scores import by_study, score
from medembed.heads import lightgbm
from medembed.heads.packaging import load_model
from medembed.results.comparison import compare
from medembed.results.runs import open_run
from medembed.sweeps import runner, sweep, training


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    home = tmp_path_factory.mktemp("data")
    table = make_table()
    write_manifest(make_manifest(table, "study"), home / "manifest.csv")
    return make_cache(home / "cache", table, n_failed=2), home / "manifest.csv"


@pytest.fixture(scope="module")
def swept(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "sweep"
    return sweep(*data, out, **SMALL).as_dict(), open_run(out)


def test_a_sweep_reports_each_head_best_first(swept):
    result, run = swept
    assert run.is_complete
    assert {entry["head"] for entry in result["leaderboard"]} == {"logistic", "mlp"}
    cv = [entry["cv"] for entry in result["leaderboard"]]
    assert cv == sorted(cv, reverse=True)
    assert cv[0] > 0.7
    assert {"head", "pooling", "trial", "params", "cv", "seconds"} <= set(result["leaderboard"][0])


def test_the_ledger_has_one_line_per_trial_and_fold(swept):
    trials_table = swept[1].trials()
    assert len(trials_table) == 2 * 2 * 3
    assert trials_table["key"].is_unique
    assert (trials_table["status"] == "ok").all()
    winners = {entry["head"]: entry for entry in swept[0]["leaderboard"]}
    means = trials_table.groupby(["head", "trial"])["score"].mean()
    for head, entry in winners.items():
        assert entry["chosen_by"] == pytest.approx(means[head].max())
        assert entry["n_tried"] == 2


def test_patients_are_never_on_both_sides(data, tmp_path, monkeypatch):
    """A head that is handed patient numbers as embeddings looks at who is where."""
    manifest = read_manifest(data[1])
    numbers = pd.factorize(manifest.rows["patient"])[0].astype(np.float32)
    spec = CacheSpec("cd" * 32, {}, {"mean": (1,)}, "float32")
    cache = create_cache(tmp_path / "cache", spec, {"source": "numbers"})
    cache.commit(keys_from_hex(manifest.rows["sha256"].tolist()), {"mean": numbers[:, None]})
    test = set(numbers[manifest.rows["split"] == "test"].tolist())
    seen = []
    fit_path, judge, trained = training.fit_path, training._judge, []

    def watched_fit(heads, X, y, projector, rows):
        trained.append(set(X[rows, 0].tolist()))
        return fit_path(heads, X, y, projector, rows)

    def watched_judge(data, fold, head):
        held, judging = (set(data.X[part(fold), 0].tolist()) for part in (data.held, data.judging))
        assert not trained[-1] & held
        assert not (trained[-1] | held) & judging
        assert not (trained[-1] | held | judging) & test
        assert trained[-1] | held | judging == set(numbers.tolist()) - test
        seen.append(held)
        return judge(data, fold, head)

    monkeypatch.setattr(training, "fit_path", watched_fit)
    monkeypatch.setattr(training, "_judge", watched_judge)
    options = SMALL | {"heads": ("logistic",), "n_configs": 1}
    sweep(cache, manifest, tmp_path / "run", **options)
    assert len(seen) == 3
    assert set.union(*seen) == set(numbers.tolist()) - test
    assert sum(map(len, seen)) == len(set.union(*seen))


def test_predictions_cover_train_out_of_fold_and_test_once(swept):
    predictions = swept[1].predictions()
    assert set(predictions["head"]) == {"logistic", "mlp", "class-prior", "region-prior"}
    manifest_rows = len(make_table())
    assert (predictions.groupby("head").size() == manifest_rows - 2).all()
    assert predictions[predictions["split"] == "train"]["fold"].notna().all()
    assert predictions[predictions["split"] == "test"]["fold"].isna().all()
    assert predictions["probability"].between(0, 1).all()
    assert predictions.groupby("patient")["split"].nunique().max() == 1


def test_train_predictions_are_the_winners_on_its_held_out_folds(swept):
    result, run = swept
    for entry in result["leaderboard"]:
        own = run.predictions().query("split == 'train' and head == @entry['head']")
        folds = [by_study(fold) for _, fold in own.groupby("fold")]
        aurocs = [score(f["label"].to_numpy(int), f["probability"], 0.5)["auroc"] for f in folds]
        assert np.mean(aurocs) == pytest.approx(entry["cv"])


def test_reported_scores_come_from_the_model_on_disk(swept, data):
    run = swept[1]
    rows = read_manifest(data[1]).rows
    keys = keys_from_hex(rows["sha256"][:-2].tolist())
    X = open_cache(data[0]).read(keys, ["mean"])["mean"]
    for head in ("logistic", "mlp"):
        model = load_model(run.model_path(head))
        own = run.predictions().query("head == @head").reset_index(drop=True)
        is_test = (own["split"] == "test").to_numpy()
        again = model.head.predict_proba(X)[:, 1]
        assert np.array_equal(again[is_test], own["probability"].to_numpy()[is_test])
        studies = by_study(own[is_test])
        y = studies["label"].to_numpy(np.int8)
        auroc = score(y, studies["probability"].to_numpy(), 0.5)["auroc"]
        reported = next(row for row in run.scores()["rows"] if row["head"] == head)
        assert reported["scores"]["auroc"]["value"] == pytest.approx(auroc)
        assert model.card["threshold"] == reported["threshold"]
        train_hash = rows["sha256"][rows["split"] == "train"].iloc[0]
        code = hashlib.sha256(bytes.fromhex(train_hash)).hexdigest()[:16]
        assert code in model.card["training_images"]
        test_hash = rows["sha256"][rows["split"] == "test"].iloc[0]
        code = hashlib.sha256(bytes.fromhex(test_hash)).hexdigest()[:16]
        assert code not in model.card["training_images"]


def test_scores_json_is_what_compare_says_but_for_the_times(swept):
    said = compare([swept[1].path])
    seconds = [row.pop("seconds") for row in said["rows"]]
    assert all(value > 0 for value in seconds if value is not None)
    assert any(seconds)
    assert swept[1].scores() == said


def test_no_machine_path_or_patient_is_in_the_run_description(swept):
    text = (swept[1].path / "run.json").read_text()
    assert "/root" not in text
    assert "patient0" not in text
    assert swept[1].info.encoder.source == "demo"


def test_left_out_images_are_counted(swept):
    assert swept[1].info.data.left_out == 2
    assert [image.reason for image in swept[1].info.left_out] == ["truncated"] * 2
    assert any("Left out: 2 images" in note for note in swept[1].scores()["notes"])


def test_the_same_seed_gives_the_same_bytes_in_one_process_or_two(swept, data, tmp_path):
    sweep(*data, tmp_path / "again", **SMALL | {"jobs": 2})
    first = (swept[1].path / "predictions.parquet").read_bytes()
    assert (tmp_path / "again" / "predictions.parquet").read_bytes() == first


def test_shuffled_labels_land_at_chance(tmp_path):
    table = make_table(n_patients=160, seed=3)
    cache = make_cache(tmp_path / "cache", table)
    labels = table.groupby("study")["label"].first()
    shuffled = pd.Series(np.random.default_rng(5).permutation(labels), labels.index)
    table["label"] = table["study"].map(shuffled)
    options = SMALL | {"heads": ("logistic",), "n_configs": 1}
    sweep(cache, make_manifest(table, "study"), tmp_path / "run", **options)
    best = open_run(tmp_path / "run").scores()["rows"]
    auroc = next(row for row in best if row["head"] == "logistic")["scores"]["auroc"]
    assert auroc["low"] < 0.5 < auroc["high"]


def test_a_finished_sweep_asked_again_trains_nothing(swept, data, monkeypatch):
    monkeypatch.setattr(runner, "train_unit", lambda *_a, **_k: pytest.fail("trained again"))
    ticks = []
    again = sweep(
        *data, swept[1].path, **SMALL, progress=lambda done, total: ticks.append((done, total))
    ).as_dict()
    assert again["leaderboard"] == swept[0]["leaderboard"]
    assert ticks == [(12, 12)]


def test_only_what_the_ledger_lacks_is_trained(swept, data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    train_unit, folds = runner.train_unit, []

    def counted(data, unit):
        if unit.head == "logistic":
            folds.append(unit.fold)
            if folds == [0, 1, 2]:
                raise KeyboardInterrupt
        return train_unit(data, unit)

    monkeypatch.setattr(runner, "train_unit", counted)
    with pytest.raises(KeyboardInterrupt):
        sweep(*data, out, **SMALL)
    with pytest.raises(RunError, match=r"unfinished.*medembed sweep"):
        compare([out])
    with open(out / "trials.jsonl", "ab") as file:
        file.write(b'{"trial": 1, "he')  # a torn line
    result = sweep(*data, out, **SMALL).as_dict()
    assert folds == [0, 1, 2, 2]
    strip = [{**entry, "seconds": 0} for entry in result["leaderboard"]]
    assert strip == [{**entry, "seconds": 0} for entry in swept[0]["leaderboard"]]
    assert not (out / "folds").exists()


def train_slowly(data, out):
    sweep(*data, out, **SMALL, progress=lambda done, total: time.sleep(0.15))


def test_a_killed_sweep_resumed_gives_the_same_leaderboard(swept, data, tmp_path):
    out = tmp_path / "run"
    process = fork(train_slowly, data, out)
    ledger = out / "trials.jsonl"
    deadline = time.monotonic() + 60
    while not (ledger.exists() and ledger.read_bytes().count(b"\n") >= 4):
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.join()
    assert not (out / "scores.json").exists()
    n_before = ledger.read_bytes().count(b"\n")
    sweep(*data, out, **SMALL)
    assert ledger.read_bytes().count(b"\n") == 12 > n_before
    first = (swept[1].path / "predictions.parquet").read_bytes()
    assert (out / "predictions.parquet").read_bytes() == first


def test_two_sweeps_do_not_write_one_run(swept, data):
    run = swept[1]
    with run.locked(), pytest.raises(RunError, match="another process"):
        sweep(*data, run.path, **SMALL)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed was 0 there and is 1 here"),
        ({"n_folds": 4}, "n_folds was 3 there and is 4 here"),
        ({"heads": ("mlp",)}, "heads was"),
        ({"metric": "kappa"}, "metric was"),
    ],
)
def test_a_run_of_another_question_is_refused(swept, data, change, words):
    with pytest.raises(RunError, match=words) as raised:
        sweep(*data, swept[1].path, **SMALL | change)
    assert "Choose another --out" in str(raised.value)


def test_a_failing_configuration_does_not_end_the_sweep(data, tmp_path, monkeypatch):
    fit = lightgbm.BinnedRows.fit

    def fragile(self, head):
        if head.k_best is not None:
            raise ValueError("this one breaks")
        return fit(self, head)

    monkeypatch.setattr(lightgbm.BinnedRows, "fit", fragile)
    result = sweep(*data, tmp_path / "run", **SMALL | {"heads": ("lightgbm",)}).as_dict()
    assert {entry["head"]: entry["trial"] for entry in result["leaderboard"]}["lightgbm"] == 0
    table = open_run(tmp_path / "run").trials()
    assert set(table[table["status"] == "error"]["error"]) == {"ValueError: this one breaks"}


def test_a_diverging_member_is_told_and_its_cohort_goes_on(data, tmp_path):
    (tmp_path / "space.toml").write_text(
        "[mlp]\nconfigs = 2\nlr = [0.001, 1e30]\nhidden = [4, 4]\n[logistic]\nconfigs = 1\n"
    )
    options = SMALL | {"space": tmp_path / "space.toml", "n_configs": None}
    result = sweep(*data, tmp_path / "run", **options).as_dict()
    assert {entry["head"]: entry["trial"] for entry in result["leaderboard"]}["mlp"] == 0
    table = open_run(tmp_path / "run").trials().query("head == 'mlp'")
    assert table[table["trial"] == 1]["error"].str.contains("lower lr").all()
    assert (table[table["trial"] == 0]["status"] == "ok").all()


def test_a_failing_head_is_listed_and_left_out_of_the_comparison(data, tmp_path, monkeypatch):
    def broken(*_args):
        raise ValueError("always")

    monkeypatch.setattr(training, "gather", broken)
    result = sweep(*data, tmp_path / "run", **SMALL).as_dict()
    failed = result["leaderboard"][-1]
    assert (failed["head"], failed["status"], failed["cv"]) == ("mlp", "error", None)
    scored = {row["head"] for row in open_run(tmp_path / "run").scores()["rows"]}
    assert scored == {"logistic", "class-prior", "region-prior"}


def test_when_every_head_fails_the_run_is_not_complete(data, tmp_path, monkeypatch):
    def broken(*_args, **_kwargs):
        raise ValueError("no library")

    monkeypatch.setattr(training, "make_head", broken)
    with pytest.raises(RunError, match=r"every head failed.*ValueError: no library"):
        sweep(*data, tmp_path / "run", **SMALL)
    assert not (tmp_path / "run" / "scores.json").exists()


def test_a_fit_that_kills_its_process_costs_only_itself(data, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "train_unit", _deadly_train_unit)
    options = SMALL | {"n_configs": 1, "n_folds": 2, "jobs": 2}
    result = sweep(*data, tmp_path / "run", **options).as_dict()
    assert [entry["status"] for entry in result["leaderboard"]] == ["ok", "error"]
    assert "the process died" in result["leaderboard"][1]["error"]


_train_unit = runner.train_unit


def _deadly_train_unit(data, unit):
    if unit.head == "mlp":
        os.kill(os.getpid(), signal.SIGKILL)
    return _train_unit(data, unit)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no train", "no train rows"),
        ("no labels", "none of the .* train rows has a label"),
        ("one class", r"only abnormal.*Add normal \(label 0\) patients"),
        ("no test", "no labelled test rows"),
        ("few patients", "patients"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused_before_training(data, tmp_path, kind, words):
    manifest = make_manifest(broken_table(kind), "study")
    with pytest.raises(TrainingDataError, match=words):
        sweep(data[0], manifest, tmp_path / "run", **SMALL)
    assert not (tmp_path / "run").exists()


def test_a_logistic_head_is_always_in_the_table(data, tmp_path):
    swept = sweep(
        *data, tmp_path / "run", **{**SMALL, "heads": ("lightgbm",), "n_configs": 1}
    ).as_dict()
    assert {row["head"] for row in swept["leaderboard"]} == {"lightgbm", "logistic"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": ("logistik",)}, "logistic"),
        ({"metric": "auc"}, "auroc"),
        ({"n_folds": 1}, "at least 2"),
        ({"n_configs": 0}, "at least 1"),
        ({"heads": ()}, "--heads"),
    ],
)
def test_options_out_of_range_are_refused(data, tmp_path, options, words):
    with pytest.raises(TrainingDataError, match=words):
        sweep(*data, tmp_path / "run", **SMALL | options)
    assert not (tmp_path / "run").exists()


def test_rows_that_are_neither_embedded_nor_failed_are_refused(tmp_path):
    table = make_table()
    make_cache(tmp_path / "cache", table.iloc[:-3])
    with pytest.raises(MissingRowsError, match="3 of"):
        sweep(tmp_path / "cache", make_manifest(table, "study"), tmp_path / "run", **SMALL)
    assert not (tmp_path / "run").exists()


def test_a_foreign_directory_is_left_alone(data, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty and not a run"):
        sweep(*data, tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_unlabelled_rows_are_predicted_and_not_scored_and_synthetic_is_told(tmp_path):
    table = make_table()
    table.loc[table["patient"].isin(["patient000", "patient003"]), "label"] = ""
    table["synthetic"] = "1"
    cache = make_cache(tmp_path / "cache", table)
    options = SMALL | {"heads": ("logistic",), "n_configs": 1}
    sweep(cache, make_manifest(table, "study"), tmp_path / "run", **options)
    run = open_run(tmp_path / "run")
    own = run.predictions().query("head == 'logistic'")
    assert len(own) == len(table)
    assert own["label"].isna().sum() == table["label"].eq("").sum() > 0
    assert own[own["label"].isna()]["fold"].isna().all()
    assert run.scores()["test"]["n"] == 11
    assert run.info.data.synthetic is True
    assert run.scores()["synthetic"] is True


def test_a_lower_brier_score_wins(data, tmp_path):
    options = SMALL | {"heads": ("logistic",), "n_configs": 4, "metric": "brier"}
    result = sweep(*data, tmp_path / "run", **options).as_dict()
    means = open_run(tmp_path / "run").trials().groupby("trial")["score"].mean()
    assert result["leaderboard"][0]["chosen_by"] == pytest.approx(means.min())
    assert means.nunique() > 1
    assert json.dumps(result, allow_nan=False)
