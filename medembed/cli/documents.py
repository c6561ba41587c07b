"""Models of what each command prints with `--json`; `make schemas` writes their JSON Schema.

No command imports this module: tests check every document that they see against the written
schemas. Keys may be added, but never removed or given another meaning.
"""

from typing import Any, Literal

from medembed.core.prompts import PromptEntry
from medembed.core.schema import AnyTable, ClosedRecord, Count, Digest, Field, Given, Record
from medembed.results.audit_schema import LabelAuditDocument, ShortcutsDocument
from medembed.results.comparison_schema import (
    ComparedHead,
    ComparisonResult,
    Counts,
    Pair,
    Score,
)
from medembed.results.run_schema import LeaderboardEntry
from medembed.results.target_comparison import TargetsComparison

__all__ = [
    "DOCUMENTS",
    "Autoencoder",
    "CacheCard",
    "CacheCompact",
    "CacheCopy",
    "CacheExport",
    "CacheInfo",
    "CacheVerify",
    "Check",
    "Checklist",
    "ChecklistItem",
    "Compacted",
    "Completion",
    "Coverage",
    "Demo",
    "Doctor",
    "EncoderFamily",
    "Evaluate",
    "ExcludedImage",
    "Execution",
    "Extract",
    "FailureCounts",
    "FailureDocument",
    "FilmAskedAbout",
    "KnownRecipe",
    "ManifestBuild",
    "ManifestCheck",
    "ManifestInit",
    "ManifestRelabel",
    "ManifestTexts",
    "MapDocument",
    "PlanDocument",
    "Point",
    "Prediction",
    "PromptsWritten",
    "RecipeText",
    "Report",
    "RunDocument",
    "Similar",
    "SimilarFilm",
    "SpecDocument",
    "SplitCount",
    "SweptTargets",
    "TargetCount",
    "WorklistImage",
]


class FailureDocument(ClosedRecord):
    """An image that could not become a row."""

    image: str | None
    sha256: str
    stage: Literal["read", "decode", "encode"]
    reason: str


class SplitCount(ClosedRecord):
    """Rows of a split, a region and a label; null is unlabelled."""

    split: str
    region: str
    label: Literal[0, 1] | None
    images: Count
    studies: Count
    patients: Count


class ExcludedImage(ClosedRecord):
    """An image that a build left out."""

    image: str
    reason: str


class TargetCount(ClosedRecord):
    """Images by the answer of a target."""

    positive: Count
    negative: Count
    unknown: Count


class ManifestBuild(ClosedRecord):
    """`medembed manifest build --json`."""

    images: Count
    studies: Count
    patients: Count
    abnormal: Count
    abnormal_studies: Count
    unlabelled: Count
    targets: Given[dict[str, TargetCount]] = None
    """Of a recipe with [targets]."""
    splits: list[SplitCount]
    excluded: list[ExcludedImage]
    warnings: list[str]
    notices: list[str]
    recipe: Given[str] = None
    """Where the proposed recipe was written, of a build without one."""


class ManifestInit(ClosedRecord):
    """`medembed manifest init --json`."""

    name: str
    layout: str
    image_root: str
    settled: AnyTable
    """What was guessed or chosen."""
    warnings: list[str]
    notices: list[str]
    recipe: str
    """The text of the recipe."""
    output: str


class KnownRecipe(ClosedRecord):
    """A recipe that medembed brings."""

    name: str
    about: str
    layout: str
    licence: str
    citation: str
    url: str
    patient_ids: str
    tried: str


class RecipeText(ClosedRecord):
    """The text of a recipe that medembed brings."""

    name: str
    recipe: str


class ManifestTexts(ClosedRecord):
    """`medembed manifest texts --json`."""

    output: str
    columns: list[str]
    texts: Count
    """Rows with a text."""


class ManifestRelabel(ClosedRecord):
    """`medembed manifest relabel --json`: counts of images."""

    changed: Count
    to_abnormal: Count
    to_normal: Count
    labelled: Count
    confirmed: Count
    output: str


class ManifestCheck(ClosedRecord):
    """`medembed manifest check --json`."""

    problems: list[str]
    warnings: list[str]
    near_duplicates: AnyTable | None = None
    """With --cache: pairs, look-alikes, and how they were found."""


class Check(ClosedRecord):
    """A thing that was looked at."""

    name: str
    ok: bool
    detail: str
    remedy: str


class Doctor(ClosedRecord):
    """`medembed doctor --json`."""

    checks: list[Check]


