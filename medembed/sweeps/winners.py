"""Choose each head's winner, refit it, package it, and let it predict."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medembed.cache.embeddings import Embeddings
from medembed.errors import RunError
from medembed.evaluation.calibration import fit_platt
from medembed.evaluation.intervals import plain
from medembed.evaluation.scores import score
from medembed.evaluation.thresholds import youden_threshold
from medembed.heads.base import Head
from medembed.heads.packaging import load_model, save_model
from medembed.results.comparison import score_run
from medembed.results.priors import PRIORS, image_code, image_rows, prior_rows
from medembed.results.runs import Run, utc_now
from medembed.sweeps.plan import Trial
from medembed.sweeps.pool import Died, Pool
from medembed.sweeps.training import Training, configure, one_thread, to_studies
from medembed.sweeps.trials import LOWER_IS_BETTER, Ledger

__all__ = ["Winner", "choose", "finish", "standings"]

Load = Callable[[str], tuple[Embeddings, Training]]


@dataclass(frozen=True)
class Winner:
    """The best configuration of one head, or why there is none.

    Attributes
    ----------
    pooling : str
        Its own; of a head without a winner those that were tried.
    budget : int, optional
        Epochs or trees of the refit: the median over folds of the best.
    """

    head: str
    pooling: str
    trial: int | None
    params: Mapping[str, Any] | None
    cv: float | None
    seconds: float
    error: str | None
    budget: int | None = None
    keys: tuple[str, ...] = ()

    def as_entry(self) -> dict[str, Any]:
        """Return the line of the leaderboard."""
        return {
            "head": self.head,
            "pooling": self.pooling,
            "trial": self.trial,
            "params": None if self.params is None else dict(self.params),
            "cv": self.cv,
            "seconds": round(self.seconds, 3),
            "status": "error" if self.trial is None else "ok",
            "error": self.error,
        }


def choose(ledger: Ledger, head: str, metric: str) -> Winner:
    """Take the configuration with the best mean over folds; of equals the first."""
    own = _trials(ledger, head)
    records = ledger.records
    seconds = sum(records[key]["seconds"] for trial in own for key in trial.keys)
    means = _means(ledger, own)
    if not means:
        found = [records[key]["error"] for trial in own for key in trial.keys]
        poolings = ",".join(dict.fromkeys(trial.pooling for trial in own))
        return Winner(head, poolings, None, None, None, seconds, next(filter(None, found)))
    sign = -1 if metric in LOWER_IS_BETTER else 1
    best = max(means, key=lambda number: sign * means[number])
    trial = next(trial for trial in own if trial.number == best)
    epochs = [records[key]["best_epoch"] for key in trial.keys]
    known = [epoch for epoch in epochs if epoch is not None]
    budget = max(1, round(float(np.median(known)))) if known else None
    return Winner(
        head,
        trial.pooling,
        best,
        trial.params,
        means[best],
        seconds,
        None,
        budget,
        trial.keys,
    )


def standings(ledger: Ledger, metric: str) -> list[dict[str, Any]]:
    """Return the leaderboard so far, best first, then heads without a finished configuration.

    One entry per head: ``head``, ``tried`` and ``total`` (configurations), ``best`` (mean over
    folds, or None), ``pooling`` and ``params`` of the best.
    """
    lines: list[dict[str, Any]] = []
    sign = -1 if metric in LOWER_IS_BETTER else 1
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
                "params": _telling_first(trial, own) if trial else None,
            }
        )
    return sorted(lines, key=lambda line: np.inf if line["best"] is None else -sign * line["best"])


def _telling_first(trial: Trial, others: Sequence[Trial]) -> dict[str, Any]:
    """Return a trial's parameters, those first that it does not share with all others."""
    params = trial.params
    varying = [k for k in params if any(o.params.get(k) != params[k] for o in others)]
    return {name: params[name] for name in dict.fromkeys([*varying, *params])}


def _trials(ledger: Ledger, head: str) -> list[Trial]:
    return [trial for batch in ledger.batches if batch.head == head for trial in batch.trials]


def _means(ledger: Ledger, trials: Iterable[Trial]) -> dict[int, float]:
    """Return the mean over folds of the configurations that went to the end on all of them."""
    means = {}
    for trial in trials:
        records = [ledger.records.get(key) for key in trial.keys]
        if all(record is not None and record["status"] == "ok" for record in records):
            means[trial.number] = float(np.mean([r["score"] for r in records if r is not None]))
    return means


