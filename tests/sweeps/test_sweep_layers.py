"""Scores by layer: out-of-fold, tested against the last, and one layer in memory at a time."""

import gc
import json
import weakref

import made_sweeps
import numpy as np
import pytest
from click.testing import CliRunner
from made_sweeps import QUICK, auroc_of, command, make_data, make_table, predictions_of
from sklearn.metrics import roc_auc_score

from medembed.cache.embeddings import choose_poolings, load_embeddings
from medembed.cache.store import open_cache
from medembed.cli import main
from medembed.core.errors import CacheError
from medembed.evaluation.scores import by_study
from medembed.report import page
from medembed.report.comparison import compare
from medembed.report.figures import plot_layers
from medembed.report.page import write_report
from medembed.results.runs import open_run
from medembed.sweeps import data as sweep_data
from medembed.sweeps import sweep
from medembed.sweeps.selection import choose

SIGNALS = {"mean": 0.6, "mean@1": 0.0, "mean@2": 1.6, "mean@3": 0.6, "max@3": 0.3}
POOL = "mean@all,mean"


@pytest.fixture(scope="module")
def layered(tmp_path_factory):
    """A cache in which block 2 of 3 knows the label best."""
    home = tmp_path_factory.mktemp("layered")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made_sweeps, "SHAPES", dict.fromkeys(SIGNALS, (made_sweeps.WIDTH,)))
        found = make_data(home, SIGNALS, table=make_table(n_patients=160))
    document = json.loads((home / "cache" / "cache.json").read_text())
    document["recorded"]["blocks"] = 3
    (home / "cache" / "cache.json").write_text(json.dumps(document))
    return found


