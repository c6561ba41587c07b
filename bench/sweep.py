"""Compare time and AUROC of `medembed sweep` with scikit-learn's grid search.

    .venv/bin/python bench/sweep.py --out bench/results/sweep.json
    .venv/bin/python bench/sweep.py --only gflops,default
    .venv/bin/python bench/sweep.py --rows 3000 --configs 16       # does it all work?

All use a synthetic table of MURA's size (see made_table.py) and medembed's own patient-disjoint
folds. A part's jobs alternate: medembed, then each peer, then again for every further run.

medembed is timed as a whole process: start, loading, the logistic floor (one configuration), all
trials, refits, packaging, test scores. A peer's time covers only `GridSearchCV.fit` with
refit=False, rows in memory and processes warm, over every eighth of medembed's configurations (the
two slowest: every 32nd), with one single-threaded process per core. It is extrapolated to all
configurations by their number (the ratios), and by the number of weights of the chosen ones
(`extrapolated_seconds_by_weights`). Ratios are a peer's extrapolated time over medembed's.

- `gridsearch`: StandardScaler and MLPClassifier, float32, batches of 256, always 20 epochs.
  MLPClassifier has no dropout; weight_decay becomes alpha; GELU and SiLU become ReLU; label
  smoothing and class weights have no counterpart. It requires a hidden layer: a configuration
  without one is replaced by the next that has one.
- `gridsearch_early_stopping`: up to 60 epochs, stopped after 8 without a better score on a tenth of
  the rows, which MLPClassifier draws at random, so that patients are on both sides.
- `skorch`: a torch module in skorch's NeuralNetClassifier, AdamW, with dropout, the activations,
  label smoothing and class weights (of the whole table); 20 epochs. Only where skorch is installed.
- `lightgbm`: LGBMClassifier at its defaults except for num_leaves, learning_rate and lambda_l2 of
  the configuration, and LightGBMHead's maximum number of trees. One configuration of eight.
- `hist_gradient_boosting`: HistGradientBoostingClassifier at its defaults (at most 100 trees, early
  stopping on random rows if there are over 10,000). One configuration, counted for eight.

`auroc` is the best configuration's mean over folds, of images, for all; medembed chooses by the
AUROC of studies, which is also reported. Interpret `auroc` with caution: medembed chooses among all
configurations and stops on the scored fold itself, whereas peers choose among few and do not see
it. `auroc_test`, of images of unseen patients, has neither bias; for it a peer's winner is refitted
on all training rows, outside its time.

`default_sweep` is `medembed sweep` without options: its seconds, and the peak of memory of all its
processes in a second run, since watching takes time.

`gflops_share`: the time that torch.mm takes for a cohort's products alone over the time of the
cohort's epochs, on one thread, and with one process per core in parallel; in the precision of the
sweep on this machine and, if that is bfloat16, also in float32.
"""

import argparse
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import numpy as np
import pandas as pd
import torch
from sklearn.base import clone
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from made_table import make_table, write_table
from measuring import time_command, write_results
from medembed.cache.embeddings import load_embeddings
from medembed.dataset.splits import draw_folds
from medembed.heads.batched_mlp import PRECISIONS, BatchedMLP, Rows, resolve_precision
from medembed.heads.lightgbm import LightGBMHead
from medembed.heads.mlp import MLPHead, gather
from medembed.heads.scaling import Projector
from medembed.sweeps.search_space import default_spaces, read_spaces
from peak_memory import watch

