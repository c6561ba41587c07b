"""Sweep heads over the embeddings of a cache: cross-validate, choose, refit, score once on test.

Every trial and fold is written to the run's ledger when it ends, under a key that hashes all that
decides its result; the same sweep again runs only what is missing.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medembed.cache.embeddings import Embeddings, choose_poolings, load_embeddings
from medembed.cache.store import Cache, open_cache
from medembed.dataset.covariates import CovariateEncoder, fit_covariates
from medembed.dataset.manifest import Manifest, read_manifest
from medembed.dataset.splits import draw_folds, draw_fraction
from medembed.errors import TrainingDataError
from medembed.evaluation.scores import SCORES
from medembed.heads.registry import head_class
from medembed.heads.spaces import HeadSpace, default_spaces, read_spaces
from medembed.results.provenance import (
    library_versions,
    list_left_out,
    public_name,
    summarise_data,
)
from medembed.results.runs import create_run
from medembed.sweeps.plan import Batch, Pooling, digest, plan_batches
from medembed.sweeps.pool import BACKENDS
from medembed.sweeps.training import Training
from medembed.sweeps.trials import Ledger, run_batches
from medembed.sweeps.winners import choose, finish, standings

__all__ = ["sweep"]

FLOOR = "logistic"  # in every table, so that nobody reports a head without what a line can do
VERSIONED = ("medembed", "numpy", "scikit-learn", "torch", "lightgbm")


def sweep(
    cache: Cache | str | Path,
    manifest: Manifest | str | Path,
    out: str | Path,
    *,
    heads: Sequence[str] = ("logistic", "mlp", "lightgbm"),
    pool: str | Sequence[str] | None = None,
    space: str | Path | None = None,
    n_configs: int | None = None,
    n_folds: int = 5,
    metric: str = "auroc",
    covariates: Sequence[str] = (),
    train_fraction: float = 1.0,
    seed: int = 0,
    jobs: int | None = None,
    backend: str = "loky",
    progress: Callable[[int, int], None] | None = None,
    board: Callable[[list[dict[str, Any]]], None] | None = None,
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
    pool : str or sequence of str, optional
        What heads are tried on, each a pooling or several joined by ``+``; by default all
        single-vector poolings of the cache side by side. A pooling of cells, such as ``grid4``, is
        for heads that read cells.
    space : path, optional
        A search space, see `medembed.heads.spaces`; heads that it does not name have the default.
    n_configs : int, optional
        Configurations tried per head and pooling, at least 1; by default what the space says.
    n_folds : int
        Patient-disjoint folds, at least 2.
    metric : str
        The study-level score that chooses, one of `SCORES`.
    covariates : sequence of str
        Columns of the manifest that are encoded and appended to every embedding.
    train_fraction : float in (0, 1]
        Share of the training patients that is learnt from; a smaller share's patients are among a
        larger one's, and keep their folds.
    seed : int
        Decides folds, configurations and heads. The same seed gives the same predictions,
        whatever `jobs` is.
    jobs : int, optional
        Processes of one thread; one per core by default, 1 trains in this process.
    backend : {"loky", "ray"}
        Processes of this machine, or of the Ray at `RAY_ADDRESS`.
    progress : callable, optional
        Called with the number of trained folds so far and the total.
    board : callable, optional
        Called with the leaderboard so far, see `standings`, whenever a trial has ended.

    Returns
    -------
    dict
        ``run`` (path) and ``leaderboard``: a list of ``{head, pooling, trial, params, cv, seconds,
        status, error}``, best first, heads of which every configuration failed last.

    Raises
    ------
    TrainingDataError
        Labels, patients, columns, heads, space or metric do not allow this sweep; before any
        training.
    CacheError
        A pooling is not in the cache.
    MissingRowsError
        Rows of the manifest are neither embedded nor listed as failed.
    RunError
        `out` answers another question or is not a run, or every head failed.
    """
    _check_options(heads, n_configs, n_folds, metric, backend)
    asked = _Asked(
        cache=cache if isinstance(cache, Cache) else open_cache(cache),
        manifest=manifest if isinstance(manifest, Manifest) else read_manifest(manifest),
        heads=list(dict.fromkeys([*heads, FLOOR])),
        spaces=default_spaces() if space is None else read_spaces(space),
        n_configs=n_configs,
        n_folds=n_folds,
        metric=metric,
        covariates=tuple(covariates),
        train_fraction=train_fraction,
        seed=seed,
    )
    data = _Data(asked, _choose_poolings(asked.cache, pool))
    batches = plan_batches(
        asked.heads, data.poolings, asked.spaces, n_configs, n_folds, data.shared()
    )
    details = {
        "seed": seed,
        "command": _command(cache, manifest, out, pool, space, asked),
        "versions": library_versions(VERSIONED),
        "encoder": _about_encoder(asked.cache),
        "data": summarise_data(asked.manifest.rows, data.failed, asked.manifest.label_level),
        "left_out": list_left_out(asked.manifest.rows, data.failed),
    }
    run = create_run(out, data.question(batches), details=details)

    def watch(ledger: Ledger) -> None:
        if progress is not None:
            progress(len(ledger.done), ledger.n_wanted)
        if board is not None:
            board(standings(ledger, metric))

    with run.locked():
        if run.is_complete:
            if progress is not None:
                progress(n_total := len(run.trial_records()), n_total)
            return {"run": str(out), "leaderboard": run.info["leaderboard"]}
        ledger = Ledger(run, batches, watch)
        for pooling in data.poolings:
            own = [batch for batch in batches if batch.pooling == pooling.name]
            if any(ledger.lacks(batch, fold) for batch in own for fold in range(n_folds)):
                training = data.load(pooling.name)[1]
                run_batches(ledger, own, training, n_folds, jobs, backend)
        winners = [choose(ledger, head, metric) for head in asked.heads]
        extras = {"covariates": None if data.encoder is None else data.encoder.as_dict()}
        finish(run, data.load, data.row_folds, winners, extras, jobs, backend)
    return {"run": str(out), "leaderboard": run.info["leaderboard"]}


