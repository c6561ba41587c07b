"""Make the document that the page's script reads: curves, cases and the map, as numbers."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medembed.report.cases import CaseList
from medembed.report.figures import Plot
from medembed.report.figures.captions import name_rows, shown_rows
from medembed.report.gallery import FILM_DIGITS
from medembed.report.page_schema import (
    Band,
    PageDocument,
    PageHead,
    PageMap,
    PagePoint,
    PageTest,
    pack,
)
from medembed.report.target_answers import code_answers
from medembed.results.alignment import ScoredHead, TestSet
from medembed.results.comparison_schema import ComparedHead, ComparisonResult
from medembed.results.embedding_map import EmbeddingMap
from medembed.results.methods import name_compared_classes

__all__ = ["BINS", "MAX_POINTS", "count_called", "find_thresholds", "make_document"]

BINS = 40
"""Of a distribution of probabilities."""
STEPS = 200
"""Equal steps between 0 and 1 among the thresholds, so that the slider reaches everywhere."""
MAX_SCORES = 1200
"""Most distinct probabilities among the thresholds; curves of more are drawn through quantiles."""
DECIMALS = 6
MAX_POINTS = 50_000
"""Images of a map."""


def make_document(
    result: ComparisonResult,
    test_set: TestSet,
    plots: Mapping[str, Plot],
    cases: CaseList,
    found_map: tuple[str, EmbeddingMap] | None = None,
) -> PageDocument:
    """Return the document of a page.

    Parameters
    ----------
    result, test_set
        The comparison.
    plots : mapping of str to Plot
        The page's figures, whose bands are taken over.
    cases : CaseList
        The cases that the page holds.
    found_map : tuple of str and EmbeddingMap, optional
        The name of a run, and its map.
    """
    rows = shown_rows(result)
    own = {(contender.run, contender.head): contender for contender in test_set.contenders}
    heads = [own[row["run"], row["head"]] for row in rows]
    thresholds = find_thresholds(heads)
    named = zip(rows, heads, name_rows(result, rows), strict=True)
    return PageDocument(
        test=PageTest(
            level="study" if result["level"] == "study" else "image",
            n=result["test"]["n"],
            n_abnormal=result["test"]["n_abnormal"],
            n_patients=result["test"]["n_patients"],
            prevalence=result["prevalence"],
        ),
        target=cases.target,
        classes=list(name_compared_classes(result)),
        regions=cases.regions,
        thresholds=thresholds.tolist(),
        heads=[
            _describe(row, head, name, thresholds, test_set, cases) for row, head, name in named
        ],
        roc_band=_read_band(plots.get("roc"), "fpr"),
        precision_recall_band=_read_band(plots.get("precision_recall"), "recall"),
        cases=cases.content,
        cases_file=cases.file,
        map=None if found_map is None else _pack_map(*found_map, cases),
    )


def find_thresholds(heads: Sequence[ScoredHead]) -> NDArray[np.float64]:
    """Return the thresholds that the page offers, rising, in (0, 1).

    These are the heads' operating points as they are, equal steps, and the distinct probabilities,
    or quantiles of them, rounded down so that a row stays at or above its own.
    """
    if not heads:
        return np.empty(0)
    scores = np.unique(np.concatenate([head.probability for head in heads]))
    if len(scores) > MAX_SCORES:
        scores = scores[np.linspace(0, len(scores) - 1, MAX_SCORES).astype(int)]
    scores = np.round(np.floor(scores * 10**DECIMALS) / 10**DECIMALS, DECIMALS)
    points = [point.threshold for head in heads for point in head.points]
    points += [head.threshold for head in heads]
    known = np.array([point for point in points if point is not None], np.float64)
    steps = np.round(np.arange(1, STEPS) / STEPS, DECIMALS)
    every = np.unique(np.concatenate([scores, known, steps]))
    return every[(every > 0) & (every < 1)]


def _describe(
    row: ComparedHead,
    head: ScoredHead,
    name: str,
    thresholds: NDArray[np.float64],
    test_set: TestSet,
    cases: CaseList,
) -> PageHead:
    abnormal = test_set.y == 1
    panel = row["calibrations"]["platt"]
    return PageHead(
        name=name,
        threshold=head.threshold,
        auroc=row["scores"]["auroc"],
        average_precision=row["scores"]["average_precision"],
        true_positives=pack(count_called(head.probability[abnormal], thresholds), "i4"),
        false_positives=pack(count_called(head.probability[~abnormal], thresholds), "i4"),
        distribution=pack(_count_bins(head.probability, abnormal, cases), "i4"),
        points=[
            PagePoint(name=point["name"], threshold=point["threshold"], scores=point["scores"])
            for point in row["operating_points"]
            if point["threshold"] is not None
        ],
        calibration=panel["curve"],
        bins=panel["bins"],
        benefit=row["net_benefit"],
    )


def count_called(
    probability: NDArray[np.float64], thresholds: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Return how many rows are called abnormal, at or above each threshold."""
    rising = np.sort(probability)
    return len(rising) - np.searchsorted(rising, thresholds, side="left")


def _count_bins(
    probability: NDArray[np.float64], abnormal: NDArray[np.bool_], cases: CaseList
) -> NDArray[np.int64]:
    """Return counts by region, label and bin, (regions, 2, bins)."""
    bins = np.minimum((probability * BINS).astype(int), BINS - 1)
    counts = np.zeros((len(cases.regions), 2, BINS), np.int64)
    np.add.at(counts, (cases.region_codes, abnormal.astype(int), bins), 1)
    return counts


def _read_band(plot: Plot | None, x: str) -> Band | None:
    """Return the band of a figure from the numbers that lie beside it."""
    if plot is None:
        return None
    table = pd.read_csv(io.StringIO(plot.csv))
    band = table[(table["kind"] == "band") & table["low"].notna()]
    if band.empty:
        return None
    return Band(
        x=band[x].astype(float).tolist(),
        low=band["low"].round(4).astype(float).tolist(),
        high=band["high"].round(4).astype(float).tolist(),
    )


def _pack_map(run: str, found: EmbeddingMap, cases: CaseList) -> PageMap:
    """Return the map of the first pooling: the images of test first, then those of train."""
    pooling = str(found.rows["pooling"].iloc[0])
    rows = found.rows[found.rows["pooling"] == pooling]
    rows = rows.assign(is_test=rows["split"] == "test")
    rows = rows.sort_values(["is_test", "sha256"], ascending=[False, True])
    n_all = len(rows)
    rows = rows.iloc[:MAX_POINTS]
    span = max(float(np.ptp(rows["x"])), float(np.ptp(rows["y"])), 1e-12)
    scaled = {name: (rows[name] - rows[name].min()) / span * 65535 for name in ("x", "y")}
    codes = {name: code for code, name in enumerate(cases.regions)}
    region = rows["region"].map(codes).fillna(len(cases.regions))
    return PageMap(
        run=run,
        method=found.info.method,
        pooling=pooling,
        explained=found.info.explained.get(pooling, []),
        n=n_all,
        x=pack(scaled["x"].round(), "u2"),
        y=pack(scaled["y"].round(), "u2"),
        label=pack(rows["label"].fillna(2).astype(int), "u1"),
        region=pack(region, "u2"),
        split=pack(rows["is_test"].astype(int), "u1"),
        targets={
            name: pack(code_answers(own, [[image] for image in rows["sha256"]]), "u1")
            for name, own in cases.answers.items()
        },
        case=pack(rows["sha256"].str[:FILM_DIGITS].map(cases.places()).fillna(-1), "i4"),
    )
