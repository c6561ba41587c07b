"""A packaged model on another institution's images: what is scored, refused, said and kept."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from made_sweeps import make_data, make_pooled_cache, make_table, refuse

from medembed.cache.failures import Failure
from medembed.cache.spec import CacheSpec
from medembed.cache.store import create_cache
from medembed.cli import main
from medembed.core.errors import ModelError, RunError
from medembed.dataset.manifest import make_manifest, write_manifest
from medembed.evaluation.drift.reference import VERDICTS
from medembed.evaluation.intervals import bootstrap_scores
from medembed.evaluation.recalibration import draw_patients
from medembed.evaluation.scores import by_study
from medembed.heads.packaging import load_model, save_model
from medembed.prediction import external_validation
from medembed.report import page
from medembed.report.external import find_external, render_external
from medembed.report.figures.calibration import plot_calibration
from medembed.results.comparison import compare
from medembed.results.predictions import image_code
from medembed.results.runs import open_run
from medembed.sweeps import sweep

FAST = {"n_resamples": 100}


def make_external(home, *, seed=11, n_patients=40, signal_size=0.8, **changes):
    """Write manifest and cache of other patients; `changes` are columns of the manifest."""
    table = make_table(n_patients, seed=seed)
    for name in ("image", "patient", "study"):
        table[name] = f"Elsewhere-{seed}-" + table[name]
    table["sha256"] = [hashlib.sha256(image.encode()).hexdigest() for image in table["image"]]
    signal = table["label"]
    table = table.assign(**changes)
    home.mkdir(exist_ok=True)
    write_manifest(make_manifest(table, "study"), home / "manifest.csv")
    cache = make_pooled_cache(home / "cache", table.assign(label=signal), {"mean": signal_size})
    return cache, home / "manifest.csv"


def evaluate(*args, **options):
    """Return what the command prints."""
    run = external_validation.evaluate(*args, **options)
    return {"run": str(run.path), **run.scores()}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("external")


@pytest.fixture(scope="module")
def data(home):
    return make_data(home / "own", {"mean": 1.5}, n_patients=64)


@pytest.fixture(scope="module")
def swept(home, data):
    """A run of a head on images, one on studies, with a covariate beside the embeddings."""
    options = {"heads": ("logistic", "attention"), "n_configs": 1, "n_folds": 3, "jobs": 1}
    sweep(*data, home / "sweep", covariates=("region",), **options)
    return home / "sweep"


@pytest.fixture(scope="module")
def model(swept):
    return swept / "models" / "logistic"


@pytest.fixture(scope="module")
def external(home):
    return make_external(home / "other")


@pytest.fixture(scope="module")
def found(home, model, external):
    return evaluate(model, *external, home / "evaluated", recalibrate=12, **FAST)


@pytest.fixture
def moved(model, tmp_path):
    """The model alone, as it would be handed over."""
    shutil.copytree(model, tmp_path / "handed" / "logistic")
    return tmp_path / "handed" / "logistic"


def row_of(result, head="logistic"):
    return next(row for row in result["rows"] if row["head"] == head)


def test_own_test_rows_give_what_the_sweep_gave(home, swept, data, model):
    """Thresholds, calibration, scores, priors: all are the model's own."""
    ours = compare([swept], **FAST)
    for head in ("logistic", "attention"):
        out = home / f"own-{head}"
        again = evaluate(model.with_name(head), *data, out, split="test", **FAST)
        for name in (head, "class-prior", "region-prior"):
            expected, seen = row_of(ours, name), row_of(again, name)
            kept = ("operating_points", "net_benefit", "at_sensitivity")
            for key in ("threshold", "scores", "at_half", "regions", "views", *kept):
                assert seen[key] == expected[key], (name, key)
        assert "belong to the model's own test" in again["drop"]["note"]
        assert again["drop"]["scores"] == {}
        assert again["calibration"]["internal"] is None
    assert compare([swept, home / "own-logistic"], **FAST)["runs"][1]["dropped"] == 0


@pytest.fixture(scope="module")
def second(home, model, external):
    evaluate(model.with_name("attention"), *external, home / "second", **FAST)
    return home / "second"


