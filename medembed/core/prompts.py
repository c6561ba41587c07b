"""The file of prompts: vectors of sentences in the space of an encoder's images.

`medembed prompts` writes it; heads that read words take it. It is a safetensors file:

- ``text``: float32 (n, k), the text tower's vectors of n sentences, before normalisation;
- ``image_projection``: float32 (k, d), only where the image's pooled vector, of d columns, has to
  be projected into that space first, as in CLIP;
- metadata ``document``: JSON, see `PromptsDocument`.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import safetensors
import safetensors.numpy

from medembed.core.errors import ModelError, PathNotFoundError
from medembed.core.files import as_path, describe_error, read_plain, write_atomically
from medembed.core.schema import ClosedRecord, Digest, Field, Record, parse

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "LABELS",
    "PromptEntry",
    "Prompts",
    "PromptsDocument",
    "normalise",
    "read_prompts",
    "write_prompts",
]

Label = Literal["normal", "abnormal"]
LABELS: tuple[Label, ...] = ("normal", "abnormal")
_MAX_BYTES = 1 << 28
_WAY_OUT = "Make it again with `medembed prompts`."
_LEAST_NORM = 1e-12


class PromptEntry(ClosedRecord):
    """One sentence: a row of ``text``."""

    set: Annotated[str, Field(min_length=1, max_length=100)]
    """The set of prompts that it belongs to; a sweep chooses one."""
    label: Label
    region: str | None
    """The region that was filled in, or null for a sentence without one."""
    text: str


class PromptsDocument(Record):
    """What the metadata of a file of prompts say."""

    format: Literal["medembed-prompts"] = "medembed-prompts"
    version: Literal[1] = 1
    encoder: Digest
    """Fingerprint of the image tower, as caches have it."""
    text_encoder: Digest
    """Fingerprint of the text tower."""
    source: str
    revision: str | None
    pooling: Literal["pooler"] = "pooler"
    logit_scale: Annotated[float, Field(gt=0)]
    logit_bias: float
    prompts: Annotated[list[PromptEntry], Field(min_length=2)]


@dataclass(frozen=True, eq=False)
class Prompts:
    """Sentences and their vectors.

    Attributes
    ----------
    document : PromptsDocument
    text : float32 (n, k)
        A row for each of ``document.prompts``.
    image_projection : float32 (k, d) or None
    """

    document: PromptsDocument
    text: np.ndarray
    image_projection: np.ndarray | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides a score."""
        found = hashlib.sha256(json.dumps(self.document.model_dump(), sort_keys=True).encode())
        for array in (self.text, self.image_projection):
            found.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
        return found.hexdigest()

    @property
    def sets(self) -> tuple[str, ...]:
        """The names of the sets of prompts, in the order of the file."""
        return tuple(dict.fromkeys(entry.set for entry in self.document.prompts))

    @property
    def regions(self) -> tuple[str, ...]:
        """The regions that sentences name."""
        found = {entry.region for entry in self.document.prompts if entry.region is not None}
        return tuple(sorted(found))

    @property
    def n_columns(self) -> int:
        """The columns of the pooled image vectors that belong to these sentences."""
        return int((self.text if self.image_projection is None else self.image_projection).shape[1])

    def logits(self, X: np.ndarray) -> np.ndarray:
        """Return the checkpoint's logit of each image and sentence, float64 (rows, n).

        scale * cos(image, sentence) + bias, transformers' ``logits_per_image``. A logit is no
        probability of a finding.

        Parameters
        ----------
        X : (rows, d) array
            Vectors of the pooling `pooler`.
        """
        images = normalise(X if self.image_projection is None else X @ self.image_projection.T)
        cosine = images @ normalise(self.text).T
        return np.asarray(self.document.logit_scale * cosine + self.document.logit_bias)

    def directions(self, name: str = "") -> tuple[np.ndarray, tuple[str, ...]]:
        """Return the direction from normal to abnormal, overall and for each region.

        A class's vector is the mean of its sentences' unit vectors, scaled to length 1 (Radford et
        al., ICML 2021, section 3.1.4). The product of an image's unit vector with a direction is
        the difference of the two classes' logits.

        Parameters
        ----------
        name : str
            One of `sets`; "" is the first.

        Returns
        -------
        float64 (1 + r, k)
            First the direction of all sentences, for regions that none of them names.
        tuple of str
            The r regions.

        Raises
        ------
        ModelError
            There is no such set.
        """
        name = name or self.sets[0]
        if name not in self.sets:
            raise ModelError(f"there is no set of prompts {name!r}; there are {self._listed()}")
        entries = self.document.prompts
        units = normalise(self.text)
        regions = sorted({e.region for e in entries if e.set == name and e.region is not None})
        found = []
        for region in (None, *regions):
            classes = []
            for label in LABELS:
                rows = [
                    i
                    for i, e in enumerate(entries)
                    if (e.set, e.label) == (name, label)
                    and (region is None or e.region in (None, region))
                ]
                classes.append(normalise(units[rows].mean(axis=0)))
            found.append(self.document.logit_scale * (classes[1] - classes[0]))
        return np.stack(found), tuple(regions)

    def _listed(self) -> str:
        return ", ".join(self.sets)


