"""Evaluate a packaged model on another institution's images: an ordinary run, and what changed.

Nothing is trained: the run stores how the model turns scores into decisions, so that `compare` and
`report` accept it alone and together with others.
"""

import hashlib
import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medembed.cache.embeddings import Embeddings, load_embeddings
from medembed.cache.store import Cache
from medembed.core.errors import TrainingDataError
from medembed.core.files import json_digest
from medembed.core.system import library_versions
from medembed.core.text import counted
from medembed.dataset.build_file import read_build
from medembed.dataset.identities import name_persons
from medembed.dataset.manifest import Manifest, read_manifest
from medembed.dataset.targets import LABEL, check_targets, select_target
from medembed.evaluation.calibration import Calibration
from medembed.evaluation.clinical_utility import check_prevalence
from medembed.evaluation.thresholds import ThresholdRule, parse_rules
from medembed.heads.model_files import read_part
from medembed.heads.packaging import Model, load_model
from medembed.prediction.decisions import raw_scores
from medembed.prediction.encode import CachedRows, JoinedRows, open_caches
from medembed.prediction.predictor import CacheLike, Predictor, find_model
from medembed.prediction.shift import (
    Internal,
    count_labels,
    describe_changes,
    find_drift,
    find_internal,
    study_table,
)
from medembed.report.external import digest_predictions
from medembed.results.comparison import score_run
from medembed.results.decisions import write_points
from medembed.results.methods import DISCLAIMER
from medembed.results.model_card import Card, read_card
from medembed.results.predictions import PRIORS, image_code, image_rows, predict_prior
from medembed.results.provenance import (
    describe_source,
    list_left_out,
    public_name,
    summarise_data,
)
from medembed.results.run_schema import RunEncoder
from medembed.results.runs import Run, create_run

__all__ = ["evaluate"]

N_NAMED = 5
NO_PRIORS = (
    "Priors are left out: the model is no longer inside the run that trained it, and its card "
    "does not count the labels of training."
)
_NO_DRIFT: dict[str, Any] = {
    "verdict": None,
    "sentence": "Drift was not measured: an ensemble has no embeddings of its own. Evaluate its "
    "members, each in the directory members of the model.",
}
_OF_A_PRIOR = {
    "calibrations": {"platt": Calibration().as_dict()},
    "threshold": 0.5,
    "sensitive_threshold": None,
    "operating_points": [],
}


@dataclass(frozen=True)
class _Asked:
    """A model, and the embedded rows that it is evaluated on."""

    path: Path
    model: Model
    card: Card
    embeddings: Embeddings
    rows: pd.DataFrame
    recalibrate: int | None
    seed: int
    n_resamples: int
    points: tuple[ThresholdRule, ...] = ()
    prevalence: float | None = None

    @property
    def head(self) -> str:
        """Return the head's name, its directory's."""
        return self.path.resolve().name


