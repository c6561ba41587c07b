"""Deferral: its shares by a plain loop, which heads have any and why not, and the page about it."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from made_runs import fit_sets, give_model, make_images, make_run
from statsmodels.stats.proportion import proportion_confint

from medembed.core.errors import TrainingDataError
from medembed.evaluation.scores import by_study
from medembed.evaluation.selective import SHARES, deferral_curve, estimate_deferral
from medembed.report import page
from medembed.report.figures import plot_deferral
from medembed.report.page_tables import tabulate_coverage, tabulate_deferrals
from medembed.report.tables import format_interval
from medembed.results.alignment import align_runs
from medembed.results.comparison import compare_aligned, compare_runs, score_run
from medembed.results.deferral import ALPHAS, NOMINAL

FAST = {"n_resamples": 60}
HEADS = {"mlp": 1.2, "logistic": 1.5, "older": 1.6, "damaged": 1.7, "finetuned": 1.8, "bare": 1.9}


def count(y, sets):
    """Count study by study what `SHARES` are."""
    tally = dict.fromkeys(SHARES, 0)
    for label, own in zip(y, sets, strict=True):
        tally["coverage"] += own[label]
        tally["coverage_abnormal" if label else "coverage_normal"] += own[label]
        tally["deferred"] += own.sum() != 1
        tally["empty"] += own.sum() == 0
        tally["error"] += own.sum() == 1 and not own[label]
    n = dict.fromkeys(("coverage", "deferred", "empty"), len(y))
    n |= {"coverage_normal": (y == 0).sum(), "coverage_abnormal": (y == 1).sum()}
    n |= {"error": len(y) - tally["deferred"]}
    return {share: tally[share] / n[share] if n[share] else math.nan for share in SHARES}


def made_p_values(n=90, seed=0):
    generator = np.random.default_rng(seed)
    y = generator.integers(0, 2, n)
    p_values = np.round(generator.random((n, 2)) ** 2, 2)
    p_values[np.arange(n), y] = np.round(generator.random(n), 2)  # that of the label is uniform
    return y, p_values, np.sort(generator.integers(0, n // 2, n))


def test_shares_are_those_of_a_loop_over_studies():
    y, p_values, _ = made_p_values()
    curve = deferral_curve(y, p_values, [0.05, 0.2, 0.99])
    for row in curve.to_dict("records"):
        expected = count(y, p_values > row.pop("alpha"))
        assert row == pytest.approx(expected, nan_ok=True)
    assert (curve["coverage"].diff()[1:] < 0).all()


def test_where_all_are_deferred_there_is_no_error():
    (row,) = deferral_curve([0, 1], np.array([[1.0, 0.5], [0.5, 1.0]]), [0.1]).to_dict("records")
    assert (row["coverage"], row["deferred"], row["empty"]) == (1.0, 1.0, 0.0)
    assert math.isnan(row["error"])


def test_intervals_are_wilsons_on_the_counts_and_wider_where_patients_have_several():
    y, p_values, _ = made_p_values()
    (found,) = estimate_deferral(y, p_values, np.arange(len(y)), [0.2])
    expected = count(y, p_values > 0.2)
    for share in SHARES:
        own = found[share]
        assert own.k / own.n == own.value == pytest.approx(expected[share])
        method = {"wilson": "wilson", "clopper-pearson": "beta"}[own.method]
        ends = proportion_confint(own.k, own.n, method=method)
        assert [own.low, own.high] == pytest.approx(
            list(ends), abs=0.008
        )  # z, t of as many patients
    twice = [np.repeat(part, 4, axis=0) for part in (y, p_values, np.arange(len(y)))]
    (copied,) = estimate_deferral(*twice, [0.2])
    assert copied["coverage"].low == pytest.approx(found["coverage"].low)
    (alone,) = estimate_deferral(y, p_values, np.zeros(len(y)), [0.2])
    assert math.isnan(alone["error"].low)
    assert alone["error"].value == found["error"].value


def test_p_values_of_another_length_are_refused():
    with pytest.raises(TrainingDataError, match="one length"):
        deferral_curve([0, 1, 1], np.ones((2, 2)), [0.1])
    with pytest.raises(TrainingDataError, match="a study has two"):
        deferral_curve([0, 1], np.ones((2, 3)), [0.1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose heads have models of every kind; "bare" has none."""
    images = make_images(n_patients=150)
    run = make_run(tmp_path_factory.mktemp("runs") / "sweep", images, HEADS, complete=False)
    run.write_scores({})  # complete enough for a page
    for head in ("mlp", "logistic"):
        give_model(run, head, conformal=fit_sets(run, head).as_dict(), conformal_note=None)
    give_model(run, "older")
    give_model(run, "finetuned", conformal=None, conformal_note="its epoch was chosen on them.")
    give_model(run, "damaged", conformal={"method": "other"})
    return run


@pytest.fixture(scope="module")
def rows(run):
    """What a run keeps as its scores, by head."""
    return {row["head"]: row for row in score_run(run, **FAST)["rows"]}


