"""The default sweep as a whole process: its seconds, memory, and AUROC beside Optuna's."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
from sklearn.metrics import roc_auc_score

from measuring import INSTRUCTIONS, instructions, machine, progress, time_command
from medembed.core.system import processor_flags
from medembed.sweeps.search_space import default_spaces
from peak_memory import watch
from quality_tables import SHARED
from sweep_peers import N_FOLDS, find_version

__all__ = ["measure_default", "measure_nih", "sweep_command"]

HERE = Path(__file__).parent
ONLY_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
WIDER = ("AMX", "AVX-512")


def sweep_command(place: Path, run: str, *options: str) -> list[str]:
    """Return `medembed sweep` of the table at `place`."""
    return _sweep(place / "cache", place / "manifest.parquet", place / run, *options)


def _sweep(cache: Path, manifest: Path, run: Path, *options: str) -> list[str]:
    medembed = [sys.executable, "-m", "medembed", "sweep", str(cache), str(manifest)]
    return [*medembed, "--out", str(run), "--folds", str(N_FOLDS), *options, "--json"]


def measure_default(place: Path, n_runs: int, without: list[str]) -> dict[str, Any]:
    """Run the default sweep twice, once timed and once watched for its memory, and then Optuna.

    `avx2` is with AVX2 alone, whatever the processor has; `amx` with all of one that has AMX.
    """
    kinds = {"avx2": _limited(place)}
    if (widest := instructions()) in WIDER:
        kinds[widest.lower().replace("-", "")] = ({}, [])
    found: dict[str, Any] = {}
    for kind, (environment, options) in kinds.items():
        found[kind] = _measure(place, kind, n_runs, environment, options)
    found["avx2"] |= _race_optuna(place, found["avx2"]["seconds"], "optuna" in without)
    return {"default_sweep": found}


def _limited(place: Path) -> tuple[dict[str, str], list[str]]:
    """Return the environment and the options that keep PyTorch to AVX2 and to float32."""
    if INSTRUCTIONS["AVX-512"] not in processor_flags():
        return {}, []
    text = (HERE.parent / "medembed/sweeps/default_space.toml").read_text(encoding="utf-8")
    assert 'precision = "auto"' in text
    space = place / "fp32.toml"
    space.write_text(text.replace('precision = "auto"', 'precision = "fp32"'), encoding="utf-8")
    return ONLY_AVX2, ["--space", str(space)]


def _measure(
    place: Path, kind: str, n_runs: int, environment: dict[str, str], options: list[str]
) -> dict[str, Any]:
    seconds, watched = [], []
    with mock.patch.dict(os.environ, environment):
        for number in range(n_runs):
            command = sweep_command(place, f"default-{kind}-{number}", *options)
            seconds.append(round(time_command(command), 2))
            done = watch(sweep_command(place, f"watched-{kind}-{number}", *options))
            watched.append(done._asdict())
            progress(f"{kind}: {seconds[-1]} s; {done.peak_gb} GB in {done.seconds} s")
    board = json.loads(done.output)["leaderboard"]
    return {
        "seconds": statistics.median(seconds),
        "peak_gb": max(run["peak_gb"] for run in watched),
        "runs": seconds,
        "watched": [{k: v for k, v in run.items() if k != "output"} for run in watched],
        "configurations": {e["head"]: len(default_spaces()[e["head"]].draw()) for e in board},
        "auroc_of_studies": {e["head"]: round(e["cv"], 5) for e in board},
        "auroc_test": _auroc_test(place / f"default-{kind}-0", board[0]["head"]),
        "machine": machine(),
    }


def _auroc_test(run: Path, head: str) -> float:
    rows = pd.read_parquet(run / "predictions.parquet")
    rows = rows[(rows["head"] == head) & (rows["split"] == "test") & rows["label"].notna()]
    return round(float(roc_auc_score(rows["label"].astype(int), rows["probability"])), 5)


def _race_optuna(place: Path, seconds: float, left_out: bool) -> dict[str, Any]:
    """Return the test AUROC that Optuna reaches with the seconds of the whole default sweep."""
    if left_out or find_version("optuna") is None:
        reason = "left out" if left_out else "Optuna is not installed"
        return {"optuna_auroc_test": f"not measured: {reason}"}

    def call(stage: str, text: str = "") -> Any:
        command = [sys.executable, str(HERE / "quality_tools.py"), stage, "optuna"]
        command += [str(place / name) for name in ("cache", "manifest.parquet", "none")]
        command += ["--seconds", str(seconds)]
        quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, input=text, stdout=subprocess.PIPE, text=True, check=True, env=quiet
        )
        return json.loads(done.stdout.splitlines()[-1])

    found = call("race")
    if not found:
        return {"optuna_auroc_test": f"not measured: no trial ended within {seconds:.0f} s"}
    auroc = call("score", json.dumps(found[-1:]))["curve"][0][1]
    progress(f"optuna: AUROC {auroc:.4f} on test after {seconds:.0f} s")
    return {"optuna_auroc_test": round(auroc, 5), "optuna_params": found[-1]["params"]}


def measure_nih(place: Path, n_runs: int, _without: list[str]) -> dict[str, Any]:
    """Time the default sweep of real features of 736 chest radiographs, at least three times."""
    data = SHARED / "nih"
    if not data.is_dir():
        return {"nih": {"seconds": f"not measured: {data.name} is not there"}}
    seconds = []
    for number in range(max(3, n_runs)):
        run = place / f"nih-{number}"
        seconds.append(round(time_command(_sweep(data / "cache", data / "manifest.csv", run)), 2))
        progress(f"nih: {seconds[-1]} s")
    return {"nih": {"seconds": statistics.median(seconds), "runs": seconds, "synthetic": False}}
