"""The card of a packaged model: written when the model is saved, read before it is applied."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as short
from typing import Annotated, Any, Literal, NotRequired, Self, TypedDict, final

import numpy as np
import pandas as pd

from medembed.core.errors import ModelError, PathNotFoundError
from medembed.core.schema import (
    AfterValidator,
    AnyTable,
    ClosedRecord,
    Count,
    Field,
    Given,
    Record,
    Word,
    field_validator,
    find_problems,
    model_validator,
    parse,
)
from medembed.dataset.covariates import (
    LARGEST,
    MAX_CATEGORIES,
    CategoricalColumn,
    CovariateEncoder,
    NumericColumn,
    is_covariate,
    to_number,
)
from medembed.dataset.targets import ClassNames, name_classes
from medembed.evaluation.calibration import Calibration, CalibrationEntry
from medembed.evaluation.conformal import Conformal, ConformalEntry, fit_conformal
from medembed.evaluation.intervals import plain
from medembed.evaluation.scores import score
from medembed.evaluation.thresholds import (
    PACKAGED,
    DecisionRule,
    OperatingPoint,
    ThresholdRule,
    fit_points,
    parse_rule,
)
from medembed.heads.packaging import Model, read_document
from medembed.results.decisions import NamedThreshold, PointEntries, read_points, write_points
from medembed.results.runs import Run

__all__ = [
    "Card",
    "CardDecisions",
    "CardDocument",
    "CardScores",
    "CategoricalEntry",
    "CovariatesEntry",
    "DecisionEntries",
    "EncoderSource",
    "NewScores",
    "NumericEntry",
    "ScoreInterval",
    "SourceEntry",
    "TestScores",
    "Trained",
    "TrainedCounts",
    "TrainingData",
    "describe_decisions",
    "read_card",
    "read_conformal",
    "read_covariates",
    "require_winner",
]

#: The only place beside a model where an encoder of the same run lies.
_ENCODER_PATH = r"^\.\./\.\./encoders/[A-Za-z0-9][A-Za-z0-9_.+-]*$"
_WAY_OUT = "Train or copy the model again."
Pooled = Annotated[Word, Field(pattern=r"^[^+]+(\+[^+]+)*$")]
"""Names of poolings, joined by `+`."""


class EncoderSource(Record):
    """The encoder whose embeddings a model reads."""

    source: Word | None = None
    revision: Word | None = None
    path: Annotated[str, Field(pattern=_ENCODER_PATH)] | None = None
    """Relative to the model's directory."""


class SourceEntry(Record):
    """One of the encoders of an ensemble, and what its members read of it."""

    encoder: EncoderSource
    spec: AnyTable
    pooling: Pooled


class ScoreInterval(Record):
    """A score with its interval."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


def _take_intervals(scores: dict[str, Any]) -> dict[str, Any]:
    """Check intervals; other values are not read."""
    for name, own in scores.items():
        for problem in find_problems(ScoreInterval, own) if isinstance(own, dict) else []:
            raise ValueError(f"{name}.{problem}")
    return scores


Intervals = Annotated[AnyTable, AfterValidator(_take_intervals)]


class CardScores(Record):
    """Scores of a model: out of fold, and on test rows once they are known."""

    out_of_fold: Any = None
    test: AnyTable | None = None

    @field_validator("test")
    @classmethod
    def _check_test(cls, test: dict[str, Any] | None) -> dict[str, Any] | None:
        if test is not None:
            # Older cards hold the scores themselves.
            found = {"scores": test.get("scores", test), "regions": test.get("regions", {})}
            for problem in find_problems(TestScores, found):
                raise ValueError(str(problem))
        return test


class TestScores(Record):
    """Scores of a model on test rows, overall and by region."""

    __test__ = False  # not a test case of pytest

    scores: Intervals
    regions: dict[str, Intervals]


def _check_name(name: str) -> str:
    if not is_covariate(name):
        raise ValueError(f"must be a covariate, not {name!r}")
    return name


def _check_categories(words: list[str]) -> list[str]:
    """Refuse anything but distinct words in ascending order, which training writes."""
    are_words = all(word and word == word.strip() and to_number(word) is None for word in words)
    if not are_words or words != sorted(set(words)):
        raise ValueError(f"must be distinct words in ascending order, not {short(words)}")
    return words


CovariateName = Annotated[str, AfterValidator(_check_name)]


class NumericEntry(ClosedRecord):
    """A card's entry of a covariate of numbers."""

    name: CovariateName
    kind: Literal["numeric"]
    fill: float = Field(ge=-LARGEST, le=LARGEST)


class CategoricalEntry(ClosedRecord):
    """A card's entry of a covariate of words."""

    name: CovariateName
    kind: Literal["categorical"]
    categories: Annotated[list[str], AfterValidator(_check_categories)] = Field(
        min_length=1, max_length=MAX_CATEGORIES
    )


