"""What a sweep can be asked: poolings, studies, covariates, fractions."""

import hashlib
import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from made_sweeps import (
    CELLS,
    QUICK,
    WIDTH,
    auroc_of,
    command,
    cv_of,
    make_data,
    make_pooled_cache,
    make_table,
    predictions_of,
    read_columns,
    refuse,
    winners,
)

from medembed.cli import main
from medembed.dataset.manifest import read_manifest
from medembed.heads.packaging import load_model
from medembed.heads.registry import make_head
from medembed.results.comparison import compare
from medembed.results.model_card import read_covariates
from medembed.results.runs import open_run
from medembed.sweeps import runner, sweep
from medembed.sweeps.training import seed_of_fold

HEADS = ("logistic", "mlp", "lightgbm", "attention")
NAMED = {"patient": "MUELLER^HANS", "study": "ACC-19770413", "image": "geheim"}


@pytest.fixture
def untrained(monkeypatch):
    """Let the test fail where anything is trained."""
    monkeypatch.setattr(runner, "train_unit", lambda *_a, **_k: pytest.fail("trained"))


def let_attention_learn(home):
    """Write a space in which attention has steps enough for a few studies, whatever its start."""
    path = home / "space.toml"
    path.write_text("[attention]\nlr = 0.02\nepochs = 150\npatience = 150\ndropout = 0.0\n")
    return path


# Poolings


@pytest.fixture(scope="module")
def pooled_data(tmp_path_factory):
    home = tmp_path_factory.mktemp("pooled")
    return make_data(home, {"mean": 0.8, "max": 1.2, "grid4": 2.5})


