"""Measure changes at another site: scores, calibration, recalibration, and embeddings.

`find_internal` reads the run that trained a model, with its test and training rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medembed.cache.embeddings import Embeddings
from medembed.core.errors import MedembedError
from medembed.evaluation.bootstrap import patient_codes
from medembed.evaluation.calibration import Calibration, calibration_line
from medembed.evaluation.drift.embedding_space import measure_remoteness
from medembed.evaluation.drift.reference import measure_drift
from medembed.evaluation.estimates import estimate_share
from medembed.evaluation.intervals import (
    Interval,
    Variant,
    bootstrap_scores,
    bootstrap_variants,
    plain,
)
from medembed.evaluation.paired import Difference
from medembed.evaluation.recalibration import recalibrate
from medembed.evaluation.scores import by_study
from medembed.evaluation.unpaired import mover_drop, sample_drop
from medembed.heads.packaging import read_document
from medembed.results.alignment import ScoredHead, align_runs
from medembed.results.decisions import write_points
from medembed.results.model_card import Card, require_winner
from medembed.results.runs import Run, open_run

__all__ = [
    "Internal",
    "count_labels",
    "describe_changes",
    "find_drift",
    "find_internal",
    "study_table",
]


@dataclass(frozen=True, eq=False)
class Internal:
    """The run that still contains a model.

    Attributes
    ----------
    studies : DataFrame
        Its labelled test studies: `patient`, `region`, `label`, `probability` (not calibrated).
    images : frozenset of str
        SHA-256 of their images.
    trained : DataFrame
        The training images: number of images `n` by `region` and `label`.
    decisions : dict of str to dict
        By head, including priors: ``calibrations``, ``threshold``, ``sensitive_threshold``,
        ``operating_points``, as read by `results.decisions`.
    """

    studies: pd.DataFrame
    images: frozenset[str]
    trained: pd.DataFrame
    decisions: Mapping[str, dict[str, Any]]


def find_internal(model_path: Path) -> Internal | None:
    """Return the complete run that the model at this path is a winner of, or None.

    Raises
    ------
    ModelError
        The directory is that of a winner, but holds another model.
    """
    path = model_path.resolve()
    try:
        run = open_run(path.parent.parent)
        if not run.is_complete or run.model_path(path.name).resolve() != path:
            return None
        test_set = align_runs([run])
    except (MedembedError, OSError):
        return None
    require_winner(run, path.name, read_document(path).card)
    own = {contender.head: contender for contender in test_set.contenders}
    if path.name not in own:
        return None
    images = frozenset(sha256 for names in test_set.units["images"] for sha256 in names.split())
    return Internal(
        studies=test_set.units.assign(probability=own[path.name].raw),
        images=images,
        trained=_trained(run),
        decisions={head: _decisions(contender) for head, contender in own.items()},
    )


def count_labels(card: Card) -> pd.DataFrame:
    """Return the card's number of training images `n` by `region` and `label`.

    Empty for an older card without counts.
    """
    data = card.document.data
    trained = None if data is None else data.trained
    regions = {} if trained is None else trained.regions or {}
    counts = [
        (name, label, n)
        for name, own in regions.items()
        for label, n in ((0, own.images - own.abnormal), (1, own.abnormal))
    ]
    return pd.DataFrame([own for own in counts if own[-1]], columns=["region", "label", "n"])


def _trained(run: Run) -> pd.DataFrame:
    """Return the number of training rows of the first prior, which has one row per image."""
    rows = run.predictions().query("head == 'class-prior'")
    is_trained = rows["split"].eq("train") & rows["fold"].notna() & rows["label"].notna()
    return rows[is_trained].groupby(["region", "label"], sort=True).size().reset_index(name="n")


def _decisions(contender: ScoredHead) -> dict[str, Any]:
    known = {
        name: calibration.as_dict()
        for name, calibration in contender.calibrations.items()
        if isinstance(calibration, Calibration) and name != "none"
    }
    return {
        "calibrations": known,
        "threshold": contender.threshold,
        "sensitive_threshold": contender.sensitive_threshold,
        "operating_points": write_points(contender.points),
    }


_Resampling = Mapping[str, int]  # n_resamples and seed


def study_table(embeddings: Embeddings, judged: np.ndarray) -> pd.DataFrame:
    """Return one row per study of embedded rows, in the form of `by_study`.

    `judged` (m,) holds the studies' uncalibrated probabilities, in ascending order of study.
    """
    rows = embeddings.rows[["region", "label"]].assign(
        patient=embeddings.patients,
        study=pd.factorize(embeddings.studies, sort=True)[0],
        probability=0.0,
    )
    return by_study(rows).assign(probability=judged)


def describe_changes(
    studies: pd.DataFrame,
    card: Card,
    internal: Internal | None,
    overlap: int,
    n_drawn: int | None,
    resampling: _Resampling,
) -> dict[str, Any]:
    """Return what changed since the model's own test.

    Parameters
    ----------
    studies : DataFrame
        From `study_table`.
    card : Card
        The model's card.
    internal : Internal, optional
        The run that contains the model.
    overlap : int
        How many of the images belong to that run's own test.
    n_drawn : int, optional
        Patients to recalibrate on.
    resampling : mapping
        ``n_resamples`` and ``seed``.

    Returns
    -------
    dict
        JSON values, all at study level.

        ``called_abnormal``: ``value, low, high`` of the share of all studies, labelled or not.
        The other keys are None if no study has a label.

        ``drop``: ``basis`` ("samples" if the model's run is available, else "mover" from the
        intervals on its card, else None with the reason in ``note``), ``internal`` (counts),
        ``scores``: for each score ``internal``, ``external`` (intervals) and ``difference``
        (external less internal), and ``regions`` with these values by region.

        ``calibration``: for ``raw`` and ``calibrated`` probabilities, and the calibrated ones of
        the ``internal`` test, ``line`` (see `calibration_line`) and ``scores`` (Brier, ECE).

        ``recalibrated``: see `evaluation.recalibration.recalibrate`; None if not requested.
    """
    called = _called(studies, card)
    known = studies[studies["label"].notna()]
    known = known.assign(label=known["label"].astype(np.int8))
    if known.empty:
        return {"called_abnormal": called} | dict.fromkeys(("drop", "calibration", "recalibrated"))
    mended = None
    if n_drawn is not None:
        mended = recalibrate(known, card.calibration, card.threshold, n_drawn, **resampling)
    return {
        "called_abnormal": called,
        "drop": plain(_find_drop(known, card, internal, overlap, resampling)),
        "calibration": plain(
            _find_calibration(known, card, None if overlap else internal, resampling)
        ),
        "recalibrated": mended,
    }


def find_drift(
    embeddings: Embeddings, X: np.ndarray, reference: Mapping[str, np.ndarray] | None, seed: int
) -> dict[str, Any]:
    """Return the drift found by `measure_drift`, with column names and without using labels.

    ``far`` counts images that individually lie far from training, see `measure_remoteness`.
    `X` is the head's input; the reference may cover only the embeddings.
    """
    if not reference:
        sentence = (
            "Drift was not measured: the model holds no summary of its training embeddings. "
            "Models that sweep or finetune save from now on do."
        )
        return {"verdict": None, "sentence": sentence}
    n_columns = len(reference.get("space_centre", embeddings.X[0]))
    table = embeddings.X if n_columns == embeddings.X.shape[1] else X
    drift = measure_drift(
        reference, table, seed, patients=embeddings.patients, regions=embeddings.regions
    )
    for column in drift["columns"]:
        column["name"] = _name_column(embeddings, column["column"])
    remote = measure_remoteness(reference, table)
    n_far = None if remote is None else int(remote.far.sum())
    return {**drift, "far": None if n_far is None else {"n": n_far, "of": len(table)}}


def _name_column(embeddings: Embeddings, column: int) -> str:
    for pooling, block in embeddings.blocks.items():
        if column < block.stop:
            return f"{pooling}[{column - block.start}]"
    return f"covariate[{column - embeddings.X.shape[1]}]"


def _called(studies: pd.DataFrame, card: Card) -> Any:
    called, everyone = _calibrated(studies, card) >= card.threshold, np.ones(len(studies), bool)
    codes = patient_codes(studies["patient"].to_numpy())
    return plain(estimate_share(called, everyone, codes).interval())


def _find_drop(
    known: pd.DataFrame,
    card: Card,
    internal: Internal | None,
    overlap: int,
    resampling: _Resampling,
) -> dict[str, Any]:
    own = known.assign(probability=_calibrated(known, card))
    nothing: dict[str, Any] = {"basis": None, "internal": None, "scores": {}, "regions": {}}
    if overlap:
        note = (
            f"{overlap:,} of the images belong to the model's own test, so there are no two "
            "independent samples and no drop is reported."
        )
        return {**nothing, "note": note}
    if internal is not None:
        there = internal.studies.assign(probability=_calibrated(internal.studies, card))
        regions = sorted(set(own["region"]) & set(there["region"]))
        return {
            "basis": "samples",
            "note": None,
            "internal": _count(there),
            "scores": _compare(there, own, card, resampling),
            "regions": {
                name: _compare(
                    there[there["region"] == name], own[own["region"] == name], card, resampling
                )
                for name in regions
            },
        }
    recorded, by_region = _recorded_scores(card)
    if not recorded:
        note = "The model's card has no scores of its own test, so no drop is reported."
        return {**nothing, "note": note}
    return {
        "basis": "mover",
        "note": None,
        "internal": None,
        "scores": _compare_recorded(recorded, own, card, resampling),
        "regions": {
            name: _compare_recorded(by_region[name], own[own["region"] == name], card, resampling)
            for name in sorted(set(own["region"]) & set(by_region))
        },
    }


def _compare(
    there: pd.DataFrame, own: pd.DataFrame, card: Card, resampling: _Resampling
) -> dict[str, Any]:
    return _table(
        _scores(there, card, resampling),
        _scores(own, card, resampling),
        sample_drop(there, own, card.threshold),
    )


def _compare_recorded(
    recorded: Mapping[str, Interval], own: pd.DataFrame, card: Card, resampling: _Resampling
) -> dict[str, Any]:
    scores = _scores(own, card, resampling)
    return _table(recorded, scores, mover_drop(recorded, scores))


def _table(
    inside: Mapping[str, Interval],
    outside: Mapping[str, Interval],
    drops: Mapping[str, Difference],
) -> dict[str, Any]:
    return {
        name: {"internal": inside[name], "external": outside[name], "difference": drop}
        for name, drop in drops.items()
    }


def _scores(studies: pd.DataFrame, card: Card, resampling: _Resampling) -> dict[str, Interval]:
    y, probability, patients = _arrays(studies)
    return bootstrap_scores(y, probability, patients, card.threshold, **resampling)


def _find_calibration(
    known: pd.DataFrame, card: Card, internal: Internal | None, resampling: _Resampling
) -> dict[str, Any]:
    found = {
        "raw": _fit_of(known, resampling),
        "calibrated": _fit_of(known.assign(probability=_calibrated(known, card)), resampling),
        "internal": None,
    }
    if internal is not None:
        there = internal.studies.assign(probability=_calibrated(internal.studies, card))
        found["internal"] = _fit_of(there, resampling)
    return found


def _fit_of(studies: pd.DataFrame, resampling: _Resampling) -> dict[str, Any]:
    y, probability, patients = _arrays(studies)
    wanted = {"": Variant(probability, 0.5, ("brier", "ece"))}
    return {
        "line": calibration_line(y, probability, patients),
        "scores": bootstrap_variants(y, wanted, patients, **resampling)[""],
    }


def _arrays(studies: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    labels, values = studies["label"].to_numpy(np.int8), studies["probability"].to_numpy()
    return labels, values, studies["patient"].to_numpy()


def _calibrated(studies: pd.DataFrame, card: Card) -> np.ndarray:
    return np.asarray(card.calibration.apply(studies["probability"].to_numpy()))


def _count(studies: pd.DataFrame) -> dict[str, int]:
    return {
        "n": len(studies),
        "n_abnormal": int(studies["label"].sum()),
        "n_patients": int(studies["patient"].nunique()),
    }


def _recorded_scores(
    card: Card,
) -> tuple[dict[str, Interval], dict[str, dict[str, Interval]]]:
    """Return the card's scores of the model's own test, overall and by region, or {}."""
    test = card.scores.test or {}
    regions = test.get("regions", {})
    return _intervals(test.get("scores", test)), {
        str(name): _intervals(own) for name, own in regions.items()
    }


def _intervals(scores: Mapping[str, Any]) -> dict[str, Interval]:
    """Return the intervals that `Interval.as_dict` wrote, None as NaN."""
    found = {}
    for name, own in scores.items():
        if isinstance(own, Mapping) and set(own) >= {"value", "low", "high"}:
            value, low, high = (
                nan if own[end] is None else float(own[end]) for end in ("value", "low", "high")
            )
            found[name] = Interval(value, low, high)
    return found
