"""The document of a comparison, typed: what `compare` returns and `medembed compare --json` prints.

It stays a tree of plain dicts, equal to its JSON; mypy and the JSON Schema read the `TypedDict`s.
"""

from typing import Annotated, Literal, NotRequired

from typing_extensions import TypedDict  # of typing, pydantic reads it from 3.12 on only

from medembed.core.schema import AnyTable, Count, Field, closed

__all__ = [
    "AtSensitivity",
    "CalibratedScores",
    "CalibrationBin",
    "CalibrationCurve",
    "CalibrationPanel",
    "CalibrationParameters",
    "ColumnGroups",
    "ComparedHead",
    "ComparedRun",
    "ComparisonResult",
    "Confusion",
    "ConfusionAt",
    "Counts",
    "Curve",
    "Deferral",
    "DeferralLevel",
    "Flow",
    "FlowCounts",
    "FlowPart",
    "GapDocument",
    "Group",
    "GroupScores",
    "GroupedHead",
    "Groupings",
    "HeadDeferral",
    "HeadName",
    "LayerPoint",
    "LayerSeries",
    "LayerTest",
    "McNemar",
    "NonInferiority",
    "Pair",
    "PointDocument",
    "ReasonCount",
    "RetrievalDocument",
    "RetrievalGroups",
    "RetrievalScores",
    "Score",
    "SeedSpread",
    "Series",
    "Spread",
    "TrendPoint",
    "UsedCounts",
    "VersusBest",
]

GroupScores = AnyTable
"""Of a region or a number of views: its counts, and its scores, each a `Score`."""


@closed
class Counts(TypedDict):
    """How many rows were scored."""

    n: Count
    n_abnormal: Count
    n_patients: Count


@closed
class Score(TypedDict):
    """A score with its interval; null is not estimable."""

    value: float | None
    low: float | None
    high: float | None
    method: str | None
    """Of the interval."""
    k: NotRequired[Count]
    n: NotRequired[Count]
    """Of a share: k of n."""
    reason: NotRequired[str]
    """Why there is no interval."""


@closed
class ComparedRun(TypedDict):
    """A run, what it predicts if not the label, and what of it was not compared."""

    name: str
    target: NotRequired[str]
    left_out: Count
    left_out_test: Count
    unlabelled: Count
    dropped: Count
    sought_test: NotRequired[Count]
    lacking: NotRequired[dict[str, str]]
    without_suspects: NotRequired[dict[str, Count]]
    priors_of: str | None
    """The run that has the same priors; these three name earlier runs."""
    left_out_of: str | None
    """The run that left out the same images."""
    copy_of: str | None
    """The run whose heads predict exactly alike."""


@closed
class ReasonCount(TypedDict):
    """A reason why images were left out, and how many were."""

    reason: str
    images: Count


class FlowCounts(TypedDict):
    """Images, and the studies and patients that they belong to; null is not recorded."""

    images: Count | None
    studies: Count | None
    patients: Count | None


class UsedCounts(TypedDict):
    """Images that were used, and their studies and patients."""

    images: Count
    studies: Count
    patients: Count


@closed
class FlowPart(TypedDict):
    """What became of one split; null is not recorded."""

    split: str
    images: Count | None
    failed: Count | None
    unlabelled: Count | None
    not_given: Count
    used: UsedCounts
    classes: dict[str, UsedCounts]


@closed
class Flow(TypedDict):
    """What a run found, left out and used; null is not recorded."""

    run: str
    found: Count | None
    not_listed: Count | None
    excluded: list[ReasonCount] | None
    manifest: FlowCounts
    not_asked: Count | None
    failed: Count | None
    failures: list[ReasonCount]
    unlabelled: Count | None
    not_given: Count
    used: UsedCounts
    splits: list[FlowPart]


@closed
class Confusion(TypedDict):
    """Decisions against labels."""

    tn: Count
    fp: Count
    fn: Count
    tp: Count


@closed
class ConfusionAt(TypedDict):
    """Decisions at a threshold against labels."""

    threshold: float
    tn: Count
    fp: Count
    fn: Count
    tp: Count


@closed
class PointDocument(TypedDict):
    """A head's decisions at an operating point."""

    name: str
    threshold: float | None
    scores: dict[str, Score]
    confusion: Confusion | None
    at_prevalence: NotRequired[AnyTable]
    """Predictive values at another prevalence, and that prevalence."""