def normalise(vectors: np.ndarray) -> np.ndarray:
    """Return vectors (…, k) of length 1, float64."""
    values = np.asarray(vectors, np.float64)
    lengths = np.linalg.norm(values, axis=-1, keepdims=True)
    return np.asarray(values / np.maximum(lengths, _LEAST_NORM))


def write_prompts(path: str | os.PathLike[str], prompts: Prompts) -> None:
    """Write a file of prompts, complete or not at all; equal prompts give equal bytes."""
    arrays = {"text": np.ascontiguousarray(prompts.text, np.float32)}
    if prompts.image_projection is not None:
        arrays["image_projection"] = np.ascontiguousarray(prompts.image_projection, np.float32)
    document = json.dumps(prompts.document.model_dump(), ensure_ascii=False, sort_keys=True)
    write_atomically(Path(path), safetensors.numpy.save(arrays, {"document": document}))


def read_prompts(prompts: Prompts | str | os.PathLike[str]) -> Prompts:
    """Return the prompts in a file.

    Raises
    ------
    PathNotFoundError
        There is no such file.
    ModelError
        It is not a file of prompts, or is damaged.
    """
    if isinstance(prompts, Prompts):
        return prompts
    path = as_path(prompts, "a file of prompts")
    try:
        data = read_plain(path, max_bytes=_MAX_BYTES)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        document = json.loads(header["__metadata__"]["document"])
        arrays = safetensors.numpy.load(data)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise PathNotFoundError(
            f"there is no file {path} with prompts. `medembed prompts` makes one."
        ) from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {describe_error(error)}.") from error
    except (
        *(ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError),
        *(safetensors.SafetensorError, MemoryError),
    ) as error:
        raise ModelError(f"{path} is not a file of prompts. {_WAY_OUT}") from error
    found = parse(PromptsDocument, document, ModelError, path, _WAY_OUT)
    text, projection = arrays.get("text"), arrays.get("image_projection")
    _check(path, found, arrays)
    assert text is not None
    prompts = Prompts(found, text, projection)
    _check_sets(path, prompts)
    return prompts


def _check(path: Path, document: PromptsDocument, arrays: dict[str, Any]) -> None:
    text, projection = arrays.get("text"), arrays.get("image_projection")
    held = [array for array in (text, projection) if array is not None]
    is_right = all(array.ndim == 2 for array in held) and text is not None
    if is_right:
        n, k = held[0].shape
        is_right = n == len(document.prompts) and all(len(array) == k for array in held[1:])
    if not is_right or set(arrays) - {"text", "image_projection"}:
        raise ModelError(f"{path} does not hold a vector for each of its prompts. {_WAY_OUT}")
    if any(array.dtype != np.float32 or not np.isfinite(array).all() for array in held):
        raise ModelError(f"{path} holds values that are not finite float32. {_WAY_OUT}")


def _check_sets(path: Path, prompts: Prompts) -> None:
    entries: Sequence[PromptEntry] = prompts.document.prompts
    for name in prompts.sets:
        for label in LABELS:
            if not any((e.set, e.label) == (name, label) for e in entries):
                raise ModelError(f"{path}: the set {name!r} has no {label} prompt. {_WAY_OUT}")