class EncoderFamily(ClosedRecord):
    """An entry of `medembed encoders --json`."""

    name: str
    examples: list[str]
    kinds: list[str]
    pixels: str
    poolings: list[str]
    layers: bool
    licence: str
    gated: bool
    extra: str | None
    oracle: str


class Execution(ClosedRecord):
    """How an encoder ran."""

    device: str
    card: str | None
    precision: str
    attention: str | None
    compiled: bool


class Extract(ClosedRecord):
    """`medembed extract --json`; see `ExtractionReport`."""

    requested: Count
    already: Count
    embedded: Count
    failed: Count
    duplicates: Count
    colour: Count
    notes: dict[str, Count]
    failures: list[FailureDocument]
    seconds: float = Field(ge=0)
    images_per_second: float = Field(ge=0)
    batch_size: Count
    decoders: Count
    stages: dict[str, float]
    canary: float | None
    execution: Execution | None


class SpecDocument(ClosedRecord):
    """What all rows of a cache share."""

    encoder: str
    preprocessing: AnyTable
    poolings: dict[str, list[Count]]
    dtype: Literal["float16", "float32"]


class FailureCounts(ClosedRecord):
    """Failures of a cache, by stage."""

    read: Count
    decode: Count
    encode: Count


class Coverage(ClosedRecord):
    """How much of a manifest a cache holds."""

    rows: Count
    contents: Count
    embedded: Count
    failed: Count
    missing: Count


class CacheCard(ClosedRecord):
    """What a cache is and holds."""

    path: str
    format: Literal["medembed-cache"]
    version: Literal[1]
    rows: Count
    shards: Count
    bytes: Count
    spec: SpecDocument
    recorded: AnyTable
    """What was noted of the encoder and the libraries."""
    canary: bool
    failures: FailureCounts


class CacheInfo(CacheCard):
    """`medembed cache info --json`."""

    coverage: Given[Coverage] = None
    """With --manifest."""
    failed: Given[list[FailureDocument]] = None
    """With --failures."""


class CacheVerify(ClosedRecord):
    """`medembed cache verify --json`."""

    problems: list[str]
    set_aside: Given[list[str]] = None
    """With --repair."""


class Compacted(ClosedRecord):
    """What a compaction did."""

    shards_before: Count
    shards_after: Count
    bytes_before: Count
    bytes_after: Count
    repeats: Count


class CacheCompact(CacheCard):
    """`medembed cache compact --json`."""

    compacted: Compacted


class CacheCopy(ClosedRecord):
    """`medembed cache pull --json` and `medembed cache push --json`."""

    shards: Count
    """Shards that were copied."""
    bytes: Count
    already: Count
    """Shards that were there."""
    superseded: Count
    """Shards of a directory that were removed, because shards of the bucket hold their rows."""


class CacheExport(ClosedRecord):
    """`medembed cache export --json`."""

    file: str
    rows: Count
    failed: Count
    poolings: dict[str, list[Count]]
    bytes: Count


class Autoencoder(ClosedRecord):
    """`medembed autoencoder --json`."""

    encoder: str
    fingerprint: Digest
    epochs: Count
    best_epoch: Count
    loss: float
    held_out_loss: float
    mean_image_loss: float
    images: Count
    held_out_images: Count
    failures: list[FailureDocument]
    seconds: float = Field(ge=0)
    failed: Count


class RunDocument(ClosedRecord):
    """`medembed sweep --json`, and that of `finetune` and `ensemble`."""

    run: str
    leaderboard: list[LeaderboardEntry]


class SweptTargets(ClosedRecord):
    """`medembed sweep --target … --json`."""

    runs: dict[str, RunDocument]
    not_estimable: dict[str, str]
    """The other targets, each with the reason."""


class PromptsWritten(ClosedRecord):
    """`medembed prompts --json`."""

    path: str
    classes: dict[str, Count]
    prompts: list[PromptEntry]


class Demo(ClosedRecord):
    """`medembed demo --json`."""

    leaderboard: list[LeaderboardEntry]
    page: str
    synthetic: Literal[True]


class Completion(ClosedRecord):
    """`medembed completion --json`."""

    shell: Literal["bash", "zsh", "fish"]
    script: str


class Evaluate(Record):
    """`medembed evaluate --json`: the run, and its `scores.json`.

    Where no row has a label nothing can be scored, and what a comparison has besides is absent.
    """

    run: str
    level: Literal["study", "image"]
    test: Counts
    synthetic: bool
    rows: list[ComparedHead]
    paired: list[Pair]
    notes: list[str]
    called_abnormal: Score | None
    drop: AnyTable | None
    """Against the model's own test."""
    calibration: AnyTable | None
    recalibrated: AnyTable | None
    drift: AnyTable | None
    predictions_sha256: Digest


