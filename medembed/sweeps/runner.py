"""Train the trials missing from a run's ledger, batch by batch, and record each as it ends."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from medembed.heads.registry import head_class, make_head
from medembed.heads.scaling import Basis
from medembed.results.run_schema import TrialRecord, is_final
from medembed.results.runs import Run
from medembed.sweeps.data import Batch, Trial
from medembed.sweeps.training import (
    Bases,
    FoldResult,
    Training,
    Unit,
    learn_basis,
    train_unit,
)
from medembed.sweeps.worker_pool import Died, Pool

__all__ = ["Ledger", "run_batches", "sign_of"]

LOWER_IS_BETTER = ("brier", "ece")

RETIRED = "retired"
"""Status of a trial that was retired at a rung; its score is that of its best epoch so far."""

MIN_SURVIVORS = 2
"""Trials of a cohort, of any size, that train to the end; the final choice is among them."""


def sign_of(metric: str) -> int:
    """Return -1 for a metric of which lower values are better, else 1."""
    return -1 if metric in LOWER_IS_BETTER else 1


class Ledger:
    """The record of a run's trials.

    Parameters
    ----------
    run : Run
        The run, locked by this process.
    batches : sequence of Batch
        All batches of the sweep.
    watch : callable, optional
        Called with the ledger after every record.
    """

    def __init__(
        self,
        run: Run,
        batches: Sequence[Batch],
        watch: Callable[["Ledger"], None] | None = None,
    ) -> None:
        self.run, self.batches, self._watch = run, batches, watch
        self.records = {record.key: record for record in run.trial_records()}
        wanted = {key for batch in batches for trial in batch.trials for key in trial.keys}
        self.n_wanted = len(wanted)
        self.done = {key for key in wanted if self._is_done(key)}
        again = (wanted & set(self.records)) - self.done
        if again:
            run.forget_trials(again)
        self._notify()

    def _is_done(self, key: str) -> bool:
        record = self.records.get(key)
        if record is None:
            return False
        return record.status in ("ok", RETIRED) or is_final(record.error)

    def write(self, trial: Trial, fold: int, outcome: FoldResult, status: str) -> None:
        """Record a trial's outcome on a fold, unless it is already recorded."""
        key = trial.keys[fold]
        if key in self.done:
            return
        record = TrialRecord(
            trial=trial.number,
            head=trial.head,
            pooling=trial.pooling,
            params=dict(trial.params),
            fold=fold,
            score=outcome.score,
            best_epoch=outcome.best_epoch,
            seconds=outcome.seconds,
            status=status,
            error=outcome.error,
            key=key,
        )
        self.run.append_trial(record)
        self.records[key] = record
        self.done.add(key)
        self._notify()

    def lacks(self, batch: Batch, fold: int) -> list[int]:
        """Return the trials of a batch that are not done on a fold."""
        return [i for i, trial in enumerate(batch.trials) if trial.keys[fold] not in self.done]

    def _notify(self) -> None:
        if self._watch is not None:
            self._watch(self)


