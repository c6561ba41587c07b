"""The ledger of a sweep, and what is left after it was stopped, killed or damaged: all of it."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from forked import fork
from made_sweeps import make_data, make_table, workers_in_session

from medembed.core.errors import RunError
from medembed.core.files import json_digest
from medembed.results.comparison import compare
from medembed.results.runs import Run, open_run
from medembed.sweeps import finalize, runner, sweep

HEADS = ("logistic", "mlp", "lightgbm")
SMALL = {"heads": HEADS, "n_configs": 2, "n_folds": 3, "jobs": 1}
COHORTS = ("mlp",)  # whose rungs are decided on all folds together
ONE = {"heads": ("logistic",), "n_configs": 2, "n_folds": 3, "jobs": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    table = make_table()
    table["age"] = [str(30 + i % 40) for i in range(len(table))]
    return make_data(tmp_path_factory.mktemp("resume"), {"mean": 1.5, "max": 0.5}, table=table)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Sweep without interruption: what all others have to come to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return sweep(*data, out, **SMALL).as_dict(), out


def timeless(leaderboard):
    return [{**entry, "seconds": None} for entry in leaderboard]


def require_equal(out, whole):
    """Compare a finished run with the uninterrupted one: tables, predictions, models, files."""
    result, reference = whole
    assert timeless(open_run(out).as_dict()["leaderboard"]) == timeless(result["leaderboard"])
    for name in ("predictions.parquet", "scores.json"):
        theirs, ours = ((path / name).read_bytes() for path in (reference, out))
        if name == "scores.json":  # it names the directory's run
            theirs, ours = (json.loads(text)["rows"] for text in (theirs, ours))
            for row in (*theirs, *ours):
                row.pop("run", None)
        assert ours == theirs, name
    for path in (reference / "models").rglob("*"):
        if path.is_file():
            assert (out / path.relative_to(reference)).read_bytes() == path.read_bytes()
    assert names_in(out) == names_in(reference)


def names_in(out):
    """List all files but hidden ones: what a kill leaves half-written means nothing."""
    paths = [path.relative_to(out) for path in out.rglob("*")]
    return sorted(str(p) for p in paths if not any(part.startswith(".") for part in p.parts))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Leave a run of which everything is trained and nothing is finished."""
    out = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "write_predictions", stop)
        with pytest.raises(Stop):
            sweep(*data, out, **SMALL)
    assert not open_run(out).is_complete
    return out


