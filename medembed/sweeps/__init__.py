"""Sweeps: many heads, cross-validated on one cache and one manifest, into one run."""

from medembed.sweeps.job import sweep

__all__ = ["sweep"]
