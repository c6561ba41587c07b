"""The table of what was tried to break medembed says what the suite runs."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parent
ROW = re.compile(r"^\| .* \| `(test_\w+\.py)` \| ([\d,]+) \| .* \|$", re.MULTILINE)


def count_cases(names: list[str]) -> Counter[str]:
    """Collect test files in another process."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *(str(path) for name in names for path in TESTS.rglob(name))],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "::" in line]
    return Counter(line.partition("::")[0].rpartition("/")[2] for line in lines)


def test_the_table_counts_the_cases_that_the_suite_runs(collected: Counter[str]) -> None:
    text = (TESTS.parent / "docs" / "robustness.md").read_text(encoding="utf-8")
    told = {name: int(number.replace(",", "")) for name, number in ROW.findall(text)}
    assert len(told) == text.count("| `test_")
    found = {name: collected[name] for name in told if name in collected}
    if lacking := [name for name in told if name not in found]:  # it takes as long as their imports
        found |= count_cases(lacking)
    assert told == found
