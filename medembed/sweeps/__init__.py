"""Sweeps: cross-validate many heads on one cache and one manifest, and write one run."""

from medembed.sweeps.ensembles import ensemble
from medembed.sweeps.job import sweep

__all__ = ["ensemble", "sweep"]
