"""The whole workflow on synthetic radiographs."""
