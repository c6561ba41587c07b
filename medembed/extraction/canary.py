"""The canary: a few images that verify that a run's embeddings match those of the cache.

When a cache is created, four packaged files are decoded, resized and encoded in fp32, and their
embeddings are stored in `cache.json`. Every run encodes them with its own settings before it
appends rows. Spec and fingerprint record what was requested; the canary shows the combined effect
of libraries, precision and device.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from medembed.cache.metadata import damaged
from medembed.cache.shards import as_stored
from medembed.cache.spec import CacheSpec
from medembed.core.errors import CacheError, SpecMismatchError
from medembed.core.files import json_digest
from medembed.core.locations import Location, as_location
from medembed.encoders.preprocessing import Preprocessing, prepare
from medembed.encoders.protocol import Encoder, check_rows
from medembed.images.decode import decode_image

__all__ = [
    "CANARY_FILES",
    "CANARY_VERSION",
    "TOLERANCE",
    "canary_pixels",
    "check_canary",
    "compute_canary",
]

CANARY_VERSION = 1
"""Raise it whenever a byte of `CANARY_FILES` changes: caches store the old files' embeddings."""

CANARY_FILES = ("bones.png", "haze.jpg", "rings.png", "checks.png")
"""8-bit grey PNG, colour JPEG, 16-bit grey PNG, PNG with alpha; see `tools.canary_images`."""

TOLERANCE = 0.02
"""Largest distance from the stored embedding, in median distances between different canaries.

The cosine is unsuitable: in such towers it reaches 0.997 between embeddings of unrelated images.
"""

_ASSETS = Path(__file__).parent / "assets" / "canary"
_DTYPE = "<f4"


def canary_pixels(preprocessing: Preprocessing) -> np.ndarray:
    """Return the packaged images, decoded and resized for the tower as in extraction.

    Returns
    -------
    ndarray
        uint8 (4, height, width), in the order of `CANARY_FILES`.
    """
    images = [decode_image(data).pixels for data in _read_files().values()]
    return np.stack([prepare(image, preprocessing) for image in images])


def compute_canary(
    encoder: Encoder, poolings: Sequence[str], spec: CacheSpec | None = None
) -> dict[str, Any]:
    """Embed the canaries one at a time and return the result as a JSON-able document.

    Parameters
    ----------
    encoder : Encoder
        In fp32, so that every precision is compared with one reference.
    poolings : sequence of str
        All poolings of the tower that the cache will hold.
    spec : CacheSpec, optional
        The cache's spec; the embeddings must fit its dtype.

    Raises
    ------
    EncoderError
        The encoder fails (see `Encoder.encode`) or returns invalid embeddings.
    CacheError
        An embedding does not fit the dtype of `spec`.
    """
    embeddings = _embed(encoder, poolings, batch_size=1)
    if spec is not None:
        own = replace(spec, poolings={name: spec.poolings[name] for name in poolings})
        as_stored(embeddings, own, len(CANARY_FILES))
    files = _read_files()
    document = {
        "version": CANARY_VERSION,
        "precision": encoder.precision,
        "images": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        "embeddings": {name: _pack(values) for name, values in embeddings.items()},
    }
    return {**document, "sha256": json_digest(document)}


def check_canary(
    document: Mapping[str, Any],
    encoder: Encoder,
    poolings: Sequence[str],
    *,
    batch_size: int,
    there: Mapping[str, Any],
    here: Mapping[str, Any],
    cache_path: str | PathLike[str],
) -> float:
    """Refuse a run whose embeddings of the canaries differ from those stored in the cache.

    Parameters
    ----------
    document : mapping
        The result of `compute_canary` when the cache was created.
    encoder : Encoder
        This run's encoder.
    batch_size : int
        This run's batch size; the batch is padded with black images, as in extraction.
    there, here : mapping
        The cache's record of its first run, and this run's: `precision`, `device`, `versions`.
    cache_path : path
        The cache, for messages.

    Returns
    -------
    float
        The largest distance of an image from its stored embedding, over all poolings, in median
        distances between different stored canaries; below `TOLERANCE`.

    Raises
    ------
    SpecMismatchError
        A distance is not below `TOLERANCE`; the message names the pooling, the image, and what
        differs between the cache's first run and this one.
    CacheError
        The document is damaged, or was made from other images than this medembed ships.
    EncoderError
        See `Encoder.encode`.
    """
    path = as_location(cache_path, "a cache")
    stored = _unpack_all(document, poolings, path)
    found = _embed(encoder, poolings, batch_size=batch_size)
    strays = [_farthest(name, stored[name], found[name]) for name in poolings]
    worst = max(strays, key=lambda stray: stray.distance)
    if worst.distance < TOLERANCE:
        return worst.distance
    raise _refusal(worst, document, there, here, path)


@dataclass(frozen=True)
class _Stray:
    """The image farthest from its stored embedding under one pooling."""

    distance: float
    pooling: str
    image: str