N_COLUMNS = 1152
N_FOLDS = 5
ONE_IN = 8
SLOW_ONE_IN = {"gridsearch_early_stopping": 32, "skorch": 32}
SLOW_LIMIT = 200  # seconds for one; strong weight decay produces numbers that are slow to compute
EPOCHS, EARLY_EPOCHS, PATIENCE, BATCH_SIZE = 20, 60, 8, 256
N_MEMBERS, COHORT_EPOCHS = 16, 5
MLP_PEERS = ("gridsearch", "gridsearch_early_stopping", "skorch")
TREE_PEERS = ("lightgbm", "hist_gradient_boosting")
NO_SKORCH = "not measured: skorch is not installed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=36_808)
    parser.add_argument("--configs", type=int, default=64)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--only", default="mlp,lightgbm,default,gflops")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--without", default="", help="peers to leave out: they take minutes")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)  # what (or precision), where
    given = parser.parse_args()
    if given.child:
        what, place = given.child[0], Path(given.child[1])
        child = measure_cohort if what in PRECISIONS else run_peer
        print(json.dumps(child(what, place)))
        return
    parts = {
        "mlp": measure_mlp,
        "lightgbm": measure_lightgbm,
        "default": measure_default,
        "gflops": measure_gflops,
    }
    chosen = given.only.split(",")
    if unknown := [name for name in chosen if name not in parts]:
        parser.error(f"--only {unknown[0]}: choose among {', '.join(parts)}")
    results: dict[str, Any] = {
        "ratios": {},
        "rows": given.rows,
        "folds": N_FOLDS,
        "processes": joblib.cpu_count(),
        "precision": resolve_precision("auto"),
        "synthetic": True,
        "peer_versions": {n: _version(n) for n in ("scikit-learn", "lightgbm", "skorch")},
    }
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        n_patients = round(given.rows * 11_184 / 36_808)
        write_table(make_table(given.rows, n_patients, N_COLUMNS), place)
        write_space(place, given.configs)
        for part in chosen:
            merge(results, parts[part](place, given.runs, given.without.split(",")))
            if given.out:  # a part takes minutes, so its results are kept
                write_results(given.out, results)
    if not given.out:
        print(json.dumps(results, indent=2))


def write_space(place: Path, n_configs: int) -> None:
    """Write the default space, with `n_configs` MLPs and one configuration of the floor."""
    text = files("medembed.heads").joinpath("default_space.toml").read_text(encoding="utf-8")
    tables = re.split(r"^(?=\[\w+\])", text, flags=re.MULTILINE)
    mlp, lightgbm = ([t for t in tables if t.startswith(f"[{h}]")] for h in ("mlp", "lightgbm"))
    mlp_text, n = re.subn(r"^configs = \d+", f"configs = {n_configs}", mlp[0], flags=re.MULTILINE)
    assert n == 1, mlp
    # without what C may be the floor has the head's own
    (place / "space.toml").write_text("[logistic]\nconfigs = 1\n\n" + mlp_text + lightgbm[0])


def merge(results: dict[str, Any], part: dict[str, Any]) -> None:
    for key, value in part.items():
        if isinstance(value, dict):
            merge(results.setdefault(key, {}), value)
        else:
            results[key] = value