@pytest.fixture(scope="module")
def pooled(pooled_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("pooled") / "run"
    options = {**QUICK, "n_configs": 2, "heads": HEADS, "pool": "mean,max,mean+max"}
    return sweep(*pooled_data, out, **options).as_dict(), out


def test_every_head_is_tried_on_each_pooling(pooled):
    table = open_run(pooled[1]).trials()
    tried = table.groupby(["head", "pooling"]).size().unstack()
    assert set(tried.index) == set(HEADS)
    assert set(tried.columns) == {"mean", "max", "mean+max"}
    assert (tried == 2 * 3).all(axis=None)
    assert (table.groupby(["head", "trial"])["pooling"].nunique() == 1).all()
    assert (table.groupby("head")["trial"].nunique() == 6).all()


def test_each_pooling_is_tried_with_the_same_configurations(pooled):
    table = open_run(pooled[1]).trials()
    params = table["params"].map(lambda p: json.dumps(p, sort_keys=True))
    sets = params.groupby([table["head"], table["pooling"]]).agg(lambda p: tuple(sorted(set(p))))
    assert (sets.groupby("head").nunique() == 1).all()


def test_the_leaderboard_and_the_card_name_the_winners_pooling(pooled):
    result, out = pooled
    table = open_run(out).trials()
    means = table.groupby(["head", "trial"])["score"].mean()
    for head, entry in winners(result).items():
        own = table.query("head == @head")
        [pooling] = set(own.loc[own["trial"] == entry["trial"], "pooling"])
        card = load_model(open_run(out).model_path(head)).card
        assert entry["pooling"] == pooling == card["pooling"]
        assert entry["trial"] == card["trial"]
        assert entry["chosen_by"] == pytest.approx(means[head].max())


def test_test_predictions_come_from_the_columns_of_the_winners_pooling(pooled, pooled_data):
    result, out = pooled
    for head, entry in winners(result).items():
        X, rows = read_columns(pooled_data, entry["pooling"])
        assert X.shape[1] == WIDTH * len(entry["pooling"].split("+"))
        model = load_model(open_run(out).model_path(head)).head
        own = predictions_of(out, head)
        if head == "attention":
            again = model.predict_proba(X, rows["study"].to_numpy(str))[:, 1]
        else:
            again = model.predict_proba(X)[:, 1]
        test = (own["split"] == "test").to_numpy()
        assert np.array_equal(again[test], own["probability"].to_numpy()[test])
        assert cv_of(own) == pytest.approx(entry["cv"])


@pytest.mark.parametrize("knowing", ["mean", "max"])
def test_the_pooling_that_knows_the_label_wins_wherever_it_stands(tmp_path, knowing):
    signals = {"mean": 0.0, "max": 0.0, knowing: 3.0}
    data = make_data(tmp_path, signals, n_patients=96)
    space = let_attention_learn(tmp_path)
    for pool, heads in (("mean,max", HEADS), ("max,mean", ("logistic", "mlp"))):
        out = tmp_path / pool.replace(",", "-")
        result = sweep(*data, out, **QUICK, heads=heads, pool=pool, space=space).as_dict()
        assert {entry["pooling"] for entry in result["leaderboard"]} == {knowing}
        assert all(auroc_of(predictions_of(out, head)) > 0.85 for head in heads)


def test_without_a_choice_all_single_vector_poolings_stand_side_by_side(pooled_data, tmp_path):
    result = sweep(*pooled_data, tmp_path / "run", **QUICK, heads=("logistic",)).as_dict()
    assert result["leaderboard"][0]["pooling"] == "mean+max"


def test_a_pooling_not_in_the_cache_lists_those_that_are(pooled_data, tmp_path, untrained):
    out = tmp_path / "run"
    line = refuse(command(pooled_data, out, "--pool", "mean,cls"), out)
    assert "cls" in line
    assert all(name in line for name in ("mean", "max", "grid4"))


@pytest.mark.parametrize("heads", ["logistic", "attention"])
def test_cells_alone_are_refused_with_a_way_out_that_works(
    pooled_data, tmp_path, monkeypatch, heads
):
    """`attention` too: a logistic head is always in the table."""
    out = tmp_path / "run"
    asked = command(pooled_data, out, "--heads", heads, "--configs", "1")
    with monkeypatch.context() as patch:
        patch.setattr(runner, "train_unit", lambda *_a, **_k: pytest.fail("trained"))
        line = refuse([*asked, "--pool", "grid4"], out)
    assert "logistic" in line
    way_out = line.split("--pool ")[-1].rstrip(".")
    ran = CliRunner().invoke(main, [*asked, "--pool", way_out])
    assert ran.exit_code == 0, ran.output


def test_cells_beside_single_vectors_are_refused(pooled_data, tmp_path, untrained):
    out = tmp_path / "run"
    line = refuse(command(pooled_data, out, "--pool", "mean+grid4"), out)
    assert "grid4" in line


def test_attention_reads_cells_and_other_heads_do_not(pooled_data, tmp_path):
    out = tmp_path / "run"
    options = {**QUICK, "heads": ("attention", "mlp"), "pool": "mean,grid4"}
    result = sweep(*pooled_data, out, **options).as_dict()
    tried = open_run(out).trials().groupby("head")["pooling"].agg(lambda names: sorted(set(names)))
    assert tried.to_dict() == {
        "attention": ["grid4", "mean"],
        "logistic": ["mean"],
        "mlp": ["mean"],
    }
    entry = winners(result)["attention"]
    model = load_model(open_run(out).model_path("attention"))
    assert model.card["pooling"] == entry["pooling"]
    X, rows = read_columns(pooled_data, entry["pooling"])
    n_cells = CELLS if entry["pooling"] == "grid4" else 1
    assert model.head.get_params()["n_cells"] == n_cells
    own = predictions_of(out, "attention")
    again = model.head.predict_proba(X, rows["study"].to_numpy(str))[:, 1]
    test = (own["split"] == "test").to_numpy()
    assert np.array_equal(again[test], own["probability"].to_numpy()[test])


def test_attention_finds_the_cell_that_knows(tmp_path):
    data = make_data(tmp_path, {"mean": 0.0, "grid4": 6.0}, n_patients=96)
    result = sweep(
        *data, tmp_path / "run", **QUICK, heads=("attention",), pool="mean,grid4"
    ).as_dict()
    entry = winners(result)["attention"]
    assert entry["pooling"] == "grid4"
    assert load_model(tmp_path / "run" / "models" / "attention").head.get_params()["n_cells"] == 16
    own = predictions_of(tmp_path / "run", "attention")
    assert auroc_of(own[own["split"] == "test"]) > 0.8


# Heads that judge studies


def test_attention_has_one_row_per_study_out_of_fold_in_train_and_final_in_test(
    pooled, pooled_data
):
    own = predictions_of(pooled[1], "attention")
    rows = read_manifest(pooled_data[1]).rows
    assert (own["sha256"] == "").all()
    assert own["study"].is_unique
    assert len(own) == rows["study"].nunique()
    assert own[own["split"] == "train"]["fold"].notna().all()
    assert own[own["split"] == "test"]["fold"].isna().all()
    views = predictions_of(pooled[1], "logistic").groupby("study")
    mine = own.set_index("study")
    for column in ("label", "split", "patient", "region", "fold"):
        there = views[column].first()
        assert (mine[column].fillna(-1) == there.fillna(-1)).all()


def test_attention_is_told_which_views_belong_together(pooled, pooled_data):
    """Its predictions are those of a head fitted by hand, on other folds and on all of train."""
    result, out = pooled
    entry, own = winners(result)["attention"], predictions_of(out, "attention")
    X, rows = read_columns(pooled_data, entry["pooling"])
    y, studies = rows["label"].to_numpy(int), rows["study"].to_numpy(str)
    fold_of = dict(zip(np.unique(studies), own["fold"].fillna(-1).astype(int), strict=True))
    folds = rows["study"].map(fold_of).to_numpy()
    table = open_run(out).trials().query("head == 'attention' and trial == @entry['trial']")
    for fold, best in table.set_index("fold")["best_epoch"].items():
        held, others = folds == fold, (folds >= 0) & (folds != fold)
        start = seed_of_fold(0, int(fold))
        head = make_head("attention", entry["params"], seed=start).with_budget(int(best))
        head.fit(X[others], y[others], studies=studies[others])
        expected = head.predict_proba(X[held], studies[held])[:, 1]
        assert own.loc[own["fold"] == fold, "probability"].to_numpy() == pytest.approx(
            expected, abs=1e-5
        )
    saved = load_model(out / "models" / "attention").head
    ledger = open_run(out).trials().query("head == 'attention' and trial == @entry['trial']")
    budget = round(ledger["best_epoch"].median())
    assert saved.best_epoch_ == budget
    head = make_head("attention", entry["params"], seed=0).with_budget(budget)
    head.fit(X[folds >= 0], y[folds >= 0], studies=studies[folds >= 0])
    assert saved.predict_proba(X, studies) == pytest.approx(
        head.predict_proba(X, studies), abs=1e-5
    )


def test_comparing_studies_includes_attention_and_comparing_images_leaves_it_out(pooled):
    out = pooled[1]
    assert set(HEADS) <= {row["head"] for row in compare([out])["rows"]}
    ran = CliRunner().invoke(main, ["compare", str(out), "--level", "image", "--json"])
    assert ran.exit_code == 0, ran.output
    found = {row["head"] for row in json.loads(ran.stdout)["rows"]}
    assert found == {*HEADS, "class-prior", "region-prior"} - {"attention"}


def test_studies_of_one_view_are_scored_with_their_own_labels(tmp_path):
    """Where studies sort otherwise than images do, nothing may be mixed up."""
    table = make_table(n_patients=96).drop_duplicates("study").reset_index(drop=True)
    table["study"] = [f"study{999 - i:03d}" for i in range(len(table))]
    data = make_data(tmp_path, {"mean": 3.0}, table=table)
    space = let_attention_learn(tmp_path)
    result = sweep(*data, tmp_path / "run", **QUICK, heads=("attention",), space=space).as_dict()
    own = predictions_of(tmp_path / "run", "attention")
    assert winners(result)["attention"]["cv"] == pytest.approx(cv_of(own))
    assert winners(result)["attention"]["cv"] > 0.9
    card = load_model(tmp_path / "run" / "models" / "attention").card
    assert card["scores"]["out_of_fold"]["auroc"] > 0.9


def test_a_study_is_abnormal_if_any_view_is(tmp_path):
    table = make_table(n_patients=96)
    rng = np.random.default_rng(3)
    flipped = table["label"].eq("1") & (rng.random(len(table)) < 0.4) & (table["split"] == "train")
    table.loc[flipped, "label"] = "0"
    data = make_data(tmp_path, {"mean": 2.0}, table=table, label_level="image")
    space = let_attention_learn(tmp_path)
    result = sweep(*data, tmp_path / "run", **QUICK, heads=("attention",), space=space).as_dict()
    own = predictions_of(tmp_path / "run", "attention")
    expected = table.groupby("study", sort=True)["label"].max().astype(int).to_numpy()
    assert (own["label"].to_numpy(int) == expected).all()
    assert winners(result)["attention"]["cv"] == pytest.approx(cv_of(own))


# Covariates


def make_telling_table(n_patients=160):
    """Let a number and a word know the label; some are unknown, one word is never in train."""
    table = make_table(n_patients=n_patients, seed=2)
    rng = np.random.default_rng(11)
    label = table["label"].astype(int).to_numpy()
    age = np.round(40 + 25 * label + rng.normal(0, 6, len(table)), 3).astype(str)
    table["age"] = np.where(rng.random(len(table)) < 0.15, "", age)
    side = np.where(rng.random(len(table)) < 0.9, label, 1 - label)
    table["side"] = np.where(side == 1, "left", "right")
    table.loc[table.index[table["split"] == "test"][:2], "side"] = "both"
    table.loc[table.index[:2], "side"] = " "
    table["mixed"] = np.where(np.arange(len(table)) % 2, "12", "twelve")
    table["device"] = [f"device {patient}" for patient in table["patient"]]
    table["empty"] = ""
    table["late"] = np.where(table["split"] == "test", "word", "3")
    table["patient"] = [f"{NAMED['patient']}^{patient}" for patient in table["patient"]]
    table["study"] = [f"{NAMED['study']}-{study}" for study in table["study"]]
    table["image"] = [f"{NAMED['image']}/{image}" for image in table["image"]]
    return table


@pytest.fixture(scope="module")
def telling_data(tmp_path_factory):
    home = tmp_path_factory.mktemp("telling")
    return make_data(home, {"mean": 0.0, "grid4": 0.0}, table=make_telling_table())


@pytest.fixture(scope="module")
def telling(telling_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("telling") / "run"
    options = {**QUICK, "heads": HEADS, "pool": "mean,grid4", "covariates": ("age", "side")}
    return sweep(*telling_data, out, **options).as_dict(), out


@pytest.mark.parametrize("head", HEADS)
def test_a_covariate_that_knows_the_label_is_learnt_from(telling, head):
    own = predictions_of(telling[1], head)
    assert winners(telling[0])[head]["cv"] > 0.8
    assert auroc_of(own[own["split"] == "test"]) > 0.8


@pytest.mark.parametrize("head", HEADS)
def test_without_covariates_noise_lands_at_chance(telling_data, tmp_path, head):
    sweep(*telling_data, tmp_path / "run", **QUICK, heads=(head,), pool="mean")
    row = next(r for r in open_run(tmp_path / "run").scores()["rows"] if r["head"] == head)
    auroc = row["scores"]["auroc"]
    assert auroc["low"] < 0.5 < auroc["high"]
    assert load_model(tmp_path / "run" / "models" / head).card["covariates"] is None


def test_the_card_holds_the_encoder_and_with_it_predictions_repeat(telling, telling_data):
    result, out = telling
    for head in HEADS:
        model = load_model(open_run(out).model_path(head))
        X, rows = read_columns(telling_data, winners(result)[head]["pooling"])
        encoder = read_covariates(model.card["covariates"])
        assert encoder.names[:2] == ["age", "age is missing"]
        X = np.hstack([X, encoder.transform(rows)])
        own = predictions_of(out, head)
        if head == "attention":
            again = model.head.predict_proba(X, rows["study"].to_numpy(str))[:, 1]
        else:
            again = model.head.predict_proba(X)[:, 1]
        test = (own["split"] == "test").to_numpy()
        assert np.array_equal(again[test], own["probability"].to_numpy()[test])


def test_the_encoder_knows_train_alone(telling, telling_data):
    [age, side] = load_model(telling[1] / "models" / "mlp").card["covariates"]["columns"]
    rows = read_manifest(telling_data[1]).rows
    known = rows.loc[(rows["split"] == "train") & (rows["age"] != ""), "age"].astype(float)
    assert age == {"name": "age", "kind": "numeric", "fill": known.median()}
    assert side["categories"] == ["left", "right"]


def test_only_the_fractions_own_rows_teach_the_encoder(telling_data, tmp_path):
    options = {**QUICK, "heads": ("logistic",), "pool": "mean", "covariates": ("age",)}
    sweep(*telling_data, tmp_path / "run", **options, train_fraction=0.5)
    own = predictions_of(tmp_path / "run", "logistic").set_index("sha256")
    rows = read_manifest(telling_data[1]).rows.set_index("sha256")
    ages = pd.to_numeric(rows["age"][rows["split"] == "train"])
    chosen = ages[own["fold"].reindex(ages.index).notna()]
    card = load_model(tmp_path / "run" / "models" / "logistic").card
    assert card["covariates"]["columns"][0]["fill"] == chosen.median() != ages.median()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("mixed", "mixed is of unknown kind"),
        ("agee", "did you mean age?"),
        ("patient", "patient is not a covariate"),
        ("age,study", "study is not a covariate"),
        ("image", "image is not a covariate"),
        ("sha256", "sha256 is not a covariate"),
        ("label", "label is not a covariate"),
        ("split", "split is not a covariate"),
        ("device", "looks like an identifier"),
        ("empty", "unknown in every labelled training row"),
        ("late", "late is of unknown kind"),
        ("age,age", "given twice"),
    ],
)
def test_covariates_that_cannot_be_are_refused_before_training(
    telling_data, tmp_path, untrained, names, words
):
    out = tmp_path / "run"
    assert words in refuse(command(telling_data, out, "--covariates", names), out)


