"""Train the trials missing from a run's ledger, batch by batch, and record each as it ends."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, islice
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
    StoredNet,
    Training,
    Unit,
    is_safe,
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
        _Schedule(waiting, ledger, bases, training, pool).run()


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
        for fold, basis in pool.run(learn_basis, items, is_safe=lambda _: is_safe(training)):
            # a process that died may die again during the trial, which then records the failure
            bases[fold] = {} if isinstance(basis, Died) else basis
    if all(bases):
        kept[key] = bases
    return bases


@dataclass
class _Cohort:
    """A batch in successive halving.

    Attributes
    ----------
    alive : list of int
        Its trials that are not retired.
    rungs : list of int
        The epochs after which the weaker half is retired that have not been reached.
    nets : dict of int to list
        By fold, the states of those alive, as `train_unit` returned them.
    seconds : dict of str to float
        By key, the seconds of the rungs so far.
    """

    batch: Batch
    alive: list[int]
    rungs: list[int]
    nets: dict[int, list[Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add_seconds(self, fold: int, outcomes: Sequence[FoldResult]) -> list[FoldResult]:
        """Return outcomes of the trials alive with the seconds of all rungs so far."""
        counted = []
        for i, outcome in zip(self.alive, outcomes, strict=True):
            key = self.batch.trials[i].keys[fold]
            self.seconds[key] = self.seconds.get(key, 0.0) + outcome.seconds
            counted.append(replace(outcome, seconds=self.seconds[key]))
        return counted

    def keep(self, found: Mapping[int, Sequence[FoldResult]], chosen: Sequence[int]) -> None:
        """Go on with those of the trials alive whose places are in `chosen`."""
        _discard(net for nets in self.nets.values() for net in nets)
        _discard(
            outcome.net
            for outcomes in found.values()
            for k, outcome in enumerate(outcomes)
            if k not in chosen
        )
        self.nets = {fold: [own[k].net for k in chosen] for fold, own in found.items()}
        self.alive = [self.alive[k] for k in chosen]
        self.rungs = self.rungs[1:]


def _discard(nets: Iterable[Any]) -> None:
    """Remove states that are kept in files."""
    for net in nets:
        if isinstance(net, StoredNet):
            net.path.unlink(missing_ok=True)


_RANKS: dict[str | None, int] = {"path": 0, "bins": 1, "cohort": 2}
"""What goes first, by what heads share: paths and trees end within seconds, so that a result is
there early; the rungs of a cohort wait for one another, but two cohorts fill each other's gaps."""


class _Schedule:
    """Trains batches on all folds.

    Cohorts train rung by rung, and after each the weaker half is retired on all folds: successive
    halving (Jamieson and Talwalkar, AISTATS 2016) over epochs. Trials are ranked at a rung by the
    mean over folds of the best epoch so far. Few cohorts train at a time, to bound the states that
    are kept between rungs.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        ledger: Ledger,
        bases: Sequence[Mapping[str, Basis]],
        training: Training,
        pool: Pool,
    ) -> None:
        self._ledger, self._bases, self._training, self._pool = ledger, bases, training, pool
        self._flat = [batch for batch in batches if not batch.rungs]
        self._cohorts = iter(
            _Cohort(batch, list(range(len(batch.trials))), list(batch.rungs))
            for batch in batches
            if batch.rungs
        )
        self._takers: dict[int, Callable[[Any], None]] = {}
        """What takes the result of an item of the pool, by its number."""

    def run(self) -> None:
        """Train to the end."""
        for cohort in islice(self._cohorts, max(2, -(-2 * self._pool.jobs // len(self._bases)))):
            self._send_rung(cohort)
        for part in count():  # the first configurations of all folds go before the second
            sent = [
                self._send_flat(batch, fold, part)
                for fold in range(len(self._bases))
                for batch in self._flat
            ]
            if not any(sent):
                break
        while self._takers:
            number, outcomes = self._pool.wait()
            self._takers.pop(number)(outcomes)

    def _send(self, unit: Unit, take: Callable[[Any], None], *, alone: bool = False) -> None:
        shares = head_class(unit.head).shares
        number = self._pool.submit(
            train_unit,
            unit,
            rank=_RANKS.get(shares, len(_RANKS)),
            alone=alone,
            safe=is_safe(self._training, unit.head),
        )
        self._takers[number] = take

    def _send_flat(self, batch: Batch, fold: int, part: int) -> bool:
        """Send a part of a batch for a fold; return False if there is no such part.

        A batch is one part, unless its configurations are independent and the table is small. Then
        those that bin alike are a part, the smallest first: a result is there sooner.
        """
        chosen = self._ledger.lacks(batch, fold)
        is_independent = head_class(batch.head).is_independent
        if is_independent and is_safe(self._training, batch.head):
            parts = sorted(_group_by_bins(batch, chosen), key=len)
            chosen = parts[part] if part < len(parts) else []
        elif part:
            return False
        elif chosen and not is_independent:
            chosen = list(range(len(batch.trials)))
        if not chosen:
            return False

        def take(outcomes: Any) -> None:
            if not (isinstance(outcomes, Died) and is_independent and len(chosen) > 1):
                _write_all(self._ledger, batch, fold, chosen, outcomes)
                return
            for i in chosen:  # one of them killed the process
                write = partial(_write_all, self._ledger, batch, fold, [i])
                self._send(_unit(batch, fold, [i], self._bases), write, alone=True)

        self._send(_unit(batch, fold, chosen, self._bases), take)
        return True

    def _send_rung(self, cohort: _Cohort) -> None:
        """Train a cohort on all folds up to its next rung; once all are in, send what follows."""
        until = cohort.rungs[0] if cohort.rungs else None
        found: dict[int, list[FoldResult]] = {}

        def take(fold: int, outcomes: Any) -> None:
            found[fold] = cohort.add_seconds(fold, _alive_or_dead(outcomes, len(cohort.alive)))
            if until is None:
                _write_all(self._ledger, cohort.batch, fold, cohort.alive, found[fold])
            if len(found) == len(self._bases):
                self._end_rung(cohort, until, found)

        for fold in range(len(self._bases)):
            unit = replace(
                _unit(cohort.batch, fold, cohort.alive, self._bases),
                until=until,
                nets=cohort.nets.get(fold),
                folder=self._pool.folder,
            )
            self._send(unit, partial(take, fold))

    def _end_rung(
        self, cohort: _Cohort, until: int | None, found: Mapping[int, Sequence[FoldResult]]
    ) -> None:
        chosen = []
        if until is not None:
            chosen = _retire(self._ledger, cohort.batch, cohort.alive, found, self._training.metric)
        cohort.keep(found, chosen)
        following = cohort if cohort.alive else next(self._cohorts, None)
        if following is not None:
            self._send_rung(following)


def _group_by_bins(batch: Batch, chosen: Sequence[int]) -> list[list[int]]:
    """Divide trials into those that share binned data."""
    names = head_class(batch.head).bin_params
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i in chosen:
        alike = tuple(batch.trials[i].params.get(name) for name in names)
        groups.setdefault(alike, []).append(i)
    return list(groups.values())


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
