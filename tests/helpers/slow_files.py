"""A plain file that decoder processes read only when they are told to, as from a slow disk."""

import re
from pathlib import Path

import pytest

__all__ = ["begun", "hold", "release"]

# What decoders import at their start.
HOOK = """
import os, time
from pathlib import Path
from medembed.images import load

read_plain = load.read_plain

def read_later(path, **options):
    if str(path) == {held!r}:
        Path(f"{{path}}.begun-{{os.getpid()}}").touch()
        while not Path(f"{{path}}.go").exists():
            time.sleep(0.005)
    return read_plain(path, **options)

load.read_plain = read_later
"""


def hold(path: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let decoders that start from now on wait for `release` when they read this file."""
    site.mkdir()
    (site / "sitecustomize.py").write_text(HOOK.format(held=str(path.resolve())))
    monkeypatch.syspath_prepend(str(site))


def begun(path: Path) -> set[int]:
    """Give the processes that have begun to read it."""
    found = (re.search(r"\.begun-([0-9]+)$", p.name) for p in path.parent.glob(f"{path.name}.*"))
    return {int(match[1]) for match in found if match}


def release(path: Path) -> None:
    """Let it be read."""
    Path(f"{path}.go").touch()
