"""Simulate synthetic radiographs of other detectors, which the demo's encoder has never seen.

Apart from haze and gamma, the demo's film curve maps the share I of transmitted rays to grey 1 − I.
Another beam, scatter, dose and window map this I to another image. The values are typical and were
chosen before any measurement; nothing here is fitted to a device.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

__all__ = ["DETECTORS", "Detector", "expose"]

_SCATTER_REACH = 0.1  # standard deviation of scattered rays, as a share of the image's side


@dataclass(frozen=True)
class Detector:
    """A detector that differs from the demo's.

    Attributes
    ----------
    contrast : float
        Attenuation coefficients relative to those at the usual tube voltage: I becomes
        I ** contrast. Going from 50 to 70 kVp moves the mean energy from about 30 to 38 keV, where
        bone's coefficient is 0.6 to 0.7 of what it was (NIST, cortical bone).
    scatter : float
        Share of the detected rays that are scattered; 0.1 behind a grid, 0.3 to 0.5 without one.
    photons : float
        Detected per pixel of the open field, Poisson: 4,000 of a finger's field at the usual dose.
    gain : float
        Gain of the fixed window: below 1 the image is too bright (underexposed), above 1 too dark.
    """

    contrast: float
    scatter: float
    photons: float
    gain: float


DETECTORS = {
    # At the bedside: higher voltage, no grid, a quarter of the dose, and a reader that compensates
    # for part of it.
    "bedside": Detector(contrast=0.65, scatter=0.35, photons=1000, gain=0.7),
    # Overexposed film behind a grid: the open field is black.
    "film": Detector(contrast=1.0, scatter=0.1, photons=2000, gain=1.5),
    # A worn storage plate: the usual window, a thirteenth of the dose.
    "plate": Detector(contrast=0.8, scatter=0.1, photons=300, gain=1.0),
}
"""`bedside` is reported; the others served to choose defaults."""


def expose(
    pixels: NDArray[np.uint8], detector: Detector, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """Return a rendered radiograph as recorded by `detector`.

    Parameters
    ----------
    pixels : ndarray
        uint8 (height, width), from `synthetic.render`; 0 black.
    detector : Detector
        The detector to simulate.
    generator : numpy.random.Generator
        Source of the quantum noise.

    Returns
    -------
    ndarray
        uint8 (height, width).
    """
    passed = (1 - pixels / 255) ** detector.contrast
    reach = _SCATTER_REACH * max(pixels.shape)
    scattered = gaussian_filter(passed, reach, mode="nearest")
    arriving = (1 - detector.scatter) * passed + detector.scatter * scattered
    counted = generator.poisson(detector.photons * arriving) / detector.photons
    grey = 1 - np.minimum(detector.gain * counted, 1)
    shown: NDArray[np.uint8] = (grey * 255 + 0.5).astype(np.uint8)
    return shown
