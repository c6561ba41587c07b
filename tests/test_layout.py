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


UNTYPED = re.compile(r"(?:dict|Mapping)\[str, Any\]|AnyTable")
OPEN_TABLES = {
    # the parameters of any head, and what a trial says of its epochs
    "medembed.results.alignment.ScoredHead",
    "medembed.results.comparison_schema.ComparedHead",
    "medembed.results.run_schema.LeaderboardEntry",
    "medembed.results.run_schema.TrialRecord",
    # a cache's spec on a card, whose encoder may record what it likes
    "medembed.cache.spec.CacheSpec.from_dict",
    "medembed.results.model_card.Card",
    "medembed.results.model_card.CardDocument",
    "medembed.results.model_readme.NewCard",
    # documents that are printed, or parsed where they are read
    "medembed.cache.store.Cache.card",
    "medembed.evaluation.drift.reference.measure_drift",
    "medembed.report.external.render_external",
    "medembed.report.shortcuts.tabulate_shortcuts",
    "medembed.report.shortcuts.write_shortcuts",
    "medembed.results.comparison_schema.PointDocument",
    "medembed.results.run_schema.RunInfo",
    "medembed.results.runs.Run.scores",
}
"""The only public names that take, hold or return a table of anything and serve other folders."""


def folder_of(name: str) -> str:
    return name.split(".")[1]


def names_across_folders() -> set[tuple[str, str]]:
    """Return each module and name that is imported by a module of another folder."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in MODULES:
                there, here = str(node.module), module_name(path)
                if folder_of(there) != folder_of(here):
                    found |= {(there, alias.name) for alias in node.names}
    return found


def untyped(name: str, node: ast.stmt) -> list[str]:
    """Return `name` and the methods below it that have an annotation of a table of anything."""
    if isinstance(node, ast.FunctionDef):
        own = node.args
        given = [*own.posonlyargs, *own.args, *own.kwonlyargs, own.vararg, own.kwarg]
        notes = [argument.annotation for argument in given if argument] + [node.returns]
        return [name] if any(UNTYPED.search(ast.unparse(note)) for note in notes if note) else []
    if not isinstance(node, ast.ClassDef):
        return []
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
    methods = [
        part
        for part in node.body
        if isinstance(part, ast.FunctionDef)
        and (not part.name.startswith("_") or part.name == "__init__")
    ]
    found = [name] if any(UNTYPED.search(ast.unparse(f.annotation)) for f in fields) else []
    return found + [own for m in methods for own in untyped(f"{name}.{m.name}", m)]


def test_no_table_of_anything_crosses_a_folders_border() -> None:
    """Give it a type: a TypedDict, a record, or objects where nobody but JSON reads the values."""
    across, found = names_across_folders(), set()
    for module, path in by_path().items():
        for node in ast.parse(path.read_text()).body:
            name = getattr(node, "name", "")
            if (module, name) in across:
                found |= set(untyped(f"{module}.{name}", node))
    assert found == OPEN_TABLES
