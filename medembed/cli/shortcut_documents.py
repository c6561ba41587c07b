"""Models of what `medembed audit shortcuts` prints with `--json`; see `documents`."""

from medembed.core.schema import ClosedRecord, Count, Field, Given

__all__ = [
    "AuditedColumnDocument",
    "AuditedGroupDocument",
    "ColumnScore",
    "EncodedColumn",
    "GroupGap",
    "LabelLoss",
    "LabelScore",
    "LossTest",
    "MatchedLabel",
    "ResidualisedLabel",
    "ShortcutsDocument",
]

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
