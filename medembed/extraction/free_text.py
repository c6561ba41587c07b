"""A manifest's column of free text as covariates, through the text tower of a checkpoint.

Each text becomes its place along the principal components of the vectors of the texts of `train`:
columns `NAME_1`, `NAME_2`, … of numbers, which sweeps, models and evaluations read as any other
covariate. The components are kept beside the manifest, for the texts of other data sets.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import safetensors
import safetensors.numpy

from medembed.core.errors import EncoderError, ManifestError, PathNotFoundError
from medembed.core.files import read_plain, write_atomically
from medembed.core.prompts import normalise
from medembed.core.schema import Digest, Field, Record, parse
from medembed.dataset.covariates import is_covariate
from medembed.dataset.manifest import Manifest, read_manifest, write_manifest

__all__ = ["TextBasis", "add_text_covariates", "basis_path", "may_hold_the_answer"]

N_COMPONENTS = 16
_MAX_BYTES = 1 << 28
_DIGITS = 6
_TELLING = ("report", "finding", "impression", "conclusion", "diagnos", "befund", "beurteilung")
_WAY_OUT = "Make it again with `medembed manifest texts`."


class _Document(Record):
    """The metadata of a file of components."""

    format: Literal["medembed-texts"] = "medembed-texts"
    version: Literal[1] = 1
    column: str
    text_encoder: Digest
    source: str
    revision: str | None
    components: Annotated[int, Field(ge=1)]


@dataclass(frozen=True, eq=False)
class TextBasis:
    """The components of a column's texts.

    Attributes
    ----------
    document
        Its `column`, and the text tower: `text_encoder` (fingerprint), `source`, `revision`.
    mean, components : float32 (w,) and (k, w)
        Of vectors of length 1.
    """

    document: _Document
    mean: np.ndarray
    components: np.ndarray

    def place(self, vectors: np.ndarray) -> np.ndarray:
        """Return the places of vectors (n, w) along the components, (n, k)."""
        return np.asarray((vectors - self.mean) @ self.components.T)


def basis_path(manifest: str | os.PathLike[str]) -> Path:
    """Return the file beside a manifest that holds its components, `NAME.texts.safetensors`."""
    return Path(manifest).with_suffix(".texts.safetensors")


def may_hold_the_answer(column: str) -> bool:
    """Return whether a column's name says that its texts were written after the film was read."""
    return any(word in column.casefold() for word in _TELLING)


