"""`--backend ray`: the bytes that one machine makes, also when one of Ray's workers is killed."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from made_sweeps import QUICK, command, make_data

from medembed.cli import main
from medembed.results.runs import open_run
from medembed.sweeps import runner, sweep

HELPERS = Path(__file__).parents[1] / "helpers"
pytestmark = pytest.mark.filterwarnings("ignore::Warning")  # of Ray's own, when it starts and ends
OPTIONS = {**QUICK, "heads": ("logistic", "mlp", "lightgbm"), "n_configs": 2}

ray = pytest.importorskip("ray", reason="Ray is not installed (medembed[ray])")


@pytest.fixture(scope="module")
def cluster(lone_ray):
    """Start a Ray of two cores; its workers can import these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # tokens are Ray's matter
        paths = [str(HELPERS), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        patch.delenv("RAY_ADDRESS", raising=False)
        memory = 80 * 2**20
        ray.init(
            num_cpus=2, object_store_memory=memory, include_dashboard=False, log_to_driver=False
        )
        yield ray
        ray.shutdown()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("ray"), {"mean": 1.5})


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """Sweep in this process: what Ray has to come to."""
    out = tmp_path_factory.mktemp("alone") / "run"
    sweep(*data, out, **OPTIONS)
    return out


def require_equal(out, alone):
    assert open_run(out).is_complete
    names = ["predictions.parquet"]
    names += [str(path.relative_to(alone)) for path in alone.glob("models/*/*")]
    for name in names:
        assert (out / name).read_bytes() == (alone / name).read_bytes(), name
    table = open_run(out).trials()
    assert table["key"].is_unique
    assert set(table["key"]) == set(open_run(alone).trials()["key"])
    assert (table["status"] == "ok").all()


def tell_processes(place):
    """Return a `train_unit` that tells its process; while there is a file `slow` it takes long."""
    train_unit = runner.train_unit

    def telling(data, unit):
        with open(place / "pids", "a") as file:
            file.write(f"{os.getpid()}\n")
        if (place / "slow").exists():
            time.sleep(0.5)
        return train_unit(data, unit)

    return telling


def pids_in(place):
    path = place / "pids"
    whole_lines = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [int(line) for line in whole_lines.splitlines()]


@pytest.fixture(scope="module")
def on_ray(cluster, data, tmp_path_factory):
    """Sweep by the command, with processes that tell who they are."""
    home = tmp_path_factory.mktemp("on-ray")
    arguments = command(data, home / "run", "--configs", "2", "--backend", "ray")
    arguments[arguments.index("--jobs") + 1] = "2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "train_unit", tell_processes(home))
        ran = CliRunner().invoke(main, arguments)
    assert ran.exit_code == 0, ran.output
    return home


def test_ray_gives_the_bytes_of_this_machine(on_ray, alone):
    require_equal(on_ray / "run", alone)


def test_a_connected_ray_trains_and_stays_connected(on_ray):
    assert pids_in(on_ray)
    assert os.getpid() not in pids_in(on_ray)
    assert ray.is_initialized()


def test_ray_starts_no_more_processes_than_were_asked_for(on_ray):
    """Each of them loads the libraries, which takes seconds."""
    assert len(set(pids_in(on_ray))) <= 2


def test_a_worker_that_is_killed_loses_nothing(cluster, data, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "train_unit", tell_processes(tmp_path))
    (tmp_path / "slow").touch()
    killed = []

    def kill():
        end = time.monotonic() + 60
        while not killed and time.monotonic() < end:
            time.sleep(0.05)
            for pid in pids_in(tmp_path)[1:2]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
        (tmp_path / "slow").unlink()

    thread = threading.Thread(target=kill)
    thread.start()
    sweep(*data, tmp_path / "run", **OPTIONS | {"jobs": 2}, backend="ray")
    thread.join()
    assert killed
    assert os.getpid() not in pids_in(tmp_path)
    require_equal(tmp_path / "run", alone)


def test_without_ray_the_message_names_the_extra(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    out = tmp_path / "run"
    ran = CliRunner().invoke(main, command(data, out, "--configs", "1", "--backend", "ray"))
    assert ran.exit_code == 1
    [line] = ran.stderr.splitlines()
    assert line.startswith("Error: --backend ray needs Ray")
    assert "pip install 'medembed[ray]'" in line


def test_without_ray_no_run_is_left(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    out = tmp_path / "run"
    CliRunner().invoke(main, command(data, out, "--configs", "1", "--backend", "ray"))
    assert not out.exists()
