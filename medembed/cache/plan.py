"""What a manifest asks for and a cache does not hold yet."""

from dataclasses import dataclass

import numpy as np

from medembed.cache.failures import Failure
from medembed.cache.spec import keys_from_hex
from medembed.cache.store import Cache
from medembed.dataset.manifest import Manifest
from medembed.dataset.reading import Content

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """Sort the distinct contents of a manifest by what is to be done with them.

    Parameters
    ----------
    n_rows, n_contents, n_already : int
        Rows of the manifest, distinct contents among them, those of these in the cache.
    pending : list of Content
        To be embedded, in the manifest's order.
    known : list of (Content, Failure)
        Known failures that are not tried again.
    """

    n_rows: int
    n_contents: int
    n_already: int
    pending: list[Content]
    known: list[tuple[Content, Failure]]


def make_plan(manifest: Manifest, cache: Cache | None, *, retry_failed: bool = False) -> Plan:
    """Find what is missing in a cache, or in none.

    Contents that failed to decode or embed are not pending unless `retry_failed`: the same bytes
    fail again. Those that could not be read may be readable now, and always are.
    """
    images: dict[str, list[str]] = {}
    for image, sha256 in zip(manifest.rows["image"], manifest.rows["sha256"], strict=True):
        images.setdefault(sha256, []).append(image)
    done = cache.is_done(keys_from_hex(list(images))) if cache else np.zeros(len(images), bool)
    failures = cache.failures() if cache else {}
    pending, known = [], []
    for sha256, is_done in zip(images, done.tolist(), strict=True):
        content, failure = Content(sha256, tuple(images[sha256])), failures.get(sha256)
        if failure and failure.stage != "read" and not retry_failed:
            known.append((content, failure))
        elif not is_done:
            pending.append(content)
    return Plan(len(manifest.rows), len(images), int(done.sum()), pending, known)
