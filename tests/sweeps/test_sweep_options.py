"""What a sweep tries, gives up, and refuses: spaces, successive halving, data and options."""

import json
import shutil
from dataclasses import replace

import pytest
from click.testing import CliRunner
from made_sweeps import (
    QUICK,
    broken_table,
    command,
    cv_of,
    make_data,
    make_pooled_cache,
    make_table,
    predictions_of,
    refuse,
    winners,
)

from medembed.cache.failures import Failure
from medembed.cache.store import open_cache
from medembed.cli import main
from medembed.core.errors import TrainingDataError
from medembed.dataset.manifest import make_manifest
from medembed.heads.packaging import load_model
from medembed.results.runs import open_run
from medembed.sweeps import runner, sweep
from medembed.sweeps.data import PooledColumns, plan_batches
from medembed.sweeps.search_space import default_spaces

HALVING = "[mlp]\nconfigs = 8\nhidden = [4]\nlr = { low = 1e-5, high = 0.3, log = true }\n"


@pytest.fixture
def untrained(monkeypatch):
    """Let the test fail where anything is trained."""
    monkeypatch.setattr(runner, "train_unit", lambda *_a, **_k: pytest.fail("trained"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("options"), n_patients=120)


# Spaces


def write_space(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[mlp]\nlearning = 0.1\n", "learning"),
        ("[mlp]\ndropuot = 0.1\n", "did you mean 'dropout'?"),
        ("[mpl]\nlr = 0.1\n", "did you mean mlp?"),
        ("[lightgbm]\nrungs = [1]\n", "is for heads that train by epochs"),
        ("[mlp]\nlr = \n", "is not TOML"),
        ("[logistic]\nC = -1.0\n", "C"),
        ("[logistic]\nrandom_state = 3\n", "set by the sweep"),
    ],
)
def test_a_wrong_space_is_refused_before_training(data, tmp_path, untrained, text, words):
    out, space = tmp_path / "run", write_space(tmp_path / "space.toml", text)
    assert words in refuse(command(data, out, "--space", str(space)), out)


def test_a_space_of_no_file_is_refused(data, tmp_path, untrained):
    out = tmp_path / "run"
    assert "no.toml" in refuse(command(data, out, "--space", str(tmp_path / "no.toml")), out)


def test_a_spaces_constants_and_counts_reach_the_ledger(data, tmp_path):
    space = write_space(
        tmp_path / "space.toml",
        "[mlp]\nconfigs = 3\nhidden = [5]\nepochs = 2\nlr = { low = 0.001, high = 0.1 }\n"
        "[logistic]\nC = [0.5, 0.25]\n",
    )
    options = {**QUICK, "n_configs": None, "heads": ("mlp",), "space": space}
    sweep(*data, tmp_path / "run", **options)
    table = open_run(tmp_path / "run").trials()
    params = table.query("head == 'mlp'").drop_duplicates("trial")["params"].tolist()
    assert len(params) == 3
    assert all(p["hidden"] == [5] and p["epochs"] == 2 for p in params)
    assert len({p["lr"] for p in params}) == 3
    assert all(0.001 <= p["lr"] <= 0.1 for p in params)
    tried = table.query("head == 'logistic'").drop_duplicates("trial")["params"].tolist()
    assert [p["C"] for p in tried] == [0.5, 0.25]
    model = load_model(tmp_path / "run" / "models" / "mlp").head
    assert model.get_params()["hidden"] == (5,)


def test_configs_on_the_command_line_override_the_spaces(data, tmp_path):
    space = write_space(
        tmp_path / "space.toml",
        "[mlp]\nconfigs = 7\nepochs = 1\nlr = { low = 0.001, high = 0.1 }\n",
    )
    options = ["--space", str(space), "--configs", "2", "--heads", "mlp"]
    ran = CliRunner().invoke(main, command(data, tmp_path / "run", *options))
    assert ran.exit_code == 0, ran.output
    run = open_run(tmp_path / "run")
    assert run.trials().groupby("head")["trial"].nunique().to_dict() == {"logistic": 2, "mlp": 2}
    assert "--configs 2" in run.info.command


def test_a_head_that_the_file_does_not_name_has_the_default_space(data, tmp_path):
    space = write_space(tmp_path / "space.toml", "[logistic]\nC = 0.125\n")
    options = {**QUICK, "n_configs": 3, "heads": ("lightgbm",), "space": space}
    sweep(*data, tmp_path / "run", **options)
    table = open_run(tmp_path / "run").trials().drop_duplicates(["head", "trial"])
    trees = table.query("head == 'lightgbm'").sort_values("trial")["params"].tolist()
    assert trees == default_spaces()["lightgbm"].draw(3, seed=0)
    [only] = table.query("head == 'logistic'")["params"]
    assert only["C"] == 0.125


