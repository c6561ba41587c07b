"""Light classifiers on embeddings; every one is a scikit-learn estimator."""