def test_a_run_like_every_other(home, found, second):
    run = open_run(home / "evaluated")
    assert run.is_complete
    assert run.info.kind == "evaluation"
    predictions = run.predictions()
    assert set(predictions["head"]) == {"logistic", "class-prior", "region-prior"}
    assert set(predictions["split"]) == {"test"}
    result = compare([run.path])
    assert result["test"]["n_patients"] == 40
    assert row_of(compare([run.path], **FAST))["scores"] == row_of(found)["scores"]
    # at the level of images too, and beside a second model on the same images
    assert compare([run.path], level="image", **FAST)["test"]["n"] == len(make_table(40))
    both = compare([run.path, second], **FAST)
    assert [own["dropped"] for own in both["runs"]] == [0, 0]
    assert {(row["run"], row["head"]) for row in both["rows"]} >= {
        ("evaluated", "logistic"),
        ("second", "attention"),
    }
    assert any(pair["p"] is not None for pair in both["paired"])


def test_scores_are_those_of_the_saved_head_on_all_rows(home, found, model):
    run, saved = open_run(home / "evaluated"), load_model(model)
    own = by_study(run.predictions().query("head == 'logistic'"))
    row = row_of(found)
    assert row["threshold"] == saved.card["threshold"]
    assert row["calibration"] == saved.card["calibration"]
    odds = np.log(own["probability"] / (1 - own["probability"]))
    calibrated = 1 / (
        1 + np.exp(-(row["calibration"]["slope"] * odds + row["calibration"]["intercept"]))
    )
    expected = bootstrap_scores(
        own["label"].to_numpy(np.int8),
        calibrated.to_numpy(),
        own["patient"].to_numpy(),
        row["threshold"],
        n_resamples=100,
    )
    for name, score in expected.items():
        assert row["scores"][name] == pytest.approx(score.as_dict())


def test_priors_are_those_of_the_training_rows(home, swept):
    own = open_run(swept).predictions().query("head == 'class-prior' and split == 'train'")
    there = open_run(home / "evaluated").predictions()
    prior = there.query("head == 'class-prior'")["probability"].unique()
    assert prior == pytest.approx(own["label"].mean(), abs=1e-6)
    assert (
        there.query("head == 'region-prior'").groupby("region")["probability"].nunique().eq(1).all()
    )


def test_the_drop_compares_with_the_runs_own_test(found, swept):
    drop = found["drop"]
    assert drop["basis"] == "samples"
    assert drop["internal"]["n_patients"] == 16
    inside, here = row_of(compare([swept])), row_of(found)
    for name, entry in drop["scores"].items():
        assert entry["internal"]["value"] == pytest.approx(inside["scores"][name]["value"])
        assert entry["external"]["value"] == pytest.approx(here["scores"][name]["value"])
        assert entry["difference"]["difference"] == pytest.approx(
            entry["external"]["value"] - entry["internal"]["value"]
        )
    assert drop["scores"]["auroc"]["difference"]["low"] < 0
    assert set(drop["regions"]) == {"wrist"}  # of the own test; hands are new here


def test_calibration_and_recalibration_are_told(home, found):
    calibration, mended = found["calibration"], found["recalibrated"]
    line = calibration["calibrated"]["line"]
    own = by_study(open_run(home / "evaluated").predictions().query("head == 'logistic'"))
    assert line["share_abnormal"]["value"] == pytest.approx(own["label"].mean())
    # the signal is weaker there, so the model is too sure
    assert line["slope"]["value"] < 1
    assert calibration["raw"]["line"]["slope"] != line["slope"]
    assert calibration["internal"]["line"]["share_abnormal"] != line["share_abnormal"]
    drawn = draw_patients(own["patient"].to_numpy(), 12)
    assert mended["n_patients"] == 12
    assert mended["scored"] == {
        "n": int((~drawn).sum()),
        "n_abnormal": int(own["label"][~drawn].sum()),
        "n_patients": 28,
    }


def test_drift_is_measured_without_labels(home, found, model, external, tmp_path):
    assert found["drift"]["verdict"] in VERDICTS
    assert found["drift"]["n_patients"] == 40
    assert found["drift"]["columns"][0]["name"].startswith("mean[")
    assert {entry["region"] for entry in found["drift"]["regions"]} == {"hand", "wrist"}
    unlabelled = make_external(tmp_path / "unlabelled", label="")
    bare = evaluate(model, *unlabelled, tmp_path / "run", **FAST)
    assert bare["drift"] == found["drift"]
    far = make_external(tmp_path / "far", signal_size=40)
    strong = evaluate(model, *far, tmp_path / "strong", **FAST)["drift"]
    assert strong["verdict"] == "strong"
    assert strong["columns"][0]["name"] == "mean[0]"