def evaluate(
    model: Model | Predictor | str | os.PathLike[str],
    cache: CacheLike | Sequence[CacheLike],
    manifest: Manifest | str | Path,
    out: str | Path,
    *,
    split: str | None = None,
    recalibrate: int | None = None,
    seed: int = 0,
    n_resamples: int = 2000,
    operating_points: Sequence[str | ThresholdRule] = (),
    prevalence: float | None = None,
) -> Run:
    """Score a packaged model on unseen rows, and report what changed since its own test.

    Parameters
    ----------
    model : Model, Predictor or path
        A directory that `sweep` or `finetune` wrote to `models/`, or a model read from it. If it is
        still inside its run, the run's test predictions and priors are used.
    cache, manifest : Cache, Manifest or path
        The images to score. The cache's spec must be the model's; of an ensemble, give a list of
        caches, one for each encoder. Covariates that the model reads come from the manifest.
    out : str or Path
        The run directory: new, or that of an identical evaluation, whose result is then read.
    split : {"train", "test"}, optional
        Score only these rows; by default all rows of the manifest.
    recalibrate : int, optional
        Refit calibration and threshold on this many labelled patients, and score the others.
    seed : int
        Random seed for the draw of patients, the rows used to measure drift, and the bootstrap.
    n_resamples : int
        Bootstrap resamples of patients.
    operating_points : sequence of str or ThresholdRule
        Operating points to show in addition to the default ones: packaged with the model, or
        ``threshold=…``.
    prevalence : float, optional
        See `comparison.compare`.

    Returns
    -------
    Run
        Complete. Its ``scores()`` are those that `compare` returns, and ``drop``, ``calibration``,
        ``recalibrated``, ``drift``, ``called_abnormal``, see `shift`. Without any label ``rows`` is
        empty, and only the last two are present.

    Raises
    ------
    ModelError
        The model is damaged, reads other embeddings, or lacks the operating point.
    TrainingDataError
        Some images were used to train the model or show a patient of such an image in the
        manifest, a covariate is missing, or recalibration would leave no patient to be scored.
    MissingRowsError
        Rows are neither embedded nor listed as failed; the message names the command to run.
    ManifestError
        The model predicts a target that the manifest lacks.
    RunError
        `out` holds a different evaluation or is not a run.
    """
    points = parse_rules(operating_points)
    share = None if prevalence is None else check_prevalence(prevalence)
    path = find_model(model)
    loaded = load_model(path)
    card = read_card(loaded, path)
    for rule in points:
        card.point(rule.name)
    parts = _match_caches(cache, card)
    caches = list(dict.fromkeys(part.cache for part in parts))
    read = read_manifest(manifest)
    given = read if isinstance(manifest, Manifest) else manifest
    [target] = check_targets([card.target or LABEL], read.rows.columns)
    embeddings = _load(parts, given, split)
    embeddings = replace(embeddings, rows=select_target(embeddings.rows, target))
    rows = select_target(read.rows, target)
    rows = rows if split is None else rows[rows["split"] == split]
    known = (path, loaded, card, embeddings, rows)
    asked = _Asked(*known, recalibrate, seed, n_resamples, points, share)
    _refuse_trained(asked, read.rows, split)
    _refuse_too_many(asked)
    words = ["medembed", "evaluate", public_name(path), public_name(caches[0].path)]
    words += ["MANIFEST" if isinstance(manifest, Manifest) else public_name(manifest)]
    words += ["--out", public_name(out)]
    words += [word for own in caches[1:] for word in ("--cache", public_name(own.path))]
    words += ["--split", split] if split else []
    words += ["--recalibrate", str(recalibrate)] if recalibrate else []
    words += [word for rule in points for word in ("--operating-point", rule.name)]
    words += ["--prevalence", str(share)] if share is not None else []
    details = {
        "kind": "evaluation",
        "seed": seed,
        "command": shlex.join([*words, "--seed", str(seed)]),
        "versions": library_versions("evaluation"),
        "encoder": _describe_encoders(caches),
        "data": summarise_data(
            rows.assign(split="test"),
            embeddings.failed,
            embeddings.label_level,
            read_build(manifest, read),
        ),
        "left_out": list_left_out(rows.assign(split="test"), embeddings.failed),
    }
    run = create_run(out, _question(asked, read, split), details=details)
    with run.locked():
        if not run.is_complete:
            _answer(run, asked, find_internal(path))
    return run


def _match_caches(cache: CacheLike | Sequence[CacheLike], card: Card) -> Sequence[CachedRows]:
    """Return what the model reads of each cache, in the order of its columns."""
    found = open_caches(cache, card)
    return found.parts if isinstance(found, JoinedRows) else [found]


def _load(
    parts: Sequence[CachedRows], manifest: Manifest | str | Path, split: str | None
) -> Embeddings:
    """Return the images that all caches have, with their embeddings side by side."""
    every = [
        load_embeddings(part.cache, manifest, pool="+".join(part.poolings), split=split, cells=True)
        for part in parts
    ]
    first, *others = every
    if not others:
        return first
    kept = set(first.rows["image"]).intersection(*(own.rows["image"] for own in others))
    chosen = [own.rows["image"].isin(kept).to_numpy() for own in every]
    failed = pd.concat([own.failed for own in every]).drop_duplicates("image")
    return replace(
        first,
        X=np.hstack([own.X[rows] for own, rows in zip(every, chosen, strict=True)]),
        rows=first.rows[chosen[0]].reset_index(drop=True),
        failed=failed.reset_index(drop=True),
    )


def _describe_encoders(caches: Sequence[Cache]) -> RunEncoder:
    known = [describe_source(c.recorded, c.spec.encoder, c.spec.preprocessing) for c in caches]
    if len(known) == 1:
        return known[0]
    return RunEncoder(source=" and ".join(dict.fromkeys(str(own.source) for own in known)))


