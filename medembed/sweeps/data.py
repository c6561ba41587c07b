"""The data and the plan of a sweep: rows, folds, covariates, trials and batches."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medembed.cache.embeddings import Embeddings, choose_poolings, load_embeddings
from medembed.cache.store import Cache
from medembed.core.errors import TrainingDataError
from medembed.core.files import json_digest
from medembed.core.poolings import DEFAULT_POOLINGS
from medembed.core.system import library_versions
from medembed.dataset.covariates import MAX_CATEGORIES, CovariateEncoder, fit_covariates
from medembed.dataset.manifest import Manifest
from medembed.dataset.splits import draw_inner, fold_train_rows, require_both_classes
from medembed.evaluation.thresholds import ThresholdRule
from medembed.heads.batched_mlp import resolve_precision
from medembed.heads.registry import head_class, make_head
from medembed.results.run_schema import CV_METHOD
from medembed.results.runs import RUN_VERSION
from medembed.sweeps.memory import MemoryNeed
from medembed.sweeps.search_space import HeadSpace
from medembed.sweeps.training import Training

__all__ = [
    "Batch",
    "PooledColumns",
    "SweepConfig",
    "SweepRows",
    "Trial",
    "estimate_need",
    "list_poolings",
    "plan_batches",
]


@dataclass(frozen=True)
class PooledColumns:
    """The embedding columns that heads are trained on.

    Attributes
    ----------
    name : str
        Poolings of the cache joined by `+`.
    n_cells : int
        Vectors per image; above 1 the pooling is only for heads that read cells.
    """

    name: str
    n_cells: int = 1


@dataclass(frozen=True)
class Trial:
    """One configuration of one head on one pooling; `keys` has one entry per fold."""

    head: str
    number: int
    pooling: str
    params: Mapping[str, Any]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Batch:
    """Trials of one head and pooling that train together.

    Attributes
    ----------
    rungs : tuple of int
        Epochs after which the weaker half is retired.
    """

    trials: tuple[Trial, ...]
    rungs: tuple[int, ...] = ()

    @property
    def head(self) -> str:
        """The head of all trials."""
        return self.trials[0].head

    @property
    def pooling(self) -> str:
        """The pooling of all trials."""
        return self.trials[0].pooling


def plan_batches(
    heads: Sequence[str],
    poolings: Sequence[PooledColumns],
    spaces: Mapping[str, HeadSpace],
    n_configs: int | None,
    n_folds: int,
    shared: Mapping[str, Any],
) -> list[Batch]:
    """Return all batches that a sweep trains.

    A trial's key hashes everything that determines its result: `shared`, its head, pooling,
    parameters and fold, and the batch in which it trains.

    Raises
    ------
    TrainingDataError
        A head has no pooling that it can read, or a parameter is out of range.
    """
    batches = []
    for head in heads:
        space, own = spaces[head], _readable(head, poolings)
        drawn = [_resolved(params) for params in space.draw(n_configs, shared["seed"])]
        for params in drawn:
            make_head(head, params).check_parameters()
        for k, pooling in enumerate(own):
            for start, part in _parts(head, drawn):
                number = k * len(drawn) + start
                batches.append(
                    _batch(head, pooling.name, number, part, space.rungs, n_folds, shared)
                )
    return batches


def _readable(head: str, poolings: Sequence[PooledColumns]) -> list[PooledColumns]:
    reads_cells = "n_cells" in head_class(head)().get_params()
    own = [pooling for pooling in poolings if reads_cells or pooling.n_cells == 1]
    if not own:
        names = ", ".join(pooling.name for pooling in poolings)
        raise TrainingDataError(
            f"head {head} reads one vector per image, and {names} holds several. Add a "
            f"single-vector pooling: --pool {DEFAULT_POOLINGS[0]},{names}."
        )
    return own


def _resolved(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters with machine-dependent values resolved for this machine."""
    if "precision" in params:
        return {**params, "precision": resolve_precision(params["precision"])}
    return dict(params)