@pytest.fixture
def out(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


class Stop(KeyboardInterrupt):
    pass


def stop(*_arguments):
    raise Stop


def count_fits(monkeypatch):
    """Return a list that grows by (head, fold, number of configurations) with every unit."""
    train_unit, seen = runner.train_unit, []

    def counted(data, unit):
        seen.append((unit.head, unit.fold, len(unit.params)))
        return train_unit(data, unit)

    monkeypatch.setattr(runner, "train_unit", counted)
    return seen


# Keys


def keys_of(data, out, **options):
    """Return the keys of a sweep's ledger by head and configuration."""
    sweep(*data, out, **ONE | options)
    table = open_run(out).trials()
    return {
        (row.head, json.dumps(row.params, sort_keys=True), row.fold): row.key
        for row in table.itertuples()
        if row.pooling == "mean"
    }


@pytest.fixture(scope="module")
def keys(data, tmp_path_factory):
    return keys_of(data, tmp_path_factory.mktemp("keys") / "run", pool="mean")


def test_the_same_question_in_another_directory_has_the_same_keys(data, keys, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(data[0].parent, moved)
    again = keys_of((moved / "cache", moved / "manifest.csv"), tmp_path / "b", pool="mean")
    assert again == keys
    assert len(set(keys.values())) == len(keys) == 6


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"n_folds": 4},
        {"metric": "brier"},
        {"covariates": ("age",)},
        {"train_fraction": 0.6},
        {"n_configs": 3},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_decides_a_result_is_in_its_key(data, keys, tmp_path, change):
    other = keys_of(data, tmp_path / "run", pool="mean", **change)
    common = set(other) & set(keys)
    assert common  # the same configurations on the same folds by number
    assert not set(other.values()) & set(keys.values())


def test_another_label_or_embedded_image_changes_the_keys(data, keys, tmp_path):
    table = make_table()
    table["age"] = [str(30 + i % 40) for i in range(len(table))]
    index = table.index[table["patient"] == "patient000"]
    table.loc[index, "label"] = str(1 - int(table["label"][index[0]]))
    (tmp_path / "other").mkdir()
    signals = {"mean": 1.5, "max": 0.5}
    other = make_data(tmp_path / "other", signals, table=table)
    found = keys_of((data[0], other[1]), tmp_path / "run", pool="mean")
    assert not set(found.values()) & set(keys.values())


def test_another_space_changes_the_keys_of_its_head_alone(data, tmp_path):
    found = []
    for rate in (0.05, 0.1):
        space = tmp_path / f"{rate}.toml"
        space.write_text(f"[lightgbm]\nlearning_rate = {rate}\n[logistic]\nC = 1.0\n")
        options = {**ONE, "heads": ("lightgbm",), "space": space, "pool": "mean"}
        sweep(*data, tmp_path / str(rate), **options)
        table = open_run(tmp_path / str(rate)).trials()
        found.append({head: set(rows["key"]) for head, rows in table.groupby("head")})
    assert not found[0]["lightgbm"] & found[1]["lightgbm"]
    assert found[0]["logistic"] == found[1]["logistic"]


def test_an_mlp_has_another_key_among_other_mates(data, tmp_path):
    """Sums in a cohort are rounded together, so its members are part of the question."""
    found = []
    for mates in ("8", "9"):
        space = tmp_path / f"{mates}.toml"
        space.write_text(f"[mlp]\nhidden = [[4], [{mates}]]\nepochs = 1\n[logistic]\nC = 1.0\n")
        options = {**ONE, "n_configs": None, "heads": ("mlp",), "space": space, "pool": "mean"}
        sweep(*data, tmp_path / mates, **options)
        table = open_run(tmp_path / mates).trials().query("head == 'mlp'")
        found.append(set(table[[p["hidden"] == [4] for p in table["params"]]]["key"]))
    assert all(len(keys) == 3 for keys in found)
    assert not found[0] & found[1]


# Damage that the same command repairs


def kept_fold_of(out, whole, head, fold):
    """Return where a run keeps what the head's winner predicts of a fold that it was without."""
    trial = next(e["trial"] for e in whole[0]["leaderboard"] if e["head"] == head)
    [record] = [
        r for r in open_run(out).trial_records() if (r.head, r.trial, r.fold) == (head, trial, fold)
    ]
    key = json_digest(["fold", record.key, record.best_epoch])[:32]
    return out / "folds" / f"{key}.npy"


def damage(out, whole, kind):
    """Damage an unfinished run; return the trial that has to be trained again, if one has."""
    record, kept = None, kept_fold_of(out, whole, "lightgbm", 1)
    probability = np.load(kept)
    if kind == "torn line":
        lines = (out / "trials.jsonl").read_bytes().splitlines(keepends=True)
        record = json.loads(lines[-1])
        (out / "trials.jsonl").write_bytes(b"".join(lines)[: -len(lines[-1]) // 2])
    elif kind == "line without its end":
        content = (out / "trials.jsonl").read_bytes()
        record = json.loads(content.splitlines()[-1])
        (out / "trials.jsonl").write_bytes(content[:-1])
    elif kind == "deleted":
        kept.unlink()
    elif kind == "all deleted":
        shutil.rmtree(out / "folds")
    elif kind == "truncated":
        kept.write_bytes(kept.read_bytes()[:-8])
    elif kind == "empty":
        kept.write_bytes(b"")
    elif kind == "too short":
        np.save(kept, probability[:-1])
    elif kind == "too long":
        np.save(kept, np.append(probability, 0.5))
    elif kind == "one value":
        np.save(kept, probability[:1])
    return record


def count_refits(monkeypatch):
    """Return a list that grows by (head, fold) with every winner that is trained without a fold."""
    refit, seen = finalize.refit, []

    def counted(training, item):
        seen.extend([(item.head, item.fold)] if item.fold is not None else [])
        return refit(training, item)

    monkeypatch.setattr(finalize, "refit", counted)
    return seen


DAMAGES = [
    *("torn line", "line without its end", "deleted", "truncated", "empty"),
    *("too short", "too long", "one value"),
]


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_repaired_by_the_same_command(data, whole, out, monkeypatch, kind):
    record = damage(out, whole, kind)
    fits, again = count_fits(monkeypatch), count_refits(monkeypatch)
    sweep(*data, out, **SMALL)
    require_equal(out, whole)
    if record is None:
        assert (fits, again) == ([], [("lightgbm", 1)])
        return
    assert again == []
    assert {head for head, _, _ in fits} == {record["head"]}
    if record["head"] not in COHORTS:
        assert {fold for _, fold, _ in fits} == {record["fold"]}


def test_all_kept_folds_deleted_means_all_winners_are_trained_again(data, whole, out, monkeypatch):
    damage(out, whole, "all deleted")
    fits, again = count_fits(monkeypatch), count_refits(monkeypatch)
    sweep(*data, out, **SMALL)
    require_equal(out, whole)
    assert fits == []
    assert sorted(again) == sorted((head, fold) for head in HEADS for fold in range(3))


def test_the_ledger_of_a_repaired_run_has_one_line_per_trial_and_fold(data, whole, out):
    damage(out, whole, "torn line")
    sweep(*data, out, **SMALL)
    table = open_run(out).trials()
    assert table["key"].is_unique
    assert len(table) == 3 * 2 * 3


def test_a_cohort_in_the_midst_of_its_rungs_is_repaired_to_the_same_bytes(
    data, tmp_path, monkeypatch
):
    space = tmp_path / "space.toml"
    space.write_text("[mlp]\nrungs = [1, 2]\nhidden = [4]\nlr = { low = 1e-4, high = 0.1 }\n")
    options = {**SMALL, "heads": ("mlp",), "n_configs": 8, "space": space}
    first = sweep(*data, tmp_path / "whole", **options).as_dict(), tmp_path / "whole"
    for stop in (2, 5, 8):  # in each of the three rungs
        out, train_unit, seen = tmp_path / f"run{stop}", runner.train_unit, []

        def stopping(data, unit, stop=stop, seen=seen, train_unit=train_unit):
            seen.append(unit.head)
            if seen.count("mlp") == stop:
                raise Stop
            return train_unit(data, unit)

        with monkeypatch.context() as patch:
            patch.setattr(runner, "train_unit", stopping)
            with pytest.raises(Stop):
                sweep(*data, out, **options)
        sweep(*data, out, **options)
        require_equal(out, first)
        assert open_run(out).trials()["key"].is_unique


def test_a_sweep_stopped_before_its_last_step_cleans_up_when_asked_again(
    data, whole, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "drop_folds", stop)
        with pytest.raises(Stop):
            sweep(*data, out, **SMALL)
    sweep(*data, out, **SMALL)
    require_equal(out, whole)


def test_another_programs_line_in_the_ledger_is_an_error_of_ours(data, out):
    with open(out / "trials.jsonl", "ab") as file:
        file.write(b"{}\n")
    with pytest.raises(RunError, match=r"line 19 .* are missing\. Delete that line"):
        sweep(*data, out, **SMALL)


# Kills


def be_killed(data, out, jobs):
    os.setsid()
    sweep(*data, out, **SMALL | {"jobs": jobs})


def kill_after(data, out, jobs, n_lines, seconds):
    """Kill a sweep so long after its next lines of the ledger; return whether it had not ended."""
    process = fork(be_killed, data, out, jobs)
    wanted = count_lines(out) + n_lines
    while process.is_alive() and count_lines(out) < wanted:
        process.join(0.002)
    process.join(seconds)
    process.kill()
    process.join()
    code = process.exitcode
    for pid in workers_in_session(process.pid):  # they would wait for minutes
        os.kill(pid, signal.SIGKILL)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def count_lines(out):
    ledger = out / "trials.jsonl"
    return ledger.read_bytes().count(b"\n") if ledger.exists() else 0


def test_twenty_kills_at_random_moments_lose_nothing(data, whole, tmp_path):
    import medembed.heads.batched_mlp  # noqa: F401 (or each fork would be killed importing torch)

    generator, n_killed, n_whole = random.Random(20), 0, 0
    out, phases = tmp_path / "run0", set()
    while n_killed < 20:
        jobs = 2 if n_killed % 7 == 6 else 1
        if kill_after(data, out, jobs, generator.randrange(4), generator.uniform(0, 0.2)):
            n_killed += 1
            phases.add(phase_of(out))
        else:
            require_equal(out, whole)
            n_whole += 1
            out = tmp_path / f"run{n_whole}"
    sweep(*data, out, **SMALL)
    require_equal(out, whole)
    assert "training" in phases


def phase_of(out):
    ledger = out / "trials.jsonl"
    if not ledger.exists():
        return "before"
    if (out / "models").exists():
        return "finishing"
    return "training" if not (out / "scores.json").exists() else "finished"


def test_a_kill_while_models_are_written_leaves_no_hidden_directories(data, whole, tmp_path):
    out = tmp_path / "run"
    process = fork(die_while_saving, data, out)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(RunError, match="unfinished"):
        compare([out])
    sweep(*data, out, **SMALL)
    require_equal(out, whole)
    assert [p.name for p in (out / "models").iterdir() if p.name.startswith(".")] == []


def die_while_saving(data, out):
    rename = os.rename

    def dying(source, target):
        if Path(target).name == "mlp":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.rename = dying
    sweep(*data, out, **SMALL)
