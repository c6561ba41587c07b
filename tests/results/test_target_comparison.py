"""Targets side by side: tests within a target, Holm over all, means over those with an AUROC."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from made_pages import give_map
from made_runs import fit_sets, give_model, make_images, make_run
from matplotlib.text import Text
from statsmodels.stats.multitest import multipletests

from medembed.cli import main
from medembed.core.errors import RunError
from medembed.dataset.targets import ClassNames
from medembed.report import figures
from medembed.report.target_tables import render_targets
from medembed.results.comparison import ComparisonOptions, compare, compare_opened
from medembed.results.embedding_map import first_map
from medembed.results.methods import name_compared_classes
from medembed.results.target_comparison import compare_targets
from medembed.results.targets import TargetEntry, create_targets, open_targets

HEADS = {"logistic": 1.0, "mlp": 2.0}
QUICK = ComparisonOptions(n_resamples=50)


def make_targets(home, n_patients=80):
    """Two targets with runs (of the second, some labels are unknown) and one without."""
    counts = {"positive": 9, "negative": 9, "unknown": 0}
    entries = [TargetEntry(name=name, reason=None, **counts) for name in ("cast", "metal")]
    entries.append(TargetEntry(name="rare", reason="fold 0 has no positive image.", **counts))
    runs = create_targets(home, {"seed": 0}, entries, "medembed sweep cache m.csv --target cast")
    for seed, name in enumerate(("cast", "metal")):
        images = make_images(n_patients=n_patients, seed=seed)
        if name == "metal":
            images["label"] = images["label"].astype("Int8").mask(images["patient"] % 9 == 0)
        images["fold"] = images["fold"].where(images["label"].notna())
        asked, info = {"target": name}, {"kind": "sweep"}
        make_run(home / name, images, HEADS, seed=seed, info=info, asked=asked)
    return runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return make_targets(tmp_path_factory.mktemp("targets") / "wrist")


@pytest.fixture(scope="module")
def result(runs):
    return compare_targets(runs, QUICK)


def test_each_target_is_compared_as_its_run_alone_but_for_holms_correction(runs, result):
    for name, own in result["targets"].items():
        alone = compare(runs.run_path(name), n_resamples=50)
        for found, expected in zip(own["paired"], alone["paired"], strict=True):
            assert {**found, "p_holm": 0} == {**expected, "p_holm": 0}
        for found, expected in zip(own["rows"], alone["rows"], strict=True):
            assert found["scores"] == expected["scores"]
    assert result["not_estimable"] == {"rare": "fold 0 has no positive image."}


def test_holms_correction_runs_over_the_tests_of_all_targets(result):
    pairs = [pair for own in result["targets"].values() for pair in own["paired"]]
    tested = [pair for pair in pairs if pair["p"] is not None]
    expected = multipletests([pair["p"] for pair in tested], method="holm")[1]
    assert [pair["p_holm"] for pair in tested] == pytest.approx(expected)
    assert result["n_tests"] == len(tested)
    for own in result["targets"].values():
        best, *others = own["rows"]
        assert best["versus_best"] is None
        for row in others:
            [pair] = [p for p in own["paired"] if (p["a"], p["b"]) == (best["head"], row["head"])]
            assert row["versus_best"]["p_holm"] == pair["p_holm"]


def test_means_weigh_targets_equally_and_have_intervals(result):
    for row in result["macro"]:
        for score, mean in row["scores"].items():
            own = [
                next(r for r in target["rows"] if r["head"] == row["head"])["scores"][score][
                    "value"
                ]
                for target in result["targets"].values()
            ]
            assert mean["value"] == pytest.approx(np.mean(own))
        assert (row["targets"], row["left_out"]) == (["cast", "metal"], [])
    best = result["macro"][0]["scores"]["auroc"]
    assert best["low"] < best["value"] < best["high"]


def test_patients_in_both_targets_widen_the_interval_of_the_mean(tmp_path):
    """Two targets that are one and the same tell no more than one of them."""
    runs = make_targets(tmp_path / "same")
    shutil.rmtree(runs.run_path("metal"))
    shutil.copytree(runs.run_path("cast"), runs.run_path("metal"))
    found = compare_targets(runs, QUICK)
    mean = next(row for row in found["macro"] if row["head"] == "logistic")["scores"]["auroc"]
    rows = found["targets"]["cast"]["rows"]
    single = next(row for row in rows if row["head"] == "logistic")["scores"]["auroc"]
    assert mean["value"] == pytest.approx(single["value"])
    assert mean["high"] - mean["low"] == pytest.approx(single["high"] - single["low"], rel=0.02)


def test_a_target_whose_test_rows_have_one_class_is_left_out_of_the_mean(tmp_path):
    runs = make_targets(tmp_path / "runs")
    predictions = runs.run("metal").predictions()
    is_test = predictions["split"] == "test"
    predictions.loc[is_test, "label"] = 0
    runs.run("metal").write_predictions(predictions)
    found = compare_targets(open_targets(runs.path), QUICK)
    row = found["macro"][0]
    assert (row["targets"], row["left_out"]) == (["cast"], ["metal"])
    assert found["n_tests"] < 2 * len(found["targets"]["cast"]["paired"])


def test_unfinished_and_missing_runs_are_named(tmp_path):
    runs = make_targets(tmp_path / "runs")
    (runs.run_path("metal") / "scores.json").unlink()
    with pytest.raises(RunError, match=r"metal is unfinished"):
        compare_targets(runs, QUICK)
    shutil.rmtree(runs.run_path("metal"))
    with pytest.raises(RunError, match=r"no run of target metal yet\. Finish the sweep with"):
        compare_targets(runs, QUICK)
    with pytest.raises(RunError, match="does not hold a run per target"):
        open_targets(tmp_path)


def test_tables_fit_the_terminal_and_name_every_target(result):
    text = render_targets(result, width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "AUROC [95 %] by target" in text
    assert "rare: not estimable, fold 0 has no positive image." in text.replace("\n", " ")
    assert text.index("mean ") < text.index("cast: heads on test studies")
    csv = pd.read_csv(io.StringIO(render_targets(result, "csv")))
    assert set(csv["target"]) == {"cast", "metal", "mean"}
    assert len(csv) == 3 * 4
    assert "\\toprule" in render_targets(result, "latex")
    assert "| cast |" in render_targets(result, "markdown")


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    ran = CliRunner().invoke(main, ["report", str(runs.path), "-o", str(out), "--json"])
    assert ran.exit_code == 0, ran.output
    return out, json.loads(ran.stdout)


def test_the_page_has_a_tab_for_each_target_and_no_path_or_network(runs, written):
    out, document = written
    assert document["page"] == str(out / "index.html")
    assert list(document["targets"]) == ["cast", "metal"]
    overview = (out / "index.html").read_text()
    assert 'href="cast/index.html">cast</a>' in overview
    assert "<script" not in overview
    assert "rare: not estimable" in overview
    own = (out / "metal" / "index.html").read_text()
    assert 'href="../metal/index.html" aria-current="page">metal</a>' in own
    assert 'href="../index.html">All targets</a>' in own
    for page in (overview, own):
        assert str(runs.path.parent) not in page
        assert "http" not in page.replace("http-equiv", "")
    assert (out / "cast" / "figures" / "roc.svg").exists()


def test_cases_of_a_target_have_the_answers_to_the_others(runs, written):
    for own, other in (("cast", "metal"), ("metal", "cast")):
        text = (written[0] / own / "index.html").read_text()
        document = json.loads(re.search(r'id="page-data">(.*?)</script>', text, re.S)[1])
        assert document["target"] == own
        assert list(document["cases"]["targets"]) == [other]
        found = base64.b64decode(document["cases"]["targets"][other]["data"])
        rows = runs.run(other).predictions()
        labels = rows["label"].fillna(2).astype(int).groupby(rows["sha256"].str[:16]).first()
        expected = [int(labels[films.split()].iloc[0]) for films in document["cases"]["films"]]
        assert list(found) == expected
        assert len(set(expected)) == (3 if other == "metal" else 2)


def test_commands_take_a_targets_run_and_refuse_the_directory(runs, tmp_path):
    def fail(*words):
        ran = CliRunner().invoke(main, list(map(str, words)))
        assert ran.exit_code != 0
        return ran.stderr

    for words in (
        ("compare", runs.path),
        ("predict", runs.path, "x.png"),
        ("evaluate", runs.path, "cache", "m.csv", "-o", tmp_path / "e"),
    ):
        assert "it holds one for each target, cast, metal. Name one" in fail(*words)
    assert "stands alone" in fail("report", runs.path, runs.path / "cast", "-o", tmp_path / "p")
    assert "takes one directory" in fail("compare", runs.path, "x", "--by", "target")
    ran = CliRunner().invoke(main, ["compare", str(runs.path / "cast"), "--json"])
    assert ran.exit_code == 0
    tables = tmp_path / "tables"
    words = ["compare", str(runs.path), "--by", "target", "--json", "--tables", str(tables)]
    ran = CliRunner().invoke(main, words)
    assert ran.exit_code == 0, ran.output
    assert list(json.loads(ran.stdout)["targets"]) == ["cast", "metal"]
    assert (tables / "targets.csv").exists()
    assert (tables / "metal" / "heads.tex").exists()


# The words of a target's pages and tables

OF_THE_LABEL = re.compile(r"\b(?:ab)?normal\b|\babn\.", re.IGNORECASE)


@pytest.fixture(scope="module", params=[120, 16])
def metal(request, tmp_path_factory):
    """A run of a target with prediction sets and a map; of few patients, scores lack limits."""
    home = tmp_path_factory.mktemp("metal")
    images = make_images(n_patients=request.param)
    run = make_run(home / "run", images, HEADS, asked={"target": "metal"})
    sets = fit_sets(run, "logistic").as_dict()
    give_model(run, "logistic", target="metal", conformal=sets)
    give_map(run, images)
    return run, home


def read_words(html):
    """Return what a page says without its script, and its pictures' alternatives."""
    shown = re.sub(r"<(style|script)\b.*?</\1>", " ", html, flags=re.DOTALL)
    return re.sub(r'src(?:set)?="data:[^"]*"', " ", shown)


