"""The end of a sweep: refit and package the winners, predict every row, and score them once.

A trial learned from some of the other folds' patients and was judged on the rest. A winner is
retrained on all of these patients, for the number of epochs or trees that was best on the rest,
and predicts the left-out fold, which influenced no decision. Heads are judged by these predictions,
and calibration, thresholds and prediction sets are based on them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NotRequired, TypedDict, final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medembed.cache.embeddings import Embeddings
from medembed.core.errors import RunError, TrainingDataError
from medembed.core.files import json_digest
from medembed.core.schema import as_json
from medembed.evaluation.drift.reference import fit_reference
from medembed.evaluation.thresholds import ThresholdRule
from medembed.heads.base import Head
from medembed.heads.packaging import load_model, save_model
from medembed.heads.registry import head_class
from medembed.results.comparison import score_run
from medembed.results.model_card import describe_decisions
from medembed.results.model_readme import (
    NewCard,
    complete_cards,
    count_trained,
    describe_encoder,
    describe_use,
    write_readme,
)
from medembed.results.predictions import PRIORS, image_code, image_rows, prior_rows
from medembed.results.run_schema import CV_METHOD, describe_failure, is_final
from medembed.results.runs import Run
from medembed.sweeps.runner import sign_of
from medembed.sweeps.selection import Winner
from medembed.sweeps.training import (
    Training,
    configure,
    is_safe,
    one_thread,
    predict,
    study_score,
    to_studies,
)
from medembed.sweeps.worker_pool import Died, Pool

__all__ = [
    "CardExtras",
    "Refit",
    "Refitted",
    "finish",
    "predict_folds",
    "refit",
    "score_studies",
]

_Folds = Sequence[NDArray[np.float64]]


@dataclass(frozen=True)
class Refit:
    """One training of a winner.

    Attributes
    ----------
    head, params, budget
        The winner's head, parameters and epochs or trees; without a budget its parameters apply.
    fold : int, optional
        The fold to leave out and predict; None trains on all rows.
    key : str
        The key under which the run keeps the predictions of that fold.
    """

    head: str
    params: Mapping[str, Any]
    budget: int | None
    fold: int | None = None
    key: str = ""


@dataclass(frozen=True)
class Refitted:
    """A winner trained on all rows, and its predictions of every left-out fold.

    Attributes
    ----------
    head : Head
    out_of_fold : float64 array of shape (n,)
        One per row, or one per study code if the head judges studies; NaN if left out.
    cv : float
        Mean over folds of the sweep's metric.
    """

    head: Head
    out_of_fold: NDArray[np.float64]
    cv: float


def _refit_winners(
    run: Run, training: Training, winners: Sequence[Winner], jobs: int | None, backend: str
) -> dict[str, Refitted | str]:
    """Train the winners of one pooling on all rows, and without each fold.

    Each fold's predictions are kept in the run as soon as they exist, so that repeating the sweep
    does not compute them again.

    Parameters
    ----------
    run : Run
        The run, locked by this process.
    winners : sequence of Winner
        Winners with a configuration.
    jobs, backend
        Number and kind of processes, see `Pool`.

    Returns
    -------
    dict of str to Refitted or str
        Head name -> refit, or the reason why it cannot be trained, if that would recur.

    Raises
    ------
    RunError
        A training failed, or its process died, for a reason that may not recur.
    """
    parts = {own.head: _plan_folds(own) for own in winners}
    kept = {part.key: run.kept_fold(part.key) for own in parts.values() for part in own}
    heads: dict[str, Head] = {}
    failed: dict[str, str] = {}
    items: list[Refit] = []
    for winner in sorted(winners, key=lambda winner: -winner.seconds / winner.n_tried):
        # (what takes longest goes first, so that no process waits for another's at the end)
        items.append(Refit(winner.head, winner.params or {}, winner.budget))
        items += (p for p in parts[winner.head] if not _is_whole(training, p, kept[p.key]))
    with Pool(training, jobs, backend) as pool:
        for k, result in pool.run(refit, items, is_safe=lambda item: is_safe(training, item.head)):
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
            found[name] = Refitted(heads[name], _gather_folds(training, name, folds), cv)
    return found


def predict_folds(
    run: Run, training: Training, winner: Winner, jobs: int | None, backend: str
) -> NDArray[np.float64] | None:
    """Return a winner's predictions of every left-out fold, or None if it cannot be trained.

    What the run keeps of them is not computed again; see `Refitted.out_of_fold`, `Pool`.
    """
    parts = _plan_folds(winner)
    kept = {part.key: run.kept_fold(part.key) for part in parts}
    lacking = [part for part in parts if not _is_whole(training, part, kept[part.key])]
    if lacking:
        with Pool(training, jobs, backend) as pool:
            for k, result in pool.run(
                refit, lacking, is_safe=lambda item: is_safe(training, item.head)
            ):
                if isinstance(result, Died):
                    return None
                kept[lacking[k].key] = result
                run.keep_fold(lacking[k].key, result)
    return _gather_folds(training, winner.head, [_known(kept[part.key]) for part in parts])


def refit(training: Training, item: Refit) -> Any:
    """Return the head of one training, or its predictions of the left-out fold; run in a process.

    Errors are returned as `Died`: an exception raised in a process would be taken for the end of
    that process, and all concurrent trainings would be restarted.
    """
    try:
        if item.fold is None:
            return _train(training, item, np.flatnonzero(training.folds >= 0))
        head = _train(training, item, training.others(item.fold))
        with one_thread():
            found = predict(training, head, training.held(item.fold))
    except Exception as error:
        return Died(describe_failure(error))
    return found if np.isfinite(found).all() else Died("its predictions are not finite numbers")


def _gather_folds(training: Training, head: str, folds: _Folds) -> NDArray[np.float64]:
    """Return the folds' predictions in row order, see `Refitted.out_of_fold`."""
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
    """Return why a training failed; raise RunError if another attempt may succeed."""
    if is_final(died.reason):
        return died.reason
    rows = "on all training rows" if item.fold is None else f"without fold {item.fold}"
    raise RunError(
        f"the refit of {item.head} {rows} failed: {died.reason}. The same command tries it again; "
        "without that head give another --out."
    )


