"""README and the pages of the documentation that people write; others are made by `make docs`."""

from pathlib import Path

__all__ = ["DOCS", "PAGES", "README", "ROOT"]

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
