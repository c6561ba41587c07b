"""Manifests, recipes and splits: which radiographs a dataset has."""
