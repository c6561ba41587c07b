"""The API reference, from the docstrings: `make docs`."""

from importlib import metadata
from typing import Any

import medembed

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


def skip_member(_app: Any, what: str, name: str, _member: Any, skip: bool, _options: Any) -> bool:
    """Leave out what is told elsewhere.

    That is what scikit-learn adds to every estimator for the routing of metadata, and, on a
    module's page, the names of the public surface, which have pages of their own.
    """
    is_public = what == "module" and name in medembed.__all__
    return skip or is_public or (name.startswith("set_") and name.endswith("_request"))


def setup(app: Any) -> None:
    """Register with Sphinx."""
    app.connect("autodoc-skip-member", skip_member)
