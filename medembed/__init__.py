"""Embed radiographs once with a frozen medical encoder; compare light classifiers on the cache."""

__version__ = "0.1.0"
