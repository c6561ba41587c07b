"""Sweep heads over the embeddings of a cache: cross-validate, choose, refit, score once on test.

Every trial and fold is written to the run's ledger when it ends, under a key that hashes all that
decides its result; the same sweep again runs only what is missing.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medembed.cache.embeddings import Embeddings, load_embeddings
from medembed.cache.store import Cache, open_cache
from medembed.dataset.manifest import Manifest, read_manifest
from medembed.dataset.splits import draw_folds
from medembed.errors import TrainingDataError
from medembed.evaluation.scores import SCORES
from medembed.heads.registry import head_class
from medembed.results.provenance import (
    library_versions,
    list_left_out,
    public_name,
    summarise_data,
)
from medembed.results.runs import create_run
from medembed.sweeps.trials import Training, digest, list_tasks, run_trials
from medembed.sweeps.winners import choose, finish

__all__ = ["sweep"]

FLOOR = "logistic"  # in every table, so that nobody reports a head without what a line can do
VERSIONED = ("medembed", "numpy", "scikit-learn", "torch", "lightgbm")


def sweep(
    cache: Cache | str | Path,
    manifest: Manifest | str | Path,
    out: str | Path,
    *,
    heads: Sequence[str] = ("logistic", "mlp", "lightgbm"),
    pool: str | None = None,
    n_configs: int = 8,
    n_folds: int = 5,
    metric: str = "auroc",
    seed: int = 0,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Cross-validate heads, refit each head's winner on all of train, score it on test.

    Parameters
    ----------
    cache : Cache or path
        Embeddings of the manifest's images.
    manifest : Manifest or path
        Labels, patients and splits.
    out : str or Path
        The run directory: new, or the same sweep's, which is then continued.
    heads : sequence of str
        Names of heads, see `medembed.heads.registry`; ``logistic`` is added where it is missing.
    pool : str, optional
        Poolings joined by ``+``; by default all single-vector poolings of the cache.
    n_configs : int
        Configurations tried per head, at least 1.
    n_folds : int
        Patient-disjoint folds, at least 2.
    metric : str
        The study-level score that chooses, one of `SCORES`.
    seed : int
        Decides folds, configurations and heads. The same seed gives the same predictions,
        whatever `jobs` is.
    jobs : int, optional
        Processes; one per core by default, 1 trains in this process.
    progress : callable, optional
        Called with the number of trained folds so far and the total.

    Returns
    -------
    dict
        ``run`` (path) and ``leaderboard``: a list of ``{head, pooling, trial, params, cv, seconds,
        status, error}``, best first, heads of which every configuration failed last.

    Raises
    ------
    TrainingDataError
        Labels, patients, heads or the metric do not allow this sweep; before any training.
    MissingRowsError
        Rows of the manifest are neither embedded nor listed as failed.
    RunError
        `out` answers another question or is not a run, or every head failed.
    """
    _check_options(heads, n_configs, n_folds, metric)
    heads = list(dict.fromkeys([*heads, FLOOR]))
    sources = {"cache": cache, "manifest": manifest}
    cache = cache if isinstance(cache, Cache) else open_cache(cache)
    manifest = manifest if isinstance(manifest, Manifest) else read_manifest(manifest)
    folds = _draw_folds(manifest, n_folds, seed)
    embeddings = load_embeddings(cache, manifest, pool=pool)
    training, row_folds = _select_training(embeddings, manifest, folds)
    settings = {"n_folds": n_folds, "metric": metric, "seed": seed}
    question = {
        "heads": heads,
        "n_configs": n_configs,
        **settings,
        "pooling": embeddings.pooling,
        "manifest": manifest.digest(),
        "embedded": digest(sorted(embeddings.rows["sha256"])),
        "spec": embeddings.spec.as_dict(),
    }
    details = {
        "seed": seed,
        "command": _command(sources, out, heads, pool, n_configs, settings),
        "versions": library_versions(VERSIONED),
        "encoder": _about_encoder(cache),
        "data": summarise_data(manifest.rows, embeddings.failed, manifest.label_level),
        "left_out": list_left_out(manifest.rows, embeddings.failed),
    }
    run = create_run(out, question, details=details)
    with run.locked():
        if not run.is_complete:
            tasks = list_tasks(heads, n_configs, n_folds, seed, question)
            records = run_trials(run, tasks, training, settings, jobs, progress)
            winners = [choose(run, head, tasks, records, training, metric) for head in heads]
            finish(run, embeddings, training, row_folds, winners, settings)
        elif progress is not None:
            progress(n_total := len(run.trial_records()), n_total)
    return {"run": str(out), "leaderboard": run.info["leaderboard"]}