def _plan_folds(winner: Winner) -> list[Refit]:
    """Return the trainings behind out-of-fold scores."""
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


@final
class CardExtras(TypedDict):
    """What all cards of a sweep have in common."""

    covariates: dict[str, object] | None
    target: NotRequired[str]


Load = Callable[[str], tuple[Embeddings, Training]]


def finish(
    run: Run,
    load: Load,
    row_folds: NDArray[Any],
    winners: Sequence[Winner],
    extras: CardExtras,
    points: Sequence[ThresholdRule],
    jobs: int | None,
    backend: str,
) -> None:
    """Refit, package, predict and score; the scores are written last.

    `load` returns the embeddings and training rows of a pooling; `extras` are added to every card;
    `points` are operating points in addition to the default ones.
    """
    run.drop_partial_models()
    _refuse_failures(run, winners)
    parts, ended = {}, {winner.head: winner for winner in winners}
    for pooling in dict.fromkeys(winner.pooling for winner in winners if winner.keys):
        own = [winner for winner in winners if winner.pooling == pooling and winner.keys]
        embeddings, training = load(pooling)
        refitted = _refit_winners(run, training, own, jobs, backend)
        reference = _summarise(embeddings, training)
        for winner in own:
            found = refitted[winner.head]
            if isinstance(found, str):
                ended[winner.head] = replace(winner, trial=None, error=found)
                continue
            winner = ended[winner.head] = replace(winner, cv=found.cv)
            card: NewCard = {
                **_describe(run, winner, found, embeddings, training, points),
                **extras,
            }
            path = run.model_path(winner.head)
            path.parent.mkdir(exist_ok=True)
            texts = write_readme(card)
            with one_thread():
                save_model(path, found.head, card, reference=reference, texts=texts, replace=True)
            parts[winner.head] = _predict(run, winner, found, embeddings, training)
    _refuse_failures(run, list(ended.values()))
    sign = sign_of(str(run.info.asked.metric))
    ordered = sorted(ended.values(), key=lambda w: np.inf if w.cv is None else -sign * w.cv)
    embeddings, _ = load(ordered[0].pooling)
    parts |= dict(zip(PRIORS, prior_rows(embeddings.rows, row_folds), strict=True))
    names = [*(winner.head for winner in ordered if winner.trial is not None), *PRIORS]
    run.write_predictions(pd.concat([parts.pop(name) for name in names], ignore_index=True))
    run.end(leaderboard=[winner.as_entry() for winner in ordered])
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
    """Return the saved model's predictions of every row; those of train rows are out-of-fold."""
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
    """Return the reference for drift in `evaluate`, fitted on the training rows' embeddings."""
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
) -> NewCard:
    """Return a card: the model's inputs, how scores become decisions, and its training data."""
    trained = np.flatnonzero(training.folds >= 0)
    per_study = found.head.study_level
    studies = score_studies(found.out_of_fold, embeddings, training, per_study)
    synthetic, encoder = run.info.data.synthetic, run.info.encoder
    return {
        "name": winner.head,
        "spec": embeddings.spec.as_dict(),
        "pooling": embeddings.pooling,
        "label_level": embeddings.label_level,
        "views": "attention" if per_study else "mean",
        **describe_decisions(studies, points),  # type: ignore[typeddict-item]
        "metric": training.metric,
        "cv": winner.cv,
        "cv_method": CV_METHOD,
        "n_tried": winner.n_tried,
        "trial": winner.trial,
        "seed": training.seed,
        "encoder": describe_encoder(encoder.source, encoder.revision),
        "data": {
            "trained": count_trained(embeddings.rows.iloc[trained]),
            "manifest": as_json(run.info.data),
        },
        "use": describe_use(synthetic=synthetic, keeps_rows=found.head.keeps_rows),
        "manifest": run.info.asked.manifest,
        "synthetic": synthetic,
        "training_images": sorted(
            {image_code(sha256) for sha256 in embeddings.rows["sha256"].iloc[trained]}
        ),
    }


def score_studies(
    probability: NDArray[np.float64], embeddings: Embeddings, training: Training, per_study: bool
) -> pd.DataFrame:
    """Return one row per training study with its out-of-fold score: see `describe_decisions`."""
    trained = np.flatnonzero(training.folds >= 0)
    known = probability[np.unique(training.studies[trained]) if per_study else trained]
    studies = to_studies(training, trained, known, per_study=per_study)
    _, first = np.unique(training.studies, return_index=True)
    place = first[studies["study"]]
    return studies.assign(region=embeddings.regions[place], patient=embeddings.patients[place])