def _question(asked: _Asked, manifest: Manifest, split: str | None) -> dict[str, Any]:
    own = hashlib.sha256(read_part(asked.path / "model.json")).hexdigest()
    return {
        "model": own,
        "manifest": manifest.digest(),
        "embedded": json_digest(sorted(asked.embeddings.rows["sha256"])),
        "spec": asked.embeddings.spec.as_dict(),
        **({"sources": [own.spec for own in asked.card.sources]} if asked.card.sources else {}),
        "pooling": asked.card.pooling,
        "split": split,
        "recalibrate": asked.recalibrate,
        "seed": asked.seed,
        "n_resamples": asked.n_resamples,
        # older runs do not record these
        **({"operating_points": [rule.name for rule in asked.points]} if asked.points else {}),
        **({} if asked.prevalence is None else {"prevalence": asked.prevalence}),
        **({} if asked.card.target is None else {"target": asked.card.target}),
    }


def _answer(run: Run, asked: _Asked, internal: Internal | None) -> None:
    """Predict, score, and write the results; the scores come last."""
    started = time.perf_counter()
    X = _columns(asked)
    studies = pd.factorize(asked.embeddings.studies, sort=True)[0]
    images, judged = raw_scores(asked.model, asked.card, X, studies)
    priors = _predict_priors(asked, internal)
    parts = [_predictions(asked, images, judged, per_study=bool(priors)), *priors.values()]
    run.write_predictions(pd.concat(parts, ignore_index=True))
    seconds = round(time.perf_counter() - started, 3)
    run.end(
        leaderboard=[_entry(asked, seconds)],
        decisions=_decisions(asked, internal, list(priors)),
    )
    resampling = {"n_resamples": asked.n_resamples, "seed": asked.seed}
    overlap = len(set(asked.embeddings.rows["sha256"]) & (internal.images if internal else set()))
    changes = describe_changes(
        study_table(asked.embeddings, judged),
        asked.card,
        internal,
        overlap,
        asked.recalibrate,
        resampling,
    )
    drift = _NO_DRIFT
    if not asked.model.members:
        drift = find_drift(asked.embeddings, X, asked.model.reference, asked.seed)
    if (asked.embeddings.y >= 0).any():
        shown = {"operating_points": asked.points, "prevalence": asked.prevalence}
        scores: Mapping[str, Any] = score_run(run, **resampling, **shown)
    else:
        scores = _without_labels(run)
    *notes, last = scores["notes"]
    notes += [] if priors else [NO_PRIORS]
    of = {"predictions_sha256": digest_predictions(run)}
    run.write_scores({**scores, **changes, "drift": drift, "notes": [*notes, last], **of})


def _without_labels(run: Run) -> Mapping[str, Any]:
    """Return a comparison's keys for rows that cannot be scored."""
    data = run.info.data
    images, patients = counted(data.images or 0, "image"), counted(data.patients or 0, "patient")
    return {
        "level": "study",
        "test": {"n": 0, "n_abnormal": 0, "n_patients": 0},
        "synthetic": data.synthetic,
        "rows": [],
        "paired": [],
        "notes": [
            f"No label: {images} of {patients} were predicted, and nothing could be scored.",
            DISCLAIMER,
        ],
    }


def _columns(asked: _Asked) -> np.ndarray:
    """Return the head's input: embeddings, followed by covariates of the manifest."""
    embeddings = asked.embeddings
    if asked.card.covariates is None:
        return embeddings.X
    encoder = asked.card.covariates
    return np.hstack([embeddings.X, encoder.transform(embeddings.rows)])


def _predictions(
    asked: _Asked, images: np.ndarray, judged: np.ndarray, *, per_study: bool
) -> pd.DataFrame:
    """Return the model's rows of `predictions.parquet`, all as test rows.

    A head that judges studies has one row per study, as in every run; but if no prior lists their
    images, one row per image, with its study's probability.
    """
    rows = image_rows(asked.embeddings.rows.assign(split="test"), np.full(len(images), -1))
    rows = rows.assign(head=asked.head, trial=asked.card.document.trial)
    if asked.card.views != "attention":
        return rows.assign(probability=images)
    rows = rows.assign(probability=judged[rows["study"].to_numpy()])
    if not per_study:
        return rows
    labels = rows["label"].astype("Int8").groupby(rows["study"]).max()
    first = rows.groupby("study", sort=True).head(1).sort_values("study")
    return first.assign(sha256="", label=labels.reindex(first["study"]).to_numpy())