def _parts(head: str, drawn: Sequence[Any]) -> Iterator[tuple[int, Sequence[Any]]]:
    size = head_class(head).n_together or len(drawn)
    for start in range(0, len(drawn), size):
        yield start, drawn[start : start + size]


def _batch(
    head: str,
    pooling: str,
    number: int,
    params: Sequence[Mapping[str, Any]],
    rungs: tuple[int, ...],
    n_folds: int,
    shared: Mapping[str, Any],
) -> Batch:
    rungs = rungs if len(params) > 1 else ()
    together = json_digest([RUN_VERSION, shared, head, pooling, list(params), rungs])
    trials = [
        Trial(
            head,
            number + i,
            pooling,
            own,
            tuple(json_digest([together, own, fold])[:32] for fold in range(n_folds)),
        )
        for i, own in enumerate(params)
    ]
    return Batch(tuple(trials), rungs)


@dataclass(frozen=True)
class SweepConfig:
    """The sweep's options, after parsing."""

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
    points: tuple[ThresholdRule, ...] = ()


@dataclass
class SweepRows:
    """A sweep's rows, identical for all poolings; only one pooling is in memory at a time.

    Attributes
    ----------
    row_folds : int64 array of shape (n,)
        The fold of every embedded row; -1 for rows that are not trained on.
    row_inner : bool array of shape (n_folds, n)
        Whether the row is used, for each fold, to stop and choose trials, see `draw_inner`.
    failed : DataFrame
        Rows left out, see `Embeddings.failed`.
    encoder : CovariateEncoder, optional
    """

    asked: SweepConfig
    poolings: Sequence[PooledColumns]
    row_folds: NDArray[np.int64] = field(init=False)
    row_inner: NDArray[np.bool_] = field(init=False)
    failed: pd.DataFrame = field(init=False)
    encoder: CovariateEncoder | None = field(init=False, default=None)
    _loaded: tuple[str, Embeddings, Training] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        asked = self.asked
        folds = fold_train_rows(
            asked.manifest.rows,
            n_folds=asked.n_folds,
            fraction=asked.train_fraction,
            seed=asked.seed,
        )
        known = asked.manifest.rows.set_index("image", drop=False).loc[folds.index]
        inner = draw_inner(known, folds.to_numpy(), seed=asked.seed)
        embeddings = self._embed(self.poolings[0])
        if asked.covariates:
            rows = asked.manifest.rows
            trained = rows[rows["image"].isin(folds.index)]
            self.encoder = fit_covariates(trained, asked.covariates)
            self.encoder.transform(rows)  # an invalid covariate is reported before any training
        self.row_folds = folds.reindex(embeddings.rows["image"]).fillna(-1).to_numpy(np.int64)
        by_image = pd.DataFrame(inner.T, folds.index).reindex(
            embeddings.rows["image"], fill_value=False
        )
        self.row_inner = by_image.to_numpy(bool).T.copy()
        self.failed = embeddings.failed
        _check_rows(embeddings, self.row_folds, self.row_inner)
        self._keep(self.poolings[0], embeddings)

    def load(self, name: str) -> tuple[Embeddings, Training]:
        """Return embeddings and training rows of a pooling, cached only for the last pooling."""
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None  # one table at a time
            pooling = next(pooling for pooling in self.poolings if pooling.name == name)
            self._keep(pooling, self._embed(pooling))
        assert self._loaded is not None
        return self._loaded[1:]

    def shared(self) -> dict[str, Any]:
        """Return everything that affects the results of all trials."""
        asked = self.asked
        assert self._loaded is not None
        rows, trained = self._loaded[1].rows, self.row_folds >= 0
        return {
            "n_folds": asked.n_folds,
            "cv_method": CV_METHOD,
            "metric": asked.metric,
            "seed": asked.seed,
            "covariates": list(asked.covariates),
            "train_fraction": asked.train_fraction,
            "manifest": asked.manifest.digest(),
            "embedded": json_digest(sorted(rows["sha256"])),
            "trained": json_digest(sorted(rows["sha256"][trained])),
            "spec": asked.cache.spec.as_dict(),
            "versions": library_versions("sweep"),
        }

    def question(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Return the question that a run directory answers; another question needs another one."""
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
            "space": json_digest(tried)[:16],
            # older runs do not record operating points
            **({"operating_points": names} if (names := self._name_points()) else {}),
        }

    def _name_points(self) -> list[str]:
        return [rule.name for rule in self.asked.points]

    def _embed(self, pooling: PooledColumns) -> Embeddings:
        return load_embeddings(
            self.asked.cache, self.asked.manifest, pool=pooling.name, cells=pooling.n_cells > 1
        )

    def _keep(self, pooling: PooledColumns, embeddings: Embeddings) -> None:
        X, n_covariates = embeddings.X, 0
        if self.encoder is not None:
            encoded = self.encoder.transform(embeddings.rows)
            X, n_covariates = np.hstack([X, encoded]), encoded.shape[1]
            embeddings = replace(embeddings, X=X[:, :-n_covariates])  # not a second table
        training = Training(
            X=X,
            y=embeddings.y,
            folds=self.row_folds,
            inner=self.row_inner,
            studies=pd.factorize(embeddings.studies, sort=True)[0],
            n_cells=pooling.n_cells,
            n_covariates=n_covariates,
            metric=self.asked.metric,
            seed=self.asked.seed,
        )
        self._loaded = (pooling.name, embeddings, training)


def estimate_need(asked: SweepConfig, poolings: Sequence[PooledColumns]) -> MemoryNeed:
    """Return what the sweep's rows take in memory, as if no image had failed."""
    rows = asked.manifest.rows
    is_trained = (rows["split"] == "train") & rows["label"].notna()
    shapes = asked.cache.spec.poolings
    widest = max(
        sum(math.prod(shapes[name]) for name in pooling.name.split("+")) for pooling in poolings
    )
    n_covariates = sum(
        min(rows[name].nunique(), MAX_CATEGORIES) + 1 for name in asked.covariates if name in rows
    )
    n_trained = math.ceil(is_trained.sum() * asked.train_fraction)
    return MemoryNeed(len(rows), n_trained, widest + n_covariates, n_covariates)


def list_poolings(cache: Cache, pool: str | Sequence[str] | None) -> list[PooledColumns]:
    """Return the requested poolings, which the cache must hold."""
    names = pool.split(",") if isinstance(pool, str) else pool
    chosen = []
    for name in dict.fromkeys(names) if names else [None]:
        found = choose_poolings(cache, name, cells=True)
        shape = cache.spec.poolings[found[0]]
        chosen.append(PooledColumns("+".join(found), shape[0] if len(shape) > 1 else 1))
    return chosen


def _check_rows(
    embeddings: Embeddings, row_folds: NDArray[np.int64], row_inner: NDArray[np.bool_]
) -> None:
    """Refuse rows unfit for training: a single class in a part of a fold, or no test rows."""
    is_test = (embeddings.rows["split"] == "test").to_numpy() & (embeddings.y >= 0)
    if not is_test.any():
        raise TrainingDataError(
            f"all labelled test images failed to be embedded ({len(embeddings.failed)} failures). "
            "`medembed cache info CACHE --failures` names the reasons."
        )
    left_out = f"without the {len(embeddings.failed)} images that could not be embedded"
    for fold, judged in enumerate(row_inner):
        held, trained = row_folds == fold, row_folds >= 0
        require_both_classes(embeddings.y[held], f"fold {fold} {left_out}")
        for part, flags in (("learnt from", ~judged), ("stopped by", judged)):
            where = f"the data {part} without fold {fold}, {left_out},"
            require_both_classes(embeddings.y[trained & ~held & flags], where)
