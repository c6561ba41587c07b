"""A small cache in a bucket, and whether it holds what it should."""

import itertools
import os

import numpy as np

from medembed.cache.spec import CacheSpec
from medembed.cache.store import Cache, open_cache
from medembed.core.locations import BucketPath

SPEC = CacheSpec("ab" * 32, {"width": 8}, {"mean": (4,), "max": (4,)}, "float32")
OTHER = CacheSpec("cd" * 32, {"width": 8}, {"mean": (4,), "max": (4,)}, "float32")
RECORDED = {"source": "made up"}
NUMBERS = itertools.count()


def some_keys(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 32), dtype=np.uint8)


def rows_of(keys: np.ndarray) -> dict[str, np.ndarray]:
    mean = keys[:, :4].astype(np.float32)
    return {"mean": mean, "max": mean + 0.5}


def commit(cache: Cache, keys: np.ndarray) -> BucketPath:
    path = cache.commit(keys, rows_of(keys))
    assert isinstance(path, BucketPath)
    return path


def check(cache: Cache, keys: np.ndarray) -> None:
    """Check that a cache is whole and holds exactly these rows, each once."""
    fresh = open_cache(cache.path)
    assert fresh.verify() == []
    assert np.array_equal(fresh.keys(), np.unique(keys, axis=0))
    read = fresh.read(keys, ["mean", "max"])
    for name, values in rows_of(keys).items():
        assert np.array_equal(read[name], values)


def new_place() -> BucketPath:
    """Return a prefix that nothing has used."""
    return BucketPath("s3", "bucket", f"made/{os.getpid()}-{next(NUMBERS)}")
