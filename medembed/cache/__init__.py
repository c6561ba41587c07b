"""The embedding cache: immutable HDF5 shards named by their hash."""
