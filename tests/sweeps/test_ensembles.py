"""Ensembles: shared folds, weights without the fold, one model over several encoders."""

import hashlib
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from made_extraction import HalvesEncoder, write_images
from made_sweeps import (
    auroc_of,
    cv_of,
    make_cache,
    make_data,
    make_pooled_cache,
    make_table,
    predictions_of,
)
from PIL import Image
from sklearn.metrics import roc_auc_score

from medembed.cache.spec import CacheSpec
from medembed.cli import main
from medembed.core.errors import ArgumentError, MedembedError, ModelError, RunError
from medembed.dataset.manifest import Manifest, read_manifest
from medembed.evaluation import calibration
from medembed.evaluation.calibration import fit_platt
from medembed.evaluation.scores import by_study
from medembed.evaluation.stacking import pool_weights
from medembed.extraction import extract
from medembed.heads import ensemble as heads_ensemble
from medembed.heads.packaging import load_model
from medembed.prediction import Predictor
from medembed.prediction.external_validation import evaluate
from medembed.results.comparison import compare_runs
from medembed.results.model_card import read_card
from medembed.results.runs import open_run
from medembed.sweeps import ensemble, sweep
from medembed.sweeps.ensemble_members import EnsembleRows

QUICK = {"n_configs": 1, "n_folds": 3, "jobs": 1}
OTHER = "cd" * 32


def make_other_cache(path, table, signals, monkeypatch, seed=9):
    """A cache of another encoder."""
    monkeypatch.setattr("made_sweeps.CacheSpec", lambda _, *known: CacheSpec(OTHER, *known))
    return make_pooled_cache(path, table, signals, seed=seed)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two sweeps of one manifest: logistic and attention on one encoder, logistic on another."""
    home = tmp_path_factory.mktemp("ensembles")
    table = make_table(96)
    cache, manifest = make_data(home, {"mean": 1.0}, table=table)
    with pytest.MonkeyPatch.context() as patch:
        other = make_other_cache(home / "other", table, {"mean": 1.0, "max": 0.5}, patch)
    sweep(cache, manifest, home / "a", heads=("logistic", "attention"), **QUICK)
    sweep(other, manifest, home / "b", heads=("logistic",), covariates=("region",), **QUICK)
    ensemble([home / "a", home / "b"], home / "both")
    ensemble([home / "a", home / "b"], home / "plain", heads=("logistic",))
    return home


def members_of(home, pairs):
    """Read members' predictions again, by study: labels, folds, and a column for each."""
    tables = [by_study(predictions_of(home / run, head)) for run, head in pairs]
    y = tables[0]["label"].fillna(-1).to_numpy(int)
    return tables[0], y, np.column_stack([own["probability"] for own in tables])


def test_a_folds_predictions_come_from_weights_fitted_without_it(home):
    pairs = [("a", "logistic"), ("b", "logistic")]
    views = [predictions_of(home / run, head) for run, head in pairs]
    studies, y, plain = members_of(home, pairs)
    own = by_study(predictions_of(home / "plain", "ensemble"))
    for fold in (0, 1, 2):
        others = (studies["fold"].notna() & studies["fold"].ne(fold)).to_numpy()
        columns = []
        for k, table in enumerate(views):
            mapped = fit_platt(plain[others, k], y[others]).apply(table["probability"].to_numpy())
            columns.append(by_study(table.assign(probability=mapped))["probability"])
        calibrated = np.column_stack(columns)
        weights = pool_weights(calibrated[others], y[others])
        held = studies["fold"].eq(fold).fillna(False).to_numpy(bool)
        expected = calibrated[held] @ weights
        assert np.allclose(own["probability"][held], expected, atol=1e-12)


def test_cv_is_the_mean_over_folds_of_these_predictions(home):
    for out in ("both", "plain"):
        for entry in open_run(home / out).as_dict()["leaderboard"]:
            assert entry["cv"] == pytest.approx(cv_of(predictions_of(home / out, entry["head"])))


