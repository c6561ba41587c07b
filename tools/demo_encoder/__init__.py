"""How the demo's encoder was made: run from a checkout, not part of the installed package."""
