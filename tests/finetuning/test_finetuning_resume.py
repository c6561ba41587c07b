"""Fine-tuning that was stopped or killed goes on from its last epoch, to the same bytes."""

import json
import os
import signal
import time
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from forked import fork
from made_finetuning import QUICK, Stop, make_cohort, make_tower, require_equal, stop_after, tune
from safetensors.numpy import save

from medembed.core.errors import RunError
from medembed.finetuning import training
from medembed.finetuning.training import Counters, State, read_state, write_state
from medembed.results.runs import Run, open_run

LONG = replace(QUICK, epochs=3, patience=9)
OPTIONS: dict[str, Any] = {"unfreeze": "0,1,2", "config": LONG}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("resume")
    make_cohort(home)
    make_tower(home / "tower")
    tune(home, home / "tower", home / "whole", **OPTIONS)
    return home


@pytest.mark.parametrize("n", [1, 6, 9])
def test_ctrl_c_leaves_a_run_that_goes_on(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    stop_after(monkeypatch, n)
    with pytest.raises(Stop):
        tune(home, home / "tower", tmp_path / "run", **OPTIONS)
    monkeypatch.undo()
    run = open_run(tmp_path / "run")
    assert not run.is_complete
    assert len(run.trial_records()) == (n - 1) // LONG.epochs
    with pytest.raises(RunError, match="unfinished"):
        run.require_complete()
    epochs = count_epochs(monkeypatch)
    tune(home, home / "tower", tmp_path / "run", **OPTIONS)
    assert len(epochs) == 3 * LONG.epochs - n
    require_equal(tmp_path / "run", home / "whole")


def count_epochs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    epochs: list[int] = []
    train_epoch = training.Trainer._train_epoch

    def counted(trainer: Any, epoch: int, progress: Any) -> float:
        epochs.append(epoch)
        return train_epoch(trainer, epoch, progress)

    monkeypatch.setattr(training.Trainer, "_train_epoch", counted)
    return epochs


def test_killed_at_moments_of_every_depth_it_ends_with_the_same_bytes(
    home: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    wanted = [("unfreeze-0", 2), ("unfreeze-1", 1), ("unfreeze-2", 2)]
    n_killed = 0
    while True:
        process = fork(train_alone, home, out)
        killed = wait_and_kill(process, out, wanted)
        n_killed += killed
        if not killed:
            break
    assert process.exitcode == 0
    assert n_killed >= 2
    require_equal(out, home / "whole")


def train_alone(home: Path, out: Path) -> None:
    os.setsid()
    tune(home, home / "tower", out, **OPTIONS)


def wait_and_kill(process: ForkServerProcess, out: Path, wanted: list[tuple[str, int]]) -> bool:
    """Kill the process once it has written one of the epochs wanted; False where it ends."""
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        for head, epoch in wanted:
            path = out / "training" / f"{head}.safetensors"
            if path.is_file() and epoch_of(path) >= epoch:
                wanted.remove((head, epoch))
                os.killpg(process.pid, signal.SIGKILL)
                process.join()
                return True
        time.sleep(0.002)
    process.join(timeout=0)
    return False


def epoch_of(path: Path) -> int:
    try:
        size = int.from_bytes((data := path.read_bytes())[:8], "little")
        return int(json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["counters"])["epoch"])
    except (OSError, ValueError, KeyError):
        return 0


@pytest.mark.parametrize(
    "counters",
    [{"epoch": "1"}, {"epoch": -1}, {"seconds": None}, {"best_key": [0.5, "x"]}, {"epochs": 1}],
)
def test_a_state_with_counters_that_no_training_writes_is_not_gone_on_from(
    tmp_path: Path, counters: dict[str, Any]
) -> None:
    path = tmp_path / "state.safetensors"
    sound = Counters(epoch=1, best_epoch=1, best_key=[0.5, -1.0], history=[{"loss": 0.5}])
    write_state(path, "key", State(sound, {}, {}, {}))
    assert read_state(path, "key").counters == sound
    edited = json.dumps({**vars(sound), **counters})
    path.write_bytes(save({}, {"key": "key", "counters": edited}))
    assert read_state(path, "key") is None


def test_a_state_of_another_question_or_a_damaged_one_is_not_gone_on_from(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 2)
    with pytest.raises(Stop):
        tune(home, home / "tower", tmp_path / "run", **OPTIONS)
    monkeypatch.undo()
    path = tmp_path / "run" / "training" / "unfreeze-0.safetensors"
    assert read_state(path, "another") is None
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert read_state(path, "any") is None
    epochs = count_epochs(monkeypatch)
    tune(home, home / "tower", tmp_path / "run", **OPTIONS)
    assert len(epochs) == 3 * LONG.epochs
    require_equal(tmp_path / "run", home / "whole")


def test_what_was_trained_is_not_trained_again_after_a_crash_at_the_end(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_predictions", stop)
        with pytest.raises(Stop):
            tune(home, home / "tower", tmp_path / "run", **OPTIONS)
    epochs = count_epochs(monkeypatch)
    tune(home, home / "tower", tmp_path / "run", **OPTIONS)
    assert epochs == []
    require_equal(tmp_path / "run", home / "whole")


def test_a_full_memory_is_tried_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    train_epoch = training.Trainer._train_epoch

    def full(trainer: Any, epoch: int, progress: Any) -> float:
        if trainer._name == "unfreeze-1":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train_epoch(trainer, epoch, progress)

    def stop(*_: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "_train_epoch", full)
        patch.setattr(Run, "write_predictions", stop)
        with pytest.raises(Stop):
            tune(home, home / "tower", tmp_path / "run", **OPTIONS)
    record = open_run(tmp_path / "run").trial_records()[1]
    assert record.status == "error"
    assert "Give a larger --accumulate, --checkpointing or a smaller" in record.error
    epochs = count_epochs(monkeypatch)
    tune(home, home / "tower", tmp_path / "run", **OPTIONS)
    assert len(epochs) == LONG.epochs
    statuses = [r.status for r in open_run(tmp_path / "run").trial_records()]
    assert statuses == ["ok"] * 3
