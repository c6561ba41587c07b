"""Retrieval scores of a cache beside a comparison, and their table."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from medembed.core.errors import RunError
from medembed.core.text import to_csv
from medembed.dataset.identities import name_persons
from medembed.dataset.manifest import Manifest
from medembed.dataset.splits import join_same_bytes
from medembed.evaluation.retrieval import DEPTHS, Films, score_retrieval
from medembed.report.tables import MISSING, Table, format_interval
from medembed.results.alignment import TestSet
from medembed.results.comparison_schema import ComparisonResult, RetrievalDocument
from medembed.results.runs import Run
from medembed.results.subgroups import explain_other_manifest

if TYPE_CHECKING:
    import os

    from medembed.cache.embeddings import Embeddings
    from medembed.cache.store import Cache

__all__ = ["find_retrieval", "retrieval_csv", "tabulate_retrieval"]

_SCORES = {**{f"p_at_{k}": f"P@{k}" for k in DEPTHS}, "map": "mAP"}
_SHOWN = (f"p_at_{DEPTHS[-1]}", "map")
"""Scores in the table; all are in the CSV."""
_BOUNDS = ("value", "low", "high")


def find_retrieval(
    runs: Sequence[Run],
    test_set: TestSet,
    cache: "Cache | str | os.PathLike[str]",
    manifest: Manifest,
    seed: int = 0,
) -> list[RetrievalDocument]:
    """Return how well films of train are found by films of test, for each pooling of a cache.

    Returns
    -------
    list of dict
        ``pooling`` and the keys of `evaluation.retrieval.score_retrieval`: all single-vector
        poolings side by side, as heads read them, then each alone.

    Raises
    ------
    RunError
        A run was made from another manifest.
    MissingRowsError, CacheError, TrainingDataError
        On the conditions of `load_embeddings`, or if train or test has no labelled film.
    """
    # (here, because tables of a comparison without retrieval need no HDF5)
    from medembed.cache.embeddings import choose_poolings, load_embeddings
    from medembed.cache.store import open_cache

    other = explain_other_manifest(runs, test_set, manifest)
    if other is not None:
        raise RunError(other)
    cache = open_cache(cache)
    poolings = choose_poolings(cache, None)
    joined = "+".join(poolings)
    found: list[RetrievalDocument] = []
    for pool in dict.fromkeys([joined, *poolings]):
        embeddings = load_embeddings(cache, manifest, pool=pool, verify=pool == joined)
        queries, database = (_take(embeddings, split) for split in ("test", "train"))
        own: Any = {"pooling": pool, **score_retrieval(queries, database, seed=seed)}
        found.append(own)
    return found


def _take(embeddings: "Embeddings", split: str) -> Films:
    """Return the labelled films of a split, each content once."""
    rows = embeddings.rows
    person = join_same_bytes(name_persons(rows), rows["sha256"])
    is_own = (rows["split"] == split) & rows["label"].notna() & ~rows["sha256"].duplicated()
    chosen = np.flatnonzero(is_own.to_numpy())
    return Films(
        embeddings.X[chosen],
        embeddings.y[chosen],
        embeddings.regions[chosen],
        person.to_numpy(object)[chosen],
        rows["sha256"].to_numpy(str)[chosen],
    )


def tabulate_retrieval(result: ComparisonResult) -> list[Table]:
    """Return the tables of a comparison's ``retrieval``, none if it has none."""
    found = result.get("retrieval") or []
    tables = [
        Table(
            title=f"Retrieval by the cosine of {own['pooling']}",
            columns=["Same", "Queries", "n", "Chance", *(f"{_SCORES[s]} [95 %]" for s in _SHOWN)],
            n_names=2,
            sections=[[_cells(*line) for line in _blocks(own)]],
        )
        for own in found
    ]
    if found:
        tables[-1].notes.append(_explain(found[0]))
    return tables


def _explain(own: Mapping[str, Any]) -> str:
    drawn = ""
    if own["n_drawn"] < own["n_queries"]:
        drawn = f" {own['n_drawn']:,} of {own['n_queries']:,} queries were drawn."
    return (
        f"Every film of test is a query, and {own['n_database']:,} films of train are ranked by "
        f"their similarity to it, without those of its own patient.{drawn} A hit has the same "
        "label, or the same region. Chance is the precision of a random ranking. Intervals are "
        "over the patients of test, for this set of train films."
    )


def _cells(kind: str, group: str, block: Mapping[str, Any]) -> list[str]:
    chance = MISSING if block["chance"] is None else f"{block['chance']:.2f}"
    return [kind, group, f"{block['n']:,}", chance] + [
        format_interval(block[name], digits=2) for name in _SHOWN
    ]


def retrieval_csv(result: ComparisonResult) -> str:
    """Return a comparison's ``retrieval`` as CSV, at full precision."""
    heads = [f"{name}{end}" for name in _SCORES for end in ("", "_low", "_high")]
    lines: list[list[Any]] = [["pooling", "same", "queries", "n", "n_patients", "chance", *heads]]
    for own in result.get("retrieval") or []:
        for kind, group, block in _blocks(own):
            numbers = [block[name][end] for name in _SCORES for end in _BOUNDS]
            about = [own["pooling"], kind, group, block["n"], block["n_patients"], block["chance"]]
            lines.append([*about, *numbers])
    return to_csv(lines)


def _blocks(own: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield what is shared, which queries, and their scores; a lone region is not repeated."""
    for kind in ("label", "region"):
        regions = own[kind]["regions"]
        if kind == "region" and own[kind]["overall"]["chance"] == 1:
            continue  # there is one region, so that every film is a hit
        yield kind, "all", own[kind]["overall"]
        for group, block in own[kind]["labels"].items() if kind == "label" else ():
            yield kind, group, block
        for group, block in regions.items() if len(regions) > 1 else ():
            yield kind, group, block