def test_a_targets_page_speaks_of_the_target_and_not_of_the_label(metal):
    run, home = metal
    words = ["report", str(run.path), "-o", str(home / "page"), "--checklist", "claim"]
    ran = CliRunner().invoke(main, [*words, "--prevalence", "0.2", "--margin", "0.1"])
    assert ran.exit_code == 0, ran.output
    text = read_words((home / "page" / "index.html").read_text())
    assert not OF_THE_LABEL.findall(text)
    for told in (
        "How well heads tell metal from no metal",
        "Called metal, labelled no metal",
        "a share of 0.2 is metal",
        "No metal covered",
        "No metal + metal",
        "nine of ten no metal and nine of ten metal studies",
        "n (pos.)",
    ):
        assert told in text
    [checklist] = (home / "page").glob("*.md")
    assert not OF_THE_LABEL.findall(checklist.read_text())


def test_figures_of_a_target_are_lettered_in_its_words(metal):
    run, _ = metal
    result, test_set = compare_opened([run], QUICK)
    drawn = {name: figures.draw_figure(name, result, test_set) for name in figures.FIGURES}
    drawn["map"] = figures.plot_map(*first_map([run], ["run"]), ClassNames("no metal", "metal"))
    drawn["map"] = drawn["map"].figure()
    letters = {
        name: "\n".join(text.get_text() for text in own.findobj(Text))
        for name, own in drawn.items()
        if own is not None
    }
    assert not OF_THE_LABEL.findall("\n".join(letters.values()))
    for name in ("confusion", "flow", "map", "precision_recall", "calibration", "regions"):
        assert "metal" in letters[name]
    assert "no metal" in letters["confusion"]