def test_without_labels_there_are_drift_and_the_share_called_abnormal(model, tmp_path):
    data = make_external(tmp_path / "unlabelled", label="")
    found = evaluate(model, *data, tmp_path / "run", **FAST)
    assert found["rows"] == []
    assert {found[name] for name in ("drop", "calibration", "recalibrated")} == {None}
    own = open_run(tmp_path / "run").predictions().query("head == 'logistic'")
    assert 0 <= found["called_abnormal"]["low"] <= found["called_abnormal"]["value"] <= 1
    assert own["label"].isna().all()
    text = render_external(found)
    assert "nothing could be scored" in text
    assert "Called abnormal" in text
    assert open_run(tmp_path / "run").is_complete


def test_one_class_is_not_estimable_and_no_crash(model, tmp_path):
    data = make_external(tmp_path / "normal", label="0")
    found = evaluate(model, *data, tmp_path / "run", recalibrate=5, **FAST)
    row = row_of(found)
    assert row["scores"]["auroc"]["value"] is None
    assert row["scores"]["specificity"]["value"] is not None
    assert found["drop"]["scores"]["auroc"]["difference"]["difference"] is None
    assert found["calibration"]["calibrated"]["line"]["slope"]["value"] is None
    assert "hold 0 with abnormal studies" in found["recalibrated"]["note"]
    assert "not estimable" in render_external(found)
    assert compare([tmp_path / "run"], **FAST)["rows"]


def test_training_images_are_refused_by_code(model, data, tmp_path):
    out = tmp_path / "run"
    line = refuse(["evaluate", str(model), *map(str, data), "--out", str(out)], out)
    known = {image_code(sha256) for sha256 in make_table(64).query("split == 'train'")["sha256"]}
    named = line.split("by code: ")[1].split(", …")[0].split(", ")
    assert len(named) == 5
    assert set(named) < known
    assert "--split test" in line
    line = refuse(
        ["evaluate", str(model), *map(str, data), "--out", str(out), "--split", "train"], out
    )
    assert f"{len(known)} of the {len(known)} images" in line


def test_other_images_of_patients_it_knows_are_refused(model, tmp_path):
    """Of a patient's three images one is a training image, and one is filed under another case."""
    table = make_table(40, seed=11)
    row = int(table.index[table["patient"] == "patient002"][0])
    columns = {
        "patient": [f"Elsewhere-11-{name}" for name in table["patient"]],
        "study": [f"Elsewhere-11-{name}" for name in table["study"]],
        "sha256": [hashlib.sha256(f"{i}".encode()).hexdigest() for i in table.index],
    }
    columns["sha256"][row] = make_table(64).query("split == 'train'")["sha256"].iloc[0]
    columns["patient"][row + 2] = "ELSEWHERE-11-PATIENT2"
    columns["study"][row + 2] = "another"
    given = make_external(tmp_path / "data", **columns)
    out = tmp_path / "run"
    line = refuse(["evaluate", str(model), *map(str, given), "--out", str(out)], out)
    assert f"1 of the {len(table)} images are among those that the model" in line
    assert f"2 of the {len(table)} images show patients of whom the model" in line
    given = make_external(tmp_path / "exact", **columns, ids="exact")
    line = refuse(["evaluate", str(model), *map(str, given), "--out", str(out)], out)
    assert f"1 of the {len(table)} images show patients of whom the model" in line


@pytest.mark.parametrize("n", [40, 999])
def test_recalibration_that_leaves_nobody_is_refused(n, model, external, tmp_path):
    out = tmp_path / "run"
    words = ["evaluate", str(model), *map(str, external), "--out", str(out)]
    assert "there are 40" in refuse([*words, "--recalibrate", str(n)], out)


