"""The table of what was tried to break medembed says what the suite runs."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parent
ROW = re.compile(r"^\| .* \| `(test_\w+\.py)` \| ([\d,]+) \| .* \|$", re.MULTILINE)


def test_the_table_counts_the_cases_that_the_suite_runs() -> None:
    text = (TESTS.parent / "docs" / "robustness.md").read_text(encoding="utf-8")
    told = {name: int(number.replace(",", "")) for name, number in ROW.findall(text)}
    assert len(told) == text.count("| `test_")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *(str(TESTS / name) for name in told)],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if "::" in line]
    found = Counter(line.partition("::")[0].rpartition("/")[2] for line in lines)
    assert told == dict(found), done.stderr