def test_the_mean_stands_beside_the_weights(home):
    run = open_run(home / "both")
    entries = {entry["head"]: entry["params"]["weights"] for entry in run.as_dict()["leaderboard"]}
    assert set(entries) == {"ensemble", "mean"}
    assert set(entries["mean"]) == {"a:logistic", "a:attention", "b:logistic"}
    assert list(entries["mean"].values()) == pytest.approx([1 / 3] * 3, abs=1e-6)
    assert sum(entries["ensemble"].values()) == pytest.approx(1, abs=1e-5)


def test_calibration_of_the_card_is_fitted_on_the_same_predictions(home):
    run = open_run(home / "plain")
    card = read_card(run.model("ensemble"), "here")
    studies = by_study(predictions_of(home / "plain", "ensemble")).query("fold.notna()")
    fitted = fit_platt(studies["probability"].to_numpy(), studies["label"].to_numpy(int))
    assert card.calibration.slope == pytest.approx(fitted.slope)
    assert card.calibration.intercept == pytest.approx(fitted.intercept)


@pytest.mark.parametrize("out", ["both", "plain"])
@pytest.mark.parametrize("head", ["ensemble", "mean"])
def test_the_model_predicts_what_its_run_says_of_test(home, out, head):
    model = open_run(home / out).model(head)
    predictor = Predictor(model, cache=[home / "other", home / "cache"])
    rows = [r for r in predictor.predict_manifest(home / "manifest.csv") if r["image"] is None]
    splits = read_manifest(home / "manifest.csv").rows.groupby("study")["split"].first()
    found = sorted(r["probability"] for r in rows if splits[r["study"]] == "test")
    test = by_study(predictions_of(home / out, head)).query("split == 'test'")
    expected = predictor.card.calibration.apply(test["probability"].to_numpy())
    assert found == pytest.approx(sorted(expected), abs=1e-9)
    assert all(r["distance"] is not None for r in rows)


def test_heads_without_weight_and_their_encoders_are_left_out(home, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "medembed.sweeps.ensemble_members.pool_weights", lambda *_: np.array([0.0, 1.0])
    )
    run = ensemble([home / "a", home / "b"], tmp_path / "one", heads=("logistic",))
    model = run.model("ensemble")
    assert len(model.members) == 1
    assert [source.spec["encoder"] for source in read_card(model, "").sources] == [OTHER]


def test_calibration_is_the_same_in_the_head_as_in_the_fit():
    assert heads_ensemble.EDGE == calibration._EDGE


def test_compare_takes_the_run(home):
    result = compare_runs([open_run(home / name) for name in ("a", "b", "both")], n_resamples=50)
    assert {row["head"] for row in result["rows"]} >= {"ensemble", "mean", "logistic"}


def test_evaluation_reads_a_cache_for_each_encoder(home, tmp_path):
    given = ([home / "cache", home / "other"], home / "manifest.csv")
    run = evaluate(home / "both" / "models" / "mean", *given, tmp_path / "elsewhere", split="test")
    test = predictions_of(home / "both", "mean").query("split == 'test'")
    assert auroc_of(run.predictions().query("head == 'mean'")) == pytest.approx(auroc_of(test))


def test_images_that_one_cache_lacks_are_left_out_of_both(home, tmp_path):
    table = make_table(96)
    manifest = read_manifest(home / "manifest.csv")
    keep = np.random.default_rng(0).permutation(len(table)) >= 9
    order = pd.concat([table[keep], table[~keep]])
    cache = make_cache(tmp_path / "cache", order, n_failed=9)
    sweep(cache, manifest, tmp_path / "c", heads="logistic", **QUICK)
    run = ensemble([home / "a", tmp_path / "c"], tmp_path / "out", heads=("logistic",))
    found = predictions_of(tmp_path / "out", "ensemble")
    assert len(found) == len(table) - 9
    assert set(found["sha256"]) == set(order["sha256"][:-9])
    entries = {entry["head"]: entry["cv"] for entry in run.as_dict()["leaderboard"]}
    assert entries["ensemble"] == pytest.approx(cv_of(found))


