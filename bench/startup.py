"""Time `medembed --help` against a bare `import click`, alternating, as whole processes.

    .venv/bin/python bench/startup.py --out bench/results/startup.json

Writes both medians in seconds and `ratios.help_vs_import_click`.
"""

import argparse
import statistics
import sys
from pathlib import Path

from measuring import alternate, time_command, write_results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--out", type=Path, default=Path("bench/results/startup.json"))
    arguments = parser.parse_args()
    medembed = Path(sys.executable).with_name("medembed")
    seconds = alternate(
        {
            "medembed --help": lambda: time_command([str(medembed), "--help"]),
            "import click": lambda: time_command([sys.executable, "-c", "import click"]),
        },
        arguments.runs,
    )
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    write_results(
        arguments.out,
        {"seconds": seconds, "ratios": {"help_vs_import_click": statistics.median(ratios)}},
    )


if __name__ == "__main__":
    main()