@pytest.fixture(scope="module")
def run(layered, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    return sweep(*layered, out, heads="logistic", pool=POOL, **QUICK)


def test_layers_are_read_only_where_they_are_named(layered, tmp_path):
    cache = open_cache(layered[0])
    assert choose_poolings(cache, None) == ["mean"]
    assert load_embeddings(*layered).pooling == "mean"
    plain = sweep(*layered, tmp_path / "run", heads="logistic", **QUICK)
    assert set(plain.trials()["pooling"]) == {"mean"}
    assert plain.info.layers is None
    joined = load_embeddings(*layered, pool="mean@1+mean@3")
    assert joined.X.shape[1] == 2 * made_sweeps.WIDTH


def test_all_stands_for_every_block_in_the_cache(layered):
    found = sweep_data.list_poolings(open_cache(layered[0]), POOL)
    assert [own.name for own in found] == ["mean@1", "mean@2", "mean@3", "mean"]
    with pytest.raises(CacheError, match=r"no pooling 'cls@all'; it has mean, mean@1"):
        sweep_data.list_poolings(open_cache(layered[0]), "cls@all")


def test_a_layers_score_is_that_of_out_of_fold_predictions(run, layered, tmp_path):
    """The oracle is a sweep of that layer alone, whose predictions of train are out-of-fold."""
    [series] = run.info.layers
    assert [point["pooling"] for point in series["points"]] == [
        "mean@1",
        "mean@2",
        "mean@3",
        "mean",
    ]
    for point in series["points"]:
        alone = sweep(
            *layered, tmp_path / point["pooling"], heads="logistic", pool=point["pooling"], **QUICK
        )
        predicted = predictions_of(alone.path, "logistic").query("split == 'train'")
        assert point["auroc"]["value"] == pytest.approx(auroc_of(predicted), abs=1e-12)
        studies = by_study(predicted)
        assert point["auroc"]["value"] == pytest.approx(
            roc_auc_score(studies["label"].to_numpy(int), studies["probability"]), abs=1e-12
        )
        assert point["auroc"]["low"] < point["auroc"]["value"] < point["auroc"]["high"]


def test_the_planted_layer_is_found_and_tested_against_the_last(run):
    [series] = run.info.layers
    points = {point["pooling"]: point for point in series["points"]}
    assert (series["best"], series["last"], series["unfreeze"]) == ("mean@2", "mean", 1)
    assert points["mean"]["versus_last"] is None
    assert points["mean"]["block"] is None
    test = points["mean@2"]["versus_last"]
    difference = points["mean@2"]["auroc"]["value"] - points["mean"]["auroc"]["value"]
    assert test["difference"] == pytest.approx(difference, abs=1e-9)
    assert 0 < test["low"] < test["difference"] < test["high"]
    p_values = sorted(point["versus_last"]["p"] for point in series["points"][:-1])
    assert test["p"] == p_values[0]
    assert test["p_holm"] == pytest.approx(min(1.0, 3 * test["p"]))
    assert test["p_holm"] < 0.05


def test_labels_of_test_do_not_move_any_layer(run, layered, tmp_path):
    cache, manifest = layered
    lines = manifest.read_text().splitlines()
    header = lines[0].split(",")
    rows = [dict(zip(header, line.split(","), strict=True)) for line in lines[1:]]
    for row in rows:
        if row["split"] == "test":
            row["label"] = str(1 - int(row["label"]))
    other = tmp_path / "other.csv"
    text = "\n".join([lines[0], *(",".join(row.values()) for row in rows)])
    other.write_text(text + "\n")
    turned = sweep(cache, other, tmp_path / "run", heads="logistic", pool=POOL, **QUICK)
    assert turned.info.layers == run.info.layers
    assert turned.scores()["rows"] != run.scores()["rows"]


def test_no_more_than_one_layer_is_in_memory(layered, tmp_path, monkeypatch):
    tables, most = [], 0

    def load(*arguments, **options):
        nonlocal most
        gc.collect()
        most = max(most, sum(table() is not None for table in tables))
        found = load_embeddings(*arguments, **options)
        tables.append(weakref.ref(found))
        return found

    monkeypatch.setattr(sweep_data, "load_embeddings", load)
    sweep(*layered, tmp_path / "run", heads="logistic,mlp", pool=POOL, **QUICK)
    assert len(tables) >= 4
    assert most == 0  # when the next is read, the one before is gone


def test_shards_are_hashed_once_in_a_sweep(layered, tmp_path, monkeypatch):
    asked = []

    def load(*arguments, **options):
        asked.append(options["verify"])
        return load_embeddings(*arguments, **options)

    monkeypatch.setattr(sweep_data, "load_embeddings", load)
    sweep(*layered, tmp_path / "run", heads="logistic", pool=POOL, **QUICK)
    assert asked[0] is True
    assert not any(asked[1:])


def test_an_interrupted_probe_goes_on_and_ends_alike(run, layered, tmp_path, monkeypatch):
    from medembed.sweeps import layers

    seen = []

    def stop(*arguments):
        seen.append(arguments)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return choose(*arguments)

    monkeypatch.setattr(layers, "choose", stop)
    options = {**QUICK, "heads": "logistic", "pool": POOL}
    with pytest.raises(KeyboardInterrupt):
        sweep(*layered, tmp_path / "run", **options)
    monkeypatch.undo()
    again = sweep(*layered, tmp_path / "run", **options)
    assert again.info.layers == run.info.layers
    assert not (again.path / "folds").exists()


def test_the_command_says_what_the_layers_say(layered, tmp_path):
    options = ["--heads", "logistic", "--configs", "1", "--pool", POOL]
    ran = CliRunner().invoke(main, command(layered, tmp_path / "run", *options))
    assert ran.exit_code == 0, ran.output
    said = " ".join(ran.stderr.split())
    assert "logistic on mean: best after block 2 of 3, out-of-fold AUROC" in said
    assert "The blocks above 2 add nothing here: medembed finetune --unfreeze 1" in said


@pytest.fixture
def only_layers(monkeypatch):
    """Draw no other figure, which would take most of the time."""

    def draw(result, _test_set, _progress, formats):
        plots = [plot for plot in [plot_layers(result)] if plot]
        for plot in plots:
            plot.save(("svg", *formats))
        return plots

    monkeypatch.setattr(page, "plot_all", draw)


@pytest.mark.usefixtures("only_layers")
def test_the_page_draws_the_layers_and_lists_their_tests(run, tmp_path):
    written = write_report(run, tmp_path / "page", n_resamples=100)
    text = (tmp_path / "page" / "index.html").read_text()
    assert 'id="layers"' in text
    assert "Scores by layer of the encoder" in text
    names = {path.rpartition("/")[2] for path in written["figures"]}
    assert {"layers.svg", "layers.csv"} <= names
    lines = (tmp_path / "page" / "figures" / "layers.csv").read_text().splitlines()
    cells = [line.split(",") for line in lines[1:]]
    assert [(own[2], own[3]) for own in cells] == [
        ("mean@1", "1"),
        ("mean@2", "2"),
        ("mean@3", "3"),
        ("mean", "output"),
    ]
    [series] = run.info.layers
    values = [point["auroc"]["value"] for point in series["points"]]
    assert np.allclose([float(own[4]) for own in cells], values)
    assert compare(run).plot.layers() is not None


@pytest.mark.usefixtures("only_layers")
def test_a_run_without_layers_has_no_such_section(layered, tmp_path):
    plain = sweep(*layered, tmp_path / "run", heads="logistic", pool="mean@2", **QUICK)
    assert plain.info.layers is None  # one layer has nothing to be compared with
    write_report(plain, tmp_path / "page", n_resamples=100)
    assert 'id="layers"' not in (tmp_path / "page" / "index.html").read_text()
    assert not list((tmp_path / "page" / "figures").glob("layers.*"))


def test_two_series_keep_apart_and_an_unknown_number_of_blocks_gives_no_advice(layered, tmp_path):
    home = tmp_path / "copy"
    home.mkdir()
    (home / "shards").symlink_to(layered[0] / "shards")
    document = json.loads((layered[0] / "cache.json").read_text())
    del document["recorded"]["blocks"]
    (home / "cache.json").write_text(json.dumps(document))
    pool = "mean@2,mean@3,max@3,mean@1+mean@2"
    found = sweep(home, layered[1], tmp_path / "run", heads="logistic", pool=pool, **QUICK)
    [series] = found.info.layers
    assert [point["pooling"] for point in series["points"]] == ["mean@2", "mean@3"]
    assert (series["best"], series["n_blocks"], series["unfreeze"]) == ("mean@2", None, None)
    assert open_run(found.path).info.layers == found.info.layers