def progress(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def measure_mlp(place: Path, n_runs: int, without: list[str]) -> dict[str, Any]:
    peers = [peer for peer in MLP_PEERS if peer != "skorch" or _version("skorch")]
    peers = [peer for peer in peers if peer not in without]
    n = len(read_spaces(place / "space.toml")["mlp"].draw())
    found = compare(place, "mlp", n, peers, n_runs)
    if "skorch" not in peers:
        merge(found, {"auroc": {"skorch": NO_SKORCH}, "ratios": {"mlp_vs_skorch": NO_SKORCH}})
    return found


def measure_lightgbm(place: Path, n_runs: int, without: list[str]) -> dict[str, Any]:
    peers = [peer for peer in TREE_PEERS if peer not in without]
    n = len(read_spaces(place / "space.toml")["lightgbm"].draw())
    found = compare(place, "lightgbm", n, peers, n_runs)
    found["ratios"]["lightgbm_vs_defaults"] = found["ratios"].pop("lightgbm_vs_lightgbm")
    return found


def compare(
    place: Path, head: str, n_configs: int, peers: list[str] | tuple[str, ...], n_runs: int
) -> dict[str, Any]:
    """Run medembed and the peers in turn; return ratios of medians."""
    ours, times = f"medembed {head}", {}
    last: dict[str, dict[str, Any]] = {}
    not_ended: list[str] = []
    for run in range(n_runs):
        jobs = {ours: lambda run=run: run_sweep(place, head, run)}
        jobs |= {peer: lambda peer=peer: run_child(peer, place) for peer in peers}
        for name, job in jobs.items():
            if name in not_ended:
                continue
            try:
                last[name] = job()
            except subprocess.TimeoutExpired:
                not_ended.append(name)
                progress(f"{name}: not ended after {SLOW_LIMIT} s")
                continue
            times.setdefault(name, []).append(round(last[name]["seconds"], 3))
            progress(
                f"{name}: {last[name]['seconds']:.1f} s, "
                f"AUROC {last[name]['auroc']:.4f}, on test {last[name]['auroc_test']:.4f}"
            )
    medians = {name: statistics.median(values) for name, values in times.items()}
    peers = [peer for peer in peers if peer not in not_ended]
    found: dict[str, Any] = {
        "configurations": {ours: n_configs, **{p: last[p]["configurations"] for p in peers}},
        "seconds": times,
        "auroc": {name: last[name]["auroc"] for name in last},
        "auroc_test": {name: last[name]["auroc_test"] for name in last},
        "auroc_of_studies": {ours: last[ours]["auroc_of_studies"]},
        "auroc_of_each_configuration": {p: last[p]["auroc_of_each"] for p in peers},
        "winner": {ours: last[ours]["params"], **{p: last[p]["params"] for p in peers}},
        "extrapolated_seconds": {},
        "extrapolated_seconds_by_weights": {},
        "ratios": {},
    }
    for peer in peers:
        whole = medians[peer] * n_configs / last[peer]["configurations"]
        found["extrapolated_seconds"][peer] = round(whole, 1)
        found["ratios"][f"{head}_vs_{peer}"] = round(whole / medians[ours], 3)
        if (share := last[peer]["share_of_weights"]) is not None:
            by_weights = round(medians[peer] / share, 1)
            found["extrapolated_seconds_by_weights"][peer] = by_weights
    for peer in not_ended:
        least = SLOW_LIMIT * SLOW_ONE_IN[peer] / medians[ours]
        found["ratios"][f"{head}_vs_{peer}"] = (
            f"not measured: not ended after {SLOW_LIMIT} s, that is about {least:.0f} × at least"
        )
    return found


def run_child(peer: str, place: Path) -> dict[str, Any]:
    """Return a peer's result; raise subprocess.TimeoutExpired if a slow one exceeds its limit."""
    return call("--child", peer, str(place), limit=SLOW_LIMIT if peer in SLOW_ONE_IN else None)


def call(*arguments: str, limit: float | None = None) -> dict[str, Any]:
    """Run this script in a separate process; return the JSON of its last line."""
    command = [sys.executable, __file__, *arguments]
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}  # MLPClassifier warns of its last epoch
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=quiet, start_new_session=True
    )
    try:
        printed, _ = running.communicate(timeout=limit)
    except BaseException:
        os.killpg(running.pid, signal.SIGKILL)  # and the processes that it has started
        running.communicate()
        raise
    if running.returncode:
        raise subprocess.CalledProcessError(running.returncode, command)
    return dict(json.loads(printed.splitlines()[-1]))


def sweep_command(place: Path, run: str, *options: str) -> list[str]:
    medembed = [sys.executable, "-m", "medembed", "sweep"]
    paths = [str(place / "cache"), str(place / "manifest.parquet"), "--out", str(place / run)]
    return [*medembed, *paths, "--folds", str(N_FOLDS), *options, "--json"]


def run_sweep(place: Path, head: str, number: int) -> dict[str, Any]:
    """Run `medembed sweep` of one head; return its time and its winner's scores."""
    run = f"{head}-{number}"
    command = sweep_command(place, run, "--heads", head, "--space", str(place / "space.toml"))
    start = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    seconds = time.perf_counter() - start
    entry = next(e for e in json.loads(done.stdout)["leaderboard"] if e["head"] == head)
    rows = pd.read_parquet(place / run / "predictions.parquet")
    rows = rows[(rows["head"] == head) & rows["label"].notna()]
    folds = [own for _, own in rows[rows["fold"].notna()].groupby("fold")]
    assert len(folds) == N_FOLDS, run
    return {
        "seconds": seconds,
        "auroc": round(float(np.mean([_auroc(own) for own in folds])), 5),
        "auroc_test": round(_auroc(rows[rows["split"] == "test"]), 5),
        "auroc_of_studies": round(entry["cv"], 5),
        "params": entry["params"],
    }


def _auroc(rows: pd.DataFrame) -> float:
    return float(roc_auc_score(rows["label"].astype(int), rows["probability"]))


class Table(NamedTuple):
    """Training rows, their folds, and test rows."""

    X: np.ndarray
    y: np.ndarray
    folds: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray


def load_table(place: Path) -> Table:
    """Return the rows with the folds that `medembed sweep --seed 0` draws."""
    embeddings = load_embeddings(place / "cache", place / "manifest.parquet")
    is_train = (embeddings.rows["split"] == "train").to_numpy()
    rows = embeddings.rows[is_train].reset_index(drop=True)
    folds = np.asarray(draw_folds(rows, n_folds=N_FOLDS, seed=0), np.int64)
    X, y = embeddings.X, embeddings.y.astype(np.int64)  # the dtype that torch's losses need
    return Table(X[is_train], y[is_train], folds, X[~is_train], y[~is_train])