@dataclass(frozen=True)
class _Asked:
    """What was asked, as it is understood."""

    cache: Cache
    manifest: Manifest
    heads: list[str]
    spaces: Mapping[str, HeadSpace]
    n_configs: int | None
    n_folds: int
    metric: str
    covariates: tuple[str, ...]
    train_fraction: float
    seed: int


@dataclass
class _Data:
    """A sweep's rows: the same for all poolings, of which one at a time is in memory.

    Attributes
    ----------
    row_folds : int64 array of shape (n,)
        The fold of every embedded row; -1 where it is not trained on.
    failed : DataFrame
        Rows left out, as `Embeddings` has them.
    encoder : CovariateEncoder, optional
    """

    asked: _Asked
    poolings: Sequence[Pooling]
    row_folds: NDArray[np.int64] = field(init=False)
    failed: pd.DataFrame = field(init=False)
    encoder: CovariateEncoder | None = field(init=False, default=None)
    _loaded: tuple[str, Embeddings, Training] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        asked = self.asked
        folds = _draw_folds(asked.manifest, asked.n_folds, asked.train_fraction, asked.seed)
        embeddings = self._embed(self.poolings[0])
        if asked.covariates:
            rows = asked.manifest.rows
            trained = rows[rows["image"].isin(folds.index)]
            self.encoder = fit_covariates(trained, asked.covariates)
            self.encoder.transform(rows)  # what cannot be encoded is told before any training
        self.row_folds = folds.reindex(embeddings.rows["image"]).fillna(-1).to_numpy(np.int64)
        self.failed = embeddings.failed
        _check_rows(embeddings, self.row_folds, asked.n_folds)
        self._keep(self.poolings[0], embeddings)

    def load(self, name: str) -> tuple[Embeddings, Training]:
        """Return embeddings and training rows of a pooling, read anew unless it was the last."""
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None  # one table at a time
            pooling = next(pooling for pooling in self.poolings if pooling.name == name)
            self._keep(pooling, self._embed(pooling))
        assert self._loaded is not None
        return self._loaded[1:]

    def shared(self) -> dict[str, Any]:
        """Return what decides the results of all trials alike."""
        asked = self.asked
        assert self._loaded is not None
        rows, trained = self._loaded[1].rows, self.row_folds >= 0
        return {
            "n_folds": asked.n_folds,
            "metric": asked.metric,
            "seed": asked.seed,
            "covariates": list(asked.covariates),
            "train_fraction": asked.train_fraction,
            "manifest": asked.manifest.digest(),
            "embedded": digest(sorted(rows["sha256"])),
            "trained": digest(sorted(rows["sha256"][trained])),
            "spec": asked.cache.spec.as_dict(),
            "versions": library_versions(VERSIONED),
        }

    def question(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Return what a run directory answers: other questions want another one."""
        shared = self.shared()
        del shared["versions"], shared["trained"]
        counts: dict[str, int] = {}
        for batch in batches:
            counts[batch.head] = counts.get(batch.head, 0) + len(batch.trials)
        tried = [[batch.rungs, [dict(t.params) for t in batch.trials]] for batch in batches]
        return {
            "heads": self.asked.heads,
            "pooling": ",".join(pooling.name for pooling in self.poolings),
            **shared,
            "n_configs": counts,
            "space": digest(tried)[:16],
        }

    def _embed(self, pooling: Pooling) -> Embeddings:
        return load_embeddings(
            self.asked.cache, self.asked.manifest, pool=pooling.name, cells=pooling.n_cells > 1
        )

    def _keep(self, pooling: Pooling, embeddings: Embeddings) -> None:
        X, n_covariates = embeddings.X, 0
        if self.encoder is not None:
            encoded = self.encoder.transform(embeddings.rows)
            X, n_covariates = np.hstack([X, encoded]), encoded.shape[1]
        training = Training(
            X=X,
            y=embeddings.y,
            folds=self.row_folds,
            studies=pd.factorize(embeddings.studies, sort=True)[0],
            n_cells=pooling.n_cells,
            n_covariates=n_covariates,
            metric=self.asked.metric,
            seed=self.asked.seed,
        )
        self._loaded = (pooling.name, embeddings, training)


def _check_options(
    heads: Sequence[str], n_configs: int | None, n_folds: int, metric: str, backend: str
) -> None:
    if not heads:
        raise TrainingDataError("no head was given. Name at least one with --heads.")
    for head in heads:
        head_class(head)
    if n_configs is not None and n_configs < 1:
        raise TrainingDataError(f"--configs is {n_configs}; try at least 1 configuration per head.")
    if n_folds < 2:
        raise TrainingDataError(f"--folds is {n_folds}; cross-validation needs at least 2 folds.")
    for name, value, known in (("metric", metric, SCORES), ("backend", backend, BACKENDS)):
        if value not in known:
            raise TrainingDataError(
                f"{name} {value!r} is unknown. Choose one of: {', '.join(known)}."
            )


def _choose_poolings(cache: Cache, pool: str | Sequence[str] | None) -> list[Pooling]:
    """Return the poolings asked for; the cache must have them."""
    names = pool.split(",") if isinstance(pool, str) else pool
    chosen = []
    for name in dict.fromkeys(names) if names else [None]:
        found = choose_poolings(cache, name, cells=True)
        shape = cache.spec.poolings[found[0]]
        chosen.append(Pooling("+".join(found), shape[0] if len(shape) > 1 else 1))
    return chosen


def _draw_folds(
    manifest: Manifest, n_folds: int, train_fraction: float, seed: int
) -> "pd.Series[Any]":
    """Draw folds over all labelled train rows, embedded or not: image name to fold.

    Of these the rows of a fraction of the patients are returned.
    """
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
    labelled = labelled.reset_index(drop=True)
    folds = np.asarray(draw_folds(labelled, n_folds=n_folds, seed=seed), np.int64)
    chosen = draw_fraction(labelled, folds, fraction=train_fraction, seed=seed)
    return pd.Series(folds[chosen], index=labelled["image"].to_numpy()[chosen])


def _check_rows(embeddings: Embeddings, row_folds: NDArray[np.int64], n_folds: int) -> None:
    """Refuse rows that allow no training: one class on either side of a fold, no test rows."""
    is_test = (embeddings.rows["split"] == "test").to_numpy() & (embeddings.y >= 0)
    if not is_test.any():
        raise TrainingDataError(
            f"all labelled test images failed to be embedded ({len(embeddings.failed)} failures). "
            "`medembed cache info CACHE --failures` names the reasons."
        )
    left_out = f"without the {len(embeddings.failed)} images that could not be embedded"
    for fold in range(n_folds):
        held, trained = row_folds == fold, row_folds >= 0
        _require_both_classes(embeddings.y[held], f"fold {fold} {left_out}")
        _require_both_classes(embeddings.y[trained & ~held], f"all folds but {fold} {left_out}")


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
    cache: Cache | str | Path,
    manifest: Manifest | str | Path,
    out: str | Path,
    pool: str | Sequence[str] | None,
    space: str | Path | None,
    asked: _Asked,
) -> str:
    """Write the command that asks this sweep again."""
    words = ["medembed", "sweep", public_name(cache.path if isinstance(cache, Cache) else cache)]
    words += ["MANIFEST" if isinstance(manifest, Manifest) else public_name(manifest)]
    words += ["--out", public_name(out), "--heads", ",".join(asked.heads)]
    words += ["--pool", pool if isinstance(pool, str) else ",".join(pool)] if pool else []
    words += ["--space", public_name(space)] if space else []
    words += ["--configs", str(asked.n_configs)] if asked.n_configs else []
    words += ["--covariates", ",".join(asked.covariates)] if asked.covariates else []
    words += ["--train-fraction", str(asked.train_fraction)] if asked.train_fraction < 1 else []
    words += ["--folds", str(asked.n_folds), "--metric", asked.metric, "--seed", str(asked.seed)]
    return shlex.join(words)