def test_other_embeddings_are_refused(model, external, tmp_path):
    spec = CacheSpec("cd" * 32, {"size": [8, 8], "fit": "stretch"}, {"mean": (6,)}, "float32")
    create_cache(tmp_path / "cache", spec, {"source": "other"})
    out = tmp_path / "run"
    words = ["evaluate", str(model), str(tmp_path / "cache"), str(external[1]), "--out", str(out)]
    line = refuse(words, out)
    assert "encoder=" in line
    assert str(tmp_path / "cache") in line


def test_failed_images_are_counted_and_missing_ones_an_error(model, tmp_path):
    table = make_table(20, seed=3)
    table["sha256"] = [hashlib.sha256(f"x{image}".encode()).hexdigest() for image in table["image"]]
    write_manifest(make_manifest(table, "study"), tmp_path / "manifest.csv")
    make_pooled_cache(tmp_path / "cache", table.iloc[:-2], {"mean": 1.0})
    words = ["evaluate", str(model), str(tmp_path / "cache"), str(tmp_path / "manifest.csv")]
    ran = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "run")])
    assert ran.exit_code == 1
    assert "2 of" in ran.stderr
    assert "medembed extract" in ran.stderr
    assert not (tmp_path / "run").exists()
    from medembed.cache.store import open_cache

    lost = [Failure(name, "decode", "truncated") for name in table["sha256"].iloc[-2:]]
    open_cache(tmp_path / "cache").record_failures(lost)
    ran = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "run"), "--json"])
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert found["runs"][0]["left_out"] == 2
    assert {"level", "rows", "paired", "drop", "calibration", "recalibrated", "drift"} <= set(found)
    assert "2 images that could not be embedded" in " ".join(found["notes"])


def test_a_model_handed_over_alone_still_tells(moved, model, external, home, found, tmp_path):
    alone = evaluate(moved, *external, tmp_path / "run", **FAST)
    for head in ("logistic", "class-prior", "region-prior"):
        assert row_of(alone, head)["scores"]["auroc"] == row_of(found, head)["scores"]["auroc"]
    for key in ("threshold", "scores", "regions", "calibration"):
        assert row_of(alone)[key] == row_of(found)[key]
    ours, theirs = (open_run(path).predictions() for path in (tmp_path / "run", home / "evaluated"))
    assert ours["probability"].to_numpy() == pytest.approx(theirs["probability"].to_numpy())
    assert alone["drift"] == found["drift"]
    drop = alone["drop"]
    assert drop["basis"] == "mover"
    assert set(drop["regions"]) == {"wrist"}
    for name, entry in drop["scores"].items():
        assert entry["difference"]["difference"] == pytest.approx(
            found["drop"]["scores"][name]["difference"]["difference"]
        )
    assert drop["scores"]["auroc"]["difference"]["low"] is not None
    assert "MOVER" in render_external(alone)
    both = compare([tmp_path / "run", home / "evaluated"], **FAST)
    assert both["test"]["n"] == 40


def test_a_model_of_before_tells_what_it_can(moved, external, tmp_path):
    """Its card has no scores of test and no counts, and there is no reference."""
    saved = load_model(moved)
    card = {name: entry for name, entry in saved.card.items() if name != "data"}
    card["scores"] = {"out_of_fold": card["scores"]["out_of_fold"]}
    save_model(moved, saved.head, card, replace=True)
    found = evaluate(moved, *external, tmp_path / "run", **FAST)
    assert {row["head"] for row in found["rows"]} == {"logistic"}
    assert any("Priors are left out" in note for note in found["notes"])
    assert "no scores of its own test" in found["drop"]["note"]
    assert found["calibration"]["internal"] is None
    assert found["drift"]["verdict"] is None
    assert "holds no summary" in render_external(found)


def test_operating_points_elsewhere_are_those_of_the_model(home, swept, model, external, tmp_path):
    asked = {"operating_points": ["threshold=0.3", "specificity=0.9"], "prevalence": 0.05}
    found = evaluate(model, *external, tmp_path / "run", **asked, **FAST)
    card = load_model(model).card
    packaged = {own["name"]: own["threshold"] for own in card["operating_points"]}
    told = {own["name"]: own["threshold"] for own in row_of(found)["operating_points"]}
    assert told == {**packaged, "threshold=0.5": 0.5, "threshold=0.3": 0.3}
    assert "0.05 is abnormal" in render_external(found)
    assert "--operating-point threshold=0.3" in open_run(tmp_path / "run").info.command
    with pytest.raises(
        ModelError, match=r"no operating point sensitivity=0\.6: it packages youden"
    ):
        evaluate(model, *external, tmp_path / "no", operating_points=["sensitivity=0.6"], **FAST)
    assert not (tmp_path / "no").exists()
    with pytest.raises(RunError, match=r"no operating point sensitivity=0\.6: its model packages"):
        compare([swept, tmp_path / "run"], operating_points=["sensitivity=0.6"], **FAST)


