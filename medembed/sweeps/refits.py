"""Train winners again: on all rows for their models, and fold by fold for clean scores.

Early stopping sees the rows that a trial is scored on, so its out-of-fold scores are a little too
good, and prediction sets that rest on them a little too small. A clean score comes from a winner
that is trained without the row's fold for as many epochs or trees as the *other* folds have found
best. Heads that do not stop early have clean scores already.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medembed.errors import RunError
from medembed.files import json_digest
from medembed.heads.base import Head
from medembed.heads.registry import head_class
from medembed.results.failures import describe_failure
from medembed.results.runs import Run
from medembed.sweeps.pool import Died, Pool
from medembed.sweeps.training import Training, configure, one_thread, predict
from medembed.sweeps.winners import Winner

__all__ = ["Refit", "Refitted", "gather_folds", "refit", "refit_winners"]

_Folds = Sequence[NDArray[np.float64]]


@dataclass(frozen=True)
class Refit:
    """One training of a winner.

    Attributes
    ----------
    head, params, budget
        Of the winner; without a budget it is trained as its parameters say.
    fold : int, optional
        The one to leave out and to predict; None trains on all.
    key : str
        Under which the run keeps the predictions of that fold.
    """

    head: str
    params: Mapping[str, Any]
    budget: int | None
    fold: int | None = None
    key: str = ""


@dataclass(frozen=True)
class Refitted:
    """A winner trained on all rows, and its predictions of every fold.

    Attributes
    ----------
    head : Head
    out_of_fold : float64 array of shape (n,)
        Of the trial: one per row, or per study by code where the head judges studies; NaN where
        not trained on.
    clean : float64 array or None
        The same, of trainings whose early stopping has not seen the row.
    error : str, optional
        Why there are none.
    """

    head: Head
    out_of_fold: NDArray[np.float64]
    clean: NDArray[np.float64] | None
    error: str | None = None


def refit_winners(
    run: Run, training: Training, winners: Sequence[Winner], jobs: int | None, backend: str
) -> dict[str, Refitted]:
    """Train winners of one pooling on all rows, and where their scores are not clean on the folds.

    What a fold's training predicts is kept in the run as soon as it is there, so that the same
    sweep, asked again, does not repeat it.

    Parameters
    ----------
    run : Run
        Locked; it keeps the trials' predictions of their folds.
    winners : sequence of Winner
        Those that are.
    jobs, backend
        As `Pool` takes them.

    Returns
    -------
    dict of str to Refitted
        By name of the head.

    Raises
    ------
    RunError
        A refit on all rows failed, or its process died. Where a fold is left out neither is an
        error: prediction sets are no reason to lose a sweep.
    """
    wholes = [Refit(own.head, own.params or {}, own.budget) for own in winners]
    parts = {own.head: _plan_folds(own) for own in winners}
    kept = {part.key: run.kept_fold(part.key) for own in parts.values() for part in own}
    lacking = [p for own in parts.values() for p in own if not _is_whole(training, p, kept[p.key])]
    heads: dict[str, Head] = {}
    failed: dict[str, str] = {}
    items = [*wholes, *lacking]
    with Pool(training, jobs, backend) as pool:
        for k, result in pool.run(refit, items):
            item = items[k]
            if isinstance(result, Died):
                if item.fold is None:
                    raise RunError(
                        f"the refit of {item.head} on all training rows failed: {result.reason}. "
                        "The same command tries it again; without that head give another --out."
                    )
                failed[item.head] = result.reason
            elif item.fold is None:
                heads[item.head] = result
            else:
                kept[item.key] = result
                run.keep_fold(item.key, result)
    found = {}
    for own in winners:
        name = own.head
        of_trial = gather_folds(training, name, [_known(run.kept_fold(key)) for key in own.keys])
        clean = None if name in failed else of_trial
        if parts[name] and clean is not None:
            clean = gather_folds(training, name, [_known(kept[p.key]) for p in parts[name]])
        found[name] = Refitted(heads[name], of_trial, clean, failed.get(name))
    return found


def refit(training: Training, item: Refit) -> Any:
    """Train once; return the head, or its predictions of the fold left out. Runs in a process.

    What goes wrong is returned as `Died`: raised in a process, it would be taken for the end of
    that process, and all that ran beside it would begin again.
    """
    try:
        if item.fold is None:
            return _train(training, item, np.flatnonzero(training.folds >= 0))
        head = _train(training, item, training.others(item.fold))
        with one_thread():
            found = predict(training, head, training.held(item.fold))
    except Exception as error:
        return Died(describe_failure(error))
    return found if np.isfinite(found).all() else Died("its predictions are no finite numbers")


def gather_folds(training: Training, head: str, folds: _Folds) -> NDArray[np.float64]:
    """Put predictions of each fold in their rows' places, see `Refitted.out_of_fold`."""
    per_study = head_class(head).study_level
    n = int(training.studies.max()) + 1 if per_study else len(training.y)
    found = np.full(n, np.nan)
    for fold, values in enumerate(folds):
        held = training.held(fold)
        found[np.unique(training.studies[held]) if per_study else held] = values
    return found


def _train(training: Training, item: Refit, rows: NDArray[np.int64]) -> Head:
    head = configure(training, item.head, item.params)
    if item.budget is not None:
        head = head.with_budget(item.budget)
    studies = {"studies": training.studies[rows]} if head.study_level else {}
    with one_thread():
        head.fit(training.X[rows], training.y[rows], **studies)
    return head


def _plan_folds(winner: Winner) -> list[Refit]:
    """Plan the trainings behind clean scores; none of a head without epochs or trees."""
    return [
        Refit(
            winner.head,
            winner.params or {},
            budget,
            fold,
            json_digest(["clean", winner.keys[fold], budget])[:32],
        )
        for fold, budget in enumerate(winner.fold_budgets)
    ]


def _is_whole(training: Training, part: Refit, kept: NDArray[np.float64] | None) -> bool:
    assert part.fold is not None
    held = training.held(part.fold)
    wanted = np.unique(training.studies[held]) if head_class(part.head).study_level else held
    return kept is not None and len(kept) == len(wanted)


def _known(kept: NDArray[np.float64] | None) -> NDArray[np.float64]:
    assert kept is not None
    return kept