@closed
class AtSensitivity(TypedDict):
    """Decisions at the threshold of a sensitivity on out-of-fold predictions."""

    target: float
    threshold: float | None
    scores: dict[str, Score]


@closed
class Curve(TypedDict):
    """Net benefit by threshold."""

    thresholds: list[float]
    value: list[float]
    low: list[float | None]
    high: list[float | None]
    treat_all: list[float]
    method: str | None


class CalibrationParameters(TypedDict):
    """A calibration as cards and runs keep it."""

    method: Literal["platt", "temperature"]
    slope: Annotated[float, Field(gt=0)]
    intercept: float


@closed
class CalibrationBin(TypedDict):
    """A bin of ECE; see `evaluation.calibration.reliability`."""

    low: float
    high: float
    n: Count
    k: Count
    mean_probability: float | None
    share_abnormal: float | None
    share_low: float | None
    share_high: float | None
    method: str | None


@closed
class CalibrationCurve(TypedDict):
    """The share of abnormal rows by probability, with its band."""

    probability: list[float]
    share: list[float]
    low: list[float | None]
    high: list[float | None]


@closed
class CalibrationPanel(TypedDict):
    """How well the probabilities of one calibration fit."""

    brier: Score
    ece: Score
    slope: Score
    intercept: Score
    bins: list[CalibrationBin]
    curve: CalibrationCurve


@closed
class VersusBest(TypedDict):
    """A head's test against the best one."""

    difference: float | None
    p_holm: float | None
    tied: bool
    """Whether the difference may be chance."""


class DeferralLevel(TypedDict):
    """Shares of prediction sets on test, at a nominal coverage."""

    nominal: float
    alpha: float
    coverage: Score
    coverage_normal: Score
    coverage_abnormal: Score
    deferred: Score
    empty: Score
    error: Score
    regions: dict[str, GroupScores]


@closed
class Deferral(TypedDict):
    """How a head's prediction sets perform on test."""

    levels: list[DeferralLevel]
    curve: dict[str, list[float | None]]
    min_group: Count
    warning: str | None


class CalibratedScores(TypedDict):
    """The part of a head's entry that is resampled together."""

    at_sensitivity: AtSensitivity
    calibrations: dict[str, CalibrationPanel]


class HeadDeferral(TypedDict):
    """How a head's prediction sets perform, or why it has none."""

    deferral: Deferral | None
    deferral_note: str | None


class HeadName(TypedDict):
    """What names a head in any part of a comparison."""

    run: str
    head: str


@closed
class ComparedHead(TypedDict):
    """A head's scores on the test rows that all runs share."""

    run: str
    head: str
    baseline: bool
    pooling: str | None
    trial: int | None
    params: AnyTable | None
    cv: float | None
    cv_method: str | None
    n_tried: Count | None
    seconds: NotRequired[float | None]
    depth: int | None
    seed: int | None
    train_fraction: float | None
    n_train_patients: Count | None
    threshold: float
    calibration: CalibrationParameters
    scores: dict[str, Score]
    auroc_delong: Score
    fit: dict[str, Score]
    at_half: dict[str, Score]
    at_sensitivity: AtSensitivity
    calibrations: dict[str, CalibrationPanel]
    confusion: ConfusionAt
    operating_points: list[PointDocument]
    net_benefit: Curve
    regions: dict[str, GroupScores]
    mean_over_regions: GroupScores
    views: dict[str, GroupScores]
    deferral: Deferral | None
    deferral_note: str | None
    """Why there are no prediction sets."""
    versus_best: VersusBest | None
    """None of the best head itself."""


@closed
class McNemar(TypedDict):
    """The decisions of two heads: rows that only one of them got right."""

    only_a: Count
    only_b: Count
    p: float | None


@closed
class Pair(TypedDict):
    """A paired test of the difference in AUROC between two heads."""

    a: str
    b: str
    score: Literal["auroc"]
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    method: str | None
    p_holm: float | None
    """After Holm's correction over all pairs."""
    p_bootstrap: float | None
    p_delong: float | None
    mcnemar: McNemar


@closed
class Spread(TypedDict):
    """Standard deviations of a score over seeds, and over samples of patients."""

    mean: float | None
    seed_sd: float | None
    sampling_sd: float | None