@pytest.mark.parametrize("table_format", ["table", "markdown", "latex"])
@pytest.mark.parametrize("by", [None, "region", "views"])
def test_tables_of_a_target_say_its_words(metal, table_format, by):
    run, _ = metal
    words = ["compare", str(run.path), "--format", table_format, "--margin", "0.1"]
    words += ["--prevalence", "0.2"] if by is None else ["--by", by]
    ran = CliRunner().invoke(main, words)
    assert ran.exit_code == 0, ran.output
    assert not OF_THE_LABEL.findall(ran.stdout)
    assert " metal)" in ran.stdout


def test_the_document_names_the_target_and_keeps_its_keys(metal):
    run, _ = metal
    ran = CliRunner().invoke(main, ["compare", str(run.path), "--json"])
    document = json.loads(ran.stdout)
    assert document["runs"][0]["target"] == "metal"
    assert (
        document["test"]["n_abnormal"]
        == document["rows"][0]["confusion"]["tp"] + (document["rows"][0]["confusion"]["fn"])
    )


def test_runs_of_several_targets_have_a_negative_and_a_positive_class(tmp_path):
    images = make_images(n_patients=60)
    asked = ({"target": "metal"}, {"target": "cast"}, {"target": "label"})
    runs = [make_run(tmp_path / f"{k}", images, HEADS, asked=own) for k, own in enumerate(asked)]
    result = compare(runs, n_resamples=20)
    assert name_compared_classes(result) == ("negative", "positive")
    assert "target" not in compare(runs[2], n_resamples=20)["runs"][0]
    assert name_compared_classes(compare(runs[2], n_resamples=20)) == ("normal", "abnormal")
