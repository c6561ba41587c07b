"""Image files become grey pixels."""
