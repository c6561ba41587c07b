import json
import time

import numpy as np
import pandas as pd
import pytest

from medembed.core.errors import TrainingDataError
from medembed.evaluation import bootstrap
from medembed.evaluation.intervals import (
    Interval,
    bootstrap_report,
    bootstrap_scores,
    holm,
    paired_difference,
    paired_differences,
    plain,
)
from medembed.evaluation.scores import DECISION_SCORES, SCORES, score


def studies(n, n_patients, seed, noise=1.0):
    """Studies whose scores share a part with the patient's other studies."""
    generator = np.random.default_rng(seed)
    patients = generator.integers(0, n_patients, n)
    y = generator.integers(0, 2, n)
    shared = generator.normal(size=n_patients)[patients]
    logit = 2 * y - 1 + noise * (0.6 * shared + 0.8 * generator.normal(size=n))
    return y, 1 / (1 + np.exp(-logit)), patients


def assert_alike(a, b):
    ends = [(own.value, own.low, own.high) for own in (a, b)]
    assert ends[0] == pytest.approx(ends[1], abs=1e-12, nan_ok=True)
    assert (a.method, a.reason, a.k, a.n) == (b.method, b.reason, b.k, b.n)


def table(n=300, n_patients=120, seed=0):
    y, probability, patients = studies(n, n_patients, seed)
    generator = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "patient": [f"p{code}" for code in patients],
            "region": generator.choice(["elbow", "hand", "wrist"], n),
            "label": pd.array(y, dtype="Int8"),
            "probability": probability,
            "n_views": generator.integers(1, 6, n),
        }
    )


def test_eces_bound_is_that_of_resampled_patients_one_at_a_time():
    y, probability, patients = studies(60, 25, seed=1)
    found = bootstrap_scores(y, probability, patients, 0.5, n_resamples=200, seed=3)
    names, codes = np.unique(patients, return_inverse=True)
    drawn = np.random.default_rng(3).integers(0, len(names), size=(200, len(names)))
    chosen = [np.concatenate([np.flatnonzero(codes == code) for code in row]) for row in drawn]
    loop = [score(y[rows], probability[rows], 0.5)["ece"] for rows in chosen]
    assert found["ece"].high == pytest.approx(np.quantile(loop, 0.95))
    assert np.isnan(found["ece"].low)
    assert {k: v.value for k, v in found.items()} == pytest.approx(score(y, probability, 0.5))


def test_chunks_do_not_change_a_number(monkeypatch):
    y, probability, patients = studies(60, 25, seed=1)
    whole = bootstrap_scores(y, probability, patients, 0.5, n_resamples=100)
    monkeypatch.setattr(bootstrap, "_CHUNK_ELEMENTS", 60 * 7)
    chunked = bootstrap_scores(y, probability, patients, 0.5, n_resamples=100)
    for name in SCORES:
        assert_alike(whole[name], chunked[name])


def test_the_order_of_rows_does_not_change_a_number():
    y, probability, patients = studies(60, 25, seed=1)
    forwards = bootstrap_scores(y, probability, patients, 0.5, n_resamples=100)
    backwards = bootstrap_scores(y[::-1], probability[::-1], patients[::-1], 0.5, n_resamples=100)
    for name in SCORES:
        assert_alike(forwards[name], backwards[name])


def test_studies_of_one_patient_move_together():
    y, probability, _ = studies(40, 40, seed=2)
    single = bootstrap_scores(y, probability, np.arange(40), 0.5)["auroc"]
    ninefold = [np.repeat(part, 9) for part in (y, probability, np.arange(40))]
    copied = bootstrap_scores(*ninefold, 0.5)["auroc"]
    assert_alike(copied, single)


def test_2000_resamples_of_every_score_at_muras_size_take_under_2_seconds():
    y, probability, patients = studies(1199, 783, seed=0)
    start = time.process_time()
    bootstrap_scores(y, probability, patients, 0.5)
    assert time.process_time() - start < 2


def test_intervals_cover_the_truth_about_95_times_in_100():
    truth = score(*studies(400_000, 200_000, seed=99)[:2], 0.5)
    n_runs = 150
    covered = dict.fromkeys(("auroc", "accuracy", "kappa", "brier"), 0)
    for seed in range(n_runs):
        found = bootstrap_scores(*studies(240, 120, seed=seed), 0.5, n_resamples=400, seed=seed)
        for name in covered:
            covered[name] += found[name].low <= truth[name] <= found[name].high
    # three standard errors of a share of .95 over 150 runs are .053
    assert all(0.89 <= count / n_runs <= 1 for count in covered.values()), covered