def run_peer(name: str, place: Path) -> dict[str, Any]:
    """Time a grid search, in a separate process, whose memory is released afterwards."""
    table, spaces = load_table(place), read_spaces(place / "space.toml")
    share = None
    if name in MLP_PEERS:
        drawn = [{**MLPHead().get_params(), **params} for params in spaces["mlp"].draw()]
        chosen = one_in(drawn, SLOW_ONE_IN.get(name, ONE_IN))
        share = sum(map(n_weights, chosen)) / sum(map(n_weights, drawn))
        estimator, grid = MLPS[name](chosen, table)
    elif name == "lightgbm":
        estimator, grid = lightgbm_defaults(spaces["lightgbm"].draw()[::ONE_IN])
    else:
        estimator, grid = HistGradientBoostingClassifier(random_state=0), [{}]
    with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
        search = GridSearchCV(
            estimator,
            grid,
            scoring="roc_auc",
            cv=PredefinedSplit(table.folds),
            n_jobs=joblib.cpu_count(),
            refit=False,
            error_score="raise",
        )
        # start the processes, and their imports, with a search whose time does not count
        few = np.concatenate([np.flatnonzero(table.folds == f)[:64] for f in range(N_FOLDS)])
        warm = clone(search).set_params(param_grid=grid[0], cv=PredefinedSplit(table.folds[few]))
        warm.fit(table.X[few], table.y[few])
        start = time.perf_counter()
        search.fit(table.X, table.y)
        seconds = time.perf_counter() - start
    scores = search.cv_results_["mean_test_score"]
    best = search.cv_results_["params"][int(scores.argmax())]
    fitted = clone(estimator).set_params(**best).fit(table.X, table.y)
    on_test = roc_auc_score(table.y_test, fitted.predict_proba(table.X_test)[:, 1])
    return {
        "seconds": seconds,
        "configurations": len(scores),
        "share_of_weights": share,
        "auroc": round(float(scores.max()), 5),
        "auroc_test": round(float(on_test), 5),
        "auroc_of_each": [round(float(score), 5) for score in scores],
        "params": {key: repr(value) for key, value in best.items()},
    }


