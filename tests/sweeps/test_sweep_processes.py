"""The processes of a sweep: any number gives equal bytes, one may die, Ctrl-C ends them all."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
from click.testing import CliRunner
from made_sweeps import make_data, session_of, workers_in_session
from threadpoolctl import threadpool_limits

from medembed.cli import main
from medembed.core.errors import TrainingDataError
from medembed.heads.packaging import load_model
from medembed.results.runs import open_run
from medembed.sweeps import runner, sweep, training
from medembed.sweeps.processes import start_early
from medembed.sweeps.worker_pool import Died, Pool

HEADS = ("logistic", "mlp", "lightgbm", "attention")
OPTIONS = ["--configs", "12", "--folds", "3"]
DEADLY = 63


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("processes"), {"mean": 1.5, "max": 0.5})


# Their start

IMPORTED = "'medembed.heads.batched_mlp' in __import__('sys').modules"


@pytest.mark.parametrize("early", [True, False])
def test_processes_have_imported_when_they_get_work(early):
    with start_early(2) if early else nullcontext(), Pool(IMPORTED, 2) as pool:
        assert list(pool.run(eval, [{}])) == [(0, True)]


def test_processes_end_with_the_context_in_which_they_start_early():
    with start_early(2), Pool(None, 2) as pool:
        pids = {pid for _, pid in pool.run(lambda *_: os.getpid(), range(8))}
    assert pids
    assert os.getpid() not in pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_processes_started_early_for_nothing_end_without_a_warning(recwarn):
    with start_early(2):
        pass
    assert not recwarn.list


def test_a_refused_number_is_refused_by_the_pool_alone():
    with start_early(10**6), pytest.raises(TrainingDataError, match="--jobs 1000000"):
        Pool(None, 10**6).__enter__()


def test_processes_do_not_run_a_script_that_has_no_guard(tmp_path):
    script = (
        "from medembed.sweeps.worker_pool import Pool\n"
        "print('once')\n"
        "with Pool(2, 2) as pool:\n"
        "    print(sorted(pool.run(pow, [3, 4])))\n"
    )
    assert run_script(script, tmp_path) == ("once\n[(0, 8), (1, 16)]\n", [])


SAFE = """
import os
from medembed.sweeps.worker_pool import Died, Pool

def own(shared, item):
    return os.getpid() if item else 1 / item

with Pool(None, 2) as pool:
    for item, rank in ((1, 1), (0, 0)):
        pool.submit(own, item, rank=rank, safe=True)
    pool.submit(own, 1)
    found = [pool.wait() for _ in range(3)]
    assert found[:2] == [(1, Died("division by zero")), (0, os.getpid())], found
    assert found[2][0] == 2 and found[2][1] != os.getpid()
    pool.submit(own, 1, safe=True)
    assert pool.wait()[1] != os.getpid()
"""


def run_script(text, tmp_path):
    """Run a script in a session of its own; return what it said and who is left of it."""
    script = tmp_path / "script.py"
    script.write_text(text)
    with subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    return said, last_of(process.pid)


def test_only_while_others_start_this_process_runs_what_is_safe(tmp_path):
    assert run_script(SAFE, tmp_path) == ("", [])


END = """
import atexit, os
from contextlib import nullcontext

servers = []
atexit.register(lambda: print([os.path.exists(f"/proc/{pid}") for pid in servers]))
from medembed.sweeps.processes import _fork_server, are_starting, start_early, start_importing

with CONTEXT:
    assert are_starting()
    servers.append(_fork_server()._forkserver_pid)
