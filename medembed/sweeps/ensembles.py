"""Combine the heads of several sweeps, of one encoder or of many, into one run and one model.

The weights are fitted on out-of-fold predictions. What is reported of the ensemble, and what its
calibration is fitted on, comes from weights that were fitted without the fold that they are applied
to. The members' predictions of the other folds come from trainings that saw that fold, as always in
stacking.
"""

import hashlib
import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medembed.core.errors import TrainingDataError
from medembed.core.files import json_digest
from medembed.core.schema import as_json
from medembed.core.system import library_versions
from medembed.evaluation.scores import score
from medembed.evaluation.thresholds import ThresholdRule, parse_rules
from medembed.heads.ensemble import EnsembleHead
from medembed.heads.model_files import MODEL_FILE, read_part
from medembed.heads.packaging import save_model
from medembed.results.comparison import score_run
from medembed.results.model_card import (
    CardDecisions,
    describe_decisions,
    read_covariates,
)
from medembed.results.model_readme import (
    CardEncoder,
    NewCard,
    complete_cards,
    describe_encoder,
    describe_use,
    write_readme,
)
from medembed.results.predictions import PRIORS
from medembed.results.provenance import public_name
from medembed.results.run_schema import CV_METHOD, RunEncoder
from medembed.results.runs import Run, RunLike, create_run, open_run
from medembed.sweeps.ensemble_members import (
    COLUMNS,
    SHARED,
    EnsembleRows,
    Member,
    Weighting,
    read_rows,
)
from medembed.sweeps.runner import sign_of

__all__ = ["ensemble"]


def ensemble(
    runs: RunLike | Sequence[RunLike],
    out: str | Path,
    *,
    heads: Sequence[str] | None = None,
    operating_points: Sequence[str | ThresholdRule] = (),
) -> Run:
    """Average the heads of sweeps with convex weights, and write the result as a run.

    Each member is calibrated by Platt scaling, and the weights, not negative and with a sum of 1,
    minimise the cross-entropy of out-of-fold predictions. Beside the `ensemble` stands the `mean`,
    with equal weights. For every fold both are fitted on the other folds' predictions, from which
    come ``cv``, calibration, thresholds and the predictions of training rows; the packaged models
    are fitted on all folds. They hold their members, those with weight 0 excepted.

    Parameters
    ----------
    runs : Run, path or sequence of these
        Complete sweeps over one manifest with equal folds; their caches may differ.
    out : str or Path
        The run directory: new, or that of an identical ensemble, whose result is then read.
    heads : sequence of str, optional
        The heads to take of each run that has them; by default all. Choosing heads by their scores
        in the same cross-validation would make the ensemble's ``cv`` too good.
    operating_points : sequence of str or ThresholdRule
        See `sweep`.

    Returns
    -------
    Run
        Complete, with the heads `ensemble` and `mean`. Its ``leaderboard`` has the weights as
        ``params``.

    Raises
    ------
    RunError
        A run is unfinished, no sweep, given twice, or its folds, labels or manifest differ from
        those of the first; there are fewer than two members or more than 64; `out` holds something
        else.
    ModelError
        A member's model is damaged or is not its run's.
    TrainingDataError
        A fold holds one class, or members encode a covariate differently.
    """
    points = parse_rules(operating_points)
    given = [runs] if isinstance(runs, str | os.PathLike | Run) else list(runs)
    opened = [open_run(run) for run in given]
    rows = read_rows(opened, heads)
    names = [member.name for member in rows.members]
    first = opened[0].info
    asked = {
        "heads": ["ensemble", "mean"],
        "members": dict(zip(names, map(_digest, rows.members), strict=True)),
        "pooling": _name_poolings(rows.members),
        "covariates": _name_covariates(rows.members),
        **first.asked.model_dump(exclude_unset=True, include=set(SHARED)),
        **({"operating_points": [rule.name for rule in points]} if points else {}),
    }
    details = {
        "kind": "ensemble",
        "seed": first.seed,
        "cv_method": CV_METHOD,
        "command": _command(opened, out, heads, points),
        "versions": library_versions("sweep"),
        "encoder": _describe_encoders(opened),
        "data": max((run.info.data for run in opened), key=lambda own: own.left_out or 0),
        "left_out": max((run.info.left_out for run in opened), key=len),
    }
    run = create_run(out, asked, details=details)
    with run.locked():
        if not run.is_complete:
            _finish(run, rows, points)
    return run