def run_batches(
    ledger: Ledger,
    batches: Sequence[Batch],
    training: Training,
    n_folds: int,
    jobs: int | None,
    backend: str,
    kept: Bases | None = None,
) -> None:
    """Train the missing trials of batches that read the same columns.

    Scalings and components are taken from `kept`, and kept there for the next target.
    """
    waiting = [
        batch for batch in batches if any(ledger.lacks(batch, fold) for fold in range(n_folds))
    ]
    if not waiting:
        return
    with Pool(training, jobs, backend) as pool:
        bases = _learn_bases(waiting, training, n_folds, pool, {} if kept is None else kept)
        _run_flat([batch for batch in waiting if not batch.rungs], ledger, bases, pool)
        halving = [batch for batch in waiting if batch.rungs]
        size = max(1, -(-2 * pool.jobs // n_folds))  # enough for every process, twice
        for start in range(0, len(halving), size):
            _run_halving(halving[start : start + size], ledger, bases, training.metric, pool)


def _learn_bases(
    batches: Sequence[Batch], training: Training, n_folds: int, pool: Pool, kept: Bases
) -> list[Mapping[str, Basis]]:
    """Return, for each fold, the scalings and components that several heads use."""
    wanted: dict[str, int] = {}
    spans: set[str] = set()
    for batch in batches:
        for trial in batch.trials:
            for scaling, pca in make_head(trial.head, trial.params).find_bases():
                wanted[scaling] = max(pca, wanted.get(scaling, 0))
                if not pca and head_class(trial.head).uses_span:
                    spans.add(scaling)
    key = (batches[0].pooling, *sorted(wanted.items()), *sorted(spans))
    if key in kept:
        return kept[key]
    bases: list[Mapping[str, Basis]] = [{} for _ in range(n_folds)]
    if wanted:
        items = [(fold, wanted, sorted(spans)) for fold in range(n_folds)]
        for fold, basis in pool.run(learn_basis, items):
            # a process that died may die again during the trial, which then records the failure
            bases[fold] = {} if isinstance(basis, Died) else basis
    if all(bases):
        kept[key] = bases
    return bases


def _run_flat(
    batches: Sequence[Batch], ledger: Ledger, bases: Sequence[Mapping[str, Basis]], pool: Pool
) -> None:
    """Train each batch on each fold to its end."""
    jobs: list[tuple[Batch, int, list[int]]] = []
    for fold in range(len(bases)):
        for batch in batches:
            lacking = ledger.lacks(batch, fold)
            if lacking:
                alone = head_class(batch.head).is_independent
                jobs.append((batch, fold, lacking if alone else list(range(len(batch.trials)))))
    units = [_unit(batch, fold, chosen, bases) for batch, fold, chosen in jobs]
    dead = []
    for n, outcomes in pool.run(train_unit, units):
        batch, fold, chosen = jobs[n]
        is_independent = head_class(batch.head).is_independent
        if isinstance(outcomes, Died) and is_independent and len(chosen) > 1:
            dead += [(batch, fold, [i]) for i in chosen]
            continue
        _write_all(ledger, batch, fold, chosen, outcomes)
    units = [_unit(batch, fold, chosen, bases) for batch, fold, chosen in dead]
    for n, outcomes in pool.run(train_unit, units, suspected=True):
        batch, fold, chosen = dead[n]
        _write_all(ledger, batch, fold, chosen, outcomes)


def _unit(
    batch: Batch, fold: int, chosen: Sequence[int], bases: Sequence[Mapping[str, Basis]]
) -> Unit:
    return Unit(
        batch.head,
        tuple(batch.trials[i].params for i in chosen),
        fold,
        basis=bases[fold],
    )


def _write_all(
    ledger: Ledger, batch: Batch, fold: int, chosen: Sequence[int], outcomes: Any
) -> None:
    for i, outcome in zip(chosen, _alive_or_dead(outcomes, len(chosen)), strict=True):
        ledger.write(batch.trials[i], fold, outcome, "error" if outcome.error else "ok")


def _alive_or_dead(outcomes: Any, n: int) -> list[FoldResult]:
    if isinstance(outcomes, Died):
        return [FoldResult(None, None, 0.0, error=outcomes.reason)] * n
    return list(outcomes)


def _run_halving(
    batches: Sequence[Batch],
    ledger: Ledger,
    bases: Sequence[Mapping[str, Basis]],
    metric: str,
    pool: Pool,
) -> None:
    """Train batches rung by rung; after each the weaker half of a batch is retired on all folds.

    Successive halving (Jamieson and Talwalkar, AISTATS 2016) over epochs; trials are ranked at a
    rung by the mean over folds of the best epoch so far.
    """
    folds = range(len(bases))
    alive = {n: list(range(len(batch.trials))) for n, batch in enumerate(batches)}
    nets: dict[tuple[int, int], list[Any] | None] = {}
    seconds: dict[str, float] = {}
    rungs = batches[0].rungs  # set by the space, so equal for all batches
    for until in [*rungs, None]:
        jobs = [(n, fold) for n in alive if alive[n] for fold in folds]
        units = [
            Unit(
                batches[n].head,
                tuple(batches[n].trials[i].params for i in alive[n]),
                fold,
                until,
                nets.get((n, fold)),
                bases[fold],
            )
            for n, fold in jobs
        ]
        nets.clear()
        found: dict[tuple[int, int], list[FoldResult]] = {}
        for k, outcomes in pool.run(train_unit, units):
            n, fold = jobs[k]
            found[n, fold] = [
                _add_seconds(outcome, seconds, batches[n].trials[i].keys[fold])
                for i, outcome in zip(
                    alive[n], _alive_or_dead(outcomes, len(alive[n])), strict=True
                )
            ]
            if until is None:
                _write_all(ledger, batches[n], fold, alive[n], found[n, fold])
        if until is not None:
            for n in alive:
                own = {fold: found[n, fold] for fold in folds if (n, fold) in found}
                kept = _retire(ledger, batches[n], alive[n], own, metric)
                for fold, outcomes in own.items():
                    nets[n, fold] = [outcomes[k].net for k in kept]
                alive[n] = [alive[n][k] for k in kept]


def _retire(
    ledger: Ledger,
    batch: Batch,
    alive: Sequence[int],
    found: Mapping[int, Sequence[FoldResult]],
    metric: str,
) -> list[int]:
    """Return the indices in `alive` of the trials that continue; record the others."""
    sign = sign_of(metric)
    means: dict[int, float] = {}
    for k in range(len(alive)):
        scores = [outcomes[k].score for outcomes in found.values()]
        if None not in scores:
            means[k] = sign * float(np.mean([score for score in scores if score is not None]))
    n_kept = max(MIN_SURVIVORS, -(-len(alive) // 2))
    best = sorted(means, key=lambda k: -means[k])[:n_kept]
    for k, i in enumerate(alive):
        if k in best:
            continue
        for fold, outcomes in found.items():
            status = "error" if outcomes[k].error else RETIRED
            ledger.write(batch.trials[i], fold, outcomes[k], status)
    return sorted(best)


def _add_seconds(outcome: FoldResult, seconds: dict[str, float], key: str) -> FoldResult:
    seconds[key] = seconds.get(key, 0.0) + outcome.seconds
    return replace(outcome, seconds=seconds[key])
