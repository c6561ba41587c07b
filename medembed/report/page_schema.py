"""The document that the page's script reads, typed: `docs/schemas/page.json` is made from it.

Columns with a value per study, image or threshold are `Packed`: little-endian numbers in base64,
which a browser turns into a typed array without parsing them one by one.
"""

import base64
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from medembed.core.schema import ClosedRecord, Count
from medembed.results.comparison_schema import CalibrationBin, CalibrationCurve, Curve, Score

__all__ = [
    "Band",
    "Cases",
    "Films",
    "HeatMap",
    "Packed",
    "PageDocument",
    "PageHead",
    "PageMap",
    "PagePoint",
    "PageTest",
    "TrainingFilms",
    "pack",
]

Kind = Literal["f4", "i4", "u2", "u1"]


class Packed(ClosedRecord):
    """A column of numbers, little-endian; f4 is float32, where NaN is unknown."""

    type: Kind
    data: str
    """Base64."""


def pack(values: ArrayLike, kind: Kind) -> Packed:
    """Return numbers as a column of the document, flattened row by row."""
    found = np.ascontiguousarray(np.asarray(values), np.dtype(f"<{kind}"))
    return Packed(type=kind, data=base64.b64encode(found.tobytes()).decode())


class PageTest(ClosedRecord):
    """What was scored."""

    level: Literal["study", "image"]
    n: Count
    n_abnormal: Count
    n_patients: Count
    prevalence: float | None
    """The prevalence that was asked for; null takes the share of the test rows."""


class PagePoint(ClosedRecord):
    """A head's operating point: its scores on test, with intervals."""

    name: str
    threshold: float
    scores: dict[str, Score]


class Band(ClosedRecord):
    """A pointwise 95 % band, where it is estimable."""

    x: list[float]
    low: list[float]
    high: list[float]


class PageHead(ClosedRecord):
    """A trained head, the best first."""

    name: str
    """Of run and head, where there are several runs."""
    threshold: float
    """Youden's, of the calibrated probability."""
    auroc: Score
    average_precision: Score
    true_positives: Packed
    """i4: abnormal rows at or above each threshold."""
    false_positives: Packed
    """i4: normal rows at or above each threshold."""
    distribution: Packed
    """i4 (regions, 2, 40): rows by region, label and bin of the probability, equally wide."""
    points: list[PagePoint]
    calibration: CalibrationCurve
    bins: list[CalibrationBin]
    benefit: Curve


class TrainingFilms(ClosedRecord):
    """Films of train that are among the nearest of a case."""

    films: list[str]
    label: Packed
    """u1: 0 normal, 1 abnormal, 2 unlabelled."""
    region: Packed
    """u2: index of `regions`."""
    neighbours: Packed
    """i4 (n, k): for each case, indices of these films, the nearest first; -1 is none."""
    similarity: Packed
    """f4 (n, k): cosine of the nearest of the case's views."""
    k: Count
    pooling: str


class Cases(ClosedRecord):
    """Test rows, mistakes of the best head first."""

    n: Count
    """All test rows; the page holds the first of them, `cases.js` all."""
    label: Packed
    """u1."""
    region: Packed
    """u2: index of `regions`."""
    probability: list[Packed]
    """f4: calibrated probability of abnormal, by head."""
    sets: Packed | None
    """u1: prediction set of the best head at 90 % coverage: 0 neither, 1 normal, 2 abnormal,
    3 both."""
    distance: Packed | None
    """f4: cosine distance to the nearest film of train, of the case's furthest view."""
    films: list[str]
    """The views, each the first 16 digits of its SHA-256, joined by blanks."""
    names: list[list[str]] | None
    """Paths of the views; only if they were asked for."""
    covariates: dict[str, list[str]]
    targets: dict[str, Packed]
    """u1: answers to targets that the heads do not predict: 0 negative, 1 positive, 2 unknown."""
    training: TrainingFilms | None


class PageMap(ClosedRecord):
    """Images in two dimensions."""

    run: str
    method: str
    pooling: str
    explained: list[float]
    n: Count
    """All images of the map, of which at most 50,000 are here."""
    x: Packed
    y: Packed
    """u2: from the lowest to the highest coordinate; both axes have the same scale."""
    label: Packed
    """u1: 0 normal, 1 abnormal, 2 unlabelled."""
    region: Packed
    split: Packed
    """u1: 0 train, 1 test."""
    targets: dict[str, Packed]
    """u1: as of `cases`."""
    case: Packed
    """i4: index of the case in the order of `cases`; below -1 a training film, -2 being the first;
    -1 none."""


class HeatMap(ClosedRecord):
    """A heat map of a film."""

    rows: Count
    columns: Count
    box: list[float]
    """Left, top, right and bottom as shares of the film's width and height."""
    top: float
    """Largest absolute logit of a cell."""
    values: Packed
    """u1: 128 plus 127 times the logit over `top`."""


class Films(ClosedRecord):
    """Pictures, by the first 16 digits of the film's SHA-256."""

    folder: str
    """Where films lie beside the page."""
    inlined: dict[str, str]
    """Data URIs."""
    beside: list[str]
    """Films that are only in the folder."""
    heat: dict[str, HeatMap]


class PageDocument(ClosedRecord):
    """The data of the page's figures, cases and map."""

    format: Literal["medembed-page"] = "medembed-page"
    version: Literal[1] = 1
    test: PageTest
    target: str
    """The target that the heads predict; the manifest's own is `label`."""
    classes: list[str]
    """What its negative and its positive class are called."""
    regions: list[str]
    thresholds: list[float]
    """Rising; of the calibrated probability. The page's slider steps through them."""
    heads: list[PageHead]
    roc_band: Band | None
    """Of the best head."""
    precision_recall_band: Band | None
    cases: Cases
    cases_file: str | None
    """The file beside the page that has the other cases."""
    map: PageMap | None
