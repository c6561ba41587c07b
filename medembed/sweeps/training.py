"""Train heads without one fold, in the processes of a sweep.

A trial learns from some of the other folds' patients and is judged on the rest, which determine
when it stops, whether it is retired and whether it is chosen. The left-out fold is not used here.
Each fit uses one thread, so that results do not depend on how many run in parallel.
"""

import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors.numpy import load_file, save
from scipy.special import expit
from threadpoolctl import threadpool_limits

from medembed.core.errors import TrainingDataError
from medembed.evaluation.scores import by_study, score
from medembed.heads.base import Head
from medembed.heads.lightgbm import BinnedRows, LightGBMHead
from medembed.heads.linear import LogisticHead, fit_path
from medembed.heads.mlp import MLPHead, gather
from medembed.heads.registry import head_class, make_head
from medembed.heads.scaling import Basis, Projector

if TYPE_CHECKING:  # what training processes, or the parent process, need not wait for
    from medembed.core.prompts import Prompts
    from medembed.heads.mlp_network import Net

__all__ = [
    "Bases",
    "FoldResult",
    "StoredNet",
    "Training",
    "Unit",
    "configure",
    "is_safe",
    "learn_basis",
    "one_thread",
    "predict",
    "seed_of_fold",
    "study_score",
    "to_studies",
    "train_unit",
]

SELECTION_THRESHOLD = 0.5
"""Threshold for decision metrics: configurations are compared before a threshold is fitted."""

_SAFE_BYTES = 64_000_000


@dataclass(frozen=True)
class Training:
    """The embedded rows of one pooling, in the manifest's order, and the sweep's settings.

    Attributes
    ----------
    X, y, folds, studies : arrays of shape (n, d) float32, (n,) int8, (n,) int64, (n,) int64
        Embeddings and covariates, labels 0 or 1 (-1: unknown), fold numbers (-1: not trained on),
        study codes.
    inner : bool array of shape (n_folds, n)
        For each fold, the rows of other folds that judge its trials.
    n_cells, n_covariates : int
        Vectors per image, and the number of last columns of X that are covariates.
    metric, seed : str, int
        The score that configurations are chosen by, and the random seed; see `sweep`.
    scaled_folds : int64 array of shape (n,), optional
        The fold of each row that scalings and components are learnt from, -1 for others. Targets
        share them, so that rows count whose answer one target lacks. By default `folds`.
    words, region_columns : Prompts or None, dict of str to int
        For heads that read words: the prompts, and the place of each region among the covariates.
    """

    X: NDArray[Any]
    y: NDArray[Any]
    folds: NDArray[Any]
    studies: NDArray[Any]
    inner: NDArray[Any]
    n_cells: int
    n_covariates: int
    metric: str
    seed: int
    scaled_folds: NDArray[Any] | None = None
    words: "Prompts | None" = None
    region_columns: Mapping[str, int] = field(default_factory=dict)

    def held(self, fold: int) -> NDArray[np.int64]:
        """Return the indices of the rows of one fold."""
        return np.flatnonzero(self.folds == fold)

    def others(self, fold: int) -> NDArray[np.int64]:
        """Return the indices of the training rows of all other folds."""
        return np.flatnonzero((self.folds >= 0) & (self.folds != fold))

    def learnt(self, fold: int) -> NDArray[np.int64]:
        """Return the indices of the rows of other folds that trials learn from."""
        return np.flatnonzero((self.folds >= 0) & (self.folds != fold) & ~self.inner[fold])

    def judging(self, fold: int) -> NDArray[np.int64]:
        """Return the indices of the rows of other folds that judge trials, of other patients."""
        return np.flatnonzero(self.inner[fold] & (self.folds >= 0))

    def scaled(self, fold: int) -> NDArray[np.int64]:
        """Return the indices of the rows from which a fold's trials learn their scaling."""
        folds = self.folds if self.scaled_folds is None else self.scaled_folds
        return np.flatnonzero((folds >= 0) & (folds != fold) & ~self.inner[fold])


