"""Recipes, and the manifests that they build."""
