"""Models of what `medembed similar` and `medembed map` print with `--json`; see `documents`."""

from typing import Literal

from medembed.core.schema import ClosedRecord, Count, Digest, Field

__all__ = ["FilmAskedAbout", "MapDocument", "Similar", "SimilarFilm"]


class SimilarFilm(ClosedRecord):
    """A film of another patient; `image` and `study` are null without --names."""

    sha256: Digest
    image: str | None
    study: str | None
    region: str
    label: Literal[0, 1] | None
    split: str
    similarity: float = Field(ge=-1, le=1)


class FilmAskedAbout(ClosedRecord):
    """The film asked about; all but `sha256` and `in_cache` are null if no manifest row has it."""

    sha256: Digest
    row: Count | None
    image: str | None
    study: str | None
    region: str | None
    label: Literal[0, 1] | None
    in_cache: bool


class Similar(ClosedRecord):
    """`medembed similar --json`."""

    query: FilmAskedAbout
    poolings: list[str]
    compared: Count
    """Films of other patients."""
    own: Count
    """Films of the query's patient, left out."""
    failed: Count
    neighbours: list[SimilarFilm]


class MapDocument(ClosedRecord):
    """`medembed map --json`."""

    map: str
    images: Count
    method: Literal["pca", "tsne"]
    seed: Count
    explained: dict[str, list[float]]
    """Share of the variance on either axis, by pooling; empty for t-SNE."""