def finish(
    run: Run,
    load: Load,
    row_folds: NDArray[Any],
    winners: Sequence[Winner],
    extras: Mapping[str, Any],
    jobs: int | None,
    backend: str,
) -> None:
    """Refit, package, predict and score; the scores are written last.

    `load` gives the embeddings and training rows of a pooling; `extras` go on every card.
    """
    metric = run.info["asked"]["metric"]
    sign = -1 if metric in LOWER_IS_BETTER else 1
    ordered = sorted(winners, key=lambda w: np.inf if w.cv is None else -sign * w.cv)
    if ordered[0].trial is None:
        reasons = "; ".join(f"{winner.head}: {winner.error}" for winner in ordered)
        raise RunError(f"every head failed in the run at {run.path}. {reasons}")
    run.drop_partial_models()
    parts = {}
    for pooling in dict.fromkeys(winner.pooling for winner in winners if winner.trial is not None):
        own = [winner for winner in ordered if winner.pooling == pooling and winner.keys]
        embeddings, training = load(pooling)
        with Pool(training, jobs, backend) as pool:
            for k, head in pool.run(_refit, own):
                if isinstance(head, Died):
                    raise RunError(f"the refit of {own[k].head} failed: {head.reason}")
                parts[own[k].head] = _predict(run, own[k], head, embeddings, training, extras)
    embeddings, _ = load(ordered[0].pooling)
    parts |= dict(zip(PRIORS, prior_rows(embeddings.rows, row_folds), strict=True))
    names = [*(winner.head for winner in ordered if winner.trial is not None), *PRIORS]
    run.write_predictions(pd.concat([parts[name] for name in names], ignore_index=True))
    leaderboard = [winner.as_entry() for winner in ordered]
    run.update_info(leaderboard=leaderboard, times={**run.info["times"], "ended": utc_now()})
    run.write_scores(score_run(run))


def _refit(training: Training, winner: Winner) -> Head:
    """Train a winner on all training rows; runs in a sweep's processes."""
    head = configure(training, winner.head, winner.params or {})
    if winner.budget is not None:
        head = head.with_budget(winner.budget)
    rows = np.flatnonzero(training.folds >= 0)
    studies = {"studies": training.studies[rows]} if head.study_level else {}
    with one_thread():
        head.fit(training.X[rows], training.y[rows], **studies)
    return head


def _predict(
    run: Run,
    winner: Winner,
    head: Head,
    embeddings: Embeddings,
    training: Training,
    extras: Mapping[str, Any],
) -> pd.DataFrame:
    """Save a refitted winner, and predict every row with what was saved."""
    path = run.model_path(winner.head)
    path.parent.mkdir(exist_ok=True)
    out_of_fold = _out_of_fold(run, winner, training, head.study_level)
    card = _card(run, winner, head, embeddings, training, out_of_fold) | dict(extras)
    with one_thread():
        save_model(path, head, card, replace=True)
        saved = load_model(path).head
        if saved.study_level:
            rows = _study_rows(embeddings, training)
            probability = saved.predict_proba(training.X, training.studies)[:, 1]  # type: ignore[call-arg]
        else:
            rows = image_rows(embeddings.rows, training.folds)
            probability = saved.predict_proba(training.X)[:, 1]
    trained = rows["fold"].notna().to_numpy()
    probability = np.asarray(probability, np.float64)
    probability[trained] = out_of_fold[trained]
    return rows.assign(head=winner.head, trial=winner.trial, probability=probability)


def _out_of_fold(
    run: Run, winner: Winner, training: Training, study_level: bool
) -> NDArray[np.float64]:
    """Return the winner's predictions on its held-out folds, one per row or study, else NaN."""
    n = int(training.studies.max()) + 1 if study_level else len(training.y)
    found = np.full(n, np.nan)
    for fold, key in enumerate(winner.keys):
        held = training.held(fold)
        found[np.unique(training.studies[held]) if study_level else held] = run.kept_fold(key)
    return found


def _study_rows(embeddings: Embeddings, training: Training) -> pd.DataFrame:
    """Return one row per study, by code; sha256 is empty."""
    images = image_rows(embeddings.rows, training.folds).assign(sha256="")
    studies = images.groupby("study", sort=True)
    rows = studies[["sha256", "region", "split", "patient"]].first()
    rows["label"] = images["label"].astype("Int8").groupby(images["study"]).max()
    rows["fold"] = studies["fold"].max()
    return rows.reset_index()


def _card(
    run: Run,
    winner: Winner,
    head: Head,
    embeddings: Embeddings,
    training: Training,
    out_of_fold: NDArray[np.float64],
) -> dict[str, Any]:
    """Say what the model wants, how its scores become decisions, and what it has seen."""
    trained = np.flatnonzero(training.folds >= 0)
    if head.study_level:
        known = out_of_fold[np.unique(training.studies[trained])]
    else:
        known = out_of_fold[trained]
    studies = to_studies(training, trained, known, per_study=head.study_level)
    y, raw = studies["label"].to_numpy(np.int8), studies["probability"].to_numpy()
    calibration = fit_platt(raw, y)
    threshold = youden_threshold(y, calibration.apply(raw))
    return {
        "spec": embeddings.spec.as_dict(),
        "pooling": embeddings.pooling,
        "label_level": embeddings.label_level,
        "views": "attention" if head.study_level else "mean",
        "calibration": calibration.as_dict(),
        "threshold": threshold,
        "metric": training.metric,
        "cv": winner.cv,
        "trial": winner.trial,
        "seed": training.seed,
        "scores": {"out_of_fold": plain(score(y, calibration.apply(raw), threshold))},
        "manifest": run.info["asked"]["manifest"],
        "synthetic": run.info["data"]["synthetic"],
        "training_images": sorted(
            {image_code(sha256) for sha256 in embeddings.rows["sha256"].iloc[trained]}
        ),
    }
