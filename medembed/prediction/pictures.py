"""Heat maps as pictures in a directory, one for each image that is answered for."""

from pathlib import Path

import numpy as np

from medembed.heads.base import Head
from medembed.images.load import read_content
from medembed.prediction.attribution import Explainer
from medembed.prediction.encode import Embedder
from medembed.prediction.overlay import overlay_name, write_overlay

__all__ = ["Pictures"]


class Pictures:
    """Draws where a head looked; the directory is made if it is not there.

    A picture is of the image alone, also where the head judges studies, and named by the hash of
    its SHA-256, as `overlay_name` does.

    Raises
    ------
    EncoderError, ModelError
        The encoder cannot be had, or nothing sensible can be said of it or of the head.
    OSError
        The directory cannot be made.
    """

    def __init__(self, directory: Path, embedder: Embedder, head: Head) -> None:
        self._explainer = Explainer(embedder.encoder, head, embedder.card.pooling)
        self._embedder, self._directory = embedder, directory
        directory.mkdir(parents=True, exist_ok=True)

    def draw(
        self,
        path: Path,
        sha256: str,
        pixels: np.ndarray,
        covariates: np.ndarray,
        probability: float,
    ) -> str | None:
        """Write the picture of an image and its numbers beside it.

        Parameters
        ----------
        path, sha256
            The image's file; it is read once more, since the picture shows it as it is.
        pixels : uint8 (height, width)
            The same, prepared.
        covariates : float32 (k,)
        probability : float
            Calibrated, of abnormal, in [0, 1]: it stands in the legend.

        Returns
        -------
        str or None
            The picture's path; None where the file has changed meanwhile.
        """
        reading = read_content(
            [path], sha256, _as_it_is, self._embedder.intensity, self._embedder.limits
        )
        if reading.pixels is None:
            return None
        known = covariates[None] if len(covariates) else None
        heat = self._explainer.heat_maps(pixels[None], known)[0]
        place = self._directory / overlay_name(sha256)
        write_overlay(
            place,
            reading.pixels,
            heat,
            self._embedder.encoder.preprocessing,
            notes=(f"Probability of abnormal, calibrated: {probability:.3f}",),
        )
        return str(place)


def _as_it_is(pixels: np.ndarray) -> np.ndarray:
    return pixels