def test_the_paired_test_calls_equal_heads_different_about_5_times_in_100():
    n_runs, n_called = 300, 0
    for seed in range(n_runs):
        generator = np.random.default_rng(seed)
        patients = generator.integers(0, 100, 200)
        y = generator.integers(0, 2, 200)
        shared = y + generator.normal(size=200)
        a, b = (1 / (1 + np.exp(-shared - 0.7 * generator.normal(size=200))) for _ in "ab")
        n_called += paired_difference(y, a, b, patients).p < 0.05
    # three standard errors of .05 over 300 runs are .038
    assert 0.012 <= n_called / n_runs <= 0.088


def test_a_clearly_better_head_is_found():
    y, good, patients = studies(400, 200, seed=0, noise=0.7)
    worse = np.clip(good + np.random.default_rng(1).normal(size=400), 0, 1)
    found = paired_difference(y, good, worse, patients)
    assert 0 < found.low < found.difference < found.high
    assert found.p < 1e-4


def test_identical_predictions_differ_by_nothing():
    y, probability, patients = studies(60, 25, seed=1)
    found = paired_difference(y, probability, probability.copy(), patients)
    nothing = dict.fromkeys(("low", "high", "method"))
    assert found.as_dict() == {"difference": 0.0, "p": 1.0, **nothing}


def test_turning_a_pair_round_turns_its_sign():
    y, a, patients = studies(60, 25, seed=1)
    b = studies(60, 25, seed=2)[1]
    forwards = paired_difference(y, a, b, patients)
    backwards = paired_difference(y, b, a, patients)
    assert backwards.p == forwards.p
    assert (backwards.low, backwards.high) == pytest.approx((-forwards.high, -forwards.low))


def test_every_pair_of_heads_equals_the_pair_alone():
    y, a, patients = studies(60, 25, seed=1)
    heads = {"a": a, "b": studies(60, 25, seed=2)[1], "c": np.full(60, 0.5)}
    cuts = {"a": 0.4, "b": 0.6, "c": 0.5}
    pairs = paired_differences(y, heads, patients, score="accuracy", thresholds=cuts)
    assert list(pairs) == [("a", "b"), ("a", "c"), ("b", "c")]
    alone = paired_difference(
        y,
        heads["a"],
        heads["c"],
        patients,
        score="accuracy",
        thresholds=(0.4, 0.5),
    )
    assert pairs["a", "c"] == alone


def test_holm_steps_down_as_computed_by_hand():
    # sorted .01 x 4 = .04, .02 x 3 = .06, .03 x 2 = .06, .04 x 1 = .04, held at .06
    np.testing.assert_allclose(holm([0.03, 0.01, 0.04, 0.02]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.6, 0.5]), [1.0, 1.0])
    np.testing.assert_allclose(holm([np.nan, 0.02, 0.03]), [np.nan, 0.04, 0.04])
    assert holm([]).shape == (0,)


def test_a_class_with_two_patients_gets_a_value_but_no_interval():
    y = np.r_[1, 1, np.zeros(38, int)]
    found = bootstrap_scores(y, np.linspace(1, 0, 40), np.arange(40), 0.5, n_resamples=500)
    assert found["auroc"].value == 1
    auroc = found["auroc"].as_dict()
    assert (auroc["value"], auroc["low"], auroc["high"], auroc["method"]) == (1.0, None, None, None)
    assert auroc["reason"] == "2 patients with abnormal rows; an interval needs 5"
    assert found["accuracy"].low < found["accuracy"].value < found["accuracy"].high


def test_one_patient_gets_no_interval():
    found = bootstrap_scores(np.array([0, 1]), np.array([0.1, 0.9]), np.array(["p", "p"]), 0.5)
    assert found["auroc"].value == 1
    assert all(np.isnan(own.low) and np.isnan(own.high) for own in found.values())


@pytest.mark.parametrize("patients", [["p"], ["p", "q", "r"]])
def test_patients_of_other_rows_are_refused(patients):
    with pytest.raises(TrainingDataError, match=f"2 labels, but {len(patients)} patients"):
        bootstrap_scores(np.array([0, 1]), np.array([0.1, 0.9]), np.array(patients), 0.5)


