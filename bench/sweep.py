"""Compare time and AUROC of `medembed sweep` with scikit-learn's grid search.

    .venv/bin/python bench/sweep.py --out bench/results/sweep.json
    .venv/bin/python bench/sweep.py --only gflops,default --out bench/results/sweep.json
    .venv/bin/python bench/sweep.py --rows 3000 --configs 16       # does it all work?

All use a synthetic table of MURA's size (see made_table.py) and medembed's own patient-disjoint
folds. A part's jobs alternate: medembed, then each peer, then again for every further run. Parts
that `--only` leaves out keep their results in the file, and so do peers that `--without` names;
`machines` has the processor of each part.

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
- `autograd`: a plain loop of torch, float32, fused AdamW, batches of a sixteenth of the rows, with
  all cores; one configuration of eight. Two epochs without one fold, counted for 20 epochs of five.
- `vmap`: all configurations, those of equal widths as one module by `torch.func.vmap`; counted
  likewise. For both, `auroc` is that after two epochs on one fold.
- `ridge_cv`, `logistic_cv`: scikit-learn's linear models that choose their penalty themselves, of
  13 and of the sweep's, on the same folds; nothing is extrapolated. They stand beside `medembed
  sweep --heads logistic`.
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
processes in a second run, since watching takes time. `avx2` is with AVX2 alone, as most laptops
have (PyTorch is limited to it where the processor has more), `amx` with everything of a processor
that has AMX. `optuna_auroc_test` is what Optuna reaches over the same space in these seconds, see
`peer_optuna.py` (`pip install optuna`). `nih` is the default sweep of real features.

`gflops_share`: the time that torch.mm takes for a cohort's products alone over the time of the
cohort's epochs, on one thread, and with one process per core in parallel; in the precision of the
sweep on this machine and, if that is bfloat16, also in float32.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from made_table import make_table, write_table
from measuring import machine, progress, write_results
from medembed.heads.mlp import PRECISIONS, resolve_precision
from medembed.sweeps.search_space import read_spaces
from sweep_default import measure_default, measure_nih, sweep_command
from sweep_gflops import measure_cohort, measure_gflops
from sweep_peers import (
    LINEAR_PEERS,
    MLP_PEERS,
    N_COLUMNS,
    N_FOLDS,
    SLOW_LIMIT,
    SLOW_ONE_IN,
    TREE_PEERS,
    find_version,
    run_peer,
)

NO_SKORCH = "not measured: skorch is not installed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=36_808)
    parser.add_argument("--configs", type=int, default=64)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--only", default="mlp,lightgbm,linear,default,nih,gflops")
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
        "linear": measure_linear,
        "default": measure_default,
        "nih": measure_nih,
        "gflops": measure_gflops,
    }
    chosen = given.only.split(",")
    if unknown := [name for name in chosen if name not in parts]:
        parser.error(f"--only {unknown[0]}: choose among {', '.join(parts)}")
    results = read_kept(given.out, given.rows, parts) if given.out else {"ratios": {}}
    results |= {
        "rows": given.rows,
        "folds": N_FOLDS,
        "processes": joblib.cpu_count(),
        "precision": resolve_precision("auto"),
        "synthetic": True,
        "peer_versions": {
            n: find_version(n) for n in ("scikit-learn", "lightgbm", "skorch", "optuna")
        },
    }
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        n_patients = round(given.rows * 11_184 / 36_808)
        write_table(make_table(given.rows, n_patients, N_COLUMNS), place)
        write_space(place, given.configs)
        for part in chosen:
            merge(results, parts[part](place, given.runs, given.without.split(",")))
            results.setdefault("machines", {})[part] = machine()
            if given.out:  # a part takes minutes, so its results are kept
                write_results(given.out, results)
    if not given.out:
        print(json.dumps(results, indent=2))


def write_space(place: Path, n_configs: int) -> None:
    """Write the default space, with `n_configs` MLPs and one configuration of the floor."""
    text = files("medembed.sweeps").joinpath("default_space.toml").read_text(encoding="utf-8")
    tables = re.split(r"^(?=\[\w+\])", text, flags=re.MULTILINE)
    mlp, lightgbm = ([t for t in tables if t.startswith(f"[{h}]")] for h in ("mlp", "lightgbm"))
    mlp_text, n = re.subn(r"^configs = \d+", f"configs = {n_configs}", mlp[0], flags=re.MULTILINE)
    assert n == 1, mlp
    # without what C may be the floor has the head's own
    (place / "space.toml").write_text("[logistic]\nconfigs = 1\n\n" + mlp_text + lightgbm[0])


def read_kept(path: Path, n_rows: int, parts: Iterable[str]) -> dict[str, Any]:
    """Return the results of earlier runs; `machines` has that of each part."""
    if not path.exists():
        return {"ratios": {}}
    kept = dict(json.loads(path.read_text()))
    if kept.get("rows") != n_rows:
        raise SystemExit(f"{path} is of {kept.get('rows')} rows, not {n_rows}: name another --out")
    machines = dict.fromkeys(parts, kept["machine"]) | kept.get("machines", {})
    return {**kept, "machines": machines}


def merge(results: dict[str, Any], part: dict[str, Any]) -> None:
    for key, value in part.items():
        if isinstance(value, dict) and isinstance(results.setdefault(key, {}), dict):
            merge(results[key], value)
        else:
            results[key] = value


def measure_mlp(place: Path, n_runs: int, without: list[str]) -> dict[str, Any]:
    peers = [peer for peer in MLP_PEERS if peer != "skorch" or find_version("skorch")]
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


def measure_linear(place: Path, n_runs: int, without: list[str]) -> dict[str, Any]:
    """Compare a sweep of the logistic head alone with linear models that tune themselves."""
    peers = [peer for peer in LINEAR_PEERS if peer not in without]
    seconds: dict[str, list[float]] = {}
    auroc: dict[str, float] = {}
    for run in range(n_runs):
        jobs = {"medembed logistic": lambda run=run: run_sweep(place, "logistic", run, ())}
        jobs |= {peer: lambda peer=peer: run_child(peer, place) for peer in peers}
        for name, job in jobs.items():
            done = job()
            seconds.setdefault(name, []).append(round(done["seconds"], 3))
            auroc[name] = done["auroc_test"]
            progress(f"{name}: {done['seconds']:.1f} s, AUROC {auroc[name]:.4f} on test")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ours = medians["medembed logistic"]
    ratios = {f"logistic_vs_{peer}": round(medians[peer] / ours, 3) for peer in peers}
    return {"seconds": seconds, "auroc_test": auroc, "ratios": ratios}


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


def run_sweep(
    place: Path, head: str, number: int, options: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """Run `medembed sweep` of one head; return its time and its winner's scores."""
    run = f"{head}-{number}"
    if options is None:  # one configuration of the floor beside it
        options = ("--space", str(place / "space.toml"))
    command = sweep_command(place, run, "--heads", head, *options)
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


if __name__ == "__main__":
    main()
