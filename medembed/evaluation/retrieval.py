"""Retrieval: whether the films nearest to a film share its label and its region.

Precision at k is the share of relevant films among the k nearest; average precision the mean of
precision at the rank of each relevant film, over the whole ranking (Manning, Raghavan and Schütze,
Introduction to Information Retrieval, 2008, 8.4). Chance is the share of relevant films among all
that could be found, which is what a random ranking has for precision at any k.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medembed.core.errors import TrainingDataError
from medembed.core.nearest import unit_rows
from medembed.evaluation.bootstrap import finite_or_none
from medembed.evaluation.estimates import estimate_mean, estimate_share

__all__ = ["DEPTHS", "MAX_QUERIES", "Films", "score_retrieval"]

DEPTHS = (1, 5, 10)
"""The k of precision at k."""
MAX_QUERIES = 4000
"""More queries are drawn at random: the whole ranking of each is sorted."""
_RANKED = 1 << 24  # films in the rankings that are in memory at a time, 40 bytes each
_BLOCK = 8192  # rows that are scaled at a time
_DECIMALS = 6  # of a cosine in float32: beyond them equal films would be ranked by rounding errors


@dataclass(frozen=True, eq=False)
class Films:
    """Films that are compared, or that are sought.

    Attributes
    ----------
    X : (n, d) float
        Embeddings.
    label, region, patient, name : arrays of shape (n,)
        Labels 0 or 1; regions and patients, which may be of any kind; distinct names, such as
        SHA-256, which alone decide between films that are equally near.
    """

    X: NDArray[Any]
    label: NDArray[Any]
    region: NDArray[Any]
    patient: NDArray[Any]
    name: NDArray[Any]

    def take(self, rows: NDArray[Any]) -> "Films":
        """Return some of the films."""
        return Films(**{key: own[rows] for key, own in vars(self).items()})


def score_retrieval(queries: Films, database: Films, *, seed: int = 0) -> dict[str, object]:
    """Return how well the films of a database are ranked by their cosine with each query.

    Films of the query's own patient are left out. Queries for which nothing relevant could be found
    are counted, and left out.

    Parameters
    ----------
    queries, database : Films
        In any order, which changes nothing.
    seed : int
        Seed of the draw of `MAX_QUERIES` queries, if there are more.

    Returns
    -------
    dict
        JSON values: ``n_queries``, ``n_drawn``, ``n_database``, and for each of ``label`` and
        ``region``, which a relevant film shares with the query, ``overall``, ``labels`` and
        ``regions`` of queries. Each is ``n``, ``n_patients``, ``left_out``, ``chance``, and
        ``p_at_1``, ``p_at_5``, ``p_at_10`` and ``map`` with 95 % intervals over the queries'
        patients, which hold for this database.

    Raises
    ------
    TrainingDataError
        There are no queries, or no films in the database.
    """
    if not len(queries.X) or not len(database.X):
        raise TrainingDataError("retrieval needs labelled films of test and of train")
    n_queries = len(queries.X)
    queries = queries.take(np.argsort(queries.name))
    if n_queries > MAX_QUERIES:
        drawn = np.random.default_rng(seed).permutation(n_queries)[:MAX_QUERIES]
        queries = queries.take(np.sort(drawn))
    found: dict[str, object] = {
        "n_queries": n_queries,
        "n_drawn": len(queries.X),
        "n_database": len(database.X),
    }
    ranked = _rank(queries, database)
    for kind, values in ranked.items():
        found[kind] = _summarise(values, queries)
    return found


def _rank(queries: Films, database: Films) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Return per kind of relevance and score a value of each query, NaN if nothing is relevant."""
    names = ("chance", *(f"p_at_{k}" for k in DEPTHS), "map")
    scores = {
        kind: {name: np.full(len(queries.X), np.nan) for name in names}
        for kind in ("label", "region")
    }
    vectors = np.empty(database.X.shape, np.float32)  # the one copy of all films
    for block in _parts(len(vectors), _BLOCK):
        vectors[block] = unit_rows(database.X[block])
    by_name = np.argsort(database.name)  # equally near films are ranked in this order
    patients = database.patient[by_name]
    shares = {kind: getattr(database, kind)[by_name] for kind in scores}
    for part in _parts(len(queries.X), max(1, _RANKED // len(database.X))):
        own = queries.take(np.arange(part.start, part.stop))
        cosine = np.round(unit_rows(own.X) @ vectors.T, _DECIMALS)[:, by_name]
        is_own = own.patient[:, None] == patients
        cosine[is_own] = -np.inf
        order = np.argsort(-cosine, axis=1, kind="stable")
        n_others = (~is_own).sum(axis=1)
        for kind, values in scores.items():
            shared = getattr(own, kind)[:, None] == shares[kind]
            relevant = np.take_along_axis(shared & ~is_own, order, axis=1)
            for name, value in _score_ranking(relevant, n_others).items():
                values[name][part] = value
    return scores


def _score_ranking(
    relevant: NDArray[np.bool_], n_others: NDArray[np.int64]
) -> dict[str, NDArray[np.float64]]:
    """Return the scores of rankings (q, n), of which the first `n_others` count."""
    hits = np.cumsum(relevant, axis=1, dtype=np.float64)
    n_relevant = hits[:, -1]
    ranks = np.arange(1, relevant.shape[1] + 1)
    is_known = n_relevant > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        found = {"chance": n_relevant / n_others}
        for k in DEPTHS:
            depth = np.minimum(k, n_others)  # of fewer films, all
            last = np.take_along_axis(hits, np.maximum(depth - 1, 0)[:, None], axis=1)[:, 0]
            found[f"p_at_{k}"] = last / depth
        found["map"] = (relevant * (hits / ranks)).sum(axis=1) / n_relevant
    return {name: np.where(is_known, values, np.nan) for name, values in found.items()}


def _summarise(values: Mapping[str, NDArray[np.float64]], queries: Films) -> dict[str, Any]:
    everyone = np.ones(len(queries.X), bool)
    names = {0: "normal", 1: "abnormal"}
    return {
        "overall": _block(values, queries, everyone),
        "labels": {
            names[int(label)]: _block(values, queries, queries.label == label)
            for label in np.unique(queries.label)[::-1]
        },
        "regions": {
            str(region): _block(values, queries, queries.region == region)
            for region in np.unique(queries.region.astype(str))
        },
    }


def _block(
    values: Mapping[str, NDArray[np.float64]], queries: Films, chosen: NDArray[np.bool_]
) -> dict[str, Any]:
    """Return the means over some queries, with their intervals."""
    is_known = chosen & ~np.isnan(values["map"])
    _, codes = np.unique(queries.patient[is_known].astype(str), return_inverse=True)
    chance = values["chance"][is_known]
    found: dict[str, Any] = {
        "n": int(is_known.sum()),
        "n_patients": len(np.unique(codes)),
        "left_out": int((chosen & ~is_known).sum()),
        "chance": finite_or_none(float(chance.mean())) if len(chance) else None,
    }
    for name in (f"p_at_{k}" for k in DEPTHS):
        own = values[name][is_known]
        is_share = name == "p_at_1"
        estimate = (
            estimate_share(own > 0.5, np.ones(len(own), bool), codes)
            if is_share
            else estimate_mean(own, codes)
        )
        found[name] = estimate.interval().as_dict()
    found["map"] = estimate_mean(values["map"][is_known], codes).interval().as_dict()
    return found


def _parts(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