@dataclass(frozen=True)
class Unit:
    """The work of one process at a time: heads that train together, without one fold.

    Attributes
    ----------
    params : tuple of dict
        One per head.
    until : int, optional
        For MLPs, the epoch to stop at.
    nets : list of (Net or StoredNet), optional
        For MLPs, their state so far.
    folder : Path, optional
        Where files of the states that MLPs reach are kept; otherwise these are returned.
    basis : dict, optional
        The result of `learn_basis` for this fold.
    """

    head: str
    params: tuple[Mapping[str, Any], ...]
    fold: int
    until: int | None = None
    nets: "Sequence[Net | StoredNet] | None" = None
    folder: Path | None = None
    basis: Mapping[str, Basis] = field(default_factory=dict)


Bases = dict[tuple[Any, ...], list[Mapping[str, Basis]]]
"""For a pooling and its scalings, the result of `learn_basis` for each fold."""


@dataclass(frozen=True)
class FoldResult:
    """The outcome of one trial without one fold.

    Attributes
    ----------
    score, best_epoch
        On the rows that judge the trial; None if training failed.
    net : Net or StoredNet, optional
        The state of an MLP that may continue.
    """

    score: float | None
    best_epoch: int | None
    seconds: float
    error: str | None = None
    net: "Net | StoredNet | None" = None


def is_safe(training: Training, head: str | None = None) -> bool:
    """Return whether a head's fits, or scalings and components, are safe, see `Pool.submit`.

    Those of few rows are, which cannot exhaust memory, by scikit-learn and LightGBM.
    """
    is_light = head is None or head_class(head).shares in ("path", "bins")
    return is_light and training.X.nbytes <= _SAFE_BYTES


def configure(
    training: Training, name: str, params: Mapping[str, Any], fold: int | None = None
) -> Head:
    """Return an unfitted head for these columns, to be trained without a fold or on all rows.

    Each fold has its own random weights. The judges of all folds together are nearly all patients,
    so with shared weights a configuration could be chosen because its weights happen to suit these
    patients, and then be scored on the same patients by nearly the same function.
    """
    known = make_head(name, {}).get_params()
    columns = {
        "n_cells": training.n_cells,
        "n_covariates": training.n_covariates,
        "words": training.words,
        "region_columns": training.region_columns,
    }
    own = {key: value for key, value in columns.items() if key in known}
    seed = training.seed if fold is None else seed_of_fold(training.seed, fold)
    head = make_head(name, {**params, **own}, seed=seed)
    # the counterpart of what `fit` learns from its rows, for heads that are fitted together
    head.classes_, head.n_features_in_ = np.array([0, 1]), training.X.shape[1]
    head.import_libraries()
    return head


