"""Sweeps with prompts: which heads they add, what they read, what is refused."""

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from made_sweeps import make_table, predictions_of
from made_words import make_prompts

from medembed.cache.spec import CacheSpec, keys_from_hex
from medembed.cache.store import create_cache
from medembed.cli import main
from medembed.core.errors import ModelError, RunError, TrainingDataError
from medembed.core.prompts import PromptEntry, Prompts, write_prompts
from medembed.dataset.manifest import make_manifest, write_manifest
from medembed.prediction import Predictor
from medembed.results.runs import open_run
from medembed.sweeps import sweep

WIDTH = 12
QUICK = {"n_folds": 3, "jobs": 1}


def make_cache(path, table, direction, poolings=("mean", "pooler")):
    spec = CacheSpec("ab" * 32, {"size": [8, 8]}, dict.fromkeys(poolings, (WIDTH,)), "float32")
    cache = create_cache(path, spec, {"source": "google/medsiglip-448", "precision": "fp32"})
    generator = np.random.default_rng(5)
    label = table["label"].astype(float).to_numpy() * 2 - 1
    seen = {name: generator.normal(size=(len(table), WIDTH)) for name in poolings}
    seen[poolings[-1]] += 1.2 * np.outer(label, direction)
    rows = {name: own.astype(np.float32) for name, own in seen.items()}
    cache.commit(keys_from_hex(table["sha256"].tolist()), rows)
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("words")
    table = make_table(96)
    write_manifest(make_manifest(table, "study"), home / "manifest.csv")
    direction = np.random.default_rng(1).normal(size=WIDTH)
    direction /= np.linalg.norm(direction)
    make_cache(home / "cache", table, direction)
    make_cache(home / "mean", table, direction, ("mean",))
    write_prompts(home / "prompts.safetensors", make_prompts(direction))
    data = (home / "cache", home / "manifest.csv")
    sweep(*data, home / "run", heads="logistic", prompts=home / "prompts.safetensors", **QUICK)
    return home


def test_prompts_add_two_heads_on_the_pooler(home):
    board = open_run(home / "run").leaderboard.set_index("head")
    assert set(board.index) == {"logistic", "zero-shot", "text-logistic"}
    assert board.loc["logistic", "pooling"] == "mean+pooler"
    assert board.loc["zero-shot", "pooling"] == board.loc["text-logistic", "pooling"] == "pooler"


def test_each_set_of_prompts_is_tried_and_one_is_chosen_on_train(home):
    trials = open_run(home / "run").trials().query("head == 'zero-shot'")
    assert {params["prompts"] for params in trials["params"]} == {"right", "astray"}
    [entry] = open_run(home / "run").leaderboard.query("head == 'zero-shot'").to_dict("records")
    assert entry["params"]["prompts"] == "right"
    assert entry["n_tried"] == 2


def test_a_space_may_name_the_set(home, tmp_path):
    (tmp_path / "space.toml").write_text('[zero-shot]\nprompts = "astray"\n')
    options = {"space": tmp_path / "space.toml", "prompts": home / "prompts.safetensors"}
    data = (home / "cache", home / "manifest.csv")
    run = sweep(*data, tmp_path / "run", heads="zero-shot", **options, **QUICK)
    tried = run.trials().query("head == 'zero-shot'")["params"]
    assert {params["prompts"] for params in tried} == {"astray"}
    (tmp_path / "space.toml").write_text('[zero-shot]\nprompts = "other"\n')
    with pytest.raises(ModelError, match="no set of prompts 'other'"):
        sweep(*data, tmp_path / "other", heads="zero-shot", **options, **QUICK)


@pytest.mark.parametrize("head", ["zero-shot", "text-logistic"])
def test_a_packaged_model_predicts_what_the_run_says(home, head):
    predictor = Predictor(home / "run" / "models" / head, cache=home / "cache")
    rows = [r for r in predictor.predict_manifest(home / "manifest.csv") if r["image"]]
    test = predictions_of(home / "run", head).query("split == 'test'")
    expected = predictor.card.calibration.apply(test["probability"].to_numpy())
    names = pd.read_csv(home / "manifest.csv").query("split == 'test'")["image"]
    found = {row["image"]: row["probability"] for row in rows}
    assert [found[name] for name in names] == pytest.approx(expected.tolist())


def test_other_prompts_are_another_question(home, tmp_path):
    data = (home / "cache", home / "manifest.csv")
    with pytest.raises(RunError, match="another question"):
        sweep(*data, home / "run", heads="logistic", prompts=make_prompts(np.ones(WIDTH)), **QUICK)


def region_prompts():
    prompts = make_prompts(np.ones(WIDTH))
    entries = [
        PromptEntry(set=e.set, label=e.label, region="hand" if i % 2 else None, text=e.text)
        for i, e in enumerate(prompts.document.prompts)
    ]
    return Prompts(prompts.document.model_copy(update={"prompts": entries}), prompts.text)


@pytest.mark.parametrize(
    ("cache", "prompts", "options", "words"),
    [
        ("cache", None, {"heads": "zero-shot"}, "head zero-shot needs prompts"),
        ("cache", make_prompts(np.ones(WIDTH), encoder="99" * 32), {}, "no partner in words"),
        ("mean", make_prompts(np.ones(WIDTH)), {}, "cache holds no pooler. Extract with --pool"),
        (
            "cache",
            make_prompts(np.ones(WIDTH + 1)),
            {},
            r"holds \(12,\) values of the pooler",
        ),
        ("cache", region_prompts(), {}, "Add --covariates region"),
    ],
)
def test_prompts_that_do_not_belong_are_refused(home, tmp_path, cache, prompts, options, words):
    given = {"heads": "logistic", **options, **QUICK}
    with pytest.raises(TrainingDataError, match=words):
        sweep(home / cache, home / "manifest.csv", tmp_path / "x", prompts=prompts, **given)
    assert not (tmp_path / "x").exists()


def test_prompts_with_regions_read_the_covariate(home, tmp_path):
    data = (home / "cache", home / "manifest.csv")
    run = sweep(
        *data,
        tmp_path / "run",
        heads="zero-shot",
        prompts=region_prompts(),
        covariates=("region",),
        **QUICK,
    )
    head = run.model("zero-shot").head
    assert head.directions_.shape == (2, WIDTH)
    assert head.region_columns_.tolist() == [WIDTH]


def test_the_command_names_a_missing_file(home, tmp_path):
    words = ["sweep", str(home / "cache"), str(home / "manifest.csv"), "-o", str(tmp_path / "x")]
    ran = CliRunner().invoke(main, [*words, "--prompts", str(tmp_path / "none.safetensors")])
    assert ran.exit_code == 1
    assert "`medembed prompts` makes one" in ran.stderr
