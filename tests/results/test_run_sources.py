"""Two files of a run that tell the same thing and are not of one run: a refusal naming both."""

import json
import shutil
from pathlib import Path

import pytest
from made_runs import fit_sets, give_model, make_images, make_run

from medembed.core.errors import ModelError, RunError
from medembed.prediction.shift import find_internal
from medembed.report.external import find_external
from medembed.results.alignment import align_runs
from medembed.results.comparison import compare_runs
from medembed.results.model_card import read_conformal
from medembed.results.runs import Run, open_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run", make_images(), {"mlp": 0.5, "logistic": 1.0})


def edit_board(run: Run, **changes: object) -> Run:
    """Write another winner of the first head into run.json."""
    first, *others = run.as_dict()["leaderboard"]
    run.update_info(leaderboard=[{**first, **changes}, *others])
    return open_run(run.path)


def test_predictions_of_another_trial_are_refused(run: Run) -> None:
    align_runs([run])
    with pytest.raises(RunError, match=r"run.json of .* names trial 7 as the winner of mlp, and "):
        align_runs([edit_board(run, trial=7)])
    with pytest.raises(RunError, match=r"predictions.parquet holds trial 0"):
        compare_runs([open_run(run.path)], n_resamples=10)


def test_predictions_of_another_sweep_are_refused(run: Run, tmp_path: Path) -> None:
    heads = {"logistic": 1.0, "mlp": 0.5}  # the other way round: other trials won
    other = make_run(tmp_path / "other", make_images(), heads, seed=2)
    shutil.copy(other.path / "predictions.parquet", run.path)
    with pytest.raises(RunError, match="are not of one run"):
        align_runs([run])


@pytest.mark.parametrize(
    ("name", "value"), [("trial", 3), ("pooling", "cls"), ("cv", 0.5), ("seed", 9)]
)
def test_a_model_of_another_run_is_refused(run: Run, name: str, value: object) -> None:
    run = edit_board(run, seed=1)
    card = {"trial": 0, "pooling": "mean+max", "cv": 0.9, "seed": 1}
    kept = {"conformal": fit_sets(run, "mlp").as_dict()}
    path = give_model(run, "mlp", **card, **kept)
    assert read_conformal(run, "mlp") is not None
    assert find_internal(path) is not None
    shutil.rmtree(path)
    give_model(run, "mlp", **{**card, name: value}, **kept)
    said = (
        rf"the model at .* has {name} {value}, and run.json names .*: the model is not of this run"
    )
    with pytest.raises(ModelError, match=said):
        read_conformal(run, "mlp")
    with pytest.raises(ModelError, match=said):
        find_internal(path)


def test_scores_of_other_predictions_are_refused(run: Run) -> None:
    run.update_info(kind="evaluation")
    scores = json.loads((run.path / "scores.json").read_text())
    run.write_scores({**scores, "predictions_sha256": "0" * 64})
    with pytest.raises(RunError, match=r"scores.json of .* is not of the predictions.parquet"):
        find_external([run])
