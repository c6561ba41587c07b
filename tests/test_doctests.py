"""The examples in docstrings print what they say; those that need a GPU or files are skipped."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import medembed

PACKAGE = Path(medembed.__file__).parent
MODULES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_print_what_they_say(name: str) -> None:
    found = doctest.testmod(import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0, f"pytest --doctest-modules shows which of {name}"


def test_the_scores_and_thresholds_have_examples() -> None:
    assert {"medembed.evaluation.scores", "medembed.evaluation.thresholds"} <= set(MODULES)
