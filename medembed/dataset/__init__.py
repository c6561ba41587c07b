"""Manifests, splits and images: what the radiographs are."""
