"""The documentation that `make docs` builds, with pages for the commands and for Python."""

import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from pydantic import BaseModel

import medembed
from tools.cli_pages import write_pages
from tools.schema_page import render_page

DOCS = Path(__file__).parent

project = "medembed"
author = "the authors of medembed"
release = metadata.version("medembed")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
autosummary_generate = True
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
python_maximum_signature_line_length = 88
napoleon_google_docstring = False
napoleon_use_ivar = True
exclude_patterns = ["build"]
templates_path = ["templates"]

html_theme = "furo"
html_title = "medembed"
html_static_path = ["static"]
html_css_files = ["medembed.css"]
html_copy_source = False
html_show_copyright = False
smartquotes_action = "qe"  # not dashes: --image-root in a sentence is an option
html_theme_options = {"footer_icons": []}


def skip_member(_app: Any, what: str, name: str, member: Any, skip: bool, _options: Any) -> bool:
    """Leave out what is described elsewhere.

    That is what scikit-learn adds to every estimator for the routing of metadata, and, on a
    module's page, the names of the public surface and the models of file formats, which have pages
    of their own.
    """
    has_page = name in medembed.__all__ or (
        isinstance(member, type) and issubclass(member, BaseModel)
    )
    is_routing = name.startswith("set_") and name.endswith("_request")
    return skip or is_routing or (what == "module" and has_page)


def break_names(html: str) -> str:
    """Let names break after dots, slashes and underscores, but not after their hyphens."""
    parts = re.split(r"(<[^>]*>|&\w+;)", html)
    for number, text in enumerate(parts[::2]):
        pieces = re.split(r"(?<=\w[._/])(?=[A-Za-z])", text)
        whole = [f'<span class="whole">{p}</span>' if "-" in p else p for p in pieces]
        parts[2 * number] = "<wbr>".join(whole)
    return "".join(parts)


def break_page(_app: Any, _name: str, _template: str, context: dict[str, Any], _tree: Any) -> None:
    """Apply `break_names` to headings, code within text, signatures and the navigation."""
    for part in ("toc", "furo_navigation_tree"):
        context[part] = break_names(context.get(part) or "")
    context["body"] = re.sub(
        r"<pre>.*?</pre>|<(h[1-6]|code|dt)\b.*?</\1>",
        lambda found: break_names(found[0]) if found[1] else found[0],
        context.get("body") or "",
        flags=re.DOTALL,
    )


def setup(app: Any) -> None:
    """Register with Sphinx."""
    write_pages(DOCS / "reference" / "cli")
    (DOCS / "reference" / "schemas.md").write_text(render_page(DOCS / "schemas"), encoding="utf-8")
    app.connect("autodoc-skip-member", skip_member)
    app.connect("html-page-context", break_page, priority=900)  # after the theme's own
