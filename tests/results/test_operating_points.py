"""Operating points: how they are asked for, fitted, told, packaged and used."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import give_model, make_images, make_run
from scipy.special import expit, logit
from sklearn.metrics import confusion_matrix, precision_score, recall_score

from medembed.cli import main
from medembed.core.errors import ModelError, RunError, TrainingDataError
from medembed.evaluation.scores import by_study
from medembed.evaluation.thresholds import (
    HIGHEST,
    PACKAGED,
    SHOWN,
    ThresholdRule,
    fit_points,
    parse_rule,
    parse_rules,
    sensitivity_threshold,
    specificity_threshold,
    youden_threshold,
)
from medembed.heads.packaging import load_model
from medembed.report import page as page_module
from medembed.report.operating_tables import points_csv, tabulate_points
from medembed.report.tables import render
from medembed.results.comparison import compare
from medembed.results.model_card import describe_decisions, read_card
from medembed.results.model_readme import complete_cards, write_readme
from medembed.results.runs import open_run

FAST = {"n_resamples": 20}
ROWS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6)), min_size=2, max_size=40)
NAMES = ["youden", "sensitivity=0.95", "specificity=0.9", "threshold=0.5"]


def run_command(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def run_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "first"
    make_run(path, make_images(n_patients=120), {"mlp": 0.8, "logistic": 2.5}, complete=False)
    open_run(path).write_scores({"rows": []})
    return path


@pytest.fixture(scope="module")
def result(run_path):
    return compare(
        [run_path], operating_points=["sensitivity=0.8", "threshold=0.3"], prevalence=0.1, **FAST
    )


# rules


@settings(deadline=None, max_examples=100)
@given(ROWS, st.sampled_from([0.01, 0.25, 1 / 3, 0.5, 0.7, 0.9, 1.0]))
def test_no_lower_threshold_is_as_specific(pairs, target):
    """Against every distinct decision, tried one by one."""
    y, level = (np.array(column) for column in zip(*pairs, (0, 2), (1, 3), strict=True))
    probability = level / 6
    threshold = specificity_threshold(y, probability, target)
    cuts = [*np.unique(probability), HIGHEST]
    kept = [np.mean(probability[y == 0] < cut) for cut in cuts]
    lowest = next(cut for cut, share in zip(cuts, kept, strict=True) if share >= target)
    assert ((probability >= threshold) == (probability >= lowest)).all()
    assert np.mean(probability[y == 0] < threshold) >= target
    assert 0 <= threshold <= HIGHEST


def test_specificity_mirrors_sensitivity():
    generator = np.random.default_rng(3)
    y, probability = generator.integers(0, 2, 200), generator.random(200)
    found = specificity_threshold(y, probability, 0.9)
    mirrored = sensitivity_threshold(1 - y, 1 - probability, 0.9)
    assert found == pytest.approx(1 - mirrored)


def test_all_normal_rows_are_kept_below_where_one_of_them_has_the_largest_probability():
    y = np.array([0, 1, 0])
    assert specificity_threshold(y, np.array([0.1, 0.5, 0.8]), 1.0) == pytest.approx(0.9)
    assert specificity_threshold(y, np.array([0.1, 0.5, 1.0]), 1.0) == HIGHEST
    assert HIGHEST > 1


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan"), float("inf")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(TrainingDataError, match=r"specificity .* is not above 0 and at most 1"):
        specificity_threshold(np.array([0, 1]), np.array([0.1, 0.9]), share)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("youden", "youden"),
        (" sensitivity=0.950 ", "sensitivity=0.95"),
        ("specificity=1", "specificity=1"),
        ("threshold=.3", "threshold=0.3"),
        ("threshold=0.1234567891", "threshold=0.1234567891"),
        ("sensitivity=9e-1", "sensitivity=0.9"),
    ],
)
def test_a_rule_is_read_and_its_name_is_read_back(text, name):
    rule = parse_rule(text)
    assert rule.name == name
    assert parse_rule(name) == rule


@pytest.mark.parametrize(
    "text",
    [
        *("", "Youden", "youden=0.3", "sensitivity", "sensitivity=", "f1=0.9", "=0.9"),
        *("sensitivity=0", "sensitivity=1.01", "specificity=-0.9", "sensitivity=nan"),
        *("threshold=0", "threshold=1", "threshold=inf", "threshold=0,3", "threshold=a\x1b[31m"),
    ],
)
def test_what_is_no_rule_is_refused_and_says_what_is(text):
    with pytest.raises(TrainingDataError, match=r"sensitivity=0\.95, specificity=0\.9, youden or"):
        parse_rule(text)


def test_a_rule_given_twice_is_refused():
    with pytest.raises(TrainingDataError, match=r"sensitivity=0\.9 was given twice"):
        parse_rules(["sensitivity=0.9", "youden", "sensitivity=.90"])
    assert parse_rules(["youden"]) == (ThresholdRule("youden"),)


def test_rules_are_fitted_as_their_functions_do():
    generator = np.random.default_rng(0)
    y, probability = generator.integers(0, 2, 90), generator.random(90)
    points = fit_points((*SHOWN, ThresholdRule("youden")), y, probability)
    assert [point.name for point in points] == NAMES
    assert [point.threshold for point in points] == [
        youden_threshold(y, probability),
        sensitivity_threshold(y, probability, 0.95),
        specificity_threshold(y, probability, 0.9),
        0.5,
    ]


# comparisons


def test_a_comparison_tells_of_every_operating_point(run_path, result):
    """Thresholds from out-of-fold rows of train alone; counts and shares as scikit-learn has them.

    The oracle reads the predictions and calibrates them itself.
    """
    names = [*NAMES, "sensitivity=0.8", "threshold=0.3"]
    assert result["operating_points"] == names
    for row in result["rows"]:
        assert [point["name"] for point in row["operating_points"]] == names
        own = open_run(run_path).predictions().query(f"head == '{row['head']}'")
        train, test = (by_study(own[own["split"] == split]) for split in ("train", "test"))
        slope, intercept = (row["calibration"][name] for name in ("slope", "intercept"))
        fitted, scored = (
            expit(slope * logit(part["probability"].to_numpy()) + intercept)
            for part in (train, test)
        )
        y = test["label"].to_numpy(int)
        for point in row["operating_points"]:
            expected = parse_rule(point["name"]).fit(train["label"].to_numpy(int), fitted)
            assert point["threshold"] == pytest.approx(expected.threshold, abs=1e-9)
            called = scored >= point["threshold"]
            tn, fp, fn, tp = confusion_matrix(y, called, labels=[0, 1]).ravel().tolist()
            if not row["baseline"]:
                assert point["confusion"] == {"tn": tn, "fp": fp, "fn": fn, "tp": tp}
                scores = point["scores"]
                assert scores["sensitivity"]["value"] == pytest.approx(recall_score(y, called))
                assert scores["ppv"]["value"] == pytest.approx(precision_score(y, called))
                assert (scores["npv"]["k"], scores["npv"]["n"]) == (tn, tn + fn)
                low, high = scores["sensitivity"]["low"], scores["sensitivity"]["high"]
                assert low < high
                assert low <= scores["sensitivity"]["value"] <= high


def test_what_was_there_before_stays_and_agrees(result):
    for row in result["rows"]:
        youden, half = (row["operating_points"][i] for i in (0, 3))
        assert youden["threshold"] == row["threshold"] == row["confusion"]["threshold"]
        assert youden["confusion"].items() <= row["confusion"].items()
        for name in ("accuracy", "macro_f1", "kappa", "sensitivity", "specificity"):
            assert youden["scores"][name] == row["scores"][name]
            assert half["scores"][name] == row["at_half"][name]
        assert row["at_sensitivity"]["target"] == 0.9


def test_no_share_has_an_interval_of_zero_width(result):
    for row in result["rows"]:
        for point in row["operating_points"]:
            shares = [*point["scores"].values()]
            shares += [point["at_prevalence"][name] for name in ("ppv", "npv")]
            for score in shares:
                assert score["low"] is None or score["low"] < score["high"]
                assert (score["method"] is None) == (score["low"] is None)
    json.dumps(result, allow_nan=False)


def test_a_rule_that_is_always_shown_stands_there_once(run_path):
    found = compare([run_path], operating_points=["youden", "threshold=0.50"], **FAST)
    assert found["operating_points"] == NAMES
    assert found["prevalence"] is None
    assert "at_prevalence" not in found["rows"][0]["operating_points"][0]


@pytest.mark.parametrize("prevalence", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_a_prevalence_out_of_range_is_refused(run_path, prevalence):
    with pytest.raises(TrainingDataError, match=r"prevalence .* is not above 0 and below 1"):
        compare([run_path], prevalence=prevalence, **FAST)


# tables


def test_counts_stand_beside_shares_in_every_format(result):
    counts = result["rows"][0]["operating_points"][1]["scores"]["sensitivity"]
    text = f"{counts['k']}/{counts['n']}"
    for table_format, width in (("table", 80), ("table", 120), ("markdown", None), ("latex", None)):
        more = tabulate_points(result, width)
        shown = render(result, table_format=table_format, width=width or 80, more=more)
        assert text in shown
        assert "sensitivity=0.8" in shown
        assert max(map(len, shown.splitlines())) <= 120 or width is None
    rows = list(csv.DictReader(io.StringIO(render(result, table_format="csv"))))
    youden = result["rows"][0]["scores"]["sensitivity"]
    assert (rows[0]["sensitivity_k"], rows[0]["sensitivity_n"]) == (
        str(youden["k"]),
        str(youden["n"]),
    )


@pytest.mark.parametrize("width", [80, 100, 240])
def test_a_table_fits_its_terminal(result, width):
    for table in tabulate_points(result, width):
        shown = render(result, width=width, more=[table])
        assert max(map(len, shown.splitlines())) <= width
        assert "…" not in shown


def test_a_csv_of_operating_points_has_all_heads_and_numbers(result):
    rows = list(csv.DictReader(io.StringIO(points_csv(result))))
    assert len(rows) == sum(len(row["operating_points"]) for row in result["rows"])
    point = result["rows"][0]["operating_points"][0]
    assert float(rows[0]["ppv_low"]) == point["scores"]["ppv"]["low"]
    assert int(rows[0]["tn"]) == point["confusion"]["tn"]
    assert float(rows[0]["npv_at_prevalence_high"]) == point["at_prevalence"]["npv"]["high"]


def test_a_comparison_of_before_has_no_such_table(result):
    older = {**result, "rows": [dict(row) for row in result["rows"]]}
    for row in older["rows"]:
        del row["operating_points"]
    del older["prevalence"], older["operating_points"]
    assert tabulate_points(older, 80) == []


# cards


def make_card(run, rules=()):
    rows = run.predictions().query("head == 'mlp' and split == 'train'")
    studies = by_study(rows).astype({"label": int})
    trained = {"images": 1, "studies": 1, "patients": 1, "abnormal_studies": 0, "regions": {}}
    return {
        "name": "mlp",
        "spec": {},
        "pooling": "mean",
        "label_level": "study",
        "views": "mean",
        "training_images": [],
        "encoder": {"source": "demo", "revision": None, "path": None, "terms": "None."},
        "covariates": None,
        "synthetic": True,
        "manifest": "0" * 64,
        "data": {"trained": trained, "manifest": {"licence": None}},
        "use": {"intended": "Tests.", "not_intended": ["Anything else."]},
        **describe_decisions(studies, parse_rules(rules)),
    }


def test_a_card_packages_points_and_gives_them_back(run_path, tmp_path):
    run = make_run(tmp_path / "run", make_images(n_patients=60), {"mlp": 1.0}, complete=False)
    path = give_model(run, "mlp", **make_card(run, ["sensitivity=0.8", "threshold=0.25"]))
    card = read_card(load_model(path), path)
    names = [*(rule.name for rule in PACKAGED), "sensitivity=0.8", "threshold=0.25"]
    assert [point.name for point in card.points] == names
    assert card.point().threshold == card.point("youden").threshold == card.threshold
    assert card.point("sensitivity=.80").threshold == card.points[3].threshold
    assert card.point("threshold=0.4").threshold == 0.4
    with pytest.raises(
        ModelError, match=r"no operating point specificity=0\.5: it packages youden"
    ):
        card.point("specificity=0.5")
    with pytest.raises(TrainingDataError, match="is unknown"):
        card.point("best")


def test_a_readme_tells_what_points_give_on_test(tmp_path):
    run = make_run(tmp_path / "run", make_images(n_patients=60), {"mlp": 1.0}, complete=False)
    card = make_card(run, ["sensitivity=0.8"])
    path = give_model(run, "mlp", **card)
    assert "| sensitivity=0.8 |" in write_readme(card)["README.md"]
    run.write_scores({})
    scores = compare([run.path], operating_points=["sensitivity=0.8"], **FAST)
    complete_cards(run, scores)
    text = (path / "README.md").read_text()
    point = scores["rows"][0]["operating_points"][-1]
    ppv = point["scores"]["ppv"]
    line = next(line for line in text.splitlines() if line.startswith("| sensitivity=0.8 |"))
    assert f"{ppv['k']}/{ppv['n']}" in line
    assert line.endswith(
        " | ".join(str(point["confusion"][n]) for n in ("tp", "fn", "fp", "tn")) + " |"
    )
    assert "| Calibration slope (1 is right) |" in text
    curve = scores["rows"][0]["net_benefit"]
    assert f"| 0.2 | {curve['value'][19]:.3f} ({curve['low'][19]:.3f} to" in text
    test = json.loads((path / "model.json").read_text())["card"]["scores"]["test"]
    assert test["net_benefit"] == curve
    assert test["operating_points"][0]["name"] == "youden"


def test_a_card_of_before_has_youdens_point(tmp_path):
    run = make_run(tmp_path / "run", make_images(n_patients=60), {"mlp": 1.0}, complete=False)
    card = make_card(run)
    del card["operating_points"]
    path = give_model(run, "mlp", **card)
    read = read_card(load_model(path), path)
    assert [(own.name, own.threshold) for own in read.points] == [("youden", card["threshold"])]
    with pytest.raises(ModelError, match=r"it packages youden\. Ask"):
        read.point("sensitivity=0.95")
    assert "Operating points" not in write_readme(card)["README.md"]


@pytest.mark.parametrize(
    "entries",
    [
        *("youden", [1], [{"name": "youden"}], [{"name": "\u202eyouden", "threshold": 0.5}]),
        *([{"name": "youden", "threshold": x}] for x in (-0.1, 1.5, "0.5", True, None)),
        [{"name": "youden", "threshold": 0.5}] * 2,
        [{"name": "sensitivity=0.950", "threshold": 0.5}],
    ],
)
def test_points_that_a_card_cannot_have_are_refused(tmp_path, entries):
    run = make_run(tmp_path / "run", make_images(n_patients=60), {"mlp": 1.0}, complete=False)
    path = give_model(run, "mlp", **make_card(run) | {"operating_points": entries})
    with pytest.raises(ModelError, match="operating_points"):
        read_card(load_model(path), path)


# models from elsewhere


def as_evaluation(path, points):
    """Make of a run one that a model was evaluated in: no out-of-fold row, decisions kept."""
    run = make_run(path, make_images(n_patients=60), {"mlp": 1.0}, complete=False)
    identity = {"method": "platt", "slope": 1.0, "intercept": 0.0}
    own = {"calibrations": {"platt": identity}, "threshold": 0.4, "sensitive_threshold": None}
    own |= {} if points is None else {"operating_points": points}
    prior = {**own, "threshold": 0.5}
    prior.pop("operating_points", None)
    run.update_info(decisions={"mlp": own, "class-prior": prior, "region-prior": prior})
    rows = run.predictions()
    run.write_predictions(rows[rows["split"] == "test"])
    run.write_scores({})
    return run


def test_an_evaluation_has_the_points_that_its_model_packages(tmp_path):
    points = [{"name": "youden", "threshold": 0.4}, {"name": "sensitivity=0.8", "threshold": 0.3}]
    run = as_evaluation(tmp_path / "run", points)
    found = compare([run.path], operating_points=["sensitivity=0.8", "threshold=0.7"], **FAST)
    row = next(row for row in found["rows"] if row["head"] == "mlp")
    thresholds = {own["name"]: own["threshold"] for own in row["operating_points"]}
    known = {"youden": 0.4, "threshold=0.5": 0.5, "sensitivity=0.8": 0.3, "threshold=0.7": 0.7}
    assert thresholds == {**known, "sensitivity=0.95": None, "specificity=0.9": None}
    unknown = row["operating_points"][1]
    assert unknown["confusion"] is None
    assert unknown["scores"]["ppv"]["value"] is None
    assert "sensitivity=0.95" not in render(found, more=tabulate_points(found, 80))
    with pytest.raises(RunError, match=r"no operating point specificity=0\.9: its model packages"):
        compare([run.path], operating_points=["specificity=0.9"], **FAST)


def test_an_evaluation_of_before_still_compares(tmp_path):
    run = as_evaluation(tmp_path / "run", None)
    row = next(row for row in compare([run.path], **FAST)["rows"] if row["head"] == "mlp")
    thresholds = [own["threshold"] for own in row["operating_points"]]
    assert thresholds == [0.4, None, None, 0.5]
    with pytest.raises(RunError, match=r"sensitivity=0\.95: its model packages youden\. Ask"):
        compare([run.path], operating_points=["sensitivity=0.95"], **FAST)


def test_damaged_points_of_an_evaluation_are_refused(tmp_path):
    run = as_evaluation(tmp_path / "run", [{"name": "youden", "threshold": 7}])
    with pytest.raises(RunError, match=r"operating_points\[0\]\.threshold must be .*, not 7"):
        compare([run.path], **FAST)


# commands


def test_compare_takes_points_and_a_prevalence(run_path, tmp_path):
    words = ["compare", run_path, "--operating-point", "sensitivity=0.8", "--prevalence", "0.2"]
    found = json.loads(run_command(*words, "--json").stdout)
    assert found["operating_points"][-1] == "sensitivity=0.8"
    assert found["rows"][0]["operating_points"][-1]["at_prevalence"]["prevalence"] == 0.2
    shown = run_command(*words, "--tables", tmp_path / "tables")
    assert "Predictive values where a share of 0.2 is abnormal" in shown.stdout
    assert len(list((tmp_path / "tables").glob("operating_points.*"))) == 2
    grouped = [
        run_command("compare", run_path, "--by", "region", *more) for more in ([], words[2:])
    ]
    assert ["Decisions on test" in own.stdout for own in grouped] == [False, True]
    said = run_command(*words, "--format", "csv").stderr
    assert "operating points are in --json and in the files of --tables" in said


SHOWING, PACKAGING = ("compare", "report", "evaluate"), ("sweep", "finetune")
ONE = [["--operating-point", "sensitivity=2"], ["--operating-point", "best"]]
TWICE = ["--operating-point", "youden", "--operating-point", "youden"]
SHARES = [["--prevalence", value] for value in ("0", "1", "nan", "-1")]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        *((command, words) for command in (*SHOWING, *PACKAGING, "predict") for words in ONE),
        *((command, TWICE) for command in (*SHOWING, *PACKAGING)),
        *((command, words) for command in SHOWING for words in SHARES),
    ],
)
def test_wrong_values_are_wrong_usage(run_path, tmp_path, command, words):
    given = {"compare": [run_path], "report": [run_path, "-o", tmp_path / "page"]}
    given |= {"evaluate": ["m", "c", "m.csv", "--out", tmp_path / "out"]}
    given |= {"sweep": ["c", "m.csv", "--out", tmp_path / "out"], "predict": ["m", "x.png"]}
    images = ["--image-root", tmp_path, "--encoder", "demo", "--out", tmp_path / "out"]
    given |= {"finetune": ["m.csv", *images]}
    found = run_command(command, *given[command], *words)
    assert found.exit_code == 2
    assert words[-1].split("=")[-1] in found.stderr
    assert not list(tmp_path.iterdir())


def test_the_page_names_the_command_that_makes_it_again(run_path, tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "plot_all", lambda *_: [])
    asked = {"operating_points": ["threshold=0.3"], "prevalence": 0.1}
    written = page_module.write_report([run_path], tmp_path, **asked, **FAST)
    page = Path(written["page"]).read_text()
    assert "--operating-point threshold=0.3 --prevalence 0.1" in page
    assert "Predictive values where a share of 0.1 is abnormal" in page
    assert "threshold=0.3</th>" in page


def test_predictions_table_is_read_in_any_order(run_path, result):
    """Thresholds do not depend on the order of rows."""
    run = open_run(run_path)
    rows = run.predictions()
    run.write_predictions(rows.sample(frac=1, random_state=1))
    try:
        found = compare([run_path], **FAST)
    finally:
        run.write_predictions(rows)
    told = [[own["threshold"] for own in row["operating_points"][:4]] for row in found["rows"]]
    before = [[own["threshold"] for own in row["operating_points"][:4]] for row in result["rows"]]
    assert pd.DataFrame(told).equals(pd.DataFrame(before)) or np.allclose(told, before)