def one_in(drawn: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """Return every `step`-th configuration, or the next one that has a hidden layer."""
    return [
        next(params for params in [*drawn[start:], *drawn] if params["hidden"])
        for start in range(0, len(drawn), step)
    ]


def n_weights(params: dict[str, Any]) -> int:
    """Return the number of weights of an MLP on the table, to which its time is proportional."""
    return sum(a * b for a, b in pairwise([N_COLUMNS, *params["hidden"], 1]))


def one_of_each(chosen: list[dict[str, Any]]) -> list[dict[str, list[Any]]]:
    return [{key: [value] for key, value in params.items()} for params in chosen]


def sklearn_mlp(chosen: list[dict[str, Any]], early: bool) -> tuple[Any, list[dict[str, Any]]]:
    epochs = EARLY_EPOCHS if early else EPOCHS
    mlp = MLPClassifier(
        batch_size=BATCH_SIZE,
        max_iter=epochs,
        early_stopping=early,
        # without early stopping it would still end where the training loss no longer falls
        n_iter_no_change=PATIENCE if early else epochs,
        random_state=0,
    )
    grid = [
        {
            "mlpclassifier__hidden_layer_sizes": tuple(params["hidden"]),
            "mlpclassifier__activation": "tanh" if params["activation"] == "tanh" else "relu",
            "mlpclassifier__learning_rate_init": params["lr"],
            "mlpclassifier__alpha": params["weight_decay"],
        }
        for params in chosen
    ]
    return make_pipeline(StandardScaler(), mlp), one_of_each(grid)


ACTIVATIONS = {
    "relu": torch.nn.ReLU,
    "gelu": torch.nn.GELU,
    "silu": torch.nn.SiLU,
    "tanh": torch.nn.Tanh,
}


class Perceptron(torch.nn.Sequential):
    """The module that a skorch user would write."""

    def __init__(self, hidden: tuple[int, ...], activation: str, dropout: float, n: int) -> None:
        layers: list[torch.nn.Module] = []
        for before, after in pairwise([n, *hidden]):
            act = ACTIVATIONS[activation]
            layers += [torch.nn.Linear(before, after), act(), torch.nn.Dropout(dropout)]
        super().__init__(*layers, torch.nn.Linear([n, *hidden][-1], 2))


def skorch_mlp(chosen: list[dict[str, Any]], table: Table) -> tuple[Any, list[dict[str, Any]]]:
    from skorch import NeuralNetClassifier

    net = NeuralNetClassifier(
        Perceptron,
        module__n=table.X.shape[1],
        criterion=torch.nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        max_epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        iterator_train__shuffle=True,
        train_split=None,
        verbose=0,
    )
    balanced = len(table.y) / (2 * np.bincount(table.y))
    net_grid = [
        {
            "module__hidden": tuple(params["hidden"]),
            "module__activation": params["activation"],
            "module__dropout": params["dropout"],
            "lr": params["lr"],
            "optimizer__weight_decay": params["weight_decay"],
            "criterion__label_smoothing": params["label_smoothing"],
            "criterion__weight": torch.tensor(
                balanced if params["class_weight"] else [1.0, 1.0], dtype=torch.float32
            ),
        }
        for params in chosen
    ]
    grid = [{f"neuralnetclassifier__{k}": v for k, v in own.items()} for own in net_grid]
    return make_pipeline(StandardScaler(), net), one_of_each(grid)


MLPS: dict[str, Callable[..., tuple[Any, list[dict[str, Any]]]]] = {
    "gridsearch": lambda chosen, table: sklearn_mlp(chosen, early=False),
    "gridsearch_early_stopping": lambda chosen, table: sklearn_mlp(chosen, early=True),
    "skorch": skorch_mlp,
}


def lightgbm_defaults(chosen: list[dict[str, Any]]) -> tuple[Any, list[dict[str, Any]]]:
    from lightgbm import LGBMClassifier

    own = [{**LightGBMHead().get_params(), **params} for params in chosen]
    names = {
        "num_leaves": "num_leaves",
        "learning_rate": "learning_rate",
        "lambda_l2": "reg_lambda",
    }
    grid = [{names[key]: params[key] for key in names} for params in own]
    n_trees = own[0]["n_trees"]
    return LGBMClassifier(n_estimators=n_trees, n_jobs=1, verbosity=-1), one_of_each(grid)


def measure_default(place: Path, n_runs: int, _without: list[str]) -> dict[str, Any]:
    """Run the default sweep twice: once timed, once watched for its memory."""
    seconds, watched = [], []
    for number in range(n_runs):
        seconds.append(round(time_command(sweep_command(place, f"default-{number}")), 2))
        done = watch(sweep_command(place, f"watched-{number}"))
        watched.append(done._asdict())
        progress(f"default sweep: {seconds[-1]} s; {done.peak_gb} GB in {done.seconds} s")
    board = json.loads(done.output)["leaderboard"]
    return {
        "default_sweep": {
            "seconds": statistics.median(seconds),
            "peak_gb": max(run["peak_gb"] for run in watched),
            "runs": seconds,
            "watched": [{k: v for k, v in run.items() if k != "output"} for run in watched],
            "configurations": {e["head"]: len(default_spaces()[e["head"]].draw()) for e in board},
            "auroc_of_studies": {e["head"]: round(e["cv"], 5) for e in board},
        }
    }


def measure_gflops(place: Path, n_runs: int, _without: list[str]) -> dict[str, Any]:
    """Compare a cohort's training with its products, in one process and in one per core."""
    found: dict[str, Any] = {}
    for precision in dict.fromkeys([resolve_precision("auto"), "fp32"]):
        for side_by_side in dict.fromkeys([1, joblib.cpu_count()]):
            measured = [
                m for _ in range(n_runs) for m in run_cohorts(place, precision, side_by_side)
            ]
            products = sum(sum(m["products_seconds"]) for m in measured)
            training = sum(sum(m["training_seconds"]) for m in measured)
            gflop = sum(m["gflop"] for m in measured)
            found[name := f"{precision}_{side_by_side}_at_once"] = {
                "gflops_share": round(products / training, 4),
                "gflops_training": round(gflop / training, 1),
                "gflops_products": round(gflop / products, 1),
                "processes": measured,
            }
            progress(f"{name}: {found[name]['gflops_share']}")
    shares = {name: own["gflops_share"] for name, own in found.items()}
    first = next(iter(shares.values()))
    return {"gflops_share": first, "gflops_shares": shares, "gflops": found}


def run_cohorts(place: Path, precision: str, n: int) -> list[dict[str, Any]]:
    """Return the results of processes that run each phase at the same time."""
    command = [sys.executable, __file__, "--child", precision, str(place)]
    pipe = subprocess.PIPE
    running = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(n)]
    outputs: list[dict[str, Any]] = []
    while not outputs:
        lines = [process.stdout.readline() for process in running if process.stdout]
        if all(line == "ready\n" for line in lines):
            for process in running:
                assert process.stdin
                process.stdin.write("go\n")
                process.stdin.flush()
        else:
            outputs = [json.loads(line) for line in lines]
    for process in running:
        process.communicate()
        assert process.returncode == 0
    return outputs


