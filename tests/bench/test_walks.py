"""The profiler of the walks counts the modules that calls enter, and none that is only imported."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import walks  # noqa: E402

MODULES = {
    "__init__": "",
    "__main__": "from medembed import a\na.enter()\n",
    "a": "import threading\nfrom medembed import b, idle\n\n\ndef enter():\n"
    "    thread = threading.Thread(target=b.work)\n    thread.start()\n    thread.join()\n"
    "    b.work()\n",
    "b": "def work():\n    return sorted([2, 1], key=lambda n: n)\n",
    "idle": "def prepare():\n    return 1\n\n\nprepare()\n",
}


def test_calls_are_counted_in_threads_too_and_imports_are_not(tmp_path: Path) -> None:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(walks.PROFILER)
    (tmp_path / "tree" / "medembed").mkdir(parents=True)
    for name, text in MODULES.items():
        (tmp_path / "tree" / "medembed" / f"{name}.py").write_text(text)
    log = tmp_path / "log"
    own = {"PYTHONPATH": str(tmp_path / "hook"), "WALKS_LOG": str(log)}
    environment = {**os.environ, **own, "WALKS_PACKAGE": str(tmp_path / "tree")}
    subprocess.run([sys.executable, "-m", "medembed"], check=True, env=environment, cwd=tmp_path)
    found = walks.read_log(log)
    assert found["modules"] == ["__main__.py", "a.py", "b.py"]
    assert (found["n_modules"], found["n_crossings"]) == (3, 2)
