"""README and the pages of the documentation that people write; others are made by `make docs`."""

import re
from pathlib import Path

__all__ = ["DOCS", "PAGES", "README", "ROOT", "awaited_commands"]

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
_MADE = {DOCS / "build", DOCS / "reference" / "api", DOCS / "reference" / "cli"}
PAGES = [
    README,
    *sorted(
        path
        for path in DOCS.rglob("*.md")
        if not _MADE & set(path.parents) and path != DOCS / "reference" / "schemas.md"
    ),
]


def awaited_commands() -> set[str]:
    """Return the commands that pages describe before they are there, by a mark above a block."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    return {name for text in texts for name in re.findall(r"<!-- needs: (.+?) -->", text)}
