"""A film asked about: found in a cache, or embedded with the cache's encoder."""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medembed.cache.embeddings import choose_poolings
from medembed.cache.shards import describe_loss
from medembed.cache.spec import keys_from_hex
from medembed.cache.store import Cache
from medembed.core.errors import ArgumentError, EncoderError, ImageError, SpecMismatchError
from medembed.core.files import describe_error, read_plain
from medembed.dataset.manifest import Manifest
from medembed.encoders.preprocessing import prepare
from medembed.encoders.protocol import check_rows
from medembed.images.load import DEFAULT_LIMITS, Limits, read_content
from medembed.prediction.encode import read_intensity

__all__ = ["Film", "embed_film", "find_film"]

_DIGEST = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True)
class Film:
    """A film asked about.

    Attributes
    ----------
    sha256 : str
        SHA-256 of its bytes, in hex.
    path : Path or None
        Its file, if one was named.
    row : int or None
        Its first row in the manifest, from 1; None if it is not there.
    in_cache : bool
        Whether the cache holds its embedding.
    """

    sha256: str
    path: Path | None
    row: int | None
    in_cache: bool


def find_film(
    asked: str | os.PathLike[str],
    cache: Cache,
    manifest: Manifest,
    *,
    limits: Limits = DEFAULT_LIMITS,
) -> Film:
    """Return the film that `asked` names: a file if there is one, a SHA-256, or a manifest row.

    Raises
    ------
    ImageError
        The file cannot be read.
    ArgumentError
        It names nothing: neither a file, 64 hexadecimal digits nor a row from 1; or the row does
        not exist, or a film named by SHA-256 or row is not in the cache.
    """
    text, path = os.fspath(asked), None
    rows = manifest.rows
    if os.path.lexists(text):
        path = Path(text)
        sha256 = _hash(path, limits)
    elif _DIGEST.fullmatch(text):
        sha256 = text.lower()
    elif text.isascii() and text.isdecimal():
        sha256 = _digest_of_row(text, manifest)
    else:
        raise ArgumentError(
            f"{text!r} is no film: there is no such file, and it is neither a SHA-256 (64 "
            f"hexadecimal digits) nor a row of the manifest (1 to {len(rows):,})."
        )
    places = np.flatnonzero((rows["sha256"] == sha256).to_numpy())
    in_cache = bool(cache.is_done(keys_from_hex([sha256]))[0])
    if path is None and not in_cache:
        where = f"row {text} of the manifest" if len(text) < 64 else f"the film {sha256[:12]}…"
        failure = cache.failures().get(sha256)
        why = f": {failure.stage} failed, {failure.reason}" if failure else ""
        raise ArgumentError(
            f"{where} is not in the cache at {cache.path}{why}. Name its file, to have it embedded."
        )
    return Film(sha256, path, int(places[0]) + 1 if len(places) else None, in_cache)


def embed_film(
    film: Film,
    cache: Cache,
    *,
    pool: str | None = None,
    encoder: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    limits: Limits = DEFAULT_LIMITS,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """Embed a film's file as the cache would hold it, (d,) float32: poolings side by side.

    Parameters
    ----------
    film : Film
        A film with a file.
    cache : Cache
        The cache whose spec the embedding has to match.
    pool : str, optional
        Poolings joined by `+`, see `load_embeddings`.
    encoder : str, optional
        The cache's encoder, if it is not found where the cache says.
    device, precision : str
        See `load_encoder`.
    progress : callable, optional
        Called as progress(done, total) with bytes, while weights are downloaded.

    Raises
    ------
    SpecMismatchError
        The encoder is not that of the cache.
    EncoderError
        The encoder cannot be loaded, or its result does not fit the cache's dtype.
    ImageError
        The file is no image, or has pixels that the cache's version of decoding gave otherwise.
    """
    from medembed.encoders.loading import load_encoder
    from medembed.extraction import spec_of

    assert film.path is not None
    poolings, spec = choose_poolings(cache, pool), cache.spec
    intensity = read_intensity(spec)
    loaded = load_encoder(
        encoder or cache.source,
        device=device,
        precision=precision,
        fit=str(spec.preprocessing.get("fit", "stretch")),
        poolings=list(spec.poolings),
        progress=progress,
    )
    offered = [name for name in spec.poolings if name in loaded.dimensions]
    difference = spec.first_difference(spec_of(loaded, offered, spec.dtype, intensity))
    if difference is not None:
        name, ours, theirs = difference
        raise SpecMismatchError(
            f"the cache at {cache.path} was made by {cache.source} with {name}={_shown(ours)}, and "
            f"the encoder {loaded.source} has {name}={_shown(theirs)}. Name the cache's own "
            "encoder with --encoder."
        )
    transform = partial(prepare, preprocessing=loaded.preprocessing)
    reading = read_content([film.path], film.sha256, transform, intensity, limits).joining(
        spec.images_version, "the cache", "Extract into a new cache"
    )
    if reading.pixels is None:
        reason = reading.reason or "it changed while it was read"
        raise ImageError(f"{film.path} cannot be embedded: {reason}.")
    found = loaded.encode(reading.pixels[None], poolings)
    return _as_stored(check_rows(loaded, found, poolings, 1, 1), spec.dtype)


def _as_stored(rows: dict[str, NDArray[Any]], dtype: str) -> NDArray[np.float32]:
    """Round each pooling to the cache's dtype, and join them."""
    parts = []
    for name, values in rows.items():
        with np.errstate(over="ignore"):
            narrow = values.astype(dtype)
        if loss := describe_loss(values, narrow):
            raise EncoderError(f"the embedding does not fit {dtype}: pooling {name} {loss}")
        parts.append(narrow[0].astype(np.float32))
    return np.concatenate(parts)


def _hash(path: Path, limits: Limits) -> str:
    try:
        return hashlib.sha256(read_plain(path, max_bytes=limits.max_bytes)).hexdigest()
    except OSError as error:
        raise ImageError(
            f"{path} cannot be read: {describe_error(error)}. Name one image file."
        ) from error


def _digest_of_row(text: str, manifest: Manifest) -> str:
    n = len(manifest.rows)
    # (a number of a thousand digits is none of a row either)
    row = int(text) if len(text) < 19 else 0
    if not 1 <= row <= n:
        raise ArgumentError(f"there is no row {text:.40} in the manifest; its rows are 1 to {n:,}.")
    return str(manifest.rows["sha256"].iloc[row - 1])


def _shown(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)