class CovariatesEntry(ClosedRecord):
    """A card's entry of the covariates, which `CovariateEncoder.as_dict` returns."""

    columns: list[Annotated[NumericEntry | CategoricalEntry, Field(discriminator="kind")]]

    @field_validator("columns")
    @classmethod
    def _check_twins(
        cls, columns: list[NumericEntry | CategoricalEntry]
    ) -> list[NumericEntry | CategoricalEntry]:
        names = [column.name for column in columns]
        if len(set(names)) < len(names):
            raise ValueError(f"must have different names, not {short(names)}")
        return columns

    def build(self) -> CovariateEncoder:
        """Return the encoder that the entry describes."""
        return CovariateEncoder(
            tuple(
                NumericColumn(own.name, own.fill)
                if isinstance(own, NumericEntry)
                else CategoricalColumn(own.name, tuple(own.categories))
                for own in self.columns
            )
        )


class TrainedCounts(Record):
    """How many images of a region a model was trained on."""

    images: Count
    studies: Given[Count] = None
    patients: Given[Count] = None
    abnormal: Count
    abnormal_studies: Given[Count] = None
    unlabelled: Given[Count] = None

    @model_validator(mode="after")
    def _check_abnormal(self) -> Self:
        if self.abnormal > self.images:
            raise ValueError(f"{self.abnormal} of {self.images} images cannot be abnormal")
        return self


class Trained(Record):
    """Counts of the training images."""

    images: Given[Count] = None
    studies: Given[Count] = None
    patients: Given[Count] = None
    abnormal: Given[Count] = None
    abnormal_studies: Given[Count] = None
    unlabelled: Given[Count] = None
    regions: Given[dict[str, TrainedCounts]] = None


class TrainingData(Record):
    """What a model was trained on; older cards have no counts."""

    trained: Trained | None = None


class CardDocument(Record):
    """`card` of `model.json`; older cards lack conformal scores and the encoder's source."""

    spec: AnyTable
    """Empty for an ensemble, whose encoders are in `sources`."""
    pooling: Pooled
    label_level: Literal["study", "image"]
    views: Literal["mean", "attention"]
    calibration: CalibrationEntry
    threshold: float
    training_images: list[Annotated[str, Field(pattern="^[0-9a-f]{16}$")]]
    operating_points: PointEntries | None = None
    conformal: ConformalEntry | None = None
    conformal_note: Word | None = None
    encoder: EncoderSource | None = None
    sources: list[SourceEntry] | None = Field(default=None, min_length=1)
    covariates: CovariatesEntry | None = None
    scores: Given[CardScores] = None
    synthetic: bool = False
    trial: int | None = None
    seed: int | None = None
    depth: int | None = None
    n_tried: int | None = None
    cv: float | None = None
    cv_method: Word | None = None
    data: TrainingData | None = None
    manifest: str | None = None
    """Its digest."""
    target: Given[Annotated[str, Field(pattern="^[a-z0-9_]+$")]] = None
    """What abnormal means, of a sweep of targets."""


