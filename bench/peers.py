"""Time `medembed sweep` against eva's offline fit and AutoGluon on equal embeddings.

    .venv/bin/python bench/peers.py --eva EVA/bin/python --autogluon AG/bin/python \
        --out bench/results/peers.json

Both peers have their own dependencies, so each is installed in a separate virtual environment (`pip
install kaiko-eva scikit-learn`, `pip install 'autogluon.tabular[lightgbm]'`), whose Python is given
by an option or by MEDEMBED_EVA and MEDEMBED_AUTOGLUON; a missing peer is "not measured". The table
is synthetic (see made_table.py), with identical, patient-disjoint training, validation and test
rows for all. AUROC is that of the test images.

- `medembed logistic`: a whole `medembed sweep --heads logistic`: all penalties × 5 folds, test.
- `medembed default`: a whole `medembed sweep` of the default space, × 5 folds; AUROC is
  that of the head that was best in cross-validation.
- `eva`: its offline classification in the usual form: one file per embedding, a linear head, AdamW
  at 3e-4, batches of 256, at most 12,500 steps, stopped after 5 epochs without a better AUROC on
  the validation rows, one run (its own configurations take several).
- `autogluon`: TabularPredictor with AUROC, preset "medium_quality", the validation rows as tuning
  data, otherwise default settings, at most `--limit` seconds.

A peer's time covers only its fit, with libraries loaded and rows in memory (eva reads its files, as
usual); medembed's time covers the whole process. Ratios are a peer's time over medembed's, from
medians of alternated runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

N_COLUMNS = 1152
NOT_MEASURED = "not measured"
PAIRS = {"eva": "medembed logistic", "autogluon": "medembed default"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8_000)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--limit", type=int, default=600, help="seconds that AutoGluon may take")
    for peer in PAIRS:
        python = os.environ.get(f"MEDEMBED_{peer.upper()}")
        parser.add_argument(f"--{peer}", default=python, help="a Python that has it")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)  # peer, folder, limit
    given = parser.parse_args()
    if given.child:
        peer, place, limit = given.child
        print(json.dumps(CHILDREN[peer](Path(place), int(limit))))
        return
    pythons = {"eva": given.eva, "autogluon": given.autogluon}
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), given.rows, given.runs, given.limit, pythons)
    if given.out:
        from measuring import write_results

        write_results(given.out, found)
    else:
        print(json.dumps(found, indent=2))


def measure(
    place: Path, n_rows: int, n_runs: int, limit: int, pythons: dict[str, str | None]
) -> dict[str, Any]:
    """Run all in turn, and return the comparison of medians."""
    write_rows(place, n_rows)
    jobs: dict[str, Any] = {
        "medembed logistic": lambda run: sweep(place, f"logistic-{run}", "--heads", "logistic"),
        "medembed default": lambda run: sweep(place, f"default-{run}"),
    }
    for peer, python in pythons.items():
        if python:
            command = [python, __file__, "--child", peer, str(place), str(limit)]
            jobs[peer] = lambda _run, command=command: call(command)
    seconds: dict[str, list[float]] = {}
    last: dict[str, dict[str, Any]] = {}
    for run in range(n_runs):
        for name, job in jobs.items():
            last[name] = job(run)
            seconds.setdefault(name, []).append(round(last[name]["seconds"], 2))
            print(name, last[name], file=sys.stderr, flush=True)
    ratios: dict[str, Any] = {}
    for peer, ours in PAIRS.items():
        ratios[f"{peer}_vs_{ours.split()[1]}"] = NOT_MEASURED
        if peer in seconds:
            ratio = statistics.median(seconds[peer]) / statistics.median(seconds[ours])
            ratios[f"{peer}_vs_{ours.split()[1]}"] = round(ratio, 3)
    return {
        "ratios": ratios,
        "auroc": {name: round(found["auroc"], 5) for name, found in last.items()},
        "seconds": seconds,
        "rows": n_rows,
        "columns": N_COLUMNS,
        "limit": limit,
        "details": {name: found.get("details") for name, found in last.items()},
        "synthetic": True,
    }


def write_rows(place: Path, n_rows: int) -> None:
    """Write cache and manifest for medembed, arrays for the peers, a file per embedding for eva."""
    import numpy as np

    from made_table import make_table, write_table
    from medembed.cache.embeddings import load_embeddings
    from medembed.dataset.splits import draw_folds

    write_table(make_table(n_rows, round(n_rows * 11_184 / 36_808), N_COLUMNS), place)
    rows = load_embeddings(place / "cache", place / "manifest.parquet")
    is_train = (rows.rows["split"] == "train").to_numpy()
    folds = np.full(len(rows.y), -1)
    folds[is_train] = draw_folds(rows.rows[is_train].reset_index(drop=True), n_folds=5, seed=0)
    split = np.where(~is_train, "test", np.where(folds == 0, "val", "train"))
    np.savez(place / "rows.npz", X=rows.X, y=rows.y.astype(np.int64), split=split)


def sweep(place: Path, run: str, *options: str) -> dict[str, Any]:
    """Run a whole sweep; return the test AUROC of the head chosen by cross-validation."""
    import pandas as pd
    from sklearn.metrics import roc_auc_score

    command = [sys.executable, "-m", "medembed", "sweep", str(place / "cache")]
    command += [str(place / "manifest.parquet"), "--out", str(place / run), "--json", *options]
    start = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    seconds = time.perf_counter() - start
    best = json.loads(done.stdout)["leaderboard"][0]["head"]
    rows = pd.read_parquet(place / run / "predictions.parquet")
    rows = rows[(rows["head"] == best) & (rows["split"] == "test")]
    auroc = roc_auc_score(rows["label"].astype(int), rows["probability"])
    return {"seconds": seconds, "auroc": float(auroc), "details": best}


def call(command: list[str]) -> dict[str, Any]:
    """Run a peer in its own Python; return the JSON of its last line."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def fit_eva(place: Path, _limit: int) -> dict[str, Any]:
    """Fit a linear head as in eva's offline configurations; runs in eva's Python."""
    import numpy as np
    import torch
    from eva.core.data.dataloaders import DataLoader
    from eva.core.data.datamodules import DataModule
    from eva.core.data.datamodules.schemas import DataloadersSchema, DatasetsSchema
    from eva.core.data.datasets import EmbeddingsClassificationDataset
    from eva.core.metrics.defaults import MulticlassClassificationMetrics
    from eva.core.metrics.structs import MetricsSchema
    from eva.core.models.modules import HeadModule
    from eva.core.trainers import Trainer
    from lightning.pytorch.callbacks import EarlyStopping
    from sklearn.metrics import roc_auc_score

    rows = np.load(place / "rows.npz")
    folder = write_eva(place / "eva", rows)
    train, val = (
        EmbeddingsClassificationDataset(str(folder), "manifest.csv", split)
        for split in ("train", "val")
    )
    loader = {"batch_size": 256, "num_workers": 0, "pin_memory": False}
    loader |= {"prefetch_factor": None, "persistent_workers": False}
    data = DataModule(
        datasets=DatasetsSchema(train=train, val=val),
        dataloaders=DataloadersSchema(
            train=DataLoader(**loader, shuffle=True), val=DataLoader(**loader)
        ),
    )
    head = torch.nn.Linear(rows["X"].shape[1], 2)
    module = HeadModule(
        head=head,
        criterion=torch.nn.CrossEntropyLoss(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-4),
        metrics=MetricsSchema(common=MulticlassClassificationMetrics(num_classes=2)),
    )
    trainer = Trainer(
        default_root_dir=str(folder / "logs"),
        accelerator="cpu",
        max_steps=12_500,
        callbacks=[EarlyStopping(monitor="val/MulticlassAUROC", mode="max", patience=5)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    start = time.perf_counter()
    trainer.fit(module, datamodule=data)
    seconds = time.perf_counter() - start
    is_test = rows["split"] == "test"
    with torch.no_grad():
        logits = head(torch.from_numpy(rows["X"][is_test]))
    auroc = roc_auc_score(rows["y"][is_test], (logits[:, 1] - logits[:, 0]).numpy())
    return {"seconds": seconds, "auroc": float(auroc), "details": f"{trainer.global_step} steps"}


def write_eva(folder: Path, rows: Any) -> Path:
    """Write a file per embedding and a list of them, once."""
    import pandas as pd
    import torch

    if not folder.is_dir():
        folder.mkdir()
        for number, row in enumerate(rows["X"]):
            torch.save(torch.from_numpy(row), folder / f"{number}.pt")
        names = [f"{number}.pt" for number in range(len(rows["y"]))]
        table = {"embeddings": names, "target": rows["y"], "split": rows["split"]}
        pd.DataFrame(table).to_csv(folder / "manifest.csv", index=False)
    return folder


def fit_autogluon(place: Path, limit: int) -> dict[str, Any]:
    """Fit AutoGluon's tabular predictor; runs in its Python."""
    import numpy as np
    import pandas as pd
    from autogluon.tabular import TabularPredictor
    from sklearn.metrics import roc_auc_score

    rows = np.load(place / "rows.npz")
    table = pd.DataFrame(rows["X"], columns=[f"c{i}" for i in range(rows["X"].shape[1])])
    table["label"] = rows["y"]
    parts = {split: table[rows["split"] == split] for split in ("train", "val", "test")}
    with tempfile.TemporaryDirectory() as folder:
        predictor = TabularPredictor("label", eval_metric="roc_auc", path=folder, verbosity=0)
        start = time.perf_counter()
        predictor.fit(
            parts["train"], tuning_data=parts["val"], presets="medium_quality", time_limit=limit
        )
        seconds = time.perf_counter() - start
        probability = predictor.predict_proba(parts["test"])[1]
        best = predictor.model_best
    auroc = roc_auc_score(parts["test"]["label"], probability)
    return {"seconds": seconds, "auroc": float(auroc), "details": best}


CHILDREN = {"eva": fit_eva, "autogluon": fit_autogluon}


if __name__ == "__main__":
    main()