def measure_cohort(precision: str, place: Path) -> dict[str, Any]:
    """Train a cohort epoch by epoch, and after each epoch run only its products; one thread."""
    torch.set_num_threads(1)
    table = load_table(place)
    rows, held = np.flatnonzero(table.folds != 0), np.flatnonzero(table.folds == 0)
    space = default_spaces()["mlp"]
    heads = [
        MLPHead().set_params(**{**params, "precision": precision})
        for params in space.draw(N_MEMBERS, seed=0)
    ]
    cohort = gather(
        heads,
        Rows(table.X, rows, table.y[rows]),
        Rows(table.X, held, table.y[held]),
        Projector(table.X, rows),
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    products = Products(cohort, dtype, len(rows), len(held), cohort._batch_size)
    cohort.train(1)
    products.run()
    training, alone, flop = [], [], cohort.flop
    for epoch in range(2, COHORT_EPOCHS + 2):
        training.append(_timed(lambda epoch=epoch: cohort.train(epoch)))
        alone.append(_timed(products.run))
    trained = cohort.flop - flop
    assert all(net.failure is None for net in cohort.nets)
    assert math.isclose(trained, COHORT_EPOCHS * products.flop, rel_tol=1e-9), "not the same work"
    return {"training_seconds": training, "products_seconds": alone, "gflop": trained / 1e9}


def _timed(job: Callable[[], object]) -> float:
    print("ready", flush=True)  # and wait for those side by side
    sys.stdin.readline()
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


class Products:
    """Only the matrix products of one epoch of a cohort, with equal shapes, dtypes and layouts.

    The factors are random, since their values do not matter.
    """

    def __init__(
        self, cohort: BatchedMLP, dtype: torch.dtype, n_rows: int, n_held: int, batch_size: int
    ) -> None:
        self._size, self._dtype = batch_size, dtype
        firsts = [net.params[0] for net in cohort.nets]
        self._first = self._random(sum(map(len, firsts)), firsts[0].shape[1])
        # (weight, as it is for the backward pass) of every further layer of every member
        self._further = [
            (weight, weight.t().contiguous())
            for net in cohort.nets
            for weight in (self._random(*own.shape) for own in net.params[1::2])
        ]
        self._rows, self._held = (self._random(n, len(self._first[0])) for n in (n_rows, n_held))
        self._gradient = torch.empty_like(self._first)
        self._outputs = torch.empty(len(self._first) * batch_size, dtype=dtype)
        self._activations = {
            (width, m): self._random(width, m)
            for width in {width for weight, _ in self._further for width in weight.shape}
            for m in (batch_size, n_rows % batch_size, n_held % batch_size)
        }
        self.flop = 0.0

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(self._dtype)

    def run(self) -> None:
        """Multiply, and count."""
        self.flop = 0.0
        with torch.inference_mode():
            for X in self._rows.split(self._size):
                Z = self._first_layers(X)
                for weight, turned in self._further:
                    a, dz = (self._activations[width, len(X)] for width in weight.shape[::-1])
                    torch.mm(weight, a)
                    torch.mm(dz, a.t())
                    torch.mm(turned, dz)
                    self.flop += 6 * weight.numel() * len(X)
                torch.mm(Z, X, out=self._gradient)
                self.flop += 2 * self._first.numel() * len(X)
            for X in self._held.split(self._size):
                self._first_layers(X)
                for weight, _ in self._further:
                    torch.mm(weight, self._activations[weight.shape[1], len(X)])
                    self.flop += 2 * weight.numel() * len(X)

    def _first_layers(self, X: torch.Tensor) -> torch.Tensor:
        Z = self._outputs[: len(self._first) * len(X)].view(len(self._first), len(X))
        self.flop += 2 * self._first.numel() * len(X)
        return torch.mm(self._first, X.t(), out=Z)


if __name__ == "__main__":
    main()
