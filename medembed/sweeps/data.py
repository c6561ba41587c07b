"""The data and the plan of a sweep: rows, folds, covariates, trials and batches."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medembed.cache.embeddings import (
    Embeddings,
    choose_poolings,
    load_embeddings,
    load_statistics,
)
from medembed.cache.store import Cache
from medembed.core.errors import TrainingDataError
from medembed.core.files import json_digest
from medembed.core.locations import Location
from medembed.core.poolings import DEFAULT_POOLINGS, IMAGE_STATISTICS, expand_blocks
from medembed.core.prompts import Prompts
from medembed.core.system import library_versions
from medembed.dataset.covariates import MAX_CATEGORIES, fit_covariates
from medembed.dataset.manifest import Manifest
from medembed.dataset.splits import TrainFolds, draw_train_folds, require_both_classes
from medembed.dataset.targets import list_targets, select_target
from medembed.evaluation.thresholds import ThresholdRule
from medembed.heads.mlp import resolve_precision
from medembed.heads.registry import head_class, make_head
from medembed.results.run_schema import CV_METHOD
from medembed.results.runs import RUN_VERSION
from medembed.sweeps.memory import MemoryNeed
from medembed.sweeps.search_space import HeadSpace
from medembed.sweeps.training import Bases, Training

__all__ = [
    "Batch",
    "Exclusion",
    "PooledColumns",
    "SharedRows",
    "SweepConfig",
    "SweepRows",
    "Trial",
    "estimate_need",
    "list_poolings",
    "plan_batches",
]


#: Raised when equal parameters on equal rows train to another result than before, so that a run
#: which was interrupted under the older rules does not mix both.
_TRAINING_VERSION = 5

#: From this many configurations on, a head with rungs has two batches at least: while one waits for
#: its slowest fold to reach a rung, processes train the other.
_SPLIT_FROM = 12


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
    words: Prompts | None = None,
) -> list[Batch]:
    """Return all batches that a sweep trains.

    Heads that read words try each configuration with every set of prompts. A trial's key hashes
    everything that determines its result: `shared`, its head, pooling, parameters and fold, and the
    batch in which it trains.

    Raises
    ------
    TrainingDataError
        A head has no pooling that it can read, or a parameter is out of range.
    """
    batches = []
    for head in heads:
        space, own = spaces[head], _readable(head, poolings)
        drawn = [_resolved(params) for params in space.draw(n_configs, shared["seed"])]
        if words is not None and head_class(head).reads_words:
            drawn = _with_sets(drawn, words)
        for params in drawn:
            make_head(head, params).check_parameters()
        for k, pooling in enumerate(own):
            for start, part in _parts(head, drawn, halved=bool(space.rungs)):
                number = k * len(drawn) + start
                batches.append(
                    _batch(head, pooling.name, number, part, space.rungs, n_folds, shared)
                )
    return batches


def _with_sets(drawn: Sequence[dict[str, Any]], words: Prompts) -> list[dict[str, Any]]:
    """Return configurations with each set of prompts, but those that name a set as they are."""
    found = [
        own
        for params in drawn
        for own in (
            [params] if "prompts" in params else [{**params, "prompts": s} for s in words.sets]
        )
    ]
    for params in found:
        words.directions(params["prompts"])  # refuses an unknown set before any training
    return found


def _readable(head: str, poolings: Sequence[PooledColumns]) -> list[PooledColumns]:
    only = head_class(head).reads_pooling
    if only is not None:
        return [PooledColumns(only)]
    if head_class(head).is_baseline:
        return list(poolings[:1])
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


def _parts(head: str, drawn: Sequence[Any], *, halved: bool) -> Iterator[tuple[int, Sequence[Any]]]:
    """Yield each batch's first number and its configurations; batches are of nearly equal size."""
    n_batches = -(-len(drawn) // (head_class(head).n_together or len(drawn)))
    if halved and len(drawn) >= _SPLIT_FROM:
        n_batches = max(n_batches, 2)
    for part in np.array_split(np.arange(len(drawn)), n_batches):
        yield int(part[0]), drawn[part[0] : part[-1] + 1]


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
    together = json_digest(
        [RUN_VERSION, _TRAINING_VERSION, shared, head, pooling, list(params), rungs]
    )
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
class Exclusion:
    """Images of train that are not trained on, because an audit suspects their labels.

    Attributes
    ----------
    manifest : str
        Digest of the manifest that still has these labels.
    n_studies : int
        Studies, or images if labels are per image.
    sha256 : tuple of str
        The images, in ascending order.
    """

    manifest: str
    n_studies: int
    sha256: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"studies": self.n_studies, "images": len(self.sha256)}


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
    target: str = ""
    """The target to train on; "" for the label, in a sweep without targets."""
    words: Prompts | None = None
    image_root: Location | None = None
    """Where films are measured whose statistics the cache does not hold."""
    without: Exclusion | None = None
    """Suspected studies whose labels `manifest` no longer has."""
    lacking: Mapping[str, str] = field(default_factory=dict)
    """Heads that were asked for and cannot be had, and why."""

    @property
    def digest(self) -> str:
        """The digest of the manifest that was given."""
        return self.manifest.digest() if self.without is None else self.without.manifest

    @property
    def labelled_rows(self) -> pd.DataFrame:
        """The manifest's rows, with the target as their label."""
        rows = self.manifest.rows
        return select_target(rows, self.target) if self.target else rows


