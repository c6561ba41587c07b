"""The foundation of all other packages: errors, files, system, text."""