def test_scores_tell_what_the_models_sets_do_on_test(run, rows):
    test = by_study(run.predictions().query("head == 'mlp' and split == 'test'"))
    y = test["label"].to_numpy(int)
    deferral = rows["mlp"]["deferral"]
    assert [own["nominal"] for own in deferral["levels"]] == list(NOMINAL)
    for own in deferral["levels"]:
        # before calibration: the sets that `predict` would give
        sets = fit_sets(run, "mlp").sets(test["probability"], test["region"], own["alpha"])
        expected = count(y, sets)
        assert {share: own[share]["value"] for share in SHARES} == pytest.approx(expected)
        assert own["coverage"]["low"] <= own["coverage"]["value"] <= own["coverage"]["high"]
    curve = deferral["curve"]
    assert curve["alpha"] == list(ALPHAS)
    at_tenth = curve["alpha"].index(0.1)
    assert curve["error"][at_tenth] == deferral["levels"][1]["error"]["value"]
    assert rows["mlp"]["deferral_note"] is None
    json.dumps(deferral, allow_nan=False)


def test_coverage_by_region_is_that_of_its_rows_and_says_what_was_promised(run, rows):
    test = by_study(run.predictions().query("head == 'mlp' and split == 'test'"))
    conformal = fit_sets(run, "mlp")
    level = rows["mlp"]["deferral"]["levels"][1]
    assert set(level["regions"]) == set(test["region"])
    for name, own in level["regions"].items():
        part = test[test["region"] == name]
        y = part["label"].to_numpy(int)
        sets = conformal.sets(part["probability"], part["region"], level["alpha"])
        assert {share: own[share]["value"] for share in SHARES} == pytest.approx(count(y, sets))
        assert (own["n"], own["n_abnormal"]) == (len(y), y.sum())
        few = min(conformal.count(name)) < rows["mlp"]["deferral"]["min_group"]
        assert own["coverage_of"] == ("marginal" if few else "region")
    table = tabulate_coverage({"runs": [{}], "rows": list(rows.values())})
    assert [row[1] for row in table.table.rows][:2] == sorted(level["regions"])[:2]
    assert {row[3] for row in table.table.rows} <= {"all regions", "this region"}


def test_a_region_of_one_class_has_no_coverage_of_the_other(run):
    test_set = align_runs([run])
    one = test_set.units["region"] == test_set.units["region"].iloc[0]
    keep = ~one | (test_set.units["label"] == 0)
    rows = {
        row["head"]: row for row in compare_aligned([run], only(test_set, keep), **FAST)["rows"]
    }
    region = test_set.units["region"].iloc[0]
    own = rows["mlp"]["deferral"]["levels"][1]["regions"][region]
    assert own["n_abnormal"] == 0
    assert own["coverage_abnormal"]["value"] is None
    assert own["coverage_normal"]["value"] is not None


def only(test_set, keep):
    """Return a test set of some of its rows."""
    flags = keep.to_numpy()
    contenders = [
        replace(own, raw=own.raw[flags], probability=own.probability[flags])
        for own in test_set.contenders
    ]
    units = test_set.units[flags].reset_index(drop=True)
    return replace(test_set, units=units, contenders=contenders)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ("older", "before models had prediction sets"),
        ("finetuned", "its epoch was chosen on them."),
        ("damaged", "cannot be read"),
        ("bare", "holds no model"),
        ("class-prior", "reads no embedding"),
    ],
)
def test_a_head_without_sets_says_why(rows, head, words):
    assert rows[head]["deferral"] is None
    assert words in rows[head]["deferral_note"]


def test_images_have_no_sets(run):
    for row in compare_runs([run], level="image", **FAST)["rows"]:
        assert row["deferral"] is None
        assert "--level study" in row["deferral_note"]


def test_a_run_that_evaluates_elsewhere_brings_its_models_scores(run, tmp_path):
    decisions = {
        "calibrations": {"platt": {"method": "platt", "slope": 1.0, "intercept": 0.0}},
        "threshold": 0.5,
        "sensitive_threshold": None,
        "conformal": fit_sets(run, "mlp").as_dict(),
    }
    images = make_images(n_patients=60, seed=2)
    info = {"kind": "evaluation", "decisions": {"mlp": decisions}}
    other = make_run(tmp_path / "there", images, {"mlp": 1.2}, info=info, complete=False)
    row = next(row for row in score_run(other, **FAST)["rows"] if row["head"] == "mlp")
    assert 0.5 < row["deferral"]["levels"][1]["coverage"]["value"] <= 1


def test_the_page_shows_deferral_and_names_the_heads_without(run, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "plot_all", lambda result, *_: [plot_deferral(result)])
    written = page.write_report([run.path], tmp_path, **FAST)
    text = (tmp_path / "index.html").read_text()
    assert '<details id="deferral">' in text
    assert "none deferred" in text
    assert "No prediction sets, finetuned: its epoch was chosen on them." in text
    assert str(run.path.parent) not in text
    names = [path.rsplit("/", 1)[1] for path in written["figures"]]
    assert names == [f"deferral.{suffix}" for suffix in ("svg", "csv")]


def test_the_table_says_what_deciding_all_would_cost(rows):
    result = {"runs": [{}], "rows": list(rows.values())}
    table = tabulate_deferrals(result)
    first = table.table.rows[0]
    accuracy = rows["mlp"]["scores"]["accuracy"]
    expected = {"value": 1 - accuracy["value"], "low": 1 - accuracy["high"]}
    assert first[:2] == ["mlp", "none deferred"]
    assert first[-1] == format_interval(expected | {"high": 1 - accuracy["low"]})
    assert [row[1] for row in table.table.rows[1:4]] == ["80 %", "90 %", "95 %"]
    without = {**result, "rows": [row for row in rows.values() if not row["deferral"]]}
    assert tabulate_deferrals(without) is None