def _finish(run: Run, rows: EnsembleRows, points: Sequence[ThresholdRule]) -> None:
    run.drop_partial_models()
    per_study = any(member.per_study for member in rows.members)
    parts, entries = {}, []
    for head, equal in (("ensemble", False), ("mean", True)):
        started = time.perf_counter()
        pool = rows.fit(np.flatnonzero(rows.is_trained), equal=equal)
        found, fold_weights = _predict_folds(rows, pool, equal=equal, per_study=per_study)
        cv = _cross_validate(run, rows, found, per_study=per_study)
        entry = _entry(rows, head, pool, cv)
        entry["fold_weights"] = fold_weights
        _package(run, rows, head, pool, (entry, _studies(rows, found, per_study=per_study)), points)
        entry["seconds"] = round(time.perf_counter() - started, 3)
        entries.append(entry)
        base = _study_rows(rows) if per_study else rows.images
        parts[head] = base.assign(head=head, trial=None, probability=found)
    parts |= {name: _prior(rows, name) for name in PRIORS}
    run.write_predictions(pd.concat(parts.values(), ignore_index=True))
    sign = sign_of(_metric(run))
    entries.sort(key=lambda entry: -sign * entry["cv"])
    run.end(leaderboard=entries)
    scores = score_run(run, operating_points=points)
    complete_cards(run, scores)
    run.write_scores(scores)


def _predict_folds(
    rows: EnsembleRows, pool: Weighting, *, equal: bool, per_study: bool
) -> tuple[NDArray[np.float64], list[list[float]]]:
    """Return predictions, of each fold by a pool fitted without it, and the folds' weights."""
    found, weights = rows.predict(pool, per_study=per_study), []
    of_study = rows.folds if per_study else rows.folds[rows.codes]
    for fold in np.unique(rows.folds[rows.is_trained]).tolist():
        others = np.flatnonzero(rows.is_trained & (rows.folds != fold))
        without = rows.fit(others, equal=equal)
        held = of_study == fold
        found[held] = rows.predict(without, per_study=per_study)[held]
        weights.append([round(float(weight), 6) for weight in without.weights])
    return found, weights


def _studies(rows: EnsembleRows, found: NDArray[np.float64], *, per_study: bool) -> pd.DataFrame:
    """Return a row per training study: see `describe_decisions`."""
    if not per_study:
        found = np.bincount(rows.codes, found) / np.bincount(rows.codes)
    return rows.studies.assign(probability=found)[rows.is_trained]


def _cross_validate(
    run: Run, rows: EnsembleRows, found: NDArray[np.float64], *, per_study: bool
) -> float:
    """Return the mean over folds of the runs' metric, at study level."""
    studies, metric = _studies(rows, found, per_study=per_study), _metric(run)
    values = []
    for fold, own in studies.groupby("fold"):
        y, probability = own["label"].to_numpy(np.int8), own["probability"].to_numpy()
        value = float(score(y, probability, 0.5)[metric])
        if not np.isfinite(value):
            raise TrainingDataError(f"{metric} is not estimable on fold {fold} of the runs")
        values.append(value)
    return float(np.mean(values))


def _entry(rows: EnsembleRows, head: str, pool: Weighting, cv: float) -> dict[str, Any]:
    """Return a row of the leaderboard."""
    names = [member.name for member in rows.members]
    weights = dict(zip(names, (round(float(w), 6) for w in pool.weights), strict=True))
    return {
        "head": head,
        "pooling": _name_poolings(_keep_weighted(rows, pool)[1]),
        "trial": None,
        "params": {"weights": weights},
        "cv": cv,
        "seconds": 0.0,
        "status": "ok",
        "error": None,
        "chosen_by": None,
        "n_tried": None,
        "budget": None,
        "fold_budgets": None,
    }


