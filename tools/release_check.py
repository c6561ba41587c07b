"""Check that this commit may be released: exit 1 and every reason where it may not.

The version stands in `medembed/__init__.py` alone. The commit's tag has to be `v` and that version,
`CHANGELOG.md` has to describe it without "(unreleased)", and nothing may be uncommitted.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSION = re.compile(r'^__version__ = "([^"]+)"$', re.MULTILINE)


def find_problems(root: Path) -> Iterator[str]:
    """Yield what is in the way of a release of the checkout's commit, a line each."""
    found = VERSION.search((root / "medembed" / "__init__.py").read_text())
    if found is None:
        yield 'medembed/__init__.py has no line `__version__ = "…"`.'
        return
    version = found[1]
    tags = _git(root, "tag", "--points-at", "HEAD").split()
    if f"v{version}" not in tags:
        what = f"the tags {', '.join(tags)}" if tags else "no tag"
        yield f"the version is {version} and this commit has {what}: git tag v{version}"
    if f"## {version}" not in (root / "CHANGELOG.md").read_text().splitlines():
        yield f"CHANGELOG.md has no line `## {version}`, without (unreleased) behind it."
    if _git(root, "status", "--porcelain"):
        yield "files are not committed: git status lists them."


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit("\n".join(find_problems(ROOT)) or None)
