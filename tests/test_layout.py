"""No circle of imports, a light start-up, listed names, lengths of modules, and how tests lie.

The floors and the two halves are contracts in `pyproject.toml`, which `make lint` checks.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import medembed

PACKAGE = Path(medembed.__file__).parent
TESTS = Path(__file__).parent

HEAVY = (
    *("torch", "transformers", "sklearn", "lightgbm", "pandas"),
    *("numpy", "h5py", "rich", "matplotlib", "pydantic"),
)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def imported_modules(path: Path) -> set[str]:
    """Return every `medembed` module that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    own = {name for name in found if name.startswith("medembed.")}
    return own - {"medembed.__version__"}


MODULES = {module_name(path): imported_modules(path) for path in sorted(PACKAGE.rglob("*.py"))}


def reachable(name: str) -> set[str]:
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        for found in MODULES.get(waiting.pop(), set()):
            if found in MODULES and found not in seen:
                seen.add(found)
                waiting.append(found)
    return seen


@pytest.mark.parametrize("name", MODULES)
def test_no_module_imports_itself_in_a_circle(name: str) -> None:
    assert name not in reachable(name)


def test_the_command_starts_without_heavy_libraries() -> None:
    code = f"import medembed.cli, sys; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_listed(name: str) -> None:
    tree = ast.parse((PACKAGE.parent / Path(*name.split("."))).with_suffix(".py").read_text())
    listed = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id == "__all__"
    ]
    if name.rsplit(".", 1)[-1] in {"__init__", "__main__", "cli"}:
        return
    assert listed, f"{name} has no __all__"
    defined = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    assert defined <= set(listed[0]), f"not in __all__ of {name}: {defined - set(listed[0])}"


def test_no_module_takes_a_public_name_from_the_top() -> None:
    """It would import upwards, past the floors."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "medembed":
                taken = {alias.name for alias in node.names} & set(medembed.__all__)
                assert taken <= {"__version__"}, f"{path} imports {taken} from medembed"


def test_long_modules_are_noticed() -> None:
    long = {n: len(p.read_text().splitlines()) for n, p in by_path().items()}
    assert not {n: lines for n, lines in long.items() if lines > 600}


def by_path() -> dict[str, Path]:
    return {module_name(path): path for path in PACKAGE.rglob("*.py")}


def test_no_test_module_is_imported_by_another() -> None:
    """What several of them need is in a helper module; scripts in their texts count as well."""
    for path in TESTS.rglob("*.py"):
        imported = re.findall(r"\b(?:from|import) (test_\w+)", path.read_text(encoding="utf-8"))
        assert not imported, f"{path} imports {imported}: move what it needs to a helper module"


def test_tests_follow_the_tree_of_the_package() -> None:
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")}
    strangers = {folder for folder in folders if not (PACKAGE / folder / "__init__.py").is_file()}
    assert strangers == {Path("bench")}, f"no folder of medembed: {strangers - {Path('bench')}}"
