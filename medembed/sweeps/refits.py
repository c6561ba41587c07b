"""Train winners again: on all rows for their models, and without each fold for its scores.

A trial has learnt from a part of the other folds' patients, and the rest of them has judged it. Its
head is trained anew on all of them, for as many epochs or trees as that rest has found best, and
predicts the fold, which no decision has seen. Those predictions are what a head is judged by, and
what calibration, thresholds and prediction sets rest on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medembed.core.errors import RunError, TrainingDataError
from medembed.core.files import json_digest
from medembed.heads.base import Head
from medembed.heads.registry import head_class
from medembed.results.failures import describe_failure, is_final
from medembed.results.runs import Run
from medembed.sweeps.pool import Died, Pool
from medembed.sweeps.selection import Winner
from medembed.sweeps.training import Training, configure, one_thread, predict, study_score

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
    """A winner trained on all rows, and what it predicts of every fold when that is left out.

    Attributes
    ----------
    head : Head
    out_of_fold : float64 array of shape (n,)
        One per row, or per study by code where the head judges studies; NaN if left out.
    cv : float
        Mean over folds of the sweep's metric.
    """

    head: Head
    out_of_fold: NDArray[np.float64]
    cv: float


def refit_winners(
    run: Run, training: Training, winners: Sequence[Winner], jobs: int | None, backend: str
) -> dict[str, Refitted | str]:
    """Train winners of one pooling on all rows, and without each fold.

    What a fold's training predicts is kept in the run as soon as it is there, so that the same
    sweep, asked again, does not repeat it.

    Parameters
    ----------
    run : Run
        Locked.
    winners : sequence of Winner
        Those that are.
    jobs, backend
        As `Pool` takes them.

    Returns
    -------
    dict of str to Refitted or str
        By name of the head; or why it cannot be trained again, which would come again.

    Raises
    ------
    RunError
        A training failed, or its process died, for a reason that need not come again.
    """
    parts = {own.head: _plan_folds(own) for own in winners}
    kept = {part.key: run.kept_fold(part.key) for own in parts.values() for part in own}
    lacking = [p for own in parts.values() for p in own if not _is_whole(training, p, kept[p.key])]
    heads: dict[str, Head] = {}
    failed: dict[str, str] = {}
    wholes = [Refit(own.head, own.params or {}, own.budget) for own in winners]
    items = [*wholes, *lacking]
    with Pool(training, jobs, backend) as pool:
        for k, result in pool.run(refit, items):
            item = items[k]
            if isinstance(result, Died):
                failed[item.head] = _explain(item, result)
            elif item.fold is None:
                heads[item.head] = result
            else:
                kept[item.key] = result
                run.keep_fold(item.key, result)
    found: dict[str, Refitted | str] = dict(failed)
    for name, own in parts.items():
        if name not in failed:
            folds = [_known(kept[part.key]) for part in own]
            try:
                cv = float(np.mean([_score(training, p, kept[p.key]) for p in own]))
            except TrainingDataError as error:
                found[name] = describe_failure(error)
                continue
            found[name] = Refitted(heads[name], gather_folds(training, name, folds), cv)
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
    head = configure(training, item.head, item.params, item.fold)
    if item.budget is not None:
        head = head.with_budget(item.budget)
    studies = {"studies": training.studies[rows]} if head.study_level else {}
    with one_thread():
        head.fit(training.X[rows], training.y[rows], **studies)
    return head


def _explain(item: Refit, died: Died) -> str:
    """Return why a training failed; RunError where the next one may not."""
    if is_final(died.reason):
        return died.reason
    rows = "on all training rows" if item.fold is None else f"without fold {item.fold}"
    raise RunError(
        f"the refit of {item.head} {rows} failed: {died.reason}. The same command tries it again; "
        "without that head give another --out."
    )


def _plan_folds(winner: Winner) -> list[Refit]:
    """Plan the trainings behind out-of-fold scores."""
    return [
        Refit(
            winner.head,
            winner.params or {},
            budget,
            fold,
            json_digest(["fold", winner.keys[fold], budget])[:32],
        )
        for fold, budget in enumerate(winner.fold_budgets)
    ]


def _score(training: Training, part: Refit, kept: NDArray[np.float64] | None) -> float:
    assert part.fold is not None
    per_study = head_class(part.head).study_level
    return study_score(training, training.held(part.fold), _known(kept), per_study=per_study)


def _is_whole(training: Training, part: Refit, kept: NDArray[np.float64] | None) -> bool:
    assert part.fold is not None
    held = training.held(part.fold)
    wanted = np.unique(training.studies[held]) if head_class(part.head).study_level else held
    return kept is not None and len(kept) == len(wanted)


def _known(kept: NDArray[np.float64] | None) -> NDArray[np.float64]:
    assert kept is not None
    return kept
