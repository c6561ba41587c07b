"""Choose each head's winner, and rank the heads."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from medembed.sweeps.data import Trial
from medembed.sweeps.runner import Ledger, sign_of

__all__ = ["Standing", "Winner", "choose", "standings"]


@dataclass(frozen=True)
class Winner:
    """The best configuration of one head, or the reason for its absence.

    Attributes
    ----------
    pooling : str
        The winner's pooling; all poolings tried if the head has no winner.
    score : float, optional
        The score it was chosen by: the mean over folds on the patients that judged its trial.
    n_tried : int
        Number of configurations it was chosen from, over all poolings.
    fold_budgets : tuple of (int or None)
        For each fold the best number of epochs or trees; None for heads without a budget.
    keys : tuple of str
        The trial's key on each fold.
    cv : float, optional
        Mean score over folds when trained on all other folds; None before the refit.
    """

    head: str
    pooling: str
    trial: int | None
    params: Mapping[str, Any] | None
    seconds: float
    error: str | None
    n_tried: int
    score: float | None = None
    fold_budgets: tuple[int | None, ...] = ()
    keys: tuple[str, ...] = ()
    cv: float | None = None

    @property
    def budget(self) -> int | None:
        """Epochs or trees of the refit on all rows: the median over folds."""
        found = [budget for budget in self.fold_budgets if budget is not None]
        return max(1, round(float(np.median(found)))) if found else None

    def as_entry(self) -> dict[str, Any]:
        """Return the winner's row of the leaderboard."""
        return {
            "head": self.head,
            "pooling": self.pooling,
            "trial": self.trial,
            "params": None if self.params is None else dict(self.params),
            "cv": self.cv,
            "seconds": round(self.seconds, 3),
            "status": "ok" if self.error is None else "error",
            "error": self.error,
            "chosen_by": self.score,
            "n_tried": self.n_tried,
            "budget": self.budget,
            "fold_budgets": list(self.fold_budgets) if self.budget is not None else None,
        }


def choose(ledger: Ledger, head: str, metric: str, pooling: str | None = None) -> Winner:
    """Return the configuration with the best mean over folds; among equals the first.

    With `pooling`, of its configurations on that pooling alone.
    """
    own = [trial for trial in _trials(ledger, head) if pooling in (None, trial.pooling)]
    records = ledger.records
    seconds = sum(records[key].seconds for trial in own for key in trial.keys)
    means = _means(ledger, own)
    if not means:
        found = [records[key].error for trial in own for key in trial.keys]
        poolings = ",".join(dict.fromkeys(trial.pooling for trial in own))
        error = next(filter(None, found))
        return Winner(head, poolings, None, None, seconds, error, n_tried=len(own))
    sign = sign_of(metric)
    best = max(means, key=lambda number: sign * means[number])
    trial = next(trial for trial in own if trial.number == best)
    return Winner(
        head,
        trial.pooling,
        best,
        trial.params,
        seconds,
        None,
        n_tried=len(own),
        score=means[best],
        fold_budgets=tuple(records[key].best_epoch for key in trial.keys),
        keys=trial.keys,
    )


class Standing(TypedDict):
    """A head's row of the leaderboard so far."""

    head: str
    tried: int
    total: int
    """Of configurations."""
    best: float | None
    """Mean over the folds."""
    pooling: str | None
    """Of the best, as `params`."""
    params: Mapping[str, object] | None


def standings(ledger: Ledger, metric: str) -> list[Standing]:
    """Return the leaderboard so far, best first, then heads without a finished configuration.

    One entry per head.
    """
    lines: list[Standing] = []
    sign = sign_of(metric)
    for head in dict.fromkeys(batch.head for batch in ledger.batches):
        own = _trials(ledger, head)
        tried = sum(all(key in ledger.done for key in trial.keys) for trial in own)
        means = _means(ledger, own)
        best = max(means, key=lambda number: sign * means[number]) if means else None
        trial = next((trial for trial in own if trial.number == best), None)
        lines.append(
            {
                "head": head,
                "tried": tried,
                "total": len(own),
                "best": None if best is None else means[best],
                "pooling": trial.pooling if trial else None,
                "params": _distinct_params_first(trial, own) if trial else None,
            }
        )
    return sorted(lines, key=lambda line: np.inf if line["best"] is None else -sign * line["best"])


def _distinct_params_first(trial: Trial, others: Sequence[Trial]) -> dict[str, Any]:
    """Return a trial's parameters, starting with those that differ between trials."""
    params = trial.params
    varying = [k for k in params if any(o.params.get(k) != params[k] for o in others)]
    return {name: params[name] for name in dict.fromkeys([*varying, *params])}


def _trials(ledger: Ledger, head: str) -> list[Trial]:
    return [trial for batch in ledger.batches if batch.head == head for trial in batch.trials]


def _means(ledger: Ledger, trials: Iterable[Trial]) -> dict[int, float]:
    """Return the mean over folds of every configuration that finished on all folds."""
    means = {}
    for trial in trials:
        records = [ledger.records.get(key) for key in trial.keys]
        scores = [r.score for r in records if r is not None and r.status == "ok"]
        if len(scores) == len(records):
            means[trial.number] = float(np.mean(np.array(scores, np.float64)))
    return means