def test_the_same_command_reads_the_run_and_another_is_refused(home):
    before = (home / "both" / "predictions.parquet").stat().st_mtime_ns
    ensemble([home / "a", home / "b"], home / "both")
    assert (home / "both" / "predictions.parquet").stat().st_mtime_ns == before
    with pytest.raises(RunError, match="another question"):
        ensemble([home / "a", home / "b"], home / "both", heads=("logistic",))


# What is refused


def run_with(home, tmp_path, change):
    """Copy run b and change its run.json."""
    shutil.copytree(home / "b", tmp_path / "c")
    path = tmp_path / "c" / "run.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))
    return tmp_path / "c"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda info: info.update(kind="finetune"), "only sweeps have out-of-fold predictions"),
        (lambda info: info.pop("cv_method"), "from an older medembed"),
        (lambda info: info["asked"].update(manifest="0" * 64), "another manifest"),
        (lambda info: info["asked"].update(metric="brier"), "another metric"),
        (lambda info: info["asked"].update(train_fraction=0.5), "another train_fraction"),
        (lambda info: info["leaderboard"][0].update(cv=0.1), "not of this run"),
    ],
)
def test_a_run_of_another_question_is_refused(home, tmp_path, change, words):
    with pytest.raises(MedembedError, match=words):
        ensemble([home / "a", run_with(home, tmp_path, change)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_folds_are_refused(home, tmp_path):
    sweep(home / "cache", home / "manifest.csv", tmp_path / "s1", heads="logistic", seed=1, **QUICK)
    with pytest.raises(RunError, match=r"other folds than a for \d+ of \d+ images"):
        ensemble([home / "a", tmp_path / "s1"], tmp_path / "out")


def test_an_unfinished_run_and_a_run_twice_are_refused(home, tmp_path):
    shutil.copytree(home / "b", tmp_path / "c")
    (tmp_path / "c" / "scores.json").unlink()
    with pytest.raises(RunError, match="unfinished"):
        ensemble([home / "a", tmp_path / "c"], tmp_path / "out")
    with pytest.raises(RunError, match="given twice"):
        ensemble([home / "a", home / "a"], tmp_path / "out")


def test_one_head_is_no_ensemble(home, tmp_path):
    ran = CliRunner().invoke(main, ["ensemble", str(home / "b"), "-o", str(tmp_path / "out")])
    assert ran.exit_code == 1
    assert "an ensemble has 2 to 64 members, and the runs hold 1 head" in ran.stderr


def test_an_unknown_head_is_refused(home, tmp_path):
    with pytest.raises(RunError, match="no run has a model of the head 'mpl'"):
        ensemble([home / "a", home / "b"], tmp_path / "out", heads=("logistic", "mpl"))


def test_a_member_that_was_replaced_is_refused(home, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(home / "both" / "models" / "mean", model)
    shutil.rmtree(model / "members" / "0")
    shutil.copytree(model / "members" / "2", model / "members" / "0")
    with pytest.raises(ModelError, match="its member 0 is another model"):
        load_model(model)
    shutil.rmtree(model / "members" / "0")
    with pytest.raises(ModelError, match="lacks members/0"):
        load_model(model)


def test_a_stranger_among_the_members_is_refused(home, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(home / "both" / "models" / "mean", model)
    (model / "members" / "9").mkdir()
    with pytest.raises(ModelError, match="'9', which is not part of a model"):
        load_model(model)
    plain = tmp_path / "plain"
    shutil.copytree(home / "a" / "models" / "logistic", plain)
    (plain / "members").mkdir()
    with pytest.raises(ModelError, match="'members', which is not part of a model"):
        load_model(plain)


def test_a_cache_that_lacks_or_adds_an_encoder_is_refused(home):
    model = home / "both" / "models" / "mean"
    rows = Predictor(model, cache=home / "cache").predict_manifest(home / "manifest.csv")
    with pytest.raises(ModelError, match="An ensemble needs a cache for each of its encoders"):
        next(rows)
    with pytest.raises(ArgumentError, match="reads embeddings of 2 encoders"):
        Predictor(model, encoder="demo").load()


def test_an_ensemble_is_not_explained_but_its_members_are_named(home, tmp_path):
    predictor = Predictor(home / "both" / "models" / "mean")
    with pytest.raises(ModelError, match=r"Explain a member, such as .*mean/members/0"):
        next(predictor.predict_manifest(home / "manifest.csv", tmp_path, explain=tmp_path / "x"))


# Through two encoders, from files


def test_predict_embeds_files_with_every_encoder(tmp_path):
    manifest = make_bright_images(tmp_path / "images")
    encoders = [HalvesEncoder(), HalvesEncoder("other", fingerprint=OTHER, scale=0.5)]
    encoders[1].dimensions = {"max": (2,)}
    caches = [tmp_path / "cache0", tmp_path / "cache1"]
    for k, encoder in enumerate(encoders):
        poolings = tuple(encoder.dimensions)
        extract(manifest, tmp_path / "images", encoder, caches[k], poolings=poolings, decoders=1)
        sweep(caches[k], manifest, tmp_path / f"run{k}", heads="logistic", **QUICK)
    run = ensemble([tmp_path / "run0", tmp_path / "run1"], tmp_path / "both")
    model = run.model("mean")
    cached = list(Predictor(model, cache=caches).predict_manifest(manifest))
    fresh = Predictor(model, encoder=encoders).predict_manifest(manifest, tmp_path / "images")
    for ours, theirs in zip(fresh, cached, strict=True):
        assert ours["probability"] == pytest.approx(theirs["probability"], abs=1e-9)
    swapped = Predictor(model, encoder=encoders[::-1])
    with pytest.raises(ModelError, match="encoder=abababababab"):
        swapped.load()


def make_bright_images(root):
    """48 images of 8 × 8, of which the brighter half is abnormal."""
    rows = write_images(root, 48).rows
    generator = np.random.default_rng(0)
    label = np.arange(48) // 2 % 2
    for number, name in enumerate(rows["image"]):
        low = 40 + 60 * label[number] + generator.integers(-30, 30)
        pixels = generator.integers(low, low + 90, (8, 8)).astype(np.uint8)
        Image.fromarray(pixels).save(root / name)
    rows["sha256"] = [hashlib.sha256((root / n).read_bytes()).hexdigest() for n in rows["image"]]
    rows["label"] = pd.array(label, dtype="Int8")
    rows["split"] = np.where(np.arange(48) % 4 == 3, "test", "train")
    rows.loc[np.arange(48) % 8 == 0, "split"] = "test"
    return Manifest(rows, "study")


# Members that know nothing


def test_members_that_know_nothing_gain_nothing_without_the_fold():
    """Nested scores of noise are those of guessing; fitted on their own folds they are better."""
    nested, own = [], []
    for seed in range(16):
        rows = make_noise(seed)
        labelled = np.arange(len(rows.y))
        pool = rows.fit(labelled, equal=False)
        within = rows.predict(pool, per_study=False)
        held = np.full(len(rows.y), np.nan)
        for fold in range(4):
            without = rows.fit(np.flatnonzero(rows.folds != fold), equal=False)
            here = rows.folds == fold
            held[here] = rows.predict(without, per_study=False)[here]
        nested.append(mean_auroc(rows, held))
        own.append(mean_auroc(rows, within))
    assert np.mean(nested) <= 0.5 + 2 * np.std(nested) / np.sqrt(len(nested))
    assert np.mean(own) > np.mean(nested)


def mean_auroc(rows, probability):
    return np.mean(
        [roc_auc_score(rows.y[rows.folds == f], probability[rows.folds == f]) for f in range(4)]
    )


def make_noise(seed, n=80, k=4):
    """Studies of one image and members that guess, in the form that `ensemble` has them."""
    generator = np.random.default_rng(seed)
    images = pd.DataFrame(
        {
            "sha256": "",
            "patient": np.arange(n),
            "study": np.arange(n),
            "region": "hand",
            "label": pd.array(np.arange(n) // 4 % 2, dtype="Int8"),
            "split": "train",
            "fold": pd.array(np.arange(n) % 4, dtype="Int16"),
        }
    )

    class Guess:
        per_study = False

        def __init__(self):
            self.probability = generator.random(n)

    return EnsembleRows(images, [Guess() for _ in range(k)])