def test_nothing_of_patients_studies_or_paths_is_in_a_run(telling):
    out = telling[1]
    for path in out.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        if path.suffix == ".parquet":
            content = pd.read_parquet(path).to_csv().encode()
        for name in NAMED.values():
            assert name.encode() not in content, path
            assert name not in str(path)
    assert b'"age"' in (out / "models" / "mlp" / "model.json").read_bytes()


def test_nothing_of_patients_is_in_a_run_that_was_not_finished(telling_data, tmp_path, monkeypatch):
    def stop(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "train_unit", stop)
    with pytest.raises(KeyboardInterrupt):
        sweep(*telling_data, tmp_path / "run", **QUICK, pool="mean", covariates=("age", "side"))
    content = (tmp_path / "run" / "run.json").read_bytes()
    assert b"age,side" in content
    assert not [name for name in NAMED.values() if name.encode() in content]


# A fraction of the patients


@pytest.fixture(scope="module")
def fraction_data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("fractions"), n_patients=120)


@pytest.fixture(scope="module")
def fractions(fraction_data, tmp_path_factory):
    home, found = tmp_path_factory.mktemp("fractions"), {}
    for share in (0.25, 0.5, 1.0):
        found[share] = home / str(share)
        options = {**QUICK, "heads": ("logistic", "attention"), "train_fraction": share}
        sweep(*fraction_data, found[share], **options)
    return found


