"""Programs that generated files of the package. They run from a checkout and are not installed."""