def _study_rows(rows: EnsembleRows) -> pd.DataFrame:
    """Return a row per study, by code; sha256 is empty."""
    found = rows.studies.assign(sha256="")
    return found[COLUMNS]


def _prior(rows: EnsembleRows, name: str) -> pd.DataFrame:
    probability = rows.images[name].to_numpy(np.float64)
    return rows.images[COLUMNS].assign(head=name, trial=None, probability=probability)


def _package(
    run: Run,
    rows: EnsembleRows,
    head: str,
    pool: Weighting,
    judged: tuple[Mapping[str, Any], pd.DataFrame],
    points: Sequence[ThresholdRule],
) -> None:
    """Save a model that holds the members with weight."""
    entry, studies = judged
    kept, members = _keep_weighted(rows, pool)
    layout = _lay_out(members)
    decisions: CardDecisions = describe_decisions(studies, points)
    card: NewCard = {
        "name": head,
        "spec": {},
        "pooling": entry["pooling"],
        "sources": layout.sources,
        "members": [
            {"name": member.name, "head": member.head, "weight": float(pool.weights[k])}
            for k, member in zip(kept, members, strict=True)
        ],
        "covariates": layout.covariates,
        "label_level": members[0].card.label_level,
        "views": "attention" if any(member.per_study for member in members) else "mean",
        **decisions,  # type: ignore[typeddict-item]
        "metric": _metric(run),
        "cv": entry["cv"],
        "cv_method": CV_METHOD,
        "n_tried": None,
        "trial": None,
        "seed": run.info.seed,
        "encoder": _describe_terms(members),
        "data": {"trained": _trained(members[0]), "manifest": as_json(run.info.data)},
        "use": describe_use(synthetic=any(member.card.synthetic for member in members)),
        "manifest": run.info.asked.manifest,
        "synthetic": any(member.card.synthetic for member in members),
        "training_images": sorted(frozenset().union(*(m.card.training_images for m in members))),
    }
    maps = [pool.calibrations[k] for k in kept]
    built = EnsembleHead.build(
        [member.model.head for member in members],
        layout.columns,
        pool.weights[kept],
        np.array([own.slope for own in maps]),
        np.array([own.intercept for own in maps]),
        layout.n_features,
    )
    path = run.model_path(head)
    path.parent.mkdir(exist_ok=True)
    paths = [member.run.model_path(member.head) for member in members]
    save_model(path, built, card, texts=write_readme(card), members=paths, replace=True)


def _keep_weighted(rows: EnsembleRows, pool: Weighting) -> tuple[list[int], list[Member]]:
    """Return the members with weight, and their places among all."""
    kept = np.flatnonzero(pool.weights > 0).tolist()
    return kept, [rows.members[k] for k in kept]


@dataclass(frozen=True, eq=False)
class _Layout:
    """The columns of an ensemble: poolings of each encoder, then covariates.

    Attributes
    ----------
    sources : list of dict
        What the card says of each encoder: ``encoder``, ``spec``, ``pooling``.
    columns : list of int64 arrays
        For each member the columns that it reads.
    covariates : dict or None
        The encodings of all covariates that a member reads.
    """

    sources: list[dict[str, Any]]
    columns: list[NDArray[np.int64]]
    covariates: dict[str, Any] | None
    n_features: int


