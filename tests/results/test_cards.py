"""What a model says of itself: what sweeps and fine-tuning write on its card, and what is read."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from made_finetuning import make_cohort, make_tower, one_thread, tune
from made_sweeps import auroc_of, make_data, make_table, predictions_of, read_columns

from medembed.core.errors import ModelError, RunError, TrainingDataError
from medembed.dataset.manifest import read_manifest
from medembed.dataset.splits import fold_train_rows
from medembed.evaluation.conformal import Conformal, fit_conformal
from medembed.evaluation.scores import by_study
from medembed.finetuning import Hyperparameters
from medembed.heads.packaging import Model, load_model, read_document
from medembed.heads.registry import make_head
from medembed.results import model_readme
from medembed.results.model_card import EncoderSource, describe_decisions, read_card, read_conformal
from medembed.results.model_readme import describe_encoder, write_readme
from medembed.results.predictions import image_code
from medembed.results.runs import Run, open_run
from medembed.sweeps import finalize, sweep
from medembed.sweeps.finalize import Refit, refit
from medembed.sweeps.selection import choose
from medembed.sweeps.training import seed_of_fold
from medembed.sweeps.worker_pool import Died

HEADS = ("logistic", "mlp", "lightgbm", "attention")
SMALL = {"heads": HEADS, "n_configs": 1, "n_folds": 3, "jobs": 1}
ASSETS = Path(__file__).parents[1] / "assets" / "format-1" / "run"


class Stop(KeyboardInterrupt):
    """Like Ctrl-C."""


def stop(*_):
    raise Stop


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    home = tmp_path_factory.mktemp("cards")
    table = make_table(n_patients=60)
    numbers = table["patient"].str[-3:].astype(int)
    table["region"] = np.where(numbers // 4 % 2, "hand", "wrist")  # both of them in test
    table["patient"] = "secret-" + table["patient"]
    return make_data(home / "planted-place", table=table)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("planted-runs") / "run"
    sweep(*data, out, **SMALL)
    return open_run(out)


def card_of(run, head):
    path = run.model_path(head)
    return read_card(load_model(path), path)


def kept_scores(conformal):
    """Return all scores of the normal, and of the abnormal, ascending."""
    return [
        np.sort(np.concatenate([parts[k] for parts in conformal.scores.values()])).tolist()
        for k in range(2)
    ]


# What a sweep writes


def document_of(run, head):
    """Return the card as JSON."""
    return read_document(run.model_path(head)).card


@pytest.mark.parametrize("head", HEADS)
def test_a_card_is_read_as_it_was_meant(head, run):
    card = card_of(run, head)
    assert (card.encoder.source, card.encoder.revision, card.encoder.path) == ("demo", None, None)
    assert (card.pooling, card.label_level) == ("mean", "study")
    assert card.views == ("attention" if head == "attention" else "mean")
    assert (card.synthetic, card.covariates, card.conformal_note) == (False, None, None)
    images = read_manifest_rows(run)
    assert card.training_images == {image_code(sha256) for sha256 in images["sha256"]}
    assert card.document.name == head


def read_manifest_rows(run):
    """Return the rows of train as a prior has them: one per image."""
    return predictions_of(run.path, "class-prior").query("split == 'train'")


def test_the_card_counts_the_training_data(run, data):
    rows = read_manifest(data[1]).rows.query("split == 'train'")
    counted = document_of(run, "mlp")["data"]["trained"]
    assert counted["images"] == len(rows)
    assert counted["patients"] == rows["patient"].nunique()
    hand = rows[rows["region"] == "hand"]
    assert counted["regions"]["hand"]["studies"] == hand["study"].nunique()
    assert (
        counted["regions"]["hand"]["abnormal_studies"]
        == hand.query("label == 1")["study"].nunique()
    )


@pytest.mark.parametrize("head", HEADS)
def test_the_scores_of_test_are_those_of_the_run(head, run):
    row = next(row for row in run.scores()["rows"] if row["head"] == head)
    test = card_of(run, head).scores.test
    assert test["scores"] == row["scores"]
    assert set(test["regions"]) == {"hand", "wrist"}
    assert test["regions"]["hand"]["auroc"] == row["regions"]["hand"]["auroc"]
    assert test["n"] == run.scores()["test"]["n"]
    own = predictions_of(run.path, head).query("split == 'test'")
    assert test["scores"]["auroc"]["value"] == pytest.approx(auroc_of(own))
    assert test["scores"]["auroc"]["low"] is None  # of too few patients
    assert "patients" in test["scores"]["auroc"]["reason"]


def test_models_know_their_training_embeddings(run):
    reference = load_model(run.model_path("mlp")).reference
    assert reference["n_patients"][0] > 0
    assert load_model(run.model_path("logistic")).reference.keys() == reference.keys()


def test_nothing_identifying_is_in_a_model(run, data):
    images = read_manifest(data[1]).rows
    planted = ["secret-", "planted", *images["study"], *images["sha256"], *images["image"]]
    for path in (run.path / "models").rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        found = [text for text in planted if str(text).encode() in content]
        assert not found, f"{path.name} holds {found[0]}"


# Clean scores


@pytest.mark.parametrize("head", ["mlp", "lightgbm", "logistic"])
def test_sets_rest_on_fits_of_all_other_folds_that_stopped_within_them(head, run, data):
    """An oracle without the sweep's machinery: heads are fitted anew, fold by fold."""
    X, rows = read_columns(data, "mean")
    folds = fold_train_rows(read_manifest(data[1]).rows, n_folds=3, seed=0)
    fold = folds.reindex(rows["image"]).fillna(-1).to_numpy(int)
    trials = run.trials().query("head == @head").set_index("fold")
    y = rows["label"].to_numpy(int)
    parts = []
    for k in range(3):
        others = (fold >= 0) & (fold != k)
        unfitted = make_head(head, trials["params"][k], seed=seed_of_fold(0, k))
        if head != "logistic":
            unfitted = unfitted.with_budget(int(trials["best_epoch"][k]))
        with one_thread():
            fitted = unfitted.fit(X[others], y[others])
        held = rows[fold == k]
        parts.append(held.assign(probability=fitted.predict_proba(X[fold == k])[:, 1]))
    studies = by_study(pd.concat(parts))
    expected = fit_conformal(
        *(studies[name].to_numpy() for name in ("probability", "label", "region"))
    )
    found = card_of(run, head).conformal
    for ours, theirs in zip(kept_scores(found), kept_scores(expected), strict=True):
        assert ours == pytest.approx(theirs, abs=2e-5)


