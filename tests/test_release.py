"""What a release is: one version, a source distribution with its tests, lowest dependencies."""

import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from shutil import which

import pytest
from packaging.requirements import Requirement

import medembed
from tools import lowest_versions, release_check

ROOT = Path(__file__).parents[1]

in_git = pytest.mark.skipif(
    which("git") is None or not (ROOT / ".git").exists(), reason="this is no checkout of git"
)
EXTRA = re.compile(r"medembed\[([\w,]+)\]")


def git(root: Path, *arguments: str) -> str:
    who = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
    command = ["git", "-C", str(root), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository whose only commit may be released as 1.2.0."""
    (tmp_path / "medembed").mkdir()
    (tmp_path / "medembed" / "__init__.py").write_text('x = 1\n__version__ = "1.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changes\n\n## 1.2.0\n\nMuch.\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "All")
    git(tmp_path, "tag", "v1.2.0")
    return tmp_path


def problems(root: Path) -> str:
    return "\n".join(release_check.find_problems(root))


@pytest.mark.skipif(which("git") is None, reason="git is not installed")
def test_a_release_has_one_version_in_code_tag_and_changes(checkout: Path) -> None:
    assert problems(checkout) == ""
    (checkout / "CHANGELOG.md").write_text("# Changes\n\n## 1.2.0 (unreleased)\n")
    assert "no line `## 1.2.0`" in problems(checkout)
    assert "not committed" in problems(checkout)
    (checkout / "medembed" / "__init__.py").write_text('__version__ = "1.3.0"\n')
    git(checkout, "commit", "-q", "-a", "-m", "More")
    assert "this commit has no tag: git tag v1.3.0" in problems(checkout)
    git(checkout, "tag", "v1.2.1")
    assert "this commit has the tags v1.2.1" in problems(checkout)


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["hatch"]["version"]["path"] == "medembed/__init__.py"
    assert release_check.VERSION.search(Path(medembed.__file__).read_text())
    assert "version:" not in (ROOT / "CITATION.cff").read_text().replace("cff-version:", "")


@in_git
def test_the_source_distribution_holds_every_file_that_git_has(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [archive] = tmp_path.iterdir()
    with tarfile.open(archive) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    committed = set(git(ROOT, "ls-files", "-z").rstrip("\0").split("\0"))
    assert packed - committed <= {"PKG-INFO"}
    assert committed <= packed


def test_the_lowest_releases_are_those_of_all_requirements(tmp_path: Path) -> None:
    lowest = dict(line.split("==") for line in lowest_versions.lowest_versions(ROOT))
    assert {"numpy", "transformers", "ray", "pytest"} <= set(lowest)
    assert not {"torch", "medembed"} & set(lowest)
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()[1:]
    )
    for name, version in {name.lower(): version for name, version in pinned.items()}.items():
        if low := {n.lower(): v for n, v in lowest.items()}.get(name):
            assert Requirement(f"{name}>={low}").specifier.contains(version), name
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["numpy<3"]\n')
    with pytest.raises(SystemExit, match="numpy<3 names no lowest version"):
        list(lowest_versions.lowest_versions(tmp_path))


def test_every_extra_that_is_named_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    sources = [*(ROOT / "medembed").rglob("*.py"), *ROOT.glob("*.md"), ROOT / "pyproject.toml"]
    named = {
        extra
        for source in sources
        for group in EXTRA.findall(source.read_text(encoding="utf-8"))
        for extra in group.split(",")
    }
    assert named >= {"encoders", "dicom", "lora", "ray"}
    assert named <= extras
