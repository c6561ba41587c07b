"""Whether embeddings of other patients resemble those of training."""
