"""Runs that differ in one thing: seed, share of training patients, depth; what may not differ."""

import numpy as np
import pandas as pd
import pytest
from made_runs import make_images, make_run

from medembed.core.errors import RunError
from medembed.core.schema import as_json
from medembed.evaluation.delong import auroc_differences, auroc_interval
from medembed.evaluation.paired import mcnemar
from medembed.report.tables import render
from medembed.results.alignment import align_runs
from medembed.results.comparison import compare, compare_aligned
from medembed.results.runs import create_run

FAST = {"n_resamples": 100}


@pytest.fixture(scope="module")
def images():
    return make_images(n_patients=180)


def rename(run, **asked):
    """Give a made run another question, as sweeps with other options have."""
    run.update_info(asked={**as_json(run.info.asked), **asked})
    return run


def test_seeds_are_kept_apart_from_sampling(images, tmp_path):
    for seed in (1, 2, 3):
        make_run(tmp_path / f"s{seed}", images, {"mlp": 1.0, "logistic": 2.0}, seed=seed)
    result = compare([tmp_path / f"s{seed}" for seed in (1, 2, 3)], **FAST)
    assert [(own["head"], own["n_seeds"]) for own in result["seeds"]] == [
        ("mlp", 3),
        ("logistic", 3),
    ]
    for own in result["seeds"]:
        values = [r["scores"]["auroc"]["value"] for r in result["rows"] if r["head"] == own["head"]]
        assert own["auroc"]["mean"] == pytest.approx(np.mean(values))
        assert own["auroc"]["seed_sd"] == pytest.approx(np.std(values, ddof=1))
        assert 0 < own["auroc"]["sampling_sd"] < 0.1
        assert own["runs"] == ["s1", "s2", "s3"]


def test_runs_that_differ_in_more_than_the_seed_are_no_seeds(images, tmp_path):
    make_run(tmp_path / "a", images, {"mlp": 1.0}, seed=1)
    rename(make_run(tmp_path / "b", images, {"mlp": 1.0}, seed=2), n_folds=7)
    assert compare([tmp_path / "a", tmp_path / "b"], **FAST)["seeds"] == []
    assert compare([tmp_path / "a"], **FAST)["seeds"] == []


def test_seeds_of_one_run_go_by_the_end_of_their_names(images, tmp_path):
    run = make_run(tmp_path / "a", images, {"unfreeze-2-s0": 1.0, "unfreeze-2-s1": 1.1})
    board = [{**e, "seed": i, "depth": 2} for i, e in enumerate(run.as_dict()["leaderboard"])]
    run.update_info(leaderboard=board)
    result = compare([tmp_path / "a"], **FAST)
    assert [(own["head"], own["n_seeds"]) for own in result["seeds"]] == [("unfreeze-2", 2)]
    assert [row["seed"] for row in sorted(result["rows"], key=lambda r: r["head"])][-2:] == [0, 1]


def test_label_efficiency_by_share_of_patients(images, tmp_path):
    for fraction, noise in ((1.0, 0.8), (0.1, 2.0), (0.5, 1.0)):
        run = make_run(tmp_path / f"f{fraction}", images, {"mlp": noise, "logistic": noise})
        rename(run, train_fraction=fraction)
    paths = [tmp_path / f"f{fraction}" for fraction in (1.0, 0.1, 0.5)]
    result = compare(paths, **FAST)
    assert {own["head"] for own in result["efficiency"]} == {"mlp", "logistic"}
    for own in result["efficiency"]:
        assert [point["train_fraction"] for point in own["points"]] == [0.1, 0.5, 1.0]
        assert all(point["n_train_patients"] == 90 for point in own["points"])
        assert all(0.5 < point["auroc"]["low"] < 1 for point in own["points"])
    text = render(result, width=100)
    assert "Train" in text
    assert "10 %" in text
    assert compare(paths[:1], **FAST)["efficiency"] == []
    assert "Train" not in render(compare(paths[:1], **FAST), width=100)


def test_depths_of_one_run_are_one_series(images, tmp_path):
    heads = {"unfreeze-0": 2.0, "unfreeze-1": 1.5, "unfreeze-12": 1.0}
    run = make_run(tmp_path / "a", images, heads)
    depths = [0, 1, 12]
    board = [{**e, "depth": d} for e, d in zip(run.as_dict()["leaderboard"], depths, strict=True)]
    run.update_info(leaderboard=board)
    (series,) = compare([tmp_path / "a"], **FAST)["depths"]
    assert series["head"] == "unfreeze"
    assert [point["depth"] for point in series["points"]] == depths
    values = [point["auroc"]["value"] for point in series["points"]]
    assert values == sorted(values)


