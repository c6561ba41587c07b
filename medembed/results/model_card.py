"""What a packaged model says of itself: written when it is saved, read before it is asked."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medembed.core.errors import ModelError, PathNotFoundError
from medembed.dataset.covariates import CovariateEncoder
from medembed.dataset.manifest import LABEL_LEVELS
from medembed.evaluation.calibration import Calibration
from medembed.evaluation.conformal import Conformal, fit_conformal
from medembed.evaluation.intervals import plain
from medembed.evaluation.scores import is_number, score
from medembed.evaluation.thresholds import (
    PACKAGED,
    DecisionRule,
    OperatingPoint,
    ThresholdRule,
    fit_points,
    parse_rule,
)
from medembed.heads.packaging import Model, read_document
from medembed.results.decisions import read_points, write_points
from medembed.results.runs import Run

__all__ = [
    "Card",
    "describe_decisions",
    "read_card",
    "read_conformal",
    "require_winner",
]

VIEWS = ("mean", "attention")
#: The only place beside a model where an encoder of the same run lies.
_ENCODER_PATH = re.compile(r"\.\./\.\./encoders/[A-Za-z0-9][A-Za-z0-9_.+-]*")
_COUNTS = ("images", "abnormal")
_CODE = re.compile(r"[0-9a-f]{16}")
_WAY_OUT = "Train or copy the model again."


@dataclass(frozen=True, eq=False)
class Card:
    """What a model asks of embeddings, and how its scores become answers.

    Attributes
    ----------
    spec : dict
        Of the embeddings that the head reads, as `CacheSpec.as_dict` wrote it.
    pooling : str
        Names of poolings, side by side in this order, joined by ``+``.
    label_level : {"study", "image"}
        Of the manifest it was trained on.
    views : {"mean", "attention"}
        How the views of a study combine.
    calibration : Calibration
        Of the head's study probabilities.
    threshold : float
        Of calibrated study probabilities: abnormal at or above it. Youden's.
    points : tuple of OperatingPoint
        All that it was packaged with; models of before have Youden's alone.
    conformal : Conformal or None
        On the head's study probabilities before calibration.
    conformal_note : str or None
        Why there is none.
    encoder : dict
        ``source``, ``revision`` and ``path``, each a str or None; ``path`` is relative to the
        model's directory and leads to an encoder that was adapted in the same run.
    covariates : dict or None
        As `CovariateEncoder.as_dict` wrote it.
    scores : dict
        ``out_of_fold``, and ``test`` once it is known: see `results.model_readme.complete_cards`.
    synthetic : bool
        Whether it was trained on images that nobody's body has made.
    training_images : frozenset of str
        Codes of the images it has seen, see `results.predictions.image_code`.
    document : dict
        The whole card.
    """

    spec: dict[str, Any]
    pooling: str
    label_level: str
    views: str
    calibration: Calibration
    threshold: float
    points: tuple[OperatingPoint, ...]
    conformal: Conformal | None
    conformal_note: str | None
    encoder: dict[str, Any]
    covariates: dict[str, Any] | None
    scores: dict[str, Any]
    synthetic: bool
    training_images: frozenset[str]
    document: dict[str, Any]

    def point(self, asked: str | None = None) -> OperatingPoint:
        """Return an operating point: by default Youden's, or a packaged one, or a threshold.

        Parameters
        ----------
        asked : str, optional
            As `thresholds.parse_rule` reads it.

        Raises
        ------
        TrainingDataError
            It is none.
        ModelError
            The model was not packaged with it; names what it has.
        """
        if asked is None:
            return OperatingPoint("youden", self.threshold)
        rule = parse_rule(asked)
        if rule.kind == "threshold" and rule.value is not None:
            return OperatingPoint(rule.name, rule.value)
        for point in self.points:
            if point.name == rule.name:
                return point
        raise ModelError(
            f"the model has no operating point {rule.name}: it packages "
            f"{', '.join(point.name for point in self.points) or 'none'}. Ask for one of these, "
            "or for a threshold of your own, such as threshold=0.3."
        )


def read_card(model: Model, path: str | Path) -> Card:
    """Read a model's card; those of before lack conformal scores and the encoder's source.

    Parameters
    ----------
    model : Model
        Loaded.
    path : path
        Where it lies, for messages.

    Raises
    ------
    ModelError
        Names the entry that is missing or wrong.
    """
    try:
        return _read(model.card)
    except ModelError as error:
        text = str(error).rstrip(".")
        raise ModelError(f"the card of the model at {path}: {text}. {_WAY_OUT}") from error


def describe_decisions(
    studies: pd.DataFrame, rules: Sequence[ThresholdRule] = ()
) -> dict[str, Any]:
    """Fit what turns a head's scores into answers, on out-of-fold predictions of train.

    They are of trainings that have not seen the rows, neither to learn nor to decide anything.

    Parameters
    ----------
    studies : DataFrame
        One row per labelled study: `label` (0, 1), `probability` (the head's own, out of fold),
        `region`, `patient`.
    rules : sequence of ThresholdRule
        Operating points beside `thresholds.PACKAGED`.

    Returns
    -------
    dict
        Entries of a card: ``calibration`` (Platt's), ``threshold`` (Youden's, of calibrated
        scores), ``operating_points`` (``name``, ``threshold``), ``scores`` (``out_of_fold``, at
        Youden's), ``conformal``, and
        ``conformal_note``, None.

    Raises
    ------
    TrainingDataError
        Only one class, or probabilities outside [0, 1].
    """
    y, raw = studies["label"].to_numpy(np.int8), studies["probability"].to_numpy(np.float64)
    calibration, threshold, calibrated = DecisionRule.fit(y, raw)
    regions, patients = (studies[name].to_numpy() for name in ("region", "patient"))
    conformal = fit_conformal(raw, y, regions, patients=patients)
    return {
        "calibration": calibration.as_dict(),
        "threshold": threshold,
        "operating_points": write_points(fit_points((*PACKAGED, *rules), y, calibrated)),
        "conformal": conformal.as_dict(),
        "conformal_note": None,
        "scores": {"out_of_fold": plain(score(y, calibrated, threshold))},
    }


def read_conformal(run: Run, head: str) -> Conformal | None:
    """Read the conformal scores of a run's packaged model, without loading the model.

    Returns
    -------
    Conformal or None
        None where the head has no model (a prior) or its model has none.

    Raises
    ------
    ModelError
        There is a model, and its card cannot be read, or it is not the run's winner.
    """
    path = run.model_path(head)
    try:
        document = read_document(path)
    except PathNotFoundError:
        return None
    require_winner(run, head, document["card"])
    try:
        return _read_conformal(document["card"])
    except ModelError as error:
        raise ModelError(f"the card of the model at {path}: {error}. {_WAY_OUT}") from error


def require_winner(run: Run, head: str, card: Mapping[str, Any]) -> None:
    """Refuse a model that lies in a run and is not the winner that its `run.json` names.

    Raises
    ------
    ModelError
        Names the first entry in which the two differ.
    """
    entries = (entry for entry in run.info.get("leaderboard", []) if entry.get("head") == head)
    entry: Mapping[str, Any] = next(entries, {})
    for name in ("trial", "pooling", "cv", "seed"):
        named, own = entry.get(name), card.get(name)
        if named is not None and own is not None and named != own:
            raise ModelError(
                f"the model at {run.model_path(head)} has {name} {own}, and run.json names "
                f"{named}: it is not of this run. Restore it, or run again into another --out"
            )


def _read(card: Mapping[str, Any]) -> Card:
    needed = ("spec", "pooling", "label_level", "views", "calibration", "threshold")
    for name in (*needed, "training_images"):
        if name not in card:
            raise ModelError(f"{name} is missing")
    threshold = card["threshold"]
    _require("threshold", threshold, is_number(threshold))
    _require("label_level", card["label_level"], card["label_level"] in LABEL_LEVELS)
    _require("views", card["views"], card["views"] in VIEWS)
    pooling = card["pooling"]
    _require("pooling", pooling, _is_word(pooling) and all(pooling.split("+")))
    synthetic = card.get("synthetic", False)
    _require("synthetic", synthetic, isinstance(synthetic, bool))
    note = card.get("conformal_note")
    _require("conformal_note", note, note is None or _is_word(note))
    for name in ("trial", "seed", "depth", "n_tried"):
        _require(name, card.get(name), card.get(name) is None or type(card[name]) is int)
    _require("cv", card.get("cv"), card.get("cv") is None or is_number(card["cv"]))
    method = card.get("cv_method")
    _require("cv_method", method, method is None or _is_word(method))
    _check_trained(card.get("data"))
    return Card(
        spec=_table("spec", card["spec"]),
        pooling=pooling,
        label_level=card["label_level"],
        views=card["views"],
        calibration=Calibration.from_dict(_table("calibration", card["calibration"])),
        threshold=float(threshold),
        points=_read_points(card, float(threshold)),
        conformal=_read_conformal(card),
        conformal_note=note,
        encoder=_read_encoder(card.get("encoder")),
        covariates=_read_covariates(card.get("covariates")),
        scores=_read_scores(card.get("scores", {})),
        synthetic=synthetic,
        training_images=_read_codes(card["training_images"]),
        document=dict(card),
    )


def _read_points(card: Mapping[str, Any], threshold: float) -> tuple[OperatingPoint, ...]:
    try:
        return read_points(card.get("operating_points"), threshold)
    except ValueError as error:
        raise ModelError(str(error)) from None


def _read_conformal(card: Mapping[str, Any]) -> Conformal | None:
    entry = card.get("conformal")
    return None if entry is None else Conformal.from_dict(_table("conformal", entry))


def _read_encoder(entry: Any) -> dict[str, Any]:
    known = _table("encoder", {} if entry is None else entry)
    found = {name: known.get(name) for name in ("source", "revision", "path")}
    for name, value in found.items():
        _require(f"encoder.{name}", value, value is None or _is_word(value))
    path = found["path"]
    _require("encoder.path", path, path is None or bool(_ENCODER_PATH.fullmatch(path)))
    return found


def _read_covariates(entry: Any) -> dict[str, Any] | None:
    if entry is None:
        return None
    CovariateEncoder.from_dict(_table("covariates", entry))
    return dict(entry)


def _read_scores(entry: Any) -> dict[str, Any]:
    scores = _table("scores", entry)
    if scores.get("test") is not None:
        test = _table("scores.test", scores["test"])
        _check_scores("scores.test.scores", test.get("scores", test))
        for name, own in _table("scores.test.regions", test.get("regions", {})).items():
            _check_scores(f"scores.test.regions.{name}", own)
    return scores


def _check_scores(name: str, entry: Any) -> None:
    """Refuse intervals of other things than numbers; what is no interval is not read."""
    for score_name, own in _table(name, entry).items():
        if isinstance(own, dict):
            for end in ("value", "low", "high"):
                value = own.get(end)
                _require(f"{name}.{score_name}.{end}", value, value is None or is_number(value))


def _check_trained(data: Any) -> None:
    """Refuse counts of the training images that are none; older cards have no counts."""
    trained = _table("data", {} if data is None else data).get("trained") or {}
    regions = _table("data.trained", trained).get("regions", {})
    for name, own in _table("data.trained.regions", regions).items():
        n, n_abnormal = (_table(f"data.trained.regions.{name}", own).get(k) for k in _COUNTS)
        are_counts = type(n) is type(n_abnormal) is int and is_number(n) and 0 <= n_abnormal <= n
        _require(f"data.trained.regions.{name}", own, are_counts)


def _read_codes(entry: Any) -> frozenset[str]:
    are_codes = isinstance(entry, list) and all(
        isinstance(code, str) and _CODE.fullmatch(code) for code in entry
    )
    _require("training_images", entry, are_codes)
    return frozenset(entry)


def _table(name: str, value: Any) -> dict[str, Any]:
    _require(name, value, isinstance(value, dict))
    return dict(value)


def _require(name: str, value: Any, is_right: bool) -> None:
    if not is_right:
        shown = repr(value)
        raise ModelError(f"{name} is {shown if len(shown) <= 60 else f'{shown[:60]}…'}")


def _is_word(value: Any) -> bool:
    """Say whether this is text that a terminal may be shown."""
    return isinstance(value, str) and value != "" and value.isprintable()
