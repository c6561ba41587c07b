"""The quality study: its curves, its comparison of heads, and the peers it trains."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import peer_mlps
import quality
import quality_report
import quality_tools
from paired_heads import compare_heads
from quality_tables import prepare

PARAMS = {
    "hidden": [8],
    "activation": "relu",
    "dropout": 0.0,
    "lr": 0.01,
    "weight_decay": 0.1,
    "label_smoothing": 0.05,
    "class_weight": "balanced",
}


def write_piece(place: Path, tool: str, seed: int, curve: list[tuple[float, float]]) -> None:
    piece = quality.Piece("made", seed, tool, place)
    piece.score.parent.mkdir(exist_ok=True)
    heads = {"mlp": curve[-1][1], "logistic": 0.7}
    piece.score.write_text(json.dumps({"curve": curve, "heads": heads}))


def pieces_of(place: Path, seed: int) -> list[quality.Piece]:
    return [quality.Piece("made", seed, tool, place) for tool in ("medembed", "ridge")]


def test_a_tool_counts_chance_before_its_first_result_and_keeps_its_last() -> None:
    grid = np.array([0.5, 1.0, 2.0, 9.0])
    found = quality_report.at_times([(1.0, 0.7), (3.0, 0.6)], grid)
    assert found.tolist() == [0.5, 0.7, 0.7, 0.6]
    assert quality_report.at_times([], grid).tolist() == [0.5] * 4


def test_the_report_takes_the_pairs_that_every_tool_has(tmp_path: Path) -> None:
    for seed, ours in ((0, 0.80), (1, 0.90), (2, 0.10)):
        write_piece(tmp_path, "medembed", seed, [(1.0, ours)])
        if seed < 2:  # the others are not done with the third
            write_piece(tmp_path, "ridge", seed, [(6.0, ours + 0.03)])
            write_piece(tmp_path, "before", seed, [(9.0, ours - 0.01 * (1 + 2 * seed))])
    tools = ("medembed", "ridge", "before")
    pieces = [quality.Piece("made", seed, tool, tmp_path) for seed in range(3) for tool in tools]
    out = tmp_path / "quality.json"
    quality_report.write_report(pieces, 10, out, "1a2b3c4")
    found = json.loads(out.read_text())
    assert found["tables"] == {"made": 2}
    assert found["auroc_at"]["medembed"]["5"] == pytest.approx(0.85)
    assert found["lead"]["tools"] == {"ridge": {"auroc": 0.03, "at": 6.0}}
    assert found["heads"]["mlp"]["difference"] == pytest.approx(0.02)
    assert "<svg" in out.with_suffix(".svg").read_text()
    rows = out.with_suffix(".csv").read_text().splitlines()
    assert {"ridge,made,1,,6.0,0.93", "before,made,1,mlp,,0.87"} <= set(rows)
    page = "\n".join(quality_report.describe_quality(found))
    assert "+0.0300 (wanted: at most 0.005, missed)" in page
    assert "Each head against the version of 1a2b3c4" in page
    assert "| mlp | 2 | 0.8300 | 0.8500 | +0.0200" in page
    assert "| mlp | made: 128 directions, products | 2 | +0.0200" in page
    quality_report.write_report(pieces, 10, out)
    assert json.loads(out.read_text())["against"] == "1a2b3c4", "of the points it goes on from"
    with pytest.raises(SystemExit, match="compares with 1a2b3c4, not with 5d6e7f8: delete it"):
        quality_report.write_report(pieces, 10, out, "5d6e7f8")


def test_a_report_goes_on_from_the_points_of_an_earlier_one(tmp_path: Path) -> None:
    out, places = tmp_path / "quality.json", [tmp_path / "one", tmp_path / "two"]
    for seed, place in enumerate(places):
        place.mkdir()
        for tool in ("medembed", "ridge"):
            write_piece(place, tool, seed, [(1.0, 0.8 + 0.1 * seed)])
    empty = quality.Piece("made", 0, "optuna", places[0])
    empty.score.write_text(json.dumps({"curve": []}))
    quality_report.write_report([empty, *pieces_of(places[0], 0)], 10, out)
    quality_report.write_report(pieces_of(places[1], 1), 10, out)
    found = quality_report.read_points(out.with_suffix(".csv"))
    assert found.curves["ridge"]["made"] == {0: [(1.0, 0.8)], 1: [(1.0, 0.9)]}
    assert found.curves["optuna"]["made"] == {0: []}
    assert found.heads["medembed"]["made", 1] == {"mlp": 0.9, "logistic": 0.7}
    assert json.loads(out.read_text())["tables"] == {"made": 1}, "where every tool has raced"


def test_a_table_without_points_is_not_added_to(tmp_path: Path) -> None:
    (tmp_path / "quality.csv").write_text("tool,seconds\n")
    with pytest.raises(SystemExit, match=r"has the columns tool, seconds, .*: delete it to begin"):
        quality_report.write_report([], 10, tmp_path / "quality.json")
    assert not (tmp_path / "quality.json").exists()


def test_what_a_better_one_of_the_same_head_follows_at_once_is_not_refitted() -> None:
    found = [
        quality_tools.Found(at, score, {"head": head})
        for at, score, head in ((1.0, 0.6, "mlp"), (1.05, 0.7, "mlp"), (1.06, 0.5, "logistic"))
    ]
    assert quality_tools._drop_superseded(found) == found[1:]
    later = [*found, quality_tools.Found(1.5, 0.55, {"head": "logistic"})]
    assert quality_tools._drop_superseded(later) == later[1:]


def test_heads_are_compared_on_common_pairs_as_scipy_does() -> None:
    generator = np.random.default_rng(0)
    old = {("made", seed): {"mlp": generator.uniform(0.7, 0.8)} for seed in range(12)}
    new = {pair: {"mlp": own["mlp"] - 0.01 * generator.random()} for pair, own in old.items()}
    new["made", 99] = {"mlp": 0.0}
    found = compare_heads(old, new)["mlp"]
    a, b = ([scores[pair]["mlp"] for pair in sorted(old)] for scores in (old, new))
    assert found["pairs"] == 12
    p = stats.ttest_rel(b, a, alternative="less").pvalue
    assert found["p_worse"] == pytest.approx(p, abs=1e-5)
    assert found["p_worse"] < 0.01
    assert found["tables"]["made"]["p_worse"] == found["tables"]["made"]["p_worse_holm"]
    assert compare_heads(old, old)["mlp"]["p_worse"] == 1.0


def test_a_head_that_is_worse_on_one_table_of_two_is_found_there() -> None:
    generator = np.random.default_rng(0)
    pairs = [(table, seed) for table in ("made", "nih") for seed in range(10)]
    old = {pair: {"mlp": generator.uniform(0.7, 0.8)} for pair in [*pairs, ("demo", 0)]}
    move = {"made": -0.02, "nih": 0.05, "demo": 0.0}
    new = {
        pair: {"mlp": own["mlp"] + move[pair[0]] + 0.01 * generator.standard_normal()}
        for pair, own in old.items()
    }
    found = compare_heads(old, new)["mlp"]
    assert found["p_worse"] > 0.9
    made = found["tables"]["made"]
    assert made["p_worse_holm"] == pytest.approx(2 * made["p_worse"], abs=1e-5)
    assert made["p_worse_holm"] < 0.01 < found["tables"]["nih"]["p_worse_holm"]
    assert list(found["tables"]) == ["made", "nih"], "one pair tells nothing"


def test_members_of_a_batch_train_as_one_by_one() -> None:
    """Without dropout, only the initial weights differ."""
    generator = np.random.default_rng(0)
    X = generator.standard_normal((200, 6)).astype(np.float32)
    y = (X[:, 0] + generator.standard_normal(200) > 0).astype(np.int8)
    rows = peer_mlps.Rows.of(X, y, np.arange(150), np.arange(150, 200))
    linear = [{**PARAMS, "hidden": [], "lr": lr} for lr in (0.01, 0.05)]
    # a perceptron without hidden layers is convex: from any start both end at the same place
    alone = [peer_mlps.train_one(own, rows, epochs=80, patience=80) for own in linear]
    together = peer_mlps.train_together(linear, rows, epochs=80, patience=80)
    assert [own.auroc for own in together] == pytest.approx([own.auroc for own in alone], abs=0.005)


def test_a_batch_drops_stopped_members_and_leaves_the_others_as_they_are() -> None:
    generator = np.random.default_rng(1)
    X = generator.standard_normal((120, 5)).astype(np.float32)
    y = (X[:, 0] > 0).astype(np.int8)
    rows = peer_mlps.Rows.of(X, y, np.arange(80), np.arange(80, 120))
    members = [{**PARAMS, "lr": lr} for lr in (1e-3, 0.2, 1e-2)]
    dropped = peer_mlps._Batch(members, rows)
    whole = peer_mlps._Batch(members, rows)
    for name, tensor in whole._params.items():
        tensor.copy_(dropped._params[name])
    for k in range(4):
        if k == 2:
            dropped.keep([0, 2])
        for batch in (dropped, whole):
            batch.step(rows.X, rows.y)
    assert dropped.going == [0, 2]
    assert dropped.logits(rows.X) == pytest.approx(whole.logits(rows.X)[[0, 2]], abs=1e-5)


def test_auroc_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(2)
    y = generator.integers(0, 2, 60)
    scores = np.round(generator.random((2, 60)), 1)  # with ties
    assert peer_mlps.auroc(y, scores) == pytest.approx([roc_auc_score(y, own) for own in scores])


def test_time_that_is_over_ends_a_fit() -> None:
    X = np.zeros((40, 3), np.float32)
    rows = peer_mlps.Rows.of(X, np.arange(40) % 2, np.arange(40))
    with pytest.raises(peer_mlps.OutOfTimeError):
        peer_mlps.train_one(PARAMS, rows, until=0.0)
    with pytest.raises(peer_mlps.OutOfTimeError):
        peer_mlps.train_together([PARAMS, PARAMS], rows, until=0.0)


def test_seeds_draw_other_tables_and_a_table_is_drawn_once(tmp_path: Path) -> None:
    cache, manifest = prepare("low_rank", 0, tmp_path)
    before = manifest.read_bytes()
    assert prepare("low_rank", 0, tmp_path) == (cache, manifest)
    assert manifest.read_bytes() == before
    assert prepare("low_rank", 1, tmp_path)[1].read_bytes() != before


def test_a_study_names_an_unknown_table_or_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options in (["--tools", "ridg"], ["--tables", "made,mad"], ["--tools", "before"]):
        given = ["quality.py", "race", "--place", str(tmp_path), *options]
        monkeypatch.setattr(sys, "argv", given)
        with pytest.raises(SystemExit) as caught:
            quality.main()
        assert any(word in str(caught.value) for word in ("ridg", "mad is", "--against"))
