"""Print the lowest release of each dependency that `pyproject.toml` permits, as pip constraints.

Only what the project names itself is held to its lowest release; what those need in turn is pip's
choice. torch is left out: the Makefile chooses its build.
"""

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

CHOSEN_ELSEWHERE = {"torch", "medembed"}


def lowest_versions(root: Path) -> Iterator[str]:
    """Yield `name==version` for each dependency of the project, those of its extras too."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project.get("optional-dependencies", {}).values()]
    wishes = (Requirement(line) for group in groups for line in group)
    lowest = {wish.name: _bound(wish) for wish in wishes if wish.name not in CHOSEN_ELSEWHERE}
    yield from (f"{name}=={version}" for name, version in sorted(lowest.items()))


def _bound(wish: Requirement) -> str:
    for part in wish.specifier:
        if part.operator == ">=":
            return part.version
    sys.exit(f"{wish} names no lowest version. Write it in pyproject.toml as {wish.name}>=….")


if __name__ == "__main__":
    print("\n".join(lowest_versions(Path(__file__).parents[1])))