"""


@pytest.mark.parametrize("context", ["start_early(2)", "nullcontext(start_importing(2))"])
def test_a_start_that_is_not_awaited_ends_with_the_program(context, tmp_path):
    assert run_script(END.replace("CONTEXT", context), tmp_path) == ("[False]\n", [])


def test_processes_start_again_after_a_start_that_was_not_awaited(tmp_path):
    script = (
        "from medembed.sweeps.processes import are_starting, start_early\n"
        "from medembed.sweeps.worker_pool import Pool\n"
        "for _ in range(2):\n"
        "    with start_early(2):\n"
        "        assert are_starting()\n"
        "with Pool(2, 2) as pool:\n"
        "    assert list(pool.run(pow, [3])) == [(0, 8)]\n"
    )
    assert run_script(script, tmp_path) == ("", [])


# What it gives back


def test_items_of_a_lower_rank_go_first_and_an_error_is_a_result():
    def divide(shared, item):
        return shared / item

    for jobs in (1, 2):
        with Pool(6.0, jobs) as pool:
            for item, rank in ((1, 2), (2, 1), (0, 0), (3, 1)):
                pool.submit(divide, item, rank=rank)
            found = [pool.wait() for _ in range(4)]
            with pytest.raises(LookupError):
                pool.wait()
        assert sorted(found, key=lambda pair: pair[0]) == [
            (0, 6.0),
            (1, 3.0),
            (2, Died("float division by zero")),
            (3, 2.0),
        ]
        if jobs == 1:
            assert [number for number, _ in found] == [2, 1, 3, 0]


def test_one_that_kills_its_process_is_found_among_those_that_do_not():
    def maybe(shared, item):
        if item == shared:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    with Pool(3, 2) as pool:
        found = dict(pool.run(maybe, range(6)))
        assert isinstance(found.pop(3), Died)
        assert found == {i: i for i in (0, 1, 2, 4, 5)}
        assert dict(pool.run(maybe, [7, 8])) == {0: 7, 1: 8}


def test_files_of_a_pool_go_with_it():
    with Pool("shared", 2) as pool:
        folder = pool.folder
        assert folder.is_dir()
        assert [value for _, value in pool.run(lambda shared, _: shared, [0])] == ["shared"]
    assert not folder.exists()


# Their number


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Sweep in one, two and three processes, which tell how many threads they compute with."""
    home, train_unit = tmp_path_factory.mktemp("jobs"), runner.train_unit
    space = home / "space.toml"
    space.write_text(
        "[mlp]\nrungs = [2, 4]\nhidden = [[4], [8, 4]]\nlr = { low = 1e-3, high = 1e-1 }\n"
    )

    def watched(data, unit):
        judge = training._judge

        def judge_and_tell(*arguments):
            import threadpoolctl
            import torch

            pools = [
                (pool["user_api"], pool["num_threads"]) for pool in threadpoolctl.threadpool_info()
            ]
            line = {"pid": os.getpid(), "head": unit.head, "torch": torch.get_num_threads()}
            with open(home / "threads.jsonl", "a") as file:
                file.write(json.dumps({**line, "pools": pools}) + "\n")
            return judge(*arguments)

        training._judge = judge_and_tell
        try:
            return train_unit(data, unit)
        finally:
            training._judge = judge

    with pytest.MonkeyPatch.context() as patch, threadpool_limits(2):
        patch.setattr(runner, "train_unit", watched)
        for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
            patch.setenv(name, "2")  # what has to be overruled
        for jobs in (1, 2, 3):
            options = {"heads": HEADS, "n_configs": 4, "n_folds": 3, "space": space}
            sweep(*data, home / str(jobs), **options, jobs=jobs)
    return home


@pytest.mark.parametrize("jobs", ["2", "3"])
def test_any_number_of_processes_gives_the_same_bytes(runs, jobs):
    one, several = runs / "1", runs / jobs
    names = ["predictions.parquet"]
    names += [str(path.relative_to(one)) for path in one.glob("models/*/*")]
    assert len(names) == 1 + 4 * len(HEADS)
    for name in names:
        assert (several / name).read_bytes() == (one / name).read_bytes(), name


def test_any_number_of_processes_writes_the_same_ledger_in_some_order(runs):
    ledgers = [
        {
            (r.key, r.trial, r.fold, r.score, r.status, r.best_epoch)
            for r in open_run(runs / str(jobs)).trial_records()
        }
        for jobs in (1, 2, 3)
    ]
    assert ledgers[0] == ledgers[1] == ledgers[2]
    assert len(ledgers[0]) == 4 * 4 * 3
    assert {status for *_, status, _ in ledgers[0]} == {"ok", "retired"}


def test_no_process_computes_with_more_than_one_thread(runs):
    told = [json.loads(line) for line in (runs / "threads.jsonl").read_text().splitlines()]
    assert {line["head"] for line in told} == set(HEADS)
    assert len({line["pid"] for line in told}) >= 3
    for line in told:
        assert line["torch"] == 1
        assert line["pools"]
        assert all(n == 1 for _, n in line["pools"]), line


# One that dies


def _deadly_train_unit(data, unit):
    if unit.head == "lightgbm" and any(p.get("num_leaves") == DEADLY for p in unit.params):
        os.kill(os.getpid(), signal.SIGKILL)
    return _train_unit(data, unit)


_train_unit = runner.train_unit


