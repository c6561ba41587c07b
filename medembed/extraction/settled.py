"""What `extract` can answer from files alone, before torch is imported and weights are loaded."""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from medembed.cache.metadata import is_free
from medembed.cache.pending import Worker, make_plan
from medembed.cache.store import Cache, open_cache
from medembed.core.errors import SpecMismatchError
from medembed.core.locations import Location
from medembed.core.poolings import refuse_unknown
from medembed.dataset.manifest import Manifest, existing_source, require_hashes
from medembed.encoders.base_ref import read_base
from medembed.encoders.checkpoint_files import SIGLIP_TYPES, find_config, read_json
from medembed.encoders.hub import resolve_checkpoint
from medembed.encoders.preprocessing import read_preprocessing
from medembed.extraction.job import make_report
from medembed.extraction.report import ExtractionReport
from medembed.extraction.writer import Timeline
from medembed.images.intensity import DEFAULT_INTENSITY, Intensity
from medembed.images.streams import StreamRoot
from medembed.images.versions import IMAGES_VERSION

__all__ = ["report_if_settled"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@\S+)?")


def report_if_settled(
    manifest: Manifest,
    image_root: Location | StreamRoot,
    reference: str,
    cache_path: Location,
    *,
    poolings: Sequence[str],
    dtype: str,
    fit: str,
    intensity: Intensity = DEFAULT_INTENSITY,
    retry_failed: bool = False,
    worker: Worker | None = None,
    dry_run: bool = False,
) -> ExtractionReport | None:
    """Report a dry run, or that nothing is left to embed, without loading the encoder.

    That is possible where there is no cache yet, and where the cache's own record names the encoder
    by `reference` and everything else that was asked for. None is returned where it takes the
    encoder to know.

    Parameters
    ----------
    reference, fit
        The encoder and how images become square, as `load_encoder` takes them.
    manifest, image_root, cache_path, poolings, dtype, intensity, retry_failed, worker, dry_run
        See `extract`.

    Raises
    ------
    PathNotFoundError
        The image root is missing.
    ManifestError
        The manifest holds no SHA-256s.
    CacheError
        The cache cannot be read.
    EncoderError
        A pooling is unknown, or `reference` names a directory that holds no checkpoint.
    SpecMismatchError
        The encoder asked for is certainly not the cache's: one is the demo's and the other a
        published one, or images or rows differ in size.
    """
    start = time.monotonic()
    existing_source(image_root)
    require_hashes(manifest)
    refuse_unknown(poolings)
    if is_free(cache_path):
        if not dry_run:
            return None
        directory = _find_directory(reference)
        if directory is not None:
            read_preprocessing(directory, fit)  # a directory without a checkpoint is refused
        plan = make_plan(manifest.rows, None, retry_failed=retry_failed, worker=worker)
        return make_report(plan, None, 0, None, start, Timeline())
    cache = open_cache(cache_path)
    source = cache.recorded.get("source")
    if source != reference:
        _refuse_known_other(cache, str(source), reference)
        _refuse_other_shape(cache, str(source), reference, fit)
        return None
    known, window = cache.spec.preprocessing, intensity.as_spec()
    asked = (set(poolings), dtype, fit, window, IMAGES_VERSION)
    held = (set(cache.spec.poolings), cache.spec.dtype, known.get("fit"), known.get("window"))
    if (*held, cache.spec.images_version) != asked:
        return None
    plan = make_plan(manifest.rows, cache, retry_failed=retry_failed, worker=worker)
    if plan.pending and not dry_run:
        return None
    return make_report(plan, None, 0, None, start, Timeline())


def _refuse_known_other(cache: Cache, source: str, reference: str) -> None:
    """Refuse the demo's encoder for a published one's cache, and the reverse, by their names."""
    names = {source, reference}
    other = next(iter(names - {"demo"}))
    if "demo" in names and _HUB_ID.fullmatch(other) and not Path(other).exists():
        raise SpecMismatchError(
            f"cache at {cache.path} was made by {source}, and you asked for {reference}. Use "
            f"--encoder {source}, or another --cache for {reference}."
        )


def _find_directory(reference: str) -> Path | None:
    """Return the directory of a local encoder, or None for one on the hub, which is not asked."""
    if _HUB_ID.fullmatch(reference) and not Path(reference).exists():
        return None
    return resolve_checkpoint(reference).path


def _refuse_other_shape(cache: Cache, source: str, reference: str, fit: str) -> None:
    """Refuse a local encoder whose images or rows have another size than the cache's.

    Equal sizes prove nothing: two names may hold one tower, and its fingerprint decides.
    """
    directory = _find_directory(reference)
    if directory is None or read_base(directory) is not None:
        return
    asked = read_preprocessing(directory, fit)
    size, stored_size = (asked.height, asked.width), cache.spec.preprocessing.get("size")
    if _is_pair(stored_size) and size != tuple(stored_size):
        there = f"images of {stored_size[0]} x {stored_size[1]} pixels"
        _refuse(cache, source, reference, there, f"{size[0]} x {size[1]}")
    config = read_json(find_config(directory))
    kind = config.get("model_type") if isinstance(config, dict) else None
    vision = config.get("vision_config", config) if kind in SIGLIP_TYPES else None
    columns = vision.get("hidden_size") if isinstance(vision, dict) else None
    stored = cache.spec.poolings.get("mean")
    if stored is not None and type(columns) is int and stored != (columns,):
        _refuse(cache, source, reference, f"rows of {stored[0]} columns", f"{columns}")


def _is_pair(size: Any) -> TypeGuard[Sequence[int]]:
    return isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int for n in size)


def _refuse(cache: Cache, source: str, reference: str, there: str, asked: str) -> NoReturn:
    raise SpecMismatchError(
        f"cache at {cache.path} was made by {source} with {there}, and {reference} has {asked}. "
        f"Use --encoder {source}, or another --cache for {reference}."
    )
