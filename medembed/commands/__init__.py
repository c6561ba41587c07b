"""One module per family of commands; `cli` puts them together."""