def _lay_out(members: Sequence[Member]) -> _Layout:
    sources: dict[str, dict[str, Any]] = {}
    for member in members:
        spec, card = member.card.spec, member.card
        key = _source_key(spec)
        encoder = card.encoder.model_dump(include={"source", "revision", "path"})
        new = {"encoder": encoder, "spec": {**spec, "poolings": {}}, "pooling": ""}
        own = sources.setdefault(key, new)
        for name in card.pooling.split("+"):
            own["spec"]["poolings"].setdefault(name, spec["poolings"][name])
    places: dict[tuple[str, str], NDArray[np.int64]] = {}
    n = 0
    for key, own in sources.items():
        own["pooling"] = "+".join(own["spec"]["poolings"])
        for name, shape in own["spec"]["poolings"].items():
            width = int(np.prod(shape))
            places[key, name] = np.arange(n, n + width)
            n += width
    entries: dict[str, dict[str, object]] = {}
    of_name: dict[str, NDArray[np.int64]] = {}
    for member in members:
        known = member.card.covariates
        for entry in [] if known is None else [own.as_dict() for own in known.columns]:
            if entries.setdefault(str(entry["name"]), entry) != entry:
                raise TrainingDataError(
                    f"covariate {entry['name']} is encoded differently by {member.name} than by "
                    "the members before it. Sweep again with the same --covariates."
                )
    for name, entry in entries.items():
        width = len(read_covariates({"columns": [entry]}).names)
        of_name[name] = np.arange(n, n + width)
        n += width
    columns = [
        np.concatenate(
            [
                *(places[_source_key(m.card.spec), own] for own in m.card.pooling.split("+")),
                *(of_name[own] for own in _name_covariates([m])),
            ]
        ).astype(np.int64)
        for m in members
    ]
    covariates = {"columns": list(entries.values())} if entries else None
    return _Layout(list(sources.values()), columns, covariates, n)


def _trained(member: Member) -> dict[str, object]:
    """Return the card's counts of the rows that all members were trained on."""
    data = member.card.document.data
    counts: dict[str, object] = {} if data is None else as_json(data.trained)
    return counts


def _source_key(spec: Mapping[str, Any]) -> str:
    """Return a text that embeddings of one encoder have in common, whatever their pooling."""
    return json.dumps({key: own for key, own in spec.items() if key != "poolings"}, sort_keys=True)


def _name_poolings(members: Sequence[Member]) -> str:
    """Return the poolings of all members, for tables: each once, whatever the encoder."""
    return "+".join(dict.fromkeys(name for m in members for name in m.card.pooling.split("+")))


def _name_covariates(members: Sequence[Member]) -> list[str]:
    cards = (member.card.covariates for member in members)
    found = (column.name for own in cards if own is not None for column in own.columns)
    return list(dict.fromkeys(found))


def _describe_terms(members: Sequence[Member]) -> CardEncoder:
    """Return the card's entry about all encoders, as `describe_encoder` does for one."""
    entries = {str(own.source): own for own in (m.card.encoder for m in members)}
    every = [describe_encoder(own.source, own.revision) for own in entries.values()]
    if len(every) == 1:
        return every[0]
    terms = " ".join(own["terms"] for own in every)
    return {"source": " and ".join(entries), "revision": None, "path": None, "terms": terms}


def _describe_encoders(runs: Sequence[Run]) -> RunEncoder:
    """Return what `run.json` says of the encoder: that of all runs, or the names of several."""
    known = [run.info.encoder for run in runs]
    if all(own.fingerprint == known[0].fingerprint for own in known):
        return known[0]
    return RunEncoder(source=" and ".join(dict.fromkeys(str(own.source) for own in known)))


def _metric(run: Run) -> str:
    return str(run.info.asked.metric)  # all members were chosen by it


def _digest(member: Member) -> str:
    """Return a digest of a member's model and of its predictions."""
    content = read_part(member.run.model_path(member.head) / MODEL_FILE)
    predictions = hashlib.sha256(member.probability.tobytes()).hexdigest()
    return json_digest([hashlib.sha256(content).hexdigest(), predictions])[:32]


def _command(
    runs: Sequence[Run],
    out: str | Path,
    heads: Sequence[str] | None,
    points: Sequence[ThresholdRule],
) -> str:
    """Return the command that repeats this ensemble."""
    words = ["medembed", "ensemble", *(public_name(run.path) for run in runs)]
    words += ["--out", public_name(out)]
    words += ["--heads", ",".join(heads)] if heads else []
    words += [word for rule in points for word in ("--operating-point", rule.name)]
    return shlex.join(words)
