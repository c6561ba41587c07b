"""The formats of the half that embeds, as models: for their JSON Schema, and for tests alone.

A machine that embeds may lack pydantic, so `encoders`, `extraction`, `cache` and `autoencoder` read
these few keys by hand. `tests/test_schema.py` holds the two to each other: what such a reader takes
is valid here, and what is not valid here is refused there.
"""

from typing import Annotated, Any, Literal, Self

from medembed.core.schema import (
    AnyTable,
    ClosedRecord,
    Digest,
    Field,
    Given,
    Record,
    model_validator,
)

__all__ = [
    "AutoencoderConfig",
    "BaseDocument",
    "CacheDocument",
    "FailureLine",
    "ShardHeader",
    "Spec",
]

Length = Annotated[int, Field(ge=1, le=2**30)]
Shape = Annotated[list[Length], Field(min_length=1, max_length=3)]


class Spec(Record):
    """What all rows of a cache share."""

    encoder: str
    """Fingerprint of the encoder's weights and architecture."""
    preprocessing: AnyTable
    """How a file became the encoder's input."""
    poolings: dict[str, Shape] = Field(min_length=1)
    """Shape of one image's vector or cells, by pooling."""
    dtype: Literal["float16", "float32"]


class CacheDocument(Record):
    """`cache.json` of a cache."""

    format: Literal["medembed-cache"]
    version: Literal[1]
    spec: Spec
    recorded: AnyTable
    """What was noted of the encoder and the libraries; it is not compared."""
    canary: Given[AnyTable] = None
    """Images by which a run tells whether it embeds as the first one did; see `canary`."""


class ShardHeader(Record):
    """The JSON object in the first 512 bytes of a shard."""

    format: Literal["medembed-shard"]
    version: Literal[1]
    spec: str
    """Digest of the cache's spec."""
    rows: int = Field(ge=1)
    keys_offset: int = Field(ge=1)
    """Of the keys, from the start of the file, in bytes."""
    keys_sha256: str


class FailureLine(ClosedRecord):
    """A line of `failures.jsonl` of a cache: an image that could not become a row."""

    sha256: Digest
    stage: Literal["read", "decode", "encode"]
    reason: str


class AutoencoderConfig(Record):
    """`config.json` of what `medembed autoencoder` wrote."""

    model_type: Literal["medembed-autoencoder"]
    image_size: int = Field(ge=1, le=16384)
    """Side of its square images in pixels."""
    widths: list[Annotated[int, Field(ge=1, le=16384)]] = Field(min_length=1, max_length=10)
    """Channels after each halving of the side, multiples of norm_groups."""
    latent_channels: int = Field(ge=1, le=16384)
    norm_groups: int = Field(ge=1, le=16384)
    fit: Any = None
    """How images that are not square become square, a text; what is none is not compared."""


class BaseDocument(Record):
    """`base.json` of an adapted encoder: what its changed tensors rest on."""

    format: Literal["medembed-adapted-encoder"]
    version: Literal[1]
    base: str | None = None
    """A reference of the base, or null where it is a directory."""
    base_directory: str | None = None
    """Where the base lies, relative to the encoder's directory."""
    base_fingerprint: str
    fingerprint: str

    @model_validator(mode="after")
    def _check_base(self) -> Self:
        if bool(self.base) == bool(self.base_directory):
            raise ValueError("names a base or a base_directory, one of the two")
        return self
