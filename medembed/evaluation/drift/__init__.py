"""Test whether embeddings of new patients resemble those of training."""