@pytest.mark.parametrize("head", HEADS)
def test_sets_rest_on_the_out_of_fold_scores_that_the_run_keeps(head, run):
    studies = by_study(predictions_of(run.path, head).query("split == 'train'"))
    expected = fit_conformal(
        *(studies[name].to_numpy() for name in ("probability", "label", "region")),
        patients=studies["patient"].to_numpy(),
    )
    assert card_of(run, head).conformal.as_dict() == expected.as_dict()


def test_a_head_that_judges_studies_has_one_clean_score_per_study(run):
    n_studies = len(predictions_of(run.path, "attention").query("split == 'train'"))
    assert sum(map(len, kept_scores(card_of(run, "attention").conformal))) == n_studies


@pytest.mark.parametrize("epochs", [[9, 2, 4], [1, 2, 4], [9, 2, 4, 7]])
def test_each_fold_has_its_own_budget_and_the_model_their_median(epochs):
    trial = SimpleNamespace(
        head="mlp", number=0, pooling="mean", params={}, keys=tuple(map(str, range(len(epochs))))
    )
    records = {
        str(k): SimpleNamespace(score=0.9, status="ok", seconds=1.0, best_epoch=epoch, error=None)
        for k, epoch in enumerate(epochs)
    }
    ledger = SimpleNamespace(
        batches=[SimpleNamespace(head="mlp", trials=(trial,))], records=records
    )
    winner = choose(ledger, "mlp", "auroc")
    assert winner.budget == round(np.median(epochs))
    assert winner.fold_budgets == tuple(epochs)
    for record in records.values():
        record.best_epoch = None
    winner = choose(ledger, "mlp", "auroc")
    assert (winner.budget, winner.fold_budgets) == (None, (None,) * len(epochs))
    assert winner.as_entry()["fold_budgets"] is None