# Successive halving


def statuses(out):
    """Return the status of each MLP by trial, which has to be the same on all folds."""
    table = open_run(out).trials().query("head == 'mlp'")
    assert (table.groupby("trial").size() == 3).all()
    assert (table.groupby("trial")["fold"].nunique() == 3).all()
    assert (table.groupby("trial")["status"].nunique() == 1).all()
    return table.groupby("trial")["status"].first()


@pytest.fixture(scope="module")
def halved(data, tmp_path_factory):
    home = tmp_path_factory.mktemp("halved")
    space = write_space(home / "space.toml", HALVING + "rungs = [1, 2]\n")
    options = {**QUICK, "n_configs": None, "heads": ("mlp",), "space": space}
    return sweep(*data, home / "run", **options).as_dict(), home / "run", options


def test_halving_retires_three_quarters_of_eight_on_all_folds_alike(halved):
    found = statuses(halved[1])
    assert found.value_counts().to_dict() == {"retired": 6, "ok": 2}
    table = open_run(halved[1]).trials().query("head == 'mlp' and status == 'retired'")
    assert table["score"].notna().all()
    assert table["best_epoch"].max() <= 2
    assert table["error"].isna().all()


@pytest.mark.parametrize(
    ("n_configs", "sizes"),
    [(11, [11]), (12, [6, 6]), (16, [8, 8]), (20, [10, 10]), (33, [11, 11, 11]), (64, [16] * 4)],
)
def test_cohorts_are_of_equal_size_and_at_least_two_of_many(n_configs, sizes):
    spaces = {"mlp": default_spaces()["mlp"]}
    batches = plan_batches(["mlp"], [PooledColumns("mean")], spaces, n_configs, 2, {"seed": 0})
    trials = [trial for batch in batches for trial in batch.trials]
    assert [len(batch.trials) for batch in batches] == sizes
    assert [trial.number for trial in trials] == list(range(n_configs))
    drawn = spaces["mlp"].draw(n_configs, 0)
    assert [{**t.params, "precision": "auto"} for t in trials] == [
        {**params, "precision": "auto"} for params in drawn
    ]


def test_without_rungs_a_batch_is_as_large_as_it_can_be():
    spaces = {"mlp": replace(default_spaces()["mlp"], rungs=())}
    batches = plan_batches(["mlp"], [PooledColumns("mean")], spaces, 16, 2, {"seed": 0})
    assert [len(batch.trials) for batch in batches] == [16]


def test_the_winner_of_a_halving_went_to_the_end_on_all_folds(halved):
    entry = winners(halved[0])["mlp"]
    assert statuses(halved[1])[entry["trial"]] == "ok"
    assert cv_of(predictions_of(halved[1], "mlp")) == pytest.approx(entry["cv"])


