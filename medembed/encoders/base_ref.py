"""The base of an encoder that fine-tuning has adapted, and where to find it.

The directory of an adapted encoder holds the tensors that training changed
(`changed.safetensors`), copies of the base's config and processor, and `base.json`, which names
the base. It contains no absolute path: a base that is a directory is named by a relative path.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from medembed.core.errors import EncoderError
from medembed.encoders.checkpoint_files import INDEX_FILE, WEIGHTS_FILE, holds_file, read_json
from medembed.encoders.hub import DEMO, Checkpoint, resolve_checkpoint

__all__ = [
    "BASE_FILE",
    "BASE_LINK",
    "CHANGED_FILE",
    "BaseRef",
    "Origin",
    "base_of",
    "describe_base",
    "read_base",
]

BASE_FILE = "base.json"
CHANGED_FILE = "changed.safetensors"
BASE_LINK = "base"
"""A directory or link of this name in the encoder's directory overrides the base's location."""

_FORMAT, _VERSION = "medembed-adapted-encoder", 1


@dataclass(frozen=True)
class BaseRef:
    """The contents of `base.json`.

    Attributes
    ----------
    encoder : str or None
        Hub id with its revision, or `demo`.
    directory : str or None
        Otherwise the base's directory, relative to that of `base.json`.
    fingerprint : str
        The base's fingerprint.
    adapted : str or None
        The fingerprint of the base with the changed tensors; None while unknown.
    """

    encoder: str | None
    directory: str | None
    fingerprint: str
    adapted: str | None


@dataclass(frozen=True)
class Origin:
    """The origin of a loaded encoder.

    Attributes
    ----------
    weights : Checkpoint
        The checkpoint of its tensors; for an adapted encoder that of its base.
    directory : Path
        The directory with its own config and processor.
    fingerprint : str
        The fingerprint of `weights`, which for an adapted encoder is its base's.
    """

    weights: Checkpoint
    directory: Path
    fingerprint: str


def read_base(directory: Path) -> BaseRef | None:
    """Return the base of an adapted encoder, or None for any other checkpoint.

    Raises
    ------
    EncoderError
        `base.json` is damaged, has an unknown version, or is missing although there are changed
        tensors; or the directory also holds complete weights.
    """
    if not holds_file(directory / BASE_FILE):
        if holds_file(directory / CHANGED_FILE):
            raise EncoderError(
                f"{directory.name} holds {CHANGED_FILE} and no {BASE_FILE}, which names its base. "
                "Restore the file, or fine-tune again."
            )
        return None
    document = read_json(directory / BASE_FILE)
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise EncoderError(f"{BASE_FILE} of {directory.name} is not that of an adapted encoder.")
    if document.get("version") != _VERSION:
        raise EncoderError(
            f"encoder {directory.name} is version {document.get('version')!r} of {_FORMAT}; this "
            f"medembed reads {_VERSION}. Use the medembed that made it."
        )
    texts = [document.get(name) for name in ("base_fingerprint", "fingerprint")]
    places = [document.get(name) for name in ("base", "base_directory")]
    named = [place for place in places if isinstance(place, str) and place]
    are_texts = all(isinstance(text, str) and text for text in texts)
    if not are_texts or len(named) != 1 or places.count(None) != 1:
        raise EncoderError(
            f"{BASE_FILE} of {directory.name} does not name its base. Restore the file, or "
            "fine-tune again."
        )
    for name in (WEIGHTS_FILE, INDEX_FILE):
        if holds_file(directory / name):
            raise EncoderError(
                f"{directory.name} holds two encoders: {name}, and {BASE_FILE} with "
                f"{CHANGED_FILE}. Keep one of the two."
            )
    return BaseRef(places[0], places[1], str(texts[0]), str(texts[1]))


def base_of(ref: str | os.PathLike[str]) -> str | Path:
    """Return the reference of an adapted encoder's base, or of any other encoder its own.

    Raises
    ------
    EncoderError
        `base.json` is damaged, or the base's directory is not where it was.
    """
    directory = Path(ref)
    base = read_base(directory) if directory.is_dir() else None
    if base is None:
        return os.fspath(ref)
    if (directory / BASE_LINK).is_dir():
        return directory / BASE_LINK
    if base.encoder is not None:
        return base.encoder
    place = Path(os.path.normpath(directory / str(base.directory)))
    if not place.is_dir():
        raise EncoderError(
            f"encoder {directory.name} holds the blocks that training changed, and its base, the "
            f"directory {base.directory}, is not there any more. Put the base back, or link it: "
            f"ln -s BASE {directory / BASE_LINK}"
        )
    return place


def describe_base(origin: Origin, directory: Path, fingerprint: str) -> dict[str, object]:
    """Return the content of `base.json` for an encoder that will lie in `directory`.

    Parameters
    ----------
    origin : Origin
        The encoder that training started from.
    fingerprint : str
        Fingerprint of the adapted encoder.
    """
    weights = origin.weights
    encoder: str | None = None
    if weights.revision is not None:
        encoder = f"{weights.source}@{weights.revision}"
    elif weights.path == resolve_checkpoint(DEMO).path:
        encoder = DEMO
    place = None if encoder else os.path.relpath(weights.path.resolve(), directory.resolve())
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "base": encoder,
        "base_directory": place,
        "base_fingerprint": origin.fingerprint,
        "fingerprint": fingerprint,
    }
