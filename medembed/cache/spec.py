"""What all rows of a cache share, and the keys that name them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medembed.core.errors import CacheError
from medembed.core.files import json_digest
from medembed.core.poolings import DEFAULT_POOLINGS
from medembed.images.versions import go_together

__all__ = ["DTYPES", "KEY_BYTES", "CacheSpec", "hex_from_keys", "keys_from_hex", "sortable"]

DTYPES = ("float16", "float32")
IMAGES = "images_version"
KEY_BYTES = 32  # SHA-256
MAX_ROW_BYTES = 2**30  # all 4096 tokens of an image, 1152 float32 each, are 19 MB


@dataclass(frozen=True)
class CacheSpec:
    """Name everything that must be equal for two rows to stand in one cache.

    Parameters
    ----------
    encoder : str
        Fingerprint of the encoder's weights and architecture, SHA-256 in hex.
    preprocessing : mapping
        How a file became the encoder's input; JSON values only.
    poolings : mapping of str to tuple of int
        Shape of one image's vector (or cells) per pooling; the order is that of display.
    dtype : {"float16", "float32"}
        How values are stored.

    Raises
    ------
    CacheError
        The dtype is unknown, or there is no pooling.
    """

    encoder: str
    preprocessing: Mapping[str, object]
    poolings: Mapping[str, tuple[int, ...]]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise CacheError(
                f"stored dtype {self.dtype!r} is unknown: choose {' or '.join(DTYPES)}"
            )
        if not self.poolings:
            usual = ",".join(DEFAULT_POOLINGS)
            raise CacheError(f"a cache needs at least one pooling, such as --pool {usual}")
        # Through JSON and back, so that a spec just made equals the same spec read from disk.
        plain = json.loads(json.dumps(dict(self.preprocessing), allow_nan=False))
        object.__setattr__(self, "preprocessing", plain)
        shapes = {name: tuple(int(n) for n in shape) for name, shape in self.poolings.items()}
        object.__setattr__(self, "poolings", shapes)

    def as_dict(self) -> dict[str, object]:
        """Return the spec as JSON-able values."""
        return {
            "encoder": self.encoder,
            "preprocessing": dict(self.preprocessing),
            "poolings": {name: list(shape) for name, shape in self.poolings.items()},
            "dtype": self.dtype,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "CacheSpec":
        """Read back what `as_dict` returned.

        Raises
        ------
        KeyError, TypeError, ValueError, AttributeError, OverflowError
            An entry is missing, or is not what it should be.
        """
        if not isinstance(document["preprocessing"], dict):
            raise TypeError("preprocessing is no table")
        lengths = [n for shape in document["poolings"].values() for n in shape]
        if not all(type(n) is int for n in lengths):
            raise TypeError("a length is no whole number")
        spec = cls(**{name: document[name] for name in cls.__dataclass_fields__})
        shapes = spec.poolings.values()
        if not all(0 < len(shape) < 4 and min(shape) > 0 for shape in shapes):
            raise ValueError("a pooling has no vector or cells")
        if spec.row_bytes() > MAX_ROW_BYTES or not isinstance(spec.encoder, str):
            raise ValueError("a row is larger than any encoder's, or the encoder is no text")
        return spec

    def digest(self) -> str:
        """Hash the spec: SHA-256 hex, independent of the order of poolings and settings."""
        return json_digest(self.as_dict())

    def first_difference(self, other: "CacheSpec") -> tuple[str, Any, Any] | None:
        """Name the first entry in which two specs differ, with both values, or None.

        Two known values of `images_version` are no difference here: few files are decoded otherwise
        under one than under the other, and whoever has the file tells by it (`image_versions`).
        """
        mine, theirs = _flatten(self), _flatten(other)
        for name in [*mine, *(name for name in theirs if name not in mine)]:
            old, new = mine.get(name), theirs.get(name)
            if old != new and not (name == IMAGES and go_together(old, new)):
                return name, old, new
        return None

    @property
    def images_version(self) -> Any:
        """What the pixels are of: a number, or whatever stands in the spec in its place."""
        return self.preprocessing.get(IMAGES)

    def row_bytes(self) -> int:
        """Count the bytes that one row takes on disk, its key included."""
        values = sum(math.prod(shape) for shape in self.poolings.values())
        return KEY_BYTES + values * np.dtype(self.dtype).itemsize


def keys_from_hex(digests: Sequence[str]) -> np.ndarray:
    """Turn SHA-256 hex digests into keys, (n, 32) uint8.

    Raises
    ------
    CacheError
        A digest is not 64 hex digits.
    """
    bad = next((digest for digest in digests if len(digest) != 2 * KEY_BYTES), None)
    if bad is not None:
        raise CacheError(f"{bad!r} is not a SHA-256: 64 hex digits are needed")
    try:
        raw = bytes.fromhex("".join(digests))
    except ValueError as error:
        raise CacheError(f"a SHA-256 holds something else than hex digits: {error}") from None
    return np.frombuffer(raw, np.uint8).reshape(-1, KEY_BYTES)


def hex_from_keys(keys: np.ndarray) -> list[str]:
    """Turn keys, (n, 32) uint8, into SHA-256 hex digests."""
    digits = np.ascontiguousarray(keys, np.uint8).tobytes().hex()
    return [digits[i : i + 2 * KEY_BYTES] for i in range(0, len(digits), 2 * KEY_BYTES)]


def sortable(keys: np.ndarray) -> np.ndarray:
    """View keys, (n, 32) uint8, as (n,) byte strings that numpy sorts and compares.

    No Python object per row: 3 million keys sort in 0.4 s. numpy drops trailing zero bytes when
    it hands an *element* out, so elements are never taken; comparison within one fixed width
    stays exact, because two different strings of 32 bytes still differ without them.
    """
    return np.ascontiguousarray(keys, np.uint8).reshape(-1, KEY_BYTES).view(f"S{KEY_BYTES}").ravel()


def _flatten(spec: CacheSpec) -> dict[str, Any]:
    poolings = {name: list(shape) for name, shape in spec.poolings.items()}
    return {
        "encoder": spec.encoder,
        **spec.preprocessing,
        "poolings": poolings,
        "dtype": spec.dtype,
    }
