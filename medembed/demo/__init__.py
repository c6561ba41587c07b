"""The whole path on synthetic radiographs."""
