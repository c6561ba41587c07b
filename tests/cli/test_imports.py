"""What commands import: libraries that a run does not use cost seconds on a laptop."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from made_sweeps import command, make_data

SCRIPT = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from medembed.cli import main
said = io.StringIO()
try:
    with redirect_stdout(said), redirect_stderr(said):
        main(sys.argv[1:])
except SystemExit as end:
    assert end.code == 0, said.getvalue()
print(json.dumps(sorted(sys.modules)))
"""


def modules_of(*arguments: Any) -> set[str]:
    """Return the modules that a process has imported once it has run a command."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("imports")
    data = make_data(home / "data")
    words = command(data, home / "run", "--configs", "1", "--heads", "logistic")
    found = modules_of(*words)
    assert not found & {"transformers", "matplotlib", "medembed.encoders"}
    return home / "run"


def test_compare_imports_neither_training_nor_drawing(swept: Path) -> None:
    found = modules_of("compare", swept)
    unused = {"torch", "transformers", "sklearn", "lightgbm", "matplotlib", "scipy.stats", "PIL"}
    assert not found & (unused | {"medembed.dataset.recipes.build", "medembed.heads.base"})


def test_report_imports_no_training(swept: Path, tmp_path: Path) -> None:
    found = modules_of("report", swept, "-o", tmp_path / "page")
    unused = {"torch", "transformers", "sklearn", "lightgbm", "scipy.stats"}
    unused |= {"matplotlib.pyplot", "matplotlib.backends.backend_pdf"}
    assert "matplotlib.backends.backend_svg" in found
    assert not found & unused
