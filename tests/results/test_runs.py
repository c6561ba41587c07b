"""The run directory: complete or not, never in between."""

import json

import numpy as np
import pandas as pd
import pytest
from made_runs import make_images, make_run

from medembed.core.errors import PathNotFoundError, RunError
from medembed.results.alignment import align_runs
from medembed.results.run_schema import TrialRecord
from medembed.results.runs import PREDICTION_COLUMNS, Run, create_run, open_run

LINE = {
    "trial": 0,
    "head": "mlp",
    "pooling": "mean",
    "params": {"lr": 1},
    "fold": 1,
    "score": 0.5,
    "best_epoch": None,
    "seconds": 1.5,
    "status": "ok",
    "error": None,
    "key": "k",
}


def line(**changes):
    return TrialRecord(**LINE | changes)


def test_what_was_appended_is_read_back_in_order(tmp_path):
    run = create_run(tmp_path / "run", {"seed": 0})
    for trial in range(3):
        run.append_trial(line(trial=trial))
    assert open_run(tmp_path / "run").trials()["trial"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("n_bytes", [1, 10, 40])
def test_a_torn_last_line_is_ignored_then_mended(tmp_path, n_bytes):
    run = create_run(tmp_path / "run", {"seed": 0})
    run.append_trial(line())
    with open(run.path / "trials.jsonl", "ab") as file:
        file.write(json.dumps(LINE).encode()[:n_bytes])
    assert len(run.trials()) == 1
    with run.locked():
        run.append_trial(line(trial=1))
    assert run.trials()["trial"].tolist() == [0, 1]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    run = create_run(tmp_path / "run", {"seed": 0})
    whole = json.dumps(LINE)
    for rubbish in ("rubbish", "[]", whole.replace('"fold": 1', '"fold": "1"')):
        (run.path / "trials.jsonl").write_text(f"{whole}\n{rubbish}\n{whole}\n")
        with pytest.raises(RunError, match=r"line 2 of .*Delete that line"):
            run.trials()


def test_a_line_is_written_as_it_was_read(tmp_path):
    run = create_run(tmp_path / "run", {"seed": 0})
    lines = (json.dumps(LINE), json.dumps(LINE | {"depth": 1, "later": {"b": 1, "a": [2]}}))
    (run.path / "trials.jsonl").write_text("".join(f"{own}\n" for own in lines))
    run.forget_trials({"another"})
    assert (run.path / "trials.jsonl").read_text().splitlines() == list(lines)


def test_a_ledger_refuses_nan(tmp_path):
    run = create_run(tmp_path / "run", {"seed": 0})
    with pytest.raises(ValueError, match="finite"):
        run.append_trial(line(score=float("nan")))


def test_the_same_question_takes_a_run_up_again(tmp_path):
    create_run(tmp_path / "run", {"seed": 0, "spec": {"fit": "pad", "size": (8, 8)}})
    again = create_run(tmp_path / "run", {"spec": {"size": [8, 8], "fit": "pad"}, "seed": 0})
    assert again.info.asked.seed == 0


def test_the_first_difference_is_named_inside_nested_values(tmp_path):
    create_run(tmp_path / "run", {"seed": 0, "spec": {"fit": "pad"}})
    with pytest.raises(RunError, match=r'spec\.fit was "pad" there and is "stretch" here'):
        create_run(tmp_path / "run", {"seed": 0, "spec": {"fit": "stretch"}})


def test_predictions_keep_their_types_and_bytes(tmp_path):
    run = make_run(tmp_path / "run", make_images(), {"mlp": 1.0})
    frame = run.predictions()
    assert list(frame.columns) == list(PREDICTION_COLUMNS)
    assert str(frame["label"].dtype) == "Int8"
    assert frame["fold"].isna().equals(frame["split"] == "test")
    before = (run.path / "predictions.parquet").read_bytes()
    run.write_predictions(frame)
    assert (run.path / "predictions.parquet").read_bytes() == before
    assert run.predictions().equals(frame)


def test_damaged_predictions_are_an_error_of_ours(tmp_path):
    run = make_run(tmp_path / "run", make_images(), {"mlp": 1.0})
    (run.path / "predictions.parquet").write_bytes(b"PAR1 rubbish PAR1")
    with pytest.raises(RunError, match="cannot be read"):
        run.predictions()
    run.path.joinpath("predictions.parquet").unlink()
    with pytest.raises(RunError, match="cannot be read"):
        run.predictions()


def test_kept_folds_come_back_and_damage_reads_as_missing(tmp_path):
    run = create_run(tmp_path / "run", {"seed": 0})
    run.keep_fold("k", np.array([0.25, 0.5]))
    assert run.kept_fold("k").tolist() == [0.25, 0.5]
    (run.path / "folds" / "k.npy").write_bytes(b"\x93NUMPY")
    assert run.kept_fold("k") is None
    assert run.kept_fold("absent") is None
    run.drop_folds()
    assert not (run.path / "folds").exists()


def test_a_hollow_description_and_a_file_are_no_runs(tmp_path):
    run = create_run(tmp_path / "run", {"seed": 0})
    (run.path / "run.json").write_text('{"format": "medembed-run", "version": 1}')
    with pytest.raises(RunError, match=r"kind, asked, times are missing.*sweep again"):
        open_run(run.path)
    with pytest.raises(RunError, match="is a file"):
        open_run(run.path / "run.json")


def test_what_is_not_a_run_is_told_apart(tmp_path):
    with pytest.raises(PathNotFoundError, match="does not exist"):
        open_run(tmp_path / "absent")
    with pytest.raises(RunError, match=r"no run\.json"):
        open_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        open_run(tmp_path)
    (tmp_path / "run.json").write_text('{"format": "medembed-run", "version": 99}')
    with pytest.raises(RunError, match="version 99"):
        open_run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        create_run(tmp_path / "file", {})


def test_a_head_name_cannot_leave_the_run(tmp_path):
    run = create_run(tmp_path / "run", {"seed": 0})
    for name in ("../up", "a/b", "", ".hidden"):
        with pytest.raises(RunError):
            run.model_path(name)
    assert run.model_path("region-prior").parent.parent == run.path


def test_trials_of_an_empty_run_have_their_columns(tmp_path):
    trials = create_run(tmp_path / "run", {"seed": 0}).trials()
    assert isinstance(trials, pd.DataFrame)
    assert {"trial", "head", "fold", "score", "status", "error", "key"} <= set(trials.columns)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("leaderboard",), {"mlp": 0.9}),
        (("leaderboard", 0), "mlp"),
        (("leaderboard", 0), {}),
        (("leaderboard", 0, "head"), []),
        (("leaderboard", 0, "params"), 3),
        (("leaderboard", 0, "cv"), 10**400),
        (("leaderboard", 0, "seconds"), "1.5"),
        (("data",), None),
        (("data", "left_out"), "mean"),
        (("data", "splits"), {"train": 3}),
        (("encoder", "preprocessing"), []),
        (("decisions",), {"mlp": None}),
        (("asked", "train_fraction"), float("nan")),
        (("seed",), [0]),
        (("times",), None),
    ],
)
def test_an_entry_that_no_run_writes_is_named(tmp_path, place, value):
    board = [{"head": "mlp", "params": {}, "cv": 0.9, "seconds": 1.5}]
    details = {"leaderboard": board, "data": {}, "encoder": {"source": "demo"}, "decisions": {}}
    run = create_run(tmp_path / "run", {"seed": 0}, details=details)
    document = json.loads((run.path / "run.json").read_bytes())
    *above, last = place
    entry = document
    for key in above:
        entry = entry[key]
    entry[last] = value
    (run.path / "run.json").write_text(json.dumps(document))
    with pytest.raises(RunError, match=rf"run\.json of .*{place[0]}.*edited\. Restore it"):
        open_run(run.path)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("sha256", None),
        ("sha256", "../x"),
        ("patient", None),
        ("region", None),
        ("label", 7),
        ("split", "valid"),
        ("fold", -5),
        ("probability", 1.5),
        ("probability", None),
    ],
)
def test_predictions_that_no_run_writes_are_named(tmp_path, column, value):
    run = make_run(tmp_path / "run", make_images(n_patients=12), {"mlp": 0.5}, complete=False)
    predictions = run.predictions().astype({column: object})
    predictions.loc[:2, column] = value
    run.write_predictions(predictions)
    with pytest.raises(RunError, match=f"3 of .* rows have a {column} that no run writes"):
        run.predictions()


def test_studies_whose_images_no_head_names_are_an_error(tmp_path):
    run = make_run(tmp_path / "run", make_images(n_patients=12), {"mlp": 0.5}, complete=False)
    run.write_predictions(run.predictions().assign(sha256=""))
    with pytest.raises(RunError, match="does not say which images its studies have"):
        align_runs([run])


@pytest.mark.parametrize("threshold", [10**400, float("inf"), "0.5x", None])
def test_a_threshold_that_is_no_number_is_an_error(tmp_path, threshold):
    run = make_run(tmp_path / "run", make_images(n_patients=12), {"mlp": 0.5}, complete=False)
    platt = {"method": "platt", "slope": 1.0, "intercept": 0.0}
    own = {"calibrations": {"platt": platt}, "sensitive_threshold": None}
    document = json.loads((run.path / "run.json").read_text())
    run = Run(run.path, {**document, "decisions": {"mlp": {**own, "threshold": threshold}}})
    with pytest.raises(RunError, match=r"decisions of run\.json .*threshold must be"):
        align_runs([run])