@dataclass(frozen=True, eq=False)
class Card:
    """What embeddings a model reads, and how its scores become decisions.

    Attributes
    ----------
    spec : dict
        The spec of the embeddings that the head reads, from `CacheSpec.as_dict`.
    pooling : str
        Names of poolings, side by side in this order, joined by ``+``.
    label_level : {"study", "image"}
        The label level of the training manifest.
    views : {"mean", "attention"}
        How the views of a study are combined.
    calibration : Calibration
        Calibrates the head's study probabilities.
    threshold : float
        Youden's threshold on calibrated study probabilities; at or above it a study is abnormal.
    points : tuple of OperatingPoint
        All operating points that the model was packaged with; older models have only Youden's.
    conformal : Conformal or None
        Conformal scores of the head's study probabilities before calibration.
    conformal_note : str or None
        Why there are no conformal scores.
    encoder : EncoderSource
        Its `path` leads from the model's directory to an encoder that was adapted in the same run.
    covariates : CovariateEncoder or None
        Turns the manifest's columns into the head's.
    scores : CardScores
        `test` is None until it is known: see `results.model_readme.complete_cards`.
    synthetic : bool
        Whether the model was trained on synthetic images.
    training_images : frozenset of str
        Codes of the training images, see `results.predictions.image_code`.
    document : CardDocument
        The whole card.
    target : str or None
        The manifest's target that the model predicts; None for the label.
    sources : tuple of SourceEntry
        The encoders of an ensemble, in the order of the columns that it reads; empty for any other
        model.
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
    encoder: EncoderSource
    covariates: CovariateEncoder | None
    scores: CardScores
    synthetic: bool
    training_images: frozenset[str]
    document: CardDocument
    target: str | None = None
    sources: tuple[SourceEntry, ...] = ()

    @property
    def classes(self) -> ClassNames:
        """What decisions are called: normal and abnormal, or "no metal" and "metal" of a target."""
        return name_classes(self.target)

    def by_encoder(self) -> "list[Card]":
        """Return a card for each encoder that the model reads: itself, unless it is an ensemble."""
        return [
            replace(
                self,
                spec=source.spec,
                pooling=source.pooling,
                encoder=source.encoder,
                sources=(),
            )
            for source in self.sources
        ] or [self]

    def point(self, asked: str | None = None) -> OperatingPoint:
        """Return an operating point: by default Youden's, or a packaged one, or a threshold.

        Parameters
        ----------
        asked : str, optional
            An operating point, read by `thresholds.parse_rule`.

        Raises
        ------
        TrainingDataError
            `asked` is not an operating point.
        ModelError
            The model was not packaged with that point; the message names those that it has.
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
    """Return a model's card; older cards lack conformal scores and the encoder's source.

    Parameters
    ----------
    model : Model
        The loaded model.
    path : path
        The model's directory, for messages.

    Raises
    ------
    ModelError
        An entry is missing or wrong; the message names it.
    """
    where = f"the card of the model at {path}"
    found = parse(CardDocument, model.card, ModelError, where, _WAY_OUT)
    return Card(
        spec=found.spec,
        pooling=found.pooling,
        label_level=found.label_level,
        views=found.views,
        calibration=found.calibration.build(),
        threshold=found.threshold,
        points=read_points(found.operating_points, found.threshold),
        conformal=None if found.conformal is None else found.conformal.build(),
        conformal_note=found.conformal_note,
        encoder=found.encoder or EncoderSource(),
        covariates=None if found.covariates is None else found.covariates.build(),
        scores=found.scores or CardScores(),
        synthetic=found.synthetic,
        training_images=frozenset(found.training_images),
        document=found,
        target=found.target,
        sources=tuple(found.sources or ()),
    )


def read_covariates(document: object) -> CovariateEncoder:
    """Return the encoder whose `CovariateEncoder.as_dict` is `document`.

    Raises
    ------
    ModelError
        `as_dict` does not return such a document.
    """
    where = "the model's covariates are damaged"
    return parse(CovariatesEntry, document, ModelError, where, _WAY_OUT).build()


class NewScores(TypedDict):
    """Scores of a model on its card: out of fold, and on test rows once they are known."""

    out_of_fold: dict[str, float | None]
    test: NotRequired[AnyTable]


class DecisionEntries(TypedDict):
    """The part of a card that turns scores into decisions."""

    calibration: dict[str, str | float]
    """Platt's."""
    threshold: float
    """Youden's, of calibrated scores."""
    operating_points: list[NamedThreshold]
    conformal: dict[str, object]
    conformal_note: str | None
    scores: NewScores
    """Out of fold, at Youden's threshold."""


@final
class CardDecisions(DecisionEntries):
    """Those entries alone."""


def describe_decisions(studies: pd.DataFrame, rules: Sequence[ThresholdRule] = ()) -> CardDecisions:
    """Return a card's calibration, thresholds and scores, from out-of-fold predictions of train.

    The predictions must come from trainings that used the rows neither to learn nor to decide
    anything.

    Parameters
    ----------
    studies : DataFrame
        One row per labelled study: `label` (0, 1), `probability` (the head's own, out of fold),
        `region`, `patient`.
    rules : sequence of ThresholdRule
        Operating points in addition to `thresholds.PACKAGED`.

    Raises
    ------
    TrainingDataError
        There is only one class, or probabilities lie outside [0, 1].
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
    """Return the conformal scores of a run's packaged model, without loading the model.

    Returns
    -------
    Conformal or None
        None if the head has no model (a prior) or the model has no conformal scores.

    Raises
    ------
    ModelError
        The model's card cannot be read, or the model is not the run's winner.
    """
    path = run.model_path(head)
    try:
        document = read_document(path)
    except PathNotFoundError:
        return None
    card = document.card
    require_winner(run, head, card)
    if card.get("conformal") is None:
        return None
    where = f"the card of the model at {path}: conformal"
    return parse(ConformalEntry, card["conformal"], ModelError, where, _WAY_OUT).build()


def require_winner(run: Run, head: str, card: Mapping[str, object]) -> None:
    """Refuse a model in a run that is not the winner named in `run.json`.

    Raises
    ------
    ModelError
        The card and `run.json` differ; the message names the first such entry.
    """
    entry = run.info.winner(head)
    for name in ("trial", "pooling", "cv", "seed"):
        named, own = getattr(entry, name), card.get(name)
        if named is not None and own is not None and named != own:
            raise ModelError(
                f"the model at {run.model_path(head)} has {name} {own}, and run.json names "
                f"{named}: the model is not of this run. Restore it, or run again into another "
                "--out"
            )