def count_refits(monkeypatch):
    seen = []

    def counted(training, item):
        seen.append((item.head, item.fold))
        return refit(training, item)

    monkeypatch.setattr(finalize, "refit", counted)
    return seen


def test_a_resumed_run_repeats_no_refit_of_a_fold_and_is_equal(run, data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_predictions", stop)
        first = count_refits(patch)
        with pytest.raises(Stop):
            sweep(*data, out, **SMALL)
    assert set(first) == {(head, fold) for head in HEADS for fold in (None, 0, 1, 2)}
    kept = sorted((out / "folds").iterdir())
    assert len(kept) == 3 * len(HEADS)
    kept[0].write_bytes(b"")  # a damaged one is trained again, and no other
    with monkeypatch.context() as patch:
        again = count_refits(patch)
        sweep(*data, out, **SMALL)
    assert sum(fold is not None for _, fold in again) == 1
    for path in (run.path / "models").rglob("*"):
        if path.is_file():
            assert (out / path.relative_to(run.path)).read_bytes() == path.read_bytes()
    assert not (out / "folds").exists()


def test_a_refit_that_dies_is_told_and_tried_again(data, run, tmp_path, monkeypatch):
    def failing(training, item):
        if item.fold == 1 and item.head == "lightgbm":
            return Died("the process died: memory")
        return refit(training, item)

    with monkeypatch.context() as patch:
        patch.setattr(finalize, "refit", failing)
        said = "the refit of lightgbm without fold 1 failed: the process died: memory. The same"
        with pytest.raises(RunError, match=said):
            sweep(*data, tmp_path / "run", **SMALL)
    sweep(*data, tmp_path / "run", **SMALL)
    first, again = (path / "predictions.parquet" for path in (run.path, tmp_path / "run"))
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("fold", [None, 1])
def test_a_refit_that_the_data_do_not_allow_costs_its_head_alone(data, tmp_path, monkeypatch, fold):
    train = finalize._train

    def failing(training, item, rows):
        if item.fold == fold and item.head == "lightgbm":
            raise TrainingDataError("the loss is not a finite number")
        return train(training, item, rows)

    monkeypatch.setattr(finalize, "_train", failing)
    result = sweep(*data, tmp_path / "run", **{**SMALL, "heads": ("lightgbm",)}).as_dict()
    assert [entry["status"] for entry in result["leaderboard"]] == ["ok", "error"]
    assert result["leaderboard"][1]["cv"] is None
    assert "not a finite number" in result["leaderboard"][1]["error"]
    run = open_run(tmp_path / "run")
    assert {row["head"] for row in run.scores()["rows"] if not row["baseline"]} == {"logistic"}
    assert not run.model_path("lightgbm").exists()


def test_a_refit_that_fails_says_why_and_no_process_is_blamed(data, tmp_path, monkeypatch):
    train = finalize._train

    def failing(training, item, rows):
        if item.fold is None and item.head == "lightgbm":
            raise MemoryError("full")
        return train(training, item, rows)

    monkeypatch.setattr(finalize, "_train", failing)
    said = r"the refit of lightgbm on all training rows failed: MemoryError: full\. The same"
    with pytest.raises(RunError, match=said):
        sweep(*data, tmp_path / "run", **{**SMALL, "heads": ("lightgbm",)})


def test_what_goes_wrong_in_a_refit_is_a_result():
    training = SimpleNamespace(others=lambda fold: 1 / fold)
    assert refit(training, Refit("mlp", {}, 3, fold=0)).reason.startswith("ZeroDivisionError")


def test_conformal_scores_are_read_without_the_model(run, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(run.path, copied)
    for path in copied.glob("models/*/head.safetensors"):
        path.write_bytes(b"")
    found = read_conformal(open_run(copied), "mlp")
    assert found.as_dict() == card_of(run, "mlp").conformal.as_dict()
    assert read_conformal(open_run(copied), "class-prior") is None
    assert read_conformal(open_run(ASSETS), "mlp") is None
    (copied / "models" / "mlp" / "model.json").write_text("{}")
    with pytest.raises(ModelError, match="not a medembed-model"):
        read_conformal(open_run(copied), "mlp")


# What is refused


@pytest.mark.parametrize("head", ["lightgbm", "logistic", "mlp"])
def test_a_card_of_before_is_read(head):
    path = ASSETS / "models" / head
    card = read_card(load_model(path), path)
    assert (card.conformal, card.conformal_note) == (None, None)
    assert card.encoder == EncoderSource()
    assert card.training_images


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("spec", None),
        ("spec", []),
        ("pooling", ""),
        ("pooling", "mean+"),
        ("pooling", "mean\x1b[2J"),
        ("label_level", "patient"),
        ("views", "max"),
        ("views", ["mean"]),
        ("calibration", {"method": "platt", "slope": 0, "intercept": 0}),
        ("calibration", "platt"),
        ("threshold", "0.5"),
        ("threshold", True),
        ("threshold", float("inf")),
        ("threshold", 10**400),
        ("trial", "first"),
        ("cv", []),
        ("data", 3),
        ("data", {"trained": {"regions": {"elbow": 5}}}),
        ("data", {"trained": {"regions": {"elbow": {"images": 1, "abnormal": 3}}}}),
        ("data", {"trained": {"regions": {"elbow": {"images": 10**400, "abnormal": 3}}}}),
        ("scores", {"test": {"scores": {"auroc": {"value": "x", "low": 0, "high": 1}}}}),
        ("conformal", []),
        ("conformal", {"method": "mondrian", "min_group": 1, "scores": {"a": 1}}),
        ("conformal_note", 3),
        ("encoder", "demo"),
        ("encoder", {"source": "demo\x1b]0;"}),
        ("encoder", {"source": ["demo"]}),
        ("encoder", {"path": "/etc"}),
        ("encoder", {"path": "../../../encoders/x"}),
        ("encoder", {"path": "../../encoders/.."}),
        ("encoder", {"path": "../../encoders/a/../../b"}),
        ("covariates", {"columns": 1}),
        ("scores", []),
        ("scores", {"test": {"regions": []}}),
        ("scores", {"test": {"regions": {"hand": 1}}}),
        ("synthetic", "no"),
        ("training_images", "abc"),
        ("training_images", ["../../etc/passwd"]),
        ("training_images", [1]),
    ],
)
def test_a_wrong_entry_is_named(name, value, run):
    model = load_model(run.model_path("mlp"))
    with pytest.raises(ModelError, match=f"the card of the model at /m: .*{name}"):
        read_card(replace(model, card={**model.card, name: value}), "/m")


