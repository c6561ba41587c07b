"""Films that resemble a film: the nearest rows of a cache, of other patients, found exactly."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medembed.cache.embeddings import MappedRows, choose_poolings, find_rows, map_rows
from medembed.cache.spec import keys_from_hex
from medembed.cache.store import Cache, open_cache
from medembed.cache.widening import put_rows
from medembed.core.nearest import counting, find_neighbours
from medembed.core.text import Summarised, Summary, counted
from medembed.dataset.identities import name_persons
from medembed.dataset.manifest import Manifest, read_manifest, require_hashes
from medembed.dataset.splits import join_same_bytes

__all__ = ["SimilarFilms", "StoredRows", "find_similar", "read_vector"]

DECIMALS = 6
"""Of a similarity: float16 rounds an embedding more coarsely."""


@dataclass(frozen=True, eq=False, repr=False)
class SimilarFilms(Summarised):
    """The films most similar to one film.

    Attributes
    ----------
    rows : DataFrame
        The manifest's rows of the neighbours, the most similar first, and `similarity`: the cosine,
        in [-1, 1].
    pooling : str
        The poolings compared, joined by `+`.
    n_compared : int
        Films of other patients among which the neighbours were sought; equal bytes count once.
    n_own : int
        Films of the query's own patient, which were left out.
    n_failed : int
        Rows left out because the image failed to be embedded.
    """

    rows: pd.DataFrame
    pooling: str
    n_compared: int
    n_own: int
    n_failed: int

    def summarise(self) -> Summary:
        """Return what was compared, and the nearest film's similarity."""
        nearest = f"{self.rows['similarity'].iloc[0]:.3f}" if len(self.rows) else "none"
        return Summary(
            f"{counted(len(self.rows), 'similar film')} of {self.n_compared:,}",
            {"poolings": self.pooling, "nearest": nearest},
        )


class StoredRows:
    """Rows of a cache's poolings side by side, float32, read from mapped files when indexed.

    Slices follow the order on disk, so that a scan reads every file once, from start to end;
    `original` leads from that order back to the order of `keys`.

    Parameters
    ----------
    cache : Cache
    keys : (n, 32) uint8
        SHA-256 of each image.
    poolings : sequence of str

    Raises
    ------
    MissingRowsError
        A key is not in the cache.
    ShardError
        A shard is damaged.
    """

    def __init__(self, cache: Cache, keys: NDArray[Any], poolings: Sequence[str]) -> None:
        self._parts = [
            map_rows(cache, keys, pooling, verify=pooling == poolings[0]) for pooling in poolings
        ]
        widths = [cache.spec.poolings[pooling][0] for pooling in poolings]
        self._edges = np.cumsum([0, *widths]).tolist()
        first = self._parts[0]
        self.original = np.lexsort((first.places, first.owners))

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d)."""
        return len(self.original), self._edges[-1]

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """Return rows as they stand on disk, (m, d) float32."""
        chosen = self.original[rows]
        values = np.empty((len(chosen), self._edges[-1]), np.float32)
        for k, part in enumerate(self._parts):
            _copy(part, chosen, values[:, self._edges[k] : self._edges[k + 1]])
        return values


def _copy(part: MappedRows, rows: NDArray[np.int64], output: NDArray[np.float32]) -> None:
    """Copy rows of a pooling, block by block."""
    owners = part.owners[rows]
    order = np.argsort(owners, kind="stable")
    ends = np.flatnonzero(np.diff(owners[order])) + 1
    for places in np.split(order, ends) if len(order) else []:
        block = part.blocks[owners[places[0]]]
        put_rows(output, places, np.asarray(block[part.places[rows[places]]]))


def find_similar(
    cache: Cache | str | os.PathLike[str],
    manifest: Manifest | str | os.PathLike[str],
    query: str | NDArray[Any],
    *,
    k: int = 10,
    pool: str | None = None,
    sha256: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SimilarFilms:
    """Return the films of other patients that are most similar to a film, by cosine.

    Films with the query's bytes, and all films of the patients who have one with these bytes, are
    left out. The result depends neither on the order of the manifest nor on how the cache is
    divided into shards.

    Parameters
    ----------
    cache, manifest : Cache, Manifest or path
        The cache and the manifest whose films are compared.
    query : str or (d,) float
        SHA-256 of a film in the cache, or an embedding: the poolings side by side.
    k : int
        Number of films, at least 1.
    pool : str, optional
        Poolings joined by `+`; by default those that `load_embeddings` joins.
    sha256 : str, optional
        SHA-256 of the film behind an embedding, so that its own patient is left out.
    progress : callable, optional
        Called as progress(done, total) with films.

    Raises
    ------
    MissingRowsError
        Films of the manifest, or the query, are not in the cache.
    CacheError
        A pooling is not in the cache, or a shard is damaged (`ShardError`).
    ManifestError
        The manifest has no SHA-256s.
    ArgumentError
        `k` is below 1, or the embedding has another width or values that are not finite.
    """
    cache = open_cache(cache)
    name = "MANIFEST" if isinstance(manifest, Manifest) else str(manifest)
    manifest = read_manifest(manifest)
    require_hashes(manifest)
    poolings = choose_poolings(cache, pool)
    known = manifest.rows
    person = join_same_bytes(name_persons(known), known["sha256"])
    if isinstance(query, str):
        sha256 = query
        vector = read_vector(cache, query, poolings)
    else:
        vector = np.asarray(query)
    rows, keys, failed = find_rows(cache, known, name)
    is_first = ~rows["sha256"].duplicated().to_numpy()
    rows, keys = rows[is_first], keys[is_first]
    codes = pd.Series(pd.factorize(person)[0], index=known.index)
    own = codes[known["sha256"] == sha256].to_numpy()[:1]  # same bytes: one person
    persons = codes[rows.index].to_numpy()
    stored = StoredRows(cache, keys, poolings)
    found = find_neighbours(
        vector[None],
        stored,
        k,
        own=own if len(own) else np.array([-1]),
        groups=persons[stored.original],
        rank=np.argsort(np.argsort(rows["sha256"].to_numpy(str)))[stored.original],
        tick=counting(progress, len(rows)),
    )
    there = found.rows[0] >= 0
    nearest = rows.iloc[stored.original[found.rows[0][there]]]
    similarity = np.round(1 - found.distance[0][there], DECIMALS)
    n_own = int(np.isin(persons, own).sum())
    return SimilarFilms(
        rows=nearest.assign(similarity=similarity).reset_index(drop=True),
        pooling="+".join(poolings),
        n_compared=len(rows) - n_own,
        n_own=n_own,
        n_failed=len(failed),
    )


def read_vector(cache: Cache, sha256: str, poolings: Sequence[str]) -> NDArray[np.float32]:
    """Return a film's poolings side by side, (d,) float32, as stored.

    Raises
    ------
    MissingRowsError
        The film is not in the cache.
    """
    found = cache.read(keys_from_hex([sha256]), poolings)
    return np.concatenate([found[name][0].astype(np.float32) for name in poolings])
