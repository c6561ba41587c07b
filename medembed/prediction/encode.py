"""Where a model's embeddings come from: the encoder that its card names, or a cache.

Both are held to the spec that the model was trained on before they give anything.
"""

import os
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from medembed.cache.failures import Failure
from medembed.cache.float16 import describe_loss
from medembed.cache.spec import CacheSpec, keys_from_hex
from medembed.cache.store import Cache, open_cache
from medembed.core.errors import EncoderError, ImageError, ModelError
from medembed.encoders.hub import DEMO
from medembed.encoders.protocol import Encoder, check_rows
from medembed.images.intensity import DEFAULT_INTENSITY, Intensity
from medembed.images.load import DEFAULT_LIMITS, Limits
from medembed.prediction.decisions import check_spec, spec_of_card
from medembed.results.model_card import Card

__all__ = ["CachedRows", "Embedder", "find_encoder", "read_intensity"]

_PERCENTILES = re.compile(r"^(.+), ([0-9.]+) to ([0-9.]+) %$", re.DOTALL)


class Embedder:
    """The encoder of a model, loaded when it is first needed, and once.

    Parameters
    ----------
    model_path : Path
        The model's directory, from which its card names an adapted encoder.
    card : Card
    reference : Encoder, str or path, optional
        The encoder itself, or another place of it than the card names.
    device, precision : str
        As for `load_encoder`. `fit` and the window are the model's.
    limits : Limits
        What an image may cost before it counts as failed.
    progress : callable, optional
        Called as progress(done, total) with bytes, while weights are fetched.
    """

    def __init__(
        self,
        model_path: Path,
        card: Card,
        *,
        reference: Encoder | str | os.PathLike[str] | None = None,
        device: str = "auto",
        precision: str = "auto",
        limits: Limits = DEFAULT_LIMITS,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.limits = limits
        self.model_path, self.card, self.reference = model_path, card, reference
        self.device, self.precision, self.progress = device, precision, progress
        self.poolings = card.pooling.split("+")

    @cached_property
    def intensity(self) -> Intensity:
        """Which grey the model was trained to see a DICOM in."""
        return read_intensity(spec_of_card(self.card))

    @cached_property
    def images_version(self) -> Any:
        """Which version of decoding the model was trained on; see `images.versions`."""
        return spec_of_card(self.card).images_version

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder, loaded and compared with the spec.

        Raises
        ------
        EncoderError
            It cannot be had, or the card does not say where it is.
        ModelError
            It is another encoder than the model's.
        """
        from medembed.encoders.loading import load_encoder
        from medembed.extraction.image_encoder import find_tower

        reference = self.reference
        if reference is None:
            reference = find_encoder(self.card, self.model_path)
        if not isinstance(reference, str | os.PathLike):
            tower = find_tower(reference)
            self._check(tower)
            return tower
        encoder = load_encoder(
            reference,
            device=self.device,
            precision=self.precision,
            fit=str(spec_of_card(self.card).preprocessing.get("fit", "stretch")),
            # What the fingerprint depends on; the others are compared below, after it.
            poolings=tuple(name for name in self.poolings if name == "projector"),
            progress=self.progress,
        )
        self._check(encoder)
        return encoder

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Embed prepared images, as a cache would hold them.

        Parameters
        ----------
        pixels : uint8 (n, height, width)

        Returns
        -------
        float32 (n, d)
            Poolings side by side, cells one after the other; rounded to the dtype that the
            model's training rows were stored in.

        Raises
        ------
        EncoderError
            The encoder gives something else than its poolings, or values that are not finite, or
            too large or too small for that dtype.
        """
        found = self.encoder.encode(pixels, self.poolings)
        rows = check_rows(self.encoder, found, self.poolings, len(pixels), len(pixels))
        dtype = spec_of_card(self.card).dtype
        stored = []
        for name, values in rows.items():
            with np.errstate(over="ignore"):
                narrow = values.astype(dtype)
            loss = describe_loss(values, narrow)
            if loss:
                raise EncoderError(f"the embedding does not fit {dtype}: pooling {name} {loss}")
            stored.append(narrow.reshape(len(pixels), -1))
        return np.hstack(stored).astype(np.float32)

    def _check(self, encoder: Encoder) -> None:
        from medembed.extraction import spec_of

        offered = [name for name in self.poolings if name in encoder.dimensions]
        spec = spec_of(encoder, offered or list(encoder.dimensions)[:1], "float32", self.intensity)
        check_spec(self.card, spec, f"the encoder {encoder.source}")


class CachedRows:
    """The rows of a cache that a model can read.

    Raises
    ------
    PathNotFoundError, CacheError
        There is no cache.
    ModelError
        Its rows are not what the model was trained on.
    """

    def __init__(self, cache: Cache | str | os.PathLike[str], card: Card) -> None:
        self.cache = open_cache(cache)
        check_spec(card, self.cache.spec, f"those in the cache at {self.cache.path}")
        self.poolings = card.pooling.split("+")

    def has(self, digests: Sequence[str]) -> np.ndarray:
        """Tell of each SHA-256 whether its row is there: (n,) bool; "" is nowhere."""
        known = np.array([digest != "" for digest in digests], bool)
        found = np.zeros(len(digests), bool)
        found[known] = self.cache.is_done(keys_from_hex([d for d in digests if d]))
        return found

    def failures(self) -> dict[str, Failure]:
        """Return what will fail again, by sha256: not what could not be read, which may by now."""
        return {s: f for s, f in self.cache.failures().items() if f.stage != "read"}

    def read(self, digests: Sequence[str]) -> np.ndarray:
        """Return the rows of these SHA-256, all there, float32 (n, d), as `Embedder.encode`."""
        keys = keys_from_hex(list(digests))
        rows = self.cache.read(keys, self.poolings)
        flat = [rows[name].reshape(len(keys), -1) for name in self.poolings]
        return np.hstack(flat).astype(np.float32)


def find_encoder(card: Card, model_path: Path) -> str | Path:
    """Give the reference of the encoder that a card names.

    Raises
    ------
    EncoderError
        It names none, a directory that is not there, or one that it knows the name of only.
    """
    way_out = "Give it with --encoder."
    source, revision = card.encoder.get("source"), card.encoder.get("revision")
    place = card.encoder.get("path")
    if place:
        directory = Path(os.path.normpath(model_path.resolve() / place))
        if directory.is_dir():
            return directory
        raise EncoderError(
            f"the model at {model_path} reads embeddings of an adapted encoder, which its card "
            f"places at {place} from there, and it is not there. {way_out}"
        )
    if not source:
        raise EncoderError(
            f"the model at {model_path} does not say which encoder its embeddings are of. {way_out}"
        )
    if source == DEMO:
        return DEMO
    if "/" not in source:
        raise EncoderError(
            f"the model at {model_path} reads embeddings of {source}, a directory somewhere that "
            f"its card does not know the place of. {way_out}"
        )
    return f"{source}@{revision}" if revision else str(source)


def read_intensity(spec: CacheSpec) -> Intensity:
    """Read back what `Intensity.as_spec` wrote into a spec.

    Raises
    ------
    ModelError
        It is nothing that it writes.
    """
    text = spec.preprocessing.get("window")
    if text is None:
        return DEFAULT_INTENSITY
    found = _PERCENTILES.match(str(text))
    try:
        if found:
            intensity = Intensity(found[1], float(found[2]), float(found[3]))
        else:
            intensity = Intensity(str(text))
    except (ImageError, ValueError) as error:
        raise ModelError(f"the model's window {text!r} is none: {error}") from error
    return intensity