@pytest.mark.parametrize("name", ["spec", "pooling", "views", "calibration", "training_images"])
def test_a_missing_entry_is_named(name, run):
    model = load_model(run.model_path("mlp"))
    card = {key: value for key, value in model.card.items() if key != name}
    with pytest.raises(ModelError, match=f"{name} is missing. Train or copy the model again"):
        read_card(Model(model.head, card), "/m")


# For people


def readme_of(run, head):
    return (run.model_path(head) / "README.md").read_text()


def test_the_readme_tells_what_the_card_tells(run):
    text, card = readme_of(run, "mlp"), document_of(run, "mlp")
    auroc = card["scores"]["test"]["scores"]["auroc"]
    assert auroc["low"] is None  # of too few patients
    assert f"| AUROC | {auroc['value']:.3f} |" in text
    known = {"value": 0.8, "low": 0.7, "high": 0.9}
    assert model_readme._write_score(known) == "0.800 (0.700 to 0.900)"
    assert model_readme._write_score({**known, "low": None}) == "0.800 (at most 0.900)"
    for region, own in card["scores"]["test"]["regions"].items():
        assert (
            f"| {region} | {own['n']} | {own['n_abnormal']} | {own['auroc']['value']:.3f}" in text
        )
    counted = card["data"]["trained"]
    assert f"{counted['images']} images in {counted['studies']} studies" in text
    assert card["encoder"]["terms"] in text
    assert all(sentence in text for sentence in card["use"]["not_intended"])
    assert "medembed predict THIS_DIRECTORY" in text
    assert "Synthetic" not in text
    assert not [line for line in text.splitlines() if line != line.rstrip()]
    assert "\n\n\n" not in text