def _read_files() -> dict[str, bytes]:
    return {name: (_ASSETS / name).read_bytes() for name in CANARY_FILES}


def _embed(encoder: Encoder, poolings: Sequence[str], *, batch_size: int) -> dict[str, np.ndarray]:
    """Return the canaries' embeddings in full, black-padded batches: float32 (4, …) by pooling."""
    pixels = canary_pixels(encoder.preprocessing)
    parts = []
    for start in range(0, len(pixels), batch_size):
        some = pixels[start : start + batch_size]
        batch = np.zeros((batch_size, *pixels.shape[1:]), np.uint8)
        batch[: len(some)] = some
        found = encoder.encode(batch, poolings)
        parts.append(check_rows(encoder, found, poolings, batch_size, len(some)))
    return {name: np.concatenate([part[name] for part in parts]) for name in poolings}


def _farthest(pooling: str, stored: np.ndarray, found: np.ndarray) -> _Stray:
    """Return the largest Euclidean distance, over all values of an image's vector or cells."""
    if found.shape != stored.shape:
        return _Stray(np.inf, pooling, CANARY_FILES[0])
    old, new = (values.reshape(len(values), -1).astype(np.float64) for values in (stored, found))
    yardstick = np.median([np.linalg.norm(a - b) for a, b in combinations(old, 2)])
    distances = np.linalg.norm(new - old, axis=1)
    # NaN and infinities never pass; a tower that maps all images alike passes only if equal.
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(distances == 0, 0.0, distances / yardstick)
    ratios = np.where(np.isfinite(ratios), ratios, np.inf)
    place = int(ratios.argmax())
    return _Stray(float(ratios[place]), pooling, CANARY_FILES[place])


def _refusal(
    stray: _Stray,
    document: Mapping[str, Any],
    there: Mapping[str, Any],
    here: Mapping[str, Any],
    path: Location,
) -> SpecMismatchError:
    precise, precision = document["precision"], here.get("precision")
    causes = _differences(there, here)
    way_out = "Choose another --cache"
    if precision != precise:
        causes.insert(0, f"precision ({precise} for its canary, {precision} here)")
        way_out += f", or give --precision {precise}"
    elif causes:
        way_out += ", or compute as the cache's first run did"
    else:
        causes = ["none of library versions, precision and device, so the weights or the code"]
    far = "infinitely far"
    if np.isfinite(stray.distance):
        far = f"{stray.distance:.3f} median distances between images"
    return SpecMismatchError(
        f"this run embeds otherwise than the first run of the cache at {path}: of its canary "
        f"images, {stray.image} comes out {far} away in pooling {stray.pooling} (the limit is "
        f"{TOLERANCE}). What differs: {', '.join(causes)}. {way_out}."
    )


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return the device and the libraries in which two runs differ, with both values."""
    old, new = (
        {"device": run.get("device"), **(run.get("versions") or {})} for run in (there, here)
    )
    return [
        f"{name} ({old.get(name) or 'none'} there, {new.get(name) or 'none'} here)"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


def _pack(values: np.ndarray) -> dict[str, Any]:
    data = np.ascontiguousarray(values, _DTYPE).tobytes()
    return {"shape": list(values.shape), "float32": base64.b64encode(data).decode("ascii")}


def _unpack_all(
    document: Mapping[str, Any], poolings: Sequence[str], path: Location
) -> dict[str, np.ndarray]:
    """Return every pooling's stored embeddings; refuse a damaged document or other images."""
    try:
        _refuse_other_images(document, path)
        content = {key: value for key, value in document.items() if key != "sha256"}
        if document["sha256"] != json_digest(content):
            raise damaged(path, "the numbers of its canary are not those that were written")
        return {name: _unpack(document["embeddings"][name]) for name in poolings}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, "its canary cannot be read") from error


def _unpack(packed: Mapping[str, Any]) -> np.ndarray:
    data = base64.b64decode(packed["float32"], validate=True)
    values = np.frombuffer(data, _DTYPE).reshape(packed["shape"])
    if len(values) != len(CANARY_FILES) or not np.isfinite(values).all():
        raise ValueError("not one finite embedding of each image")
    return values


def _refuse_other_images(document: Mapping[str, Any], path: Location) -> None:
    if document["version"] != CANARY_VERSION:
        raise CacheError(
            f"cache at {path} has canary images of version {document['version']}; this medembed "
            f"brings version {CANARY_VERSION}. Install the medembed that made it, or choose "
            "another --cache."
        )
    here = {name: hashlib.sha256(data).hexdigest() for name, data in _read_files().items()}
    other = [name for name, sha256 in here.items() if document["images"].get(name) != sha256]
    if other:
        raise CacheError(
            f"cache at {path} was begun with another canary image {other[0]} than the one this "
            "medembed brings. Install medembed again; if that does not help, choose another "
            "--cache."
        )