def test_a_row_without_a_patient_is_refused():
    with pytest.raises(TrainingDataError, match="1 rows have no patient"):
        bootstrap_scores(np.array([0, 1]), np.array([0.1, 0.9]), np.array(["p", None]), 0.5)


def test_a_report_holds_every_part():
    rows = table()
    report = bootstrap_report(rows, 0.4, n_resamples=200)
    assert set(report["region"]) == {"elbow", "hand", "wrist"}
    assert list(report["n_views"]) == ["1", "2", "3+"]
    assert sum(block["n"] for block in report["n_views"].values()) == len(rows)
    y, probability = rows["label"].to_numpy(int), rows["probability"].to_numpy()
    alone = bootstrap_scores(y, probability, rows["patient"].to_numpy(), 0.4, n_resamples=200)
    assert report["overall"]["scores"] == alone
    assert tuple(report["overall"]["at_half"]) == DECISION_SCORES
    assert report["overall"]["at_half"]["accuracy"].value == score(y, probability, 0.5)["accuracy"]
    hand = rows[rows["region"] == "hand"]
    block = report["region"]["hand"]
    assert (block["n"], block["n_abnormal"]) == (len(hand), hand["label"].sum())
    assert block["n_patients"] == hand["patient"].nunique()


def test_the_mean_over_regions_weighs_regions_alike():
    report = bootstrap_report(table(), 0.4, n_resamples=200)
    values = [block["scores"]["auroc"].value for block in report["region"].values()]
    mean = report["mean_over_regions"]
    assert mean["scores"]["auroc"].value == pytest.approx(np.mean(values))
    assert mean["scores"]["auroc"].low < np.mean(values) < mean["scores"]["auroc"].high
    assert (mean["n_regions"], mean["left_out"]) == (3, [])


def test_a_region_of_one_class_is_not_estimable_and_left_out_of_the_mean():
    rows = table()
    rows.loc[rows["region"] == "hand", "label"] = 0
    report = bootstrap_report(rows, 0.4, n_resamples=200)
    hand = report["region"]["hand"]["scores"]
    assert plain(hand["auroc"])["value"] is plain(hand["auroc"])["low"] is None
    assert hand["specificity"].low < hand["specificity"].value < hand["specificity"].high
    assert report["mean_over_regions"]["left_out"] == ["hand"]
    assert report["mean_over_regions"]["n_regions"] == 2


def test_no_region_with_both_classes_leaves_an_empty_mean_not_an_error():
    rows = table()
    rows["label"] = (rows["region"] == "hand").astype("Int8")
    mean = bootstrap_report(rows, 0.4, n_resamples=50)["mean_over_regions"]
    assert plain(mean["scores"]["auroc"]) == dict.fromkeys(("value", "low", "high", "method"))


def test_unlabelled_rows_are_counted_not_scored():
    rows = table()
    known = bootstrap_report(rows.iloc[10:], 0.4, n_resamples=50)
    rows.loc[rows.index[:10], "label"] = pd.NA
    report = bootstrap_report(rows, 0.4, n_resamples=50)
    assert report.pop("n_unlabelled") == 10
    assert known.pop("n_unlabelled") == 0
    assert plain(report) == plain(known)
    rows["label"] = pd.array([None] * len(rows), dtype="Int8")
    with pytest.raises(TrainingDataError, match="no row has a label"):
        bootstrap_report(rows, 0.4)


def test_a_plain_report_is_json():
    document = plain(bootstrap_report(table(), 0.4, n_resamples=50))
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert plain({"a": Interval(np.nan, 0.5, np.float64(1)), "b": (np.int64(3),)}) == {
        "a": {"value": None, "low": 0.5, "high": 1.0, "method": None},
        "b": [3],
    }


def test_of_ece_there_is_an_upper_bound_alone_that_a_calibrated_heads_0_lies_below():
    generator = np.random.default_rng(0)
    probability = generator.uniform(size=1000)
    y = (generator.uniform(size=1000) < probability).astype(int)
    ece = bootstrap_scores(y, probability, np.arange(1000), 0.5, n_resamples=300)["ece"]
    found = plain(ece)
    assert found["low"] is None
    assert found["value"] <= found["high"] < 0.1
    assert found["method"] == "bootstrap upper bound"