def test_the_readme_before_test_is_scored_says_so(run):
    card = document_of(run, "mlp")
    early = {**card, "scores": {"out_of_fold": card["scores"]["out_of_fold"]}, "synthetic": True}
    text = write_readme(early)["README.md"]
    assert "Not scored on `test` yet. Out of fold on `train`: AUROC 0." in text
    assert "**Synthetic:" in text


def test_names_from_data_stay_text_in_the_readme(run):
    card = document_of(run, "mlp")
    hostile = "<script>|`[x](http://y)\n# hand"
    counted = {**card["data"]["trained"], "regions": {hostile: card["data"]["trained"]}}
    text = write_readme({**card, "data": {**card["data"], "trained": counted}})["README.md"]
    assert r"| &lt;script&gt;\|\`\[x\](http://y) \# hand |" in text


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("google/medgemma-4b-pt", "Health AI Developer Foundations terms of use"),
        ("google/medsiglip-448", "Health AI Developer Foundations terms of use"),
        ("demo", "Apache 2.0"),
        ("someone/resnet", "does not know the terms of someone/resnet"),
        (None, "does not know the terms of this encoder"),
    ],
)
def test_the_encoders_terms_are_told(source, said):
    entry = describe_encoder(source, "ab12")
    assert said in entry["terms"]
    assert (entry["revision"], entry["path"]) == ("ab12", None)


def test_an_adapted_encoder_has_its_bases_terms():
    entry = describe_encoder("google/medgemma-4b-pt", "ab12", "../../encoders/unfreeze-2")
    assert entry["terms"].startswith("Its last blocks were changed by fine-tuning; it derives from")
    assert model_readme.HEALTH_AI in entry["terms"]


# Fine-tuning, and both


def test_fine_tuned_models_say_where_their_encoder_is(tmp_path):
    make_cohort(tmp_path, n_patients=40)
    make_tower(tmp_path / "tower", 1)
    quick = Hyperparameters(epochs=1, batch_size=32, augment=False, lr=3e-3)
    tune(tmp_path, tmp_path / "tower", tmp_path / "run", unfreeze="0,1", config=quick)
    run = open_run(tmp_path / "run")
    frozen, adapted = (card_of(run, f"unfreeze-{depth}") for depth in (0, 1))
    assert (frozen.encoder.source, frozen.encoder.path) == ("tower", None)
    assert adapted.encoder.source == "tower"
    assert adapted.encoder.path == "../../encoders/unfreeze-1"
    assert (run.model_path("unfreeze-1") / adapted.encoder.path).resolve().is_dir()
    for card in (frozen, adapted):
        assert card.conformal is not None
        assert card.scores.test["scores"]["auroc"]["value"] is not None
    assert load_model(run.model_path("unfreeze-0")).reference["n_patients"][0] > 0
    assert str(tmp_path) not in json.dumps(read_document(run.model_path("unfreeze-1")).model_dump())


def test_decisions_and_sets_are_fitted_on_the_same_scores():
    generator = np.random.default_rng(0)
    y = np.arange(400) % 2
    studies = pd.DataFrame({"label": y, "region": "hand", "patient": np.arange(400)})
    studies["probability"] = np.clip(0.3 * y + generator.uniform(0, 0.7, 400), 0, 1)
    found = describe_decisions(studies)
    given = studies["probability"].to_numpy(), y, np.full(400, "hand")
    expected = fit_conformal(*given, patients=np.arange(400))
    assert found["conformal"] == expected.as_dict()
    assert found["conformal_note"] is None
    assert Conformal.from_dict(json.loads(json.dumps(found["conformal"]))).scores["hand"]