@closed
class SeedSpread(TypedDict):
    """A head that was trained with several seeds."""

    head: str
    runs: list[str]
    n_seeds: Count
    auroc: Spread
    macro_f1: Spread


class TrendPoint(TypedDict, total=False):
    """A head's scores at a depth, or with a share of the training patients."""

    run: str
    depth: int | None
    train_fraction: float | None
    n_train_patients: Count | None
    auroc: Score
    macro_f1: Score


@closed
class Series(TypedDict):
    """A head's scores over depths or shares of the training patients."""

    head: str
    points: list[TrendPoint]


@closed
class LayerTest(TypedDict):
    """A layer's difference in AUROC from the last, paired."""

    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    method: str | None
    p_holm: float | None


@closed
class LayerPoint(TypedDict):
    """A layer's AUROC, out-of-fold."""

    pooling: str
    block: int | None
    """None for the tower's own output."""
    auroc: Score
    versus_last: LayerTest | None


@closed
class LayerSeries(TypedDict):
    """A linear probe by layer of the encoder; see `results.ablations`."""

    run: NotRequired[str]
    """Within a comparison."""
    head: str
    pooling: str
    n: Count
    n_patients: Count
    n_blocks: int | None
    points: list[LayerPoint]
    best: str
    last: str
    unfreeze: int | None
    """Blocks above the best layer."""


@closed
class Group(TypedDict):
    """A group of test rows by a column of the manifest."""

    name: str
    n: Count
    n_abnormal: Count
    n_patients: Count


@closed
class GroupedHead(TypedDict):
    """A head's scores in each group."""

    run: str
    head: str
    groups: dict[str, dict[str, Score]]


@closed
class ColumnGroups(TypedDict):
    """The heads' scores by the groups of a column."""

    column: str
    bands: list[float | None] | None
    groups: list[Group]
    rows: list[GroupedHead]
    notes: list[str]


@closed
class GapDocument(TypedDict):
    """The difference in a head's score between two groups."""

    run: str
    head: str
    score: str
    a: str
    b: str
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    """After Holm's correction over all gaps of the head."""
    method: str | None
    reason: NotRequired[str]


class Groupings(TypedDict):
    """What a comparison has more if it is by a column."""

    groups: ColumnGroups
    gaps: list[GapDocument]


@closed
class NonInferiority(TypedDict):
    """Whether a head is worse than the best one by less than a margin."""

    a: str
    b: str
    score: Literal["auroc"]
    margin: float
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    non_inferior: bool | None
    reason: NotRequired[str]


@closed
class RetrievalScores(TypedDict):
    """How well relevant films are found by some queries."""

    n: Count
    n_patients: Count
    left_out: Count
    """Queries for which there is no relevant film."""
    chance: float | None
    p_at_1: Score
    p_at_5: Score
    p_at_10: Score
    map: Score


@closed
class RetrievalGroups(TypedDict):
    """Retrieval scores overall, and by label and region of the query."""

    overall: RetrievalScores
    labels: dict[str, RetrievalScores]
    regions: dict[str, RetrievalScores]


@closed
class RetrievalDocument(TypedDict):
    """Retrieval by one pooling; relevant films share the query's label, or its region."""

    pooling: str
    n_queries: Count
    n_drawn: Count
    n_database: Count
    label: RetrievalGroups
    region: RetrievalGroups


@closed
class ComparisonResult(TypedDict):
    """A comparison of the heads of runs; see `comparison.compare_runs`."""

    level: Literal["study", "image"]
    n_resamples: Count
    seed: int
    test: Counts
    runs: list[ComparedRun]
    flow: list[Flow]
    operating_points: list[str]
    prevalence: float | None
    synthetic: bool
    rows: list[ComparedHead]
    paired: list[Pair]
    seeds: list[SeedSpread]
    efficiency: list[Series]
    depths: list[Series]
    layers: list[LayerSeries]
    notes: list[str]
    groups: NotRequired[ColumnGroups]
    gaps: NotRequired[list[GapDocument]]
    """With --by."""
    non_inferiority: NotRequired[list[NonInferiority]]
    """With --margin."""
    retrieval: NotRequired[list[RetrievalDocument]]
    """With --retrieval."""