def _predict_priors(asked: _Asked, internal: Internal | None) -> dict[str, pd.DataFrame]:
    """Return the predictions of the training rows' priors, if their labels are recorded."""
    trained = count_labels(asked.card) if internal is None else internal.trained
    if trained.empty:
        return {}
    embeddings = asked.embeddings
    images = image_rows(embeddings.rows.assign(split="test"), np.full(len(embeddings), -1))
    regions, labels, n = (trained[name].to_numpy() for name in ("region", "label", "n"))
    found = {}
    for name in PRIORS:
        probability = predict_prior(name, regions, labels, embeddings.regions, n)
        found[name] = images.assign(head=name, trial=None, probability=probability)
    return found


def _decisions(
    asked: _Asked, internal: Internal | None, priors: list[str]
) -> dict[str, dict[str, Any]]:
    """Return each head's calibrations, which `results.alignment` uses instead of fitting."""
    known = internal.decisions if internal is not None else {}
    own = known.get(asked.head, {})
    conformal = asked.card.conformal
    head = {
        "conformal": None if conformal is None else conformal.as_dict(),
        "calibrations": {
            **own.get("calibrations", {}),
            "platt": asked.card.calibration.as_dict(),
        },
        "threshold": asked.card.threshold,
        "sensitive_threshold": own.get("sensitive_threshold"),
        "operating_points": write_points(asked.card.points),
    }
    return {asked.head: head, **{name: known.get(name, _OF_A_PRIOR) for name in priors}}


def _entry(asked: _Asked, seconds: float) -> dict[str, Any]:
    """Return the model's row of the leaderboard."""
    document = asked.card.document
    return {
        "head": asked.head,
        "pooling": asked.card.pooling,
        "trial": document.trial,
        "cv": document.cv,
        "cv_method": document.cv_method,
        "n_tried": document.n_tried,
        "seed": document.seed,
        "depth": document.depth,
        "params": json.loads(read_part(asked.path / "model.json"))["params"],
        "seconds": seconds,
        "status": "ok",
        "error": None,
    }


def _refuse_trained(asked: _Asked, every: pd.DataFrame, split: str | None) -> None:
    """Refuse images that the model was trained on, and other images of their patients.

    `every` has all rows of the manifest, embedded or not, of every split.
    """
    codes = every["sha256"].map(image_code)
    is_trained = codes.isin(asked.card.training_images)
    if not is_trained.any():
        return
    persons = name_persons(every)
    is_known = persons.isin(persons[is_trained])
    is_asked = every["image"].isin(asked.embeddings.rows["image"])
    seen = sorted(codes[is_trained & is_asked].unique())
    n_others = int((is_known & ~is_trained & is_asked).sum())
    model = f"the model at {asked.path}"
    of_all = f"of the {len(asked.embeddings)} images"
    found = []
    if seen:
        named = ", ".join(seen[:N_NAMED]) + (", …" if len(seen) > N_NAMED else "")
        found += [
            f"{len(seen)} {of_all} are among those that {model} was trained on (by code: {named})"
        ]
    if n_others:
        found += [f"{n_others} {of_all} show patients of whom {model} was trained on other images"]
    if found:
        remedy = "Take them out of the manifest"
        remedy += ", or score its test rows alone with --split test." if split != "test" else "."
        raise TrainingDataError(f"{'; '.join(found)}, and scores on them say nothing. {remedy}")


def _refuse_too_many(asked: _Asked) -> None:
    """Refuse a recalibration that leaves no patient to score, before creating the run directory."""
    if asked.recalibrate is None:
        return
    rows = asked.embeddings.rows[asked.embeddings.y >= 0]
    n = int(name_persons(rows).nunique())
    if not 1 <= asked.recalibrate < max(n, 1):
        raise TrainingDataError(
            f"--recalibrate {asked.recalibrate} needs that many labelled patients and others to "
            f"score, and there are {n}. Ask for fewer, at most about half of them."
        )