def predict(
    training: Training, head: Head, rows: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Return a fitted head's probabilities of abnormal for the given rows, or for all.

    One per row, float64 of shape (n,), or one per study in the order of codes if the head judges
    studies.
    """
    X, studies = training.X, training.studies
    if rows is not None:
        X, studies = X[rows], studies[rows]
    given = (studies,) if head.study_level else ()
    return np.asarray(head.predict_proba(X, *given)[:, 1], np.float64)


def learn_basis(
    training: Training, item: tuple[int, Mapping[str, int], Sequence[str]]
) -> dict[str, Basis]:
    """Return the basis shared by the heads of a fold.

    `item` is the fold, a number of components for each scaling, and the scalings with a span.
    """
    fold, wanted, spans = item
    projector = Projector(training.X, training.scaled(fold), n_covariates=training.n_covariates)
    with one_thread():
        for scaling, pca in wanted.items():
            projector.learn(scaling, pca)
        for scaling in spans:
            projector.span(scaling)
    return projector.known


def train_unit(training: Training, unit: Unit) -> list[FoldResult]:
    """Train and judge a unit's heads without its fold; errors become outcomes."""
    started = time.perf_counter()
    try:
        heads = [configure(training, unit.head, params, unit.fold) for params in unit.params]
        with one_thread():
            outcomes = _TRAINERS[heads[0].shares](training, unit, heads)
    except Exception as error:
        outcomes = [_failure(error)] * len(unit.params)
    share = (time.perf_counter() - started) / len(unit.params)
    return [outcome if outcome.seconds else _timed(outcome, share) for outcome in outcomes]


def _train_path(training: Training, unit: Unit, heads: Sequence[LogisticHead]) -> list[FoldResult]:
    rows = training.learnt(unit.fold)
    fit_path(heads, training.X, training.y[rows], _projector(training, unit), rows)
    return [_judge(training, unit.fold, head) for head in heads]


def _train_trees(training: Training, unit: Unit, heads: Sequence[LightGBMHead]) -> list[FoldResult]:
    rows, judging = training.learnt(unit.fold), training.judging(unit.fold)
    binned = BinnedRows(
        (training.X, rows, training.y[rows]),
        (training.X, judging, training.y[judging]),
        _projector(training, unit),
    )
    outcomes = []
    for head in heads:
        started = time.perf_counter()
        try:
            binned.fit(head)
            outcome = _judge(training, unit.fold, head)
        except Exception as error:
            outcome = _failure(error)
        outcomes.append(_timed(outcome, time.perf_counter() - started))
    return outcomes


def _train_cohort(training: Training, unit: Unit, heads: Sequence[MLPHead]) -> list[FoldResult]:
    from medembed.heads.batched_mlp import Rows

    rows, judging = training.learnt(unit.fold), training.judging(unit.fold)
    cohort = gather(
        heads,
        Rows(training.X, rows, training.y[rows]),
        Rows(training.X, judging, training.y[judging]),
        _projector(training, unit),
        None if unit.nets is None else [_read_net(net) for net in unit.nets],
    )
    cohort.train(unit.until or max(head.epochs for head in heads))
    outcomes = []
    for head, net, projection in zip(heads, cohort.nets, cohort.projections, strict=True):
        try:
            if unit.until is None or net.failure:
                head.take(net, projection)
                outcomes.append(_judge(training, unit.fold, head))
            else:
                outcome = _judge_so_far(training, unit.fold, net)
                outcomes.append(replace(outcome, net=_keep_net(net, unit.folder)))
        except Exception as error:
            outcomes.append(_failure(error))
    return outcomes


def _train_each(training: Training, unit: Unit, heads: Sequence[Head]) -> list[FoldResult]:
    """Train heads that share nothing; heads that judge studies receive the study codes."""
    rows, judging = training.learnt(unit.fold), training.judging(unit.fold)
    outcomes = []
    for head in heads:
        studies = {}
        if head.study_level:
            studies = {"studies": training.studies[rows], "studies_val": training.studies[judging]}
        head.fit(
            training.X[rows],
            training.y[rows],
            X_val=training.X[judging],
            y_val=training.y[judging],
            **studies,
        )
        outcomes.append(_judge(training, unit.fold, head))
    return outcomes


_TRAINERS: dict[str | None, Any] = {
    None: _train_each,
    "bins": _train_trees,
    "cohort": _train_cohort,
    "path": _train_path,
}
"""How heads are fitted together, keyed by what they share; see `Head.shares`."""


def _projector(training: Training, unit: Unit) -> Projector:
    return Projector(
        training.X,
        training.learnt(unit.fold),
        n_covariates=training.n_covariates,
        known=unit.basis,
    )


def _judge(training: Training, fold: int, head: Head) -> FoldResult:
    judging = training.judging(fold)
    probability = predict(training, head, judging)
    value = study_score(training, judging, probability, per_study=head.study_level)
    return FoldResult(value, head.best_epoch_, 0.0)


def _judge_so_far(training: Training, fold: int, net: "Net") -> FoldResult:
    assert net.best_logits is not None
    probability = expit(net.best_logits.astype(np.float64))
    value = study_score(training, training.judging(fold), probability)
    return FoldResult(value, net.best_epoch or net.epoch, 0.0)


@dataclass(frozen=True)
class StoredNet:
    """The state of an MLP, its tensors in a safetensors file and the rest here."""

    path: Path
    rest: Mapping[str, Any]


def _keep_net(net: "Net", folder: Path | None) -> "Net | StoredNet":
    """Write a state to a file, whose way to the next process is shorter than by the parent."""
    if folder is None:
        return net
    from medembed.heads.mlp_network import TENSORS

    path, state = folder / uuid4().hex, net.__getstate__()
    lists = {name: state.pop(name) for name in TENSORS if state[name] is not None}
    arrays = {f"{name}.{k}": array for name, own in lists.items() for k, array in enumerate(own)}
    try:
        path.write_bytes(save(arrays))
    except OSError:  # the disk is full
        path.unlink(missing_ok=True)
        return net
    return StoredNet(path, state)


def _read_net(net: "Net | StoredNet") -> "Net":
    if not isinstance(net, StoredNet):
        return net
    from medembed.heads.mlp_network import TENSORS, Net

    arrays = load_file(net.path)
    state = dict(net.rest)
    for name in TENSORS:
        own = [key for key in arrays if key.startswith(f"{name}.")]
        if own:
            state[name] = [arrays[f"{name}.{k}"] for k in range(len(own))]
    found = Net.__new__(Net)
    found.__setstate__(state)
    return found


def seed_of_fold(seed: int, fold: int) -> int:
    """Return the 32-bit seed of a fold's random weights."""
    return int(np.random.SeedSequence([seed, fold]).generate_state(1)[0])


def _failure(error: Exception) -> FoldResult:
    from medembed.results.run_schema import describe_failure

    return FoldResult(None, None, 0.0, error=describe_failure(error))


def _timed(outcome: FoldResult, seconds: float) -> FoldResult:
    return replace(outcome, seconds=seconds)


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit numeric libraries to one thread: another order of sums would change the last digits."""
    torch = sys.modules.get("torch")
    n_before = torch.get_num_threads() if torch else 0
    with threadpool_limits(1), warnings.catch_warnings():
        # A configuration that converges badly is recognised by its score.
        warnings.simplefilter("ignore")
        if torch:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if torch:
                torch.set_num_threads(n_before)


def study_score(
    training: Training,
    rows: NDArray[np.int64],
    probability: NDArray[np.float64],
    *,
    per_study: bool = False,
) -> float:
    """Return the sweep's metric on the studies of some training rows; see `to_studies`.

    Raises
    ------
    TrainingDataError
        The metric is not estimable on these studies.
    """
    if not np.isfinite(probability).all():
        raise TrainingDataError("the predictions of some rows are not finite numbers")
    # (equal to `to_studies`, in a hundredth of the time of grouping a table)
    _, places = np.unique(training.studies[rows], return_inverse=True)
    y = (np.bincount(places, training.y[rows]) > 0).astype(np.int8)
    if not per_study:
        probability = np.bincount(places, probability) / np.bincount(places)
    found = score(y, probability, SELECTION_THRESHOLD)
    value = float(found[training.metric])
    if not np.isfinite(value):
        raise TrainingDataError(f"{training.metric} is not estimable on this fold")
    return value


def to_studies(
    training: Training,
    rows: NDArray[np.int64],
    probability: NDArray[np.float64],
    *,
    per_study: bool,
) -> pd.DataFrame:
    """Return one row per study for some of the training rows, see `by_study`.

    `probability` has one value per row, or, with `per_study`, per study of these rows in the order
    of their codes.
    """
    studies, y = training.studies[rows], training.y[rows]
    if per_study:
        studies, view_studies = np.unique(studies), studies
        known = pd.Series(y).groupby(view_studies, sort=True).max()
        y = known.to_numpy(np.int8)
    return by_study(pd.DataFrame({"study": studies, "label": y, "probability": probability}))