def add_text_covariates(
    manifest: Manifest | str | os.PathLike[str],
    column: str,
    encoder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    n_components: int = N_COMPONENTS,
    like: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Write a manifest with columns `COLUMN_1` … for a column of free text, and its components.

    Texts that are longer than the tower reads are embedded in parts, whose mean counts. An empty
    text has empty fields.

    Parameters
    ----------
    manifest : Manifest or path
    column : str
        A covariate of the manifest.
    encoder : str or path
        A checkpoint with a text tower: MedSigLIP's, SigLIP's or CLIP's.
    out : path
        The manifest to write; the components go to `basis_path` of it.
    n_components : int
        The most columns; fewer where the texts of train allow no more.
    like : path, optional
        A manifest, or its file of components, whose columns these shall be: of the data that a
        model was trained on.
    progress : callable, optional
        Called as progress(done, total) with bytes, while weights are downloaded.

    Returns
    -------
    Manifest
        As it was written.

    Raises
    ------
    ManifestError
        The manifest has no such column, or fewer than 3 different texts in train.
    PathNotFoundError
        There are no components at `like`.
    EncoderError
        The checkpoint has no text tower, or another than that of `like`.
    """
    read = read_manifest(manifest)
    if column not in read.rows or not is_covariate(column):
        raise ManifestError(
            f"{column!r} is not a covariate of the manifest. List it under covariates in the "
            "recipe, and build again."
        )
    texts = read.rows[column].fillna("").astype(str).str.strip()
    known = sorted(set(texts) - {""})
    basis = None if like is None else _read_basis(like)
    from medembed.encoders.text_tower import load_text_tower

    tower = load_text_tower(encoder, progress=progress)
    vectors = normalise(np.stack([_embed(tower, text) for text in known])) if known else None
    if basis is not None and basis.document.text_encoder != tower.fingerprint:
        raise EncoderError(
            f"the components are of the text tower of {basis.document.source}, and {tower.source} "
            "has another. Name that one."
        )
    in_train = set(texts[read.rows["split"] == "train"])
    if basis is None:
        is_train = np.array([text in in_train for text in known], bool)
        if vectors is None or is_train.sum() < 3:
            raise ManifestError(f"{column!r} has fewer than 3 different texts in train.")
        basis = _learn(vectors[is_train], n_components, column, tower)
    added = _columns(basis, column, texts, known, vectors)
    clash = [name for name in added if name in read.rows]
    if clash:
        raise ManifestError(f"the manifest has a column {clash[0]!r} already. Rename it.")
    rows = pd.concat([read.rows, added], axis=1)
    found = replace(read, rows=rows[_ordered(list(read.rows.columns), list(added.columns))])
    write_manifest(found, Path(out))
    _write_basis(basis, basis_path(out))
    return found


def _ordered(columns: Sequence[str], added: Sequence[str]) -> list[str]:
    """Return the columns with the added ones after the covariates, as a manifest has them."""
    last = max((i for i, name in enumerate(columns) if is_covariate(name)), default=-1)
    return [*columns[: last + 1], *added, *columns[last + 1 :]]


def _columns(
    basis: TextBasis,
    column: str,
    texts: "pd.Series[str]",
    known: Sequence[str],
    vectors: np.ndarray | None,
) -> pd.DataFrame:
    k = len(basis.components)
    names = [f"{column}_{i}" for i in range(1, k + 1)]
    if vectors is None:
        return pd.DataFrame("", index=texts.index, columns=pd.Index(names))
    places = basis.place(vectors)
    fields = {
        text: [f"{value:.{_DIGITS}g}" for value in row]
        for text, row in zip(known, places.tolist(), strict=True)
    }
    empty = [""] * k
    return pd.DataFrame([fields.get(text, empty) for text in texts], texts.index, pd.Index(names))


def _embed(tower: Any, text: str) -> np.ndarray:
    """Return the vector of a text, or the mean of those of its parts; float64 (w,)."""
    parts = _split(tower, text)
    return np.asarray(normalise(tower.embed(parts)).mean(axis=0))


def _split(tower: Any, text: str) -> list[str]:
    """Return a text in parts that the tower reads, cut between words where there are any."""
    if tower.count_tokens(text) <= tower.max_tokens:
        return [text]
    words = text.split()
    middle = len(words) // 2
    halves = (" ".join(words[:middle]), " ".join(words[middle:]))
    if len(words) == 1:
        halves = (text[: len(text) // 2], text[len(text) // 2 :])
    return [part for half in halves for part in _split(tower, half)]


def _learn(vectors: np.ndarray, n_components: int, column: str, tower: Any) -> TextBasis:
    mean = vectors.mean(axis=0)
    _, lengths, components = np.linalg.svd(vectors - mean, full_matrices=False)
    k = min(n_components, int((lengths > 1e-6 * lengths[0]).sum()))
    components = components[:k] * np.sign(components[:k].sum(axis=1, keepdims=True))
    document = _Document(
        column=column,
        text_encoder=tower.fingerprint,
        source=tower.source,
        revision=tower.revision,
        components=k,
    )
    return TextBasis(document, mean.astype(np.float32), components.astype(np.float32))


def _write_basis(basis: TextBasis, path: Path) -> None:
    arrays = {"mean": basis.mean, "components": np.ascontiguousarray(basis.components)}
    document = json.dumps(basis.document.model_dump(), ensure_ascii=False, sort_keys=True)
    write_atomically(path, safetensors.numpy.save(arrays, {"document": document}))


def _read_basis(like: str | os.PathLike[str]) -> TextBasis:
    path = Path(like)
    path = path if path.name.endswith(".texts.safetensors") else basis_path(path)
    try:
        data = read_plain(path, max_bytes=_MAX_BYTES)
        length = int.from_bytes(data[:8], "little")
        document = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["document"])
        arrays = safetensors.numpy.load(data)
        mean, components = arrays["mean"], arrays["components"]
    except FileNotFoundError as error:
        raise PathNotFoundError(
            f"there are no components of texts at {path}. `medembed manifest texts` writes them."
        ) from error
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError),
        *(OverflowError, MemoryError, safetensors.SafetensorError),
    ) as error:
        raise ManifestError(f"{path} does not hold components of texts. {_WAY_OUT}") from error
    found = parse(_Document, document, ManifestError, path, _WAY_OUT)
    shapes = (mean.shape, components.shape)
    is_right = shapes == ((components.shape[-1],), (found.components, components.shape[-1]))
    if not is_right or not all(np.isfinite(own).all() for own in (mean, components)):
        raise ManifestError(f"{path} does not hold components of texts. {_WAY_OUT}")
    return TextBasis(found, mean, components)
