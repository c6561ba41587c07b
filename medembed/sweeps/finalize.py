"""The sweep's end: winners are refitted and packaged, predict every row, and are scored once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medembed.cache.embeddings import Embeddings
from medembed.core.errors import RunError
from medembed.evaluation.drift.reference import fit_reference
from medembed.evaluation.thresholds import ThresholdRule
from medembed.heads.packaging import load_model, save_model
from medembed.results.comparison import score_run
from medembed.results.model_card import describe_decisions
from medembed.results.model_readme import (
    complete_cards,
    count_trained,
    describe_encoder,
    describe_use,
    write_readme,
)
from medembed.results.predictions import PRIORS, image_code, image_rows, prior_rows
from medembed.results.run_schema import CV_METHOD
from medembed.results.runs import Run, utc_now
from medembed.sweeps.refits import Refitted, refit_winners
from medembed.sweeps.runner import sign_of
from medembed.sweeps.selection import Winner
from medembed.sweeps.training import Training, one_thread, predict, to_studies

__all__ = ["finish"]

Load = Callable[[str], tuple[Embeddings, Training]]


def finish(
    run: Run,
    load: Load,
    row_folds: NDArray[Any],
    winners: Sequence[Winner],
    extras: Mapping[str, Any],
    points: Sequence[ThresholdRule],
    jobs: int | None,
    backend: str,
) -> None:
    """Refit, package, predict and score; the scores are written last.

    `load` gives the embeddings and training rows of a pooling; `extras` go on every card;
    `points` are operating points beside the usual ones.
    """
    run.drop_partial_models()
    _refuse_failures(run, winners)
    parts, ended = {}, {winner.head: winner for winner in winners}
    for pooling in dict.fromkeys(winner.pooling for winner in winners if winner.keys):
        own = [winner for winner in winners if winner.pooling == pooling and winner.keys]
        embeddings, training = load(pooling)
        refitted = refit_winners(run, training, own, jobs, backend)
        reference = _summarise(embeddings, training)
        for winner in own:
            found = refitted[winner.head]
            if isinstance(found, str):
                ended[winner.head] = replace(winner, trial=None, error=found)
                continue
            winner = ended[winner.head] = replace(winner, cv=found.cv)
            card = _describe(run, winner, found, embeddings, training, points) | dict(extras)
            path = run.model_path(winner.head)
            path.parent.mkdir(exist_ok=True)
            texts = write_readme(card)
            with one_thread():
                save_model(path, found.head, card, reference=reference, texts=texts, replace=True)
            parts[winner.head] = _predict(run, winner, found, embeddings, training)
    _refuse_failures(run, list(ended.values()))
    sign = sign_of(run.info["asked"]["metric"])
    ordered = sorted(ended.values(), key=lambda w: np.inf if w.cv is None else -sign * w.cv)
    embeddings, _ = load(ordered[0].pooling)
    parts |= dict(zip(PRIORS, prior_rows(embeddings.rows, row_folds), strict=True))
    names = [*(winner.head for winner in ordered if winner.trial is not None), *PRIORS]
    run.write_predictions(pd.concat([parts[name] for name in names], ignore_index=True))
    leaderboard = [winner.as_entry() for winner in ordered]
    run.update_info(leaderboard=leaderboard, times={**run.info["times"], "ended": utc_now()})
    scores = score_run(run, operating_points=points)
    complete_cards(run, scores)
    run.write_scores(scores)


def _refuse_failures(run: Run, winners: Sequence[Winner]) -> None:
    if all(winner.trial is None for winner in winners):
        reasons = "; ".join(f"{winner.head}: {winner.error}" for winner in winners)
        raise RunError(f"every head failed in the run at {run.path}. {reasons}")


def _predict(
    run: Run, winner: Winner, found: Refitted, embeddings: Embeddings, training: Training
) -> pd.DataFrame:
    """Predict every row with what was saved; rows of train have their out-of-fold predictions."""
    with one_thread():
        saved = load_model(run.model_path(winner.head)).head
        if saved.study_level:
            rows = _study_rows(embeddings, training)
        else:
            rows = image_rows(embeddings.rows, training.folds)
        probability = predict(training, saved)
    trained = rows["fold"].notna().to_numpy()
    probability[trained] = found.out_of_fold[trained]
    return rows.assign(head=winner.head, trial=winner.trial, probability=probability)


def _study_rows(embeddings: Embeddings, training: Training) -> pd.DataFrame:
    """Return one row per study, by code; sha256 is empty."""
    images = image_rows(embeddings.rows, training.folds).assign(sha256="")
    studies = images.groupby("study", sort=True)
    rows = studies[["sha256", "region", "split", "patient"]].first()
    rows["label"] = images["label"].astype("Int8").groupby(images["study"]).max()
    rows["fold"] = studies["fold"].max()
    return rows.reset_index()


def _summarise(embeddings: Embeddings, training: Training) -> dict[str, NDArray[Any]]:
    """Fit what `evaluate` measures drift from, on the embeddings of the training rows alone."""
    trained = np.flatnonzero(training.folds >= 0)
    with one_thread():
        return fit_reference(
            embeddings.X[trained],
            training.seed,
            patients=embeddings.patients[trained],
            regions=embeddings.regions[trained],
        )


def _describe(
    run: Run,
    winner: Winner,
    found: Refitted,
    embeddings: Embeddings,
    training: Training,
    points: Sequence[ThresholdRule],
) -> dict[str, Any]:
    """Say what the model wants, how its scores become decisions, and what it has seen."""
    trained = np.flatnonzero(training.folds >= 0)
    per_study = found.head.study_level
    studies = _score_studies(found.out_of_fold, embeddings, training, per_study)
    synthetic = bool(run.info["data"]["synthetic"])
    return {
        "name": winner.head,
        "spec": embeddings.spec.as_dict(),
        "pooling": embeddings.pooling,
        "label_level": embeddings.label_level,
        "views": "attention" if per_study else "mean",
        **describe_decisions(studies, points),
        "metric": training.metric,
        "cv": winner.cv,
        "cv_method": CV_METHOD,
        "n_tried": winner.n_tried,
        "trial": winner.trial,
        "seed": training.seed,
        "encoder": describe_encoder(run.info.get("encoder", {})),
        "data": {
            "trained": count_trained(embeddings.rows.iloc[trained]),
            "manifest": run.info["data"],
        },
        "use": describe_use(synthetic=synthetic),
        "manifest": run.info["asked"]["manifest"],
        "synthetic": synthetic,
        "training_images": sorted(
            {image_code(sha256) for sha256 in embeddings.rows["sha256"].iloc[trained]}
        ),
    }


def _score_studies(
    probability: NDArray[np.float64], embeddings: Embeddings, training: Training, per_study: bool
) -> pd.DataFrame:
    """Return one row per training study: see `describe_decisions`."""
    trained = np.flatnonzero(training.folds >= 0)
    known = probability[np.unique(training.studies[trained]) if per_study else trained]
    studies = to_studies(training, trained, known, per_study=per_study)
    _, first = np.unique(training.studies, return_index=True)
    place = first[studies["study"]]
    return studies.assign(region=embeddings.regions[place], patient=embeddings.patients[place])