def test_depths_of_another_encoder_are_no_points_of_this_one(images, tmp_path):
    found = (("vit", [0, 4]), ("more", [2]), ("cnn", [4]), ("other", [0, 1]))
    for name, depths in found:
        heads = {f"unfreeze-{depth}": 1.0 for depth in depths}
        run = make_run(tmp_path / name, images, heads)
        board = [
            {**e, "depth": d} for e, d in zip(run.as_dict()["leaderboard"], depths, strict=True)
        ]
        run.update_info(leaderboard=board, encoder={"source": "vit" if name == "more" else name})
    (series,) = compare([tmp_path / name for name in ("vit", "more", "cnn")], **FAST)["depths"]
    assert series["head"] == "unfreeze"
    assert [point["depth"] for point in series["points"]] == [0, 2, 4]
    assert [point["run"] for point in series["points"]] == ["vit", "more", "vit"]
    both = compare([tmp_path / name for name in ("vit", "other")], **FAST)["depths"]
    assert {own["head"] for own in both} == {"unfreeze of vit", "unfreeze of other"}


def test_thresholds_confusion_and_calibrations_of_a_row(images, tmp_path):
    run = make_run(tmp_path / "a", images, {"mlp": 1.2})
    test_set = align_runs([run])
    row = compare_aligned([run], test_set, **FAST)["rows"][0]
    contender = next(c for c in test_set.contenders if c.head == "mlp")
    counts = row["confusion"]
    assert counts["tn"] + counts["fp"] + counts["fn"] + counts["tp"] == len(test_set.y)
    sensitivity = counts["tp"] / (counts["tp"] + counts["fn"])
    assert row["scores"]["sensitivity"]["value"] == pytest.approx(sensitivity)
    own = run.predictions().query("head == 'mlp' and split == 'train'")
    studies = own.groupby("study").agg(label=("label", "max"), p=("probability", "mean"))
    p = contender.calibration.apply(studies["p"].to_numpy())
    assert np.mean(p[studies["label"] == 1] >= row["at_sensitivity"]["threshold"]) >= 0.9
    assert row["at_sensitivity"]["target"] == 0.9
    assert set(row["calibrations"]) == {"none", "platt", "temperature", "isotonic"}
    platt = row["calibrations"]["platt"]
    for score in ("brier", "ece"):
        assert platt[score] == pytest.approx(row["scores"][score])
    assert sum(b["n"] for b in platt["bins"]) == len(test_set.y)
    delong = auroc_interval(test_set.y, contender.probability, test_set.patients)
    assert row["auroc_delong"] == delong.as_dict()


def test_cross_checks_stand_beside_the_bootstrap(images, tmp_path):
    run = make_run(tmp_path / "a", images, {"mlp": 0.8, "logistic": 2.5})
    test_set = align_runs([run])
    result = compare_aligned([run], test_set, **FAST)
    pair = next(p for p in result["paired"] if (p["a"], p["b"]) == ("mlp", "logistic"))
    a, b = (next(c for c in test_set.contenders if c.head == h) for h in ("mlp", "logistic"))
    both = {"a": a.probability, "b": b.probability}
    expected = auroc_differences(test_set.y, both, test_set.patients)["a", "b"]
    assert pair["p_delong"] == pytest.approx(expected.p)
    decisions = [c.probability >= c.threshold for c in (a, b)]
    assert pair["mcnemar"] == vars(mcnemar(test_set.y, *decisions))


def test_two_identical_heads_do_not_differ_and_two_clearly_different_ones_do(images, tmp_path):
    run = make_run(tmp_path / "a", images, {"mlp": 0.8, "poor": 4.0})
    twin = run.predictions()
    twin = twin[twin["head"] == "mlp"].assign(head="twin")
    all_rows = [run.predictions(), twin]
    board = [*run.as_dict()["leaderboard"], {**run.as_dict()["leaderboard"][0], "head": "twin"}]
    copy = create_run(
        tmp_path / "b", as_json(run.info.asked), details={**as_json(run.info), "leaderboard": board}
    )
    copy.write_predictions(pd.concat(all_rows, ignore_index=True))
    copy.write_scores({})
    pairs = {frozenset((p["a"], p["b"])): p for p in compare([tmp_path / "b"])["paired"]}
    same, other = pairs[frozenset(("mlp", "twin"))], pairs[frozenset(("mlp", "poor"))]
    assert (same["difference"], same["p_holm"], same["p_delong"]) == (0, 1, 1)
    assert same["mcnemar"] == {"only_a": 0, "only_b": 0, "p": 1}
    assert other["p_holm"] < 0.05
    assert other["p_delong"] < 0.01


@pytest.mark.parametrize("column", ["label", "region", "patient"])
def test_runs_on_other_test_rows_are_refused_by_what_differs(images, tmp_path, column):
    changed = images.copy()
    test = np.flatnonzero(changed["split"] == "test")
    if column == "label":
        first = changed["study"].iloc[test[0]]
        changed.loc[changed["study"] == first, "label"] ^= 1
    elif column == "region":
        first = changed["study"].iloc[test[0]]
        changed.loc[changed["study"] == first, "region"] = "knee"
    else:  # two patients become one
        others = changed["patient"].iloc[test].unique()
        changed.loc[changed["patient"] == others[0], "patient"] = others[1]
    make_run(tmp_path / "a", images, {"mlp": 1.0})
    make_run(tmp_path / "b", changed, {"mlp": 1.0})
    with pytest.raises(RunError, match=f"run b was scored on other {column}s than a: "):
        compare([tmp_path / "a", tmp_path / "b"], **FAST)
