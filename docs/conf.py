"""The API reference, from the docstrings: `make docs`."""

from importlib import metadata
from typing import Any

project = "medembed"
author = "the authors of medembed"
release = metadata.version("medembed")
extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
autosummary_generate = True
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}

napoleon_google_docstring = False
napoleon_use_ivar = True
exclude_patterns = ["build"]
templates_path = ["templates"]
html_theme = "alabaster"
html_theme_options = {
    "description": "Research software, not a medical device",
    "page_width": "72em",
}


def skip_member(_app: Any, _what: str, name: str, _member: Any, skip: bool, _options: Any) -> bool:
    """Leave out what scikit-learn adds to every estimator for the routing of metadata."""
    return skip or (name.startswith("set_") and name.endswith("_request"))


def setup(app: Any) -> None:
    """Register with Sphinx."""
    app.connect("autodoc-skip-member", skip_member)
