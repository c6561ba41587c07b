"""Draw the map of a run: its images in two dimensions, from a cache."""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from medembed.core.system import library_versions
from medembed.dataset.manifest import Manifest, read_manifest
from medembed.dataset.targets import LABEL, select_target
from medembed.evaluation.projection import project
from medembed.results.embedding_map import COLUMNS, EmbeddingMap, MapInfo, write_map
from medembed.results.runs import RunLike, open_run

if TYPE_CHECKING:
    from medembed.cache.store import Cache

__all__ = ["map_run"]


def map_run(
    run: RunLike,
    cache: "Cache | str | os.PathLike[str]",
    manifest: Manifest | str | os.PathLike[str],
    *,
    method: str = "pca",
    poolings: Sequence[str] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> EmbeddingMap:
    """Compute the coordinates of a manifest's images for each pooling, and keep them in the run.

    Labels are not used; the map keeps those of the run's target. The order of the manifest and of
    the cache changes nothing: images are taken in the order of their SHA-256, each content once.

    Parameters
    ----------
    run, cache, manifest
        The run that keeps the map, and what it was made from.
    method : {"pca", "tsne"}
        See `evaluation.projection.project`.
    poolings : sequence of str, optional
        By default each pooling of the cache that heads read.
    seed : int
        For t-SNE.
    progress : callable, optional
        Called as progress(done, total) with poolings.

    Raises
    ------
    RunError
        The run was made from another manifest.
    MissingRowsError, CacheError, TrainingDataError
        On the conditions of `load_embeddings` and `project`.
    MissingLibraryError
        The method needs the extra `map`.
    """
    from medembed.cache.embeddings import choose_poolings, load_embeddings
    from medembed.cache.store import open_cache

    run, cache, manifest = open_run(run), open_cache(cache), read_manifest(manifest)
    run.require_manifest(manifest.digest())
    target = run.info.asked.target or LABEL
    names = list(poolings) if poolings else choose_poolings(cache, None)
    rows_of_target = select_target(manifest.rows, target).drop_duplicates("sha256")
    sorted_rows = rows_of_target.sort_values("sha256", ignore_index=True)
    parts, explained = [], {}
    for done, name in enumerate(names):
        if progress:
            progress(done, len(names))
        embeddings = load_embeddings(cache, Manifest(sorted_rows, manifest.label_level), pool=name)
        found = project(embeddings.X, method, seed=seed)
        explained[name] = [round(share, 6) for share in found.explained]
        rows = embeddings.rows[["sha256", "region", "label", "split"]]
        parts.append(rows.assign(pooling=name, x=found.points[:, 0], y=found.points[:, 1]))
    if progress:
        progress(len(names), len(names))
    info = MapInfo(
        method=method,  # type: ignore[arg-type] # `project` has refused any other
        seed=seed,
        manifest=manifest.digest(),
        explained=explained,
        versions=library_versions("map"),
    )
    made = EmbeddingMap(pd.concat(parts, ignore_index=True)[list(COLUMNS)], info)
    with run.locked():
        write_map(run, made)
    return made