class SharedRows:
    """The embedded rows of a manifest and their folds, which are the same for all of its targets.

    Only one pooling is in memory at a time.

    Parameters
    ----------
    asked : SweepConfig
    poolings : sequence of PooledColumns
    draw : callable
        `draw_train_folds`, or `draw_target_folds` for several targets.

    Attributes
    ----------
    folds : int64 array of shape (n,)
        The fold of every embedded row; -1 for rows outside training.
    inner : bool array of shape (n_folds, n)
        Whether the row is used, for each fold, to stop and choose trials, see `draw_inner`.
    encoder : CovariateEncoder, optional
    bases : dict
        Scalings and components that a target's trials learnt, for those of the next.
    """

    def __init__(
        self,
        asked: SweepConfig,
        poolings: Sequence[PooledColumns],
        draw: Callable[..., TrainFolds] = draw_train_folds,
    ) -> None:
        rows = asked.manifest.rows
        drawn = draw(rows, n_folds=asked.n_folds, fraction=asked.train_fraction, seed=asked.seed)
        self.asked, self.encoder, self._is_verified = asked, None, False
        self._measured = None
        if asked.image_root is not None:  # a film that is missing is reported before any training
            self._measured = load_statistics(asked.cache, asked.manifest, asked.image_root)
        embeddings = self._embed(poolings[0])
        if asked.covariates:
            trained = rows[rows["image"].isin(drawn.fold.index)]
            self.encoder = fit_covariates(trained, asked.covariates)
            self.encoder.transform(rows)  # an invalid covariate is reported before any training
        images = embeddings.rows["image"]
        self.folds = drawn.fold.reindex(images).fillna(-1).to_numpy(np.int64)
        self.inner = drawn.inner.reindex(images, fill_value=False).to_numpy(bool).T.copy()
        self.bases: Bases = {}
        self._loaded: tuple[str, Embeddings, NDArray[Any]] | None = None
        self._keep(poolings[0], embeddings)

    def load(self, pooling: PooledColumns) -> tuple[Embeddings, NDArray[Any]]:
        """Return a pooling's embeddings, and the columns that heads are trained on: (n, d)."""
        if self._loaded is None or self._loaded[0] != pooling.name:
            self._loaded = None  # one table at a time
            self._keep(pooling, self._embed(pooling))
        assert self._loaded is not None
        return self._loaded[1:]

    def _embed(self, pooling: PooledColumns) -> Embeddings:
        """Read a pooling; the shards, which hold all of them, are hashed the first time only."""
        if pooling.name == IMAGE_STATISTICS and self._measured is not None:
            return self._measured
        found = load_embeddings(
            self.asked.cache,
            self.asked.manifest,
            pool=pooling.name,
            cells=pooling.n_cells > 1,
            verify=not self._is_verified,
        )
        self._is_verified = True
        return found

    def _keep(self, pooling: PooledColumns, embeddings: Embeddings) -> None:
        X = embeddings.X
        if self.encoder is not None:
            X = np.hstack([X, self.encoder.transform(embeddings.rows)])
            embeddings = replace(embeddings, X=X[:, : embeddings.X.shape[1]])  # not a second table
        self._loaded = (pooling.name, embeddings, X)