def trained_rows(out, data):
    """Return the manifest rows that a run has learnt from, with their folds."""
    own = predictions_of(out, "logistic")
    rows = read_manifest(data[1]).rows.merge(own[["sha256", "fold"]], on="sha256")
    return rows[rows["fold"].notna()]


def test_smaller_fractions_lie_within_larger_ones_and_folds_stay(fractions, fraction_data):
    rows = {share: trained_rows(out, fraction_data) for share, out in fractions.items()}
    patients = {share: set(found["patient"]) for share, found in rows.items()}
    assert patients[0.25] < patients[0.5] < patients[1.0]
    assert len(patients[1.0]) == 90
    assert 0.25 <= len(patients[0.25]) / 90 < 0.32
    assert 0.5 <= len(patients[0.5]) / 90 < 0.57
    whole = rows[1.0].set_index("image")["fold"]
    for found in rows.values():
        folds = found.set_index("image")["fold"]
        assert (folds == whole[folds.index]).all()
        every = rows[1.0][rows[1.0]["patient"].isin(set(found["patient"]))]
        assert len(every) == len(found)  # all views of a chosen patient


def test_a_smaller_fraction_is_tested_on_the_same_rows(fractions):
    tested = [
        predictions_of(out, "logistic").query("split == 'test'") for out in fractions.values()
    ]
    assert all(rows["sha256"].tolist() == tested[0]["sha256"].tolist() for rows in tested)
    assert tested[0]["probability"].tolist() != tested[-1]["probability"].tolist()


