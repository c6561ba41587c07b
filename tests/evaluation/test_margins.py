"""Non-inferiority: the one-sided test at a margin, against scipy, intervals and simulation."""

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from made_runs import make_images, make_run
from scipy import stats

from medembed.cli import main
from medembed.core.errors import RunError
from medembed.core.text import to_html
from medembed.evaluation.paired import (
    Difference,
    non_inferiority_p,
    paired_difference,
)
from medembed.report import page
from medembed.report.page import write_report
from medembed.results.comparison import compare
from medembed.results.significance import describe_margins

FAST = {"n_resamples": 100}


@pytest.fixture(scope="module")
def run_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "sweep"
    heads = {"close": 0.9, "best": 0.9, "poor": 4.0}
    make_run(path, make_images(n_patients=400), heads)
    return path


def made(generator, n, *, shift):
    """Two heads of which the second is worse by some noise, on patients of two studies."""
    patients = np.repeat(np.arange(n // 2), 2)
    y = (generator.random(n // 2) < 0.4).astype(int)[patients]
    noise = generator.normal(size=(3, n))
    a = 1.5 * y + 0.8 * noise[0] + 0.6 * noise[1]
    b = (1.5 - shift) * y + 0.8 * noise[0] + 0.6 * noise[2]
    return y, *(1 / (1 + np.exp(-own)) for own in (a, b)), patients


def test_p_is_that_of_the_shifted_t_statistic():
    y, a, b, patients = made(np.random.default_rng(3), 200, shift=0.1)
    found = paired_difference(y, b, a, patients)
    for margin in (0.01, 0.05, 0.2):
        expected = stats.t.sf((found.difference + margin) / found.error, found.freedom)
        assert non_inferiority_p(found, margin) == pytest.approx(expected, rel=1e-9)
    two_sided = 2 * stats.t.sf(abs(found.difference) / found.error, found.freedom)
    assert found.p == pytest.approx(two_sided, rel=1e-9)


def test_p_is_below_the_level_just_where_the_interval_lies_above_the_margin():
    generator = np.random.default_rng(4)
    verdicts = set()
    for _ in range(60):
        y, a, b, patients = made(generator, 160, shift=0.3)
        found = paired_difference(y, b, a, patients)
        verdict = non_inferiority_p(found, 0.06) < 0.025
        assert verdict == (found.low > -0.06)
        verdicts.add(verdict)
    assert verdicts == {True, False}


def test_a_difference_without_a_spread_has_no_p():
    assert np.isnan(non_inferiority_p(Difference(0.0, np.nan, np.nan, 1.0), 0.02))


def test_a_head_that_is_worse_by_the_margin_passes_in_one_of_forty_at_most():
    """AUROC falls from .856 to .833 by this shift, by the closed form of binormal scores."""
    shift = 0.14
    margin = stats.norm.cdf(1.5 / 2**0.5) - stats.norm.cdf((1.5 - shift) / 2**0.5)
    generator = np.random.default_rng(6)
    passed = []
    for _ in range(600):
        y, a, b, patients = made(generator, 200, shift=shift)
        passed.append(non_inferiority_p(paired_difference(y, b, a, patients), margin) < 0.025)
    assert np.mean(passed) <= 0.045


def test_every_other_trained_head_is_tested_against_the_best(run_path):
    result = compare([run_path], margin=0.06, **FAST)
    tests = result["non_inferiority"]
    assert [(own["a"], own["b"]) for own in tests] == [("close", "best"), ("poor", "best")]
    close, poor = tests
    assert close["non_inferior"] is True
    assert close["low"] > -0.06
    assert poor["non_inferior"] is False
    assert close["p"] < close["p_holm"] == pytest.approx(2 * close["p"])
    assert poor["p"] == poor["p_holm"] > 0.9
    pairs = {(own["a"], own["b"]): own for own in result["paired"]}
    for own in tests:
        pair = pairs["best", own["a"]]
        assert own["difference"] == pytest.approx(-pair["difference"])
        assert (own["low"], own["high"]) == pytest.approx((-pair["high"], -pair["low"]))
        assert (own["score"], own["margin"]) == ("auroc", 0.06)


def test_each_is_said_in_a_sentence_in_text_and_on_the_page(run_path, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "plot_all", lambda *_: [])
    result = compare([run_path], margin=0.06, **FAST)
    told = [note for note in result["notes"] if "non-inferior" in note]
    assert told[0].startswith("close is non-inferior to best at a margin of 0.06 in AUROC")
    assert told[1].startswith("poor is not shown to be non-inferior to best at a margin of 0.06")
    assert result["notes"][-1] == "Research software; not a medical device."
    write_report([run_path], tmp_path, margin=0.06, **FAST)
    text = (tmp_path / "index.html").read_text()
    for note in told:
        assert to_html(note) in text
    assert "--margin 0.06" in text


def test_too_few_patients_and_one_head_are_said_too(tmp_path):
    images = make_images(n_patients=60)
    rare = images["label"].eq(1) & images["split"].eq("test")
    kept = images["patient"].isin(images.loc[rare, "patient"].unique()[:3])
    few = make_run(tmp_path / "few", images[~rare | kept], {"a": 1.0, "b": 2.0})
    (own,) = compare([few.path], margin=0.1, **FAST)["non_inferiority"]
    assert own["non_inferior"] is own["p"] is own["p_holm"] is own["low"] is None
    assert own["reason"] == "3 patients with abnormal rows; an interval needs 5"
    assert "cannot be tested: 3 patients" in describe_margins([own], 0.1)[0]
    alone = make_run(tmp_path / "alone", images, {"a": 1.0})
    result = compare([alone.path], margin=0.1, **FAST)
    assert result["non_inferiority"] == []
    assert any("no second trained head" in note for note in result["notes"])


def test_heads_that_rank_all_rows_alike_have_no_verdict(tmp_path):
    images = make_images(n_patients=60)
    run = make_run(tmp_path / "run", images, {"a": 1.0})
    frame = run.predictions()
    twin = frame[frame["head"] == "a"].assign(head="twin")
    run.write_predictions(pd.concat([frame, twin]))
    (own,) = compare([run.path], margin=0.1, **FAST)["non_inferiority"]
    assert own["difference"] == 0
    assert own["non_inferior"] is None
    assert own["reason"] == "the rows do not tell how far the difference varies"


@pytest.mark.parametrize("margin", ["0", "0.5", "-0.02", "1", "nan", "x"])
@pytest.mark.parametrize("command", ["compare", "report"])
def test_a_margin_out_of_range_is_wrong_usage(run_path, tmp_path, command, margin):
    out = ["-o", str(tmp_path / "page")] if command == "report" else []
    result = CliRunner().invoke(main, [command, str(run_path), f"--margin={margin}", *out])
    assert result.exit_code == 2
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize("margin", [0.0, 0.5, -1.0, float("nan")])
def test_a_margin_out_of_range_is_refused_before_anything_is_read(margin, tmp_path):
    with pytest.raises(RunError, match=r"not between 0 and 0\.5"):
        compare([tmp_path / "no run"], margin=margin)


def test_without_a_margin_nothing_changes(run_path):
    assert "non_inferiority" not in compare([run_path], **FAST)
