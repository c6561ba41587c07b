"""Comparisons of made-up runs whose truth is known, and the tables made of them."""

import csv
import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from made_runs import make_images, make_run
from threadpoolctl import threadpool_info, threadpool_limits

from medembed.core.errors import RunError
from medembed.evaluation.calibration import fit_platt
from medembed.evaluation.intervals import bootstrap_scores
from medembed.evaluation.scores import by_study
from medembed.evaluation.thresholds import youden_threshold
from medembed.report.figures.roc_pr import roc_band, roc_curve
from medembed.report.tables import FORMATS, Table, format_interval, render, render_table
from medembed.results import comparison
from medembed.results.comparison import compare

FAST = {"n_resamples": 200}


@pytest.fixture(scope="module")
def images():
    return make_images(n_patients=240)


@pytest.fixture(scope="module")
def run_path(images, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "first"
    data = {"left_out": 3, "left_out_test": 1, "unlabelled": 2, "synthetic": True}
    make_run(path, images, {"mlp": 0.8, "logistic": 2.5}, info={"data": data})
    return path


@pytest.fixture(scope="module")
def result(run_path):
    return compare([run_path], **FAST)


def test_scores_are_those_of_the_evaluation_floor(run_path, result):
    from medembed.results.runs import open_run

    own = open_run(run_path).predictions().query("head == 'mlp'")
    train, test = (by_study(own[own["split"] == split]) for split in ("train", "test"))
    y = train["label"].to_numpy(np.int8)
    calibration = fit_platt(train["probability"].to_numpy(), y)
    threshold = youden_threshold(y, calibration.apply(train["probability"].to_numpy()))
    expected = bootstrap_scores(
        test["label"].to_numpy(np.int8),
        calibration.apply(test["probability"].to_numpy()),
        test["patient"].to_numpy(),
        threshold,
        n_resamples=200,
    )
    row = result["rows"][0]
    assert row["head"] == "mlp"
    assert row["threshold"] == threshold
    for name, interval in expected.items():
        assert row["scores"][name] == interval.as_dict()


def test_a_better_head_is_found_better_and_the_priors_are_there(result):
    assert [row["head"] for row in result["rows"][:2]] == ["mlp", "logistic"]
    assert {row["head"] for row in result["rows"] if row["baseline"]} == {
        "class-prior",
        "region-prior",
    }
    pair = result["paired"][0]
    assert (pair["a"], pair["b"], pair["score"]) == ("mlp", "logistic", "auroc")
    assert pair["low"] > 0
    assert pair["p_holm"] < 0.05
    assert not result["rows"][1]["versus_best"]["tied"]


def test_the_class_prior_ranks_nothing_however_many_views(result):
    prior = next(row for row in result["rows"] if row["head"] == "class-prior")
    auroc = prior["scores"]["auroc"]
    assert (auroc["value"], auroc["low"], auroc["high"], auroc["method"]) == (0.5, None, None, None)
    assert auroc["reason"] == "every row has the same probability"


def test_two_equal_heads_are_tied(images, tmp_path):
    run = make_run(tmp_path / "run", images, {"mlp": 1.0})
    frame = run.predictions()
    twin = frame[frame["head"] == "mlp"].assign(head="twin")
    run.write_predictions(pd.concat([frame, twin]))
    result = compare([run.path], **FAST)
    pair = next(p for p in result["paired"] if {p["a"], p["b"]} == {"mlp", "twin"})
    assert (pair["difference"], pair["p"], pair["p_holm"]) == (0.0, 1.0, 1.0)
    assert result["rows"][1]["versus_best"]["tied"]
    assert "≈" in render(result)


def test_json_has_no_nan_and_one_class_regions_are_not_estimable(images, tmp_path):
    images = images.copy()
    lone = (images["region"] == "hand") & (images["split"] == "test")
    images.loc[lone, "label"] = 0
    run = make_run(tmp_path / "run", images, {"mlp": 1.0})
    result = compare([run.path], **FAST)
    json.dumps(result, allow_nan=False)
    row = result["rows"][0]
    hand = row["regions"]["hand"]["auroc"]
    assert hand["value"] is hand["low"] is hand["high"] is None
    assert row["regions"]["elbow"]["auroc"]["value"] > 0.5
    assert row["mean_over_regions"]["n_regions"] == 2
    assert row["mean_over_regions"]["left_out"] == ["hand"]
    for table_format in ("table", "markdown", "latex"):
        assert "not estimable" in render(result, table_format=table_format, by="region")


def test_rows_that_only_one_run_has_fall_out_and_are_counted(run_path, images, tmp_path):
    fewer = images[~images["patient"].isin([1, 3, 5])]
    make_run(tmp_path / "second", fewer, {"mlp": 1.0}, seed=9)
    result = compare([run_path, tmp_path / "second"], **FAST)
    assert result["test"]["n"] == 117
    assert [run["dropped"] for run in result["runs"]] == [3, 0]
    assert "first: Not compared: 3 studies of test that other runs lack." in result["notes"]


def test_codes_of_patients_and_studies_mean_nothing_across_runs(run_path, images, tmp_path):
    """The same predictions under other codes, in another order, differ by nothing."""
    mixed = images.assign(patient=1000 - images["patient"], study=images["study"] * 7 % 241)
    run = make_run(tmp_path / "second", images, {"mlp": 0.8}, seed=1)
    frame = run.predictions()
    codes = mixed.set_index("sha256")
    for column in ("patient", "study"):
        frame[column] = frame["sha256"].map(codes[column])
    run.write_predictions(frame.sample(frac=1, random_state=3))
    result = compare([run_path, run.path], **FAST)
    pair = next(p for p in result["paired"] if {p["a"], p["b"]} == {"first/mlp", "second/mlp"})
    assert pair["difference"] == pytest.approx(0, abs=1e-12)


def test_copies_of_one_image_in_two_studies_are_kept_apart(images, tmp_path):
    images = images.copy()
    single = images[(images["split"] == "test")].groupby("study").filter(lambda g: len(g) == 1)
    same = single[single["label"] == 1].index[:2]
    images.loc[same, "sha256"] = "ab" * 32
    paths = [make_run(tmp_path / name, images, {"mlp": 1.0}).path for name in "ab"]
    for level in ("study", "image"):
        result = compare(paths, level=level, **FAST)
        assert [run["dropped"] for run in result["runs"]] == [0, 0]


def test_runs_on_different_images_are_refused(run_path, tmp_path):
    other = make_images(n_patients=60)
    other["sha256"] = other["sha256"].str[::-1]
    make_run(tmp_path / "other", other, {"mlp": 1.0})
    with pytest.raises(RunError, match="no test studies in common"):
        compare([run_path, tmp_path / "other"])


def test_runs_on_other_labels_are_refused(run_path, images, tmp_path):
    relabelled = images.assign(
        label=np.where(images["patient"] == 1, 1 - images["label"], images["label"])
    )
    make_run(tmp_path / "other", relabelled, {"mlp": 1.0})
    with pytest.raises(RunError, match="1 of the 120 common"):
        compare([run_path, tmp_path / "other"])


def test_unfinished_or_repeated_runs_are_refused(run_path, images, tmp_path):
    make_run(tmp_path / "half", images, {"mlp": 1.0}, complete=False)
    with pytest.raises(RunError, match=r"unfinished.*medembed sweep cache manifest.csv --out run"):
        compare([tmp_path / "half"])
    with pytest.raises(RunError, match="twice"):
        compare([run_path, run_path])
    with pytest.raises(RunError, match="Name at least one"):
        compare([])


def test_image_level_scores_every_view(run_path, images):
    result = compare([run_path], level="image", **FAST)
    assert result["test"]["n"] == (images["split"] == "test").sum()
    assert "test images" in render(result)


def test_losses_and_synthetic_images_are_told_under_every_table(result):
    for table_format in ("table", "markdown", "latex"):
        for by in (None, "region", "views"):
            text = " ".join(render(result, table_format=table_format, by=by).split())
            assert "Left out: 3 images that could not be embedded (1 in test)." in text
            assert "Not scored: 2 images without a label." in text
            assert "Synthetic images" in text
            assert "not a medical device" in text


@pytest.mark.parametrize("by", [None, "region", "views"])
def test_the_terminal_table_fits_80_columns(result, by):
    lines = render(result, by=by).splitlines()
    assert max(map(len, lines)) <= 80
    assert len([line for line in lines if "mlp" in line]) >= 1
    body = [line for line in lines if re.search(r"\d\.\d{3} \[", line)]
    own = 3 if by is None else 1  # of Brier score, slope and intercept each has one
    assert {line.count("[") for line in body} == {1, own}


def test_csv_has_every_score_at_full_precision(result):
    rows = list(csv.DictReader(io.StringIO(render(result, table_format="csv"))))
    assert len(rows) == len(result["rows"])
    assert float(rows[0]["auroc"]) == result["rows"][0]["scores"]["auroc"]["value"]
    assert float(rows[0]["ece_high"]) == result["rows"][0]["scores"]["ece"]["high"]


@pytest.mark.parametrize("table_format", FORMATS)
def test_hostile_names_do_nothing_in_a_table(images, tmp_path, table_format):
    names = dict.fromkeys(images["region"], "")
    names |= dict(
        zip(names, ["<script>x</script>", "=a|b\x1b[31m\u202e", "$x_{1}$ & [bold]y"], strict=True)
    )
    hostile = images.assign(region=images["region"].map(names))
    make_run(tmp_path / "run", hostile, {"mlp": 1.0})
    text = render(compare([tmp_path / "run"], **FAST), table_format=table_format, by="region")
    assert "\x1b" not in text
    assert "\u202e" not in text
    if table_format == "csv":
        assert "'=a|b�[31m�" in {row[0] for row in csv.reader(io.StringIO(text))}
    if table_format == "markdown":
        assert "<script>" not in text
        assert all(
            line.count("|") - line.count(r"\|") == 8 for line in text.splitlines() if "|" in line
        )
    if table_format == "latex":
        assert r"\$x\_\{1\}\$ \& [bold]y" in text
    if table_format == "table":
        assert "[bold]y" in text


def test_unknown_formats_and_levels_are_named(result, run_path):
    with pytest.raises(RunError, match="'html'"):
        render(result, table_format="html")
    with pytest.raises(RunError, match="'age'"):
        render(result, by="age")
    with pytest.raises(RunError, match="'patient'"):
        compare([run_path], level="patient")


def test_the_roc_curve_is_scikit_learns_and_the_band_holds_it():
    from sklearn import metrics

    generator = np.random.default_rng(0)
    y = generator.integers(0, 2, 120)
    p = np.round(np.clip(0.3 * y + generator.normal(0.4, 0.2, 120), 0, 1), 2)
    curve = roc_curve(y, p)
    fpr, tpr, thresholds = metrics.roc_curve(y, p, drop_intermediate=False)
    assert np.allclose(curve["fpr"], fpr)
    assert np.allclose(curve["tpr"], tpr)
    assert np.array_equal(curve["threshold"], thresholds)
    band = roc_band(y, p, np.arange(120), n_resamples=200)
    assert ((band["low"] <= band["tpr"]) & (band["tpr"] <= band["high"])).all()
    assert band["tpr"].iloc[-1] == 1
    assert roc_curve(np.ones(3), np.arange(3) / 3).empty


def test_every_interval_names_its_method_and_shares_their_counts(result):
    for row in result["rows"]:
        for part in (row["scores"], row["at_half"], row["at_sensitivity"]["scores"], row["fit"]):
            for name, score in part.items():
                assert (score["high"] is None) == (score["method"] is None), name
                assert score["low"] is None or score["low"] < score["high"]
                if score["high"] is None and score["value"] is not None:
                    assert score["reason"]
        for name in ("accuracy", "sensitivity", "specificity"):
            own = row["scores"][name]
            assert own["k"] / own["n"] == pytest.approx(own["value"])
        assert row["scores"]["ece"]["low"] is None
    text = render(result)
    assert "Newcombe" in text
    assert "Slope" in text
    rows = list(csv.DictReader(io.StringIO(render(result, table_format="csv"))))
    assert float(rows[0]["slope"]) == result["rows"][0]["fit"]["slope"]["value"]


@pytest.mark.parametrize(("width", "gap"), [(90, 3), (80, 2)])
def test_gaps_between_columns_shrink_before_a_head_is_folded(width, gap):
    columns = ["Head", "AUROC [95 %]", "Macro-F1", "Sens.", "Spec.", "κ", "p"]
    row = ["region-prior", "0.731 [0.479, 0.883]", "0.342", "1.000", "0.083", "-0.073", "0.755 ≈"]
    lines = render_table(Table("Heads", columns, 1, [[row]]), "table", width).splitlines()
    [line] = [line for line in lines if "0.731" in line]
    assert line.split() == " ".join(row).split()
    assert f"1.000{' ' * gap}0.083" in line
    assert max(map(len, lines)) <= width


def test_limits_that_reach_hundreds_lose_their_decimals() -> None:
    slope = {"value": 423.21, "low": -20781.95, "high": 21628.37}
    assert format_interval(slope, 2) == "423 [-20782, 21628]"
    assert format_interval({"value": 1.2, "low": -99.99, "high": None}, 2) == "1.20"
    assert format_interval({"value": None, "low": None, "high": None}) == "not estimable"


def count_threads():
    return {own["num_threads"] for own in threadpool_info() if own["user_api"] == "blas"}


def test_sums_do_not_depend_on_the_number_of_cores(run_path, monkeypatch):
    found = {}
    own = comparison.pair_rows

    def noted(*args):
        found["pairs"] = count_threads()
        return own(*args)

    monkeypatch.setattr(comparison, "pair_rows", noted)
    with threadpool_limits(2, user_api="blas"):
        before = count_threads()
        compare([run_path], n_resamples=20)
        assert count_threads() == before
    assert found == {"pairs": {1}}
