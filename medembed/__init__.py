"""Embed radiographs once with a frozen medical encoder; compare light classifiers on the cache."""
