"""Types of `audit.json`, which `medembed audit labels --json` prints too."""

from typing import Annotated, Literal

from medembed.core.schema import ClosedRecord, Count, Digest, Field, Given

__all__ = ["AuditedPart", "LabelAuditDocument", "Noise", "Suspect"]

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