def test_a_retired_trial_never_wins_whatever_its_score(halved, data, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(halved[1], out)
    (out / "scores.json").unlink()
    lines = []
    for line in (out / "trials.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["status"] == "retired":
            record["score"] = 1.0
        lines.append(json.dumps(record) + "\n")
    (out / "trials.jsonl").write_text("".join(lines))
    again = sweep(*data, out, **halved[2]).as_dict()
    assert winners(again)["mlp"]["trial"] == winners(halved[0])["mlp"]["trial"]


def test_without_rungs_all_go_to_the_end(data, tmp_path):
    space = write_space(tmp_path / "space.toml", HALVING + "rungs = []\nepochs = 3\n")
    options = {**QUICK, "n_configs": None, "heads": ("mlp",), "space": space}
    sweep(*data, tmp_path / "run", **options)
    assert (statuses(tmp_path / "run") == "ok").all()
    assert len(statuses(tmp_path / "run")) == 8


@pytest.mark.parametrize("metric", ["auroc", "brier"])
def test_the_half_that_is_worse_after_the_rung_is_retired(data, tmp_path, metric):
    """Eight that are trained for one epoch alone tell which half that is."""
    found = {}
    for name, more in (("alone", "epochs = 1\n"), ("halved", "epochs = 4\nrungs = [1]\n")):
        space = write_space(tmp_path / f"{name}.toml", HALVING + more)
        options = {**QUICK, "n_configs": None, "heads": ("mlp",), "metric": metric}
        sweep(*data, tmp_path / name, **options, space=space)
        found[name] = open_run(tmp_path / name).trials().query("head == 'mlp'")
    means = found["alone"].groupby("trial")["score"].mean()
    ordered = means.sort_values(ascending=metric == "brier").index
    kept = statuses(tmp_path / "halved")
    assert means[ordered[3]] != means[ordered[4]]
    assert set(kept[kept == "ok"].index) == set(ordered[:4])
    retired = found["halved"].query("status == 'retired'").groupby("trial")["score"].mean()
    assert retired.to_numpy() == pytest.approx(means[retired.index].to_numpy(), abs=1e-3)


def test_rungs_beyond_the_last_epoch_train_no_longer(data, tmp_path):
    space = write_space(tmp_path / "space.toml", HALVING + "rungs = [2, 9]\nepochs = 3\n")
    options = {**QUICK, "n_configs": None, "heads": ("mlp",), "space": space}
    sweep(*data, tmp_path / "run", **options)
    assert open_run(tmp_path / "run").trials().query("head == 'mlp'")["best_epoch"].max() <= 3
    assert statuses(tmp_path / "run").value_counts().to_dict() == {"retired": 6, "ok": 2}


# Data and options that allow no sweep


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no train", "no train rows"),
        ("no labels", "has a label"),
        ("one class", "only abnormal"),
        ("no test", "no labelled test rows"),
        ("few patients", "patients"),
    ],
)
def test_data_without_what_training_needs_is_one_line(tmp_path, untrained, kind, words):
    broken, out = make_data(tmp_path / "data", table=broken_table(kind)), tmp_path / "run"
    assert words in refuse(command(broken, out), out)


def test_one_class_is_named_either_way(tmp_path, untrained):
    table = make_table()
    table.loc[table["split"] == "train", "label"] = "0"
    broken, out = make_data(tmp_path / "data", table=table), tmp_path / "run"
    line = refuse(command(broken, out), out)
    assert "only normal" in line
    assert "abnormal (label 1)" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--folds", "91"], "91 folds"),
        (["--folds", "60"], "60 folds"),
        (["--metric", "auc"], "auroc"),
        (["--heads", "logistik"], "did you mean logistic?"),
        (["--pool", "mean+mean"], "twice"),
    ],
)
def test_options_that_do_not_fit_are_one_line(data, tmp_path, untrained, options, words):
    out = tmp_path / "run"
    assert words in refuse(command(data, out, *options), out)


def test_what_is_not_there_is_one_line(data, tmp_path, untrained):
    out, nothing = tmp_path / "run", tmp_path / "nothing"
    assert "nothing" in refuse(command((nothing, data[1]), out), out)
    assert "nothing" in refuse(command((data[0], nothing), out), out)


def test_all_test_images_failed_is_refused_before_training(tmp_path, untrained):
    table = make_table()
    train = table[table["split"] == "train"]
    cache = make_pooled_cache(tmp_path / "cache", train, {"mean": 1.0})
    missing = table.loc[table["split"] == "test", "sha256"]
    open_cache(cache).record_failures([Failure(name, "decode", "torn") for name in missing])
    with pytest.raises(TrainingDataError, match="all labelled test images failed"):
        sweep(cache, make_manifest(table, "study"), tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()


# What comes first, and what is shown


def test_trees_of_a_small_table_that_bin_alike_train_together_the_fewest_first(data, tmp_path):
    options = {"heads": ("lightgbm",), "n_configs": 3, "n_folds": 2, "jobs": 1}
    table = sweep(*data, tmp_path / "run", **options).trials()
    trees = table[table["head"] == "lightgbm"]
    assert ["k_best" in params for params in trees["params"]] == [True] * 2 + [False] * 4
    assert trees["trial"].tolist() == [1, 1, 0, 2, 0, 2]
    assert trees["fold"].tolist() == [0, 1, 0, 0, 1, 1]


def test_a_new_run_and_one_that_had_ended_show_the_table_of_compare(data, tmp_path):
    run, points = tmp_path / "run", ["--operating-point", "sensitivity=0.8"]
    sweeps = [command(data, run, "--configs", "1", *points)] * 2
    first, *others = [
        CliRunner().invoke(main, arguments).stdout
        for arguments in (*sweeps, ["compare", str(run), *points])
    ]
    assert "logistic" in first
    assert others == [first, first]
