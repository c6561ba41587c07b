"""A worklist holds unlabelled studies of train: a random share, and what covers or is uncertain."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from made_sweeps import WIDTH, make_data, make_table

import medembed as me
from medembed.cache.spec import CacheSpec, keys_from_hex
from medembed.cache.store import create_cache
from medembed.cli import main
from medembed.core.errors import ArgumentError, TrainingDataError
from medembed.prediction.worklist import _choose, _uncertainty, make_worklist

Data = tuple[Path, Path]


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """Of 80 patients, those with a number above 30 have no label."""
    table = make_table(80)
    table.loc[table["patient"] > "patient030", "label"] = ""
    return table


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, table: pd.DataFrame) -> Data:
    return make_data(tmp_path_factory.mktemp("worklist"), table=table)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Data) -> me.Run:
    out = tmp_path_factory.mktemp("runs") / "sweep"
    return me.sweep(*data, out, heads="logistic", n_configs=1, n_folds=2, jobs=1)


def test_only_unlabelled_studies_of_train_are_chosen_each_with_all_views(
    data: Data, table: pd.DataFrame, run: me.Run
) -> None:
    free = table[(table["label"] == "") & (table["split"] == "train")]
    for model in (None, run):
        chosen = make_worklist(*data, 12, model=model)
        assert len(chosen) == chosen.rows["study"].nunique() == 12
        assert set(chosen.rows["study"]) <= set(free["study"])
        views = free[free["study"].isin(chosen.rows["study"])]
        assert set(chosen.rows["sha256"]) == set(views["sha256"])
        assert chosen.counts()["random"] == round(0.2 * 12)
        assert chosen.n_unlabelled == free["study"].nunique()
        assert sorted(chosen.rows["rank"].unique()) == list(range(1, 13))


def test_all_are_listed_if_more_are_asked_for_than_there_are(data: Data) -> None:
    chosen = make_worklist(*data, 5000)
    assert len(chosen) == chosen.n_unlabelled


def test_equal_seeds_give_equal_lists_and_a_prefix_is_fair(data: Data) -> None:
    first, again = (make_worklist(*data, 30, random_share=0.5) for _ in range(2))
    pd.testing.assert_frame_equal(first.rows, again.rows)
    reasons = [
        make_worklist(*data, 30, random_share=0.5, seed=seed)
        .rows.drop_duplicates("rank")["chosen_by"]
        .head(10)
        for seed in range(10)
    ]
    share = np.mean([(own == "random").mean() for own in reasons])
    assert 0.35 < share < 0.65


def test_the_random_share_is_a_fair_draw(data: Data) -> None:
    drawn = pd.concat(
        make_worklist(*data, 20, random_share=1, seed=seed).rows.drop_duplicates("study")["study"]
        for seed in range(40)
    ).value_counts()
    n_free = make_worklist(*data, 1).n_unlabelled
    assert len(drawn) == n_free
    expected = 800 / n_free
    spread = (expected * (1 - 20 / n_free)) ** 0.5  # of 40 draws, each without replacement
    assert drawn.max() < expected + 5 * spread
    assert drawn.min() > expected - 5 * spread


def test_a_model_points_at_what_it_is_least_sure_of(
    data: Data, table: pd.DataFrame, run: me.Run
) -> None:
    chosen = make_worklist(*data, 6, model=run, random_share=0).rows
    every = make_worklist(*data, 5000, model=run).rows
    labelled = table[(table["label"] != "") & (table["split"] == "train")]
    share = labelled.drop_duplicates("study")["label"].astype(int).mean()
    assert (chosen["chosen_by"] == "uncertainty").all()
    gap = (_logit(every["probability"]) - _logit(share)).abs()
    own = (_logit(chosen["probability"]) - _logit(share)).abs()
    assert own.max() <= gap.sort_values().iloc[: 30 * 3].max()
    assert own.mean() < gap.mean()
    answers = me.Predictor(run, cache=data[0]).predict_manifest(data[1])
    of_study = {row["study"]: row["probability"] for row in answers if row["image"] is None}
    for study, p in chosen[["study", "probability"]].itertuples(index=False):
        assert p == pytest.approx(of_study[study], abs=1e-9)


def _logit(p: "pd.Series[float] | float") -> "pd.Series[float]":
    return np.log(p / (1 - p))


def test_a_cover_takes_one_of_each_group_of_alike_films(tmp_path: Path) -> None:
    table = make_table(60).drop_duplicates("patient").reset_index(drop=True)
    table[["label", "split"]] = ["", "train"]
    group = np.arange(60) % 6
    X = np.eye(6, WIDTH, dtype=np.float32)[group] * 10
    X += np.random.default_rng(0).normal(size=X.shape).astype(np.float32) / 10
    cache, path = make_data(tmp_path / "data", table=table)
    known = me.open_cache(cache)
    grouped = create_cache(tmp_path / "grouped", known.spec, {"source": "demo"})
    grouped.commit(keys_from_hex(table["sha256"].tolist()), {"mean": X})
    group_of = dict(zip(table["sha256"], group, strict=True))
    chosen = make_worklist(grouped, path, 6, random_share=0).rows
    assert sorted(chosen["sha256"].map(group_of)) == list(range(6))
    # what is alike to a labelled film waits: only groups without a label are chosen
    table.loc[group < 3, "label"] = "0"
    table.loc[(group < 3) & (np.arange(60) > 30), "label"] = ""
    partly = make_data(tmp_path / "partly", table=table)[1]
    later = make_worklist(grouped, partly, 3, random_share=0).rows
    assert sorted(later["sha256"].map(group_of)) == [3, 4, 5]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=25),
)
def test_patients_are_different_while_there_are_others(k: int, rows: list[tuple[int, int]]) -> None:
    Z = np.array([[place, 0.0] for place, _ in rows])
    persons = np.array([person for _, person in rows], object)
    chosen = _choose(Z, np.ones(len(Z)), persons, k, 0)
    assert len(chosen) == len(set(chosen.tolist())) == min(k, len(rows))
    n_persons = len(set(persons.tolist()))
    assert len(set(persons[chosen].tolist())) == (min(k, n_persons) if k < len(rows) else n_persons)


def test_uncertainty_is_greatest_at_the_share_of_abnormal_studies() -> None:
    p = np.linspace(0, 1, 101)
    for share in (0.02, 0.5, 0.9):
        weights = _uncertainty(p, share)
        assert np.isfinite(weights).all()
        assert p[weights.argmax()] == pytest.approx(share)
        assert (np.diff(weights[p <= share]) >= 0).all()
        assert (np.diff(weights[p >= share]) <= 0).all()


def test_what_cannot_be_listed_is_refused(data: Data, tmp_path: Path) -> None:
    labelled = make_data(tmp_path / "labelled")
    with pytest.raises(TrainingDataError, match="no embedded study of train is unlabelled"):
        make_worklist(*labelled, 5)
    for n, share, named in ((0, 0.2, "at least 1"), (5, 1.5, r"1\.5")):
        with pytest.raises(ArgumentError, match=named):
            make_worklist(*data, n, random_share=share)


def test_the_command_writes_a_list_that_can_be_filled_in_and_applied(
    data: Data, run: me.Run, tmp_path: Path
) -> None:
    out = tmp_path / "worklist.csv"
    arguments = ["worklist", *map(str, data), "--run", str(run.path), "-n", "8", "-o", str(out)]
    ran = CliRunner().invoke(main, [*arguments, "--json"])
    assert ran.exit_code == 0, ran.output
    listed = pd.read_csv(out, dtype=str)
    assert list(listed) == ["rank", "sha256", "region", "chosen_by", "new_label"]
    assert [own["sha256"] for own in json.loads(ran.stdout)] == listed["sha256"].tolist()
    assert "patient0" not in out.read_text() + ran.stdout
    assert CliRunner().invoke(main, arguments).exit_code == 1  # labels may have been filled in
    listed["new_label"] = (listed["rank"].astype(int) % 2).astype(str)
    listed.to_csv(out, index=False)
    done = me.relabel(data[1], out)
    assert done.as_dict()["labelled"] == len(listed)
    again = make_worklist(data[0], done.manifest, 5000)
    assert again.n_unlabelled == make_worklist(*data, 1).n_unlabelled - 8
    named = tmp_path / "named.csv"
    ran = CliRunner().invoke(main, [*arguments[:-1], str(named), "--names"])
    assert ran.exit_code == 0, ran.output
    assert {"image", "study"} <= set(pd.read_csv(named))
    assert "Next: medembed manifest relabel" in ran.stderr


def test_a_model_of_another_encoder_is_refused(run: me.Run, data: Data, tmp_path: Path) -> None:
    rows = me.read_manifest(data[1]).rows
    spec = CacheSpec("cd" * 32, {"size": [8, 8], "fit": "stretch"}, {"mean": (WIDTH,)}, "float32")
    other = create_cache(tmp_path / "other", spec, {"source": "other"})
    other.commit(
        keys_from_hex(rows["sha256"].tolist()), {"mean": np.ones((len(rows), WIDTH), np.float32)}
    )
    with pytest.raises(me.ModelError, match="embeddings"):
        make_worklist(other, data[1], 5, model=run)


def test_scores_on_studies_that_were_sought_out_carry_a_warning(
    tmp_path: Path, table: pd.DataFrame
) -> None:
    labelled = make_table(40)
    labelled["chosen_by"] = np.where(labelled["patient"] < "patient020", "uncertainty", "random")
    home = make_data(tmp_path / "sought", table=labelled)
    run = me.sweep(*home, tmp_path / "run", heads="logistic", n_configs=1, n_folds=2, jobs=1)
    of_test = labelled[(labelled["split"] == "test") & (labelled["chosen_by"] == "uncertainty")]
    [warning] = [note for note in me.compare(run).notes if "sought out" in note]
    assert f"{of_test['study'].nunique()} studies" in warning
    assert "--by chosen_by" in warning