class SweepRows:
    """A sweep's rows, with the target that it is asked for as their label.

    Parameters
    ----------
    asked : SweepConfig
    poolings : sequence of PooledColumns
    rows : SharedRows, optional
        Of a sweep of several targets; by default they are loaded.

    Attributes
    ----------
    tried : sequence of PooledColumns
        Those given.
    poolings : list of PooledColumns
        Those given, and those that only one head reads.
    row_folds : int64 array of shape (n,)
        The fold of every embedded row; -1 for rows that are not trained on.
    failed : DataFrame
        Rows left out, see `Embeddings.failed`.
    encoder : CovariateEncoder, optional

    Raises
    ------
    TrainingDataError
        Part of a fold has rows of one class, or there is nothing to test on.
    """

    def __init__(
        self,
        asked: SweepConfig,
        poolings: Sequence[PooledColumns],
        rows: SharedRows | None = None,
    ) -> None:
        self.asked, self.tried = asked, poolings
        own = {head_class(head).reads_pooling for head in asked.heads} - {None}
        more = [PooledColumns(str(name)) for name in sorted(map(str, own))]
        self.poolings = list(dict.fromkeys([*poolings, *more]))
        self._common = rows or SharedRows(asked, poolings)
        embeddings = self._label(self._common.load(poolings[0])[0])
        self.row_folds = np.where(embeddings.y >= 0, self._common.folds, -1)
        self.failed, self.encoder = embeddings.failed, self._common.encoder
        self._sha256 = embeddings.rows["sha256"]
        check = _check_target if asked.target else _check_rows
        check(embeddings, self.row_folds, self._common.inner)

    @property
    def bases(self) -> Bases | None:
        """Where scalings and components are kept for other targets; None without any."""
        return self._common.bases if self.asked.target else None

    def load(self, name: str) -> tuple[Embeddings, Training]:
        """Return embeddings and training rows of a pooling, cached only for the last pooling."""
        pooling = next(pooling for pooling in self.poolings if pooling.name == name)
        found, X = self._common.load(pooling)
        embeddings = self._label(found)
        training = Training(
            X=X,
            y=embeddings.y,
            folds=self.row_folds,
            inner=self._common.inner,
            studies=pd.factorize(embeddings.studies, sort=True)[0],
            n_cells=pooling.n_cells,
            n_covariates=X.shape[1] - embeddings.X.shape[1],
            metric=self.asked.metric,
            seed=self.asked.seed,
            scaled_folds=self._common.folds,
            words=self.asked.words,
            region_columns=self._region_columns(),
        )
        return embeddings, training

    @cached_property
    def shared(self) -> Mapping[str, Any]:
        """Everything that affects the results of all trials."""
        asked = self.asked
        trained = self.row_folds >= 0
        return {
            "n_folds": asked.n_folds,
            "cv_method": CV_METHOD,
            "metric": asked.metric,
            "seed": asked.seed,
            "covariates": list(asked.covariates),
            "train_fraction": asked.train_fraction,
            "manifest": asked.digest,
            "embedded": json_digest(sorted(self._sha256)),
            "trained": json_digest(sorted(self._sha256[trained])),
            "spec": asked.cache.spec.as_dict(),
            "versions": library_versions("sweep"),
            **({"target": asked.target} if asked.target else {}),
            # only sweeps with prompts record them
            **({} if asked.words is None else {"prompts": asked.words.digest}),
            **({} if asked.without is None else {"without": json_digest(asked.without.sha256)}),
        }

    def question(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Return the question that a run directory answers; another question needs another one."""
        left_out = ("versions", "trained")
        shared = {key: value for key, value in self.shared.items() if key not in left_out}
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

    def _label(self, embeddings: Embeddings) -> Embeddings:
        if not self.asked.target:
            return embeddings
        return replace(embeddings, rows=select_target(embeddings.rows, self.asked.target))

    def _region_columns(self) -> dict[str, int]:
        """Return for each region the encoded covariate that is 1 there."""
        names = [] if self.encoder is None else self.encoder.names
        start = "region="
        return {n.removeprefix(start): i for i, n in enumerate(names) if n.startswith(start)}


def estimate_need(asked: SweepConfig, poolings: Sequence[PooledColumns]) -> MemoryNeed:
    """Return what the sweep's rows take in memory, as if no image had failed."""
    rows = asked.manifest.rows
    answers = [select_target(rows, name)["label"].notna() for name in list_targets(rows.columns)]
    is_trained = (rows["split"] == "train") & np.any(answers, axis=0)
    shapes = asked.cache.spec.poolings
    widest = max(
        sum(math.prod(shapes[name]) for name in pooling.name.split("+")) for pooling in poolings
    )
    n_covariates = sum(
        min(rows[name].nunique(), MAX_CATEGORIES) + 1 for name in asked.covariates if name in rows
    )
    n_trained = math.ceil(is_trained.sum() * asked.train_fraction)
    n_columns = widest + n_covariates
    return MemoryNeed(len(rows), n_trained, n_columns, n_covariates, asked.n_folds)


def list_poolings(cache: Cache, pool: str | Sequence[str] | None) -> list[PooledColumns]:
    """Return the requested poolings, which the cache must hold."""
    names = pool.split(",") if isinstance(pool, str) else pool
    chosen = []
    for name in expand_blocks(names, cache.spec.poolings) if names else [None]:
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


def _check_target(
    embeddings: Embeddings, row_folds: NDArray[np.int64], row_inner: NDArray[np.bool_]
) -> None:
    """Refuse a target that cannot be estimated on these folds, in words of its answers."""
    y, is_train = embeddings.y, row_folds >= 0
    is_test = (embeddings.rows["split"] == "test").to_numpy() & (y >= 0)
    if not is_test.any():
        raise TrainingDataError("no embedded test image has an answer.")
    parts = {"train": is_train}
    parts |= {f"fold {fold}": row_folds == fold for fold in range(len(row_inner))}
    for fold, judged in enumerate(row_inner):
        others = is_train & (row_folds != fold)
        parts[f"the learning part of train without fold {fold}"] = others & ~judged
        parts[f"the early-stopping part of train without fold {fold}"] = others & judged
    for part, chosen in parts.items():
        found = y[chosen]
        lacking = [word for word, value in (("positive", 1), ("negative", 0)) if value not in found]
        if lacking:
            raise TrainingDataError(
                f"{part} has no {' and no '.join(lacking)} image. Add patients, or ask for fewer "
                "--folds."
            )
