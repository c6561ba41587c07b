"""Choose each head's winner, refit it, package it, and let it predict."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medembed.cache.embeddings import Embeddings
from medembed.errors import RunError
from medembed.evaluation.calibration import fit_platt, youden_threshold
from medembed.evaluation.intervals import plain
from medembed.evaluation.scores import score
from medembed.heads.baselines import ClassPrior, RegionPrior
from medembed.heads.packaging import load_model, save_model
from medembed.heads.registry import make_head
from medembed.results.comparison import compare_runs
from medembed.results.runs import Run, utc_now
from medembed.sweeps.trials import Task, Training, one_thread, to_studies

__all__ = ["Winner", "choose", "finish"]

LOWER_IS_BETTER = ("brier", "ece")
BASELINES = {"class-prior": ClassPrior, "region-prior": RegionPrior}


@dataclass(frozen=True)
class Winner:
    """The best configuration of one head, or why there is none."""

    head: str
    trial: int | None
    params: dict[str, Any] | None
    cv: float | None
    seconds: float
    error: str | None
    budget: int | None = None
    out_of_fold: NDArray[np.float64] | None = None

    def as_entry(self, pooling: str) -> dict[str, Any]:
        """Return the line of the leaderboard."""
        return {
            "head": self.head,
            "pooling": pooling,
            "trial": self.trial,
            "params": self.params,
            "cv": self.cv,
            "seconds": round(self.seconds, 3),
            "status": "error" if self.trial is None else "ok",
            "error": self.error,
        }


def choose(
    run: Run,
    head: str,
    tasks: Sequence[Task],
    records: Mapping[str, Mapping[str, Any]],
    training: Training,
    metric: str,
) -> Winner:
    """Take the configuration with the best mean over folds; of equals the first."""
    own = [task for task in tasks if task.head == head]
    seconds = sum(records[task.key]["seconds"] for task in own)
    trials: dict[int, list[Task]] = {}
    for task in own:
        trials.setdefault(task.trial, []).append(task)
    sign = -1 if metric in LOWER_IS_BETTER else 1
    means = {
        trial: float(np.mean([records[task.key]["score"] for task in folds]))
        for trial, folds in trials.items()
        if all(records[task.key]["status"] == "ok" for task in folds)
    }
    if not means:
        errors = [str(records[task.key]["error"]) for task in own if records[task.key]["error"]]
        return Winner(head, None, None, None, seconds, errors[0])
    best = max(means, key=lambda trial: sign * means[trial])
    out_of_fold = np.empty(len(training.y))
    for task in trials[best]:
        out_of_fold[training.rows_of(task.fold)] = run.kept_fold(task.key)
    epochs = [records[task.key]["best_epoch"] for task in trials[best]]
    known = [epoch for epoch in epochs if epoch is not None]
    budget = max(1, round(float(np.median(known)))) if known else None
    params = trials[best][0].params
    return Winner(head, best, params, means[best], seconds, None, budget, out_of_fold)


def finish(
    run: Run,
    embeddings: Embeddings,
    training: Training,
    row_folds: NDArray[Any],
    winners: Sequence[Winner],
    settings: Mapping[str, Any],
) -> None:
    """Refit, package, predict and score; the scores are written last."""
    sign = -1 if settings["metric"] in LOWER_IS_BETTER else 1
    ordered = sorted(winners, key=lambda w: np.inf if w.cv is None else -sign * w.cv)
    if ordered[0].trial is None:
        reasons = "; ".join(f"{winner.head}: {winner.error}" for winner in ordered)
        raise RunError(f"every head failed in the run at {run.path}. {reasons}")
    base = _prediction_rows(embeddings, row_folds)
    parts = []
    for winner in ordered:
        if winner.trial is not None:
            probability = _refit(run, winner, embeddings, training, settings)
            probability[row_folds >= 0] = winner.out_of_fold
            parts.append(base.assign(head=winner.head, trial=winner.trial, probability=probability))
    for name in BASELINES:
        probability = _predict_prior(name, embeddings, row_folds)
        parts.append(base.assign(head=name, trial=None, probability=probability))
    run.write_predictions(pd.concat(parts, ignore_index=True))
    leaderboard = [winner.as_entry(embeddings.pooling) for winner in ordered]
    times = {**run.info["times"], "ended": utc_now()}
    run.update_info(leaderboard=leaderboard, times=times)
    run.write_scores(compare_runs([run]))
    run.drop_folds()


def _prediction_rows(embeddings: Embeddings, row_folds: NDArray[Any]) -> pd.DataFrame:
    rows = embeddings.rows[["sha256", "region", "label", "split"]].copy()
    rows["patient"] = pd.factorize(embeddings.patients, sort=True)[0]
    rows["study"] = pd.factorize(embeddings.studies, sort=True)[0]
    rows["fold"] = pd.array(row_folds, dtype="Int16")
    rows.loc[row_folds < 0, "fold"] = pd.NA
    return rows


def _refit(
    run: Run,
    winner: Winner,
    embeddings: Embeddings,
    training: Training,
    settings: Mapping[str, Any],
) -> NDArray[np.float64]:
    """Train the winner on all of train, save it, and predict every row with what was saved."""
    head = make_head(winner.head, winner.params or {}, seed=settings["seed"])
    if winner.budget is not None:
        head = head.with_budget(winner.budget)
    path = run.model_path(winner.head)
    path.parent.mkdir(exist_ok=True)
    with one_thread():
        head.fit(training.X, training.y)
        save_model(path, head, _card(run, winner, embeddings, training, settings), replace=True)
        saved = load_model(path).head
        return np.asarray(saved.predict_proba(embeddings.X)[:, 1], np.float64)


def _card(
    run: Run,
    winner: Winner,
    embeddings: Embeddings,
    training: Training,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Say what the model wants, how its scores become decisions, and what it has seen."""
    assert winner.out_of_fold is not None
    studies = to_studies(training, np.ones(len(training.y), bool), winner.out_of_fold)
    y, raw = studies["label"].to_numpy(np.int8), studies["probability"].to_numpy()
    calibration = fit_platt(raw, y)
    threshold = youden_threshold(y, calibration.apply(raw))
    hashes = embeddings.rows["sha256"][
        (embeddings.rows["split"] == "train").to_numpy() & (embeddings.y >= 0)
    ]
    return {
        "spec": embeddings.spec.as_dict(),
        "pooling": embeddings.pooling,
        "label_level": embeddings.label_level,
        "views": "mean",
        "calibration": calibration.as_dict(),
        "threshold": threshold,
        "metric": settings["metric"],
        "cv": winner.cv,
        "trial": winner.trial,
        "seed": settings["seed"],
        "scores": {"out_of_fold": plain(score(y, calibration.apply(raw), threshold))},
        "manifest": run.info["asked"]["manifest"],
        "synthetic": run.info["data"]["synthetic"],
        "training_images": sorted({_image_code(sha256) for sha256 in hashes}),
    }


def _image_code(sha256: str) -> str:
    """Hash an image's hash, so that the card tells its owner, and nobody else, what it has seen."""
    return hashlib.sha256(bytes.fromhex(sha256)).hexdigest()[:16]


def _predict_prior(
    name: str, embeddings: Embeddings, row_folds: NDArray[Any]
) -> NDArray[np.float64]:
    regions, y, trained = embeddings.regions, embeddings.y, row_folds >= 0
    fitted = BASELINES[name]().fit(regions[trained], y[trained])
    found = fitted.predict_proba(regions)[:, 1]
    for fold in np.unique(row_folds[trained]):
        held, others = row_folds == fold, trained & (row_folds != fold)
        fitted = BASELINES[name]().fit(regions[others], y[others])
        found[held] = fitted.predict_proba(regions[held])[:, 1]
    # Half of float64's digits stay free, so that the mean over equal views is that very number:
    # rounding in the mean would otherwise rank studies by their number of views.
    return np.asarray(found, np.float32).astype(np.float64)
