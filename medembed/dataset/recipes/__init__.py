"""Recipes, and building manifests from them."""