def test_a_trial_of_trees_that_kills_its_process_costs_just_that_trial(data, tmp_path, monkeypatch):
    space = tmp_path / "space.toml"
    space.write_text(f"[lightgbm]\nnum_leaves = [4, {DEADLY}, 8]\n[logistic]\nC = 1.0\n")
    monkeypatch.setattr(runner, "train_unit", _deadly_train_unit)
    with Pool(None, 2) as pool:  # so that none is still starting: these trees are not safe
        assert list(pool.run(lambda *_: 0, [0])) == [(0, 0)]
    options = {"heads": ("lightgbm",), "n_folds": 2, "jobs": 2, "space": space}
    result = sweep(*data, tmp_path / "run", **options).as_dict()
    assert {entry["status"] for entry in result["leaderboard"]} == {"ok"}
    table = open_run(tmp_path / "run").trials()
    assert table["key"].is_unique
    assert len(table) == (3 + 1) * 2
    is_deadly = table["params"].map(lambda params: params.get("num_leaves") == DEADLY)
    assert is_deadly.sum() == 2
    assert (table[is_deadly]["status"] == "error").all()
    assert table[is_deadly]["error"].str.contains("the process died").all()
    assert (table[~is_deadly]["status"] == "ok").all()
    winner = load_model(tmp_path / "run" / "models" / "lightgbm").head
    assert winner.get_params()["num_leaves"] != DEADLY


# Ctrl-C


def start(data, out, jobs):
    arguments = ["sweep", *map(str, data), "--out", str(out), *OPTIONS, "--jobs", jobs]
    process = subprocess.Popen(
        [sys.executable, "-m", "medembed", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return process, arguments


def wait_for(happened, process):
    end = time.monotonic() + 60
    while not happened():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.01)


def interrupt(process):
    """Send SIGINT as a terminal does; return what was said and who is left after five seconds."""
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=20)
    end = time.monotonic() + 5
    while (left := session_of(process.pid)) and time.monotonic() < end:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return {"status": process.returncode, "stdout": stdout, "stderr": stderr, "left": left}


@pytest.fixture(scope="module", params=["1", "2"])
def interrupted(request, data, tmp_path_factory):
    """Interrupt a sweep in the midst of its training."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    process, arguments = start(data, out, request.param)
    ledger = out / "trials.jsonl"
    wait_for(lambda: ledger.exists() and ledger.read_bytes().count(b"\n") > 0, process)
    return {**interrupt(process), "arguments": arguments, "run": open_run(out)}


def test_ctrl_c_is_one_clear_line_and_status_130(interrupted):
    assert interrupted["status"] == 130
    assert interrupted["stdout"] == ""
    assert "Traceback" not in interrupted["stderr"]
    lines = [
        line for line in interrupted["stderr"].splitlines() if not line.startswith("Training: ")
    ]
    assert lines == ["Interrupted. Nothing is half-written; the same command continues from here."]


def test_ctrl_c_leaves_no_process(interrupted):
    assert interrupted["left"] == []


def test_after_ctrl_c_the_run_is_unfinished_and_the_same_command_ends_it(interrupted):
    run = interrupted["run"]
    assert not run.is_complete
    n_before = len(run.trial_records())
    assert 0 < n_before < (6 + 12 + 12) * 3
    ran = CliRunner().invoke(main, interrupted["arguments"])
    assert ran.exit_code == 0, ran.output
    assert run.is_complete
    table = run.trials()
    assert table["key"].is_unique
    assert len(table) == (6 + 12 + 12) * 3


def test_ctrl_c_while_processes_start_is_no_traceback_either(data, tmp_path):
    said = []
    for seconds in (0.0, 0.3, 0.6):
        process, _ = start(data, tmp_path / str(seconds), "2")
        wait_for(lambda process=process: workers_in_session(process.pid), process)
        time.sleep(seconds)
        found = interrupt(process)
        said.append(found["stderr"])
        assert found["status"] == 130
        assert found["left"] == []
    assert "Traceback" not in "".join(said)


def last_of(session, seconds=20):
    """Give who is left of a session after some seconds; they are ended."""
    end = time.monotonic() + seconds
    while (left := session_of(session)) and time.monotonic() < end:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return left


def test_four_ctrl_c_in_a_row_leave_no_process(data, tmp_path):
    process, _ = start(data, tmp_path / "run", "2")
    wait_for(lambda: workers_in_session(process.pid), process)
    for _ in range(4):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
    stderr = process.communicate(timeout=60)[1]
    assert last_of(process.pid) == []
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert stderr.count("Interrupted. Nothing is half-written") == 1


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])
def test_processes_end_with_a_sweep_that_is(number, data, tmp_path):
    process, _ = start(data, tmp_path / "run", "2")
    ledger = tmp_path / "run" / "trials.jsonl"
    wait_for(lambda: ledger.exists() and ledger.read_bytes().count(b"\n") > 0, process)
    os.kill(process.pid, number)  # of this one alone
    process.communicate(timeout=60)
    assert last_of(process.pid) == []
    assert process.returncode == (129 if number == signal.SIGHUP else -9)
