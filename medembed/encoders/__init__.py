"""Frozen vision towers: pixels in, pooled embeddings out."""