def _check_options(heads: Sequence[str], n_configs: int, n_folds: int, metric: str) -> None:
    if not heads:
        raise TrainingDataError("no head was given. Name at least one with --heads.")
    for head in heads:
        head_class(head)
    if n_configs < 1:
        raise TrainingDataError(f"--configs is {n_configs}; try at least 1 configuration per head.")
    if n_folds < 2:
        raise TrainingDataError(f"--folds is {n_folds}; cross-validation needs at least 2 folds.")
    if metric not in SCORES:
        raise TrainingDataError(
            f"metric {metric!r} is unknown. Choose one of: {', '.join(SCORES)}."
        )


def _draw_folds(manifest: Manifest, n_folds: int, seed: int) -> "pd.Series[Any]":
    """Draw folds over all labelled train rows, embedded or not: image name to fold."""
    rows = manifest.rows
    train = rows[rows["split"] == "train"]
    if train.empty:
        raise TrainingDataError("the manifest has no train rows. Give some rows the split train.")
    labelled = train[train["label"].notna()]
    if labelled.empty:
        raise TrainingDataError(
            f"none of the {len(train)} train rows has a label. Give the manifest labels 0 and 1."
        )
    _require_both_classes(labelled["label"].to_numpy(np.int8), "the train rows of the manifest")
    if not (rows["label"].notna() & (rows["split"] == "test")).any():
        raise TrainingDataError(
            "the manifest has no labelled test rows, so no head could be scored. "
            "Give some patients the split test."
        )
    folds = draw_folds(labelled.reset_index(drop=True), n_folds=n_folds, seed=seed)
    return pd.Series(np.asarray(folds, np.int64), index=labelled["image"].to_numpy())


def _select_training(
    embeddings: Embeddings, manifest: Manifest, folds: "pd.Series[Any]"
) -> tuple[Training, NDArray[Any]]:
    """Return the training rows and, for every embedded row, its fold (-1: not trained on)."""
    row_folds = folds.reindex(embeddings.rows["image"]).fillna(-1).to_numpy(np.int64)
    chosen = row_folds >= 0
    studies = pd.factorize(embeddings.studies, sort=True)[0]
    training = Training(
        embeddings.X[chosen], embeddings.y[chosen], row_folds[chosen], studies[chosen]
    )
    is_test = (embeddings.rows["split"] == "test").to_numpy() & (embeddings.y >= 0)
    if not is_test.any():
        raise TrainingDataError(
            f"all labelled test images failed to be embedded ({len(embeddings.failed)} failures). "
            "`medembed cache info CACHE --failures` names the reasons."
        )
    left_out = f"without the {len(embeddings.failed)} images that could not be embedded"
    for fold in sorted(folds.unique()):
        held = training.rows_of(fold)
        _require_both_classes(training.y[held], f"fold {fold} {left_out}")
        _require_both_classes(training.y[~held], f"all folds but {fold} {left_out}")
    return training, row_folds


def _require_both_classes(y: NDArray[Any], where: str) -> None:
    present = np.unique(y)
    if len(present) < 2:
        names = ("normal (label 0)", "abnormal (label 1)")
        found = f"only {names[int(present[0])]}" if len(present) else "no"
        lacking = names[1 - int(present[0])] if len(present) else "labelled"
        fewer = " or ask for fewer --folds" if "fold" in where else ""
        raise TrainingDataError(
            f"{where} hold {found} rows; a head learns from both classes. "
            f"Add {lacking} patients{fewer}."
        )


def _about_encoder(cache: Cache) -> dict[str, Any]:
    recorded = cache.recorded
    return {
        "source": public_name(recorded.get("source") or "unknown"),
        "revision": recorded.get("revision"),
        "precision": recorded.get("precision"),
        "fingerprint": cache.spec.encoder,
        "preprocessing": dict(cache.spec.preprocessing),
    }


def _command(
    sources: Mapping[str, Any],
    out: str | Path,
    heads: Sequence[str],
    pool: str | None,
    n_configs: int,
    settings: Mapping[str, Any],
) -> str:
    """Write the command that asks this sweep again."""
    cache, manifest = sources["cache"], sources["manifest"]
    words = ["medembed", "sweep", public_name(cache.path if isinstance(cache, Cache) else cache)]
    words += ["MANIFEST" if isinstance(manifest, Manifest) else public_name(manifest)]
    words += ["--out", public_name(out), "--heads", ",".join(heads)]
    words += ["--pool", pool] if pool else []
    words += ["--configs", str(n_configs), "--folds", str(settings["n_folds"])]
    words += ["--metric", settings["metric"], "--seed", str(settings["seed"])]
    return shlex.join(words)