def test_the_card_lists_the_images_of_the_fraction(fractions, fraction_data):
    for out in fractions.values():
        names = trained_rows(out, fraction_data)["sha256"]
        codes = {hashlib.sha256(bytes.fromhex(name)).hexdigest()[:16] for name in names}
        for head in ("logistic", "attention"):
            assert set(load_model(out / "models" / head).card["training_images"]) == codes


def test_rows_outside_the_fraction_teach_nothing(fractions, fraction_data, tmp_path):
    """Their embeddings may be absurd: no prediction on test or out of fold changes."""
    out, rows = fractions[0.25], read_manifest(fraction_data[1]).rows
    chosen = set(trained_rows(out, fraction_data)["image"])
    outside = rows.loc[(rows["split"] == "train") & ~rows["image"].isin(chosen), "image"]
    table = make_table(n_patients=120)
    make_pooled_cache(tmp_path / "cache", table, {"mean": 1.5}, poison=outside)
    options = {**QUICK, "heads": ("logistic", "attention"), "train_fraction": 0.25}
    sweep(tmp_path / "cache", fraction_data[1], tmp_path / "run", **options)
    for head in ("logistic", "attention"):
        before, after = predictions_of(out, head), predictions_of(tmp_path / "run", head)
        counts = (before["split"] == "test") | before["fold"].notna()
        assert np.array_equal(before["probability"][counts], after["probability"][counts])
        assert not np.array_equal(before["probability"], after["probability"])


def test_the_run_and_its_command_record_the_fraction(fractions):
    info = open_run(fractions[0.25]).info
    assert info.asked.train_fraction == 0.25
    assert "--train-fraction 0.25" in info.command
    assert "--train-fraction" not in open_run(fractions[1.0]).info.command


@pytest.mark.parametrize("share", ["0", "1.5", "-0.1", "nan"])
def test_a_fraction_out_of_range_is_refused(fraction_data, tmp_path, untrained, share):
    out = tmp_path / "run"
    ran = CliRunner().invoke(main, command(fraction_data, out, "--train-fraction", share))
    assert ran.exit_code == 2
    assert "--train-fraction" in ran.stderr
    assert not out.exists()


def test_another_fraction_is_another_question(fractions, fraction_data):
    ran = CliRunner().invoke(
        main, command(fraction_data, fractions[0.5], "--heads", "logistic,attention",
                      "--configs", "1", "--train-fraction", "0.25"),
    )  # fmt: skip
    assert ran.exit_code == 1
    assert "train_fraction was 0.5 there and is 0.25 here" in ran.stderr
