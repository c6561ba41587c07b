"""Documents of `medembed audit`: of labels, which `audit.json` holds too, and of shortcuts."""

from typing import Annotated, Literal

from medembed.core.schema import ClosedRecord, Count, Digest, Field, Given

__all__ = [
    "AuditedColumnDocument",
    "AuditedGroupDocument",
    "AuditedPart",
    "ColumnScore",
    "EncodedColumn",
    "GroupGap",
    "LabelAuditDocument",
    "LabelLoss",
    "LabelScore",
    "LossTest",
    "MatchedLabel",
    "Noise",
    "ResidualisedLabel",
    "ShortcutsDocument",
    "Suspect",
]

Label = Annotated[int, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[float, Field(ge=0)]


class Suspect(ClosedRecord):
    """A study, or an image if labels are per image, whose label the scores contradict."""

    rank: Count
    split: Literal["train", "test"]
    region: str
    label: Label
    probability: Share
    """Calibrated, of abnormal; the mean of the heads, calibrated again."""
    scores: dict[str, Share]
    """Calibrated probability of each head."""
    images: list[Digest]
    names: Given[list[str]] = None
    """Of the images, with --names, as is study."""
    study: Given[str] = None


class AuditedPart(ClosedRecord):
    """Counts of the audited studies in a split, and in a region of it."""

    split: Literal["train", "test"]
    region: str | None
    """Null is all regions."""
    studies: Count
    suspects: Count
    expected: Number
    errors: Number


class Noise(ClosedRecord):
    """The fitted model of wrong labels, see `evaluation.label_errors.NoiseModel`."""

    intercept: float
    slope: float
    missed: Share
    invented: Share


class LabelAuditDocument(ClosedRecord):
    """What an audit of labels found."""

    format: Literal["medembed-label-audit"]
    version: Literal[1]
    run: str
    """Name of the run's directory."""
    manifest: Digest
    level: Literal["study", "image"]
    synthetic: bool
    heads: list[str]
    thresholds: dict[Literal["normal", "abnormal"], Share]
    """Probabilities of a class from which it is confident."""
    noise: Noise
    studies: Count
    """Audited, of train and test, as are the counts that follow."""
    not_scored: Count
    """Labelled studies of the run that not every head has scored out of fold or on test."""
    expected: Number
    """Suspects if all labels were right."""
    errors: Number
    """Estimated wrong labels, suspects or not."""
    errors_low: Number | None
    """With `errors_high` the 95 % interval; null where it cannot be estimated."""
    errors_high: Number | None
    parts: list[AuditedPart]
    suspects: list[Suspect]


_P = Field(ge=0, le=1)


class ColumnScore(ClosedRecord):
    """An AUROC with its interval; null is not estimable."""

    value: float | None
    low: float | None
    high: float | None
    method: str | None
    reason: Given[str] = None
    """Why there is no interval."""


class EncodedColumn(ColumnScore):
    """How well the column can be read: the macro AUROC, and tests that it is above 0.5."""

    p: float | None = _P
    p_holm: float | None = _P
    """Corrected over the columns, as each `p_holm` here."""


class LabelLoss(ClosedRecord):
    """The AUROC of the label that is lost without the column."""

    difference: float | None
    low: float | None
    high: float | None
    method: str | None


class LossTest(LabelLoss):
    """A loss, and one-sided tests that it is above 0."""

    p: float | None = _P
    p_holm: float | None = _P


class ResidualisedLabel(ClosedRecord):
    """The label's score without the groups' means in the embedding."""

    score: ColumnScore
    control: ColumnScore
    """Without the means of groups dealt at random: `lost` is this less `score`."""
    lost: LossTest


class MatchedLabel(ClosedRecord):
    """The label's score on pairs of images of one group."""

    score: ColumnScore
    lost: LabelLoss


class LabelScore(ClosedRecord):
    """The label's score, and what of it is lost without the column."""

    score: ColumnScore
    residualised: ResidualisedLabel
    matched: MatchedLabel


class GroupGap(LossTest):
    """The label's AUROC in group `a` less that in `b`: of all pairs of groups the smallest p.

    `p` is corrected over the pairs, and two-sided. With many groups `b` is all others.
    """

    a: str
    b: str
    reason: str | None
    """Why there is no interval."""


class AuditedGroupDocument(ClosedRecord):
    """A group of a column, and the label's AUROC within it; null if it was not used."""

    name: str
    n: Count
    n_abnormal: Count
    n_patients: Count
    auroc: ColumnScore | None


class AuditedColumnDocument(ClosedRecord):
    """A column: three answers, null if not estimable."""

    groups: list[AuditedGroupDocument]
    left_out: Count
    """Images without a value, outside of the bands, or in a group that is too small."""
    reason: str | None
    """Why there are no answers."""
    alone: ColumnScore | None
    """The label's AUROC by the column alone."""
    encoded: EncodedColumn | None
    used: LabelScore | None
    gap: GroupGap | None


class ShortcutsDocument(ClosedRecord):
    """`medembed audit shortcuts --json`."""

    pooling: str
    folds: Count
    seed: Count
    images: Count
    """Labelled, of train."""
    patients: Count
    baselines: dict[str, ColumnScore]
    """The label's AUROC by `embedding`, by the columns alone (`metadata`), and by brightness, size,
    sharpness and border of the films (`imagestats`)."""
    lacking: dict[str, str]
    """Those of them that cannot be had, and why."""
    columns: dict[str, AuditedColumnDocument]