def test_a_head_that_judges_studies_is_compared_without_priors(swept, external, second, tmp_path):
    saved = load_model(swept / "models" / "attention")
    card = {name: entry for name, entry in saved.card.items() if name != "data"}
    save_model(tmp_path / "attention", saved.head, card)
    alone = evaluate(tmp_path / "attention", *external, tmp_path / "run", **FAST)
    assert [row["head"] for row in alone["rows"]] == ["attention"]
    assert alone["test"]["n"] == 40
    beside = open_run(second).scores()
    scores = [row_of(own, "attention")["scores"]["auroc"] for own in (alone, beside)]
    assert scores[0] == pytest.approx(scores[1])


def test_the_same_question_is_answered_once_and_another_refused(
    home, found, model, external, tmp_path
):
    out, options = home / "evaluated", {"recalibrate": 12, **FAST}
    before = (out / "scores.json").stat().st_mtime_ns
    assert evaluate(model, *external, out, **options) == found
    assert (out / "scores.json").stat().st_mtime_ns == before
    evaluate(model, *external, tmp_path / "twin", **options)
    for name in ("scores.json", "predictions.parquet"):
        own = (tmp_path / "twin" / name).read_bytes()
        assert own.replace(b'"twin"', b'"evaluated"') == (out / name).read_bytes()
    words = ["evaluate", str(model), *map(str, external), "--out", str(out), "--seed", "5"]
    ran = CliRunner().invoke(main, words)
    assert ran.exit_code == 1
    assert "answers another question" in ran.stderr


def test_nothing_that_identifies_is_kept(found, home):
    for path in (home / "evaluated").rglob("*"):
        if path.is_file():
            assert b"Elsewhere" not in path.read_bytes(), path
            assert str(home).encode() not in path.read_bytes(), path


def test_the_table_fits_a_terminal_and_tells_it_all(found):
    text = render_external(found, width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for title in ("Against the model's own test", "Calibration", "Recalibrated on 12", "Drift of"):
        assert title in text


@pytest.mark.parametrize("damage", ['{"rows": [{}]}', '{"rows": [], "notes": 3}', '{"drop": 1}'])
def test_damaged_scores_are_named_on_the_page_and_the_terminal(damage, found, tmp_path):
    shutil.copytree(found["run"], tmp_path / "run")
    scores = json.loads((tmp_path / "run" / "scores.json").read_text()) | json.loads(damage)
    (tmp_path / "run" / "scores.json").write_text(json.dumps(scores))
    with pytest.raises(RunError, match="is damaged"):
        render_external({"run": str(tmp_path / "run"), **scores})
    if "drop" in damage:
        with pytest.raises(RunError, match=r"scores\.json: drop must be a table, not 1\. Del"):
            page.write_report([tmp_path / "run"], tmp_path / "page", n_resamples=20)


def test_scores_that_are_no_json_are_said_to_be_once(found, tmp_path):
    shutil.copytree(found["run"], tmp_path / "run")
    (tmp_path / "run" / "scores.json").write_text("{")
    with pytest.raises(RunError, match=r"scores\.json cannot be read") as refused:
        find_external([open_run(tmp_path / "run")])
    assert "RunError" not in str(refused.value)


def test_the_page_shows_drop_calibration_and_drift(found, home, tmp_path, monkeypatch):
    """With the one figure that an evaluation changes: the model brings two scalings, not four."""
    monkeypatch.setattr(page, "plot_all", lambda result, *_: [plot_calibration(result)])
    page.write_report([home / "evaluated"], tmp_path / "page", n_resamples=20)
    text = (tmp_path / "page" / "index.html").read_text()
    for words in (
        "Against the model&#39;s own test",
        "Slope (1 is right)",
        "Recalibrated on 12 patients",
        "Drift of the embeddings",
    ):
        assert words in text