class ChecklistItem(ClosedRecord):
    """An item of a reporting checklist."""

    item: str
    section: str
    asks: str
    status: Literal["answered", "partly", "open"]
    answer: str | None
    source: str | None
    by: str | None


class Checklist(ClosedRecord):
    """A reporting checklist, filled in as far as the runs know."""

    name: str
    title: str
    source: str
    counts: dict[Literal["answered", "partly", "open"], Count]
    items: list[ChecklistItem]
    path: str


class Report(ClosedRecord):
    """`medembed report --json`: paths of what was written."""

    page: str
    figures: list[str]
    checklist: Given[list[Checklist]] = None
    """With --checklist."""
    targets: Given[dict[str, str]] = None
    """Of a sweep of targets: the page of each."""


class PlanDocument(ClosedRecord):
    """`medembed plan --json`."""

    patients: Count
    studies: Count
    abnormal_studies: Count
    method: str
    design_effect: float
    asked: dict[str, float]


class Point(ClosedRecord):
    """The operating point that decides."""

    name: str
    threshold: float


class Prediction(ClosedRecord):
    """What a model says of an image or a study; `predict --jsonl` prints one a line."""

    image: str | None
    study: str
    probability: float | None = Field(ge=0, le=1)
    decision: str | None
    """"normal" or "abnormal"; of a target's model the target's name, or "no" and its name."""
    operating_point: Point | None
    set: list[str] | None
    coverage: str | None
    distance: float | None
    distance_p: float | None
    far: bool | None
    n_views: Count | None
    n_failed: Count | None
    trained_on: bool | None
    error: str | None
    explanation: str | None = None
    """With --explain."""


class WorklistImage(ClosedRecord):
    """An image to label next; views of a study share their rank."""

    rank: Count
    sha256: Digest
    region: str
    chosen_by: Literal["random", "cover", "uncertainty"]
    probability: float | None = Field(ge=0, le=1)
    image: Given[str] = None
    """With --names, as are study and patient."""
    study: Given[str] = None
    patient: Given[str] = None


class SimilarFilm(ClosedRecord):
    """A film of another patient; `image` and `study` are null without --names."""

    sha256: Digest
    image: str | None
    study: str | None
    region: str
    label: Literal[0, 1] | None
    split: str
    similarity: float = Field(ge=-1, le=1)


class FilmAskedAbout(ClosedRecord):
    """The film asked about; all but `sha256` and `in_cache` are null if no manifest row has it."""

    sha256: Digest
    row: Count | None
    image: str | None
    study: str | None
    region: str | None
    label: Literal[0, 1] | None
    in_cache: bool


class Similar(ClosedRecord):
    """`medembed similar --json`."""

    query: FilmAskedAbout
    poolings: list[str]
    compared: Count
    """Films of other patients."""
    own: Count
    """Films of the query's patient, left out."""
    failed: Count
    neighbours: list[SimilarFilm]


class MapDocument(ClosedRecord):
    """`medembed map --json`."""

    map: str
    images: Count
    method: Literal["pca", "tsne"]
    seed: Count
    explained: dict[str, list[float]]
    """Share of the variance on either axis, by pooling; empty for t-SNE."""


DOCUMENTS: dict[str, Any] = {
    "audit-labels": LabelAuditDocument,
    "audit-shortcuts": ShortcutsDocument,
    "autoencoder": Autoencoder,
    "cache-compact": CacheCompact,
    "cache-export": CacheExport,
    "cache-info": CacheInfo,
    "cache-pull": CacheCopy,
    "cache-push": CacheCopy,
    "cache-verify": CacheVerify,
    "compare": ComparisonResult | TargetsComparison,
    "completion": Completion,
    "demo": Demo,
    "doctor": Doctor,
    "encoders": list[EncoderFamily],
    "ensemble": RunDocument,
    "evaluate": Evaluate,
    "extract": Extract,
    "finetune": RunDocument,
    "manifest-build": ManifestBuild,
    "manifest-check": ManifestCheck,
    "manifest-relabel": ManifestRelabel,
    "manifest-texts": ManifestTexts,
    "manifest-init": ManifestInit,
    "manifest-recipes": list[KnownRecipe] | RecipeText,
    "map": MapDocument,
    "plan": PlanDocument,
    "predict": list[Prediction],
    "prompts": PromptsWritten,
    "report": Report,
    "run": dict[str, str],
    "similar": Similar,
    "sweep": RunDocument | SweptTargets,
    "worklist": list[WorklistImage],
}
"""By command, with a hyphen for a blank: its document's model."""
